"""Intervals, tests and multiplicity, on numpy and scipy; the unit of every one of them is the document."""

from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

CHUNK_WEIGHTS = 1 << 19
"""Bootstrap weights that exist at once."""


def resample_weights(n: int, resamples: int, rng: np.random.Generator) -> Float[NDArray, "resamples n"]:
    """Bootstrap weights of `n` documents: how often each is drawn.

    Weights instead of indices, so that one draw serves every quantity of the same documents (their pairing is
    kept) and a resampled mean is one matrix product. Whole numbers, so that equal values give exactly their mean.
    """
    return rng.multinomial(n, np.full(n, 1.0 / n), size=resamples).astype(float)


class Resampler:
    """Bootstrap draws of `n` documents, made again for each use instead of kept: memory does not grow with them.

    Every use sees the same draws, so quantities of the same documents stay paired.

    Args:
        n: Documents.
        resamples: Draws.
        seed: Whatever `numpy.random.default_rng` takes.
    """

    def __init__(self, n: int, resamples: int, seed: Any) -> None:
        self.n, self.resamples, self._seed = n, resamples, seed

    def apply(self, statistic: Callable[[NDArray], NDArray]) -> Float[NDArray, "resamples ..."]:
        """`statistic(weights)` of all draws, computed for a few thousand kilobytes of weights at a time."""
        rng = np.random.default_rng(self._seed)
        chunk = max(1, CHUNK_WEIGHTS // max(1, self.n))
        starts = range(0, self.resamples, chunk)
        sizes = (min(chunk, self.resamples - start) for start in starts)
        return np.concatenate([statistic(resample_weights(self.n, size, rng)) for size in sizes])


def weighted_mean(
    weights: Float[NDArray, "resamples n"], values: Float[NDArray, "n ..."]
) -> Float[NDArray, "resamples ..."]:
    """Resampled means over the documents that have a value (NaN marks one that has none)."""
    known = np.isfinite(values)
    if known.all():
        drawn = weights.sum(axis=1).reshape(-1, *[1] * (values.ndim - 1))
        return np.tensordot(weights, values, axes=1) / drawn
    total = np.tensordot(weights, np.where(known, values, 0.0), axes=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.tensordot(weights, known.astype(float), axes=1)


def percentile_interval(
    samples: Float[NDArray, "resamples ..."], confidence: float = 0.95, documents: int | None = None
) -> tuple[NDArray, NDArray]:
    """Percentile bootstrap interval along the first axis (Efron 1979); NaN where every resample is NaN.

    Given the number of documents, the percentiles are taken further out, by as much as a t interval with the
    unbiased variance exceeds a normal one with the biased variance: plain percentiles of few documents are too
    narrow (expanded percentile interval, Hesterberg 2015, https://arxiv.org/abs/1411.5279).
    """
    tail = 50.0 * (1.0 - confidence)
    if documents is not None and documents > 1:
        reach = np.sqrt(documents / (documents - 1)) * stats.t.ppf(0.5 + confidence / 2, documents - 1)
        tail = 100.0 * float(stats.norm.sf(reach))
    with np.errstate(invalid="ignore"):
        known = np.isfinite(samples)
        if known.all():
            lo, hi = np.percentile(samples, [tail, 100.0 - tail], axis=0)
        else:
            filled = np.where(known.any(axis=0), samples, 0.0)
            lo, hi = np.nanpercentile(filled, [tail, 100.0 - tail], axis=0)
            lo, hi = (np.where(known.any(axis=0), bound, np.nan) for bound in (lo, hi))
    return np.asarray(lo), np.asarray(hi)


def exchange_p(
    a: Float[NDArray, " n"], b: Float[NDArray, " m"], resamples: int, rng: np.random.Generator
) -> float:
    """Two-sided permutation p of a difference in document means between two sets of documents.

    It answers "do these two sets of text behave differently", which plain fragility of one text also causes.
    """
    a, b = a[np.isfinite(a)], b[np.isfinite(b)]
    if min(len(a), len(b)) < 2:
        return float("nan")

    def difference(x: NDArray, y: NDArray, axis: int = -1) -> NDArray:
        return x.mean(axis=axis) - y.mean(axis=axis)

    test = stats.permutation_test(
        (a, b),
        difference,
        permutation_type="independent",
        vectorized=True,
        n_resamples=resamples,
        batch=max(1, 2_000_000 // (len(a) + len(b))),
        rng=rng,
    )
    return float(test.pvalue)


def mean_t(
    total: NDArray, squares: NDArray, n: int, confidence: float = 0.95
) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """One-sample t over `n` documents from their sum and sum of squares: mean, lo, hi and two-sided p.

    A column without spread has its mean as its interval; its p is 1 where that is 0, else 0.
    """
    mean = total / max(n, 1)
    if n < 2:
        return mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan), np.full_like(mean, np.nan)
    variance = np.maximum(squares / n - mean**2, 0.0) * n / (n - 1)
    error = np.sqrt(variance / n)
    with np.errstate(invalid="ignore", divide="ignore"):
        p = 2.0 * stats.t.sf(np.abs(mean) / error, n - 1)
    p = np.where(error > 0, p, np.where(mean == 0, 1.0, 0.0))
    half = error * stats.t.ppf(0.5 + confidence / 2, n - 1)
    return mean, mean - half, mean + half, p


def benjamini_hochberg(p: Float[NDArray, " n"]) -> Float[NDArray, " n"]:
    """False-discovery-rate adjusted p-values (Benjamini & Hochberg 1995); NaN stays NaN and is not counted."""
    q = np.full(p.shape, np.nan)
    known = np.isfinite(p)
    if known.any():
        q[known] = stats.false_discovery_control(p[known], method="bh")
    return q


def holm(p: Float[NDArray, " n"]) -> Float[NDArray, " n"]:
    """Family-wise adjusted p-values, whatever their dependence (Holm 1979); NaN stays NaN and is not counted."""
    adjusted = np.full(p.shape, np.nan)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    steps = np.arange(len(order), 0, -1)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * steps), 1.0)
    return adjusted


def binomial_interval(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Exact interval of a share of which `k` of `n` were seen (Clopper & Pearson 1934); all of [0, 1] when n is 0."""
    if n == 0:
        return 0.0, 1.0
    found = stats.binomtest(k, n).proportion_ci(confidence, method="exact")
    return float(found.low), float(found.high)


def minimum_detectable(standard_error: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Smallest true effect that a two-sided normal test at `alpha` finds with probability `power`."""
    return float((stats.norm.ppf(1 - alpha / 2) + stats.norm.ppf(power)) * standard_error)
