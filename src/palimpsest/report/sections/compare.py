"""Diffs of one pair side by side: what each method finds, what each recovers, and whether its rankings find causes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt

from palimpsest.report.display import count, decimal, finite, percent, visible
from palimpsest.report.parts import Chart, Column, Figures, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.diff_charts import ranking_name
from palimpsest.report.sections.diff_tables import PLACES
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import (
    Row,
    dig,
    ends,
    figure,
    mapping,
    notes,
    rounded,
    rows_of,
    share_text,
    slug,
    summary,
)

BASELINES = {"mean": "one mean vector", "template": "difference at template tokens", "raw": "true difference"}


def sections(run: Run) -> list[Section]:
    """The sections of a comparison of diffs."""
    rows = rows_of(run.data.get("rows"))
    charts = [chart for place in PLACES if (chart := _recovered(run, rows, place))]
    return [
        Section(
            "compare",
            "Diffs side by side",
            "verdict",
            run=run.name,
            lead=_lead(run, rows),
            verdict=summary(run) or _verdict(rows),
            blocks=[*_figures(rows), *notes(run)],
            methods=[methods.COMPARING],
        ),
        Section(
            "compare-evidence",
            "What each method recovers",
            "evidence",
            run=run.name,
            blocks=[*charts, *([chart] if (chart := _halves_chart(run, rows)) else [])],
            methods=[methods.PATCHING],
        ),
        Section(
            "compare-tables",
            "What each method finds",
            "tables",
            run=run.name,
            blocks=[_found_table(run, rows), *_halves_table(run, rows)],
        ),
    ]


def _name(row: Mapping[str, Any]) -> str:
    return visible(row.get("name") or "diff", 40)


def _lead(run: Run, rows: Sequence[Mapping[str, Any]]) -> str:
    site = run.data.get("site")
    where = f" at {visible(site, 60)}" if site else ""
    return f"{count(len(rows))} diffs of one pair{where}, each through a dictionary of its own."


def _verdict(rows: Sequence[Mapping[str, Any]]) -> str:
    """The comparison in a sentence: what is found new, and which method recovers most."""
    shares = [
        (share, _name(row)) for row in rows if (share := figure(row, "recovered", "all", "share")) is not None
    ]
    news = [(surviving, row) for row in rows if (surviving := finite(row.get("surviving"))) is not None]
    parts = []
    if shares:
        best, worst = max(shares), min(shares)
        parts.append(
            f"{best[1]} recovers most of the KL ({percent(best[0])}), {worst[1]} least ({percent(worst[0])})"
        )
    cross = [
        f"{_name(row)} {count(surviving)} (null {_null(row)})"
        for surviving, row in news
        if row.get("method") == "crosscoder"
    ]
    if cross:
        parts.append("latents that survive as new: " + ", ".join(cross))
    return "; ".join(parts) + "." if parts else ""


def _null(row: Mapping[str, Any]) -> str:
    null = finite(row.get("null"))
    return "not measured" if null is None else decimal(null, 1)


def _figures(rows: Sequence[Mapping[str, Any]]) -> list[Figures]:
    items = []
    for row in rows:
        whole = dig(row, "recovered", "all")
        if finite(dig(whole, "share")) is None:
            continue
        kind = f"{visible(row.get('method') or '', 30)}, {visible(row.get('activation') or '', 30)}"
        items.append((_name(row), share_text(dig(whole, "share"), dig(whole, "ci")), f"of the KL; {kind}"))
    return [Figures(items)] if items else []


def _recovered(run: Run, rows: Sequence[Mapping[str, Any]], place: str) -> Chart | None:
    drawn: list[Row] = []
    for row in rows:
        whole = dig(row, "recovered", place)
        low, high = ends(whole, "ci")
        drawn.append({"name": _name(row), "value": rounded(dig(whole, "share")), "lo": low, "hi": high})
    drawn = [row for row in drawn if row["value"] is not None]
    if not drawn:
        return None
    levels = [
        (share, BASELINES.get(str(one.get("set")), visible(one.get("set"), 30)))
        for one in rows_of(run.data.get("baselines"))
        if one.get("positions") == place and (share := finite(one.get("share"))) is not None
    ]
    values = marks.known(drawn, keys=("value", "lo", "hi")) + [value for value, _ in levels]
    x = Axis(
        "share of the KL recovered by all latents and the bias", ".0%", domain=marks.span(values, most=2.0)
    )
    order = [row["name"] for row in drawn]
    lines: list[Any] = [marks.rule_x(value, "zero", (5, 3)) for value, _ in levels]
    layers = [marks.rule_x(0.0), *lines, *marks.whiskers(drawn, x, order, "tuned")]
    listed = ", ".join(f"{name} {percent(value)}" for value, name in sorted(levels))
    gap = figure(run.data, "gap", place)
    nats = "" if gap is None else f" The gap is {gap:.4f} nats per prediction."
    return Chart(
        slug("compare-kl", place),
        f"KL recovered at {PLACES[place]}",
        f"with intervals over documents.{nats}"
        + (f" Dashed, without a dictionary: {listed}." if listed else ""),
        alt.layer(*layers),
        34 * len(drawn) + 40,
        spoken="; ".join(f"{row['name']} {row['value']:.1%}" for row in drawn),
    )


def _halves(rows: Sequence[Mapping[str, Any]], place: str = "all") -> list[Row]:
    found: list[Row] = []
    for row in rows:
        for half in rows_of(row.get("halves")):
            low, high = ends(half, "best_ci")
            null = ends(half, "random_range")
            found.append(
                {
                    "diff": _name(row),
                    "ranking": ranking_name(str(half.get("ranking"))),
                    "positions": PLACES.get(str(half.get("positions")), visible(half.get("positions"), 40)),
                    "size": half.get("size"),
                    "value": rounded(half.get("best")),
                    "lo": low,
                    "hi": high,
                    "worst": rounded(half.get("worst")),
                    "random": rounded(half.get("random")),
                    "null_lo": null[0],
                    "null_hi": null[1],
                    "directions": rounded(half.get("directions")),
                    "at": half.get("positions"),
                }
            )
    return [row for row in found if row["at"] == place] if place else found


def _halves_chart(run: Run, rows: Sequence[Mapping[str, Any]]) -> Chart | None:
    drawn = [
        {**row, "name": row["diff"]}
        for row in _halves(rows)
        if row["ranking"] == ranking_name("attribution") and row["value"] is not None
    ]
    if not drawn:
        return None
    values = marks.known(drawn, keys=("value", "lo", "hi", "null_lo", "null_hi", "worst"))
    x = Axis("share of the KL recovered", ".0%", domain=marks.span(values, most=2.0))
    order = [row["name"] for row in drawn]
    keys = ("name", "value", "lo", "hi", "null_lo", "null_hi", "worst")
    slim = [{key: row[key] for key in keys} for row in drawn]
    data = marks.source(slim).mark_point(style="estimate", shape="circle", size=55)
    worst = data.encode(x=x.encode(alt.X, "worst"), y=marks.names_axis(order))
    layers = [marks.rule_x(0.0), *marks.whiskers(slim, x, order, "tuned"), worst]
    return Chart(
        "compare-halves",
        "Does attribution find causes?",
        "the latents of largest causal share, with intervals; open circle: the next as many; grey bar: random "
        "sets of the same weight.",
        alt.layer(*layers),
        34 * len(drawn) + 40,
        spoken="; ".join(f"{row['name']} {row['value']:.1%}" for row in drawn),
    )


def _found_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> Table:
    listed = []
    for row in rows:
        stability, fve = mapping(row.get("stability")), mapping(row.get("fve"))
        plain = (
            "method",
            "activation",
            "latents",
            "k",
            "l0",
            "trained_tokens",
            "raw",
            "surviving",
            "null",
            "sensitivity",
        )
        listed.append(
            {
                "name": _name(row),
                **{key: row.get(key) for key in plain},
                **{f"fve_{side}": rounded(fve.get(side)) for side in ("base", "tuned", "difference")},
                "stable": rounded(stability.get("alive")),
                "train": row.get("train_seconds"),
                "read": row.get("diff_seconds"),
            }
        )
    columns = [
        Column("name", "diff"),
        Column("method", "method"),
        Column("activation", "activation"),
        Column("latents", "latents", "count"),
        Column("l0", "L0", "number", "active per token", 1),
        Column("fve_base", "FVE base", "number", side="base"),
        Column("fve_tuned", "FVE tuned", "number", side="tuned"),
        Column("fve_difference", "FVE difference", "number"),
        Column("raw", "look tuned-only", "count"),
        Column("surviving", "survive", "count"),
        Column("null", "null", "number", "survive in null pairs", 1),
        Column("sensitivity", "rule would pass", "share", "positive control", 0),
        Column("stable", "stability", "number", "cosine with its twin", 2),
        Column("trained_tokens", "trained on", "count", "tokens"),
        Column("train", "training", "count", "seconds"),
        Column("read", "diff", "count", "seconds"),
    ]
    caption = "Read survivors beside the null: the raw count depends on the recipe more than on the models."
    return Table("compare-found", "Each diff", columns, listed, caption)


def _halves_table(run: Run, rows: Sequence[Mapping[str, Any]]) -> list[Table]:
    listed = _halves(rows, "")
    if not listed:
        return []
    columns = [
        Column("diff", "diff"),
        Column("ranking", "ranking"),
        Column("positions", "measured at"),
        Column("size", "latents", "count"),
        Column("value", "strongest", "share", "of the KL", 1, ("lo", "hi")),
        Column("worst", "the next", "share", digits=1),
        Column("random", "random sets", "share", "of the same weight", 1, ("null_lo", "null_hi")),
        Column("directions", "random directions", "share", digits=1),
    ]
    title = "Do the rankings find causes?"
    return [Table("compare-halves", title, columns, listed)]
