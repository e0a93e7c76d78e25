"""What a second person needs to make a run again: its command, what it read, and with which versions."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from palimpsest.report import facts
from palimpsest.report.display import visible
from palimpsest.report.parts import Run

VERBS = {
    "audit": "audit",
    "diff": "diff",
    "diff-compare": "diff compare",
    "tune": "tune",
    "explain": "explain",
    "explain-compare": "explain compare",
    "examples": "examples",
    "labels": "label",
    "steer": "steer",
    "evaluation": "evaluate",
}
TRAINED = {"pair": "crosscoder", "diff": "diff-sae"}
"""What `train` makes of each view; an SAE of any other."""
_OUT_OF_CONFIG = ("run", "out", "resume", "overwrite")


@dataclass(frozen=True)
class Recipe:
    """How one run is made again.

    Attributes:
        name: Of the run.
        stage: Of the run.
        command: The command line.
        config: Options as TOML, for a command that takes them from a file; empty where the command says all.
        file: Name of that file.
        rows: Fingerprints, hashes and versions.
    """

    name: str
    stage: str
    command: str
    rows: list[tuple[str, Any]]
    config: str = ""
    file: str = ""


def recipe(run: Run) -> Recipe:
    """How a run is made again."""
    manifest = run.artifact.manifest
    if run.stage == "audit":
        return audit_recipe(dict(run.data), manifest, run.name)
    given = run.data.get("command") or manifest.get("command")
    verb = VERBS.get(run.stage)
    if run.stage in ("dictionary", "dictionaries"):
        verb = f"train {TRAINED.get(str(run.artifact.config.get('view')), 'sae')}"
    config = as_toml(run.artifact.config) if verb and not given else ""
    file = f"{run.stage}.toml"
    out = shlex.quote(str(run.path))
    command = str(given) if given else f"palimpsest {verb} --config {file} --out {out}" if verb else ""
    return Recipe(run.name, run.stage, command or "its command was not recorded", _rows(run), config, file)


def audit_recipe(audit: dict[str, Any], manifest: Mapping[str, Any], name: str = "") -> Recipe:
    """How an audit is made again, from its content."""
    command = audit.get("command")
    return Recipe(
        name,
        "audit",
        "not measured" if command is None else str(command),
        facts.reproducibility(audit, dict(manifest)),
    )


def _rows(run: Run) -> list[tuple[str, Any]]:
    manifest, pair = run.artifact.manifest, run.data.get("pair") or {}
    rows: list[tuple[str, Any]] = [
        ("base weights", pair.get("fingerprint_base")),
        ("tuned weights", pair.get("fingerprint_tuned")),
    ]
    for name, entry in run.artifact.inputs.items():
        if isinstance(entry, Mapping) and (entry.get("sha256") or entry.get("path")):
            rows.append((name, f"{entry.get('path') or ''} {entry.get('sha256') or ''}".strip()))
    packages = manifest.get("packages") or {}
    rows += [
        ("seed", manifest.get("seed")),
        ("palimpsest", manifest.get("palimpsest")),
        ("packages", ", ".join(f"{key} {packages[key]}" for key in sorted(packages)) or None),
        ("device", manifest.get("device")),
        ("configuration hash", manifest.get("config_hash")),
        ("run created", manifest.get("created")),
    ]
    return [(visible(label, 60), value) for label, value in rows if value is not None]


def as_toml(config: Mapping[str, Any]) -> str:
    """A run's configuration as a file for `--config`: groups of options stand beside the others, as flags do."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= {inner: one for inner, one in value.items() if inner not in _OUT_OF_CONFIG}
        elif key not in _OUT_OF_CONFIG:
            flat[key] = value
    lines = [
        f"{key.replace('_', '-')} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in flat.items()
        if value is not None and value != [] and not isinstance(value, Mapping) and _plain(value)
    ]
    return "\n".join(lines)


def _plain(value: Any) -> bool:
    """Whether TOML writes a value as JSON does."""
    if isinstance(value, list):
        return all(isinstance(one, (str, int, float)) for one in value)
    return isinstance(value, (str, int, float))
