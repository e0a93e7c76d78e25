"""From a measured suspect to its verdict: the battery's nulls, and nulls of the suspect's own if asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from palimpsest.artifacts import input_entry
from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.battery.make import CALIBRATION
from palimpsest.audit.calibration import Level, calibrate, nulls_needed
from palimpsest.audit.config import AuditConfig
from palimpsest.audit.inputs import Inputs
from palimpsest.audit.nulls.store import Figures, Nulls, figures_of, panel_of
from palimpsest.audit.results import Evidence
from palimpsest.errors import ConfigError, NumericsError
from palimpsest.findings import AuditFinding, CalibrationFinding, Range


def check_gate(config: AuditConfig, battery: Battery) -> None:
    """Refuse, before anything is computed, a verdict that this battery cannot give.

    Raises:
        ConfigError: No nulls, or too few of them for a gate at this level; or a gate on what was not measured.
    """
    options = config.calibration
    nulls = Nulls(battery.path) if (battery.path / CALIBRATION).exists() else None
    if options.null == "spectrum" and config.models.one_at_a_time:
        raise ConfigError(
            "Spectrum nulls need both models in memory", found="--one-at-a-time", fix="Leave one of them out"
        )
    if nulls is None and options.null is None and (options.declared or options.fail_on):
        raise ConfigError(
            f"The battery {battery.path} has no nulls, so there is no verdict",
            fix=f"Run `palimpsest battery calibrate {battery.path}`, or pass --null spectrum",
        )
    if not options.fail_on:
        return
    if "damaged" in options.fail_on and (nulls is None or not config.loss or not battery.has_loss):
        raise ConfigError(
            "A gate on damage needs losses and trained nulls",
            expected="a battery with losses, calibrated, and an audit without --no-loss",
        )
    need = nulls_needed(options.alpha, matched=nulls is None)
    counts = _counts(battery.names, nulls, options.spectrum_nulls)
    if short := {name: count for name, count in counts.items() if count < need}:
        raise ConfigError(
            f"Too few nulls for a gate at level {options.alpha:g}",
            expected=f"at least {need} nulls that were not trained on the corpus they judge",
            found=", ".join(f"{count} for {name}" for name, count in short.items()),
            fix=f"Run `palimpsest battery calibrate {battery.path} --nulls N` with more, or raise --alpha",
        )


def calibrated(
    config: AuditConfig, inputs: Inputs, evidence: Evidence, finding: AuditFinding
) -> AuditFinding:
    """The finding with its verdicts, where there are nulls to give them."""
    battery, options = inputs.battery, config.calibration
    assert battery is not None
    readers = {reader.name: reader.site for reader in battery.readers if not reader.control}
    suspect = figures_of(evidence.sums)
    common: dict[str, Any] = {
        "delta_loss_ci": _loss_intervals(finding),
        "declared": options.declared,
        "settings": Level(options.alpha, config.confidence, config.resamples, config.run.seed),
        "battery": input_entry(battery.path),
    }
    trained = spectrum = None
    if (battery.path / CALIBRATION).exists():
        nulls = Nulls(battery.path)
        used = nulls.used
        pairs = [(record["family"], nulls.figures(record)) for record in used]
        panel = panel_of(battery.names, suspect, pairs, readers, config.k, loss=config.loss)
        records = [_record(record) for record in used]
        common["battery"] |= {"nulls_sha256": input_entry(nulls.path)["sha256"]}
        trained = calibrate(panel, excluded=nulls.excluded, null_records=records, **common)
    notes = []
    if options.null == "spectrum":
        try:
            spectrum = _spectrum(config, inputs, suspect, readers, common)
        except NumericsError as error:
            if trained is None:
                raise
            notes.append(f"There are no spectrum nulls: {error}")
    result = _joined(trained, spectrum)
    if result is None:
        note = (
            "The battery has no nulls: these are raw figures. `palimpsest battery calibrate` makes a verdict."
        )
        return replace(finding, warnings=[*finding.warnings, note])
    return _with_verdicts(replace(finding, warnings=[*finding.warnings, *notes]), result)


def _counts(names: Sequence[str], nulls: Nulls | None, spectrum: int) -> dict[str, int]:
    if nulls is None:
        return dict.fromkeys(names, spectrum)
    return {name: sum(record["family"] != name for record in nulls.used) for name in names}


def _loss_intervals(finding: AuditFinding) -> dict[str, Range] | None:
    found = {row.name: row.delta_loss_ci for row in finding.datasets if row.delta_loss_ci is not None}
    return found or None


def _record(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: record[key] for key in ("name", "family", "method", "lr", "steps")}


def _spectrum(
    config: AuditConfig,
    inputs: Inputs,
    suspect: Figures,
    readers: Mapping[str, str],
    common: Mapping[str, Any],
) -> CalibrationFinding:
    from palimpsest.audit.nulls.suspect import spectrum_figures

    found = spectrum_figures(config, inputs, suspect)
    battery = inputs.battery
    assert battery is not None
    pairs = [("spectrum", figures) for _, figures in found]
    panel = panel_of(battery.names, suspect, pairs, readers, config.k, loss=False)
    records = [
        {"name": f"spectrum-{index:03d}", "family": "spectrum", "method": "rotation", "alpha": alpha}
        for index, (alpha, _) in enumerate(found)
    ]
    return calibrate(panel, source="spectrum", null_records=records, **common)


def _joined(
    trained: CalibrationFinding | None, spectrum: CalibrationFinding | None
) -> CalibrationFinding | None:
    """Trained nulls decide; the suspect's own stand beside them, or alone where there are no others."""
    if spectrum is None:
        return trained
    rows = [
        {"name": one.name, "z": one.features.z, "p": one.features.p, "residual": one.features.residual}
        for one in spectrum.domains
        if one.features is not None
    ]
    beside = {"nulls": spectrum.nulls, "drift": spectrum.drift, "domains": rows}
    return replace(trained or spectrum, spectrum=beside)


def _with_verdicts(finding: AuditFinding, calibration: CalibrationFinding) -> AuditFinding:
    domains = {one.name: one for one in calibration.domains}
    tasks = []
    for task in finding.tasks:
        domain = domains[task.name]
        test = domain.features
        figures = {} if test is None else {"calibrated": test.residual, "z": test.z, "p_null": test.p}
        tasks.append(
            replace(
                task,
                **figures,
                q=domain.q,
                kind=domain.kind,
                declared=domain.declared,
                verdict=domain.verdict,
            )
        )
    warnings = list(finding.warnings)
    if calibration.extrapolated:
        lo, hi = calibration.drift["nulls"]
        warnings.append(
            f"This fine-tune's drift, log(1 - overlap on general text) = {calibration.drift['suspect']:.2f}, lies "
            f"outside its nulls' ({lo:.2f} to {hi:.2f}): the verdict extrapolates. Calibrate with other learning rates."
        )
    summary = f"{calibration.sentence} {finding.summary}"
    return replace(finding, tasks=tasks, warnings=warnings, calibration=calibration, summary=summary)
