"""Labels as sections: how well they predict, beside the same labels on wrong latents."""

from __future__ import annotations

from typing import Any

import altair as alt
import numpy as np

from palimpsest.report.display import count, decimal, finite, pair_of, percent, visible
from palimpsest.report.parts import Block, Chart, Column, Figures, Prose, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.examples import numbers
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import (
    INLINE,
    Row,
    dig,
    figure,
    mapping,
    notes,
    number_text,
    rounded,
    rows_of,
    summary,
    table_of,
)


def sections(run: Run) -> list[Section]:
    """The sections of a labels folder."""
    chart, table = score_chart(run), label_table(run)
    blocks: list[Block] = [Figures(items)] if (items := _figures(run)) else []
    if chart is not None:
        blocks.append(chart)
    else:
        text = "These labels were not scored: nothing says whether they fit."
        blocks.append(
            Prose([text], "empty", "palimpsest label EXAMPLES --provider PROVIDER --judge tokens --out RUN")
        )
    made = [
        Section(
            "labels",
            "Do the labels fit?",
            "evidence",
            run=run.name,
            lead=_lead(run),
            verdict="",
            blocks=[*blocks, *notes(run)],
            methods=[methods.LABELLING],
        )
    ]
    if table is not None:
        made.append(Section("labels-table", "Labels", "latents", run=run.name, blocks=[table]))
    return made


def _lead(run: Run) -> str:
    provider, judge = run.data.get("provider"), run.data.get("judge")
    by = f"Labels by {visible(provider, 60)}" if provider else "Labels"
    scored = f", judged by {visible(judge, 60)}" if judge and judge != "none" else ""
    return f"{by}{scored}. {summary(run)}".strip()


def _figures(run: Run) -> list[tuple[str, str, str]]:
    data, items = run.data, []
    labelled, asked = figure(data, "counts", "labelled"), figure(data, "counts", "asked")
    if labelled is not None:
        items.append(
            ("latents labelled", count(labelled), "" if asked is None else f"of {count(asked)} asked for")
        )
    score = mapping(data.get("score"))
    if finite(score.get("mean")) is not None:
        text = number_text(score.get("mean"), [score.get("lo"), score.get("hi")], 2)
        items.append(("mean score", text, "balanced accuracy; chance is 0.5"))
    shuffled = figure(data, "control", "shuffled")
    if shuffled is not None:
        ends = [dig(data, "control", "lo"), dig(data, "control", "hi")]
        items.append(
            ("on wrong latents", number_text(shuffled, ends, 2), "the same labels, dealt out at random")
        )
    for key, name in (("random", "against random texts"), ("similar", "against similar texts")):
        value = finite(score.get(key))
        if value is not None:
            items.append(
                (name, decimal(value, 2), "the easy negatives" if key == "random" else "the hard negatives")
            )
    return items


def score_chart(run: Run) -> Chart | None:
    """The scores of the labels, beside what the same labels reach on wrong latents."""
    scores = numbers(table_of(run, "labels.parquet"), "score")
    scores = scores[np.isfinite(scores)]
    if not len(scores):
        return None
    rows = marks.steps(scores, 0.0, 1.0, 40)
    x = Axis("balanced accuracy on held-out texts", ".1~f", domain=(0.0, 1.0))
    y = marks.counts_axis("labels", max(row["n"] for row in rows))
    bars = marks.source(rows).mark_bar(style="estimate", opacity=0.75, binSpacing=1)
    tips = marks.tips(("n:Q", "labels", ",d"), ("x:Q", "from", ".2f"), ("x2:Q", "to", ".2f"))
    layers: list[Any] = []
    null = _null(run)
    if null is not None:
        low, high = null
        band = marks.source([{"x": low, "x2": high}]).mark_rect(style="band", opacity=0.25)
        layers.append(band.encode(x=x.encode(alt.X, "x"), x2="x2:Q"))
    where = {"x": x.encode(alt.X, "x"), "x2": "x2:Q", "y": y.encode(alt.Y, "n"), "y2": "none:Q"}
    layers.append(bars.encode(**where, tooltip=tips))
    layers.append(marks.rule_x(0.5))
    mean = float(scores.mean())
    named = [(mean, f"mean {decimal(mean, 2)}")]
    shuffled = figure(run.data, "control", "shuffled")
    if shuffled is not None:
        named.append((shuffled, f"shuffled {decimal(shuffled, 2)}"))
    for place, (value, name) in enumerate(named):
        mark = marks.source([{"x": rounded(value), "label": name}])
        style = "estimate" if place == 0 else "primary"
        layers.append(mark.mark_rule(style=style, strokeDash=[4, 3], strokeWidth=1.5).encode(x="x:Q"))
        right = value < max(one for one, _ in named)
        text = mark.mark_text(style="label", align="right" if right else "left", dx=-4 if right else 4, dy=8)
        layers.append(text.encode(x="x:Q", y=alt.value(0), text="label:N"))
    return Chart(
        "labels-scores",
        "Scores of the labels",
        f"{count(len(scores))} labels; grey and “shuffled”: the same labels on wrong latents. At 0.5 is chance.",
        alt.layer(*layers),
        260,
        spoken=f"mean {mean:.2f}, {percent(float((scores > 0.5).mean()), 0)} above chance",
    )


def _null(run: Run) -> tuple[float, float] | None:
    """What shuffled labels reach: the interval of their mean, or the range of several shuffles."""
    runs = [
        (finite(one.get("lo")), finite(one.get("hi"))) for one in rows_of(dig(run.data, "control", "runs"))
    ]
    ends = [pair for pair in runs if pair[0] is not None and pair[1] is not None]
    if ends:
        return min(low for low, _ in ends if low is not None), max(
            high for _, high in ends if high is not None
        )
    return pair_of([dig(run.data, "control", "lo"), dig(run.data, "control", "hi")])


def label_table(run: Run) -> Table | None:
    """The labels with their scores, the best first; 2,000 at most."""
    table = table_of(run, "labels.parquet")
    if table is None or not {"latent", "label"} <= set(table.column_names):
        return None
    rows: list[Row] = [
        {key: rounded(value, 3) if isinstance(value, float) else value for key, value in raw.items()}
        for raw in table.to_pylist()
        if raw.get("label")
    ]
    if not rows:
        return None
    rows.sort(key=lambda row: -(row.get("score") or 0.0))
    columns = [
        Column("latent", "latent", "latent"),
        Column("label", "label"),
        Column("score", "score", "number", "balanced accuracy", 2, ("score_lo", "score_hi")),
        Column("score_random", "random", "number", "against texts at random", 2),
        Column("score_similar", "similar", "number", "against texts of like latents", 2),
        Column("n", "texts", "count", "judged"),
        Column("provider", "by"),
    ]
    kept = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    shown = rows[:INLINE]
    name = "labels-table"
    return Table(name, "Labels", kept, shown, sort=("score", True), total=len(rows))


def labels_of(runs: list[Run]) -> dict[int, dict[str, Any]]:
    """Labels with scores by latent, of several folders; of two for one latent the better scored one."""
    found: dict[int, dict[str, Any]] = {}
    for run in runs:
        table = table_of(run, "labels.parquet")
        if table is None or not {"latent", "label"} <= set(table.column_names):
            continue
        for row in table.to_pylist():
            other = found.get(row["latent"])
            if row.get("label") and (
                other is None or (row.get("score") or 0.0) >= (other.get("score") or 0.0)
            ):
                found[row["latent"]] = row
    return found
