"""`palimpsest label`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.display.text import visible
from palimpsest.interpret.labels.config import LabelConfig
from palimpsest.log import console

if TYPE_CHECKING:
    from palimpsest.interpret.labels.result import Labelling

app = verb_app("label", VERBS["label"].capitalize() + ".")
FLAT = Parameter(name="*")
SHOWN = 20


@app.default
def label(
    config: Annotated[LabelConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Say in a few words what each latent stands for, and test that on texts that the words were not made from."""
    from palimpsest.interpret.labels.run import run_label

    found = run_label(config)
    emit(display, {"path": str(config.run.out)} | found.to_dict(), lambda: show(found, str(config.run.out)))


def show(found: Labelling, path: str) -> None:
    """Print the first labels with their scores, and how labels of other latents do."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    by = found.provider + (f" ({found.model})" if found.model else "")
    table = Table(title=Text(visible(f"Labels by {by}, judged by {found.judge}")))
    for name, side in (("latent", "right"), ("label", "left"), ("score", "right"), ("random", "right")):
        table.add_column(name, justify=side)  # pyright: ignore[reportArgumentType] - one of rich's words
    table.add_column("similar", justify="right")
    for row in found.rows[:SHOWN]:
        score = _interval({"mean": row.score, "lo": row.score_lo, "hi": row.score_hi})
        cells = (f"{row.latent:,}", row.label, score, _number(row.score_random), _number(row.score_similar))
        table.add_row(*(Text(visible(cell)) for cell in cells))
    width = None if console().is_terminal else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
    if len(found.rows) > SHOWN:
        say(f"… and {len(found.rows) - SHOWN:,} more in labels.parquet.")
    if found.score["n"]:
        say(
            f"Balanced accuracy over {found.score['n']:,} labels: {_interval(found.score)}; against random texts "
            f"{_number(found.score['random'])}, similar ones {_number(found.score['similar'])}. "
            f"{found.counts['texts']:,} texts judged; chance is 0.5."
        )
    control = found.control
    if control["shuffled"] is not None:
        say(
            f"With labels of other latents: {_interval(control | {'mean': control['shuffled']})}; the own labels are "
            f"{_interval(control['above'])} above that."
        )
    for note in found.notes:
        say(f"! {note}")
    say(found.summary)
    say(f"Written to {path}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def _interval(values: dict[str, Any]) -> str:
    if values["mean"] is None or values["lo"] is None:
        return _number(values["mean"])
    return f"{values['mean']:.3f} [{values['lo']:.3f}, {values['hi']:.3f}]"
