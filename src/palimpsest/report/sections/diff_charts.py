"""The charts of a diff: which latents are new, what recovers the divergence, and whether attribution holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import altair as alt
import numpy as np

from palimpsest.report.display import finite, pair_of, visible
from palimpsest.report.parts import Chart, Run
from palimpsest.report.sections import marks
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import Row, ends, figure, rounded, rows_of, slug

RANKINGS = ("attribution", "activation_change", "nu", "delta_norm", "nu|delta_norm")
NAMES = {
    "attribution": "attribution",
    "activation_change": "change",
    "nu": "ν",
    "delta_norm": "Δnorm",
    "nu|delta_norm": "ν within Δnorm",
}


ALIKE = 1.25
"""Random sets whose sizes differ by less than this factor are drawn together."""


def ranking_name(ranking: str) -> str:
    """How a ranking is called on the page."""
    return NAMES.get(ranking, visible(ranking, 30))


def _patched(run: Run, key: str, place: str) -> list[Mapping[str, Any]]:
    return [row for row in rows_of(run.data.get(key)) if row.get("positions") == place]


def _share_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    return next((finite(row.get("share")) for row in rows if row.get("set") == name), None)


def null_band(rows: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Random sets by how many latents they hold, those of about one size together: mean, and the ends of intervals."""
    found: list[tuple[float, float, float, float]] = []
    for row in rows:
        size, share = finite(row.get("size")), finite(row.get("share"))
        if str(row.get("set")).startswith("random:") and size and share is not None:
            found.append((size, share, *(pair_of(row.get("ci")) or (share, share))))
    groups: list[list[tuple[float, float, float, float]]] = []
    for point in sorted(found):
        if groups and point[0] <= ALIKE * groups[-1][-1][0]:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [
        {
            "x": rounded(float(np.exp(np.mean([np.log(one[0]) for one in group])))),
            "y": rounded(float(np.mean([one[1] for one in group]))),
            "lo": rounded(min(one[2] for one in group)),
            "hi": rounded(max(one[3] for one in group)),
            "sets": len(group),
        }
        for group in groups
    ]


def curve_chart(run: Run, place: str, words: str) -> Chart | None:
    """The share that the n strongest latents recover, by ranking, beside random sets and one mean vector."""
    mine = _patched(run, "patching", place)
    rows: list[Row] = []
    for ranking in RANKINGS:
        for one in mine:
            share, size = finite(one.get("share")), finite(one.get("size"))
            if one.get("set") == f"top:{ranking}" and share is not None and size:
                low, high = ends(one, "ci")
                point = {"x": size, "y": rounded(share), "lo": low, "hi": high}
                rows.append({**point, "series": ranking_name(ranking)})
    if not rows:
        return None
    nulls = null_band(mine)
    names = list(dict.fromkeys(row["series"] for row in rows))
    rows.sort(key=lambda row: (names.index(row["series"]), row["x"]))
    x = marks.sizes_axis("number of latents", max(row["x"] for row in [*rows, *nulls]))
    lines = [("all+bias", "all latents and bias"), ("raw", "true difference"), ("mean", "one mean vector")]
    levels = [(share, name) for key, name in lines if (share := _share_of(mine, key)) is not None]
    found = marks.known(rows, nulls, keys=("y", "lo", "hi")) + [value for value, _ in levels]
    y = Axis("share of the KL recovered", ".0%", domain=marks.span(found, most=1.2))
    layers = [
        marks.rule_y(0.0),
        *_apart(levels, y),
        *_null_layers(nulls, x, y),
        *marks.curves(rows, x, y, names),
    ]
    gap = figure(run.data, "gap", place)
    size = "" if gap is None else f", a share of {gap:.3f} nats per prediction"
    return Chart(
        slug("diff-kl", place),
        f"KL recovered, {words}",
        f"by the n strongest latents put into the base{size}; bands are intervals over documents. Grey with crosses: "
        "random sets, the ends of all their intervals, drawn through between the sizes that were measured.",
        alt.layer(*layers),
        330,
        wide=True,
        spoken="; ".join(f"{name} {value:.0%}" for value, name in levels),
    )


def _apart(levels: Sequence[tuple[float, str]], y: Axis) -> list[Any]:
    """Reference lines with names; of two that are too near for their names only the first is named."""
    low, high = y.domain or (0.0, 1.0)
    named: list[tuple[float, str]] = []
    for value, name in sorted(levels, reverse=True):
        near = any(abs(value - other) < 0.06 * (high - low) for other, _ in named)
        if near and named:
            last, text = named[-1]
            named[-1] = (last, f"{text}; {name} ({value:.0%})")
        else:
            named.append((value, f"{name} ({value:.0%})"))
    return marks.labelled_y(named)


