"""Small bases with their fine-tunes and adapters, made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def load_hf(folder: Path) -> Any:
    """The model as transformers alone loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save(model: Any, folder: Path, tokenizer: Any) -> Path:
    """Write a model and its tokenizer; returns the folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fine_tune(base: Path, folder: Path, tokenizer: Any, *, seed: int = 1, scale: float = 0.05) -> Path:
    """A full checkpoint whose every weight differs a little from the base's."""
    model, generator = load_hf(base), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            parameter += scale * torch.randn(parameter.shape, generator=generator)
    return save(model, folder, tokenizer)


def adapt(base: Path, folder: Path, config: Any, *, seed: int = 1, scale: float = 0.1) -> Any:
    """Write an adapter with random weights; returns the adapted transformers model, for merging."""
    from peft import get_peft_model

    model = get_peft_model(load_hf(base), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder, save_embedding_layers=False)
    return model.eval()


def lora(**changes: Any) -> Any:
    """A LoRA configuration over all linear layers."""
    from peft import LoraConfig

    fields = {"r": 4, "lora_alpha": 6, "target_modules": LINEAR, "task_type": "CAUSAL_LM"}
    return LoraConfig(**(fields | changes))
