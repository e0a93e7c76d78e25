"""Latents to compare a latent with: others that fire as often and as strongly and are written at the same length."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.corpus import TokenBatch
from palimpsest.evaluate.text import kept_places
from palimpsest.evaluate.views import flat_rows
from palimpsest.interpret.steering.changes import Change
from palimpsest.interpret.subject import PAIRED, Subject
from palimpsest.log import progress
from palimpsest.models import SIDES, Side

POOL = 20
"""Nearest latents that a control is drawn from."""


class Habits(NamedTuple):
    """How each latent behaves on some text, read as steering reads it.

    Attributes:
        rate: Share of the measured tokens on which it fires.
        mean: Its mean activation where it fires; 0 where it never does.
        norm: Length of its decoder row in the steered model.
        tokens: How many were measured.
    """

    rate: Float[NDArray, " latents"]
    mean: Float[NDArray, " latents"]
    norm: Float[NDArray, " latents"]
    tokens: int


@torch.inference_mode()
def habits(
    subject: Subject, side: Side, batches: Iterable[TokenBatch], *, total: int | None = None
) -> Habits:
    """One pass that stops at the site.

    Args:
        subject: Dictionary and models.
        side: The steered model, whose codes an SAE gives.
        batches: Text.
        total: Tokens of the batches, for the progress line.
    """
    dictionary, view = subject.dictionary, subject.dictionary.view
    fires = torch.zeros(dictionary.n_latents, dtype=torch.float64, device=dictionary.device)
    mass, tokens = torch.zeros_like(fires), 0
    with progress("How often latents fire", total) as advance:
        for batch in batches:
            kept, _ = kept_places(batch)
            if len(kept):
                acts = [
                    flat_rows(
                        subject.model(one).read(batch.input_ids, [subject.site]).acts[subject.site], kept
                    )
                    for one in (SIDES if view in PAIRED else (side,))
                ]
                acts = [one.to(dictionary.device, torch.float32) for one in acts]
                signal = (
                    acts[1] - acts[0]
                    if view == "diff"
                    else torch.stack(acts, 1)
                    if view == "pair"
                    else acts[0]
                )
                codes = dictionary.encode(signal)
                fires.index_add_(0, codes.indices.long(), (codes.values > 0).double())
                mass.index_add_(0, codes.indices.long(), codes.values.double())
                tokens += len(kept)
            advance(batch.tokens)
    norms = dictionary.decoder_norms()[:, SIDES.index(side) if view == "pair" else 0]
    counts = fires.cpu().numpy()
    return Habits(
        counts / max(tokens, 1),
        mass.cpu().numpy() / np.maximum(counts, 1),
        norms.double().cpu().numpy(),
        tokens,
    )


def matched_latents(latents: Sequence[int], of: Habits, count: int, seed: int) -> list[list[int]]:
    """For each latent up to `count` others, drawn from the nearest in rate, strength and norm; no latent twice.

    Distance is the sum of the absolute differences of the logarithms.

    Args:
        latents: To be matched, none of them a match of another.
        of: How all latents behave.
        count: Matches of each.
        seed: Of the draw.
    """
    rng = np.random.default_rng([seed, 23])
    columns = np.stack([of.rate + 0.5 / max(of.tokens, 1), of.mean + 1e-6, of.norm + 1e-12])
    logs, taken, found = np.log(columns), set(latents), []
    for latent in latents:
        distance = np.abs(logs - logs[:, latent : latent + 1]).sum(0)
        nearest = np.argsort(distance, kind="stable")
        # A silent latent is no match of one that fires.
        fits = [
            int(one) for one in nearest if one not in taken and (of.rate[one] > 0 or of.rate[latent] == 0)
        ]
        pool = fits[: max(POOL, count)]
        drawn = [int(one) for one in rng.choice(pool, min(count, len(pool)), replace=False)] if pool else []
        taken |= set(drawn)
        found.append(drawn)
    return found


def control_changes(changes: Sequence[Change], matches: Sequence[Sequence[int]]) -> list[tuple[Change, ...]]:
    """The same changes on matched latents, as often as every one of them has a match."""
    count = min(map(len, matches), default=0)
    return [
        tuple(change.on(own[place]) for change, own in zip(changes, matches, strict=True))
        for place in range(count)
    ]


def described(latent: int, matches: Sequence[int], of: Habits) -> dict[str, Any]:
    """A latent and its matches, as plain values."""

    def row(one: int) -> dict[str, Any]:
        figures = {name: float(getattr(of, name)[one]) for name in ("rate", "mean", "norm")}
        return {"latent": int(one)} | figures

    return row(latent) | {"matched": [row(one) for one in matches]}


__all__ = ["Habits", "control_changes", "described", "habits", "matched_latents"]
