"""Latents turned up and down while the models write."""

from __future__ import annotations

from typing import Any

from palimpsest.interpret.steering.changes import MODES, Change, read_changes
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.bench import Job, Place
from palimpsest.web.desk import OWN, Desk, names_of
from palimpsest.web.refusals import PageError
from palimpsest.web.writing import (
    LONGEST_PROMPT,
    MOST_CHANGES,
    MOST_NEW_TOKENS,
    Steering,
    command,
    steering,
)

LARGEST = 1e6
SLIDER = {"scale": 10.0, "add": 20.0, "clamp": 20.0, "ablate": 1.0}
"""Where sliders end that know no largest activation."""

DEFAULT = "The river runs past the old mill, and"


def form(desk: Desk, ask: Ask) -> Answer:
    """The form, with the latents that the address names."""
    if desk.bench is None or not desk.places():
        return Answer("steer.html.j2", empty(desk) | {"job": None})
    place = desk.place(ask.text("on", limit=40))
    asked = Steering(
        ask.text("prompt", DEFAULT, LONGEST_PROMPT),
        tuple(_one(latent, "scale", 4.0) for latent in _latents(ask)),
        ask.text("side") or _sides(desk, place)[-1],
    )
    return Answer("steer.html.j2", _form(desk, place, asked) | {"job": None})


def send(desk: Desk, ask: Ask) -> Answer:
    """Let the models write.

    Raises:
        PageError: A field is empty, too long or out of range.
    """
    bench, place = desk.need_bench(), desk.place(ask.text("on", limit=40))
    side = ask.text("side") or _sides(desk, place)[-1]
    if side not in ("base", "tuned"):
        raise PageError("There is no such model", expected="base or tuned", found=side[:20])
    asked = Steering(
        ask.text("prompt", limit=LONGEST_PROMPT).rstrip(),
        _changes(ask),
        side,
        max_new_tokens=ask.whole("max_new_tokens", 60, low=1, high=MOST_NEW_TOKENS),
        temperature=ask.number("temperature", 0.0, low=0, high=5) or 0.0,
        seed=ask.whole("seed", 0),
        chat=ask.text("chat") == "yes",
    )
    if not asked.prompt.strip():
        raise PageError("The prompt is empty", fix="Type something that the models can continue")
    job = bench.submit("steer", place, {"asked": asked}, steering(asked))
    return Answer(to=f"/job/{job.id}")


def view(desk: Desk, job: Job) -> dict[str, Any]:
    """The form as it was sent, to be changed and sent again."""
    return _form(desk, job.place, job.asked["asked"])


def empty(desk: Desk) -> dict[str, Any]:
    """What a page without models or dictionaries says: which command to run."""
    folder = str(desk.shelf.root)
    return {
        "places": [],
        "missing_model": desk.bench is None,
        "serve_command": f"palimpsest serve {folder} --model",
        "examples_command": "palimpsest examples BASE TUNED --dictionary DICTIONARY --corpus general.jsonl "
        f"--out {folder}/examples",
    }


def _form(desk: Desk, place: Place, asked: Steering) -> dict[str, Any]:
    sides = _sides(desk, place)
    base, tuned, dictionary = _named(desk, place)
    return {
        "places": desk.places(),
        "place": place,
        "asked": asked,
        "sides": sides,
        "columns": (*sides, "steered"),
        "changes": [_change(desk, place, one) for one in asked.changes],
        "modes": MODES,
        "most_changes": MOST_CHANGES,
        "most_new_tokens": MOST_NEW_TOKENS,
        "names": {"base": base, "tuned": tuned, "dictionary": dictionary},
        "command": command(base, dictionary, asked, tuned if "tuned" in sides else ""),
        "latent_at": f"/run/{place.id}/latent/" if place.folder else "",
        "loaded": desk.bench is not None and desk.bench.loaded() == place.id,
    }


def _named(desk: Desk, place: Place) -> tuple[str, str, str]:
    """Base, tuned model and dictionary of a place, as they will be loaded."""
    config = desk.config
    if place.id == OWN:
        return config.base or "", config.tuned or "", config.dictionary or ""
    about = desk.shown(place.id).index.about
    base, tuned = names_of(about)
    dictionary = about.get("dictionary")
    path = dictionary.get("path") if isinstance(dictionary, dict) else ""
    return config.base or base, config.tuned or tuned, str(path or "")


def _sides(desk: Desk, place: Place) -> tuple[str, ...]:
    return ("base", "tuned") if _named(desk, place)[1] else ("base",)


def _latents(ask: Ask) -> list[int]:
    found = [text for text in ask.all("latent")[:MOST_CHANGES] if text.isascii() and text.isdigit()]
    return [int(text) for text in dict.fromkeys(found) if len(text) < 10]


def _one(latent: int, mode: Any, value: float | None) -> str:
    return str(Change(latent, mode, value))


def _changes(ask: Ask) -> tuple[str, ...]:
    """Rows of the form: a latent, a mode and a value each; rows without a latent are left out."""
    latents, modes, values = (ask.all(name)[: MOST_CHANGES * 2] for name in ("latent", "mode", "value"))
    found = []
    for row, latent in enumerate(latents):
        if not latent.strip():
            continue
        mode = modes[row] if row < len(modes) else "scale"
        value = values[row].strip() if row < len(values) else ""
        text = f"{latent.strip()}:{mode}" if mode == "ablate" else f"{latent.strip()}:{mode}={value}"
        change = Change.parse(text[:80])
        if change.value is not None and abs(change.value) > LARGEST:
            raise PageError(f"The value of latent {change.latent} is out of range", found=change.value)
        found.append(change)
    if len(found) > MOST_CHANGES:
        raise PageError("Too many latents at once", expected=f"at most {MOST_CHANGES}", found=len(found))
    return tuple(str(one) for one in read_changes(found))


def _change(desk: Desk, place: Place, text: str) -> dict[str, Any]:
    change = Change.parse(text)
    largest, label = SLIDER[change.mode], ""
    if place.folder is not None:
        index = desk.shown(place.id).index
        known = index.latents
        if change.latent in known:
            row = index.row(change.latent)
            label = row["label"] or ", ".join((row["tokens"] or row["promoted_base"] or [])[:4])
            top = row.get("max_value")
            if change.mode in ("add", "clamp") and top:
                largest = float(f"{2 * top:.2g}")
    value = change.value if change.value is not None else 0.0
    largest = max(largest, abs(value))
    return {
        "latent": change.latent,
        "mode": change.mode,
        "value": f"{value:g}",
        "low": f"{-largest:g}" if change.mode == "add" else "0" if value >= 0 else f"{-largest:g}",
        "high": f"{largest:g}",
        "label": label,
    }
