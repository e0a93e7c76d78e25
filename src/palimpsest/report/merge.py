"""Finished runs of any stage, opened to stand on one page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from palimpsest.artifacts import Artifact, open_artifact
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.log import log
from palimpsest.report.display import visible
from palimpsest.report.parts import Run, Section
from palimpsest.report.sections.labels import labels_of

STAGES = {
    "audit": ("audit.json", "palimpsest.report.audit_sections"),
    "diff": ("diff.json", "palimpsest.report.sections.diff"),
    "diff-compare": ("compare.json", "palimpsest.report.sections.compare"),
    "attribute": ("attribute.json", "palimpsest.report.sections.other"),
    "tune": ("tune.json", "palimpsest.report.sections.tune"),
    "explain": ("explain.json", "palimpsest.report.sections.explain"),
    "explain-compare": ("compare.json", "palimpsest.report.sections.explain"),
    "examples": ("examples.json", "palimpsest.report.sections.examples"),
    "labels": ("labels.json", "palimpsest.report.sections.labels"),
    "steer": ("steer.json", "palimpsest.report.sections.steer"),
    "evaluation": ("evaluation.json", "palimpsest.report.sections.other"),
    "dictionaries": ("variants.json", "palimpsest.report.sections.other"),
}
"""Main file of a stage, and the module whose `sections(run)` shows it, in the order of the page."""

OTHER = "palimpsest.report.sections.other"
TRAJECTORY = "palimpsest.report.sections.trajectory"
REPORT = "report"
DEEPEST = 3
"""How far below a folder runs are looked for."""
MOST = 60
"""Runs on one page: more say less."""


def open_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Open finished runs; a folder that holds runs below it stands for all of them.

    Args:
        paths: Folders.

    Returns:
        Each run once, under a short name of its own, those with verdicts first.

    Raises:
        ArtifactError: A folder is missing, unfinished, edited or holds no run.
        ConfigError: No folder was given.
    """
    given = [Path(one) for one in paths]
    if not given:
        raise ConfigError("No run was given", fix="Name the folders of one or several finished runs")
    artifacts: dict[Path, Artifact] = {}
    for path in given:
        for artifact in _artifacts(path):
            artifacts.setdefault(artifact.path.resolve(), artifact)
    if len(artifacts) > MOST:
        raise ConfigError(
            f"{len(artifacts)} runs are too many for one page",
            expected=f"{MOST} at most",
            fix="Name the runs that belong together",
        )
    names = _names(list(artifacts))
    runs = [Run(one, names[path], main_data(one)) for path, one in artifacts.items()]
    order = list(STAGES)
    return sorted(
        runs, key=lambda run: (not _judged(run), order.index(run.stage) if run.stage in order else 99)
    )


def main_data(artifact: Artifact) -> dict[str, Any]:
    """The content of a run's main JSON file; empty where its stage has none.

    Raises:
        ArtifactError: The file of a known stage is missing or holds something else.
    """
    known = STAGES.get(artifact.stage)
    tops = [name for name in artifact.files if name.endswith(".json") and "/" not in name]
    name = known[0] if known else f"{artifact.stage}.json"
    if name not in tops:
        if known and artifact.stage not in ("dictionaries", "evaluation"):
            artifact.file(name)
        found = [one for one in tops if one.endswith(f"-{name}") or one.startswith(artifact.stage)]
        return {one.removesuffix(".json"): artifact.read_json(one) for one in found}
    data = artifact.read_json(name)
    if not isinstance(data, dict):
        raise ArtifactError(
            f"{artifact.path / name} is no result of {artifact.stage}",
            expected="an object",
            found=type(data).__name__,
        )
    return data


