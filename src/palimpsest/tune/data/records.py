"""Training data as it stands in files: records of any fields, each with where it was read."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from palimpsest.corpus import formats
from palimpsest.corpus.formats import BadRecord
from palimpsest.corpus.rows import HubId, parse_source
from palimpsest.errors import CorpusError

KINDS = (*formats.SUFFIXES, ".csv")
"""Endings of files that are read."""

Records = Iterator[tuple[str, Any]]


def read_records(sources: Sequence[str | Path], fields: tuple[str, str], split: str) -> Records:
    """(origin, record) of every row of the sources, one source after the other.

    Args:
        sources: Files (.jsonl, .ndjson, .json as lines or as one array, .parquet, .csv, .txt, .md), folders of them,
            saved data sets, or data sets on the hub.
        fields: Names of the fields with text and with messages; a text file is a record of the first.
        split: Of a data set.

    Raises:
        CorpusError: A source is missing, empty or damaged. What is wrong with one row comes out as a `BadRecord`.
    """
    for source in sources:
        parsed = parse_source(source)
        if isinstance(parsed, HubId):
            yield from formats.hub_records(parsed.name, parsed.config, parsed.revision, split)
        elif parsed.is_dir() and formats.is_saved_dataset(parsed):
            yield from formats.saved_records(parsed, split)
        else:
            for path in _files(parsed):
                yield from _file_records(path, fields)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        if source.stat().st_size == 0:
            raise CorpusError(f"{source} is empty", fix="Give a file with at least one row")
        return [source]
    found = [path for path in sorted(source.rglob("*")) if path.is_file() and _known(path)]
    if not found:
        raise CorpusError(
            f"The folder {source} holds no data", expected="files that end in " + ", ".join(KINDS)
        )
    return found


def _known(path: Path) -> bool:
    return formats.kind_of(path) is not None or path.suffix.lower() == ".csv"


def _file_records(path: Path, fields: tuple[str, str]) -> Records:
    kind = formats.kind_of(path)
    if path.suffix.lower() == ".csv":
        yield from _csv(path)
    elif kind == "parquet":
        yield from _parquet(path)
    elif kind == "lines" and _is_array(path):
        yield from _array(path)
    elif kind is not None:
        yield from formats.KINDS[kind](path, fields)
    else:
        raise CorpusError(
            f"{path} is of no known kind",
            expected="a name that ends in " + ", ".join(KINDS),
            found=path.suffix or "no ending",
        )


def _csv(path: Path) -> Records:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), 1):
                origin = f"{path}, row {number},"
                # Surplus cells come under no name, missing ones as None.
                whole = None not in row and None not in row.values()
                yield origin, row if whole else BadRecord(origin, "has more or fewer cells than the header")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise CorpusError(f"{path} cannot be read as CSV", found=error) from error


def _parquet(path: Path) -> Records:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=256):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number},", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet", found=error) from error


def _is_array(path: Path) -> bool:
    if path.suffix.lower() != ".json":
        return False
    with path.open("rb") as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _array(path: Path) -> Records:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise CorpusError(f"{path} is no readable JSON array", found=error) from error
    for number, record in enumerate(rows, 1):
        yield f"{path}, row {number},", record
