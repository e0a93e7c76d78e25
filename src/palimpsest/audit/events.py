"""A few example tokens per latent: where it left or entered the top k most strongly."""

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.audit.overlap import Churn, Matches
from palimpsest.dictionaries import TopList
from palimpsest.harvest import PairedTokens

KEEP = 4
"""Examples kept per latent."""

BEFORE, AFTER = 12, 8
"""Tokens of context on either side of an example."""


class EventBuffer:
    """Keeps the `KEEP` strongest events of each latent; bounded by latents, not by tokens."""

    def __init__(self, n_latents: int) -> None:
        self._floor = torch.full((n_latents,), -1.0)
        self._table = _empty()

    def add(self, batch: PairedTokens, lists: list[TopList], changed: Churn, matches: Matches) -> None:
        """Consider the events of one batch."""
        base, tuned = lists
        found = [
            self._events(batch, base, tuned, changed.left, matches.same, entered=False),
            self._events(batch, tuned, base, changed.entered, matches.same.transpose(1, 2), entered=True),
        ]
        merged = {key: torch.cat([self._table[key], *(part[key] for part in found)]) for key in self._table}
        self._table = self._strongest(merged)

    def arrays(self) -> dict[str, NDArray]:
        """Columns of the kept events, by latent and strength."""
        return {key: value.numpy() for key, value in self._table.items()}

    def _events(
        self,
        batch: PairedTokens,
        own: TopList,
        other: TopList,
        which: Tensor,
        same: Tensor,
        *,
        entered: bool,
    ) -> dict[str, Tensor]:
        """Events that beat the weakest kept one of their latent, with their context."""
        token, rank = which.nonzero(as_tuple=True)
        latent = own.indices[token, rank].cpu()
        value = own.values[token, rank].float()
        # Outside the other model's list the latent is at most as strong as that list's end; shown as 0.
        place = same[token, rank]
        there = torch.where(place, other.values[token], 0.0).sum(1).float()
        score = (value - there).abs().cpu()
        good = (score > self._floor[latent]).nonzero().squeeze(1)
        token, value, there = token.cpu()[good], value.cpu()[good], there.cpu()[good]
        base, tuned = (there, value) if entered else (value, there)
        return {
            "latent": latent[good],
            "score": score[good],
            "base": base,
            "tuned": tuned,
            "document": batch.document[token],
            "entered": torch.full((len(good),), int(entered)),
            "window": _window(batch, token),
        }

    def _strongest(self, table: dict[str, Tensor]) -> dict[str, Tensor]:
        latent, score = table["latent"].numpy(), table["score"].numpy()
        order = np.lexsort((-score, latent))
        latent = latent[order]
        first = np.r_[True, latent[1:] != latent[:-1]] if len(latent) else np.zeros(0, bool)
        starts = np.maximum.accumulate(np.where(first, np.arange(len(latent)), 0)) if len(latent) else first
        rank = np.arange(len(latent)) - starts
        kept = torch.from_numpy(order[rank < KEEP])
        last = torch.from_numpy(order[rank == KEEP - 1])
        self._floor[table["latent"][last]] = table["score"][last]
        return {key: value[kept] for key, value in table.items()}


def _empty() -> dict[str, Tensor]:
    whole = {key: torch.zeros(0, dtype=torch.long) for key in ("latent", "document", "entered")}
    parts = {key: torch.zeros(0) for key in ("score", "base", "tuned")}
    return whole | parts | {"window": torch.zeros(0, BEFORE + 1 + AFTER, dtype=torch.int32)}


def _window(batch: PairedTokens, token: Int[Tensor, " events"]) -> Int[Tensor, "events window"]:
    """Ids around each token of its document; -1 outside."""
    context = batch.context
    columns = batch.position[token][:, None] + torch.arange(-BEFORE, AFTER + 1)
    inside = (columns >= 0) & (columns < context.input_ids.shape[1])
    rows = batch.row[token][:, None]
    columns = columns.clamp(0, context.input_ids.shape[1] - 1)
    inside &= context.attention_mask[rows, columns].bool()
    return torch.where(inside, context.input_ids[rows, columns], -1).to(torch.int32)
