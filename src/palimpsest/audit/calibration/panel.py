"""The same documents read through several models: the suspect and its nulls."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.errors import ConfigError, NumericsError

GENERAL = "general"
"""Name of the corpus whose overlap is the drift."""


@dataclass(frozen=True)
class Level:
    """How verdicts and intervals are made.

    Attributes:
        alpha: Share of false findings that is allowed: false discovery rate over corpora.
        confidence: Coverage of the intervals.
        resamples: Bootstrap resamples of documents and nulls.
        seed: Of every resample.
    """

    alpha: float = 0.05
    confidence: float = 0.95
    resamples: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("alpha", "confidence"):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(f"{name} is no share", expected="a number between 0 and 1", found=value)
        if self.resamples < 1:
            raise ConfigError("too few resamples", expected="at least 1", found=self.resamples)


@dataclass(frozen=True)
class Panel:
    """Document means of every corpus through every model; model 0 is the suspect, the others are nulls.

    Attributes:
        overlap: By corpus, the general one first: o_k of every document `[models, documents, grid]`, NaN where a
            document has none.
        loss: By corpus: loss of the tuned model minus the base's, nats per token `[models, documents]`, NaN where
            a document has none. None when losses were not measured.
        grid: (site, k) of the last axis; entry 0 is primary.
        families: For each null, the corpus whose kind of text it was trained on, or another word.
    """

    # One panel has corpora of several lengths, so the axis of documents has no name here.
    overlap: dict[str, Float[NDArray, "models _ grid"]]
    loss: dict[str, Float[NDArray, "models _"]] | None
    grid: tuple[tuple[str, int], ...]
    families: tuple[str, ...]

    def __post_init__(self) -> None:
        if next(iter(self.overlap), None) != GENERAL:
            raise ConfigError(
                "a panel starts with the general corpus", expected=f"'{GENERAL}'", found=list(self.overlap)
            )
        if not self.grid:
            raise ConfigError("a panel needs a site and a k", expected="at least one (site, k)", found="none")
        if self.loss is not None and set(self.loss) != set(self.overlap):
            raise ConfigError(
                "overlap and loss are not of the same corpora",
                expected=list(self.overlap),
                found=list(self.loss),
            )
        for name, values in self.overlap.items():
            self._check(name, values)

    def _check(self, name: str, values: NDArray) -> None:
        models, grid = 1 + len(self.families), len(self.grid)
        if values.ndim != 3 or (values.shape[0], values.shape[2]) != (models, grid):
            raise ConfigError(
                f"overlap of {name} has another shape than the panel",
                expected=f"[{models} models, documents, {grid} grid points]",
                found=list(values.shape),
            )
        known = values[~np.isnan(values)]
        # Means of float32 shares may end a rounding error beyond 1.
        if ((known < -1e-6) | (known > 1 + 1e-6)).any():
            raise NumericsError(
                f"overlap of {name} is no share",
                expected="values from 0 to 1, or NaN",
                found=f"{known.min():g} to {known.max():g}",
            )
        if self.loss is None:
            return
        loss = self.loss[name]
        if loss.shape != values.shape[:2]:
            raise ConfigError(
                f"overlap and loss of {name} are not of the same documents",
                expected=list(values.shape[:2]),
                found=list(loss.shape),
            )
        if np.isinf(loss).any():
            raise NumericsError(f"a loss of {name} is infinite", expected="numbers, or NaN", found="infinity")

    @property
    def names(self) -> tuple[str, ...]:
        """Every corpus, the general one first."""
        return tuple(self.overlap)

    @property
    def nulls(self) -> int:
        """How many models are nulls."""
        return len(self.families)

    def calibrating(self, name: str) -> Bool[NDArray, " nulls"]:
        """Which nulls may judge a corpus: those that were not trained on its kind of text."""
        return np.array([family != name for family in self.families], dtype=bool)
