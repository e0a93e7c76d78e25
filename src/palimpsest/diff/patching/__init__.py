"""The causal test: parts of the difference put into the base, and removed from the tuned model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from palimpsest.corpus import TokenBatch
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.methods import Method
from palimpsest.diff.patching.effects import Patcher, measure, predicted_places
from palimpsest.diff.patching.estimate import estimate
from palimpsest.diff.patching.samples import continuations
from palimpsest.diff.patching.sets import Candidates, Variant, plan
from palimpsest.diff.result import Patching
from palimpsest.diff.text import Texts
from palimpsest.errors import CorpusError
from palimpsest.evaluate.estimate import Settings
from palimpsest.models import ModelPair

__all__ = ["Candidates", "Patcher", "Variant", "check_text", "patch_pair"]


def patch_pair(
    method: Method,
    pair: ModelPair,
    site: str,
    texts: Texts,
    candidates: Candidates,
    config: DiffConfig,
    *,
    sets: Mapping[str, Sequence[int]] | None = None,
) -> Patching:
    """How much of the KL between tuned model and base each part of the difference carries.

    The base's activations at the site, changed by one part, go through the tuned model's upper layers; the result
    is compared with the tuned model by KL(tuned ‖ patched), in nats per measured prediction. Documents of even number
    are read. Each model runs once; what lies above the site runs once for every part.

    Args:
        method: The dictionary as a description of the step.
        pair: Both models in memory.
        site: Where the dictionary reads.
        texts: The text.
        candidates: Alive latents and their orders.
        config: `patching`, `confidence`, `resamples` and the seed are read.
        sets: Further sets of latents to measure in both directions, by name.

    Returns:
        Rows for every part, defined in `docs/measures/patching.md`.

    Raises:
        CorpusError: The text has no predictions to measure, or no answers where their first tokens are asked for.
        ConfigError: One of `sets` is empty or larger than the alive latents.
        SiteError: Nothing can be written at the site.
        NumericsError: NaN or infinity; names the document.

    Source: Minder et al., arXiv 2504.02922, section 3.3, with removal, controls and intervals added.
    """
    options = config.patching
    text = texts.pass_over(options.patch_tokens, config.models.tokens_per_batch, "even")
    batches = list(text)
    positions, template = _positions(texts, batches, config)
    variants = plan(candidates, options, config.run.seed, template=template, sets=sets or {})
    patcher = Patcher(method, pair, site, texts, candidates.mean_difference)
    tables, moved = measure(patcher, batches, variants, positions, options.first)
    settings = Settings(config.confidence, config.resamples, config.run.seed)
    found = estimate(tables, variants, texts.names, settings, moved=moved)
    if options.generate:
        found = replace(found, samples=continuations(patcher, batches, options.generate))
    return found


def check_text(texts: Texts, config: DiffConfig) -> None:
    """Refuse, before any model runs, text that `patch_pair` would refuse.

    Raises:
        CorpusError: The text has no predictions to measure, or no answers where their first tokens are asked for.
    """
    per_batch = config.models.tokens_per_batch
    _positions(texts, list(texts.pass_over(config.patching.patch_tokens, per_batch, "even")), config)


def _positions(
    texts: Texts, batches: Sequence[tuple[int, TokenBatch]], config: DiffConfig
) -> tuple[tuple[str, ...], bool]:
    """Which predictions are measured, and whether the text has template or special tokens."""
    count, early, template = 0, 0, False
    for _, batch in batches:
        places = texts.places(batch)
        predicted, first = predicted_places(places, batch, config.patching.first)
        count, early = count + len(predicted), early + int(first.sum())
        template = template or bool(places.template.any())
    asked = config.patching.positions
    if count == 0:
        raise CorpusError(
            "The text has no prediction to measure",
            expected="measured tokens that something precedes",
            fix="Give longer documents, or measure other roles",
        )
    if "first" in asked and not early:
        raise CorpusError(
            "The text has no answers, so their first tokens cannot be measured",
            expected="conversations with answers by the assistant",
            fix="Give rows with messages, or mark the turns of plain text with --dialogue 'User:' 'Assistant:'",
        )
    return tuple(dict.fromkeys(asked)) or (("all", "first") if early else ("all",)), template
