"""Which latents cause what the adapter does: curves of what is left with some of them, and the fewest that suffice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.log import progress
from palimpsest.tune.adapter import latent_layers
from palimpsest.tune.explain.effects import read_latents
from palimpsest.tune.explain.latents import Latents, effect_of
from palimpsest.tune.explain.probe import Probe
from palimpsest.tune.explain.result import CurvePoint
from palimpsest.tune.explain.statistics import Settings, grid, random_orders, smallest, strongest_first
from palimpsest.tune.explain.texts import Text
from palimpsest.tune.measure import Yardstick, answer
from palimpsest.tune.rows import KtoRow, PairRow, PromptRow, Row, TextRow

POINTS = 10
"""Numbers of latents among which `latents_needed` looks first."""


@dataclass(frozen=True, eq=False)
class Orders:
    """Latents in the orders in which they are kept.

    Attributes:
        effect: By activation-weighted effect, of the half that chooses.
        magnitude: By |value|.
        random: Several orders of the latents that fire, moved or not; the others behind them.
        active: Latents with an effect.
    """

    effect: NDArray
    magnitude: NDArray
    random: list[NDArray]
    active: int

    @classmethod
    def of(
        cls,
        latents: Latents,
        effect: Float[NDArray, " latents"],
        firing: Bool[NDArray, " latents"],
        seeds: int,
        seed: int,
    ) -> Orders:
        """The orders of one adapter."""
        size = np.abs(latents.values)
        return cls(
            strongest_first(effect, size * latents.norms),
            strongest_first(size),
            list(random_orders((firing | (effect > 0)) & latents.editable, seeds, seed)),
            int((effect > 0).sum()),
        )


def numbers(latents: Latents, active: int, points: int) -> list[int]:
    """Sizes that curves are measured at: up to the latents with an effect, and all that may change."""
    return sorted({*grid(active, points), int(latents.editable.sum())})


def curves(probe: Probe, orders: Orders, sizes: list[int]) -> list[CurvePoint]:
    """What is left of the effect with the first n latents of each order, or without them.

    Returns:
        `keep`, `ablate` and `magnitude` with intervals over documents, `random` with the range over its orders; no
        shares where the adapter has no effect.
    """
    if not probe.effect.present:
        return []
    kinds: dict[str, Callable[[int], NDArray]] = {
        "keep": lambda n: probe.first(orders.effect, n),
        "ablate": lambda n: probe.first(orders.effect, n, dropped=True),
        "magnitude": lambda n: probe.first(orders.magnitude, n),
    }
    found = []
    with progress("keeping and taking out latents", len(sizes) * (3 + len(orders.random)), "runs") as advance:
        for kind, losses in kinds.items():
            for n in sizes:
                share = probe.effect.share(losses(n))
                assert share is not None
                found.append(CurvePoint(kind, n, *share))
                advance()
        for n in sizes:
            shares = []
            for order in orders.random:
                shares.append(probe.effect.point(probe.first(order, n)))
                advance()
            spread = (min(shares), max(shares)) if shares else None
            found.append(CurvePoint("random", n, float(np.mean(shares)) if shares else None, spread))
    return found


@dataclass(frozen=True)
class Needed:
    """How many latents each order needs to keep the share that was asked for; None where none suffices."""

    effect: int | None
    magnitude: int | None
    random: list[int | None]


def needed(probe: Probe, orders: Orders, sizes: list[int], keep: float) -> Needed:
    """Choose the sizes on the documents of a probe: the lower end of a share's interval must reach what is asked for.

    The share itself would be too large for the number that was chosen by it, and too small on other documents.
    """
    with progress("looking for the fewest latents", None, "runs") as advance:

        def count(order: NDArray) -> int | None:
            def share(n: int) -> float:
                advance()
                losses = probe.first(order, n)
                found = probe.effect.share(losses)
                return probe.effect.point(losses) if found is None else found[1][0]

            return smallest(share, sizes, keep)

        return Needed(count(orders.effect), count(orders.magnitude), [count(one) for one in orders.random])


def latents_needed(
    model: Any, yardstick: Yardstick, share: float = 0.95, *, adapter: str = "default"
) -> int | None:
    """The fewest latents, by activation-weighted effect, that keep a share of what an adapter does to an objective.

    Ranked and chosen on the yardstick's own rows; `palimpsest explain` reports it on documents that chose nothing.

    Args:
        model: The peft model, the adapter active.
        yardstick: Held-out rows and the objective.
        share: Of the objective's change.
        adapter: Its name.

    Returns:
        None where the adapter changes no latents, or its effect cannot be told from 0.
    """
    if not latent_layers(model):
        return None
    latents = Latents(model, adapter)
    rows = [_text_of(row) for row in yardstick.rows]
    if not latents.editable.any() or not rows:
        return None
    probe = Probe(model, latents, yardstick, Settings())
    if not probe.effect.present:
        return None
    text = Text("held-out rows", "corpus", "", rows, np.zeros(len(rows), int), {})
    effect = effect_of(latents, [read_latents(model, latents, text, TOKENS_PER_BATCH)])
    order = strongest_first(effect, np.abs(latents.values) * latents.norms)
    sizes = numbers(latents, int((effect > 0).sum()), POINTS)
    return smallest(lambda n: probe.effect.point(probe.first(order, n)), sizes, share)


TOKENS_PER_BATCH = 4096
"""Padded tokens of a forward pass of `latents_needed`."""


def _text_of(row: Row) -> TextRow:
    """The tokens of a row that an adapter was trained to write."""
    match row:
        case PairRow():
            return answer(row.prompt, row.chosen)
        case KtoRow():
            return answer(row.prompt, row.answer)
        case PromptRow():
            return TextRow(row.prompt, row.prompt)
        case _:
            return row
