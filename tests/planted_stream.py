"""Streams of activations with planted directions, and the recipe that finds them."""

import torch
from torch.nn.functional import normalize

from palimpsest.dictionaries import TrainConfig

D_MODEL, PLANTED = 24, 48


def directions():
    return normalize(torch.randn(PLANTED, D_MODEL, generator=torch.Generator().manual_seed(3)), dim=1)


def stream(tokens, *, planted=True, piece=500, seed=0, models=1):
    """Sparse sums of planted directions far from the origin, or Gaussian noise; seeded."""
    generator, rows = torch.Generator().manual_seed(seed), directions()
    for _ in range(tokens // piece):
        if planted:
            values = torch.rand(piece, PLANTED, generator=generator) + 0.5
            x = (values * (torch.rand(piece, PLANTED, generator=generator) < 0.07)) @ rows
        else:
            x = torch.randn(piece, D_MODEL, generator=generator)
        yield 7 * (x[:, None].expand(-1, models, -1) + 1.5)


def recovered(made):
    """Mean, over planted directions, of the best cosine with a decoder row."""
    return (directions() @ normalize(made.W_dec[:, 0], dim=1).T).amax(dim=1).mean().item()


def recipe(**changes):
    fields = {
        "n_latents": 64,
        "k": 4,
        "tokens": 250_000,
        "batch_size": 512,
        "lr": 8e-3,
        "seed": 1,
        "log_every": 50,
    }
    return TrainConfig(**{**fields, **changes})
