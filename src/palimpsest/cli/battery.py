"""`palimpsest battery`."""

import sys
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.audit.battery.config import BatteryConfig
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

app = verb_app("battery", VERBS["battery"].capitalize() + ".")
FLAT = Parameter(name="*")


@app.command(name="make")
def make(
    *,
    config: Annotated[BatteryConfig, FLAT],
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> None:
    """Choose the documents of every corpus, read the base over them once, and keep what audits need of it."""
    from palimpsest.audit.battery import make_battery

    artifact = make_battery(config)
    emit(display, _described(artifact.path), lambda: _show(artifact.path))


@app.command(name="calibrate")
def calibrate(
    config: Annotated[CalibrateConfig, FLAT],
    *,
    display: Annotated[Display, FLAT] = Display(),  # noqa: B008
) -> int:
    """Train innocent fine-tunes of the base and keep what they do to the battery; goes on where it stopped."""
    from palimpsest.audit.nulls.calibrate import calibrate_battery

    try:
        calibrate_battery(config)
    except KeyboardInterrupt:
        # Unlike other verbs it needs no --resume, which the usual words would send the user to.
        sys.stderr.write(
            "palimpsest battery: interrupted. Finished nulls are kept; the same command goes on.\n"
        )
        return 130
    emit(display, _described(config.path), lambda: _show(config.path))
    return 0


@app.command(name="show")
def show(battery: Path, *, display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """Say what a battery holds and whether it can give verdicts.

    Args:
        battery: The battery's folder.
        display: What is printed.
    """
    emit(display, _described(battery), lambda: _show(battery))


@app.command(name="list")
def list_(folder: Path = Path(), *, display: Annotated[Display, FLAT] = Display()) -> None:  # noqa: B008
    """List the batteries below a folder, and the presets that ship with the package.

    Args:
        folder: Where to look.
        display: What is printed.
    """
    from palimpsest.audit.battery.presets import list_presets
    from palimpsest.errors import ArtifactError, ConfigError

    if not folder.is_dir():
        raise ConfigError(f"There is no folder {folder}")
    found = []
    for path in sorted(folder.rglob("battery.json")):
        try:
            found.append(_described(path.parent))
        except ArtifactError as error:
            found.append({"path": str(path.parent), "error": str(error)})
    emit(display, {"batteries": found, "presets": list_presets()}, lambda: _show_list(found, list_presets()))


def _described(path: Path) -> dict[str, Any]:
    """The battery's own description, and what its nulls can judge."""
    from palimpsest.audit.battery.folder import Battery
    from palimpsest.audit.nulls.calibrate import describe
    from palimpsest.audit.nulls.store import CALIBRATION, Nulls

    battery = Battery(path)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    described: dict[str, Any] = {"path": str(path), "bytes": size} | battery.description
    if (path / CALIBRATION / "manifest.json").exists():
        nulls = Nulls(path)
        described["calibration"] = {
            "summary": describe(battery.names, nulls.records),
            "nulls": nulls.records,
            "seconds": nulls.seconds,
        }
    else:
        described["calibration"] = None
    return described


def _show(path: Path) -> None:
    described = _described(path)
    readers = ", ".join(f"{reader['path']} at {reader['site']}" for reader in described["readers"])
    say(f"{described['path']}: battery of {described['base']['path']} through {readers}")
    for row in described["corpora"]:
        say(
            f"  {row['name']:<14} {row['documents']:>5} documents, {row['tokens']:>7,} tokens; set aside "
            f"{row['aside_documents']} ({row['aside_tokens']:,} tokens)"
        )
    kept = [
        "codes",
        *(["losses"] if described["loss"] else []),
        *(["activations"] if described["activations"] else []),
    ]
    say(f"  kept of the base: {', '.join(kept)}; {described['bytes'] / 1e6:.1f} MB with its nulls")
    calibration = described["calibration"]
    if calibration is None:
        say(f"  no nulls yet: run `palimpsest battery calibrate {path}` for verdicts")
        return
    say(f"  {calibration['summary']}")
    say(
        f"  training and measuring them took {calibration['seconds']:.0f} s of work, shared among the workers"
    )


def _show_list(found: list[dict[str, Any]], presets: list[str]) -> None:
    if not found:
        say("No battery here.")
    for one in found:
        if "error" in one:
            say(f"{one['path']}: {one['error']}")
            continue
        names = ", ".join(row["name"] for row in one["corpora"])
        nulls = "no nulls" if one["calibration"] is None else one["calibration"]["summary"]
        say(f"{one['path']}: {names}; {nulls}")
    say(f"Presets (they need the hub): {', '.join(presets)}")
