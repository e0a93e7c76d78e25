"""`palimpsest info`."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

app = verb_app("info", VERBS["info"].capitalize() + ".")

NOTABLE = {
    "audit": ("audit.json", ("summary",)),
    "dictionary": ("dictionary.json", ("n_latents", "k", "activation", "d_model", "view", "metadata")),
    "dictionaries": ("variants.json", ("site", "view", "dictionaries")),
    "evaluation": ("evaluation.json", ("summary", "site", "view", "tokens", "masking", "notes")),
    "store": ("store.json", ("sites", "models", "d_model", "dtype")),
}
"""The file of each stage that says most, and its keys worth a line."""

ORIGIN = ("model", "base", "tuned", "site", "tokens", "metrics", "evaluation")
"""What of a dictionary's metadata is shown."""


@app.default
def info(
    path: Path,
    *,
    display: Annotated[Display, Parameter(name="*")] = Display(),  # noqa: B008
) -> None:
    """Say what a folder is, where it came from, and whether it is whole.

    Args:
        path: Any folder that palimpsest wrote.
        display: What is printed.
    """
    from palimpsest.artifacts import open_artifact

    artifact = open_artifact(path, allow_running=True)
    manifest = artifact.manifest
    name, keys = NOTABLE.get(artifact.stage, ("", ()))
    content: dict[str, Any] = {}
    if name in manifest["files"]:
        data = artifact.read_json(name)
        content = {key: data[key] for key in keys if key in data}
    emit(display, manifest | {"content": content}, lambda: _show(manifest, content))


def _show(manifest: dict[str, Any], content: dict[str, Any]) -> None:
    whole = (
        "all files match their hashes"
        if manifest["status"] == "complete"
        else "unfinished: its command with --resume goes on"
    )
    say(f"{manifest['stage']} ({manifest['status']}, {whole})")
    say(f"  created {manifest['created']} by palimpsest {manifest['palimpsest']}")
    about = {key: value for key, value in content.items() if key != "metadata"}
    about |= {k: v for k, v in content.get("metadata", {}).items() if k in ORIGIN and v is not None}
    for key, value in about.items():
        say(f"  {key}: {value}")
    for name, entry in manifest["inputs"].items():
        say(f"  input {name}: {entry.get('path')} ({str(entry.get('sha256'))[:12]})")
    for name, entry in manifest["files"].items():
        say(f"  file {name}: {entry['bytes']:,} bytes")
    for name in manifest.get("attached", []):
        say(f"  attached {name} (made from the files above, not verified)")
    for name, seconds in manifest["timings"].items():
        say(f"  {name}: {seconds:.1f} s")
