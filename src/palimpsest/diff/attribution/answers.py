"""A behaviour that the user gives: prompts, each with an answer that is wanted and one that is not."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from palimpsest.corpus import CorpusStats, Document, Role
from palimpsest.corpus.batches import bucketed
from palimpsest.corpus.formats import BadRecord, line_records
from palimpsest.corpus.rows import row_of
from palimpsest.corpus.tokenize import DocumentTokenizer
from palimpsest.diff.attribution.integrate import Item
from palimpsest.diff.text import WINDOW, Texts
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.log import log
from palimpsest.options import CorpusOptions, parse_assignment

FIELDS = {"prompt": ("prompt",), "wanted": ("wanted", "chosen"), "unwanted": ("unwanted", "rejected")}
"""The parts of a row and the fields that may hold them: preference data have names of their own."""

EXAMPLE = '{"prompt": "…", "wanted": "…", "unwanted": "…"}, each a text or a list of messages'

_WRITTEN = (Role.TEXT, Role.ASSISTANT)
"""Tokens of an answer that count; chat-template markup does not."""


@dataclass(frozen=True)
class Pair:
    """One prompt with both answers.

    Attributes:
        wanted: Prompt and wanted answer as one sequence.
        unwanted: The same with the other answer.
        start: First token in which the two differ. What stands before has the same probability in both, and cancels.
    """

    wanted: Document
    unwanted: Document
    start: int

    @property
    def tokens(self) -> int:
        """Tokens of both answers that count."""
        return sum(int(_counted(one, self.start).sum()) for one in (self.wanted, self.unwanted))


@dataclass(frozen=True)
class Answers:
    """The pairs of answers of one behaviour.

    Its objective is Σ [log p(unwanted) - log p(wanted)] over the pairs: sums over the tokens of an answer, so a longer
    answer has the smaller probability, in both models alike.
    """

    name: str
    pairs: list[Pair]

    def items(self, texts: Texts, tokens_per_batch: int) -> Iterator[Item]:
        """Batches with the predictions that count; `corpus` is -1."""
        documents = [
            replace(document, index=2 * number + side)
            for number, pair in enumerate(self.pairs)
            for side, document in enumerate((pair.wanted, pair.unwanted))
        ]
        starts = torch.tensor([pair.start for pair in self.pairs])
        written = torch.tensor(_WRITTEN)
        for batch in bucketed(documents, texts.corpora[0].masking, tokens_per_batch, WINDOW):
            # Padding has the document -1; the mask takes it out.
            answer = torch.arange(batch.input_ids.shape[1]) >= starts[batch.document // 2]
            counted = answer & torch.isin(batch.role, written) & batch.attention_mask
            sign = 1.0 - 2.0 * (batch.document[counted] % 2)
            yield Item(-1, batch, texts.places(batch), counted.reshape(-1).nonzero().squeeze(1) - 1, sign)


def read_behaviours(sources: tuple[str, ...], tokenizer: Any, texts: Texts, tokens: int) -> list[Answers]:
    """The behaviours of files named as `--behaviour` takes them, each with an optional name in front.

    Args:
        sources: Files, as in `refusal=refusals.jsonl`.
        tokenizer: Of the pair.
        texts: How text is read.
        tokens: Answer tokens that are read of each file, rounded up to whole pairs.

    Raises:
        ConfigError: Two behaviours have the same name, or one is called kl.
        CorpusError: A file cannot be read, or holds no pair of answers that can be compared.
    """
    named = [parse_assignment(source) for source in sources]
    names = [name for name, _ in named]
    if len({*names, "kl"}) != len(names) + 1:
        raise ConfigError(
            "Behaviours need different names, none of them kl",
            expected="NAME=FILE, as in refusal=refusals.jsonl",
            found=", ".join(names),
        )
    return [_read(name, Path(path), tokenizer, texts.options, tokens) for name, path in named]


def _read(name: str, path: Path, tokenizer: Any, options: CorpusOptions, tokens: int) -> Answers:
    if not path.is_file():
        raise CorpusError(f"The behaviour file {path} does not exist", expected=f"lines of {EXAMPLE}")
    encoder = DocumentTokenizer(tokenizer, replace(options, skip_bad_rows=False), max_length=None)
    pairs: list[Pair] = []
    rows = cut = found = 0
    for origin, record in line_records(path, ("", "")):
        if found >= tokens:
            log.warning(
                "Behaviour %s: the first %d rows of %s are read; raise --attribution-tokens for more.",
                name,
                rows,
                path,
            )
            break
        rows += 1
        try:
            pair = _pair(origin, record, encoder)
        except BadRecord as bad:
            raise CorpusError(str(bad), expected=bad.expected, found=bad.found) from None
        if max(len(pair.wanted), len(pair.unwanted)) > options.max_length:
            cut += 1
            continue
        pairs.append(pair)
        found += pair.tokens
    if rows == 0:
        raise CorpusError(f"The behaviour file {path} holds no rows", expected=f"lines of {EXAMPLE}")
    if not pairs:
        raise CorpusError(
            f"Every answer in {path} would be cut off",
            expected=f"prompt and answer of at most {options.max_length} tokens",
            found=f"{cut} longer pairs",
            fix="Raise --max-length, or shorten prompts and answers",
        )
    if cut:
        log.warning("Behaviour %s: %d of %d rows are left out as too long (--max-length).", name, cut, rows)
    return Answers(name, pairs)


def _pair(origin: str, record: Any, encoder: DocumentTokenizer) -> Pair:
    if isinstance(record, BadRecord):
        raise record
    if not isinstance(record, Mapping):
        raise BadRecord(origin, "is no object", EXAMPLE, type(record).__name__)
    parts = {
        part: next((record[name] for name in names if record.get(name) is not None), None)
        for part, names in FIELDS.items()
    }
    if missing := [" or ".join(FIELDS[part]) for part, value in parts.items() if value is None]:
        found = "the fields " + ", ".join(map(str, record)) if record else "an empty object"
        raise BadRecord(origin, f"has no {', no '.join(missing)}", EXAMPLE, found)
    plain = all(isinstance(value, str) for value in parts.values())
    records = [_record(origin, parts["prompt"], parts[key], plain) for key in ("wanted", "unwanted")]
    documents = [_document(origin, record, encoder) for record in records]
    ids = [document.token_ids for document in documents]
    shortest = min(map(len, ids))
    differ = np.flatnonzero(ids[0][:shortest] != ids[1][:shortest])
    pair = Pair(*documents, start=int(differ[0]) if len(differ) else shortest)
    if pair.tokens == 0:
        raise BadRecord(
            origin, "has two answers that do not differ", "two texts, or other words of the assistant"
        )
    if not all(_counted(document, pair.start).any() for document in documents):
        raise BadRecord(
            origin,
            "has an answer that is empty, or the beginning of the other",
            "two answers of which neither begins with all of the other",
        )
    if pair.start == 0:
        raise BadRecord(
            origin, "has answers with nothing before them", "a prompt, or a tokenizer with a BOS token"
        )
    return pair


def _record(origin: str, prompt: Any, answer: Any, plain: bool) -> dict[str, Any]:
    """Prompt and answer as a corpus row: text end to end, or one conversation."""
    if plain:
        return {"text": prompt + answer}
    return {"messages": _messages(origin, prompt, "user") + _messages(origin, answer, "assistant")}


def _document(origin: str, record: dict[str, Any], encoder: DocumentTokenizer) -> Document:
    stats = CorpusStats()
    row = row_of(origin, record, ("text", "messages"), stats)
    document = next(encoder.documents([row], stats), None)
    if document is None:
        raise BadRecord(origin, "holds no text", EXAMPLE)
    return document


def _messages(origin: str, value: Any, role: str) -> list[Any]:
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list):
        raise BadRecord(origin, f"has a part of another type ({role})", EXAMPLE, type(value).__name__)
    return value


def _counted(document: Document, start: int) -> np.ndarray:
    """Bool mask over the tokens: those of the answer."""
    return (np.arange(len(document)) >= start) & np.isin(document.roles, _WRITTEN)
