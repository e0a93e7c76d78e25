"""Running statistics of activations."""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

_PART = 4096
"""Rows that are held in float64 at once."""


class Moments:
    """Running mean and mean squared norm per model, in float64.

    Args:
        models: Size of the models axis.
        d_model: Width of the activations.
    """

    def __init__(self, models: int, d_model: int) -> None:
        self.count = 0
        self.mean: Float64[Tensor, "models d_model"] = torch.zeros(models, d_model, dtype=torch.float64)
        self.square: Float64[Tensor, " models"] = torch.zeros(models, dtype=torch.float64)

    def add(self, acts: Float[Tensor, "tokens models d_model"]) -> None:
        """Take in rows; any split of the same rows gives the same result up to float64 rounding."""
        for part in acts.split(_PART):
            if not len(part):
                continue
            part = part.double()
            self.count += len(part)
            share = len(part) / self.count
            self.mean += (part.mean(0) - self.mean) * share
            self.square += (part.square().sum(-1).mean(0) - self.square) * share

    @property
    def rms_norm(self) -> Float64[Tensor, " models"]:
        """Root of the mean squared norm of an activation vector."""
        return self.square.sqrt()

    def state(self) -> dict[str, Any]:
        """What `store.json` keeps."""
        rms = self.rms_norm.tolist()
        return {
            "count": self.count,
            "mean": self.mean.tolist(),
            "mean_square": self.square.tolist(),
            "rms_norm": rms,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Moments":
        """The moments that `state` described."""
        mean = torch.tensor(state["mean"], dtype=torch.float64)
        moments = cls(*mean.shape)
        moments.count, moments.mean = state["count"], mean
        moments.square = torch.tensor(state["mean_square"], dtype=torch.float64)
        return moments
