"""Training data: rows of token ids to learn from, rows held out, and the text that must stay as it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from palimpsest.corpus import Corpus
from palimpsest.corpus.formats import BadRecord
from palimpsest.errors import CorpusError
from palimpsest.log import log
from palimpsest.models import LanguageModel
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data.encode import Counts, RowEncoder
from palimpsest.tune.data.holdout import LEAST, hold_out_rows
from palimpsest.tune.data.records import Records, read_records
from palimpsest.tune.rows import IGNORED, Row, TextRow, evenly

GENERAL_ROWS = 20
"""So many times `eval_rows` are read of each source of general text; those that are measured are spread over them."""

PLAIN = ("all", "first")
"""Scopes that need no prompt and answer to be told apart."""


@dataclass
class TuneData:
    """What a run learns from and is measured on.

    Attributes:
        train: Rows to learn from, in the order of the files.
        heldout: Rows of the same kind that are not trained on.
        retain: Text whose predictions unlearn keeps.
        retain_heldout: The same, not trained on.
        general: Text on which the divergence from the base is measured.
        limit: Tokens that a row may have.
        notes: What was left out, in sentences for the user.
        inputs: What the manifest says of the files.
    """

    train: list[Any]
    heldout: list[Any]
    retain: list[TextRow]
    retain_heldout: list[TextRow]
    general: list[TextRow]
    limit: int
    notes: list[str] = field(default_factory=list)
    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)


def load_data(config: TuneConfig, model: LanguageModel) -> TuneData:
    """Read and tokenise everything that a run needs, and hold out a part of it.

    Rows that do not fit into the context or `max_length` are left out (pairs, verdicts, prompts) or cut (text), and
    counted. Without held-out data a share of the rows is held out, two at least.

    Raises:
        CorpusError: A file or a row cannot be read; too little is left; the adapter's scope needs answers and a row has
            none.
    """
    asked = config.objective
    limit = min(config.corpora.max_length, model.context or config.corpora.max_length)
    data = TuneData([], [], [], [], [], limit)

    def read(name: str, sources: tuple[str, ...], kind: str, most: int | None = None) -> list[Any]:
        if not sources:
            return []
        rows, counts = _read(config, model.tokenizer, sources, kind, limit, most)
        data.notes += [f"{name}: {note}" for note in _notes(counts, kind, limit)]
        if counts.cut:
            log.info("%s: %d of %d rows are cut at %d tokens.", name, counts.cut, counts.rows, limit)
        data.inputs[name] = Corpus(list(sources), model.tokenizer, options=config.corpora).fingerprint()
        if not rows:
            raise CorpusError(
                f"No row of {', '.join(sources)} can be used",
                found="; ".join(_notes(counts, kind, limit)) or "no rows",
                fix="Give shorter rows, or raise --max-length" if counts.long else None,
            )
        return rows

    kind = KINDS[asked.objective]
    data.train = read("data", asked.data, kind)
    data.heldout = read("eval_data", asked.eval_data, kind)
    data.retain, data.retain_heldout = hold_out_rows(read("retain", asked.retain, "text"), asked.hold_out)
    general = read("general", asked.general, "general", GENERAL_ROWS * asked.eval_rows)
    data.general = evenly(general, asked.eval_rows)
    if not data.heldout:
        data.train, data.heldout = hold_out_rows(data.train, asked.hold_out)
    _enough(config, data)
    if config.adapter.scope != "all":
        _need_prompts(config, data)
    if data.general and config.adapter.scope not in PLAIN:
        data.notes.append(
            f"general: nothing is measured with --scope {config.adapter.scope}, because plain text does not say which "
            "of its tokens are prompt and which are answer"
        )
    return data


KINDS = {
    "sft": "text",
    "unlearn": "text",
    "dpo": "pair",
    "orpo": "pair",
    "simpo": "pair",
    "kto": "verdict",
    "grpo": "prompt",
}
"""Which kind of row an objective reads: a method of `RowEncoder`."""


def _read(
    config: TuneConfig, tokenizer: Any, sources: tuple[str, ...], kind: str, limit: int, most: int | None
) -> tuple[list[Row], Counts]:
    options = config.corpora
    encoder = RowEncoder(
        tokenizer,
        options,
        limit,
        answers_only=config.objective.answers_only and kind == "text",
        room=config.objective.completion_length if kind == "prompt" else 0,
    )
    encode: Callable[[str, Mapping[str, Any]], Row | None] = getattr(
        encoder, "text" if kind == "general" else kind
    )
    rows: list[Row] = []
    for origin, record in _records(sources, encoder, options.split, most):
        encoder.counts.rows += 1
        try:
            if isinstance(record, BadRecord):
                raise record
            if not isinstance(record, Mapping):
                expected = 'an object such as {"prompt": "…"}'
                raise BadRecord(origin, "is no object", expected, type(record).__name__)
            row = encode(origin, record)
        except BadRecord as bad:
            if not options.skip_bad_rows:
                raise bad.error() from None
            encoder.counts.bad += 1
            continue
        if row is not None:
            rows.append(row)
        if len(rows) == options.max_documents:
            break
    return rows, encoder.counts


def _records(sources: tuple[str, ...], encoder: RowEncoder, split: str, most: int | None) -> Records:
    """The first `most` of each source, or all."""
    for source in sources:
        yield from islice(read_records([source], encoder.fields, split), most)


def _notes(counts: Counts, kind: str, limit: int) -> list[str]:
    of = f"of {counts.rows} rows"
    said = {
        f"{counts.long} {of} are longer than {limit} tokens, "
        + ("room for the completion included, " if kind == "prompt" else "prompt and answer, ")
        + "and are left out": counts.long,
        f"{counts.alike} {of} have the same chosen and rejected answer and are left out": counts.alike,
        f"{counts.nothing} {of} hold no token to learn and are left out": counts.nothing,
        f"{counts.bad} {of} cannot be read and are left out": counts.bad,
    }
    return [text for text, count in said.items() if count]


def _enough(config: TuneConfig, data: TuneData) -> None:
    if config.objective.objective == "kto" and len({row.label for row in data.train}) < 2:
        raise CorpusError("All verdicts are the same", expected="rows with label true and with label false")
    parts = [
        ("to train on", data.train, "--data"),
        ("held out", data.heldout, "--eval-data" if config.objective.eval_data else "--data"),
    ]
    if config.objective.retain:
        parts += [
            ("to retain", data.retain, "--retain"),
            ("to retain, held out", data.retain_heldout, "--retain"),
        ]
    for what, rows, option in parts:
        if len(rows) < LEAST:
            raise CorpusError(
                f"There are too few rows {what}",
                expected=f"at least {LEAST}",
                found="; ".join([str(len(rows)), *data.notes]),
                fix=f"Give {option} with more rows: those with one prompt (or text) are never on both sides",
            )


def _need_prompts(config: TuneConfig, data: TuneData) -> None:
    """A text of which everything is learned does not say where its prompt ends."""
    for row in (*data.train, *data.heldout):
        if isinstance(row, TextRow) and all(label != IGNORED for label in row.labels[1:]):
            raise CorpusError(
                f"--scope {config.adapter.scope} needs to know what is prompt and what is answer",
                expected="rows of prompt and completion, or --answers-only with messages (or --dialogue marks)",
                found="text of which every token is learned",
            )


__all__ = ["KINDS", "PLAIN", "RowEncoder", "TuneData", "hold_out_rows", "load_data"]
