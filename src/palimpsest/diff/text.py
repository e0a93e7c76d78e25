"""The text of a diff: named corpora, a share of the tokens from each, and which of their tokens play which part."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple
from zlib import crc32

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.corpus import Corpus, Document, Role, TokenBatch, special_ids
from palimpsest.corpus.batches import bucketed
from palimpsest.corpus.named import open_named
from palimpsest.errors import CorpusError, PairError
from palimpsest.harvest.stream import check_finite, kept_rows
from palimpsest.models import SIDES, ModelPair
from palimpsest.options import CorpusOptions

Part = Literal["all", "even", "odd"]
"""Which documents a pass reads: every one, or those whose tokens have an even or an odd checksum. What was chosen by
looking at the odd ones is judged on the even ones; copies of a document are always on one side, and corpora whose
rows alternate between two kinds fall into like halves."""

GROUPS = 64
"""Groups of documents that sums per latent are kept for."""

WINDOW = 512


class Places(NamedTuple):
    """The tokens of one batch that a dictionary reads: all but padding and the BOS that begins a sequence.

    Attributes:
        flat: Their places in the flattened batch.
        measured: Those that the statistics count (the corpus' own choice).
        template: Chat-template and special tokens.
        answer: Tokens that the assistant wrote.
        document: Number of each token's document in its corpus.
    """

    flat: Int[Tensor, " tokens"]
    measured: Bool[Tensor, " tokens"]
    template: Bool[Tensor, " tokens"]
    answer: Bool[Tensor, " tokens"]
    document: Int[Tensor, " tokens"]


class Texts:
    """Named corpora that are read together.

    Args:
        sources: Each a file, a folder or a data set, with an optional name in front: `math=math.jsonl`.
        tokenizer: Of the pair.
        options: How rows are read.
        context: Tokens that the models can read at once.
        template: Measure template and special tokens too.

    Raises:
        ConfigError: Two corpora have the same name, or are the same file.
        CorpusError: A source does not exist.
    """

    def __init__(
        self,
        sources: Sequence[str],
        tokenizer: Any,
        options: CorpusOptions,
        context: int | None,
        *,
        template: bool = False,
    ) -> None:
        self.corpora = open_named(sources, tokenizer, options, context)
        self.names = [corpus.name for corpus in self.corpora]
        self.options, self.template = self.corpora[0].options, template
        self._special = torch.from_numpy(special_ids(tokenizer)).long()

    def pass_over(self, tokens: int, tokens_per_batch: int, part: Part = "all") -> TextPass:
        """A pass over the first documents of each corpus that hold an equal share of `tokens` measured tokens.

        Raises:
            CorpusError: A corpus cannot be read, or has no token to measure among the documents of this part.
        """
        return TextPass(self, max(1, tokens // len(self.corpora)), tokens_per_batch, part)

    def places(self, batch: TokenBatch) -> Places:
        """Which tokens of a batch are read, and what they are."""
        ids = batch.input_ids.reshape(-1)
        special = torch.isin(ids, self._special)
        read = batch.attention_mask.reshape(-1).clone()
        if not self.options.all_positions:
            # The first position holds activations unlike all others, which no dictionary of text was trained on.
            first = torch.arange(len(ids)) % batch.input_ids.shape[1] == 0
            read &= ~(first & special)
        flat = read.nonzero().squeeze(1)
        role = batch.role.reshape(-1)[flat]
        template = (role == Role.TEMPLATE) | special[flat]
        measured = batch.keep.reshape(-1)[flat]
        return Places(
            flat,
            measured | template if self.template else measured,
            template,
            role == Role.ASSISTANT,
            batch.document.reshape(-1)[flat],
        )


class TextPass:
    """Batches of a part of the documents, that can be passed over again and again.

    Attributes:
        documents: How many documents of each corpus are read.
        tokens: How many of their tokens are measured.
    """

    def __init__(self, texts: Texts, tokens: int, tokens_per_batch: int, part: Part) -> None:
        self._corpora, self._tokens_per_batch, self._part = texts.corpora, tokens_per_batch, part
        self._template = texts.template
        counted = [self._count(corpus, tokens) for corpus in texts.corpora]
        self._last = [last for last, _, _ in counted]
        self.documents = [documents for _, documents, _ in counted]
        self.tokens = sum(found for _, _, found in counted)

    def __iter__(self) -> Iterator[tuple[int, TokenBatch]]:
        """Number of the corpus, and a batch of it."""
        for index, (corpus, last) in enumerate(zip(self._corpora, self._last, strict=True)):
            documents = self._documents(corpus, last)
            for batch in bucketed(documents, corpus.masking, self._tokens_per_batch, WINDOW):
                yield index, batch

    def _documents(self, corpus: Corpus, last: int) -> Iterator[Document]:
        limited = Corpus(
            corpus.sources,
            corpus.tokenizer,
            name=corpus.name,
            options=replace(corpus.options, max_documents=last),
        )
        return (document for document in limited.documents() if self._takes(document))

    def _takes(self, document: Document) -> bool:
        return self._part == "all" or crc32(document.token_ids.tobytes()) % 2 == (self._part == "odd")

    def _count(self, corpus: Corpus, tokens: int) -> tuple[int, int, int]:
        found = documents = last = 0
        for document in corpus.documents():
            if not self._takes(document):
                continue
            counted = corpus.masking.keep(document.roles, document.special)
            if self._template:
                counted |= document.special | (document.roles == Role.TEMPLATE)
            found += int(counted.sum())
            documents, last = documents + 1, document.index + 1
            if found >= tokens:
                break
        if found == 0:
            which = (
                "" if self._part == "all" else f" in the half of its documents with {self._part} checksums"
            )
            raise CorpusError(
                f"The corpus {corpus.name} has no token to measure{which}",
                fix="Give more documents or other roles, or leave passes out with --no-patch and --no-attribute",
            )
        return last, documents, found


@torch.inference_mode()
def read_pair(
    pair: ModelPair, site: str, batch: TokenBatch, places: Int[Tensor, " tokens"], device: torch.device
) -> Float[Tensor, "tokens models d_model"]:
    """Both models' activations at the places of a batch, in float32; the forward passes stop at the site.

    Raises:
        NumericsError: A model gives NaN or infinity.
        PairError: The pair holds one model at a time.
    """
    if pair.one_at_a_time:
        raise PairError(
            "A diff reads both models at once",
            found="a pair that holds one model at a time",
            fix="Load the pair without one_at_a_time",
        )
    acts = []
    for side in SIDES:
        rows = kept_rows(pair.side(side).read(batch.input_ids, [site]).acts[site], places)
        check_finite(rows, f"{side} model", site, batch, places)
        acts.append(rows.to(device, torch.float32))
    return torch.stack(acts, 1)
