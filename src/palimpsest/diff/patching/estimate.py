"""From sums per document to shares of the KL gap with intervals: numbers only, no models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.diff.patching.effects import COLUMNS, MOST_DOCUMENTS
from palimpsest.diff.patching.sets import Variant
from palimpsest.diff.result import Patching, PatchRow
from palimpsest.evaluate.estimate import Settings
from palimpsest.evaluate.sums import DocumentTable
from palimpsest.findings import Range
from palimpsest.stats import Resampler, percentile_interval

NO_GAP = 1e-9
"""Nats per prediction below which there is nothing to recover."""


class Totals:
    """The sums of some positions: of all documents, of each corpus and of every resample.

    Args:
        table: Sums per document.
        variants: Of the columns; the first is `none`.
        corpora: Their names.
        settings: Of the intervals.
        moved: Whether the models differ at the site at all.
    """

    def __init__(
        self,
        table: DocumentTable,
        variants: Sequence[Variant],
        corpora: Sequence[str],
        settings: Settings,
        *,
        moved: bool,
    ) -> None:
        self._table, self._variants, self._settings = table, variants, settings
        self.documents = len(table.documents)
        self._total = table.sums.sum(0)
        owner = table.documents // MOST_DOCUMENTS
        self._corpora = {
            name: table.sums[owner == index].sum(0)
            for index, name in enumerate(corpora)
            if (owner == index).any()
        }
        self.predictions = int(self._total[0])
        self.gap, self.floor = self.mean("kl", 0), self.mean("kl_floor")
        # Identical models leave the noise of float32, which has no shares.
        self.sized = moved and self.gap > max(NO_GAP, 2 * self.floor)
        self._samples = None
        if self.sized and settings.enough(self.documents):
            kl = table.sums[:, len(COLUMNS) : len(COLUMNS) + len(variants)]
            draws = Resampler(self.documents, settings.resamples, [settings.seed, 23])
            self._samples = draws.apply(lambda weights: weights @ kl)

    def mean(self, name: str, variant: int = 0) -> float:
        """Nats per prediction of a column of `COLUMNS`, or of the `kl` of a variant."""
        return float(self._total[self._column(name, variant)] / self._total[0])

    def losses(self, name: str, variant: int = 0) -> dict[str, float]:
        """The same by corpus."""
        column = self._column(name, variant)
        return {corpus: float(sums[column] / sums[0]) for corpus, sums in self._corpora.items()}

    def rows(self, positions: str) -> list[PatchRow]:
        """One row for each variant."""
        return [self._row(index, variant, positions) for index, variant in enumerate(self._variants)]

    def _column(self, name: str, variant: int) -> int:
        if name in COLUMNS:
            return COLUMNS.index(name)
        return len(COLUMNS) + variant + (len(self._variants) if name == "ce" else 0)

    def _row(self, index: int, variant: Variant, positions: str) -> PatchRow:
        return PatchRow(
            set=variant.name,
            size=variant.size,
            positions=positions,
            kl=self.mean("kl", index),
            share=_share(self._total, index, variant) if self.sized else None,
            ci=self._interval(index, variant),
            seed=variant.seed,
            loss=self.losses("ce", index),
            by_corpus={
                name: _share(sums, index, variant) if self.sized else None
                for name, sums in self._corpora.items()
            },
        )

    def _interval(self, index: int, variant: Variant) -> Range | None:
        """Percentile bootstrap over documents, of both KLs together."""
        if self._samples is None:
            return None
        with np.errstate(invalid="ignore", divide="ignore"):
            ratio = self._samples[:, index] / self._samples[:, 0]
        shares = ratio if variant.removed else 1 - ratio
        lo, hi = percentile_interval(
            np.where(np.isfinite(shares), shares, np.nan), self._settings.confidence, self.documents
        )
        return (float(lo), float(hi)) if np.isfinite(lo) and np.isfinite(hi) else None


def _share(sums: Float[NDArray, " columns"], index: int, variant: Variant) -> float | None:
    none = sums[len(COLUMNS)]
    if none <= NO_GAP * sums[0]:
        return None
    ratio = float(sums[len(COLUMNS) + index] / none)
    return ratio if variant.removed else 1 - ratio


def estimate(
    tables: Mapping[str, DocumentTable],
    variants: Sequence[Variant],
    corpora: Sequence[str],
    settings: Settings,
    *,
    moved: bool,
) -> Patching:
    """Everything that the sums say, of all positions.

    Args:
        tables: Sums per document by positions.
        variants: Of the columns; the first is `none`.
        corpora: Their names.
        settings: Of the intervals.
        moved: Whether the models differ at the site at all.
    """
    totals = {name: Totals(table, variants, corpora, settings, moved=moved) for name, table in tables.items()}
    widest = next(iter(totals.values()))
    rows = [pair for name, one in totals.items() for pair in zip(variants, one.rows(name), strict=True)]
    return Patching(
        documents=widest.documents,
        predictions={name: one.predictions for name, one in totals.items()},
        gap={name: one.gap for name, one in totals.items()},
        base_kl={name: one.mean("kl_base") for name, one in totals.items()},
        loss={side: widest.losses(f"ce_{side}") for side in ("base", "tuned")},
        added=[row for variant, row in rows if not variant.removed],
        removed=[row for variant, row in rows if variant.removed],
        notes=[note for name, one in totals.items() for note in _notes(name, one, settings)],
    )


def _notes(positions: str, totals: Totals, settings: Settings) -> list[str]:
    where = "" if positions == "all" else f" on the {positions} positions"
    if not totals.sized:
        return [
            f"There is no KL gap{where}: {totals.gap:.1e} nats, of which {totals.floor:.1e} are rounding."
        ]
    notes = []
    if totals.floor > 0.01 * totals.gap:
        notes.append(f"Rounding alone leaves {totals.floor / totals.gap:.0%} of the KL gap{where}.")
    if not settings.enough(totals.documents):
        notes.append(f"{totals.documents} documents are too few for intervals of patching{where}.")
    return notes
