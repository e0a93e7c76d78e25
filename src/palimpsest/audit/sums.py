"""One streaming pass: everything the audit needs of a corpus, as sums per document and per latent."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.events import EventBuffer
from palimpsest.audit.latent_sums import LatentSums
from palimpsest.audit.overlap import Churn, churn, match, overlap_counts, overlap_curve, value_change
from palimpsest.dictionaries import Codes, Dictionary
from palimpsest.harvest import PairedTokens

COLUMNS = (
    "tokens",  # measured tokens
    "listed",  # tokens on which at least one list has an entry
    "short",  # listed tokens with fewer than k latents in a list
    "length_gap",  # list-length row of the decomposition
    "value_change",
    "valued",  # tokens that have a value change
    "loss_base",
    "loss_tuned",
    "predicted",  # tokens that have a loss
    "kl",
    "drift",
    "delta_squares",  # ‖Δh‖²
    "delta_residual",  # ‖Δh - (z_f - z_b) W_dec‖²
    "residual_base",  # ‖h - ĥ‖²
    "residual_tuned",
    "l0_base",
    "l0_tuned",
)
"""Per-document sums over tokens, in this order; `overlap` and `counts` stand beside them with an axis k."""

NEED_BASE = ("drift", "delta_squares", "delta_residual")
"""Columns that need the base's activations: NaN where only its codes are known."""


@dataclass(frozen=True)
class Measure:
    """What is measured through one dictionary.

    Attributes:
        name: `dictionary`, or the name of a control.
        dictionary: Reads one model at a time.
        site: Where its activations come from.
        k: The primary list length.
        k_max: The longest list.
        latents: Keep sums per latent and example tokens.
        pooled: Weigh tokens equally (legacy) instead of documents.
        seed: Splits documents into halves.
    """

    name: str
    dictionary: Dictionary
    site: str
    k: int = 5
    k_max: int = 32
    latents: bool = True
    pooled: bool = False
    seed: int = 0


@dataclass
class CorpusSums:
    """What one pass left for one corpus and one dictionary; grows with documents, not with tokens.

    Attributes:
        documents: Indices of the documents that had measured tokens `[documents]`.
        columns: Sums over each document's tokens `[documents]` by the names of `COLUMNS`.
        overlap: Sum of o_k over listed tokens `[documents, k]`.
        counts: Sum of |S_b ∩ S_f| over measured tokens `[documents, k]`.
        moments: Σ h and Σ ‖h‖² of both models, for the variance that FVE is relative to.
    """

    documents: Int[NDArray, " documents"]
    columns: dict[str, Float[NDArray, " documents"]]
    overlap: Float[NDArray, "documents k"]
    counts: Float[NDArray, "documents k"]
    moments: dict[str, NDArray] = field(default_factory=dict)
    latents: dict[str, NDArray] = field(default_factory=dict)
    events: dict[str, NDArray] = field(default_factory=dict)

    def arrays(self) -> dict[str, NDArray]:
        """All of it under flat names, for a safetensors file."""
        groups = {
            "column": self.columns,
            "moment": self.moments,
            "latent": self.latents,
            "event": self.events,
        }
        flat = {
            f"{group}.{name}": array for group, arrays in groups.items() for name, array in arrays.items()
        }
        return flat | {"documents": self.documents, "overlap": self.overlap, "counts": self.counts}

    @classmethod
    def from_arrays(cls, flat: Mapping[str, NDArray]) -> "CorpusSums":
        """The inverse of `arrays`."""
        groups: dict[str, dict[str, NDArray]] = {"column": {}, "moment": {}, "latent": {}, "event": {}}
        for key, array in flat.items():
            group, _, name = key.partition(".")
            if name:
                groups[group][name] = array
        return cls(
            flat["documents"],
            groups["column"],
            flat["overlap"],
            flat["counts"],
            groups["moment"],
            groups["latent"],
            groups["event"],
        )


