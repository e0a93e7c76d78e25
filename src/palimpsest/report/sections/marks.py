"""What the charts of the sections are put together from: bands, lines, dots with whiskers, binned densities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from palimpsest.report.sections.reading import Row, rounded

Drawn = alt.Chart | alt.LayerChart
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [1, 4]]
SIZES = [4**power for power in range(10)]


@dataclass(frozen=True)
class Axis:
    """One axis: what stands at it, how its numbers are printed, and its scale."""

    title: str
    form: str = ""
    log: bool = False
    domain: tuple[float, float] | None = None
    zero: bool = False
    values: Sequence[float] | None = None

    def encode(self, kind: Any, field: str) -> Any:
        """The encoding of a field along this axis."""
        scale: dict[str, Any] = {"type": "log"} if self.log else {"zero": self.zero}
        if self.domain is not None:
            scale |= {"domain": list(self.domain), "nice": False, "clamp": True}
        made = kind(f"{field}:Q", title=self.title or None, scale=alt.Scale(**scale))
        axis: dict[str, Any] = {"tickCount": 6, "labelOverlap": "greedy", "grid": kind is alt.Y}
        axis |= {"format": self.form} if self.form else {}
        axis |= {"values": list(self.values)} if self.values else {}
        return made.axis(**axis)


def source(rows: Sequence[Mapping[str, Any]]) -> alt.Chart:
    """A chart of rows that stand in the page."""
    return alt.Chart(alt.InlineData(values=[dict(row) for row in rows]))


def tips(*fields: tuple[str, str, str]) -> list[alt.Tooltip]:
    """Tooltips: field with its type, title, and format or nothing."""
    return [
        alt.Tooltip(field, title=title, format=form) if form else alt.Tooltip(field, title=title)
        for field, title, form in fields
    ]


def rule_y(value: float, style: str = "zero", dash: Sequence[int] | None = None) -> alt.Chart:
    """A line across the plot."""
    mark: dict[str, Any] = {"strokeDash": list(dash)} if dash else {}
    return source([{"y": value}]).mark_rule(style=style, **mark).encode(y="y:Q")


def rule_x(value: float, style: str = "zero", dash: Sequence[int] | None = None) -> alt.Chart:
    """A line up the plot."""
    mark: dict[str, Any] = {"strokeDash": list(dash)} if dash else {}
    return source([{"x": value}]).mark_rule(style=style, **mark).encode(x="x:Q")


def labelled_y(marks: Sequence[tuple[float, str]], style: str = "label-quiet") -> list[alt.Chart]:
    """Dashed lines across the plot, each with its name above its left end."""
    rows = [{"y": rounded(value), "label": name} for value, name in marks]
    if not rows:
        return []
    lines = source(rows).mark_rule(style="zero", strokeDash=[5, 3], opacity=0.8).encode(y="y:Q")
    text = source(rows).mark_text(style=style, align="left", baseline="bottom", dx=3, dy=-2)
    return [lines, text.encode(x=alt.value(0), y="y:Q", text="label:N")]


def series(
    names: Sequence[str], *, legend: bool = True, columns: int = 2, among: Sequence[str] = ()
) -> dict[str, Any]:
    """Colour and dash of a field `series`, with one small legend above the plot.

    Args:
        names: That are drawn.
        legend: Whether they are named above the plot.
        columns: Of the legend.
        among: All names of several charts in which each keeps its colour; `names` alone by default.
    """
    # The first colour of the page is near the grey of the nulls, so that it is given to a name that nothing has.
    domain = ["", *(among or names)]
    shown = None
    if legend and len(names) > 1:
        shown = alt.Legend(
            title=None,
            orient="top",
            columns=columns,
            symbolType="stroke",
            symbolOpacity=1,
            labelLimit=150,
            values=list(names),
        )
    dashes = [DASHES[-1], *(DASHES[i % len(DASHES)] for i in range(len(domain) - 1))]
    return {
        "color": alt.Color("series:N", scale=alt.Scale(domain=domain), legend=shown),
        "strokeDash": alt.StrokeDash("series:N", scale=alt.Scale(domain=domain, range=dashes), legend=shown),
    }


def curves(rows: Sequence[Row], x: Axis, y: Axis, names: Sequence[str], *, points: bool = True) -> list[Any]:
    """A line and a band per series from rows of `x`, `y`, `lo`, `hi` and `series`."""
    shared = series(names)
    data = source(rows)
    across, up = x.encode(alt.X, "x"), y.encode(alt.Y, "y")
    band = data.mark_area(opacity=0.16).encode(
        x=across, y=y.encode(alt.Y, "lo"), y2="hi:Q", color=shared["color"]
    )
    line = data.mark_line(strokeWidth=2).encode(x=across, y=up, **shared)
    form = y.form or ".3~g"
    hover = data.mark_point(filled=True, size=26 if points else 90, opacity=1 if points else 0).encode(
        x=across,
        y=up,
        color=shared["color"],
        tooltip=tips(
            ("series:N", "series", ""),
            ("x:Q", x.title, x.form),
            ("y:Q", "estimate", form),
            ("lo:Q", "from", form),
            ("hi:Q", "to", form),
        ),
    )
    return [band, line, hover]


def whiskers(rows: Sequence[Row], x: Axis, order: Sequence[str], style: str = "estimate") -> list[Any]:
    """A dot with its interval per `name`, above a bar of what nothing specific gives (`null_lo`, `null_hi`).

    Rows that say `null` are nulls themselves: their dots are grey.
    """
    data = source([row for row in rows if not row.get("null")])
    nulls = [row for row in rows if row.get("null")]
    y = names_axis(order)
    layers: list[Any] = []
    if any(row.get("null_lo") is not None for row in rows):
        bar = source(rows).mark_bar(style="band", opacity=0.22, height=16)
        layers.append(bar.encode(x=x.encode(alt.X, "null_lo"), x2="null_hi:Q", y=y))
    span = data.mark_rule(style=style, strokeWidth=2).encode(x=x.encode(alt.X, "lo"), x2="hi:Q", y=y)
    form = x.form or ".3~g"
    found = [("name:N", "", ""), ("value:Q", "estimate", form), ("lo:Q", "from", form), ("hi:Q", "to", form)]
    if layers:
        found += [("null_lo:Q", "null from", form), ("null_hi:Q", "null to", form)]
    where = {"x": x.encode(alt.X, "value"), "y": y, "tooltip": tips(*found)}
    layers += [span, data.mark_point(style=style, filled=True, size=70, opacity=1).encode(**where)]
    if nulls:
        layers.append(
            source(nulls).mark_point(style="band", shape="cross", size=60, opacity=1).encode(**where)
        )
    return layers


def names_axis(order: Sequence[str]) -> alt.Y:
    """Names from top to bottom."""
    y = alt.Y("name:N", sort=list(order), title=None, scale=alt.Scale(domain=list(order)))
    return y.axis(ticks=False, domain=False, labelFontSize=12, labelPadding=8, labelLimit=150)


def binned(
    x: Sequence[float | None], y: Sequence[float | None], xs: tuple[float, float], ys: tuple[float, float]
) -> list[Row]:
    """How many points lie in each cell of a grid of 44 x 32; what lies outside is counted at the edge.

    Returns:
        Rows of `x`, `x2`, `y`, `y2` and `n` for the cells that are not empty: 1,408 at most, whatever the points.
    """
    pairs = np.array(
        [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None], float
    ).reshape(-1, 2)
    inside = np.column_stack([np.clip(pairs[:, 0], *xs), np.clip(pairs[:, 1], *ys)])
    counts, across, up = np.histogram2d(inside[:, 0], inside[:, 1], bins=(44, 32), range=(xs, ys))
    return [
        {
            "x": rounded(across[i]),
            "x2": rounded(across[i + 1]),
            "y": rounded(up[j]),
            "y2": rounded(up[j + 1]),
            "n": int(counts[i, j]),
        }
        for i, j in zip(*np.nonzero(counts), strict=True)
    ]


def density(rows: Sequence[Row], x: Axis, y: Axis, style: str = "band", most: int = 0) -> alt.Chart:
    """Cells whose opacity grows with the logarithm of their count; layers of one chart share the largest, `most`."""
    most = most or max((row["n"] for row in rows), default=1)
    shade = alt.Opacity(
        "n:Q", scale=alt.Scale(type="log", domain=[1, max(most, 2)], range=[0.18, 0.9]), legend=None
    )
    return (
        source(rows)
        .mark_rect(style=style)
        .encode(
            x=x.encode(alt.X, "x"),
            x2="x2:Q",
            y=y.encode(alt.Y, "y"),
            y2="y2:Q",
            opacity=shade,
            tooltip=tips(("n:Q", "latents", ",d")),
        )
    )


def steps(values: Sequence[float] | np.ndarray, low: float, high: float, bins: int) -> list[Row]:
    """A histogram as rows of `x`, `x2`, `n` and `none` (0); what lies outside is counted at the edge."""
    counts, edges = np.histogram(np.clip(np.asarray(values, float), low, high), bins=bins, range=(low, high))
    return [
        {"x": rounded(edges[i]), "x2": rounded(edges[i + 1]), "n": int(counts[i]), "none": 0}
        for i in range(bins)
    ]


def counts_axis(title: str, most: float) -> Axis:
    """Counts from zero on."""
    return Axis(title, "~s", domain=(0.0, 1.05 * max(most, 1.0)))


def sizes_axis(title: str, most: float) -> Axis:
    """Numbers of latents from 1 on, by factors."""
    top = max(float(most), 2.0)
    return Axis(title, ",d", log=True, domain=(1.0, top), values=[n for n in SIZES if n <= top])


def known(*rows: Sequence[Row], keys: Sequence[str]) -> list[float]:
    """All numbers of some keys, for a scale that holds them."""
    return [row[key] for listed in rows for row in listed for key in keys if row.get(key) is not None]


def span(values: Sequence[float], *, zero: bool = True, most: float | None = None) -> tuple[float, float]:
    """A domain around values with a small margin."""
    found = [*values, *([0.0] if zero else [])] or [0.0, 1.0]
    low, high = min(found), max(found)
    if most is not None:
        low, high = max(low, -most), min(high, most)
    margin = 0.05 * (high - low) or 0.5
    return low - margin, high + margin
