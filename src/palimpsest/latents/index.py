"""The reader of an examples folder: search, filter and sort latents, and show one with its examples."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute

from palimpsest.artifacts import open_artifact
from palimpsest.display.notebook import Rich, card_from
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.latents.example_file import Example, ExampleFile
from palimpsest.latents.labels import Label, read_labels
from palimpsest.latents.schema import ABOUT, EXAMPLES, LATENTS, STAGE, VOCAB

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
REMEMBERED = 16


@dataclass(frozen=True)
class Query:
    """Which latents are wanted.

    Attributes:
        text: A number finds that latent; any other text is looked for in labels and tokens, whatever its case.
        where: Conditions (column, operator, number or text) that all must hold.
        sort: Column to order by.
        descending: The largest first; latents without a value come last both ways.
        offset: Rows to leave out.
        limit: Rows to give at most.
    """

    text: str = ""
    where: tuple[tuple[str, str, float | str], ...] = ()
    sort: str = "latent"
    descending: bool = False
    offset: int = 0
    limit: int = 50


@dataclass(frozen=True)
class Page:
    """A part of the latents that were asked for, and how many there are."""

    total: int
    rows: list[dict[str, Any]]


class LatentIndex(Rich):
    """An examples folder, open for questions; safe to ask from several threads.

    The table of latents is held in memory, a few hundred bytes a latent; examples are read when they are asked for.

    Attributes:
        path: The folder.
        about: The content of `examples.json`.
        latents: The alive latents.
        names: Columns that may be filtered and sorted by.
        texts: Columns that may be filtered by `=` and `!=`, and that hold text.
    """

    _card = card_from("palimpsest.latents.card", "index_card")

    def __init__(self, path: str | Path, labels: Sequence[str | Path] = ()) -> None:
        """Open a folder; see `LatentIndex.open`."""
        artifact = open_artifact(path, stage=STAGE, verify=False)
        self.path = artifact.path
        self.about: dict[str, Any] = artifact.read_json(ABOUT)
        dictionary = self.about.get("dictionary")
        known = dictionary.get("sha256") if isinstance(dictionary, dict) else None
        self._labels = read_labels(labels, known)
        self._table = self._with_labels(artifact.read_table(LATENTS))
        self.latents = self._table["latent"].to_numpy()
        scalar = (pa.types.is_integer, pa.types.is_floating)
        self.names = tuple(
            field.name
            for field in self._table.schema
            if any(kind(field.type) for kind in scalar) and field.name != "histogram_start"
        )
        self.texts: tuple[str, ...] = ()
        vocab = artifact.read_table(VOCAB)
        self._examples = ExampleFile(artifact.file(EXAMPLES), list(self.about["corpora"]), vocab)
        self._lock = threading.Lock()
        # Pages, sorting and filters of one search ask for the same text again.
        self._matches = lru_cache(maxsize=REMEMBERED)(self._matching)

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
            keep &= _true(OPERATORS[operator](self._column(column, text=isinstance(bound, str)), bound))
        if query.text.strip():
            keep &= self._matches(query.text.strip())
        order = self._order(query.sort, query.descending)
        order = order[keep[order]]
        chosen = order[max(query.offset, 0) :][: max(query.limit, 0)]
        columns = [*self.names, *self.texts, *SHOWN, "label", "label_provider"]
        rows = self._table.select(columns).take(pa.array(chosen)).to_pylist()
        for row in rows:
            row["promoted"] = row["promoted_tuned"] or row["promoted_base"]
        return Page(len(order), rows)

    def join(self, name: str, latents: np.ndarray, values: Sequence[Any] | np.ndarray) -> None:
        """Add a column that another source knows, before anyone searches; null for latents that it does not know.

        Args:
            name: Of the column, which is new.
            latents: Each at most once.
            values: Beside them, numbers or text.
        """
        text = any(isinstance(one, str) for one in values)
        place = np.searchsorted(self.latents, latents)
        known = place < len(self)
        known[known] = self.latents[place[known]] == np.asarray(latents)[known]
        column = np.full(len(self), None, object)
        column[place[known]] = np.asarray(values, object)[known]
        self._table = self._table.append_column(
            name, pa.array(column, pa.string() if text else pa.float64(), from_pandas=True)
        )
        self.names, self.texts = (
            (self.names, (*self.texts, name)) if text else ((*self.names, name), self.texts)
        )

    def values(self, name: str) -> np.ndarray:
        """A column of `names` beside `latents`; NaN where it is null."""
        return self._column(name).to_numpy().astype(float)

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
        return self._examples.read(latent, kind, limit)

    def label(self, latent: int) -> Label | None:
        """The label of a latent with its score, or None."""
        return self._labels.get(latent)

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

    def _matching(self, text: str) -> np.ndarray:
        if re.fullmatch(r"\d{1,9}", text):
            exact = self.latents == int(text)
            if exact.any():
                return exact
        # Arrow refuses halves of surrogate pairs, which occur in no token's text either.
        wanted = text[:LONGEST_TEXT].lower().encode(errors="replace").decode()
        return _true(pc.match_substring(self._haystack, wanted))

    def _order(self, name: str, descending: bool) -> np.ndarray:
        with self._lock:
            known = self._orders
            if (name, descending) not in known:
                values = self.values(name)
                # NaN, which stands for null, goes last in either direction; equals keep the order of their numbers.
                known[name, descending] = np.argsort(-values if descending else values, kind="stable")
            return known[name, descending]

    @cached_property
    def _orders(self) -> dict[tuple[str, bool], np.ndarray]:
        return {}

    def _column(self, name: str, *, text: bool = False) -> pa.ChunkedArray:
        known = self.texts if text else self.names
        if name not in known:
            raise ConfigError(
                f"There is no column '{name[:LONGEST_TEXT]}'", expected=", ".join(known), found=name[:80]
            )
        return self._table[name]

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
