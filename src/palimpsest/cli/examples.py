"""`palimpsest examples`."""

import os
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.display.text import visible, visible_token
from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.log import console

if TYPE_CHECKING:
    from rich.table import Table

    from palimpsest.artifacts import Artifact

app = verb_app("examples", VERBS["examples"].capitalize() + ".")
FLAT = Parameter(name="*")

SHOWN = 10
"""Latents of the table in the terminal."""


@app.default
def examples(
    config: Annotated[ExamplesConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Collect the examples of every latent, write their folder and print a summary."""
    from palimpsest.interpret.examples import run_examples

    folder = run_examples(config)
    about: dict[str, Any] = folder.read_json("examples.json")
    rows = standing_out(folder)
    emit(
        display,
        {"path": str(folder.path)} | about | {"strongest": rows},
        lambda: show(about, rows, str(folder.path)),
    )


def standing_out(folder: "Artifact") -> list[dict[str, Any]]:
    """The latents whose rate differs most between the models; without two rates those that fire most often.

    The difference is measured against its own noise: (r_tuned - r_base) / √(r_tuned + r_base).
    """
    import numpy as np

    table = folder.read_table("latents.parquet").select(
        ["latent", "rate", "rate_base", "rate_tuned", "max_value", "tokens"]
    )
    base, tuned = (table[name].to_numpy().astype(float) for name in ("rate_base", "rate_tuned"))
    if len(table) and np.isfinite(base + tuned).all():
        score = np.abs(tuned - base) / np.sqrt(np.maximum(tuned + base, 1e-12))
    else:
        score = table["rate"].to_numpy()
    order = np.argsort(-score, kind="stable")[:SHOWN]
    return table.take(order).to_pylist()


def show(about: dict[str, Any], rows: list[dict[str, Any]], path: str) -> None:
    """Print what was collected."""
    from rich.console import Console

    say(about["summary"])
    say("")
    width = None if console().is_terminal or "COLUMNS" in os.environ else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print(_table(rows))
    for note in about["notes"]:
        say(f"! {visible(note)}")
    say(f"Written to {path}; palimpsest report {path} shows it as a page, palimpsest serve as an app")


def _table(rows: list[dict[str, Any]]) -> "Table":
    from rich.table import Table

    both = all(row["rate_base"] is not None and row["rate_tuned"] is not None for row in rows)
    title = "Latents whose rate differs most between the models" if both else "Latents that fire most often"
    table = Table(title=title, title_justify="left")
    columns = ("base", "tuned") if both else ("rate",)
    for name in ("latent", *(f"rate {one}" if both else one for one in columns), "strongest"):
        table.add_column(name, justify="right")
    table.add_column("on tokens such as", overflow="fold")
    for row in rows:
        rates = [row[f"rate_{one}"] if both else row["rate"] for one in columns]
        tokens = " ".join(visible_token(token, 16) for token in row["tokens"] or [])
        table.add_row(
            str(row["latent"]), *(f"{rate:.4f}" for rate in rates), f"{row['max_value']:.2f}", tokens or "–"
        )
    return table
