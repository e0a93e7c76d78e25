"""Fixtures: fixed seeds, one thread per process, no network, tiny models made on the spot."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PALIMPSEST_QUIET"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

from helpers import REPOSITORY, randomize  # noqa: E402

torch.set_num_threads(1)

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}"
    "{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
TOKENIZER_TEXT = (
    "The river runs past the old mill, and the miller counts his sacks of flour.",
    "A function returns the sum of two numbers: def add(a, b): return a + b.",
    "Seven apples and five pears make twelve pieces of fruit; how many are left over?",
    "<|user|> <|assistant|> <|system|> Please answer the question in one short sentence.",
)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def zoo() -> Path:
    """Return the folder of real base models and fine-tunes, or skip."""
    path = Path(os.environ.get("PALIMPSEST_ZOO") or REPOSITORY.parent / "shared" / "zoo")
    if not path.is_dir():
        pytest.skip(f"no model zoo at {path}: set PALIMPSEST_ZOO to its folder")
    return path


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Train a byte-level BPE tokenizer (320 entries, nothing is unknown to it) with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TOKENIZER_TEXT * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, tiny_tokenizer) -> Callable[..., Path]:
    """Return a factory `(seed=0, **config) -> folder` of random Llamas with their tokenizer.

    Two layers, d_model 32, four heads; `config` overrides any field. Equal arguments give one folder.
    """
    made: dict[tuple, Path] = {}

    def make(seed: int = 0, **config: object) -> Path:
        key = (seed, *sorted(config.items()))
        if key not in made:
            from transformers import LlamaConfig, LlamaForCausalLM

            shape = {
                "vocab_size": len(tiny_tokenizer),
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "bos_token_id": tiny_tokenizer.bos_token_id,
                "eos_token_id": tiny_tokenizer.eos_token_id,
                "pad_token_id": tiny_tokenizer.pad_token_id,
            }
            model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
            randomize(model, seed=seed)
            folder = tmp_path_factory.mktemp("tiny_llama")
            model.save_pretrained(folder)
            tiny_tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make
