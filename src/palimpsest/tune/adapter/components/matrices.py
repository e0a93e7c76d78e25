"""Components whose change of a latent depends on the token beyond that latent: gate, low-rank, mlp."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.dictionaries import kernels
from palimpsest.edits import Edit, Reading
from palimpsest.tune.adapter.components.base import Component, zeros
from palimpsest.tune.adapter.components.shapes import one_sided, soft_threshold


class Gate(Component):
    """f(z) = ReLU(z + S_t(G x + c)) where z > 0: how far a latent moves depends on the token.

    S_t is a soft threshold that each latent learns, from 0 on. G is evaluated at the entries of the codes alone.

    Source: Ferrao et al., Feature Steering with Reinforcement Learning (https://arxiv.org/abs/2509.12934), who let it
    turn on latents that do not fire, too; then most of them move on every token.
    """

    kind = "gate"

    def __init__(
        self, n_latents: int, latents: Tensor | None = None, d_model: int = 0, rank: int | None = None
    ) -> None:
        super().__init__(n_latents, latents)
        self.d_model, self.rank = d_model, rank
        self.weight = zeros(self.n, rank or d_model)
        self.bias, self.threshold = zeros(self.n), zeros(self.n)
        if rank is not None:
            self.down = nn.Parameter(torch.randn(d_model, rank) / d_model**0.5)

    def _new(self, latents: Tensor) -> Component:
        return Gate(self.n_latents, latents, self.d_model, self.rank)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        codes, x = reading.codes, reading.x.to(self.weight.dtype)
        if self.rank is not None:
            x = x @ self.down
        index = codes.indices
        if self.place is not None:
            # Latents that stay are read off the last row, and their result is dropped.
            index = self.place[index].clamp(max=self.n - 1)
        a: Any = _EntryDot.apply(x, self.weight, codes.crow, index)
        a = a + self.take(self.bias, codes.indices)
        a = soft_threshold(a, self.take(one_sided(self.threshold), codes.indices))
        if self.place is not None:
            a = torch.where(self.place[codes.indices] < self.n, a, 0)
        return Edit(entries=torch.maximum(a, -codes.values) * (codes.values > 0))

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight, self.bias]


class _EntryDot(torch.autograd.Function):
    """x_token(e) · row_index(e) for every entry e; the gradient of the rows is grouped by latent."""

    @staticmethod
    def forward(ctx: Any, x, rows, crow, index):
        ctx.save_for_backward(x, rows, crow, index)
        return kernels.row_dot(crow, index, x.contiguous(), rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        x, rows, crow, index = ctx.saved_tensors
        gradient, of_x, of_rows = gradients[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_x = kernels.row_sum(crow, index, gradient, rows)
        if ctx.needs_input_grad[1]:
            grouped = kernels.by_latent(crow, index, rows.shape[0])
            of_rows = kernels.row_sum(grouped.crow, grouped.token, gradient[grouped.place], x.contiguous())
        return of_x, of_rows, None, None


class _EntrySum(torch.autograd.Function):
    """Σ over a token's entries of value · row_index; differentiable in both, sparse in the codes."""

    @staticmethod
    def forward(ctx: Any, values, rows, crow, index):
        ctx.save_for_backward(values, rows, crow, index)
        return kernels.row_sum(crow, index, values, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        values, rows, crow, index = ctx.saved_tensors
        gradient, of_values, of_rows = gradients[0].contiguous(), None, None
        if ctx.needs_input_grad[0]:
            of_values = kernels.row_dot(crow, index, gradient, rows)
        if ctx.needs_input_grad[1]:
            grouped = kernels.by_latent(crow, index, rows.shape[0])
            of_rows = kernels.row_sum(grouped.crow, grouped.token, values[grouped.place], gradient)
        return of_values, of_rows, None, None


class LowRank(Component):
    """f(z) = z + B A z, through `rank` numbers: [tokens, latents] is never there."""

    kind = "low-rank"

    def __init__(self, n_latents: int, latents: Tensor | None = None, rank: int = 8) -> None:
        super().__init__(n_latents, latents)
        self.rank = rank
        self.down = nn.Parameter(torch.randn(n_latents, rank) / n_latents**0.5)
        self.weight = zeros(self.n, rank)

    def _new(self, latents: Tensor) -> Component:
        return type(self)(self.n_latents, latents, self.rank)

    def hidden(self, reading: Reading) -> Float[Tensor, "tokens rank"]:
        """A z."""
        codes = reading.codes
        made: Any = _EntrySum.apply(codes.values.to(self.down.dtype), self.down, codes.crow, codes.indices)
        return made

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        return Edit(low=(self.hidden(reading), self.weight))

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight]


class Mlp(LowRank):
    """f(z) = z + B act(A z + a): a residual network with one hidden layer; reads all latents, moves those of B."""

    kind = "mlp"

    def __init__(
        self, n_latents: int, latents: Tensor | None = None, rank: int = 64, activation: str = "gelu"
    ) -> None:
        super().__init__(n_latents, latents, rank)
        self.activation = activation
        self.shift = zeros(rank)

    def _new(self, latents: Tensor) -> Component:
        return Mlp(self.n_latents, latents, self.rank, self.activation)

    def hidden(self, reading: Reading) -> Tensor:
        """act(A z + a)."""
        return getattr(F, self.activation)(super().hidden(reading) + self.shift)
