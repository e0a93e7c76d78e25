"""What a reader sees: hostile text made visible, numbers with their sign and interval, whiskers to scale."""

import math
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

NOT_MEASURED = "not measured"
_NAMED = {"\n": "↵", "\t": "⇥", "\u00a0": "⍽"}
_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
# Letters by category that are drawn as nothing at all.
_BLANK_LETTERS = {"\u115f", "\u1160", "\u3164", "\uffa0", "\u034f", "\u17b4", "\u17b5", "\u2800"}


def _visible_char(char: str) -> str:
    if " " <= char <= "~":
        return char
    if char in _NAMED:
        return _NAMED[char]
    if unicodedata.category(char) in _HIDDEN or char in _BLANK_LETTERS:
        return f"⟨U+{ord(char):04X}⟩"
    return char


def visible(text: object, limit: int | None = None) -> str:
    """Text in which nothing can hide: control, bidi and zero-width characters become symbols.

    Args:
        text: Any value; strings from corpora and models are the hostile case.
        limit: Longest result in characters, the cut marked with an ellipsis.
    """
    source = str(text)
    if limit is not None:
        source = source[: limit + 1]
    shown = "".join(map(_visible_char, source))
    return shown if limit is None or len(shown) <= limit else shown[: limit - 1] + "…"


def visible_tail(text: object, limit: int) -> str:
    """Like `visible`, but keeps the end of the text: what stands right before a token."""
    shown = "".join(map(_visible_char, str(text)[-limit - 1 :]))
    return shown if len(shown) <= limit else "…" + shown[-limit + 1 :]


def visible_token(text: object, limit: int = 48) -> str:
    """A single token: spaces at its ends are drawn, an empty token says so."""
    source = str(text)
    if not source:
        return "∅"
    shown = visible(source, limit)
    inner = shown.strip(" ")
    lead = len(shown) - len(shown.lstrip(" "))
    trail = len(shown) - lead - len(inner)
    return "␣" * lead + inner + "␣" * trail


def finite(value: Any) -> float | None:
    """The value as a float, or None when it is absent, no number, NaN or infinite."""
    if value is None or isinstance(value, (str, bool, dict, list)):
        return None
    number = float(value)
    return number if math.isfinite(number) else None


def pair_of(values: Any) -> tuple[float, float] | None:
    """An interval [lo, hi], or None unless both ends are finite."""
    if not isinstance(values, (list, tuple)) or len(values) != 2:
        return None
    low, high = finite(values[0]), finite(values[1])
    return None if low is None or high is None else (low, high)


def decimal(value: float, digits: int = 3, signed: bool = False) -> str:
    """A number with a true minus sign; tiny ones in scientific notation rather than as zero."""
    small = 0 < abs(value) < 0.5 * 10**-digits
    text = f"{value:{'+' if signed else ''}{'.1e' if small else f'.{digits}f'}}"
    if not small and float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(value: float, digits: int = 1, signed: bool = False) -> str:
    """A share as a percentage."""
    text = f"{100 * value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−") + "%"


def count(value: Any) -> str:
    """A whole number with commas between thousands."""
    number = finite(value)
    return NOT_MEASURED if number is None else f"{round(number):,}"


@dataclass(frozen=True)
class Scale:
    """Maps values to 0..100, with zero inside when asked."""

    low: float
    high: float

    @classmethod
    def over(cls, values: Iterable[float | None], *, zero: bool = True) -> "Scale":
        """The range of the finite values, widened a little so that no mark touches the edge."""
        known = [value for value in values if value is not None] + ([0.0] if zero else [])
        low, high = min(known, default=0.0), max(known, default=1.0)
        margin = 0.06 * (high - low) or 0.5
        return cls(low - margin, high + margin)

    def at(self, value: float) -> float:
        """Position of a value, 0 (left) to 100 (right)."""
        return round(100 * (value - self.low) / (self.high - self.low), 2)


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
