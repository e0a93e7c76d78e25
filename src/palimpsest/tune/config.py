"""The options of a fine-tune through latents: adapter, objective, schedule and log. Imports no torch."""

import math
import re
from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, Number, RunOptions
from palimpsest.tune.choices import COMPONENTS, NONLINEARITIES, OBJECTIVES, PREFERENCES, SCOPES, TRANSFORMS

Component = Literal[
    "scale", "active-bias", "bias", "relu-bias", "lerp", "gate", "low-rank", "mlp", "vector", "lora"
]


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"Unknown {name}", expected=" | ".join(known), found=repr(value))


@Parameter(group="Adapter")
@dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """What is trained."""

    component: Component = "scale"
    """What is done to the latents; lora trains an ordinary LoRA instead, for comparison."""

    transform: Literal["identity", "exp", "non-negative", "one-sided"] = "identity"
    """How scale turns its numbers into factors: 1 + s, e^s, never below 0, or never below 1."""

    rank: Count | None = None
    """Rank of low-rank (8), of lora (8), hidden units of mlp (64); of gate a bottleneck, none by default."""

    activation: Literal["gelu", "relu", "silu"] = "gelu"
    """Non-linearity of mlp."""

    scope: Literal["all", "prompt", "answer", "first", "last"] = "all"
    """Tokens that are edited: all, those of the prompt or of the answer, or the first or last few of the prompt."""

    scope_tokens: Count = 1
    """How many tokens first and last mean."""

    skip_special: Literal["bos", "all", "none"] = "bos"
    """Special tokens that are left alone: the BOS and padding, all of the tokenizer's, or none."""

    latents: tuple[str, ...] = ()
    """Train only these: numbers `12 80 8802`, a file with one per line, or `site=file` where there are several
    sites."""

    forbid: tuple[str, ...] = ()
    """Never move these, written in the same way."""

    dictionary_dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the dictionary's weights; as stored by default."""

    allow_quadratic: bool = False
    """Accept a component with as many parameters as latents squared."""

    def __post_init__(self) -> None:
        """Refuse unknown names."""
        _one_of("component", self.component, (*COMPONENTS, "lora"))
        _one_of("transform", self.transform, TRANSFORMS)
        _one_of("activation", self.activation, NONLINEARITIES)
        _one_of("scope", self.scope, SCOPES)
        if self.transform != "identity" and self.component != "scale":
            raise ConfigError(f"{self.component} has no transform", expected="--component scale")
        if self.rank is not None and self.component not in ("low-rank", "mlp", "gate", "lora"):
            raise ConfigError(f"{self.component} has no rank", expected="low-rank, mlp, gate or lora")


@Parameter(group="Objective")
@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions:
    """What is minimised, and on what."""

    objective: Literal["sft", "dpo", "kto", "orpo", "simpo", "grpo", "unlearn"] = "sft"
    """sft: predict the text. dpo, kto, orpo, simpo: prefer answers. grpo: earn a reward. unlearn: forget --data and
    keep --retain."""

    data: tuple[str, ...] = ()
    """Training data: rows with `text`, `messages` or `prompt` and `completion` (sft, unlearn); `prompt`, `chosen` and
    `rejected` (dpo, orpo, simpo); `prompt`, `completion` and `label` (kto); `prompt` (grpo)."""

    eval_data: tuple[str, ...] = ()
    """Held-out data of the same kind; by default a part of --data is held out."""

    hold_out: Number = 0.1
    """Share of the rows of --data, chosen by a checksum of their prompts, that are held out where there is no
    --eval-data."""

    general: tuple[str, ...] = ()
    """General text: the KL divergence from the base is measured on it."""

    retain: tuple[str, ...] = ()
    """Text whose predictions unlearn keeps."""

    retain_weight: Number = 1.0
    """Weight of that text's loss."""

    answers_only: bool = False
    """sft: learn the assistant's and the completion's tokens only."""

    beta: Number | None = None
    """Strength of the reference (dpo, kto, unlearn: 0.1), of orpo's odds ratio (0.1), of simpo's reward (10)."""

    reward: str | None = None
    """grpo: the reward, `module:function`, called with `prompts` and `completions`, returning one number each. The
    module is imported from Python's path."""

    completion_length: Count = 64
    """grpo: tokens of a sampled completion."""

    generations: Count = 4
    """grpo: completions per prompt."""

    eval_rows: Count = 64
    """Held-out rows, and rows of general text, that are measured, evenly spaced over all of them."""

    def __post_init__(self) -> None:
        """Refuse objectives that lack what they need."""
        _one_of("objective", self.objective, OBJECTIVES)
        if not 0 < self.hold_out <= 0.5:
            raise ConfigError(
                "hold_out is a share of the rows", expected="above 0, at most 0.5", found=self.hold_out
            )
        if not self.data:
            raise ConfigError("There is nothing to train on", fix="Pass --data FILE")
        if self.objective == "unlearn" and not self.retain:
            raise ConfigError(
                "unlearn needs text that must stay",
                fix="Pass --retain FILE; forgetting alone ruins the model",
            )
        if self.retain and self.objective != "unlearn":
            raise ConfigError("--retain belongs to --objective unlearn", found=self.objective)
        if (self.objective == "grpo") != (self.reward is not None):
            raise ConfigError(
                "grpo and --reward go together", expected="--objective grpo --reward module:function"
            )
        if self.reward is not None and not re.fullmatch(r"[\w.]+:\w+", self.reward):
            raise ConfigError("--reward names no function", expected="module:function", found=self.reward)
        for name in ("beta", "retain_weight"):
            if (value := getattr(self, name)) is not None and not 0 <= value < math.inf:
                raise ConfigError(f"{name} cannot be negative", found=value)
        if self.beta == 0 and self.objective in ("dpo", "kto", "simpo", "unlearn"):
            raise ConfigError(f"beta must be above 0 with {self.objective}", found=self.beta)
        if self.answers_only and self.objective != "sft":
            raise ConfigError("--answers-only belongs to --objective sft", found=self.objective)

    @property
    def pairs(self) -> bool:
        """Whether a row holds a chosen and a rejected answer."""
        return self.objective in PREFERENCES


