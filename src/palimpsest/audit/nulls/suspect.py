"""Nulls of one suspect: its own weight change, randomly rotated and scaled to its own drift, read over the battery."""

import numpy as np

from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.inputs import GENERAL, Inputs
from palimpsest.audit.measure import Size, measure_corpus
from palimpsest.audit.nulls.store import Figures, figures_of
from palimpsest.audit.sums import CorpusSums, Measure
from palimpsest.harvest.cached import CachedHarvester
from palimpsest.log import progress
from palimpsest.models.spectrum import SpectrumNull, base_deltas, bisect_alpha


def spectrum_figures(config: AuditConfig, inputs: Inputs, suspect: Figures) -> list[tuple[float, Figures]]:
    """Scale and figures of each null; every one keeps as much of the general corpus' lists as the suspect.

    Raises:
        PairError: The pair holds one model at a time.
        NumericsError: The two models are the same, or no scale reaches the suspect's drift.
    """
    battery = inputs.battery
    assert battery is not None
    count, k = config.calibration.spectrum_nulls, config.k
    with inputs.pair.both() as (base, _):
        deltas = base_deltas(inputs.pair)
        measures = [measure for measure in inputs.measures(config) if measure.name in _readers(battery)]
        harvester = CachedHarvester(base, inputs.sites, battery.base_side, loss=False)
        target = float(np.nanmean(suspect["overlap/dictionary/0"][:, k - 1]))

        def sums(names: list[str], chosen: list[Measure]) -> dict[str, dict[str, CorpusSums]]:
            return {
                name: measure_corpus(
                    harvester,
                    battery.text(name),
                    Size(battery.row(name)["documents"], battery.row(name)["tokens"], 0),
                    chosen,
                    config.models.tokens_per_batch,
                )
                for name in names
            }

        found: list[tuple[float, Figures]] = []
        with progress("spectrum nulls", count, unit="nulls") as advance:
            for index in range(count):
                null = SpectrumNull(base, deltas, config.run.seed + index)

                def overlap(alpha: float, null: SpectrumNull = null) -> float:
                    with null.at(alpha):
                        figures = figures_of(sums([GENERAL], measures[:1]))
                    return float(np.nanmean(figures["overlap/dictionary/0"][:, k - 1]))

                alpha = bisect_alpha(overlap, target, what="general overlap")
                with null.at(alpha):
                    found.append((alpha, figures_of(sums(battery.names, measures))))
                advance(1)
    return found


def _readers(battery: Battery) -> set[str]:
    return {reader.name for reader in battery.readers if not reader.control}
