"""Training runs while they run, and afterwards."""

from __future__ import annotations

from typing import Any

from palimpsest.latents.schema import STAGE
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.desk import Desk
from palimpsest.web.live import progress
from palimpsest.web.refusals import NoPageError
from palimpsest.web.runs import TRAINING, Entry

EVERY = 3_000
"""Milliseconds between two looks at a run that is not over."""


def index(desk: Desk, ask: Ask) -> Answer:
    """Training runs, unfinished ones first and newest first."""
    entries = [one for one in desk.shelf.entries() if one.stage in TRAINING and _logged(one)]
    entries.sort(key=lambda one: one.created, reverse=True)
    entries.sort(key=lambda one: one.status == "complete")
    rows = [
        {"id": one.id, "name": one.name, "stage": one.stage, "status": one.status, "created": one.created}
        for one in entries
    ]
    return Answer("training.html.j2", {"rows": rows, "folder": str(desk.shelf.root)})


def one(desk: Desk, ask: Ask) -> Answer:
    """How far a run is; asked for again every few seconds while it runs.

    Raises:
        NoPageError: It is no training run.
    """
    entry = desk.shelf.entry(ask.place("run"))
    if entry.stage not in TRAINING:
        raise NoPageError(
            f"{entry.name} is no training run", expected="tune, train", found=entry.stage or "damaged"
        )
    artifact = desk.shelf.open(entry, running=True)
    found = progress(entry, artifact)
    context: dict[str, Any] = {
        "entry": entry,
        "found": found,
        "every": EVERY,
        "over": found.state == "complete",
        "latent_at": _latents_at(desk, entry),
    }
    return Answer("live_part.html.j2" if ask.fragment else "live.html.j2", context)


def _logged(entry: Entry) -> bool:
    """Whether it reported anything: a dictionary that was one of several, or was converted, did not."""
    return entry.status != "complete" or any(
        (entry.path / name).exists() for name in ("log.jsonl", "training.jsonl")
    )


def _latents_at(desk: Desk, entry: Entry) -> str:
    """Where the latents of an adapter's dictionary can be looked at."""
    if entry.stage != "tune":
        return ""
    mine = desk.family(entry)
    found = [one for one in desk.examples() if one.stage == STAGE and mine.same(desk.family(one))]
    return f"/run/{found[0].id}/latent/" if found else ""
