"""The list of runs, and a run with its report."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from palimpsest.artifacts import Artifact
from palimpsest.display.text import finite
from palimpsest.errors import PalimpsestError
from palimpsest.latents.schema import STAGE
from palimpsest.log import log
from palimpsest.report.data_table import Cards
from palimpsest.report.draw import Page, draw_methods, draw_section, draw_top, methods_of, unique
from palimpsest.report.merge import main_data, sections_of
from palimpsest.report.parts import Run
from palimpsest.report.reproduce import recipe
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.desk import Desk, names_of
from palimpsest.web.refusals import GoneError
from palimpsest.web.runs import GROUPS, TRAINING, Entry

LONGEST_SUMMARY = 260
OTHER_GROUPS = ("Others", "Damaged")


def index(desk: Desk, ask: Ask) -> Answer:
    """All runs in groups, those that hold a text in name, stage or summary."""
    wanted = ask.text("q").strip()
    entries = desk.shelf.entries()
    found = [one for one in entries if _holds(one, wanted.lower())]
    titles = [title for title, _ in GROUPS] + list(OTHER_GROUPS)
    groups = [(title, [_row(one) for one in found if one.group == title]) for title in titles]
    context = {
        "q": wanted,
        "groups": [(title, rows) for title, rows in groups if rows],
        "found": len(found),
        "total": len(entries),
        "cut": desk.shelf.cut,
        "folder": str(desk.shelf.root),
    }
    return Answer("runs_part.html.j2" if ask.fragment else "runs.html.j2", context)


def one(desk: Desk, ask: Ask) -> Answer:
    """A run: what it is, its report, and where to go from here."""
    entry = desk.shelf.entry(ask.place("run"))
    context: dict[str, Any] = {
        "entry": _row(entry),
        "facts": [],
        "report": None,
        "problem": "",
        "latents_at": f"/run/{entry.id}/latents" if _browsable(entry) else "",
        "live_at": f"/live/{entry.id}" if entry.stage in TRAINING else "",
        "examples": [_row(one) for one in desk.examples_of(entry)] if entry.status == "complete" else [],
        "examples_command": "",
    }
    if entry.status == "damaged":
        return Answer("run.html.j2", context | {"problem": entry.summary})
    artifact = desk.shelf.open(entry, running=True)
    context["facts"] = _facts(entry, artifact)
    if entry.status == "complete":
        if not context["examples"]:
            context["examples_command"] = _examples_command(desk, entry, artifact)
        try:
            context["report"] = _report(desk, entry, artifact)
        except PalimpsestError as error:
            context["problem"] = str(error)
        except Exception:
            # What is in a run may be anything; the rest of the page does not depend on it.
            log.exception("The report of %s could not be drawn", entry.name)
            context["problem"] = "Its report could not be drawn; the log of palimpsest serve says why."
    return Answer("run.html.j2", context, charts=bool(context["report"] and context["report"]["specs"]))


def read_run(entry: Entry, artifact: Artifact) -> Run:
    """A run as the report takes it.

    Raises:
        GoneError: Its main file is missing or damaged.
    """
    try:
        return Run(artifact, entry.name, main_data(artifact))
    except (OSError, RecursionError) as error:
        raise GoneError(f"{entry.name} cannot be read", found=error) from error


def _holds(entry: Entry, text: str) -> bool:
    return not text or any(
        text in part.lower() for part in (entry.name, entry.stage, entry.summary, entry.group)
    )


def _browsable(entry: Entry) -> bool:
    return entry.stage == STAGE and entry.status == "complete"


def _row(entry: Entry) -> dict[str, Any]:
    short = entry.summary
    if len(short) > LONGEST_SUMMARY:
        short = short[: LONGEST_SUMMARY - 1].rsplit(" ", 1)[0] + "…"
    return {
        "id": entry.id,
        "name": entry.name,
        "stage": entry.stage or "unknown",
        "status": entry.status,
        "summary": short,
        "created": entry.created,
        "size": size(entry.size),
        "latents": _browsable(entry),
        "live": entry.stage in TRAINING,
    }


def size(count: int) -> str:
    """Bytes in few characters."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count} B" if count else ""


