"""Writing a store: shards are appended one by one, and each is whole before it is listed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.artifacts import RunFolder, file_sha256
from palimpsest.errors import ArtifactError, ConfigError, NumericsError
from palimpsest.store.moments import Moments
from palimpsest.store.probe import PROBE, ProbeRows
from palimpsest.store.reader import ActivationStore
from palimpsest.store.shards import DTYPES, LABELS


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
        self._probe = ProbeRows()
        self._probe_entry: dict[str, Any] | None = None
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

    def add_probe(
        self,
        *,
        input_ids: Int[Tensor, "batch seq"],
        attention_mask: Bool[Tensor, "batch seq"],
        keep: Bool[Tensor, "batch seq"],
        document: Int[Tensor, "batch seq"],
        compute: torch.dtype,
    ) -> None:
        """Offer the padded token rows of what `append` takes next; the first few are kept for the live check.

        Args:
            input_ids: Tokens as the model was given them.
            attention_mask: False on padding.
            keep: Tokens that `append` takes, whose `position` is their column.
            document: Document of each token.
            compute: Type of the weights that the activations are computed with.
        """
        # The probe is written with the first shard, which then holds the documents that it needs.
        if not self.shards:
            name = str(compute).removeprefix("torch.")
            self._probe.add(input_ids, attention_mask, keep, document, name)

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
        labels = dict(zip(LABELS, (token_ids, document, position), strict=True))
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
        if len(self._probe) and self._probe_entry is None:
            self._write_probe()
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

    def _write_probe(self) -> None:
        with self.folder.writing(PROBE) as temporary:
            save_file(self._probe.tensors(), temporary)
        digest = file_sha256(self.folder.file(PROBE))
        self._probe_entry = {"name": PROBE, "sha256": digest, "compute": self._probe.compute}

    def _save_index(self) -> None:
        statistics = {site: moments.state() for site, moments in self.moments.items()}
        index = self.layout | {"shards": self.shards, "statistics": statistics}
        if self._probe_entry is not None:
            index["probe"] = self._probe_entry
        self.folder.write_json("store.json", index)

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
        self._probe_entry = before.index.get("probe")
