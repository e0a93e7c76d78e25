"""Where the latents of a diff lie: by the two models' decoder lengths, and by what the base has of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa

from palimpsest.report.display import finite, visible
from palimpsest.report.parts import Chart, Run
from palimpsest.report.sections import marks
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import Row, columns_of, mapping, rounded, slug

CLASS_STYLE = {"tuned-only": "tuned", "base-only": "base"}
MARKED = 250
"""Latents that are drawn one by one; all others are counted in cells."""
NU_RANGE = (-0.5, 2.0)


def map_charts(run: Run, table: pa.Table | None) -> list[Chart]:
    """Δnorm against each ν of a crosscoder; of other dictionaries ν against how much a latent moves the base."""
    if table is None:
        return []
    limits = mapping(run.data.get("thresholds"))
    if _known(table, "delta_norm"):
        found = [
            ("nu_error", "ν error", "nu_error", "the base's error holds it"),
            (
                "nu_reconstruction",
                "ν reconstruction",
                "nu_reconstruction",
                "the base's other latents write it",
            ),
        ]
        return [
            chart
            for key, name, limit, meaning in found
            if (chart := _norm_map(run, table, (key, name, meaning), finite(limits.get(limit)), limits))
        ]
    chart = _change_map(run, table, limits)
    return [chart] if chart else []


def _known(table: pa.Table, name: str) -> bool:
    return name in table.column_names and table[name].null_count < table.num_rows


def _marked(columns: Mapping[str, list[Any]], x: str, y: str) -> list[Row]:
    """The latents to draw one by one: tuned-only and base-only ones, then the largest causal shares."""
    rows = []
    for place, latent in enumerate(columns["latent"]):
        across, up = finite(columns[x][place]), finite(columns[y][place])
        if across is None or up is None:
            continue
        name = str(columns["class"][place] or "")
        share = finite(columns["causal_share"][place])
        rows.append(
            {
                "latent": latent,
                "x": rounded(across),
                "y": rounded(min(max(up, NU_RANGE[0]), NU_RANGE[1]) if y.startswith("nu") else up),
                "value": rounded(up),
                "class": visible(name, 30),
                "verdict": visible(columns["verdict"][place] or "", 30),
                "share": rounded(share),
                "own": name in CLASS_STYLE,
                "weight": abs(share or 0.0),
            }
        )
    rows.sort(key=lambda row: (not row["own"], row["verdict"] != "tuned-specific", -row["weight"]))
    kept = [row for row in rows if row["own"] or row["weight"] > 0 or row["verdict"] == "tuned-specific"]
    return kept[:MARKED]


def _points(rows: Sequence[Row], x: Axis, y: Axis) -> list[alt.Chart]:
    tooltip = marks.tips(
        ("latent:N", "latent", ""),
        ("class:N", "class", ""),
        ("verdict:N", "verdict", ""),
        ("x:Q", x.title, ".3~g"),
        ("value:Q", y.title, ".3~g"),
        ("share:Q", "causal share", ".2%"),
    )
    layers = []
    for style, shape, mine in (
        ("estimate", "circle", [row for row in rows if row["class"] not in CLASS_STYLE]),
        ("base", "square", [row for row in rows if row["class"] == "base-only"]),
        ("tuned", "diamond", [row for row in rows if row["class"] == "tuned-only"]),
    ):
        if mine:
            drawn = [
                {key: value for key, value in row.items() if key not in ("own", "weight")} for row in mine
            ]
            mark = marks.source(drawn).mark_point(style=style, shape=shape, strokeWidth=1.6, opacity=0.9)
            size = alt.value(22 if shape == "circle" else 80)
            layers.append(
                mark.encode(x=x.encode(alt.X, "x"), y=y.encode(alt.Y, "y"), size=size, tooltip=tooltip)
            )
    return layers


def _norm_map(
    run: Run, table: pa.Table, axis: tuple[str, str, str], limit: float | None, limits: Mapping[str, Any]
) -> Chart | None:
    key, name, meaning = axis
    columns = columns_of(table, ("latent", "class", "verdict", "causal_share", "delta_norm", key))
    cells = marks.binned(
        [finite(v) for v in columns["delta_norm"]], [finite(v) for v in columns[key]], (0.0, 1.0), NU_RANGE
    )
    if not cells:
        return None
    x = Axis("Δnorm: 0 base only, ½ shared, 1 tuned only", ".1f", domain=(0.0, 1.0))
    y = Axis(name, ".1f", domain=NU_RANGE)
    lines: list[Any] = []
    for edge in ("base_only", "tuned_only"):
        value = finite(limits.get(edge))
        lines += [] if value is None else [marks.rule_x(value, "zero", (4, 3))]
    lines += [] if limit is None else [marks.rule_y(limit, "zero", (4, 3))]
    corner = finite(limits.get("tuned_only"))
    if corner is not None and limit is not None:
        box = marks.source([{"x": corner, "x2": 1.0, "y": NU_RANGE[0], "y2": limit}])
        text = marks.source([{"x": (corner + 1) / 2, "y": (NU_RANGE[0] + limit) / 2, "label": "new"}])
        lines.append(text.mark_text(style="label").encode(x="x:Q", y="y:Q", text="label:N"))
        lines.insert(
            0, box.mark_rect(style="tuned", opacity=0.14).encode(x="x:Q", x2="x2:Q", y="y:Q", y2="y2:Q")
        )
    chart = alt.layer(*lines, marks.density(cells, x, y), *_points(_marked(columns, "delta_norm", key), x, y))
    total = sum(row["n"] for row in cells)
    outside = sum(
        1
        for value in columns[key]
        if (v := finite(value)) is not None and not NU_RANGE[0] <= v <= NU_RANGE[1]
    )
    beyond = f" {outside:,} lie beyond the axis and are drawn at its edge." if outside else ""
    return Chart(
        slug("diff-map", key),
        f"Δnorm against {name}",
        f"near 1: {meaning}. {total:,} latents counted in cells; tuned-only ones are diamonds, base-only ones squares, "
        f"circles the largest causal shares ({MARKED} marks at most). Shaded: where a new latent lies.{beyond}",
        chart,
        300,
        spoken=f"{total} latents by Δnorm and {name}",
    )


def _change_map(run: Run, table: pa.Table, limits: Mapping[str, Any]) -> Chart | None:
    if not (_known(table, "nu_centred") and _known(table, "activation_change")):
        return None
    columns = columns_of(
        table, ("latent", "class", "verdict", "causal_share", "nu_centred", "activation_change")
    )
    logs = [np.log10(v) if (v := finite(value)) and v > 0 else None for value in columns["activation_change"]]
    columns["change"] = logs
    found = [value for value in logs if value is not None]
    if not found:
        return None
    low, high = float(np.floor(min(found))), float(np.ceil(max(found)))
    across = (-1.0, 4.0)
    columns["nu"] = [
        None if (v := finite(value)) is None else min(max(v, across[0]), across[1])
        for value in columns["nu_centred"]
    ]
    cells = marks.binned(columns["nu"], logs, across, (low, max(high, low + 1)))
    x = Axis("ν centred: base / tuned activation", ".1~f", domain=across)
    y = Axis("change of the base per token, log10", ".1~f", domain=(low, max(high, low + 1)))
    lines = [marks.rule_x(1.0), marks.rule_x(0.0, "faint")]
    limit = finite(limits.get("nu_activation"))
    if limit is not None:
        box = marks.source([{"x": across[0], "x2": limit}])
        lines.insert(0, box.mark_rect(style="tuned", opacity=0.14).encode(x="x:Q", x2="x2:Q"))
    chart = alt.layer(*lines, marks.density(cells, x, y), *_points(_marked(columns, "nu", "change"), x, y))
    total = sum(row["n"] for row in cells)
    return Chart(
        slug("diff-map", "change"),
        "Which latents vary in the tuned model alone",
        f"{total:,} latents counted in cells, those beyond the axis at its edge; diamonds are tuned-only, squares "
        f"base-only, the {MARKED} of largest causal share. At 1 both models vary alike along it; shaded: where the "
        "base does not.",
        chart,
        300,
        spoken=f"{total} latents by the ratio of the two models' activations and by how much they change",
    )
