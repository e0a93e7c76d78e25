"""From rows to documents: token ids with a role and a special flag for every token."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import islice
from typing import Any

import numpy as np

from palimpsest.corpus.formats import BadRecord
from palimpsest.corpus.rows import ROLE_NAMES, CorpusStats, Row
from palimpsest.errors import CorpusError
from palimpsest.options import CorpusOptions

_MARK = re.compile("\ue000(\\d+)\ue001")
_BATCH = 64
_CHARS_PER_TOKEN = 16


class Role(IntEnum):
    """Who wrote a token; TEMPLATE is chat-template markup, TEXT a row without roles."""

    TEXT = 0
    SYSTEM = 1
    USER = 2
    ASSISTANT = 3
    TOOL = 4
    TEMPLATE = 5


@dataclass(frozen=True, slots=True)
class Document:
    """One document as one sequence.

    Attributes:
        index: Its number in the corpus, from 0, without the dropped rows.
        token_ids: int32 [seq].
        roles: uint8 [seq], values of `Role`.
        special: bool [seq], BOS, EOS and the tokenizer's other control tokens.
    """

    index: int
    token_ids: np.ndarray
    roles: np.ndarray
    special: np.ndarray

    def __len__(self) -> int:
        """Tokens of the document."""
        return len(self.token_ids)


@dataclass(frozen=True, slots=True)
class _Rendered:
    """A row's text and, for conversations, the role of each character."""

    text: str
    char_roles: np.ndarray | None


