"""`palimpsest harvest`."""

from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.harvest.config import HarvestConfig

app = verb_app("harvest", VERBS["harvest"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.default
def harvest(config: Annotated[HarvestConfig, FLAT], *, display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """Write the store and say what it holds."""
    from palimpsest.harvest import run_harvest

    artifact = run_harvest(config)
    index = artifact.read_json("store.json")
    rows = sum(shard["rows"] for shard in index["shards"])
    sites = ", ".join(index["sites"])
    emit(
        display,
        {"path": str(artifact.path), "rows": rows, "sites": index["sites"], "models": index["models"]},
        lambda: say(f"{rows:,} tokens of {sites} ({', '.join(index['models'])}) in {artifact.path}"),
    )
