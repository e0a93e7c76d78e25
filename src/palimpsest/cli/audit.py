"""`palimpsest audit`."""

import shlex
import sys
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.audit.config import AuditConfig
from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.log import console

app = verb_app("audit", VERBS["audit"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.default
def audit(config: Annotated[AuditConfig, FLAT], *, display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """Run the audit, write its folder and its report, and print the answer."""
    from palimpsest.audit import run_audit
    from palimpsest.report import build_report

    command = shlex.join(["palimpsest", *sys.argv[1:]]) if sys.argv[1:2] == ["audit"] else None
    artifact = run_audit(config, command=command)
    report = build_report(artifact.path)
    result = artifact.read_json("audit.json")
    emit(display, result, lambda: show(result, str(report)))


def show(result: dict[str, Any], report: str) -> None:
    """Print the table of tasks and the answer."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{result['pair']['tuned']} against {result['pair']['base']} at {result['site']}")
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
            corpus["name"],
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
    say(result["summary"])
    say("Raw figures: how far a harmless fine-tune of this size would move each text is not in them.")
    say(f"Report: {report}")


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
