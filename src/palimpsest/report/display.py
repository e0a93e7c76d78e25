"""What a reader sees: hostile text made visible, numbers with their sign and interval, whiskers to scale."""

from dataclasses import dataclass
from typing import Any

from palimpsest.display.text import (
    NOT_MEASURED,
    Scale,
    count,
    decimal,
    finite,
    pair_of,
    percent,
    visible,
    visible_tail,
    visible_token,
)

__all__ = [
    "NOT_MEASURED",
    "Cell",
    "Scale",
    "Whisker",
    "count",
    "decimal",
    "finite",
    "measure",
    "missing",
    "pair_of",
    "percent",
    "visible",
    "visible_tail",
    "visible_token",
]


@dataclass(frozen=True)
class Whisker:
    """Positions of an estimate, its interval and the reference, 0..100."""

    low: float
    mid: float
    high: float
    reference: float | None


@dataclass(frozen=True)
class Cell:
    """One table cell: the estimate, what stands beside it, and its raw value for sorting."""

    text: str
    note: str = ""
    sort: float | None = None
    whisker: Whisker | None = None
    missing: bool = False


def missing(reason: str = "") -> Cell:
    """A cell for a value that was not measured, with the reason."""
    return Cell(NOT_MEASURED, f"({reason})" if reason else "", missing=True)


def measure(
    value: Any,
    interval: Any = None,
    *,
    style: str = "decimal",
    digits: int = 3,
    signed: bool = False,
    scale: Scale | None = None,
    reference: float | None = 0.0,
    reason: str = "",
) -> Cell:
    """A cell with an estimate, its interval in words and, given a scale, drawn.

    Args:
        value: The estimate; anything not finite gives a "not measured" cell.
        interval: [lo, hi] or None.
        style: `decimal` or `percent`.
        digits: Digits after the point.
        signed: Whether positive numbers carry a plus.
        scale: The column's scale; without it nothing is drawn.
        reference: Where the reference line stands (None for no line).
        reason: Why a missing value is missing.
    """
    number, ends = finite(value), pair_of(interval)
    if number is None:
        return missing(reason)

    def show(x: float) -> str:
        return percent(x, digits, signed) if style == "percent" else decimal(x, digits, signed)

    note = "" if ends is None else f"[{show(ends[0])}, {show(ends[1])}]".replace("%,", ",")
    whisker = None
    if scale is not None and ends is not None:
        line = None if reference is None else scale.at(reference)
        whisker = Whisker(scale.at(ends[0]), scale.at(number), scale.at(ends[1]), line)
    return Cell(show(number), note, number, whisker)
