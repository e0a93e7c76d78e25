"""Selection rules: which pre-activations survive, as ordered sparse rows.

Every rule keeps strictly positive values only, orders a row strongest first and breaks ties by the smaller
latent, exactly. Top-k is top-k, then ReLU, as SAELens does it (https://github.com/decoderesearch/SAELens).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.codes import Codes

ACTIVATIONS = ("relu", "topk", "batch_topk", "jumprelu", "gated")
"""Every rule that a dictionary can be built with; gated is read and never trained."""

THRESHOLDED = ("batch_topk", "jumprelu")
"""Rules whose inference compares each pre-activation with a threshold per latent."""


def select(
    pre: Float[Tensor, "tokens latents"],
    activation: str,
    *,
    k: int | float | None = None,
    threshold: Float[Tensor, " latents"] | None = None,
) -> Codes:
    """Apply a selection rule as inference does (batch_topk by its threshold).

    Args:
        pre: Pre-activations.
        activation: One of `ACTIVATIONS`.
        k: Latents per token, for topk.
        threshold: For batch_topk and jumprelu.

    Returns:
        Ordered codes; differentiable in `pre` where it needs a gradient.
    """
    if activation == "topk":
        assert k is not None
        values, indices = top_k(pre, int(k))
        return Codes.from_fixed(values, indices, pre.shape[1])
    return above(pre, threshold if activation in THRESHOLDED else None)


def gate(
    pre: Float[Tensor, "tokens latents"],
    b_gate: Float[Tensor, " latents"],
    r_mag: Float[Tensor, " latents"],
    b_mag: Float[Tensor, " latents"],
) -> Float[Tensor, "tokens latents"]:
    """The magnitude `pre * e^r_mag + b_mag` where the gate `pre + b_gate` is above 0, else 0.

    Args:
        pre: Activations times the encoder, without a bias.
        b_gate: Bias of the gate.
        r_mag: Logarithm of the magnitude's rescaling of the encoder.
        b_mag: Bias of the magnitude.

    Source: Rajamanoharan et al., Improving Dictionary Learning with Gated SAEs (https://arxiv.org/abs/2404.16014).
    """
    return torch.where(pre + b_gate > 0, torch.addcmul(b_mag, pre, r_mag.exp()), 0)


def top_k(
    pre: Float[Tensor, "tokens latents"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest entries of each row, then ReLU; entries that are not positive become (0, latent 0).

    Args:
        pre: Pre-activations.
        k: At most the number of latents.
    """
    needs_gradient = torch.is_grad_enabled() and pre.requires_grad
    if not needs_gradient and (found := kernels.largest(pre, k)) is not None:
        return found
    with torch.no_grad():
        best, indices = torch.topk(pre, min(k + 1, pre.shape[1]), dim=1)
        best, indices = _settle_ties(pre, best, indices, k)
        indices = indices.masked_fill_(best <= 0, 0)
    if needs_gradient:
        kept = pre.gather(1, indices)
        return torch.where(best > 0, kept, kept.new_zeros(())), indices
    return best.relu_(), indices


def _settle_ties(
    pre: Tensor, best: Tensor, indices: Tensor, k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """Make ties go to the smaller latent; touches only rows that have one."""
    equal = (best[:, 1:] == best[:, :-1]) & (best[:, 1:] > 0)
    best, indices = best[:, :k].contiguous(), indices[:, :k].contiguous()
    if k < pre.shape[1]:
        rows = equal[:, k - 1].nonzero().squeeze(1)
        if rows.numel():
            _settle_boundary(pre, best, indices, rows)
    rows = equal[:, : k - 1].any(dim=1).nonzero().squeeze(1)
    if rows.numel():
        by_latent, order = indices[rows].sort(dim=1)
        best[rows], order = best[rows].gather(1, order).sort(dim=1, descending=True, stable=True)
        indices[rows] = by_latent.gather(1, order)
    return best, indices


def _settle_boundary(pre: Tensor, best: Tensor, indices: Tensor, rows: Tensor) -> None:
    """Where the last kept value also occurs outside the list, keep its occurrences of smallest latent."""
    last = best[rows, -1:]
    tied = best[rows] == last
    row, latent = (pre[rows] == last).nonzero(as_tuple=True)
    counts = torch.bincount(row, minlength=rows.shape[0])
    rank = torch.arange(row.shape[0], device=row.device) - (counts.cumsum(0) - counts)[row]
    chosen = latent[rank < tied.sum(dim=1)[row]]
    indices[rows] = indices[rows].masked_scatter(tied, chosen)


def above(pre: Float[Tensor, "tokens latents"], threshold: Float[Tensor, " latents"] | None) -> Codes:
    """Entries that are positive and above the threshold of their latent: relu(h) * (h > threshold)."""
    tokens, n_latents = pre.shape
    if not (torch.is_grad_enabled() and pre.requires_grad):
        found = kernels.above(pre, pre.new_zeros(n_latents) if threshold is None else threshold)
        if found is not None:
            return Codes(*found, n_latents)
    with torch.no_grad():
        row, latent = (pre > (0 if threshold is None else threshold.clamp(min=0))).nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=tokens)
        crow = torch.zeros(tokens + 1, dtype=torch.long, device=pre.device)
        torch.cumsum(counts, dim=0, out=crow[1:])
    values = pre[row, latent]
    order = _strongest_first(values.detach(), row, crow, counts)
    return Codes(crow, latent[order], values[order], n_latents)


def _strongest_first(values: Tensor, row: Tensor, crow: Tensor, counts: Tensor) -> Int[Tensor, " entries"]:
    """Order of entries inside their rows; the input is ordered by latent, so a stable sort settles ties."""
    if values.numel() == 0:
        return row
    column = torch.arange(values.shape[0], device=values.device) - crow[row]
    padded = values.new_zeros(counts.shape[0], int(counts.max()))
    padded[row, column] = values
    order = padded.sort(dim=1, descending=True, stable=True).indices
    return order[row, column] + crow[row]
