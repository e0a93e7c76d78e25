"""What a folder of each stage says of itself, in the words of its main file: for `info` and for notebooks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palimpsest.display.notebook import Card, Measured, Table

if TYPE_CHECKING:
    from palimpsest.artifacts.reading import Artifact

_BOARD = ("title", "model", "kind", "unit", "rows", "lines.name", "notes")

NOTABLE: dict[str, tuple[str, tuple[str, ...]]] = {
    "audit": ("audit.json", ("summary", "pair", "site", "datasets.name", "warnings")),
    "battery": (
        "battery.json",
        ("base.path", "readers.path", "corpora.name", "max_length", "loss", "activations"),
    ),
    "calibration": ("nulls.json", ()),
    "diff": ("diff.json", ("summary", "method", "pair", "site", "classes", "tuned_only", "gap", "notes")),
    "diff-compare": ("compare.json", ("pair", "site", "rows.name", "notes")),
    "dictionaries": ("variants.json", ("site", "view", "dictionaries")),
    "evaluation": ("evaluation.json", ("summary", "site", "view", "tokens", "masking", "notes")),
    "examples": (
        "examples.json",
        (
            "summary",
            "pair",
            "site",
            "dictionary.path",
            "view",
            "corpora",
            "tokens",
            "latents",
            "alive",
            "lens",
            "notes",
        ),
    ),
    "explain": ("explain.json", ("summary", "adapter", "component", "concentration", "pruned", "notes")),
    "explain-compare": ("compare.json", ("summary", "counts", "notes")),
    "labels": (
        "labels.json",
        (
            "summary",
            "provider",
            "model",
            "examples",
            "dictionary.path",
            "scored",
            "counts",
            "control",
            "notes",
        ),
    ),
    "null-model": ("null.json", ("base", "tuned", "site", "alpha", "drift")),
    "report": ("report.json", ("summary", "verdicts.sentence", "runs.path")),
    "steer": (
        "steer.json",
        ("summary", "pair", "site", "dictionary.path", "side", "changes", "prompts.prompt", "guard", "notes"),
    ),
    "store": ("store.json", ("sites", "models", "d_model", "dtype")),
    "tune": (
        "tune.json",
        (
            "model",
            "method",
            "objective",
            "objective_value",
            "margin",
            "general",
            "parameters",
            "latents_moved",
        ),
    ),
    "tune-baselines": ("baselines.json", _BOARD),
    "tune-sweep": ("leaderboard.json", _BOARD),
}
"""The file of each stage that says most, and what of it is worth a line; a dictionary is told by its header.

A path into the file, `corpora.name`, is followed through lists and is shown under its first part.
"""

NOTHING = (None, "", [], {})
"""What is not worth a line."""

ESTIMATES = ("difference", "kl", "share", "after")
"""Of a figure with an interval: which of its numbers the interval is of, the first that is there."""


def contents(artifact: Artifact) -> dict[str, Any]:
    """What a folder says of itself; empty for a stage that is not known, or that has not written it yet.

    Raises:
        ArtifactError: The file is no JSON.
    """
    manifest = artifact.manifest
    said: dict[str, Any] = {"summary": manifest["summary"]} if "summary" in manifest else {}
    name, paths = NOTABLE.get(artifact.stage, ("", ()))
    if name in manifest["files"]:
        data = artifact.read_json(name)
        said |= {path.partition(".")[0]: found for path in paths if (found := _at(data, path)) not in NOTHING}
    if isinstance(said.get("pair"), dict):
        said["pair"] = {side: name for side, name in said["pair"].items() if side in ("base", "tuned")}
    return said


def _at(data: Any, path: str) -> Any:
    """What lies at a path; None where there is nothing."""
    first, _, rest = path.partition(".")
    found = data.get(first) if isinstance(data, dict) else None
    if not rest or found is None:
        return found
    if isinstance(found, list):
        return [_at(one, rest) for one in found]
    return _at(found, rest)


def artifact_card(artifact: Artifact) -> Card:
    """A folder in a notebook: what it found, what it was made of, its files."""
    manifest, said = artifact.manifest, contents(artifact)
    rows = [_measured(name, one) for name, one in said.items() if isinstance(one, dict) and "ci" in one]
    apart = {"summary", "notes", "warnings"} | {
        name for name, one in said.items() if isinstance(one, dict) and "ci" in one
    }
    inputs = [
        (name, _path(one), str(one.get("sha256") or "")[:12]) for name, one in artifact.inputs.items() if one
    ]
    files = [(name, one.get("bytes")) for name, one in artifact.files.items()]
    unfinished = ["Unfinished: its command with --resume goes on."] if artifact.status != "complete" else []
    return Card(
        kind=f"Run of stage {artifact.stage}",
        name=str(artifact.path),
        summary=str(said.get("summary") or ""),
        facts={
            "made": manifest.get("created"),
            "palimpsest": manifest.get("palimpsest"),
            "device": manifest.get("device"),
            "models": artifact.models,
            **{name.replace("_", " "): one for name, one in said.items() if name not in apart},
        },
        tables=[
            Table(("", "before", "after", "estimate", "unit"), rows, scale="cell"),
            Table(("input", "path", "sha256"), inputs, "What it was made of", folded=True),
            Table(("file", "bytes"), files, "Files", folded=True),
            Table(
                ("part", "seconds"), list(manifest.get("timings", {}).items()), "What took time", folded=True
            ),
        ],
        notes=[*unfinished, *_lines(said.get("notes")), *_lines(said.get("warnings"))],
    )


def _measured(name: str, figure: dict[str, Any]) -> tuple[Any, ...]:
    key = next((one for one in ESTIMATES if figure.get(one) is not None), "")
    before, after = (figure.get(one, figure.get(f"loss_{one}")) for one in ("before", "after"))
    unit = figure.get("unit") or ("KL from the base, nats per token" if key == "kl" else "nats")
    estimate = Measured(figure.get(key), figure["ci"], digits=4, signed=key in ("difference", "after"))
    return name.replace("_", " "), before, after, estimate, unit


def _path(entry: Any) -> str:
    return str(entry.get("path") or "") if isinstance(entry, dict) else str(entry)


def _lines(value: Any) -> list[str]:
    return [str(one) for one in value] if isinstance(value, list) else []
