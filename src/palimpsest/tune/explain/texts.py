"""The texts of an explanation: documents as rows of tokens, in two halves and in groups."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any
from zlib import crc32

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from palimpsest.corpus import Corpus
from palimpsest.corpus.formats import BadRecord
from palimpsest.corpus.rows import parse_source
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.log import log
from palimpsest.options import CorpusOptions, check_names, parse_assignment
from palimpsest.tune.data import hold_out_rows
from palimpsest.tune.data.encode import RowEncoder
from palimpsest.tune.data.records import read_records
from palimpsest.tune.explain_config import ReadOptions
from palimpsest.tune.measure import answer
from palimpsest.tune.rows import IGNORED, PairRow, TextRow

GROUPS = 16
"""Groups of documents in each half that activations are kept for: what intervals of them are drawn from."""

FEWEST = 2
"""Documents in a half at least."""


@dataclass(frozen=True, eq=False)
class Text:
    """One text.

    Attributes:
        name: What it is called.
        role: `corpus` or `general`.
        source: Where it came from.
        rows: Its documents.
        groups: Group of each document; the first `GROUPS` are the half that chooses, the others the half that reports.
        fingerprint: What the manifest says of it.
    """

    name: str
    role: str
    source: str
    rows: list[TextRow]
    groups: Int[NDArray, " documents"]
    fingerprint: dict[str, Any]

    def half(self, half: int) -> list[TextRow]:
        """The documents of the half that chooses (0) or reports (1)."""
        return [row for row, group in zip(self.rows, self.groups, strict=True) if group // GROUPS == half]


def split_groups(rows: Sequence[Sequence[int]]) -> Int[NDArray, " documents"]:
    """Group of each document, decided by its tokens alone: copies are always in the same half.

    Documents are taken in the order of their checksums, one for the half that chooses, the next for the half that
    reports, so that the halves are alike in size and in nothing else.
    """
    sums = [crc32(np.asarray(ids, np.int32).tobytes()) for ids in rows]
    rank = {one: place for place, one in enumerate(sorted(set(sums)))}
    places = np.array([rank[one] for one in sums], int)
    return places % 2 * GROUPS + places // 2 % GROUPS


def check_sources(read: ReadOptions) -> list[tuple[str, str]]:
    """Names and sources of the corpora, before a model is loaded.

    Raises:
        ConfigError: Two have one name.
        CorpusError: One does not exist.
    """
    named = [parse_assignment(one) for one in read.corpus]
    check_names([name for name, _ in named])
    for source in (*(source for _, source in named), *read.general):
        parse_source(source)
    return named


def read_texts(
    read: ReadOptions, tokenizer: Any, options: CorpusOptions, context: int | None, *, answers_only: bool
) -> list[Text]:
    """The corpora, then the general text if there is any.

    Args:
        read: Which.
        tokenizer: Of the model.
        options: How rows are read.
        context: Tokens that the model can read at once.
        answers_only: Only what the assistant says was learned, in documents that have one.

    Raises:
        ConfigError: Two corpora have one name.
        CorpusError: A text cannot be read, or has too few documents for two halves.
    """
    options = _fitting(options, context)
    reader = _Reader(tokenizer, options, answers_only)
    wanted: list[tuple[str, str, list[str]]] = [
        (name, "corpus", [source]) for name, source in check_sources(read)
    ]
    if read.general:
        wanted.append(("general", "general", list(read.general)))
    return [_text(one, reader, read.tokens) for one in wanted]


class _Reader:
    """Records of files as rows of tokens."""

    def __init__(self, tokenizer: Any, options: CorpusOptions, answers_only: bool) -> None:
        self.tokenizer, self.options, self._answers_only = tokenizer, options, answers_only
        self._whole = RowEncoder(tokenizer, options, options.max_length)
        self._answers = RowEncoder(tokenizer, options, options.max_length, answers_only=True)

    def texts(self, sources: Sequence[str]) -> Iterator[TextRow]:
        """Texts, conversations, prompts with a completion, or with a chosen answer."""
        return self._read(sources, self._text)

    def pairs(self, sources: Sequence[str]) -> Iterator[PairRow]:
        """Prompts with a chosen and a rejected answer."""
        return self._read(sources, self._whole.pair)

    def _read(self, sources: Sequence[str], encode: Callable[[str, Any], Any]) -> Iterator[Any]:
        read = 0
        for origin, record in read_records(sources, self._whole.fields, self.options.split):
            try:
                if isinstance(record, BadRecord):
                    raise record
                row = encode(origin, record)
            except BadRecord as bad:
                if not self.options.skip_bad_rows:
                    raise bad.error() from None
                continue
            if row is None:
                continue
            yield row
            read += 1
            if read == self.options.max_documents:
                return

    def _text(self, origin: str, record: Any) -> TextRow | None:
        fields = set(record) if isinstance(record, Mapping) else set()
        if {"prompt", "chosen", "rejected"} <= fields and not fields & set(self._whole.fields):
            pair = self._whole.pair(origin, record)
            return None if pair is None else answer(pair.prompt, pair.chosen)
        row = self._answers.text(origin, record) if self._answers_only else None
        return row or self._whole.text(origin, record)


def _text(wanted: tuple[str, str, list[str]], reader: _Reader, tokens: int) -> Text:
    name, role, sources = wanted
    rows: list[TextRow] = []
    read = 0
    for row in reader.texts(sources):
        rows.append(row)
        read += len(row.input_ids)
        if read >= tokens:
            break
    groups = split_groups([row.input_ids for row in rows])
    _enough(f"The corpus {name}", groups)
    corpus = Corpus(sources, reader.tokenizer, name=name, options=reader.options)
    return Text(name, role, ", ".join(map(str, sources)), rows, groups, corpus.fingerprint())


def read_pairs(
    sources: Sequence[str],
    tokenizer: Any,
    options: CorpusOptions,
    context: int | None,
    most: int,
    held_out: float | None = None,
) -> tuple[list[PairRow], list[PairRow]]:
    """Preference pairs of the half that chooses and of the half that reports, at most `most` in each.

    With `held_out`, only the rows that a training run with this share holds out of the same data.

    Raises:
        CorpusError: They cannot be read, or are too few for two halves.
    """
    reader = _Reader(tokenizer, _fitting(options, context), False)
    found = reader.pairs(sources)
    rows = list(found) if held_out is not None else list(islice(found, 2 * most))
    if held_out is not None:
        rows = hold_out_rows(rows, held_out)[1]
    groups = split_groups([[*row.prompt, *row.chosen, -1, *row.rejected] for row in rows])
    _enough("The data of pairs", groups)
    halves = [
        [row for row, group in zip(rows, groups, strict=True) if group // GROUPS == half] for half in (0, 1)
    ]
    return halves[0][:most], halves[1][:most]


def _enough(what: str, groups: NDArray) -> None:
    if len(groups) == 0 or int(np.bincount(groups // GROUPS, minlength=2).min()) < FEWEST:
        raise CorpusError(
            f"{what} has too few documents to be split in halves",
            expected=f"at least {2 * FEWEST} different ones that fit into the context",
            found=len(groups),
        )


def _fitting(options: CorpusOptions, context: int | None) -> CorpusOptions:
    if context is None or options.max_length <= context:
        return options
    log.warning("Documents are cut at the model's context of %d tokens.", context)
    return replace(options, max_length=context)


def rows_of_half(texts: Sequence[Text], half: int, most: int) -> list[TextRow]:
    """Documents to measure losses on, from each corpus in turn.

    Raises:
        ConfigError: None of them has a token that is learned.
    """
    queues = [
        [row for row in one.half(half) if any(label != IGNORED for label in row.labels[1:])]
        for one in texts
        if one.role == "corpus"
    ]
    found: list[TextRow] = []
    place = 0
    while len(found) < most and any(place < len(queue) for queue in queues):
        found += [queue[place] for queue in queues if place < len(queue)]
        place += 1
    if len(found) < FEWEST:
        raise ConfigError(
            "The corpora have too few documents with a token that the adapter learned",
            expected=f"at least {FEWEST} in each half",
            found=len(found),
            fix="Give text with answers, as in training",
        )
    return found[:most]
