"""The density of a latent's activations as a small drawing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palimpsest.report.display import finite

HEIGHT = 40
"""Of the drawing; it is as wide as there are bins."""


@dataclass(frozen=True)
class Histogram:
    """Outlines of the distributions on one common scale.

    Attributes:
        shapes: Side (`base`, `tuned` or `value`) and path.
        bins: How many there are.
        low: Activation at the left end, as text.
        high: At the right end.
        spoken: What a screen reader says.
    """

    shapes: list[tuple[str, str]]
    bins: int
    low: str
    high: str
    spoken: str


def histogram(row: Mapping[str, Any], sides: tuple[str, ...]) -> Histogram | None:
    """The density histogram of a latent, base and tuned on one scale of counts.

    Args:
        row: A row of `latents.parquet`.
        sides: Models whose own activation is known; without any, the signal that chose the examples is drawn.
    """
    counts = {side: _counts(row, side) for side in (sides or ("value",))}
    counts = {side: values for side, values in counts.items() if values}
    start = finite(row.get("histogram_start"))
    length = max((len(values) for values in counts.values()), default=0)
    most = max((value for values in counts.values() for value in values), default=0.0)
    if start is None or not length or most <= 0:
        return None
    low, high = 2 ** (start / 2), 2 ** ((start + length) / 2)
    shapes = [(side, _outline(values, most)) for side, values in counts.items()]
    spoken = f"Distribution of the activations from {low:.2g} to {high:.2g}"
    return Histogram(shapes, length, f"{low:.2g}", f"{high:.2g}", spoken)


def _counts(row: Mapping[str, Any], side: str) -> list[float]:
    return [max(finite(value) or 0.0, 0.0) for value in row.get(f"histogram_{side}") or []]


def _outline(values: list[float], most: float) -> str:
    """Steps from left to right; what is not zero is at least a pixel high."""
    path = f"M0 {HEIGHT}"
    for value in values:
        path += f"V{HEIGHT - (max(1, round((HEIGHT - 2) * value / most)) if value else 0)}h1"
    return f"{path}V{HEIGHT}"
