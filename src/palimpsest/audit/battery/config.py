"""The options of `palimpsest battery make`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import (
    FLAT,
    CorpusOptions,
    Count,
    ModelOptions,
    RunOptions,
    check_names,
    parse_assignment,
)


@dataclass(frozen=True, kw_only=True)
class BatteryConfig:
    """Which base is read, through which dictionary, on which text."""

    base: str
    """The base model: a folder or a hub id."""

    dictionary: tuple[str, ...]
    """Dictionaries of the base model; the first one's site is primary, further ones stand for further sites."""

    run: Annotated[RunOptions, FLAT]
    """Where the battery goes."""

    general: str | None = None
    """Text of no particular domain."""

    task: tuple[str, ...] = ()
    """Task corpora as NAME=FILE."""

    preset: str | None = None
    """Take the corpora from a preset that ships with the package (they come from the hub)."""

    tokens: Count = 20_000
    """Measured tokens of each corpus at most."""

    set_aside: float = 0.3
    """Share of each corpus' documents that is never audited: null fine-tunes are trained on it."""

    aside_tokens: Count = 200_000
    """Tokens of the set-aside share that are kept at most."""

    loss: Annotated[bool, Parameter(negative="--no-loss")] = True
    """Cache the base's losses."""

    keep_activations: bool = False
    """Cache the base's activations too (bfloat16), for relative drift and the transfer check R²_Δ."""

    controls: bool = False
    """Also read random directions, principal components and neurons of the first site."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the base is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Refuse options that contradict each other."""
        if not 0 <= self.set_aside < 1:
            raise ConfigError("set_aside is no share", expected="0 up to below 1", found=self.set_aside)
        if not self.dictionary:
            raise ConfigError("A battery needs a dictionary", fix="Pass --dictionary")
        if (self.preset is None) == (self.general is None):
            raise ConfigError(
                "A battery's corpora come from files or from a preset",
                expected="--general and --task, or --preset",
                found="both" if self.preset else "neither",
            )
        if self.preset is None and not self.task:
            raise ConfigError("A battery needs at least one task corpus", fix="Pass --task NAME=FILE")
        check_names([name for name, _ in self.tasks])

    @property
    def tasks(self) -> list[tuple[str, str]]:
        """Task corpora as (name, source)."""
        return [parse_assignment(task) for task in self.task]

    @property
    def out(self) -> Path:
        """Folder of the battery."""
        return Path(self.run.out)
