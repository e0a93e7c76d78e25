"""From sums to findings and tables: the content of an audit's folder."""

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from palimpsest.artifacts import RunFolder
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.estimate import Comparison, CorpusEstimates, Settings, compare, curve_rows, exchange
from palimpsest.audit.inputs import GENERAL
from palimpsest.audit.latent_table import latent_rows
from palimpsest.audit.measure import Size, Text
from palimpsest.audit.summary import summary, warnings
from palimpsest.audit.sums import CorpusSums
from palimpsest.dictionaries import Dictionary
from palimpsest.findings import AuditFinding, ControlFinding, CorpusFinding, TaskFinding
from palimpsest.models import LayerDelta, ModelPair, edits_activations

CONTROLS = ("random", "pca", "neurons")


class Evidence(NamedTuple):
    """Everything the pass left, before any estimate."""

    pair: ModelPair
    dictionary: Dictionary
    dictionary_entry: dict[str, Any]
    site: str
    corpora: dict[str, tuple[Text, Size]]
    sums: dict[str, dict[str, CorpusSums]]
    deltas: list[LayerDelta] | None
    fingerprints: dict[str, str]


def settings_of(config: AuditConfig) -> Settings:
    """How the config wants intervals."""
    return Settings(config.k, config.legacy, config.confidence, config.resamples, config.run.seed)


def estimates_of(config: AuditConfig, evidence: Evidence, measure: str) -> dict[str, CorpusEstimates]:
    """Estimates of every corpus through one measure; a corpus uses the same resamples in every measure."""
    settings = settings_of(config)
    return {
        name: CorpusEstimates(found[measure], settings, stream)
        for stream, (name, found) in enumerate(evidence.sums.items())
    }


def audit_finding(
    config: AuditConfig, evidence: Evidence, estimates: dict[str, CorpusEstimates], command: str
) -> AuditFinding:
    """Estimate everything and put it into words."""
    corpora = [_corpus_finding(config, evidence, name, one) for name, one in estimates.items()]
    tasks = [
        _task_finding(config, corpus, estimates[corpus.name], estimates[GENERAL])
        for corpus in corpora
        if corpus.role == "task"
    ]
    controls = [
        _control_finding(name, estimates_of(config, evidence, name))
        for name in evidence.sums[GENERAL]
        if name in CONTROLS
    ]
    dictionary = evidence.dictionary
    return AuditFinding(
        summary=summary(config, corpora, tasks),
        command=command,
        pair=_pair(config, evidence),
        site=evidence.site,
        dictionary=evidence.dictionary_entry
        | {
            "latents": dictionary.n_latents,
            "k": dictionary.k,
            "activation": dictionary.activation,
            "site": dictionary.site,
        },
        k=config.k,
        ks=list(range(1, len(estimates[GENERAL].curve.mean) + 1)),
        mode="legacy" if config.legacy else "macro",
        tokens="all" if config.legacy or config.corpora.all_positions else "content",
        loss_measured=config.loss,
        kl_measured=config.kl,
        confidence=config.confidence,
        resamples=config.resamples,
        seed=config.run.seed,
        datasets=corpora,
        tasks=tasks,
        controls=controls,
        layers=_layers(evidence),
        layers_note=_layers_note(evidence),
        warnings=warnings(config, evidence.dictionary, corpora, _notes(evidence)),
    )


def write_tables(
    run: RunFolder, config: AuditConfig, evidence: Evidence, estimates: dict[str, CorpusEstimates]
) -> None:
    """Write `curve.parquet` and `latents.parquet`."""
    rows: list[dict[str, Any]] = []
    latents: list[pa.Table] = []
    for name, one in estimates.items():
        general = name == GENERAL
        against = None if general else compare(one, estimates[GENERAL])
        rows += curve_rows(name, "general" if general else "task", one, against)
        share = _length_share(one)
        table = latent_rows(
            name, one.sums, share, evidence.pair.tokenizer, config.top_latents, config.confidence
        )
        latents.append(table)
    run.write_table("curve.parquet", pa.Table.from_pylist(rows))
    run.write_table("latents.parquet", pa.concat_tables(latents))


def _corpus_finding(
    config: AuditConfig, evidence: Evidence, name: str, one: CorpusEstimates
) -> CorpusFinding:
    corpus, size = evidence.corpora[name]
    value, value_ci = one.mean("value_change", "valued")
    optional: dict[str, Any] = {}
    # A battery without activations leaves nothing to measure a change of activations by.
    if np.isfinite(one.sums.columns["drift"]).all():
        optional["r2_delta"], optional["r2_delta_ci"] = one.r2_delta()
        optional["relative_drift"], optional["relative_drift_ci"] = one.mean("drift", "tokens")
        # Two models that agree leave nothing to be blind to.
        changed = one.total("delta_squares") > 0
        optional["blind"] = changed and not optional["r2_delta_ci"][1] > 0
    if config.loss:
        delta, delta_ci = one.mean("loss_tuned", "predicted", minus="loss_base")
        loss = {side: one.mean(f"loss_{side}", "predicted")[0] for side in ("base", "tuned")}
        optional |= {"loss": loss, "delta_loss": delta, "delta_loss_ci": delta_ci}
    if config.kl:
        optional["kl"], optional["kl_ci"] = one.mean("kl", "predicted")
    tokens = one.total("tokens")
    return CorpusFinding(
        name=name,
        role="general" if name == GENERAL else "task",
        source=", ".join(map(str, corpus.sources)),
        documents=len(one.sums.documents),
        tokens=int(tokens),
        skipped_tokens=int(tokens - one.total("listed")),
        short_tokens=int(one.total("short")),
        bad_rows=size.bad_rows,
        **_curve(one),
        list_length_share=_length_share(one),
        value_change=value,
        value_change_ci=value_ci,
        fve={side: one.fve(side) for side in ("base", "tuned")},
        l0={side: one.total(f"l0_{side}") / tokens for side in ("base", "tuned")},
        **optional,
    )


