"""Two runs side by side: what was set differently, and what came out differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.display.text import finite, pair_of, visible
from palimpsest.errors import PalimpsestError
from palimpsest.report.data_table import Cards, TableView, plain_value, table_view
from palimpsest.report.merge import sections_of
from palimpsest.report.parts import Column, Figures, Kind, Section, Table
from palimpsest.report.sections.reading import rows_of
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.desk import Desk, names_of
from palimpsest.web.pages.runs import read_run
from palimpsest.web.runs import Entry

MOST_SETTINGS = 200
MOST_FIGURES = 80
MOST_JOINED = 5
NUMBERS = ("number", "share", "count")
UNTOLD = ("schema", "seed", "seconds", "created")
BY_TASK: tuple[tuple[str, str, str, Kind, int], ...] = (
    ("idr", "ci", "IDR_rel", "share", 1),
    ("delta_loss", "delta_loss_ci", "Δloss", "number", 3),
    ("kl", "kl_ci", "KL", "number", 3),
    ("relative_drift", "relative_drift_ci", "Drift", "number", 3),
)
"""Measures of an audit's tasks: key, its interval, what it is called, and how it is shown."""


def compare(desk: Desk, ask: Ask) -> Answer:
    """The two runs of the address, and a choice of others."""
    entries = [one for one in desk.shelf.entries() if one.status == "complete"]
    left, right = ask.text("a", limit=40), ask.text("b", limit=40)
    context: dict[str, Any] = {
        "groups": _choices(entries),
        "a": left,
        "b_": right,
        "found": None,
        "folder": str(desk.shelf.root),
    }
    if left and right:
        context["found"] = _compared(desk, left, right)
    return Answer("compare.html.j2", context)


def _choices(entries: Sequence[Entry]) -> list[tuple[str, list[tuple[str, str]]]]:
    groups: dict[str, list[tuple[str, str]]] = {}
    for one in entries:
        groups.setdefault(one.group, []).append((one.id, f"{one.name} ({one.stage})"))
    return list(groups.items())


def _compared(desk: Desk, left: str, right: str) -> dict[str, Any]:
    opened = [desk.open(one) for one in (left, right)]
    runs = [read_run(entry, artifact) for entry, artifact in opened]
    sections, problems = [], []
    for run in runs:
        try:
            sections.append(sections_of([run]))
        except PalimpsestError as error:
            sections.append([])
            problems.append(str(error))
    settings = _differences(*(_flat(run.artifact.config) for run in runs))
    figures = _figures(*sections) or _numbers(*(_flat(run.data) for run in runs))
    by_task = _by_task(runs[0].data, runs[1].data)
    tables = ([by_task] if by_task else []) + _tables(sections[0], sections[1])
    return {
        "runs": [
            {"entry": entry, "pair": names_of(run.data), "site": str(run.data.get("site") or "")}
            for (entry, _), run in zip(opened, runs, strict=True)
        ],
        "same_stage": runs[0].stage == runs[1].stage,
        "same": left == right,
        "settings": settings[:MOST_SETTINGS],
        "more_settings": max(0, len(settings) - MOST_SETTINGS),
        "figures": figures,
        "tables": tables,
        "table_data": [(view.name, view.data) for view in tables if view.count],
        "problems": problems,
    }


def _flat(value: Any, prefix: str = "", depth: int = 0) -> dict[str, Any]:
    """Nested mappings as dotted keys; lists stay whole."""
    if not isinstance(value, Mapping) or depth > 6:
        return {prefix: value}
    found: dict[str, Any] = {}
    for key, inner in value.items():
        found |= _flat(inner, f"{prefix}.{key}" if prefix else str(key), depth + 1)
        if len(found) > 5_000:
            break
    return found


def _differences(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    keys = list(dict.fromkeys([*left, *right]))
    differing = [key for key in keys if left.get(key) != right.get(key)]
    return [(key, _said(left.get(key)), _said(right.get(key))) for key in differing]


def _said(value: Any) -> str:
    if value is None or value == [] or value == "":
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}".replace("-", "−")
    if isinstance(value, list):
        return ", ".join(_said(one) for one in value[:12]) + (" …" if len(value) > 12 else "")
    return visible(value, 200)


def _figures(left: Sequence[Section], right: Sequence[Section]) -> list[tuple[str, str, str, str]]:
    """Headline figures that both reports show, as they show them."""
    found = [{item[0]: item[1] for item in _headlines(one)} for one in (left, right)]
    both = [label for label in found[0] if label in found[1]]
    return [(label, str(found[0][label]), str(found[1][label]), "") for label in both]


