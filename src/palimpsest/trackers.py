"""Figures of a run in TensorBoard, wandb or trackio."""

import json
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from palimpsest.errors import ConfigError

Tracker = tuple[Callable[[Mapping[str, Any]], None], Callable[[], None]]
"""How figures are sent, and how that ends."""


def open_trackers(
    names: Iterable[str], folder: Path, config: Mapping[str, Any], clock: str = "tokens"
) -> list[Tracker]:
    """Begin a run in each tracker.

    Args:
        names: Of tensorboard, wandb, trackio.
        folder: The run's folder; TensorBoard writes below it, the others are told its name.
        config: Handed on as the run's configuration.
        clock: The figure that says how far the run is; every report holds it.

    Raises:
        ConfigError: A tracker is not installed, or cannot start.
    """
    return [_TRACKERS[name](folder, dict(config), clock) for name in names]


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures under flat names; those of one of several dictionaries under its name."""
    place = f"{figures['name']}/" if "name" in figures else ""
    return {place + key: float(value) for key, value in figures.items() if isinstance(value, int | float)}


def _tensorboard(folder: Path, config: dict[str, Any], clock: str) -> Tracker:
    _need("tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", json.dumps(config, indent=1, default=str))

    def log(figures: Mapping[str, Any]) -> None:
        for name, value in _numbers(figures).items():
            writer.add_scalar(name, value, figures[clock])

    return log, writer.close


def _service(name: str) -> Callable[[Path, dict[str, Any], str], Tracker]:
    """wandb, or trackio, which has the same interface."""

    def start(folder: Path, config: dict[str, Any], clock: str) -> Tracker:
        library = _need(name)
        try:
            run = library.init(project="palimpsest", name=folder.name, config=config)
        except Exception as error:  # each service has errors of its own for a missing key or network
            raise ConfigError(
                f"--track {name} cannot start",
                found=error,
                fix=f"Log in to {name}, set it offline, or leave --track out",
            ) from error

        def log(figures: Mapping[str, Any]) -> None:
            run.log(_numbers(figures), step=figures[clock])

        return log, run.finish

    return start


def _need(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--track {name} needs a package that is not installed", fix=f"pip install {name}"
        ) from error


_TRACKERS: dict[str, Callable[[Path, dict[str, Any], str], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _service("wandb"),
    "trackio": _service("trackio"),
}
