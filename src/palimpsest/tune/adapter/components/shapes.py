"""Functions with a gradient where the usual ones have none: at the zero that every component begins with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class _OneSided(torch.autograd.Function):
    """max(s, 0) whose gradient at and below 0 lets s rise and never fall further: a projection, not a dead end."""

    @staticmethod
    def forward(ctx: Any, s):
        ctx.save_for_backward(s >= 0)
        return s.clamp(min=0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (inside,) = ctx.saved_tensors
        return torch.where(inside, gradients[0], gradients[0].clamp(max=0))


def one_sided(s: Tensor) -> Tensor:
    """max(s, 0), with a gradient at 0."""
    made: Any = _OneSided.apply(s)
    return made


class _SoftThreshold(torch.autograd.Function):
    """sign(a) max(|a| - t, 0), open at |a| = t: the usual gradient there is 0, so that a = t = 0 would never move."""

    @staticmethod
    def forward(ctx: Any, a, threshold):
        outside = a.abs() >= threshold
        ctx.save_for_backward(a.sign(), outside)
        return torch.where(outside, a - a.sign() * threshold, 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        sign, outside = ctx.saved_tensors
        of_a = gradients[0] * outside
        return of_a, -sign * of_a


def soft_threshold(a: Tensor, threshold: Tensor) -> Tensor:
    """Shrink towards 0 by a threshold that is not negative."""
    made: Any = _SoftThreshold.apply(a, threshold)
    return made


TRANSFORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda s: s,
    "exp": torch.expm1,
    "non-negative": F.elu,
    "one-sided": one_sided,
}
