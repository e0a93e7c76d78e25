"""The charts of steering: what each strength costs, and how watched text moves, beside control latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from palimpsest.report.display import finite, visible
from palimpsest.report.parts import Chart, Run
from palimpsest.report.sections import marks
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import Row, ends, figure, rounded, rows_of, slug, words_of

WATCHED = 4
"""Texts with a chart of their own."""
MEANINGS = {
    "perplexity_ratio": "perplexity, over that of the model as it is",
    "kl": "KL from the model as it is, nats per token",
}


def strengths_of(run: Run) -> list[Mapping[str, Any]]:
    """The rows of a sweep, the weakest change first."""
    found = [row for row in rows_of(run.data.get("sweep")) if finite(row.get("strength")) is not None]
    return sorted(found, key=lambda row: float(row["strength"]))


def _style(run: Run) -> str:
    """Whose colour the steered model has."""
    return "tuned" if run.data.get("side") == "tuned" else "base"


def _series(
    strengths: Sequence[Mapping[str, Any]], value: Any, interval: str = ""
) -> tuple[list[Row], list[Row]]:
    """Points of the changed latents and of their controls; `value` reads a figure from a row."""
    own: list[Row] = []
    controls: list[Row] = []
    for row in strengths:
        at = rounded(row["strength"])
        found = value(row)
        if found is not None:
            low, high = ends(row, interval) if interval else (None, None)
            ok = "within the guard" if row.get("ok") else "beyond the guard"
            own.append({"x": at, "y": rounded(found), "lo": low, "hi": high, "ok": ok})
        for control in rows_of(row.get("controls")):
            beside = value(control)
            if beside is not None:
                name = ", ".join(visible(one, 20) for one in words_of(control.get("latents")))
                controls.append({"x": at, "y": rounded(beside), "name": f"latent {name}"})
    return own, controls


def _across(rows: Sequence[Row]) -> Axis:
    return Axis("strength of the change", "~g", domain=(0.0, max(row["x"] for row in rows) * 1.04 or 1.0))


def cost_chart(run: Run, key: str, title: str) -> Chart | None:
    """What each strength costs on held-out text, beside control latents and the guard.

    Args:
        run: A folder of stage `steer`.
        key: `perplexity_ratio` or `kl`.
        title: Of the measure.
    """
    rows, controls = _series(strengths_of(run), lambda row: finite(row.get(key)), f"{key}_ci")
    if not rows:
        return None
    ratio = key == "perplexity_ratio"
    guard = figure(run.data, "guard", "ratio") if ratio else None
    found = marks.known(rows, controls, keys=("y", "lo", "hi")) + [
        one for one in (guard, 1.0 if ratio else None) if one
    ]
    log = ratio and max(found) > 20 and min(found) > 0
    domain = (0.9 * min(found), 1.1 * max(found)) if log else marks.span(found, zero=not ratio)
    x, y = _across(rows), Axis(MEANINGS[key], ".3~g", log=log, domain=domain)
    layers: list[Any] = [marks.rule_y(1.0 if ratio else 0.0)]
    layers += marks.labelled_y([(guard, f"guard: {guard:g}")]) if guard else []
    layers += [*_control_layers(controls, x, y), *_own_layers(rows, x, y, _style(run))]
    return Chart(
        slug("steer", key),
        f"{title} against strength",
        "on held-out text, with intervals over documents; open marks are beyond the guard. Grey: control latents that "
        "fire as often and as strongly, changed alike.",
        alt.layer(*layers),
        280,
        spoken="; ".join(f"strength {row['x']:g}: {row['y']:.3g}" for row in rows[:12]),
    )


def _control_layers(controls: Sequence[Row], x: Axis, y: Axis) -> list[Any]:
    if not controls:
        return []
    data = marks.source(controls)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    tips = marks.tips(("name:N", "control", ""), ("x:Q", "strength", "~g"), ("y:Q", y.title, ".3~g"))
    line = data.mark_line(style="band", strokeWidth=1.5, strokeDash=[2, 3]).encode(
        x=across, y=up, detail="name:N"
    )
    return [line, data.mark_point(size=50, opacity=0).encode(x=across, y=up, tooltip=tips)]


def _own_layers(rows: Sequence[Row], x: Axis, y: Axis, style: str) -> list[Any]:
    data = marks.source(rows)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    band = data.mark_area(style=style, opacity=0.18)
    fields = [
        ("x:Q", "strength", "~g"),
        ("y:Q", y.title, ".3~g"),
        ("lo:Q", "from", ".3~g"),
        ("hi:Q", "to", ".3~g"),
    ]
    tips = marks.tips(*fields, ("ok:N", "guard", ""))
    layers = [
        band.encode(x=across, y=y.encode(alt.Y, "lo"), y2="hi:Q"),
        data.mark_line(style=style, strokeWidth=2).encode(x=across, y=up),
    ]
    for name, filled in (("within the guard", True), ("beyond the guard", False)):
        mine = [row for row in rows if row["ok"] == name]
        if mine:
            mark = marks.source(mine).mark_point(style=style, filled=filled, size=60, opacity=1)
            layers.append(mark.encode(x=across, y=up, tooltip=tips))
    return layers


def watch_charts(run: Run) -> list[Chart]:
    """How the log-probability of each watched text moves with the strength, beside control latents."""
    strengths, charts = strengths_of(run), []
    texts = dict.fromkeys(str(one.get("text")) for row in strengths for one in rows_of(row.get("watch")))
    for place, text in enumerate(list(texts)[:WATCHED]):
        rows, controls = _series(strengths, lambda row, text=text: _watched(row, text))
        if not rows:
            continue
        domain = marks.span(marks.known(rows, controls, keys=("y",)))
        x, y = _across(rows), Axis("change of log-probability, nats", "+.2~g", domain=domain)
        own = _own_layers(rows, x, y, _style(run))[1:]
        charts.append(
            Chart(
                slug("steer-watch", place),
                f"“{visible(text, 40)}” after the prompts",
                "mean over prompts; open marks are beyond the guard. Grey: control latents, changed alike.",
                alt.layer(marks.rule_y(0.0), *_control_layers(controls, x, y), *own),
                260,
                spoken="; ".join(f"strength {row['x']:g}: {row['y']:+.2f}" for row in rows[:12]),
            )
        )
    return charts


def _watched(row: Mapping[str, Any], text: str) -> float | None:
    found = (finite(one.get("change")) for one in rows_of(row.get("watch")) if str(one.get("text")) == text)
    return next(found, None)
