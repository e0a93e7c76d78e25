"""Which tokens of a corpus an evaluation measures."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from jaxtyping import Int
from torch import Tensor

from palimpsest.corpus import Corpus, TokenBatch
from palimpsest.errors import CorpusError


class CorpusBatches(Iterable[TokenBatch]):
    """The batches of a corpus, which can be passed over again and again."""

    def __init__(self, corpus: Corpus, tokens_per_batch: int) -> None:
        self.corpus, self.tokens_per_batch = corpus, tokens_per_batch

    def __iter__(self) -> Iterator[TokenBatch]:
        return self.corpus.batches(self.tokens_per_batch)


def evaluation_batches(
    corpus: Corpus, tokens: int | None = None, tokens_per_batch: int = 4096
) -> CorpusBatches:
    """Batches of the first documents of a corpus that hold `tokens` measured tokens, or of all of it.

    The documents are counted first, in the corpus' own order: batches sort by length, and the first ones would
    hold nothing but long documents.

    Raises:
        CorpusError: The text cannot be read, or holds no document or no token to measure.
    """
    found, documents = 0, 0
    for document in corpus.documents():
        found += int(corpus.masking.keep(document.roles, document.special).sum())
        documents = document.index + 1
        if tokens is not None and found >= tokens:
            break
    if found == 0:
        raise CorpusError(
            f"The corpus {corpus.name} has no token to measure",
            fix="Choose other roles, or measure all positions",
        )
    options = replace(corpus.options, max_documents=documents)
    return CorpusBatches(
        Corpus(corpus.sources, corpus.tokenizer, name=corpus.name, options=options), tokens_per_batch
    )


def replayable(batches: Iterable[TokenBatch]) -> Iterable[TokenBatch]:
    """Batches that can be passed over twice: those of a one-time iterator are held, about 26 bytes a token."""
    return list(batches) if iter(batches) is batches else batches


def kept_places(batch: TokenBatch) -> tuple[Int[Tensor, " tokens"], Int[Tensor, " tokens"]]:
    """Flat places of the measured tokens, and of the tokens that predict them."""
    kept = batch.keep.reshape(-1).nonzero().squeeze(1)
    return kept, (kept - 1).clamp_min(0)
