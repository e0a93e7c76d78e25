"""Latent Scaling of every latent in one pass: how much of each latent's direction either model holds.

For the direction d of a latent, its code f on token i and a target Y, β = argmin_b Σ_i ‖b f_i d - Y_i‖² has the closed
form d · (Σ_i f_i Y_i) / (‖d‖² Σ_i f_i²). The numerator is a sum of scalars f_i (d · Y_i) over the tokens on which the
latent fires, so only those products are computed (a sampled matrix product), and only scalars are kept: per latent and
group of documents, from which every ratio and its interval follow. No [d_model, latents] sum is needed.

Source: Minder et al., arXiv 2504.02922, section 3; the error targets follow from activation and reconstruction:
β^ε = β^act - β^r + (d · d_model's own row) / ‖d‖².
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.dictionaries import Codes, kernels
from palimpsest.diff.methods import Method, scaled
from palimpsest.diff.text import GROUPS
from palimpsest.stats import Resampler, percentile_interval

COLUMNS = (
    "squares",
    "value",
    "activation_base",
    "activation_tuned",
    "reconstruction_base",
    "reconstruction_tuned",
)
"""Per latent: Σ f², Σ f, and Σ f (d · Y) for the activations and reconstructions of each model."""

TARGETS = ("activation", "centred", "reconstruction", "error")
"""`centred` takes each model's mean activation out first: the variant without a bias."""

FEWEST_GROUPS = 5
"""Groups of documents that a latent must fire in for an interval."""

CHUNK = 1 << 24
"""Resampled sums that exist at once."""


class ScalingSums:
    """Accumulates the sums; their memory is groups × latents, whatever the number of tokens.

    Args:
        method: The dictionary; only a crosscoder has reconstructions of both models.
    """

    def __init__(self, method: Method) -> None:
        self._method = method
        dictionary = method.dictionary
        self._width = len(COLUMNS) if method.kind == "crosscoder" else 4
        self._sums = torch.zeros(
            GROUPS * dictionary.n_latents, self._width, dtype=torch.float64, device=dictionary.device
        )

    def add(
        self,
        group: Int[Tensor, " tokens"],
        acts: Float[Tensor, "tokens models d_model"],
        codes: Codes,
        reconstruction: Float[Tensor, "tokens models d_model"] | None = None,
    ) -> None:
        """Fold the measured tokens of a batch in.

        Args:
            group: Of each token's document.
            acts: Of base and tuned.
            codes: `method.codes(acts)`.
            reconstruction: A crosscoder's `decode(codes)`.
        """
        targets = [acts[:, 0], acts[:, 1]]
        if reconstruction is not None:
            targets += [reconstruction[:, 0], reconstruction[:, 1]]
        entries = scaled(codes)
        index, value = entries.indices.long(), entries.values
        rows = self._method.direction
        columns = value.new_empty(len(value), self._width)
        torch.mul(value, value, out=columns[:, 0])
        columns[:, 1] = value
        for place, target in enumerate(targets, 2):
            left = target.to(rows.dtype).contiguous()
            torch.mul(kernels.row_dot(entries.crow, index, left, rows), value, out=columns[:, place])
        cell = group.to(index.device)[codes.rows()] * codes.n_latents + index
        self._sums.index_add_(0, cell, columns.double())

    def finish(self) -> Float[NDArray, "groups latents columns"]:
        """The sums, by `COLUMNS`; those of the reconstructions are NaN where there are none."""
        found = self._sums.view(GROUPS, -1, self._width).cpu().numpy()
        missing = np.full((*found.shape[:2], len(COLUMNS) - self._width), np.nan)
        return np.concatenate([found, missing], axis=2)


class Geometry(NamedTuple):
    """What the decoder adds to the sums.

    Attributes:
        squared: ‖d‖² of each latent's direction.
        own: d · d_m / ‖d‖² for base and tuned: what a latent's own contribution adds to the β of an error.
    """

    squared: Float[NDArray, " latents"]
    own: Float[NDArray, "models latents"]

    def of(self, latents: Int[NDArray, " some"]) -> Geometry:
        """That of some latents."""
        return Geometry(self.squared[latents], self.own[:, latents])


def geometry(method: Method) -> Geometry:
    """The products that need no pass, in float64."""
    d = method.direction.double()
    squared = d.square().sum(1)
    rows = method.dictionary.W_dec.detach().double()
    models = [rows[:, m] for m in range(2)] if method.kind == "crosscoder" else [d, d]
    own = torch.stack([(d * one).sum(1) for one in models]) / squared
    return Geometry(squared.cpu().numpy(), own.cpu().numpy())


