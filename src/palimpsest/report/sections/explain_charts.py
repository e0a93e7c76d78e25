"""The charts of an explained adapter: kept and taken-out curves, concentration, and intervals beside their nulls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa

from palimpsest.report.display import count, finite, visible
from palimpsest.report.parts import Chart, Run
from palimpsest.report.sections import marks
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import (
    Row,
    columns_of,
    dig,
    ends,
    figure,
    mapping,
    rounded,
    rows_of,
    slug,
)

KEPT = {"keep": "strongest by effect", "magnitude": "largest values"}
_MEASURES = {"cosine": "cosine", "spearman": "ranks", "overlap": "top latents"}


def _curve(run: Run, kind: str, name: str = "") -> list[Row]:
    rows = []
    for point in rows_of(run.data.get("curves")):
        size, share = finite(point.get("n")), finite(point.get("share"))
        if point.get("kind") == kind and size and share is not None:
            low, high = ends(point, "ci")
            rows.append({"x": size, "y": rounded(share), "lo": low, "hi": high, "series": name or kind})
    return sorted(rows, key=lambda row: row["x"])


def curve_chart(run: Run, kind: str) -> Chart | None:
    """The share of the adapter's effect with the n strongest latents kept, or with them taken out.

    Args:
        run: A folder of stage `explain`.
        kind: `keep`, drawn beside the largest values and random orders, or `ablate`.
    """
    kept = kind == "keep"
    named = KEPT if kept else {"ablate": "strongest by effect"}
    rows = [row for key, name in named.items() for row in _curve(run, key, name)]
    if not rows:
        return None
    nulls = _curve(run, "random") if kept else []
    most = max(row["x"] for row in rows)
    x = marks.sizes_axis("latents kept" if kept else "latents taken out", most)
    domain = marks.span(marks.known(rows, nulls, keys=("y", "lo", "hi")), most=1.5)
    y = Axis("share of the effect on the objective", ".0%", domain=domain)
    layers: list[Any] = [marks.rule_y(0.0), marks.rule_y(1.0, "faint")]
    if nulls:
        data, across = marks.source(nulls), x.encode(alt.X, "x")
        band = data.mark_area(style="band", opacity=0.22)
        layers.append(band.encode(x=across, y=y.encode(alt.Y, "lo"), y2="hi:Q"))
        line = data.mark_line(style="band", strokeDash=[2, 3], strokeWidth=1.5)
        layers.append(line.encode(x=across, y=y.encode(alt.Y, "y")))
        middle = min(nulls, key=lambda row: abs(np.log(row["x"]) - 0.6 * np.log(most)))
        text = marks.source([{**middle, "label": "random orders"}]).mark_text(
            style="label-quiet", align="left", baseline="top", dx=6, dy=6
        )
        layers.append(text.encode(x=across, y=y.encode(alt.Y, "y"), text="label:N"))
    layers += marks.curves(rows, x, y, list(named.values()) if kept else ["strongest by effect"])
    n = figure(run.data, "pruned", "n")
    if kept and n:
        mark = marks.source([{"x": n, "label": f"pruned: {count(n)}"}])
        layers.append(mark.mark_rule(style="primary", strokeDash=[3, 3]).encode(x=x.encode(alt.X, "x")))
        text = mark.mark_text(style="primary-label", align="right", dx=-4, dy=9)
        layers.append(text.encode(x=x.encode(alt.X, "x"), y=alt.value(0), text="label:N"))
    captions = {
        "keep": "what the adapter still does when only these latents change; bands are intervals over documents, "
        "of random orders their range.",
        "ablate": "what is left when these latents are taken out of the whole adapter; the band is an interval over "
        "documents.",
    }
    return Chart(
        slug("explain", kind),
        "Latents kept" if kept else "Latents taken out",
        captions["keep" if kept else "ablate"],
        alt.layer(*layers),
        300,
        spoken=f"from {rows[0]['y']:.0%} with {rows[0]['x']:.0f} latents",
    )


def concentration_chart(run: Run, table: pa.Table | None) -> Chart | None:
    """The part of the effect that the n latents of the largest effect hold."""
    effects = np.array(
        [v for value in columns_of(table, ("effect",))["effect"] if (v := finite(value)) and v > 0]
    )
    if not len(effects):
        return None
    held = np.cumsum(np.sort(effects)[::-1]) / effects.sum()
    picks = sorted({round(n) for n in np.geomspace(1, len(held), 60)})
    rows: list[Row] = [{"x": n, "y": rounded(held[n - 1])} for n in picks]
    x = marks.sizes_axis("latents of the largest effect", len(held))
    y = Axis("share of the effect held", ".0%", domain=(0.0, 1.05))
    data = marks.source(rows)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    tips = marks.tips(("x:Q", "latents", ",d"), ("y:Q", "hold", ".1%"))
    layers = [
        marks.rule_y(0.5, "zero", (3, 3)),
        marks.rule_y(0.9, "zero", (3, 3)),
        data.mark_line(style="tuned", strokeWidth=2).encode(x=across, y=up),
        data.mark_point(size=60, opacity=0).encode(x=across, y=up, tooltip=tips),
    ]
    half, most = (figure(run.data, "concentration", key) for key in ("half", "most"))
    marked = [{"x": n, "y": share, "label": count(n)} for n, share in ((half, 0.5), (most, 0.9)) if n]
    if marked:
        dots = marks.source(marked)
        layers.append(dots.mark_point(style="tuned", filled=True, size=60, opacity=1).encode(x=across, y=up))
        text = dots.mark_text(style="label", align="right", dx=-7, dy=-8)
        layers.append(text.encode(x=across, y=up, text="label:N"))
    return Chart(
        "explain-concentration",
        "How concentrated is the effect?",
        f"of {len(effects):,} latents with any effect; the labelled dots hold half and 90% of it. No share of the "
        "objective: lengths of what is added.",
        alt.layer(*layers),
        300,
        spoken=f"half in {count(half)} latents, 90% in {count(most)}",
    )


def specificity_chart(run: Run) -> Chart | None:
    """Whether the top latents fire more on the adapter's data, beside random latents and shuffled values."""
    found = mapping(run.data.get("specificity"))
    names = {"top": "top latents", "permuted": "shuffled values", "random": "random latents"}
    rows: list[Row] = []
    for key, name in names.items():
        low, high = ends(found, key, "ci")
        value = rounded(dig(found, key, "ratio"))
        if value is not None:
            null = key != "top"
            rows.append(
                {
                    "name": name,
                    "value": value,
                    "lo": None if null else low,
                    "hi": None if null else high,
                    "null_lo": low if null else None,
                    "null_hi": high if null else None,
                    "null": null,
                }
            )
    if not rows:
        return None
    values = [*marks.known(rows, keys=("value", "lo", "hi", "null_lo", "null_hi")), 1.0]
    x = Axis("activation on its data / on general text", ".2~f", domain=marks.span(values, zero=False))
    order = [row["name"] for row in rows]
    p = finite(found.get("p"))
    chance = "" if p is None else f" Of the shuffles {p:.0%} reach as much."
    return Chart(
        "explain-specificity",
        "Do the latents belong to the data?",
        f"1: no more active there. Grey: the range of 95% of the sets or shuffles.{chance}",
        alt.layer(marks.rule_x(1.0), *marks.whiskers(rows, x, order, "tuned")),
        150,
        spoken="; ".join(f"{row['name']} {row['value']:.2f}" for row in rows),
    )


