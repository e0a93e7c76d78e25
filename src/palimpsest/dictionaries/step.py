"""One training step's forward: selection, sparse decoding, and the loss terms it gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.dictionaries import losses
from palimpsest.dictionaries.activations import batch_top_k, top_k
from palimpsest.dictionaries.config import TrainConfig
from palimpsest.dictionaries.dictionary import Dictionary


class Forward(NamedTuple):
    """What a step computes before it moves the weights.

    Attributes:
        losses: Named terms and weights.
        active: How often each latent fired in the batch.
        smallest: The smallest positive activation that was kept; infinity when none was.
        tokens: Size of the batch.
    """

    losses: losses.Losses
    active: Float[Tensor, " latents"]
    smallest: Float[Tensor, ""]
    tokens: int


def forward(
    dictionary: Dictionary,
    flat: Float[Tensor, "tokens features"],
    config: TrainConfig,
    k: int | float,
    dead: Int[Tensor, " dead"],
) -> Forward:
    """Encode, decode and take the losses of one batch.

    Args:
        dictionary: The weights in training.
        flat: Activations with the models side by side, scaled.
        config: The recipe.
        k: Latents per token of this step.
        dead: Latents that AuxK is to revive.
    """
    pre = _pre_activations(dictionary, flat, config.dtype)
    if config.activation == "relu":
        return _dense(dictionary, flat, pre, config)
    tokens = flat.shape[0]
    if config.activation == "topk":
        values, indices = top_k(pre, int(k), exact=False)
        crow = torch.arange(tokens + 1, device=flat.device) * int(k)
        values, indices = values.reshape(-1), indices.reshape(-1)
    else:
        row, indices, values = batch_top_k(pre, k)
        crow = torch.searchsorted(row, torch.arange(tokens + 1, device=flat.device))
    output = dictionary.gather(crow, indices, values) + dictionary.b_dec.view(-1)
    terms = {"reconstruction": losses.reconstruction(flat, output)}
    weights = {"reconstruction": 1.0}
    if dead.numel() and config.auxk_alpha > 0:
        revived = _revive(dictionary, flat, dead)
        terms["auxk"] = losses.auxk(flat - output, revived)
        weights["auxk"] = config.auxk_alpha
    positive = values.detach() > 0
    active = torch.zeros(config.n_latents, device=flat.device).index_add_(0, indices, positive.float())
    return Forward(losses.Losses(terms, weights), active, _smallest(values.detach(), positive), tokens)


def _pre_activations(
    dictionary: Dictionary, flat: Tensor, dtype: str, latents: Tensor | None = None
) -> Float[Tensor, "tokens latents"]:
    """Pre-activations of all latents or of some.

    The decoder bias is folded into the encoder's: its gradient then needs one vector product instead of the
    gradient of the whole input.
    """
    weight = dictionary.W_enc.view(-1, dictionary.n_latents)
    bias = dictionary.b_enc
    if latents is not None:
        weight, bias = weight.index_select(1, latents), bias.index_select(0, latents)
    if dictionary.apply_b_dec_to_input:
        bias = bias - dictionary.b_dec.view(-1) @ weight
    if dtype == "float32":
        return torch.addmm(bias, flat, weight)
    return (flat.bfloat16() @ weight.bfloat16()).float() + bias


def _revive(dictionary: Dictionary, flat: Tensor, dead: Tensor) -> Float[Tensor, "tokens features"]:
    """What the strongest dead latents would write, at most d_model / 2 of them per token, without the bias.

    The gradient reaches the encoder of those latents, which is what brings them back.
    """
    pre = _pre_activations(dictionary, flat, "float32", dead)
    width = max(1, min(dictionary.d_model // 2, dead.numel()))
    values, place = top_k(pre, width, exact=False)
    crow = torch.arange(flat.shape[0] + 1, device=flat.device) * width
    return dictionary.gather(crow, dead[place.reshape(-1)], values.reshape(-1))


def _dense(dictionary: Dictionary, flat: Tensor, pre: Tensor, config: TrainConfig) -> Forward:
    """ReLU with its sparsity loss: half of the latents fire at first, so sparse decoding would not help."""
    values = pre.relu()
    output = values @ dictionary.W_dec.view(dictionary.n_latents, -1) + dictionary.b_dec.view(-1)
    terms = {
        "reconstruction": losses.reconstruction(flat, output),
        "l1": losses.l1(values, dictionary.W_dec, flat),
    }
    weights = {"reconstruction": 1.0, "l1": config.l1_weight}
    positive = values.detach() > 0
    active = positive.float().sum(dim=0)
    return Forward(losses.Losses(terms, weights), active, _smallest(values.detach(), positive), flat.shape[0])


def _smallest(values: Tensor, positive: Bool[Tensor, " ..."]) -> Float[Tensor, ""]:
    return torch.where(positive, values, values.new_full((), torch.inf)).amin()
