"""The objective of one half of the documents, with some latents' edits kept and the others dropped."""

from __future__ import annotations

from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.tune.explain.latents import Latents
from palimpsest.tune.explain.statistics import Effect, Settings
from palimpsest.tune.measure import Measured, Part, Yardstick, estimate


class Probe:
    """Measures an adapter, in part or whole, on one yardstick.

    Attributes:
        model: The peft model.
        latents: The adapter's.
        effect: What the whole adapter does there.
        margin: Of pairs, of the whole adapter.
    """

    def __init__(self, model: Any, latents: Latents, yardstick: Yardstick, settings: Settings) -> None:
        self.model, self.latents, self._yardstick = model, latents, yardstick
        base, units = row_losses(yardstick.before(model, general=False))
        full = self._measured()
        self.margin = None if full.margin is None else estimate((full.margin,))
        self.effect = Effect(base, row_losses(full)[0], units, settings)

    def losses(self, kept: Bool[NDArray, " latents"] | None = None) -> Float[NDArray, " documents"]:
        """The objective's sums by document with the edits of these latents only; of all when absent."""
        return row_losses(self._measured(kept))[0]

    def first(self, order: NDArray, n: int, *, dropped: bool = False) -> Float[NDArray, " documents"]:
        """With the first `n` latents of an order kept, or with them dropped."""
        kept = np.full(len(self.latents), dropped)
        kept[order[:n]] = not dropped
        return self.losses(kept)

    def of(self, adapter: str) -> Float[NDArray, " documents"]:
        """Of another adapter of the same model."""
        self.model.set_adapter(adapter)
        try:
            return row_losses(self._yardstick.measure(self.model, general=False))[0]
        finally:
            self.model.set_adapter(self.latents.adapter)

    def _measured(self, kept: NDArray | None = None) -> Measured:
        with self.latents.keeping(kept):
            return self._yardstick.measure(self.model, general=False)


def row_losses(measured: Measured) -> tuple[Float[NDArray, " documents"], Float[NDArray, " documents"]]:
    """The objective as sums by row and what they are divided by: tokens, or 1 per pair.

    An objective of several parts (orpo, unlearn) comes down to what each row adds to it, divided by one in all.
    """
    parts = measured.objective
    if len(parts) == 1:
        return parts[0].factor * parts[0].values, parts[0].weights
    groups: dict[str, list[Part]] = {}
    for part in parts:
        groups.setdefault(part.group, []).append(part)
    added: list[Any] = [
        sum(part.factor * part.values / part.weights.sum() for part in same) for same in groups.values()
    ]
    joined = np.concatenate(added)
    return joined, np.full(len(joined), 1 / len(joined))
