"""Overlap of two top-k lists for every k at once, and its exact decomposition into latents.

Per token, `S_b` and `S_f` are the k strongest strictly positive latents in the base and in the tuned model and
`k_t = min(k, longer list)`. Overlap is `o_k = |S_b ∩ S_f| / k_t`. A latent that both lists hold at ranks
`r_b` and `r_f` counts for every `k >= max(r_b, r_f)`, so one histogram of max-ranks gives the whole curve.
And exactly, `1 - o_k = (|S_b Δ S_f| + ||S_b| - |S_f||) / (2 k_t)`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.dictionaries import TopList


class Matches(NamedTuple):
    """Which entries of two lists are the same latent.

    Attributes:
        same: True where entry i of the base's list is entry j of the tuned model's.
        longer: The longer list of each token.
    """

    same: Bool[Tensor, "tokens k k"]
    longer: Int[Tensor, " tokens"]


class Churn(NamedTuple):
    """The difference of two lists at one k.

    Attributes:
        left: Entries of the base's list that the tuned model's lacks.
        entered: Entries of the tuned model's list that the base's lacks.
        k_t: min(k, longer list), at least 1.
        length_gap: How many entries one list has more than the other.
    """

    left: Bool[Tensor, "tokens k"]
    entered: Bool[Tensor, "tokens k"]
    k_t: Int[Tensor, " tokens"]
    length_gap: Int[Tensor, " tokens"]


def match(base: TopList, tuned: TopList) -> Matches:
    """Compare two lists entry by entry; padding matches nothing."""
    a = base.indices.to(torch.int32)
    b = tuned.indices.to(torch.int32)
    b = torch.where(b < 0, -2, b)
    return Matches(a[:, :, None] == b[:, None, :], torch.maximum(base.length, tuned.length))


def overlap_counts(matches: Matches) -> Int[Tensor, "tokens k"]:
    """|S_b ∩ S_f| for every k from 1 to the width of the lists."""
    tokens, k_max, _ = matches.same.shape
    device = matches.same.device
    worst = torch.maximum(torch.arange(k_max, device=device)[:, None], torch.arange(k_max, device=device))
    token, i, j = matches.same.nonzero(as_tuple=True)
    place = token * k_max + worst[i, j]
    return torch.bincount(place, minlength=tokens * k_max).view(tokens, k_max).cumsum(1)


def overlap_curve(
    counts: Int[Tensor, "tokens k"], longer: Int[Tensor, " tokens"]
) -> Float[Tensor, "tokens k"]:
    """o_k for every k; NaN where neither list has an entry."""
    ks = torch.arange(1, counts.shape[1] + 1, device=counts.device)
    # In double precision, so that the decomposition into latents sums to it exactly.
    curve = counts.double() / torch.minimum(ks, longer[:, None].clamp_min(1))
    curve[longer == 0] = torch.nan
    return curve


def churn(matches: Matches, base: TopList, tuned: TopList, k: int) -> Churn:
    """What left and what entered the top k."""
    same = matches.same[:, :k, :k]
    left = (base.indices[:, :k] >= 0) & ~same.any(2)
    entered = (tuned.indices[:, :k] >= 0) & ~same.any(1)
    lengths = base.length.clamp(max=k), tuned.length.clamp(max=k)
    return Churn(left, entered, matches.longer.clamp(1, k), (lengths[0] - lengths[1]).abs())


def value_change(matches: Matches, base: TopList, tuned: TopList, k: int) -> Float[Tensor, " tokens"]:
    """Mean |a_b - a_f| over mean (a_b + a_f) of the latents in both top-k lists; NaN where there is none.

    The same latent's two values are compared; the original compared values of the same rank.
    """
    token, i, j = matches.same[:, :k, :k].nonzero(as_tuple=True)
    a, b = base.values[token, i], tuned.values[token, j]
    size = matches.same.shape[0]
    difference, total = (
        torch.zeros(size, dtype=a.dtype, device=a.device).index_add_(0, token, v)
        for v in ((a - b).abs(), a + b)
    )
    return difference / torch.where(total > 0, total, torch.nan)
