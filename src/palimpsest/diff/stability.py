"""Whether a latent comes back when the same dictionary is trained with another seed."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.dictionaries import Dictionary
from palimpsest.errors import DictionaryError

TILE = 1024
FOUND_AGAIN = (0.7, 0.9)
"""Cosines from which a latent counts as found again."""


class Match(NamedTuple):
    """The closest latent of another dictionary.

    Attributes:
        score: Cosine of the decoder rows, of both models side by side.
        latent: Which one.
        mutual: Whether each is the other's closest.
    """

    score: Float[NDArray, " latents"]
    latent: Int[NDArray, " latents"]
    mutual: NDArray[np.bool_]


def match_latents(dictionary: Dictionary, twin: Dictionary) -> Match:
    """The closest latent of `twin` for every latent; tiles of latents, so that no square matrix exists.

    Raises:
        DictionaryError: The two do not describe the same thing.
    """
    check_twin(dictionary, twin)
    rows = _unit(dictionary)
    others = _unit(twin).to(rows.device)
    best, place = _closest(rows, others)
    _, back = _closest(others, rows)
    mutual = back[place] == torch.arange(len(place), device=place.device)
    return Match(best.cpu().double().numpy(), place.cpu().numpy(), mutual.cpu().numpy())


def check_twin(dictionary: Dictionary, twin: Dictionary) -> None:
    """Refuse to match dictionaries of different things.

    Raises:
        DictionaryError: They differ in view, models, width or site, or are the same.
    """
    fix = "Give the same recipe trained with another seed"
    if (dictionary.view, dictionary.models, dictionary.d_model) != (twin.view, twin.models, twin.d_model):
        expected, found = (
            f"view {one.view}, {one.models} models, width {one.d_model}" for one in (dictionary, twin)
        )
        raise DictionaryError(
            "The twin is another kind of dictionary", expected=expected, found=found, fix=fix
        )
    if dictionary.site and twin.site and dictionary.site != twin.site:
        raise DictionaryError(
            "The twin was trained at another site", expected=dictionary.site, found=twin.site, fix=fix
        )
    if dictionary.W_dec.shape == twin.W_dec.shape and torch.equal(dictionary.W_dec.cpu(), twin.W_dec.cpu()):
        raise DictionaryError("The twin is the dictionary itself", found="the same weights", fix=fix)


def summarise_match(match: Match, found: NDArray, path: str) -> dict[str, Any]:
    """Scores of the alive latents and of the tuned-only ones.

    Args:
        match: Of every latent.
        found: Its class.
        path: Of the twin.
    """
    summary: dict[str, Any] = {"twin": path}
    for name, which in {"alive": found != "dead", "tuned_only": found == "tuned-only"}.items():
        score = match.score[which]
        summary[name] = {
            "latents": int(which.sum()),
            "mean": float(score.mean()) if len(score) else None,
            **{f"above_{line}": float((score > line).mean()) if len(score) else None for line in FOUND_AGAIN},
        }
    return summary


def _unit(dictionary: Dictionary) -> Float[Tensor, "latents features"]:
    return torch.nn.functional.normalize(dictionary.W_dec.detach().float().flatten(1), dim=1)


def _closest(
    rows: Float[Tensor, "latents features"], others: Float[Tensor, "other_latents features"]
) -> tuple[Float[Tensor, " latents"], Int[Tensor, " latents"]]:
    parts = [(some @ others.T).max(dim=1) for some in rows.split(TILE)]
    return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])
