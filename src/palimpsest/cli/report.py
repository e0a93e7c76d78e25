"""`palimpsest report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

if TYPE_CHECKING:
    from palimpsest.report.build import Written

app = verb_app("report", VERBS["report"].capitalize() + ".")


@app.default
def report(
    run: Annotated[list[Path], Parameter(name="run")],
    *,
    out: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    display: Annotated[Display, Parameter(name="*")] = Display(),  # noqa: B008
) -> None:
    """Write the report of finished runs.

    Args:
        run: Folders of runs, of any stage; a folder that holds runs below it stands for all of them.
        out: A folder for the page, report.json, report.md, the plots and the latents, or a file that ends with .html
            for the page alone. One run needs none: its page goes into its own folder.
        resume: Go on with an unfinished report in that folder.
        overwrite: Replace an earlier report in that folder.
        display: What is printed.
    """
    from palimpsest.report.build import write_report

    written = write_report(run, out, resume=resume, overwrite=overwrite)
    data = {"report": str(written.page), "summary": written.summary}
    emit(display, {**data, "files": written.files, "plots": written.plots}, lambda: _show(written))


def _show(written: "Written") -> None:
    """The verdict, and what was written."""
    say(written.summary)
    say()
    say(f"Report: {written.page}")
    for name, size in sorted(written.files.items(), key=lambda one: -one[1]):
        say(f"  {name}, {size / 1e6:.1f} MB" if size >= 1e5 else f"  {name}, {size / 1e3:.1f} kB")
    if written.plots:
        say(f"  plots/, {written.plots} plots as PNG and SVG")
