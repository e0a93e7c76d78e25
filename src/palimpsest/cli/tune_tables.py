"""`palimpsest tune sweep` and `palimpsest tune baselines`."""

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from palimpsest.cli.command import Display, emit, say
from palimpsest.log import console
from palimpsest.tune.baselines_config import BaselinesConfig
from palimpsest.tune.sweep_config import SweepConfig

if TYPE_CHECKING:
    from palimpsest.tune.board import Board

FLAT = Parameter(name="*")


def register(app: App) -> None:
    """Add both to the parser of `palimpsest tune`."""
    app.command(sweep, name="sweep")
    app.command(baselines, name="baselines")


def sweep(
    config: Annotated[SweepConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Train with several learning rates, penalties or components, and rank them on held-out rows."""
    from palimpsest.tune.sweep import run_sweep

    _show(run_sweep(config), str(config.run.out), "leaderboard.md", display)


def baselines(
    config: Annotated[BaselinesConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Compare latents with LoRA, steering vectors and single latents on the same data and steps."""
    from palimpsest.tune.baselines import run_baselines

    _show(run_baselines(config), str(config.run.out), "baselines.md", display)


def _show(board: "Board", path: str, page: str, display: Display) -> None:
    emit(display, {"path": path} | board.to_dict(), lambda: _print(board, path, page))


def _print(board: "Board", path: str, page: str) -> None:
    from rich.console import Console
    from rich.table import Table

    names, rows = board.cells()
    table = Table(
        title=f"{board.kind}: {board.unit}, lower is better; {board.rows} held-out rows", title_justify="left"
    )
    for place, name in enumerate(names):
        table.add_column(name, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    width = None if console().is_terminal or "COLUMNS" in os.environ else 160
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
    for remark in board.remarks():
        say(f"! {remark}")
    say(f"Written to {path}: {page} has the table; each adapter lies in a folder of its name")
