"""Steering as sections: what the models write side by side, and what each strength costs."""

from __future__ import annotations

from typing import Any

from palimpsest.report.display import finite, visible, visible_token
from palimpsest.report.parts import Block, Column, Figures, Prose, Run, Section, Table, Template
from palimpsest.report.sections import methods
from palimpsest.report.sections.reading import (
    Row,
    ends,
    figure,
    notes,
    number_text,
    rounded,
    rows_of,
    summary,
    words_of,
)
from palimpsest.report.sections.steer_charts import WATCHED, cost_chart, strengths_of, watch_charts

_PROMPTS, _TEXT = 40, 4000


def sections(run: Run) -> list[Section]:
    """The sections of a steering run."""
    charts = [cost_chart(run, *one) for one in (("perplexity_ratio", "Perplexity"), ("kl", "KL"))]
    charts += watch_charts(run)
    drawn: list[Block] = [chart for chart in charts if chart is not None]
    if not drawn:
        text = "What each strength costs was not measured: without it nobody knows when the model broke."
        command = "palimpsest steer BASE TUNED --dictionary DICT --latent CHANGE --sweep 0 1 2 --corpus FILE --out RUN"
        drawn = [Prose([text], "empty", command)]
    prompts = _prompts(run)
    beside = Template("side_by_side.html.j2", {"prompts": prompts})
    return [
        Section(
            "steer",
            "What happens when latents are turned",
            "verdict",
            run=run.name,
            lead=_lead(run),
            verdict=summary(run),
            blocks=[*([Figures(items)] if (items := _figures(run)) else []), *_beyond(run), *notes(run)],
            methods=[methods.STEERING],
        ),
        Section("steer-cost", "What each strength costs", "evidence", run=run.name, blocks=drawn),
        Section(
            "steer-texts",
            "Side by side",
            "latents",
            run=run.name,
            lead="The same prompt and seed for every model." if prompts else "",
            blocks=[beside] if prompts else [Prose(["Nothing was written: no prompt was given."], "note")],
        ),
        *_tables(run),
    ]


def changes_text(changes: Any) -> str:
    """Changes as they are written on the command line."""
    parts = []
    for one in rows_of(changes):
        value = finite(one.get("value"))
        mode = visible(one.get("mode") or "", 20)
        parts.append(f"{visible(one.get('latent'), 20)}:{mode}" + ("" if value is None else f"={value:g}"))
    return " ".join(parts).replace("-", "−")


def _lead(run: Run) -> str:
    side, site = run.data.get("side"), run.data.get("site")
    changes = changes_text(run.data.get("changes"))
    what = f"{changes} in the {visible(side, 20)} model" if changes and side else changes
    return f"{what} at {visible(site, 60)}." if what and site else what


def _figures(run: Run) -> list[tuple[str, str, str]]:
    items = []
    largest, ratio = figure(run.data, "guard", "largest_ok"), figure(run.data, "guard", "ratio")
    if ratio is not None and rows_of(run.data.get("sweep")):
        shown = "none" if largest is None else f"{largest:g}"
        items.append(
            (
                "largest strength within the guard",
                shown,
                f"1 is the change itself; perplexity below {ratio:g} times",
            )
        )
    own = "tuned" if run.data.get("side") == "tuned" else "base"
    prompts = rows_of(run.data.get("prompts"))
    if prompts:
        changed = sum(row.get("steered") != row.get(own) for row in prompts)
        items.append(
            ("continuations that change", f"{changed} of {len(prompts)}", f"beside the {own} model's own")
        )
    for row in rows_of(run.data.get("watch"))[:WATCHED]:
        if finite(row.get("change")) is not None:
            text = number_text(row.get("change"), digits=2, signed=True)
            items.append(
                (
                    f"log-probability of “{visible_token(row.get('text') or '')}”",
                    text,
                    "nats, mean over prompts",
                )
            )
    return items


def _beyond(run: Run) -> list[Prose]:
    """A warning where the continuations were written beyond the guard; strength 1 is the change that wrote them."""
    own = next((row for row in rows_of(run.data.get("sweep")) if finite(row.get("strength")) == 1), {})
    if own.get("ok") is not False:
        return []
    ratio = number_text(own.get("perplexity_ratio"), own.get("perplexity_ratio_ci"), 2)
    text = (
        f"The continuations were written beyond the guard, at {ratio} times the perplexity: they may show a broken "
        "model as much as the latent."
    )
    return [Prose([text], "callout")]


def _prompts(run: Run) -> list[dict[str, Any]]:
    side = "tuned" if run.data.get("side") == "tuned" else "base"
    found = []
    for row in rows_of(run.data.get("prompts"))[:_PROMPTS]:
        texts = []
        for key in ("base", "tuned", "steered"):
            if row.get(key) is not None:
                style = f"steered {side}" if key == "steered" else key
                name = f"{side}, steered" if key == "steered" else key
                texts.append({"name": name, "style": style, "text": written(row[key])})
        found.append({"prompt": written(row.get("prompt") or ""), "texts": texts})
    return found


def written(text: Any) -> list[str]:
    """A continuation as lines in which nothing hides; line ends stay line ends."""
    return [visible(line, 1000) for line in str(text)[:_TEXT].split("\n")]


def _tables(run: Run) -> list[Section]:
    rows = []
    for one in strengths_of(run):
        (low, high), (kl_low, kl_high) = ends(one, "perplexity_ratio_ci"), ends(one, "kl_ci")
        rows.append(
            {
                "strength": one.get("strength"),
                "loss": rounded(one.get("loss")),
                "ratio": rounded(one.get("perplexity_ratio")),
                "lo": low,
                "hi": high,
                "kl": rounded(one.get("kl")),
                "kl_lo": kl_low,
                "kl_hi": kl_high,
                "ok": bool(one.get("ok")),
                "text": next(iter(words_of(one.get("texts"))), None),
            }
        )
    controls = _control_rows(run)
    blocks: list[Block] = []
    if rows:
        columns = [
            Column("strength", "strength", "number", digits=2),
            Column("loss", "loss", "number", "nats per token", 4),
            Column("ratio", "perplexity", "number", "over the unsteered", 3, ("lo", "hi")),
            Column("kl", "KL", "number", "nats per token", 4, ("kl_lo", "kl_hi")),
            Column("ok", "within the guard"),
            Column("text", "first continuation"),
        ]
        blocks.append(Table("steer-sweep", "Strengths", columns, rows))
    if controls:
        columns = [
            Column("latent", "latent", "latent"),
            Column("role", "what it is"),
            Column("rate", "fires", "share", digits=1),
            Column("mean", "mean", "number", "where it fires", 2),
            Column("norm", "decoder norm", "number", digits=2),
        ]
        blocks.append(Table("steer-controls", "Changed latents and their controls", columns, controls))
    if not blocks:
        return []
    return [Section("steer-tables", "Strengths and controls", "tables", run=run.name, blocks=blocks)]


def _control_rows(run: Run) -> list[Row]:
    rows: list[Row] = []
    for one in rows_of(run.data.get("controls")):
        role = f"control of {visible(one.get('latent'), 20)}"
        for row, name in ((one, "changed"), *((other, role) for other in rows_of(one.get("matched")))):
            figures = {key: rounded(row.get(key)) for key in ("rate", "mean", "norm")}
            rows.append({"latent": row.get("latent"), "role": name, **figures})
    return rows
