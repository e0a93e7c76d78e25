"""Batteries by name: which public data sets make up one, and how their rows become conversations.

A preset is a TOML file beside this module, or one of the user's own. The shipped ones name data sets on the Hugging
Face hub. **They have not been run against a hub**: ids, fields and licences were read from public pages, each named
under `checked`; what stands there under no fact is an assumption. Tests read local files of the published layout.
Listing and loading presets imports no torch.
"""

import json
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from palimpsest.artifacts.disk import replacing
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.log import log

PRESETS = Path(__file__).with_name("presets")
FACTS = ("source", "split", "format", "fields", "licence")
"""What may be checked of a corpus on a public page."""

_NAME = re.compile(r"[\w-]+")
_TEXTS = ("source", "split", "licence", "assistant", "messages", "text", "note")
_LISTS = ("user", "optional")
_PARQUET_ROWS = 256


@dataclass(frozen=True)
class PresetCorpus:
    """One data set of a preset. Rows are read through `user` and `assistant`, or `messages`, or `text`."""

    name: str
    source: str
    """`owner/name[:config][@revision]` on the hub, a JSONL or Parquet file, or a saved data set's folder."""
    licence: str
    """As its card says; the user's terms are the publisher's, not this string."""
    documents: int
    """Rows that are taken, the first ones."""
    split: str = "train"
    user: tuple[str, ...] = ()
    """Fields of the question, joined by a line break."""
    optional: tuple[str, ...] = ()
    """Those of `user` that a row may leave blank."""
    assistant: str | None = None
    """Field of the answer."""
    messages: str | None = None
    """Field with a list of objects with role and content."""
    text: str | None = None
    """Field with plain text."""
    answer_chars: int | None = None
    """How much of an answer the battery's author kept; written rows hold all of it."""
    note: str = ""
    checked: dict[str, str] = field(default_factory=dict)
    """Fact -> the public page on which it was read."""

    @property
    def role(self) -> str:
        """`general` or `task`."""
        return "general" if self.name == "general" else "task"

    @property
    def unchecked(self) -> tuple[str, ...]:
        """Facts that were read on no page."""
        return tuple(fact for fact in FACTS if fact not in self.checked)


@dataclass(frozen=True)
class Preset:
    """A battery's corpora, the general one first."""

    name: str
    about: str
    corpora: tuple[PresetCorpus, ...]


def list_presets() -> list[str]:
    """Names of the presets that ship with the package."""
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load_preset(name: str) -> Preset:
    """The preset of a name, or of a file that ends in `.toml`.

    Raises:
        ConfigError: When there is none, or when it holds what no preset has.
    """
    path = Path(name) if name.endswith(".toml") else PRESETS / f"{name}.toml"
    if not name.endswith(".toml") and name not in list_presets():
        raise ConfigError(
            f"There is no preset '{name}'", expected=", ".join(list_presets()) + ", or a .toml file"
        )
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Cannot read the preset {path}", found=error.strerror) from error
    except ValueError as error:
        raise ConfigError(f"Cannot parse the preset {path}", found=str(error)) from error
    where = f"The preset {path.stem}"
    _known(where, data, ("about", "documents", "answer_chars", "general", "tasks"))
    shared = {key: data[key] for key in ("documents", "answer_chars") if key in data}
    tables = {"general": data.get("general")}
    tasks = data.get("tasks", {})
    if not isinstance(tasks, dict) or not tasks or "general" in tasks or tables["general"] is None:
        raise ConfigError(f"{where} is no battery", expected="a table [general] and tables [tasks.NAME]")
    about = data.get("about", "")
    if not isinstance(about, str):
        raise _wrong(f"{where} has 'about' of another type", "a string", about)
    corpora = tuple(_corpus(path.stem, key, table, shared) for key, table in (tables | tasks).items())
    return Preset(path.stem, about, corpora)


