"""Synthetic activations with a planted dictionary: what every contestant trains on."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

ACTIVE = 20
"""Planted latents per token, on average."""

RANK = 8
"""Of the dense part, which no sparse dictionary explains with one latent."""

CHUNK = 8192


def make(d_model: int, rows: int, held_out: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Activations of a planted pair: sparse codes times unit directions, a low-rank part, an offset and noise.

    Four planted directions per dimension, firing at rates that fall like a power law. The tuned model shares all
    directions up to a small turn and has a few of its own. Both sides have a mean norm of sqrt(d_model).
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    planted = 4 * d_model
    own = planted // 64
    base = torch.nn.functional.normalize(normal(planted, d_model), dim=1)
    tuned = torch.nn.functional.normalize(base + 0.02 * normal(planted, d_model), dim=1)
    # The last directions belong to the tuned model alone.
    base[planted - own :] = 0
    rate = torch.arange(1, planted + 1).float().pow(-0.7)
    rate = (rate[torch.randperm(planted, generator=generator)] * ACTIVE / rate.sum()).clamp(max=0.5)
    low = normal(RANK, d_model) / math.sqrt(d_model)
    offset = normal(d_model) / math.sqrt(d_model)
    parts: dict[str, list[torch.Tensor]] = {"base": [], "tuned": []}
    total = rows + held_out
    for start in range(0, total, CHUNK):
        count = min(CHUNK, total - start)
        fires = torch.rand(count, planted, generator=generator) < rate
        size = 0.5 + torch.rand(count, planted, generator=generator).clamp(min=1e-6).log().neg()
        codes = fires * size
        dense = 0.5 * normal(count, RANK) @ low + offset
        for name, directions in (("base", base), ("tuned", tuned)):
            noise = 0.3 / math.sqrt(d_model) * normal(count, d_model)
            parts[name].append(codes @ directions + dense + noise)
    made = {}
    for name, pieces in parts.items():
        x = torch.cat(pieces)
        x *= math.sqrt(d_model) / x.norm(dim=1).mean()
        made[name], made[f"{name}_held_out"] = x[:rows].contiguous(), x[rows:].contiguous()
    return made


def save(tensors: dict[str, torch.Tensor], path: Path) -> None:
    save_file(tensors, str(path))


def load(path: Path, view: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and held-out rows: `[rows, d]` of one model or of the difference, `[rows, 2, d]` of the pair."""
    found = load_file(str(path))
    train, held_out = [], []
    for suffix, kept in (("", train), ("_held_out", held_out)):
        one, two = found["base" + suffix], found["tuned" + suffix]
        kept.append(
            one if view == "base" else two - one if view == "diff" else torch.stack([one, two], dim=1)
        )
    return train[0], held_out[0]
