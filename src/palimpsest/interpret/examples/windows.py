"""`examples.parquet`: every example with the text around it; the tokens that each latent prefers on the way."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from palimpsest.interpret.examples.chunks import Chunk
from palimpsest.interpret.examples.collect import Collected
from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.interpret.token_odds import EventCounts
from palimpsest.latents.schema import ROW_GROUP, SIGNALS, example_schema
from palimpsest.log import progress

GROUP_ENTRIES = 6_000_000
GROUP_EXAMPLES = 100_000
"""Codes and examples of a group of latents that are in memory together."""

REPEATING = ["latent", "kind", "rank", "corpus", "peak", "document", "ids.list.element", "at.list.element"]
"""Columns with few values, which are written as numbers of these."""


class Wanted(NamedTuple):
    """Examples to be written: their latent, chunk and token, and whether they are among the strongest."""

    latent: NDArray[np.int64]
    chunk: NDArray[np.int64]
    slot: NDArray[np.int64]
    top: NDArray[np.bool_]

    def of(self, chosen: NDArray | slice) -> Wanted:
        """Some of them."""
        return Wanted(self.latent[chosen], self.chunk[chosen], self.slot[chosen], self.top[chosen])


@dataclass
class _Found:
    """Columns of the examples of one chunk; ragged ones as lengths and values."""

    wanted: Wanted
    corpus: NDArray
    document: NDArray
    start: NDArray
    peak: NDArray
    own: NDArray[np.float32]
    ids: tuple[NDArray, NDArray]
    at: tuple[NDArray, NDArray]
    signals: NDArray[np.float32]


def wanted_examples(collected: Collected) -> Wanted:
    """The strongest and the sampled examples, by latent."""
    tables = [(collected.top.rows(), True)]
    if collected.sample is not None:
        tables.append((collected.sample.rows(), False))
    latent, chunk, slot = (np.concatenate([rows[place] for rows, _ in tables]) for place in range(3))
    top = np.repeat([is_top for _, is_top in tables], [len(rows[0]) for rows, _ in tables])
    order = latent.argsort(kind="stable")
    return Wanted(latent[order], chunk[order], slot[order], top[order])


def write_examples(
    collected: Collected, config: ExamplesConfig, path: Path, odds: EventCounts | None = None
) -> int:
    """Write the examples of every latent; the events of `odds` are counted on the way.

    Returns:
        How many examples there are.
    """
    wanted, schema = wanted_examples(collected), example_schema()
    names = collected.tallies.names
    # Its list of columns is missing in the description that type checkers read.
    repeating: Any = REPEATING
    with (
        pq.ParquetWriter(
            path, schema, compression="zstd", compression_level=1, use_dictionary=repeating
        ) as writer,
        ThreadPoolExecutor(1) as pool,
        progress("text around the examples", len(wanted.latent), unit="examples") as advance,
    ):
        left: list[pa.Table] = []
        writing: Future[None] | None = None
        for first, last in latent_groups(collected.tallies.fires, wanted.latent):
            begin, end = np.searchsorted(wanted.latent, [first, last])
            rows = wanted.of(slice(begin, end))
            found = _group(collected, config, rows, (first, last), odds)
            advance(end - begin)
            if not found:
                continue
            whole, left = _whole_groups([*left, _ordered(found, names, config).cast(schema)])
            if writing is not None:
                writing.result()
            # Packing one group takes as long as looking up the next; without rows it would be an empty one.
            writing = pool.submit(writer.write_table, whole, ROW_GROUP) if len(whole) else None
        if writing is not None:
            writing.result()
        for table in left:
            writer.write_table(table, ROW_GROUP)
    return len(wanted.latent)


def _whole_groups(tables: list[pa.Table]) -> tuple[pa.Table, list[pa.Table]]:
    """Whole row groups; what is left waits for the next latents."""
    table = pa.concat_tables(tables)
    rows = len(table) // ROW_GROUP * ROW_GROUP
    return table.slice(0, rows), [table.slice(rows)] if rows < len(table) else []


def latent_groups(fires: NDArray[np.int64], latent: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Ranges of latents that hold a bounded number of codes and of examples."""
    examples = np.bincount(latent, minlength=len(fires))
    load = np.maximum(fires / GROUP_ENTRIES, examples / GROUP_EXAMPLES).cumsum()
    first = 0
    while first < len(fires):
        done = load[first - 1] if first else 0.0
        last = max(first + 1, int(np.searchsorted(load, done + 1.0, side="right")))
        yield first, last
        first = last


def _group(
    collected: Collected,
    config: ExamplesConfig,
    rows: Wanted,
    latents: tuple[int, int],
    odds: EventCounts | None,
) -> list[_Found]:
    """The examples of a range of latents from every chunk."""
    order = rows.chunk.argsort(kind="stable")
    rows = rows.of(order)
    bounds = np.searchsorted(rows.chunk, np.arange(len(collected.chunks) + 1))
    found = []
    for number, path in enumerate(collected.chunks):
        mine = rows.of(slice(bounds[number], bounds[number + 1]))
        if odds is None and not len(mine.latent):
            continue
        chunk = Chunk.load_latents(path, *latents)
        latent = np.repeat(np.arange(*latents, dtype=np.int32), np.diff(chunk.pointer))
        if odds is not None:
            odds.add(chunk, latent)
        if len(mine.latent):
            found.append(_windows(chunk, latent - latents[0], mine, latents[0], config))
    if odds is not None:
        odds.close(*latents)
    return found


