"""From records to rows of token ids: what is learned, what is answered, where an answer begins."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from palimpsest.corpus import CorpusStats, Role
from palimpsest.corpus.formats import BadRecord
from palimpsest.corpus.rows import row_of
from palimpsest.corpus.tokenize import DocumentTokenizer
from palimpsest.errors import CorpusError
from palimpsest.options import CorpusOptions
from palimpsest.tune.rows import IGNORED, KtoRow, PairRow, PromptRow, TextRow

TAKEN = (
    *("prompt", "prompts", "completion", "completions", "completion_ids"),
    *("trainer_state", "log_extra", "log_metric", "environments"),
)
"""Columns that a reward function is not given, because trl calls it with arguments of these names."""

Text = str | list[Mapping[str, Any]]


@dataclass
class Counts:
    """What was left out of the data, and why."""

    rows: int = 0
    """Rows that were read."""

    long: int = 0
    """Rows that do not fit."""

    cut: int = 0
    """Texts that were cut at the maximal length."""

    alike: int = 0
    """Pairs whose two answers are the same."""

    nothing: int = 0
    """Texts without a token to learn."""

    bad: int = 0
    """Rows that cannot be read."""


class RowEncoder:
    """Turns records into rows of one kind.

    A text begins with the BOS where `Corpus` would put one. An answer in plain text ends with the tokenizer's
    end-of-text token, as trl has it; a conversation is what the chat template makes of it.

    Args:
        tokenizer: Of the model.
        options: How text is read.
        limit: Tokens that a row may have.
        answers_only: Learn the assistant's tokens of a text only.
        room: Tokens that are kept free behind a prompt that the model answers.
    """

    def __init__(
        self, tokenizer: Any, options: CorpusOptions, limit: int, *, answers_only: bool = False, room: int = 0
    ) -> None:
        self.tokenizer, self.limit, self.answers_only, self.room = tokenizer, limit, answers_only, room
        self.fields = (options.text_field, options.messages_field)
        self.counts = Counts()
        self._stats = CorpusStats()
        # Bad rows are counted here, with those of other kinds.
        self._documents = DocumentTokenizer(tokenizer, replace(options, skip_bad_rows=False), limit)

    def text(self, origin: str, record: Mapping[str, Any]) -> TextRow | None:
        """A row of `text`, of `messages`, or of `prompt` and `completion`; None where nothing is to be learned.

        Raises:
            BadRecord: It is none of them.
        """
        if record.get("completion") is not None and record.get("prompt") is not None:
            prompt, (answer,) = self._answers(origin, record, ("completion",))
            ids = (prompt + answer)[: self.limit]
            self.counts.cut += len(prompt) + len(answer) > self.limit
            labels = [IGNORED] * min(len(prompt), len(ids)) + ids[len(prompt) :]
        else:
            row = row_of(origin, record, self.fields, self._stats)
            before = self._stats.truncated_documents
            document = next(self._documents.documents([row], self._stats), None)
            self.counts.cut += self._stats.truncated_documents - before
            if document is None:
                raise BadRecord(origin, "holds no text", "text with at least one token")
            ids = document.token_ids.tolist()
            learned = document.roles == Role.ASSISTANT if self.answers_only else [True] * len(ids)
            labels = [token if on else IGNORED for token, on in zip(ids, learned, strict=True)]
        labels[0] = IGNORED
        if all(label == IGNORED for label in labels):
            self.counts.nothing += 1
            return None
        return TextRow(ids, labels)

    def pair(self, origin: str, record: Mapping[str, Any]) -> PairRow | None:
        """A row of `prompt`, `chosen` and `rejected`; None where it does not fit or prefers nothing.

        Raises:
            BadRecord: A field is missing, empty or of another type.
        """
        prompt, (chosen, rejected) = self._answers(origin, record, ("chosen", "rejected"))
        if chosen == rejected:
            self.counts.alike += 1
            return None
        if len(prompt) + max(len(chosen), len(rejected)) > self.limit:
            self.counts.long += 1
            return None
        return PairRow(prompt, chosen, rejected)

    def verdict(self, origin: str, record: Mapping[str, Any]) -> KtoRow | None:
        """A row of `prompt`, `completion` and `label`; None where it does not fit.

        Raises:
            BadRecord: A field is missing, empty or of another type.
        """
        label = _field(origin, record, "label")
        # A CSV file has no truth values.
        label = {"true": True, "false": False, "1": True, "0": False}.get(str(label).strip().lower(), label)
        if not isinstance(label, bool):
            raise BadRecord(origin, "has a label that is no verdict", "true or false", repr(label))
        prompt, (answer,) = self._answers(origin, record, ("completion",))
        if len(prompt) + len(answer) > self.limit:
            self.counts.long += 1
            return None
        return KtoRow(prompt, answer, label)

    def prompt(self, origin: str, record: Mapping[str, Any]) -> PromptRow | None:
        """A row with a `prompt`; None where no room is left for an answer.

        Raises:
            BadRecord: It has none.
        """
        text = self._text(origin, record, "prompt", role="user")
        ids = self._ids(text if isinstance(text, str) else self._render(origin, text, asking=True))
        if len(ids) + self.room > self.limit:
            self.counts.long += 1
            return None
        return PromptRow(ids, text, {k: v for k, v in record.items() if k not in TAKEN})

    def _answers(
        self, origin: str, record: Mapping[str, Any], names: tuple[str, ...]
    ) -> tuple[list[int], list[list[int]]]:
        """Tokens of the prompt and of each answer to it; where tokens span the border, they are the answer's."""
        prompt = self._text(origin, record, "prompt", role="user")
        answers = [self._text(origin, record, name, role="assistant") for name in names]
        if isinstance(prompt, str) and all(isinstance(one, str) for one in answers):
            end = self.tokenizer.eos_token or ""
            whole = [prompt + one + ("" if one.endswith(end) else end) for one in map(str, answers)]
            asked = prompt
        else:
            before = _messages(prompt, "user")
            whole = [self._render(origin, [*before, *_messages(one, "assistant")]) for one in answers]
            asked = self._render(origin, before, asking=True)
        ids = [self._ids(one) for one in whole]
        prompt_ids = self._ids(asked)
        border = min(_shared(prompt_ids, one) for one in ids)
        if border == 0 or any(len(one) == border for one in ids):
            raise BadRecord(
                origin,
                "has an answer that cannot be told from its prompt",
                "a prompt that is rendered alike with and without its answer",
            )
        return ids[0][:border], [one[border:] for one in ids]

    def _text(self, origin: str, record: Mapping[str, Any], name: str, *, role: str) -> Text:
        """Plain text, or checked messages."""
        value = _field(origin, record, name)
        if isinstance(value, str):
            if not value.strip():
                raise BadRecord(origin, f"has an empty {name}", f"a {name} with text")
            # Half a surrogate pair, which JSON can hold, has no tokens.
            return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        try:
            row = row_of(origin, {"messages": value}, ("", "messages"), self._stats)
        except BadRecord as bad:
            expected = bad.expected or "text or a list of messages"
            raise BadRecord(origin, f"has a {name} that cannot be read", expected, bad.found) from bad
        messages = list(row.messages or ())
        if not any(message["content"].strip() for message in messages):
            raise BadRecord(origin, f"has an empty {name}", f"a {name} with text")
        return messages

    def _render(self, origin: str, messages: list[Mapping[str, Any]], *, asking: bool = False) -> str:
        from jinja2.exceptions import TemplateError

        if getattr(self.tokenizer, "chat_template", None) is None:
            raise CorpusError(
                f"{origin.rstrip(',')} holds a conversation, but the tokenizer has no chat template",
                expected="a tokenizer with a chat_template, or rows with plain text",
            )
        try:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=asking)
        except (TemplateError, ValueError, TypeError, KeyError, IndexError) as error:
            raise BadRecord(origin, f"does not fit the tokenizer's chat template ({error})") from error

    def _ids(self, text: str) -> list[int]:
        ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        bos = self._documents.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]


def _field(origin: str, record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        found = ", ".join(map(str, record)) or "an empty object"
        raise BadRecord(origin, f"has no {name}", f"a field '{name}'", f"the fields {found}")
    return record[name]


def _messages(text: Text, role: str) -> list[Mapping[str, Any]]:
    return [{"role": role, "content": text}] if isinstance(text, str) else text


def _shared(a: list[int], b: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
