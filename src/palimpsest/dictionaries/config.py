"""How a dictionary is trained, as one frozen dataclass. Imports no torch."""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import Count, Number

LONGEST_DEAD = 10_000_000
"""Tokens without activity after which a latent counts as dead in long runs."""

ANNEAL_FROM = 4
"""How many times the final k annealing starts from."""


@Parameter(group="Recipe")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Recipe of one dictionary."""

    n_latents: Annotated[Count, Parameter(name="--latents")] = 4096
    """Number of latents."""
    k: Number | None = 32
    """Latents per token: exact for topk, on average for batch_topk, unused for relu."""
    activation: Literal["topk", "batch_topk", "relu"] = "topk"
    """Which latents survive."""
    tokens: Count = 2_000_000
    """Tokens to train on."""
    batch_size: Count = 2048
    """Tokens per step."""
    view: Annotated[Literal["base", "tuned", "diff"], Parameter(parse=False)] = "base"
    """What a batch with one activation per token is; two activations per token are always a pair."""
    lr: Number | None = None
    """Adam's learning rate; by default 1.5e-3 / sqrt(latents / 16384), at most 6e-3: for up to 10M tokens."""
    warmup: Number = 0.02
    """Share of the run over which the learning rate rises."""
    decay: Number = 0.2
    """Share of the run, at its end, over which the learning rate falls to zero."""
    k_anneal: Number = 0.0
    """Share of the run over which k falls from four times its value."""
    auxk_alpha: Number = 1 / 32
    """Weight of the loss by which dead latents explain what the live ones leave."""
    l1_weight: Number = 0.1
    """Weight of the sparsity loss of relu; the others have none."""
    dead_after_tokens: Count | None = None
    """Tokens without activity after which a latent is dead; a tenth of the run, at most 10M, when absent."""
    clip: Number = 1.0
    """Largest norm of the gradient."""
    seed: Annotated[int, Parameter(parse=False)] = 0
    """Of the initial directions."""
    dtype: Annotated[Literal["float32", "bfloat16"], Parameter(name="--compute-dtype")] = "float32"
    """Of the encoder's matrix product; weights, sums and everything else stay float32."""
    device: Annotated[str, Parameter(parse=False)] = "cpu"
    """Where training runs."""
    log_every: Count = 100
    """Steps between two reports."""
    checkpoint_every: Count = 1000
    """Steps between two checkpoints, where there is a folder for them."""

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        if self.activation not in ("topk", "batch_topk", "relu"):
            raise ConfigError(
                "This activation cannot be trained",
                expected="topk, batch_topk or relu",
                found=self.activation,
            )
        for name in ("n_latents", "tokens", "batch_size", "log_every", "checkpoint_every", "clip"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be above 0", found=getattr(self, name))
        for name in ("warmup", "decay", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is a share of the run", expected="0 to 1", found=getattr(self, name)
                )
        if min(self.auxk_alpha, self.l1_weight) < 0:
            raise ConfigError("Loss weights cannot be negative", found=(self.auxk_alpha, self.l1_weight))
        if self.lr is not None and self.lr <= 0:
            raise ConfigError("The learning rate must be above 0", found=self.lr)
        if self.dtype not in ("float32", "bfloat16"):
            raise ConfigError("Training runs in float32 or bfloat16", found=self.dtype)

    @property
    def steps(self) -> int:
        """How many whole batches the run has, at least one."""
        return max(1, self.tokens // self.batch_size)

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        return self.lr if self.lr is not None else min(6e-3, 1.5e-3 / math.sqrt(self.n_latents / 2**14))

    @property
    def dead_after(self) -> int:
        """Tokens without activity after which a latent is dead."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return min(LONGEST_DEAD, self.tokens // 10)

    def lr_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0."""
        rise = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        fall = min(1.0, (self.steps - step) / max(1.0, self.decay * self.steps))
        return self.peak_lr * rise * fall

    def k_at(self, step: int) -> float:
        """Latents per token of a step, counted from 0."""
        if self.k is None:
            return 0.0
        left = 1 - step / (self.k_anneal * self.steps) if self.k_anneal else 0.0
        k = min(self.k * (1 + (ANNEAL_FROM - 1) * max(0.0, left)), float(self.n_latents))
        return float(round(k)) if self.activation == "topk" else k
