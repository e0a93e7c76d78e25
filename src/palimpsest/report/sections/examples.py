"""A folder of examples as sections: what is alive, how often it fires in both models, and the latents that differ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import numpy as np
import pyarrow as pa

from palimpsest.report.display import count, finite, percent, visible
from palimpsest.report.parts import Block, Chart, Column, Figures, Prose, Run, Section, Table
from palimpsest.report.sections import marks, methods
from palimpsest.report.sections.marks import Axis
from palimpsest.report.sections.reading import INLINE, Row, mapping, notes, rounded, summary, table_of

SIDES = ("base", "tuned")
LOWEST = -6.0
"""Rates below a millionth stand at the left end."""
_BINS = 36


def sections(run: Run, labels: Mapping[int, Mapping[str, Any]] | None = None) -> list[Section]:
    """The sections of an examples folder.

    Args:
        run: A folder of stage `examples`.
        labels: What is known of latents by number: `label`, `score`, `score_lo`, `score_hi`, from labels folders.
    """
    table = table_of(run, "latents.parquet")
    charts = [density_chart(run, table), rates_chart(run, table)]
    blocks: list[Block] = [chart for chart in charts if chart is not None]
    latents = latent_table(run, table, labels or {})
    if not blocks:
        blocks = [
            Prose(
                ["No latent fired on this text."],
                "empty",
                "palimpsest examples BASE TUNED --dictionary DICT --corpus FILE --out RUN",
            )
        ]
    made = [
        Section(
            "examples",
            "Where latents fire",
            "evidence",
            run=run.name,
            lead=_lead(run),
            blocks=[Figures(_figures(run, table)), *blocks, *notes(run)],
            methods=[methods.EXAMPLES],
        )
    ]
    if latents is not None:
        made.append(
            Section(
                "examples-latents",
                "Latents that differ between the models",
                "latents",
                run=run.name,
                blocks=[latents],
            )
        )
    return made


def _lead(run: Run) -> str:
    signals = mapping(run.data.get("signals"))
    words = visible(signals.get("value") or "", 200)
    return " ".join(
        part for part in (summary(run), f"Examples were chosen by: {words}" if words else "") if part
    )


def numbers(table: pa.Table | None, name: str) -> np.ndarray:
    """A column as floats, NaN where it is null; empty where it does not exist."""
    if table is None or name not in table.column_names:
        return np.full(0 if table is None else table.num_rows, np.nan)
    try:
        return np.asarray(table[name].to_numpy(zero_copy_only=False), float)
    except (TypeError, ValueError):
        return np.full(table.num_rows, np.nan)


def _known(table: pa.Table | None, name: str) -> bool:
    return bool(np.isfinite(numbers(table, name)).any())


def _figures(run: Run, table: pa.Table | None) -> list[tuple[str, str, str]]:
    data = run.data
    total, alive = finite(data.get("latents")), finite(data.get("alive"))
    items = []
    if alive is not None:
        share = "" if not total else f"of {count(total)}, {percent(alive / total)}"
        items.append(("alive latents", count(alive), share))
    corpora = mapping(data.get("corpora"))
    items.append(("tokens read", count(data.get("tokens")), ", ".join(visible(name, 30) for name in corpora)))
    for side, other in (("tuned", "base"), ("base", "tuned")):
        own, rest = numbers(table, f"rate_{side}"), numbers(table, f"rate_{other}")
        if np.isfinite(own).any() and np.isfinite(rest).any():
            items.append(
                (f"fire in {side} alone", count(int(((own > 0) & (rest == 0)).sum())), "on this text")
            )
    return items


def _log(rates: np.ndarray) -> np.ndarray:
    known = rates[np.isfinite(rates) & (rates > 0)]
    return np.clip(np.log10(known), LOWEST, 0.0)


def density_chart(run: Run, table: pa.Table | None) -> Chart | None:
    """How many latents fire how often, base as an area and tuned as a line."""
    sides = [side for side in SIDES if _known(table, f"rate_{side}")]
    listed = [(side, numbers(table, f"rate_{side}"), side) for side in sides] or [
        ("latents", numbers(table, "rate"), "band")
    ]
    layers: list[Any] = []
    x = Axis("share of tokens, log10", ".1~f", domain=(LOWEST, 0.0))
    found = [(name, logs, style) for name, rates, style in listed if len(logs := _log(rates))]
    drawn = {name: marks.steps(logs, LOWEST, 0.0, _BINS) for name, logs, _ in found}
    y = marks.counts_axis("latents", max((row["n"] for rows in drawn.values() for row in rows), default=1))
    spoken = []
    for name, logs, style in found:
        rows = [{**row, "side": name} for row in drawn[name]]
        spoken.append(f"{name}: half fire on more than {10 ** float(np.median(logs)):.2%} of the tokens")
        data = marks.source(rows)
        where = {"x": x.encode(alt.X, "x"), "y": y.encode(alt.Y, "n")}
        tips = marks.tips(
            ("side:N", "model", ""), ("n:Q", "latents", ",d"), ("x:Q", "from", ".2f"), ("x2:Q", "to", ".2f")
        )
        if style == "tuned":
            layers.append(
                data.mark_line(style=style, interpolate="step-after", strokeWidth=2).encode(**where)
            )
        else:
            area = data.mark_area(style=style, interpolate="step-after", opacity=0.3)
            layers.append(area.encode(**where))
        bar = data.mark_rect(opacity=0).encode(**where, x2="x2:Q", y2="none:Q", tooltip=tips)
        layers.append(bar)
    if not layers:
        return None
    words = "filled: base, line: tuned; " if len(sides) == 2 else ""
    return Chart(
        "examples-density",
        "How often latents fire",
        f"{words}latents that never fire are not drawn.",
        alt.layer(*layers),
        270,
        spoken="; ".join(spoken),
    )


def rates_chart(run: Run, table: pa.Table | None) -> Chart | None:
    """How often each latent fires in the base and in the tuned model, counted in cells."""
    base, tuned = (numbers(table, f"rate_{side}") for side in SIDES)
    both = np.isfinite(base) & np.isfinite(tuned)
    if not both.any():
        return None
    floor = LOWEST - 0.5
    across, up = (
        np.where(one[both] > 0, np.log10(np.maximum(one[both], 1e-9)), floor) for one in (base, tuned)
    )
    cells = marks.binned(across.tolist(), up.tolist(), (floor, 0.0), (floor, 0.0))
    silent = [row for row in cells if row["x"] <= floor or row["y"] <= floor]
    rest, most = [row for row in cells if row not in silent], max(row["n"] for row in cells)
    ticks = [-6.0, -5.0, -4.0, -3.0, -2.0, -1.0, 0.0]
    x = Axis("share of tokens in the base, log10", ".1~f", domain=(floor, 0.0), values=ticks)
    y = Axis("share of tokens in the tuned model, log10", ".1~f", domain=(floor, 0.0), values=ticks)
    line = marks.source([{"x": LOWEST, "y": LOWEST}, {"x": 0.0, "y": 0.0}]).mark_line(
        style="zero", strokeDash=[4, 3]
    )
    most = max(row["n"] for row in cells)
    layers = [line.encode(x=x.encode(alt.X, "x"), y=y.encode(alt.Y, "y"))]
    layers.append(marks.density(rest, x, y, most=most))
    for side, key in (("tuned", "x"), ("base", "y")):
        edge = [row for row in silent if row[key] <= floor]
        if edge:
            layers.append(marks.density(edge, x, y, side, most))
    named = [
        {"x": floor + 0.9, "y": -0.35, "label": "tuned only"},
        {"x": -0.9, "y": floor + 0.55, "label": "base only"},
    ]
    for row, side in zip(named, ("tuned", "base"), strict=True):
        text = marks.source([row]).mark_text(style=side, fontSize=11, fontWeight=600)
        layers.append(text.encode(x="x:Q", y="y:Q", text="label:N"))
    return Chart(
        "examples-rates",
        "Base against tuned",
        f"{int(both.sum()):,} latents counted in cells, darker for more; on the line a latent fires as often in "
        "both. The cells at the edges fire in one model alone.",
        alt.layer(*layers),
        320,
        spoken=f"{int(both.sum())} latents by how often they fire in each model",
    )


def differing(table: pa.Table | None, tokens: float | None = None) -> np.ndarray:
    """Places of the latents in the order of how much they differ between the models, the largest first.

    By the difference of the two rates over its noise where tokens were independent: for an order only. Where one
    signal alone is known, by how often latents fire.
    """
    base, tuned = (numbers(table, f"rate_{side}") for side in SIDES)
    if not np.isfinite(base).any() or not np.isfinite(tuned).any():
        strength = np.nan_to_num(numbers(table, "rate"))
    else:
        strength = np.abs(np.nan_to_num(distance(base, tuned, tokens)))
    return np.argsort(-strength, kind="stable")


def distance(base: np.ndarray, tuned: np.ndarray, tokens: float | None) -> np.ndarray:
    """The difference of two rates over its noise."""
    noise = np.sqrt(np.maximum(base + tuned, 1e-12) / (tokens or 1.0))
    return (tuned - base) / noise


def latent_table(run: Run, table: pa.Table | None, labels: Mapping[int, Mapping[str, Any]]) -> Table | None:
    """The 2,000 latents that differ most between the models, with their words."""
    if table is None or "latent" not in table.column_names or table.num_rows == 0:
        return None
    tokens = finite(run.data.get("tokens"))
    base, tuned = (numbers(table, f"rate_{side}") for side in SIDES)
    order = differing(table, tokens)[:INLINE]
    found = distance(base, tuned, tokens)[order]
    kept = [name for name in _NEEDED if name in table.column_names]
    corpora = [name for name in table.column_names if name.startswith("rate[") and name.endswith("]")]
    rows = [
        _row(raw, labels.get(raw["latent"]) or {}, z)
        for raw, z in zip(
            table.select([*kept, *corpora]).take(pa.array(order)).to_pylist(), found, strict=True
        )
    ]
    columns = [column for column in _columns(corpora) if column.key == "latent" or _filled(rows, column.key)]
    two = any(row["z"] is not None for row in rows)
    what = "that differ most between the models" if two else "that fire most often"
    caption = (
        f"The {len(rows):,} latents {what}, of {table.num_rows:,} alive ones; latents.parquet holds all."
    )
    title = "Latents that differ between the models" if two else "Latents"
    return Table("examples-latents", title, columns, rows, caption, total=table.num_rows)


_NEEDED = (
    "latent",
    *(f"{kind}_{side}" for side in SIDES for kind in ("rate", "mean")),
    "rate",
    "mean_value",
    "tokens",
    "promoted_base",
    "promoted_tuned",
    "decoder_cosine",
)


def _filled(rows: Sequence[Row], key: str) -> bool:
    return any(row.get(key) not in (None, [], "") for row in rows)


def _row(raw: Row, label: Mapping[str, Any], z: float) -> Row:
    row: Row = {key: rounded(value) if isinstance(value, float) else value for key, value in raw.items()}
    promoted = row.pop("promoted_tuned", None) or row.get("promoted_base")
    row.pop("promoted_base", None)
    row |= {"promoted": (promoted or [])[:6], "tokens": (row.get("tokens") or [])[:6], "z": rounded(z, 3)}
    return row | {"label": label.get("label"), **{key: rounded(label.get(key), 3) for key in _SCORES}}


_SCORES = ("score", "score_lo", "score_hi")


def _columns(corpora: Sequence[str]) -> list[Column]:
    return [
        Column("latent", "latent", "latent"),
        Column("label", "label"),
        Column("score", "label score", "number", "balanced accuracy", 2, ("score_lo", "score_hi")),
        Column("z", "difference", "number", "of the rates over its noise, for the order only", 1),
        Column("rate_base", "fires, base", "share", digits=2, side="base"),
        Column("rate_tuned", "fires, tuned", "share", digits=2, side="tuned"),
        Column("rate", "fires", "share", digits=2),
        Column("mean_base", "mean, base", "number", "where it fires", 2, side="base"),
        Column("mean_tuned", "mean, tuned", "number", "where it fires", 2, side="tuned"),
        Column("tokens", "fires on", "words", "tokens above their frequency"),
        Column("promoted", "promotes", "words", "through the model's head"),
        Column("decoder_cosine", "cosine", "number", "of the two decoder rows", 2),
        *(Column(name, f"on {name[5:-1]}", "share", digits=2) for name in corpora),
    ]