def with_means(
    method: Method,
    sums: Float[NDArray, "groups latents columns"],
    activations: Float[NDArray, "groups models d_model"],
) -> Float[NDArray, "groups latents more_columns"]:
    """The sums with two columns more: d · Σ x of base and of tuned, from which the mean of any documents follows.

    Args:
        method: The dictionary.
        sums: `ScalingSums.finish()`.
        activations: Σ x of each group.
    """
    d = method.direction.double().cpu().numpy()
    return np.concatenate([sums, np.moveaxis(activations @ d.T, 1, 2)], axis=2)


def betas(
    sums: Float[NDArray, "... more_columns"], fixed: Geometry, tokens: Any
) -> dict[str, Float[NDArray, "models ..."]]:
    """β of base and tuned for every target of `TARGETS`, from sums over any set of documents.

    Args:
        sums: `[..., latents, columns]` of `with_means`.
        fixed: Of the same latents.
        tokens: Of those documents; broadcasts against `[..., latents]`.
    """
    squares, value = sums[..., 0], sums[..., 1]
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = 1.0 / (fixed.squared * squares)
        activation = np.stack([sums[..., 2] * scale, sums[..., 3] * scale])
        shift = np.stack([value * sums[..., 6 + m] / tokens * scale for m in range(2)])
        reconstruction = np.stack([sums[..., 4] * scale, sums[..., 5] * scale])
        own = np.stack([np.broadcast_to(fixed.own[m], squares.shape) for m in range(2)])
    return {
        "activation": activation,
        "centred": activation - shift,
        "reconstruction": reconstruction,
        "error": activation - reconstruction + own,
    }


class Scaling(NamedTuple):
    """β and ν of every latent with intervals over documents; NaN where they are not defined.

    Attributes:
        beta: `[models, latents]` by target.
        beta_tuned_lo: Lower end of the interval of the tuned model's β, by target.
        nu: β_base / β_tuned by target.
        lo: Lower end of its interval.
        hi: Upper end.
        groups: Groups of documents in which each latent fires.
    """

    beta: dict[str, Float[NDArray, "models latents"]]
    beta_tuned_lo: dict[str, Float[NDArray, " latents"]]
    nu: dict[str, Float[NDArray, " latents"]]
    lo: dict[str, Float[NDArray, " latents"]]
    hi: dict[str, Float[NDArray, " latents"]]
    groups: Int[NDArray, " latents"]


def scale_latents(
    sums: Float[NDArray, "groups latents more_columns"],
    fixed: Geometry,
    tokens: Int[NDArray, " groups"],
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
) -> Scaling:
    """β, ν and their intervals from the sums; the bootstrap draws groups of documents.

    A group holds every document whose number leaves the same rest, so it is a fair draw of documents, and whole
    documents stay together. The intervals are widened for the number of groups in which a latent fires; latents that
    fire in fewer than `FEWEST_GROUPS` have none.

    Args:
        sums: Of `with_means`.
        fixed: Of the dictionary.
        tokens: Measured in each group.
        confidence: Coverage.
        resamples: Of groups.
        seed: Of the resamples.
    """
    there = tokens > 0
    used, tokens = sums[there], tokens[there]
    total, fires = used.sum(0), (used[:, :, 0] > 0).sum(0)
    beta = betas(total, fixed, tokens.sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        nu = {name: both[0] / both[1] for name, both in beta.items()}
    bounds = {
        name: {target: np.full(total.shape[0], np.nan) for target in TARGETS}
        for name in ("lo", "hi", "beta_tuned_lo")
    }
    draws = Resampler(len(used), resamples, [seed, 17])
    counted = draws.apply(lambda weights: weights @ tokens)[:, None]
    step = max(1, CHUNK // (resamples * sums.shape[2]))
    for count in np.unique(fires[fires >= FEWEST_GROUPS]):
        alike = np.flatnonzero(fires == count)
        for some in np.split(alike, range(step, len(alike), step)):
            part = used[:, some].reshape(len(used), -1)
            sampled = draws.apply(lambda weights, part=part: weights @ part)
            sampled = sampled.reshape(-1, len(some), sums.shape[2])
            for target, both in betas(sampled, fixed.of(some), counted).items():
                with np.errstate(invalid="ignore", divide="ignore"):
                    ratio = both[0] / both[1]
                lo, hi = percentile_interval(ratio, confidence, int(count))
                bounds["lo"][target][some], bounds["hi"][target][some] = lo, hi
                least = percentile_interval(both[1], confidence, int(count))[0]
                bounds["beta_tuned_lo"][target][some] = least
    return Scaling(beta, bounds["beta_tuned_lo"], nu, bounds["lo"], bounds["hi"], fires)


def without_own(scaling: Scaling, fixed: Geometry) -> Scaling:
    """The ratios that each latent would have if the base did not hold it: its own contribution taken out of the base.

    A positive control: every latent is tuned-only then, by construction, and the share that the rule calls so is what
    the rule can see at all. Codes and other latents stay as they are.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        nu = {name: (both[0] - fixed.own[0]) / both[1] for name, both in scaling.beta.items()}
    return scaling._replace(nu=nu)
