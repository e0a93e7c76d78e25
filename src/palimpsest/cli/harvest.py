"""`palimpsest harvest`."""

from typing import Annotated

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, print_table, say, verb_app
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
    sizes = [str(index["d_model"]), index["dtype"], f"{rows:,}"]
    megabytes = sum(shard["bytes"] for shard in index["shards"]) / 1e6

    def tell() -> None:
        table = [(site, ", ".join(index["models"]), *sizes) for site in index["sites"]]
        print_table("Activations", ("site", "models", "width", "dtype", "tokens"), table)
        say(f"{megabytes:,.1f} MB in {len(index['shards']):,} shards. Written to {artifact.path}")

    emit(
        display,
        {"path": str(artifact.path), "rows": rows, "sites": index["sites"], "models": index["models"]},
        tell,
    )
