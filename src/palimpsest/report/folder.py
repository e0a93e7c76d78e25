"""The folder of a report: the page, all findings as JSON, Markdown, every plot as a picture, and the latents."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.artifacts import Artifact, RunFolder, input_entry
from palimpsest.latents.schema import ABOUT, EXAMPLES, LATENTS, VOCAB
from palimpsest.log import log, progress
from palimpsest.report.draw import charts_of, slug
from palimpsest.report.findings_json import findings
from palimpsest.report.markdown import markdown
from palimpsest.report.pictures import chart_pictures

if TYPE_CHECKING:
    from palimpsest.report.build import Report

STAGE = "report"
PAGE, DATA, TEXT = "report.html", "report.json", "report.md"
PLOTS = "plots"


def write_folder(path: Path, report: Report, *, resume: bool = False, overwrite: bool = False) -> Artifact:
    """Write a report's folder.

    Args:
        path: The folder.
        report: What is reported.
        resume: Go on with an unfinished report.
        overwrite: Replace an earlier one.

    Returns:
        The folder, opened.

    Raises:
        ArtifactError: The folder holds something else, or cannot be written.
    """
    inputs = {f"run/{i}": input_entry(run.path) for i, run in enumerate(report.runs)}
    config = {"runs": [run.name for run in report.runs]}
    with RunFolder(
        path, stage=STAGE, config=config, inputs=inputs, resume=resume, overwrite=overwrite
    ) as run:
        if run.already_complete:
            return run.finish()
        beside = _latents(run, report)
        page = report.html().encode()
        plots = _plots(run, report)
        content = findings(report.runs, report.sections, plots, beside)
        run.write_json(DATA, content)
        run.write_bytes(TEXT, markdown(report.runs, report.sections, plots).encode())
        run.write_bytes(PAGE, page)
        made = run.finish(summary=content["summary"])
    log.info("wrote %s (page %.1f MB, %d plots)", path, len(page) / 1e6, len(plots))
    return made


def _plots(run: RunFolder, report: Report) -> dict[str, dict[str, str]]:
    """Every chart as pictures: file names by chart and ending."""
    found: dict[str, dict[str, str]] = {}
    charts = charts_of(report.sections)
    with progress("Plots", len(charts), "plots") as advance:
        for chart in charts:
            found[chart.name] = {}
            for ending, data in chart_pictures(chart).items():
                name = f"{PLOTS}/{chart.name}.{ending}"
                run.write_bytes(name, data)
                found[chart.name][ending] = name
            advance()
    return found


def _latents(run: RunFolder, report: Report) -> dict[str, Any]:
    """All latents and examples beside the page: the same files where the disk can share them, else copies."""
    found: dict[str, Any] = {}
    for deck in report.decks:
        folder = "" if len(report.decks) == 1 else f"latents/{slug(deck.run.name)}/"
        names = []
        for name in (LATENTS, EXAMPLES, VOCAB, ABOUT):
            source = deck.run.artifact.file(name)
            with run.writing(f"{folder}{name}") as target:
                _share(source, target)
            names.append(f"{folder}{name}")
        found[deck.run.name] = names
    return found


def _share(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:
        shutil.copyfile(source, target)
