"""Several sites and k at once: z of every grid point, and one p for the largest of them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.audit.calibration.panel import Level
from palimpsest.audit.calibration.statistic import Judged, judge
from palimpsest.stats import CHUNK_WEIGHTS

MULTIPLIERS = 103
"""Stream of the seed."""


class Maximum(NamedTuple):
    """One corpus over the grid.

    Attributes:
        z: Of every grid point; NaN where the suspect or a null has no overlap, or the nulls are all alike.
        p: Family-wise p of the largest |z|; NaN where every z is.
    """

    z: Float[NDArray, " grid"]
    p: float


def maximum(
    drift: Float[NDArray, "grid models"],
    contrast: Float[NDArray, "grid models"],
    level: Level,
    stream: int,
    *,
    matched: bool = False,
) -> Maximum:
    """Z over the grid, and the p of its largest absolute value.

    Args:
        drift: Of the suspect (first) and the nulls that judge the corpus.
        contrast: c of the corpus for the same models.
        level: Resamples and seed.
        stream: Number of the corpus.
        matched: The nulls sit at the suspect's drift.
    """
    z = np.full(len(drift), np.nan)
    known = np.isfinite(drift).all(1) & np.isfinite(contrast).all(1)
    if not known.any():
        return Maximum(z, float("nan"))
    found = judge(drift[known], contrast[known], matched=matched)
    z[known] = found.z
    if not np.isfinite(z).any():
        return Maximum(z, float("nan"))
    draws = null_maxima(found, level, stream)
    return Maximum(z, float((1 + (draws >= np.nanmax(np.abs(z))).sum()) / (len(draws) + 1)))


def null_maxima(found: Judged, level: Level, stream: int) -> Float[NDArray, " resamples"]:
    """Largest |z| over the grid of innocent fine-tunes: a Gaussian multiplier bootstrap of the nulls' residuals.

    One set of multipliers of the nulls serves the whole grid, for the residual and for the spread that divides it, so
    both keep their correlation between grid points and each point alone has the t distribution of its test. One
    spread for the whole grid would make the largest too small where grid points are nearly independent.
    """
    rng = np.random.default_rng([level.seed, MULTIPLIERS, stream])
    residuals = found.residuals[found.error > 0]
    units = residuals.T / np.sqrt((residuals**2).sum(1))
    nulls, grid = units.shape
    chunk = max(1, CHUNK_WEIGHTS // ((found.freedom + 1) * max(nulls, grid)))
    largest = []
    for start in range(0, level.resamples, chunk):
        size = min(chunk, level.resamples - start)
        normal = rng.standard_normal((size, found.freedom + 1, nulls)) @ units
        spread = np.sqrt((normal[:, 1:] ** 2).mean(1))
        largest.append((np.abs(normal[:, 0]) / spread).max(1))
    return np.concatenate(largest)
