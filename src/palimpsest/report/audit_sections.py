"""An audit as sections of the page: its verdicts on top, then what they rest on, its latents, tables and method."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from palimpsest.errors import ArtifactError
from palimpsest.report import facts, tables, verdicts
from palimpsest.report.charts import build_charts, chart_height
from palimpsest.report.latent_panels import latent_panels
from palimpsest.report.null_charts import STRIPS, strip_text
from palimpsest.report.parts import Chart, Run, Section, Template

Audit = dict[str, Any]

WORDS = {
    "nulls_features": ("Features", "c_D: left of zero it changed less than the other corpora"),
    "nulls_loss": ("Loss", "Δloss: left of zero the tuned model predicts the corpus better"),
    "tasks_idr": ("IDR_rel", "with interval; shaded: too small to detect"),
    "tasks_loss": ("Δloss", "with interval; left of zero: tuned predicts it better"),
    "overlap": ("Overlap", "of the two models' k strongest latents{}; bands are intervals over documents"),
    "idr": (
        "IDR_rel",
        "of each task; above zero the task's latents moved more than those of general text",
    ),
    "layers": ("Relative change", "of all weights of a layer"),
}
"""Title and caption of each chart."""


def sections(run: Run) -> list[Section]:
    """The sections of one audit.

    Raises:
        ArtifactError: A table of the audit is missing or damaged.
    """
    audit = dict(run.data)
    if not isinstance(audit.get("datasets", []), list | None):
        raise ArtifactError(f"{run.path / 'audit.json'} is no audit", expected="a list of corpora")
    curve = run.artifact.read_table(audit.get("curve") or "curve.parquet")
    latents = run.artifact.read_table(audit.get("latents") or "latents.parquet")
    return audit_sections(audit, curve, latents, run.name)


def audit_sections(audit: Audit, curve: pa.Table, latents: pa.Table, name: str = "") -> list[Section]:
    """The sections of an audit's content.

    Args:
        audit: The content of `audit.json`.
        curve: The table of `curve.parquet`.
        latents: The table of `latents.parquet`.
        name: Of the run.

    Returns:
        In the order of the page; the first stands above all others.
    """
    context = _context(audit, curve, latents)
    found = context["calibration"]
    top = ("verdicts", "callouts", "claims") if found else ("callouts", "claims")
    beside = "random changes of this size" if found and found["rotations"] else "innocent fine-tunes"

    def section(key: str, title: str, order: Any, *names: str, verdict: str = "") -> Section:
        blocks = [Template(f"{one}.html.j2", context) for one in names or (key,)]
        return Section(key, title, order, run=name, verdict=verdict, blocks=blocks)

    made = [section("verdict", "Verdict", "verdict", *top, verdict=headline(audit))]
    made.append(section("compared", "What was compared", "evidence", "facts"))
    if found:
        made.append(section("calibration", f"Beside {beside}", "evidence"))
    made += [
        section("tasks", "Tasks against general text", "evidence"),
        section("curves", "Every k at once", "evidence"),
        section("latents", "Latents that entered and left", "latents"),
        section("corpora", "Corpora, and whether the dictionary can see there", "tables"),
    ]
    if context["controls"]:
        made.append(section("controls", "Controls: what the dictionary adds", "tables"))
    made.append(section("weights", "Weight change by layer", "tables"))
    made.append(section("method", "The method in plain words", "method"))
    return made


def headline(audit: Mapping[str, Any]) -> str:
    """What the audit found, in a sentence: the verdicts where there are any."""
    found = verdicts.calibration(dict(audit))
    return str(found["headline"] if found else audit.get("summary") or "This audit has no summary")


def _context(audit: Audit, curve: pa.Table, latents: pa.Table) -> dict[str, Any]:
    datasets = [(str(d.get("name")), str(d.get("role"))) for d in audit.get("datasets") or []]
    legacy = audit.get("mode") == "legacy"
    return {
        "audit": dict.fromkeys(("summary", "site", "command", "layers_note")) | audit,
        "k": audit.get("k"),
        "legacy": legacy,
        "facts": facts.facts(audit),
        "callouts": facts.callouts(audit),
        "calibration": verdicts.calibration(audit),
        "charts": _charts(audit, curve, ", as a count out of k" if legacy else ""),
        "tasks": tables.task_table(audit),
        "datasets": tables.dataset_table(audit),
        "curve": tables.curve_table(audit),
        "controls": tables.control_table(audit),
        "layers": tables.layer_table(audit),
        "panels": latent_panels(latents, datasets),
    }


def _charts(audit: Audit, curve: pa.Table, unit: str) -> dict[str, Chart]:
    made = {}
    for name, chart in build_charts(audit, curve).items():
        title, caption = WORDS[name]
        spoken = strip_text(audit["calibration"], STRIPS[name][0]) if name in STRIPS else ""
        height = chart_height(name, audit)
        made[name] = Chart(name, title, caption.format(unit), chart, height, spoken=spoken)
    return made
