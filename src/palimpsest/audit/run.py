"""The audit as a stage: a config in, an artifact folder out."""

import shlex
import time
from dataclasses import replace
from typing import Any

from palimpsest.artifacts import Artifact, RunFolder, check_claim, open_artifact
from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.inputs import MAIN, Inputs, open_inputs
from palimpsest.audit.measure import measure_corpora
from palimpsest.audit.results import Evidence, audit_finding, estimates_of, write_tables
from palimpsest.audit.verdict import calibrated, check_gate
from palimpsest.harvest import Harvester
from palimpsest.harvest.cached import CachedHarvester
from palimpsest.log import log
from palimpsest.models import fingerprint, weight_deltas
from palimpsest.options import as_flags, config_dict


def run_audit(config: AuditConfig, *, command: str | None = None) -> Artifact:
    """Measure what a fine-tune changed, and where: `docs/measures/overlap.md` defines every figure.

    Args:
        config: Pair, dictionary, corpora and options.
        command: Recorded as what reproduces the result; made from the config when absent.

    Returns:
        The finished folder: `audit.json`, `curve.parquet`, `latents.parquet`.

    Raises:
        PalimpsestError: Bad input, before anything is written; or NaN and a full disk during the pass, after
            which `resume` continues with the corpora that are left.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    config.check_text()
    if config.calibration.battery is not None:
        check_gate(config, Battery(config.calibration.battery))
    inputs = open_inputs(config)
    entries = inputs.entries(config)
    with RunFolder(
        config.out,
        stage="audit",
        config=config_dict(config),
        inputs=entries,
        seed=config.run.seed,
        device=str(inputs.pair.base.device),
        models={"base": config.base, "tuned": config.tuned, "kind": inputs.pair.kind},
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            log.warning("%s is complete already; nothing was run.", config.out)
            return open_artifact(config.out, stage="audit")
        if inputs.battery is not None and not inputs.battery.has_loss:
            config = replace(config, loss=False)
        evidence = _measure(config, inputs, entries, run)
        estimates = estimates_of(config, evidence, MAIN)
        finding = audit_finding(config, evidence, estimates, command or default_command(config))
        if inputs.battery is not None:
            finding = calibrated(config, inputs, evidence, finding)
        write_tables(run, config, evidence, estimates)
        run.write_json("audit.json", finding.to_dict())
        return run.finish(summary=finding.summary)


def default_command(config: AuditConfig) -> str:
    """The command line that gives this audit."""
    return shlex.join(["palimpsest", "audit", *as_flags(config, positional=("base", "tuned"))])


def _measure(config: AuditConfig, inputs: Inputs, entries: dict[str, Any], run: RunFolder) -> Evidence:
    started = time.perf_counter()
    pair, battery = inputs.pair, inputs.battery
    measures = inputs.measures(config)
    # KL needs both models' predictions, so the base runs again.
    if battery is None or config.kl:
        harvester = Harvester(pair, inputs.sites, loss=config.loss, kl=config.kl, spool=run.part("spool"))
    else:
        harvester = CachedHarvester(pair.tuned, inputs.sites, battery.base_side, loss=config.loss)
    sums = measure_corpora(harvester, inputs.corpora, measures, run, config.models.tokens_per_batch)
    run.timing("measure", time.perf_counter() - started)
    prints = {"base": entries["base"]["sha256"], "tuned": fingerprint(pair.tuned)}
    run.update(models={"kind": pair.kind, "base": config.base, "tuned": config.tuned, "fingerprints": prints})
    deltas = None if pair.one_at_a_time else weight_deltas(pair)
    return Evidence(
        pair=pair,
        dictionary=inputs.dictionary,
        dictionary_entry={
            "path": inputs.dictionary_path,
            "sha256": entries["dictionary"].get("sha256"),
        },
        site=inputs.site,
        corpora={corpus.name: (corpus, size) for corpus, size in inputs.corpora},
        sums=sums,
        deltas=deltas,
        fingerprints=prints,
    )
