"""The examples of single latents, read from a Parquet file one or two row groups at a time."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet as pq

from palimpsest.errors import ArtifactError
from palimpsest.latents.schema import SIGNALS

# Its functions are made at import, where a type checker does not see them.
pc: Any = pyarrow.compute


@dataclass(frozen=True)
class Example:
    """One place where a latent fires, with the text around it.

    Attributes:
        kind: 0 for one of the strongest, else the quantile bin, 1 the weakest.
        rank: Its place among its kind.
        corpus: Name of the corpus.
        document: Row of the corpus.
        start: Place of the window's first token in the document.
        peak: Which token of the window the example is about.
        value: What it was chosen by.
        base: The base's activation there; None where the dictionary gives none.
        tuned: The tuned model's.
        tokens: The window as text.
        ids: The window as token ids.
        value_at: The signal on each token of the window.
        base_at: The base's activation on each token, or None.
        tuned_at: The tuned model's, or None.
    """

    kind: int
    rank: int
    corpus: str
    document: int
    start: int
    peak: int
    value: float
    base: float | None
    tuned: float | None
    tokens: list[str]
    ids: list[int]
    value_at: list[float]
    base_at: list[float] | None
    tuned_at: list[float] | None


class ExampleFile:
    """`examples.parquet`, open for reading; safe to ask from several threads.

    Args:
        path: The file.
        corpora: Names of the corpora by their numbers.
        vocab: The table of `vocab.parquet`.
    """

    def __init__(self, path: Path, corpora: list[str], vocab: pa.Table) -> None:
        self._path, self._corpora, self._vocab = path, corpora, vocab
        self._lock = threading.Lock()
        self._last: tuple[tuple[int, int], pa.Table] | None = None

    def read(self, latent: int, kind: int | None = None, limit: int | None = None) -> list[Example]:
        """Examples of a latent in the order of the file; none of a latent that is not in it.

        Raises:
            ArtifactError: The file has gone or is damaged.
        """
        try:
            rows = [row for row in self._rows(latent) if kind is None or row["kind"] == kind]
            return [self._example(row) for row in (rows if limit is None else rows[:limit])]
        except (OSError, pa.ArrowException, LookupError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(
                f"The examples of latent {latent} in {self._path} cannot be read",
                found=error,
                fix="Make the folder again with palimpsest examples",
            ) from error

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as they are shown."""
        return [self._texts.get(one, f"⟨{one}⟩") for one in ids]

    @cached_property
    def _texts(self) -> dict[int, str]:
        pairs = zip(self._vocab["id"].to_pylist(), self._vocab["text"].to_pylist(), strict=True)
        return {one: text for one, text in pairs if text is not None}

    @cached_property
    def _file(self) -> pq.ParquetFile:
        # Not mapped: a file that is cut short while it is read would end the process.
        return pq.ParquetFile(self._path)

    @cached_property
    def _spans(self) -> np.ndarray:
        """First and last latent of every row group `[groups, 2]`."""
        meta = self._file.metadata
        column = self._file.schema_arrow.names.index("latent")
        spans = [meta.row_group(i).column(column).statistics for i in range(meta.num_row_groups)]
        return np.array([(one.min, one.max) for one in spans], np.int64).reshape(-1, 2)

    def _rows(self, latent: int) -> list[dict[str, Any]]:
        groups = np.flatnonzero((self._spans[:, 0] <= latent) & (latent <= self._spans[:, 1]))
        if len(groups) == 0:
            return []
        # One reader, one file position; latents that are asked for in order share what was read last.
        with self._lock:
            key = (int(groups[0]), int(groups[-1]))
            if self._last is None or self._last[0] != key:
                self._last = (key, self._file.read_row_groups(groups.tolist(), use_threads=False))
            table = self._last[1]
        return table.filter(pc.equal(table["latent"], latent)).to_pylist()

    def _example(self, row: dict[str, Any]) -> Example:
        length = len(row["ids"])
        spread: dict[str, list[float] | None] = {}
        for signal in SIGNALS:
            values = row[f"{signal}_at"]
            spread[signal] = None
            if values is not None:
                dense = [0.0] * length
                for place, value in zip(row["at"], values, strict=True):
                    dense[place] = value
                spread[signal] = dense
        return Example(
            *(row[name] for name in ("kind", "rank")),
            corpus=self._corpora[row["corpus"]],
            **{name: row[name] for name in ("document", "start", "peak", "value", "ids")},
            base=row["base_value"],
            tuned=row["tuned_value"],
            tokens=self.text(row["ids"]),
            value_at=spread["value"] or [0.0] * length,
            base_at=spread["base"],
            tuned_at=spread["tuned"],
        )
