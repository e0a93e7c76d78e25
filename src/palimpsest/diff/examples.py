"""A few tokens on which each latent fires most strongly, with the text around them; bounded by latents."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Codes

KEEP = 3
BEFORE, AFTER = 12, 6


class TopExamples:
    """Keeps the strongest activations of each latent, one per document.

    Args:
        n_latents: Of the dictionary.
    """

    def __init__(self, n_latents: int) -> None:
        self._floor = torch.zeros(n_latents)
        self._table = {key: torch.zeros(0, dtype=torch.long) for key in ("latent", "corpus", "document")}
        self._table["value"] = torch.zeros(0)
        self._table["window"] = torch.zeros(0, BEFORE + 1 + AFTER, dtype=torch.int32)

    def add(
        self,
        corpus: int,
        batch: TokenBatch,
        places: Int[Tensor, " tokens"],
        codes: Codes,
    ) -> None:
        """Consider the codes of the tokens at some places of a batch of one corpus."""
        latent, value, row = (one.cpu() for one in (codes.indices.long(), codes.values.float(), codes.rows()))
        good = (value > self._floor[latent]).nonzero().squeeze(1)
        latent, value, place = latent[good], value[good], places[row[good]]
        document = batch.document.reshape(-1)[place]
        fresh = {"latent": latent, "value": value, "document": document}
        fresh["corpus"] = torch.full_like(latent, corpus)
        kept = _strongest({key: tensor.numpy() for key, tensor in fresh.items()})
        fresh = {key: tensor[kept] for key, tensor in fresh.items()}
        fresh["window"] = _windows(batch, place[kept])
        merged = {key: torch.cat([self._table[key], fresh[key]]) for key in self._table}
        kept = _strongest({key: merged[key].numpy() for key in ("latent", "value", "corpus", "document")})
        self._table = {key: tensor[kept] for key, tensor in merged.items()}
        latents, start = np.unique(self._table["latent"].numpy(), return_index=True)
        counts = np.diff(np.append(start, len(self._table["latent"])))
        full = counts == KEEP
        # Of a full latent the last row is the weakest one kept: only stronger ones are considered from here on.
        self._floor[latents[full]] = self._table["value"][start[full] + KEEP - 1]

    def arrays(self) -> dict[str, NDArray]:
        """Columns by latent, strongest first."""
        return {f"example/{key}": tensor.numpy() for key, tensor in self._table.items()}


def _strongest(table: dict[str, NDArray]) -> Tensor:
    """Rows of the `KEEP` strongest activations of each latent, the strongest of each document only, by latent."""
    order = np.lexsort((-table["value"], table["document"], table["corpus"], table["latent"]))
    keys = [table[key][order] for key in ("latent", "corpus", "document")]
    order = order[_first_of(keys)]
    order = order[np.lexsort((-table["value"][order], table["latent"][order]))]
    latent = table["latent"][order]
    first = np.flatnonzero(_first_of([latent]))
    start = np.repeat(first, np.diff(np.append(first, len(latent)))) if len(latent) else first
    return torch.from_numpy(order[np.arange(len(latent)) - start < KEEP])


def _first_of(keys: list[NDArray]) -> NDArray[np.bool_]:
    """Where a run of equal keys begins."""
    changed = np.ones(len(keys[0]), bool)
    if len(changed):
        changed[1:] = np.logical_or.reduce([key[1:] != key[:-1] for key in keys])
    return changed


def _windows(batch: TokenBatch, places: Int[Tensor, " events"]) -> Int[Tensor, "events window"]:
    """Ids around each place in its sequence; -1 outside."""
    length = batch.input_ids.shape[1]
    row, column = places[:, None] // length, places[:, None] % length + torch.arange(-BEFORE, AFTER + 1)
    inside = (column >= 0) & (column < length)
    column = column.clamp(0, length - 1)
    inside &= batch.attention_mask[row, column]
    return torch.where(inside, batch.input_ids[row, column], -1).to(torch.int32)


def read_examples(
    arrays: dict[str, NDArray], latent: int, tokenizer: Any, corpora: list[str]
) -> list[dict[str, Any]]:
    """The kept examples of one latent as text: `corpus`, `document`, `value`, `before`, `token`, `after`."""
    found = []
    for row in np.flatnonzero(arrays["example/latent"] == latent):
        window = arrays["example/window"][row]
        parts = (window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :])
        before, token, after = (tokenizer.decode([int(i) for i in part if i >= 0]) for part in parts)
        found.append(
            {
                "corpus": corpora[int(arrays["example/corpus"][row])],
                "document": int(arrays["example/document"][row]),
                "value": float(arrays["example/value"][row]),
                "before": before,
                "token": token,
                "after": after,
            }
        )
    return found
