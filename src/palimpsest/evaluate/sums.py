"""Sums per document and per latent: what one pass over the tokens leaves, whatever their number."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.dictionaries import Codes

RECONSTRUCTION = ("tokens", "residual", "centred", "sized", "cosine", "norm_ratio")
"""Per token: 1, ‖x - x̂‖², ‖x - mean x‖², 1 where x is not zero, and cosine and ‖x̂‖ / ‖x‖ there."""

PREDICTION = (
    "predicted",
    "ce_original",
    "ce_spliced",
    "ce_zero",
    "ce_mean",
    "kl_spliced",
    "kl_zero",
    "kl_mean",
)
"""Per token: 1 where something predicts it, then nats; all of them 0 elsewhere."""

COLUMNS = (*RECONSTRUCTION, *PREDICTION)


class DocumentTable(NamedTuple):
    """Sums over each document's tokens.

    Attributes:
        documents: Their indices, ascending.
        sums: By `columns`.
    """

    documents: Int[NDArray, " documents"]
    sums: Float[NDArray, "documents columns"]


class DocumentSums:
    """Sums of columns by document, in float64; they stay on the device until `finish`."""

    def __init__(self, width: int) -> None:
        self.width = width
        self._documents: list[Tensor] = []
        self._sums: list[Tensor] = []

    def add(self, document: Int[Tensor, " tokens"], columns: Float[Tensor, "tokens columns"]) -> None:
        """Fold in the tokens of a batch.

        Args:
            document: Of each token, on the CPU.
            columns: On any device.
        """
        documents, place = torch.unique(document, return_inverse=True)
        sums = torch.zeros(len(documents), self.width, dtype=torch.float64, device=columns.device)
        self._sums.append(sums.index_add_(0, place.to(columns.device), columns.double()))
        self._documents.append(documents)

    def finish(self) -> DocumentTable:
        """The sums; a document that came in several batches is one row."""
        if not self._documents:
            return DocumentTable(np.zeros(0, np.int64), np.zeros((0, self.width)))
        documents, place = np.unique(torch.cat(self._documents).numpy(), return_inverse=True)
        sums = np.zeros((len(documents), self.width))
        np.add.at(sums, place, torch.cat(self._sums).cpu().numpy())
        return DocumentTable(documents, sums)


class CodeSums:
    """How often each latent fires, and how many latents fire on a token: memory grows with latents only."""

    def __init__(self, n_latents: int, device: torch.device) -> None:
        self._fires = torch.zeros(n_latents, dtype=torch.long, device=device)
        self._l0 = torch.zeros(n_latents + 1, dtype=torch.long, device=device)

    def add(self, codes: Codes) -> None:
        """Fold in the codes of a batch."""
        self._fires.index_add_(0, codes.indices.long(), (codes.values > 0).long())
        l0 = codes.l0()
        self._l0.index_add_(0, l0, torch.ones_like(l0))

    def fires(self) -> Int[NDArray, " latents"]:
        """Tokens on which each latent is active."""
        return self._fires.cpu().numpy()

    def l0(self) -> Int[NDArray, " latents_and_one"]:
        """Tokens by their number of active latents."""
        return self._l0.cpu().numpy()


def reconstruction_columns(
    x: Float[Tensor, "tokens d_model"],
    reconstruction: Float[Tensor, "tokens d_model"],
    mean: Float[Tensor, " d_model"],
) -> Float[Tensor, "tokens columns"]:
    """The columns of `RECONSTRUCTION`."""
    size, made = x.norm(dim=1), reconstruction.norm(dim=1)
    sized = size > 0
    aligned = (x * reconstruction).sum(1)
    cosine = torch.where(sized & (made > 0), aligned / (size * made).clamp_min(1e-30), 0.0)
    ratio = torch.where(sized, made / size.clamp_min(1e-30), 0.0)
    residual, centred = (x - reconstruction).square().sum(1), (x - mean).square().sum(1)
    columns = (torch.ones_like(size), residual, centred, sized, cosine, ratio)
    return torch.stack([column.double() for column in columns], 1)
