"""Gradients of what the tuned model predicts, integrated along the way from the base's activations to its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import kernels
from palimpsest.diff.methods import Entries, Method
from palimpsest.diff.text import Places
from palimpsest.evaluate.splice import LOGIT_BYTES, predictions
from palimpsest.harvest.stream import check_finite, kept_rows
from palimpsest.models import SIDES, ModelPair
from palimpsest.models.sites import Head
from palimpsest.models.upper import UpperHalf

NO_GAP = 1e-9
"""Nats per unit below which there is nothing to attribute."""


class Item(NamedTuple):
    """One batch, and which of its predictions count and how.

    Attributes:
        corpus: Number of its corpus.
        batch: The tokens.
        places: Where base and tuned activations are told apart.
        before: Flat places of the tokens whose outputs are the predictions that count.
        sign: None where a prediction counts with KL(tuned ‖ ·); else it counts with sign · cross-entropy.
    """

    corpus: int
    batch: TokenBatch
    places: Places
    before: Int[Tensor, " predictions"]
    sign: Float[Tensor, " predictions"] | None

    @property
    def ids(self) -> Int[Tensor, " predictions"]:
        """The tokens that are predicted."""
        return self.batch.input_ids.reshape(-1)[self.before + 1]


class Path(NamedTuple):
    """The straight way from base to tuned at the site, over one batch.

    Attributes:
        base: The base's activations.
        flat: Flat places at which the way leads anywhere.
        step: Tuned minus base there, in float32.
        entries: The dictionary's description of it.
        original: The tuned model's own head input at the predictions.
    """

    base: Float[Tensor, "batch seq d_model"]
    flat: Int[Tensor, " tokens"]
    step: Float[Tensor, "tokens d_model"]
    entries: Entries
    original: Float[Tensor, "predictions d_head"]

    def plus(self, added: Float[Tensor, "tokens d_model"]) -> Float[Tensor, "batch seq d_model"]:
        """The base's activations with something added at the places, in float32 at least."""
        dtype = torch.promote_types(self.base.dtype, torch.float32)
        flat = self.base.reshape(-1, self.base.shape[-1]).to(dtype)
        places = self.flat.to(flat.device)
        return flat.index_add(0, places, added.to(flat.device, dtype)).view(self.base.shape)


class Integrator:
    """Objectives of a pair at a site, and their gradients.

    The objective F of a batch is Σ KL(tuned ‖ ·) or Σ sign · cross-entropy over its predictions, as a function of
    the activations that the tuned model's upper layers are given.

    Args:
        method: The dictionary.
        pair: Both models, in memory at once.
        site: Where activations are read and given, absolute.
        steps: Midpoints between base and tuned at which gradients are taken.

    Raises:
        SiteError: Nothing can be written at the site.

    Source: Sundararajan et al., Axiomatic Attribution for Deep Networks (https://arxiv.org/abs/1703.01365).
    """

    def __init__(self, method: Method, pair: ModelPair, site: str, steps: int) -> None:
        self.method, self.pair, self.site, self.steps = method, pair, site, steps
        self.upper = UpperHalf(pair.tuned, site)

    @torch.inference_mode()
    def path(self, item: Item) -> Path:
        """Both models' activations of a batch, and their description.

        Raises:
            NumericsError: A model or the dictionary gives NaN or infinity.
        """
        batch, flat = item.batch, item.places.flat
        readings = [
            self.pair.side(side).read(batch.input_ids, [self.site], head=side == "tuned") for side in SIDES
        ]
        device, rows = self.method.change.device, []
        for side, reading in zip(SIDES, readings, strict=True):
            acts = kept_rows(reading.acts[self.site], flat)
            check_finite(acts, f"{side} model", self.site, batch, flat)
            rows.append(acts.to(device, torch.float32))
        tuned_head = readings[1].head_input
        assert tuned_head is not None
        original = kept_rows(tuned_head, item.before)
        check_finite(original, "tuned model", "its head", batch, item.before)
        entries = self.method.entries(torch.stack(rows, 1))
        check_finite(self.method.written(entries), "dictionary", self.site, batch, flat)
        return Path(readings[0].acts[self.site], flat, rows[1] - rows[0], entries, original)

    @torch.inference_mode()
    def values(
        self, path: Path, item: Item, added: Sequence[Float[Tensor, "tokens d_model"]]
    ) -> Float[Tensor, "predictions variants"]:
        """F of each prediction when the upper layers are given the base plus each of `added`, in float64."""
        heads = []
        for one in added:
            heads.append(kept_rows(self.upper.run(item.batch.input_ids, path.plus(one)), item.before))
            check_finite(heads[-1], "patched model", "its head", item.batch, item.before)
        found = predictions(self.pair.tuned.head, path.original, heads, item.ids)
        if item.sign is None:
            return found.kl.double()
        return found.ce[:, 1:].double() * item.sign.to(found.ce.device)[:, None]

    def gradients(
        self, path: Path, item: Item, masks: Sequence[Bool[Tensor, " predictions"]]
    ) -> list[Float[Tensor, "tokens d_model"]]:
        """∂F/∂h at the places, averaged along the way, for the predictions of each mask alone.

        One forward pass per step serves all masks. Parameters collect no gradients.

        Raises:
            NumericsError: A gradient overflows.
        """
        sums = [torch.zeros(path.step.shape, device=path.step.device) for _ in masks]
        with _frozen(self.pair.tuned.model), torch.enable_grad():
            for step in range(self.steps):
                hidden = path.plus((step + 0.5) / self.steps * path.step).requires_grad_()
                rows = kept_rows(self.upper.run(item.batch.input_ids, hidden), item.before)
                of_rows = head_gradient(self.pair.tuned.head, rows.detach(), path.original, item)
                for index, mask in enumerate(masks):
                    masked = of_rows * mask.to(of_rows.device)[:, None]
                    (found,) = torch.autograd.grad(rows, hidden, masked, retain_graph=index + 1 < len(masks))
                    sums[index] += kept_rows(found, path.flat).to(sums[index]) / self.steps
        for one in sums:
            check_finite(one, "gradient of the tuned model", self.site, item.batch, path.flat)
        return sums

    def shares(self, path: Path, gradient: Float[Tensor, "tokens d_model"]) -> Float[Tensor, " entries"]:
        """How much each entry lowers F: -entry · (change · gradient)."""
        crow, indices, values = path.entries
        return -values * kernels.row_dot(crow, indices.long(), gradient, self.method.change)


