"""Training several adapters of one base into the folders of one run, each finished one kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from palimpsest.artifacts import Artifact, RunFolder, check_claim, open_artifact
from palimpsest.artifacts.disk import MANIFEST
from palimpsest.errors import NumericsError
from palimpsest.log import log
from palimpsest.models import LanguageModel
from palimpsest.options import config_dict
from palimpsest.tune.board import Board, Line
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.prepare import check_options
from palimpsest.tune.run import RESULT, run_tune


def open_run(config: Any, stage: str, versions: Iterable[TuneConfig]) -> RunFolder:
    """The folder of a run of several adapters, once all their options are known to go together.

    Args:
        config: With `run` and `model`; a `SweepConfig` or a `BaselinesConfig`.
        stage: What the run is.
        versions: The options of each adapter.
    """
    for one in versions:
        check_options(one)
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    return RunFolder(
        config.run.out,
        stage=stage,
        config=config_dict(config),
        models={"base": config.model},
        seed=config.run.seed,
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    )


def train_version(config: TuneConfig, language: LanguageModel, run: RunFolder) -> dict[str, Any]:
    """Train one adapter, or go on with it, and read its `tune.json`.

    An adapter whose training broke off at NaN counts as finished: its last good step was saved and says so.

    Args:
        config: Its options, with a folder inside that of `run`.
        language: The base.
        run: The run that all versions belong to.
    """
    begun = run.resumed and (config.run.out / MANIFEST).exists()
    try:
        made = run_tune(replace(config, run=replace(config.run, resume=begun)), language)
    except NumericsError as error:
        if not finished(config.run.out):
            raise
        log.warning("%s: %s", config.run.out.name, error)
        made = open_artifact(config.run.out, verify=False)
    return made.read_json(RESULT)


def finished(folder: Path) -> bool:
    """Whether a folder holds a complete run."""
    return (folder / MANIFEST).exists() and open_artifact(
        folder, verify=False, allow_running=True
    ).status == "complete"


def rank(value: float | None) -> tuple[bool, float]:
    """Key that sorts low objectives first and missing ones last."""
    bad = value is None or not math.isfinite(value)
    return bad, 0.0 if bad or value is None else float(value)


def figures(result: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a `tune.json` that goes into a table of several."""
    general = result.get("general") or {}
    return {
        "objective": result["objective_value"],
        "heldout_loss": result["heldout_loss"],
        "kl": general.get("kl"),
        "kl_ci": general.get("ci"),
        "parameters": result["parameters"],
        "latents_moved": result["latents_moved"],
        "lr": result["lr"],
        "seconds": result["seconds"],
        "stopped": result["stopped"],
    }


def write_board(run: RunFolder, board: Board, name: str) -> None:
    """Write a table as JSON and as Markdown."""
    run.write_json(f"{name}.json", board.to_dict())
    run.write_bytes(f"{name}.md", board.markdown.encode())


def board_from(artifact: Artifact, name: str) -> Board:
    """The table that `write_board` wrote."""
    fields: dict[str, Any] = dict(artifact.read_json(f"{name}.json"))
    fields["lines"] = [Line(**line) for line in fields["lines"]]
    return Board(**fields)
