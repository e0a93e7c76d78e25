"""The table of moved latents on disk, written so that an interrupted run neither loses nor repeats an entry.

While a run lasts, entries lie in parts, each named after the last step it may hold. A part is closed before a
checkpoint of that step is written: a run that goes on from the checkpoint throws the later parts away and makes them
again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.artifacts import RunFolder, disk

if TYPE_CHECKING:
    import pyarrow

TABLE = "latents.parquet"
"""Value, gradient and firings of latents over steps."""

LOG = "log.jsonl"
"""What the trainer reported, one report per line."""

FLUSH_ROWS = 1 << 20
"""Rows that are held before they become a part."""

Columns = Mapping[str, list[Any]]
"""site, latent, value, gradient and firings of one entry, each as long as the entry."""


def schema() -> pyarrow.Schema:
    """Columns of `latents.parquet`.

    Firings are counted since the last entry; they are null for components that read no codes, a gradient is null where
    there was none.
    """
    import pyarrow as pa

    return pa.schema(
        [
            ("step", pa.int32()),
            ("site", pa.string()),
            ("latent", pa.int32()),
            ("value", pa.float32()),
            ("gradient", pa.float32()),
            ("firings", pa.int64()),
        ]
    )


class Entries:
    """Collects entries and writes `latents.parquet`.

    Args:
        run: The run's folder.
        start: Step of the checkpoint that the run goes on from, 0 for a new one; later entries are thrown away.
    """

    def __init__(self, run: RunFolder, start: int) -> None:
        self._run, self._rows, self._waiting = run, 0, list[Any]()
        self._folder = run.part("movers")
        self._folder.mkdir(exist_ok=True)
        for path in self._parts():
            if int(path.stem) > start:
                path.unlink()

    def add(self, step: int, columns: Columns) -> None:
        """Take one entry; steps increase."""
        self._waiting.append(_table(step, columns))
        self._rows += len(columns["latent"])
        if self._rows > FLUSH_ROWS:
            self.flush(step)

    def flush(self, step: int) -> None:
        """Write what is waiting, before a checkpoint of `step`."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        if self._waiting:
            with disk.replacing(self._folder / f"{step:09d}.parquet") as temporary:
                pq.write_table(pa.concat_tables(self._waiting), temporary)
            self._waiting, self._rows = [], 0

    def last(self) -> tuple[int, set[tuple[str, int]]]:
        """Step of the last entry, 0 where there is none, and the (site, latent) pairs that it holds."""
        for table in self._tables(newest_first=True):
            if table.num_rows:
                step = table.column("step")[-1].as_py()
                rows = [
                    row for row in table.select(["step", "site", "latent"]).to_pylist() if row["step"] == step
                ]
                return step, {(row["site"], row["latent"]) for row in rows}
        return 0, set()

    def write(self, step: int, more: Columns) -> None:
        """Write `latents.parquet`, one row group per part, and last the rows of `more` under `step`."""
        import pyarrow.parquet as pq

        self._waiting.append(_table(step, more))
        with self._run.writing(TABLE) as temporary, pq.ParquetWriter(temporary, schema()) as writer:
            for table in self._tables():
                writer.write_table(table)

    def rewind(self, step: int) -> None:
        """Forget entries behind a step whose weights were taken back."""
        late = [path for path in self._parts() if int(path.stem) > step]
        self._waiting = [*map(self._read, late), *self._waiting]
        for path in late:
            path.unlink()
        self._waiting = [table.filter(table.column("step").to_numpy() <= step) for table in self._waiting]
        self._rows = sum(table.num_rows for table in self._waiting)

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("[0-9]*.parquet"))

    def _tables(self, *, newest_first: bool = False) -> Iterator[Any]:
        parts = self._parts()
        if newest_first:
            yield from reversed(self._waiting)
            yield from (self._read(path) for path in reversed(parts))
        else:
            yield from (self._read(path) for path in parts)
            yield from self._waiting

    @staticmethod
    def _read(path: Path) -> Any:
        import pyarrow.parquet as pq

        return pq.read_table(path)


def _table(step: int, columns: Columns) -> Any:
    import pyarrow as pa

    fields = schema()
    arrays = [pa.array([step] * len(columns["latent"]), fields.field("step").type)]
    arrays += [pa.array(columns[field.name], field.type) for field in list(fields)[1:]]
    return pa.Table.from_arrays(arrays, schema=fields)


class Log:
    """Appends reports to `log.jsonl`; lines behind `start` are taken away, because those steps are taken again."""

    def __init__(self, run: RunFolder, start: int) -> None:
        self._path = run.file(LOG)
        lines = (
            self._path.read_text(encoding="utf-8").splitlines(keepends=True) if self._path.exists() else []
        )
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= start]
        run.write_bytes(LOG, "".join(kept).encode())
        self._lines = self._path.open("a", encoding="utf-8")

    def add(self, step: int, report: Mapping[str, Any]) -> None:
        """Write one report; NaN becomes null."""
        try:
            self._lines.write(disk.to_json({**report, "step": step}, indent=None).decode())
            self._lines.flush()
        except OSError as error:
            raise disk.write_error(self._path, error) from error

    def close(self) -> None:
        """Let go of the file."""
        with suppress(OSError):  # what could not be written was reported
            self._lines.close()
