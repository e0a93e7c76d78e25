"""The file formats of a corpus: each reader streams `(origin, record)` pairs.

A record that cannot be read comes out as a `BadRecord`, so that the caller may count it and go on; what
spoils a whole file (truncated gzip, no Parquet) is raised at once.
"""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from palimpsest.errors import CorpusError
from palimpsest.hub import hub_errors

SUFFIXES = (".jsonl", ".ndjson", ".json", ".txt", ".md", ".parquet")
_SAVED = ("dataset_info.json", "state.json", "dataset_dict.json")
_PARQUET_ROWS = 256


class BadRecord(Exception):  # noqa: N818  (control flow: becomes a CorpusError unless bad rows are skipped)
    """One row that cannot be read; `error` words it for the user."""

    def __init__(
        self, origin: str, problem: str, expected: str | None = None, found: str | None = None
    ) -> None:
        super().__init__(f"{origin} {problem}")
        self.expected, self.found = expected, found

    def error(self) -> CorpusError:
        """The error that stops a run which does not skip bad rows."""
        fix = "Correct the row, or count and skip such rows with --skip-bad-rows"
        return CorpusError(str(self), expected=self.expected, found=self.found, fix=fix)


Records = Iterator[tuple[str, Any]]


def kind_of(path: Path) -> str | None:
    """The reader's name for a file: `lines`, `text`, `parquet`, or None when the ending is unknown."""
    suffix = (path.with_suffix("") if path.suffix == ".gz" else path).suffix.lower()
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix == ".gz"):
        return None
    return {".txt": "text", ".md": "text", ".parquet": "parquet"}.get(suffix, "lines")


def is_saved_dataset(folder: Path) -> bool:
    """Whether `datasets.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in _SAVED)


def _open(path: Path) -> io.BufferedReader | gzip.GzipFile:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")


def line_records(path: Path, fields: tuple[str, str]) -> Records:
    """One JSON object per line; empty lines are no rows."""
    number = 0
    try:
        with _open(path) as handle:
            for number, line in enumerate(handle, 1):  # noqa: B007  (named in the error below)
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                if number == 1 and line.lstrip().startswith(b"["):
                    raise CorpusError(
                        f"{path} holds one JSON array",
                        expected="one JSON object per line",
                        fix=f"Write it as lines, e.g. jq -c '.[]' {path.name} > {path.stem}.lines.jsonl",
                    )
                yield f"{path}:{number}", _parse(f"{path}:{number}", line)
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read after line {number}", found=error) from error


def _parse(origin: str, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return BadRecord(origin, "is no valid UTF-8", "UTF-8 text", found)
    except (ValueError, RecursionError) as error:
        return BadRecord(origin, "is no valid JSON", "one JSON object on the line", str(error))


def text_records(path: Path, fields: tuple[str, str]) -> Records:
    """The whole file as one document."""
    try:
        with _open(path) as handle:
            data = handle.read()
    except (OSError, EOFError, zlib.error) as error:
        raise CorpusError(f"{path} cannot be read", found=error) from error
    try:
        yield str(path), {fields[0]: data.decode("utf-8-sig")}
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        origin = f"{path}:{line}"
        yield origin, BadRecord(origin, "is no valid UTF-8", "UTF-8 text", f"byte 0x{data[error.start]:02x}")


def parquet_records(path: Path, fields: tuple[str, str]) -> Records:
    """The rows of a Parquet file; only the two fields are read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            columns = [name for name in fields if name in names]
            if not columns:
                raise CorpusError(
                    f"{path} holds no text",
                    expected=f"a column '{fields[0]}' or '{fields[1]}'",
                    found="the columns " + ", ".join(names),
                    fix="Name the column with --text-field or --messages-field",
                )
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    number += 1
                    yield f"{path}, row {number},", _arrow_row(f"{path}, row {number},", batch, index)
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet", found=error) from error


def _arrow_row(origin: str, batch: Any, index: int) -> Any:
    try:
        return {name: batch.column(name)[index].as_py() for name in batch.schema.names}
    except UnicodeDecodeError as error:
        return BadRecord(origin, "is no valid UTF-8", "UTF-8 text", str(error))


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise CorpusError(
            f"{source} needs the package datasets", fix="Install it with pip install datasets, or give a file"
        ) from error
    return datasets


def saved_records(folder: Path, split: str) -> Records:
    """The rows of a saved data set, memory-mapped."""
    datasets = _datasets(str(folder))
    import pyarrow as pa

    try:
        loaded = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CorpusError(f"{folder} cannot be opened as a saved data set", found=error) from error
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise CorpusError(
                f"{folder} has no split '{split}'",
                found="the splits " + ", ".join(loaded),
                fix="Choose one with --split",
            )
        loaded = loaded[split]
    for number, record in enumerate(loaded, 1):
        yield f"{folder}, row {number},", record


def hub_records(name: str, config: str | None, revision: str | None, split: str) -> Records:
    """The rows of a data set on the hub, streamed."""
    datasets = _datasets(name)
    try:
        loaded = datasets.load_dataset(name, config, revision=revision, split=split, streaming=True)
        for number, record in enumerate(loaded, 1):
            yield f"{name}, row {number},", record
    except hub_errors() as error:
        answered = isinstance(error, FileNotFoundError | ValueError) or hasattr(error, "response")
        fix = (
            "Check the name, the configuration (owner/name:config), the split and your access"
            if answered
            else "Go online, or download the data set elsewhere (save_to_disk) and give the folder's path"
        )
        raise CorpusError(
            f"The data set {name} cannot be read from the hub and no local path has this name",
            found=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}",
            fix=fix,
        ) from error


KINDS: dict[str, Callable[[Path, tuple[str, str]], Records]] = {
    "lines": line_records,
    "text": text_records,
    "parquet": parquet_records,
}
