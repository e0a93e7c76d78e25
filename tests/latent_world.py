"""Tiny models of several families, a dictionary that fits them, and latent adapters on them."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import torch

from helpers import randomize
from palimpsest.dictionaries import Dictionary

D_MODEL, LATENTS, K = 32, 96, 12
GROUPED = {
    "vocab_size": 128,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES = ("Llama", "Qwen2", "Gemma2", "GPT2", "GPTNeoX")
KINDS = ("scale", "active-bias", "bias", "relu-bias", "lerp", "gate", "low-rank", "mlp", "vector")


@cache
def _model(name: str) -> Any:
    import transformers as t

    fields = dict(GROUPED)
    if name == "Gemma2":
        fields |= {"head_dim": 8, "query_pre_attn_scalar": 8, "attn_implementation": "eager"}
    if name == "GPTNeoX":
        fields.pop("num_key_value_heads")
    if name == "GPT2":
        ids = {key: fields[key] for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
        fields = {**ids, "n_embd": D_MODEL, "n_layer": 3, "n_head": 4, "n_positions": 64}
    head = "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    model = getattr(t, head)(getattr(t, f"{name}Config")(**fields))
    randomize(model, seed=3)
    return model.eval()


def tiny(name: str = "Llama", dtype: torch.dtype = torch.float32) -> Any:
    """A fresh copy of a random model, for evaluation."""
    return copy.deepcopy(_model(name)).to(dtype)


def dictionary(activation: str = "topk", seed: int = 0, **extra: Any) -> Dictionary:
    """A random dictionary whose latents fire on part of the tokens."""
    torch.manual_seed(seed)
    k = {"topk": K, "batch_topk": K}.get(activation)
    made = Dictionary(D_MODEL, LATENTS, activation=activation, k=k, **extra).requires_grad_(False)
    for name in ("threshold", "r_mag"):
        if getattr(made, name, None) is not None:
            getattr(made, name).copy_(0.3 * torch.rand(LATENTS))
    made.b_dec.copy_(0.1 * torch.randn_like(made.b_dec))
    return made


def config(kind: str, *hooks: Any, **changes: Any) -> Any:
    """A configuration; the site is resid_post.1 unless hooks are given."""
    from palimpsest.tune.adapter import LatentConfig

    rank = {"mlp": 8, "low-rank": 4}.get(kind)
    hooks = hooks or ((dictionary(), "resid_post.1"),)
    return LatentConfig(**({"target_hooks": list(hooks), "component": kind, "rank": rank} | changes))


def adapted(kind: str, *hooks: Any, base: Any = None, move: float = 0.0, **changes: Any) -> Any:
    """A model with an adapter, whose numbers are moved at random where `move` is given."""
    from peft import get_peft_model

    model = get_peft_model(tiny() if base is None else base, config(kind, *hooks, **changes)).eval()
    if move:
        shift(model, move)
    return model


def shift(model: Any, by: float, seed: int = 5) -> None:
    """Move every trainable number at random."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += by * torch.randn(parameter.shape, generator=generator).to(parameter)


def tokens(batch: int = 2, seq: int = 9, seed: int = 0) -> torch.Tensor:
    """Ids without special ones, behind a BOS."""
    ids = torch.randint(3, 128, (batch, seq), generator=torch.Generator().manual_seed(seed))
    ids[:, 0] = 1
    return ids
