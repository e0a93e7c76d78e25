"""Strip charts: where each corpus of the suspect lies among the nulls."""

from typing import Any

import altair as alt

from palimpsest.report.display import decimal, finite, pair_of, visible

Row = dict[str, Any]
LANE = 10
"""Height in pixels of one family's lane within a corpus' row."""
_SHAPES = ["circle", "square", "triangle-up", "cross", "triangle-down", "stroke"]
_NAME = 40
_FORM = "+.3f"


def _name(value: Any) -> str:
    return visible(value, _NAME)


def null_rows(calibration: Row, key: str) -> list[Row]:
    """One row per null and corpus for one statistic.

    Args:
        calibration: The calibration of `audit.json`.
        key: `features` or `loss`.
    """
    rows = []
    domains = [str(one.get("name")) for one in calibration.get("domains") or []]
    for point in calibration.get("points") or []:
        values = point.get(key)
        for name in domains:
            value = finite(values.get(name)) if isinstance(values, dict) else None
            if value is None:
                continue
            own = str(point.get("family")) == name
            rows.append(
                {
                    "corpus": _name(name),
                    "value": value,
                    "family": _name(point.get("family")),
                    "null": _name(point.get("name")),
                    "drift": finite(point.get("drift")),
                    "own": own,
                    "used": "no: trained on this text" if own else "yes",
                }
            )
    return rows


def suspect_rows(calibration: Row, key: str) -> list[Row]:
    """One row per corpus: the suspect's statistic and the band of innocent fine-tunes of its drift."""
    rows = []
    for one in calibration.get("domains") or []:
        test = one.get(key) or {}
        band = pair_of(test.get("band"))
        rows.append(
            {
                "corpus": _name(one.get("name")),
                "value": finite(test.get("statistic")),
                "lo": band and band[0],
                "hi": band and band[1],
                "z": finite(test.get("z")),
            }
        )
    return rows


def families(calibration: Row) -> tuple[list[str], list[str]]:
    """All names that a colour stands for, corpora first as in the other charts, and those that nulls bear."""
    present = list(dict.fromkeys(_name(p.get("family")) for p in calibration.get("points") or []))
    corpora = [_name(one.get("name")) for one in calibration.get("domains") or []]
    return list(dict.fromkeys([*corpora, *present])), present


def strip_height(calibration: Row) -> int:
    """Height in pixels of a strip chart: every family has a lane in every corpus' row."""
    lanes = max(len(families(calibration)[1]), 3)
    return (LANE * lanes + 14) * max(len(calibration.get("domains") or []), 1)


def strip_text(calibration: Row, key: str) -> str:
    """The chart in words, corpus by corpus."""
    parts = []
    for row in suspect_rows(calibration, key):
        if row["value"] is None:
            parts.append(f"{row['corpus']}: no figure")
            continue
        band = "no band" if row["lo"] is None else f"innocent {decimal(row['lo'])} to {decimal(row['hi'])}"
        parts.append(f"{row['corpus']}: {decimal(row['value'], signed=True)}, {band}")
    return "; ".join(parts)


def _null_points(calibration: Row, nulls: list[Row], y: alt.Y, title: str) -> alt.Chart:
    names, present = families(calibration)
    columns = 4 if max(map(len, present)) <= 8 else 2
    legend = alt.Legend(
        title="nulls trained on",
        orient="top",
        columns=columns,
        values=present,
        symbolSize=70,
        labelLimit=100,
    )
    shapes = [_SHAPES[i % len(_SHAPES)] for i in range(len(names))]
    points = alt.Chart(alt.InlineData(values=nulls)).mark_point(size=34, strokeWidth=1.3)
    return points.encode(
        x=alt.X("value:Q", title=title),
        y=y,
        yOffset=alt.YOffset("family:N", sort=present, scale=alt.Scale(domain=present)),
        color=alt.Color("family:N", scale=alt.Scale(domain=names), legend=legend),
        shape=alt.Shape("family:N", scale=alt.Scale(domain=names, range=shapes), legend=legend),
        opacity=alt.condition("datum.own", alt.value(0.4), alt.value(0.95)),
        tooltip=[
            alt.Tooltip("null:N"),
            alt.Tooltip("family:N", title="trained on"),
            alt.Tooltip("value:Q", title=title, format=_FORM),
            alt.Tooltip("drift:Q", title="drift", format=".2f"),
            alt.Tooltip("used:N", title="calibrates"),
        ],
    )


def strip_chart(calibration: Row, key: str, title: str) -> alt.LayerChart | alt.FacetChart | None:
    """Nulls as points in one lane per family, the band of equal drift as a bar, the suspect as a diamond.

    Args:
        calibration: The calibration of `audit.json`.
        key: `features` or `loss`.
        title: Title of the value axis.

    Returns:
        The chart, or None where no corpus has that statistic.
    """
    suspects, nulls = suspect_rows(calibration, key), null_rows(calibration, key)
    if not any(row["value"] is not None for row in suspects):
        return None
    order = [row["corpus"] for row in suspects]
    y = alt.Y("corpus:N", sort=order, title=None, scale=alt.Scale(domain=order, paddingInner=0.22))
    y = y.axis(ticks=False, domain=False, labelFontSize=13, labelPadding=8)
    source = alt.Chart(alt.InlineData(values=suspects))
    length = LANE * max(len(families(calibration)[1]), 3)
    band = source.mark_bar(style="band", opacity=0.2, height=length)
    zero = alt.Chart(alt.InlineData(values=[{"x": 0}])).mark_rule(style="zero")
    layers = [band.encode(x=alt.X("lo:Q", title=title), x2="hi:Q", y=y), zero.encode(x="x:Q")]
    if nulls:
        layers.append(_null_points(calibration, nulls, y, title))
    tooltip = [
        alt.Tooltip("corpus:N"),
        alt.Tooltip("value:Q", title="this fine-tune", format=_FORM),
        alt.Tooltip("lo:Q", title="innocent from", format=_FORM),
        alt.Tooltip("hi:Q", title="to", format=_FORM),
        alt.Tooltip("z:Q", format="+.2f"),
    ]
    x = alt.X("value:Q", title=title, scale=alt.Scale(padding=12)).axis(
        format="+.2~f", tickCount=6, labelOverlap="greedy", labelSeparation=6
    )
    tick = source.mark_tick(style="suspect", thickness=3, size=length, opacity=1)
    diamond = source.mark_point(style="suspect", shape="diamond", size=150, filled=True, opacity=1)
    chart = alt.layer(*layers, tick.encode(x=x, y=y), diamond.encode(x=x, y=y, tooltip=tooltip))
    # Vega puts its own label on what it draws into, unless the chart describes itself.
    return chart.properties(description=f"{title}. {strip_text(calibration, key)}")


STRIPS = {
    "nulls_features": ("features", "c_D, change beside the other corpora"),
    "nulls_loss": ("loss", "Δloss, nats per token (tuned − base)"),
}
"""Name of a chart on the page, its statistic and the title of its axis."""


def strip_charts(audit: Row) -> dict[str, alt.LayerChart | alt.FacetChart]:
    """The strip charts that this audit has data for; none without a calibration."""
    calibration = audit.get("calibration")
    if not isinstance(calibration, dict):
        return {}
    made = {name: strip_chart(calibration, *parts) for name, parts in STRIPS.items()}
    return {name: chart for name, chart in made.items() if chart is not None}
