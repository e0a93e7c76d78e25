"""Dictionaries whose encoder is their decoder transposed: the bases that a learned one is compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from palimpsest.dictionaries.dictionary import Dictionary


def random_directions(n_latents: int, d_model: int, seed: int) -> Float[Tensor, "latents d_model"]:
    """Unit rows in random directions, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n_latents, d_model, generator=generator), dim=1)


def tied(
    directions: Float[Tensor, "latents d_model"],
    k: int,
    *,
    mean: Float[Tensor, " d_model"] | None = None,
    recipe: str,
) -> Dictionary:
    """Top-k around `mean` that reads and writes along the same directions.

    Args:
        directions: Rows of the decoder.
        k: Latents per token.
        mean: Subtracted before reading and added after writing; zero when absent.
        recipe: Noted in the metadata.
    """
    from palimpsest.dictionaries.native import build

    n_latents, d_model = directions.shape
    fields = {"d_model": d_model, "n_latents": n_latents, "activation": "topk", "k": k, "models": 1}
    weights = {
        "W_enc": directions.T[None],
        "W_dec": directions[:, None],
        "b_enc": directions.new_zeros(n_latents),
        "b_dec": directions.new_zeros(1, d_model) if mean is None else mean[None].to(directions, copy=True),
    }
    return build(fields, weights, recipe, metadata={"recipe": recipe}, dtype=directions.dtype)
