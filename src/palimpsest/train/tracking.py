"""The figures of a run, on disk and in trackers."""

import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from palimpsest.artifacts import RunFolder, disk
from palimpsest.trackers import open_trackers

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
        self._open = open_trackers(trackers, run.path, config)
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
