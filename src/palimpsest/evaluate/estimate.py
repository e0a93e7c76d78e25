"""From sums per document to figures with intervals: numbers only, no models."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray

from palimpsest.evaluate.result import (
    BINS_PER_DECADE,
    LOWEST_DECADE,
    Density,
    Evaluation,
    ModelEvaluation,
    Range,
    Splice,
)
from palimpsest.evaluate.sums import COLUMNS, DocumentTable
from palimpsest.stats import Resampler, percentile_interval

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
FEWEST_DOCUMENTS = 5
BASELINES = ("zero", "mean")


class Settings(NamedTuple):
    """How intervals are made: coverage, bootstrap resamples of documents, and their seed."""

    confidence: float = 0.95
    resamples: int = 1000
    seed: int = 0

    def enough(self, documents: int) -> bool:
        """Whether a percentile interval of so many documents says anything."""
        return documents >= max(FEWEST_DOCUMENTS, 0.5 / (1 - self.confidence) - 1e-9)


class _Totals:
    """Sums of the columns: of all documents, and of every resample of them."""

    def __init__(self, table: DocumentTable, settings: Settings) -> None:
        self.documents, self._settings = len(table.documents), settings
        self._total = table.sums.sum(0)
        self._samples = None
        if settings.enough(self.documents):
            draws = Resampler(self.documents, settings.resamples, [settings.seed, 11])
            self._samples = draws.apply(lambda weights: weights @ table.sums)

    def total(self, column: str) -> float:
        return float(self._total[COLUMNS.index(column)])

    def mean(self, column: str, per: str) -> float | None:
        return _ratio(self.total(column), self.total(per))

    def unexplained(self) -> tuple[float | None, Range | None]:
        """Σ‖x - x̂‖² / Σ‖x - mean x‖², with its interval."""
        return self._fraction({"residual": 1.0}, {"centred": 1.0})

    def left(self, kind: str, baseline: str) -> tuple[float | None, Range | None]:
        """The part of what a baseline costs that the reconstruction costs too: 1 - recovered."""
        own, worst = f"{kind}_spliced", f"{kind}_{baseline}"
        if kind == "kl":
            return self._fraction({own: 1.0}, {worst: 1.0})
        return self._fraction({own: 1.0, "ce_original": -1.0}, {worst: 1.0, "ce_original": -1.0})

    def undecided(self, baseline: str) -> bool:
        """Whether the interval of CE baseline - CE original holds 0."""
        if self._samples is None:
            return False
        gap = self._combined(self._samples, {f"ce_{baseline}": 1.0, "ce_original": -1.0})
        bounds = self._interval(gap)
        return bounds is None or bounds[0] <= 0 <= bounds[1]

    def _fraction(
        self, above: dict[str, float], below: dict[str, float]
    ) -> tuple[float | None, Range | None]:
        value = _ratio(self._combined(self._total, above), self._combined(self._total, below))
        if value is None or self._samples is None:
            return value, None
        with np.errstate(invalid="ignore", divide="ignore"):
            samples = self._combined(self._samples, above) / self._combined(self._samples, below)
        return value, self._interval(np.where(np.isfinite(samples), samples, np.nan))

    @staticmethod
    def _combined(sums: NDArray, weights: dict[str, float]) -> Any:
        return sum(weight * sums[..., COLUMNS.index(name)] for name, weight in weights.items())

    def _interval(self, samples: NDArray) -> Range | None:
        lo, hi = percentile_interval(samples, self._settings.confidence, self.documents)
        return (float(lo), float(hi)) if np.isfinite(lo) and np.isfinite(hi) else None


def estimate_model(
    side: str,
    name: str,
    table: DocumentTable,
    codes: tuple[Int[NDArray, " latents"], Int[NDArray, " latents_and_one"]],
    settings: Settings,
    *,
    loss: bool,
) -> tuple[ModelEvaluation, list[str]]:
    """The figures of one model, and what its reader should know.

    Args:
        side: `model`, `base` or `tuned`.
        name: Where the model came from.
        table: Sums per document.
        codes: Tokens on which each latent fires, and tokens by their L0.
        settings: Of the intervals.
        loss: Whether predictions were measured.
    """
    totals = _Totals(table, settings)
    fires, l0 = codes
    unexplained, bounds = totals.unexplained()
    fve, fve_ci = _one_minus(unexplained, bounds)
    tokens = totals.total("tokens")
    density = histogram(fires, int(tokens))
    splice, notes = _splice(totals) if loss else (None, [])
    found = ModelEvaluation(
        side=side,
        name=name,
        fve=fve,
        fve_ci=fve_ci,
        cosine=totals.mean("cosine", "sized"),
        norm_ratio=totals.mean("norm_ratio", "sized"),
        l0=float((np.arange(len(l0)) * l0).sum() / tokens),
        l0_quantiles=_quantiles(l0),
        dead=density.never,
        dead_share=density.never / len(fires),
        density=density,
        splice=splice,
    )
    if not settings.enough(totals.documents):
        notes.append(f"{totals.documents} documents are too few for intervals.")
    return found, notes


def histogram(fires: Int[NDArray, " latents"], tokens: int) -> Density:
    """Latents by log10 of the share of tokens on which they fire."""
    live = fires[fires > 0]
    # Rounded to whole steps at bin edges: log10(10^-3) is -2.9999999999999996.
    steps = np.round((np.log10(live / max(tokens, 1)) - LOWEST_DECADE) * BINS_PER_DECADE, 9)
    bins = -LOWEST_DECADE * BINS_PER_DECADE
    place = np.clip(np.floor(steps).astype(np.int64), 0, bins - 1)
    return Density(np.bincount(place, minlength=bins).tolist(), int((fires == 0).sum()))


def finish_evaluation(
    dictionary: dict[str, Any],
    site: str,
    models: list[ModelEvaluation],
    settings: Settings,
    size: tuple[int, int, int],
    notes: list[str],
) -> Evaluation:
    """Everything together; `size` is documents, measured tokens and tokens passed through."""
    documents, tokens, passed = size
    head = f"{dictionary['n_latents']:,} latents at {site} over {tokens:,} tokens"
    masking = "every token" if passed == 0 else "the tokens that the batches mark"
    return Evaluation(
        summary=f"{head}: " + "; ".join(_sentence(one) for one in models) + ".",
        dictionary=dictionary,
        site=site,
        view=dictionary["view"],
        documents=documents,
        tokens=tokens,
        passed_tokens=passed,
        masking=masking,
        confidence=settings.confidence,
        resamples=settings.resamples,
        seed=settings.seed,
        models=models,
        notes=notes,
    )


def _splice(totals: _Totals) -> tuple[Splice | None, list[str]]:
    count = int(totals.total("predicted"))
    if count == 0:
        return None, ["No measured token has a prediction, so there is neither CE nor KL."]
    ce = {name: totals.mean(f"ce_{name}", "predicted") for name in ("original", "spliced", *BASELINES)}
    kl = {name: totals.mean(f"kl_{name}", "predicted") for name in ("spliced", *BASELINES)}
    notes = [
        f"CE under {name} ablation does not differ from the model's own beyond its interval: CE recovered against "
        "it says little, KL recovered does."
        for name in BASELINES
        if totals.undecided(name)
    ]
    recovered: dict[str, dict[str, Any]] = {}
    for kind in ("ce", "kl"):
        figures = {name: _one_minus(*totals.left(kind, name)) for name in BASELINES}
        recovered[f"{kind}_recovered"] = {name: value for name, (value, _) in figures.items()}
        recovered[f"{kind}_recovered_ci"] = {name: bounds for name, (_, bounds) in figures.items()}
    return Splice(predictions=count, ce=ce, kl=kl, **recovered), notes


def _one_minus(value: float | None, bounds: Range | None) -> tuple[float | None, Range | None]:
    return (
        None if value is None else 1.0 - value,
        None if bounds is None else (1.0 - bounds[1], 1.0 - bounds[0]),
    )


def _ratio(above: float, below: float) -> float | None:
    if not (np.isfinite(above) and np.isfinite(below)) or below == 0:
        return None
    return float(above / below)


def _quantiles(l0: Int[NDArray, " latents_and_one"]) -> dict[str, int]:
    reached = np.cumsum(l0) / max(int(l0.sum()), 1)
    return {str(level): int(np.searchsorted(reached, level - 1e-12)) for level in QUANTILES}


def _sentence(one: ModelEvaluation) -> str:
    fve = "no variance to explain" if one.fve is None else f"FVE {one.fve:.3f}"
    text = f"{one.side}: {fve}, L0 {one.l0:.1f}, dead {one.dead_share:.1%}"
    if one.splice is not None:
        shares = [
            f"{value:.1%} against {name}"
            for name, value in one.splice.ce_recovered.items()
            if value is not None
        ]
        text += f", CE recovered {' and '.join(shares) or 'undefined'}"
    return text
