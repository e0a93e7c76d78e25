"""Sums per latent over a corpus, kept for two halves of its documents."""

import numpy as np
import torch
from jaxtyping import Bool, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.overlap import Churn
from palimpsest.dictionaries import Codes, TopList

FIELDS = ("left", "entered", "lost", "gained", "rate_base", "rate_tuned", "mean_base", "mean_tuned")
"""`lost`/`gained` are contributions to 1 - o_k, the others rates and mean activations per token."""

TILE_ENTRIES = 1 << 22
"""Entries of a [documents, latents] tile; documents of one batch are taken in groups that fit."""


def halves(documents: Int[Tensor, " documents"], seed: int) -> Int[Tensor, " documents"]:
    """0 or 1 for each document, a fixed pseudo-random split (one round of splitmix64)."""
    mask = (1 << 64) - 1
    bits = []
    for document in documents.tolist():
        x = (document * 0x9E3779B97F4A7C15 + (seed + 1) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        bits.append((x ^ (x >> 31)) & 1)
    return torch.tensor(bits, dtype=torch.long, device=documents.device)


class LatentSums:
    """Accumulates document means per latent, and the squares of their change, for each half.

    Args:
        n_latents: Latents of the dictionary.
        pooled: Weigh tokens equally in the contributions, instead of documents.
        seed: Of the split into halves.
    """

    def __init__(self, n_latents: int, pooled: bool, seed: int) -> None:
        self._n, self._pooled, self._seed = n_latents, pooled, seed
        self._sums: Tensor | None = None
        self._change: Tensor | None = None
        self._weight = torch.zeros(2, 2, dtype=torch.float64)

    def add(
        self,
        documents: Int[Tensor, " documents"],
        place: Int[Tensor, " tokens"],
        codes: list[Codes],
        lists: list[TopList],
        changed: Churn,
        listed: Bool[Tensor, " tokens"],
    ) -> None:
        """Fold one batch in; `place` says which of `documents` each token is in, `listed` which have a list."""
        device = place.device
        if self._sums is None:
            self._sums = torch.zeros(2, len(FIELDS), self._n, dtype=torch.float64, device=device)
            self._change = torch.zeros(2, 2, self._n, dtype=torch.float64, device=device)
        half = halves(documents, self._seed)
        count = torch.bincount(place, minlength=len(documents)).double()
        with_list = torch.bincount(place[listed], minlength=len(documents)).double()
        weight = 1 / count.clamp_min(1)
        list_weight = torch.ones_like(count) if self._pooled else 1 / with_list.clamp_min(1)
        self._count(half, count, with_list)
        self._lists(half[place], list_weight[place], lists, changed)
        self._activations(half, place, weight, codes)

    def arrays(self) -> dict[str, NDArray]:
        """`sums [2, fields, latents]`, `change [2, 2, latents]` (sum, squares), `weight [2, 2]`.

        `weight[half]` holds what the sums are to be divided by: documents with measured tokens, and documents
        (tokens when pooled) with a list.
        """
        if self._sums is None or self._change is None:
            return {
                "sums": np.zeros((2, len(FIELDS), self._n)),
                "change": np.zeros((2, 2, self._n)),
                "weight": np.zeros((2, 2)),
            }
        return {
            "sums": self._sums.cpu().numpy(),
            "change": self._change.cpu().numpy(),
            "weight": self._weight.numpy(),
        }

    def _count(self, half: Tensor, count: Tensor, with_list: Tensor) -> None:
        for column, tokens in enumerate((count, with_list)):
            amount = tokens if self._pooled and column == 1 else (tokens > 0).double()
            self._weight[:, column] += (
                torch.zeros(2, dtype=torch.float64, device=half.device).index_add_(0, half, amount).cpu()
            )

    def _lists(self, half: Tensor, weight: Tensor, lists: list[TopList], changed: Churn) -> None:
        assert self._sums is not None
        share = weight / (2 * changed.k_t)
        for entries, which, rate, contribution in (
            (lists[0], changed.left, "left", "lost"),
            (lists[1], changed.entered, "entered", "gained"),
        ):
            token, rank = which.nonzero(as_tuple=True)
            latent = entries.indices[token, rank]
            for name, values in ((rate, weight), (contribution, share)):
                self._scatter(name, half[token], latent, values[token])

    def _scatter(self, field: str, half: Tensor, latent: Tensor, values: Tensor) -> None:
        assert self._sums is not None
        flat = torch.zeros(2 * self._n, dtype=torch.float64, device=values.device)
        flat.index_add_(0, half * self._n + latent, values.double())
        self._sums[:, FIELDS.index(field)] += flat.view(2, self._n)

    def _activations(self, half: Tensor, place: Tensor, weight: Tensor, codes: list[Codes]) -> None:
        """Rates and mean activations per document and latent, a tile of documents at a time."""
        assert self._sums is not None and self._change is not None
        group = max(1, TILE_ENTRIES // self._n)
        entries = [_document_entries(code, place, weight) for code in codes]
        for start in range(0, len(half), group):
            stop = min(len(half), start + group)
            means = []
            for side, (document, latent, value, share) in zip(("base", "tuned"), entries, strict=True):
                here = (document >= start) & (document < stop) if group < len(half) else slice(None)
                key = (document[here] - start) * self._n + latent[here]
                for field, amount in (("rate", share[here]), ("mean", value[here] * share[here])):
                    table = torch.zeros((stop - start) * self._n, device=place.device).index_add_(
                        0, key, amount
                    )
                    table = table.view(stop - start, self._n)
                    for part in range(2):
                        mine = table[half[start:stop] == part]
                        self._sums[part, FIELDS.index(f"{field}_{side}")] += mine.sum(0)
                means.append(table)
            change = means[1] - means[0]
            for part in range(2):
                mine = change[half[start:stop] == part].double()
                self._change[part, 0] += mine.sum(0)
                self._change[part, 1] += mine.square().sum(0)


def _document_entries(codes: Codes, place: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Document, latent, value and token weight of every strictly positive entry."""
    rows = codes.rows()
    positive = codes.values > 0
    rows, latent, value = rows[positive], codes.indices[positive], codes.values[positive].float()
    document = place[rows]
    return document, latent, value, weight[document].float()
