"""Sparse codes: the strictly positive latents of each token, strongest first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries.input_norm import TokenNorm
from palimpsest.display.notebook import Card, Rich


class TopList(NamedTuple):
    """The k strongest latents of every token.

    Attributes:
        values: Activations, strongest first; 0 beyond `length`.
        indices: Latents, ties by the smaller one; -1 beyond `length`.
        length: How many strictly positive latents the list holds, at most k.
    """

    values: Float[Tensor, "tokens k"]
    indices: Int[Tensor, "tokens k"]
    length: Int[Tensor, " tokens"]


@dataclass(frozen=True, eq=False, slots=True)
class Codes(Rich):
    """Sparse activations of `tokens` tokens in compressed rows.

    A row is ordered strongest first, ties by the smaller latent. Only entries above zero count; codes of
    fixed width may end a row with padding of value 0 (latent 0).

    Attributes:
        crow: Where each row starts; the last entry is the number of stored entries.
        indices: The latent of each entry.
        values: The activation of each entry.
        n_latents: How many latents the dictionary has.
        width: Entries per row where every row holds the same number, else None.
        norm: What a dictionary with an `input_norm` took out of each token, else None.
    """

    crow: Int[Tensor, " tokens_and_one"]
    indices: Int[Tensor, " entries"]
    values: Float[Tensor, " entries"]
    n_latents: int
    width: int | None = None
    norm: TokenNorm | None = None

    @classmethod
    def from_fixed(
        cls, values: Float[Tensor, "tokens width"], indices: Int[Tensor, "tokens width"], n_latents: int
    ) -> Codes:
        """Codes of fixed width from rows that are already ordered; shares their memory."""
        tokens, width = values.shape
        crow = torch.arange(tokens + 1, device=values.device) * width
        return cls(crow, indices.reshape(-1), values.reshape(-1), n_latents, width)

    @classmethod
    def concatenate(cls, parts: Sequence[Codes]) -> Codes:
        """Join the codes of consecutive tokens; all parts come from one dictionary."""
        if len(parts) == 1:
            return parts[0]
        ends = torch.stack([part.crow[-1] for part in parts]).cumsum(0)
        crow = [parts[0].crow] + [part.crow[1:] + end for part, end in zip(parts[1:], ends[:-1], strict=True)]
        widths = {part.width for part in parts}
        norms = [part.norm for part in parts if part.norm is not None]
        return cls(
            torch.cat(crow),
            torch.cat([part.indices for part in parts]),
            torch.cat([part.values for part in parts]),
            parts[0].n_latents,
            widths.pop() if len(widths) == 1 else None,
            TokenNorm(*(torch.cat(one) for one in zip(*norms, strict=True))) if norms else None,
        )

    def _card(self) -> Card:
        from palimpsest.dictionaries.card import codes_card

        return codes_card(self)

    @property
    def tokens(self) -> int:
        """How many tokens were encoded."""
        return self.crow.shape[0] - 1

    def to(self, device: torch.device | str) -> Codes:
        """The same codes on another device."""
        crow, indices, values = self.crow.to(device), self.indices.to(device), self.values.to(device)
        norm = None if self.norm is None else self.norm.to(device)
        return Codes(crow, indices, values, self.n_latents, self.width, norm)

    def fixed(self) -> tuple[Float[Tensor, "tokens width"], Int[Tensor, "tokens width"]]:
        """Values and latents as rectangles, without a copy.

        Raises:
            ValueError: The rows differ in length; use `top` there.
        """
        if self.width is None:
            raise ValueError("these codes have rows of different length; use top(k)")
        shape = (self.tokens, self.width)
        return self.values.view(shape), self.indices.view(shape)

    def top(self, k: int) -> TopList:
        """The at most k strongest latents of every token, strictly positive ones only."""
        column = torch.arange(k, device=self.crow.device)
        start, end = self.crow[:-1, None], self.crow[1:, None]
        place = start + column
        inside = place < end
        if self.values.numel() == 0:
            values = self.values.new_zeros(self.tokens, k)
            indices = self.indices.new_zeros(self.tokens, k)
        else:
            place = place.clamp(max=self.values.shape[0] - 1)
            values, indices = self.values[place], self.indices[place]
        inside = inside & (values > 0)
        return TopList(
            torch.where(inside, values, values.new_zeros(())),
            torch.where(inside, indices, indices.new_full((), -1)),
            inside.sum(dim=1),
        )

    def l0(self) -> Int[Tensor, " tokens"]:
        """How many latents are strictly positive on each token."""
        positive = torch.zeros(self.values.shape[0] + 1, dtype=torch.long, device=self.values.device)
        torch.cumsum(self.values > 0, dim=0, out=positive[1:])
        return positive[self.crow[1:]] - positive[self.crow[:-1]]

    def rows(self) -> Int[Tensor, " entries"]:
        """The token of each stored entry."""
        token = torch.arange(self.tokens, device=self.crow.device)
        return token.repeat_interleave(self.crow.diff(), output_size=self.values.shape[0])

    def dense(self) -> Float[Tensor, "tokens latents"]:
        """The full matrix; for tests and small dictionaries only."""
        full = self.values.new_zeros(self.tokens, self.n_latents)
        return full.index_put((self.rows(), self.indices), self.values, accumulate=True)