def _windows(
    chunk: Chunk, latent: NDArray[np.int32], rows: Wanted, first: int, config: ExamplesConfig
) -> _Found:
    """The text around each example, and where in it the latent fires."""
    slots, slot = len(chunk.ids), rows.slot
    document = np.searchsorted(chunk.starts, slot, side="right") - 1
    low = np.maximum(chunk.starts[document], slot - config.before)
    high = np.minimum(chunk.starts[document + 1], slot + config.after + 1)
    keys = latent.astype(np.int64) * slots + chunk.slot
    base = (rows.latent - first) * slots
    begin, own, end = (np.searchsorted(keys, base + place) for place in (low, slot, high))
    tokens, entries = _spread(low, high - low), _spread(begin, end - begin)
    at = chunk.slot[entries] - np.repeat(low, end - begin)
    signals = np.stack(chunk.signals) if chunk.signals else np.zeros((0, 0), np.float32)
    return _Found(
        rows,
        np.full(len(slot), chunk.corpus, np.int16),
        chunk.document[document],
        (low - chunk.starts[document]).astype(np.int32),
        (slot - low).astype(np.int16),
        signals[:, own],
        (high - low, chunk.ids[tokens]),
        (end - begin, at.astype(np.int16)),
        signals[:, entries],
    )


def _ordered(found: list[_Found], names: tuple[str, ...], config: ExamplesConfig) -> pa.Table:
    """Rows of all chunks as one table: by latent, kind and rank."""
    rows = Wanted(*(np.concatenate([getattr(one.wanted, name) for one in found]) for name in Wanted._fields))
    own = np.concatenate([one.own for one in found], axis=1)
    value = np.maximum(*own) if len(own) == 2 else own[0]
    kind = np.where(rows.top, 0, _bins(rows, value, config.bins))
    order = np.lexsort((rows.slot, rows.chunk, -value, kind, rows.latent))
    latent, kind = rows.latent[order], kind[order]
    begins = np.flatnonzero(np.append(True, (latent[1:] != latent[:-1]) | (kind[1:] != kind[:-1])))
    counts = np.diff(np.append(begins, len(latent)))
    rank = np.arange(len(latent)) - np.repeat(begins, counts)
    columns = {"latent": latent.astype(np.int32), "kind": kind.astype(np.int8), "rank": rank.astype(np.int16)}
    for name in ("corpus", "document", "start", "peak"):
        columns[name] = np.concatenate([getattr(one, name) for one in found])[order]
    values = by_signal(names, own[:, order], value[order])
    arrays = {name: pa.array(one) for name, one in columns.items()}
    nothing = len(order)
    for signal, name in zip(SIGNALS, ("value", "base_value", "tuned_value"), strict=True):
        one = values.get(signal)
        arrays[name] = pa.nulls(nothing, pa.float32()) if one is None else pa.array(one)
    lengths, entries = _reordered(found, "ids", order)
    arrays["ids"] = _lists(lengths, np.concatenate([one.ids[1] for one in found])[entries])
    lengths, entries = _reordered(found, "at", order)
    arrays["at"] = _lists(lengths, np.concatenate([one.at[1] for one in found])[entries])
    spread = np.concatenate([one.signals for one in found], axis=1)[:, entries]
    fired = by_signal(names, spread, np.maximum(*spread) if len(spread) == 2 else spread[0])
    for signal in SIGNALS:
        one = fired.get(signal)
        empty = pa.nulls(nothing, pa.list_(pa.float32()))
        arrays[f"{signal}_at"] = empty if one is None else _lists(lengths, one)
    return pa.table(arrays)


def by_signal(names: tuple[str, ...], stored: NDArray, value: NDArray) -> dict[str, NDArray]:
    """Stored signals by name, with the value; a lone model's own signal is the value too."""
    return {"value": value} | dict(zip(names, stored, strict=True))


def _bins(rows: Wanted, value: NDArray[np.float32], bins: int) -> NDArray[np.int64]:
    """Quantile bin of each sampled example among those of its latent: 1 the weakest."""
    found = np.zeros(len(value), np.int64)
    sampled = np.flatnonzero(~rows.top)
    if not len(sampled):
        return found
    order = sampled[
        np.lexsort((rows.slot[sampled], rows.chunk[sampled], value[sampled], rows.latent[sampled]))
    ]
    latent = rows.latent[order]
    begins = np.flatnonzero(np.append(True, latent[1:] != latent[:-1]))
    counts = np.diff(np.append(begins, len(latent)))
    rank = np.arange(len(latent)) - np.repeat(begins, counts)
    found[order] = 1 + rank * bins // np.repeat(counts, counts)
    return found


def _spread(first: NDArray, length: NDArray) -> NDArray[np.int64]:
    """`first, first + 1, …` of each of several ranges, one after the other."""
    ends = length.cumsum()
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(first - (ends - length), length)


def _reordered(found: list[_Found], name: str, order: NDArray) -> tuple[NDArray, NDArray[np.int64]]:
    """Lengths of ragged rows in a new order, and where their values were."""
    lengths = np.concatenate([getattr(one, name)[0] for one in found])
    begins = lengths.cumsum() - lengths
    return lengths[order], _spread(begins[order], lengths[order])


def _lists(lengths: NDArray, values: NDArray) -> pa.ListArray:
    offsets = np.concatenate([[0], lengths.cumsum()]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
