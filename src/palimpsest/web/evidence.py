"""What other runs say of the same latents: whose dictionary they share, and which of their columns are worth a look."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from palimpsest.artifacts import Artifact
from palimpsest.artifacts.reading import read_json
from palimpsest.errors import PalimpsestError
from palimpsest.latents import LatentIndex
from palimpsest.log import log
from palimpsest.web.runs import Entry, Shelf

ABOUT = {
    "audit": "audit.json",
    "diff": "diff.json",
    "examples": "examples.json",
    "explain": "explain.json",
    "labels": "labels.json",
    "steer": "steer.json",
}
"""Where each stage says which dictionary it read."""

LARGEST_ABOUT = 32 << 20
MOST_SOURCES = 6
"""Runs whose columns are joined, newest first; more would not fit a page."""

DIFF = {
    "class": "class",
    "verdict": "verdict",
    "delta_norm": "Δnorm",
    "nu_reconstruction": "ν reconstruction",
    "nu_error": "ν error",
    "nu_centred": "ν centred",
    "causal_share": "causal share",
    "activation_change": "activation change",
    "stability": "stability",
}
EXPLAIN = {"value": "adapter value", "effect": "effect", "share": "share of effect"}
AUDIT = {"contribution": "contribution", "change": "change", "q": "q"}


@dataclass(frozen=True)
class Source:
    """One other run: one row for each latent that it speaks of.

    Attributes:
        entry: The run.
        name: Shorter than its folder where that is clear.
        latents: Sorted.
        columns: Values by what a reader calls them.
    """

    entry: Entry
    name: str
    latents: np.ndarray = field(repr=False)
    columns: Mapping[str, Sequence[Any]] = field(repr=False)

    def of(self, latent: int) -> dict[str, Any]:
        """What it says of a latent; empty where it says nothing."""
        place = int(np.searchsorted(self.latents, latent))
        if place >= len(self.latents) or self.latents[place] != latent:
            return {}
        return {key: value for key, values in self.columns.items() if (value := values[place]) is not None}


@dataclass(frozen=True)
class Evidence:
    """What other runs say of the latents of an examples run.

    Attributes:
        sources: One each.
        joined: Columns that were joined to the index: name there, what stands above it, and the source.
    """

    sources: tuple[Source, ...] = ()
    joined: tuple[tuple[str, str, str], ...] = ()

    def of(self, latent: int) -> list[tuple[str, dict[str, Any]]]:
        """Run name and values by label, as a card shows them."""
        found = [(one.name, one.of(latent)) for one in self.sources]
        return [(name, values) for name, values in found if values]

    def choices(self, name: str) -> tuple[str, ...]:
        """The values of a joined column of text, the most frequent first."""
        label, source = next((label, source) for one, label, source in self.joined if one == name)
        values = next(one.columns[label] for one in self.sources if one.name == source)
        return tuple(text for text, _ in Counter(one for one in values if one is not None).most_common(40))


class Dictionaries(NamedTuple):
    """The dictionary that a run read.

    Attributes:
        hashes: Of the whole dictionary.
        names: Hashes and paths in full; adapters list hashes of tensors alone.
    """

    hashes: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()

    def same(self, other: Dictionaries) -> bool:
        """Whether two runs speak of the same latents; a path counts only without a hash, for it may be trained anew."""
        if self.hashes and other.hashes:
            return bool(self.hashes & other.hashes)
        return bool(self.names & other.names)


def dictionaries_of(entry: Entry) -> Dictionaries:
    """The dictionary of a run; none where it read several, whose latents bear the same numbers."""
    inputs = [one for name, one in entry.inputs.items() if name.partition("/")[0] == "dictionary"]
    about = _about(entry)
    sites = about.get("sites")
    sites = sites if isinstance(sites, list) else []
    if len(sites) > 1:
        return Dictionaries()
    whole = [one for one in (*inputs, about.get("dictionary")) if isinstance(one, Mapping)]
    hashes = {str(one["sha256"]) for one in whole if one.get("sha256")}
    names = set(hashes)
    for one in (*whole, *(one for one in sites if isinstance(one, Mapping))):
        place = one.get("path") or one.get("dictionary")
        names |= {str(one["sha256"])} if one.get("sha256") else set()
        names |= {os.path.normpath(Path.cwd() / str(place))} if place else set()
    return Dictionaries(frozenset(hashes), frozenset(names))


def _about(entry: Entry) -> Mapping[str, Any]:
    """The main file of a run; empty where it cannot be read or leads elsewhere."""
    name = ABOUT.get(entry.stage)
    if not name:
        return {}
    try:
        path = entry.path / name
        fits = path.is_file() and not path.is_symlink() and path.stat().st_size <= LARGEST_ABOUT
        data = read_json(path) if fits else {}
    except (PalimpsestError, OSError, RecursionError):
        data = {}
    return data if isinstance(data, Mapping) else {}


def tuned_of(entry: Entry) -> str:
    """Where the tuned model of a run is; empty where there is none, or nobody said."""
    return _tuned(_about(entry))


def _tuned(about: Mapping[str, Any]) -> str:
    """Where the tuned model of a run is; empty where there is none, or nobody said."""
    pair = about.get("pair")
    tuned = pair.get("tuned") if isinstance(pair, Mapping) else None
    return os.path.normpath(Path.cwd() / str(tuned)) if tuned else ""


def gather(shelf: Shelf, related: Iterable[Entry], index: LatentIndex) -> Evidence:
    """Read what other runs of the same pair say, and join it to the index; what cannot be read is left out."""
    index_site, mine = str(index.about.get("site") or ""), _tuned(index.about)
    newest = sorted(related, key=lambda one: one.created, reverse=True)
    sources: list[Source] = []
    for entry in newest:
        if entry.stage in READERS and len(sources) < MOST_SOURCES:
            other = _tuned(_about(entry))
            if mine and other and mine != other:
                continue  # it speaks of another fine-tune
            try:
                sources.append(_source(entry, READERS[entry.stage](shelf.open(entry), index_site)))
            except Exception as error:
                # Its table may be anything; the latents themselves are shown all the same.
                log.warning("%s says nothing of its latents: %s", entry.name, error)
    _join_change(index)
    joined = []
    for source in sources:
        for label, values in source.columns.items():
            name = f"{source.name}: {label}"
            if name in (*index.names, *index.texts) or all(one is None for one in values):
                continue
            index.join(name, source.latents, values)
            joined.append((name, label, source.name))
    return Evidence(tuple(sources), tuple(joined))


def _source(entry: Entry, found: Mapping[str, list[Any]]) -> Source:
    """One row per latent of a run's table, columns that are neither numbers nor text left out."""
    latents = np.asarray(found["latent"], np.int64)
    if latents.ndim != 1:
        raise ValueError("its latents are no numbers")
    columns = {key: values for key, values in found.items() if key != "latent" and _plain(values)}
    order = np.argsort(latents, kind="stable")
    latents = latents[order]
    first = np.ones(len(latents), bool)
    first[1:] = latents[1:] != latents[:-1]
    kept = order[first]
    return Source(
        entry, entry.name, latents[first], {key: [values[i] for i in kept] for key, values in columns.items()}
    )


