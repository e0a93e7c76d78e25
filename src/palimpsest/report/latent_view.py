"""One latent as it is shown: a card with its figures, its words and its examples, in the report and in the app."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from palimpsest.latents import Label, LatentIndex
from palimpsest.latents.schema import ROLES
from palimpsest.report.display import (
    Cell,
    Scale,
    count,
    decimal,
    finite,
    measure,
    percent,
    visible,
    visible_token,
)
from palimpsest.report.latent_shapes import Histogram, histogram
from palimpsest.report.latent_windows import Group, activation, groups_of

STEPS = 20
"""Widths that a bar may have."""
WORDS, FEW_WORDS = 8, 5
"""Words and neighbours of a list, with and without detail."""
_LABEL, _NAME = 160, 60

Evidence = Sequence[tuple[str, Mapping[str, Any]]]
"""Rows about the same latent in other runs: the run's name, and what it found by label."""


@dataclass(frozen=True)
class Word:
    """A token that a latent fires on or promotes; `number` is empty where space is short."""

    text: str
    number: str = ""


@dataclass(frozen=True)
class Words:
    """A list of tokens, and of which model they speak: `base`, `tuned` or nothing."""

    title: str
    side: str
    words: Sequence[Word]


@dataclass(frozen=True)
class Bar:
    """A share as a bar; the longest is `STEPS` wide."""

    name: str
    text: str
    width: int


@dataclass(frozen=True)
class Strength:
    """How often and how strongly a signal fires."""

    side: str
    name: str
    rate: str
    mean: str
    top: str


@dataclass(frozen=True)
class LatentView:
    """Everything that a card shows, ready to print.

    Attributes:
        latent: Its number.
        label: What it is said to stand for; empty where nothing was said.
        provider: Who said so.
        score: The label's score with its interval.
        judged: On how many texts, and the score by kind of text.
        chips: Class and verdict that other runs gave it, each with the run's name.
        sides: Models whose own activation is known: both, one or none.
        strengths: Rates and activations of each signal.
        histogram: Distribution of the activations; None where there is none.
        corpora: Rate on each corpus.
        roles: Shares of its firings on each part of a conversation.
        lens: Tokens that the decoder row promotes and suppresses in each model, and what changed.
        tokens: Tokens on which it fires beyond their frequency.
        neighbours: Latents that fire on the same tokens, each with its cosine and its address.
        evidence: What other runs found.
        groups: Examples by kind.
        note: What the numbers of the examples are, in a sentence.
    """

    latent: int
    label: str
    provider: str
    score: Cell
    judged: str
    chips: Sequence[tuple[str, str]]
    sides: tuple[str, ...]
    strengths: Sequence[Strength]
    histogram: Histogram | None
    corpora: Sequence[Bar]
    roles: Sequence[Bar]
    lens: Sequence[Words]
    tokens: Words
    neighbours: Sequence[tuple[int, str, str]]
    evidence: Sequence[tuple[str, Sequence[tuple[str, str]]]]
    groups: Sequence[Group]
    note: str


def latent_view(
    index: LatentIndex,
    latent: int,
    evidence: Evidence = (),
    *,
    limits: tuple[int, int] | None = None,
    detail: bool = True,
    link: str = "#latent-{}",
) -> LatentView:
    """Everything that the card of a latent shows.

    Args:
        index: The examples folder, with its labels.
        latent: Its number.
        evidence: What other runs found about it: run name and values by label; `class` and `verdict` become chips.
        limits: Strongest examples and examples of each quantile bin to show at most; None for all.
        detail: With all there is; else with shorter windows and lists and fewer numbers, a third as large.
        link: Address of another latent, with `{}` for its number.

    Raises:
        ConfigError: The latent never fired, or there is none of that number.
    """
    row = index.row(latent)
    sides = tuple(side for side in ("base", "tuned") if finite(row.get(f"rate_{side}")) is not None)
    joint = len(sides) == 2 and index.about.get("view") == "pair"
    # What is not shown need not be read.
    only = None if limits is None or limits[1] > 0 else 0
    found = index.examples(latent, only, limits[0] if limits and only == 0 else None)
    label = index.label(latent)
    return LatentView(
        latent=int(row["latent"]),
        label=visible(row["label"], _LABEL) if row.get("label") else "",
        provider=visible(row["label_provider"], _NAME) if row.get("label_provider") else "",
        score=_score(row, label),
        judged=_judged(label),
        chips=_chips(evidence),
        sides=sides,
        strengths=_strengths(row, sides, joint),
        histogram=histogram(row, sides),
        corpora=_bars(row, [(f"rate[{name}]", name) for name in index.about["corpora"]]),
        roles=_bars(row, [(f"share[{role}]", role) for role in ROLES]),
        lens=_lens(row, detail),
        tokens=_words("fires on", "", row, "tokens", "tokens_z", detail),
        neighbours=_neighbours(row, link, detail),
        evidence=[(visible(name, _NAME), _facts(values)) for name, values in evidence if _facts(values)],
        groups=groups_of(found, sides, limits, detail, joint=joint),
        note=visible((index.about.get("signals") or {}).get("value") or ""),
    )