def agreement_charts(run: Run, pairs: Mapping[str, str] | None = None) -> list[Chart]:
    """Agreement with another seed and with other data, each beside what shuffled values give."""
    wanted = pairs or {"twin": "other seed", "other": "other data"}
    rows: list[Row] = []
    for key, name in wanted.items():
        found = mapping(run.data.get("agreement") if pairs else dig(run.data, "controls", key))
        for measure, words in _MEASURES.items():
            value = rounded(found.get(measure))
            if value is None:
                continue
            low, high = ends(found, f"null_{measure}")
            title = words if pairs else f"{name}: {words}"
            rows.append(
                {"name": title, "value": value, "lo": None, "hi": None, "null_lo": low, "null_hi": high}
            )
    charts = []
    if rows:
        values = marks.known(rows, keys=("value", "null_lo", "null_hi"))
        x = Axis("agreement", ".1~f", domain=marks.span([*values, 1.0]))
        order = [row["name"] for row in rows]
        charts.append(
            Chart(
                "explain-agreement",
                "Agreement between adapters",
                "cosine and rank correlation of the values, and the share of the top latents that both have; "
                "grey: 95% of the shuffles of one adapter's values.",
                alt.layer(marks.rule_x(0.0), *marks.whiskers(rows, x, order, "tuned")),
                28 * len(rows) + 40,
                spoken="; ".join(f"{row['name']} {row['value']:.2f}" for row in rows),
            )
        )
    shuffled = None if pairs else _shuffled_chart(run)
    return [*charts, *([shuffled] if shuffled else [])]


def _shuffled_chart(run: Run) -> Chart | None:
    """What this adapter and one trained on shuffled data do to the objective."""
    own, other = mapping(run.data.get("objective")), mapping(dig(run.data, "controls", "shuffled"))
    rows: list[Row] = []
    for name, found in (("this adapter", own), ("trained on shuffled data", other)):
        low, high = ends(found, "ci")
        value = rounded(found.get("difference"))
        if value is not None:
            rows.append({"name": name, "value": value, "lo": low, "hi": high})
    if len(rows) < 2:
        return None
    unit = visible(own.get("unit") or "nats", 50)
    x = Axis(
        f"lowers the objective by, {unit}",
        "+.2~g",
        domain=marks.span(marks.known(rows, keys=("value", "lo", "hi"))),
    )
    return Chart(
        "explain-shuffled",
        "Beside shuffled data",
        "an adapter of the same kind that had nothing to learn but its text's format.",
        alt.layer(marks.rule_x(0.0), *marks.whiskers(rows, x, [row["name"] for row in rows], "tuned")),
        110,
        spoken="; ".join(f"{row['name']} {row['value']:+.3f}" for row in rows),
    )
