"""The two differentiable ends of a training step: values of the selected latents, and their decoding."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.kernels.entries import Grouped


def encode_values(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    crow: Int[Tensor, " tokens_and_one"],
    index: Int[Tensor, " entries"],
    grouped: Grouped,
    value: Float[Tensor, " entries"] | None = None,
) -> Float[Tensor, " entries"]:
    """relu(x·W + b) at the selected entries, differentiable in x, W and b.

    The gradient of the input is computed only where it is wanted. An entry that is not positive gets none.

    Args:
        x: Activations, models side by side.
        weight: Encoder.
        bias: Its bias.
        crow: Where each token's entries start.
        index: The latent of each entry.
        grouped: The same entries by latent, from `kernels.by_latent`.
        value: The result as selection already found it (0 for padding); computed here when absent.

    Source: the gradient is that of a linear layer followed by a mask: dW_j = Σ_e g_e x_token(e).
    """
    result: Any = _EncodeValues.apply(x, weight, bias, crow, index, grouped, value)
    return result


def decode(
    value: Float[Tensor, " entries"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " features"],
    crow: Int[Tensor, " tokens_and_one"],
    index: Int[Tensor, " entries"],
    grouped: Grouped,
) -> Float[Tensor, "tokens features"]:
    """Weighted sum of decoder rows plus the bias, differentiable in values, rows and bias.

    Args:
        value: The value of each entry.
        weight: Decoder, one row per latent.
        bias: Decoder bias.
        crow: Where each token's entries start.
        index: The latent of each entry.
        grouped: The same entries by latent, from `kernels.by_latent`.
    """
    result: Any = _Decode.apply(value, weight, bias, crow, index, grouped)
    return result


class _EncodeValues(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x, weight, bias, crow, index, grouped, value):
        kept = (
            kernels.row_dot(crow, index, x, weight).add_(bias[index]).relu_()
            if value is None
            else value.clone()
        )
        ctx.save_for_backward(x, weight, crow, index, *grouped, kept)
        return kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x, weight, crow, index, *grouped, value = ctx.saved_tensors
        grouped = Grouped(*grouped)
        gradient = gradients[0].masked_fill(value <= 0, 0)
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = kernels.row_sum(crow, index, gradient, weight)
        if ctx.needs_input_grad[1]:
            of_weight = kernels.row_sum(grouped.crow, grouped.token, gradient[grouped.place], x)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.new_zeros(weight.shape[0]).index_add_(0, index, gradient)
        return of_x, of_weight, of_bias, None, None, None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value, weight, bias, crow, index, grouped):
        ctx.save_for_backward(value, weight, crow, index, *grouped)
        return kernels.row_sum(crow, index, value, weight).add_(bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        value, weight, crow, index, *grouped = ctx.saved_tensors
        grouped = Grouped(*grouped)
        gradient = gradients[0].contiguous()
        of_value = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_value = kernels.row_dot(crow, index, gradient, weight)
        if ctx.needs_input_grad[1]:
            of_weight = kernels.row_sum(grouped.crow, grouped.token, value[grouped.place], gradient)
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum(dim=0)
        return of_value, of_weight, of_bias, None, None, None
