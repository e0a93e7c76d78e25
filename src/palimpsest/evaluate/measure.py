"""A dictionary on a model or a pair: two passes over the text, sums only."""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import CorpusError, NumericsError
from palimpsest.evaluate.estimate import Settings, estimate_model, finish_evaluation
from palimpsest.evaluate.result import Evaluation, ModelEvaluation
from palimpsest.evaluate.splice import head_input_with, predictions
from palimpsest.evaluate.sums import (
    COLUMNS,
    PREDICTION,
    CodeSums,
    DocumentSums,
    DocumentTable,
    reconstruction_columns,
)
from palimpsest.evaluate.text import replayable
from palimpsest.evaluate.views import Read, Reader, Source, flat_rows, origin_notes, readers, site_of
from palimpsest.log import progress
from palimpsest.models import LanguageModel


class Measured(NamedTuple):
    """An evaluation, and what it keeps of single latents.

    Attributes:
        evaluation: The figures.
        fires: Tokens on which each latent is active, by side.
    """

    evaluation: Evaluation
    fires: dict[str, Int[NDArray, " latents"]]


class _First(NamedTuple):
    """What the first pass leaves: the mean of the signal, and how many tokens there are."""

    mean: Float[Tensor, "models d_model"]
    tokens: int
    passed: int


