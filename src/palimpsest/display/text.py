"""Hostile text made visible, numbers with their sign, and where they lie on a scale."""

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
    # Most text is plain, and a page holds thousands of pieces.
    plain = source.isascii() and source.isprintable()
    shown = source if plain else "".join(map(_visible_char, source))
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
    try:
        number = float(value)
    except OverflowError:  # a whole number beyond every float, as JSON may hold
        return None
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
