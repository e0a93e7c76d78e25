"""The other model of a pair on the same tokens: what joint codes need while one model reads or writes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from inspect import signature
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.models import LanguageModel, capture

_unsteered: ContextVar[bool] = ContextVar("unsteered", default=False)


def reading_unsteered() -> bool:
    """Whether a companion is reading now: no steering applies to it."""
    return _unsteered.get()


class Call(NamedTuple):
    """One forward pass of the steered model, as it was called.

    Attributes:
        ids: Its token ids.
        past: Tokens of each sequence that the cache holds already.
        cached: Whether a later pass may go on from this one.
        mask: The attention mask of past and present, where one was given.
        positions: The positions, where they were given.
    """

    ids: Int[Tensor, "batch seq"]
    past: int
    cached: bool
    mask: Tensor | None
    positions: Tensor | None


class Companion:
    """Reads the other model's site on the tokens of each forward pass, with a cache of its own while generating."""

    def __init__(self, model: LanguageModel, site: str) -> None:
        """Nothing is read yet."""
        self.model, self.site = model, site
        self._cache: Any = None
        self._seen = 0

    @torch.no_grad()
    def read(self, call: Call) -> Float[Tensor, "batch seq d_model"]:
        """The other model's activations of these tokens; it runs no further than the site.

        Raises:
            ConfigError: The pass goes on from a cache whose tokens the companion did not see.
        """
        from transformers import DynamicCache

        if call.past == 0:
            self._cache = DynamicCache(config=self.model.model.config) if call.cached else None
            self._seen = 0
        if call.past != self._seen or (call.past and self._cache is None):
            raise ConfigError(
                "A joint code needs both models to read the text from its beginning",
                expected=f"a cache of the {self._seen} tokens that were read inside this block",
                found=f"a cache of {call.past} tokens",
                fix="Start the generation inside the steering block, without beams or assisted decoding",
            )
        with _alone(), self.model.active(), capture(self.model.sites, [self.site]) as found:
            self.model.model(input_ids=call.ids.to(self.model.device), **self._arguments(call))
        self._seen = call.past + call.ids.shape[1] if call.cached else 0
        return found[self.site]

    def _arguments(self, call: Call) -> dict[str, Any]:
        device = self.model.device
        given: dict[str, Any] = {"use_cache": call.cached}
        if self._cache is not None:
            given["past_key_values"] = self._cache
        if call.mask is not None:
            given["attention_mask"] = call.mask.to(device)
        if call.positions is not None:
            given["position_ids"] = call.positions.to(device)
        elif call.past and "position_ids" in signature(type(self.model.model).forward).parameters:
            # The cache cannot tell: of a site before the first attention it stays empty.
            seq = call.ids.shape[1]
            given["position_ids"] = torch.arange(call.past, call.past + seq, device=device)[None]
        return given


@contextmanager
def _alone() -> Iterator[None]:
    token = _unsteered.set(True)
    try:
        yield
    finally:
        _unsteered.reset(token)


__all__ = ["Call", "Companion", "reading_unsteered"]
