"""`palimpsest train`."""

from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.train.config import TrainSaeConfig

app = verb_app("train", VERBS["train"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.command(name="sae")
def sae(*, config: Annotated[TrainSaeConfig, FLAT], display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """Train a sparse autoencoder of one model's activations at one site."""
    from palimpsest.train import train_sae

    dictionary = train_sae(config)
    described = dictionary.describe()
    metrics = described["metadata"]["metrics"]
    emit(
        display,
        {"path": str(config.run.out)} | described,
        lambda: say(
            f"{dictionary.n_latents:,} latents at {dictionary.site}: FVE {metrics['fve']:.3f}, L0 {metrics['l0']:.1f}, "
            f"dead {metrics['dead_share']:.1%}, in {config.run.out}"
        ),
    )
