"""The text that examples come from: named corpora, an equal share of the tokens from each, in one pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from palimpsest.corpus import Corpus, Document, Role, TokenBatch, special_ids
from palimpsest.corpus.batches import bucketed
from palimpsest.corpus.named import open_named
from palimpsest.errors import CorpusError
from palimpsest.options import CorpusOptions

WINDOW = 512
"""Documents among which lengths are sorted."""


class Texts:
    """Named corpora that are read one after the other.

    Attributes:
        names: Of the corpora, in order.
        corpora: The corpora.
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
        """Open the corpora.

        Args:
            sources: Each a file, a folder or a data set, with an optional name in front: `math=math.jsonl`.
            tokenizer: Of the models.
            options: How rows are read.
            context: Tokens that the models can read at once.
            template: Measure template and special tokens too.

        Raises:
            ConfigError: Two corpora have the same name, or are the same file.
            CorpusError: A source does not exist.
        """
        self.corpora = open_named(sources, tokenizer, options, context)
        self.names = [corpus.name for corpus in self.corpora]
        self._template, self._all = template, options.all_positions
        self._special = torch.from_numpy(special_ids(tokenizer)).long()

    def require_tokens(self) -> None:
        """Refuse a corpus without a token to measure, before anything is computed; reads little of the others.

        Raises:
            CorpusError: There is such a corpus, or one that cannot be read.
        """
        for corpus in self.corpora:
            if not any(self._counted(corpus, document).any() for document in corpus.documents()):
                raise CorpusError(
                    f"The corpus {corpus.name} has no token to measure",
                    fix="Choose other roles, or measure more with --template or --all-positions",
                )

    def batches(self, corpus: int, tokens: int, tokens_per_batch: int) -> Iterator[TokenBatch]:
        """Batches of the first documents of a corpus that hold `tokens` measured tokens."""
        chosen = self.corpora[corpus]
        yield from bucketed(self._first(chosen, tokens), chosen.masking, tokens_per_batch, WINDOW)

    def measured(self, batch: TokenBatch) -> Bool[Tensor, "batch seq"]:
        """Which tokens of a batch are read by the dictionary and counted."""
        keep = batch.keep
        if self._template and not self._all:
            special = torch.isin(batch.input_ids, self._special)
            more = (special | (batch.role == Role.TEMPLATE)) & batch.attention_mask
            # The first position holds activations unlike all others, which no dictionary of text was trained on.
            more[:, 0] &= ~special[:, 0]
            keep = keep | more
        return keep

    def _first(self, corpus: Corpus, tokens: int) -> Iterator[Document]:
        found = 0
        for document in corpus.documents():
            yield document
            found += int(self._counted(corpus, document).sum())
            if found >= tokens:
                return

    def _counted(self, corpus: Corpus, document: Document) -> np.ndarray:
        kept = corpus.masking.keep(document.roles, document.special)
        if self._template and not self._all:
            more = document.special | (document.roles == Role.TEMPLATE)
            more[:1] &= ~document.special[:1]
            kept = kept | more
        return kept
