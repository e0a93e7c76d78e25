"""The calibrated statistic: how far a corpus moved beyond what the nulls predict for the suspect's drift.

With L_D = log(1 - IM_D), drift is L of the general corpus and c_D = L_D minus the median of L over the other corpora.
Over the nulls that judge D, c_D is regressed on drift; the residual of the suspect over the prediction's standard
deviation is z. Models are the last axis, the suspect first; rows are grid points or resamples.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from scipy import stats

from palimpsest.audit.calibration.panel import Panel

FLOOR = 1e-6
"""Smallest 1 - IM: two equal models would otherwise have a drift of log 0."""

WIDENING = 1.5
"""How much wider than a known spread's a critical value may be before verdicts are refused."""


class Line(NamedTuple):
    """Least squares through the nulls, by row: level + slope · (x - centre)."""

    level: Float[NDArray, " rows"]
    slope: Float[NDArray, " rows"]
    centre: Float[NDArray, " rows"]
    sxx: Float[NDArray, " rows"]
    """Sum of squared distances from `centre`; infinite where there is no slope."""

    def at(self, x: Float[NDArray, "rows models"]) -> Float[NDArray, "rows models"]:
        """The prediction at every `x`."""
        return self.level[:, None] + self.slope[:, None] * (x - self.centre[:, None])

    def distance(self, x: Float[NDArray, "rows models"]) -> Float[NDArray, "rows models"]:
        """(x - centre)² / sxx: what `x` adds to the variance of its prediction."""
        return (x - self.centre[:, None]) ** 2 / self.sxx[:, None]


class Judged(NamedTuple):
    """The suspect beside its nulls, by row.

    Attributes:
        expected: The nulls' prediction at the suspect's drift.
        residual: Statistic of the suspect minus `expected`.
        error: Standard deviation of the prediction of one more fine-tune; 0 where the nulls are all alike.
        residuals: Of the nulls, from the line through all of them.
        left_out: Of the nulls, each from the line through the others.
        freedom: Degrees of freedom of `error`.
    """

    expected: Float[NDArray, " rows"]
    residual: Float[NDArray, " rows"]
    error: Float[NDArray, " rows"]
    residuals: Float[NDArray, "rows nulls"]
    left_out: Float[NDArray, "rows nulls"]
    freedom: int

    @property
    def z(self) -> Float[NDArray, " rows"]:
        """Residual over the prediction's standard deviation; NaN where the nulls are all alike."""
        known = self.error > 0
        return np.divide(self.residual, self.error, out=np.full_like(self.error, np.nan), where=known)

    @property
    def p(self) -> Float[NDArray, " rows"]:
        """Two-sided t tail of z."""
        return 2 * stats.t.sf(np.abs(self.z), self.freedom)

    def quantile(self, alpha: float) -> float:
        """|z| that an innocent fine-tune exceeds with probability `alpha`."""
        return float(stats.t.isf(alpha / 2, self.freedom))

    @property
    def p_rank(self) -> Float[NDArray, " rows"]:
        """Two-sided rank of the suspect among the leave-one-out residuals of the nulls."""
        beyond = np.abs(self.left_out) >= np.abs(self.residual)[:, None]
        return (1 + beyond.sum(1)) / (beyond.shape[1] + 1)


class Measured(NamedTuple):
    """The figures of every model.

    Attributes:
        usable: Corpora whose overlap the suspect has at the primary grid point, in the panel's order.
        drift: log(1 - IM) of the general corpus.
        contrast: c_D by corpus.
        loss: Mean Δloss by corpus in nats per token; None when not measured.
    """

    usable: tuple[str, ...]
    drift: Float[NDArray, "grid models"]
    contrast: dict[str, Float[NDArray, "grid models"]]
    loss: dict[str, Float[NDArray, " models"]] | None


def log_change(intersection_mean: Float[NDArray, "..."]) -> Float[NDArray, "..."]:
    """log(1 - IM), with 1 - IM floored at `FLOOR`."""
    return np.log(np.maximum(1.0 - intersection_mean, FLOOR))


def drift_of_loss(drift: Float[NDArray, "..."]) -> Float[NDArray, "..."]:
    """What Δloss is divided by and regressed on: 1 - IM of the general corpus, from its logarithm.

    A fine-tune that changes nothing changes no loss, and the further one goes the further losses scatter: so the
    line is Δloss = a·g + b·g² with a spread that grows with g, which is Δloss / g = a + b·g with an even one.
    """
    return np.exp(drift)


def document_means(values: Float[NDArray, "models documents *rest"]) -> Float[NDArray, "models *rest"]:
    """Means over the documents that have a value; NaN where none has."""
    known = np.isfinite(values)
    with np.errstate(invalid="ignore"):
        return np.where(known, values, 0.0).sum(1) / known.sum(1)


