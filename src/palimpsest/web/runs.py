"""The runs below a folder: found by looking, addressed by ids, and read only where they lie."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from palimpsest.artifacts import Artifact, disk, open_artifact
from palimpsest.artifacts.reading import read_manifest
from palimpsest.errors import ArtifactError
from palimpsest.web.refusals import GoneError, NoPageError

DEEPEST = 8
MOST_RUNS = 5_000
MOST_FOLDERS = 50_000
LARGEST_MANIFEST = 32 << 20
LARGEST_SIZE = 1 << 60
RESCAN_SECONDS = 2.0
SKIPPED = {disk.PARTS, "node_modules", "__pycache__"}

GROUPS = (
    ("Audits", ("audit", "battery", "calibration")),
    ("Differences", ("diff", "diff-compare", "null-model")),
    ("Latents", ("examples", "labels", "steer")),
    ("Adapters", ("tune", "explain", "explain-compare")),
    ("Dictionaries", ("dictionary", "dictionaries", "evaluation")),
    ("Activations", ("store",)),
)
"""Stages by what a reader looks for; any other stage stands under Others."""

TRAINING = ("tune", "dictionary", "dictionaries")
"""Stages whose progress can be watched."""


class Stamp(NamedTuple):
    """What changes when a file is replaced."""

    inode: int
    changed: int
    size: int


@dataclass(frozen=True)
class Entry:
    """A run as the list shows it.

    Attributes:
        id: Stands in addresses; made from the name.
        name: Its folder, relative to the folder that is served.
        path: The folder.
        stamp: Of its manifest.
        stage: Which stage wrote it; empty where the manifest cannot be read.
        status: `complete`, `running`, or `damaged`.
        summary: In its own words, or what is wrong with it.
        created: As the manifest says, with minutes.
        size: Bytes of its files.
        inputs: As recorded.
    """

    id: str
    name: str
    path: Path
    stamp: Stamp
    stage: str = ""
    status: str = "damaged"
    summary: str = ""
    created: str = ""
    size: int = 0
    inputs: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> str:
        """Under which heading it stands."""
        if self.status == "damaged":
            return "Damaged"
        return next((title for title, stages in GROUPS if self.stage in stages), "Others")


class Shelf:
    """The runs below one folder.

    Safe to ask from several threads. Links are not followed, and an address is looked up among the ids of what was
    found: no part of an address ever becomes part of a path.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._looked = -float("inf")
        self.cut = False

    def entries(self) -> list[Entry]:
        """All runs by name, as of a moment ago."""
        with self._lock:
            if time.monotonic() - self._looked > RESCAN_SECONDS:
                self._look()
            return list(self._entries.values())

    def entry(self, id: str) -> Entry:
        """The run of an id, as it is on disk now.

        Raises:
            NoPageError: There never was one.
            GoneError: It was deleted.
        """
        with self._lock:
            entry = self._entries.get(id)
            if entry is None and time.monotonic() - self._looked > RESCAN_SECONDS / 4:
                self._look()
                entry = self._entries.get(id)
            if entry is None:
                raise NoPageError(
                    "There is no such run here",
                    fix="It was deleted or renamed, or the address is wrong: see the list of runs",
                )
            fresh = _entry(self.root, entry.path, entry)
            if fresh is None:
                del self._entries[id]
                raise GoneError(
                    f"The run {entry.name} is gone", fix="It was deleted or renamed: see the list of runs"
                )
            self._entries[id] = fresh
            return fresh

    def open(self, entry: Entry, *, running: bool = False) -> Artifact:
        """Open a run for reading.

        Raises:
            GoneError: It was deleted, is unfinished or damaged, or links lead out of the served folder.
        """
        try:
            artifact = open_artifact(entry.path, allow_running=running, verify=False)
        except (ArtifactError, RecursionError) as error:
            raise GoneError(f"The run {entry.name} cannot be shown", found=error) from error
        for path in entry.path.rglob("*"):
            if path.exists() and not (path.is_file() or path.is_dir()):
                # A pipe would be waited for without end.
                raise GoneError(
                    f"The run {entry.name} is not shown: it holds what is neither file nor folder",
                    found=path.name,
                )
            if path.is_symlink() and not path.resolve().is_relative_to(self.root):
                raise GoneError(
                    f"The run {entry.name} is not shown: it holds a link that leaves the served folder",
                    found=path.name,
                )
        return artifact

    def _look(self) -> None:
        found: dict[str, Entry] = {}
        known = {entry.path: entry for entry in self._entries.values()}
        self.cut = False
        for path in _folders(self.root):
            entry = _entry(self.root, path, known.get(path))
            if entry is None:
                continue
            if len(found) >= MOST_RUNS:
                self.cut = True
                break
            found[entry.id] = entry
        self._entries = dict(sorted(found.items(), key=lambda item: item[1].name))
        self._looked = time.monotonic()


def _folders(root: Path) -> Iterator[Path]:
    """The folders that hold a manifest, links left out."""
    for seen, (place, folders, files) in enumerate(os.walk(root, followlinks=False)):
        if seen > MOST_FOLDERS:
            return
        path = Path(place)
        deep = len(path.relative_to(root).parts)
        folders[:] = sorted(
            name
            for name in folders
            if deep < DEEPEST
            and name not in SKIPPED
            and not name.startswith(".")
            and not (path / name).is_symlink()
        )
        if disk.MANIFEST in files:
            yield path


def _entry(root: Path, path: Path, known: Entry | None) -> Entry | None:
    """What the list says of a folder; None where there is no manifest of ours in it."""
    file = path / disk.MANIFEST
    try:
        facts = file.lstat()
        # A folder above it may have become a link since it was found.
        inside = path.resolve() == path and path.is_relative_to(root)
    except OSError:
        return None
    if file.is_symlink() or not file.is_file() or not inside:
        return None
    stamp = Stamp(facts.st_ino, facts.st_mtime_ns, facts.st_size)
    if known is not None and known.stamp == stamp:
        return known
    place = path.relative_to(root).as_posix()
    name = root.name if place == "." else place
    plain = Entry(hashlib.sha256(os.fsencode(place)).hexdigest()[:12], name, path, stamp)
    if facts.st_size > LARGEST_MANIFEST:
        return _damaged(plain, "Its manifest is larger than any of ours.")
    try:
        manifest = read_manifest(path)
    except ArtifactError as error:
        # The manifest of something else, such as a browser extension's, is no run.
        ours = "no palimpsest manifest" not in error.problem
        return _damaged(plain, str(error)) if ours else None
    except (RecursionError, OSError) as error:
        return _damaged(plain, f"Its manifest cannot be read ({type(error).__name__}).")
    return Entry(
        plain.id,
        name,
        path,
        stamp,
        stage=manifest["stage"],
        status="complete" if manifest["status"] == "complete" else "running",
        summary=str(manifest.get("summary") or "")[:2_000],
        created=str(manifest.get("created") or "")[:16].replace("T", " "),
        size=_size(manifest["files"]),
        inputs=manifest["inputs"],
    )


def _damaged(entry: Entry, why: str) -> Entry:
    return Entry(entry.id, entry.name, entry.path, entry.stamp, summary=why)


def _size(files: Mapping[str, Any]) -> int:
    sizes = [one.get("bytes") for one in files.values() if isinstance(one, dict)]
    return sum(size for size in sizes if isinstance(size, int) and 0 <= size < LARGEST_SIZE)
