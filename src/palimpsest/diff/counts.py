"""Counts and sums per latent: how often it fires, how strongly, where, and what it adds. Memory grows with latents."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.corpus import Role
from palimpsest.dictionaries import Codes
from palimpsest.diff.methods import Entries

KINDS = tuple(role.name.lower() for role in Role)
"""What a token can be; special tokens count as template."""


class LatentCounts:
    """How often and how strongly each latent fires, by corpus.

    Args:
        n_latents: Of the dictionary.
        corpora: How many.
        device: Of the codes.
    """

    def __init__(self, n_latents: int, corpora: int, device: torch.device) -> None:
        shape = (corpora, n_latents)
        self.fires = torch.zeros(shape, dtype=torch.long, device=device)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)
        self.largest = torch.zeros(shape, device=device)

    def add(self, corpus: int, codes: Codes) -> None:
        """Fold in the codes of tokens of one corpus."""
        index = codes.indices.long()
        self.fires[corpus].index_add_(0, index, (codes.values > 0).long())
        self.total[corpus].index_add_(0, index, codes.values.double())
        self.largest[corpus].scatter_reduce_(0, index, codes.values.float(), "amax")

    def arrays(self, name: str) -> dict[str, NDArray]:
        """`{name}/fires`, `{name}/total`, `{name}/largest`, each `[corpora, latents]`."""
        held = {"fires": self.fires, "total": self.total, "largest": self.largest}
        return {f"{name}/{key}": value.cpu().numpy() for key, value in held.items()}


class KindSums:
    """Activation of each latent by the kind of token, over all tokens that are read."""

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self._n = n_latents
        self._sums = torch.zeros(len(KINDS) * n_latents, dtype=torch.float64, device=device)
        self._tokens = torch.zeros(len(KINDS), dtype=torch.long)

    def add(self, kind: Int[Tensor, " tokens"], codes: Codes) -> None:
        """Fold in a batch; `kind` indexes `KINDS`."""
        cell = kind.to(codes.indices.device)[codes.rows()] * self._n + codes.indices.long()
        self._sums.index_add_(0, cell, codes.values.double())
        self._tokens += torch.bincount(kind.cpu(), minlength=len(KINDS))

    def arrays(self) -> dict[str, NDArray]:
        """`kind/sums [kinds, latents]` and `kind/tokens [kinds]`."""
        return {
            "kind/sums": self._sums.view(len(KINDS), -1).cpu().numpy(),
            "kind/tokens": self._tokens.numpy(),
        }


class ChangeSums:
    """What each latent adds to the base: Σ |entry| and Σ entry over all tokens that are read, as patching does."""

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self._size = torch.zeros(n_latents, dtype=torch.float64, device=device)
        self._signed = torch.zeros_like(self._size)

    def add(self, entries: Entries) -> None:
        """Fold in a batch."""
        value, index = entries.values.double(), entries.indices.long()
        self._size.index_add_(0, index, value.abs())
        self._signed.index_add_(0, index, value)

    def arrays(self) -> dict[str, NDArray]:
        """`change/size` and `change/signed`, `[latents]`."""
        return {"change/size": self._size.cpu().numpy(), "change/signed": self._signed.cpu().numpy()}


class Variance:
    """What a description leaves of signals `[tokens, d_model]`: 1 - Σ‖x - x̂‖² / Σ‖x - mean x‖²."""

    def __init__(self, d_model: int, device: torch.device) -> None:
        self._sum = torch.zeros(d_model, dtype=torch.float64, device=device)
        self._scalars = torch.zeros(3, dtype=torch.float64, device=device)

    def add(
        self, x: Float[Tensor, "tokens d_model"], described: Float[Tensor, "tokens d_model"] | None
    ) -> None:
        """Fold in a batch; without a description only the mean is kept."""
        self._sum += x.sum(0, dtype=torch.float64)
        self._scalars[0] += len(x)
        self._scalars[1] += x.square().sum(dtype=torch.float64)
        self._scalars[2] += (
            torch.nan if described is None else (x - described).square().sum(dtype=torch.float64)
        )

    @property
    def size(self) -> float:
        """Root mean square length of the signal."""
        n, squares, _ = self._scalars.tolist()
        return (squares / n) ** 0.5

    @property
    def mean(self) -> Float[NDArray, " d_model"]:
        """Mean of the signal."""
        return (self._sum / self._scalars[0]).cpu().numpy()

    def fve(self) -> float:
        """NaN where nothing was described, or the signal never varies."""
        n, squares, residual = self._scalars.tolist()
        variance = squares - float(self._sum.square().sum()) / n
        return 1.0 - residual / variance if variance > 1e-12 * max(squares, 1e-30) else float("nan")


class JointFiring:
    """How often the two latents of each of some pairs fire, alone and together.

    Args:
        pairs: Latents, as `[pairs, 2]`.
        n_latents: Of the dictionary.
        device: Of the codes.
    """

    def __init__(self, pairs: Int[NDArray, "pairs two"], n_latents: int, device: torch.device) -> None:
        unique, place = np.unique(pairs, return_inverse=True)
        self._place = torch.from_numpy(place.reshape(pairs.shape)).to(device)
        self._slot = torch.full((n_latents,), -1, dtype=torch.long, device=device)
        self._slot[torch.from_numpy(unique).to(device)] = torch.arange(len(unique), device=device)
        self._n = len(unique)
        self._counts = torch.zeros(len(pairs), 3, dtype=torch.long, device=device)

    def add(self, codes: Codes) -> None:
        """Fold in a batch: a bit per token for each latent that is in a pair, not for the others."""
        if not len(self._counts):
            return
        slot = self._slot[codes.indices.long()]
        there = (slot >= 0) & (codes.values > 0)
        fires = torch.zeros(self._n, codes.tokens, dtype=torch.bool, device=slot.device)
        fires[slot[there], codes.rows()[there]] = True
        for start in range(0, len(self._counts), 256):
            some = slice(start, start + 256)
            first, second = fires[self._place[some, 0]], fires[self._place[some, 1]]
            self._counts[some] += torch.stack([first.sum(1), second.sum(1), (first & second).sum(1)], 1)

    def counts(self) -> Int[NDArray, "pairs three"]:
        """Tokens on which the first fires, the second, and both."""
        return self._counts.cpu().numpy()
