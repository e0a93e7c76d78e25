"""Text that a model writes after a prompt: greedy or sampled by a seed, piece by piece where someone watches."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypedDict

import torch
from torch import Tensor

from palimpsest.errors import ConfigError
from palimpsest.models import LanguageModel

OnToken = Callable[[str], object]
"""Is given each further piece of text."""


class DecodingFields(TypedDict, total=False):
    """The fields of `Decoding`, as keywords."""

    max_new_tokens: int
    temperature: float
    seed: int
    chat: bool


@dataclass(frozen=True)
class Decoding:
    """How a continuation is written.

    Attributes:
        max_new_tokens: Tokens at most; it ends earlier at an end-of-sequence token or where the context is full.
        temperature: 0 takes the likeliest token, above it tokens are drawn from the whole distribution.
        seed: Of the draws.
        chat: The prompt is a user's message, rendered with the chat template.
    """

    max_new_tokens: int = 60
    temperature: float = 0.0
    seed: int = 0
    chat: bool = False

    def __post_init__(self) -> None:
        """Refuse what no generation can do.

        Raises:
            ConfigError: It is such.
        """
        if self.max_new_tokens < 1:
            raise ConfigError("Nothing would be written", expected="max_new_tokens from 1 on")
        if not math.isfinite(self.temperature) or self.temperature < 0:
            raise ConfigError(
                "The temperature is no temperature", expected="0 or more", found=self.temperature
            )
        if not 0 <= self.seed < 2**63:
            raise ConfigError("The seed is out of range", expected="0 to 2^63 - 1", found=self.seed)


def encode_prompt(model: LanguageModel, prompt: str, *, chat: bool = False) -> list[int]:
    """Token ids of a prompt, behind the tokenizer's BOS where it has one.

    Args:
        model: The model that reads it.
        prompt: Text.
        chat: Render it with the chat template, as a user's message that waits for its answer.

    Raises:
        ConfigError: There is no chat template, the prompt has no token, or the context has no room for one more.
    """
    tokenizer = model.tokenizer
    text = _rendered(tokenizer, prompt) if chat else prompt
    ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:1] != [bos]:
        ids = [bos, *ids]
    if not ids:
        raise ConfigError("The prompt is empty", expected="text, since this tokenizer has no BOS token")
    if model.context and len(ids) >= model.context:
        raise ConfigError(
            "The prompt leaves no room in the model's context",
            expected=f"fewer than {model.context} tokens",
            found=len(ids),
            fix="Shorten the prompt",
        )
    return ids


def _rendered(tokenizer: Any, prompt: str) -> str:
    from jinja2.exceptions import TemplateError

    if getattr(tokenizer, "chat_template", None) is None:
        raise ConfigError("The tokenizer has no chat template", fix="Leave --chat out")
    message = [{"role": "user", "content": prompt}]
    try:
        return tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            "The chat template refuses the prompt", found=error, fix="Leave --chat out"
        ) from error


def write_on(model: LanguageModel, ids: list[int], options: Decoding, on_token: OnToken | None = None) -> str:
    """Continue token ids; the caller has the right adapter on and the steering in place.

    Args:
        model: Which writes.
        ids: Of the prompt.
        options: How.
        on_token: Called with each piece of text that is a whole number of characters.

    Returns:
        The new text alone, without special tokens.
    """
    from transformers import GenerationConfig

    tokenizer, hf_model = model.tokenizer, model.model
    ends = _ends(hf_model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    room = options.max_new_tokens if not model.context else model.context - len(ids)
    drawn: dict[str, Any] = {"temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    settings = GenerationConfig(
        do_sample=options.temperature > 0,
        max_new_tokens=min(options.max_new_tokens, room),
        eos_token_id=ends or None,
        pad_token_id=pad,
        repetition_penalty=1.0,
        num_beams=1,
        **(drawn if options.temperature > 0 else {}),
    )
    prompt = torch.tensor([ids], device=model.device)
    pieces = _Pieces(tokenizer, set(ends), on_token)
    with _evaluating(hf_model), _plain(hf_model), seeded(options.seed), torch.no_grad():
        made = hf_model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=settings,
            streamer=None if on_token is None else pieces,
        )
    return pieces.text(made[0, len(ids) :].tolist())


class _Pieces:
    """Text as it grows: a streamer of transformers, which gets the prompt first and then token after token."""

    def __init__(self, tokenizer: Any, ends: set[int], on_token: OnToken | None) -> None:
        self._tokenizer, self._ends, self._on_token = tokenizer, ends, on_token
        self._ids: list[int] | None = None
        self._shown = ""

    def text(self, ids: list[int]) -> str:
        """The text of new tokens up to the end of the sequence."""
        end = next((place for place, one in enumerate(ids) if one in self._ends), len(ids))
        # Cleaning up spaces would change what was shown already.
        return self._tokenizer.decode(ids[:end], skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def put(self, ids: Tensor) -> None:
        """Take in the next token."""
        if self._ids is None:
            self._ids = []
            return
        self._ids += ids.reshape(-1).tolist()
        # A character may be spread over several tokens.
        self._show(self.text(self._ids), whole=False)

    def end(self) -> None:
        """Show what is left."""
        self._show(self.text(self._ids or []), whole=True)

    def _show(self, text: str, *, whole: bool) -> None:
        more = text[len(self._shown) :]
        if not more or (not whole and text.endswith("\ufffd")):
            return
        self._shown = text
        if self._on_token is not None:
            self._on_token(more)


def _ends(hf_model: Any, tokenizer: Any) -> list[int]:
    stated = getattr(hf_model.generation_config, "eos_token_id", None)
    several = stated if isinstance(stated, list) else [stated]
    return sorted({end for end in (*several, tokenizer.eos_token_id) if end is not None})


@contextmanager
def _evaluating(hf_model: Any) -> Iterator[None]:
    training = hf_model.training
    hf_model.eval()
    try:
        yield
    finally:
        if training:
            hf_model.train()


@contextmanager
def _plain(hf_model: Any) -> Iterator[None]:
    """Without the checkpoint's own generation_config: its penalties and filters are no part of the comparison."""
    from transformers import GenerationConfig

    own = hf_model.generation_config
    hf_model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        hf_model.generation_config = own


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Random draws of torch by a seed; the global random state is as it was when the block ends."""
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(seed)
        yield


__all__ = ["Decoding", "DecodingFields", "OnToken", "encode_prompt", "seeded", "write_on"]
