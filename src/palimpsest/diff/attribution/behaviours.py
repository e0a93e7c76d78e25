"""Behaviours: latents that explain the same predictions, among those in which the two models differ most."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from scipy.cluster.hierarchy import fcluster, linkage
from scipy.spatial.distance import pdist
from torch import Tensor

from palimpsest.corpus import TokenBatch
from palimpsest.diff.attribution.integrate import Item, Path
from palimpsest.diff.result import Behaviour
from palimpsest.harvest import Harvester
from palimpsest.log import progress
from palimpsest.models import ModelPair

GROUPED = 100
"""Latents that are grouped: those of the largest shares."""

CUT = 0.7
"""Mean cosine distance of their profiles up to which latents belong together."""

BEHAVIOURS = 10
CONTEXTS = 5
BEFORE, AFTER = 24, 8
"""Tokens of context that are shown around a predicted token."""


class Context(NamedTuple):
    """A prediction and the text around it, as token ids."""

    corpus: int
    document: int
    before: list[int]
    token: int
    after: list[int]
    kl: float


class Differing:
    """The predictions of largest KL(tuned ‖ base model), with what the latents at each of them explain.

    Args:
        kl: Of every measured prediction, in the order of the batches.
        share: Share of the predictions that are kept; those without any KL never are.
    """

    def __init__(self, kl: Float[NDArray, " predictions"], share: float) -> None:
        count = min(int(np.ceil(share * len(kl))), int((kl > 0).sum()))
        self._kl = kl
        self._chosen = np.zeros(len(kl), bool)
        self._chosen[np.argsort(-kl, kind="stable")[:count]] = True
        self._seen = 0
        self.contexts: list[Context] = []
        self._entries: list[NDArray] = []

    def take(self, item: Item) -> Bool[Tensor, " predictions"]:
        """Which predictions of the next batch are among them; their contexts are kept."""
        rows = slice(self._seen, self._seen + len(item.before))
        self._seen = rows.stop
        chosen, kl = torch.from_numpy(self._chosen[rows]), self._kl[rows]
        for index in chosen.nonzero().squeeze(1).tolist():
            self.contexts.append(_context(item.corpus, item.batch, int(item.before[index]), float(kl[index])))
        return chosen

    def add(
        self,
        item: Item,
        path: Path,
        chosen: Bool[Tensor, " predictions"],
        shares: Float[Tensor, " entries"],
    ) -> None:
        """Keep the shares of the entries at the chosen predictions of the batch that `take` saw last."""
        number = torch.full((item.batch.input_ids.numel(),), -1)
        count = int(chosen.sum())
        number[item.before[chosen]] = torch.arange(len(self.contexts) - count, len(self.contexts))
        row = number[item.places.flat].repeat_interleave(path.entries.crow.diff().cpu())
        kept = row >= 0
        entries = (row, path.entries.indices.cpu(), shares.cpu())
        self._entries.append(np.stack([one[kept].double().numpy() for one in entries]))

    def behaviours(
        self, share: Float[NDArray, " latents"], tokenizer: Any, corpora: Sequence[str]
    ) -> list[Behaviour]:
        """Groups of the latents that explain most of these predictions, by share.

        The profile of a latent is what it explains at each prediction's own position; latents whose profiles have
        an average cosine distance up to `CUT` make one group.

        Args:
            share: Part of the KL of these predictions that each latent explains, at all positions.
            tokenizer: Decodes contexts.
            corpora: Names by number.
        """
        if not self._entries:
            return []
        row, latent, value = np.concatenate(self._entries, axis=1)
        top = np.argsort(-share, kind="stable")[:GROUPED]
        top = top[share[top] > 0]
        column = np.full(len(share), -1)
        column[top] = np.arange(len(top))
        known = column[latent.astype(int)] >= 0
        table = np.zeros((len(self.contexts), len(top)))
        np.add.at(table, (row[known].astype(int), column[latent[known].astype(int)]), value[known])
        total = np.bincount(row.astype(int), weights=value, minlength=len(self.contexts))
        found = []
        for group in groups(table):
            theirs = table[:, group].sum(axis=1)
            strongest = np.argsort(-theirs, kind="stable")[:CONTEXTS]
            shown = [self.contexts[index] for index in strongest if theirs[index] > 0]
            behaviour = Behaviour(
                latents=top[group].tolist(),
                share=float(share[top[group]].sum()),
                tokens=int(((theirs >= total / 2) & (theirs > 0)).sum()),
                contexts=[_decoded(one, tokenizer, corpora) for one in shown],
            )
            found.append(behaviour)
        return sorted(found, key=lambda one: -one.share)[:BEHAVIOURS]


def prediction_kl(pair: ModelPair, items: Iterable[Item]) -> Float[NDArray, " predictions"]:
    """KL(tuned ‖ base model) of every measured prediction, in nats, in the order of the batches."""
    stream = Harvester(pair, [], loss=False, kl=True).stream("attribution", (item.batch for item in items))
    found = []
    with progress("Comparing predictions") as advance:
        for paired in stream:
            assert paired.kl is not None
            found.append(paired.kl[paired.position > 0])
            advance(paired.tokens)
    return torch.cat(found).double().numpy() if found else np.zeros(0)


def groups(table: Float[NDArray, "predictions latents"]) -> list[Int[NDArray, " members"]]:
    """Columns whose directions go together; a column of zeros has none and belongs to no group."""
    columns = np.flatnonzero(np.abs(table).sum(axis=0))
    if len(columns) < 2:
        return [columns] if len(columns) else []
    distance = pdist(table[:, columns].T, "cosine").clip(0)
    label = fcluster(linkage(distance, "average"), CUT, "distance")
    return [columns[label == one] for one in np.unique(label)]


def _context(corpus: int, batch: TokenBatch, before: int, kl: float) -> Context:
    row, place = divmod(before + 1, batch.input_ids.shape[1])
    ids = batch.input_ids[row, : int(batch.attention_mask[row].sum())].tolist()
    document = int(batch.document[row, place])
    return Context(
        corpus,
        document,
        ids[max(0, place - BEFORE) : place],
        ids[place],
        ids[place + 1 : place + 1 + AFTER],
        kl,
    )


def _decoded(context: Context, tokenizer: Any, corpora: Sequence[str]) -> dict[str, Any]:
    return {
        "corpus": corpora[context.corpus],
        "document": context.document,
        "before": tokenizer.decode(context.before),
        "token": tokenizer.decode([context.token]),
        "after": tokenizer.decode(context.after),
        "kl": context.kl,
    }
