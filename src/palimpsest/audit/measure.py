"""The pass over the text: corpora in, `CorpusSums` out, one corpus at a time and resumable after each."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import RunFolder, disk
from palimpsest.audit.sums import Accumulator, CorpusSums, Measure
from palimpsest.corpus import Corpus, TokenBatch
from palimpsest.errors import CorpusError
from palimpsest.harvest import Harvester
from palimpsest.harvest.cached import CachedHarvester
from palimpsest.log import progress


@runtime_checkable
class Text(Protocol):
    """What a pass reads: a `Corpus`, or the documents of a battery."""

    @property
    def name(self) -> str:
        """What reports call it."""
        ...

    @property
    def sources(self) -> Sequence[str | Path]:
        """Where it comes from."""
        ...

    def batches(self, tokens_per_batch: int = 4096, window: int = 512) -> Iterator[TokenBatch]:
        """Batches of whole documents."""
        ...


class Size(NamedTuple):
    """What a corpus holds once it is tokenised and masked."""

    documents: int
    tokens: int
    bad_rows: int


def survey(corpus: Corpus, tokens_per_batch: int, minimum: int) -> Size:
    """Read a corpus once without a model, so that bad input is found before anything is computed.

    Raises:
        CorpusError: A row cannot be read, or fewer than `minimum` documents have tokens to measure.
    """
    documents = tokens = 0
    for batch in corpus.batches(tokens_per_batch):
        documents += int(batch.keep.any(1).sum())
        tokens += int(batch.keep.sum())
    if documents < minimum:
        raise CorpusError(
            f"The corpus {corpus.name} has too few documents for the interval asked",
            expected=f"at least {minimum} documents with tokens to measure",
            found=str(documents),
            fix="Give more documents, or lower --confidence",
        )
    return Size(documents, tokens, corpus.stats.bad_rows)


def measure_corpora(
    harvester: Harvester | CachedHarvester,
    corpora: Sequence[tuple[Text, Size]],
    measures: Sequence[Measure],
    run: RunFolder,
    tokens_per_batch: int,
) -> dict[str, dict[str, CorpusSums]]:
    """Sums of every corpus through every measure: `{corpus: {measure: sums}}`, one pass for all of them.

    A corpus that an interrupted run finished is read back instead of measured again.
    """
    files = {
        corpus.name: {m.name: run.part(f"{index:03d}-{m.name}.safetensors") for m in measures}
        for index, (corpus, _) in enumerate(corpora)
    }
    todo = [
        (corpus, size) for corpus, size in corpora if not all(p.exists() for p in files[corpus.name].values())
    ]
    if isinstance(harvester, Harvester) and harvester.pair.one_at_a_time:
        for corpus, size in todo:
            with progress(f"base on {corpus.name}", size.tokens) as advance:
                for tokens in harvester.record(corpus.name, corpus.batches(tokens_per_batch)):
                    advance(tokens)
    for corpus, size in todo:
        started = time.perf_counter()
        found = measure_corpus(harvester, corpus, size, measures, tokens_per_batch)
        for name, sums in found.items():
            _save(sums, files[corpus.name][name])
        run.timing(f"measure {corpus.name}", time.perf_counter() - started)
    return {
        corpus: {name: CorpusSums.from_arrays(load_file(path)) for name, path in paths.items()}
        for corpus, paths in files.items()
    }


def measure_corpus(
    harvester: Harvester | CachedHarvester,
    corpus: Text,
    size: Size,
    measures: Sequence[Measure],
    tokens_per_batch: int,
) -> dict[str, CorpusSums]:
    """Sums of one corpus by measure, in one pass."""
    accumulators = [Accumulator(measure) for measure in measures]
    with progress(f"measuring {corpus.name}", size.tokens) as advance:
        for batch in harvester.stream(corpus.name, corpus.batches(tokens_per_batch)):
            for accumulator in accumulators:
                accumulator.add(batch)
            advance(batch.tokens)
    found = {m.name: a.finish() for m, a in zip(measures, accumulators, strict=True)}
    if isinstance(harvester, CachedHarvester):
        moments = harvester.base_side(corpus.name).moments
        for measure in measures:
            known = moments[measure.site]
            found[measure.name].moments |= {key: value.numpy() for key, value in known.items()}
    return found


def _save(sums: CorpusSums, path: Path) -> None:
    """A killed run leaves either the whole file or none."""
    with disk.replacing(path) as temporary:
        save_file({key: array.copy() for key, array in sums.arrays().items()}, temporary)
