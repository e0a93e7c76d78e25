"""What is trained: functions f of the codes of one dictionary, each the identity when it is new.

A component holds its numbers and turns a reading into an `Edit`; it never sees the dictionary's weights. Numbers are
one per edited latent (or one row), float32, in modules rather than in a ParameterDict: trl copies what is called
`.default.` for its reference model.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from palimpsest.edits import Edit, Reading

PER_LATENT = ("weight", "bias", "threshold", "target")
"""Names of parameters whose first axis is the latents that may change."""


class Component(nn.Module):
    """One component on one dictionary.

    Attributes:
        kind: Its name.
        latents: The latents that it may change, ascending.
        constant: It changes every token alike, so that it needs no codes.
    """

    kind: str
    constant = False
    latents: Tensor
    place: Tensor | None

    def __init__(self, n_latents: int, latents: Int[Tensor, " n"] | None = None) -> None:
        """A new component.

        Args:
            n_latents: Of the dictionary.
            latents: Those it may change, ascending; all when absent.
        """
        super().__init__()
        self.n_latents = n_latents
        chosen = torch.arange(n_latents) if latents is None else latents.long().cpu()
        self.whole = latents is None
        place = None
        if latents is not None:
            # One place behind the last stands for every latent that stays as it is.
            place = torch.full((n_latents,), len(chosen)).index_copy_(0, chosen, torch.arange(len(chosen)))
        self.register_buffer("latents", chosen, persistent=False)
        self.register_buffer("place", place, persistent=False)

    @property
    def n(self) -> int:
        """How many latents it may change."""
        return len(self.latents)

    @abstractmethod
    def forward(self, reading: Reading | None) -> Edit:
        """The edit of some tokens; `reading` is absent for constant components."""

    @abstractmethod
    def rows(self) -> list[nn.Parameter]:
        """Parameters whose first axis is `latents`; where all are 0, so is the edit."""

    def restricted(self, latents: Int[Tensor, " m"]) -> Component:
        """The same component with only some of its latents, ascending; it shares no memory.

        Raises:
            KeyError: One of them is none that it may change.
        """
        wanted = latents.long().cpu().unique()
        inside = torch.isin(wanted, self.latents.cpu())
        if not bool(inside.all()):
            raise KeyError(f"latent {int(wanted[~inside][0])} is not among those of this component")
        made = self._new(wanted)
        kept = torch.searchsorted(self.latents.cpu(), wanted)
        own = dict(made.named_parameters())
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                own[name].copy_(parameter[kept.to(parameter.device)] if name in PER_LATENT else parameter)
        return made

    def _new(self, latents: Tensor) -> Component:
        return type(self)(self.n_latents, latents)

    def take(self, numbers: Float[Tensor, " n"], index: Int[Tensor, " entries"]) -> Float[Tensor, " entries"]:
        """The number of each entry's latent, 0 for those that stay."""
        if self.place is None:
            return numbers.index_select(0, index)
        return F.pad(numbers, (0, 1)).index_select(0, self.place[index])

    @torch.no_grad()
    def values(self) -> Float[Tensor, " n"]:
        """One number per latent: how strongly, and for scalars in which direction, it is changed."""
        return _lengths(self.rows())

    @torch.no_grad()
    def gradients(self) -> Float[Tensor, " n"] | None:
        """The gradient of that number (its length for rows); None before a backward pass."""
        found = [one.grad for one in self.rows()]
        return (
            None if any(one is None for one in found) else _lengths([one for one in found if one is not None])
        )

    @torch.no_grad()
    def keep_top_(self, n: int, norms: Float[Tensor, " n"]) -> None:
        """Set all but the `n` strongest latents, by |value| times norm, to 0."""
        if n >= self.n:
            return
        strength = self.values().abs() * norms
        dropped = torch.ones_like(strength, dtype=torch.bool)
        dropped[strength.topk(n).indices] = False
        for parameter in self.rows():
            parameter[dropped] = 0


def _lengths(rows: list[Any]) -> Tensor:
    """Length over all parameters of a latent; with its sign where there is a single number."""
    if len(rows) == 1 and rows[0].ndim == 1:
        return rows[0].detach().float().clone()
    return (
        torch.stack([one.detach().float().flatten(1).square().sum(1) for one in map(_matrix, rows)])
        .sum(0)
        .sqrt()
    )


def _matrix(parameter: Tensor) -> Tensor:
    return parameter if parameter.ndim > 1 else parameter[:, None]


def zeros(*shape: int) -> nn.Parameter:
    """A new parameter of zeros, float32."""
    return nn.Parameter(torch.zeros(*shape))
