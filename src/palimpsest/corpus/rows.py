"""Rows of a corpus, one at a time, from files, folders, saved datasets and the Hugging Face hub.

A row holds plain text or a conversation. Lines (`.jsonl`, `.ndjson`, `.json`) hold one JSON object each, a
Parquet file one row each, a text file (`.txt`, `.md`) is one document however long. Preference rows
(`prompt`, `chosen`, `rejected`) are no corpus rows: write the side to be read as `messages` first.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.corpus import formats
from palimpsest.corpus.formats import KINDS, BadRecord, kind_of
from palimpsest.errors import CorpusError

ROLE_NAMES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "model": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""Role of a message as data sets spell it -> the role that its tokens get."""

_HUB_ID = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?")
_NOT_ROWS = {"readme", "license"}


@dataclass
class CorpusStats:
    """What one pass over a corpus met; the counts grow while the pass runs."""

    documents: int = 0
    """Documents that came out."""

    tokens: int = 0
    """Tokens of those documents, BOS and template included."""

    bad_rows: int = 0
    """Rows that were skipped because they could not be read."""

    empty_documents: int = 0
    """Rows without any token of their own, dropped."""

    truncated_documents: int = 0
    """Documents that were cut at the maximal length."""

    repaired_rows: int = 0
    """Rows in which lone surrogates were replaced by U+FFFD."""

    unplaced_messages: int = 0
    """Messages whose content the chat template changed or dropped; their tokens count as template."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: `text`, or `messages` as mappings with at least `role` and `content`; `origin` says where."""

    text: str | None
    messages: tuple[Mapping[str, Any], ...] | None
    origin: str


@dataclass(frozen=True, slots=True)
class HubId:
    """A data set on the hub, written `owner/name[:config][@revision]`."""

    name: str
    config: str | None = None
    revision: str | None = None


def parse_source(source: str | Path) -> Path | HubId:
    """The file or folder, or the hub data set, that `source` means.

    Raises:
        CorpusError: When it is neither.
    """
    path = Path(source)
    if path.exists():
        return path
    match = _HUB_ID.fullmatch(str(source))
    if isinstance(source, Path) or match is None or kind_of(path) or path.parent.is_dir():
        raise CorpusError(
            f"{source} does not exist",
            expected="a file, a folder or a data set on the hub, owner/name[:config][@revision]",
            fix="Check the path",
        )
    return HubId(match["name"], match["config"], match["revision"])


def read_rows(
    source: str | Path | Sequence[str | Path],
    *,
    text_field: str = "text",
    messages_field: str = "messages",
    split: str = "train",
    skip_bad_rows: bool = False,
    stats: CorpusStats | None = None,
) -> Iterator[Row]:
    """Stream the rows of `source`; memory does not grow with its length.

    Args:
        source: A file (`.jsonl`, `.ndjson`, `.json`, `.txt`, `.md`, each also with `.gz`, or `.parquet`), a
            folder of such files (sorted, with its subfolders; hidden files, README and LICENSE are left
            out), a folder written by `datasets.save_to_disk`, or a hub data set. Several sources are read in
            turn, a row from each.
        text_field: Field with plain text.
        messages_field: Field with a conversation; where a row has both, the conversation is read.
        split: Split of a data set.
        skip_bad_rows: Count unreadable rows in `stats` instead of raising.
        stats: Takes the counts.

    Raises:
        CorpusError: When a source is missing or empty, or a row cannot be read.
    """
    stats = CorpusStats() if stats is None else stats
    sources = [source] if isinstance(source, str | Path) else list(source)
    fields = (text_field, messages_field)
    streams = [_records(parse_source(one), fields, split) for one in sources]
    while streams:
        for stream in list(streams):
            record = next(stream, None)
            if record is None:
                streams.remove(stream)
                continue
            try:
                yield row_of(*record, fields, stats)
            except BadRecord as bad:
                if not skip_bad_rows:
                    raise bad.error() from None
                stats.bad_rows += 1


def _records(source: Path | HubId, fields: tuple[str, str], split: str) -> Iterator[tuple[str, Any]]:
    """(origin, parsed record or BadRecord) of one source."""
    if isinstance(source, HubId):
        yield from formats.hub_records(source.name, source.config, source.revision, split)
    elif source.is_dir() and formats.is_saved_dataset(source):
        yield from formats.saved_records(source, split)
    else:
        for path in _files(source):
            yield from KINDS[kind_of(path) or ""](path, fields)