def _curve(one: CorpusEstimates) -> dict[str, Any]:
    """Intersection means and their intervals by k."""
    lo, hi = one.interval(one.curve.samples)
    ks = [str(k + 1) for k in range(len(one.curve.mean))]
    return {
        "intersection_mean": dict(zip(ks, one.curve.mean.tolist(), strict=True)),
        "ci": {k: (float(a), float(b)) for k, a, b in zip(ks, lo, hi, strict=True)},
    }


def _length_share(one: CorpusEstimates) -> float:
    return one.mean("length_gap", "listed")[0]


def _task_finding(
    config: AuditConfig, corpus: CorpusFinding, one: CorpusEstimates, general: CorpusEstimates
) -> TaskFinding:
    figures = _figures(compare(one, general), config.k)
    return TaskFinding(
        name=corpus.name,
        p_exchange=exchange(one, general),
        relative_drift=corpus.relative_drift,
        relative_drift_ci=corpus.relative_drift_ci,
        delta_loss=corpus.delta_loss,
        delta_loss_ci=corpus.delta_loss_ci,
        kl=corpus.kl,
        kl_ci=corpus.kl_ci,
        **figures,
    )


def _figures(comparison: Comparison, k: int) -> dict[str, Any]:
    i = k - 1

    def interval(bounds: np.ndarray) -> tuple[float, float]:
        return float(bounds[0, i]), float(bounds[1, i])

    return {
        "k": k,
        "idr": float(comparison.idr[i]),
        "ci": interval(comparison.idr_ci),
        "idr_abs": float(comparison.idr_abs[i]),
        "idr_abs_ci": interval(comparison.idr_abs_ci),
        "churn_ratio": float(comparison.churn_ratio[i]),
        "churn_ratio_ci": interval(comparison.churn_ratio_ci),
        "minimum_detectable_idr": float(comparison.minimum_detectable[i]),
    }


def _control_finding(name: str, estimates: dict[str, CorpusEstimates]) -> ControlFinding:
    general = estimates[GENERAL]
    datasets = [
        {
            "name": corpus,
            **_curve(one),
            "fve": {side: one.fve(side) for side in ("base", "tuned")},
            "r2_delta": one.r2_delta()[0],
        }
        for corpus, one in estimates.items()
    ]
    k = general.settings.k
    tasks = [
        {"name": corpus, **_figures(compare(one, general), k)}
        for corpus, one in estimates.items()
        if corpus != GENERAL
    ]
    return ControlFinding(name, datasets, tasks)


def _notes(evidence: Evidence) -> list[str]:
    """What is odd about the inputs, whatever the figures are."""
    notes = list(evidence.pair.notes)
    prints = evidence.fingerprints
    if prints["base"] == prints["tuned"]:
        notes.append("The two models have the same weights.")
    notes += [f"Reading the dictionary: {note}" for note in evidence.dictionary.metadata.get("notes") or []]
    own = evidence.dictionary.site
    if own and evidence.pair.tuned.sites.canonical(own) != evidence.site:
        notes.append(f"The dictionary was trained at {own} and is read at {evidence.site}.")
    return notes


def _layers_note(evidence: Evidence) -> str | None:
    if edits_activations(evidence.pair.tuned):
        return "the adapter edits activations; no weight changed"
    if evidence.deltas is None:
        return "not measured: the two models were never in memory together (one_at_a_time)"
    return None


def _layers(evidence: Evidence) -> list[dict[str, Any]] | None:
    if evidence.deltas is None or edits_activations(evidence.pair.tuned):
        return None
    return [delta._asdict() | {"relative": delta.relative} for delta in evidence.deltas]


def _pair(config: AuditConfig, evidence: Evidence) -> dict[str, Any]:
    model = evidence.pair.tuned
    return {
        "base": config.base,
        "tuned": config.tuned,
        "kind": evidence.pair.kind,
        "dtype": str(model.dtype).removeprefix("torch."),
        "d_model": model.sites.d_model,
        "n_layers": model.sites.n_layers,
        "fingerprint_base": evidence.fingerprints["base"],
        "fingerprint_tuned": evidence.fingerprints["tuned"],
    }
