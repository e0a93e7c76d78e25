"""A diff in a few sentences."""

from __future__ import annotations

from dataclasses import replace

from palimpsest.diff.result import Diff, PatchRow

PREFERRED = ("best:attribution", "best:activation_change")
"""The one ranking that the summary names: fixed beforehand, so that it is not the luckiest of several."""

NOTHING = 0.01
"""Share recovered by the true difference below which patching reaches none of the measured predictions."""


def summarise(found: Diff) -> Diff:
    """The finding with its summary."""
    sentences = [_counts(found)]
    if found.patching:
        sentences.append(_causes(found))
    return replace(found, summary=" ".join(sentences))


def _counts(found: Diff) -> str:
    only, latents = found.tuned_only, f"{found.dictionary['n_latents']:,}"
    null = "no null diff was given"
    if only["null"] is not None:
        null = f"null pairs leave {only['null']:.1f}"
    if found.method != "crosscoder":
        return (
            f"Of {latents} latents {only['surviving']:,} point where the tuned model's activations vary and the base's "
            f"do not, {only['undetermined']:,} more may; {null}."
        )
    text = (
        f"Of {latents} latents {only['raw']:,} look tuned-only, {only['surviving']:,} of them survive Latent Scaling "
        f"and {only['undetermined']:,} stay undetermined; {null}"
    )
    seen = only.get("sensitivity")
    return text + (
        "."
        if seen is None
        else f". The rule would pass {seen['tuned-specific']:.0%} of the latents if the base lacked them."
    )


def _causes(found: Diff) -> str:
    measured = [row.positions for row in found.patching]
    place = "all" if "all" in measured else measured[0]
    rows = {row.set: row for row in found.patching if row.positions == place}
    unit = "prediction" if place == "all" else "first answer token"
    everything, ceiling = rows.get("all+bias"), rows.get("raw")
    if everything is None or everything.share is None:
        return "The two models predict alike here: there is no KL to recover."
    gap = f"of the KL between base and tuned activations ({found.gap[place]:.3f} nats per {unit})"
    if ceiling is not None and ceiling.share is not None and ceiling.share < NOTHING:
        return (
            f"Even the true difference recovers nothing {gap}: no measured prediction sees a patched token."
        )
    verb = "recover" if everything.share >= 0 else "make it worse:"
    text = f"All latents with the bias {verb} {share_text(everything)} {gap}"
    chosen = next((rows[name] for name in PREFERRED if name in rows), None)
    if chosen is None:
        return text + "."
    ranking = chosen.set.partition(":")[2]
    worse = rows.get(f"worst:{ranking}")
    seeds = [
        row.share
        for row in found.patching
        if row.set == f"random:{ranking}" and row.positions == place and row.share is not None
    ]
    controls = [] if worse is None or worse.share is None else [f"the next {worse.size:,}: {worse.share:.1%}"]
    if seeds:
        controls.append(f"random sets of the same weight: {sum(seeds) / len(seeds):.1%}")
    beside = f" ({'; '.join(controls)})" if controls else ""
    return (
        f"{text}; the {chosen.size:,} strongest by {ranking.replace('_', ' ')} {share_text(chosen)}{beside}."
    )


def share_text(row: PatchRow) -> str:
    """The share with its interval."""
    if row.share is None:
        return "no share"
    return f"{row.share:.1%}" + ("" if row.ci is None else f" [{row.ci[0]:.1%}, {row.ci[1]:.1%}]")
