"""Rescaling a dictionary without changing what it does: input scales and decoder norms go into the weights.

A saved dictionary reads raw activations, and the activation of a latent is already weighted by the norm of its
decoder: the weighting that crosscoders select by (Minder et al., https://arxiv.org/abs/2504.02922) and that
SAELens calls `rescale_acts_by_decoder_norm`. Nothing has to be remembered at inference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.native import FIELDS, build

ALONG = ("b_enc", "threshold", "b_gate", "b_mag")
"""Tensors `[latents]` in the units of a latent's activation."""


def folded(dictionary: Dictionary, *, scale: Float[Tensor, " models"] | None = None) -> Dictionary:
    """The same dictionary with both folds done; see `fold`."""
    fields = {name: value for name, value in dictionary.describe().items() if name in FIELDS}
    weights = fold(fields, dictionary.state_dict(), scale=scale)
    return build(fields, weights, "the folded dictionary", metadata=dictionary.metadata)


def fold(
    fields: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    *,
    scale: Float[Tensor, " models"] | None = None,
) -> dict[str, Tensor]:
    """Fold what each model's activations were multiplied by, then the norms of the decoder rows.

    With n_j the sum over models of the norms of latent j's rows (after the first fold), the folded dictionary
    gives n_j times the activations, writes the same output, and its own n_j is 1. relu, jumprelu, gated and
    batch_topk keep their function exactly. topk selects by the weighted activation, as training did; where
    the models of a pair have different scales, its rows are weighted by them (their mean, the geometric one,
    taken out), since training saw scaled rows: the sum of the two norms is then 1 up to the ratio of the scales.

    Args:
        fields: activation is read.
        weights: In our layout, as training left them. `threshold` is per latent in units of the unweighted
            activation or, without dimensions, one number in units of the weighted one (batch_topk's running
            threshold, in training's scale).
        scale: What training multiplied each model's activations by; 1 when absent.

    Returns:
        New weights. Rows without length are left alone, except that topk and batch_topk, for which their
        weighted activation is 0, no longer read anything with them.
    """
    norms = torch.linalg.vector_norm(weights["W_dec"], dim=2, dtype=torch.float64)
    inverse = norms.new_ones(norms.shape[1]) if scale is None else 1 / scale.to(norms)
    selects = fields["activation"] == "topk"
    counted = inverse.log().mean().exp().expand_as(inverse) if selects else inverse
    by, seen = norms @ counted, norms.sum(dim=1)
    made = dict(weights) if scale is None else fold_scale(weights, scale)
    if (running := made.get("threshold")) is not None and running.ndim == 0:
        # Training compared h * seen with it; the folded dictionary compares h * by.
        ratio = torch.where(seen > 0, by / seen, counted.mean())
        made["threshold"] = (running.double() * ratio).to(made["W_enc"].dtype)
        along = tuple(name for name in ALONG if name != "threshold")
    else:
        along = ALONG
    reads = by if fields["activation"] in ("topk", "batch_topk") else torch.where(by > 0, by, 1)
    writes = torch.where(by > 0, by, 1).to(made["W_dec"].dtype)
    made["W_enc"] = made["W_enc"] * reads.to(made["W_enc"].dtype)
    made["W_dec"] = made["W_dec"] / writes[:, None, None]
    for name in along:
        if name in made:
            made[name] = made[name] * reads.to(made[name].dtype)
    return made


def fold_scale(weights: Mapping[str, Tensor], scale: Float[Tensor, " models"]) -> dict[str, Tensor]:
    """Weights that do on raw activations what `weights` do on activations times `scale`, output unscaled."""
    factor = scale.to(weights["W_enc"])
    return {
        **weights,
        "W_enc": weights["W_enc"] * factor[:, None, None],
        "W_dec": weights["W_dec"] / factor[:, None],
        "b_dec": weights["b_dec"] / factor[:, None],
    }
