"""A run of any other stage as a section: its sentence, the figures in its JSON, its configuration and its files."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from palimpsest.report.display import finite, pair_of, visible
from palimpsest.report.parts import Block, Column, Prose, Run, Section, Table
from palimpsest.report.sections import evaluation
from palimpsest.report.sections.reading import Row, mapping, notes, rounded, slug, summary
from palimpsest.report.sections.tune import loss_chart

_DEPTH, _FIGURES, _SETTINGS, _FILES = 4, 400, 200, 500
_LOGS = ("log.jsonl", "training.jsonl")
_INTERVALS = ("_ci", "_interval")


def sections(run: Run) -> list[Section]:
    """The sections of a run that has none of its own."""
    if run.stage == "evaluation" and isinstance(run.data.get("models"), list):
        return evaluation.sections(run)
    charts = [chart for name in _LOGS if (chart := loss_chart(run, name))]
    tables = [table for table in (figures_table(run), settings_table(run), files_table(run)) if table]
    stage = visible(run.stage, 40)
    blocks: list[Block] = [*charts[:1], *notes(run), *tables]
    if not blocks:
        text = "This run holds nothing that can be shown here."
        blocks = [Prose([text], "empty", f"palimpsest info {shlex.quote(str(run.path))}")]
    return [
        Section(
            slug("run", stage),
            f"A run of {stage}",
            "tables",
            run=run.name,
            lead=summary(run) or _first_summary(run),
            blocks=blocks,
        )
    ]


def _first_summary(run: Run) -> str:
    said = run.artifact.manifest.get("summary")
    found = said or next(
        (mapping(one).get("summary") for one in run.data.values() if mapping(one).get("summary")), ""
    )
    return visible(found, 600) if found else ""


def figures(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Row]]:
    """Every finite number of a JSON value with its address, and its interval where one stands beside it as `…_ci`."""
    if isinstance(value, Mapping):
        for key, one in value.items():
            number = finite(one)
            if number is not None:
                near = [value.get(f"{key}{end}") for end in _INTERVALS] + [value.get("ci")]
                pair = next((pair for one in near if (pair := pair_of(one))), None)
                yield (
                    ".".join((*path, str(key))),
                    {"value": number, "lo": pair and pair[0], "hi": pair and pair[1]},
                )
            elif len(path) < _DEPTH and not any(str(key).endswith(end) for end in (*_INTERVALS, "ci")):
                yield from figures(one, (*path, str(key)))
    elif isinstance(value, list) and len(path) < _DEPTH:
        for place, one in enumerate(value[:50]):
            if isinstance(one, Mapping):
                name = next((str(one[key]) for key in ("name", "side", "id") if one.get(key)), str(place))
                yield from figures(one, (*path, name))


def figures_table(run: Run) -> Table | None:
    """The numbers of the run's JSON."""
    rows: list[Row] = []
    for name, row in figures(run.data):
        rows.append({"name": visible(name, 120), **{key: rounded(one, 6) for key, one in row.items()}})
        if len(rows) > _FIGURES:
            break
    columns = [Column("name", "figure"), Column("value", "value", "number", digits=4, interval=("lo", "hi"))]
    more = "" if len(rows) <= _FIGURES else f"The first {_FIGURES}; all are in the run's JSON."
    return Table("run-figures", "Figures", columns, rows[:_FIGURES], more, shown=12) if rows else None


def _settings(value: Any, path: tuple[str, ...] = ()) -> Iterator[Row]:
    if isinstance(value, Mapping) and len(path) < _DEPTH:
        for key, one in value.items():
            yield from _settings(one, (*path, str(key)))
    elif value is not None and value not in ([], {}, ""):
        text = ", ".join(map(str, value[:8])) if isinstance(value, list) else str(value)
        yield {"name": visible(".".join(path), 120), "value": visible(text, 200)}


def settings_table(run: Run) -> Table | None:
    """How the run was configured."""
    rows = [row for _, row in zip(range(_SETTINGS), _settings(run.artifact.config), strict=False)]
    columns = [Column("name", "setting"), Column("value", "value")]
    return Table("run-settings", "Configuration", columns, rows, shown=8) if rows else None


def files_table(run: Run) -> Table | None:
    """What the folder holds."""
    listed = [(name, mapping(entry)) for name, entry in sorted(run.artifact.files.items())[:_FILES]]
    rows = [
        {"name": visible(name, 160), "bytes": finite(entry.get("bytes")), "sha256": entry.get("sha256")}
        for name, entry in listed
    ]
    columns = [Column("name", "file"), Column("bytes", "bytes", "count"), Column("sha256", "sha256")]
    return Table("run-files", "Files", columns, rows, shown=8) if rows else None
