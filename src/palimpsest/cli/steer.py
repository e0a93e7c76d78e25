"""`palimpsest steer`."""

import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.interpret.steering.config import SteerConfig
from palimpsest.interpret.steering.result import SteeringRun, Strength
from palimpsest.log import console

if TYPE_CHECKING:
    from rich.table import Table

app = verb_app("steer", VERBS["steer"].capitalize() + ".")
FLAT = Parameter(name="*")

SHOWN = 5
"""Prompts that the terminal shows."""


@app.default
def steer(
    config: Annotated[SteerConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Let base, tuned and steered model write side by side; measure how strong the changes can be made."""
    from palimpsest.interpret.steering.run import run_steer

    found = run_steer(config)
    emit(display, {"path": str(config.run.out)} | found.to_dict(), lambda: show(found, str(config.run.out)))


def show(found: SteeringRun, path: str) -> None:
    """Print the texts side by side and the table of strengths."""
    from rich.console import Console

    from palimpsest.display.text import visible

    width = None if console().is_terminal or "COLUMNS" in os.environ else 130
    out = Console(width=width, markup=False, emoji=False, highlight=False)
    say(visible(found.summary))
    say("")
    for row in found.prompts[:SHOWN]:
        out.print(_texts(row, found.side))
    if len(found.prompts) > SHOWN:
        say(f"{len(found.prompts) - SHOWN} further prompts are in steer.json.")
    if found.sweep:
        out.print(_strengths(found))
        say(
            f"{found.unsteered['tokens']:,} tokens of {found.unsteered['documents']:,} documents; intervals: "
            f"{found.confidence:.0%}, over documents. × marks strengths above the guard."
            if found.unsteered
            else ""
        )
    for note in found.notes:
        say(f"! {visible(note)}")
    say(f"Written to {path}")


def _texts(row: dict[str, Any], side: str) -> "Table":
    """One prompt, a column for each model; control codes of what they wrote are shown, not obeyed."""
    from rich.table import Table
    from rich.text import Text

    from palimpsest.display.text import visible

    table = Table(title=Text(visible(row["prompt"], 200)), title_justify="left", show_lines=False)
    cells = []
    for name in ("base", "tuned", "steered"):
        if row[name] is not None:
            table.add_column(f"{name} ({side})" if name == "steered" else name, ratio=1)
            cells.append(Text(visible(row[name])))
    table.add_row(*cells)
    return table


def _strengths(found: SteeringRun) -> "Table":
    from rich.table import Table
    from rich.text import Text

    from palimpsest.display.text import visible
    from palimpsest.interpret.steering.summary import ratio

    loss = "" if found.unsteered is None else f"; unsteered loss {found.unsteered['loss']:.3f}"
    table = Table(title=f"Strengths of the {found.side} model{loss}", title_justify="left")
    watched = [row["text"] for row in found.sweep[0].watch]
    columns = ("", "strength", "loss", "perplexity ratio", "KL", "control latents' ratios")
    for name in columns:
        table.add_column(name, justify="right")
    for text in watched:
        table.add_column(Text(f"Δ log p {visible(repr(text), 24)}"), justify="right")
    for row in found.sweep:
        controls = ", ".join(ratio(one | {"perplexity_ratio_ci": None}) for one in row.controls) or "–"
        table.add_row(
            "" if row.ok else "×",
            f"{row.strength:g}",
            f"{row.loss:.3f}",
            ratio(row),
            f"{row.kl:.4f}",
            controls,
            *(_watched(row, place) for place in range(len(watched))),
        )
    return table


def _watched(row: Strength, place: int) -> str:
    """Change of a watched text's log-probability, and in brackets the largest of the controls'."""
    own = f"{row.watch[place]['change']:+.2f}"
    others = [one["watch"][place]["change"] for one in row.controls]
    return own if not others else f"{own} ({max(others, key=abs):+.2f})"