def _facts(entry: Entry, artifact: Artifact) -> list[tuple[str, str]]:
    manifest = artifact.manifest
    timings = manifest.get("timings")
    listed = timings.values() if isinstance(timings, Mapping) else ()
    seconds = sum(number for one in listed if (number := finite(one)) is not None)
    rows = [
        ("folder", str(entry.path)),
        ("stage", entry.stage),
        ("created", entry.created),
        ("size", size(entry.size)),
        ("took", f"{seconds:,.0f} s" if seconds else ""),
        ("device", str(manifest.get("device") or "")),
    ]
    return [(name, value) for name, value in rows if value]


def _examples_command(desk: Desk, entry: Entry, artifact: Artifact) -> str:
    """What collects the examples of the latents that a run speaks of; empty where it speaks of none of one pair."""
    asked = artifact.config
    base, tuned, dictionary = (asked.get(name) for name in ("base", "tuned", "dictionary"))
    if entry.stage not in ("audit", "diff"):
        return ""
    named = {name: str(one.get("path")) for name, one in entry.inputs.items() if isinstance(one, Mapping)}
    dictionary = named.get("dictionary") or dictionary
    models = artifact.manifest["models"]
    corpora = [f"{name.rpartition('/')[2].rpartition(' ')[2]}={path}" for name, path in named.items()]
    listed = [one for one in corpora if one.partition("=")[2].endswith((".jsonl", ".parquet", ".txt"))]
    words = [str(models.get("base") or base or "BASE"), str(models.get("tuned") or tuned or "TUNED")]
    words += ["--dictionary", str(dictionary or "DICTIONARY")]
    words += ["--corpus", *(listed or ["general.jsonl"])]
    return shlex.join(["palimpsest", "examples", *words, "--out", f"{desk.shelf.root / entry.name}-examples"])


def _report(desk: Desk, entry: Entry, artifact: Artifact) -> dict[str, Any]:
    """The sections of the report, drawn; the last few runs stay in memory, since most of the time goes here."""
    address, shown, stamp = "", frozenset[int](), None
    examples = desk.examples_of(entry)
    target = entry if _browsable(entry) else examples[0] if examples else None
    if target is not None:
        try:
            index = desk.shown(target.id).index
            address, shown = f"/run/{target.id}/latent/", frozenset(index.latents.tolist())
            stamp = target.stamp
        except PalimpsestError as error:
            log.warning("%s has no cards: %s", entry.name, error)
    key = _Key((entry.path, entry.stamp, address, stamp), lambda: _drawn(entry, artifact, address, shown))
    return _kept(key)


class _Key:
    """A cache's key that brings along how its value is made."""

    def __init__(self, key: Any, make: Any) -> None:
        self.key, self.make = key, make

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Key) and self.key == other.key


@lru_cache(maxsize=6)
def _kept(key: _Key) -> dict[str, Any]:
    return key.make()


def _drawn(entry: Entry, artifact: Artifact, address: str, shown: frozenset[int]) -> dict[str, Any]:
    run = read_run(entry, artifact)
    sections = unique(sections_of([run]))
    page = Page(cards={run.name: Cards(address, shown)} if address else {})
    top = [one for one in sections if one.order == "verdict"]
    rest = [one for one in sections if one.order not in ("verdict", "method")]
    drawn_top = [draw_top(one, page) for one in top]
    drawn = [draw_section(one, page, named=False) for one in rest]
    base, tuned = names_of(run.data)
    return {
        "headline": next((one.verdict for one in sections if one.verdict), "") or entry.summary,
        "pair": (base, tuned),
        "site": str(run.data.get("site") or ""),
        "links": [(one.id, one.title) for one in rest],
        "top": drawn_top,
        "sections": drawn,
        "methods": draw_methods(methods_of(sections)),
        "recipe": recipe(run),
        "specs": page.specs,
        "chart_data": chart_data(page.specs),
        "tables": list(page.tables.items()),
    }


def chart_data(specs: Mapping[str, Any]) -> dict[str, Any]:
    """What the page's script draws charts from."""
    from palimpsest.report.pictures import page_config

    return {"specs": dict(specs), "config": page_config()}
