"""From sums per document to estimates with intervals: numbers only, no models."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.audit.sums import CorpusSums
from palimpsest.stats import (
    Resampler,
    exchange_p,
    minimum_detectable,
    percentile_interval,
    weighted_mean,
)


@dataclass(frozen=True)
class Settings:
    """How intervals are made.

    Attributes:
        k: The primary list length.
        pooled: Legacy mode: counts |S_b ∩ S_f| pooled over tokens instead of document means of o_k.
        confidence: Coverage.
        resamples: Bootstrap resamples of documents.
        seed: Of every resample.
    """

    k: int
    pooled: bool
    confidence: float
    resamples: int
    seed: int


class Curve(NamedTuple):
    """Intersection means of one corpus: estimates, their resamples and the values of single documents."""

    mean: Float[NDArray, " k"]
    samples: Float[NDArray, "resamples k"]
    documents: Float[NDArray, "documents k"]


class CorpusEstimates:
    """Estimates of one corpus; every quantity uses the same resamples of its documents."""

    def __init__(self, sums: CorpusSums, settings: Settings, stream: int) -> None:
        self.sums, self.settings = sums, settings
        self._draws = Resampler(len(sums.documents), settings.resamples, [settings.seed, stream])
        self.curve = self._curve()

    def interval(self, samples: NDArray) -> tuple[Any, Any]:
        """Interval of resampled figures of this corpus."""
        return percentile_interval(samples, self.settings.confidence, len(self.sums.documents))

    def total(self, column: str) -> float:
        """Sum of a column over all documents."""
        return float(self.sums.columns[column].sum())

    def mean(self, column: str, per: str, minus: str | None = None) -> tuple[float, tuple[float, float]]:
        """Mean of (column - minus) per `per`, over documents (over tokens when pooled), with its interval."""
        columns = self.sums.columns
        numerator = columns[column] - (columns[minus] if minus else 0.0)
        if self.settings.pooled:
            return self._ratio(numerator, columns[per])
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.where(columns[per] > 0, numerator / columns[per], np.nan)
        if not np.isfinite(values).any():
            return float("nan"), (float("nan"), float("nan"))
        return float(np.nanmean(values)), self._interval(self._means(values))

    def r2_delta(self) -> tuple[float, tuple[float, float]]:
        """1 - E‖Δh - Δĥ‖² / E‖Δh‖² over tokens, with its interval over documents."""
        ratio, (lo, hi) = self._ratio(self.sums.columns["delta_residual"], self.sums.columns["delta_squares"])
        return 1 - ratio, (1 - hi, 1 - lo)

    def fve(self, side: str) -> float:
        """Fraction of variance explained: 1 - Σ‖h - ĥ‖² / Σ‖h - mean h‖²."""
        tokens = self.total("tokens")
        total, squares = self.sums.moments[f"sum_{side}"], float(self.sums.moments[f"squares_{side}"])
        variance = squares - float((total**2).sum()) / tokens
        return 1 - self.total(f"residual_{side}") / variance if variance > 0 else float("nan")

    def _curve(self) -> Curve:
        sums, columns = self.sums, self.sums.columns
        if self.settings.pooled:
            tokens = columns["tokens"]
            samples = self._draws.apply(lambda w: (w @ sums.counts) / (w @ tokens)[:, None])
            return Curve(sums.counts.sum(0) / tokens.sum(), samples, sums.counts / tokens[:, None])
        with np.errstate(invalid="ignore", divide="ignore"):
            documents = sums.overlap / np.where(columns["listed"] > 0, columns["listed"], np.nan)[:, None]
        mean = (
            np.nanmean(documents, 0) if np.isfinite(documents).any() else np.full(documents.shape[1], np.nan)
        )
        return Curve(mean, self._means(documents), documents)

    def _ratio(self, numerator: NDArray, denominator: NDArray) -> tuple[float, tuple[float, float]]:
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = self._draws.apply(lambda w: (w @ numerator) / (w @ denominator))
            value = float(numerator.sum() / denominator.sum())
        return value, self._interval(samples)

    def _interval(self, samples: NDArray) -> tuple[float, float]:
        lo, hi = self.interval(samples)
        return float(lo), float(hi)

    def _means(self, values: NDArray) -> NDArray:
        return self._draws.apply(lambda w: weighted_mean(w, values))


class Comparison(NamedTuple):
    """A task corpus against the general one: estimates per k `[k]` and their intervals `[2, k]`."""

    idr: NDArray
    idr_ci: NDArray
    idr_abs: NDArray
    idr_abs_ci: NDArray
    churn_ratio: NDArray
    churn_ratio_ci: NDArray
    minimum_detectable: NDArray


def compare(task: CorpusEstimates, general: CorpusEstimates) -> Comparison:
    """IDR_rel, IDR_abs and churn ratio for every k; the two sets of documents are resampled independently."""
    ks = np.arange(1, len(task.curve.mean) + 1)
    scale = ks if task.settings.pooled else np.ones_like(ks)

    def figures(mine: NDArray, other: NDArray) -> tuple[NDArray, NDArray, NDArray]:
        with np.errstate(invalid="ignore", divide="ignore"):
            lost, lost_general = scale - mine, scale - other
            churn = np.where(lost_general > 0, lost / lost_general, np.nan)
            idr = 1 - np.where(other > 0, mine / other, np.nan)
            return idr, (other - mine) / scale, churn

    estimates = figures(task.curve.mean, general.curve.mean)
    samples = figures(task.curve.samples, general.curve.samples)
    fewer = min(task, general, key=lambda one: len(one.sums.documents))
    intervals = [np.stack(fewer.interval(sample)) for sample in samples]
    with np.errstate(invalid="ignore"):
        error = samples[0].std(axis=0, ddof=1)
    return Comparison(
        estimates[0],
        intervals[0],
        estimates[1],
        intervals[1],
        estimates[2],
        intervals[2],
        np.array([minimum_detectable(one) for one in error]),
    )


def exchange(task: CorpusEstimates, general: CorpusEstimates) -> float:
    """P of a permutation of documents between the two corpora, at the primary k."""
    column = task.settings.k - 1
    rng = np.random.default_rng([task.settings.seed, 7])
    a, b = (one.curve.documents[:, column] for one in (task, general))
    return exchange_p(a, b, task.settings.resamples, rng)


def curve_rows(
    name: str, role: str, estimates: CorpusEstimates, against: Comparison | None
) -> list[dict[str, Any]]:
    """Rows of `curve.parquet` for one corpus."""
    lo, hi = estimates.interval(estimates.curve.samples)
    rows = []
    for i, mean in enumerate(estimates.curve.mean):
        row = {"dataset": name, "role": role, "k": i + 1, "intersection_mean": mean, "lo": lo[i], "hi": hi[i]}
        columns = ("idr", "idr_lo", "idr_hi", "idr_abs", "churn_ratio")
        values = (
            (against.idr[i], *against.idr_ci[:, i], against.idr_abs[i], against.churn_ratio[i])
            if against is not None
            else (None,) * len(columns)
        )
        rows.append(row | dict(zip(columns, values, strict=True)))
    return rows