def sections_of(runs: Sequence[Run]) -> list[Section]:
    """The sections of all runs, those over several of them first.

    Raises:
        ArtifactError: A run lacks a table that its section shows, or a file is damaged.
    """
    found: list[Section] = []
    for group in comparable_audits(runs):
        found += import_module(TRAJECTORY).sections(group)
    for run in runs:
        module = STAGES[run.stage][1] if run.stage in STAGES else OTHER
        try:
            found += _sections(run, module, runs)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise ArtifactError(
                f"{run.path} does not hold what a run of stage {run.stage} holds",
                found=f"{type(error).__name__}: {visible(error, 120)}",
                fix="Make it again with this version of palimpsest, or leave it out",
            ) from error
    return found


def _sections(run: Run, module: str, runs: Sequence[Run]) -> list[Section]:
    """The sections of a run; labels of the same latents stand beside its examples."""
    draw = import_module(module).sections
    if run.stage != "examples":
        return draw(run)
    return draw(run, labels_of([one for one in runs if one.stage == "labels" and one.same_latents(run)]))


def comparable_audits(runs: Sequence[Run]) -> list[list[Run]]:
    """Audits of one base at one site through one dictionary: groups of two or more."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        if run.stage != "audit":
            continue
        pair, dictionary = run.data.get("pair") or {}, run.data.get("dictionary") or {}
        base = pair.get("fingerprint_base") or pair.get("base")
        key = (str(base), str(dictionary.get("sha256") or dictionary.get("path")), str(run.data.get("site")))
        groups.setdefault(key, []).append(run)
    return [group for group in groups.values() if len(group) > 1]


def _judged(run: Run) -> bool:
    """Whether it holds calibrated verdicts, which belong on top."""
    return run.stage == "audit" and bool(run.data.get("calibration"))


def _artifacts(path: Path) -> list[Artifact]:
    """The run of a folder, or the finished runs below it."""
    if path.is_file():
        raise ArtifactError(
            f"{path} is a file", expected="the folder of a run", fix=f"Pass {path.parent} instead"
        )
    if (path / "manifest.json").exists() or not path.is_dir():
        artifact = open_artifact(path, allow_running=True)
        if artifact.stage == REPORT:
            raise ArtifactError(
                f"{path} is a report already",
                fix="Pass the runs that it was made from, listed in its report.json",
            )
        if artifact.status != "complete" and not _written(artifact):
            raise ArtifactError(
                f"{path} is unfinished",
                expected="a finished run",
                found=f"stage {artifact.stage}, status {artifact.status}",
                fix="Give its command again with --resume, then the report",
            )
        return [artifact]
    found = []
    for below in sorted(_below(path, DEEPEST)):
        artifact = open_artifact(below, allow_running=True, verify=False)
        if artifact.stage not in STAGES:
            continue
        if artifact.status != "complete":
            log.warning("%s is unfinished and left out", below)
            continue
        found.append(open_artifact(below))
    if not found:
        raise ArtifactError(
            f"{path} holds no run, and no finished run lies below it",
            expected=f"a folder with a manifest.json, of stage {', '.join(STAGES)}",
        )
    return found


def _written(artifact: Artifact) -> bool:
    """An audit writes its page before it ends, from results that are there."""
    name = STAGES.get(artifact.stage, ("",))[0]
    return artifact.stage == "audit" and (artifact.path / name).exists()


def _below(folder: Path, depth: int) -> list[Path]:
    """Folders with a manifest; what lies inside a run belongs to it."""
    found: list[Path] = []
    for one in folder.iterdir():
        if not one.is_dir() or one.is_symlink():
            continue
        if (one / "manifest.json").exists():
            found.append(one)
        elif depth > 1:
            found += _below(one, depth - 1)
    return found


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """The shortest endings of some different paths that differ."""
    return {path: visible(_ending(path, paths), 80) for path in paths}


def _ending(path: Path, paths: Sequence[Path]) -> str:
    for length in range(1, len(path.parts)):
        ending = path.parts[-length:]
        if sum(other.parts[-length:] == ending for other in paths) == 1:
            return "/".join(ending)
    return str(path)
