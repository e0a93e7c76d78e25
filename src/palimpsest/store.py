"""Activations on disk: appended shard by shard, read back shuffled, with memory bounded on both sides."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float64, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.artifacts import RunFolder, file_sha256, open_artifact
from palimpsest.errors import ArtifactError, ConfigError, NumericsError, SiteError

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
"""Types that a store can hold, by the name in `store.json`."""

_LABELS = ("token_ids", "document", "position")


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


class Moments:
    """Running mean and mean squared norm per model, in float64.

    Args:
        models: Size of the models axis.
        d_model: Width of the activations.
    """

    def __init__(self, models: int, d_model: int) -> None:
        self.count = 0
        self.mean: Float64[Tensor, "models d_model"] = torch.zeros(models, d_model, dtype=torch.float64)
        self.square: Float64[Tensor, " models"] = torch.zeros(models, dtype=torch.float64)

    def add(self, acts: Float[Tensor, "tokens models d_model"]) -> None:
        """Take in rows; any split of the same rows gives the same result up to float64 rounding."""
        if not len(acts):
            return
        acts = acts.double()
        self.count += len(acts)
        share = len(acts) / self.count
        self.mean += (acts.mean(0) - self.mean) * share
        self.square += (acts.square().sum(-1).mean(0) - self.square) * share

    @property
    def rms_norm(self) -> Float64[Tensor, " models"]:
        """Root of the mean squared norm of an activation vector."""
        return self.square.sqrt()

    def state(self) -> dict[str, Any]:
        """What `store.json` keeps."""
        rms = self.rms_norm.tolist()
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "mean_square": self.square.tolist(),
            "rms_norm": rms,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Moments":
        """The moments that `state` described."""
        mean = torch.tensor(state["mean"], dtype=torch.float64)
        moments = cls(*mean.shape)
        moments.count, moments.mean = state["count"], mean
        moments.square = torch.tensor(state["mean_square"], dtype=torch.float64)
        return moments


class StoreWriter:
    """Appends activations to an artifact folder of stage `store`.

    A shard is cut only between two calls of `append`, so it holds whole documents when each call does.
    After an interruption the listed shards stay: rows of their documents are then left out of `append`,
    and `holds` tells which documents need no forward pass.

    Args:
        folder: The run folder, of stage `store`.
        sites: Addresses of the sites.
        models: Names on the models axis, e.g. `("base", "tuned")`.
        d_model: Width of the activations.
        dtype: `bfloat16` or `float32`.
        shard_bytes: Size at which a shard is closed; about what the writer holds in memory.

    Raises:
        ConfigError: When the layout makes no sense.
        ArtifactError: When the folder is finished, or holds shards of another layout.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        sites: Sequence[str],
        models: Sequence[str],
        d_model: int,
        dtype: str = "bfloat16",
        shard_bytes: int = 2**27,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError("A store cannot hold this type", expected=" or ".join(DTYPES), found=dtype)
        if not sites or not models or len(set(sites)) < len(sites):
            raise ConfigError(
                "A store needs different sites and at least one model", found=f"{sites}, {models}"
            )
        if folder.already_complete:
            raise ArtifactError(f"The store {folder.path} is finished", fix="Read it with ActivationStore")
        self.folder = folder
        self.layout = {"sites": list(sites), "models": list(models), "d_model": d_model, "dtype": dtype}
        self.shard_bytes = shard_bytes
        self.shards: list[dict[str, Any]] = []
        self.moments = {site: Moments(len(models), d_model) for site in sites}
        self._held = np.empty(0, np.int64)
        self._pending: list[dict[str, Tensor]] = []
        self._pending_bytes = 0
        if folder.resumed and folder.file("store.json").exists():
            self._continue()
        else:
            self._save_index()

    @property
    def rows(self) -> int:
        """Rows appended so far, those of an interrupted run included."""
        pending = sum(len(part["document"]) for part in self._pending)
        return sum(shard["rows"] for shard in self.shards) + pending

    def holds(self, document: Int[Tensor, " tokens"]) -> bool:
        """Whether an interrupted run already stored all of these documents (-1, padding, aside)."""
        wanted = np.unique(document.cpu().numpy())
        return bool(np.isin(wanted[wanted >= 0], self._held).all())

    def append(
        self,
        acts: Mapping[str, Float[Tensor, "tokens models d_model"]],
        *,
        token_ids: Int[Tensor, " tokens"],
        document: Int[Tensor, " tokens"],
        position: Int[Tensor, " tokens"],
    ) -> None:
        """Add the rows of whole documents.

        Args:
            acts: Activations of each site.
            token_ids: Token of each row.
            document: Document of each row.
            position: Position of each row in its sequence.

        Raises:
            NumericsError: When an activation is NaN or infinite.
            ArtifactError: When a full shard cannot be written.
        """
        new = torch.from_numpy(~np.isin(document.cpu().numpy(), self._held))
        labels = dict(zip(_LABELS, (token_ids, document, position), strict=True))
        part = {name: label.cpu()[new].to(torch.int32) for name, label in labels.items()}
        for site in self.layout["sites"]:
            part[f"acts.{site}"] = self._checked(site, acts[site].detach().cpu(), len(new))[new]
        self._pending.append(part)
        self._pending_bytes += sum(tensor.nbytes for tensor in part.values())
        if self._pending_bytes >= self.shard_bytes:
            self.flush()

    def _checked(self, site: str, acts: Tensor, rows: int) -> Tensor:
        expected = (rows, len(self.layout["models"]), self.layout["d_model"])
        if tuple(acts.shape) != expected:
            raise ValueError(f"activations of {site}: expected {expected}, found {tuple(acts.shape)}")
        acts = acts.to(DTYPES[self.layout["dtype"]])
        if not acts.isfinite().all():
            row, model = (~acts.isfinite()).any(-1).nonzero()[0].tolist()
            raise NumericsError(
                f"An activation of {self.layout['models'][model]} at {site} is NaN or infinite",
                expected="finite numbers",
                found=f"row {row} of the batch",
                fix="Load the model in another dtype (bfloat16 or float32)",
            )
        return acts

    def flush(self) -> None:
        """Write what is pending as a shard of its own.

        Raises:
            ArtifactError: When the disk is full; the shards before it stay.
        """
        if not self._pending:
            return
        name = f"shard-{len(self.shards):05d}.safetensors"
        parts = self._pending
        shard = {key: torch.cat([part[key] for part in parts]).contiguous() for key in parts[0]}
        self._pending, self._pending_bytes = [], 0
        with self.folder.writing(name) as temporary:
            save_file(shard, temporary)
        for site, moments in self.moments.items():
            moments.add(shard[f"acts.{site}"])
        path = self.folder.file(name)
        entry = {"name": name, "rows": len(shard["document"]), "bytes": path.stat().st_size}
        self.shards.append(entry | {"sha256": file_sha256(path)})
        self._save_index()

    def finish(self, **manifest_fields: Any) -> "ActivationStore":
        """Write the last shard and mark the store complete."""
        self.flush()
        if not self.rows:
            raise ArtifactError(
                f"The store {self.folder.path} would be empty", fix="Append activations first"
            )
        self.folder.finish(**manifest_fields)
        return ActivationStore(self.folder.path)

    def _save_index(self) -> None:
        statistics = {site: moments.state() for site, moments in self.moments.items()}
        self.folder.write_json("store.json", self.layout | {"shards": self.shards, "statistics": statistics})

    def _continue(self) -> None:
        before = ActivationStore(self.folder.path, allow_running=True)
        found = {key: before.index[key] for key in self.layout}
        if found != self.layout:
            raise ArtifactError(
                f"{self.folder.path} holds activations of another layout", expected=self.layout, found=found
            )
        held = [before.labels(i)["document"].unique().numpy() for i in range(len(before.shards))]
        self._held = np.unique(np.concatenate(held)) if held else self._held
        self.shards, self.moments = before.shards, before.statistics