class Sums:
    """What the batches so far attribute to each latent, to the bias and to the whole difference, in nats.

    Attributes:
        latents: By latent, float64.
        bias: To the bias.
        whole: To tuned minus base, whatever the dictionary says of it.
        gap: F at the base's activations minus F at the tuned ones.
    """

    def __init__(self, method: Method) -> None:
        change = method.change
        self._bias = method.bias.double()
        self.latents = torch.zeros(len(change), dtype=torch.float64, device=change.device)
        self.bias = self.whole = self.gap = 0.0

    def add(
        self,
        path: Path,
        gradient: Float[Tensor, "tokens d_model"],
        shares: Float[Tensor, " entries"],
        ends: Float[Tensor, "predictions two"],
    ) -> None:
        """Count one batch.

        Args:
            path: Its way.
            gradient: The mean gradient along it.
            shares: What `Integrator.shares` gave for this gradient.
            ends: F of the predictions that count, at the base's and at the tuned activations.
        """
        self.latents.index_add_(0, path.entries.indices.long(), shares.double())
        self.bias -= float(gradient.sum(0, dtype=torch.float64) @ self._bias)
        self.whole -= float((gradient.double() * path.step).sum())
        self.gap += float((ends[:, 0] - ends[:, 1]).sum())

    def has_gap(self, units: int) -> bool:
        """Whether there is more than rounding to attribute."""
        return abs(self.gap) > NO_GAP * units

    def share(self, units: int) -> Float[NDArray, " latents"]:
        """Share of the gap of each latent; zeros where there is no gap."""
        latents = self.latents.cpu().numpy()
        return latents / self.gap if self.has_gap(units) else np.zeros_like(latents)


def head_gradient(
    head: Head,
    rows: Float[Tensor, "predictions d_head"],
    original: Float[Tensor, "predictions d_head"],
    item: Item,
) -> Float[Tensor, "predictions d_head"]:
    """∂F/∂(head input), chunk by chunk: logits of a whole batch never exist."""
    weight = getattr(head.module, "weight", None)
    device = rows.device if weight is None else weight.device
    chunk = 256 if weight is None else max(64, LOGIT_BYTES // (4 * weight.shape[0]))
    found = torch.empty_like(rows)
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        leaf = rows[part].to(device).detach().requires_grad_()
        log_q = head.logits(leaf).log_softmax(-1)
        if item.sign is None:
            with torch.no_grad():
                p = head.logits(original[part].to(device)).softmax(-1)
            # A token that both rule out has a log-probability of -inf and weighs nothing.
            value = -torch.where(p > 0, p * log_q, 0.0).sum()
        else:
            target = item.ids[part, None].to(device)
            value = -(item.sign[part].to(device) * log_q.gather(1, target)[:, 0]).sum()
        (gradient,) = torch.autograd.grad(value, leaf)
        found[part] = gradient.to(found.device)
    return found


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Parameters that want no gradients: nothing is kept for them during the forward pass."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
