"""`palimpsest audit`."""

import shlex
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.audit.config import AuditConfig
from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.display.text import visible
from palimpsest.findings import AuditFinding
from palimpsest.log import console

app = verb_app("audit", VERBS["audit"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.default
def audit(config: Annotated[AuditConfig, FLAT], *, display: Annotated[Display, FLAT] = Display()) -> int:  # noqa: B008
    """Run the audit, write its folder and its report, and print the answer."""
    from palimpsest.audit import run_audit
    from palimpsest.report import build_report

    command = shlex.join(["palimpsest", *sys.argv[1:]]) if sys.argv[1:2] == ["audit"] else None
    artifact = run_audit(config, command=command)
    report = build_report(artifact.path)
    result = artifact.read_json("audit.json")
    emit(display, result, lambda: show(result, str(report)))
    return _gate(config, result)


def _gate(config: AuditConfig, result: dict[str, Any]) -> int:
    """The exit code: 3 when what the user asked to fail on was found, or could not be ruled out."""
    fail_on = config.calibration.fail_on
    if not fail_on:
        return 0
    calibration = AuditFinding.from_dict(result).calibration
    if calibration is None:
        sys.stderr.write("palimpsest audit: gate failed: there is no verdict\n")
        return 3
    undecided = set(calibration.refused)
    if "damaged" in fail_on:
        undecided |= {domain.name for domain in calibration.domains if domain.loss is None}
    found = {"undeclared": calibration.undeclared, "damaged": calibration.damaged}
    failed = {reason: found[reason] for reason in fail_on if found[reason]}
    if undecided:
        failed["without a verdict"] = sorted(undecided)
    for reason, names in failed.items():
        sys.stderr.write(f"palimpsest audit: gate failed, {reason}: {', '.join(names)}\n")
    return 3 if failed else 0


def show(result: dict[str, Any], report: str) -> None:
    """Print the table of tasks and the answer."""
    from rich.console import Console
    from rich.table import Table

    pair = result["pair"]
    table = Table(title=visible(f"{pair['tuned']} against {pair['base']} at {result['site']}"))
    for column in (
        "corpus",
        "documents",
        f"IM (k={result['k']})",
        "IDR_rel",
        "churn ratio",
        "Δloss",
        "KL",
        "‖Δh‖/‖h‖",
        "R²_Δ",
    ):
        table.add_column(column, justify="left" if column == "corpus" else "right")
    tasks = {task["name"]: task for task in result["tasks"]}
    for corpus in result["datasets"]:
        task = tasks.get(corpus["name"])
        table.add_row(
            visible(corpus["name"]),
            str(corpus["documents"]),
            _number(corpus["intersection_mean"][str(result["k"])]),
            "" if task is None else _interval(task["idr"], task["ci"], percent=True),
            "" if task is None else _interval(task["churn_ratio"], task["churn_ratio_ci"]),
            _interval(corpus["delta_loss"], corpus["delta_loss_ci"], signed=True),
            _number(corpus["kl"]),
            _number(corpus["relative_drift"]),
            _number(corpus["r2_delta"]),
        )
    width = None if console().is_terminal else 150
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
    for warning in result["warnings"]:
        say(f"! {warning}")
    calibration = result["calibration"]
    if calibration is not None:
        _show_verdicts(calibration)
    say(result["summary"])
    if calibration is None:
        say("Raw figures: how far a harmless fine-tune of this size would move each text is not in them.")
    say(f"Report: {report}")


def _show_verdicts(calibration: dict[str, Any]) -> None:
    """Print one line per corpus."""
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Beside {calibration['nulls']} {calibration['source']} nulls, level {calibration['alpha']:g}"
    )
    for column in (
        "corpus",
        "verdict",
        "kind",
        "calibrated c",
        "z",
        "p",
        "Δloss beyond nulls",
        "z",
        "p",
        "q",
    ):
        table.add_column(column, justify="left" if column in ("corpus", "verdict", "kind") else "right")
    for domain in calibration["domains"]:
        cells = []
        for test in (domain["features"], domain["loss"]):
            known = test is not None
            cells += [
                _interval(test["residual"], test["ci"], signed=True) if known else "–",
                f"{test['z']:+.1f}" if known and test["z"] is not None else "–",
                f"{test['p']:.1g}" if known and test["p"] is not None else "–",
            ]
        q = "–" if domain["q"] is None else f"{domain['q']:.1g}"
        table.add_row(visible(domain["name"]), domain["verdict"], domain["kind"] or "–", *cells, q)
    width = None if console().is_terminal else 170
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
    for domain in calibration["domains"]:
        say(f"  {domain['sentence']}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(
    value: float | None, bounds: list[float | None] | None, *, percent: bool = False, signed: bool = False
) -> str:
    if value is None or bounds is None or None in bounds:
        return "–"
    spec = "+.1%" if percent else "+.3f" if signed else ".3f"
    lo, hi = (format(bound, spec) for bound in bounds if bound is not None)
    return f"{value:{spec}} [{lo}, {hi}]"
