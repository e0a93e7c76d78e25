"""The options of dictionary training: where activations come from, and the recipe."""

from dataclasses import dataclass, field
from typing import Annotated

from palimpsest.dictionaries.config import TrainConfig
from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions


@dataclass(frozen=True, kw_only=True)
class TrainSaeConfig:
    """A sparse autoencoder of one model's activations at one site."""

    site: str
    """Where activations are read, as in `resid_post.13` or `resid_post.50%`."""

    run: Annotated[RunOptions, FLAT]
    """Where the dictionary goes."""

    model: str | None = None
    """The model: a folder or a hub id."""

    corpus: tuple[str, ...] = ()
    """Text files, folders or hub data sets; rows are taken from each in turn, again from the start at the end."""

    store: str | None = None
    """Read activations from a store that `palimpsest harvest` wrote, instead of a model and text."""

    block_length: Count = 256
    """Tokens of a packed block of text; at most the model's context."""

    recipe: Annotated[TrainConfig, FLAT] = field(default_factory=TrainConfig)
    """How the dictionary is trained."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the model is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require one source of activations, and blocks that hold more than a BOS."""
        if self.block_length < 2:
            raise ConfigError(
                "The blocks are too short", expected="at least 2 tokens", found=self.block_length
            )
        if (self.store is None) == (self.model is None or not self.corpus):
            raise ConfigError(
                "Training needs one source of activations",
                expected="--model and --corpus, or --store",
                found="neither" if self.store is None else "both",
            )
        k, latents = self.recipe.k, self.recipe.n_latents
        if self.recipe.activation != "relu" and k is not None and not 0 < k <= latents:
            raise ConfigError("k does not fit the number of latents", expected=f"1 to {latents}", found=k)
