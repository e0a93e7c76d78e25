"""What an adapter does to latents as sections: how few carry it, whether they cause it, and whether it is chance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from palimpsest.report.display import count, decimal, finite, pair_of, percent, visible
from palimpsest.report.parts import Block, Figures, Prose, Run, Section
from palimpsest.report.sections import methods
from palimpsest.report.sections.explain_charts import (
    agreement_charts,
    concentration_chart,
    curve_chart,
    specificity_chart,
)
from palimpsest.report.sections.explain_tables import latent_table, moved_tables, pruned_table
from palimpsest.report.sections.reading import (
    dig,
    figure,
    in_full,
    items_of,
    mapping,
    notes,
    number_text,
    rows_of,
    share_text,
    slug,
    summary,
    table_of,
)

Item = tuple[str, str, str]


def sections(run: Run) -> list[Section]:
    """The sections of an explained adapter, or of two that were compared."""
    if run.stage == "explain-compare":
        return compare_sections(run)
    table = table_of(run, "latents.parquet")
    charts = [curve_chart(run, "keep"), curve_chart(run, "ablate"), concentration_chart(run, table)]
    checks = [specificity_chart(run), *agreement_charts(run)]
    latents = latent_table(run, table)
    return [
        Section(
            "explain",
            "What the adapter does to latents",
            "verdict",
            run=run.name,
            lead=_lead(run),
            verdict=_verdict(run) or summary(run),
            blocks=[Figures(_figures(run)), *in_full(run), *notes(run)],
            methods=[methods.EXPLAINING],
        ),
        _evidence(run, "explain-curves", "How few latents carry it?", charts, pruned_table(run)),
        _evidence(run, "explain-controls", "More than chance?", checks, None),
        *(
            [
                Section(
                    "explain-table",
                    "Latents of the adapter",
                    "latents",
                    run=run.name,
                    blocks=[latents],
                )
            ]
            if latents
            else []
        ),
    ]


def compare_sections(run: Run) -> list[Section]:
    """The sections of two adapters that were compared."""
    both = [visible(one, 80) for one in items_of(run.data.get("adapters"))]
    lead = f"{both[0]} beside {both[1]}, through the same dictionaries." if len(both) == 2 else ""
    agreement = agreement_charts(run, {"agreement": "the two adapters"})
    return [
        Section(
            "explain-compare",
            "Two adapters",
            "verdict",
            run=run.name,
            lead=lead,
            verdict=summary(run),
            blocks=[Figures(_compared(run)), *notes(run)],
            methods=[methods.EXPLAINING],
        ),
        _evidence(run, "explain-compare-agreement", "Do the two adapters agree?", agreement, None),
        Section(
            "explain-compare-latents",
            "Latents that moved in one and not in the other",
            "latents",
            run=run.name,
            blocks=moved_tables(run),
        ),
    ]


def _evidence(run: Run, key: str, title: str, charts: list[Any], table: Any) -> Section:
    blocks: list[Block] = [one for one in (*charts, table) if one is not None]
    if not blocks:
        text = {
            "explain-curves": "The change of the objective could not be told from zero, so there are no shares.",
            "explain-controls": "Nothing was given to hold this against: another seed, other data, shuffled data.",
        }.get(key, "This was not measured.")
        command = (
            "palimpsest explain ADAPTER --corpus FILE --general FILE --twin ADAPTER --other ADAPTER --out RUN"
        )
        blocks = [Prose([text], "empty", command)]
    return Section(slug(key), title, "evidence", run=run.name, blocks=blocks)


def _lead(run: Run) -> str:
    texts = [
        f"{visible(row.get('name'), 40)} ({count(row.get('documents'))} documents)"
        for row in rows_of(run.data.get("corpora"))
    ]
    component = visible(run.data.get("component") or "latent", 30)
    read = f", read on {', '.join(texts)}" if texts else ""
    return f"A {component} adapter{read}."


def _verdict(run: Run) -> str:
    """What the adapter does and how few latents carry it, in a sentence."""
    objective, few = mapping(run.data.get("objective")), mapping(run.data.get("concentration"))
    change, half = finite(objective.get("difference")), finite(few.get("half"))
    if change is None or half is None:
        return ""
    unit = visible(objective.get("unit") or "nats", 60)
    verb = "lowers" if change >= 0 else "raises"
    verb = (
        f"{verb} its objective" if objective.get("present", True) else "does not clearly change its objective"
    )
    text = f"The adapter {verb} (by {_lowered(objective)} {unit}); "
    text += f"{count(half)} of {count(few.get('moved'))} moved latents hold half of its effect"
    pruned = mapping(run.data.get("pruned"))
    if finite(pruned.get("n")) is not None:
        kept, random = share_text(pruned.get("share"), pruned.get("ci")), finite(pruned.get("random_n"))
        text += f", and {count(pruned.get('n'))} keep {kept} of what it does"
        text += "" if random is None else f" (random orders need {count(random)})"
    return f"{text}."


def _lowered(objective: Mapping[str, Any]) -> str:
    """By how much the objective falls. The sign is told by the word; below zero it rises, and the words say so."""
    change, pair = finite(objective.get("difference")) or 0.0, pair_of(objective.get("ci"))
    # What rises by a number has that number's interval, its ends turned round.
    interval = pair if pair is None or change >= 0 else (-pair[1], -pair[0])
    return number_text(abs(change), interval, 4)


def _figures(run: Run) -> list[Item]:
    data = run.data
    objective, few = mapping(data.get("objective")), mapping(data.get("concentration"))
    items: list[Item] = []
    if finite(objective.get("difference")) is not None:
        text = _lowered(objective)
        unit = visible(objective.get("unit") or "", 60)
        present = "" if objective.get("present", True) else "cannot be told from 0; "
        verb = "lowers" if float(objective["difference"]) >= 0 else "raises"
        items.append((f"{verb} its objective by", text, f"{present}{unit}"))
    if finite(few.get("half")) is not None:
        beside = f"{count(few.get('most'))} hold 90%; {count(few.get('moved'))} moved"
        items.append(("half of the effect in", f"{count(few.get('half'))} latents", beside))
    pruned = mapping(data.get("pruned"))
    if finite(pruned.get("n")) is not None:
        kept = share_text(pruned.get("share"), pruned.get("ci"))
        needed = [("by size", pruned.get("magnitude_n")), ("at random", pruned.get("random_n"))]
        others = ", ".join(f"{count(n)} {name}" for name, n in needed if finite(n) is not None)
        items.append(
            (f"{count(pruned.get('n'))} latents keep", kept, f"{others} for as much" if others else "")
        )
    ratio = figure(data, "specificity", "top", "ratio")
    if ratio is not None:
        text = number_text(ratio, dig(data, "specificity", "top", "ci"), 2)
        shuffled = figure(data, "specificity", "permuted", "ratio")
        beside = "" if shuffled is None else f"shuffled values: {decimal(shuffled, 2)}"
        p = figure(data, "specificity", "p")
        beside += f", p {decimal(p, 3)}" if beside and p is not None else ""
        items.append(("top latents fire more on its data", f"× {text}", beside))
    return items


def _compared(run: Run) -> list[Item]:
    names = {
        "only_a": "only in the first",
        "only_b": "only in the second",
        "both": "in both",
        "opposite": "in opposite directions",
    }
    counts = mapping(run.data.get("counts"))
    items = [(names.get(key, visible(key, 30)), count(n), "latents moved") for key, n in counts.items()]
    overlap = figure(run.data, "agreement", "overlap")
    if overlap is not None:
        top = count(dig(run.data, "agreement", "top_n"))
        items.append(("shared top latents", percent(overlap, 0), f"of the {top} of largest effect"))
    return items