def _plain(values: Sequence[Any]) -> bool:
    """Whether a column is all text or all numbers."""
    kinds = {type(one) for one in values if one is not None}
    return kinds <= {str} or kinds <= {int, float}


def _join_change(index: LatentIndex) -> None:
    """The difference of the rates, which is what most readers sort by."""
    if "rate_change" in index.names or not {"rate_base", "rate_tuned"} <= set(index.names):
        return
    base, tuned = index.values("rate_base"), index.values("rate_tuned")
    if not (np.isnan(base).all() or np.isnan(tuned).all()):
        index.join("rate_change", index.latents, tuned - base)


def _diff(artifact: Artifact, site: str) -> dict[str, list[Any]]:
    return _columns(artifact.read_table("latents.parquet"), DIFF)


def _explain(artifact: Artifact, site: str) -> dict[str, list[Any]]:
    table = artifact.read_table("latents.parquet")
    if "site" in table.column_names:
        mine = np.asarray(table["site"].to_pylist()) == site
        table = table.filter(pa.array(mine))
    return _columns(table, EXPLAIN)


def _audit(artifact: Artifact, site: str) -> dict[str, list[Any]]:
    """One column for each measure and corpus."""
    table = artifact.read_table("latents.parquet")
    corpora = list(dict.fromkeys(table["dataset"].to_pylist()))[:6]
    names = np.asarray(table["dataset"].to_pylist(), object)
    latents = np.unique(table["latent"].to_numpy())
    found: dict[str, list[Any]] = {"latent": latents.tolist()}
    for corpus in corpora:
        part = table.filter(pa.array(names == corpus))
        place = np.searchsorted(latents, part["latent"].to_numpy())
        for key, label in AUDIT.items():
            column: list[Any] = [None] * len(latents)
            for at, value in zip(place.tolist(), part[key].to_pylist(), strict=True):
                column[at] = value
            found[f"{label} on {corpus}"] = column
    return found


def _columns(table: pa.Table, names: Mapping[str, str]) -> dict[str, list[Any]]:
    kept = {label: table[key].to_pylist() for key, label in names.items() if key in table.column_names}
    return {"latent": table["latent"].to_pylist(), **kept}


READERS = {"diff": _diff, "explain": _explain, "audit": _audit}
"""How each stage's table of latents is read."""
