"""A run of steering in one sentence, and what its reader should know. No torch."""

from __future__ import annotations

from typing import Any

from palimpsest.interpret.steering.result import FEWEST_DOCUMENTS, Cost, SteeringRun, Strength, written


def sentence(found: SteeringRun) -> str:
    """What was changed, whether it shows, and how far it can be turned up."""
    parts = [f"{written(found.changes)} in the {found.side} model at {found.site}"]
    if found.prompts:
        own = "tuned" if found.side == "tuned" else "base"
        changed = sum(row["steered"] != row[own] for row in found.prompts)
        parts.append(f"{changed} of {len(found.prompts)} continuations change")
    parts += [f"'{row['text']}' {row['change']:+.2f} nats" for row in found.watch]
    if found.sweep:
        parts.append(_guard(found))
    return f"{parts[0]}: {'; '.join(parts[1:])}."


def _guard(found: SteeringRun) -> str:
    largest, limit = found.guard["largest_ok"], found.guard["ratio"]
    if largest is None:
        weakest = found.sweep[0]
        return f"even strength {weakest.strength:g} passes {limit:g} times the perplexity ({ratio(weakest)})"
    row = next(one for one in found.sweep if one.strength == largest)
    text = f"up to strength {largest:g} perplexity stays below {limit:g} times ({ratio(row)}"
    return f"{text}; {control_ratios(row)})" if row.controls else f"{text})"


def control_ratios(row: Strength) -> str:
    """Perplexity ratios of a strength's controls."""
    return "control latents " + ", ".join(ratio(one | {"perplexity_ratio_ci": None}) for one in row.controls)


def ratio(cost: Cost | dict[str, Any]) -> str:
    """A perplexity ratio with its interval."""
    data = cost if isinstance(cost, dict) else vars(cost)
    bounds = data["perplexity_ratio_ci"]
    text = "∞" if data["perplexity_ratio"] is None else f"{data['perplexity_ratio']:.3g}"
    return text if bounds is None else f"{text} [{bounds[0]:.3g}, {bounds[1]:.3g}]"


def notes_of(found: SteeringRun, *, wanted_controls: int) -> list[str]:
    """What a reader should know of a run."""
    notes = []
    if found.sweep and found.unsteered is not None:
        documents = found.unsteered["documents"]
        if documents < FEWEST_DOCUMENTS:
            notes.append(
                f"{documents} documents are too few for intervals: the guard goes by the perplexity ratio itself."
            )
        if found.tokens != "all":
            notes.append(
                f"Continuations are steered on {found.tokens} tokens only; held-out text has neither and is steered "
                "on all."
            )
        count = min((len(one["matched"]) for one in found.controls), default=0)
        if count < wanted_controls:
            notes.append(f"{count} of {wanted_controls} control latents: no further ones fire on this text.")
    silent = [one["latent"] for one in found.controls if one["rate"] == 0]
    if silent:
        latents = ", ".join(map(str, silent))
        notes.append(
            f"On the held-out text these latents never fire, so scaling or ablating them does nothing there: {latents}."
        )
    if any(one["mode"] == "clamp" for one in found.changes) and any(one.strength == 0 for one in found.sweep):
        notes.append("At strength 0 a clamped latent is set to 0, which is not the unsteered model.")
    return notes


__all__ = ["control_ratios", "notes_of", "ratio", "sentence"]
