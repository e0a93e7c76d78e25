"""What a result shows at the end of a notebook cell: one card, drawn the same way for everything.

A class becomes one by inheriting `Rich` and saying what is on its card:

    >>> from dataclasses import dataclass
    >>> @dataclass(frozen=True)
    ... class Found(Rich):
    ...     gain: float
    ...     gain_ci: tuple[float, float]
    ...     def _card(self) -> Card:
    ...         row = ("all", Measured(self.gain, self.gain_ci, signed=True))
    ...         return Card("A finding", summary="It is there.", tables=[Table(("text", "gain"), [row])])
    >>> "+0.200" in Found(0.2, (0.1, 0.3))._repr_html_()
    True

Text may come from corpora, models and label providers: all of it is made visible and escaped here and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.display.text import Scale, count, decimal, finite, pair_of, percent, visible

if TYPE_CHECKING:
    from jinja2 import Environment

LIMIT = 90_000
"""Characters of a card at most: a notebook keeps every output in its file."""

LONGEST, CELL = 2000, 240
"""Characters of a sentence and of a cell at most."""

WIDTH, HEIGHT, EDGE = 88, 14, 4
"""Of a whisker in pixels; `EDGE` is kept free on both sides."""

SIDES = ("base", "tuned")


@dataclass(frozen=True)
class Measured:
    """A number of a table with its interval, which is drawn on a scale that its column shares."""

    value: Any
    """Anything that is no finite number is shown as a dash."""
    ci: Any = None
    """Lower and upper end, or None."""
    style: str = "decimal"
    """`decimal` or `percent`."""
    digits: int = 3
    signed: bool = False
    """Positive numbers carry a plus, and the scale has a line at zero."""


@dataclass(frozen=True)
class Table:
    """A table of a card."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    """Cells: text, numbers, `Measured`, or None for what is not known."""
    title: str = ""
    sides: Sequence[str] = ()
    """Of each row: `base`, `tuned` or nothing; its marks have the colour of that model."""
    folded: bool = False
    """Shown after a click only."""
    scale: str = "column"
    """What shares a scale: a `column`, the whole `table`, or no more than one `cell`, where rows differ in unit."""
    within: tuple[float, float] | None = None
    """No scale reaches beyond these; an estimate outside is a hollow mark at the edge."""


@dataclass(frozen=True)
class Card:
    """What a result says of itself."""

    kind: str
    """What it is, as in `Diff`."""
    name: str = ""
    """Which one it is."""
    summary: str = ""
    """What was found, in a sentence."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Single figures and names, in a line."""
    tables: Sequence[Table] = ()
    lists: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Long lists by their heading, each shown after a click."""
    notes: Sequence[Any] = ()
    """What a reader should know beside the figures."""


class Rich:
    """Gives a class its `_repr_html_`; the class says in `_card` what is on it."""

    __slots__ = ()

    def _card(self) -> Card:
        raise NotImplementedError(f"{type(self).__name__} does not say what is on its card")

    def _repr_html_(self) -> str:
        return card_html(self._card())


def card_from(module: str, name: str) -> Any:
    """A `_card` whose words stand in another module, which is imported when a card is asked for.

    Args:
        module: Full name of the module.
        name: Function in it that takes the result and gives its card.
    """

    def card(self: Any) -> Card:
        return getattr(import_module(module), name)(self)

    return card


def card_html(card: Card) -> str:
    """The card as HTML that needs nothing else: no script, no address, colours for light and dark notebooks.

    Returns:
        Fewer than 100,000 characters, however much there is to show: what is left out is counted.
    """
    for most in (60, 24, 8, 2):
        html = _draw(card, most)
        if len(html) <= LIMIT:
            return html
    return _draw(Card(card.kind, card.name, card.summary), 0)


def _draw(card: Card, most: int) -> str:
    return (
        _environment()
        .get_template("card.html.j2")
        .render(
            card=card,
            facts=[(name, _plain(value)) for name, value in list(card.facts.items())[:most] if _known(value)],
            tables=[_table(one, most) for one in card.tables if one.rows],
            lists=[
                (name, list(rows)[:most], max(0, len(rows) - most))
                for name, rows in card.lists.items()
                if rows
            ],
            notes=list(card.notes)[: max(most, 1)],
            width=WIDTH,
            height=HEIGHT,
        )
    )


@lru_cache(maxsize=1)
def _environment() -> "Environment":
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def shown(value: Any) -> Any:
        """Every expression of the template passes here before it is escaped: nothing stays invisible."""
        return value if isinstance(value, Markup) else visible(value, LONGEST)

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=shown,
    )


def _known(value: Any) -> bool:
    return value is not None and value != "" and value != [] and value != {}


def _table(table: Table, most: int) -> dict[str, Any]:
    """The rows that fit, with their marks in pixels."""
    columns = list(table.columns)[:12]
    rows = [list(row)[: len(columns)] for row in list(table.rows)[:most]]
    by_column = [[row[place] for row in rows if place < len(row)] for place in range(len(columns))]
    scales = _scales(table, rows, by_column)
    sides = [*table.sides, *[""] * len(rows)]
    return {
        "title": table.title,
        "folded": table.folded,
        "columns": [
            {"name": name, "number": _numbers(cells)} for name, cells in zip(columns, by_column, strict=True)
        ],
        "rows": [
            {
                "side": side if side in SIDES else "",
                "cells": [_cell(one, scale) for one, scale in zip(row, own, strict=False)],
            }
            for row, own, side in zip(rows, scales, sides, strict=False)
        ],
        "more": len(table.rows) - len(rows),
        "narrower": len(table.columns) - len(columns),
    }


def _scales(
    table: Table, rows: Sequence[Sequence[Any]], by_column: Sequence[Sequence[Any]]
) -> list[list[Scale | None]]:
    """The scale of every cell."""
    if table.scale == "cell":
        return [[_scale([one], table.within) for one in row] for row in rows]
    if table.scale == "table":
        return [[_scale([one for row in rows for one in row], table.within)] * len(by_column)] * len(rows)
    return [[_scale(cells, table.within) for cells in by_column]] * len(rows)


def _numbers(cells: Sequence[Any]) -> bool:
    """Whether a column holds numbers, which stand at its right."""
    known = [one for one in cells if one is not None]
    return bool(known) and all(
        isinstance(one, Measured | int | float) and not isinstance(one, bool) for one in known
    )


def _scale(cells: Sequence[Any], within: tuple[float, float] | None) -> Scale | None:
    """What the marks of a column share; None where it has no interval."""
    found = [one for one in cells if isinstance(one, Measured)]
    ends = [end for one in found if finite(one.value) is not None for end in pair_of(one.ci) or ()]
    if not ends:
        return None
    values = [finite(one.value) for one in found if pair_of(one.ci) is not None]
    scale = Scale.over([*ends, *values], zero=any(one.signed for one in found))
    if within is None:
        return scale
    return Scale(max(scale.low, within[0]), max(min(scale.high, within[1]), within[0] + 1e-9))


def _cell(value: Any, scale: Scale | None) -> dict[str, Any]:
    if not isinstance(value, Measured):
        return {"text": visible(_plain(value), CELL), "note": "", "mark": None}
    number, ends = finite(value.value), pair_of(value.ci)
    if number is None:
        return {"text": "–", "note": "", "mark": None}

    def show(one: float) -> str:
        form = percent if value.style == "percent" else decimal
        return form(one, value.digits, value.signed)

    mark: dict[str, Any] | None = None
    if scale is not None and ends is not None:
        mark = {"low": _at(scale, ends[0]), "mid": _at(scale, number), "high": _at(scale, ends[1])}
        mark["zero"] = _at(scale, 0.0) if value.signed else None
        mark["outside"] = not scale.low <= number <= scale.high
    note = "" if ends is None else f"[{show(ends[0])}, {show(ends[1])}]".replace("%,", ",")
    return {"text": show(number), "note": note, "mark": mark}


def _at(scale: Scale, value: float) -> float:
    return round(EDGE + min(max(scale.at(value), 0.0), 100.0) / 100 * (WIDTH - 2 * EDGE), 1)


def _plain(value: Any) -> str:
    """A cell that is no estimate, in words."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value).replace("-", "−")
    if isinstance(value, float):
        number = finite(value)
        return "–" if number is None else f"{number:.4g}".replace("-", "−")
    if isinstance(value, Mapping):
        known = [(name, one) for name, one in value.items() if _known(one)]
        return ", ".join(f"{name} {_plain(one)}" for name, one in known[:40])
    if isinstance(value, list | tuple | set | frozenset):
        joint = "; " if any(isinstance(one, Mapping) for one in value) else ", "
        return joint.join(_plain(one) for one in list(value)[:40])
    return str(value)
