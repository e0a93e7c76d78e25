"""From the evidence of all passes to the finding: numbers only, no models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from palimpsest.diff.attribution import AttributionResult
from palimpsest.diff.classes import CLASSES, VERDICTS
from palimpsest.diff.examples import read_examples
from palimpsest.diff.nulls import null_count
from palimpsest.diff.result import Diff, Patching
from palimpsest.diff.scaling import TARGETS, Scaling
from palimpsest.diff.statistics import Statistics
from palimpsest.diff.summary import summarise
from palimpsest.diff.table import NAMES

if TYPE_CHECKING:
    from palimpsest.diff.inputs import Inputs

RANKED = 50
"""Latents that the finding shows with examples."""

LOUDER = 1.1
"""Ratio of activation sizes from which Δnorm compares rulers of different length."""


class Evidence(NamedTuple):
    """What the passes found."""

    statistics: Statistics
    scaling: Scaling
    columns: dict[str, NDArray]
    rows: dict[str, Any]
    patching: Patching | None
    attribution: AttributionResult | None
    nulls: list[dict[str, Any]]


def finding_of(evidence: Evidence, inputs: Any, seconds: dict[str, float], notes: list[str]) -> Diff:
    """The content of `diff.json`.

    Args:
        evidence: Of all passes.
        inputs: The `Inputs` of the run.
        seconds: That each pass took.
        notes: What the reader should know beside it.
    """
    given: Inputs = inputs
    config, method, columns = given.config, given.method, evidence.columns
    arrays, patching = evidence.statistics.arrays, evidence.patching
    names = ("base", "tuned", "difference")
    fve: dict[str, float | None] = {
        name: _number(one) for name, one in zip(names, arrays["fve"], strict=True)
    }
    classes = {name: int((columns["class"] == name).sum()) for name in CLASSES}
    described = method.dictionary.describe()
    found = Diff(
        summary="",
        method=method.kind,
        pair={"base": config.base, "tuned": config.tuned},
        site=given.site,
        dictionary={"path": config.dictionary} | described,
        corpora={
            name: {"documents": int(documents), "tokens": int(tokens)}
            for name, documents, tokens in zip(
                given.texts.names, arrays["documents"], arrays["tokens"], strict=True
            )
        },
        tokens=evidence.statistics.tokens,
        fve=fve,
        l0=float(arrays["l0"]),
        dead=classes["dead"],
        classes=classes,
        tuned_only=_tuned_only(columns, evidence.nulls, evidence.rows["sensitivity"]),
        thresholds={key: float(value) for key, value in vars(config.classes).items()},
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.run.seed,
        scaling=_scaling(evidence, method.kind),
        artefacts=evidence.rows["artefacts"],
        stability=evidence.rows["stability"],
        nulls=evidence.nulls,
        gap=patching.gap if patching else {},
        patching=patching.added if patching else [],
        removal=patching.removed if patching else [],
        patched=_patched(patching),
        attribution=evidence.attribution.found if evidence.attribution else [],
        behaviours=evidence.attribution.behaviours if evidence.attribution else [],
        ranked=_ranked(evidence, given),
        seconds=seconds,
        notes=notes + _notes(evidence, method.kind) + (patching.notes if patching else []),
    )
    return summarise(found)


def _tuned_only(
    columns: dict[str, NDArray], nulls: list[dict[str, Any]], sensitivity: dict[str, float] | None
) -> dict[str, Any]:
    tuned = columns["class"] == "tuned-only"
    counts = {name: int((tuned & (columns["verdict"] == name)).sum()) for name in VERDICTS}
    return {
        "raw": int(tuned.sum()),
        "surviving": counts["tuned-specific"],
        "rejected": counts["rejected"],
        "undetermined": counts["undetermined"],
        "null": null_count(nulls, "surviving"),
        "null_raw": null_count(nulls, "raw"),
        "sensitivity": sensitivity,
    }


def _scaling(evidence: Evidence, kind: str) -> dict[str, Any]:
    """How many latents of any class pass, and the correlation of Δnorm with the ratios."""
    columns = evidence.columns
    alive = ~columns["dead"]
    verdict = columns["verdict"][alive]
    found: dict[str, Any] = {name: int((verdict == name).sum()) for name in VERDICTS}
    for target in TARGETS:
        values = columns[NAMES[target]][alive]
        known = values[np.isfinite(values)]
        found[NAMES[target]] = {
            "defined": len(known),
            "median": _number(np.median(known)) if len(known) else None,
        }
        if kind == "crosscoder":
            both = np.isfinite(values) & (np.abs(values) < 3)
            norm = columns["delta_norm"][alive][both]
            spread = both.sum() > 2 and norm.std() > 0 and values[both].std() > 0
            found[NAMES[target]]["correlation_with_delta_norm"] = (
                _number(np.corrcoef(norm, values[both])[0, 1]) if spread else None
            )
    return found


def _patched(patching: Patching | None) -> dict[str, Any]:
    if patching is None:
        return {}
    return {
        "documents": patching.documents,
        "predictions": patching.predictions,
        "base_kl": patching.base_kl,
        "loss": patching.loss,
        "samples": patching.samples,
    }


def _ranked(evidence: Evidence, given: Any) -> list[dict[str, Any]]:
    """The alive latents to look at first: by causal share where it is known, else by how much they move the base."""
    columns = evidence.columns
    share = columns["causal_share"]
    # Without a gap every share is 0, which is no order.
    order = np.abs(share) if np.nan_to_num(share).any() else columns["activation_change"]
    order = np.where(columns["dead"], -1.0, order)
    chosen = np.argsort(-np.nan_to_num(order), kind="stable")[:RANKED]
    shown = (
        "delta_norm",
        *NAMES.values(),
        "rate",
        "rate_base",
        "rate_tuned",
        "template_share",
        "activation_change",
    )
    rows = []
    for latent in chosen[~columns["dead"][chosen]]:
        row: dict[str, Any] = {"latent": int(latent), "label": None}
        row |= {key: str(columns[key][latent]) for key in ("class", "verdict")}
        row |= {key: _number(columns[key][latent]) for key in (*shown, "causal_share")}
        for name in NAMES.values():
            bounds = [_number(columns[f"{name}_{end}"][latent]) for end in ("lo", "hi")]
            row[f"{name}_ci"] = None if None in bounds else bounds
        if "stability" in columns:
            row["stability"] = _number(columns["stability"][latent])
        row["examples"] = read_examples(
            evidence.statistics.arrays, int(latent), given.pair.tokenizer, given.texts.names
        )
        rows.append(row)
    return rows


def _notes(evidence: Evidence, kind: str) -> list[str]:
    notes = []
    size, hidden = evidence.statistics.arrays["size"], int(evidence.statistics.unmeasured.sum())
    if kind == "crosscoder" and size.min() > 0 and size.max() / size.min() > LOUDER:
        notes.append(
            f"Activations of the tuned model are {size[1] / size[0]:.2f} times as long as the base's: Δnorm compares "
            "decoder lengths as they are, so shared latents may lie beside 0.5."
        )
    if hidden:
        notes.append(
            f"{hidden:,} latents fire on template and special tokens only, which are not measured (--template measures "
            "them): they have a class, but no ratio."
        )
    if kind != "crosscoder":
        notes.append(
            "This dictionary has one decoder: latents are classed by ν of the centred activations, and the ratios of "
            "reconstruction and error are not defined."
        )
    if not evidence.nulls:
        notes.append("No null diff was given (--null): the number of tuned-only latents stands alone.")
    return notes


def _number(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
