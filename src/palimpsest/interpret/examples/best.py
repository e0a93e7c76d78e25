"""The few best tokens of each latent, kept while the text streams by: the strongest, and a random sample."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from palimpsest.interpret.examples.chunks import Chunk

PENDING = 1 << 18
"""Candidates that wait, before the best are chosen again."""

_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))
_STEP = 0x9E3779B97F4A7C15
_WORD = (1 << 64) - 1


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64: every bit of the result depends on every bit of `x`. Works in place.

    Source: Steele, Lea, Flood, Fast Splittable Pseudorandom Number Generators, OOPSLA 2014.
    """
    x ^= x >> np.uint64(30)
    x *= _MIX[0]
    x ^= x >> np.uint64(27)
    x *= _MIX[1]
    x ^= x >> np.uint64(31)
    return x


class Lots:
    """Random numbers of tokens and latents that depend on the seed and the text alone, not on how it was cut up."""

    def __init__(self, seed: int, n_latents: int) -> None:
        self._seed = np.uint64((seed * _STEP + _STEP) & _WORD)
        numbers = np.arange(1, n_latents + 1, dtype=np.uint64)
        self._latent = mixed(numbers * np.uint64(_STEP) ^ self._seed)

    def slots(self, chunk: Chunk) -> NDArray[np.uint64]:
        """A number for each token: of its document's content and its place there."""
        lengths = np.diff(chunk.starts)
        position = np.arange(len(chunk.ids)) - np.repeat(chunk.starts[:-1], lengths)
        content = np.repeat(chunk.content.view(np.uint64), lengths)
        return mixed(content + (position.astype(np.uint64) + np.uint64(1)) * np.uint64(_STEP) ^ self._seed)

    def entries(
        self, slots: NDArray[np.uint64], chunk: Chunk, latent: NDArray[np.integer]
    ) -> NDArray[np.uint32]:
        """A number for each entry, from `slots` of its chunk and from its latent; 0 stands for none."""
        found = slots[chunk.slot]
        found ^= self._latent[latent]
        found *= _MIX[0]
        found ^= found >> np.uint64(32)
        found *= _MIX[1]
        return (found >> np.uint64(32)).astype(np.uint32)


class Runs(NamedTuple):
    """Entries of one latent in one document, side by side in a chunk.

    Attributes:
        first: The first entry of each run.
        length: How many entries it has.
        latent: Its latent.
        fresh: Whether no earlier document has the same tokens.
    """

    first: NDArray[np.int64]
    length: NDArray[np.int64]
    latent: NDArray[np.int32]
    fresh: NDArray[np.bool_]


def runs_of(chunk: Chunk, latent: NDArray[np.int32], fresh: NDArray[np.bool_]) -> Runs:
    """Where each latent's entries in one document begin and end."""
    number = np.repeat(np.arange(len(chunk.document), dtype=np.int32), np.diff(chunk.starts))
    document = number[chunk.slot]
    begins = np.ones(len(document), bool)
    begins[1:] = (document[1:] != document[:-1]) | (latent[1:] != latent[:-1])
    first = np.flatnonzero(begins)
    length = np.diff(np.append(first, len(document)))
    return Runs(first, length, latent[first], fresh[document[first]])


class Best:
    """For each latent the entries of highest score, one per document.

    A floor per latent, the score of the weakest one kept, lets almost nothing pass once the first documents are read.

    Args:
        n_latents: Of the dictionary.
        keep: How many entries of each latent.
    """

    def __init__(self, n_latents: int, keep: int) -> None:
        self.keep = keep
        self._floor = np.zeros(n_latents, np.uint32)
        self._key, self._where = np.zeros(0, np.uint64), np.zeros(0, np.int64)
        self._pending: list[tuple[NDArray[np.uint64], NDArray[np.int64]]] = []
        self._waiting = 0

    def add(self, number: int, runs: Runs, score: NDArray[np.uint32], slot: NDArray[np.int32]) -> None:
        """Consider a chunk.

        Args:
            number: Of the chunk.
            runs: Its runs.
            score: Of each entry; 0 is never kept.
            slot: The token of each entry.
        """
        if not len(runs.first):
            return
        best = np.maximum.reduceat(score, runs.first)
        chosen = np.flatnonzero(runs.fresh & (best > self._floor[runs.latent]))
        if len(chosen):
            entry = _where_best(score, runs.first[chosen], runs.length[chosen], best[chosen])
            key = runs.latent[chosen].astype(np.uint64) << np.uint64(32)
            key |= (~best[chosen]).astype(np.uint64)
            self._pending.append((key, (np.int64(number) << 32) | slot[entry]))
            self._waiting += len(chosen)
        if self._waiting > max(PENDING, len(self._key) // 2):
            self._settle()

    def rows(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Latent, chunk and token of everything kept, by latent, the best first."""
        self._settle()
        latent = (self._key >> np.uint64(32)).astype(np.int64)
        return latent, self._where >> 32, self._where & 0xFFFFFFFF

    def _settle(self) -> None:
        """Choose among the kept and the waiting."""
        if not self._pending:
            return
        fresh = np.concatenate([key for key, _ in self._pending])
        where = np.concatenate([where for _, where in self._pending])
        key, where = np.concatenate([self._key, fresh]), np.concatenate([self._where, where])
        # Equal scores stay in the order of the text.
        order = key.argsort(kind="stable")
        key, where = key[order], where[order]
        latent = key >> np.uint64(32)
        begins = np.flatnonzero(np.append(True, latent[1:] != latent[:-1]))
        counts = np.diff(np.append(begins, len(key)))
        kept = np.arange(len(key)) - np.repeat(begins, counts) < self.keep
        full = begins[counts >= self.keep]
        weakest = key[full + self.keep - 1]
        self._floor[latent[full].astype(np.int64)] = ~(weakest & np.uint64(0xFFFFFFFF)).astype(np.uint32)
        self._key, self._where = key[kept], where[kept]
        self._pending, self._waiting = [], 0


def _where_best(score: NDArray, first: NDArray, length: NDArray, best: NDArray) -> NDArray[np.int64]:
    """The first entry of each run that has the run's best score."""
    ends = length.cumsum()
    entry = np.arange(int(ends[-1])) + np.repeat(first - (ends - length), length)
    run = np.repeat(np.arange(len(first)), length)
    hit = np.flatnonzero(score[entry] == best[run])
    hit = hit[np.append(True, run[hit][1:] != run[hit][:-1])]
    return entry[hit]
