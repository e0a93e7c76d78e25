"""How well a dictionary reconstructs a model, as sections."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from palimpsest.report.display import count, finite, percent, visible
from palimpsest.report.parts import Block, Chart, Column, Figures, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import (
    Row,
    dig,
    ends,
    items_of,
    mapping,
    notes,
    number_text,
    rounded,
    rows_of,
    share_text,
    summary,
)

LOWEST, PER_DECADE = -8, 4
STYLES = {"base": "base", "tuned": "tuned"}


def sections(run: Run) -> list[Section]:
    """The sections of an evaluation."""
    models = rows_of(run.data.get("models"))
    charts = [density_chart(models), recovered_chart(models)]
    blocks: list[Block] = [Figures(items)] if (items := _figures(models)) else []
    blocks += [chart for chart in charts if chart is not None]
    site, view = run.data.get("site"), run.data.get("view")
    where = f"At {visible(site, 60)}, view {visible(view or 'base', 20)}, " if site else ""
    return [
        Section(
            "evaluation",
            "How much goes through the dictionary?",
            "evidence",
            run=run.name,
            lead=f"{where}{count(run.data.get('tokens'))} tokens of {count(run.data.get('documents'))} documents. "
            + summary(run),
            blocks=[*blocks, *notes(run), *([table] if (table := _table(models)) else [])],
            methods=[methods.RECONSTRUCTION],
        )
    ]


def _side(row: Mapping[str, Any]) -> str:
    return visible(row.get("side") or "model", 30)


def _figures(models: Sequence[Mapping[str, Any]]) -> list[tuple[str, str, str]]:
    items = []
    for row in models:
        text = number_text(row.get("fve"), row.get("fve_ci"))
        dead = finite(row.get("dead_share"))
        beside = f"L0 {number_text(row.get('l0'), digits=1)}" + (
            "" if dead is None else f", {percent(dead)} dead"
        )
        items.append((f"FVE, {_side(row)}", text, beside))
        zero = dig(row, "splice", "ce_recovered", "zero")
        if finite(zero) is not None:
            found = share_text(zero, dig(row, "splice", "ce_recovered_ci", "zero"))
            items.append((f"CE recovered, {_side(row)}", found, "against a site ablated to zero"))
    return items


def density_chart(models: Sequence[Mapping[str, Any]]) -> Chart | None:
    """How many latents fire how often."""
    found: list[tuple[str, list[Row]]] = []
    for row in models:
        counts = [finite(n) or 0.0 for n in items_of(dig(row, "density", "counts"))]
        if any(counts):
            edges = [LOWEST + i / PER_DECADE for i in range(len(counts) + 1)]
            bins = [
                {"x": edges[i], "x2": edges[i + 1], "n": n, "none": 0, "side": _side(row)}
                for i, n in enumerate(counts)
            ]
            found.append((_side(row), bins))
    if not found:
        return None
    x = Axis("share of tokens, log10", "d", domain=(float(LOWEST), 0.0))
    y = marks.counts_axis("latents", max(row["n"] for _, rows in found for row in rows))
    layers: list[Any] = []
    for side, rows in found:
        data, where = marks.source(rows), {"x": x.encode(alt.X, "x"), "y": y.encode(alt.Y, "n")}
        style = STYLES.get(side, "band")
        if side == "tuned":
            layers.append(
                data.mark_line(style=style, interpolate="step-after", strokeWidth=2).encode(**where)
            )
        else:
            layers.append(data.mark_area(style=style, interpolate="step-after", opacity=0.35).encode(**where))
        tips = marks.tips(("side:N", "model", ""), ("n:Q", "latents", ",d"))
        hover = data.mark_rect(opacity=0)
        layers.append(hover.encode(**where, x2="x2:Q", y2="none:Q", tooltip=tips))
    never = "; ".join(f"{_side(row)}: {count(dig(row, 'density', 'never'))}" for row in models)
    return Chart(
        "evaluation-density",
        "How often latents fire",
        f"latents by the share of tokens on which they fire. Never: {never}.",
        alt.layer(*layers),
        260,
        spoken=f"never fire: {never}",
    )


def recovered_chart(models: Sequence[Mapping[str, Any]]) -> Chart | None:
    """CE and KL recovered of each model against both baselines, with intervals."""
    rows: list[Row] = []
    for row in models:
        for key, name in (("ce_recovered", "CE"), ("kl_recovered", "KL")):
            for baseline in ("zero", "mean"):
                value = rounded(dig(row, "splice", key, baseline))
                if value is not None:
                    low, high = ends(row, "splice", f"{key}_ci", baseline)
                    title = f"{_side(row)}, {name}, {baseline}"
                    rows.append({"name": title, "value": value, "lo": low, "hi": high})
    if not rows:
        return None
    found = marks.known(rows, keys=("value", "lo", "hi"))
    x = Axis("share recovered", ".1~%", domain=marks.span([*found, 1.0], zero=min(found) < 0.5, most=2.0))
    order = [row["name"] for row in rows]
    return Chart(
        "evaluation-recovered",
        "Recovered",
        "of what an ablated site costs, in loss (CE) and in predictions (KL), against both ablations; with intervals.",
        alt.layer(marks.rule_x(1.0), *marks.whiskers(rows, x, order)),
        28 * len(rows) + 40,
        spoken="; ".join(f"{row['name']} {row['value']:.1%}" for row in rows),
    )


def _table(models: Sequence[Mapping[str, Any]]) -> Table | None:
    rows = []
    for row in models:
        splice = mapping(row.get("splice"))
        low, high = ends(row, "fve_ci")
        ce, kl = mapping(splice.get("ce")), mapping(splice.get("kl"))
        rows.append(
            {
                "side": _side(row),
                "fve": rounded(row.get("fve")),
                "lo": low,
                "hi": high,
                **{key: rounded(row.get(key)) for key in ("l0", "dead_share", "norm_ratio", "cosine")},
                **{f"ce_{key}": rounded(ce.get(key)) for key in ("original", "spliced", "zero", "mean")},
                "kl": rounded(kl.get("spliced")),
            }
        )
    if not rows:
        return None
    columns = [
        Column("side", "model"),
        Column("fve", "FVE", "number", interval=("lo", "hi")),
        Column("l0", "L0", "number", "active per token", 1),
        Column("dead_share", "dead", "share", digits=1),
        Column("norm_ratio", "norm ratio", "number"),
        Column("cosine", "cosine", "number"),
        Column("ce_original", "CE", "number", "nats per token, as it is"),
        Column("ce_spliced", "CE spliced", "number"),
        Column("ce_zero", "CE, zero", "number", "ablated"),
        Column("ce_mean", "CE, mean", "number", "ablated"),
        Column("kl", "KL spliced", "number"),
    ]
    kept = [column for column in columns if any(row.get(column.key) is not None for row in rows)]
    return Table("evaluation", "Reconstruction", kept, rows)
