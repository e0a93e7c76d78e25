"""A diff in a few sentences."""

from __future__ import annotations

from dataclasses import replace

from palimpsest.diff.result import Diff, PatchRow


def summarise(found: Diff) -> Diff:
    """The finding with its summary."""
    sentences = [_counts(found)]
    if found.patching:
        sentences.append(_causes(found))
    return replace(found, summary=" ".join(filter(None, sentences)))


def _counts(found: Diff) -> str:
    only = found.tuned_only
    null = (
        "no null diff was given"
        if only["null"] is None
        else f"null pairs leave {only['null']:.1f} (of {only['null_raw']:.1f})"
    )
    return (
        f"Of {found.dictionary['n_latents']:,} latents {only['raw']:,} look tuned-only, {only['surviving']:,} of them "
        f"survive Latent Scaling and {only['undetermined']:,} stay undetermined; {null}."
    )


def _causes(found: Diff) -> str:
    rows = {row.set: row for row in found.patching if row.positions == "all"}
    everything = rows.get("all+bias") or rows.get("all")
    if everything is None or everything.share is None:
        return "The two models predict alike here: there is no KL to recover."
    text = (
        f"All latents with the bias recover {share_text(everything)} of the KL between base and tuned activations "
        f"({found.gap['all']:.3f} nats per prediction)"
    )
    best = [row for name, row in rows.items() if name.startswith("best:") and row.share is not None]
    if best:
        top = max(best, key=lambda row: row.share or 0.0)
        text += f"; the best half by {top.set.partition(':')[2]} ({top.size:,} latents) {share_text(top)}"
    return text + "."


def share_text(row: PatchRow) -> str:
    """The share with its interval."""
    if row.share is None:
        return "no share"
    return f"{row.share:.1%}" + ("" if row.ci is None else f" [{row.ci[0]:.1%}, {row.ci[1]:.1%}]")