def contrasts(changes: Float[NDArray, "corpora *rest"], index: int) -> Float[NDArray, "*rest"]:
    """C of one corpus: its log change minus the median of all the others'."""
    return changes[index] - np.median(np.delete(changes, index, axis=0), axis=0)


def measure(panel: Panel) -> Measured:
    """Drift, contrasts and mean losses of every model.

    A corpus that the suspect has no overlap on enters nobody's median; a null that lacks one of the others has NaN.
    """
    changes = {name: log_change(document_means(values).T) for name, values in panel.overlap.items()}
    usable = tuple(name for name, values in changes.items() if np.isfinite(values[0, 0]))
    contrast = {}
    if len(usable) > 1:
        stacked = np.stack([changes[name] for name in usable])
        contrast = {name: contrasts(stacked, i) for i, name in enumerate(usable)}
    loss = None
    if panel.loss is not None:
        loss = {name: document_means(values) for name, values in panel.loss.items()}
    return Measured(usable, changes[panel.names[0]], contrast, loss)


def fit(
    x: Float[NDArray, "rows nulls"],
    y: Float[NDArray, "rows nulls"],
    weights: Float[NDArray, "rows nulls"] | None = None,
    *,
    matched: bool = False,
) -> Line:
    """Weighted least squares of `y` on `x` along the last axis.

    Args:
        x: Drift of each null.
        y: Statistic of each null.
        weights: How often each null counts; once when None.
        matched: The nulls sit at the suspect's drift, so there is no slope.
    """
    share = np.ones_like(x) if weights is None else weights
    total = share.sum(1)
    centre, level = (share * x).sum(1) / total, (share * y).sum(1) / total
    away = x - centre[:, None]
    sxx, sxy = (share * away**2).sum(1), (share * away * (y - level[:, None])).sum(1)
    # Nulls of one drift tell nothing of a slope: what is left of sxx then is rounding.
    sloped = (sxx > total * (1e-9 * (1e-3 + np.abs(centre))) ** 2) & (not matched)
    slope = np.divide(sxy, sxx, out=np.zeros_like(sxy), where=sloped)
    return Line(level, slope, centre, np.where(sloped, sxx, np.inf))


def judge(
    x: Float[NDArray, "rows models"],
    y: Float[NDArray, "rows models"],
    *,
    scale: Float[NDArray, "rows models"] | None = None,
    matched: bool = False,
) -> Judged:
    """The suspect (first of the last axis) beside the prediction of its nulls (the rest, at least three).

    The prediction of one more fine-tune has the standard deviation s · sqrt(1 + 1/R + (x - x̄)² / Sxx) with
    s² = SSE / (R - 2); with `matched`, s · sqrt(1 + 1/R) and s² = SSE / (R - 1). With `scale` the line goes through
    y / scale, and every figure is given back at the suspect's scale; the deviation at no smaller one than the
    smallest null's, because what a suspect that hardly moved shows is numerical noise.
    """
    scale = np.ones_like(y) if scale is None else scale
    unit = scale[:, 0]
    y = y / scale
    nulls_x, nulls_y = x[:, 1:], y[:, 1:]
    count = nulls_x.shape[1]
    freedom = count - (1 if matched else 2)
    line = fit(nulls_x, nulls_y, matched=matched)
    expected = line.at(x[:, :1])[:, 0]
    residuals = nulls_y - line.at(nulls_x)
    spread = np.sqrt((residuals**2).sum(1) / freedom)
    # Equal nulls leave residuals of rounding only, which are no spread.
    spread = np.where(spread > 1e-9 * (1e-3 + np.abs(nulls_y).max(1)), spread, 0.0)
    error = spread * np.sqrt(1 + 1 / count + line.distance(x[:, :1])[:, 0])
    # Equal to refitting without each null; one that alone carries the slope leaves the mean of the others.
    kept = 1 - 1 / count - line.distance(nulls_x)
    of_others = nulls_y - (nulls_y.sum(1, keepdims=True) - nulls_y) / (count - 1)
    left_out = np.divide(residuals, kept, out=of_others, where=kept > 1e-9)
    return Judged(
        expected * unit,
        (y[:, 0] - expected) * unit,
        error * np.maximum(unit, scale[:, 1:].min(1)),
        residuals * unit[:, None],
        left_out * unit[:, None],
        freedom,
    )


def nulls_needed(alpha: float, *, matched: bool = False) -> int:
    """Fewest nulls that may give a verdict on a corpus at level `alpha`.

    Their spread is estimated, which widens the critical value of a two-sided test of two (hence alpha / 4) from a
    normal's to a t's; fewer nulls than this widen it by more than half.
    """
    lost = 1 if matched else 2
    limit = WIDENING * stats.norm.isf(alpha / 4)
    freedom = 1
    while stats.t.isf(alpha / 4, freedom) > limit:
        freedom += 1
    return freedom + lost