def _null_layers(nulls: Sequence[Row], x: Axis, y: Axis) -> list[Any]:
    if not nulls:
        return []
    data = marks.source(nulls)
    across = x.encode(alt.X, "x")
    band = data.mark_area(style="band", opacity=0.22).encode(x=across, y=y.encode(alt.Y, "lo"), y2="hi:Q")
    whisker = data.mark_rule(style="band", strokeWidth=5, opacity=0.35)
    tooltip = marks.tips(
        ("sets:Q", "random sets", "d"),
        ("x:Q", "latents", ",.0f"),
        ("y:Q", "mean", ".1%"),
        ("lo:Q", "from", ".1%"),
        ("hi:Q", "to", ".1%"),
    )
    dot = data.mark_point(style="band", shape="cross", size=50, filled=True, opacity=1)
    line = data.mark_line(style="band", strokeWidth=1.5, strokeDash=[2, 3])
    return [
        band,
        line.encode(x=across, y=y.encode(alt.Y, "y")),
        whisker.encode(x=across, y=y.encode(alt.Y, "lo"), y2="hi:Q"),
        dot.encode(x=across, y=y.encode(alt.Y, "y"), tooltip=tooltip),
    ]


def _half_rows(mine: Sequence[Mapping[str, Any]]) -> list[Row]:
    rows: list[Row] = []
    for ranking in RANKINGS:
        best = next((row for row in mine if row.get("set") == f"best:{ranking}"), None)
        if best is None or finite(best.get("share")) is None:
            continue
        random = [
            v
            for row in mine
            if row.get("set") == f"random:{ranking}" and (v := finite(row.get("share"))) is not None
        ]
        low, high = ends(best, "ci")
        rows.append(
            {
                "name": ranking_name(ranking),
                "value": rounded(best.get("share")),
                "lo": low,
                "hi": high,
                "null_lo": rounded(min(random)) if random else None,
                "null_hi": rounded(max(random)) if random else None,
                "next": rounded(_share_of(mine, f"worst:{ranking}")),
                "directions": rounded(
                    _mean([row.get("share") for row in mine if row.get("set") == f"directions:{ranking}"])
                ),
            }
        )
    return rows


def halves_chart(run: Run, key: str, place: str) -> Chart | None:
    """Per ranking the better half of its strongest latents, the next half, and what random sets and directions give."""
    mine = _patched(run, key, place)
    rows = _half_rows(mine)
    if not rows:
        return None
    added = key == "patching"
    values = marks.known(rows, keys=("value", "lo", "hi", "null_lo", "null_hi", "next", "directions"))
    x = Axis(
        "share of the KL " + ("recovered" if added else "lost without it"),
        ".0%",
        domain=marks.span(values, most=2.0),
    )
    data = marks.source(rows)
    order = [row["name"] for row in rows]
    layers: list[Any] = [marks.rule_x(0.0), *marks.whiskers(rows, x, order, "tuned")]
    for field, shape, title in (
        ("next", "circle", "next half"),
        ("directions", "cross", "random directions"),
    ):
        if any(row[field] is not None for row in rows):
            mark = data.mark_point(style="estimate", shape=shape, size=55, opacity=0.85)
            layers.append(
                mark.encode(
                    x=x.encode(alt.X, field),
                    y=marks.names_axis(order),
                    tooltip=marks.tips((f"{field}:Q", title, ".1%")),
                )
            )
    size = next((finite(row.get("size")) for row in mine if str(row.get("set")).startswith("best:")), None)
    many = "" if size is None else f"{size:,.0f} "
    words = "put into the base" if added else "taken out of the tuned model"
    return Chart(
        slug("diff-halves", key, place),
        f"Strongest {many}latents {words}",
        "by ranking, with intervals. Grey bar: random sets of the same weight, range over seeds"
        + (
            "; open circle: the next as many latents; cross: random directions of the same length."
            if added
            else "."
        ),
        alt.layer(*layers),
        52 * len(rows) + 20,
        spoken="; ".join(f"{row['name']} {row['value']:.1%}" for row in rows),
    )


def _mean(values: Sequence[Any]) -> float | None:
    found = [v for value in values if (v := finite(value)) is not None]
    return float(np.mean(found)) if found else None


def verified_chart(run: Run) -> Chart | None:
    """What gradients predicted of the strongest latents beside what happened when they were put in and taken out."""
    first = next(iter(rows_of(run.data.get("attribution"))), {})
    series = (("predicted", "predicted"), ("added", "put in"), ("removed", "taken out"))
    rows: list[Row] = [
        {"x": size, "y": rounded(value), "lo": None, "hi": None, "series": name}
        for key, name in series
        for one in rows_of(first.get("verified"))
        if (size := finite(one.get("size"))) and (value := finite(one.get(key))) is not None
    ]
    if not rows:
        return None
    sizes = sorted({row["x"] for row in rows})
    x = Axis(
        "strongest latents by attribution",
        "d",
        log=True,
        domain=(sizes[0] * 0.85, sizes[-1] * 1.15),
        values=sizes,
    )
    y = Axis("share of the gap", ".0%", domain=marks.span(marks.known(rows, keys=("y",))))
    names = [name for _, name in series]
    chart = alt.layer(marks.rule_y(0.0), *marks.curves(rows, x, y, names)[1:])
    apart = max(
        (abs(b["y"] - a["y"]) for a, b in pairwise(sorted(rows, key=lambda r: r["x"])) if a["x"] == b["x"]),
        default=0.0,
    )
    return Chart(
        "diff-verified",
        "Attribution, verified",
        "what gradients promise of the strongest latents, and what putting them in and taking them out does.",
        chart,
        260,
        spoken=f"largest distance between promise and measurement {apart:.0%}",
    )
