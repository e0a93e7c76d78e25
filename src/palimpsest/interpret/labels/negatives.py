"""Texts that test a label: where the latent fires, and where it does not.

An examples folder tells of a token whether *its own* latent fires there. Of the token that another latent's example
is about this is known where an example of this latent covers the place too, and else up to a chance: the latent's
rate at a random one, and its rate among the firings of a neighbour, which their cosine gives. The chance is kept, so
that the score can say how far a perfect label would fall short.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from palimpsest.interpret.labels.evidence import context_of, evenly, text_of
from palimpsest.interpret.labels.protocol import Text
from palimpsest.latents import Example, LatentIndex

POSITIVE, RANDOM, SIMILAR = "positive", "random", "similar"
OTHERS = 256
"""Latents whose examples are the random texts."""
MOST_SHARED = 0.2
"""A neighbour with which the latent fires more often than this on the neighbour's tokens gives no negatives."""


@dataclass(frozen=True)
class Trial:
    """The texts of one latent, in the order in which they are judged.

    Attributes:
        texts: Windows with the token in question.
        kinds: Of each whether the latent fires there, or what kind of negative it is.
        doubt: Mean chance of the negatives that the latent does fire there.
    """

    texts: tuple[Text, ...]
    kinds: tuple[str, ...]
    doubt: float


class TextPool:
    """Texts for every latent of an examples folder.

    Args:
        index: The folder.
        seed: Of the random choices; a latent's texts do not depend on which others are asked for.
    """

    def __init__(self, index: LatentIndex, seed: int) -> None:
        self.index, self.seed = index, seed
        rng = np.random.default_rng((seed, 1))
        size = min(OTHERS, len(index))
        self._others = [int(one) for one in rng.choice(index.latents, size, replace=False)]
        self._examples = lru_cache(maxsize=4096)(index.examples)
        self._row = lru_cache(maxsize=4096)(index.row)
        self._alive = frozenset(map(int, index.latents))

    def trial(self, latent: int, held: Sequence[Example], most: int) -> Trial:
        """The texts that test a label of this latent.

        Args:
            latent: Its number.
            held: Its examples that no label was made from.
            most: Positives at most; there are as many random and as many similar negatives, where there are.
        """
        rng = np.random.default_rng((self.seed, 2, latent))
        row, own = self._row(latent), _Known(self._examples(latent))
        positives = [(text_of(one), POSITIVE, 0.0) for one in evenly(held, most)]
        shared = self._shared(row)
        taken: set[tuple[str, int, int]] = set()
        similar = self._similar(shared, own, len(positives), rng, taken)
        near = {*shared, latent}
        random = self._random(row, near, own, len(positives), rng, taken)
        texts = [*positives, *random, *similar]
        order = rng.permutation(len(texts))
        doubt = [chance for _, kind, chance in texts if kind != POSITIVE]
        return Trial(
            tuple(texts[i][0] for i in order),
            tuple(texts[i][1] for i in order),
            float(np.mean(doubt)) if doubt else 0.0,
        )

    def _shared(self, row: dict[str, Any]) -> dict[int, float]:
        """The neighbours, each with the share of its firings on which this latent fires too."""
        pairs = zip(row["neighbours"] or [], row["neighbour_scores"] or [], strict=False)
        shared = {}
        for other, cosine in pairs:
            fires = self._row(int(other))["fires"] if other in self._alive else 0
            if fires and other != row["latent"]:
                shared[int(other)] = min(1.0, max(0.0, cosine) * math.sqrt(row["fires"] / fires))
        return shared

    def _similar(
        self,
        shared: dict[int, float],
        own: _Known,
        most: int,
        rng: np.random.Generator,
        taken: set[tuple[str, int, int]],
    ) -> list[tuple[Text, str, float]]:
        """Examples of neighbours, the closest first, one of each in turn."""
        found: list[tuple[Text, str, float]] = []
        lists: dict[int, list[Example]] = {}
        for one, share in shared.items():
            if share <= MOST_SHARED:
                examples = self._examples(one)
                lists[one] = [examples[i] for i in rng.permutation(len(examples))]
        while len(found) < most and any(lists.values()):
            for one, examples in lists.items():
                if examples and len(found) < most:
                    found += _negative(examples.pop(), SIMILAR, shared[one], own, taken)
        return found

    def _random(
        self,
        row: dict[str, Any],
        near: set[int],
        own: _Known,
        most: int,
        rng: np.random.Generator,
        taken: set[tuple[str, int, int]],
    ) -> list[tuple[Text, str, float]]:
        """Examples of other latents drawn at random."""
        found: list[tuple[Text, str, float]] = []
        others = [one for one in self._others if one not in near]
        for _ in range(4):
            for one in rng.permutation(others).tolist() if others else ():
                if len(found) == most:
                    return found
                examples = self._examples(one)
                if examples:
                    example = examples[int(rng.integers(len(examples)))]
                    found += _negative(example, RANDOM, float(row["rate"] or 0.0), own, taken)
        return found


def _negative(
    example: Example, kind: str, chance: float, own: _Known, taken: set[tuple[str, int, int]]
) -> list[tuple[Text, str, float]]:
    """The text as a negative; nothing where the latent fires there, or where the text is in use."""
    place = (example.corpus, example.document, example.start + example.peak)
    fires = own.fires(example)
    if fires or place in taken:
        return []
    taken.add(place)
    return [(text_of(example), kind, 0.0 if fires is False else chance)]


class _Known:
    """What a latent's own examples say of other places: there it fires, there not."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self._windows: dict[tuple[str, int], list[Example]] = {}
        for one in examples:
            self._windows.setdefault((one.corpus, one.document), []).append(one)
        self._before = {
            context_of(one.ids, place)
            for one in examples
            for place, value in enumerate(one.value_at)
            if value > 0
        }

    def fires(self, example: Example) -> bool | None:
        """Whether the latent fires on the token that another latent's example is about; None: not known."""
        token = example.start + example.peak
        for one in self._windows.get((example.corpus, example.document), ()):
            if 0 <= token - one.start < len(one.ids):
                return one.value_at[token - one.start] > 0
        # Text that comes again, as templates do, makes it fire again.
        return True if context_of(example.ids, example.peak) in self._before else None
