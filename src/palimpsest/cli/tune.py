"""`palimpsest tune`."""

from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app
from palimpsest.cli.tune_export import export
from palimpsest.cli.tune_tables import register
from palimpsest.tune.config import TuneConfig

if TYPE_CHECKING:
    from palimpsest.artifacts import Artifact

app = verb_app("tune", VERBS["tune"].capitalize() + ".")
register(app)
app.command(export, name="export")
FLAT = Parameter(name="*")

SHOWN = 8
"""Latents that are named."""


@app.default
def tune(
    config: Annotated[TuneConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Fine-tune a model through the latents of frozen dictionaries; the result is an adapter that peft loads."""
    from palimpsest.tune.run import RESULT, run_tune

    made = run_tune(config)
    result = made.read_json(RESULT)
    movers = strongest(made)
    emit(
        display,
        {"path": str(made.path), **result, "movers": movers},
        lambda: show(result, movers, str(made.path)),
    )


def strongest(made: "Artifact") -> list[dict[str, Any]]:
    """The latents with the largest |value| at the end: site, latent, value."""
    pc = import_module("pyarrow.compute")
    if "latents.parquet" not in made.files:
        return []
    table = made.read_table("latents.parquet")
    if not table.num_rows:
        return []
    last = table.filter(pc.equal(table["step"], pc.max(table["step"])))
    rows = last.select(["site", "latent", "value"]).to_pylist()
    rows.sort(key=lambda row: (-abs(row["value"]), row["site"], row["latent"]))
    return [row for row in rows[:SHOWN] if row["value"]]


def show(result: dict[str, Any], movers: list[dict[str, Any]], path: str) -> None:
    """Print what a run did."""
    sites = ", ".join(one["site"] for one in result["sites"]) or "all linear layers"
    say(
        f"{result['objective']} with {result['method']} at {sites}: {result['parameters']:,} parameters, "
        f"{result['steps']} steps at lr {result['lr']:g}, {result['seconds']:.1f} s"
    )
    say()
    for line in _lines(result):
        say(line)
    say()
    if result["latents_moved"] is not None:
        total = sum(one["latents"] for one in result["sites"])
        named = ", ".join(f"{row['latent']} at {row['site']} {row['value']:+.3g}" for row in movers)
        say(
            f"Latents moved: {result['latents_moved']:,} of {total:,}" + (f"; most: {named}" if named else "")
        )
    say(f"Written to {path}")
    if result["component"] not in ("vector", "lora"):
        say(f"Next: palimpsest explain {path} --corpus FILE --out {path}-explained")


def _lines(result: dict[str, Any]) -> list[str]:
    objective = result["objective_value"]
    rows = [
        (
            f"{objective['unit']}, {objective['rows']} held-out rows",
            objective["before"],
            objective["after"],
            _change(objective),
        )
    ]
    loss, margin, general = (result[name] for name in ("heldout_loss", "margin", "general"))
    if loss is not None and result["objective"] != "sft":
        rows.append(("held-out loss, nats per token", loss["before"], loss["after"], _change(loss)))
    if margin is not None:
        right = f"right in {100 * margin['accuracy']:.0f} % of pairs"
        rows.append(
            ("margin chosen over rejected, nats", 0.0, margin["after"], f"{_interval(margin['ci'])} {right}")
        )
    if general is not None:
        kl = f"KL from the base {_number(general['kl'])} {_interval(general['ci'])}"
        rows.append(("general text, nats per token", general["loss_before"], general["loss_after"], kl))
    width = max(len(row[0]) for row in rows)
    head = f"{'':<{width}}  {'before':>8}  {'after':>8}"
    return [
        head,
        *(f"{name:<{width}}  {_number(a):>8}  {_number(b):>8}  {more}" for name, a, b, more in rows),
    ]


def _change(value: dict[str, Any]) -> str:
    return f"{_number(value['difference'], sign=True)} {_interval(value['ci'])}".strip()


def _interval(ends: list[float | None] | None) -> str:
    if not ends or None in ends:
        return ""
    return f"[{', '.join(_number(end) for end in ends)}]"


def _number(value: float | None, *, sign: bool = False) -> str:
    return "-" if value is None else f"{value:{'+' if sign else ''}.4g}"
