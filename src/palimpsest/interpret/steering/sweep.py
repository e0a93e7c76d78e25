"""What changes cost on held-out text: loss, perplexity against the unsteered model, KL; by document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.corpus import TokenBatch
from palimpsest.errors import NumericsError
from palimpsest.evaluate.splice import predictions
from palimpsest.evaluate.sums import DocumentSums, DocumentTable
from palimpsest.evaluate.text import kept_places
from palimpsest.evaluate.views import flat_rows
from palimpsest.interpret.steering.changes import Change
from palimpsest.interpret.steering.result import FEWEST_DOCUMENTS, Cost
from palimpsest.interpret.steering.steerer import Steerer
from palimpsest.log import progress
from palimpsest.models import Side
from palimpsest.stats import Resampler, percentile_interval


class Settings(NamedTuple):
    """How intervals are made: coverage, bootstrap resamples of documents, and their seed."""

    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0


@torch.inference_mode()
def measure(
    steerer: Steerer,
    side: Side,
    variants: Sequence[Sequence[Change]],
    batches: Iterable[TokenBatch],
    *,
    total: int | None = None,
) -> DocumentTable:
    """Sums per document: predictions, nats of the model as it is, then nats and KL of each variant.

    Every token but the special ones is edited; every measured token that something predicts is counted.

    Args:
        steerer: Of the dictionary.
        side: The model.
        variants: Changes; the model as it is runs once for all of them.
        batches: Held-out text, whole documents.
        total: Tokens of the batches, for the progress line.

    Raises:
        NumericsError: NaN or infinity; names the document.
    """
    model = steerer.subject.model(side)
    sums = DocumentSums(2 + 2 * len(variants))
    with progress("Steering held-out text", total) as advance:
        for batch in batches:
            kept, _ = kept_places(batch)
            kept = kept[kept % batch.input_ids.shape[1] > 0]
            if len(kept):
                heads = []
                for changes in ((), *variants):
                    with steerer.steering(side, changes):
                        found = model.read(batch.input_ids, [], head=True).head_input
                    assert found is not None
                    heads.append(flat_rows(found, kept - 1))
                made = predictions(model.head, heads[0], heads[1:], batch.input_ids.reshape(-1)[kept])
                pairs = torch.stack([made.ce[:, 1:], made.kl], 2).flatten(1)
                columns = torch.cat([torch.ones_like(made.ce[:, :1]), made.ce[:, :1], pairs], 1)
                document = batch.document.reshape(-1)[kept]
                _check(columns, document)
                sums.add(document, columns)
            advance(batch.tokens)
    return sums.finish()


def _check(columns: torch.Tensor, document: torch.Tensor) -> None:
    if torch.isfinite(columns.sum()):
        return
    row = int((~torch.isfinite(columns)).any(1).nonzero()[0])
    raise NumericsError(
        "The predictions of the steered model are NaN or infinite",
        found=f"document {int(document[row])}",
        fix="Choose smaller strengths, or load the models in float32 or bfloat16 instead of float16",
    )


def costs(table: DocumentTable, settings: Settings) -> list[Cost]:
    """The figures of each variant of a table; ratios of sums, intervals over documents, paired."""
    total = table.sums.sum(0)
    samples = None
    if len(table.documents) >= FEWEST_DOCUMENTS:
        draws = Resampler(len(table.documents), settings.resamples, [settings.seed, 17])
        samples = draws.apply(lambda weights: weights @ table.sums)

    def interval(values: Any) -> tuple[float, float] | None:
        if values is None:
            return None
        lo, hi = percentile_interval(values, settings.confidence, len(table.documents))
        # Beyond every number there is no interval either.
        return (float(lo), float(hi)) if np.isfinite(values).all() else None

    found = []
    for place in range(2, len(total), 2):
        ratio = _ratio(total, place)
        bounds = None if samples is None else (_ratio(samples, place), samples[:, place + 1] / samples[:, 0])
        found.append(
            Cost(
                loss=float(total[place] / total[0]),
                perplexity_ratio=float(ratio) if np.isfinite(ratio) else None,
                perplexity_ratio_ci=interval(None if bounds is None else bounds[0]),
                kl=float(total[place + 1] / total[0]),
                kl_ci=interval(None if bounds is None else bounds[1]),
            )
        )
    return found


def _ratio(sums: Float[NDArray, "*resamples columns"], place: int) -> Any:
    with np.errstate(over="ignore"):
        return np.exp((sums[..., place] - sums[..., 1]) / sums[..., 0])


def unsteered(table: DocumentTable) -> dict[str, Any]:
    """Loss of the model as it is, and how much text that was."""
    total = table.sums.sum(0)
    return {
        "loss": float(total[1] / total[0]),
        "documents": len(table.documents),
        "tokens": int(total[0]),
    }


def largest_ok(rows: Iterable[tuple[float, Cost]], limit: float) -> float | None:
    """The largest strength up to which no perplexity ratio passes the limit, by the upper ends of their intervals.

    Args:
        rows: Strengths with what they cost, in any order.
        limit: Perplexity of the steered model over that of the unsteered one.

    Returns:
        None where the weakest passes it already. A strength above one that passes it does not count: what breaks in
        between is not known to be mended.
    """
    largest = None
    for strength, cost in sorted(rows, key=lambda one: one[0]):
        upper = cost.perplexity_ratio if cost.perplexity_ratio_ci is None else cost.perplexity_ratio_ci[1]
        # Not `>`: what is no number passes no limit.
        if upper is None or not upper <= limit:
            break
        largest = strength
    return largest


__all__ = ["Settings", "costs", "largest_ok", "measure", "unsteered"]
