"""Which tokens of a forward pass are edited: prompt or answer, first or last of the prompt, special ones left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from inspect import signature
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from palimpsest.errors import ConfigError


class Call:
    """What is known of the forward pass that is running; its methods are hooks of the model.

    Attributes:
        ids: Its token ids, or None where embeddings were given.
        mask: Which of them are no padding, or None.
        past: Tokens that the cache holds already.
        answer: What `answering` says.
        untouched: No adapter has edited anything in this pass yet.
    """

    def __init__(self, root: nn.Module) -> None:
        """Nothing is known yet; `attach` sets the hooks."""
        self.root = root
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.past, self.cached = 0, False
        self.labels: Tensor | None = None
        self.answer: Tensor | None = None
        self.untouched = True
        self._holders: list[Any] = []
        self._stopped: list[Any] = []
        self._handles: list[RemovableHandle] = []
        self._running: nn.Module | None = None
        self._found: dict[tuple[str, int, tuple[int, ...]], Tensor | None] = {}
        self._special: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def attach(self) -> None:
        """Listen to the model, and find the layers that must not be computed again in the backward pass.

        An adapter inside of them would then see the tokens of whichever pass came last.
        """
        from palimpsest.tune.adapter.layer import latent_layers

        inner = getattr(self.root, "base_model", None)
        for one in () if self._handles else dict.fromkeys(filter(None, (self.root, inner))):
            self._handles.append(one.register_forward_pre_hook(self.before, with_kwargs=True))
            self._handles.append(one.register_forward_hook(self.after, always_call=True))
        self._holders = [
            layer
            for layer in self.root.modules()
            if hasattr(type(layer), "gradient_checkpointing") and latent_layers(layer)
        ]

    def detach(self) -> None:
        """Take the hooks away, and let layers recompute again that did."""
        while self._handles:
            self._handles.pop().remove()
        while self._stopped:
            self._stopped.pop().gradient_checkpointing = True

    def before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Read the arguments of a language model's forward pass; of the outermost, where models are nested."""
        # The same module again: an interrupt ended its last pass before `after` could.
        if self._running is not None and module is not self._running:
            return
        self._running, self.untouched, self._found = module, True, {}
        given = dict(zip(_names(type(module)), arguments, strict=False)) | keywords
        ids = given.get("input_ids")
        self.ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        cache = given.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        self.cached = cache is not None
        mask = given.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.labels = given.get("labels")
        for layer in self._holders:
            if layer.gradient_checkpointing:
                layer.gradient_checkpointing = False
                self._stopped.append(layer)

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """End the pass, also after an error; what was read stays for the backward pass."""
        del arguments, output
        if module is self._running:
            self._running = None

    def edited(self, scope: str, count: int, skip: Sequence[int]) -> Bool[Tensor, "batch seq"] | None:
        """Which tokens are edited; None stands for all.

        Args:
            scope: One of `SCOPES`.
            count: How many tokens first and last mean.
            skip: Token ids that are left alone.

        Raises:
            ConfigError: The call does not say what the scope needs to know.
        """
        key = (scope, count, tuple(skip))
        if key not in self._found:
            self._found[key] = self._edited(scope, count, skip)
        return self._found[key]

    def _edited(self, scope: str, count: int, skip: Sequence[int]) -> Tensor | None:
        if scope == "all" and not skip:
            return None
        ids = self._required_ids()
        chosen = torch.ones_like(ids, dtype=torch.bool)
        if skip:
            key = (tuple(skip), ids.device)
            if key not in self._special:
                self._special[key] = torch.tensor(key[0], device=ids.device)
            chosen = torch.isin(ids, self._special[key], invert=True)
        return chosen if scope == "all" else self._in_scope(scope, count, ids, chosen)

    def _in_scope(self, scope: str, count: int, ids: Tensor, chosen: Tensor) -> Tensor:
        """Those of the tokens that are not left alone; first and last count these alone."""
        if self.mask is not None:
            chosen = chosen & self.mask[:, -ids.shape[1] :].bool()
        answer = self._answer(ids, required=scope != "first")
        if scope == "answer":
            return chosen if answer is None else chosen & answer
        prompt = chosen if answer is None else chosen & ~answer
        if scope == "prompt":
            return prompt
        place = prompt.long().cumsum(1)
        if scope == "last":
            place = place[:, -1:] - place + 1
        return prompt & (place <= count)

    def _answer(self, ids: Tensor, *, required: bool) -> Tensor | None:
        for known in (self.answer, None if self.labels is None else self.labels != -100):
            if known is not None and known.shape == ids.shape:
                return known.to(ids.device).bool()
        if self.past and ids.shape[1] == 1:
            return torch.ones_like(ids, dtype=torch.bool)
        if self.cached and not self.past:
            return torch.zeros_like(ids, dtype=torch.bool)
        if not required and not self.past:
            return None
        raise ConfigError(
            "The adapter edits the prompt or the answer only, and this forward pass does not say which is which",
            expected="`labels` (-100 on the prompt), generation with a cache from the first token on, or "
            "`palimpsest.tune.adapter.answering(model, mask)` around the call",
            found=f"{ids.shape[1]} tokens, {self.past} in the cache",
        )

    def _required_ids(self) -> Int[Tensor, "batch seq"]:
        if self.ids is None:
            raise ConfigError(
                "The adapter leaves special tokens alone or edits some tokens only, and was given embeddings",
                expected="input_ids",
                fix="Call the model with input_ids, or make the adapter with scope='all' and skip_ids=[]",
            )
        return self.ids


@cache
def _names(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of a forward pass's arguments, in order."""
    return tuple(signature(kind.forward).parameters)[1:]


@contextmanager
def answering(model: nn.Module, mask: Bool[Tensor, "batch seq"] | None) -> Iterator[None]:
    """Say which tokens are the answer, for the forward passes on ids of that shape inside the block.

    Args:
        model: A model with a latent adapter, or any other, which is left as it is.
        mask: True on the tokens of the answer.
    """
    from palimpsest.tune.adapter.layer import latent_layers

    calls = {id(layer.call): layer.call for layer in latent_layers(model)}
    before = {key: call.answer for key, call in calls.items()}
    for call in calls.values():
        call.answer = mask
    try:
        yield
    finally:
        for key, call in calls.items():
            call.answer = before[key]


__all__ = ["Call", "answering"]
