"""Classes of latents by their decoder norms, what Latent Scaling says of them, and the two artefacts of L1."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray

from palimpsest.dictionaries import Dictionary
from palimpsest.diff.config import ClassOptions
from palimpsest.diff.methods import Method
from palimpsest.diff.scaling import Geometry, Scaling, without_own

CLASSES = ("tuned-only", "shared", "base-only", "other", "dead")
VERDICTS = ("tuned-specific", "rejected", "undetermined")

SAME_CONCEPT = 0.9
"""Cosine from which a tuned-only and a base-only latent count as one concept that was split."""

MOST_PAIRS = 2000
"""Such pairs whose joint firing is counted."""

TILE = 1024


def norms(dictionary: Dictionary) -> Float[NDArray, "latents models"]:
    """Decoder norms in base and tuned; one column for what has one model."""
    return dictionary.decoder_norms().detach().double().cpu().numpy()


def delta_norm(norm: Float[NDArray, "latents models"]) -> Float[NDArray, " latents"]:
    """½ [(‖d_tuned‖ - ‖d_base‖) / max(‖d_tuned‖, ‖d_base‖) + 1]: 0 is base-only, 1 is tuned-only.

    Source: Minder et al., arXiv 2504.02922 (their released tables hold 1 minus this).
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        return 0.5 * ((norm[:, 1] - norm[:, 0]) / norm.max(axis=1) + 1.0)


def decoder_cosine(dictionary: Dictionary) -> Float[NDArray, " latents"]:
    """Cosine of each latent's two decoder rows; NaN where one is zero."""
    rows = dictionary.W_dec.detach().double()
    above, below = (rows[:, 0] * rows[:, 1]).sum(1), rows.norm(dim=2).prod(1)
    return torch.where(below > 0, above / below, torch.nan).cpu().numpy()


def classify(
    method: Method, scaling: Scaling, alive: Bool[NDArray, " latents"], options: ClassOptions
) -> NDArray:
    """The class of each latent.

    A crosscoder's comes from Δnorm. The other dictionaries have one decoder, so theirs comes from ν of the centred
    activations with the same meaning: below `nu_activation` tuned-only, above its inverse base-only, and shared where
    the two models differ by less than a third.
    """
    if method.kind == "crosscoder":
        measure = delta_norm(norms(method.dictionary))
        lines = (options.base_only, options.shared_from, options.shared_to, options.tuned_only)
        low, shared_from, shared_to, high = lines
        below, above = measure < low, measure > high
        tuned, base = above, below
        shared = (measure >= shared_from) & (measure <= shared_to)
    else:
        measure = scaling.nu["centred"]
        with np.errstate(invalid="ignore"):
            tuned, base = measure < options.nu_activation, measure > 1 / options.nu_activation
            shared = (measure >= 2 / 3) & (measure <= 3 / 2)
    found = np.select([~alive, tuned, base, shared], ["dead", "tuned-only", "base-only", "shared"], "other")
    return found.astype(np.str_)


def verdicts(method: Method, scaling: Scaling, options: ClassOptions) -> NDArray:
    """What Latent Scaling says of each latent: `tuned-specific`, `rejected` or `undetermined`.

    It is asked only where the interval of β_tuned lies above 0 and ν is not below `nu_floor`.
    """
    if method.kind == "crosscoder":
        rules = {"error": options.nu_error, "reconstruction": options.nu_reconstruction}
    else:
        rules = {"centred": options.nu_activation}
    with np.errstate(invalid="ignore"):
        asked = np.logical_and.reduce(
            [(scaling.beta_tuned_lo[name] > 0) & (scaling.nu[name] >= options.nu_floor) for name in rules]
        )
        passed = np.logical_and.reduce([scaling.nu[name] < limit for name, limit in rules.items()])
    return np.where(asked, np.where(passed, "tuned-specific", "rejected"), "undetermined").astype(np.str_)


