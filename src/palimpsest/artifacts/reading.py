"""Opening a folder: nothing is handed out that is unfinished, edited or of an unknown schema."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.artifacts import disk
from palimpsest.display.notebook import Card, Rich
from palimpsest.errors import ArtifactError

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
"""Version of the manifest that this code writes, and the newest it reads."""


@dataclass(frozen=True)
class Artifact(Rich):
    """A folder that one stage wrote, opened for reading."""

    path: Path
    """The folder."""
    manifest: dict[str, Any]
    """What the stage said about itself."""

    def _card(self) -> Card:
        from palimpsest.artifacts.contents import artifact_card

        return artifact_card(self)

    @property
    def stage(self) -> str:
        """Which stage wrote the folder."""
        return self.manifest["stage"]

    @property
    def status(self) -> str:
        """`complete`, or `running` when an unfinished folder was asked for."""
        return self.manifest["status"]

    @property
    def config(self) -> dict[str, Any]:
        """The stage's configuration."""
        return self.manifest["config"]

    @property
    def inputs(self) -> dict[str, Any]:
        """What was read, each with its path and hash."""
        return self.manifest["inputs"]

    @property
    def models(self) -> dict[str, Any]:
        """Which models were used."""
        return self.manifest["models"]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Every data file with its hash and its size in bytes."""
        return self.manifest["files"]

    def file(self, name: str) -> Path:
        """Return the path of a file of this folder.

        Raises:
            ArtifactError: The name leaves the folder, or there is no such file.
        """
        path = disk.safe_join(self.path, name, links=name in self.files)
        if not path.exists():
            raise ArtifactError(
                f"{self.path} holds no {name}", found=", ".join(disk.data_files(self.path)) or "no files"
            )
        return path

    def read_json(self, name: str) -> Any:
        """Read a JSON file of this folder.

        Raises:
            ArtifactError: It is missing or is no JSON.
        """
        return read_json(self.file(name))

    def read_table(self, name: str) -> pyarrow.Table:
        """Read a Parquet file of this folder.

        Raises:
            ArtifactError: It is missing or is no Parquet.
        """
        import pyarrow
        import pyarrow.parquet

        path = self.file(name)
        try:
            return pyarrow.parquet.read_table(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise ArtifactError(f"{path} is no readable Parquet file", found=error) from error

    def attach(self, name: str, data: bytes) -> Path:
        """Add a file that is derived from the artifact, such as a rendered report, or replace it.

        It is listed apart from the data, is not verified, and leaves the artifact's identity as it was.

        Raises:
            ArtifactError: The name belongs to the data, or another process is writing to the folder.
        """
        if name in self.files or name in (disk.MANIFEST, disk.LOCK):
            raise ArtifactError(f"{name} is part of {self.path} and cannot be replaced")
        path = disk.safe_join(self.path, name)
        lock = disk.take_lock(self.path)
        try:
            disk.write_bytes(path, data)
            manifest = read_manifest(self.path)
            manifest["attached"] = sorted({*manifest.get("attached", []), name})
            disk.write_bytes(self.path / disk.MANIFEST, disk.to_json(manifest))
            self.manifest["attached"] = manifest["attached"]
        finally:
            disk.drop_lock(self.path, lock)
        return path


def open_artifact(
    path: str | Path,
    *,
    stage: str | tuple[str, ...] | None = None,
    allow_running: bool = False,
    verify: bool = True,
) -> Artifact:
    """Open a folder that a stage wrote.

    Args:
        path: The folder.
        stage: The stage, or one of the stages, that must have written it; None for any.
        allow_running: Accept a folder that is not finished.
        verify: Compare every data file with its recorded hash.

    Raises:
        ArtifactError: The folder is missing, unfinished, edited, of another stage or of a newer schema.
    """
    root = Path(path)
    manifest = read_manifest(root)
    stages = (stage,) if isinstance(stage, str) else stage
    if stages is not None and manifest["stage"] not in stages:
        raise ArtifactError(
            f"{root} was written by another verb",
            expected=" or ".join(stages),
            found=manifest["stage"],
            fix=f"See `palimpsest info {root}`",
        )
    if manifest["status"] != "complete" and not allow_running:
        raise ArtifactError(
            f"{root} is not finished",
            expected="status complete",
            found=f"status {manifest['status']}",
            fix="Run the command that writes it again with --resume",
        )
    if manifest["config_hash"] != disk.digest(manifest["config"]):
        raise ArtifactError(f"{root / disk.MANIFEST} was edited: its config no longer has its hash")
    if verify:
        _verify(root, manifest["files"])
    return Artifact(root, manifest)


def input_entry(path: str | Path) -> dict[str, str]:
    """Return what a manifest records of an input: its path and a hash of its content.

    A file gives its own hash, an artifact that of its manifest, any other folder that of its
    files' names and hashes.

    Raises:
        ArtifactError: There is nothing at this path, or it is an artifact that is not finished.
    """
    root = Path(path)
    if not root.is_dir():
        return {"path": str(path), "sha256": disk.file_sha256(root)}
    if is_manifest(_try_json(root / disk.MANIFEST)):
        manifest = dict(open_artifact(root, verify=False).manifest)
        manifest.pop("attached", None)
        return {"path": str(path), "sha256": disk.digest(manifest)}
    total = hashlib.sha256()
    for file in sorted(item for item in root.rglob("*") if item.is_file()):
        total.update(f"{file.relative_to(root).as_posix()}\0{disk.file_sha256(file)}\n".encode())
    return {"path": str(path), "sha256": total.hexdigest()}


def read_manifest(root: Path) -> dict[str, Any]:
    """Read and check the manifest of a folder, whatever its stage and status.

    Raises:
        ArtifactError: It is missing, damaged, or of a schema that this version does not read.
    """
    if not root.exists():
        raise ArtifactError(f"There is no folder {root}")
    if not root.is_dir():
        raise ArtifactError(f"{root} is a file", expected="a folder that a palimpsest command wrote")
    path = root / disk.MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{root} holds no {disk.MANIFEST}", expected="a folder that a palimpsest command wrote"
        )
    manifest = read_json(path)
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise ArtifactError(
            f"{root} was written by a newer palimpsest",
            expected=f"schema {SCHEMA} or older",
            found=f"schema {schema}, palimpsest {manifest.get('palimpsest', 'of unknown version')}",
            fix=f"Install palimpsest-lm {manifest.get('palimpsest', 'in its newest version')} or later",
        )
    if not is_manifest(manifest):
        raise ArtifactError(
            f"{path} is no palimpsest manifest", expected=f"schema {SCHEMA}", found=f"schema {schema}"
        )
    return manifest


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        ArtifactError: It cannot be read or is cut short.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no readable JSON",
            found=error,
            fix="The file is damaged: remove the folder and make it again",
        ) from error


_FIELDS = {
    "stage": str,
    "status": str,
    "palimpsest": str,
    "config": dict,
    "config_hash": str,
    "inputs": dict,
    "models": dict,
    "files": dict,
}


def is_manifest(value: object) -> bool:
    """Tell whether a value read from JSON is a manifest of ours in the schema that we write."""
    if not isinstance(value, dict) or value.get("schema") != SCHEMA:
        return False
    return all(isinstance(value.get(name), kind) for name, kind in _FIELDS.items())


def _try_json(path: Path) -> object:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _verify(root: Path, files: dict[str, dict[str, Any]]) -> None:
    for name, entry in files.items():
        path = disk.safe_join(root, name, links=True)
        if not path.is_file():
            raise ArtifactError(f"{path} is missing", fix="Restore the file or make the folder again")
        listed = entry if isinstance(entry, dict) else {}
        if "chunks" in listed and disk.chunk_hashes(path) == listed["chunks"]:
            continue
        expected, found = listed.get("sha256"), disk.file_sha256(path)
        if found != expected:
            raise ArtifactError(
                f"{path} was changed after it was written",
                expected=f"sha256 {expected}",
                found=f"sha256 {found}",
                fix="Restore the file or make the folder again",
            )
