"""The options of an evaluation: which dictionary, on which model or pair, over which text."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Protocol, runtime_checkable

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions


@dataclass(frozen=True)
class EvaluateConfig:
    """What a dictionary leaves of a model's activations and of its predictions."""

    dictionary: str
    """The dictionary: a folder or hub id."""

    _: KW_ONLY

    corpus: tuple[str, ...]
    """Text files, folders or hub data sets; rows are taken from each in turn."""

    run: Annotated[RunOptions, FLAT]
    """Where the results go."""

    model: str | None = None
    """The one model that a dictionary of one model is measured on: a folder or a hub id."""

    base: str | None = None
    """The base model of a pair; needed with --tuned for dictionaries of a difference or of both models."""

    tuned: str | None = None
    """Its fine-tune: a folder or hub id of a full checkpoint or of a PEFT adapter."""

    site: str | None = None
    """Where activations are read, as in `resid_post.13`; the dictionary's own site by default."""

    tokens: Count = 100_000
    """Tokens to measure, rounded up to whole documents; fewer where the text ends."""

    loss: Annotated[bool, Parameter(negative="--no-loss")] = True
    """Splice the reconstruction in and measure CE and KL; without it the forward passes stop at the site."""

    confidence: float = 0.95
    """Coverage of the intervals."""

    resamples: Count = 1000
    """Bootstrap resamples of documents."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require one model or one pair, and sound intervals."""
        check_source("An evaluation", self)
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                "confidence is no coverage", expected="0.5 up to below 1", found=self.confidence
            )
        if self.resamples < 100:
            raise ConfigError(
                "Too few resamples for an interval", expected="at least 100", found=self.resamples
            )


@runtime_checkable
class Reads(Protocol):
    """Options that name one model or one pair, and text."""

    @property
    def corpus(self) -> tuple[str, ...]: ...  # noqa: D102
    @property
    def model(self) -> str | None: ...  # noqa: D102
    @property
    def base(self) -> str | None: ...  # noqa: D102
    @property
    def tuned(self) -> str | None: ...  # noqa: D102
    @property
    def models(self) -> ModelOptions: ...  # noqa: D102
    @property
    def corpora(self) -> CorpusOptions: ...  # noqa: D102


def check_source(what: str, config: Reads) -> None:
    """Require one model or one pair, and text.

    Raises:
        ConfigError: Says what is missing.
    """
    given = [name for name in ("model", "base", "tuned") if getattr(config, name) is not None]
    if given not in (["model"], ["base", "tuned"]):
        raise ConfigError(
            f"{what} needs one model or one pair",
            expected="--model MODEL, or --base BASE with --tuned TUNED",
            found=" and ".join(f"--{name}" for name in given) or "none of them",
        )
    if not config.corpus:
        raise ConfigError(f"{what} needs text", expected="--corpus FILE")
