"""Trains one null in place and takes it back: a short fine-tune that leaves no trace on the model."""

import math
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from palimpsest.audit.nulls.recipes import NullRecipe
from palimpsest.errors import ConfigError
from palimpsest.models import LanguageModel

LORA_RANK = 8
LORA_ALPHA = 16
CHECK_EVERY = 10
"""Steps between looks at the loss: each look makes an accelerator wait."""
RISE = 0.5
"""Nats per token by which the loss may end above its start; beyond, the run diverged."""


@dataclass(frozen=True)
class NullOutcome:
    """How the training of one null went.

    Attributes:
        loss_first: Mean loss of the first quarter of the steps, in nats per token.
        loss_last: The same of the last quarter.
        lr: The highest learning rate as the optimiser had it.
        tokens: Tokens trained on, repeats counted.
        seconds: Wall time.
        diverged: Why the null must not be used, else None.
    """

    loss_first: float
    loss_last: float
    lr: float
    tokens: int
    seconds: float
    diverged: str | None


@contextmanager
def trained_null(
    model: LanguageModel,
    blocks: Int[Tensor, "blocks seq"],
    recipe: NullRecipe,
    *,
    batch_size: int,
    advance: Callable[[int], None] | None = None,
) -> Iterator[NullOutcome]:
    """The model as a null inside the block, and bit for bit what it was after it, whatever happens inside.

    AdamW in float32 with a short warm-up and a cosine to a tenth of the rate; a low-rank adapter goes into every
    linear layer but the head and is merged into the weights, so the model's sites stay what they are. Weights in
    another dtype are rounded back to it before the block.

    Args:
        model: A plain model, without an adapter of its own.
        blocks: Token ids without padding; repeated, in a new order each time, as the steps need.
        recipe: What to do.
        batch_size: Blocks per step.
        advance: Told the tokens of each step as they are done; a diverged run tells of fewer.

    Yields:
        How the training went. When it diverged, the model is not worth reading.

    Raises:
        ConfigError: When there is no block to train on, or blocks are longer than the model's context.
    """
    _check(model, blocks, batch_size)
    started = time.monotonic()
    # Training needs gradients also where the caller reads without them.
    with _restored(model.model) as dtypes:
        with torch.inference_mode(False), torch.enable_grad():
            rates, losses = _train(model, blocks, recipe, batch_size, advance)
        for parameter, dtype in dtypes.items():
            parameter.data = parameter.data.to(dtype)
        quarter = max(1, len(losses) // 4)
        yield NullOutcome(
            loss_first=fmean(losses[:quarter]),
            loss_last=fmean(losses[-quarter:]),
            lr=rates,
            tokens=len(losses) * batch_size * blocks.shape[1],
            seconds=time.monotonic() - started,
            diverged=_divergence(model.model, losses),
        )


def _check(model: LanguageModel, blocks: Tensor, batch_size: int) -> None:
    if batch_size < 1:
        raise ConfigError("Nulls need at least one block per step", found=batch_size)
    if len(blocks) == 0 or blocks.shape[1] < 2:
        raise ConfigError(
            "Too little text to train a null on",
            expected="at least one block of two tokens",
            found=f"{len(blocks)} blocks of {blocks.shape[1]} tokens",
        )
    if model.context and blocks.shape[1] > model.context:
        raise ConfigError(
            f"The nulls' text is longer than the context of {model.name}",
            expected=f"at most {model.context} tokens per block",
            found=blocks.shape[1],
        )


@contextmanager
def _restored(hf_model: nn.Module) -> Iterator[dict[nn.Parameter, torch.dtype]]:
    """Lend float32 copies of the weights; weights, flags, buffers and module tree are put back at the end.

    Yields:
        The parameters with floating-point weights and the dtype of each.
    """
    parameters = list(hf_model.parameters())
    # The old tensors themselves are kept and never written to, which no rounding or interruption can spoil.
    weights = [
        (parameter, parameter.data, parameter.requires_grad, parameter.grad) for parameter in parameters
    ]
    buffers = [(buffer, buffer.detach().clone()) for buffer in hf_model.buffers()]
    tree = [(module, dict(module._modules), module.training) for module in hf_model.modules()]
    adapted = hasattr(hf_model, "peft_config")
    floating = {p: p.dtype for p in parameters if p.is_floating_point()}
    try:
        with torch.inference_mode(False), torch.no_grad():
            for parameter in floating:
                parameter.data = parameter.data.to(torch.float32, copy=True)
        yield floating
    finally:
        for module, children, training in tree:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
        for parameter, data, requires_grad, grad in weights:
            # First, because a gradient must have its weight's dtype.
            parameter.grad = None
            parameter.data = data
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        with torch.no_grad():
            for buffer, values in buffers:
                buffer.copy_(values)
        if not adapted:
            # Otherwise the next adapter would be taken for a second one.
            vars(hf_model).pop("peft_config", None)


def _train(
    model: LanguageModel,
    blocks: Tensor,
    recipe: NullRecipe,
    batch_size: int,
    advance: Callable[[int], None] | None,
) -> tuple[float, list[float]]:
    """Train and merge; returns the highest learning rate and the loss of every step that was taken."""
    hf_model = model.model
    children = [(module, dict(module._modules)) for module in hf_model.modules()]
    accelerators = sorted({p.device.index or 0 for p in hf_model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=accelerators):
        torch.manual_seed(recipe.seed)
        for parameter in hf_model.parameters():
            parameter.requires_grad_(recipe.method == "full" and parameter.is_floating_point())
        lr = recipe.lr
        if recipe.method == "full":
            lr *= _weight_scale(hf_model)
        else:
            _insert_lora(hf_model)
        hf_model.train()
        losses = _descend(model, blocks, recipe, lr, batch_size, advance)
    for module, before in children:
        for name, child in module._modules.items():
            if child is not None and child is not before.get(name):
                child.merge()
        module._modules.update(before)
    hf_model.eval().requires_grad_(False)
    return lr, losses


def _insert_lora(hf_model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=LORA_RANK, lora_alpha=LORA_ALPHA, lora_dropout=0.0, target_modules="all-linear")
    with warnings.catch_warnings():
        # Of GPT-2's transposed layers, which peft gets right while it warns.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(config, hf_model)


def _weight_scale(hf_model: nn.Module) -> float:
    """Root mean square of a weight matrix, the median of the model's: what a step of one unit is relative to."""
    scales = [p.detach().square().mean().sqrt().cpu() for p in hf_model.parameters() if p.dim() == 2]
    return float(torch.stack(scales).median())


def _descend(
    model: LanguageModel,
    blocks: Tensor,
    recipe: NullRecipe,
    lr: float,
    batch_size: int,
    advance: Callable[[int], None] | None,
) -> list[float]:
    """Run the optimiser over everything that requires a gradient; ends early when the loss is not finite."""
    trained = [parameter for parameter in model.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
        lr=lr,
        betas=(0.9, 0.98),
        weight_decay=0.01 if recipe.method == "full" else 0.0,
        fused=model.device.type in ("cpu", "cuda"),
    )
    generator = torch.Generator().manual_seed(recipe.seed)
    epochs = -(-recipe.steps * batch_size // len(blocks))
    order = torch.cat([torch.randperm(len(blocks), generator=generator) for _ in range(epochs)])
    # All at once, so that no step waits for a copy.
    blocks, order = blocks.to(model.device), order.to(model.device)
    warmup = max(1, recipe.steps // 20)
    losses: list[Tensor] = []
    for step in range(recipe.steps):
        share = min((step + 1) / warmup, 0.55 + 0.45 * math.cos(math.pi * step / recipe.steps))
        for group in optimizer.param_groups:
            group["lr"] = lr * share
        ids = blocks[order[step * batch_size : (step + 1) * batch_size]]
        loss = model.model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
        if advance is not None:
            advance(ids.numel())
        if len(losses) % CHECK_EVERY == 0 and not torch.stack(losses[-CHECK_EVERY:]).isfinite().all():
            break
    return torch.stack(losses).tolist()


def _divergence(hf_model: nn.Module, losses: list[float]) -> str | None:
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return f"the loss was not finite at step {step}"
    if not all(p.isfinite().all() for p in hf_model.parameters() if p.is_floating_point()):
        return "weights are not finite"
    last = fmean(losses[-max(1, len(losses) // 4) :])
    if last > losses[0] + RISE:
        return f"the loss rose from {losses[0]:.2f} to {last:.2f} nats per token"
    return None
