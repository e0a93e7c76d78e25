"""Windows of text in which a latent fires, cut into pieces that carry each model's activation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.latents import Example
from palimpsest.report.display import count, decimal, finite, visible, visible_token

LEVELS = 9
"""Steps of intensity in which a token's activation is drawn."""
AROUND = (12, 6)
"""Tokens before and after the peak where space is short."""


@dataclass(frozen=True)
class Piece:
    """Some text of a window: silent text of any length (`style` is empty) or one token on which the latent fires."""

    text: str
    style: str = ""
    title: str = ""
    peak: bool = False


@dataclass(frozen=True)
class ExampleView:
    """A window around one firing."""

    pieces: Sequence[Piece]
    base: str
    tuned: str
    value: str
    joint: str
    corpus: str
    document: str


@dataclass(frozen=True)
class Group:
    """Examples of one kind: the strongest, or those of one quantile bin."""

    title: str
    note: str
    examples: Sequence[ExampleView]


def groups_of(
    found: Sequence[Example],
    sides: tuple[str, ...],
    limits: tuple[int, int] | None,
    detail: bool,
    *,
    joint: bool = False,
) -> list[Group]:
    """Examples by kind: all in full with `detail`, else short windows and one group for all quantile bins.

    Args:
        found: The examples of one latent.
        sides: Models whose own activation is known.
        limits: Strongest examples and examples of each bin to show at most; None for all.
        detail: Whether there is space.
        joint: Whether the signal that chose them is a third one, the joint code of both models.
    """
    most = max((value for one in found for value in _values(one, sides)), default=0.0)
    bins = max((one.kind for one in found), default=0)
    tops, each = limits or (len(found), len(found))
    groups: list[Group] = []
    for kind in range(bins + 1):
        mine = [one for one in found if one.kind == kind][: tops if kind == 0 else each]
        views = [_example(one, sides, most, detail, joint) for one in mine]
        if not views:
            continue
        if detail or len(groups) < 2:
            title = "Strongest" if kind == 0 else f"Bin {kind} of {bins}" if detail else "Weaker ones"
            groups.append(Group(title, "the weakest" if kind == 1 else "", views))
        else:
            groups[-1] = Group(groups[-1].title, "the weakest first", [*groups[-1].examples, *views])
    return groups


def activation(value: Any) -> str:
    """An activation as text; a dash where it is not known."""
    number = finite(value)
    return "–" if number is None else decimal(number, 2)


def _values(example: Example, sides: tuple[str, ...]) -> list[float]:
    """The activations at the peak, of which the strongest example has the largest."""
    found = [getattr(example, side) for side in sides] or [example.value]
    return [number for value in found if (number := finite(value)) is not None]


def _example(example: Example, sides: tuple[str, ...], most: float, detail: bool, joint: bool) -> ExampleView:
    return ExampleView(
        pieces=_pieces(example, sides, most, detail),
        base=activation(example.base) if "base" in sides else "",
        tuned=activation(example.tuned) if "tuned" in sides else "",
        value=activation(example.value),
        joint=activation(example.value) if joint else "",
        corpus=visible(example.corpus, 40),
        document=count(example.document),
    )


def _pieces(example: Example, sides: tuple[str, ...], most: float, detail: bool) -> list[Piece]:
    """Neighbouring silent tokens become one piece, so that a card holds few elements."""
    signals = {"base": ("b", example.base_at), "tuned": ("t", example.tuned_at)}
    lists = [signals[side] for side in sides] if len(sides) == 2 else [("v", example.value_at)]
    pieces: list[Piece] = []
    silent: list[str] = []
    before, after = (len(example.tokens),) * 2 if detail else AROUND
    first, last = max(0, example.peak - before), example.peak + after
    if first:
        silent.append("…")
    for place, token in enumerate(example.tokens[: last + 1]):
        if place < first:
            continue
        values = [(mark, finite(values[place]) if values else None) for mark, values in lists]
        style = " ".join(f"{mark}{level}" for mark, value in values if (level := _level(value, most)))
        peak = place == example.peak
        if not style and not peak:
            silent.append(visible(token, 80))
            continue
        text = token.lstrip(" ")
        # Leading spaces stay outside the mark, unless there is nothing else to mark.
        silent += [" " * (len(token) - len(text))] if text else []
        if "".join(silent):
            pieces.append(Piece("".join(silent)))
        silent = []
        fired = visible(text, 80) if text else visible_token(token)
        pieces.append(Piece(fired, style, _title(sides, values) if detail else "", peak))
    silent += ["…"] if last + 1 < len(example.tokens) else []
    if silent:
        pieces.append(Piece("".join(silent)))
    return pieces


def _level(value: float | None, most: float) -> int:
    if value is None or value <= 0 or most <= 0:
        return 0
    return max(1, min(LEVELS, round(LEVELS * value / most)))


def _title(sides: tuple[str, ...], values: Sequence[tuple[str, float | None]]) -> str:
    names = {"b": "base", "t": "tuned", "v": sides[0] if sides else "activation"}
    return ", ".join(f"{names[mark]} {activation(value)}" for mark, value in values)
