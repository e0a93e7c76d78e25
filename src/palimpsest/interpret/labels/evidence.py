"""What is shown to a provider, and what is held back to test its label."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from palimpsest.errors import ConfigError
from palimpsest.interpret.labels.protocol import Evidence, Text
from palimpsest.latents import Example, LatentIndex, Query

CHANGE = "change"
SAME_BEFORE = 8
"""Tokens before the one in question that make two texts the same: the model, too, goes by what came before."""


def choose_latents(index: LatentIndex, latents: Sequence[int], top: int, by: str | None) -> list[int]:
    """The latents to label: those that are named, else the first `top` by a column.

    Raises:
        ConfigError: One of them never fired, or there is no such column.
    """
    if latents:
        return [int(index.row(latent)["latent"]) for latent in latents]
    pair = (index.about.get("pair") or {}).get("tuned") is not None
    by = by or (CHANGE if pair and _both_rates(index) else "rate")
    if by != CHANGE:
        if by in index.names and not np.isfinite(index.values(by)).any():
            raise ConfigError(
                f"There is nothing to rank by: {by} has no value for any of these latents",
                fix="Choose another --by",
            )
        return [row["latent"] for row in index.search(Query(sort=by, descending=True, limit=top)).rows]
    if not _both_rates(index):
        raise ConfigError(
            "There is no change to rank by: these examples have no rates of both models",
            expected=", ".join(index.names),
            fix="Choose another --by",
        )
    rows = index.search(Query(limit=len(index))).rows
    change = {row["latent"]: abs((row["rate_tuned"] or 0.0) - (row["rate_base"] or 0.0)) for row in rows}
    return sorted(change, key=lambda latent: (-change[latent], latent))[:top]


def _both_rates(index: LatentIndex) -> bool:
    return len(index) > 0 and all(
        index.row(int(index.latents[0])).get(f"rate_{side}") is not None for side in ("base", "tuned")
    )


def split_examples(
    examples: Sequence[Example], latent: int, seed: int
) -> tuple[list[Example], list[Example]]:
    """Divide a latent's examples into those to show and those to hold back, half of each kind.

    A hash of the document decides, so that neither the order of the examples nor their number does; a document is
    never on both sides, and what repeats a shown text is not held back but left out.

    Returns:
        What is shown and what is held back, each in the order given.
    """
    side: dict[tuple[str, int], bool] = {}
    for kind in sorted({one.kind for one in examples}):
        new = {(one.corpus, one.document) for one in examples if one.kind == kind} - side.keys()
        ordered = sorted(new, key=lambda place: _hash(seed, latent, *place))
        # Kinds with one document each must not all fall on one side.
        held = sum(side.values()) < len(side) - sum(side.values())
        for document in ordered:
            side[document] = held
            held = not held
    shown, held_back = [], []
    for one in examples:
        (held_back if side[one.corpus, one.document] else shown).append(one)
    seen = {context_of(one.ids, one.peak) for one in shown if one.peak >= SAME_BEFORE}
    return shown, [one for one in held_back if context_of(one.ids, one.peak) not in seen]


def evidence_of(row: dict[str, Any], shown: Sequence[Example], most: int) -> Evidence:
    """What a provider sees of a latent.

    Log-odds are counted over all text, so a token is shown only where a shown example fires on it: what the label
    is made from must not have been read off the examples that test it.

    Args:
        row: The latent's row of the index.
        shown: Examples that are not held back.
        most: Examples that are shown at most, evenly over their kinds.
    """
    fired = {
        token for one in shown for token, value in zip(one.tokens, one.value_at, strict=True) if value > 0
    }
    tokens, scores = row.get("tokens") or [], row.get("tokens_z") or []
    seen = [(token, z) for token, z in zip(tokens, scores, strict=False) if token in fired]
    return Evidence(
        int(row["latent"]),
        tuple(evenly(shown, most)),
        tuple(row.get("promoted_tuned") or row.get("promoted_base") or ()),
        tuple(token for token, _ in seen),
        tuple(z for _, z in seen),
    )


def evenly(examples: Sequence[Example], most: int) -> list[Example]:
    """At most so many examples, every kind in turn: the strongest ones, then each quantile bin."""
    kinds: dict[int, list[Example]] = {}
    for one in examples:
        kinds.setdefault(one.kind, []).append(one)
    turns = max(map(len, kinds.values()), default=0)
    taken = [kinds[kind][turn] for turn in range(turns) for kind in sorted(kinds) if turn < len(kinds[kind])]
    chosen = taken[:most]
    return [one for one in examples if any(one is other for other in chosen)]


def text_of(example: Example) -> Text:
    """An example as a text in question."""
    return Text(tuple(example.tokens), example.peak)


def context_of(ids: Sequence[int], place: int) -> tuple[int, ...]:
    """The token in question and some before it; shorter at the beginning of a window."""
    return tuple(ids[max(0, place - SAME_BEFORE) : place + 1])


def _hash(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode(errors="backslashreplace")).hexdigest()
