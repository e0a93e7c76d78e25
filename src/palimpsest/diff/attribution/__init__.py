"""Which latents explain what the fine-tune changed: attribution along the way from base to tuned, and its check.

`integrate` takes the gradients, `behaviours` groups latents on the predictions that differ most, `answers` reads
behaviours that the user names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.diff.attribution.answers import read_behaviours
from palimpsest.diff.attribution.behaviours import Differing, prediction_kl
from palimpsest.diff.attribution.integrate import Integrator, Item, Sums
from palimpsest.diff.config import DiffConfig
from palimpsest.diff.methods import Method
from palimpsest.diff.result import Attributed, Behaviour
from palimpsest.diff.text import TextPass, Texts
from palimpsest.log import progress
from palimpsest.models import ModelPair

TOP = 30
"""Latents that an objective lists."""

VERIFIED = (1, 3, 10, 30)
"""How many of the strongest latents are put in and taken out."""


@dataclass(frozen=True)
class AttributionResult:
    """What gradients integrated from base to tuned give to every latent.

    Attributes:
        found: The KL first, then one objective for each behaviour file.
        causal_share: Share of the KL gap that is attributed to each latent; zeros where there is no gap.
        by_behaviour: The same for each behaviour file, by name.
        behaviours: Groups of latents that explain the predictions in which the models differ most.
    """

    found: list[Attributed]
    causal_share: Float[NDArray, " latents"]
    by_behaviour: dict[str, Float[NDArray, " latents"]]
    behaviours: list[Behaviour]


def attribute_pair(
    method: Method, pair: ModelPair, site: str, texts: Texts, config: DiffConfig
) -> AttributionResult:
    """Attribute KL(tuned ‖ ·), and the behaviours that are named, to the latents of a dictionary.

    The upper layers of the tuned model are run on h_base + α(h_tuned - h_base), and the gradient G of the objective
    is averaged over α. A latent gets -Σ entry · (change · G) over the tokens, the bias likewise; with the part that
    the dictionary leaves out they add up to the gap between base and tuned activations (completeness).

    Args:
        method: The dictionary.
        pair: Both models, in memory at once.
        site: Where activations are read and given, absolute.
        texts: Its documents of odd number are read.
        config: The diff.

    Raises:
        ConfigError: Names of behaviours clash.
        CorpusError: No text to measure, or a behaviour file that cannot be used.
        NumericsError: NaN or infinity, with the document.
        SiteError: Nothing can be written at the site.
    """
    options, per_batch = config.attribution, config.models.tokens_per_batch
    # A behaviour file with a fault in it must not cost the passes that come before it.
    answers = read_behaviours(options.behaviour, pair.tokenizer, texts, options.attribution_tokens)
    integrator = Integrator(method, pair, site, options.steps)
    passed = texts.pass_over(options.attribution_tokens, per_batch, "odd")
    read = _Items(lambda: _text_items(texts, passed))
    differing = Differing(prediction_kl(pair, read), options.differing)
    attributed, share, of_differing = _attributed("kl", integrator, read, differing)
    found, by_behaviour = [attributed], {}
    for one in answers:
        items = _Items(lambda one=one: one.items(texts, per_batch))
        attributed, by_behaviour[one.name], _ = _attributed(one.name, integrator, items, units=len(one.pairs))
        found.append(attributed)
    behaviours = differing.behaviours(of_differing, pair.tokenizer, texts.names)
    return AttributionResult(found, share, by_behaviour, behaviours)


class _Items(Iterable[Item]):
    """Batches that can be passed over again; those in which no prediction counts are left out."""

    def __init__(self, make: Callable[[], Iterator[Item]]) -> None:
        self._make = make

    def __iter__(self) -> Iterator[Item]:
        return (item for item in self._make() if len(item.before))


def _text_items(texts: Texts, passed: TextPass) -> Iterator[Item]:
    for corpus, batch in passed:
        places = texts.places(batch)
        # Nothing predicts the first token of a sequence.
        predicted = places.measured & (places.flat % batch.input_ids.shape[1] > 0)
        yield Item(corpus, batch, places, places.flat[predicted] - 1, None)


def _attributed(
    name: str, integrator: Integrator, items: _Items, differing: Differing | None = None, units: int = 0
) -> tuple[Attributed, Float[NDArray, " latents"], Float[NDArray, " latents"]]:
    """One objective: what is reported of it, the share of each latent, and that in the differing predictions alone.

    The gap is told per unit, which is a prediction where no number of units is given.
    """
    whole, part = Sums(integrator.method), Sums(integrator.method)
    predictions = 0
    with progress(f"Attributing {name}", unit="predictions") as advance:
        for item in items:
            path = integrator.path(item)
            ends = integrator.values(path, item, [torch.zeros_like(path.step), path.step])
            masks = [torch.ones(len(item.before), dtype=torch.bool)]
            if differing is not None and (chosen := differing.take(item)).any():
                masks.append(chosen)
            gradients = integrator.gradients(path, item, masks)
            # Without a differing prediction in the batch there is one mask only.
            for sums, mask, gradient in zip((whole, part), masks, gradients, strict=False):
                shares = integrator.shares(path, gradient)
                sums.add(path, gradient, shares, ends[mask.to(ends.device)])
                if differing is not None and sums is part:
                    differing.add(item, path, mask, shares)
            predictions += len(item.before)
            advance(len(item.before))
    units = units or predictions
    share = whole.share(units)
    verified = _verified(integrator, items, share, whole.gap)
    return _summary(name, whole, share, units, integrator.steps, verified), share, part.share(units)


def _summary(
    name: str,
    sums: Sums,
    share: Float[NDArray, " latents"],
    units: int,
    steps: int,
    verified: list[dict[str, Any]],
) -> Attributed:
    """What is reported of an objective; without a gap there is nothing to share out, and every share is 0."""
    gap = sums.gap if sums.has_gap(units) else float("inf")
    latents, bias, explained = float(share.sum()), sums.bias / gap, sums.whole / gap
    strongest = np.argsort(-np.abs(share), kind="stable")[:TOP]
    return Attributed(
        objective=name,
        gap=sums.gap / max(units, 1),
        units=units,
        latents=latents,
        bias=bias,
        error=explained - latents - bias,
        incomplete=1 - explained if sums.has_gap(units) else 0.0,
        steps=steps,
        top=[{"latent": int(latent), "share": float(share[latent])} for latent in strongest if share[latent]],
        verified=verified,
    )


def _verified(
    integrator: Integrator, items: _Items, share: Float[NDArray, " latents"], gap: float
) -> list[dict[str, Any]]:
    """The strongest latents added to the base and taken from the tuned activations, beside what was predicted."""
    order = np.argsort(-share, kind="stable")
    sizes = [size for size in VERIFIED if size <= int((share > 0).sum())]
    if not sizes:
        return []
    method = integrator.method
    rank = torch.from_numpy(np.argsort(order)).to(method.change.device)
    totals = np.zeros(2 + 2 * len(sizes))
    with progress("Checking the strongest latents", unit="predictions") as advance:
        for item in items:
            path = integrator.path(item)
            place = rank[path.entries.indices.long()]
            parts = [method.written(path.entries, path.entries.values * (place < size)) for size in sizes]
            ends = [torch.zeros_like(path.step), path.step]
            variants = ends + parts + [path.step - one for one in parts]
            totals += integrator.values(path, item, variants).sum(0).cpu().numpy()
            advance(len(item.before))
    none, tuned, *others = totals
    return [
        {
            "size": size,
            "predicted": float(share[order[:size]].sum()),
            "added": float((none - others[index]) / gap),
            "removed": float((others[len(sizes) + index] - tuned) / gap),
        }
        for index, size in enumerate(sizes)
    ]