class DocumentTokenizer:
    """Turns rows into documents with one tokenizer.

    Args:
        tokenizer: A `transformers` tokenizer; conversations need a fast one with a chat template.
        options: Lengths, roles and masks.
        max_length: Overrides the option; None leaves documents whole.

    Raises:
        CorpusError: When a BOS is asked for that the tokenizer does not have, or dialogue marks are given for one that
            says not where its tokens stand.
    """

    def __init__(self, tokenizer: Any, options: CorpusOptions, max_length: int | None) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        self.answer_chars, self.skip_bad_rows = options.answer_chars, options.skip_bad_rows
        self.bos = tokenizer.bos_token_id if options.prepend_bos is not False else None
        if options.prepend_bos and self.bos is None:
            raise CorpusError(
                "The tokenizer has no BOS token",
                expected="a tokenizer with a bos_token, since prepend_bos is set",
                fix="Leave prepend_bos out",
            )
        self._special = special_ids(tokenizer)
        self.dialogue = options.dialogue
        if self.dialogue:
            self._require_offsets("The corpus has dialogue marks", "leave --dialogue out")

    def documents(self, rows: Iterable[Row], stats: CorpusStats) -> Iterator[Document]:
        """Documents of the rows, in order; rows without a token of their own are dropped and counted.

        Raises:
            CorpusError: When the tokenizer cannot render or place a conversation.
        """
        rows = iter(rows)
        while chunk := list(islice(rows, _BATCH)):
            rendered = [one for row in chunk if (one := self._render(row, stats)) is not None]
            for ids, roles in self._encode(rendered):
                document = self._document(ids, roles, stats)
                if document is not None:
                    yield document

    def _document(self, ids: np.ndarray, roles: np.ndarray, stats: CorpusStats) -> Document | None:
        has_bos = self.bos is not None and len(ids) > 0 and ids[0] == self.bos
        if len(ids) <= has_bos:
            stats.empty_documents += 1
            return None
        if self.bos is not None and not has_bos:
            chat = bool((roles == Role.TEMPLATE).any())
            ids = np.concatenate([np.array([self.bos], np.int32), ids])
            roles = np.concatenate([np.array([Role.TEMPLATE if chat else Role.TEXT], np.uint8), roles])
        if self.max_length is not None and len(ids) > self.max_length:
            stats.truncated_documents += 1
            ids, roles = ids[: self.max_length].copy(), roles[: self.max_length].copy()
        document = Document(stats.documents, ids, roles, np.isin(ids, self._special))
        stats.documents += 1
        stats.tokens += len(ids)
        return document

    def _encode(self, rendered: Sequence[_Rendered]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(token ids, roles) of each text; plain texts and conversations are tokenised together."""
        if not rendered:
            return
        texts = [self._head(one.text) for one in rendered]
        offsets = any(one.char_roles is not None for one in rendered)
        encoded = self._call(texts, offsets)
        for i, one in enumerate(rendered):
            ids = encoded["input_ids"][i]
            spans = encoded["offset_mapping"][i] if offsets else None
            if len(texts[i]) < len(one.text) and len(ids) < 2 * (self.max_length or 0):
                whole = self._call([one.text], offsets)
                ids, spans = whole["input_ids"][0], whole["offset_mapping"][0] if offsets else None
            if one.char_roles is None or spans is None:
                roles = np.full(len(ids), Role.TEXT, np.uint8)
            else:
                roles = token_roles(spans, one.char_roles)
            yield np.asarray(ids, np.int32), roles

    def _head(self, text: str) -> str:
        # A book of which 512 tokens are kept: far more characters than those can hold are enough.
        return text if self.max_length is None else text[: _CHARS_PER_TOKEN * self.max_length + 1024]

    def _call(self, texts: list[str], offsets: bool) -> Any:
        extra = {"return_offsets_mapping": True} if offsets else {}
        return self.tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **extra
        )

    def _render(self, row: Row, stats: CorpusStats) -> _Rendered | None:
        if row.messages is None:
            text = row.text or ""
            return _Rendered(text, dialogue_roles(text, self.dialogue) if self.dialogue else None)
        self._require_chat(row)
        messages = [self._cut(message) for message in row.messages]
        try:
            text = self._template(messages)
            spans = self._spans(messages, text)
        except BadRecord as bad:
            if not self.skip_bad_rows:
                raise BadRecord(row.origin, str(bad)).error() from bad
            stats.bad_rows += 1
            return None
        roles = np.full(len(text), Role.TEMPLATE, np.uint8)
        for message, span in zip(messages, spans, strict=True):
            if span is None:
                stats.unplaced_messages += 1
            else:
                roles[span[0] : span[1]] = Role[ROLE_NAMES[message["role"].lower()].upper()]
        return _Rendered(text, roles)

    def _require_chat(self, row: Row) -> None:
        if getattr(self.tokenizer, "chat_template", None) is None:
            raise CorpusError(
                f"{row.origin} holds a conversation, but the tokenizer has no chat template",
                expected="a tokenizer with a chat_template, or rows with plain text",
                fix="Take the tokenizer of a chat model, or write the rows as text",
            )
        self._require_offsets(f"{row.origin} holds a conversation", "write the rows as text")

    def _require_offsets(self, what: str, otherwise: str) -> None:
        if not getattr(self.tokenizer, "is_fast", False):
            raise CorpusError(
                f"{what}, but the tokenizer gives no character offsets",
                expected="a fast tokenizer (tokenizer.json)",
                found=type(self.tokenizer).__name__,
                fix=f"Load it with use_fast=True, or {otherwise}",
            )

    def _cut(self, message: Mapping[str, Any]) -> dict[str, Any]:
        message = dict(message)
        if self.answer_chars is not None and ROLE_NAMES[message["role"].lower()] == "assistant":
            message["content"] = message["content"][: self.answer_chars]
        return message

    def _template(self, messages: list[dict[str, Any]]) -> str:
        from jinja2.exceptions import TemplateError

        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise BadRecord("", f"does not fit the tokenizer's chat template ({error})") from error

    def _spans(self, messages: list[dict[str, Any]], text: str) -> list[tuple[int, int] | None]:
        contents = [message["content"] for message in messages]
        marks = [_mark(i) if content.strip() else "" for i, content in enumerate(contents)]
        marked = [message | {"content": mark} for message, mark in zip(messages, marks, strict=True)]
        return align_contents(text, self._template(marked), contents)


def _mark(index: int) -> str:
    return f"\ue000{index}\ue001"


def special_ids(tokenizer: Any) -> np.ndarray:
    """Ids of BOS, EOS, padding and every added token flagged as special, int64 and sorted.

    `all_special_ids` alone misses the turn markers of several chat models, which are only added tokens.
    """
    added = getattr(tokenizer, "added_tokens_decoder", {})
    flagged = {index for index, token in added.items() if getattr(token, "special", False)}
    return np.array(sorted(flagged | set(tokenizer.all_special_ids)), np.int64)


def dialogue_roles(text: str, marks: Sequence[str]) -> np.ndarray | None:
    """Role of each character of a dialogue in plain text, uint8; None for a text without any mark.

    What follows a mark, up to the next one, is the USER's after the first of `marks` and the ASSISTANT's after the
    second. The marks, with the whitespace right before them, are TEMPLATE; what stands before the first one is TEXT.
    """
    # Of two marks that begin alike the longer is meant.
    either = "|".join(re.escape(mark) for mark in sorted(marks, key=len, reverse=True))
    found = list(re.finditer(either, text))
    if not found:
        return None
    roles = np.full(len(text), Role.TEXT, np.uint8)
    ends = [*(match.start() for match in found[1:]), len(text)]
    for match, end in zip(found, ends, strict=True):
        start = match.start()
        while start and text[start - 1].isspace():
            start -= 1
        roles[start : match.end()] = Role.TEMPLATE
        roles[match.end() : end] = Role.USER if match[0] == marks[0] else Role.ASSISTANT
    return roles


def align_contents(text: str, skeleton: str, contents: Sequence[str]) -> list[tuple[int, int] | None]:
    """Where each message's content stands in the rendered conversation.

    Args:
        text: The conversation as the template renders it.
        skeleton: The same with the mark of `_mark` in the place of each content that is not blank.
        contents: The contents, which the template may have trimmed.

    Returns:
        Character spans; an empty span for a blank content, None where the template changed or dropped it.
    """
    markup = _MARK.split(skeleton)
    if not text.startswith(markup[0]):
        return _search_contents(text, contents)
    spans: list[tuple[int, int] | None] = [None if content.strip() else (0, 0) for content in contents]
    begin = len(markup[0])
    for place in range(1, len(markup), 2):
        i, after, last = int(markup[place]), markup[place + 1], place + 2 == len(markup)
        for content in (contents[i], contents[i].strip(), contents[i].rstrip(), contents[i].lstrip()):
            end = begin + len(content)
            fits = text[end:] == after if last else text.startswith(after, end)
            if fits and text.startswith(content, begin):
                spans[i], begin = (begin, end), end + len(after)
                break
        else:
            return _search_contents(text, contents)
    return spans


def _search_contents(text: str, contents: Sequence[str]) -> list[tuple[int, int] | None]:
    """Spans by plain search in order, for templates whose markup depends on the contents."""
    spans: list[tuple[int, int] | None] = []
    cursor = 0
    for content in contents:
        stripped = content.strip()
        start = text.find(stripped, cursor) if stripped else cursor
        spans.append(None if start < 0 else (start, start + len(stripped)))
        cursor = cursor if start < 0 else start + len(stripped)
    return spans


def token_roles(offsets: Sequence[tuple[int, int]], char_roles: np.ndarray) -> np.ndarray:
    """Role of each token, uint8 [seq]: that of the first content character it covers, else TEMPLATE.

    A token across a border (a space of the markup merged with a word) therefore counts as content.
    """
    size = len(char_roles)
    spans = np.asarray(offsets, np.int64).reshape(-1, 2)
    if size == 0 or len(spans) == 0:
        return np.full(len(spans), Role.TEMPLATE, np.uint8)
    # Tokenizers that trim offsets report a token of blanks as an empty span behind the blank.
    start, end = np.minimum(spans[:, 0], spans[:, 1] - 1).clip(0, size - 1), spans[:, 1]
    place = np.where(char_roles != Role.TEMPLATE, np.arange(size), size)
    first = np.minimum.accumulate(place[::-1])[::-1][start]
    inside = first < end
    return np.where(inside, char_roles[np.minimum(first, size - 1)], Role.TEMPLATE).astype(np.uint8)
