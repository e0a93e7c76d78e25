"""The one edit of latents: h + (f(z) - z) W_dec, written without a reconstruction and sparse in z.

What the dictionary does not explain is never touched, an edit of nothing is the identity to the last bit, and the
gradient is the true one for whatever lies below: z depends on h through the encoder's kept entries alone.

Source: Khoriaty, Interpretable Fine Tuning Research Update (https://www.lesswrong.com/posts/xZkBDAgQGqm6tvCvy), which
writes dec(f(z)) + (h - dec(z)) and cuts the second term off from gradients; the sum is the same, its gradient is not.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import Codes, Dictionary, kernels
from palimpsest.dictionaries.input_norm import normalise


class Edit(NamedTuple):
    """A change of latents; what is None changes nothing.

    Attributes:
        entries: Change of z at each entry of the codes.
        constant: Change of z_i at every token, whether i fires or not, for `n` latents.
        low: u and B: the change of those n latents is u Bᵀ.
        vector: Added as it is, past all latents.
    """

    entries: Float[Tensor, " entries"] | None = None
    constant: Float[Tensor, " n"] | None = None
    low: tuple[Float[Tensor, "tokens r"], Float[Tensor, "n r"]] | None = None
    vector: Float[Tensor, " d_model"] | None = None


class Reading(NamedTuple):
    """What a dictionary reads in some tokens.

    Attributes:
        codes: Their codes, values in float32 or better, differentiable where `x` is.
        x: What the encoder saw: the activations, normalised where the dictionary has an `input_norm`.
        scale: By how much an edit grows when it is written back, `[tokens, 1]`, where there is an `input_norm`.
    """

    codes: Codes
    x: Float[Tensor, "tokens d_model"]
    scale: Float[Tensor, "tokens 1"] | None


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that edits are computed in: float32, or float64 where the activations are."""
    return torch.promote_types(dtype, torch.float32)


def read(dictionary: Dictionary, hidden: Float[Tensor, "tokens d_model"]) -> Reading:
    """Encode activations; nothing wider than the codes is kept for the backward pass.

    Args:
        dictionary: One that reads a single model.
        hidden: Activations of the site; where they need a gradient, so do the codes.
    """
    x, scale = hidden, None
    if dictionary.input_norm is not None:
        x, norm = normalise(hidden, 1, dictionary.input_norm)
        scale = norm.scale
    with torch.no_grad():
        codes = dictionary.encode(hidden.detach(), check=False)
    values = codes.values.to(wide(hidden.dtype))
    if torch.is_grad_enabled() and x.requires_grad:
        values = _Attach.apply(x, values, codes.crow, codes.indices, _slopes(dictionary, codes), dictionary)
    found: Any = values
    return Reading(
        Codes(codes.crow, codes.indices, found, codes.n_latents, codes.width, codes.norm), x, scale
    )


def write(
    dictionary: Dictionary,
    edit: Edit,
    reading: Reading | None,
    *,
    latents: Int[Tensor, " n"] | None = None,
    mask: Float[Tensor, " latents"] | None = None,
) -> Float[Tensor, "tokens d_model"] | Float[Tensor, " d_model"] | None:
    """What an edit adds to the activations: one row per token, or one vector for all; None where nothing is.

    Args:
        dictionary: Whose decoder writes.
        edit: The change of its latents.
        reading: Needed for entries and low-rank changes.
        latents: The latents that `constant` and `low` speak of; all, in their order, when absent.
        mask: 1 for the latents whose change counts, 0 for the others.
    """
    rows = dictionary.W_dec.view(dictionary.n_latents, -1)
    total = None
    if edit.entries is not None and reading is not None:
        codes, change = reading.codes, edit.entries
        if mask is not None:
            change = change * mask[codes.indices]
        total = _Write.apply(change, rows, codes.crow, codes.indices)
    if edit.low is not None:
        u, weight = edit.low
        total = _add(total, u @ _through(weight, rows, latents, mask))
    if edit.constant is not None:
        total = _add(total, _through(edit.constant[:, None], rows, latents, mask)[0])
    if reading is not None and reading.scale is not None and total is not None:
        total = total * reading.scale
    return total if edit.vector is None else _add(total, edit.vector)


def _through(
    weight: Float[Tensor, "n r"], rows: Tensor, latents: Tensor | None, mask: Tensor | None
) -> Float[Tensor, "r d_model"]:
    """weightᵀ times the decoder rows of its latents; the decoder is neither copied nor cast as a whole."""
    if mask is not None:
        weight = weight * (mask if latents is None else mask[latents])[:, None]
    if latents is not None and 4 * len(latents) < len(rows):
        rows = rows[latents]
    elif latents is not None:
        weight = weight.new_zeros(len(rows), weight.shape[1]).index_copy(0, latents, weight)
    return (weight.T.to(rows.dtype) @ rows).to(weight.dtype)


def _add(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total + more


def _slopes(dictionary: Dictionary, codes: Codes) -> Tensor | None:
    """D z / d pre-activation of each entry where it is not 1: gated dictionaries rescale."""
    return dictionary.r_mag.exp()[codes.indices] if dictionary.activation == "gated" else None


class _Attach(torch.autograd.Function):
    """Values that are known already, with the gradient they have in what was encoded.

    The selection is held fixed: dz_e / dx is the encoder's column of the entry's latent, and padding has none.
    """

    @staticmethod
    def forward(ctx: Any, x, values, crow, index, slopes, dictionary):
        ctx.save_for_backward(crow, index, slopes, values > 0)
        ctx.dictionary, ctx.dtype = dictionary, x.dtype
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        crow, index, slopes, positive = ctx.saved_tensors
        gradient = gradients[0].masked_fill(~positive, 0)
        if slopes is not None:
            gradient = gradient * slopes
        columns = ctx.dictionary.W_enc.view(-1, ctx.dictionary.n_latents).T.contiguous()
        of_x = kernels.row_sum(crow, index, gradient.to(columns.dtype), columns)
        return of_x.to(ctx.dtype), None, None, None, None, None


class _Write(torch.autograd.Function):
    """Weighted sum of decoder rows, differentiable in the weights; keeps the entries and nothing else."""

    @staticmethod
    def forward(ctx: Any, change, rows, crow, index):
        ctx.save_for_backward(rows, crow, index)
        ctx.dtype = change.dtype
        return kernels.row_sum(crow, index, change.to(rows.dtype), rows).to(change.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        rows, crow, index = ctx.saved_tensors
        gradient = gradients[0].to(rows.dtype).contiguous()
        return kernels.row_dot(crow, index, gradient, rows).to(ctx.dtype), None, None, None


__all__ = ["Edit", "Reading", "read", "wide", "write"]