def sensitivity(
    method: Method, scaling: Scaling, fixed: Geometry, alive: Bool[NDArray, " latents"], options: ClassOptions
) -> dict[str, float] | None:
    """Shares of the alive latents that the rule would call each verdict if the base did not hold them.

    None for a diff-SAE, whose latents are no contribution to the base.
    """
    if method.kind == "diff-sae" or not alive.any():
        return None
    found = verdicts(method, without_own(scaling, fixed), options)[alive]
    return {name: float((found == name).mean()) for name in VERDICTS}


def split_pairs(method: Method, options: ClassOptions) -> Int[NDArray, "pairs two"]:
    """(tuned-only, base-only) latents of one direction: candidates for Latent Decoupling, closest first.

    Known before any pass, since a crosscoder's classes are: the cosine of the first's decoder in the tuned model and
    the second's in the base is above `SAME_CONCEPT`.
    """
    none = np.zeros((0, 2), np.int64)
    if method.kind != "crosscoder":
        return none
    measure = delta_norm(norms(method.dictionary))
    tuned, base = (np.flatnonzero(one) for one in (measure > options.tuned_only, measure < options.base_only))
    rows = torch.nn.functional.normalize(method.dictionary.W_dec.detach().float(), dim=2)
    right = rows[torch.from_numpy(base), 0]
    found: list[tuple[float, int, int]] = []
    for some in np.split(tuned, range(TILE, len(tuned), TILE)):
        cosine = (rows[torch.from_numpy(some), 1] @ right.T).cpu().numpy()
        for i, j in zip(*np.nonzero(cosine > SAME_CONCEPT), strict=True):
            found.append((-float(cosine[i, j]), int(some[i]), int(base[j])))
    kept = sorted(found)[:MOST_PAIRS]
    return np.array([pair for _, *pair in kept], np.int64) if kept else none


def artefacts(
    found: dict[str, NDArray],
    scaling: Scaling,
    pairs: tuple[Int[NDArray, "pairs two"], Int[NDArray, "pairs three"]],
    options: ClassOptions,
) -> dict[str, Any]:
    """How many tuned-only latents Complete Shrinkage and Latent Decoupling explain.

    Args:
        found: `class` and `verdict` of each latent.
        scaling: Its ratios.
        pairs: Of `split_pairs`, and on how many tokens the first, the second, and both fire.
        options: The limits of ν.
    """
    tuned = found["class"] == "tuned-only"
    asked = tuned & (found["verdict"] != "undetermined")
    with np.errstate(invalid="ignore"):
        shrunk = asked & (scaling.nu["error"] >= options.nu_error)
        decoupled = asked & (scaling.nu["reconstruction"] >= options.nu_reconstruction)
    latents, counts = pairs
    firing = (counts[:, :2] > 0).all(axis=1)
    first, second, both = counts[firing].T
    overlap = both / np.maximum(first + second - both, 1)
    shared = found["class"] == "shared"
    rows: dict[str, Any] = {
        "shrinkage": int(shrunk.sum()),
        "decoupling": int(decoupled.sum()),
        "split_pairs": int(firing.sum()),
        "split_pairs_apart": int((overlap < 0.1).sum()),
        "split_pairs_overlap": float(overlap.mean()) if len(overlap) else None,
        "split_examples": [
            {"tuned_only": int(a), "base_only": int(b), "overlap": float(share)}
            for (a, b), share in list(zip(latents[firing], overlap, strict=True))[:10]
        ],
    }
    for name in ("reconstruction", "error"):
        null = scaling.nu[name][shared]
        rows[f"shared_{name}"] = _quantiles(null)
        rows[f"tuned_only_like_shared_{name}"] = _inside(scaling.nu[name][asked], null)
    return rows


def _quantiles(values: NDArray) -> dict[str, float] | None:
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    levels = (2.5, 25, 50, 75, 97.5)
    return {
        str(level): float(value) for level, value in zip(levels, np.percentile(known, levels), strict=True)
    }


def _inside(values: NDArray, null: NDArray) -> float | None:
    """Share of `values` inside the central 95 % of `null`."""
    null, values = null[np.isfinite(null)], values[np.isfinite(values)]
    if not len(null) or not len(values):
        return None
    low, high = np.percentile(null, [2.5, 97.5])
    return float(((values >= low) & (values <= high)).mean())