def _headlines(sections: Sequence[Section]) -> list[Sequence[str]]:
    return [
        item for one in sections for block in one.blocks if isinstance(block, Figures) for item in block.items
    ]


def _numbers(left: Mapping[str, Any], right: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Single numbers in which the main files differ, with their difference."""
    found = []
    for key in left:
        one, other = finite(left[key]), finite(right.get(key))
        if one is None or other is None or one == other or key.rpartition(".")[2] in UNTOLD:
            continue
        change = f"{other - one:+.4g}".replace("-", "−")
        found.append((key.replace("_", " "), _said(left[key]), _said(right[key]), change))
    return found[:MOST_FIGURES]


def _by_task(left: Mapping[str, Any], right: Mapping[str, Any]) -> TableView | None:
    """The measures of the tasks that two audits share, with their intervals."""
    named = [{str(row.get("name")): row for row in rows_of(one.get("tasks"))} for one in (left, right)]
    both = [name for name in named[0] if name in named[1]]
    columns, rows = [Column("name", "Task")], [{"name": name} for name in both]
    for key, interval, label, kind, digits in BY_TASK:
        if all(finite(one[name].get(key)) is None for one in named for name in both):
            continue
        for letter, one in zip("AB", named, strict=True):
            ends = (f"{key}/{letter}/lo", f"{key}/{letter}/hi")
            columns.append(Column(f"{key}/{letter}", f"{label}, {letter}", kind, "", digits, ends))
            for name, row in zip(both, rows, strict=True):
                pair = pair_of(one[name].get(interval)) or (None, None)
                row |= {f"{key}/{letter}": one[name].get(key), ends[0]: pair[0], ends[1]: pair[1]}
    table = Table(
        "tasks", "Tasks of both audits", columns, rows, caption="Whiskers are the audits' own intervals."
    )
    return table_view(table, Cards()) if both and len(columns) > 1 else None


def _tables(left: Sequence[Section], right: Sequence[Section]) -> list[TableView]:
    """Tables that both reports have under one title, joined by what their rows are about."""
    first = {block.title: block for one in left for block in one.blocks if isinstance(block, Table)}
    second = {block.title: block for one in right for block in one.blocks if isinstance(block, Table)}
    joined = []
    for title, table in first.items():
        if title in second and (view := _join(table, second[title], len(joined))) is not None:
            joined.append(view)
    return joined


def _join(left: Table, right: Table, number: int) -> TableView | None:
    """One table of both: the numbers of each, and their difference where there is room."""
    key = _key(left)
    if key is None or _key(right) is None or _key(right).key != key.key:  # pyright: ignore[reportOptionalMemberAccess]
        return None
    others = {plain_value(row, key): row for row in right.rows}
    columns = [one for one in left.columns if one.kind in NUMBERS and _has(right, one.key)][:MOST_JOINED]
    rows = []
    for row in left.rows:
        name = plain_value(row, key)
        if name not in others:
            continue
        made: dict[str, Any] = {"key": name}
        for one in columns:
            first, second = (finite(side.get(one.key)) for side in (row, others[name]))
            made |= {f"{one.key}/a": first, f"{one.key}/b": second}
            if first is not None and second is not None:
                made[f"{one.key}/change"] = second - first
        rows.append(made)
    if not columns or not rows:
        return None
    heads = [Column("key", key.label, "latent" if key.kind == "latent" else "text")]
    for one in columns:
        heads += [
            Column(f"{one.key}/a", f"{one.label}, A", one.kind, one.meaning, one.digits),
            Column(f"{one.key}/b", f"{one.label}, B", one.kind, "", one.digits),
            Column(
                f"{one.key}/change", "B − A", one.kind if one.kind != "count" else "number", "", one.digits
            ),
        ]
    caption = f"{len(rows):,} rows that both runs have."
    table = Table(f"joined-{number}", left.title, heads, rows, caption=caption)
    return table_view(table, Cards())


def _has(table: Table, key: str) -> bool:
    return any(one.key == key for one in table.columns)


def _key(table: Table) -> Column | None:
    """What the rows of a table are about: their latent, else the first text that names each row once."""
    latents = [one for one in table.columns if one.kind == "latent"]
    texts = [one for one in table.columns if one.kind in ("text", "token")]
    for column in (*latents, *texts):
        values = [plain_value(row, column) for row in table.rows]
        if None not in values and len(set(values)) == len(values):
            return column
    return None
