"""Which tokens a latent fires on beyond their share of the text: log-odds with an informative Dirichlet prior.

Source: Monroe, Colaresi, Quinn, Fightin' Words, Political Analysis 16 (2008), section 3.5: δ = log-odds of a token
among the firings minus its log-odds in the text, both with the text's frequencies as the prior;
z = δ / √(1/(y_i + α) + 1/(y_j + α)). Unlike there, the firings stay part of the text that they are compared with: a
token on which a latent always fires would have a rest of 0, whose 1/α makes z small for the very tokens to be found.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from palimpsest.interpret.examples.best import Lots
from palimpsest.interpret.examples.chunks import Chunk
from palimpsest.interpret.examples.listing import Listing, best_of

EVENTS = 1500
"""Firings of a latent that are counted, about; a random choice where there are more."""

PRIOR = 100.0
"""Firings that the prior is worth."""

LEAST_Z = 2.0
MOST = 8


def log_odds(
    latent: NDArray[np.integer],
    token: NDArray[np.integer],
    count: NDArray[np.integer],
    vocabulary: NDArray[np.integer],
) -> NDArray[np.float64]:
    """The z of each (latent, token) that occurs.

    Args:
        latent: The latent of each pair; every pair occurs once.
        token: Its token id.
        count: Firings of the latent on that token.
        vocabulary: How often each token id is in the whole text, the firings among them.

    Returns:
        z of each pair; the same for a random part of the firings but for its size.
    """
    total = float(vocabulary.sum())
    size = int(latent.max()) + 1 if len(latent) else 0
    fires = np.bincount(latent, weights=count, minlength=size)[latent]
    here, prior = count.astype(float), PRIOR * vocabulary[token] / total
    inside, outside = here + prior, vocabulary[token] + prior
    # Where the text is one token again and again, nothing else is left to compare it with.
    least = 1e-9
    left = np.log(inside / np.maximum(fires + PRIOR - inside, least))
    right = np.log(outside / np.maximum(total + PRIOR - outside, least))
    return (left - right) / np.sqrt(1 / inside + 1 / outside)


class EventCounts:
    """Counts on which tokens latents fire, and keeps the best of each; latents come in ranges, one range at a time.

    Args:
        fires: Firings of each latent in the whole text.
        vocabulary: How often each token id was measured.
        lots: Decides which firings of a frequent latent count.
    """

    def __init__(self, fires: NDArray[np.int64], vocabulary: NDArray[np.int64], lots: Lots) -> None:
        self._vocabulary, self._lots = vocabulary, lots
        share = np.minimum(1.0, EVENTS / np.maximum(fires, 1))
        self._bar = (share * 0xFFFFFFFF).astype(np.uint32)
        self._parts: list[Listing] = []
        self._latent: list[NDArray[np.int32]] = []
        self._token: list[NDArray[np.int32]] = []

    def add(self, chunk: Chunk, latent: NDArray[np.int32]) -> None:
        """Count the entries of a chunk, whose latents are given."""
        value = chunk.value
        lots = self._lots.entries(self._lots.slots(chunk), chunk, latent)
        kept = np.flatnonzero((value > 0) & (lots <= self._bar[latent]))
        self._latent.append(latent[kept])
        self._token.append(chunk.ids[chunk.slot[kept]])

    def close(self, first: int, last: int) -> None:
        """All chunks are counted for the latents `first` … `last - 1`."""
        from scipy.sparse import csc_matrix

        latent, token = np.concatenate(self._latent) - first, np.concatenate(self._token)
        self._latent, self._token = [], []
        if not len(latent):
            return
        ones = np.ones(len(latent), np.int32)
        # Two passes of counting sort: by token while the matrix is made, by latent as it is turned.
        counts = csc_matrix((ones, (latent, token)), shape=(last - first, len(self._vocabulary))).tocsr()
        rows = np.repeat(np.arange(last - first), np.diff(counts.indptr))
        z = log_odds(rows, counts.indices, counts.data.astype(np.int64), self._vocabulary)
        good = np.flatnonzero(z >= LEAST_Z)
        self._parts.append(best_of(rows[good] + first, counts.indices[good], z[good], MOST))

    def best(self) -> Listing:
        """The tokens of highest z of every latent that was counted."""
        return Listing.concatenate(self._parts)
