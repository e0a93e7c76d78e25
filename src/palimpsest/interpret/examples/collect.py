"""The one pass over the text: forward passes that stop at the site, codes, and what is kept of every latent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor

from palimpsest.artifacts import RunFolder, disk
from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Codes
from palimpsest.errors import CorpusError
from palimpsest.harvest.stream import check_finite, kept_rows
from palimpsest.interpret.examples.best import Best, Lots, runs_of
from palimpsest.interpret.examples.chunks import CHUNK_ENTRIES, CHUNK_TOKENS, Batch, Chunk, make_chunk
from palimpsest.interpret.examples.cofiring import CoFiring
from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.interpret.examples.tallies import Tallies
from palimpsest.interpret.examples.text import Texts
from palimpsest.interpret.subject import Subject
from palimpsest.log import progress
from palimpsest.models import LanguageModel, Side

Encode = Callable[[int, TokenBatch, Int[Tensor, " tokens"]], tuple[Codes, ...]]


@dataclass
class Collected:
    """What the pass leaves.

    Attributes:
        chunks: The files of the chunks, in order.
        tallies: Counts, sums and histograms.
        top: The strongest token of each document for each latent.
        sample: Random firings of each latent, one per document; None where no bins are wanted.
        cofiring: A sample of tokens with their latents; None where no neighbours are wanted.
        lots: The random numbers that were drawn.
        copies: Documents that are token for token an earlier one.
    """

    chunks: list[Path]
    tallies: Tallies
    top: Best
    sample: Best | None
    cofiring: CoFiring | None
    lots: Lots
    copies: int = 0

    @classmethod
    def empty(cls, subject: Subject, config: ExamplesConfig, corpora: int) -> Collected:
        """Before any text is read."""
        n = subject.dictionary.n_latents
        sampled = config.bins * config.per_bin
        return cls(
            [],
            Tallies(n, corpora, stored_signals(subject)),
            Best(n, config.tops),
            Best(n, sampled) if sampled else None,
            CoFiring(n) if config.neighbours else None,
            Lots(config.run.seed, n),
        )


class _Folding:
    """Folds chunks into what is collected, one after the other."""

    def __init__(self, collected: Collected) -> None:
        self._into = collected
        self._seen = np.zeros(0, np.int64)

    def add(self, chunk: Chunk, path: Path) -> None:
        """Fold in a chunk that lies at a path."""
        into, number = self._into, len(self._into.chunks)
        latent = np.repeat(np.arange(len(chunk.pointer) - 1, dtype=np.int32), np.diff(chunk.pointer))
        into.tallies.add(chunk, latent)
        runs = runs_of(chunk, latent, self._fresh(chunk))
        value = chunk.value
        # Positive floats and their bits have the same order.
        into.top.add(number, runs, value.view(np.uint32), chunk.slot)
        slots = into.lots.slots(chunk)
        if into.sample is not None:
            lots = into.lots.entries(slots, chunk, latent)
            lots[value == 0] = 0
            into.sample.add(number, runs, lots, chunk.slot)
        if into.cofiring is not None:
            into.cofiring.add(chunk, slots, latent, value > 0)
        into.chunks.append(path)

    def _fresh(self, chunk: Chunk) -> NDArray[np.bool_]:
        """Which documents are no copy of an earlier one."""
        content, first = np.unique(chunk.content, return_index=True)
        place = np.searchsorted(self._seen, content)
        known = np.zeros(len(content), bool)
        inside = place < len(self._seen)
        known[inside] = self._seen[place[inside]] == content[inside]
        fresh = np.zeros(len(chunk.content), bool)
        fresh[first[~known]] = True
        self._seen = np.insert(self._seen, place[~known], content[~known])
        self._into.copies += int((~fresh).sum())
        return fresh


def stored_signals(subject: Subject) -> tuple[str, ...]:
    """The signals that are computed for each token; `value` is made of the others under an SAE."""
    by_view = {"diff": ("value",), "pair": ("value", "base", "tuned")}
    return by_view.get(subject.dictionary.view, subject.sides)


def collect(subject: Subject, texts: Texts, config: ExamplesConfig, run: RunFolder) -> Collected:
    """Read the text through both models and the dictionary; finished chunks of an interrupted run are read instead.

    Raises:
        CorpusError: No latent fires on this text.
        NumericsError: A model or the dictionary gives NaN or infinity.
    """
    collected = Collected.empty(subject, config, len(texts.corpora))
    encode = _spooled(subject, texts, config, run) if _one_at_a_time(subject) else _encoder(subject)
    folding = _Folding(collected)
    with (
        progress("activations of every latent", config.tokens, unit="tokens") as advance,
        ThreadPoolExecutor(1) as pool,
    ):
        waiting: Future[None] | None = None
        for step in _chunks(texts, config, run, encode):
            # One chunk is put in order while the models read the next one.
            if waiting is not None:
                waiting.result()
            waiting = pool.submit(_settle, step, folding, subject.dictionary.n_latents)
            advance(step.tokens)
        if waiting is not None:
            waiting.result()
    if not collected.tallies.fires.any():
        raise CorpusError(
            "No latent of the dictionary fires on this text",
            fix="Check that it was trained on this model and site (palimpsest info DICT --corpus FILE)",
        )
    return collected


@dataclass(frozen=True)
class _Step:
    """The batches of a chunk that is to be made, or one that an interrupted run finished."""

    corpus: int
    path: Path
    batches: list[Batch]
    tokens: int
    finished: Chunk | None = None


def _settle(step: _Step, folding: _Folding, n_latents: int) -> None:
    chunk = step.finished
    if chunk is None:
        chunk = make_chunk(step.corpus, step.batches, n_latents)
        chunk.save(step.path)
    folding.add(chunk, step.path)


def _chunks(texts: Texts, config: ExamplesConfig, run: RunFolder, encode: Encode) -> Iterator[_Step]:
    """Batches until a chunk is full, corpus by corpus."""
    share, number = max(1, config.tokens // len(texts.corpora)), 0
    for corpus in range(len(texts.corpora)):
        held: list[Batch] = []
        skip = tokens = entries = places = 0
        while (path := _chunk_path(run, number)).exists():
            found = Chunk.load(path)
            if found.corpus != corpus:
                break
            yield _Step(corpus, path, [], int(found.measured.sum()), found)
            skip, number = skip + found.batches, number + 1
        for place, batch in enumerate(texts.batches(corpus, share, config.models.tokens_per_batch)):
            measured = texts.measured(batch).reshape(-1).nonzero().squeeze(1)
            if place < skip:
                continue
            held.append(Batch(batch, measured.numpy(), encode(corpus * 10**6 + place, batch, measured)))
            tokens, entries = tokens + len(measured), entries + held[-1].entries
            # Of all places, not of the measured ones, which may be few: one role's in long conversations.
            places += batch.input_ids.numel()
            if places >= CHUNK_TOKENS or entries >= CHUNK_ENTRIES:
                yield _Step(corpus, path, held, tokens)
                number, held, tokens, entries, places = number + 1, [], 0, 0, 0
                path = _chunk_path(run, number)
        if held:
            yield _Step(corpus, path, held, tokens)
            number += 1


def _chunk_path(run: RunFolder, number: int) -> Path:
    return run.part(f"chunks/{number:06d}.safetensors")


def _one_at_a_time(subject: Subject) -> bool:
    return not isinstance(subject.source, LanguageModel) and subject.source.one_at_a_time


def read_acts(
    model: LanguageModel, site: str, batch: TokenBatch, places: Int[Tensor, " tokens"], device: torch.device
) -> Float[Tensor, "tokens d_model"]:
    """One model's activations at some places of a batch; the forward pass stops at the site.

    Raises:
        NumericsError: There is NaN or infinity among them.
    """
    rows = kept_rows(model.read(batch.input_ids, [site]).acts[site], places)
    check_finite(rows, model.name, site, batch, places)
    return rows.to(device, torch.float32)


def _encoder(subject: Subject) -> Encode:
    """Both models on one batch."""
    device = subject.dictionary.device

    @torch.inference_mode()
    def encode(number: int, batch: TokenBatch, places: Tensor) -> tuple[Codes, ...]:
        del number
        acts = [read_acts(subject.model(side), subject.site, batch, places, device) for side in subject.sides]
        codes = subject.own_signals(torch.stack(acts, 1), check=False)
        return tuple(one for one in codes if one is not None)

    return encode


def _spooled(subject: Subject, texts: Texts, config: ExamplesConfig, run: RunFolder) -> Encode:
    """The same for a pair that holds one model at a time: first all of the base, whose codes wait on disk."""
    dictionary, share = subject.dictionary, max(1, config.tokens // len(texts.corpora))

    @torch.inference_mode()
    def own(side: Side, batch: TokenBatch, places: Tensor) -> Codes:
        acts = read_acts(subject.model(side), subject.site, batch, places, dictionary.device)
        return dictionary.encode(acts, check=False)

    def path(number: int) -> Path:
        return run.part(f"base/{number:09d}.safetensors")

    with progress("the base alone", config.tokens, unit="tokens") as advance:
        for corpus in range(len(texts.corpora)):
            for place, batch in enumerate(texts.batches(corpus, share, config.models.tokens_per_batch)):
                measured = texts.measured(batch).reshape(-1).nonzero().squeeze(1)
                if not path(corpus * 10**6 + place).exists():
                    codes = own("base", batch, measured).to("cpu")
                    arrays = {"crow": codes.crow, "indices": codes.indices, "values": codes.values}
                    with disk.replacing(path(corpus * 10**6 + place)) as temporary:
                        save_file({key: one.contiguous() for key, one in arrays.items()}, temporary)
                advance(len(measured))

    def encode(number: int, batch: TokenBatch, places: Tensor) -> tuple[Codes, ...]:
        kept = load_file(path(number))
        base = Codes(kept["crow"], kept["indices"], kept["values"], dictionary.n_latents)
        return base, own("tuned", batch, places)

    return encode
