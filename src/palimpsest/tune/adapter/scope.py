"""Which tokens of a forward pass are edited: prompt or answer, first or last of the prompt, special ones left alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from palimpsest.errors import ConfigError


class Call:
    """What is known of the forward pass that is running; its methods are hooks of the model.

    Attributes:
        ids: Its token ids, or None where embeddings were given.
        mask: Which of them are no padding, or None.
        past: Tokens that the cache holds already.
        answer: What `answering` says.
        untouched: No adapter has edited anything in this pass yet.
        holders: Layers with an adapter inside, which must not compute anything again under another pass's tokens.
    """

    def __init__(self, root: nn.Module, prefix: str) -> None:
        """Nothing is known yet.

        Args:
            root: The base model.
            prefix: Begins the names of the adapter's parameters inside it.
        """
        self.root, self._prefix = root, prefix
        self.ids: Tensor | None = None
        self.mask: Tensor | None = None
        self.past, self.cached = 0, False
        self.labels: Tensor | None = None
        self.answer: Tensor | None = None
        self.untouched = True
        self.holders: list[Any] = []
        self._running: nn.Module | None = None
        self._found: dict[tuple[str, int, tuple[int, ...]], Tensor | None] = {}
        self._special: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}

    def before(self, module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Read the arguments of a language model's forward pass; of the outermost, where models are nested."""
        if self._running is not None:
            return
        self._running, self.untouched, self._found = module, True, {}
        ids = keywords.get("input_ids", arguments[0] if arguments else None)
        self.ids = ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None
        cache = keywords.get("past_key_values")
        self.past = int(cache.get_seq_length()) if cache is not None else 0
        self.cached = cache is not None
        mask = keywords.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        self.labels = keywords.get("labels")
        for layer in self.holders:
            layer.gradient_checkpointing = False

    def after(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        """End the pass, also after an error; what was read stays for the backward pass."""
        del arguments, output
        if module is self._running:
            self._running = None

    def others_train(self) -> bool:
        """Whether a parameter of the base is trained, too."""
        named = self.root.named_parameters()
        return any(one.requires_grad and self._prefix not in name for name, one in named)

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
        chosen = self._in_scope(scope, count, ids)
        if skip:
            key = (tuple(skip), ids.device)
            if key not in self._special:
                self._special[key] = torch.tensor(key[0], device=ids.device)
            special = torch.isin(ids, self._special[key])
            chosen = ~special if chosen is None else chosen & ~special
        return chosen

    def _in_scope(self, scope: str, count: int, ids: Tensor) -> Tensor | None:
        if scope == "all":
            return None
        real = torch.ones_like(ids, dtype=torch.bool)
        if self.mask is not None:
            real = self.mask[:, -ids.shape[1] :].bool()
        answer = self._answer(ids, required=scope in ("prompt", "answer"))
        if scope == "answer":
            assert answer is not None
            return answer & real
        prompt = real if answer is None else real & ~answer
        if scope == "prompt":
            return prompt
        if self.past:
            # The prompt has been read; with one token at a time, nothing of it comes again.
            return torch.zeros_like(real)
        place = prompt.long().cumsum(1)
        if scope == "last":
            place = place[:, -1:] - place + 1
        return prompt & (place <= count)

    def _answer(self, ids: Tensor, *, required: bool) -> Tensor | None:
        for known in (self.answer, None if self.labels is None else self.labels != -100):
            if known is not None and known.shape == ids.shape:
                return known.to(ids.device).bool()
        if self.past:
            return torch.ones_like(ids, dtype=torch.bool)
        if self.cached or not required:
            return torch.zeros_like(ids, dtype=torch.bool) if self.cached else None
        raise ConfigError(
            "The adapter edits the prompt or the answer only, and this forward pass does not say which is which",
            expected="`labels` (-100 on the prompt), generation with a cache, or "
            "`palimpsest.tune.adapter.answering(model, mask)` around the call",
        )

    def _required_ids(self) -> Int[Tensor, "batch seq"]:
        if self.ids is None:
            raise ConfigError(
                "The adapter leaves special tokens alone or edits some tokens only, and was given embeddings",
                expected="input_ids",
                fix="Call the model with input_ids, or make the adapter with scope='all' and skip_ids=[]",
            )
        return self.ids


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
