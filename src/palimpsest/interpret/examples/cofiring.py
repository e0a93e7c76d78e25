"""Which latents fire on the same tokens, from a random sample of the tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from palimpsest.interpret.examples.chunks import Chunk
from palimpsest.interpret.examples.listing import Listing, best_of

PAIRS_PER_LATENT = 3000
LEAST_PAIRS, MOST_PAIRS = 30_000_000, 400_000_000
"""Pairs of latents on one token that are counted: with the number of latents, between these bounds."""

MIN_JOINT = 4
"""Tokens of the sample that two latents share before they count as neighbours."""

BLOCK_PAIRS = 8_000_000


class CoFiring:
    """A sample of tokens with the latents that fire on them.

    Each token has a random number; those below a bar are kept, and the bar is lowered whenever they become too many.

    Args:
        n_latents: Of the dictionary.
        pairs: How many pairs of latents may be kept; by default a multiple of the latents.
    """

    def __init__(self, n_latents: int, pairs: int | None = None) -> None:
        most = min(max(PAIRS_PER_LATENT * n_latents, LEAST_PAIRS), MOST_PAIRS)
        self._n, self._limit = n_latents, most if pairs is None else pairs
        self._bar = np.uint64((1 << 64) - 1)
        self._lot = np.zeros(0, np.uint64)
        self._token, self._latent = np.zeros(0, np.int32), np.zeros(0, np.int32)
        self._pairs = 0

    @property
    def tokens(self) -> int:
        """Tokens of the sample."""
        return len(self._lot)

    def add(
        self, chunk: Chunk, slots: NDArray[np.uint64], latent: NDArray[np.int32], fires: NDArray[np.bool_]
    ) -> None:
        """Sample the tokens of a chunk.

        Args:
            chunk: The chunk.
            slots: A random number of each of its tokens.
            latent: The latent of each entry.
            fires: Whether the entry counts.
        """
        # The sample must not depend on what the other random choices do.
        lot = slots ^ (slots << np.uint64(17))
        chosen = chunk.measured & (lot <= self._bar)
        number = np.cumsum(chosen, dtype=np.int32) - 1 + self.tokens
        kept = np.flatnonzero(chosen[chunk.slot] & fires)
        token = number[chunk.slot[kept]]
        self._lot = np.concatenate([self._lot, lot[chosen]])
        self._token = np.concatenate([self._token, token])
        self._latent = np.concatenate([self._latent, latent[kept]])
        while self._count() > self._limit and self.tokens > 1:
            self._thin()

    def neighbours(self, most: int) -> Listing:
        """The latents that share most tokens with each latent, and the cosine n_ij / √(n_i n_j) of their firings."""
        from scipy.sparse import csr_matrix

        ones = np.ones(len(self._token), np.float32)
        fires = csr_matrix((ones, (self._token, self._latent)), shape=(self.tokens, self._n))
        lengths = np.diff(fires.indptr)
        by_latent = fires.T.tocsr()
        count = np.diff(by_latent.indptr).astype(np.float64)
        work = np.append(0, lengths[by_latent.indices].cumsum(dtype=np.int64))[by_latent.indptr]
        found = []
        for first, last in _blocks(work):
            joint = (by_latent[first:last] @ fires).tocoo()
            row, column = joint.row + first, joint.col
            good = (joint.data >= MIN_JOINT) & (row != column)
            row, column, shared = row[good], column[good], joint.data[good]
            score = shared / np.sqrt(count[row] * count[column])
            found.append(best_of(row, column, score, most))
        return Listing.concatenate(found)

    def _count(self) -> float:
        lengths = np.bincount(self._token, minlength=self.tokens).astype(np.float64)
        return float(lengths @ lengths)

    def _thin(self) -> None:
        self._bar >>= np.uint64(1)
        kept = self._lot <= self._bar
        number = np.cumsum(kept, dtype=np.int32) - 1
        entry = kept[self._token]
        self._lot = self._lot[kept]
        self._token, self._latent = number[self._token[entry]], self._latent[entry]


def _blocks(work: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of latents with a bounded number of pairs, `work` being the pairs before each latent."""
    first, n = 0, len(work) - 1
    while first < n:
        last = max(first + 1, int(np.searchsorted(work, work[first] + BLOCK_PAIRS, side="right")) - 1)
        yield first, min(last, n)
        first = last