def _score(row: Mapping[str, Any], label: Label | None) -> Cell:
    return measure(
        row.get("label_score"),
        label.ci if label else None,
        digits=2,
        scale=Scale(0.0, 1.0),
        reference=0.5,
        reason="not scored",
    )


def _judged(label: Label | None) -> str:
    if label is None or label.score is None:
        return ""
    parts = [("random texts", finite(label.random)), ("similar texts", finite(label.similar))]
    against = ", ".join(f"{decimal(value, 2)} against {name}" for name, value in parts if value is not None)
    return f"on {count(label.n)} texts" + (f": {against}" if against else "")


def _chips(evidence: Evidence) -> list[tuple[str, str]]:
    chips = []
    for name, values in evidence:
        for key in ("class", "verdict"):
            if values.get(key):
                chips.append((visible(values[key], 40), visible(name, _NAME)))
    return list(dict.fromkeys(chips))


def shown(value: Any) -> str:
    """A value of any kind in few characters."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return count(value).replace("-", "−")
    if isinstance(value, float):
        number = finite(value)
        return "not measured" if number is None else f"{number:.3g}".replace("-", "−")
    if isinstance(value, (list, tuple)):
        return ", ".join(shown(one) for one in value[:8])
    return visible(value, 80)


def _facts(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    kept = [(key, value) for key, value in values.items() if value is not None and value != ""]
    return [(visible(key, _NAME), shown(value)) for key, value in kept]


def _strengths(row: Mapping[str, Any], sides: tuple[str, ...], joint: bool) -> list[Strength]:
    signals = [(side, side, f"rate_{side}", f"mean_{side}", f"max_{side}") for side in sides]
    if len(sides) != 1:
        name = "joint" if joint else "either" if sides else "all"
        signals.insert(0, ("", name, "rate", "mean_value", "max_value"))
    return [
        Strength(side, name, *(_rate(row.get(rate)), activation(row.get(mean)), activation(row.get(top))))
        for side, name, rate, mean, top in signals
    ]


def _rate(value: Any) -> str:
    number = finite(value)
    if not number:
        return "–" if number is None else "0%"
    return "< 0.001%" if 0 < number < 1e-5 else percent(number, 3 if number < 0.01 else 1)


def _bars(row: Mapping[str, Any], names: Sequence[tuple[str, str]]) -> list[Bar]:
    known = [(name, finite(row.get(key))) for key, name in names]
    values = [(name, value) for name, value in known if value is not None]
    most = max((value for _, value in values), default=0.0)
    return [
        Bar(visible(name, 40), _rate(value), round(STEPS * value / most) if most else 0)
        for name, value in values
    ]


def _words(
    title: str, side: str, row: Mapping[str, Any], key: str, numbers: str, detail: bool, signed: bool = False
) -> Words:
    texts, values = row.get(key) or [], row.get(numbers) or []
    listed = []
    for place, text in enumerate(texts[: WORDS if detail else FEW_WORDS]):
        value = finite(values[place]) if place < len(values) else None
        # The sign of a change is its whole meaning: it is never left out.
        number = "" if value is None or not (detail or signed) else decimal(value, 1, signed)
        listed.append(Word(visible_token(text, 32), number))
    return Words(title, side, listed)


def _lens(row: Mapping[str, Any], detail: bool) -> list[Words]:
    found = []
    for kind, title in (("promoted", "promotes"), ("suppressed", "suppresses")):
        for side in ("base", "tuned"):
            key = f"{kind}_{side}"
            found.append(_words(title, side, row, key, f"{key}_logits", detail))
    found.append(_words("changed most", "", row, "changed", "changed_logits", detail, signed=True))
    return [one for one in found if one.words]


def _neighbours(row: Mapping[str, Any], link: str, detail: bool) -> list[tuple[int, str, str]]:
    pairs = zip(row.get("neighbours") or [], row.get("neighbour_scores") or [], strict=False)
    kept = [(int(one), finite(score)) for one, score in pairs if int(one) != row["latent"]]
    # An address may hold braces of its own, so that it is no format string.
    return [
        (one, "" if score is None or not detail else decimal(score, 2), link.replace("{}", str(one)))
        for one, score in kept[: WORDS if detail else FEW_WORDS]
    ]
