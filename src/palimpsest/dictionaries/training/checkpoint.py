"""One file with everything that the next step of a run depends on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from palimpsest.dictionaries.config import TrainConfig
from palimpsest.dictionaries.training.trainer import Trainer
from palimpsest.dictionaries.training.weights import Weights
from palimpsest.errors import ArtifactError

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")
_STREAM = "::"
"""Before what belongs to the stream; no dictionary's name begins so."""


def save(trainers: Mapping[str, Trainer], path: Path, stream: Mapping[str, Tensor] | None = None) -> None:
    """Write the state of all runs on one stream, and of the stream itself where it has one.

    Random numbers are drawn by the stream alone, after the start: its state holds their generator.
    """
    tensors = {_STREAM + name: tensor for name, tensor in (stream or {}).items()}
    counts: dict[str, Any] = {}
    for name, trainer in trainers.items():
        tensors |= {f"{name}/{key}": tensor for key, tensor in _tensors(trainer).items()}
        counts[name] = {
            "step": trainer.step,
            "tokens": trainer.tokens,
            "density": trainer.density,
            "precision": trainer.precision,
        }
    held = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(held, path, metadata={"state": json.dumps(counts)})


def load(configs: Mapping[str, TrainConfig], path: Path) -> tuple[dict[str, Trainer], dict[str, Tensor]]:
    """Continue from what `save` wrote; returns the runs and the stream's state.

    Raises:
        ArtifactError: The file is damaged or belongs to other recipes.
    """
    device = next(iter(configs.values())).device
    tensors, counts = read(path, device)
    trainers = {}
    try:
        for name, config in configs.items():
            own = {key[len(name) + 1 :]: t for key, t in tensors.items() if key.startswith(f"{name}/")}
            trainers[name] = _restore(config, own, counts[name])
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        raise ArtifactError(
            f"{path} does not hold a checkpoint of this recipe",
            found=error,
            fix="Start again with --overwrite",
        ) from error
    return trainers, {key[len(_STREAM) :]: t for key, t in tensors.items() if key.startswith(_STREAM)}


def tokens_of(path: Path) -> int:
    """How many tokens of the stream the runs of a checkpoint had used up.

    Raises:
        ArtifactError: The file is damaged.
    """
    _, counts = read(path, tensors=False)
    return max(int(count["tokens"]) for count in counts.values())


def read(
    path: Path, device: str = "cpu", *, tensors: bool = True
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """Tensors and counts of a checkpoint.

    Raises:
        ArtifactError: The file cannot be read.
    """
    try:
        with safe_open(path, framework="pt", device=device) as handle:
            counts = json.loads((handle.metadata() or {})["state"])
            names = handle.keys() if tensors else []
            return {name: handle.get_tensor(name) for name in names}, counts
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{path} is no readable checkpoint", found=error, fix="Start again with --overwrite"
        ) from error


def _tensors(trainer: Trainer) -> dict[str, Tensor]:
    tensors = {
        "idle": trainer.idle,
        "dead": trainer.dead,
        "threshold": trainer.threshold,
        "scale": trainer.scale,
    }
    for name, parameter in trainer.weights.named().items():
        tensors[f"weight.{name}"] = parameter
        for moment in _MOMENTS:
            tensors[f"adam.{moment}.{name}"] = trainer.optimiser.state[parameter][moment]
    return tensors


def _restore(config: TrainConfig, tensors: Mapping[str, Tensor], counts: Mapping[str, Any]) -> Trainer:
    models = len(tensors["scale"])
    weights = Weights.blank(config, models, tensors["weight.dec"].shape[1] // models)
    trainer = Trainer(config, weights, tensors["scale"])
    for name, parameter in weights.named().items():
        stored = tensors[f"weight.{name}"]
        if stored.shape != parameter.shape:
            raise ValueError(f"{name} is {list(stored.shape)} instead of {list(parameter.shape)}")
        with torch.no_grad():
            parameter.copy_(stored)
        trainer.optimiser.state[parameter] = {m: tensors[f"adam.{m}.{name}"] for m in _MOMENTS}
    trainer.idle, trainer.dead, trainer.threshold = (tensors[n] for n in ("idle", "dead", "threshold"))
    trainer.step, trainer.tokens = int(counts["step"]), int(counts["tokens"])
    trainer.density, trainer.precision = float(counts["density"]), str(counts["precision"])
    return trainer
