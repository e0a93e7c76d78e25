"""What is kept of a null: its figures per document on the battery, never the model."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import disk, input_entry, open_artifact
from palimpsest.audit.battery.make import CALIBRATION
from palimpsest.audit.calibration.panel import Panel
from palimpsest.audit.sums import CorpusSums
from palimpsest.errors import ArtifactError, ConfigError

RECORDS = "nulls.json"
FIGURES = "nulls.safetensors"
GRID_KS = (1, 2, 5, 10, 20, 50, 100)
"""List lengths beside the primary one at which a suspect is held against the nulls."""

Figures = dict[str, NDArray]
"""`overlap/READER/CORPUS` `[documents, k]`; `loss/CORPUS`, `drift/CORPUS`, `kl/CORPUS` `[documents]`, numbered."""


def figures_of(sums: Mapping[str, Mapping[str, CorpusSums]]) -> Figures:
    """Document means of one model on every corpus: overlap through every reader, Δloss, drift and KL."""
    found: Figures = {}
    for index, readers in enumerate(sums.values()):
        for position, (reader, one) in enumerate(readers.items()):
            columns = one.columns
            with np.errstate(invalid="ignore", divide="ignore"):
                listed = np.where(columns["listed"] > 0, columns["listed"], np.nan)
                found[f"overlap/{reader}/{index}"] = (one.overlap / listed[:, None]).astype(np.float32)
                if position:
                    continue
                predicted = np.where(columns["predicted"] > 0, columns["predicted"], np.nan)
                found[f"loss/{index}"] = (columns["loss_tuned"] - columns["loss_base"]) / predicted
                found[f"drift/{index}"] = columns["drift"] / columns["tokens"]
                found[f"kl/{index}"] = columns["kl"] / predicted
    return found


class Nulls:
    """The finished nulls of a battery.

    Raises:
        ArtifactError: There are none, they are unfinished, or they belong to an earlier battery of that place.
    """

    def __init__(self, battery: Path) -> None:
        self.path = battery / CALIBRATION
        artifact = open_artifact(self.path, stage=CALIBRATION)
        if artifact.manifest["inputs"]["battery"]["sha256"] != input_entry(battery)["sha256"]:
            raise ArtifactError(
                f"The nulls in {self.path} were made for an earlier battery of that place",
                fix=f"Run `palimpsest battery calibrate {battery} --overwrite`",
            )
        self.records: list[dict[str, Any]] = artifact.read_json(RECORDS)
        self.seconds = sum(r["seconds_training"] + r["seconds_measuring"] for r in self.records)
        self._figures = load_file(artifact.file(FIGURES))

    @property
    def used(self) -> list[dict[str, Any]]:
        """Records of the nulls that calibrate."""
        return [record for record in self.records if record["diverged"] is None]

    @property
    def excluded(self) -> list[dict[str, Any]]:
        """Name, family and reason of the nulls that diverged."""
        return [
            {"name": record["name"], "family": record["family"], "reason": record["diverged"]}
            for record in self.records
            if record["diverged"] is not None
        ]

    def figures(self, record: Mapping[str, Any]) -> Figures:
        """Figures of one null."""
        prefix = f"{record['index']:04d}/"
        return {
            key.removeprefix(prefix): array for key, array in self._figures.items() if key.startswith(prefix)
        }


def save_nulls(path: Path, figures: Mapping[int, Figures]) -> None:
    """Write the figures of all nulls in one file."""
    flat = {
        f"{index:04d}/{key}": np.ascontiguousarray(array)
        for index, one in figures.items()
        for key, array in one.items()
    }
    with disk.replacing(path) as temporary:
        save_file(flat, temporary)


def panel_of(
    names: Sequence[str],
    suspect: Figures,
    nulls: Iterable[tuple[str, Figures]],
    readers: Mapping[str, str],
    k: int,
    *,
    loss: bool,
) -> Panel:
    """A suspect beside its nulls.

    Args:
        names: Corpora, the general one first.
        suspect: The suspect's figures.
        nulls: Family and figures of each null.
        readers: Site by the name of its reader, the primary one first.
        k: The primary list length.
        loss: Whether Δloss was measured in all of them.

    Raises:
        ConfigError: k is longer than the lists that the nulls were measured with.
    """
    nulls = list(nulls)
    models = [suspect, *(figures for _, figures in nulls)]
    first = next(iter(readers))
    longest = min(model[f"overlap/{first}/0"].shape[1] for model in models)
    if k > longest:
        raise ConfigError(
            "k is longer than the lists that the nulls were measured with",
            expected=f"at most {longest}",
            found=k,
            fix="Lower --k, raise --k-max, or calibrate again with a larger --k-max",
        )
    points = [(first, k)]
    for reader in readers:
        width = min(model[f"overlap/{reader}/0"].shape[1] for model in models)
        points += [
            (reader, one) for one in sorted({*GRID_KS, k}) if one <= width and (reader, one) != (first, k)
        ]
    overlap, deltas = {}, {}
    for index, name in enumerate(names):
        overlap[name] = np.stack(
            [
                np.stack([model[f"overlap/{reader}/{index}"][:, one - 1] for reader, one in points], -1)
                for model in models
            ]
        ).astype(float)
        deltas[name] = np.stack([model[f"loss/{index}"] for model in models])
    grid = tuple((readers[reader], one) for reader, one in points)
    return Panel(overlap, deltas if loss else None, grid, tuple(family for family, _ in nulls))
