"""Numbers only: orders of latents, shares of an effect with intervals, agreement of two adapters with its null."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.stats import rankdata

from palimpsest.findings import Range
from palimpsest.stats import Resampler, percentile_interval
from palimpsest.tune.explain.result import Agreement, Ratio, Specificity

ROUNDING = 1e-6
"""Part of a loss below which a difference is arithmetic, however surely it differs from 0."""

PRECISION = 0.05
"""Part of n to which a bisection narrows it down, once n is large."""


class Settings(NamedTuple):
    """Of intervals and controls."""

    confidence: float = 0.95
    resamples: int = 1000
    permutations: int = 200
    seed: int = 0


def strongest_first(
    strength: Float[NDArray, " latents"], second: Float[NDArray, " latents"] | None = None
) -> Int[NDArray, " latents"]:
    """Latents from strong to weak; ties by a second strength, then by number."""
    place = np.arange(len(strength))
    return np.lexsort((place, -(place * 0.0 if second is None else second), -strength))


def holders(effect: Float[NDArray, " latents"], share: float) -> int:
    """The fewest latents that together hold a share of the whole; 0 where there is no effect."""
    total = effect.sum()
    if not total > 0:
        return 0
    held = np.cumsum(np.sort(effect)[::-1])
    # A sum of all of them can miss the total by its last bit.
    return int(np.searchsorted(held, share * total * (1 - 1e-12)) + 1)


def grid(largest: int, points: int) -> list[int]:
    """Whole numbers from 1 to `largest`, evenly spaced on a logarithmic axis."""
    if largest < 1:
        return []
    return sorted({int(n) for n in np.geomspace(1, largest, points).round()} | {largest})


def smallest(share: Callable[[int], float], numbers: Sequence[int], wanted: float) -> int | None:
    """The smallest n with a share of at least `wanted`: the first of `numbers`, then by bisection below it.

    Shares are not monotonous where latents hurt; what is found is the first crossing that the numbers see.

    Args:
        share: Measures one n; called once for each.
        numbers: Ascending.
        wanted: The share.
    """
    # The whole adapter has a share of 1, but for rounding.
    wanted -= ROUNDING
    below = 0
    for n in numbers:
        if share(n) < wanted:
            below = n
            continue
        while n - below > max(1, int(PRECISION * n)):
            middle = (n + below) // 2
            if share(middle) >= wanted:
                n = middle
            else:
                below = middle
        return n
    return None


class Effect:
    """What an adapter does to the losses of documents, and what share of it something else does.

    Args:
        base: Summed loss of each document without the adapter.
        full: With it.
        units: Predictions of each document, or 1 per pair: what means are over.
        settings: Of the intervals.
    """

    def __init__(
        self,
        base: Float[NDArray, " documents"],
        full: Float[NDArray, " documents"],
        units: Float[NDArray, " documents"],
        settings: Settings,
    ) -> None:
        self.base, self.full, self.units, self._settings = base, full, units, settings
        self._draws = Resampler(len(base), settings.resamples, [settings.seed, 29])
        self.difference = float((base - full).sum() / units.sum())
        self.ci = self._interval(base - full, units)
        rounding = ROUNDING * abs(float(base.sum() / units.sum()))
        self.sized = bool(abs(self.difference) > rounding)
        self.present = bool(self.sized and (self.ci[0] > 0 or self.ci[1] < 0))

    def interval(self, losses: Float[NDArray, " documents"]) -> tuple[float, Range]:
        """Mean of base - losses, with its interval."""
        gain = self.base - losses
        return float(gain.sum() / self.units.sum()), self._interval(gain, self.units)

    def point(self, losses: Float[NDArray, " documents"]) -> float:
        """(L_base - L) / (L_base - L_full), without an interval."""
        return float((self.base - losses).sum() / (self.base - self.full).sum())

    def share(self, losses: Float[NDArray, " documents"]) -> tuple[float, Range] | None:
        """The same with its interval, numerator and denominator drawn together; None where there is no effect."""
        if not self.present:
            return None
        return self.point(losses), self._interval(self.base - losses, self.base - self.full)

    def _interval(self, above: NDArray, below: NDArray) -> Range:
        both = np.stack([above, below], 1)

        def ratio(weights: NDArray) -> NDArray:
            sums = weights @ both
            with np.errstate(invalid="ignore", divide="ignore"):
                return np.where(sums[:, 1] != 0, sums[:, 0] / sums[:, 1], np.nan)

        lo, hi = percentile_interval(self._draws.apply(ratio), self._settings.confidence, len(above))
        return float(lo), float(hi)


def random_orders(candidates: Bool[NDArray, " latents"], count: int, seed: int) -> Iterator[NDArray]:
    """Orders of all latents: the candidates shuffled, then the rest shuffled."""
    for number in range(count):
        rng = np.random.default_rng([seed, 31, number])
        first, rest = np.flatnonzero(candidates), np.flatnonzero(~candidates)
        yield np.concatenate([rng.permutation(first), rng.permutation(rest)])


def per_value(
    effect: Float[NDArray, " latents"],
    values: Float[NDArray, " latents"],
    activity: Float[NDArray, " latents"],
) -> Float[NDArray, " latents"]:
    """What a value of 1 would do in each latent: effect / |value|, which shuffled values are multiplied with.

    Where a value is 0 it is guessed from the latent's activity (mean activation times decoder norm), in the ratio
    that the others have.
    """
    size = np.abs(values)
    known = (size > 0) & (effect > 0)
    found = np.divide(effect, size, out=np.zeros_like(effect), where=known)
    usable = known & (activity > 0)
    ratio = float(np.median(found[usable] / activity[usable])) if usable.any() else 1.0
    return np.where(size > 0, found, activity * ratio)


def agreement(
    values: tuple[NDArray, NDArray],
    effects: tuple[NDArray, NDArray],
    firing: Bool[NDArray, " latents"],
    top_n: int,
    settings: Settings,
    *,
    adapter: str = "",
    unit: Float[NDArray, " latents"] | None = None,
) -> Agreement:
    """How alike two adapters are on the latents that fire in both, beside what shuffled values give.

    Args:
        values: Of both, per latent.
        effects: Of both.
        firing: Latents to compare on.
        top_n: Size of the sets of strongest latents.
        settings: Number of shuffles, confidence, seed.
        adapter: Name of the second.
        unit: Effect of a value of 1 in the second, for the null of the overlap.
    """
    a, b = (one[firing].astype(float) for one in values)
    top_n = min(top_n, len(a))
    strong = strongest_first(effects[0][firing])[:top_n]
    second = effects[1][firing]
    weight = np.ones_like(b) if unit is None else unit[firing]
    ranks = rankdata(a) - (len(a) + 1) / 2, rankdata(b) - (len(b) + 1) / 2
    cosine, spearman, overlap = [], [], []
    rng = np.random.default_rng([settings.seed, 37])
    for _ in range(settings.permutations if len(a) > 1 else 0):
        place = rng.permutation(len(b))
        cosine.append(_cosine(a, b[place]))
        spearman.append(_cosine(ranks[0], ranks[1][place]))
        overlap.append(_overlap(strong, weight * np.abs(b[place]), top_n))
    return Agreement(
        adapter=adapter,
        latents=len(a),
        cosine=_number(_cosine(a, b)),
        spearman=_number(_cosine(*ranks)),
        top_n=top_n,
        overlap=_overlap(strong, second, top_n),
        null_cosine=_middle(cosine, settings.confidence),
        null_spearman=_middle(spearman, settings.confidence),
        null_overlap=_middle(overlap, settings.confidence),
    )


def _cosine(a: NDArray, b: NDArray) -> float:
    size = float(np.linalg.norm(a) * np.linalg.norm(b))
    return float(a @ b) / size if size > 0 else float("nan")


def _overlap(strong: NDArray, effect: NDArray, n: int) -> float:
    return len(np.intersect1d(strong, strongest_first(effect)[:n])) / n if n else 0.0


def _middle(samples: Sequence[float], confidence: float) -> Range | None:
    """The range that holds the middle of samples; None without any number."""
    known = [one for one in samples if np.isfinite(one)]
    if not known:
        return None
    lo, hi = np.percentile(known, [50 * (1 - confidence), 50 * (1 + confidence)])
    return float(lo), float(hi)


def _number(value: float) -> float | None:
    return value if np.isfinite(value) else None


class Activity(NamedTuple):
    """Activation times decoder norm, summed over the edited tokens of groups of documents."""

    sums: Float[NDArray, "groups latents"]
    tokens: Float[NDArray, " groups"]

    @property
    def mean(self) -> Float[NDArray, " latents"]:
        """Per edited token."""
        return self.sums.sum(0) / max(self.tokens.sum(), 1)


def specificity(
    effect: Float[NDArray, " latents"],
    values: Float[NDArray, " latents"],
    unit: Float[NDArray, " latents"],
    firing: Bool[NDArray, " latents"],
    activity: tuple[Activity, Activity],
    n: int,
    settings: Settings,
) -> Specificity | None:
    """Activation on the corpora over general text: of the top latents, of random sets, of shuffled values.

    Args:
        effect: Of the half of the documents that chooses.
        values: Of the latents.
        unit: Effect of a value of 1 there.
        firing: Latents that fire there.
        activity: On the other half of the corpora, and on general text.
        n: Size of the sets.
        settings: Number of sets, confidence, seed.
    """
    candidates = np.flatnonzero(firing)
    n = min(n, len(candidates))
    if n < 1:
        return None
    on_corpus, on_general = (one.mean for one in activity)
    top = strongest_first(effect)[:n]
    rng = np.random.default_rng([settings.seed, 41])
    random, permuted = [], []
    for _ in range(settings.permutations):
        random.append(_ratio(on_corpus, on_general, rng.choice(candidates, n, replace=False)))
        moved = unit[candidates] * np.abs(values[candidates][rng.permutation(len(candidates))])
        permuted.append(_ratio(on_corpus, on_general, candidates[strongest_first(moved)[:n]]))
    own = _ratio(on_corpus, on_general, top)
    above = sum(not one < own for one in permuted)
    return Specificity(
        n=n,
        top=Ratio(_number(own), _ratio_interval(activity, top, settings)),
        random=Ratio(_median(random), _middle(random, 0.95)),
        permuted=Ratio(_median(permuted), _middle(permuted, 0.95)),
        p=(1 + above) / (1 + len(permuted)),
    )


def _ratio(on_corpus: NDArray, on_general: NDArray, latents: NDArray) -> float:
    above, below = float(on_corpus[latents].sum()), float(on_general[latents].sum())
    return above / below if below > 0 else float("inf") if above > 0 else float("nan")


def _median(samples: Sequence[float]) -> float | None:
    known = [one for one in samples if not np.isnan(one)]
    return _number(float(np.median(known))) if known else None


def _ratio_interval(
    activity: tuple[Activity, Activity], latents: NDArray, settings: Settings
) -> Range | None:
    """Both texts' groups of documents drawn again, independently."""
    drawn, groups = [], []
    for number, one in enumerate(activity):
        both = np.stack([one.sums[:, latents].sum(1), one.tokens], 1)[one.tokens > 0].astype(float)
        if len(both) < 2:
            return None
        draws = Resampler(len(both), settings.resamples, [settings.seed, 43, number])
        sums = draws.apply(lambda weights, both=both: weights @ both)
        drawn.append(sums[:, 0] / sums[:, 1])
        groups.append(len(both))
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = np.where(drawn[1] > 0, drawn[0] / drawn[1], np.nan)
    lo, hi = percentile_interval(ratios, settings.confidence, min(groups))
    return (float(lo), float(hi)) if np.isfinite(lo) and np.isfinite(hi) else None
