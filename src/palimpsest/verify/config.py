"""The options of a verification: which dictionary, on which model or pair, over which text."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from palimpsest.errors import ConfigError
from palimpsest.evaluate.config import check_source
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions


@dataclass(frozen=True)
class VerifyConfig:
    """Whether a dictionary fits the model, the site and the conventions that it claims."""

    dictionary: str
    """The dictionary: a folder or hub id."""

    _: KW_ONLY

    corpus: tuple[str, ...]
    """Text files, folders or hub data sets; rows are taken from each in turn."""

    model: str | None = None
    """The model of a dictionary that reads one: a folder or a hub id."""

    base: str | None = None
    """The base model of a pair; needed with --tuned for dictionaries of a difference or of both models."""

    tuned: str | None = None
    """Its fine-tune: a folder or hub id of a full checkpoint or of a PEFT adapter."""

    site: str | None = None
    """Where activations are read, as in `resid_post.13`; the dictionary's own site by default."""

    tokens: Count = 4096
    """Tokens to measure."""

    search: bool = True
    """Look for the cause of a bad fit."""

    seed: int = 0
    """Of the bootstrap."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require one model or one pair, text, and tokens."""
        check_source("A verification", self)
        if self.tokens < 1:
            raise ConfigError("tokens is too small", expected="at least 1", found=self.tokens)