@Parameter(group="Schedule")
@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """How long and how fast."""

    steps: Count = 200
    """Optimiser steps."""

    lr: Number | None = None
    """Learning rate; by default what fits the component (0.03 for one number per latent, 1e-3 for matrices)."""

    batch_size: Count = 8
    """Rows of one forward and backward pass."""

    accumulate: Count = 1
    """Passes of one optimiser step."""

    warmup: Number = 0.05
    """Share of the steps over which the learning rate rises."""

    weight_decay: Number = 0.0
    """Pulls every value to 0, which is the base model."""

    clip: Number = 1.0
    """Largest norm of the gradient."""

    l1: Number = 0.0
    """Weight of the sum of |value| times the decoder norm, over all latents; of rows of matrices their length."""

    group: Number = 0.0
    """Weight of the length of each site's values, which chooses among sites."""

    top_n: Count | None = None
    """Keep only the n strongest latents of each site: all but those are set to 0 after each step, more and more of them
    over the first half of the run."""

    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: automatic mixed precision; the edit stays float32."""

    gradient_checkpointing: bool = False
    """Compute the layers' activations again in the backward pass."""

    eval_every: Count | None = None
    """Steps between two measurements on held-out rows while training; none by default."""

    save_every: Count | None = None
    """Steps between two checkpoints; a quarter of the run by default."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        for name in ("steps", "batch_size", "accumulate", "top_n", "eval_every", "save_every", "clip", "lr"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} must be above 0", found=value)
        for name in ("l1", "group", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name} cannot be negative", found=getattr(self, name))
        if not 0 <= self.warmup <= 1:
            raise ConfigError("warmup is a share of the run", expected="0 to 1", found=self.warmup)


@Parameter(group="Log")
@dataclass(frozen=True, kw_only=True)
class LogOptions:
    """What is written while training."""

    log_every: Count = 10
    """Steps between two entries of the log."""

    log_latents: str = "100"
    """How many latents an entry holds, the strongest of that moment, or `all`; the last entry always holds all that
    moved."""

    track: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ()
    """Also send the loss, and the strongest latents' values, to these trackers."""

    track_latents: int = 8
    """How many latents become a series there."""

    lm_eval: tuple[str, ...] = ()
    """Run these tasks of lm-evaluation-harness on the base and on the tuned model (the `lm-eval` extra)."""

    lm_eval_limit: Count | None = None
    """Examples of each task; all by default."""

    lm_eval_path: str | None = None
    """Folder with further task files."""

    def __post_init__(self) -> None:
        """Refuse counts that are none."""
        if self.log_every < 1 or self.track_latents < 0:
            raise ConfigError(
                "log_every and track_latents are counts", found=(self.log_every, self.track_latents)
            )
        if self.log_latents != "all" and not self.log_latents.isdigit():
            raise ConfigError("log_latents is a number or all", found=self.log_latents)


@dataclass(frozen=True)
class TuneConfig:
    """A fine-tune of one model through the latents of frozen dictionaries."""

    model: str
    """The base model: a folder or a hub id."""

    _: KW_ONLY

    run: Annotated[RunOptions, FLAT]
    """Where the adapter goes."""

    dictionary: tuple[str, ...] = ()
    """Dictionaries whose latents are trained, one for each site."""

    site: tuple[str, ...] = ()
    """Where each reads and writes; by default where it was trained."""

    adapter: Annotated[AdapterOptions, FLAT] = field(default_factory=AdapterOptions)
    """What is trained."""

    objective: Annotated[ObjectiveOptions, FLAT]
    """What is minimised, and on what."""

    schedule: Annotated[ScheduleOptions, FLAT] = field(default_factory=ScheduleOptions)
    """How long and how fast."""

    log: Annotated[LogOptions, FLAT] = field(default_factory=LogOptions)
    """What is written while training."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the model is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require a dictionary, and as many sites as dictionaries where sites are named."""
        if not self.dictionary and self.adapter.component != "lora":
            raise ConfigError("A latent adapter needs a dictionary", fix="Pass --dictionary DICT")
        if self.site and len(self.site) != len(self.dictionary):
            raise ConfigError(
                "There are as many sites as dictionaries",
                expected=f"{len(self.dictionary)} sites",
                found=", ".join(self.site),
            )

    @property
    def lr(self) -> float:
        """The learning rate that is used."""
        if self.schedule.lr is not None:
            return float(self.schedule.lr)
        known = COMPONENTS.get(self.adapter.component)
        return known.lr if known else 1e-3
