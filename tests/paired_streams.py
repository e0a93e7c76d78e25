"""Synthetic paired tokens, and the audit's sums computed from them densely, as the definitions read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from palimpsest.audit.sums import Accumulator, CorpusSums, Measure
from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Dictionary
from palimpsest.harvest import PairedTokens

SITE = "resid_post.0"


class Letters:
    """A tokenizer that writes every id as a number."""

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@dataclass(frozen=True)
class Text:
    """A document as both models see it: activations, losses and KL of every position, measured or not."""

    index: int
    ids: np.ndarray
    keep: np.ndarray
    acts: np.ndarray
    loss: np.ndarray
    kl: np.ndarray


def texts(documents=7, *, seed=0, d_model=8, change=0.4, longest=9, everything=False) -> list[Text]:
    """Random documents of random length; the tuned activations are the base's plus noise of size `change`."""
    rng = np.random.default_rng(seed)
    made = []
    for place in range(documents):
        length = int(rng.integers(2, longest + 1))
        keep = rng.random(length) < 0.8
        keep[-1] = True
        base = rng.normal(size=(length, 1, d_model))
        acts = np.concatenate([base, base + change * rng.normal(size=base.shape)], 1) + 0.2
        loss = rng.gamma(2.0, size=(length, 2))
        loss[0] = np.nan
        kl = np.where(np.arange(length) == 0, np.nan, rng.gamma(1.0, size=length))
        ids = rng.integers(3, 1000, length)
        keep = np.ones(length, bool) if everything else keep
        made.append(Text(3 * place + 1, ids, keep, acts.astype(np.float32), loss, kl))
    return made


def batch_of(group: list[Text]) -> PairedTokens:
    """One padded batch of whole documents, as the harvest gives it."""
    width = max(len(text.ids) for text in group)
    shape = (len(group), width)
    ids, document = np.zeros(shape, np.int64), np.full(shape, -1)
    present, keep = np.zeros(shape, bool), np.zeros(shape, bool)
    for row, text in enumerate(group):
        size = len(text.ids)
        ids[row, :size], document[row, :size] = text.ids, text.index
        present[row, :size], keep[row, :size] = True, text.keep
    row, position = keep.nonzero()

    def kept(name: str) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([getattr(text, name)[text.keep] for text in group])).float()

    tensors = [torch.from_numpy(array) for array in (ids, present, keep, document)]
    context = TokenBatch(*tensors, torch.zeros(shape, dtype=torch.long))
    row, position = torch.from_numpy(row), torch.from_numpy(position)
    return PairedTokens(
        {SITE: kept("acts")},
        context.document[row, position],
        position,
        context.input_ids[row, position],
        context,
        row,
        kept("loss"),
        kept("kl"),
    )


def random_dictionary(activation="topk", *, latents=24, d_model=8, k=None, bias=0.0, seed=0) -> Dictionary:
    """A dictionary with untied random parameters; a negative `bias` makes lists short."""
    torch.manual_seed(seed)
    k = {"topk": 6, "batch_topk": 4.5}.get(activation) if k is None else k
    made = Dictionary(d_model, latents, activation=activation, k=k, metadata={"site": SITE})
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape) * 0.5)
        made.b_enc.add_(bias)
        if made.threshold is not None:
            made.threshold.abs_()
    return made.requires_grad_(False).eval()


def measure_of(dictionary: Dictionary, **changes: Any) -> Measure:
    """A measure at short lists."""
    fields = {"name": "dictionary", "site": SITE, "k": 3, "k_max": 8, "seed": 5}
    return Measure(dictionary=dictionary, **{**fields, **changes})


def sums_of(groups: list[list[Text]], measure: Measure) -> CorpusSums:
    """Run groups of documents through the accumulator, a batch per group."""
    accumulator = Accumulator(measure)
    for group in groups:
        accumulator.add(batch_of(group))
    return accumulator.finish()


def codes_of(dictionary: Dictionary, x: np.ndarray) -> np.ndarray:
    """Dense activations `[tokens, latents]` in float64."""
    weights = {name: tensor.double().numpy() for name, tensor in dictionary.state_dict().items()}
    pre = (x.astype(np.float64) - weights["b_dec"][0]) @ weights["W_enc"][0] + weights["b_enc"]
    if dictionary.activation == "topk":
        limit = np.sort(pre, 1)[:, -int(dictionary.k)][:, None]
        return np.where((pre >= limit) & (pre > 0), pre, 0.0)
    floor = weights.get("threshold", np.zeros(pre.shape[1]))
    return np.where((pre > 0) & (pre > floor), pre, 0.0)


def strongest(z: np.ndarray, k: int) -> list[int]:
    """The k largest strictly positive entries of one row, ties by the smaller index."""
    order = sorted(range(len(z)), key=lambda latent: (-z[latent], latent))
    return [latent for latent in order if z[latent] > 0][:k]


def overlap(a: np.ndarray, b: np.ndarray, k: int) -> float:
    """|A ∩ B| / min(k, longer) of one token; NaN without entries."""
    mine, other = strongest(a, k), strongest(b, k)
    return len(set(mine) & set(other)) / max(len(mine), len(other)) if mine or other else np.nan
