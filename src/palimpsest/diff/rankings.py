"""Orders of the alive latents, the most tuned-specific first: what patching puts to the test."""

from __future__ import annotations

import numpy as np
from jaxtyping import Int
from numpy.typing import NDArray
from scipy.stats import rankdata

from palimpsest.diff.methods import Method

HIGHEST_NU = 2.0
"""A ν above this, or below the floor, says that a latent's direction is noise here: it is not ranked by ν."""


def rankings(
    method: Method, columns: dict[str, NDArray], nu_floor: float, attributed: NDArray | None = None
) -> dict[str, Int[NDArray, " ranked"]]:
    """Latents by each measure that the dictionary has.

    - `delta_norm`: largest Δnorm (crosscoders);
    - `nu`: smallest rank of ν^r + rank of ν^ε (crosscoders), or smallest ν of the centred activations;
    - `activation_change`: largest Σ |entry| ‖change‖;
    - `attribution`: largest share of the KL by gradients, where that was computed (on other documents).

    Args:
        method: The dictionary.
        columns: Of the table of latents.
        nu_floor: Smallest ν that means anything.
        attributed: Share of each latent.
    """
    alive = ~columns["dead"]
    made: dict[str, NDArray] = {}
    if method.kind == "crosscoder":
        made["delta_norm"] = _descending(columns["delta_norm"], alive)
        ratios = ("nu_reconstruction", "nu_error")
    else:
        ratios = ("nu_centred",)
    with np.errstate(invalid="ignore"):
        sound = alive & np.logical_and.reduce(
            [(columns[name] >= nu_floor) & (columns[name] <= HIGHEST_NU) for name in ratios]
        )
    chosen = np.flatnonzero(sound)
    ranks = np.sum([rankdata(columns[name][chosen]) for name in ratios], axis=0)
    made["nu"] = chosen[np.argsort(ranks, kind="stable")]
    made["activation_change"] = _descending(columns["activation_change"], alive)
    if attributed is not None and np.any(attributed):
        made["attribution"] = _descending(attributed, alive)
    return made


def _descending(values: NDArray, which: NDArray[np.bool_]) -> Int[NDArray, " ranked"]:
    chosen = np.flatnonzero(which & np.isfinite(values))
    return chosen[np.argsort(-values[chosen], kind="stable")]
