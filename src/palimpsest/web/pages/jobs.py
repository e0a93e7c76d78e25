"""How far a job is, and its answer."""

from __future__ import annotations

from typing import Any

from palimpsest.web.asking import Answer, Ask
from palimpsest.web.bench import Job
from palimpsest.web.desk import Desk
from palimpsest.web.pages import steer, text


def show(desk: Desk, ask: Ask) -> Answer:
    """The page that asked, with the answer as far as it is there."""
    job = desk.need_bench().job(ask.place("job"))
    shown = VIEWS[job.kind](desk, job)
    name = f"{job.kind}_part.html.j2" if ask.fragment else f"{job.kind}.html.j2"
    return Answer(name, {**shown, "job": progress(desk, job), "here": f"/{job.kind}"})


def cancel(desk: Desk, ask: Ask) -> Answer:
    """Stop a job."""
    bench = desk.need_bench()
    job = bench.job(ask.place("job"))
    bench.cancel(job)
    return Answer(to=f"/job/{job.id}")


def progress(desk: Desk, job: Job) -> dict[str, Any]:
    """A job as the templates show it."""
    waiting = desk.need_bench().before(job) if job.state == "waiting" else 0
    note = {
        "waiting": f"Waiting: {waiting} before this one." if waiting else "Waiting.",
        "done": f"Done in {job.seconds:.1f} s.",
        "failed": job.error,
        "cancelled": "Cancelled.",
    }.get(job.state, job.note)
    if job.stop.is_set() and not job.over:
        note = "Stopping before the next token."
    return {
        "id": job.id,
        "state": job.state,
        "note": note,
        "over": job.over,
        "texts": dict(job.texts),
        "result": job.result,
        "place": job.place.name,
    }


VIEWS = {"text": text.view, "steer": steer.view}
"""What else each kind of job shows."""