def evaluate_dictionary(
    dictionary: Dictionary,
    source: Source,
    batches: Iterable[TokenBatch],
    *,
    site: str | None = None,
    loss: bool = True,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Evaluation:
    """Measure what a dictionary leaves of activations and, spliced into the models, of their predictions.

    The text is passed over twice: once up to the site, for the mean activation of the measured tokens, which FVE is
    centred on and the mean ablation uses; then with the model as it is, spliced, zero-ablated and mean-ablated.
    Memory grows with documents and latents, not with tokens.

    Args:
        dictionary: Of any view, on the device where it shall encode. An SAE of one model is measured on every model
            there is; a diff dictionary is spliced into the tuned model as h_base + its reconstruction; a
            crosscoder's reconstruction of each model is spliced into that model.
        source: One model, or a pair.
        batches: What `Corpus.batches` or `Corpus.blocks` give; those of a one-time iterator are held (26 bytes per
            token). Tokens outside `keep` are neither measured nor spliced.
        site: Where to read; the dictionary's own by default.
        loss: Also measure CE and KL; without it the forward passes stop at the site.
        confidence: Coverage of the intervals, which are bootstraps over documents.
        resamples: Of documents.
        seed: Of the resamples.

    Returns:
        The figures of every model, defined in `docs/measures/reconstruction.md`.

    Raises:
        PalimpsestError: The site is unknown or of another width, the view needs a pair, there is no token to
            measure, or a model gives NaN.

    Source: FVE as 1 - FVU of sparsify, CE recovered as SAELens' `ce_loss_score` (https://github.com/decoderesearch/SAELens).
    """
    settings = Settings(confidence, resamples, seed)
    return measure_dictionary(dictionary, source, batches, settings, site=site, loss=loss).evaluation


def measure_dictionary(
    dictionary: Dictionary,
    source: Source,
    batches: Iterable[TokenBatch],
    settings: Settings,
    *,
    site: str | None = None,
    loss: bool = True,
) -> Measured:
    """`evaluate_dictionary`, with the counts of single latents."""
    batches = replayable(batches)
    # No name is kept for the base: a pair that holds one model at a time must be able to drop it.
    site = site_of(dictionary, source if isinstance(source, LanguageModel) else source.base, site, loss=loss)
    notes = [] if isinstance(source, LanguageModel) else list(source.notes)
    notes += origin_notes(dictionary, source, site)
    models: list[ModelEvaluation] = []
    fires: dict[str, NDArray] = {}
    seen, documents = None, 0
    for reader in readers(dictionary, source, site):
        seen = _first_pass(reader, dictionary, batches)
        tables, codes = _second_pass(reader, dictionary, batches, seen.mean, loss=loss)
        counts, l0 = codes.fires(), codes.l0()
        for side, table in zip(reader.spliced, tables, strict=True):
            _check_finite(table, COLUMNS.index("ce_original"), reader.model(side).name, "its head")
            name = reader.model(side).name
            found, remarks = estimate_model(side, name, table, (counts, l0), settings, loss=loss)
            models.append(found)
            fires[side] = counts
            notes += [f"{side}: {remark}" for remark in remarks]
            documents = len(table.documents)
    assert seen is not None
    evaluation = finish_evaluation(
        dictionary.describe(), site, models, settings, (documents, seen.tokens, seen.passed), notes
    )
    return Measured(evaluation, fires)


def _first_pass(reader: Reader, dictionary: Dictionary, batches: Iterable[TokenBatch]) -> _First:
    """The mean of what the dictionary reads; stops at the site.

    Raises:
        CorpusError: No token is measured.
        NumericsError: A model gives NaN or infinity.
    """
    total: Tensor | None = None
    sums, tokens, passed = DocumentSums(1), 0, 0
    with progress(f"mean of {' and '.join(reader.reads)}") as advance:
        for batch in batches:
            passed += int((batch.attention_mask & ~batch.keep).sum())
            read = reader.read(batch, dictionary.device, head=False)
            if read is None:
                continue
            here = read.signal.sum(0, dtype=torch.float64)
            total = here if total is None else total + here
            sums.add(read.document, read.signal.flatten(1).sum(1, keepdim=True))
            tokens += len(read.kept)
            advance(len(read.kept))
    if total is None:
        raise CorpusError("There is no token to measure", expected="batches whose `keep` marks tokens")
    # A row that is not finite makes its document's sum so: one look at the end, none per batch.
    _check_finite(
        sums.finish(), 0, " or ".join(reader.model(side).name for side in reader.reads), reader.site
    )
    return _First((total / tokens).float(), tokens, passed)


@torch.inference_mode()
def _second_pass(
    reader: Reader,
    dictionary: Dictionary,
    batches: Iterable[TokenBatch],
    mean: Float[Tensor, "models d_model"],
    *,
    loss: bool,
) -> tuple[list[DocumentTable], CodeSums]:
    """Sums per document of each spliced model, and of the codes."""
    codes = CodeSums(dictionary.n_latents, dictionary.device)
    sums = [DocumentSums(len(COLUMNS)) for _ in reader.spliced]
    with progress(f"evaluating on {' and '.join(reader.spliced)}") as advance:
        for batch in batches:
            read = reader.read(batch, dictionary.device, head=loss)
            if read is None:
                continue
            code = dictionary.encode(read.signal)
            codes.add(code)
            made = dictionary.decode(code).float().view(read.signal.shape)
            for index in range(len(reader.spliced)):
                columns = reconstruction_columns(read.signal[:, index], made[:, index], mean[index])
                nats = columns.new_zeros(len(columns), len(PREDICTION))
                if loss:
                    nats = _nats(reader, batch, read, index, made[:, index], mean[index]).to(columns.device)
                sums[index].add(read.document, torch.cat([columns, nats], 1))
            advance(len(read.kept))
    return [one.finish() for one in sums], codes


def _nats(
    reader: Reader, batch: TokenBatch, read: Read, index: int, made: Tensor, mean: Tensor
) -> Float[Tensor, "tokens columns"]:
    """The columns of `PREDICTION` for one spliced model."""
    model = reader.model(reader.spliced[index])
    heads = []
    for rows in (made, torch.zeros_like(made), mean.expand_as(made)):
        content = rows if read.offset is None else rows + read.offset
        head_input = head_input_with(model, batch.input_ids, reader.site, read.kept, content)
        heads.append(flat_rows(head_input, read.before))
    ids = batch.input_ids.reshape(-1)[read.kept]
    found = predictions(model.head, read.heads[index], heads, ids)
    predicted = read.predicted.to(found.ce.device)[:, None]
    nats = torch.cat([found.ce, found.kl], 1).double()
    return torch.cat([predicted.double(), torch.where(predicted, nats, 0.0)], 1)


def _check_finite(table: DocumentTable, column: int, who: str, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(table.sums[:, column]))
    if len(bad):
        raise NumericsError(
            f"{who} gives NaN or infinity at {where}",
            expected="finite activations",
            found=f"document {int(table.documents[bad[0]])}",
            fix="Load the models in float32 or bfloat16 instead of float16, and check the checkpoint",
        )
