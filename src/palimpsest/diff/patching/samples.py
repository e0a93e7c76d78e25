"""Greedy continuations by base, tuned and patched model, to be read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.corpus import Role, TokenBatch
from palimpsest.diff.patching.effects import Patcher
from palimpsest.diff.patching.sets import Variant
from palimpsest.log import progress
from palimpsest.models import LanguageModel

NEW_TOKENS = 40
PROMPT_TOKENS = 32
"""Length of the prompt where a text has no answer."""

_EDIT = Variant("all+bias")

Next = Callable[[Int[Tensor, "1 seq"]], Float[Tensor, "1 d_head"]]
"""What the head reads at the last token."""


@torch.inference_mode()
def continuations(
    patcher: Patcher, batches: Sequence[tuple[int, TokenBatch]], count: int
) -> list[dict[str, str]]:
    """Continuations of the first `count` prompts, from every corpus in turn.

    The patched model recomputes base, edit and upper half for each token; nothing is cached.
    """
    pair, found = patcher.pair, []
    tokenizer = pair.tokenizer
    writers: dict[str, tuple[LanguageModel, Next]] = {
        "base": (pair.base, lambda ids: _last(pair.base, ids)),
        "tuned": (pair.tuned, lambda ids: _last(pair.tuned, ids)),
        "patched": (pair.tuned, lambda ids: _patched(patcher, ids)),
    }
    with progress("Continuations", count, unit="prompts") as advance:
        for corpus, prompt in _chosen(batches, len(patcher.texts.names), count):
            sample = {"corpus": patcher.texts.names[corpus], "prompt": tokenizer.decode(prompt)}
            for name, (model, following) in writers.items():
                sample[name] = tokenizer.decode(_continue(model, following, prompt, tokenizer.eos_token_id))
            found.append(sample)
            advance()
    return found


def _chosen(
    batches: Sequence[tuple[int, TokenBatch]], corpora: int, count: int
) -> list[tuple[int, list[int]]]:
    """The first prompts of each corpus, one corpus after the other, by number of the document."""
    prompts = sorted(
        (document, corpus, ids) for corpus, batch in batches for document, ids in _prompts(batch)
    )
    turns = [[(corpus, ids) for _, corpus, ids in prompts if corpus == own] for own in range(corpora)]
    longest = max(map(len, turns), default=0)
    return [own[turn] for turn in range(longest) for own in turns if turn < len(own)][:count]


def _prompts(batch: TokenBatch) -> Iterator[tuple[int, list[int]]]:
    """Each document up to its first answer, or its first tokens where it has none."""
    for row, mask in enumerate(batch.attention_mask):
        answer = (batch.role[row] == Role.ASSISTANT).nonzero()
        length = int(answer[0]) if len(answer) else min(PROMPT_TOKENS, int(mask.sum()))
        if length:
            yield int(batch.document[row, 0]), batch.input_ids[row, :length].tolist()


def _continue(model: LanguageModel, following: Next, prompt: list[int], eos: int | None) -> list[int]:
    ids = list(prompt)
    room = NEW_TOKENS if not model.context else min(NEW_TOKENS, model.context - len(prompt))
    for _ in range(room):
        ids.append(int(model.head.logits(following(torch.tensor([ids])))[0].argmax()))
        if ids[-1] == eos:
            break
    return ids[len(prompt) :]


def _last(model: LanguageModel, ids: Int[Tensor, "1 seq"]) -> Float[Tensor, "1 d_head"]:
    head_input = model.read(ids, [], head=True).head_input
    assert head_input is not None
    return head_input[:, -1]


def _patched(patcher: Patcher, ids: Int[Tensor, "1 seq"]) -> Float[Tensor, "1 d_head"]:
    seen = torch.ones_like(ids, dtype=torch.bool)
    batch = TokenBatch(ids, seen, seen, torch.zeros_like(ids), torch.zeros_like(ids))
    return patcher.run(patcher.read(batch), [_EDIT], torch.tensor([ids.shape[1] - 1]))[0]