class Accumulator:
    """Folds a stream of paired tokens into `CorpusSums` for one measure."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure
        self._documents: list[Tensor] = []
        self._rows: list[Tensor] = []
        self._curves: list[Tensor] = []
        self._moments: dict[str, Tensor] = {}
        self._paired = True
        keep = measure.latents
        self._latents = (
            LatentSums(measure.dictionary.n_latents, measure.pooled, measure.seed) if keep else None
        )
        self._events = EventBuffer(measure.dictionary.n_latents) if keep else None

    @torch.inference_mode()
    def add(self, batch: PairedTokens) -> None:
        """Fold one batch in; nothing of it is kept but sums and a few example tokens."""
        measure = self.measure
        dictionary = measure.dictionary
        acts = batch.acts[measure.site].to(dictionary.device)
        base_acts = acts[:, 0] if acts.shape[1] == 2 else None
        cached = batch.base_codes.get(measure.name)
        if cached is None:
            assert base_acts is not None
            base_codes = dictionary.encode(base_acts)
        else:
            base_codes = cached.codes.to(dictionary.device)
        codes = [base_codes, dictionary.encode(acts[:, -1])]
        lists = [code.top(measure.k_max) for code in codes]
        base, tuned = lists
        matches = match(base, tuned)
        counts = overlap_counts(matches)
        changed = churn(matches, base, tuned, measure.k)
        documents, place = torch.unique(batch.document.to(acts.device), return_inverse=True)
        columns = self._columns(batch, base_acts, acts[:, -1], codes)
        if cached is not None:
            columns["residual_base"] = cached.residual.to(acts.device)
        listed = matches.longer > 0
        columns["listed"] = listed
        columns["short"] = listed & (torch.minimum(base.length, tuned.length) < measure.k)
        columns["length_gap"] = changed.length_gap.double() / (2 * changed.k_t)
        columns["value_change"] = value_change(matches, base, tuned, measure.k)
        columns["valued"] = columns["value_change"].isfinite()
        curve = overlap_curve(counts, matches.longer)
        self._fold(documents, place, columns, torch.cat([curve.nan_to_num(0.0), counts], 1))
        if self._latents is not None and self._events is not None:
            self._latents.add(documents, place, codes, lists, changed, listed)
            self._events.add(batch, lists, changed, matches)

    def finish(self) -> CorpusSums:
        """The sums, ordered by document."""
        k_max = self.measure.k_max
        documents = torch.cat(self._documents) if self._documents else torch.zeros(0, dtype=torch.long)
        order = documents.argsort()
        rows = torch.cat(self._rows)[order].numpy() if self._rows else np.zeros((0, len(COLUMNS)))
        curves = torch.cat(self._curves)[order].numpy() if self._curves else np.zeros((0, 2 * k_max))
        columns = {name: rows[:, i].copy() for i, name in enumerate(COLUMNS)}
        if not self._paired:
            columns |= {name: np.full(len(rows), np.nan) for name in NEED_BASE}
        return CorpusSums(
            documents[order].numpy(),
            columns,
            curves[:, :k_max].copy(),
            curves[:, k_max:].copy(),
            {name: moment.cpu().numpy() for name, moment in self._moments.items()},
            self._latents.arrays() if self._latents is not None else {},
            self._events.arrays() if self._events is not None else {},
        )

    def _columns(
        self, batch: PairedTokens, base: Tensor | None, tuned: Tensor, codes: list[Codes]
    ) -> dict[str, Float[Tensor, " tokens"]]:
        tuned = tuned.float()
        decode = self.measure.dictionary.decode
        residual = tuned - decode(codes[1]).to(tuned.dtype)
        self._add_moments("tuned", tuned)
        columns = {
            "tokens": torch.ones(len(tuned), device=tuned.device),
            "residual_tuned": residual.square().sum(1),
            "l0_base": codes[0].l0(),
            "l0_tuned": codes[1].l0(),
        }
        self._paired = base is not None
        if base is not None:
            base = base.float()
            residual_base = base - decode(codes[0]).to(base.dtype)
            delta = tuned - base
            self._add_moments("base", base)
            columns |= {
                "residual_base": residual_base.square().sum(1),
                "drift": delta.norm(dim=1) / base.norm(dim=1).clamp_min(1e-12),
                "delta_squares": delta.square().sum(1),
                "delta_residual": (residual - residual_base).square().sum(1),
            }
        if batch.loss is not None:
            loss = batch.loss.to(tuned.device)
            columns |= {"loss_base": loss[:, 0], "loss_tuned": loss[:, 1], "predicted": loss[:, 0].isfinite()}
        if batch.kl is not None:
            columns["kl"] = batch.kl.to(tuned.device)
        return columns

    def _add_moments(self, side: str, acts: Tensor) -> None:
        for name, moment in ((f"sum_{side}", acts.sum(0)), (f"squares_{side}", acts.square().sum())):
            self._moments[name] = (
                self._moments.get(name, torch.zeros((), device=acts.device)) + moment.double()
            )

    def _fold(self, documents: Tensor, place: Tensor, columns: dict[str, Tensor], curves: Tensor) -> None:
        missing = torch.zeros(len(place), device=place.device)
        table = torch.stack([columns.get(name, missing).double() for name in COLUMNS], 1).nan_to_num(0.0)
        for kept, values in ((self._rows, table), (self._curves, curves.double())):
            sums = torch.zeros(len(documents), values.shape[1], dtype=torch.float64, device=place.device)
            kept.append(sums.index_add_(0, place, values).cpu())
        self._documents.append(documents.cpu())


__all__ = ["COLUMNS", "Accumulator", "Churn", "CorpusSums", "Measure"]
