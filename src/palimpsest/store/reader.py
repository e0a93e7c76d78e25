"""Reading a store: shuffled batches with their labels, or an endless stream of rows that starts anywhere."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from palimpsest.artifacts import file_sha256, open_artifact
from palimpsest.display.notebook import Card, Rich, Table
from palimpsest.errors import ArtifactError, ConfigError, SiteError
from palimpsest.store.moments import Moments
from palimpsest.store.probe import PROBE, Probe
from palimpsest.store.shards import DTYPES, LABELS, ShardFile, damaged

BLOCK_BYTES = 2**21
"""Size of the pieces of a shard that `ActivationStore.stream` reads and yields."""


class StoreBatch(NamedTuple):
    """Rows of a store.

    Attributes:
        acts: Activations of one site; models in the order of `ActivationStore.models`.
        token_ids: Token of each row, int32.
        document: Document of each row, int32.
        position: Position of each row in its sequence, int32.
    """

    acts: Float[Tensor, "tokens models d_model"]
    token_ids: Int[Tensor, " tokens"]
    document: Int[Tensor, " tokens"]
    position: Int[Tensor, " tokens"]


class ActivationStore(Rich):
    """Reads the activations that a `StoreWriter` wrote.

    Each shard's hash is checked when the shard is first read, so opening is quick whatever the size.

    Args:
        path: The folder.
        allow_running: Open an unfinished store too; it holds the shards written so far.

    Raises:
        ArtifactError: When the folder is no store, is unfinished, or a shard is missing or cut short.
    """

    def __init__(self, path: str | Path, *, allow_running: bool = False) -> None:
        self._artifact = open_artifact(path, stage="store", allow_running=allow_running, verify=False)
        self.path = self._artifact.path
        self.manifest = self._artifact.manifest
        listed = self._artifact.files.get("store.json")
        if listed and listed["sha256"] != file_sha256(self._artifact.file("store.json")):
            raise damaged(self.path / "store.json", "it was changed after it was written")
        self.index: dict[str, Any] = self._artifact.read_json("store.json")
        self.sites: list[str] = self.index["sites"]
        self.models: list[str] = self.index["models"]
        self.d_model: int = self.index["d_model"]
        self.dtype: torch.dtype = DTYPES[self.index["dtype"]]
        self.shards: list[dict[str, Any]] = self.index["shards"]
        self.statistics = {site: Moments.from_state(one) for site, one in self.index["statistics"].items()}
        self._verified: set[int] = set()
        for shard in self.shards:
            size = self._artifact.file(shard["name"]).stat().st_size
            if size != shard["bytes"]:
                raise damaged(self.path / shard["name"], f"{size} bytes instead of {shard['bytes']}")

    def _card(self) -> Card:
        norms = [
            (site, name, rms)
            for site, moments in self.statistics.items()
            for name, rms in zip(self.models, moments.rms_norm.tolist(), strict=True)
        ]
        facts: dict[str, Any] = {
            "rows": self.rows,
            "sites": self.sites,
            "models": self.models,
            "d model": self.d_model,
            "dtype": self.index["dtype"],
            "shards": len(self.shards),
            "bytes": sum(shard["bytes"] for shard in self.shards),
        }
        sides = [name for _, name, _ in norms]
        table = Table(("site", "model", "root mean square ‖h‖"), norms, sides=sides)
        return Card("Store of activations", str(self.path), facts=facts, tables=[table])

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard["rows"] for shard in self.shards)

    def labels(self, shard: int) -> dict[str, Int[Tensor, " tokens"]]:
        """Token ids, documents and positions of a shard."""
        with self.open_shard(shard) as file:
            return {name: file.rows(name) for name in LABELS}

    def open_shard(self, shard: int) -> ShardFile:
        """A shard, its hash checked if this is the first time; close it.

        Raises:
            ArtifactError: It is damaged.
        """
        self._verify(shard)
        return ShardFile(self._artifact.file(self.shards[shard]["name"]))

    def probe(self) -> Probe | None:
        """The documents by which the store is held against a live model; None in stores written before there were any.

        Raises:
            ArtifactError: The file is damaged.
        """
        listed = self.index.get("probe")
        if listed is None:
            return None
        path = self._artifact.file(PROBE)
        if file_sha256(path) != listed["sha256"]:
            raise damaged(path, "its bytes do not have the hash in store.json")
        try:
            held = load(path.read_bytes())
        except SafetensorError as error:
            raise damaged(path, str(error)) from error
        names = ("input_ids", "attention_mask", "keep", "document")
        return Probe(*(held[name] for name in names), compute=listed["compute"])

    def batches(
        self, batch_size: int, site: str, *, seed: int | None = None, window: int = 4
    ) -> Iterator[StoreBatch]:
        """Every row once with its labels, in batches that are full but for the last.

        Args:
            batch_size: Rows of a batch.
            site: One of `sites`.
            seed: Shuffles the shards, and the rows among `window` shards; None keeps the stored order.
            window: Shards that are held in memory at once when shuffling.

        Raises:
            SiteError: When the store does not hold the site.
            ArtifactError: When a shard is damaged.
        """
        self._require(site)
        if batch_size < 1 or window < 1:
            raise ConfigError(
                "Batches and windows hold at least one", found=f"{batch_size} rows, {window} shards"
            )
        return self._batches(batch_size, site, seed, window)

    def stream(
        self, site: str, position: int = 0, *, seed: int | None = None, epochs: int | None = None
    ) -> Iterator[Float[Tensor, "tokens models d_model"]]:
        """Activations alone, fast and from anywhere: the source of a `palimpsest.buffer.ShuffleBuffer`.

        With a seed every epoch takes the shards in another order, and inside a shard its blocks of 2 MiB; rows of
        a block stay together, and the buffer mixes them. The next shard's hash is checked in a thread while
        one is read.

        Args:
            site: One of `sites`.
            position: Rows left out at the start, of any epoch: the stream goes on exactly there.
            seed: Orders shards and blocks; None keeps the stored order in every epoch.
            epochs: Passes over the store, counted from the very start; None never ends.

        Raises:
            SiteError: When the store does not hold the site.
            ArtifactError: When the store is empty, or a shard is damaged.
        """
        self._require(site)
        if position < 0:
            raise ConfigError("A stream starts at a row", expected="0 or more", found=position)
        if not self.rows:
            raise ArtifactError(f"The store {self.path} is empty", fix="Resume its harvest")
        return self._stream(f"acts.{site}", position, seed, epochs)

    def _stream(self, name: str, position: int, seed: int | None, epochs: int | None) -> Iterator[Tensor]:
        row = self.d_model * len(self.models) * self.dtype.itemsize
        size = max(1, BLOCK_BYTES // row)
        first, position = divmod(position, self.rows)
        with ThreadPoolExecutor(1, "palimpsest-verify") as ahead:
            for epoch in count(first) if epochs is None else range(first, epochs):
                order = _shuffled(len(self.shards), seed, epoch)
                for place, shard in enumerate(order):
                    rows = self.shards[shard]["rows"]
                    if position >= rows:
                        position -= rows
                        continue
                    with self.open_shard(shard) as file:
                        following = order[(place + 1) % len(order)]
                        checked = ahead.submit(self._verify, following)
                        for block in _shuffled(-(-rows // size), seed, epoch, shard + 1):
                            start, stop = block * size, min(rows, (block + 1) * size)
                            if position >= stop - start:
                                position -= stop - start
                                continue
                            yield file.rows(name, start + position, stop)
                            position = 0
                        if place + 1 < len(order):
                            checked.result()

    def _batches(self, batch_size: int, site: str, seed: int | None, window: int) -> Iterator[StoreBatch]:
        generator = None if seed is None else np.random.default_rng(seed)
        order = np.arange(len(self.shards)) if generator is None else generator.permutation(len(self.shards))
        size = 1 if generator is None else window
        groups = [order[start : start + size].tolist() for start in range(0, len(order), size)]
        pool: list[Tensor] = []
        filled = 0
        for group in groups:
            for shard in group:
                with self.open_shard(shard) as file:
                    if not pool:
                        pool = self._pool(file, site, groups, batch_size)
                    rows = self.shards[shard]["rows"]
                    for name, column in zip((f"acts.{site}", *LABELS), pool, strict=True):
                        file.read_into(column[filled : filled + rows], name)
                    filled += rows
            chosen = torch.from_numpy(
                np.arange(filled) if generator is None else generator.permutation(filled)
            )
            whole = filled - filled % batch_size
            for picked in chosen[:whole].split(batch_size):
                if len(picked):
                    yield StoreBatch(*(column.index_select(0, picked) for column in pool))
            # What fills no batch goes on into the next window, so that only the last batch is short.
            filled -= whole
            for column in pool:
                column[:filled] = column.index_select(0, chosen[whole:])
        if filled:
            yield StoreBatch(*(column[:filled].clone() for column in pool))

    def _pool(self, file: ShardFile, site: str, groups: list[list[int]], batch_size: int) -> list[Tensor]:
        """Room for the largest window and what the one before it left."""
        room = batch_size - 1 + max(sum(self.shards[shard]["rows"] for shard in group) for group in groups)
        like = [file.rows(name, 0, 0) for name in (f"acts.{site}", *LABELS)]
        return [torch.empty(room, *one.shape[1:], dtype=one.dtype) for one in like]

    def _require(self, site: str) -> None:
        if site not in self.sites:
            raise SiteError(
                f"{self.path} holds no {site}", expected="one of " + ", ".join(self.sites), found=site
            )

    def _verify(self, shard: int) -> None:
        entry = self.shards[shard]
        if shard not in self._verified:
            path = self._artifact.file(entry["name"])
            if file_sha256(path) != entry["sha256"]:
                raise damaged(path, "its bytes do not have the hash in store.json")
            self._verified.add(shard)


def _shuffled(size: int, seed: int | None, *place: int) -> list[int]:
    """A permutation that depends on the seed and on where it is used, and on nothing that came before."""
    if seed is None:
        return list(range(size))
    return np.random.default_rng([seed, *place]).permutation(size).tolist()
