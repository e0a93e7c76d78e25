"""Short lists for every latent as three flat columns: no object per latent, of which there may be a million."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Listing(NamedTuple):
    """What belongs to each latent, by latent, the highest score first.

    Attributes:
        latent: The latent of each item.
        item: What is listed: another latent, or a token.
        score: Its score.
    """

    latent: NDArray[np.int64]
    item: NDArray[np.int32]
    score: NDArray[np.float32]

    def lengths(self, latents: NDArray[np.int64]) -> NDArray[np.int64]:
        """How many items each of some latents has; these are all that have any, in order."""
        return np.diff(np.searchsorted(self.latent, np.append(latents, np.iinfo(np.int64).max)))

    @classmethod
    def concatenate(cls, parts: Sequence[Listing]) -> Listing:
        """Listings of ranges of latents that follow one another."""
        nothing = cls(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32))
        return cls(*(np.concatenate(columns) for columns in zip(nothing, *parts, strict=True)))


def best_of(
    latent: NDArray[np.integer], item: NDArray[np.integer], score: NDArray[np.floating], most: int
) -> Listing:
    """The `most` items of highest score of each latent; ties go to the smaller item."""
    order = np.lexsort((item, -score, latent))
    latent = latent[order]
    begins = np.flatnonzero(np.append(True, latent[1:] != latent[:-1])) if len(latent) else np.zeros(0, int)
    counts = np.diff(np.append(begins, len(latent)))
    kept = np.arange(len(latent)) - np.repeat(begins, counts) < most
    order = order[kept]
    return Listing(
        latent[kept].astype(np.int64), item[order].astype(np.int32), score[order].astype(np.float32)
    )
