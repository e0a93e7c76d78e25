"""What is put into the base, and removed from the tuned model: sets of latents, their controls, and baselines."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Float, Int
from numpy.typing import NDArray

from palimpsest.diff.config import PatchOptions
from palimpsest.errors import ConfigError

WHOLE = ("none", "bias", "all", "all+bias", "raw", "error", "mean", "template")
"""What is no choice of latents: nothing, the bias, every latent, the true difference and parts of it."""

REMOVED = ("all", "all+bias", "raw")

FEWEST = 2
STEP = 4
"""Sizes of the curve of a ranking: 1, 4, 16, 64 …"""


@dataclass(frozen=True)
class Candidates:
    """The latents that sets are drawn from.

    Attributes:
        alive: Latents that fire on the measured text.
        mass: Σ |entry| · ‖change‖ of each latent over the measured tokens.
        rankings: Alive latents by name of the measure, most tuned-specific first; some leave latents out.
        mean_difference: Mean of h_tuned - h_base over the measured tokens.
    """

    alive: Int[NDArray, " alive"]
    mass: Float[NDArray, " latents"]
    rankings: dict[str, Int[NDArray, " ranked"]]
    mean_difference: Float[NDArray, " d_model"]


@dataclass(frozen=True)
class Variant:
    """One change of the activations.

    Attributes:
        name: As the result calls it.
        latents: The latents whose changes are written; None for one of `WHOLE`.
        size: How many latents that are.
        seed: Of a random set.
        scramble: Seed of random directions that the latents write, each as long as its change.
        removed: Taken from the tuned model instead of added to the base.
    """

    name: str
    latents: Int[NDArray, " set"] | None = None
    size: int | None = None
    seed: int | None = None
    scramble: int | None = None
    removed: bool = False


def plan(
    candidates: Candidates,
    options: PatchOptions,
    seed: int,
    *,
    template: bool,
    sets: Mapping[str, Sequence[int]],
) -> list[Variant]:
    """Every variant that is measured.

    Args:
        candidates: The latents.
        options: Sizes and numbers of sets.
        seed: Of the random ones.
        template: Whether the text has template or special tokens.
        sets: Further sets by name.

    Raises:
        ConfigError: A further set is empty, has a name that is taken, or holds more than the alive latents.
    """
    added = [
        Variant(name, size=len(candidates.alive) if name.startswith("all") else None)
        for name in WHOLE
        if name != "template" or template
    ]
    removed = [one for one in added if one.name in REMOVED]
    for name, (best, worst) in halves(candidates, options.top_share).items():
        matched = list(_matched(name, best, candidates, options.random_sets, seed))
        added += [_set(f"best:{name}", best), _set(f"worst:{name}", worst), *matched]
        removed += [_set(f"best:{name}", best), *(one for one in matched if one.scramble is None)]
    for name, ranking in candidates.rankings.items():
        added += [_set(f"top:{name}", ranking[:size]) for size in curve(len(ranking))]
    named = [_set(name, _checked(name, latents, added, candidates)) for name, latents in sets.items()]
    return added + named + [replace(one, removed=True) for one in removed + named]


def halves(candidates: Candidates, share: float) -> dict[str, tuple[NDArray, NDArray]]:
    """The better and the worse half of the top `share` of the alive latents, by each ranking.

    `nu|delta_norm` are the top by `delta_norm`, halved by `nu`. A ranking of fewer than two latents has none.
    """
    count = max(FEWEST, round(share * len(candidates.alive)))
    tops = {name: ranking[:count] for name, ranking in candidates.rankings.items()}
    if "nu" in tops and "delta_norm" in tops:
        by_nu = candidates.rankings["nu"]
        tops["nu|delta_norm"] = by_nu[np.isin(by_nu, tops["delta_norm"])]
    return {
        name: (top[: len(top) // 2], top[len(top) // 2 : len(top) // 2 * 2])
        for name, top in tops.items()
        if len(top) >= FEWEST
    }


def curve(ranked: int) -> list[int]:
    """1, 4, 16 … below the number of ranked latents, and that number."""
    sizes = [STEP**power for power in range(ranked.bit_length()) if STEP**power < ranked]
    return [*sizes, ranked] if ranked else []


def _matched(name: str, best: NDArray, candidates: Candidates, count: int, seed: int) -> Iterator[Variant]:
    """Random sets with as much mass as the best half, and the best half with random directions."""
    mass = candidates.mass[best].sum()
    for index in range(count):
        rng = np.random.default_rng([seed, zlib.crc32(name.encode()), index])
        order = rng.permutation(candidates.alive)
        distance = np.abs(candidates.mass[order].cumsum() - mass)
        enough = int(distance.argmin()) + 1
        yield replace(_set(f"random:{name}", order[:enough]), seed=index)
        yield replace(_set(f"directions:{name}", best), seed=index, scramble=int(rng.integers(2**62)))


def _set(name: str, latents: NDArray) -> Variant:
    return Variant(name, latents, len(latents))


def _checked(
    name: str, latents: Sequence[int], taken: Sequence[Variant], candidates: Candidates
) -> Int[NDArray, " set"]:
    chosen = np.unique(np.asarray(latents, np.int64))
    if any(one.name == name for one in taken):
        raise ConfigError(f"The set '{name}' has the name of one that is measured anyway", fix="Rename it")
    if len(chosen) > len(candidates.alive):
        raise ConfigError(
            f"The set '{name}' is larger than the alive latents",
            expected=f"at most {len(candidates.alive)} latents",
            found=len(chosen),
        )
    strange = np.setdiff1d(chosen, candidates.alive)
    if len(chosen) == 0 or len(strange):
        raise ConfigError(
            f"The set '{name}' names no latents that fire on this text",
            expected="numbers of alive latents",
            found=", ".join(map(str, strange[:5].tolist())) or "none",
        )
    return chosen
