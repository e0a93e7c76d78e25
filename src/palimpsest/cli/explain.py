"""`palimpsest explain`."""

import os
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.log import console
from palimpsest.tune.explain_config import ExplainCompareConfig, ExplainConfig

if TYPE_CHECKING:
    from rich.table import Table

    from palimpsest.tune.explain.result import AdapterComparison, CurvePoint, Explanation, Moved

app = verb_app("explain", VERBS["explain"].capitalize() + ".")
FLAT = Parameter(name="*")

SHOWN = 12
"""Latents of a table in the terminal."""


@app.default
def explain(
    config: Annotated[ExplainConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Say which latents an adapter moved, which of them cause what it does, and how few suffice."""
    from palimpsest.tune.explain import run_explain

    found = run_explain(config)
    emit(display, {"path": str(config.run.out)} | found.to_dict(), lambda: show(found, str(config.run.out)))


@app.command(name="compare")
def compare(
    config: Annotated[ExplainCompareConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Say which latents moved in one adapter and not in another through the same dictionaries."""
    from palimpsest.tune.explain import compare_adapters

    found = compare_adapters(config)
    emit(
        display,
        {"path": str(config.run.out)} | found.to_dict(),
        lambda: show_comparison(found, str(config.run.out)),
    )


def show(found: "Explanation", path: str) -> None:
    """Print what an explanation found."""
    say(found.summary)
    say("")
    _print(_latents(found))
    if found.curves:
        _print(_curves(found))
    for note in found.notes:
        say(f"! {note}")
    more = "" if found.pruned is None else f"; the pruned adapter is {path}/{found.pruned.path}"
    say(f"Written to {path}{more}")


def show_comparison(found: "AdapterComparison", path: str) -> None:
    """Print the latents of each class; the whole is in the folder."""
    say(found.summary)
    say("")
    titles = {
        "only_a": "in A only",
        "only_b": "in B only",
        "both": "in both",
        "opposite": "in opposite directions",
    }
    for name, title in titles.items():
        if found.moved[name]:
            _print(_moved(f"Moved {title}: {found.counts[name]:,}", found.moved[name]))
    for note in found.notes:
        say(f"! {note}")
    say(f"Written to {path}: compare.md has every table")


def _print(table: "Table") -> None:
    from rich.console import Console

    width = None if console().is_terminal or "COLUMNS" in os.environ else 130
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...], last: str | None = None) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(_shown(name))
    for name in right:
        table.add_column(_shown(name), justify="right")
    if last is not None:
        table.add_column(last)
    return table


def _latents(found: "Explanation") -> "Table":
    rows = found.ranking("effect")[:SHOWN]
    texts = [one.name for one in found.corpora]
    title = f"{found.component}: the {len(rows)} latents with the largest effect"
    rates = tuple(f"fires on {name}" for name in texts)
    table = _table(title, ("site",), ("latent", "value", "‖d‖", "effect", *rates), "label")
    for row in rows:
        table.add_row(
            _shown(row.site),
            str(row.latent),
            f"{row.value:+.3g}",
            f"{row.norm:.2f}",
            f"{row.share:.1%}",
            *("–" if row.rate.get(name) is None else f"{row.rate[name]:.2%}" for name in texts),
            _shown(row.label or "–"),
        )
    return table


def _curves(found: "Explanation") -> "Table":
    """Share of the effect, by number of latents: held-out documents."""
    kinds = ("keep", "magnitude", "random", "ablate")
    points = {(one.kind, one.n): one for one in found.curves}
    table = _table(
        f"Share of the effect on the {found.objective.reported_on:,} documents or pairs kept for reporting",
        (),
        ("latents", "kept, by effect", "kept, by |value|", "kept, random", "left without them"),
    )
    for n in sorted({one.n for one in found.curves}):
        table.add_row(f"{n:,}", *(_share(points.get((kind, n))) for kind in kinds))
    return table


def _share(point: "CurvePoint | None") -> str:
    if point is None or point.share is None:
        return "–"
    return f"{point.share:.1%}" + ("" if point.ci is None else f" [{point.ci[0]:.1%}, {point.ci[1]:.1%}]")


def _moved(title: str, rows: "list[Moved]") -> "Table":
    table = _table(title, ("site",), ("latent", "value A", "value B", "effect A", "effect B"), "label")
    for row in rows[:SHOWN]:
        values, shares = (f"{one:+.3g}" for one in row.values), (f"{one:.1%}" for one in row.shares)
        table.add_row(_shown(row.site), str(row.latent), *values, *shares, _shown(row.label or "–"))
    return table


def _shown(text: str) -> str:
    """Labels and names are others' text: on one line, their control codes visible."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