class ActivationStore:
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
        listed = self._artifact.files.get("store.json")
        if listed and listed["sha256"] != file_sha256(self._artifact.file("store.json")):
            raise _damaged(self.path / "store.json", "it was changed after it was written")
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
                raise _damaged(self.path / shard["name"], f"{size} bytes instead of {shard['bytes']}")

    @property
    def rows(self) -> int:
        """Rows of all shards."""
        return sum(shard["rows"] for shard in self.shards)

    def labels(self, shard: int) -> dict[str, Int[Tensor, " tokens"]]:
        """Token ids, documents and positions of a shard."""
        return self._tensors(shard, _LABELS)

    def batches(
        self, batch_size: int, site: str, *, seed: int | None = None, window: int = 4
    ) -> Iterator[StoreBatch]:
        """Every row once, in batches that are full but for the last.

        Args:
            batch_size: Rows of a batch.
            site: One of `sites`.
            seed: Shuffles the shards, and the rows among `window` shards; None keeps the stored order.
            window: Shards that are held in memory at once when shuffling.

        Raises:
            SiteError: When the store does not hold the site.
            ArtifactError: When a shard is damaged.
        """
        if site not in self.sites:
            raise SiteError(
                f"{self.path} holds no {site}", expected="one of " + ", ".join(self.sites), found=site
            )
        if batch_size < 1 or window < 1:
            raise ConfigError(
                "Batches and windows hold at least one", found=f"{batch_size} rows, {window} shards"
            )
        return self._stream(batch_size, site, seed, window)

    def _stream(self, batch_size: int, site: str, seed: int | None, window: int) -> Iterator[StoreBatch]:
        generator = None if seed is None else np.random.default_rng(seed)
        order = np.arange(len(self.shards)) if generator is None else generator.permutation(len(self.shards))
        size = 1 if generator is None else window
        rest: list[list[Tensor]] = []
        for start in range(0, len(order), size):
            pieces = rest + [self._site_tensors(int(i), site) for i in order[start : start + size]]
            pool = [torch.cat(column) for column in zip(*pieces, strict=True)]
            rows = len(pool[0])
            chosen = torch.from_numpy(np.arange(rows) if generator is None else generator.permutation(rows))
            whole = rows - rows % batch_size
            for picked in chosen[:whole].split(batch_size):
                if len(picked):
                    yield StoreBatch(*(column[picked] for column in pool))
            # What fills no batch goes on into the next window, so that only the last batch is short.
            rest = [[column[chosen[whole:]] for column in pool]]
        if rest and len(rest[0][0]):
            yield StoreBatch(*rest[0])

    def _site_tensors(self, shard: int, site: str) -> list[Tensor]:
        tensors = self._tensors(shard, (f"acts.{site}", *_LABELS))
        return [tensors[name] for name in (f"acts.{site}", *_LABELS)]

    def _tensors(self, shard: int, names: Sequence[str]) -> dict[str, Tensor]:
        entry = self.shards[shard]
        path = self._artifact.file(entry["name"])
        if shard not in self._verified:
            if file_sha256(path) != entry["sha256"]:
                raise _damaged(path, "its bytes do not have the hash in store.json")
            self._verified.add(shard)
        try:
            with safe_open(path, framework="pt") as handle:
                return {name: handle.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as error:
            raise _damaged(path, str(error)) from error


def _damaged(path: Path, found: str) -> ArtifactError:
    fix = "Restore the file, or delete the store and harvest it again"
    return ArtifactError(f"{path} is damaged", expected="the file as it was written", found=found, fix=fix)
