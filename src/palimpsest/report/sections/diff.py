"""A diff as sections: what is new, whether it causes the change, its latents, and every set that was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.report.display import count, decimal, finite, percent, visible, visible_tail, visible_token
from palimpsest.report.parts import Block, Chart, Figures, Method, Prose, Run, Section, Table, Template
from palimpsest.report.sections import methods
from palimpsest.report.sections.diff_charts import curve_chart, halves_chart, verified_chart
from palimpsest.report.sections.diff_maps import map_charts
from palimpsest.report.sections.diff_tables import PLACES, check_table, latent_table, null_table, set_table
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
    summary,
    table_of,
)

METHOD_NAMES = {
    "crosscoder": "a crosscoder",
    "diff-sae": "a diff-SAE",
    "tuned-sae": "an SAE of the tuned model",
    "base-sae": "an SAE of the base",
}
_BEHAVIOURS, _CONTEXTS = 12, 6
Item = tuple[str, str, str]


def sections(run: Run) -> list[Section]:
    """The sections of a diff.

    Args:
        run: A folder of stage `diff`; keys that an older run lacks are shown as not measured.
    """
    table = table_of(run, run.data.get("latents") or "latents.parquet")
    return [
        _found(run),
        *_new(run, map_charts(run, table)),
        *_causes(run),
        *_latents(run, latent_table(run, table)),
        *_everything(run),
    ]


def _through(run: Run) -> str:
    through = METHOD_NAMES.get(str(run.data.get("method")), "a dictionary")
    site = run.data.get("site")
    corpora = ", ".join(visible(name, 40) for name in mapping(run.data.get("corpora")))
    where = f" at {visible(site, 60)}" if site else ""
    text = f", on {count(run.data.get('tokens'))} tokens of {corpora}" if corpora else ""
    return f"Read through {through}{where}{text}."


def _found(run: Run) -> Section:
    blocks: list[Block] = [Figures(items)] if (items := _figures(run)) else []
    return Section(
        "diff",
        "What the fine-tune made",
        "verdict",
        run=run.name,
        lead=_through(run),
        verdict=_verdict(run) or summary(run),
        blocks=[*blocks, *in_full(run), *notes(run)],
    )


def _verdict(run: Run) -> str:
    """How many latents are new and what recovers the divergence, each with its null, in a sentence."""
    only = mapping(run.data.get("tuned_only"))
    surviving, null = finite(only.get("surviving")), finite(only.get("null"))
    total = figure(run.data, "dictionary", "n_latents")
    if surviving is None:
        return ""
    of = "" if total is None else f" of {count(total)}"
    beside = "no null was given" if null is None else f"null pairs give {decimal(null, 1)}"
    if null is not None and 0 < surviving <= null:
        beside += ", so that none need be"
    verb = "is" if surviving == 1 else "are"
    text = f"{count(surviving)}{of} latents {verb} new to the tuned model ({beside})"
    whole = finite(_patch(run, "all+bias").get("share"))
    if whole is None:
        return f"{text}."
    text += f"; all latents, new or not, recover {percent(whole)} of the KL between the two models"
    best = _patch(run, "best:attribution")
    share, size, random = finite(best.get("share")), finite(best.get("size")), _random(run, "attribution")
    if share is None or size is None:
        return f"{text}."
    control = "" if random is None else f" (random sets of the same weight: {percent(random)})"
    return f"{text}, the {count(size)} strongest by attribution {percent(share)}{control}."


def _patch(run: Run, name: str, place: str | None = None) -> Mapping[str, Any]:
    wanted = place or _place(run)
    for row in rows_of(run.data.get("patching")):
        if row.get("set") == name and row.get("positions") == wanted:
            return row
    return {}


def _place(run: Run) -> str:
    measured = [str(row.get("positions")) for row in rows_of(run.data.get("patching"))]
    return next((place for place in PLACES if place in measured), measured[0] if measured else "all")


def _random(run: Run, ranking: str) -> float | None:
    shares = [
        share
        for row in rows_of(run.data.get("patching"))
        if row.get("set") == f"random:{ranking}"
        and row.get("positions") == _place(run)
        and (share := finite(row.get("share"))) is not None
    ]
    return sum(shares) / len(shares) if shares else None


def _figures(run: Run) -> list[Item]:
    return [*_count_figures(run), *_share_figures(run)]


def _count_figures(run: Run) -> list[Item]:
    only = mapping(run.data.get("tuned_only"))
    surviving, null = finite(only.get("surviving")), finite(only.get("null"))
    if surviving is None:
        return []
    raw = finite(only.get("raw"))
    open_ = finite(only.get("undetermined"))
    # With one decoder there is no first look that a second test could reject.
    looked = "" if raw is None else f"of {count(raw)} that look tuned-only; "
    if run.data.get("method") != "crosscoder":
        looked = "" if open_ is None else f"{count(open_)} more may be; "
    beside = "no null diff was given" if null is None else f"null pairs leave {decimal(null, 1)}"
    found = [("new latents", count(surviving), looked + beside)]
    passes = finite(mapping(only.get("sensitivity")).get("tuned-specific"))
    if passes is not None:
        found.append(
            ("the rule would pass", percent(passes, 0), "of latents that were taken out of the base")
        )
    return found


def _share_figures(run: Run) -> list[Item]:
    found: list[Item] = []
    whole = _patch(run, "all+bias")
    if whole:
        gap = figure(run.data, "gap", _place(run))
        nats = "" if gap is None else f"of {decimal(gap, 3)} nats per prediction"
        found.append(("KL recovered by all latents", share_text(whole.get("share"), whole.get("ci")), nats))
    chosen = next(
        (name for name in ("attribution", "activation_change") if _patch(run, f"best:{name}")), None
    )
    if chosen:
        row, null = _patch(run, f"best:{chosen}"), _random(run, chosen)
        beside = "" if null is None else f"random sets of the same weight: {percent(null)}"
        size = count(row.get("size")) if finite(row.get("size")) else "the"
        label = f"{size} strongest by {chosen.replace('_', ' ')}"
        found.append((label, share_text(row.get("share"), row.get("ci")), beside))
    raw = _patch(run, "raw")
    if raw:
        found.append(("true difference", share_text(raw.get("share")), "the ceiling of all these shares"))
    fve = figure(run.data, "fve", "difference")
    if fve is not None:
        found.append(("difference explained", percent(fve, 1), "of its variance, by the dictionary"))
    return found


def _new(run: Run, charts: Sequence[Chart]) -> list[Section]:
    tables = [table for table in (null_table(run), check_table(run)) if table]
    blocks: list[Block] = [*charts, *tables]
    if not blocks:
        return []
    if not rows_of(run.data.get("nulls")):
        text = "Without a null diff a number of new latents stands alone: diff a pair in which nothing new was learnt."
        command = "palimpsest diff null BASE TUNED --site SITE --corpus FILE --out MODEL"
        blocks.append(Prose([text], "empty", command))
    return [
        Section(
            "diff-new",
            "Which latents are new?",
            "evidence",
            run=run.name,
            lead=_classes(run),
            blocks=blocks,
            methods=[methods.SCALING],
        )
    ]


def _classes(run: Run) -> str:
    classes = [(name, n) for name, n in mapping(run.data.get("classes")).items() if finite(n)]
    if not classes:
        return ""
    listed = ", ".join(f"{count(n)} {visible(name, 30)}" for name, n in classes)
    return f"By decoder and activations the latents are: {listed}."


def _causes(run: Run) -> list[Section]:
    charts = [curve_chart(run, place, f"measured at {words}") for place, words in PLACES.items()]
    for place in PLACES:
        charts += [halves_chart(run, key, place) for key in ("patching", "removal")]
        if any(charts[2:]):
            break
    charts.append(verified_chart(run))
    drawn = [chart for chart in charts if chart is not None]
    if not drawn:
        text = "Whether these latents cause the change was not measured in this run."
        command = "palimpsest diff BASE TUNED --dictionary DICT --corpus FILE --out RUN"
        blocks: list[Block] = [Prose([text], "empty", command)]
        used: list[Method] = []
    else:
        blocks, used = [*drawn], [methods.PATCHING]
        if rows_of(run.data.get("attribution")):
            used.append(methods.ATTRIBUTION)
    return [
        Section(
            "diff-causes",
            "Do the latents cause the change?",
            "evidence",
            run=run.name,
            lead=_parts(run),
            blocks=blocks,
            methods=used,
        )
    ]


def _parts(run: Run) -> str:
    first = next(iter(rows_of(run.data.get("attribution"))), {})
    parts = [
        (name, finite(first.get(key))) for key, name in (("latents", "the latents"), ("bias", "the bias"))
    ]
    parts += [("what the dictionary leaves out", finite(first.get("error")))]
    listed = ", ".join(f"{name} {percent(value)}" for name, value in parts if value is not None)
    missing = finite(first.get("incomplete"))
    rest = "" if missing is None else f"; {percent(missing)} is not integrated"
    return f"Gradients divide the KL gap: {listed}{rest}." if listed else ""


def _latents(run: Run, table: Table | None) -> list[Section]:
    made = []
    behaviours = _behaviours(run)
    if behaviours:
        text = "Latents whose attributions rise and fall together on the predictions where the two models differ most."
        made.append(
            Section(
                "diff-behaviours",
                "What changed, and which latents did it",
                "latents",
                run=run.name,
                lead=text,
                blocks=[Template("behaviours.html.j2", {"behaviours": behaviours})],
                methods=[methods.ATTRIBUTION],
            )
        )
    if table is not None:
        made.append(Section("diff-table", "Latents of the diff", "latents", run=run.name, blocks=[table]))
    return made


def _behaviours(run: Run) -> list[dict[str, Any]]:
    found = []
    for one in rows_of(run.data.get("behaviours"))[:_BEHAVIOURS]:
        latents = [int(n) for n in items_of(one.get("latents")) if finite(n) is not None]
        tokens = finite(one.get("tokens"))
        found.append(
            {
                "latents": latents[:20],
                "more": max(0, len(latents) - 20),
                "share": share_text(one.get("share")),
                "tokens": "" if tokens is None else count(tokens),
                "contexts": [_context(context) for context in rows_of(one.get("contexts"))[:_CONTEXTS]],
            }
        )
    return found


def _context(one: Mapping[str, Any]) -> dict[str, str]:
    return {
        "before": visible_tail(one.get("before") or "", 90),
        "token": visible_token(one.get("token") or ""),
        "after": visible(one.get("after") or "", 60),
        "kl": number_text(one.get("kl"), digits=2),
        "corpus": visible(one.get("corpus") or "", 40),
        "document": "" if one.get("document") is None else count(one.get("document")),
    }


def _everything(run: Run) -> list[Section]:
    table = set_table(run)
    if table is None:
        return []
    predictions = mapping(dig(run.data, "patched", "predictions"))
    names = {"all": "predictions", "first": "of them first answer tokens"}
    listed = ", ".join(f"{count(n)} {names.get(name, visible(name, 30))}" for name, n in predictions.items())
    documents = finite(dig(run.data, "patched", "documents"))
    lead = f"Measured on {count(documents)} documents ({listed})." if documents is not None and listed else ""
    return [
        Section(
            "diff-sets",
            "Every set of latents",
            "tables",
            run=run.name,
            lead=lead,
            blocks=[table],
        )
    ]
