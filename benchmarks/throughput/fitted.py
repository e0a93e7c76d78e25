"""What a finished contestant gives, and how it is measured on rows it has not seen."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Weights(NamedTuple):
    """`f = relu((x - shift) @ encoder + bias)`, `x ≈ f @ decoder + offset`; `[features, latents]` and back."""

    encoder: Tensor
    bias: Tensor
    decoder: Tensor
    offset: Tensor
    shift: Tensor | float


class Fitted(NamedTuple):
    """A trained dictionary of any library.

    Attributes:
        infer: The library's own encode and decode: `[tokens, features]` to reconstruction and codes per token.
        weights: For the comparison at exactly k latents per token; None where `infer` keeps exactly k anyway.
    """

    infer: Callable[[Tensor], tuple[Tensor, Tensor]]
    weights: Weights | None


def fve(x: Tensor, output: Tensor) -> float:
    x = x.float()
    return 1 - float((x - output.float()).square().sum() / (x - x.mean(dim=0)).square().sum())


@torch.no_grad()
def measure(fitted: Fitted, x: Tensor, k: int, models: int) -> dict[str, float]:
    """FVE and L0 as the library infers, and FVE with the k·n strongest activations of the rows.

    The strength is the activation times the decoder norm (the sum over models), for everybody.
    """
    flat = x.flatten(1).float()
    output, l0 = fitted.infer(flat)
    found = {"fve": fve(flat, output), "l0": float(l0.float().mean())}
    if fitted.weights is None:
        return {**found, "fve_at_k": found["fve"]}
    w = Weights(*(v.float() if isinstance(v, Tensor) else v for v in fitted.weights))
    f = torch.relu((flat - w.shift) @ w.encoder + w.bias)
    strength = f * w.decoder.view(w.decoder.shape[0], models, -1).norm(dim=2).sum(dim=1)
    place = strength.flatten().topk(min(k * len(flat), strength.numel()), sorted=False).indices
    kept = torch.zeros_like(f).flatten().scatter(0, place, f.flatten()[place]).view_as(f)
    return {**found, "fve_at_k": fve(flat, kept @ w.decoder + w.offset)}
