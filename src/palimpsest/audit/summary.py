"""The audit in words: one answer, and what a reader must know before believing it."""

import math
from collections.abc import Sequence
from pathlib import Path

from scipy.stats import norm

from palimpsest.audit.config import AuditConfig
from palimpsest.dictionaries import Dictionary
from palimpsest.findings import CorpusFinding, Range, TaskFinding

FVE_LOSS = 0.1
"""A dictionary that explains this much less variance of the tuned model reads it through a worse lens."""


def summary(config: AuditConfig, corpora: Sequence[CorpusFinding], tasks: Sequence[TaskFinding]) -> str:
    """What moved, in one sentence that claims no more than an uncalibrated audit can."""
    overlap = corpora[0].intersection_mean[str(config.k)] / (config.k if config.legacy else 1)
    share = format(overlap, ".2%" if overlap > 0.99 else ".0%")
    kept = f"general text keeps {share} of its top-{config.k} latents, {_extremes(config, tasks)}"
    sentence = f"{_losses(config, corpora)}; {kept}." if config.loss else f"{kept}."
    return sentence[0].upper() + sentence[1:]


def warnings(
    config: AuditConfig, dictionary: Dictionary, corpora: Sequence[CorpusFinding], notes: Sequence[str]
) -> list[str]:
    """Reasons to trust a figure less; `notes` are those of the pair."""
    found = list(notes)
    for corpus in corpora:
        if corpus.blind:
            found.append(
                f"This dictionary is blind here: on {corpus.name} it explains none of the change between the models "
                f"(R²_Δ = {corpus.r2_delta:.2f})."
            )
        if corpus.fve["tuned"] < corpus.fve["base"] - FVE_LOSS:
            found.append(
                f"On {corpus.name} the dictionary explains {corpus.fve['tuned']:.0%} of the tuned model's activations "
                f"but {corpus.fve['base']:.0%} of the base's: its overlaps there are partly reconstruction failure."
            )
        if corpus.short_tokens > 0.1 * corpus.tokens:
            found.append(
                f"On {corpus.name} {corpus.short_tokens / corpus.tokens:.0%} of the tokens have fewer than {config.k} "
                "active latents; their overlap is taken over the latents there are."
            )
        if corpus.bad_rows:
            found.append(f"{corpus.bad_rows} rows of {corpus.name} could not be read and were left out.")
    if not config.loss:
        found.append(
            "Without losses the audit cannot tell a domain that was learned from one that was damaged."
        )
    trained_on = dictionary.metadata.get("model")
    if trained_on and Path(str(trained_on)).name != Path(config.base).name:
        found.append(f"The dictionary was trained on {trained_on}, not on {config.base}.")
    return found


def _extremes(config: AuditConfig, tasks: Sequence[TaskFinding]) -> str:
    """The task that keeps least and the one that keeps most, where that is clear among this many tasks."""
    clear = [task for task in tasks if _clear(task.idr, task.ci, config.confidence, len(tasks))]
    parts = []
    for word, best in (("fewest", max), ("most", min)):
        found = [task for task in clear if (task.idr > 0) is (word == "fewest")]
        if found:
            task = best(found, key=lambda t: t.idr)
            parts.append(f"{task.name} the {word} (IDR {task.idr:+.1%})")
    return _join(parts) if parts else "and no task differs from it beyond sampling error"


def _losses(config: AuditConfig, corpora: Sequence[CorpusFinding]) -> str:
    groups: dict[str, list[str]] = {"fell": [], "rose": []}
    for corpus in corpora:
        value, bounds = corpus.delta_loss, corpus.delta_loss_ci
        if (
            value is not None
            and bounds is not None
            and _clear(value, bounds, config.confidence, len(corpora))
        ):
            groups["fell" if value < 0 else "rose"].append(f"{corpus.name} ({value:+.2f})")
    parts = [f"{word} on {_join(names)}" for word, names in groups.items() if names]
    return f"loss {' and '.join(parts)} nats per token" if parts else "no loss changed beyond sampling error"


def _clear(value: float, bounds: Range, confidence: float, tests: int) -> bool:
    """Whether an interval widened for `tests` looks (Bonferroni, normal tails) still excludes 0."""
    if not value or not all(map(math.isfinite, (value, *bounds))):
        return False
    edge = bounds[0] if value > 0 else bounds[1]
    wider = norm.isf((1 - confidence) / (2 * tests)) / norm.isf((1 - confidence) / 2)
    return bool(abs(value) > abs(value - edge) * wider)


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
