"""Training losses as named terms; the objective is nothing but their weighted sum.

Terms do not depend on the scale of the activations: errors and L1 are divided by what the batch itself offers (its
spread, its norm), the others take activations whose norm is sqrt(d_model) on average.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

LEAST_SPREAD = 0.03
"""What is taken for the spread of a batch whose tokens are all alike, as a share of their norm."""


class Losses(NamedTuple):
    """Named loss terms and their weights.

    Attributes:
        terms: Scalars with their graph, before weighting.
        weights: One per term.
    """

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]

    def total(self) -> Float[Tensor, ""]:
        """The weighted sum: what is minimised."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()


def squared(
    target: Float[Tensor, "tokens models d_model"], output: Float[Tensor, "tokens models d_model"]
) -> Float[Tensor, ""]:
    """Share of the variance of the batch that is not explained: squared error over squared deviation."""
    return (target - output).square().sum() / _deviation(target)


def unsquared(
    target: Float[Tensor, "tokens models d_model"], output: Float[Tensor, "tokens models d_model"]
) -> Float[Tensor, ""]:
    """Mean norm of the error of each model, over the mean norm of the deviation.

    Source: the released trainer of Minder, Dumas et al. (https://arxiv.org/abs/2504.02922) takes the mean norm,
    without the divisor.
    """
    target = target.detach()
    divisor = (target - target.mean(dim=0)).norm(dim=2).mean()
    divisor = divisor.clamp(min=LEAST_SPREAD * target.norm(dim=2).mean() + 1e-12)
    # The norm has no derivative at 0, where its subgradient 0 would be NaN.
    return ((target - output).square().sum(dim=2) + 1e-12).sqrt().mean() / divisor


RECONSTRUCTION = {"squared": squared, "unsquared": unsquared}


def auxk(
    residual: Float[Tensor, "tokens features"], output: Float[Tensor, "tokens features"]
) -> Float[Tensor, ""]:
    """How badly dead latents explain what the live ones leave over.

    Args:
        residual: Target minus reconstruction, which already holds the bias; taken as a constant.
        output: Weighted decoder rows of dead latents, without the bias.

    Source: Gao et al., Scaling and evaluating sparse autoencoders (https://arxiv.org/abs/2406.04093), A.2.
    """
    residual = residual.detach()
    return (residual - output).square().sum() / _deviation(residual)


def latent_charge(
    norms: Float[Tensor, "latents models"], kind: str, share: Float[Tensor, " latents"] | None = None
) -> Float[Tensor, " latents"]:
    """What one unit of each latent costs in the sparsity penalties, with the gradient of the norms.

    Args:
        norms: Decoder norms per model.
        kind: l1_sum and tanh: their sum. l1_concat: the norm of both together. l1_mixed: concat + sum / 10.
        share: Factor per latent; shared latents of a pair pay less.

    Source: Lindsey et al., Sparse Crosscoders (https://transformer-circuits.pub/2024/crosscoders) for the sum;
    the other two are options of https://github.com/science-of-finetuning/crosscoder_learning.
    """
    together = (norms.square().sum(dim=1) + 1e-12).sqrt()
    charge = {
        "l1_sum": norms.sum(dim=1),
        "tanh": norms.sum(dim=1),
        "l1_concat": together,
        "l1_mixed": together + 0.1 * norms.sum(dim=1),
    }[kind]
    return charge if share is None else charge * share


def l1(
    weighted: Float[Tensor, " *shape"], target: Float[Tensor, "tokens models d_model"]
) -> Float[Tensor, ""]:
    """Charged activations per token, over the mean norm of the target.

    Args:
        weighted: Activations times `latent_charge`; any shape, zeros may be left out.
        target: What is reconstructed.
    """
    return weighted.sum() / target.shape[0] / target.detach().flatten(1).norm(dim=1).mean().clamp(min=1e-12)


TANH_SCALE = 4.0


def tanh(
    weighted: Float[Tensor, " *shape"], target: Float[Tensor, "tokens models d_model"]
) -> Float[Tensor, ""]:
    """Saturating count of active latents per token, over d_model; an activation counts as tanh of 4 times it.

    Source: Conerly et al., Dictionary learning optimization techniques, January 2025
    (https://transformer-circuits.pub/2025/january-update), c = 4.
    """
    return (TANH_SCALE * weighted).tanh().sum() / target.shape[0] / target.shape[2]


def pre_activation(
    pre: Float[Tensor, "tokens latents"],
    threshold: Float[Tensor, " latents"],
    charge: Float[Tensor, " latents"],
) -> Float[Tensor, ""]:
    """How far below its threshold each latent stays, weighted by its norm: mean over tokens and latents.

    Taken for dead latents, on every token: a gradient for what never fires. Source: as `tanh`, which takes it for all
    latents; for dead ones alone it is SAELens' `pre_act_loss`.
    """
    return ((threshold - pre).relu() @ charge).mean() / len(charge)


def _deviation(target: Tensor) -> Float[Tensor, ""]:
    """Squared distance to the mean of the batch, a constant; never zero."""
    target = target.detach()
    spread = (target - target.mean(dim=0)).square().sum()
    return spread.clamp(min=LEAST_SPREAD**2 * target.square().sum() + 1e-12)
