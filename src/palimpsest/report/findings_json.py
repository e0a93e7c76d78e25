"""`report.json`: what a page shows, for programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.report.parts import Chart, Column, Figures, Prose, Run, Section, Table
from palimpsest.report.reproduce import recipe

SCHEMA = 1


def findings(
    runs: Sequence[Run],
    sections: Sequence[Section],
    plots: Mapping[str, Mapping[str, str]],
    latents: Mapping[str, Sequence[str]],
) -> dict[str, Any]:
    """All findings of some runs.

    Args:
        runs: The runs.
        sections: Their sections, as on the page.
        plots: Pictures of the charts: file by chart and ending.
        latents: Files with all latents, by examples run.

    Returns:
        - `summary`: what was found, in a sentence or some.
        - `verdicts`: `run`, `section`, `sentence` of everything that stands on top of the page.
        - `runs`: `name`, `stage`, `path`, `command`, `config_hash`, versions, and `data`, the run's own JSON.
        - `sections`: `id`, `title`, `order`, `run`, `lead`, `figures`, `notes`, `plots` and `tables`, whose rows are
          the values by key, not rounded.
        - `latents`: files beside the page.
    """
    verdicts = [
        {"run": one.run, "section": one.id, "sentence": one.verdict} for one in sections if one.verdict
    ]
    return {
        "schema": SCHEMA,
        "summary": summary_of(sections),
        "verdicts": verdicts,
        "runs": [_run(one) for one in runs],
        "sections": [_section(one, plots) for one in sections],
        "latents": dict(latents),
    }


def summary_of(sections: Sequence[Section]) -> str:
    """What the first sections found."""
    return " ".join([one.verdict for one in sections if one.verdict][:3]) or "Nothing was found."


def _run(run: Run) -> dict[str, Any]:
    manifest = run.artifact.manifest
    return {
        "name": run.name,
        "stage": run.stage,
        "path": str(run.path),
        "command": recipe(run).command,
        **{key: manifest.get(key) for key in ("palimpsest", "created", "config_hash", "seed", "packages")},
        "data": dict(run.data),
    }


def _section(section: Section, plots: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
    tables = [block for block in section.blocks if isinstance(block, Table)]
    charts = [block.name for block in section.blocks if isinstance(block, Chart)]
    return {
        "id": section.id,
        "title": section.title,
        "order": section.order,
        "run": section.run,
        "lead": section.lead,
        "figures": [
            {"label": label, "value": value, "note": note}
            for block in section.blocks
            if isinstance(block, Figures)
            for label, value, note in block.items
        ],
        "notes": [text for block in section.blocks if isinstance(block, Prose) for text in block.paragraphs],
        "plots": [dict(plots[name]) for name in charts if name in plots],
        "tables": [_table(one) for one in tables],
    }


def _table(table: Table) -> dict[str, Any]:
    keys = [key for column in table.columns for key in (column.key, *(column.interval or ()))]
    return {
        "name": table.name,
        "title": table.title,
        "columns": [_column(one) for one in table.columns],
        "rows": [{key: row.get(key) for key in keys} for row in table.rows],
        "total": len(table.rows) if table.total is None else table.total,
    }


def _column(column: Column) -> dict[str, Any]:
    return {
        "key": column.key,
        "label": column.label,
        "kind": column.kind,
        "interval": list(column.interval) if column.interval else None,
        "side": column.side,
    }
