"""`palimpsest diff`."""

from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.cli.differences import show, show_comparison
from palimpsest.diff.compare_config import CompareConfig
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.null_config import NullConfig

app = verb_app("diff", VERBS["diff"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.default
def diff(
    config: Annotated[DiffConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Classify every latent of a pair's dictionary, test the classes, and measure which latents cause the change."""
    from palimpsest.diff import run_diff

    found = run_diff(config)
    emit(display, {"path": str(config.run.out)} | found.to_dict(), lambda: show(found, str(config.run.out)))


@app.command(name="null")
def null(
    config: Annotated[NullConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Write a null model: the base with a random weight change that drifts as far as the fine-tune's."""
    from palimpsest.artifacts import open_artifact
    from palimpsest.diff import make_null

    path = make_null(config)
    about = open_artifact(path, stage="null-model", verify=False).read_json("null.json")
    drift = about["drift"]
    emit(
        display,
        {"path": str(path)} | about,
        lambda: say(
            f"A null model in {path}: relative drift {drift['null']:.4f} at {about['site']}, the fine-tune's is "
            f"{drift['tuned']:.4f} (random change of scale {about['alpha']:.3g}, seed {about['seed']}). "
            "Train a dictionary on it with the fine-tune's recipe, diff it, and pass that diff with --null."
        ),
    )


@app.command(name="compare")
def compare(
    config: Annotated[CompareConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Put finished diffs of one pair side by side: which method found what, and at what cost."""
    from palimpsest.diff import compare_runs

    found = compare_runs(config)
    emit(display, found.to_dict(), lambda: show_comparison(found, str(config.run.out)))
