"""An adapter's training as sections: what it reached, what it cost elsewhere, and which latents moved when."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa

from palimpsest.report.display import count, finite, pair_of, percent, visible
from palimpsest.report.parts import Block, Chart, Column, Figures, Prose, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import (
    INLINE,
    Row,
    columns_of,
    ends,
    figure,
    json_lines,
    mapping,
    notes,
    number_text,
    rounded,
    rows_of,
    spread,
    table_of,
)

MOVERS = 8
"""Latents whose path is drawn."""
_POINTS = 80


def sections(run: Run) -> list[Section]:
    """The sections of a training run of an adapter."""
    movers = _paths(table_of(run, "latents.parquet"))
    charts = [chart for chart in (_movers_chart(run, movers), loss_chart(run), _effect_chart(run)) if chart]
    blocks: list[Block] = [*charts]
    if not movers:
        blocks.append(_nothing_logged(run))
    text = "What training moved says little of what it does: effects on held-out text come from `palimpsest explain`."
    explain = Prose(
        [text], "note", f"palimpsest explain {shlex.quote(str(run.path))} --corpus FILE --out RUN"
    )
    return [
        Section(
            "tune",
            "What the adapter learnt",
            "verdict",
            run=run.name,
            lead=_lead(run),
            verdict=_verdict(run),
            blocks=[Figures(_figures(run)), *notes(run)],
            methods=[methods.TUNING],
        ),
        Section(
            "tune-steps",
            "Which latents moved, step by step",
            "evidence",
            run=run.name,
            blocks=[*blocks, explain],
        ),
        *_tables(run, movers),
    ]


def _nothing_logged(run: Run) -> Prose:
    if run.data.get("component") in ("lora", "vector"):
        return Prose(["This adapter does not act through latents, so that none moved."], "note")
    command = "palimpsest tune MODEL --dictionary DICT --data FILE --log-latents 100 --out ADAPTER"
    return Prose(["No latent was logged while this adapter was trained."], "empty", command)


def _lead(run: Run) -> str:
    data = run.data
    component, objective = data.get("component"), data.get("objective")
    sites = ", ".join(visible(row.get("site"), 40) for row in rows_of(data.get("sites")))
    steps, rows = finite(data.get("steps")), figure(data, "rows", "train")
    text = f"{visible(component or 'an adapter', 30)} trained with {visible(objective or 'an unnamed objective', 30)}"
    text += f" at {sites}" if sites else ""
    text += f", {count(steps)} steps" if steps is not None else ""
    return text + (f" on {count(rows)} rows." if rows is not None else ".")


def _changed(found: Any) -> str:
    pair = pair_of(mapping(found).get("ci"))
    if pair is None:
        return "changes"
    return "lowers" if pair[1] < 0 else "raises" if pair[0] > 0 else "does not clearly change"


def _verdict(run: Run) -> str:
    found = mapping(run.data.get("objective_value"))
    unit = visible(found.get("unit") or "", 60)
    change = finite(found.get("difference"))
    if change is None:
        return "What this adapter does to its objective was not measured."
    by = number_text(change, found.get("ci"), 4, True)
    text = f"The adapter {_changed(found)} its objective: {by} {unit}".rstrip()
    kl = figure(run.data, "general", "kl")
    if kl is not None:
        general = number_text(kl, mapping(run.data.get("general")).get("ci"), 4)
        text += f"; on general text it moves the predictions by a KL of {general} nats"
    moved = finite(run.data.get("latents_moved"))
    return text + (f"; {count(moved)} latents moved." if moved is not None else ".")


def _figures(run: Run) -> list[tuple[str, str, str]]:
    items = []
    for key, name in _measured(run):
        found = mapping(run.data.get(key))
        words = " → ".join(number_text(found.get(end), digits=3) for end in ("before", "after"))
        items.append((name, number_text(found.get("difference"), found.get("ci"), 4, True), words))
    general = mapping(run.data.get("general"))
    items.append(("general KL", number_text(general.get("kl"), general.get("ci"), 4), "nats, from the base"))
    moved, parameters = finite(run.data.get("latents_moved")), finite(run.data.get("parameters"))
    if moved is not None:
        beside = "" if parameters is None else f"{count(parameters)} trained numbers"
        items.append(("latents moved", count(moved), beside))
    margin = mapping(run.data.get("margin"))
    if finite(margin.get("accuracy")) is not None:
        text = f"margin {number_text(margin.get('after'), margin.get('ci'), 2)}"
        items.append(("preferred answers", percent(float(margin["accuracy"])), text))
    return items


def _measured(run: Run) -> list[tuple[str, str]]:
    """The objective, and the held-out loss where that is not the same."""
    same = figure(run.data, "objective_value", "after") == figure(run.data, "heldout_loss", "after")
    found = [("objective_value", "objective")]
    return found if same else [*found, ("heldout_loss", "held-out loss")]


def _effect_chart(run: Run) -> Chart | None:
    rows: list[Row] = []
    for key, name in _measured(run):
        found = run.data.get(key)
        low, high = ends(found, "ci")
        value = figure(found, "difference")
        if value is not None:
            rows.append({"name": name, "value": rounded(value), "lo": low, "hi": high})
    low, high = ends(run.data.get("general"), "ci")
    kl = figure(run.data, "general", "kl")
    if kl is not None:
        rows.append({"name": "general KL", "value": rounded(kl), "lo": low, "hi": high})
    if not rows:
        return None
    x = Axis("change, nats", "+.2~g", domain=marks.span(marks.known(rows, keys=("value", "lo", "hi"))))
    order = [row["name"] for row in rows]
    return Chart(
        "tune-effect",
        "What it reached, and what it cost",
        "tuned − base, with intervals over held-out rows; the KL is the distance from the base on general text.",
        alt.layer(marks.rule_x(0.0), *marks.whiskers(rows, x, order, "tuned")),
        42 * len(rows) + 30,
        spoken="; ".join(f"{row['name']} {row['value']:+.4f}" for row in rows),
    )


def _paths(table: pa.Table | None) -> dict[tuple[str, int], list[tuple[float, float, float, float]]]:
    """Step, value, gradient and firings of each logged latent, in the order of the steps."""
    names = ("site", "latent", "step", "value", "gradient", "firings")
    columns = columns_of(table, names)
    found: dict[tuple[str, int], list[tuple[float, float, float, float]]] = {}
    for site, latent, step, value, gradient, firings in zip(*(columns[name] for name in names), strict=True):
        at, height = finite(step), finite(value)
        if latent is None or at is None or height is None:
            continue
        place = (str(site or ""), int(latent))
        found.setdefault(place, []).append((at, height, finite(gradient) or 0.0, finite(firings) or 0.0))
    return {key: sorted(path) for key, path in found.items()}


def _strongest(paths: Mapping[tuple[str, int], list[Any]]) -> list[tuple[str, int]]:
    last = max((path[-1][0] for path in paths.values()), default=0.0)
    kept = [key for key, path in paths.items() if path[-1][0] == last] or list(paths)
    return sorted(kept, key=lambda key: -abs(paths[key][-1][1]))


def _thin(path: Sequence[Any]) -> list[Any]:
    if len(path) <= _POINTS:
        return list(path)
    picks = sorted({round(i * (len(path) - 1) / (_POINTS - 1)) for i in range(_POINTS)})
    return [path[i] for i in picks]


def _movers_chart(run: Run, paths: Mapping[tuple[str, int], list[Any]]) -> Chart | None:
    chosen = _strongest(paths)[:MOVERS]
    if not chosen:
        return None
    sites = {site for site, _ in chosen}
    rows: list[Row] = []
    for site, latent in chosen:
        name = str(latent) if len(sites) == 1 else f"{visible(site, 24)} {latent}"
        for step, value, _, firings in _thin(paths[site, latent]):
            rows.append({"x": step, "y": rounded(value), "series": name, "firings": firings})
    last = max(row["x"] for row in rows)
    values = [row["y"] for row in rows]
    domain = marks.span(values)
    x = Axis("training step", "d", domain=(0.0, last * (1.12 if len(sites) == 1 else 1.3) or 1.0))
    y = Axis("value of the latent", "+.2~g", domain=domain)
    tips = marks.tips(
        ("series:N", "latent", ""),
        ("x:Q", "step", "d"),
        ("y:Q", "value", "+.4f"),
        ("firings:Q", "firings", ",.0f"),
    )
    data = marks.source(rows)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    line = data.mark_line(style="tuned", strokeWidth=1.6, opacity=0.85).encode(
        x=across, y=up, detail="series:N"
    )
    hover = data.mark_point(size=70, opacity=0).encode(x=across, y=up, tooltip=tips)
    ends_at = [
        next(row for row in reversed(rows) if row["series"] == name)
        for name in dict.fromkeys(r["series"] for r in rows)
    ]
    places = spread([row["y"] for row in ends_at], 0.05 * (domain[1] - domain[0]))
    labels = [
        {"x": row["x"], "y": rounded(min(max(place, domain[0]), domain[1])), "label": row["series"]}
        for row, place in zip(ends_at, places, strict=True)
    ]
    text = marks.source(labels).mark_text(style="label", align="left", dx=5)
    chart = alt.layer(marks.rule_y(0.0), line, hover, text.encode(x=across, y=up, text="label:N"))
    return Chart(
        "tune-movers",
        "Movers over training steps",
        f"the {len(ends_at)} logged latents that ended farthest from where they began; an adapter of nothing "
        "is at zero.",
        chart,
        300,
        wide=True,
        spoken="; ".join(f"latent {row['series']} ends at {row['y']:+.3f}" for row in ends_at),
    )


def loss_chart(run: Run, name: str = "log.jsonl") -> Chart | None:
    """The training loss of a log of one object per line."""
    rows: list[Row] = [
        {"x": step, "y": rounded(loss)}
        for row in json_lines(run, name)
        if (step := finite(row.get("step"))) is not None and (loss := finite(row.get("loss"))) is not None
    ]
    if not rows:
        return None
    rows = _thin(rows) if len(rows) > _POINTS * 4 else rows
    x = Axis("training step", "d", domain=(0.0, max(row["x"] for row in rows) or 1.0))
    y = Axis("training loss", ".3~g", domain=marks.span([row["y"] for row in rows], zero=False))
    data = marks.source(rows)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    tips = marks.tips(("x:Q", "step", "d"), ("y:Q", "loss", ".4f"))
    return Chart(
        "tune-loss",
        "Training loss",
        "on the rows of each step; judge by the held-out figures, not by this.",
        alt.layer(
            data.mark_line(style="estimate", strokeWidth=1.6).encode(x=across, y=up),
            data.mark_point(size=60, opacity=0).encode(x=across, y=up, tooltip=tips),
        ),
        260,
        spoken=f"from {rows[0]['y']:.3f} to {rows[-1]['y']:.3f}",
    )


def _tables(run: Run, paths: Mapping[tuple[str, int], list[Any]]) -> list[Section]:
    order = _strongest(paths)
    rows = []
    for site, latent in order[:INLINE]:
        path = paths[site, latent]
        step, value, gradient, _ = path[-1]
        rows.append(
            {
                "site": site,
                "latent": latent,
                "value": rounded(value),
                "gradient": rounded(gradient),
                "firings": float(np.sum([point[3] for point in path])),
                "step": step,
            }
        )
    if not rows:
        return []
    columns = [
        Column("latent", "latent", "latent"),
        Column("site", "site"),
        Column("value", "value", "number", "at the last step", 4),
        Column("gradient", "gradient", "number", "at the last step", 5),
        Column("firings", "firings", "count", "while it was logged"),
        Column("step", "logged until step", "count"),
    ]
    caption = (
        "Only the latents that were the strongest when values were logged; all steps are in latents.parquet."
    )
    table = Table("tune-latents", "Latents that moved", columns, rows, caption, total=len(order))
    return [
        Section(
            "tune-table",
            "Latents that training moved",
            "latents",
            run=run.name,
            blocks=[table],
        )
    ]
