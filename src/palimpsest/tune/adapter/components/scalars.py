"""Components with one number (or two) per latent, and the dense vector that they are compared with."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from palimpsest.edits import Edit, Reading
from palimpsest.tune.adapter.components.base import Component, zeros
from palimpsest.tune.adapter.components.shapes import TRANSFORMS


class Scale(Component):
    """f(z) = (1 + g(s)) z: turns up or down what fires.

    Source: IA3 on latents, as Khoriaty's prototype does it, with s = 0 for the identity.
    """

    kind = "scale"

    def __init__(self, n_latents: int, latents: Tensor | None = None, transform: str = "identity") -> None:
        super().__init__(n_latents, latents)
        self.transform = transform
        self.weight = zeros(self.n)

    def _new(self, latents: Tensor) -> Component:
        return Scale(self.n_latents, latents, self.transform)

    def factors(self) -> Float[Tensor, " n"]:
        """g(s)."""
        return TRANSFORMS[self.transform](self.weight)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        codes = reading.codes
        return Edit(entries=self.take(self.factors(), codes.indices) * codes.values)

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight]

    @torch.no_grad()
    def values(self) -> Tensor:
        """See `Component.values`."""
        return self.factors().detach().float().clone()


class ActiveBias(Component):
    """f(z) = z + b where z > 0: moves only what fires, so that b can be read off from what it does."""

    kind = "active-bias"

    def __init__(self, n_latents: int, latents: Tensor | None = None) -> None:
        super().__init__(n_latents, latents)
        self.weight = zeros(self.n)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        codes = reading.codes
        return Edit(entries=self.take(self.weight, codes.indices) * (codes.values > 0))

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight]


class Bias(Component):
    """f(z) = z + b: a steering vector b W_dec; many b give the same one."""

    kind = "bias"
    constant = True

    def __init__(self, n_latents: int, latents: Tensor | None = None) -> None:
        super().__init__(n_latents, latents)
        self.weight = zeros(self.n)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        return Edit(constant=self.weight)

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight]


class ReluBias(Bias):
    """f(z) = ReLU(z + b): what does not fire is turned on by b > 0, what fires is turned down by b < 0.

    Source: Bounhar et al., YaPO (https://arxiv.org/abs/2601.08441).
    """

    kind = "relu-bias"
    constant = False

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        codes, on = reading.codes, self.weight.relu()
        b = self.take(self.weight, codes.indices)
        fires = codes.values > 0
        # Where a latent fires the constant is taken back: there the change is max(b, -z).
        entries = (torch.maximum(b, -codes.values) - self.take(on, codes.indices)) * fires
        return Edit(entries=entries, constant=on)


class Lerp(Component):
    """f(z) = z + (2 sigmoid(t) - 1)(v - z): towards a learned target v, or away from it."""

    kind = "lerp"

    def __init__(self, n_latents: int, latents: Tensor | None = None) -> None:
        super().__init__(n_latents, latents)
        self.weight, self.target = zeros(self.n), zeros(self.n)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        assert reading is not None
        codes, share = reading.codes, 2 * self.weight.sigmoid() - 1
        return Edit(entries=-self.take(share, codes.indices) * codes.values, constant=share * self.target)

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return [self.weight, self.target]

    @torch.no_grad()
    def values(self) -> Tensor:
        """See `Component.values`."""
        return (2 * self.weight.sigmoid() - 1).float()

    @torch.no_grad()
    def gradients(self) -> Tensor | None:
        """See `Component.gradients`."""
        return None if self.weight.grad is None else self.weight.grad.float().clone()


class Vector(Component):
    """x + v: one dense vector, the steering vector that latents are compared with; it knows no latents."""

    kind = "vector"
    constant = True

    def __init__(self, n_latents: int, latents: Tensor | None = None, d_model: int = 0) -> None:
        del latents
        super().__init__(n_latents, torch.zeros(0, dtype=torch.long))
        self.weight = zeros(d_model)

    def forward(self, reading: Reading | None) -> Edit:
        """The edit of these tokens."""
        return Edit(vector=self.weight)

    def rows(self) -> list[nn.Parameter]:
        """Its numbers."""
        return []

    @torch.no_grad()
    def values(self) -> Tensor:
        """See `Component.values`."""
        return self.weight.new_zeros(0)

    @torch.no_grad()
    def gradients(self) -> Tensor | None:
        """See `Component.gradients`."""
        return self.weight.new_zeros(0)
