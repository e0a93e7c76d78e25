"""Log-probabilities and divergences of rows of tokens, without ever holding the logits of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.errors import ConfigError
from palimpsest.evaluate.splice import predictions
from palimpsest.log import progress
from palimpsest.models.sites import Head
from palimpsest.tune.adapter.scope import answering
from palimpsest.tune.rows import IGNORED, TextRow

CACHE_BYTES = 256 << 20
"""What is kept of the base's reading of general text; beyond it the base reads again each time."""


class Scores(NamedTuple):
    """Per row, in float64.

    Attributes:
        nats: Sum of -log p over the labelled tokens.
        tokens: How many those are.
    """

    nats: Float[NDArray, " rows"]
    tokens: Float[NDArray, " rows"]

    @property
    def logp(self) -> Float[NDArray, " rows"]:
        """Log-probability of all labelled tokens of each row."""
        return -self.nats

    @property
    def mean_logp(self) -> Float[NDArray, " rows"]:
        """Of one labelled token of each row; NaN where there is none."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return -self.nats / self.tokens


class Comparison(NamedTuple):
    """Base and tuned on the same rows, per row, in float64.

    Attributes:
        base: Of the base.
        tuned: Of the tuned model.
        kl: Sum over the labelled tokens of KL(base || tuned) of their prediction, nats.
    """

    base: Scores
    tuned: Scores
    kl: Float[NDArray, " rows"]


class Batch(NamedTuple):
    """Rows of similar length, padded on the right, and what of them is predicted.

    Attributes:
        rows: Which rows they are.
        ids: Tokens; behind a row's end zeros, which no real token sees.
        answer: Which tokens are labelled, and the padding.
        places: Flat places whose next token is labelled.
        targets: That token.
        owner: Its row.
    """

    rows: list[int]
    ids: Int[Tensor, "batch seq"]
    answer: Bool[Tensor, "batch seq"]
    places: Int[Tensor, " predictions"]
    targets: Int[Tensor, " predictions"]
    owner: Int[NDArray, " predictions"]


class Scorer:
    """Scores rows under a model, with its adapter on or off.

    Args:
        head: Of the model; only what it does to logits is used, its weights are those of the model that is scored.
        tokens_per_batch: Padded tokens of one forward pass.
    """

    def __init__(self, head: Head, tokens_per_batch: int) -> None:
        self._head, self._tokens = head, tokens_per_batch

    @torch.inference_mode()
    def score(self, model: Any, rows: Sequence[TextRow], *, base: bool = False) -> Scores:
        """What each row costs.

        Args:
            model: A transformers model, or a peft model on one.
            rows: Token ids and labels.
            base: With the adapter switched off.
        """
        sums = np.zeros((len(rows), 2))
        with settled(model), progress("scoring held-out rows", len(rows), "rows") as advance:
            for batch in batches(rows, self._tokens):
                hidden, head = self._read(model, batch, base=base)
                ce = predictions(head, hidden, [], batch.targets).ce[:, 0]
                _add(sums, batch, torch.stack([ce, torch.ones_like(ce)], 1))
                advance(len(batch.rows))
        return Scores(sums[:, 0], sums[:, 1])

    @torch.inference_mode()
    def compare(
        self,
        model: Any,
        rows: Sequence[TextRow],
        kept: dict[int, Tensor] | None = None,
        *,
        plain: bool = False,
    ) -> Comparison:
        """Base and tuned model on the same rows.

        Args:
            model: A peft model; of a model without an adapter both sides are the same unless `kept` says otherwise.
            rows: Token ids and labels.
            kept: What the base's head read, by batch; filled up to `CACHE_BYTES` and used when it is there.
            plain: The rows are text without an answer; the adapter's scope must be one that needs none.
        """
        sums = np.zeros((len(rows), 4))
        kept = {} if kept is None else kept
        with settled(model), progress("comparing on general text", len(rows), "rows") as advance:
            for number, batch in enumerate(batches(rows, self._tokens)):
                tuned, head = self._read(model, batch, base=False, plain=plain)
                if number in kept:
                    of_base = kept[number].to(tuned.device)
                else:
                    of_base, _ = self._read(model, batch, base=True, plain=plain)
                    _keep(kept, number, of_base)
                found = predictions(head, of_base, [tuned], batch.targets)
                columns = [found.ce, torch.ones_like(found.kl), found.kl]
                _add(sums, batch, torch.cat(columns, 1))
                advance(len(batch.rows))
        count = sums[:, 2]
        return Comparison(Scores(sums[:, 0], count), Scores(sums[:, 1], count), sums[:, 3])

    def _read(
        self, model: Any, batch: Batch, *, base: bool, plain: bool = False
    ) -> tuple[Float[Tensor, "predictions d_head"], Head]:
        """What the head reads before each labelled token, and the head."""
        inner = inner_model(model)
        head = self._head._replace(module=inner.get_output_embeddings())
        off = model.disable_adapter() if base and hasattr(model, "disable_adapter") else nullcontext()
        with off, answering(model, None if plain else batch.answer), _head_input(head.module) as found:
            inner(input_ids=batch.ids.to(inner.get_input_embeddings().weight.device), use_cache=False)
        if not found:
            raise ConfigError(
                "The model never called its output embeddings", expected="a causal language model"
            )
        return found[0].flatten(0, 1)[batch.places.to(found[0].device)], head


def inner_model(model: Any) -> Any:
    """The transformers model: its forward is the plain one, whatever a trainer wrapped around an adapter's."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def batches(rows: Sequence[TextRow], tokens: int) -> Iterator[Batch]:
    """Rows by length, longest first, as many at a time as `tokens` padded tokens hold; one at least."""
    order = sorted(range(len(rows)), key=lambda row: (-len(rows[row].input_ids), row))
    start = 0
    while start < len(order):
        width = len(rows[order[start]].input_ids)
        size = max(1, tokens // max(1, width))
        yield _batch(rows, order[start : start + size], width)
        start += size


def _batch(rows: Sequence[TextRow], chosen: list[int], width: int) -> Batch:
    ids = torch.zeros(len(chosen), width, dtype=torch.long)
    labels = torch.full((len(chosen), width), IGNORED)
    for place, row in enumerate(chosen):
        length = len(rows[row].input_ids)
        ids[place, :length] = torch.tensor(rows[row].input_ids, dtype=torch.long)
        labels[place, :length] = torch.tensor(rows[row].labels, dtype=torch.long)
    following = labels.roll(-1, dims=1)
    following[:, -1:] = IGNORED
    places = (following != IGNORED).flatten().nonzero()[:, 0]
    owner = np.asarray(chosen)[(places // max(1, width)).numpy()]
    # Padding counts as answer: an edit of a prompt's last tokens must not take padding for them.
    lengths = torch.tensor([len(rows[row].input_ids) for row in chosen])
    answer = (labels != IGNORED) | (torch.arange(width) >= lengths[:, None])
    return Batch(chosen, ids, answer, places, following.flatten()[places], owner)


def _add(sums: NDArray, batch: Batch, columns: Float[Tensor, "predictions columns"]) -> None:
    np.add.at(sums, batch.owner, columns.double().cpu().numpy())


def _keep(kept: dict[int, Tensor], number: int, hidden: Tensor) -> None:
    used = sum(one.numel() * one.element_size() for one in kept.values())
    if used + hidden.numel() * hidden.element_size() <= CACHE_BYTES:
        kept[number] = hidden.cpu()


@contextmanager
def settled(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, then each module as it was."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


class _Read(Exception):  # noqa: N818 - control flow, not a fault
    """Ends a forward pass at the head."""


@contextmanager
def _head_input(head: nn.Module) -> Iterator[list[Tensor]]:
    """What a head is given in the forward pass inside the block, which ends there."""
    found: list[Tensor] = []

    def hook(_module: nn.Module, arguments: tuple[Any, ...]) -> None:
        found.append(arguments[0])
        raise _Read

    handle = head.register_forward_pre_hook(hook)
    try:
        yield found
    except _Read:
        pass
    finally:
        handle.remove()
