"""What makes an adapter sparse: penalties on its numbers, and keeping only the strongest of them."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.dictionaries import Dictionary
from palimpsest.tune.adapter import LatentLayer, latent_layers

ADAPTER = "default"
"""Name of the adapter that is trained."""

# Frozen: a pass over a whole decoder is not worth repeating every step.
_norms: WeakKeyDictionary[Dictionary, Tensor] = WeakKeyDictionary()


def penalty(model: nn.Module, l1: float, group: float, adapter: str = ADAPTER) -> Float[Tensor, ""]:
    """l1 Σ |value| ‖d‖ + group Σ_sites ‖values of the site‖, differentiable.

    Where a latent has a row (or several numbers), its value is their length. An edit of nothing costs nothing, and has
    the gradient 0 there, as lengths have it in torch.

    Args:
        model: With a latent adapter.
        l1: Weight of the first term, per unit of value times decoder norm.
        group: Weight of the second.
        adapter: Which one.
    """
    total: Tensor | float = 0.0
    for layer in layers_of(model, adapter):
        lengths = _lengths(layer, adapter)
        if lengths is None:
            continue
        if l1:
            total = total + l1 * (lengths * decoder_norms(layer, adapter)).sum()
        if group:
            total = total + group * torch.linalg.vector_norm(lengths)
    return total if isinstance(total, Tensor) else torch.tensor(total)


@torch.no_grad()
def keep_top(model: nn.Module, n: int, adapter: str = ADAPTER) -> None:
    """Set all but the n strongest latents of each site, by |value| times decoder norm, to 0."""
    for layer in layers_of(model, adapter):
        layer.component(adapter).keep_top_(n, decoder_norms(layer, adapter))


def kept(step: int, steps: int, latents: int, n: int) -> int:
    """How many latents of a site stay after a step: from all to n over the first half of the run, geometrically.

    Args:
        step: Optimiser steps that are done.
        steps: Of the whole run.
        latents: That the site may change.
        n: Where it ends.
    """
    if n >= latents:
        return latents
    share = min(1.0, step / max(1, steps // 2))
    return max(n, round(latents * (n / latents) ** share))


def layers_of(model: nn.Module, adapter: str = ADAPTER) -> list[LatentLayer]:
    """The layers that hold an adapter, lowest first."""
    return [layer for layer in latent_layers(model) if adapter in layer.components]


@torch.no_grad()
def decoder_norms(layer: LatentLayer, adapter: str = ADAPTER) -> Float[Tensor, " n"]:
    """Length of the decoder row of each latent that the adapter may change, float32."""
    component, dictionary = layer.component(adapter), layer.dictionary_of(adapter)
    norms = _norms.get(dictionary)
    if norms is None or norms.device != dictionary.device:
        norms = torch.linalg.vector_norm(dictionary.W_dec[:, 0].float(), dim=1)
        _norms[dictionary] = norms
    return norms if component.whole else norms[component.latents]


def _lengths(layer: LatentLayer, adapter: str) -> Float[Tensor, " n"] | None:
    rows = layer.component(adapter).rows()
    if not rows:
        return None
    if len(rows) == 1 and rows[0].ndim == 1:
        return rows[0].abs()
    matrix = torch.cat([one if one.ndim > 1 else one[:, None] for one in rows], dim=1)
    return torch.linalg.vector_norm(matrix, dim=1)
