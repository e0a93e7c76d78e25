"""From finished runs to their page: alone, in the run's own folder, or in a folder with everything else."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from markupsafe import Markup

from palimpsest.artifacts import check_claim
from palimpsest.artifacts.disk import write_bytes
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.log import log
from palimpsest.report.cards import Deck, cards_by_run, decks, draw_cards, with_notes
from palimpsest.report.draw import unique
from palimpsest.report.findings_json import summary_of
from palimpsest.report.folder import PLOTS, write_folder
from palimpsest.report.merge import open_runs, sections_of
from palimpsest.report.page import Source, render_page
from palimpsest.report.parts import Run, Section

REPORT = "report.html"


@dataclass(frozen=True)
class Report:
    """Some runs with everything that a page shows of them.

    Attributes:
        runs: The runs, those with verdicts first.
        sections: Their sections, in the order of the page, with names of their own.
        decks: Cards of latents.
    """

    runs: list[Run]
    sections: list[Section] = field(repr=False)
    decks: list[Deck] = field(repr=False)

    @classmethod
    def of(cls, paths: Iterable[str | Path]) -> Report:
        """Read finished runs.

        Raises:
            ArtifactError: A folder is no run, unfinished or edited, or lacks a table.
        """
        runs = open_runs(paths)
        sections = unique(sections_of(runs))
        found = decks(runs, sections)
        return cls(runs, with_notes(sections, found), found)

    def html(self) -> str:
        """The page."""
        draw = partial(_drawn, self) if self.decks else None
        sources = [Source.of(run) for run in self.runs]
        return render_page(sources, self.sections, cards_by_run(self.decks), draw)


def _drawn(report: Report, room: int) -> Markup:
    return draw_cards(report.decks, report.sections, room)[0]


@dataclass(frozen=True)
class Written:
    """What was written.

    Attributes:
        page: Path of the page.
        summary: What was found, in a sentence or some.
        files: Size in bytes of every file but the pictures, by its name in the report's folder.
        plots: How many plots have pictures.
    """

    page: Path
    summary: str
    files: dict[str, int]
    plots: int = 0


def build_report(
    runs: str | Path | Iterable[str | Path], out: str | Path | None = None, **options: bool
) -> Path:
    """Write the report of one or several finished runs; the arguments are those of `write_report`.

    Returns:
        The path of the page.
    """
    return write_report(runs, out, **options).page


def write_report(
    runs: str | Path | Iterable[str | Path],
    out: str | Path | None = None,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> Written:
    """Write the report of one or several finished runs.

    Args:
        runs: Folders of runs; a folder that holds runs below it stands for all of them. An audit may still be
            unfinished as long as its results are written.
        out: A file that ends with `.html` for the page alone; a folder for the page, `report.json`, `report.md`, the
            plots and the latents. Default, for one run: `report.html` in the run's folder.
        resume: Go on with an unfinished report in that folder.
        overwrite: Replace an earlier report in that folder.

    Raises:
        ArtifactError: A folder is no run, was edited or lacks its results, or the report cannot be written.
        ConfigError: Several runs were given, and no `out`.
    """
    paths = [runs] if isinstance(runs, (str, Path)) else list(runs)
    folder = None if out is None or Path(out).suffix.lower() in (".html", ".htm") else Path(out)
    if folder is not None:
        check_claim(folder, resume=resume, overwrite=overwrite)
    report = Report.of(paths)
    if out is None and len(report.runs) > 1:
        raise ConfigError(
            f"A report of {len(report.runs)} runs needs a place of its own",
            fix="Pass --out DIR for a folder with everything, or --out FILE.html for the page alone",
        )
    if folder is not None:
        artifact = write_folder(folder, report, resume=resume, overwrite=overwrite)
        sizes = {name: entry["bytes"] for name, entry in artifact.files.items()}
        plots = sum(name.startswith(f"{PLOTS}/") and name.endswith(".png") for name in sizes)
        files = {name: size for name, size in sizes.items() if not name.startswith(f"{PLOTS}/")}
        return Written(folder / REPORT, str(artifact.manifest.get("summary")), files, plots)
    page = report.html().encode()
    path = _write(report.runs[0], page, out)
    log.info("wrote %s (%.1f MB)", path, len(page) / 1e6)
    return Written(path, summary_of(report.sections), {path.name: len(page)})


def _write(run: Run, page: bytes, out: str | Path | None) -> Path:
    artifact, inside = run.artifact, run.path / REPORT
    target = inside if out is None else Path(out)
    if target.absolute() != inside.absolute() or artifact.status != "complete":
        write_bytes(target, page)
        return target
    if REPORT not in artifact.files:
        return artifact.attach(REPORT, page)
    if inside.read_bytes() != page:
        raise ArtifactError(
            f"{inside} is part of the finished run and is not replaced",
            fix="Pass --out to write the new page elsewhere",
        )
    return inside
