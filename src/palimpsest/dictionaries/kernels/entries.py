"""Sparse entries in the two orders that a training step needs them in: by token and by latent."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Sparse(NamedTuple):
    """Entries of a [tokens, latents] matrix in compressed rows.

    Attributes:
        crow: Where each token's entries start; the last element is their number.
        index: The latent of each entry.
        value: The value of each entry.
    """

    crow: Int[Tensor, " tokens_and_one"]
    index: Int[Tensor, " entries"]  # pyright: ignore[reportIncompatibleMethodOverride]
    value: Float[Tensor, " entries"]


class Grouped(NamedTuple):
    """The same entries by latent; inside a latent they keep their order, which is by token.

    Attributes:
        crow: Where each latent's entries start; the last element is their number.
        token: The token of each entry.
        place: Where each entry stands in the order by token.
    """

    crow: Int[Tensor, " latents_and_one"]
    token: Int[Tensor, " entries"]
    place: Int[Tensor, " entries"]


def rows_of(crow: Int[Tensor, " rows_and_one"], entries: int) -> Int[Tensor, " entries"]:
    """The row of each entry.

    Args:
        crow: Where each row starts.
        entries: How many there are; saves a device synchronisation.
    """
    row = torch.arange(crow.shape[0] - 1, device=crow.device)
    return row.repeat_interleave(crow.diff(), output_size=entries)
