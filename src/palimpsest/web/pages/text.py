"""Own text, token by token: what fires in both models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from palimpsest.display.text import decimal, visible, visible_token
from palimpsest.web.asking import Answer, Ask
from palimpsest.web.bench import Job, Place
from palimpsest.web.desk import Desk
from palimpsest.web.pages.steer import empty
from palimpsest.web.refusals import PageError
from palimpsest.web.writing import LONGEST_TEXT, STRONGEST, reading

LEVELS = 9
SHOWN_TOKENS = 2_000
LISTED = 12
DEFAULT = "Seven apples and five pears make twelve pieces of fruit; how many are left if three are eaten?"


def form(desk: Desk, ask: Ask) -> Answer:
    """The form."""
    if desk.bench is None or not desk.places():
        return Answer("text.html.j2", empty(desk) | {"job": None})
    place = desk.place(ask.text("on", limit=40))
    follow = ask.text("follow", limit=20)
    return Answer("text.html.j2", _form(desk, place, DEFAULT, follow) | {"job": None})


def send(desk: Desk, ask: Ask) -> Answer:
    """Read a text.

    Raises:
        PageError: It is empty or too long, or what is followed is no latent.
    """
    bench, place = desk.need_bench(), desk.place(ask.text("on", limit=40))
    written = ask.text("text", limit=LONGEST_TEXT)
    if not written.strip():
        raise PageError("There is no text", fix="Type or paste some text first")
    follow = ask.text("follow", limit=20).strip()
    if follow and not (follow.isascii() and follow.isdigit() and len(follow) < 10):
        raise PageError("What is followed is no latent", expected="its number", found=follow)
    latents = [int(follow)] if follow else []
    job = bench.submit("text", place, {"text": written, "follow": follow}, reading(written, latents))
    return Answer(to=f"/job/{job.id}")


def view(desk: Desk, job: Job) -> dict[str, Any]:
    """The form as it was sent, and the tokens when they are there."""
    shown = _form(desk, job.place, job.asked["text"], job.asked["follow"])
    if job.state == "done":
        shown["reading"] = _reading(desk, job.place, job.result, job.asked["follow"])
    return shown


def _form(desk: Desk, place: Place, text: str, follow: str) -> dict[str, Any]:
    return {
        "places": desk.places(),
        "place": place,
        "text": text,
        "follow": follow,
        "longest": LONGEST_TEXT,
        "reading": None,
        "loaded": desk.bench is not None and desk.bench.loaded() == place.id,
    }


def _reading(desk: Desk, place: Place, result: Mapping[str, Any], follow: str) -> dict[str, Any]:
    """Tokens with how strongly they are marked, and the list of each."""
    tokens = list(result["tokens"])[:SHOWN_TOKENS]
    sides = [side for side in ("base", "tuned") if result.get(side) is not None]
    index = desk.shown(place.id).index if place.folder is not None else None
    marks = (
        _followed(result, sides, int(follow), len(tokens)) if follow else _changed(result, sides, len(tokens))
    )
    most = max((value for row in marks for value in row.values()), default=0.0)
    labels: dict[int, str] = {}
    lists = [_list(result, sides, place_of, index, labels) for place_of in range(len(tokens))]
    return {
        "sides": sides,
        "follow": follow,
        "label": _label(index, int(follow), labels) if follow else "",
        "most": decimal(most, 2),
        "cut": len(result["tokens"]) > len(tokens) or bool(result.get("cut")),
        "losses": _losses(result),
        "tokens": [
            {
                "text": visible(token, 80) if token.strip(" ") else visible_token(token),
                "name": visible_token(token),
                "style": " ".join(
                    f"{mark}{level}" for mark, value in row.items() if (level := _level(value, most))
                ),
                "rows": rows,
                "loss": _loss_at(result, at),
            }
            for at, (token, row, rows) in enumerate(zip(tokens, marks, lists, strict=True))
        ],
        "latent_at": f"/run/{place.id}/latent/" if place.folder else "",
    }


def _followed(result: Mapping[str, Any], sides: Sequence[str], latent: int, n: int) -> list[dict[str, float]]:
    """The activation of one latent on every token."""
    followed = result.get("followed") or result
    names = {"base": "b", "tuned": "t"} if len(sides) == 2 else {(sides or ["value"])[0]: "v"}
    rows = []
    for at in range(n):
        row = {}
        for name, mark in names.items():
            listed = dict(followed[name][at]) if followed.get(name) is not None else {}
            row[mark] = float(listed.get(latent, 0.0))
        rows.append(row)
    return rows


def _changed(result: Mapping[str, Any], sides: Sequence[str], n: int) -> list[dict[str, float]]:
    """How much the strongest latents of a token differ between the models, or how strong they are in one."""
    rows = []
    for at in range(n):
        if len(sides) == 2:
            base, tuned = dict(result["base"][at]), dict(result["tuned"][at])
            either = base.keys() | tuned.keys()
            rows.append({"v": sum(abs(tuned.get(one, 0.0) - base.get(one, 0.0)) for one in either)})
        else:
            listed = result[(sides or ["value"])[0]][at]
            rows.append({"v": float(listed[0][1]) if listed else 0.0})
    return rows


def _list(
    result: Mapping[str, Any], sides: Sequence[str], at: int, index: Any, labels: dict[int, str]
) -> list[dict[str, Any]]:
    """Latents of one token, the strongest in either model first."""
    names = sides or ["value"]
    by_side = {name: dict(result[name][at]) for name in names}
    found = {one for listed in by_side.values() for one in listed}
    strength = {one: max(listed.get(one, 0.0) for listed in by_side.values()) for one in found}
    top = sorted(found, key=lambda one: (-strength[one], one))[:LISTED]
    most = max(strength.values(), default=0.0)
    return [
        {
            "latent": one,
            "label": _label(index, one, labels),
            "values": [
                {
                    "side": name if len(sides) == 2 else "",
                    "text": _value(by_side[name], one),
                    "width": round(100 * by_side[name].get(one, 0.0) / most) if most > 0 else 0,
                }
                for name in names
            ],
        }
        for one in top
    ]


def _value(listed: Mapping[int, float], latent: int) -> str:
    """An activation; a latent that is absent from a whole list is silent, from a list that was cut it is not known."""
    if latent in listed or len(listed) < STRONGEST:
        return decimal(listed.get(latent, 0.0), 2)
    return f"< {decimal(min(listed.values()), 2)}"


def _label(index: Any, latent: int, known: dict[int, str]) -> str:
    """What a latent is called, or the tokens on which it fires."""
    if index is None:
        return ""
    if latent not in known:
        known[latent] = ""
        if latent in index.latents:
            row = index.row(latent)
            words = ", ".join(visible_token(one, 16) for one in (row["tokens"] or [])[:5])
            known[latent] = row["label"] or words
    return known[latent]


def _losses(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for side in ("base", "tuned"):
        listed = [one for one in result.get(f"loss_{side}") or [] if one is not None and one == one]
        if listed:
            found.append((side, decimal(sum(listed) / len(listed), 3)))
    return found


def _loss_at(result: Mapping[str, Any], at: int) -> list[tuple[str, str]]:
    found = []
    for side in ("base", "tuned"):
        listed = result.get(f"loss_{side}")
        if listed and listed[at] is not None:
            found.append((side, decimal(listed[at], 2)))
    return found


def _level(value: float, most: float) -> int:
    return max(1, min(LEVELS, round(LEVELS * value / most))) if value > 0 and most > 0 else 0
