"""Columns of the latent browser: what stands above them, how values are shown, and how they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import numpy as np

from palimpsest.display.text import count, decimal, finite, percent, visible_token
from palimpsest.latents import LatentIndex, Query
from palimpsest.web.asking import Ask
from palimpsest.web.evidence import Evidence
from palimpsest.web.refusals import PageError

PAGE = 50
WORDS = 4
MOST_JOINED = 2
"""Columns of other runs that are shown at once; the others can be sorted and filtered by."""

KNOWN = {
    "rate": ("Fires on", "share", ""),
    "rate_base": ("Base", "share", "base"),
    "rate_tuned": ("Tuned", "share", "tuned"),
    "rate_change": ("Change", "change", ""),
    "fires": ("Firings", "count", ""),
    "mean_value": ("Mean", "number", ""),
    "max_value": ("Largest", "number", ""),
    "mean_base": ("Mean, base", "number", "base"),
    "mean_tuned": ("Mean, tuned", "number", "tuned"),
    "max_base": ("Largest, base", "number", "base"),
    "max_tuned": ("Largest, tuned", "number", "tuned"),
    "norm_base": ("Decoder norm, base", "number", "base"),
    "norm_tuned": ("Decoder norm, tuned", "number", "tuned"),
    "decoder_cosine": ("Decoder cosine", "number", ""),
    "label_score": ("Label score", "number", ""),
}
"""Columns by name: what stands above, how values are shown, whose they are."""

TITLES = {
    "rate_base": "Fires on, base",
    "rate_tuned": "Fires on, tuned",
    "rate_change": "Change of firing, tuned − base",
}
PAIR = ("rate_base", "rate_tuned", "rate_change", "max_value")
ONE = ("rate", "mean_value", "max_value")


@dataclass(frozen=True)
class Column:
    """A column that can be sorted and filtered by.

    Attributes:
        name: In the index.
        label: What stands above it.
        kind: `share`, `change`, `count`, `number` or `text`.
        side: Whose it is.
        source: The run that says it; empty for the examples run itself.
        choices: Values of a text column.
    """

    name: str
    label: str
    kind: str
    side: str = ""
    source: str = ""
    choices: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """What it is called away from the table, where no other column explains it."""
        return TITLES.get(self.name, self.label)

    def show(self, value: Any) -> str:
        """A value in few characters; empty where it is not known."""
        if self.kind == "text":
            return str(value or "")
        number = finite(value)
        if number is None:
            return ""
        if self.kind == "count":
            return count(number)
        if self.kind in ("share", "change"):
            digits = 3 if abs(number) < 0.01 else 1
            return percent(number, digits, signed=self.kind == "change")
        return decimal(number, 2 if abs(number) >= 1 else 3)


def columns(index: LatentIndex, evidence: Evidence) -> dict[str, Column]:
    """Every column of an index that holds anything, by name."""
    joined = {name: (label, source) for name, label, source in evidence.joined}
    found: dict[str, Column] = {}
    for name in index.names:
        if name == "latent" or np.isnan(index.values(name)).all():
            continue
        if name in joined:
            label, source = joined[name]
            found[name] = Column(name, label, "number", source=source)
        elif name in KNOWN:
            found[name] = Column(name, *KNOWN[name])
        elif name.startswith(("rate[", "share[")):
            what = "Fires on" if name.startswith("rate[") else "Of its firings in"
            found[name] = Column(name, f"{what} {name.partition('[')[2].rstrip(']')}", "share")
        else:
            found[name] = Column(name, name.replace("_", " "), "number")
    for name in index.texts:
        label, source = joined[name]
        found[name] = Column(name, label, "text", source=source, choices=evidence.choices(name))
    return found


def shown(known: Mapping[str, Column]) -> list[Column]:
    """The columns of the table: rates in both models, the score of the label, and what other runs say first."""
    names = PAIR if "rate_change" in known else ONE
    first = [known[name] for name in names if name in known]
    score = [known["label_score"]] if "label_score" in known else []
    joined = [one for one in known.values() if one.source]
    classes = [one for one in joined if one.kind == "text"][:2]
    others = [one for one in joined if one.kind != "text"]
    return score + first + (classes + others)[:MOST_JOINED]


def query(ask: Ask, known: Mapping[str, Column]) -> Query:
    """What the address asks for; columns that there are not are refused.

    Raises:
        PageError: A bound is no number, or a column is not known.
    """
    where: list[tuple[str, str, float | str]] = []
    for key, _ in ask.fields:
        end, _, name = key.partition(".")
        if end not in ("lo", "hi", "is"):
            continue
        if name not in known:
            raise PageError("There is no such column here", found=name[:60])
        if end == "is":
            if text := ask.text(key):
                where.append((name, "=", text))
            continue
        scale = 100.0 if known[name].kind in ("share", "change") else 1.0
        if (bound := ask.number(key)) is not None:
            where.append((name, ">=" if end == "lo" else "<=", bound / scale))
    sort = ask.text("sort", default_sort(known))
    if sort != "latent" and (sort not in known or known[sort].kind == "text"):
        raise PageError("There is no such column to sort by", found=sort[:60])
    descending = ask.text("order", "asc" if sort == "latent" else "desc") == "desc"
    offset = PAGE * (ask.whole("page", 1, low=1, high=10_000_000) - 1)
    return Query(ask.text("q").strip(), tuple(dict.fromkeys(where)), sort, descending, offset, PAGE)


def default_sort(known: Mapping[str, Column]) -> str:
    """Where a reader begins: what the tuned model does more often, else what fires most."""
    return next((name for name in ("rate_change", "rate") if name in known), "latent")


def state(ask: Ask, **changed: Any) -> str:
    """The address's own fields, with some changed; empty ones and the place in the list are left out."""
    kept = [
        (key, text)
        for key, text in ask.fields
        if text and (key in ("q", "sort", "order") or key.partition(".")[0] in ("lo", "hi", "is"))
    ]
    for key, value in changed.items():
        kept = [pair for pair in kept if pair[0] != key] + (
            [(key, str(value))] if value not in ("", None) else []
        )
    return urlencode(kept)


def cells(row: Mapping[str, Any], listed: Sequence[Column]) -> list[dict[str, Any]]:
    """A row of the table."""
    return [{"text": one.show(row.get(one.name)), "column": one} for one in listed]


def words(texts: Sequence[str] | None) -> list[str]:
    """The first tokens of a list, as they are shown."""
    return [visible_token(one, 24) for one in (texts or [])[:WORDS]]
