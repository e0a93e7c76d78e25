"""Several audits of one base through one dictionary: how each figure goes from checkpoint to checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import altair as alt

from palimpsest.report.display import finite, pair_of, visible
from palimpsest.report.parts import Chart, Column, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.reading import Row, dig, mapping, rounded, rows_of, slug

_STEP = re.compile(
    r"(?:^|[-_/.])(?:global_?)?(?:step|steps|checkpoint|ckpt|iter|epoch)[-_]?(\d{1,12})(?!\d)", re.I
)
TASKS = 6
"""Corpora with a line of their own."""
INNOCENT = 1.96
"""Calibrated z between plus and minus this are what one innocent fine-tune in twenty goes beyond."""

Reader = Callable[[Mapping[str, Any]], tuple[Any, Any]]


@dataclass(frozen=True)
class Place:
    """Where an audit stands among the others: its family, and the step that its name says."""

    run: Run
    family: str
    step: int | None
    label: str


def step_of(name: str) -> int | None:
    """The training step that a name says, as in `math-step25` or `checkpoint-1000`."""
    found = _STEP.search(name)
    return int(found.group(1)) if found else None


def places(runs: Sequence[Run]) -> list[Place]:
    """Audits by family and step; one without a step stands at the end of its family."""
    found = []
    for run in runs:
        tuned = PurePosixPath(str(dig(run.data, "pair", "tuned") or "").replace("\\", "/").rstrip("/"))
        named = next((one for one in (run.name, tuned.name, str(tuned)) if step_of(one) is not None), None)
        step = None if named is None else step_of(named)
        family = _STEP.sub("", named or run.name).strip("-_/.")
        found.append(Place(run, family, step, visible(run.name, 40)))
    end = max((one.step for one in found if one.step is not None), default=0) + 1
    return sorted(found, key=lambda one: (one.family, end if one.step is None else one.step, one.label))


def sections(runs: list[Run]) -> list[Section]:
    """The sections over several audits of one base, site and dictionary.

    Args:
        runs: Two or more folders of stage `audit`; figures that one lacks are left out.
    """
    if len(runs) < 2:
        return []
    ordered = places(runs)
    charts = [chart for measure in MEASURES if (chart := measure_chart(ordered, measure))]
    steps = sum(one.step is not None for one in ordered)
    return [
        Section(
            "trajectory",
            "From checkpoint to checkpoint" if steps else "Audits side by side",
            "evidence",
            lead=f"{len(runs)} audits of one base through one dictionary"
            + (", by the training step in their names." if steps else "."),
            blocks=[*charts, figures_table(ordered)],
            methods=[methods.TRAJECTORY],
        )
    ]


@dataclass(frozen=True)
class Measure:
    """One figure of every corpus: where it stands in an audit, and how it is drawn."""

    name: str
    title: str
    axis: str
    caption: str
    form: str
    read: Reader
    calibrated: bool = False


def _task(value: str, interval: str) -> Reader:
    return lambda row: (row.get(value), row.get(interval))


def _z(kind: str) -> Reader:
    return lambda row: (dig(row, kind, "z"), None)


MEASURES = (
    Measure(
        "idr",
        "IDR_rel",
        "IDR_rel, task against general",
        "above zero the task's latents moved more than those of general text; whiskers are intervals over documents.",
        ".1~%",
        _task("idr", "ci"),
    ),
    Measure(
        "loss",
        "Δloss",
        "Δloss, nats per token",
        "tuned − base; below zero the tuned model predicts the text better. Whiskers are intervals over documents.",
        "+.2~g",
        _task("delta_loss", "delta_loss_ci"),
    ),
    Measure(
        "z-features",
        "Calibrated z of the latents",
        "z, in units of innocent fine-tunes",
        "how far each corpus lies beyond innocent fine-tunes of the same drift; grey: where 95% of them lie.",
        "+.1~f",
        _z("features"),
        True,
    ),
    Measure(
        "z-loss",
        "Calibrated z of the loss",
        "z, in units of innocent fine-tunes",
        "the same for the change of the loss; grey: where 95% of innocent fine-tunes lie.",
        "+.1~f",
        _z("loss"),
        True,
    ),
)


def _rows(ordered: Sequence[Place], measure: Measure) -> list[Row]:
    rows: list[Row] = []
    for place in ordered:
        data = place.run.data
        listed = dig(data, "calibration", "domains") if measure.calibrated else data.get("tasks")
        for one in rows_of(listed):
            value, interval = measure.read(one)
            low, high = pair_of(interval) or (None, None)
            if finite(value) is not None:
                rows.append(
                    {
                        "run": place.label,
                        "family": place.family,
                        "step": place.step,
                        "series": visible(one.get("name"), 40),
                        "y": rounded(value),
                        "lo": rounded(low),
                        "hi": rounded(high),
                    }
                )
    return [row for row in rows if row["series"] in corpora_of(ordered)]


def corpora_of(ordered: Sequence[Place]) -> list[str]:
    """The first corpora of all audits, each of which has one colour in all charts."""
    found: dict[str, None] = {}
    for place in ordered:
        for listed in (place.run.data.get("tasks"), dig(place.run.data, "calibration", "domains")):
            found |= dict.fromkeys(visible(one.get("name"), 40) for one in rows_of(listed))
    return list(found)[:TASKS]


def measure_chart(ordered: Sequence[Place], measure: Measure) -> Chart | None:
    """One figure of each corpus against the checkpoint, connected where checkpoints are of one family."""
    rows = _rows(ordered, measure)
    if len({row["run"] for row in rows}) < 2:
        return None
    corpora, drawn = corpora_of(ordered), {row["series"] for row in rows}
    names = [name for name in corpora if name in drawn]
    present = {row["run"] for row in rows}
    order = [place.label for place in ordered if place.label in present]
    timed = all(place.step is not None for place in ordered) and len({place.family for place in ordered}) == 1
    found = marks.known(rows, keys=("y", "lo", "hi")) + ([INNOCENT, -INNOCENT] if measure.calibrated else [])
    y = marks.Axis(measure.axis, measure.form, domain=marks.span(found))
    across: dict[str, Any]
    if timed:
        ends = [row["step"] for row in rows]
        x = marks.Axis("training step", "d", domain=(min(0, *ends), 1.04 * max(1, *ends)))
        across = {"x": x.encode(alt.X, "step")}
    else:
        axis = {"labelAngle": 0 if len(order) <= 4 else -35, "labelLimit": 110, "ticks": False}
        across = {
            "x": alt.X("run:N", sort=order, title=None, scale=alt.Scale(domain=order)).axis(**axis),
            "xOffset": alt.XOffset("series:N", sort=names, scale=alt.Scale(domain=names, paddingOuter=1)),
        }
    spoken = [f"{row['run']} {row['series']} {row['y']:+.3g}" for row in rows[:16]]
    return Chart(
        slug("trajectory", measure.name),
        measure.title,
        measure.caption,
        alt.layer(
            *_layers(
                rows, across, y, measure, marks.series(names, columns=3, among=corpora), _linked(ordered)
            )
        ),
        300,
        spoken="; ".join(spoken),
    )


def _linked(ordered: Sequence[Place]) -> set[str]:
    """Families of several checkpoints."""
    found = [
        place.family
        for place in ordered
        if any(o.family == place.family and o.step is not None for o in ordered)
    ]
    return {one for one in found if found.count(one) > 1}


def _layers(
    rows: Sequence[Row],
    across: Mapping[str, Any],
    y: marks.Axis,
    measure: Measure,
    shared: Mapping[str, Any],
    linked: set[str],
) -> list[Any]:
    layers: list[Any] = []
    if measure.calibrated:
        band = marks.source([{"lo": -INNOCENT, "hi": INNOCENT}]).mark_rect(style="band", opacity=0.16)
        layers.append(band.encode(y=y.encode(alt.Y, "lo"), y2="hi:Q"))
    layers.append(marks.rule_y(0.0))
    data = marks.source(rows)
    whisker = data.mark_rule(strokeWidth=1.6)
    layers.append(whisker.encode(**across, y=y.encode(alt.Y, "lo"), y2="hi:Q", color=shared["color"]))
    joined = [row for row in rows if row["family"] in linked]
    up = y.encode(alt.Y, "y")
    if joined:
        line = marks.source(joined).mark_line(strokeWidth=2)
        layers.append(line.encode(**across, y=up, detail="family:N", **shared))
    tips = marks.tips(
        ("run:N", "audit", ""),
        ("series:N", "corpus", ""),
        ("y:Q", measure.title, measure.form),
        ("lo:Q", "from", measure.form),
        ("hi:Q", "to", measure.form),
    )
    dot = data.mark_point(filled=True, size=55, opacity=1)
    return [*layers, dot.encode(**across, y=up, color=shared["color"], tooltip=tips)]


def figures_table(ordered: Sequence[Place]) -> Table:
    """Every figure of every corpus and audit."""
    rows: list[Row] = []
    for place in ordered:
        data = place.run.data
        judged = {one.get("name"): one for one in rows_of(dig(data, "calibration", "domains"))}
        for task in rows_of(data.get("tasks")):
            idr, loss = pair_of(task.get("ci")), pair_of(task.get("delta_loss_ci"))
            verdict = mapping(judged.get(task.get("name")))
            rows.append(
                {
                    "run": place.label,
                    "step": place.step,
                    "corpus": task.get("name"),
                    "idr": task.get("idr"),
                    "idr_lo": idr and idr[0],
                    "idr_hi": idr and idr[1],
                    "loss": task.get("delta_loss"),
                    "loss_lo": loss and loss[0],
                    "loss_hi": loss and loss[1],
                    "drift": task.get("relative_drift"),
                    "z": dig(verdict, "features", "z"),
                    "z_loss": dig(verdict, "loss", "z"),
                    "kind": verdict.get("kind"),
                }
            )
    columns = [
        Column("run", "audit"),
        Column("step", "step", "count"),
        Column("corpus", "corpus"),
        Column("idr", "IDR_rel", "share", digits=1, interval=("idr_lo", "idr_hi")),
        Column("loss", "Δloss", "number", "nats per token", 3, ("loss_lo", "loss_hi")),
        Column("drift", "drift", "number", "‖Δh‖ / ‖h‖", 3),
        Column("z", "z, latents", "number", "calibrated", 1),
        Column("z_loss", "z, loss", "number", "calibrated", 1),
        Column("kind", "kind"),
    ]
    kept = [column for column in columns if any(row.get(column.key) is not None for row in rows)] or columns
    return Table("trajectory", "Every figure", kept, rows)
