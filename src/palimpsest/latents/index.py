"""The reader of an examples folder: search, filter and sort latents, and show one with its examples."""

from __future__ import annotations

import re
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

from palimpsest.artifacts import open_artifact
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.latents.labels import read_labels
from palimpsest.latents.schema import ABOUT, EXAMPLES, LATENTS, SIGNALS, STAGE, VOCAB

# Its functions are made at import, where a type checker does not see them.
pc: Any = pyarrow.compute

OPERATORS = {
    ">": pc.greater,
    ">=": pc.greater_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    "=": pc.equal,
    "!=": pc.not_equal,
}
SEARCHED = ("label", "tokens", "promoted_base", "promoted_tuned")
SHOWN = ("promoted_base", "promoted_tuned", "tokens")
LONGEST_TEXT = 200


@dataclass(frozen=True)
class Query:
    """Which latents are wanted.

    Attributes:
        text: A number finds that latent; any other text is looked for in labels and tokens, whatever its case.
        where: Conditions (column, operator, number) that all must hold.
        sort: Column to order by.
        descending: The largest first; latents without a value come last both ways.
        offset: Rows to leave out.
        limit: Rows to give at most.
    """

    text: str = ""
    where: tuple[tuple[str, str, float], ...] = ()
    sort: str = "latent"
    descending: bool = False
    offset: int = 0
    limit: int = 50


@dataclass(frozen=True)
class Page:
    """A part of the latents that were asked for, and how many there are."""

    total: int
    rows: list[dict[str, Any]]


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


