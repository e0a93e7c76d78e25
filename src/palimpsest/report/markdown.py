"""`report.md`: the findings for a model card or a pull request; no text of a run can become markup there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from palimpsest.report import verdicts
from palimpsest.report.data_table import NUMBERS, ordered, plain_value, shown_number
from palimpsest.report.display import count, finite, pair_of, visible
from palimpsest.report.draw import charts_of, methods_of, tables_of
from palimpsest.report.facts import callouts
from palimpsest.report.parts import Column, Prose, Run, Section, Table
from palimpsest.report.reproduce import recipe

_LONGEST = 600
_ROWS, _COLUMNS, _TABLES, _PLOTS = 10, 8, 6, 12
_PUNCTUATION = re.compile(r"([\\`*_{}\[\]<>#!|~&$^])|(?<=www)\.|:(?=//)")
_BEGINS = re.compile(r"^([-+=]|\d+[.)])")


def plain(text: Any, limit: int = _LONGEST) -> str:
    """Text in which no character is Markdown, HTML, a link or a mention, on one line."""
    escaped = _PUNCTUATION.sub(r"\\\g<0>", visible(text, limit).strip())
    escaped = _BEGINS.sub(lambda found: found[0][:-1] + "\\" + found[0][-1], escaped)
    # Hosts turn @name into a mention wherever it stands in text; a comment between the two prevents it.
    return re.sub(r"@(?=\S)", "@<!-- -->", escaped)


def markdown(runs: Sequence[Run], sections: Sequence[Section], plots: Mapping[str, Mapping[str, str]]) -> str:
    """The report as Markdown.

    Args:
        runs: The runs.
        sections: Their sections, as on the page.
        plots: Pictures of the charts: file by chart and ending.

    Returns:
        Verdicts, the main tables, the plots as links, what the method cannot say, and how to repeat each run.
    """
    parts = ["# What the fine-tune changed", *_pairs(runs)]
    parts += [_verdicts(sections), *(_audit(run) for run in runs if run.stage == "audit")]
    parts += [_table(section, table) for section, table in _main_tables(sections)]
    parts += [_plots(sections, plots), _caveats(runs, sections), _again(runs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _pairs(runs: Sequence[Run]) -> list[str]:
    found: dict[str, None] = {}
    for run in runs:
        pair = run.data.get("pair") or {}
        if pair.get("base") and pair.get("tuned"):
            found[f"**{plain(pair['base'], 120)}** → **{plain(pair['tuned'], 120)}**"] = None
    return list(found)


def _verdicts(sections: Sequence[Section]) -> str:
    said = [one for one in sections if one.verdict]
    return "\n".join(f"- **{plain(one.run or one.title, 80)}**: {plain(one.verdict)}" for one in said)


def _audit(run: Run) -> str:
    """An audit's corpora with their verdicts or, without a calibration, its tasks."""
    found = verdicts.calibration(dict(run.data))
    if found:
        rows = [
            [one["name"], one["badge"].words, one["kind"] or "", one["sentence"]] for one in found["verdicts"]
        ]
        return f"## Verdicts: {plain(run.name, 80)}\n\n" + grid(["corpus", "verdict", "kind", "why"], rows)
    rows = []
    for task in run.data.get("tasks") or []:
        rows.append(
            [task.get("name"), _measure(task, "idr", "ci"), _measure(task, "delta_loss", "delta_loss_ci")]
        )
    if not rows:
        return ""
    note = "\n\nThese figures are not calibrated against other fine-tunes: they are no verdict."
    return f"## Tasks: {plain(run.name, 80)}\n\n" + grid(["task", "IDR_rel", "Δloss"], rows) + note


def _measure(row: Mapping[str, Any], key: str, ends: str) -> str:
    value, interval = finite(row.get(key)), pair_of(row.get(ends))
    if value is None:
        return "–"
    text = f"{value:.3f}"
    return (text + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else "")).replace("-", "−")


def _main_tables(sections: Sequence[Section]) -> list[tuple[Section, Table]]:
    """The tables that stand among the evidence; those in full are on the page."""
    found = [(one, table) for one, table in tables_of(sections) if one.order in ("verdict", "evidence")]
    return [pair for pair in found if pair[1].rows][:_TABLES]


def _table(section: Section, table: Table) -> str:
    columns = list(table.columns)[:_COLUMNS]
    rows = [[_cell(row, column) for column in columns] for row in ordered(table)[:_ROWS]]
    title = f"## {plain(table.title, 120)}" + (f" ({plain(section.run, 80)})" if section.run else "")
    left_out = len(table.rows) - len(rows)
    more = f"\n\n{count(left_out)} more rows are in report.html." if left_out > 0 else ""
    return f"{title}\n\n" + grid([column.label for column in columns], rows, columns) + more


def _cell(row: Mapping[str, Any], column: Column) -> str:
    value = plain_value(row, column)
    if value is None:
        return "–"
    if isinstance(value, list):
        return " ".join(value[:5])
    if column.kind not in NUMBERS:
        return str(value)
    text = shown_number(column, value)
    ends = pair_of([row.get(key) for key in column.interval]) if column.interval else None
    return (
        text if ends is None else f"{text} [{shown_number(column, ends[0])}, {shown_number(column, ends[1])}]"
    )


def grid(heads: Sequence[str], rows: Iterable[Sequence[Any]], columns: Sequence[Column] = ()) -> str:
    """A Markdown table of escaped cells; columns of numbers stand right."""
    right = [bool(columns) and columns[i].kind in NUMBERS for i in range(len(heads))]
    lines = ["| " + " | ".join(plain(head, 60) for head in heads) + " |"]
    lines.append("|" + "|".join(" ---: " if one else " --- " for one in right) + "|")
    lines += ["| " + " | ".join(plain(cell, 300) for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def _plots(sections: Sequence[Section], plots: Mapping[str, Mapping[str, str]]) -> str:
    first = [one for one in sections if one.order in ("verdict", "evidence")]
    shown = [chart for chart in charts_of(first) if "png" in plots.get(chart.name, {})][:_PLOTS]
    links = [f"![{plain(chart.title, 120)}]({plots[chart.name]['png']})" for chart in shown]
    if len(plots) > len(links):
        links.append(f"{len(plots) - len(links)} more plots are in plots/.")
    return "## Plots\n\n" + "\n\n".join(links) if plots else ""


def _caveats(runs: Sequence[Run], sections: Sequence[Section]) -> str:
    found: dict[str, None] = {}
    for run in runs:
        if run.stage == "audit":
            found |= {
                f"- {plain(one['title'])}. {plain(one['text'])}": None for one in callouts(dict(run.data))
            }
    for section in sections:
        for block in section.blocks:
            if isinstance(block, Prose) and block.kind == "callout":
                found |= {f"- {plain(text)}": None for text in block.paragraphs}
    for method in methods_of(sections):
        found |= {f"- **{plain(method.title)}**: {plain(text)}": None for text in method.misleads}
    return "## Caveats\n\n" + "\n".join(found) if found else ""


def _again(runs: Sequence[Run]) -> str:
    lines = ["## Reproduce this", ""]
    for run in runs:
        # Code of one line, fenced by more backticks than any run of them inside.
        command = visible(recipe(run).command).strip()
        fence = "`" * (1 + max((len(one) for one in re.findall("`+", command)), default=0))
        lines.append(f"- **{plain(run.name, 80)}** ({plain(run.stage, 40)}): {fence} {command} {fence}")
    return "\n".join(lines)
