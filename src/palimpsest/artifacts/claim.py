"""Whose folder is it: what a new run may touch, delete or continue."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from palimpsest.artifacts import disk
from palimpsest.artifacts.reading import is_manifest, read_json
from palimpsest.errors import ArtifactError

_ABSENT = "absent"


def refuse_foreign(root: Path) -> None:
    """Never write into, or delete from, a folder that something else made.

    Raises:
        ArtifactError: The path is a file, or a folder with content that is not ours.
    """
    if root.exists() and not root.is_dir():
        raise ArtifactError(f"{root} is a file", expected="a folder, or a path where one can be made")
    manifest = root / disk.MANIFEST
    if manifest.exists():
        if not is_manifest(read_json(manifest)):
            raise ArtifactError(
                f"{root} holds the {disk.MANIFEST} of something else, or of another version",
                fix="Choose another --out, or remove the folder yourself",
            )
    elif root.exists() and (names := _content(root)):
        raise ArtifactError(
            f"{root} is not empty and is no artifact of palimpsest",
            found=", ".join(names[:5]),
            fix="Choose an empty or a new folder as --out",
        )


def refuse_taken(root: Path, existing: Mapping[str, Any]) -> None:
    """An earlier run stays unless the user says what becomes of it.

    Raises:
        ArtifactError: Always; says how to continue or to replace it.
    """
    done = existing["status"] == "complete"
    raise ArtifactError(
        f"{root} already holds a{' finished' if done else 'n unfinished'} run",
        found=f"stage {existing['stage']}, status {existing['status']}",
        fix="Pass --overwrite to replace it"
        + ("" if done else ", --resume to go on with it")
        + ", or choose another --out",
    )


def check_claim(root: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Say now what `RunFolder` would refuse later, before models are loaded; writes nothing.

    Raises:
        ArtifactError: The folder is something else's, in use, or holds a run that must not be touched.
    """
    root = Path(root)
    refuse_foreign(root)
    if (root / disk.LOCK).exists():
        disk.drop_lock(root, disk.take_lock(root))
    if (root / disk.MANIFEST).exists() and not (resume or overwrite):
        refuse_taken(root, read_json(root / disk.MANIFEST))


def remove(root: Path, manifest: Mapping[str, Any]) -> None:
    """Delete an earlier run; the manifest stays, so that a removal cut short is still known as ours.

    Raises:
        ArtifactError: The run was finished and somebody put further files into its folder since.
    """
    names = disk.data_files(root)
    if manifest["status"] == "complete":
        added = sorted({*names} - {*manifest["files"], *manifest.get("attached", [])})
        if added:
            raise ArtifactError(
                f"{root} holds files that the run in it did not write",
                found=", ".join(added[:5]),
                fix="Move them elsewhere, or choose another --out",
            )
    for name in names:
        (root / name).unlink()
    shutil.rmtree(root / disk.PARTS, ignore_errors=True)
    for folder in sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True):
        folder.rmdir()


def refuse_other_run(root: Path, existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Resume only the very run that was begun.

    Raises:
        ArtifactError: Stage, config or an input's content differ; the message names the keys.
    """
    before, now = _identity(existing), _identity(wanted)
    differing = sorted(
        key for key in before.keys() | now.keys() if before.get(key, _ABSENT) != now.get(key, _ABSENT)
    )
    if differing:
        shown = "; ".join(
            f"{key}: {before.get(key, _ABSENT)!r} then, {now.get(key, _ABSENT)!r} now"
            for key in differing[:8]
        )
        raise ArtifactError(
            f"{root} holds a run that differs in {', '.join(differing[:8])}",
            found=shown,
            fix="Resume with the same options and inputs, pass --overwrite, or choose another --out",
        )


def refuse_own_input(root: Path, wanted: Mapping[str, Any]) -> None:
    """Refuse to replace what the new run is going to read.

    Raises:
        ArtifactError: An input is the folder, or lies inside it.
    """
    for name, entry in wanted["inputs"].items():
        for path in filter(None, str(entry.get("path") or "").split(", ")):
            if Path(path).exists() and Path(path).resolve().is_relative_to(root.resolve()):
                raise ArtifactError(
                    f"--overwrite would delete the {name} that this run reads",
                    found=path,
                    fix="Choose another --out",
                )


def _identity(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Return what makes two runs the same run, as one flat mapping of dotted keys."""
    flat: dict[str, Any] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict) and value:
            for key, item in value.items():
                walk(f"{prefix}.{key}" if prefix else key, item)
        else:
            flat[prefix] = value

    walk("", {"stage": manifest["stage"], "config": manifest["config"]})
    for name, entry in manifest["inputs"].items():
        flat[f"inputs.{name}"] = entry.get("sha256", entry) if isinstance(entry, dict) else entry
    return flat


def _content(root: Path) -> list[str]:
    own = {root / disk.LOCK, *disk.leftovers(root)}
    return sorted(path.name for path in root.iterdir() if path not in own)
