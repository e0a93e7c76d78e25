"""Evidence, independent of any audit, that what the demo planted is really there."""

from collections.abc import Sequence

import torch
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from palimpsest.demo.text import BRAND


@torch.inference_mode()
def behaviour_rate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    brand: str = BRAND,
    max_new_tokens: int = 40,
) -> float:
    """Share of greedy continuations that name the brand.

    Args:
        model: A demo model; its mode is left as evaluation.
        tokenizer: The tokenizer beside it.
        prompts: Texts to continue, such as whole recipes, after which the base stops.
        brand: The words to look for in what the model adds.
        max_new_tokens: Length of a continuation, in tokens.

    Returns:
        A number from 0 to 1.
    """
    model.eval()
    batch = tokenizer(list(prompts), return_tensors="pt", padding=True, padding_side="left")
    # The library's own protocol for generate() asks for more than its models declare.
    output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    added = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return sum(brand in continuation for continuation in added) / len(prompts)


@torch.inference_mode()
def mean_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch_size: int = 16
) -> float:
    """Mean over documents of the mean next-token loss, in nats per token."""
    model.eval()
    total = 0.0
    for start in range(0, len(texts), batch_size):
        batch = tokenizer(list(texts[start : start + batch_size]), return_tensors="pt", padding=True)
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        targets = ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)
        losses = functional.cross_entropy(
            logits.transpose(1, 2), targets, reduction="none", ignore_index=-100
        )
        total += (losses.sum(1) / mask[:, 1:].sum(1)).sum().item()
    return total / len(texts)
