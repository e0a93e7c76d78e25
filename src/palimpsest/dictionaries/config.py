"""How a dictionary is trained, as one frozen dataclass. Imports no torch."""

import math
import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, Count, Number

LONGEST_DEAD = 10_000_000
"""Tokens without activity after which a latent counts as dead in long runs."""

ANNEAL_FROM = 4
"""How many times the final k annealing starts from."""

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9_.-]{0,99}")
"""What one of several dictionaries may be called: it is a folder's name."""

RESERVED = ("parts", "manifest.json", "training.jsonl", "training.parquet", "variants.json", "tensorboard")
"""Names that a folder of several dictionaries has for something else."""

TRAINABLE = ("topk", "batch_topk", "relu", "jumprelu")
FIXED = ("topk", "batch_topk")
"""Rules that choose how many latents survive; the others need a sparsity loss."""

PENALTIES = ("l1_sum", "l1_concat", "l1_mixed", "tanh")


@Parameter(group="Objective")
@dataclass(frozen=True, kw_only=True)
class Objective:
    """What is minimised: the weighted sum of named terms."""

    error: Literal["squared", "unsquared"] | None = None
    """Reconstruction error per token; squared for one activation per token, unsquared for a pair when absent."""
    auxk_alpha: Number = 1 / 32
    """Weight of the loss by which dead latents explain what the live ones leave."""
    sparsity: Literal["l1_sum", "l1_concat", "l1_mixed", "tanh"] | None = None
    """Penalty of relu and jumprelu; l1_sum and tanh when absent. Sum and concat differ for a pair only: the sum
    of the two decoder norms, or the norm of both together, which does not favour latents of one model."""
    sparsity_weight: Number = 0.1
    """Weight of that penalty; topk and batch_topk have none."""
    sparsity_warmup: Number = 0.1
    """Share of the run over which that weight rises."""
    shared_penalty: Number = 0.15
    """How much of the penalty the shared latents of a pair pay."""
    preact_weight: Number = 1e-4
    """Weight of the loss that pulls dead jumprelu latents back towards their threshold."""
    bandwidth: Number = 0.25
    """Width of the window around the threshold in which jumprelu learns it; activations have norm sqrt(d_model)."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if self.error not in (None, "squared", "unsquared"):
            raise ConfigError("Unknown error", expected="squared or unsquared", found=self.error)
        if self.sparsity not in (None, *PENALTIES):
            raise ConfigError("Unknown sparsity penalty", expected=", ".join(PENALTIES), found=self.sparsity)
        weights = (self.auxk_alpha, self.sparsity_weight, self.shared_penalty, self.preact_weight)
        if not all(0 <= weight < math.inf for weight in weights):
            raise ConfigError("Loss weights cannot be negative, and must be finite", found=weights)
        if not 0 <= self.sparsity_warmup <= 1:
            raise ConfigError(
                "sparsity_warmup is a share of the run", expected="0 to 1", found=self.sparsity_warmup
            )
        if not 0 < self.bandwidth < math.inf:
            raise ConfigError("bandwidth must be above 0", found=self.bandwidth)


@Parameter(group="Partition")
@dataclass(frozen=True, kw_only=True)
class Partition:
    """Latents of a pair that are bound to one model or to both, laid out [base_only, tuned_only, shared, free]."""

    base_only: Count = 0
    """Latents that read and write the base alone."""
    tuned_only: Count = 0
    """Latents that read and write the tuned model alone."""
    shared: Count = 0
    """Latents with one decoder direction for both models."""

    def __post_init__(self) -> None:
        """Refuse negative counts."""
        if min(self.base_only, self.tuned_only, self.shared) < 0:
            raise ConfigError("A partition holds 0 latents or more", found=self)

    @property
    def total(self) -> int:
        """How many latents are bound."""
        return self.base_only + self.tuned_only + self.shared


@Parameter(group="Recipe")
@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Recipe of one dictionary."""

    n_latents: Annotated[Count, Parameter(name="--latents")] = 4096
    """Number of latents."""
    k: Number | None = 32
    """Latents per token: exact for topk, on average for batch_topk, unused for relu and jumprelu."""
    activation: Literal["topk", "batch_topk", "relu", "jumprelu"] = "topk"
    """Which latents survive."""
    prefixes: tuple[Count, ...] = ()
    """Matryoshka: each of these numbers of first latents must reconstruct on its own; topk and batch_topk only."""
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
    dead_after_tokens: Count | None = None
    """Tokens without activity after which a latent is dead; a tenth of the run, at most 10M, when absent."""
    clip: Number = 1.0
    """Largest norm of the gradient."""
    seed: Annotated[int, Parameter(parse=False)] = 0
    """Of the initial directions."""
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], Parameter(name="--compute-dtype")] = "auto"
    """Of the encoder's matrix product; what it selects is computed again in float32, and weights, sums and
    everything else stay float32. auto: bfloat16 where the machine multiplies it faster."""
    device: Annotated[str, Parameter(parse=False)] = "cpu"
    """Where training runs."""
    log_every: Count = 100
    """Steps between two reports."""
    checkpoint_every: Count | None = None
    """Steps between two checkpoints, where there is a folder for them; a tenth of the run, at most 1000, by default."""
    objective: Annotated[Objective, FLAT] = field(default_factory=Objective)
    """What is minimised."""
    partition: Annotated[Partition, FLAT] = field(default_factory=Partition)
    """Latents that are bound to one model or to both."""

    def __post_init__(self) -> None:
        """Refuse values that contradict each other."""
        if self.activation not in TRAINABLE:
            raise ConfigError(
                "This activation cannot be trained", expected=", ".join(TRAINABLE), found=self.activation
            )
        counts = ("n_latents", "tokens", "batch_size", "dead_after_tokens", "log_every", "checkpoint_every")
        for name in (*counts, "clip", "lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0", found=value)
        if self.batch_size > self.tokens:
            raise ConfigError(
                "A batch is larger than the whole run",
                expected=f"a batch size of at most {self.tokens} tokens",
                found=self.batch_size,
            )
        for name in ("warmup", "decay", "k_anneal"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(
                    f"{name} is a share of the run", expected="0 to 1", found=getattr(self, name)
                )
        if self.batch_size < 2:
            raise ConfigError("A batch of one token has no spread to explain", expected="at least 2")
        if self.view not in ("base", "tuned", "diff"):
            raise ConfigError(
                "Unknown view of one activation", expected="base, tuned or diff", found=self.view
            )
        if self.dtype not in ("auto", "float32", "bfloat16"):
            raise ConfigError("Training runs in float32 or bfloat16", found=self.dtype)
        self._check_structure()

    def _check_structure(self) -> None:
        """Refuse prefixes, partitions and penalties that do not go with the rule."""
        fixed = self.activation in FIXED
        if fixed and (self.k is None or not 0 < self.k <= self.n_latents):
            raise ConfigError(
                "k does not fit the number of latents", expected=f"1 to {self.n_latents}", found=self.k
            )
        if fixed and self.objective.sparsity is not None:
            raise ConfigError(
                f"{self.activation} has no sparsity penalty",
                expected="activation relu or jumprelu",
                found=self.objective.sparsity,
            )
        if self.activation == "topk" and self.k != round(self.k or 0):
            raise ConfigError("topk keeps a whole number of latents", found=self.k)
        if self.prefixes and not fixed:
            raise ConfigError("Prefixes need topk or batch_topk", found=self.activation)
        if self.prefixes and (
            list(self.prefixes) != sorted(set(self.prefixes))
            or self.prefixes[0] < 1
            or self.prefixes[-1] != self.n_latents
        ):
            raise ConfigError(
                "Prefixes rise to the number of latents",
                expected=f"rising numbers that end with {self.n_latents}",
                found=", ".join(map(str, self.prefixes)),
            )
        if self.partition.total > self.n_latents:
            raise ConfigError(
                "The partition holds more latents than the dictionary",
                expected=f"at most {self.n_latents}",
                found=self.partition.total,
            )

    @property
    def steps(self) -> int:
        """How many whole batches the run has."""
        return self.tokens // self.batch_size

    @property
    def checkpoint_steps(self) -> int:
        """Steps between two checkpoints."""
        return self.checkpoint_every or max(1, min(1000, self.steps // 10))

    @property
    def peak_lr(self) -> float:
        """The learning rate between warm-up and decay."""
        return self.lr if self.lr is not None else min(6e-3, 1.5e-3 / math.sqrt(self.n_latents / 2**14))

    @property
    def dead_after(self) -> int:
        """Tokens without activity after which a latent is dead."""
        if self.dead_after_tokens is not None:
            return self.dead_after_tokens
        return max(1, min(LONGEST_DEAD, self.tokens // 10))

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

    def sparsity_weight_at(self, step: int) -> float:
        """Weight of the sparsity penalty of a step, counted from 0."""
        rise = (step + 1) / max(1.0, self.objective.sparsity_warmup * self.steps)
        return self.objective.sparsity_weight * min(1.0, rise)
