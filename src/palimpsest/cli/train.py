"""`palimpsest train`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, print_table, verb_app
from palimpsest.train.config import TrainPairConfig, TrainSaeConfig

if TYPE_CHECKING:
    from palimpsest.dictionaries import Dictionary

app = verb_app("train", VERBS["train"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.command(name="sae")
def sae(*, config: Annotated[TrainSaeConfig, FLAT], display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """Train a sparse autoencoder of one model's activations at one site."""
    _train(config, display)


@app.command(name="diff-sae")
def diff_sae(
    *,
    config: Annotated[TrainPairConfig, FLAT],
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Train a sparse autoencoder of the difference tuned minus base at one site."""
    _train(replace(config, view="diff"), display)


@app.command(name="crosscoder")
def crosscoder(
    *,
    config: Annotated[TrainPairConfig, FLAT],
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Train a crosscoder of a base and its fine-tune at one site: one code that reads and writes both."""
    _train(replace(config, view="pair"), display)


def _train(config: TrainSaeConfig | TrainPairConfig, display: Display) -> None:
    from palimpsest.train import train_pair, train_sae, train_variants

    if config.training.variant:
        made = train_variants(config)
    else:
        made = {"": train_sae(config) if isinstance(config, TrainSaeConfig) else train_pair(config)}
    paths = {name: config.run.out / name for name in made}
    described = [{"path": str(paths[name])} | one.describe() for name, one in made.items()]
    emit(
        display,
        described if config.training.variant else described[0],
        lambda: _show(made, paths),
    )


def _show(made: "dict[str, Dictionary]", paths: dict[str, Path]) -> None:
    """Print one line per dictionary; figures on held-out text where there was some."""
    rows = []
    for name, one in made.items():
        metrics, held_out = one.metadata["metrics"], _held_out(one)
        figures = (f"{metrics['fve']:.3f}", f"{metrics['l0']:.1f}", f"{metrics['dead_share']:.1%}")
        rows.append((str(paths[name]), f"{one.n_latents:,} latents", *figures, *held_out.values()))
    one = next(iter(made.values()))
    columns = ("written to", "size", "FVE", "L0", "dead", *_held_out(one))
    print_table(f"{one.activation}, view {one.view}, at {one.site}", columns, rows)


def _held_out(dictionary: "Dictionary") -> dict[str, str]:
    return {
        f"held out: {name.replace('_', ' ')}": f"{value:.3f}"
        for name, value in dictionary.metadata.get("evaluation", {}).items()
        if isinstance(value, float) and ("fve" in name or "recovered" in name)
    }
