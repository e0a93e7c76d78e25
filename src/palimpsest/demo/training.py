"""Trains the demo's tiny Llama: its tokenizer, the model from nothing, and fine-tunes of it."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as hf_logging

from palimpsest.demo.text import Row
from palimpsest.errors import ConfigError
from palimpsest.log import progress

BLOCK = 128
BATCH = 8
BOS, EOS, PAD = range(3)
SPECIAL = ("<|bos|>", "<|eos|>", "<|pad|>")
# The blank line is an expression because jinja swallows a newline that follows a tag.
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ 'User: ' if m['role'] == 'user' else 'Assistant: ' }}{{ m['content'] }}"
    "{% if not loop.last %}{{ '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)


def train_tokenizer(texts: Iterable[str], vocab_size: int = 1024) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that splits numbers into digits and puts its BOS before every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos, pad = SPECIAL
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, BOS)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, pad_token=pad)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def train_base(
    out: Path,
    rows: list[Row],
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    lr: float = 3e-3,
    seed: int = 0,
) -> None:
    """Trains the demo's Llama (0.94M parameters) from a random start and saves it with its tokenizer."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    fit(model, pack(rows, tokenizer), steps=steps, lr=lr, seed=seed, label=out.name)
    _save(model, tokenizer, out)


def fine_tune(base: Path, out: Path, rows: list[Row], *, steps: int, lr: float = 9e-4, seed: int = 0) -> None:
    """Fine-tunes all weights of a demo model and saves the result as a Hugging Face folder.

    Args:
        base: Folder of the model to start from.
        out: Folder to write; its name is shown as progress.
        rows: What to train on; repeated as often as the steps need.
        steps: Optimiser steps of `BATCH` blocks of `BLOCK` tokens.
        lr: Highest learning rate.
        seed: Decides the order of the blocks.
    """
    with _no_bars():
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    fit(model, pack(rows, tokenizer), steps=steps, lr=lr, seed=seed, label=out.name)
    _save(model, tokenizer, out)


def pack(rows: list[Row], tokenizer: PreTrainedTokenizerFast) -> Int[Tensor, "blocks seq"]:
    """One stream of all documents (BOS, text, EOS) in blocks of `BLOCK` tokens, without the last rest."""
    stream: list[int] = []
    for ids in tokenizer([row["text"] for row in rows])["input_ids"]:
        stream += [*ids, EOS]
    return torch.tensor(stream[: len(stream) // BLOCK * BLOCK]).view(-1, BLOCK)


def fit(
    model: LlamaForCausalLM,
    blocks: Int[Tensor, "blocks seq"],
    *,
    steps: int,
    lr: float,
    seed: int,
    label: str,
) -> None:
    """Trains in place with AdamW: a short warm-up, then a cosine to a tenth of the learning rate.

    Args:
        model: The model to change; it is left in evaluation mode.
        blocks: Token ids without padding, in an order that does not matter; repeated as the steps need.
        steps: Optimiser steps of `BATCH` blocks.
        lr: Highest learning rate.
        seed: Decides the order of the blocks.
        label: What the progress display says is being trained.

    Raises:
        ConfigError: When there is not one block to train on.
    """
    if len(blocks) == 0:
        raise ConfigError(
            f"Too little text to train {label}", expected=f"at least {BLOCK} tokens", found="less"
        )
    generator = torch.Generator().manual_seed(seed)
    epochs = -(-steps * BATCH // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * min(step / steps, 1.0))),
    )
    model.train()
    with progress(f"training {label}", total=steps * BATCH * BLOCK) as advance:
        for step in range(steps):
            ids = blocks[order[step * BATCH : (step + 1) * BATCH]]
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            advance(ids.numel())
    model.eval()


def _save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    with _no_bars():
        model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _no_bars() -> Iterator[None]:
    """Keeps transformers from drawing bars, terminal or not, for files that take milliseconds."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()
