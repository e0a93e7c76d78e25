"""Counts, sums and histograms of every latent, chunk by chunk."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from palimpsest.corpus import Role
from palimpsest.interpret.examples.chunks import Chunk

LOWEST, BINS = -32, 104
"""Half octaves that activations are sorted into: from 2^-16 to 2^36, the first and the last open."""

_ROOT2 = 0x3504F4
"""Mantissa of the first float32 above √2."""


def half_octave(values: NDArray[np.float32]) -> NDArray[np.int32]:
    """Which half octave each positive value is in: 0 from 1 to √2, 1 from √2 to 2, -1 below; from the bits alone."""
    bits = values.view(np.int32)
    return ((bits >> 23) - 127) * 2 + ((bits & 0x7FFFFF) >= _ROOT2)


class SignalTally:
    """Sums of one signal over the tokens on which it fires.

    Attributes:
        fires: Firings by corpus, `[corpora, latents]`.
        total: Sum of the activations.
        largest: The largest one.
        histogram: Firings by half octave, `[latents, BINS]`.
    """

    def __init__(self, n_latents: int, corpora: int) -> None:
        self.fires = np.zeros((corpora, n_latents), np.int64)
        self.total = np.zeros(n_latents)
        self.largest = np.zeros(n_latents, np.float32)
        self.histogram = np.zeros((n_latents, BINS), np.uint32)

    def add(self, corpus: int, values: NDArray[np.float32], latent: NDArray, pointer: NDArray) -> None:
        """Fold in the entries of a chunk, in order of their latents; zeros count nothing."""
        there = np.flatnonzero(pointer[1:] > pointer[:-1])
        if not len(there):
            return
        starts = pointer[there]
        self.total[there] += np.add.reduceat(values, starts, dtype=np.float64)
        self.largest[there] = np.maximum(self.largest[there], np.maximum.reduceat(values, starts))
        fires = values > 0
        if fires.all():
            self.fires[corpus] += np.diff(pointer)
        else:
            self.fires[corpus, there] += np.add.reduceat(fires, starts, dtype=np.int64)
            values, latent = values[fires], latent[fires]
        place = np.clip(half_octave(values) - LOWEST, 0, BINS - 1)
        keys = latent.astype(np.int64) * BINS + place
        np.add.at(self.histogram.reshape(-1), keys, np.uint32(1))


class Tallies:
    """What is counted of each latent and of the text.

    Attributes:
        signals: A tally for `value`, and for `base` and `tuned` where these exist.
        role_fires: Firings of the value by role, `[latents, roles]`.
        role_tokens: Measured tokens by role.
        tokens: Measured tokens of each corpus.
        documents: Documents of each corpus.
        vocabulary: Measured tokens by token id, as long as the largest id asks for.
    """

    def __init__(self, n_latents: int, corpora: int, names: tuple[str, ...]) -> None:
        """Start at nothing.

        Args:
            n_latents: Of the dictionary.
            corpora: How many there are.
            names: The stored signals.
        """
        self.names = names
        wanted = dict.fromkeys(("value", *names))
        self.signals = {name: SignalTally(n_latents, corpora) for name in wanted}
        self.role_fires = np.zeros((n_latents, len(Role)), np.int64)
        self.role_tokens = np.zeros(len(Role), np.int64)
        self.tokens, self.documents = np.zeros(corpora, np.int64), np.zeros(corpora, np.int64)
        self.vocabulary = np.zeros(0, np.int64)

    def add(self, chunk: Chunk, latent: NDArray[np.int32]) -> None:
        """Fold in a chunk.

        Args:
            chunk: The chunk.
            latent: The latent of each of its entries.
        """
        self.tokens[chunk.corpus] += int(chunk.measured.sum())
        self.documents[chunk.corpus] += len(chunk.document)
        self._count_tokens(chunk.ids[chunk.measured])
        value = chunk.value
        for name, tally in self.signals.items():
            values = value if name == "value" else chunk.signals[self.names.index(name)]
            if name != "value" and values is value:
                continue
            tally.add(chunk.corpus, values, latent, chunk.pointer)
        roles = np.bincount(chunk.role[chunk.measured], minlength=len(Role))
        self.role_tokens += roles
        fires = value > 0
        keys = latent.astype(np.int64) * len(Role) + chunk.role[chunk.slot]
        size = self.role_fires.size
        found = np.bincount(keys if fires.all() else keys[fires], minlength=size)
        self.role_fires += found.reshape(self.role_fires.shape)

    def tally(self, name: str) -> SignalTally | None:
        """The tally of a signal, None where there is no such signal."""
        if name in self.names and len(self.names) == 1:
            return self.signals["value"]
        return self.signals.get(name)

    @property
    def fires(self) -> NDArray[np.int64]:
        """Measured tokens on which each latent fires."""
        return self.signals["value"].fires.sum(0)

    def _count_tokens(self, ids: NDArray[np.int32]) -> None:
        found = np.bincount(ids, minlength=len(self.vocabulary))
        found[: len(self.vocabulary)] += self.vocabulary
        self.vocabulary = found