class LatentIndex:
    """An examples folder, open for questions; safe to ask from several threads.

    The table of latents is held in memory, a few hundred bytes a latent; examples are read when they are asked for.

    Attributes:
        path: The folder.
        about: The content of `examples.json`.
        latents: The alive latents.
        names: Columns that may be filtered and sorted by.
    """

    def __init__(self, path: str | Path, labels: Sequence[str | Path] = ()) -> None:
        """Open a folder; see `LatentIndex.open`."""
        artifact = open_artifact(path, stage=STAGE, verify=False)
        self.path = artifact.path
        self.about: dict[str, Any] = artifact.read_json(ABOUT)
        self._examples = artifact.file(EXAMPLES)
        self._labels = read_labels(labels)
        self._table = self._with_labels(artifact.read_table(LATENTS))
        self.latents = self._table["latent"].to_numpy()
        scalar = (pa.types.is_integer, pa.types.is_floating)
        self.names = tuple(
            field.name
            for field in self._table.schema
            if any(kind(field.type) for kind in scalar) and field.name != "histogram_start"
        )
        self._vocab = artifact.read_table(VOCAB)
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: str | Path, labels: Sequence[str | Path] = ()) -> LatentIndex:
        """Open an examples folder, with the labels of some labels folders.

        Raises:
            ArtifactError: A folder is unfinished, of another stage, or lacks a file.
        """
        try:
            return cls(path, labels)
        except (pa.ArrowException, KeyError) as error:
            raise ArtifactError(f"{path} is no readable examples folder", found=error) from error

    def __len__(self) -> int:
        """How many latents are alive."""
        return len(self.latents)

    def search(self, query: Query) -> Page:
        """The latents that a query asks for.

        Raises:
            ConfigError: It names a column or an operator that there is not.
        """
        keep = np.ones(len(self), bool)
        for column, operator, bound in query.where:
            if operator not in OPERATORS:
                raise ConfigError(
                    f"'{operator}' compares nothing", expected=" ".join(OPERATORS), found=operator
                )
            keep &= _true(OPERATORS[operator](self._column(column), bound))
        if query.text.strip():
            keep &= self._matches(query.text.strip())
        order = self._order(query.sort, query.descending)
        order = order[keep[order]]
        chosen = order[max(query.offset, 0) :][: max(query.limit, 0)]
        columns = [*self.names, *SHOWN, "label", "label_provider"]
        rows = self._table.select(columns).take(pa.array(chosen)).to_pylist()
        for row in rows:
            row["promoted"] = row["promoted_tuned"] or row["promoted_base"]
        return Page(len(order), rows)

    def row(self, latent: int) -> dict[str, Any]:
        """Everything that is known of a latent, by column.

        Raises:
            ConfigError: It never fired on this text, or there is no such latent.
        """
        place = int(np.searchsorted(self.latents, latent))
        if place >= len(self) or self.latents[place] != latent:
            total = int(self.about.get("latents") or 0)
            raise ConfigError(
                f"Latent {latent} is not among the alive ones",
                expected=f"one of the {len(self):,} latents that fired on this text",
                found=f"a latent from 0 to {total - 1} that never fired"
                if 0 <= latent < total
                else f"the dictionary has {total:,} latents",
            )
        return self._table.slice(place, 1).to_pylist()[0]

    def examples(self, latent: int, kind: int | None = None, limit: int | None = None) -> list[Example]:
        """The examples of a latent, the strongest first, then the quantile bins; none of a latent that never fired."""
        rows = [row for row in self._read(latent) if kind is None or row["kind"] == kind]
        return [self._example(row) for row in (rows if limit is None else rows[:limit])]

    def text(self, ids: Sequence[int]) -> list[str]:
        """Tokens as they are shown."""
        return [self._texts[one] if 0 <= one < len(self._texts) else f"⟨{one}⟩" for one in ids]

    @cached_property
    def _texts(self) -> list[str]:
        ids, texts = self._vocab["id"].to_numpy(), self._vocab["text"].to_pylist()
        found = [""] * (int(ids.max()) + 1 if len(ids) else 0)
        for one, text in zip(ids.tolist(), texts, strict=True):
            found[one] = text
        return found

    @cached_property
    def _file(self) -> pq.ParquetFile:
        return pq.ParquetFile(self._examples, memory_map=True)

    @cached_property
    def _spans(self) -> np.ndarray:
        """First and last latent of every row group `[groups, 2]`."""
        meta = self._file.metadata
        column = self._file.schema_arrow.names.index("latent")
        spans = [meta.row_group(i).column(column).statistics for i in range(meta.num_row_groups)]
        return np.array([(one.min, one.max) for one in spans], np.int64).reshape(-1, 2)

    @cached_property
    def _haystack(self) -> pa.ChunkedArray:
        """Labels and tokens of each latent as one lower-case text."""
        parts = []
        for name in SEARCHED:
            column = self._table[name].combine_chunks()
            if pa.types.is_list(column.type):
                column = pc.binary_join(pc.fill_null(column, []), "\x1f")
            parts.append(pc.fill_null(column, ""))
        return pc.utf8_lower(pc.binary_join_element_wise(*parts, "\x1f"))

    def _matches(self, text: str) -> np.ndarray:
        if re.fullmatch(r"\d{1,9}", text):
            exact = self.latents == int(text)
            if exact.any():
                return exact
        return _true(pc.match_substring(self._haystack, text[:LONGEST_TEXT].lower()))

    def _order(self, name: str, descending: bool) -> np.ndarray:
        with self._lock:
            known = self._orders
            if (name, descending) not in known:
                values = self._column(name).to_numpy().astype(float)
                # NaN, which stands for null, goes last in either direction; equals keep the order of their numbers.
                known[name, descending] = np.argsort(-values if descending else values, kind="stable")
            return known[name, descending]

    @cached_property
    def _orders(self) -> dict[tuple[str, bool], np.ndarray]:
        return {}

    def _column(self, name: str) -> pa.ChunkedArray:
        if name not in self.names:
            raise ConfigError(
                f"There is no column '{name[:LONGEST_TEXT]}'", expected=", ".join(self.names), found=name[:80]
            )
        return self._table[name]

    def _read(self, latent: int) -> list[dict[str, Any]]:
        groups = np.flatnonzero((self._spans[:, 0] <= latent) & (latent <= self._spans[:, 1]))
        if len(groups) == 0:
            return []
        # One reader, one file position.
        with self._lock:
            table = self._file.read_row_groups(groups.tolist(), use_threads=False)
        return table.filter(pc.equal(table["latent"], latent)).to_pylist()

    def _example(self, row: dict[str, Any]) -> Example:
        length, names = len(row["ids"]), list(self.about["corpora"])
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
            corpus=names[row["corpus"]],
            **{name: row[name] for name in ("document", "start", "peak", "value", "ids")},
            base=row["base_value"],
            tuned=row["tuned_value"],
            tokens=self.text(row["ids"]),
            value_at=spread["value"] or [0.0] * length,
            base_at=spread["base"],
            tuned_at=spread["tuned"],
        )

    def _with_labels(self, table: pa.Table) -> pa.Table:
        labels = [self._labels.get(latent) for latent in table["latent"].to_pylist()]
        score = pa.array([one.score if one else None for one in labels], pa.float32())
        table = table.append_column(
            "label", pa.array([one.text if one else None for one in labels], pa.string())
        )
        table = table.append_column("label_score", score)
        provider = pa.array([one.provider if one else None for one in labels], pa.string())
        return table.append_column("label_provider", provider)


def _true(mask: Any) -> np.ndarray:
    """A mask of Arrow as one of NumPy; what is null is false."""
    return np.asarray(pc.fill_null(mask, False))


__all__ = ["Example", "LatentIndex", "Page", "Query"]
