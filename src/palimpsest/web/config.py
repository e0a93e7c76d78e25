"""What the app shows and where it listens."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from palimpsest.errors import ConfigError
from palimpsest.options import ModelOptions


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Options of the app.

    Attributes:
        root: Folder whose runs are shown; only what lies in it is read.
        model: Whether models may be loaded.
        base: Where the base is, if not where an examples run recorded it.
        tuned: Where the tuned model is.
        dictionary: A dictionary to read own text with, beside those of the examples runs.
        models: How models are loaded.
        port: 0 takes a free one.
    """

    root: Path
    model: bool = False
    base: str | None = None
    tuned: str | None = None
    dictionary: str | None = None
    models: ModelOptions = field(default_factory=ModelOptions)
    port: int = 8765

    def __post_init__(self) -> None:
        """Refuse what cannot be served.

        Raises:
            ConfigError: There is no such folder, the port is none, or a model is named that would not be loaded.
        """
        if not self.root.is_dir():
            raise ConfigError(f"There is no folder {self.root}", expected="a folder with runs in it")
        if not 0 <= self.port <= 65535:
            raise ConfigError("This is no port", expected="a number from 0 to 65535", found=self.port)
        if not self.model and (self.tuned or self.dictionary):
            raise ConfigError("--tuned and --dictionary are read with --model only")
        if self.dictionary and not self.base:
            raise ConfigError("A dictionary of its own needs a base", fix="Name it: --model BASE")
        if self.models.one_at_a_time:
            raise ConfigError("The app holds both models in memory", fix="Leave --one-at-a-time out")
