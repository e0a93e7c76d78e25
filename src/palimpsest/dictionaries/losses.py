"""Training losses as named terms; the objective is nothing but their weighted sum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Losses(NamedTuple):
    """Named loss terms and their weights.

    Attributes:
        terms: Scalars with their graph, before weighting.
        weights: One per term.
    """

    terms: Mapping[str, Tensor]
    weights: Mapping[str, float]

    def total(self) -> Tensor:
        """The weighted sum: what is minimised."""
        return torch.stack([self.weights[name] * term for name, term in self.terms.items()]).sum()


def reconstruction(
    target: Float[Tensor, "tokens features"], output: Float[Tensor, "tokens features"]
) -> Float[Tensor, ""]:
    """Share of the variance of the batch that is not explained: squared error over squared deviation."""
    return (target - output).square().sum() / _deviation(target)


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


def l1(
    values: Float[Tensor, "tokens latents"],
    W_dec: Float[Tensor, "latents models d_model"],  # noqa: N803
    target: Float[Tensor, "tokens features"],
) -> Float[Tensor, ""]:
    """Activations weighted by the norm of their decoder row, per token, over the mean norm of the target."""
    norms = W_dec.flatten(1).norm(dim=1)
    return (values @ norms).mean() / target.detach().norm(dim=1).mean().clamp(min=1e-12)


def _deviation(target: Tensor) -> Float[Tensor, ""]:
    """Squared distance to the mean of the batch, a constant; never zero."""
    target = target.detach()
    return (target - target.mean(dim=0)).square().sum().clamp(min=1e-12)
