"""The share of the KL gap that each diff recovers, as a picture."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palimpsest.diff.compare_text import NAMES, label

if TYPE_CHECKING:
    from palimpsest.diff.compare import Comparison

COLOURS = {"all": "#0a66a8", "first": "#9b3a86"}
ROW = 40
WIDTH = 520


def draw(found: Comparison) -> dict[str, bytes]:
    """The chart as `svg` and `png`; empty where no diff has a share of the KL."""
    rows = [
        {
            # A control code in a folder's name cannot stand in an SVG.
            "diff": "".join(c if c.isprintable() else "?" for c in f"{row.name}: {label(row)}"),
            "predictions": NAMES[place],
            "share": one.share,
            "low": one.ci[0] if one.ci else one.share,
            "high": one.ci[1] if one.ci else one.share,
        }
        for row in found.rows
        for place, one in row.recovered.items()
        if one.share is not None
    ]
    if not rows:
        return {}
    import vl_convert

    spec = _spec(rows)
    return {
        "svg": vl_convert.vegalite_to_svg(spec, allowed_base_urls=[]).encode(),
        "png": vl_convert.vegalite_to_png(spec, scale=2, allowed_base_urls=[]),
    }


def _spec(rows: list[dict[str, Any]]) -> dict[str, Any]:
    import altair as alt

    order = list(dict.fromkeys(row["diff"] for row in rows))
    places = [NAMES[place] for place in NAMES if any(row["predictions"] == NAMES[place] for row in rows)]
    colours = [COLOURS[place] for place in NAMES if NAMES[place] in places]
    source = alt.Chart(alt.InlineData(values=rows))
    y = alt.Y("diff:N", sort=order, title=None).axis(
        ticks=False, domain=False, labelLimit=320, labelPadding=8
    )
    shared = {
        "y": y,
        "yOffset": alt.YOffset("predictions:N", sort=places),
        "color": alt.Color("predictions:N", scale=alt.Scale(domain=places, range=colours)).legend(
            orient="top", title="predictions", labelLimit=240
        ),
    }
    title = "share of the KL gap that all latents and the bias recover"
    whisker = source.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=title), x2="high:Q", **shared)
    dot = source.mark_point(size=70, filled=True, opacity=1).encode(
        x=alt.X("share:Q", title=title).axis(format=".0%", tickCount=6), **shared
    )
    lines = alt.Chart(alt.InlineData(values=[{"x": 0}, {"x": 1}]))
    rule = lines.mark_rule(color="#57606a", strokeDash=[3, 3]).encode(x="x:Q")
    chart = alt.layer(rule, whisker, dot).properties(width=WIDTH, height=ROW * len(order))
    config = {"background": "#ffffff", "font": "sans-serif", "view": {"stroke": None}, "padding": 12}
    return chart.to_dict() | {"config": config}
