"""What all pages share: the runs, the opened examples folders, the models, the templates."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from palimpsest.artifacts import Artifact
from palimpsest.errors import ArtifactError
from palimpsest.latents import LatentIndex
from palimpsest.latents.schema import LABELS_STAGE, STAGE
from palimpsest.web.bench import Bench, Place
from palimpsest.web.columns import Column, columns
from palimpsest.web.config import ServeConfig
from palimpsest.web.evidence import Dictionaries, Evidence, dictionaries_of, gather, tuned_of
from palimpsest.web.refusals import GoneError, NoPageError, PageError
from palimpsest.web.runs import Entry, Shelf

HELD = 2
"""Opened examples folders in memory at a time: each holds its table of latents."""

OWN = "model"
"""Stands in addresses for the dictionary that the command line named."""


@dataclass(frozen=True)
class Shown:
    """An examples run, opened, with the labels of its dictionary and what other runs say of its latents."""

    entry: Entry
    index: LatentIndex
    labels: tuple[Entry, ...]
    evidence: Evidence
    columns: Mapping[str, Column]


class Desk:
    """What all pages share; safe to use from several threads.

    Attributes:
        config: What is served.
        shelf: The runs.
        bench: The models; None where none may be loaded.
    """

    def __init__(self, config: ServeConfig, bench: Bench | None = None) -> None:
        self.config, self.bench = config, bench
        self.shelf = Shelf(config.root)
        self._lock = threading.Lock()
        self._opening: dict[str, threading.Lock] = {}
        self._shown: OrderedDict[Any, Shown] = OrderedDict()
        self._families: dict[Any, tuple[Dictionaries, str]] = {}

    def open(self, id: str) -> tuple[Entry, Artifact]:
        """A finished run.

        Raises:
            NoPageError: There is none.
            GoneError: It was deleted, is unfinished or damaged.
        """
        entry = self.shelf.entry(id)
        return entry, self.shelf.open(entry)

    def shown(self, id: str) -> Shown:
        """An examples run with its labels and evidence, from memory where nothing changed.

        Raises:
            NoPageError: There is none, or it is no examples run.
            GoneError: It was deleted or damaged.
        """
        entry = self.shelf.entry(id)
        if entry.stage != STAGE or entry.status != "complete":
            raise NoPageError(
                f"{entry.name} has no latents to browse",
                expected="a finished run of palimpsest examples",
                found=f"stage {entry.stage or 'unknown'}, {entry.status}",
            )
        related = self.related(entry)
        key = (entry.id, entry.stamp, *((one.id, one.stamp) for one in related))
        with self._lock:
            if key in self._shown:
                self._shown.move_to_end(key)
                return self._shown[key]
            opening = self._opening.setdefault(entry.id, threading.Lock())
        # Two requests for one folder open it once.
        with opening:
            with self._lock:
                if key in self._shown:
                    return self._shown[key]
            made = self._show(entry, related)
            with self._lock:
                for old in [one for one in self._shown if one[0] == entry.id]:
                    del self._shown[old]
                self._shown[key] = made
                while len(self._shown) > HELD:
                    self._shown.popitem(last=False)
        return made

    def related(self, entry: Entry) -> list[Entry]:
        """Finished runs that speak of the same dictionary's latents, as far as their manifests say."""
        mine = self.family(entry)
        return [
            one
            for one in self.shelf.entries()
            if one.id != entry.id and one.status == "complete" and mine.same(self.family(one))
        ]

    def family(self, entry: Entry) -> Dictionaries:
        """The dictionary of a run."""
        return self._read(entry)[0]

    def examples_of(self, entry: Entry) -> list[Entry]:
        """Examples runs of a run's dictionary, those of another fine-tune left out."""
        tuned = self._read(entry)[1]
        found = [one for one in self.related(entry) if one.stage == STAGE]
        return [one for one in found if not tuned or self._read(one)[1] in ("", tuned)]

    def _read(self, entry: Entry) -> tuple[Dictionaries, str]:
        """Dictionaries and tuned model of a run, remembered."""
        key = (entry.id, entry.stamp)
        with self._lock:
            if key in self._families:
                return self._families[key]
        found = dictionaries_of(entry), tuned_of(entry)
        with self._lock:
            for old in [one for one in self._families if one[0] == entry.id]:
                del self._families[old]
            self._families[key] = found
        return found

    def examples(self) -> list[Entry]:
        """Finished examples runs."""
        return [one for one in self.shelf.entries() if one.stage == STAGE and one.status == "complete"]

    def places(self) -> list[Place]:
        """What own text can be read with, what the command line named first."""
        own = [Place(OWN, self.config.dictionary)] if self.config.dictionary else []
        return own + [Place(one.id, one.name, one.path) for one in self.examples()]

    def place(self, id: str) -> Place:
        """One of `places`; by default the first whose latents can be read.

        Raises:
            NoPageError: There is none of that id.
        """
        known = self.places()
        found = next((one for one in known if one.id == id or (not id and self._readable(one))), None)
        if found is None:
            raise NoPageError(
                "There is no dictionary to read with",
                expected="a finished run of palimpsest examples, or --dictionary on the command line",
            )
        if found.folder is not None:
            self.shelf.open(self.shelf.entry(found.id))
        return found

    def _readable(self, place: Place) -> bool:
        try:
            return place.folder is None or bool(self.shown(place.id))
        except PageError:
            return False

    def need_bench(self) -> Bench:
        """The models.

        Raises:
            NoPageError: None may be loaded.
        """
        if self.bench is None:
            raise NoPageError(
                "No model may be loaded", fix="Start the app with --model: palimpsest serve RUN_DIR --model"
            )
        return self.bench

    def close(self) -> None:
        """Stop what is being done."""
        if self.bench is not None:
            self.bench.close()

    def _show(self, entry: Entry, related: list[Entry]) -> Shown:
        self.shelf.open(entry)
        labels = []
        for one in related:
            if one.stage == LABELS_STAGE and _opens(self.shelf, one):
                labels.append(one)
        try:
            index = LatentIndex.open(entry.path, [one.path for one in labels])
        except (ArtifactError, OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise GoneError(f"The latents of {entry.name} cannot be read", found=error) from error
        evidence = gather(self.shelf, related, index)
        # Reading left buffers behind, more than the table itself takes.
        pa.default_memory_pool().release_unused()
        return Shown(entry, index, tuple(labels), evidence, columns(index, evidence))


def _opens(shelf: Shelf, entry: Entry) -> bool:
    """Whether labels can be read; those that cannot are left out rather than hiding the latents."""
    from palimpsest.latents import read_labels

    try:
        shelf.open(entry)
        read_labels([entry.path])
    except Exception:
        return False
    return True


def names_of(about: Mapping[str, Any]) -> tuple[str, str]:
    """Names of base and tuned model; the tuned one is empty where there is none."""
    pair = about.get("pair")
    pair = pair if isinstance(pair, Mapping) else {}
    return str(pair.get("base") or ""), str(pair.get("tuned") or "")
