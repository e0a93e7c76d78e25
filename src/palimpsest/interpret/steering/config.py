"""The options of `palimpsest steer`: which latents of which model, and what it is asked to write. Imports no torch."""

import math
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.interpret.steering.changes import read_changes
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, Number, RunOptions


@Parameter(group="Writing")
@dataclass(frozen=True, kw_only=True)
class WritingOptions:
    """How the models write."""

    max_new_tokens: Count = 60
    """Tokens of a continuation, at most."""

    temperature: Number = 0.0
    """0 takes the likeliest token each time, above it tokens are drawn by --seed."""

    chat: bool = False
    """Each prompt is a user's message, rendered with the model's chat template."""

    tokens: Literal["all", "generated", "prompt"] = "all"
    """Which tokens are edited; BOS, padding and other special tokens never are."""

    def __post_init__(self) -> None:
        """Refuse a temperature that is none."""
        if self.temperature < 0:
            raise ConfigError("The temperature is negative", expected="0 or more", found=self.temperature)


@Parameter(group="Strengths")
@dataclass(frozen=True, kw_only=True)
class SweepOptions:
    """How strong the changes can be made before the model breaks."""

    sweep: tuple[Number, ...] = ()
    """Strengths, as in `--sweep 0 1 2 4 8`: every change is multiplied, 1 being the change as it is written."""

    corpus: tuple[str, ...] = ()
    """Held-out text on which each strength's loss is measured: files, folders or hub data sets."""

    sweep_tokens: Count = 10_000
    """Tokens of that text, rounded up to whole documents."""

    max_perplexity_ratio: Number = 1.5
    """Strengths are marked from the first on whose perplexity, over that of the unsteered model, may pass this."""

    controls: int = 3
    """Random latents that get the same changes: they fire as often, as strongly, and are written at the same length."""

    watch: tuple[str, ...] = ()
    """Text whose log-probability after each prompt is compared, as in `--watch ' seven'`."""

    confidence: float = 0.95
    """Coverage of the intervals."""

    resamples: Count = 1000
    """Bootstrap resamples of documents."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if not all(math.isfinite(one) and one >= 0 for one in self.sweep):
            raise ConfigError(
                "A strength is 0 or more",
                expected="finite numbers; the direction is the sign of the change itself, as in 5:add=-3",
                found=", ".join(map(str, self.sweep)),
            )
        if len(set(self.sweep)) != len(self.sweep):
            raise ConfigError("A strength is given twice", found=", ".join(map(str, self.sweep)))
        if bool(self.sweep) != bool(self.corpus):
            given, missing = ("--sweep", "--corpus") if self.sweep else ("--corpus", "--sweep")
            raise ConfigError(f"{given} does nothing without {missing}", fix="Pass both, or neither")
        if self.max_perplexity_ratio <= 1:
            raise ConfigError(
                "No strength could pass", expected="a ratio above 1", found=self.max_perplexity_ratio
            )
        if self.controls < 0:
            raise ConfigError("controls counts latents", expected="0 or more", found=self.controls)
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                "confidence is no coverage", expected="0.5 up to below 1", found=self.confidence
            )
        if self.resamples < 100:
            raise ConfigError(
                "Too few resamples for an interval", expected="at least 100", found=self.resamples
            )


@dataclass(frozen=True)
class SteerConfig:
    """What a model writes when some of its latents are turned up, down, or off."""

    base: str
    """The base model: a folder or hub id."""

    tuned: str | None = None
    """Its fine-tune, a full checkpoint or a PEFT adapter; without it the base alone is steered."""

    _: KW_ONLY

    dictionary: str
    """An SAE, a crosscoder or a diff-SAE: a folder or hub id."""

    latent: tuple[str, ...]
    """What is changed, as in `--latent 123:scale=4 17:ablate 5:add=3 9:clamp=10`; values are activations."""

    run: Annotated[RunOptions, FLAT]
    """Where the results go."""

    prompt: tuple[str, ...] = ()
    """Texts that the models continue."""

    prompts: Path | None = None
    """A file of further prompts: one per line, or JSONL rows with a `prompt`."""

    side: Literal["base", "tuned"] | None = None
    """Which model is steered; the tuned one where there is one."""

    site: str | None = None
    """Where it is steered, as in `resid_post.13`; the dictionary's own site by default."""

    writing: Annotated[WritingOptions, FLAT] = field(default_factory=WritingOptions)
    """How the models write."""

    strengths: Annotated[SweepOptions, FLAT] = field(default_factory=SweepOptions)
    """How strong the changes can be made."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require a change and something to see it on, before any model is loaded."""
        if not self.latent:
            raise ConfigError("Nothing is changed", expected="--latent 123:scale=4")
        read_changes(self.latent)
        prompts = bool(self.prompt) or self.prompts is not None
        if not prompts and not self.strengths.sweep:
            raise ConfigError(
                "There is nothing to steer on",
                expected="--prompt TEXT, --prompts FILE, or --sweep and --corpus",
            )
        if self.strengths.watch and not prompts:
            raise ConfigError("--watch compares what follows a prompt", expected="--prompt or --prompts too")
        if self.side == "tuned" and self.tuned is None:
            raise ConfigError(
                "There is no tuned model to steer", expected="BASE TUNED", found=f"one model, {self.base}"
            )
        if self.site is not None and not self.site.strip():
            raise ConfigError("--site is empty", expected="an address such as resid_post.13")
