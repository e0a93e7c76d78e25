"""The options of `palimpsest battery calibrate`."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, Count, ModelOptions, Number, parse_assignment


@dataclass(frozen=True)
class CalibrateConfig:
    """Which nulls are trained for a battery."""

    battery: str
    """The battery's folder."""

    _: KW_ONLY

    nulls: Count = 24
    """How many nulls, shared evenly among the families."""

    null_corpus: tuple[str, ...] = ()
    """Text to train nulls on as NAME=FILE instead of the set-aside shares; a name outside the battery is a family that
    calibrates every corpus."""

    methods: tuple[Literal["lora", "full"], ...] = ("lora", "full")
    """Kinds of fine-tune."""

    full_lr: tuple[Number, ...] = (0.0025, 0.005, 0.01, 0.02)
    """Learning rates of full nulls, as a share of the typical size of the model's weights."""

    lora_lr: tuple[Number, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Learning rates of LoRA nulls."""

    steps: tuple[Count, ...] = (10, 20, 40)
    """Lengths in optimiser steps."""

    batch_size: Count = 8
    """Blocks in a step."""

    block_length: Count = 128
    """Tokens of a block; at most the model's context."""

    k_max: Count = 32
    """Longest lists that nulls are measured with."""

    kl: bool = False
    """Also measure KL(null ‖ base), at the price of a pass of the base per null."""

    workers: Annotated[int | None, Parameter()] = None
    """Nulls that are trained at once; by default one per core on a CPU for small models, else one."""

    seed: int = 0
    """Seed of every null."""

    overwrite: bool = False
    """Throw earlier nulls away instead of continuing with them."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the base is loaded."""

    def __post_init__(self) -> None:
        """Refuse options that make no sense."""
        if self.seed < 0:
            raise ConfigError("The seed is negative", expected="0 or more", found=self.seed)
        names = [name for name, _ in self.texts]
        if len(set(names)) != len(names):
            raise ConfigError("Null corpora need different names", found=", ".join(names))
        if not self.methods:
            raise ConfigError("Nulls need a method", expected="lora, full or both", found="none")

    @property
    def texts(self) -> list[tuple[str, str]]:
        """Null corpora as (family, source)."""
        return [parse_assignment(text) for text in self.null_corpus]

    @property
    def path(self) -> Path:
        """Folder of the battery."""
        return Path(self.battery)
