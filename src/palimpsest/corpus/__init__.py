"""Text as the audits read it: documents with roles and masks, in batches, streamed."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palimpsest.artifacts import input_entry
from palimpsest.corpus.batches import Masking, TokenBatch, bucketed, packed
from palimpsest.corpus.formats import kind_of
from palimpsest.corpus.rows import CorpusStats, HubId, Row, parse_source, read_rows
from palimpsest.corpus.tokenize import (
    Document,
    DocumentTokenizer,
    Role,
    align_contents,
    special_ids,
    token_roles,
)
from palimpsest.display.notebook import Card, Rich
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.hub import hub_errors
from palimpsest.options import CorpusOptions

__all__ = [
    "Corpus",
    "CorpusStats",
    "Document",
    "Role",
    "Row",
    "TokenBatch",
    "align_contents",
    "read_rows",
    "special_ids",
    "token_roles",
]


class Corpus(Rich):
    """A stream of documents that can be read again and again.

    Args:
        source: A file, a folder, a saved data set or a hub data set (`owner/name[:config][@revision]`), or
            several, of which a row is taken in turn; `read_rows` lists the kinds.
        tokenizer: A `transformers` tokenizer.
        name: What reports call the corpus; by default the file's name without its ending.
        options: How rows are read and which tokens count.
        **changes: Single fields of `CorpusOptions`, e.g. `max_length=256`.

    Raises:
        CorpusError: When the source does not exist. What is wrong inside it is raised while it is read.
        ConfigError: When an option makes no sense.
    """

    def __init__(
        self,
        source: str | Path | Sequence[str | Path],
        tokenizer: Any,
        *,
        name: str | None = None,
        options: CorpusOptions | None = None,
        **changes: Any,
    ) -> None:
        self.sources = [source] if isinstance(source, str | Path) else list(source)
        if not self.sources:
            raise CorpusError(
                "A corpus needs a source", expected="a file, a folder or a data set", found="none"
            )
        self._parsed = [parse_source(one) for one in self.sources]
        self.tokenizer = tokenizer
        self.options = replace(options or CorpusOptions(), **changes)
        self.name = name or _name(self._parsed)
        self.stats = CorpusStats()
        _check(self.options)
        self.masking = Masking(_pad_id(tokenizer), _roles(self.options.roles), self.options.all_positions)

    def __repr__(self) -> str:
        """The name and where it comes from."""
        return f"Corpus({self.name!r}, {', '.join(map(str, self.sources))})"

    def _card(self) -> Card:
        options, read = self.options, vars(self.stats) if self.stats.documents else {}
        facts = {
            "sources": [str(one) for one in self.sources],
            "longest document": options.max_length,
            "documents at most": options.max_documents,
            "roles": options.roles,
            "all positions": options.all_positions or None,
            **{f"read: {name.replace('_', ' ')}": count for name, count in read.items() if count},
        }
        return Card("Corpus", self.name, facts=facts)

    def documents(self) -> Iterator[Document]:
        """The documents, cut at `max_length`; `stats` counts this pass.

        Raises:
            CorpusError: When a row cannot be read, or when there is no document at all.
        """
        return self._pass(self.options.max_length)

    def _pass(self, max_length: int | None) -> Iterator[Document]:
        options, stats = self.options, CorpusStats()
        self.stats = stats
        rows = read_rows(
            self.sources,
            text_field=options.text_field,
            messages_field=options.messages_field,
            split=options.split,
            skip_bad_rows=options.skip_bad_rows,
            stats=stats,
        )
        encoder = DocumentTokenizer(self.tokenizer, options, max_length)
        for document in encoder.documents(rows, stats):
            yield document
            if document.index + 1 == options.max_documents:
                return
        if stats.documents == 0:
            raise CorpusError(
                f"The corpus {self.name} holds no rows with text",
                expected="at least one document",
                found=f"{stats.empty_documents} empty and {stats.bad_rows} unreadable rows",
                fix=f"Check the file and the fields '{options.text_field}' and '{options.messages_field}'",
            )

    def batches(self, tokens_per_batch: int = 4096, window: int = 512) -> Iterator[TokenBatch]:
        """Batches for audits: one document is one sequence, of similar lengths, deterministic.

        Args:
            tokens_per_batch: Tokens of a batch at most, padding included; a longer document stands alone.
            window: Documents among which lengths are sorted, and that are held in memory.

        Raises:
            CorpusError: As `documents`, and when no token is left to measure.
        """
        return self._checked(bucketed(self.documents(), self.masking, tokens_per_batch, window))

    def blocks(self, block_length: int, batch_size: int = 16, epochs: int | None = 1) -> Iterator[TokenBatch]:
        """Packed blocks for dictionary training: documents end to end, none cut at `max_length`.

        Args:
            block_length: Tokens of a block.
            batch_size: Blocks of a batch.
            epochs: Passes over the corpus; None repeats it without end.

        Raises:
            CorpusError: As `batches`.
        """
        bos = self.tokenizer.bos_token_id if self.options.prepend_bos is not False else None
        stream = packed(
            self._measured_pass,
            self.masking,
            block_length,
            batch_size=batch_size,
            epochs=epochs,
            bos_id=bos,
        )
        return self._checked(stream)

    def _measured_pass(self) -> Iterator[Document]:
        """One pass that ends in an error where no token is measured: an endless stream would go on for ever."""
        kept = False
        for document in self._pass(None):
            kept = kept or bool(self.masking.keep(document.roles, document.special).any())
            yield document
        self._require_kept(kept)

    def _checked(self, batches: Iterator[TokenBatch]) -> Iterator[TokenBatch]:
        kept = False
        for batch in batches:
            kept = kept or bool(batch.keep.any())
            yield batch
        self._require_kept(kept)

    def _require_kept(self, kept: bool) -> None:
        if not kept:
            roles = self.options.roles
            raise CorpusError(
                f"The corpus {self.name} has no token to measure",
                expected=f"tokens of the roles {', '.join(roles)}"
                if roles
                else "tokens that are not special",
                found=f"{self.stats.tokens} tokens, none of them such",
                fix="Choose other roles, or measure all positions",
            )

    def fingerprint(self) -> dict[str, Any]:
        """What the manifest says of the source: path and hash, or id and revision of a hub data set."""
        entries = [_hub_entry(one) if isinstance(one, HubId) else input_entry(one) for one in self._parsed]
        if len(entries) == 1:
            return entries[0]
        joined = hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()
        return {"path": ", ".join(str(entry["path"]) for entry in entries), "sha256": joined}


def _hub_entry(source: HubId) -> dict[str, Any]:
    """The id with the commit that `revision` stands for, as far as the hub can be asked."""
    from huggingface_hub import HfApi

    path = source.name + (f":{source.config}" if source.config else "")
    try:
        commit = HfApi().dataset_info(source.name, revision=source.revision).sha
    except hub_errors():
        commit = source.revision
    return {"path": path, "revision": commit, "sha256": None}


def _name(sources: Sequence[Path | HubId]) -> str:
    first = sources[0]
    if isinstance(first, HubId):
        name = "-".join(filter(None, (first.name.split("/")[-1], first.config)))
    elif first.is_file() and kind_of(first):
        name = Path(first.name.removesuffix(".gz")).stem
    else:
        name = first.resolve().name
    return name if len(sources) == 1 else f"{name}+{len(sources) - 1}"


def _pad_id(tokenizer: Any) -> int:
    known = (one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id) if one is not None)
    return next(known, 0)


def _roles(names: Sequence[str] | None) -> tuple[Role, ...] | None:
    if names is None:
        return None
    known = [role.name.lower() for role in Role]
    unknown = [name for name in names if name.lower() not in known]
    if unknown or not names:
        raise ConfigError(
            "There is no such role",
            expected="one of " + ", ".join(known),
            found=", ".join(unknown) or "no role",
        )
    return tuple(Role[name.upper()] for name in names)


def _check(options: CorpusOptions) -> None:
    if options.all_positions and options.roles:
        raise ConfigError(
            "All positions and single roles contradict each other",
            found=f"roles {', '.join(options.roles)} with all positions (--legacy measures all positions)",
            fix="Leave one of them out",
        )
    if options.dialogue:
        _check_dialogue(options)
    sizes = {"max_length": 2, "max_documents": 1, "answer_chars": 1}
    for name, least in sizes.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ConfigError(f"{name} is too small", expected=f"at least {least}", found=value)


def _check_dialogue(options: CorpusOptions) -> None:
    marks = options.dialogue
    if len(marks) != 2 or marks[0] == marks[1] or not all(mark.strip() for mark in marks):
        raise ConfigError(
            "A dialogue has two marks",
            expected="that of the user and that of the assistant, as in --dialogue 'User:' 'Assistant:'",
            found=", ".join(map(repr, marks)),
        )
    if options.answer_chars is not None:
        raise ConfigError(
            "answer_chars cuts messages, not dialogues in plain text",
            fix="Leave one of --answer-chars and --dialogue out",
        )
