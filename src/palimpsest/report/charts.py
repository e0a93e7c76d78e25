"""The charts of an audit, and one of them as a PNG picture."""

from collections.abc import Iterable
from typing import Any

import altair as alt
import pyarrow as pa
import vl_convert

from palimpsest.report.display import finite, pair_of, visible
from palimpsest.report.null_charts import STRIPS, strip_charts, strip_height
from palimpsest.report.theme import LIGHT, vega_config

Spec = dict[str, Any]
Row = dict[str, Any]
Chart = alt.Chart | alt.LayerChart | alt.FacetChart
_DASHES = [[1, 0], [1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]


def _dataset_order(rows: Iterable[Row]) -> list[str]:
    found = list(dict.fromkeys((row["role"] != "general", row["dataset"]) for row in rows))
    return [name for _, name in sorted(found, key=lambda item: item[0])]


def curve_rows(curve: pa.Table) -> list[Row]:
    """Rows of `curve.parquet` with visible names and with NaN as null."""
    rows = []
    for raw in curve.to_pylist():
        row: Row = {key: finite(value) for key, value in raw.items() if key not in ("dataset", "role")}
        rows.append({**row, "dataset": visible(raw["dataset"], 60), "role": raw["role"]})
    return rows


def _encoded_series(order: list[str], legend: bool) -> dict[str, Any]:
    dashes = [_DASHES[i % len(_DASHES)] for i in range(len(order))]
    shared = (
        alt.Legend(title=None, orient="top", columns=4, symbolType="stroke", symbolOpacity=1)
        if legend
        else None
    )
    return {
        "color": alt.Color("dataset:N", sort=order, scale=alt.Scale(domain=order), legend=shared),
        "strokeDash": alt.StrokeDash(
            "dataset:N", sort=order, scale=alt.Scale(domain=order, range=dashes), legend=shared
        ),
    }


def _against_k(
    rows: list[Row], value: str, low: str, high: str, title: str, form: str, k: int | None
) -> Chart:
    order = _dataset_order(rows)
    series = _encoded_series(order, legend=True)
    top = max((row["k"] for row in rows), default=1)
    across = alt.Scale(domain=[1, max(top, 2)], nice=False)
    steps = [step for step in (1, 2, 5, 10, 20, 32, 64, 128, 256, 512) if step <= top]
    x = alt.X("k:Q", title="k, how many of the strongest latents are compared", scale=across)
    x = x.axis(values=steps, grid=False, format="d", labelOverlap="greedy")
    y = alt.Y(f"{value}:Q", title=title, scale=alt.Scale(zero=False)).axis(format=form, tickCount=6)
    source = alt.Chart(alt.InlineData(values=rows))
    band = source.mark_area(opacity=0.16).encode(
        x=x, y=alt.Y(f"{low}:Q", title=title), y2=f"{high}:Q", color=series["color"]
    )
    tooltip = [
        alt.Tooltip("dataset:N", title="corpus"),
        alt.Tooltip("k:Q"),
        *(
            alt.Tooltip(f"{name}:Q", title=label, format=form)
            for name, label in ((value, "estimate"), (low, "from"), (high, "to"))
        ),
    ]
    weight = alt.condition("datum.role == 'general'", alt.value(3.2), alt.value(2))
    line = source.mark_line().encode(x=x, y=y, **series)
    line = line.encode(strokeWidth=weight)
    hover = source.mark_point(size=120, opacity=0).encode(x=x, y=y, tooltip=tooltip)
    layers = [band, line, hover]
    if k is not None:
        mark = alt.Chart(alt.InlineData(values=[{"k": k, "label": f"k = {k}"}]))
        layers.insert(
            0, mark.mark_rule(strokeDash=[3, 3], style="primary").encode(x=alt.X("k:Q", scale=across))
        )
        label = mark.mark_text(align="left", dx=4, dy=9, style="primary-label")
        layers.append(label.encode(x=alt.X("k:Q", scale=across), y=alt.value(0), text="label:N"))
    return alt.layer(*layers)


def overlap_chart(rows: list[Row], *, legacy: bool, k: int | None) -> Chart:
    """Overlap of the two models' strongest latents against k, one line and band per corpus."""
    title = "latents in both lists (count)" if legacy else "overlap of the two lists"
    return _against_k(rows, "intersection_mean", "lo", "hi", title, ".2~f" if legacy else ".1~%", k)


def idr_chart(rows: list[Row], *, k: int | None) -> Chart:
    """Intersection difference rate of each task against k, with a line at zero."""
    tasks = [row for row in rows if row["role"] != "general"]
    # The general corpus keeps its place in the colour order, so that a task has one colour in both charts.
    colours = [row for row in rows if row["role"] == "general"][:1]
    blank = [{**row, "idr": None, "idr_lo": None, "idr_hi": None} for row in colours]
    zero = alt.Chart(alt.InlineData(values=[{"y": 0}])).mark_rule(style="zero").encode(y="y:Q")
    return zero + _against_k(
        blank + tasks, "idr", "idr_lo", "idr_hi", "IDR_rel (task against general)", ".1~%", k
    )


def task_rows(audit: Spec) -> list[Row]:
    """One row per task: estimate and interval of IDR_rel and of the change of the loss."""
    rows = []
    for task in audit.get("tasks") or []:
        idr, loss = pair_of(task.get("ci")), pair_of(task.get("delta_loss_ci"))
        floor = finite(task.get("minimum_detectable_idr"))
        rows.append(
            {
                "task": visible(task.get("name"), 40),
                "idr": finite(task.get("idr")),
                "idr_lo": idr and idr[0],
                "idr_hi": idr and idr[1],
                "floor": floor,
                "minus_floor": None if floor is None else -floor,
                "loss": finite(task.get("delta_loss")),
                "loss_lo": loss and loss[0],
                "loss_hi": loss and loss[1],
            }
        )
    return rows


def interval_chart(rows: list[Row], name: str, title: str, form: str, floor: bool = False) -> Chart:
    """A dot and a whisker per task for one measure; `floor` shades what was too small to detect."""
    source = alt.Chart(alt.InlineData(values=rows))
    y = alt.Y("task:N", sort=[row["task"] for row in rows], title=None).axis(
        ticks=False, domain=False, labelFontSize=13, labelPadding=8
    )
    layers: list[alt.Chart] = []
    if floor:
        shade = source.mark_bar(style="undetectable", opacity=0.16, height=18)
        layers.append(shade.encode(x="minus_floor:Q", x2="floor:Q", y=y))
    layers.append(alt.Chart(alt.InlineData(values=[{"x": 0}])).mark_rule(style="zero").encode(x="x:Q"))
    x = alt.X(f"{name}:Q", title=title).axis(format=form, tickCount=5)
    tooltip = [alt.Tooltip("task:N")] + [
        alt.Tooltip(f"{field}:Q", title=label, format=form)
        for field, label in ((name, "estimate"), (f"{name}_lo", "from"), (f"{name}_hi", "to"))
    ]
    whisker = source.mark_rule(style="interval", strokeWidth=2)
    layers.append(whisker.encode(x=alt.X(f"{name}_lo:Q", title=title), x2=f"{name}_hi:Q", y=y))
    dot = source.mark_point(style="estimate", size=70, filled=True, opacity=1)
    layers.append(dot.encode(x=x, y=y, tooltip=tooltip))
    return alt.layer(*layers)


def layer_chart(rows: list[Row]) -> Chart:
    """Relative weight change per layer as bars, bottom layer left."""
    order = [row["layer"] for row in rows]
    x = alt.X("layer:N", sort=order, title="layer").axis(labelAngle=0, labelOverlap=True, ticks=False)
    y = alt.Y("relative:Q", title="‖Δweights‖ / ‖weights‖").axis(format=".2~%", tickCount=4)
    tooltip = [alt.Tooltip("layer:N"), alt.Tooltip("relative:Q", format=".3%")]
    bars = alt.Chart(alt.InlineData(values=rows)).mark_bar(style="weight", width={"band": 0.5})
    return bars.encode(x=x, y=y, tooltip=tooltip)


def _usable(rows: list[Row], field: str) -> bool:
    return any(row.get(field) is not None for row in rows)


def build_charts(audit: Spec, curve: pa.Table) -> dict[str, Chart]:
    """Every chart that this audit has data for, by name; widths and heights are the caller's."""
    rows, tasks = curve_rows(curve), task_rows(audit)
    k = audit.get("k")
    charts: dict[str, Chart] = {**strip_charts(audit)}
    if _usable(tasks, "idr"):
        charts["tasks_idr"] = interval_chart(tasks, "idr", "IDR_rel", ".1~%", floor=_usable(tasks, "floor"))
    if _usable(tasks, "loss"):
        charts["tasks_loss"] = interval_chart(tasks, "loss", "Δloss, nats per token (tuned − base)", "+.2~f")
    if _usable(rows, "intersection_mean"):
        charts["overlap"] = overlap_chart(rows, legacy=audit.get("mode") == "legacy", k=k)
    if _usable([row for row in rows if row["role"] != "general"], "idr"):
        charts["idr"] = idr_chart(rows, k=k)
    layers = [
        {
            "layer": "rest" if item.get("layer") is None else str(item["layer"]),
            "relative": finite(item.get("relative")),
        }
        for item in audit.get("layers") or []
    ]
    if _usable(layers, "relative"):
        charts["layers"] = layer_chart(layers)
    return charts


def chart_height(name: str, audit: Spec) -> int:
    """Height in pixels: rows decide for the charts of tasks and of nulls, the rest is fixed."""
    if name in STRIPS:
        return strip_height(audit["calibration"])
    if name.startswith("tasks"):
        return 34 * max(len(audit.get("tasks") or []), 1) + 14
    return 170 if name == "layers" else 300


def chart_png(audit: Spec, curve: pa.Table, name: str, *, width: int = 640, scale: float = 2.0) -> bytes:
    """One chart as a PNG picture, made without a browser.

    Args:
        audit: The content of `audit.json`.
        curve: The table of `curve.parquet`.
        name: `tasks_idr`, `tasks_loss`, `tasks` (both side by side), `nulls_features`, `nulls_loss`, `nulls` (both),
            `overlap`, `idr` or `layers`.
        width: Width of the plot area in CSS pixels.
        scale: Pixels per CSS pixel.

    Raises:
        KeyError: When this audit has no data for that chart.
    """
    charts = build_charts(audit, curve)
    pairs = {"tasks": ("tasks_idr", "tasks_loss"), "nulls": tuple(STRIPS)}
    if name in pairs:
        parts = [part for part in pairs[name] if part in charts]
        if not parts:
            raise KeyError(name)
        each = width // len(parts)
        chart = alt.hconcat(
            *(charts[part].properties(width=each, height=chart_height(part, audit)) for part in parts)
        )
    else:
        chart = charts[name].properties(width=width, height=chart_height(name, audit))
    spec = chart.to_dict()
    spec["config"] = {**vega_config(LIGHT.__getitem__, "sans-serif"), "padding": 12}
    return vl_convert.vegalite_to_png(spec, scale=scale, allowed_base_urls=[])
