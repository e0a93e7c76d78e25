"""The latents of all sites of an adapter as one list, and masks that keep some of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from palimpsest.tune.adapter import LatentLayer, latent_layers


class Latents:
    """Every latent of every dictionary of one adapter, site after site.

    Attributes:
        adapter: Its name in the model.
        layers: The layers that it edits, in the order of the model's modules.
        sites: Their sites.
        starts: Place of each site's first latent, and the number of all behind the last.
        values: Signed number per latent; 0 where the adapter may change nothing.
        norms: Length of each decoder row.
        editable: Latents that the adapter may change.
    """

    def __init__(self, model: torch.nn.Module, adapter: str = "default") -> None:
        """List the latents of one adapter of a model."""
        self.adapter = adapter
        self.layers: list[LatentLayer] = [one for one in latent_layers(model) if adapter in one.components]
        self.sites = [one.places[adapter].site for one in self.layers]
        sizes = [one.dictionary_of(adapter).n_latents for one in self.layers]
        self.starts = np.concatenate([[0], np.cumsum(sizes)]).astype(int)
        values, norms, editable = [], [], []
        for layer, size in zip(self.layers, sizes, strict=True):
            component = layer.component(adapter)
            chosen = component.latents.cpu().numpy()
            of = np.zeros(size)
            of[chosen] = component.values().detach().double().cpu().numpy()
            values.append(of)
            norms.append(layer.dictionary_of(adapter).decoder_norms()[:, 0].double().cpu().numpy())
            editable.append(np.isin(np.arange(size), chosen))
        empty = [np.zeros(0)]
        self.values: NDArray = np.concatenate(values or empty)
        self.norms: NDArray = np.concatenate(norms or empty)
        self.editable: NDArray = np.concatenate(editable or empty).astype(bool)

    def __len__(self) -> int:
        """Latents of all dictionaries."""
        return int(self.starts[-1])

    def locate(self, place: int) -> tuple[str, int]:
        """Site and number of a latent."""
        index = int(np.searchsorted(self.starts, place, side="right")) - 1
        return self.sites[index], int(place - self.starts[index])

    def by_site(self, places: Int[NDArray, " n"]) -> dict[str, list[int]]:
        """Numbers of some latents by site, ascending; sites without any are left out."""
        found = {}
        for index, site in enumerate(self.sites):
            inside = places[(places >= self.starts[index]) & (places < self.starts[index + 1])]
            if len(inside):
                found[site] = sorted((inside - self.starts[index]).tolist())
        return found

    @contextmanager
    def keeping(self, kept: Bool[NDArray, " latents"] | None) -> Iterator[None]:
        """Drop the edits of all other latents inside the block; None keeps all."""
        if kept is None:
            yield
            return
        try:
            for index, layer in enumerate(self.layers):
                part = torch.from_numpy(kept[self.starts[index] : self.starts[index + 1]].astype(np.float32))
                layer.masks[self.adapter] = part.to(layer.dictionary_of(self.adapter).device)
            yield
        finally:
            for layer in self.layers:
                layer.masks.pop(self.adapter, None)


class Reading(NamedTuple):
    """What one text showed of all latents, over the tokens that are edited.

    Attributes:
        fires: Tokens on which each fires, by half of the documents; None where no dictionary was read.
        change: Σ over tokens of |change of z|, by half.
        groups: Σ z by group of documents, of the first half first; None as `fires`.
        tokens: Edited tokens of each group.
    """

    fires: Int[NDArray, "halves latents"]
    change: Float[NDArray, "halves latents"]
    groups: Float[NDArray, "groups latents"]
    tokens: Int[NDArray, " groups"]

    @property
    def by_half(self) -> Int[NDArray, " halves"]:
        """Edited tokens of each half."""
        return self.tokens.reshape(2, -1).sum(1)


def effect_of(
    latents: Latents, readings: Sequence[Reading], half: int | None = None
) -> Float[NDArray, " latents"]:
    """Mean over edited tokens of |change of z| times the decoder norm.

    Args:
        latents: The adapter's.
        readings: Of all texts that count.
        half: Of the documents; both when absent.
    """
    chosen = slice(None) if half is None else slice(half, half + 1)
    change: Any = sum(one.change[chosen].sum(0) for one in readings)
    tokens = sum(int(one.by_half[chosen].sum()) for one in readings)
    return change / max(tokens, 1) * latents.norms


def fires_on(readings: Sequence[Reading], half: int | None = None) -> Bool[NDArray, " latents"]:
    """Latents that fire on an edited token."""
    chosen = slice(None) if half is None else slice(half, half + 1)
    found: Any = sum(one.fires[chosen].sum(0) for one in readings)
    return found > 0


def summed(latents: Latents, parts: Sequence[Tensor]) -> NDArray:
    """Per-site sums as one array over all latents."""
    if not parts:
        return np.zeros((2, len(latents)))
    return np.concatenate([one.cpu().numpy() for one in parts], axis=-1)
