"""Mean rewards of a model's own short answers, greedy, so that two states of it are compared without luck."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray

from palimpsest.errors import ConfigError
from palimpsest.log import progress
from palimpsest.tune.rows import PromptRow
from palimpsest.tune.scoring import settled

BATCH = 16
"""Prompts that are answered at once."""


@torch.inference_mode()
def mean_rewards(
    model: Any,
    tokenizer: Any,
    rows: Sequence[PromptRow],
    reward: Callable[..., Sequence[float | None]],
    length: int,
    *,
    base: bool,
) -> Float[NDArray, " rows"]:
    """The reward of each prompt's greedy answer; NaN where the function gives none.

    Args:
        model: A transformers or a peft model.
        tokenizer: Its tokenizer.
        rows: Prompts.
        reward: Called with `prompts`, `completions` and the rows' columns, as trl calls it; a conversation's answer
            comes as a list with one message.
        length: Tokens of an answer, at most.
        base: With the adapter switched off.

    Raises:
        ConfigError: The function does not return one number per answer.
    """
    texts = [""] * len(rows)
    off = model.disable_adapter() if base and hasattr(model, "disable_adapter") else nullcontext()
    with settled(model), off, progress("answering held-out prompts", len(rows), "rows") as advance:
        for batch in _same_length(rows):
            for place, text in zip(batch, _answers(model, tokenizer, rows, batch, length), strict=True):
                texts[place] = text
            advance(len(batch))
    completions = [
        text if isinstance(row.text, str) else [{"role": "assistant", "content": text}]
        for row, text in zip(rows, texts, strict=True)
    ]
    names = dict.fromkeys(name for row in rows for name in row.columns)
    columns = {name: [row.columns.get(name) for row in rows] for name in names}
    found = list(reward(prompts=[row.text for row in rows], completions=completions, **columns))
    if len(found) != len(rows):
        raise ConfigError(
            "The reward function must return one number per completion", expected=len(rows), found=len(found)
        )
    try:
        return np.array([math.nan if one is None else float(one) for one in found])
    except (TypeError, ValueError) as error:
        raise ConfigError("The reward function returned something that is no number", found=error) from error


def _same_length(rows: Sequence[PromptRow]) -> Iterator[list[int]]:
    """Prompts of one length together: none needs padding, which would stand before the text."""
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        groups.setdefault(len(row.prompt), []).append(place)
    for group in groups.values():
        for start in range(0, len(group), BATCH):
            yield group[start : start + BATCH]


def _answers(
    model: Any, tokenizer: Any, rows: Sequence[PromptRow], batch: list[int], length: int
) -> list[str]:
    from transformers import GenerationConfig

    ends = _ends(model, tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0] if ends else 0
    settings = GenerationConfig(
        do_sample=False, max_new_tokens=length, eos_token_id=ends or None, pad_token_id=pad
    )
    ids = torch.tensor([rows[place].prompt for place in batch], device=model.device)
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)
    answers = made[:, ids.shape[1] :].tolist()
    return [tokenizer.decode(_until(answer, ends), skip_special_tokens=True) for answer in answers]


def _ends(model: Any, tokenizer: Any) -> list[int]:
    stated = getattr(model.generation_config, "eos_token_id", None)
    several = stated if isinstance(stated, list) else [stated]
    return sorted({end for end in (*several, tokenizer.eos_token_id) if end is not None})


def _until(tokens: list[int], ends: list[int]) -> list[int]:
    end = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:end]
