"""`palimpsest report`."""

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

app = verb_app("report", VERBS["report"].capitalize() + ".")


@app.default
def report(
    run: Path,
    *,
    out: Path | None = None,
    display: Annotated[Display, Parameter(name="*")] = Display(),  # noqa: B008
) -> None:
    """Write the report of a finished run.

    Args:
        run: Folder of an audit.
        out: Where the page goes; `report.html` in the run's folder by default.
        display: What is printed.
    """
    from palimpsest.report import build_report

    path = build_report(run, out)
    emit(display, {"report": str(path)}, lambda: say(f"Report: {path}"))
