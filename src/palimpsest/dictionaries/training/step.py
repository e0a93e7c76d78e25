"""One training step's forward: which latents survive, what they write, and the loss terms it gives.

Steps run on entries (token, latent, value) and never hold a `[tokens, latents]` matrix: the encode product is then
nearly all of the work. Only `relu` and `jumprelu`, while many of their latents are active, run dense, because that is
the faster way then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.config import FIXED, TrainConfig
from palimpsest.dictionaries.kernels.autograd import decode, encode_values
from palimpsest.dictionaries.training import losses
from palimpsest.dictionaries.training.weights import Weights

SPARSE_BELOW = 0.02
"""Share of active latents under which relu and jumprelu run on entries instead of dense matrices."""


class Plan(NamedTuple):
    """What a step needs to know beyond weights and data.

    Attributes:
        step: Counted from 0.
        dead: Latents that AuxK is to revive.
        cut: A lower estimate of the batch's smallest kept score, for batch_topk; None when unknown.
        density: Share of latents that were active when it was last looked at.
        precision: Of the encode product, "float32" or "bfloat16".
    """

    step: int
    dead: Int[Tensor, " dead"]
    cut: float | None
    density: float
    precision: str


class Forward(NamedTuple):
    """What a step computes before it moves the weights.

    Attributes:
        losses: Named terms and weights.
        active: How often each latent fired in the batch.
        smallest: The smallest score that was kept; infinity when none was.
        target: The batch, scaled.
        output: Its reconstruction, detached.
    """

    losses: losses.Losses
    active: Int[Tensor, " latents"]
    smallest: Float[Tensor, ""]
    target: Float[Tensor, "tokens models d_model"]
    output: Float[Tensor, "tokens models d_model"]


@dataclass(frozen=True, eq=False)
class _Entries:
    """Selected latents of a batch, with the graph of their values."""

    value: Tensor
    crow: Tensor
    index: Tensor
    grouped: kernels.Grouped
    smallest: Tensor


def forward(
    weights: Weights, x: Float[Tensor, "tokens models d_model"], config: TrainConfig, plan: Plan
) -> Forward:
    """Encode, decode and take the losses of one batch.

    Args:
        weights: The weights in training.
        x: Scaled activations.
        config: The recipe.
        plan: What changes from step to step.
    """
    if config.activation not in FIXED and plan.density > SPARSE_BELOW:
        return _dense(weights, x, config, plan)
    flat = x.flatten(1)
    centred = flat - weights.b_dec.detach()
    entries = _encode(weights, centred, config, plan)
    if weights.threshold is not None:
        near = weights.threshold.index_select(0, entries.index)
        jumped = Jump.apply(entries.value, near, config.objective.bandwidth)
        entries = replace(entries, value=jumped)
    outputs = _decode(weights, entries, config)
    output = outputs[-1]
    error = losses.RECONSTRUCTION[
        config.objective.error or ("squared" if weights.models == 1 else "unsquared")
    ]
    terms = {"reconstruction": _mean([error(x, one.view(x.shape)) for one in outputs])}
    factors = {"reconstruction": 1.0}
    if config.activation not in FIXED:
        charge = _charge(weights, config)
        # index_select, because its gradient adds up on entries and not on a dense matrix.
        terms["sparsity"] = _penalty(config)(entries.value * charge.index_select(0, entries.index), x)
        factors["sparsity"] = config.sparsity_weight_at(plan.step)
        _pull_dead(weights, centred, charge, config, plan, (terms, factors))
    elif plan.dead.numel() and config.objective.auxk_alpha > 0:
        terms["auxk"] = losses.auxk(flat - output, _revive(weights, centred, plan))
        factors["auxk"] = config.objective.auxk_alpha
    with torch.no_grad():
        active = torch.zeros(config.n_latents, dtype=torch.long, device=flat.device)
        active.index_add_(0, entries.index, (entries.value > 0).long())
    made = losses.Losses(terms, factors)
    return Forward(made, active, entries.smallest, x, output.detach().view(x.shape))


def _bias(weights: Weights) -> Tensor:
    """The encoder's bias, through which the decoder bias that was subtracted from the input gets its gradient.

    One vector product in place of the gradient of the whole input (OpenAI's sparse_autoencoder does the same).
    """
    return weights.b_enc - weights.enc.detach() @ (weights.b_dec - weights.b_dec.detach())


def _encode(weights: Weights, centred: Tensor, config: TrainConfig, plan: Plan) -> _Entries:
    """Select latents, and give the selected values their gradient."""
    enc, bias = weights.enc, _bias(weights)
    k = config.k_at(plan.step)
    tokens = len(centred)
    with torch.no_grad():
        # A pair's latents compete by what they write: activation times the sum of their decoder norms.
        scale = weights.norms().sum(dim=1) if weights.models > 1 else None
        options = {"scale": scale, "precision": plan.precision}
        if config.activation == "topk":
            fixed, places = kernels.encode_topk(centred, enc.detach(), bias.detach(), int(k), **options)
            if config.prefixes:
                places, order = places.sort(dim=1)
                fixed = fixed.gather(1, order)
            crow = torch.arange(tokens + 1, device=centred.device) * int(k)
            value, index = fixed.reshape(-1), places.reshape(-1)
            smallest = centred.new_full((), torch.inf)
        elif config.activation == "batch_topk":
            (crow, index, value), smallest = kernels.encode_batch_topk(
                centred, enc.detach(), bias.detach(), max(1, int(k * tokens)), guess=plan.cut, **options
            )
        else:
            floor = bias.new_zeros(len(bias))
            if weights.threshold is not None:
                # What lies in the window below a threshold is silent, but the threshold learns from it.
                floor = (weights.threshold - config.objective.bandwidth / 2).clamp(min=0)
            crow, index, value = kernels.encode_above(centred, enc.detach(), bias.detach(), floor)
            smallest = centred.new_full((), torch.inf)
        grouped = kernels.by_latent(crow, index, config.n_latents)
    value = encode_values(centred, enc, bias, crow, index, grouped, value)
    return _Entries(value, crow, index, grouped, smallest)


def _decode(weights: Weights, entries: _Entries, config: TrainConfig) -> list[Tensor]:
    """The reconstruction; for Matryoshka one per prefix, each the last one plus what its own latents add."""
    value, crow, index, grouped = entries.value, entries.crow, entries.index, entries.grouped
    if not config.prefixes:
        return [decode(value, weights.dec, weights.b_dec, crow, index, grouped)]
    groups = len(config.prefixes)
    with torch.no_grad():
        tokens = len(crow) - 1
        row = torch.arange(tokens, device=index.device).repeat_interleave(crow.diff(), output_size=len(index))
        # Entries of a token are ordered by latent, so each (token, prefix) owns one stretch of them.
        stretch = row * groups
        for end in config.prefixes[:-1]:
            stretch += index >= end
        counts = torch.zeros(tokens * groups + 1, dtype=torch.long, device=index.device)
        counts.index_add_(0, stretch + 1, torch.ones_like(stretch))
        fine = kernels.Grouped(grouped.crow, stretch[grouped.place], grouped.place)
        crow = counts.cumsum(0)
    parts = decode(value, weights.dec, torch.zeros_like(weights.b_dec), crow, index, fine)
    sums = parts.view(tokens, groups, -1).cumsum(dim=1) + weights.b_dec
    return list(sums.unbind(dim=1))


def _revive(weights: Weights, centred: Tensor, plan: Plan) -> Float[Tensor, "tokens features"]:
    """What the strongest dead latents would write, at most d_model / 2 of them per token, without the bias.

    The gradient reaches the encoder of those latents, which is what brings them back.
    """
    dead = plan.dead
    enc, dec = weights.enc.index_select(0, dead), weights.dec.index_select(0, dead)
    bias = _bias(weights).index_select(0, dead)
    width = max(1, min(dec.shape[1] // weights.models // 2, len(dead)))
    with torch.no_grad():
        scale = dec.view(len(dead), weights.models, -1).norm(dim=2).sum(dim=1) if weights.models > 1 else None
        value, index = kernels.encode_topk(
            centred, enc.detach(), bias.detach(), width, scale=scale, precision=plan.precision
        )
        crow = torch.arange(len(centred) + 1, device=centred.device) * width
        value, index = value.reshape(-1), index.reshape(-1)
        grouped = kernels.by_latent(crow, index, len(dead))
    value = encode_values(centred, enc, bias, crow, index, grouped, value)
    return decode(value, dec, dec.new_zeros(dec.shape[1]), crow, index, grouped)


def _dense(
    weights: Weights, x: Float[Tensor, "tokens models d_model"], config: TrainConfig, plan: Plan
) -> Forward:
    """Relu and jumprelu while many latents fire: five dense products, which entries would not undercut."""
    flat = x.flatten(1)
    centred = flat - weights.b_dec.detach()
    pre = torch.addmm(_bias(weights), centred, weights.enc.T)
    charge = _charge(weights, config)
    terms, factors = {}, {}
    if weights.threshold is None:
        values = pre.relu()
    else:
        values = Jump.apply(pre, weights.threshold.expand_as(pre), config.objective.bandwidth)
    output = torch.addmm(weights.b_dec, values, weights.dec)
    error = losses.RECONSTRUCTION[
        config.objective.error or ("squared" if weights.models == 1 else "unsquared")
    ]
    terms["reconstruction"] = error(x, output.view(x.shape))
    terms["sparsity"] = _penalty(config)(values * charge, x)
    factors |= {"reconstruction": 1.0, "sparsity": config.sparsity_weight_at(plan.step)}
    _pull_dead(weights, centred, charge, config, plan, (terms, factors))
    active = (values.detach() > 0).sum(dim=0)
    smallest = flat.new_full((), torch.inf)
    return Forward(losses.Losses(terms, factors), active, smallest, x, output.detach().view(x.shape))


def _pull_dead(
    weights: Weights,
    centred: Tensor,
    charge: Tensor,
    config: TrainConfig,
    plan: Plan,
    losses_: tuple[dict[str, Tensor], dict[str, float]],
) -> None:
    """Add the loss that pulls dead jumprelu latents back towards their thresholds; one product over those latents."""
    if weights.threshold is None or not plan.dead.numel() or config.objective.preact_weight == 0:
        return
    terms, factors = losses_
    dead = plan.dead
    pre = torch.addmm(_bias(weights).index_select(0, dead), centred, weights.enc.index_select(0, dead).T)
    threshold, charge = weights.threshold.index_select(0, dead), charge.index_select(0, dead)
    terms["preact"] = losses.pre_activation(pre, threshold, charge)
    factors["preact"] = config.objective.preact_weight


class Jump(torch.autograd.Function):
    """relu(h) where h exceeds its threshold; the threshold learns from the positive h in a window around it.

    Both arguments have one shape: all pre-activations, or those of entries.

    Source: Rajamanoharan et al., JumpReLU sparse autoencoders (https://arxiv.org/abs/2407.14435), with the
    rectangular kernel; the threshold itself is the parameter, because its logarithm stays frozen under Adam.
    """

    @staticmethod
    def forward(ctx: Any, pre: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:  # noqa: D102
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth = bandwidth
        return torch.where(pre > threshold.clamp(min=0), pre, 0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:  # noqa: D102
        pre, threshold = ctx.saved_tensors
        inside = ((pre - threshold).abs() <= ctx.bandwidth / 2) & (pre > 0)
        moved = torch.where(inside, grads[0] * threshold, 0) / -ctx.bandwidth
        return torch.where(pre > threshold.clamp(min=0), grads[0], 0), moved, None


def _charge(weights: Weights, config: TrainConfig) -> Float[Tensor, " latents"]:
    kind = _kind(config)
    shared = weights.shared(config)
    share = None
    if shared.stop > shared.start:
        share = torch.ones(config.n_latents, device=weights.dec.device)
        share[shared] = config.objective.shared_penalty
    return losses.latent_charge(weights.norms(), kind, share)


def _penalty(config: TrainConfig) -> Callable[[Tensor, Tensor], Tensor]:
    return losses.tanh if _kind(config) == "tanh" else losses.l1


def _kind(config: TrainConfig) -> str:
    return config.objective.sparsity or ("tanh" if config.activation == "jumprelu" else "l1_sum")


def _mean(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).mean()
