"""`palimpsest evaluate`."""

from collections.abc import Callable
from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.display.text import visible
from palimpsest.evaluate.config import EvaluateConfig
from palimpsest.evaluate.result import Density, Evaluation, ModelEvaluation, Splice
from palimpsest.log import console

app = verb_app("evaluate", VERBS["evaluate"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.default
def evaluate(
    config: Annotated[EvaluateConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Run the evaluation, write its folder and print its figures."""
    from palimpsest.evaluate import run_evaluate

    found = run_evaluate(config)
    emit(display, {"path": str(config.run.out)} | found.to_dict(), lambda: show(found, str(config.run.out)))


def show(found: Evaluation, path: str) -> None:
    """Print one column per model."""
    from rich.console import Console
    from rich.table import Table

    described = found.dictionary
    k = "" if described["k"] is None else f", k {described['k']}"
    title = f"{described['n_latents']:,} latents ({described['activation']}{k}, view {found.view}) at {found.site}"
    table = Table(title=visible(title))
    table.add_column("")
    for one in found.models:
        table.add_column(visible(f"{one.side}: {one.name}"), justify="right")
    for name, cell in _rows(found):
        table.add_row(name, *(cell(one) for one in found.models))
    width = None if console().is_terminal else 120
    Console(width=width, markup=False, emoji=False, highlight=False).print(table)
    say(
        f"{found.tokens:,} tokens of {found.documents:,} documents measured ({found.masking}); {found.passed_tokens:,} "
        f"others pass through. CE in nats per token. Intervals: {found.confidence:.0%}, over documents."
    )
    for note in found.notes:
        say(f"! {note}")
    say(f"Written to {path}")


def _rows(found: Evaluation) -> list[tuple[str, Callable[[ModelEvaluation], str]]]:
    rows: list[tuple[str, Callable[[ModelEvaluation], str]]] = [
        ("FVE", lambda one: _interval(one.fve, one.fve_ci)),
        ("L0 mean (5 %, 50 %, 95 % of tokens)", _l0),
        ("dead latents", lambda one: f"{one.dead:,} ({one.dead_share:.1%})"),
        ("log10 density, median of the live", lambda one: _median(one.density)),
        ("‖x̂‖/‖x‖", lambda one: _number(one.norm_ratio)),
        ("cosine", lambda one: _number(one.cosine)),
    ]
    if all(one.splice is None for one in found.models):
        return rows

    def of(pick: Callable[[Splice], str]) -> Callable[[ModelEvaluation], str]:
        return lambda one: "–" if one.splice is None else pick(one.splice)

    names = {"original": "as it is", "spliced": "spliced", "zero": "zero-ablated", "mean": "mean-ablated"}
    for key, name in names.items():
        rows.append((f"CE {name}", of(lambda splice, key=key: _number(splice.ce[key]))))
    for key in ("spliced", "zero", "mean"):
        rows.append((f"KL {names[key]}", of(lambda splice, key=key: _number(splice.kl[key], 4))))
    for key in ("zero", "mean"):
        rows += [
            (
                f"CE recovered against {key}",
                of(lambda splice, key=key: _interval(splice.ce_recovered[key], splice.ce_recovered_ci[key])),
            ),
            (
                f"KL recovered against {key}",
                of(lambda splice, key=key: _interval(splice.kl_recovered[key], splice.kl_recovered_ci[key])),
            ),
        ]
    return rows


def _l0(one: ModelEvaluation) -> str:
    quantiles = ", ".join(str(one.l0_quantiles[level]) for level in ("0.05", "0.5", "0.95"))
    return f"{one.l0:.1f} ({quantiles})"


def _median(density: Density) -> str:
    """The bin that the median of the latents which fire falls into."""
    half, seen = sum(density.counts) / 2, 0
    for count, lower, upper in zip(density.counts, density.edges, density.edges[1:], strict=False):
        seen += count
        if count and seen >= half:
            return f"{lower:g} to {upper:g}"
    return "–"


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _interval(value: float | None, bounds: tuple[float, float] | None) -> str:
    if value is None or bounds is None:
        return _number(value)
    return f"{value:.3f} [{bounds[0]:.3f}, {bounds[1]:.3f}]"
