"""A table of the page: its first rows as they are printed, and all of them as the JSON that the page's script draws."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from palimpsest.report.display import (
    Cell,
    Scale,
    Whisker,
    count,
    decimal,
    finite,
    percent,
    visible,
    visible_token,
)
from palimpsest.report.parts import Column, Table

LONGEST = 300
"""Characters of a cell at most."""
MOST_WORDS = 12
SIGNIFICANT = 6
"""Digits of a number that the page keeps; the run's own files have the rest."""
NUMBERS = ("number", "share", "count")


@dataclass(frozen=True)
class Cards:
    """Which latents have a card on the page, and how its address begins."""

    prefix: str = "latent-"
    shown: Collection[int] = ()


@dataclass(frozen=True)
class Head:
    """Above a column."""

    label: str
    meaning: str
    style: str
    order: str


@dataclass(frozen=True)
class Item:
    """A cell: `missing`, `words`, `latent`, `measure`, `text`, `token` or `plain`."""

    kind: str
    style: str
    text: str = ""
    words: Sequence[str] = ()
    cell: Cell | None = None
    address: str = ""


@dataclass(frozen=True)
class TableView:
    """All that the templates need of a table."""

    name: str
    title: str
    caption: str
    heads: Sequence[Head]
    rows: Sequence[Sequence[Item]]
    data: Mapping[str, Any] = field(repr=False)
    shown: int
    count: int
    beyond: int
    """Rows that are not on the page."""
    cards: str
    """How the address of a latent's card begins."""


def table_view(table: Table, cards: Cards) -> TableView:
    """Values made visible and rounded, the first rows in their order.

    Args:
        table: What is shown.
        cards: Latents of this table's dictionary that can be opened.
    """
    scales = [_scale(table, column) for column in table.columns]
    values = [[_value(row, column) for column in table.columns] for row in table.rows]
    order = _order(table, values)
    shown = max(table.shown, 1)
    first = [
        [
            _item(column, scale, value, cards)
            for column, scale, value in zip(table.columns, scales, values[place], strict=True)
        ]
        for place in order[:shown]
    ]
    columns = [
        {
            "label": visible(column.label, LONGEST),
            "kind": column.kind,
            "digits": column.digits,
            "interval": column.interval is not None,
            "style": style(column),
            "scale": None if scale is None else [scale.low, scale.high],
        }
        for column, scale in zip(table.columns, scales, strict=True)
    ]
    total = len(values) if table.total is None else max(table.total, len(values))
    return TableView(
        name=table.name,
        title=table.title,
        caption=table.caption,
        heads=[_head(table, column) for column in table.columns],
        rows=first,
        data={"columns": columns, "rows": values},
        shown=shown,
        count=len(values),
        beyond=total - len(values),
        cards=cards.prefix,
    )


def style(column: Column) -> str:
    """Class names of a column's cells: how they are aligned, and whose colour they have."""
    return " ".join(filter(None, ("num" if column.kind in NUMBERS else f"is-{column.kind}", column.side)))


def ordered(table: Table) -> list[Mapping[str, Any]]:
    """The rows as the page first shows them; those without a value come last."""
    values = [[_value(row, column) for column in table.columns] for row in table.rows]
    return [table.rows[place] for place in _order(table, values)]


def shown_number(column: Column, value: float) -> str:
    """A number as this column prints it."""
    if column.kind == "share":
        return percent(value, column.digits)
    return count(value).replace("-", "−") if column.kind == "count" else decimal(value, column.digits)


def plain_value(row: Mapping[str, Any], column: Column) -> Any:
    """What a row says in a column, without its interval: a number, visible text, a list of tokens, or None."""
    value = row.get(column.key)
    if column.kind in NUMBERS:
        return _round(value)
    if value is None or value == "":
        return None
    if column.kind == "words":
        listed = value if isinstance(value, (list, tuple)) else [value]
        return [visible_token(one) for one in listed[:MOST_WORDS] if one is not None]
    if column.kind == "latent" and isinstance(value, (int, float)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return visible_token(value, 80) if column.kind == "token" else visible(value, LONGEST)


def _round(value: Any) -> float | int | None:
    number = finite(value)
    if number is None:
        return None
    rounded = float(f"{number:.{SIGNIFICANT}g}") if not number.is_integer() else number
    return int(rounded) if rounded.is_integer() else rounded


def _value(row: Mapping[str, Any], column: Column) -> Any:
    value = plain_value(row, column)
    if column.interval is None or value is None:
        return value
    return [value, *(_round(row.get(key)) for key in column.interval)]


def _scale(table: Table, column: Column) -> Scale | None:
    if column.interval is None:
        return None
    keys = (column.key, *column.interval)
    known = [number for row in table.rows for key in keys if (number := finite(row.get(key))) is not None]
    if not known:
        return None
    # A few far values, which then end at the edge, would press all others together.
    known.sort()
    beyond = len(known) // 50
    low, high = known[beyond], known[-1 - beyond]
    return Scale.over([low, high], zero=low < 0.5 * high)


def _key(value: Any, column: Column) -> Any:
    if value is None or (column.kind == "words" and not value):
        return None
    if column.kind == "words":
        return " ".join(value)
    return value[0] if column.interval else value


def _order(table: Table, values: Sequence[Sequence[Any]]) -> list[int]:
    places = list(range(len(values)))
    column = _sorted_by(table)
    if column is None or table.sort is None:
        return places
    keys = [_key(row[column], table.columns[column]) for row in values]
    known = [place for place in places if keys[place] is not None]
    text = any(isinstance(keys[place], str) for place in known)
    known.sort(key=lambda place: str(keys[place]) if text else keys[place], reverse=table.sort[1])
    return known + [place for place in places if keys[place] is None]


def _sorted_by(table: Table) -> int | None:
    keys = [column.key for column in table.columns]
    return keys.index(table.sort[0]) if table.sort and table.sort[0] in keys else None


def _head(table: Table, column: Column) -> Head:
    order = ""
    if table.sort and table.sort[0] == column.key:
        order = "descending" if table.sort[1] else "ascending"
    return Head(column.label, column.meaning, style(column), order)


def _item(column: Column, scale: Scale | None, value: Any, cards: Cards) -> Item:
    kind, classes = column.kind, style(column)
    if value is None or (kind == "words" and not value):
        return Item("missing", classes)
    if kind == "words":
        return Item("words", classes, words=value)
    if kind == "latent":
        # The app's cards are pages of their own.
        start = cards.prefix if cards.prefix.startswith("/") else f"#{cards.prefix}"
        address = f"{start}{value}" if value in cards.shown else ""
        return Item("latent", classes, str(value), address=address)
    if column.interval is not None:
        return Item("measure", classes, cell=_measured(column, scale, value))
    if kind in NUMBERS:
        return Item("plain", classes, shown_number(column, value))
    return Item("token" if kind == "token" else "text", classes, value)


def _measured(column: Column, scale: Scale | None, value: Sequence[Any]) -> Cell:
    middle, low, high = value
    text = shown_number(column, middle)
    if low is None or high is None or scale is None:
        return Cell(text, "", middle)
    note = f"[{shown_number(column, low)}, {shown_number(column, high)}]".replace("%,", ",")
    zero = scale.at(0.0) if scale.low < 0 < scale.high else None
    places = [min(max(scale.at(one), 0.0), 100.0) for one in (low, middle, high)]
    return Cell(text, note, middle, Whisker(places[0], places[1], places[2], zero))
