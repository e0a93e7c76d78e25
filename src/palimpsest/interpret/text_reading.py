"""One text of the reader's own: which latents fire on each of its tokens, in both models, and each model's loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.corpus import CorpusStats, Document
from palimpsest.corpus.formats import BadRecord
from palimpsest.corpus.rows import row_of
from palimpsest.corpus.tokenize import DocumentTokenizer
from palimpsest.dictionaries import Codes
from palimpsest.display.notebook import Card, Rich, Table
from palimpsest.display.text import visible_token
from palimpsest.errors import ConfigError
from palimpsest.harvest.stream import token_loss
from palimpsest.interpret.examples.vocabulary import token_texts
from palimpsest.interpret.subject import Subject
from palimpsest.options import CorpusOptions

LONGEST = 1024
"""Tokens of a text that are read at most."""

LONGEST_TEXT = 100_000
"""Characters that are looked at, at most."""

Firings = list[list[tuple[int, float]]]


@dataclass(frozen=True)
class TextReading(Rich):
    """What the latents say of a text.

    Attributes:
        tokens: The text's tokens as they are shown.
        value: The latents that fire on each token with their activation, strongest first; none on a leading BOS.
        base: The same of the base's own activations, None where the dictionary gives none.
        tuned: The same of the tuned model's.
        loss_base: Nats of each token given what precedes it; None for the first.
        loss_tuned: The same of the tuned model; None where there is none.
        cut: Whether the text went on.
    """

    tokens: list[str]
    value: Firings
    base: Firings | None
    tuned: Firings | None
    loss_base: list[float | None]
    loss_tuned: list[float | None] | None
    cut: bool = False

    def to_dict(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def _card(self) -> Card:
        sides = {"latents": self.value, "in the base": self.base, "in the tuned": self.tuned}
        losses = {"loss, base": self.loss_base, "loss, tuned": self.loss_tuned}
        columns = {
            name: [_strongest(one) for one in rows] for name, rows in sides.items() if rows is not None
        }
        columns |= {name: rows for name, rows in losses.items() if rows is not None}
        rows = list(zip(map(visible_token, self.tokens), *columns.values(), strict=True))
        notes = ["The text went on; this is its beginning."] if self.cut else []
        return Card(
            "A text read", facts={"tokens": len(rows)}, tables=[Table(("token", *columns), rows)], notes=notes
        )


def _strongest(firing: list[tuple[int, float]]) -> str:
    return ", ".join(f"{latent} ({activation:.3g})" for latent, activation in firing[:4])


@torch.inference_mode()
def read_text(
    subject: Subject,
    text: str | Sequence[Mapping[str, Any]],
    *,
    top: int = 8,
    latents: Sequence[int] | None = None,
    losses: bool = True,
) -> TextReading:
    """Read a text through the models and the dictionary.

    Args:
        subject: The dictionary and its models.
        text: Plain text, or the messages of a conversation.
        top: Latents that are named for each token.
        latents: Name these only, wherever they fire.
        losses: Run the models to their end for each token's loss.

    Raises:
        ConfigError: There is no text, no such latent, or a message that is none.
        CorpusError: The tokenizer cannot render the conversation.
        NumericsError: A model gives NaN or infinity.
    """
    _check_latents(subject, latents)
    document, cut = _document(subject, text)
    ids = torch.from_numpy(document.token_ids).long()
    # A leading BOS holds activations unlike all others, which no dictionary of text was trained on.
    first = int(bool(document.special[0]) and len(ids) > 1)
    acts, loss = [], []
    for side in subject.sides:
        model = subject.model(side)
        reading = model.read(ids[None], [subject.site], head=losses)
        acts.append(reading.acts[subject.site][0, first:].to(subject.dictionary.device, torch.float32))
        if reading.head_input is not None:
            nats = token_loss(model.head, reading.head_input[0, :-1], ids[1:])
            loss.append([None, *nats.tolist()])
        else:
            loss.append([None] * len(ids))
    silent: Firings = [[]] * first
    signals = subject.signals(torch.stack(acts, 1))
    base, tuned = (
        None if one is None else silent + _firings(one, top, latents) for one in (signals.base, signals.tuned)
    )
    return TextReading(
        token_texts(subject.tokenizer, document.token_ids.tolist()),
        silent + _firings(signals.value, top, latents),
        base,
        tuned,
        loss[0],
        loss[1] if len(loss) > 1 else None,
        cut,
    )


def _check_latents(subject: Subject, latents: Sequence[int] | None) -> None:
    n = subject.dictionary.n_latents
    unknown = [one for one in latents or () if not 0 <= one < n]
    if unknown:
        raise ConfigError("There is no such latent", expected=f"0 to {n - 1}", found=unknown[0])


def _document(subject: Subject, text: str | Sequence[Mapping[str, Any]]) -> tuple[Document, bool]:
    """The text as one sequence of tokens, and whether it was cut."""
    context = subject.model(subject.sides[0]).context
    longest = min(LONGEST, context or LONGEST)
    plain, stats = isinstance(text, str), CorpusStats()
    cut = plain and len(text) > LONGEST_TEXT
    record = {"text": text[:LONGEST_TEXT]} if plain else {"messages": list(text)}
    try:
        row = row_of("The text" if plain else "The conversation", record, ("text", "messages"), stats)
    except BadRecord as bad:
        raise ConfigError(str(bad), expected=bad.expected, found=bad.found) from bad
    tokenizer = DocumentTokenizer(subject.tokenizer, CorpusOptions(), longest)
    documents = list(tokenizer.documents([row], stats))
    if not documents:
        raise ConfigError("There is no text to read", expected="at least one token")
    return documents[0], cut or stats.truncated_documents > 0


def _firings(codes: Codes, top: int, latents: Sequence[int] | None) -> Firings:
    """Latents and activations of each token, strongest first."""
    if latents is not None:
        return _of_latents(codes, torch.tensor(sorted(set(latents)), device=codes.indices.device))
    best = codes.top(max(top, 0))
    rows = zip(best.indices.tolist(), best.values.float().tolist(), best.length.tolist(), strict=True)
    return [list(zip(index[:length], value[:length], strict=True)) for index, value, length in rows]


def _of_latents(codes: Codes, wanted: Int[Tensor, " wanted"]) -> Firings:
    found: Firings = [[] for _ in range(codes.tokens)]
    kept = (torch.isin(codes.indices, wanted) & (codes.values > 0)).nonzero().squeeze(1)
    rows: Float[Tensor, " kept"] | Tensor = codes.rows()[kept]
    entries = zip(
        rows.tolist(), codes.indices[kept].tolist(), codes.values[kept].float().tolist(), strict=True
    )
    for token, latent, value in entries:
        found[token].append((latent, value))
    return found
