"""The components of a latent adapter by name, and how one is made for a dictionary."""

from __future__ import annotations

import torch
from torch import Tensor

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.tune.adapter.components.base import Component
from palimpsest.tune.adapter.components.matrices import Gate, LowRank, Mlp
from palimpsest.tune.adapter.components.scalars import ActiveBias, Bias, Lerp, ReluBias, Scale, Vector
from palimpsest.tune.choices import COMPONENTS, NONLINEARITIES, SCOPES, TRANSFORMS

RANKS = {"low-rank": 8, "mlp": 64}
"""Rank that is taken when none is given."""


def make_component(
    kind: str,
    dictionary: Dictionary,
    latents: Tensor | None = None,
    *,
    transform: str = "identity",
    rank: int | None = None,
    activation: str = "gelu",
) -> Component:
    """A new component, the identity, float32, on the CPU.

    Args:
        kind: One of `COMPONENTS`.
        dictionary: Whose latents it changes.
        latents: Those that it may change, ascending; all when absent.
        transform: g of scale.
        rank: Of low-rank, mlp and gate.
        activation: Of mlp.
    """
    n = dictionary.n_latents
    if kind == "scale":
        return Scale(n, latents, transform)
    if kind == "gate":
        return Gate(n, latents, dictionary.d_model, rank)
    if kind == "low-rank":
        return LowRank(n, latents, rank or RANKS[kind])
    if kind == "mlp":
        return Mlp(n, latents, rank or RANKS[kind], activation)
    if kind == "vector":
        return Vector(n, d_model=dictionary.d_model)
    return {"active-bias": ActiveBias, "bias": Bias, "relu-bias": ReluBias, "lerp": Lerp}[kind](n, latents)


def check_kind(kind: str, transform: str, rank: int | None, activation: str, scope: str) -> None:
    """Refuse names that do not exist, and options that a component does not have.

    Raises:
        ConfigError: As said.
    """
    for what, value, known in (
        ("component", kind, tuple(COMPONENTS)),
        ("transform", transform, TRANSFORMS),
        ("activation", activation, NONLINEARITIES),
        ("scope", scope, SCOPES),
    ):
        if value not in known:
            raise ConfigError(f"Unknown {what}", expected=" | ".join(known), found=repr(value))
    if transform != "identity" and kind != "scale":
        raise ConfigError(f"{kind} has no transform", expected="scale", found=transform)
    if rank is not None and (kind not in ("gate", *RANKS) or rank < 1):
        raise ConfigError(
            "rank belongs to low-rank, mlp and gate, and is at least 1", found=f"{kind}, {rank}"
        )


def check_size(kind: str, dictionary: Dictionary, rank: int | None, allowed: bool) -> None:
    """Refuse what costs as much as a matrix of latents by latents, unless that was asked for.

    Raises:
        ConfigError: As said.
    """
    width = rank or RANKS.get(kind, 0)
    if allowed or kind not in RANKS or 2 * width < dictionary.n_latents:
        return
    parameters = 2 * width * dictionary.n_latents
    raise ConfigError(
        f"{kind} of rank {width} is quadratic in the {dictionary.n_latents:,} latents",
        expected=f"a rank below {dictionary.n_latents // 2}",
        found=f"{parameters:,} parameters, {parameters * 16 / 2**30:.1f} GiB with gradients and Adam's state",
        fix="Lower rank, or say allow_quadratic (--allow-quadratic)",
    )


def check_latents(latents: list[int] | None, n_latents: int, site: str) -> Tensor | None:
    """A list of latents as an ascending tensor.

    Raises:
        DictionaryError: The dictionary has no such latent, or the list is empty.
    """
    if latents is None:
        return None
    chosen = torch.tensor(sorted(set(latents)), dtype=torch.long)
    if not len(chosen) or int(chosen[0]) < 0 or int(chosen[-1]) >= n_latents:
        raise DictionaryError(
            f"The dictionary at {site} has no such latents",
            expected=f"numbers from 0 to {n_latents - 1}, at least one",
            found=", ".join(map(str, latents[:8])) or "none",
        )
    return chosen


__all__ = [
    "RANKS",
    "ActiveBias",
    "Bias",
    "Component",
    "Gate",
    "Lerp",
    "LowRank",
    "Mlp",
    "ReluBias",
    "Scale",
    "Vector",
    "check_kind",
    "check_latents",
    "check_size",
    "make_component",
]
