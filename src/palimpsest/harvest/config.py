"""The options of a harvest: which activations are kept."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from palimpsest.options import FLAT, CorpusOptions, ModelOptions, RunOptions


@dataclass(frozen=True)
class HarvestConfig:
    """Which activations of a model, or of a pair side by side, are written to a store."""

    base: str
    """The model: a folder or a hub id."""

    _: KW_ONLY

    corpus: tuple[str, ...]
    """Text files, folders or hub data sets; rows are taken from each in turn."""

    site: tuple[str, ...]
    """Where activations are read, as in `resid_post.13`; several are read in one pass."""

    run: Annotated[RunOptions, FLAT]
    """Where the store goes."""

    tuned: str | None = None
    """A fine-tune of the model, harvested side by side with it."""

    store_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Type of the stored activations."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""
