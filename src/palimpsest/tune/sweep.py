"""A fine-tune in several versions, and which of them does best on held-out rows."""

from __future__ import annotations

from dataclasses import replace

from palimpsest.artifacts import open_artifact
from palimpsest.log import log
from palimpsest.tune.board import Board, Line
from palimpsest.tune.prepare import open_base
from palimpsest.tune.sweep_config import SweepConfig, combinations
from palimpsest.tune.versions import board_from, figures, open_run, rank, train_version, write_board

STAGE = "tune-sweep"

NAME = "leaderboard"


def run_sweep(config: SweepConfig) -> Board:
    """Train every combination into `config.run.out/NAME`, and write `leaderboard.json` and `leaderboard.md`.

    With `resume`, finished ones are kept and an interrupted one goes on from its checkpoint.

    Returns:
        The table, best held-out objective first.

    Raises:
        PalimpsestError: As `run_tune`, before anything is trained where that can be known.
    """
    versions = combinations(config)
    with open_run(config, STAGE, versions.values()) as run:
        if run.already_complete:
            return board_from(open_artifact(config.run.out), NAME)
        language, results = open_base(config), {}
        for place, (name, one) in enumerate(versions.items(), 1):
            log.info("%d of %d: %s", place, len(versions), name)
            results[name] = train_version(one, language, run)
        lines = [
            Line(
                name=name,
                component=one.adapter.component,
                l1=float(one.schedule.l1),
                **figures(results[name]),
            )
            for name, one in versions.items()
        ]
        lines.sort(key=lambda line: rank(line.objective["after"]))
        if not rank(lines[0].objective["after"])[0]:
            lines[0] = replace(lines[0], best=True)
        first = next(iter(results.values()))
        board = Board(
            title="Sweep",
            model=config.model,
            kind=config.objective.objective,
            unit=first["objective_value"]["unit"],
            rows=first["objective_value"]["rows"],
            lines=lines,
            notes=_notes(lines),
        )
        write_board(run, board, NAME)
        run.finish()
    return board


def _notes(lines: list[Line]) -> list[str]:
    notes = [f"Marked with a star: the lowest held-out objective, {lines[0].name}."] if lines[0].best else []
    if len(lines) > 1:
        notes.append(
            f"The best of {len(lines)} was chosen by these very rows, so its figure is too good: measure it on rows "
            "that chose nothing before you report it."
        )
    return notes
