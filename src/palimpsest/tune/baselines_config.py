"""The options of a table of baselines. Imports no torch."""

import math
from dataclasses import dataclass, field, replace
from typing import Annotated

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT
from palimpsest.tune.choices import COMPONENTS, METHODS
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.sweep_config import version

USUAL = ("scale", "active-bias", "low-rank", "relu-bias", "vector", "lora", "diffmean", "best-latent")
"""Methods that are compared when none are named."""

CONTRASTED = ("diffmean", "best-latent")
"""Methods that need two kinds of text to tell apart."""


@Parameter(group="Baselines")
@dataclass(frozen=True, kw_only=True)
class BaselineOptions:
    """What is compared."""

    methods: tuple[str, ...] = ()
    """Any components, lora, diffmean (the difference of two means as a vector, its strength chosen on training data),
    best-latent (a constant on the latent that tells the data best) and latents (a constant on those of --latents); by
    default the usual ones."""

    method_lrs: tuple[str, ...] = ()
    """Learning rates of single methods, `lora=1e-4`; by default --lr, or what fits the component."""

    share: float = 0.95
    """How much of an adapter's effect the number of latents needed must keep."""

    def __post_init__(self) -> None:
        """Refuse methods that do not exist."""
        if wrong := [name for name in self.methods if name not in METHODS]:
            raise ConfigError("Unknown method", expected=" | ".join(METHODS), found=", ".join(wrong))
        if len(set(self.methods)) != len(self.methods):
            raise ConfigError("A method is named twice", found=" ".join(self.methods))
        if not 0 < self.share < 1:
            raise ConfigError("share is a part of the effect", expected="above 0, below 1", found=self.share)
        for name, lr in rates(self.method_lrs).items():
            if name not in METHODS or name == "diffmean" or not 0 < lr < math.inf:
                raise ConfigError(
                    "method_lrs names no trained method with a rate above 0", expected="lora=1e-4", found=name
                )


@dataclass(frozen=True, kw_only=True)
class BaselinesConfig(TuneConfig):
    """Several methods on the same data, with the same steps and batches, each in a folder of its own in `run.out`."""

    baselines: Annotated[BaselineOptions, FLAT] = field(default_factory=BaselineOptions)
    """What is compared."""

    def __post_init__(self) -> None:
        """Refuse a list of latents that no method takes, and the other way round."""
        super().__post_init__()
        named = "latents" in self.baselines.methods
        if named and not self.adapter.latents:
            raise ConfigError("The method latents needs --latents", expected="--latents 12 80, or a file")
        if not self.dictionary:
            raise ConfigError("Baselines are compared at a dictionary's site", fix="Pass --dictionary DICT")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods that are compared; those of `USUAL` that cannot be are left out."""
        if self.baselines.methods:
            return self.baselines.methods
        usual = tuple(name for name in USUAL if name not in CONTRASTED or no_contrast(self) is None)
        return (*usual, "latents") if self.adapter.latents else usual


def rates(given: tuple[str, ...]) -> dict[str, float]:
    """Learning rates by method.

    Raises:
        ConfigError: One is no number.
    """
    made = {}
    for one in given:
        name, _, value = one.partition("=")
        try:
            made[name] = float(value)
        except ValueError:
            raise ConfigError(f"'{one}' is no learning rate of a method", expected="lora=1e-4") from None
    return made


def no_contrast(config: TuneConfig) -> str | None:
    """Why the data holds nothing to be told apart, None where it does."""
    objective = config.objective
    if objective.objective == "grpo":
        return "prompts alone hold no wanted and unwanted text"
    if objective.objective == "sft" and not objective.general:
        return "there is no general text to tell the data from: pass --general"
    return None


def method_config(config: BaselinesConfig, method: str) -> TuneConfig:
    """The fine-tune of one method; of diffmean and best-latent all but what only the data says.

    Args:
        config: The common options; its `--latents` concern the method `latents` alone.
        method: One of `METHODS`.
    """
    component = {"diffmean": "vector", "best-latent": "bias", "latents": "bias"}.get(method, method)
    assert component in (*COMPONENTS, "lora")
    lr = rates(config.baselines.method_lrs).get(method, config.schedule.lr)
    made = version(config, method, component, lr=lr)
    if method == "latents":
        return made
    return replace(made, adapter=replace(made.adapter, latents=()))
