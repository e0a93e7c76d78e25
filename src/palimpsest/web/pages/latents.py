"""The latents of an examples run: searched, filtered and sorted, and one by one."""

from __future__ import annotations

from typing import Any

from palimpsest.errors import ConfigError
from palimpsest.latents import Query
from palimpsest.report.latent_view import latent_view
from palimpsest.web import columns
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.desk import Desk, Shown, names_of
from palimpsest.web.refusals import NoPageError


def browse(desk: Desk, ask: Ask) -> Answer:
    """A page of the latents that are asked for."""
    shown = desk.shown(ask.place("run"))
    known = shown.columns
    query = columns.query(ask, known)
    page = shown.index.search(query)
    if page.total and query.offset >= page.total:
        # The last page of a search that became shorter.
        query = Query(**{**vars(query), "offset": (page.total - 1) // columns.PAGE * columns.PAGE})
        page = shown.index.search(query)
    listed = columns.shown(known)
    address = f"/run/{shown.entry.id}"
    context = _about(shown) | {
        "q": query.text,
        "known": list(known.values()),
        "columns": listed,
        "sort": query.sort,
        "descending": query.descending,
        "bounds": {key: text for key, text in ask.fields if key.partition(".")[0] in ("lo", "hi", "is")},
        "filters": len(query.where),
        "total": page.total,
        "rows": [
            _row(address, ask, query, at, row, listed) for at, row in enumerate(page.rows, query.offset)
        ],
        "heads": [_head(address, ask, query, one) for one in listed],
        "number_head": _head(address, ask, query, columns.Column("latent", "Latent", "count")),
        "pager": _pager(address, ask, query, page.total),
    }
    return Answer("latents_part.html.j2" if ask.fragment else "latents.html.j2", context)


def one(desk: Desk, ask: Ask) -> Answer:
    """A latent: its card, what other runs say, and its neighbours in the list that it was opened from.

    Raises:
        NoPageError: It never fired, or there is none of that number.
    """
    shown, latent = desk.shown(ask.place("run")), ask.latent()
    address = f"/run/{shown.entry.id}"
    try:
        view = latent_view(shown.index, latent, shown.evidence.of(latent), link=f"{address}/latent/{{}}")
    except ConfigError as error:
        raise NoPageError(str(error)) from error
    context = _about(shown) | {
        "view": view,
        "latent": latent,
        "back": f"{address}/latents?{columns.state(ask)}" if ask.fields else f"{address}/latents",
        "turn": _turn(shown, ask, latent, address),
    }
    return Answer("latent_page.html.j2", context)


def _about(shown: Shown) -> dict[str, Any]:
    about = shown.index.about
    base, tuned = names_of(about)
    return {
        "entry": shown.entry,
        "alive": len(shown.index),
        "of": int(about.get("latents") or 0),
        "pair": (base, tuned),
        "site": str(about.get("site") or ""),
        "tokens": int(about.get("tokens") or 0),
        "labels": [one.name for one in shown.labels],
        "sources": [one.name for one in shown.evidence.sources],
    }


def _row(
    address: str, ask: Ask, query: Query, at: int, row: dict[str, Any], listed: list[columns.Column]
) -> dict[str, Any]:
    latent = row["latent"]
    sort, order = query.sort, "desc" if query.descending else "asc"
    return {
        "latent": latent,
        "at": f"{address}/latent/{latent}?{columns.state(ask, sort=sort, order=order, at=at)}",
        "label": row["label"] or "",
        "provider": row["label_provider"] or "",
        "tokens": columns.words(row["tokens"]),
        "promoted": columns.words(row["promoted"]),
        "cells": columns.cells(row, listed),
    }


def _head(address: str, ask: Ask, query: Query, column: columns.Column) -> dict[str, Any]:
    """What stands above a column, and where a click on it leads."""
    mine = query.sort == column.name
    descending = not query.descending if mine else column.name != "latent"
    order = "desc" if descending else "asc"
    return {
        "column": column,
        "order": ("descending" if query.descending else "ascending") if mine else "",
        "at": ""
        if column.kind == "text"
        else f"{address}/latents?{columns.state(ask, sort=column.name, order=order)}",
    }


def _pager(address: str, ask: Ask, query: Query, total: int) -> dict[str, Any]:
    number, last = query.offset // columns.PAGE + 1, max(1, -(-total // columns.PAGE))

    def to(page: int) -> str:
        return f"{address}/latents?{columns.state(ask, page=page)}" if 1 <= page <= last else ""

    return {
        "first": query.offset + 1 if total else 0,
        "end": min(query.offset + columns.PAGE, total),
        "number": number,
        "last": last,
        "back": to(number - 1),
        "on": to(number + 1),
    }


def _turn(shown: Shown, ask: Ask, latent: int, address: str) -> dict[str, Any] | None:
    """The latents before and after this one in the list that it was opened from."""
    at = ask.whole("at", -1, low=-1, high=10_000_000)
    if at < 0:
        return None
    query = columns.query(ask, shown.columns)
    start = max(at - 1, 0)
    page = shown.index.search(Query(**{**vars(query), "offset": start, "limit": 3}))
    found = [row["latent"] for row in page.rows]
    mine = at - start
    if mine >= len(found) or found[mine] != latent:
        return None

    def to(step: int) -> str:
        place = mine + step
        if not 0 <= place < len(found):
            return ""
        return f"{address}/latent/{found[place]}?{columns.state(ask, at=at + step)}"

    return {"back": to(-1), "on": to(1), "number": at + 1, "total": page.total}
