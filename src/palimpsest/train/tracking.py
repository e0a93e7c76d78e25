"""The figures of a run, on disk and in trackers."""

import json
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

from palimpsest.artifacts import RunFolder, disk
from palimpsest.errors import ConfigError

LOG = "training.jsonl"
"""The figures of every reported step, one per line."""

TABLE = "training.parquet"
"""The same as a table, once training is over."""


class Tracks:
    """Writes every report to `training.jsonl` and to the trackers that were asked for.

    Args:
        run: The folder; lines behind `start` are taken away, because those steps are taken again.
        start: Tokens that the checkpoint holds.
        trackers: Of tensorboard, wandb, trackio; each writes below the folder or to its own service.
        config: Handed to trackers as the run's configuration.

    Raises:
        ConfigError: A tracker is not installed.
    """

    def __init__(
        self, run: RunFolder, start: int, trackers: Iterable[str], config: Mapping[str, Any]
    ) -> None:
        self._run = run
        self._open = [_TRACKERS[name](run.path, dict(config)) for name in trackers]
        path = run.file(LOG)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["tokens"] <= start]
        run.write_bytes(LOG, "".join(kept).encode())
        self._lines = path.open("a", encoding="utf-8")

    def add(self, figures: Mapping[str, Any]) -> None:
        """Write one report."""
        try:
            self._lines.write(json.dumps(dict(figures)) + "\n")
            self._lines.flush()
        except OSError as error:
            raise disk.write_error(self._run.file(LOG), error) from error
        for log, _ in self._open:
            log(figures)

    def close(self) -> None:
        """Let go of the file and the trackers."""
        with suppress(OSError):  # what could not be written was reported
            self._lines.close()
        for _, close in self._open:
            close()

    def write_table(self) -> None:
        """The whole log as Parquet; a term that a step did not have is null."""
        import pyarrow

        lines = self._run.file(LOG).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {name: [row.get(name) for row in rows] for name in names}
        self._run.write_table(TABLE, pyarrow.table(columns))


Tracker = tuple[Callable[[Mapping[str, Any]], None], Callable[[], None]]


def _numbers(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures under flat names; those of one of several dictionaries under its name."""
    place = f"{figures['name']}/" if "name" in figures else ""
    return {place + key: float(value) for key, value in figures.items() if isinstance(value, int | float)}


def _tensorboard(folder: Path, config: dict[str, Any]) -> Tracker:
    _need("tensorboard")
    writer = import_module("torch.utils.tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("config", json.dumps(config, indent=1, default=str))

    def log(figures: Mapping[str, Any]) -> None:
        for name, value in _numbers(figures).items():
            writer.add_scalar(name, value, figures["tokens"])

    return log, writer.close


def _service(name: str) -> Callable[[Path, dict[str, Any]], Tracker]:
    """wandb, or trackio, which has the same interface."""

    def start(folder: Path, config: dict[str, Any]) -> Tracker:
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
            run.log(_numbers(figures), step=figures["tokens"])

        return log, run.finish

    return start


def _need(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"--track {name} needs a package that is not installed", fix=f"pip install {name}"
        ) from error


_TRACKERS: dict[str, Callable[[Path, dict[str, Any]], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _service("wandb"),
    "trackio": _service("trackio"),
}
