"""How much likelier a text becomes after a prompt: a behaviour in one number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from palimpsest.errors import ConfigError
from palimpsest.harvest.stream import token_loss
from palimpsest.interpret.steering.changes import Change
from palimpsest.interpret.steering.steerer import Steerer, Tokens
from palimpsest.models import LanguageModel, Side


def encode_watched(model: LanguageModel, text: str, prompts: Sequence[Sequence[int]]) -> list[int]:
    """Token ids of a watched text, tokenised by itself.

    Raises:
        ConfigError: It has no token, or the context has no room for it behind a prompt.
    """
    ids = list(model.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise ConfigError("--watch is empty", expected="text, with its leading space, as in ' seven'")
    longest = max(map(len, prompts), default=0) + len(ids)
    if model.context and longest > model.context:
        raise ConfigError(
            f"'{text}' does not fit behind the longest prompt",
            expected=f"at most {model.context} tokens together",
            found=longest,
        )
    return ids


@torch.inference_mode()
def log_probabilities(
    steerer: Steerer,
    side: Side,
    prompts: Sequence[Sequence[int]],
    watched: Sequence[Sequence[int]],
    changes: Sequence[Change] = (),
    tokens: Tokens = "all",
) -> list[list[float]]:
    """Log-probabilities of texts behind prompts in nats, summed over a text's tokens: a row per text.

    Args:
        steerer: Of the dictionary.
        side: The model.
        prompts: Token ids, as `encode_prompt` gives them.
        watched: Token ids, as `encode_watched` gives them.
        changes: Of latents; none read the model as it is.
        tokens: Which tokens are edited.
    """
    found = []
    for text in watched:
        row = []
        for prompt in prompts:
            ids = torch.tensor([[*prompt, *text]])
            with steerer.steering(side, changes, tokens=tokens, prompt_length=len(prompt)) as model:
                head_input = model.read(ids, [], head=True).head_input
            assert head_input is not None
            nats = token_loss(model.head, head_input[0, len(prompt) - 1 : -1], ids[0, len(prompt) :])
            row.append(-float(nats.sum()))
        found.append(row)
    return found


def changes_of(
    texts: Sequence[str], before: Sequence[Sequence[float]], after: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    """Per watched text the mean over prompts of the change in its log-probability."""
    return [
        {"text": text, "change": sum(b - a for a, b in zip(one, other, strict=True)) / len(one)}
        for text, one, other in zip(texts, before, after, strict=True)
    ]


__all__ = ["changes_of", "encode_watched", "log_probabilities"]
