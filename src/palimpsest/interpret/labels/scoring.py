"""How well a label fits: balanced accuracy on texts that it was not made from.

Source: detection scoring, Paulo, Mallen, Juang, Belrose, arXiv:2410.13928; here one token of each text is in question.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import norm

from palimpsest.interpret.labels.negatives import POSITIVE, RANDOM, SIMILAR
from palimpsest.stats import mean_t


@dataclass(frozen=True)
class Score:
    """How a label did on the texts of a latent.

    Attributes:
        value: Balanced accuracy: mean of the share of positives and of the share of negatives that are told right.
        lo: Its interval …
        hi: … over texts.
        n: Texts that were judged.
        random: Balanced accuracy against random negatives alone.
        similar: Against similar ones alone.
        found: Share of the positives that the label fits.
    """

    value: float | None
    lo: float | None
    hi: float | None
    n: int
    random: float | None
    similar: float | None
    found: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def score(verdicts: Sequence[bool | None], kinds: Sequence[str], confidence: float = 0.95) -> Score:
    """Balanced accuracy of verdicts.

    Args:
        verdicts: Of each text whether the label fits; None is left out.
        kinds: Of each text what it is: positive, random or similar.
        confidence: Coverage of the interval: Wilson's for each share (Wilson 1927), put together by squares (Newcombe
            1998), so that texts that are all told right still give a width.

    Returns:
        The score; its values are None where no positive or no negative was judged.
    """
    right = {kind: [0, 0] for kind in (POSITIVE, RANDOM, SIMILAR)}
    for verdict, kind in zip(verdicts, kinds, strict=True):
        if verdict is not None:
            right[kind][0] += verdict == (kind == POSITIVE)
            right[kind][1] += 1
    positives, negatives = (
        right[POSITIVE],
        [a + b for a, b in zip(right[RANDOM], right[SIMILAR], strict=True)],
    )
    n = positives[1] + negatives[1]
    found = positives[0] / positives[1] if positives[1] else None
    if not positives[1] or not negatives[1]:
        return Score(None, None, None, n, None, None, found)
    value = _balanced(positives, negatives)
    assert value is not None
    (low, high), (low_other, high_other) = (
        wilson(one[0], one[1], confidence) for one in (positives, negatives)
    )
    shares = positives[0] / positives[1], negatives[0] / negatives[1]
    below = math.hypot(shares[0] - low, shares[1] - low_other) / 2
    above = math.hypot(high - shares[0], high_other - shares[1]) / 2
    return Score(
        value,
        max(0.0, value - below),
        min(1.0, value + above),
        n,
        _balanced(positives, right[RANDOM]),
        _balanced(positives, right[SIMILAR]),
        found,
    )


def _balanced(positives: Sequence[int], negatives: Sequence[int]) -> float | None:
    if not positives[1] or not negatives[1]:
        return None
    return (positives[0] / positives[1] + negatives[0] / negatives[1]) / 2


def wilson(k: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a share of which `k` of `n` were seen (Wilson 1927)."""
    z2 = float(norm.ppf(0.5 + confidence / 2)) ** 2
    middle = (k + z2 / 2) / (n + z2)
    half = math.sqrt(z2 * (k * (n - k) / n + z2 / 4)) / (n + z2)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_score(
    values: Sequence[float | None], confidence: float = 0.95, lowest: float = 0.0
) -> dict[str, Any]:
    """Mean over latents with its t interval, from `lowest` to 1: `mean`, `lo`, `hi`, `n`; None where too few."""
    known = np.array([one for one in values if one is not None])
    if len(known) == 0:
        return {"mean": None, "lo": None, "hi": None, "n": 0}
    # Sums of squares about the mean: equal scores must have no spread.
    centre = float(known.mean())
    rest = known - centre
    mean, lo, hi, _ = mean_t(np.array([rest.sum()]), np.array([(rest**2).sum()]), len(known), confidence)
    bounds = [
        None if math.isnan(one[0]) else min(1.0, max(lowest, centre + float(one[0]))) for one in (lo, hi)
    ]
    return {"mean": centre + float(mean[0]), "lo": bounds[0], "hi": bounds[1], "n": len(known)}


def deal_out(latents: Sequence[int], run: int, seed: int) -> dict[int, int]:
    """Which other latent's label each latent gets in a control: never its own.

    Source: Sattolo's kind of shuffle, a single cycle in random order.
    """
    if len(latents) < 2:
        return {}
    order = np.random.default_rng((seed, 3, run)).permutation(np.sort(np.asarray(latents))).tolist()
    return dict(zip(order, [*order[1:], order[0]], strict=True))