def _corpus(preset: str, name: str, table: Any, shared: Mapping[str, Any]) -> PresetCorpus:
    where = f"The corpus {name} of preset {preset}"
    if not isinstance(table, dict):
        raise _wrong(f"{where} is no table", "keys such as source and split", table)
    if not _NAME.fullmatch(name):
        raise _wrong(f"{where} has a name that is no file name", "letters, digits, '-' and '_'", name)
    _known(where, table, tuple(one.name for one in fields(PresetCorpus) if one.name != "name"))
    values = dict(shared) | table
    missing = [key for key in ("source", "licence", "documents") if key not in values]
    if missing:
        raise ConfigError(f"{where} lacks {' and '.join(missing)}")
    for key, value in values.items():
        _check(f"{where} has '{key}' of another type", key, value)
    for key in _LISTS:
        values[key] = tuple(values.get(key, ()))
    corpus = PresetCorpus(name=name, **values)
    ways = [way for way in ("user", "messages", "text") if getattr(corpus, way)]
    if len(ways) != 1 or bool(corpus.user) != bool(corpus.assistant):
        raise ConfigError(
            f"{where} does not say how a row is read",
            expected="user and assistant, or messages, or text",
            found=" and ".join([*ways, *(["assistant"] if corpus.assistant else [])]) or "none of them",
        )
    stray = [one for one in corpus.optional if one not in corpus.user]
    if stray or (corpus.user and len(corpus.optional) == len(corpus.user)):
        raise ConfigError(
            f"{where} has optional fields that do not fit its user fields",
            expected="some of " + ", ".join(corpus.user) + ", not all",
            found=", ".join(corpus.optional),
        )
    return corpus


def _known(where: str, table: Mapping[str, Any], keys: Sequence[str]) -> None:
    unknown = [key for key in table if key not in keys]
    if unknown:
        raise ConfigError(
            f"{where} has keys that it cannot have", expected=", ".join(keys), found=", ".join(unknown)
        )


def _check(problem: str, key: str, value: Any) -> None:
    if key in _TEXTS and not (isinstance(value, str) and (value.strip() or key == "note")):
        raise _wrong(problem, "a string that is not blank", value)
    if key in _LISTS and not (isinstance(value, list) and value and all(isinstance(v, str) for v in value)):
        raise _wrong(problem, "a list of field names", value)
    if key in ("documents", "answer_chars") and (type(value) is not int or value < 1):
        raise _wrong(problem, "a positive whole number", value)
    if key == "checked" and not (
        isinstance(value, dict)
        and set(value) <= set(FACTS)
        and all(isinstance(v, str) for v in value.values())
    ):
        raise _wrong(problem, "pages by fact: " + ", ".join(FACTS), value)


def _wrong(problem: str, expected: str, found: Any) -> ConfigError:
    return ConfigError(problem, expected=expected, found=repr(found))


def materialise(
    preset: Preset, folder: Path, *, limit: int | None = None, skipped: dict[str, int] | None = None
) -> dict[str, Path]:
    """Write a preset's corpora as JSONL, one file each, that an audit reads like any other.

    Args:
        preset: What to fetch.
        folder: Where the files go; a file is there whole or not at all, and replaces one of its name.
        limit: Documents of each corpus at most; the preset's own number by default.
        skipped: Takes, by corpus, how many rows were left out because a field was blank.

    Returns:
        The file of each corpus by name, the general one first. Rows hold `messages`, or `text`.

    Raises:
        ConfigError: When `limit` is below 1.
        CorpusError: When a source cannot be read, a row lacks a field, or no row is left.
        ArtifactError: When the folder cannot be written.
    """
    if limit is not None and limit < 1:
        raise ConfigError("The limit of documents is too small", expected="at least 1", found=limit)
    written = {}
    for corpus in preset.corpora:
        where = f"The corpus {corpus.name} of preset {preset.name}"
        path = folder / f"{corpus.name}.jsonl"
        with replacing(path) as temporary:
            blank = _write(where, corpus, temporary, corpus.documents if limit is None else limit)
        if skipped is not None:
            skipped[corpus.name] = blank
        written[corpus.name] = path
    return written


