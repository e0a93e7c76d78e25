"""Intervals of calibrated residuals: documents and nulls are drawn again, and the nulls' line is fitted again."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.audit.calibration.panel import GENERAL, Level, Panel
from palimpsest.audit.calibration.statistic import contrasts, drift_of_loss, fit, log_change
from palimpsest.findings import Range
from palimpsest.stats import Resampler, percentile_interval, resample_weights, weighted_mean

DOCUMENTS, NULLS = 101, 102
"""Streams of the seed, apart from those of the audit's own intervals."""


class Spread(NamedTuple):
    """Intervals of one corpus.

    Attributes:
        features: Of the residual of c_D.
        loss: Of the residual of Δloss; None when not measured.
        delta_loss: Of the suspect's Δloss itself, over documents; None when not measured.
    """

    features: Range
    loss: Range | None
    delta_loss: Range | None


class Resamples:
    """Bootstrap figures of every model at the primary grid point.

    One draw of a corpus' documents serves the suspect and all nulls: what the documents do to all of them alike
    cancels in the residual. Corpora are drawn independently.

    Args:
        panel: The suspect and its nulls.
        usable: Corpora that enter the contrasts, the general one among them.
        level: Confidence, resamples and seed.
    """

    def __init__(self, panel: Panel, usable: tuple[str, ...], level: Level) -> None:
        self.panel, self.usable, self.level = panel, usable, level
        self._index = {name: i for i, name in enumerate(usable)}
        drawn = [self._draw(name) for name in usable]
        self._changes = np.stack([log_change(overlap) for overlap, _ in drawn])
        self._loss = [loss for _, loss in drawn]

    def _draw(self, name: str) -> tuple[NDArray, NDArray | None]:
        panel, level = self.panel, self.level
        columns = panel.overlap[name][:, :, 0]
        if panel.loss is not None:
            columns = np.concatenate([columns, panel.loss[name]])
        stream = [level.seed, DOCUMENTS, panel.names.index(name)]
        draws = Resampler(columns.shape[1], level.resamples, stream)
        means = draws.apply(lambda weights: weighted_mean(weights, columns.T))
        models = 1 + panel.nulls
        return means[:, :models], means[:, models:] if panel.loss is not None else None

    def spread(self, name: str, used: Bool[NDArray, " nulls"], *, matched: bool = False) -> Spread:
        """Intervals of one corpus, judged by the nulls marked in `used`; they are drawn again as well."""
        index = self._index[name]
        models = np.concatenate([[True], used])
        drift = self._changes[self._index[GENERAL]][:, models]
        stream = np.random.default_rng([self.level.seed, NULLS, self.panel.names.index(name)])
        weights = resample_weights(int(used.sum()), self.level.resamples, stream)

        def residuals(x: NDArray, y: NDArray) -> NDArray:
            return y[:, 0] - fit(x[:, 1:], y[:, 1:], weights, matched=matched).at(x[:, :1])[:, 0]

        documents = int(np.isfinite(self.panel.overlap[name][0, :, 0]).sum())
        features = self._interval(residuals(drift, contrasts(self._changes, index)[:, models]), documents)
        loss = self._loss[index]
        if loss is None:
            return Spread(features, None, None)
        change = drift_of_loss(drift)
        of_loss = residuals(change, loss[:, models] / change) * change[:, 0]
        return Spread(features, self._interval(of_loss, documents), self._interval(loss[:, 0], documents))

    def _interval(self, samples: Float[NDArray, " resamples"], size: int) -> Range:
        lo, hi = percentile_interval(samples, self.level.confidence, size)
        return float(lo), float(hi)