def _files(source: Path) -> list[Path]:
    if source.is_file():
        if kind_of(source) is None:
            raise CorpusError(
                f"{source} is of no known kind",
                expected="a name that ends in " + ", ".join(formats.SUFFIXES) + ", or one of these and .gz",
                found=source.suffix or "no ending",
            )
        if source.stat().st_size == 0:
            raise CorpusError(f"{source} is empty", fix="Give a file with at least one row")
        return [source]
    found = [
        path
        for path in sorted(source.rglob("*"))
        if path.is_file()
        and kind_of(path)
        and path.name.split(".")[0].lower() not in _NOT_ROWS
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    ]
    if not found:
        raise CorpusError(
            f"The folder {source} holds no corpus file",
            expected="files that end in " + ", ".join(formats.SUFFIXES) + ", or a saved data set",
            found=", ".join(sorted(path.name for path in source.iterdir())[:8]) or "an empty folder",
        )
    return found


def row_of(origin: str, record: Any, fields: tuple[str, str], stats: CorpusStats) -> Row:
    """One record as a row: a conversation, else text.

    Raises:
        BadRecord: It is neither.
    """
    if isinstance(record, BadRecord):
        raise record
    text_field, messages_field = fields
    if not isinstance(record, Mapping):
        raise BadRecord(origin, "is no object", 'an object such as {"text": "…"}', _kind(record))
    messages = record.get(messages_field) if messages_field else None
    if messages is not None:
        if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
            expected = "a list of objects with role and content, at least one"
            raise BadRecord(
                origin, f"has a field '{messages_field}' of another type", expected, _kind(messages)
            )
        row = Row(None, tuple(_message(origin, one) for one in messages), origin)
    else:
        text = record.get(text_field)
        if text is None:
            found = ", ".join(map(str, record)) or "an empty object"
            raise BadRecord(
                origin,
                "holds no text",
                f"a field '{text_field}' or '{messages_field}'",
                f"the fields {found}",
            )
        if not isinstance(text, str):
            raise BadRecord(origin, f"has a field '{text_field}' of another type", "a string", _kind(text))
        row = Row(text, None, origin)
    return _repaired(row, stats)


def _message(origin: str, message: Any) -> Mapping[str, Any]:
    """A message with its content as one string; fields that hold null are dropped."""
    if not isinstance(message, Mapping):
        raise BadRecord(
            origin, "has a message that is no object", "objects with role and content", _kind(message)
        )
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or role.lower() not in ROLE_NAMES:
        found = repr(role) if role is not None else "the fields " + ", ".join(map(str, message))
        raise BadRecord(
            origin, "has a message without a known role", "a role of " + ", ".join(ROLE_NAMES), found
        )
    if isinstance(content, list) and all(
        isinstance(p, Mapping) and isinstance(p.get("text"), str) for p in content
    ):
        content = "".join(part["text"] for part in content)
    if content is None and any(message.get(key) for key in ("tool_calls", "function_call")):
        content = ""
    if not isinstance(content, str):
        expected = "content as a string or a list of text parts"
        raise BadRecord(origin, f"has a {role} message without text", expected, _kind(content))
    return {key: value for key, value in message.items() if value is not None} | {"content": content}


def _kind(value: Any) -> str:
    names = {type(None): "null", bool: "a truth value", str: "a string", int: "a number", float: "a number"}
    return names.get(type(value), "a list" if isinstance(value, list) else f"{type(value).__name__}")


def _repaired(row: Row, stats: CorpusStats) -> Row:
    """The row in valid Unicode: JSON can escape half a surrogate pair, which no tokenizer accepts."""
    held = (row.text or "", json.dumps(row.messages, ensure_ascii=False, default=str) if row.messages else "")
    try:
        for text in held:
            text.encode("utf-8")
    except UnicodeEncodeError:
        stats.repaired_rows += 1
        return Row(
            None if row.text is None else _valid(row.text),
            None if row.messages is None else tuple(_valid(dict(one)) for one in row.messages),
            row.origin,
        )
    return row


def _valid(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, Mapping):
        return {_valid(key): _valid(one) for key, one in value.items()}
    return [_valid(one) for one in value] if isinstance(value, list) else value