def _write(where: str, corpus: PresetCorpus, path: Path, limit: int) -> int:
    """Write at most `limit` rows; returns how many were blank."""
    count = blank = 0
    records = _records(where, corpus)
    with path.open("w", encoding="utf-8") as handle:
        for origin, record in records:
            row = _row(f"{where}: {origin}", corpus, record)
            if row is None:
                blank += 1
                continue
            # Escaped, because a lone surrogate, which JSON can hold, has no UTF-8 form.
            handle.write(json.dumps(row) + "\n")
            count += 1
            if count == limit:
                break
    if not count:
        raise CorpusError(
            f"{where} has no row with text", expected="at least one", found=f"{blank} rows with blank fields"
        )
    if count < limit:
        log.warning("%s holds %d documents, %d were asked for", where, count, limit)
    if blank:
        log.info("%s: %d rows with blank fields left out", where, blank)
    return blank


def _records(where: str, corpus: PresetCorpus) -> Iterator[tuple[str, Any]]:
    # Late, because the corpus package imports torch.
    from palimpsest.corpus import formats
    from palimpsest.corpus.rows import HubId, parse_source

    try:
        source = parse_source(corpus.source)
    except CorpusError as error:
        raise CorpusError(f"{where}: {error.problem}", expected=error.expected, fix=error.fix) from error
    if isinstance(source, HubId):
        return formats.hub_records(source.name, source.config, source.revision, corpus.split)
    if source.is_dir() and formats.is_saved_dataset(source):
        return formats.saved_records(source, corpus.split)
    kind = formats.kind_of(source) if source.is_file() else None
    if kind == "lines":
        return formats.line_records(source, ("", ""))
    if kind == "parquet":
        return _parquet(source)
    raise CorpusError(
        f"{where}: {source} cannot be read as rows of fields",
        expected="a JSONL or Parquet file, a saved data set, or an id on the hub",
    )


def _parquet(path: Path) -> Iterator[tuple[str, Any]]:
    """Whole rows, where the reader of corpora takes two columns only."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number},", record
    except (pa.ArrowException, OSError) as error:
        raise CorpusError(f"{path} cannot be read as Parquet", found=error) from error


def _row(where: str, corpus: PresetCorpus, record: Any) -> dict[str, Any] | None:
    """The row as it is written, or None when a field that it needs is blank."""
    if isinstance(record, Exception) or not isinstance(record, Mapping):
        found = record if isinstance(record, Exception) else type(record).__name__
        raise CorpusError(f"{where} is no row of fields", expected="an object", found=found)
    if corpus.messages:
        return _messages(where, corpus.messages, record)
    if corpus.text:
        text = _text(where, record, corpus.text)
        return {"text": text} if text.strip() else None
    needed = [name for name in corpus.user if name not in corpus.optional]
    answer = _text(where, record, corpus.assistant or "")
    parts = {name: _text(where, record, name, name in corpus.optional) for name in corpus.user}
    if not answer.strip() or not all(parts[name].strip() for name in needed):
        return None
    question = "\n".join(part for part in parts.values() if part.strip())
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _text(where: str, record: Mapping[str, Any], name: str, optional: bool = False) -> str:
    """A field's text; null counts as blank."""
    value = record.get(name, "") if optional else _present(where, record, name)
    if value is None or isinstance(value, str):
        return value or ""
    raise CorpusError(
        f"{where} has a field '{name}' of another type", expected="a string", found=type(value).__name__
    )


def _messages(where: str, name: str, record: Mapping[str, Any]) -> dict[str, Any] | None:
    value = _present(where, record, name)
    if value is not None and (isinstance(value, str | Mapping) or not isinstance(value, Sequence)):
        raise CorpusError(
            f"{where} has a field '{name}' of another type",
            expected="a list of objects with role and content",
            found=type(value).__name__,
        )
    turns = []
    for one in value or ():
        if not isinstance(one, Mapping):
            raise CorpusError(
                f"{where} has a message in '{name}' that is no object", found=type(one).__name__
            )
        turns.append({key: _text(f"{where} in '{name}'", one, key) for key in ("role", "content")})
    blank = not turns or not all(turn["role"].strip() and turn["content"].strip() for turn in turns)
    return None if blank else {"messages": turns}


def _present(where: str, record: Mapping[str, Any], name: str) -> Any:
    if name in record:
        return record[name]
    raise CorpusError(
        f"{where} has no field '{name}'",
        expected=f"the field '{name}', as the preset says",
        found="the fields " + (", ".join(map(str, record)) or "of an empty object"),
        fix="The data set's layout may have changed: copy the preset's file, correct the field, and give the copy",
    )
