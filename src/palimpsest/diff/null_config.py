"""The options of a random-delta null: a model that moved as far from the base as a fine-tune, nowhere in particular."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions


@dataclass(frozen=True)
class NullConfig:
    """A checkpoint of the base with the fine-tune's weight change randomly rotated and scaled to the same drift."""

    base: str
    """The base model: a folder or hub id."""

    tuned: str
    """Its fine-tune: a folder or hub id of a full checkpoint or of a PEFT adapter."""

    _: KW_ONLY

    corpus: tuple[str, ...]
    """Text that drift is measured on, each optionally named: `math=math.jsonl`; equal shares of the tokens."""

    site: str
    """Where drift is matched, as in `resid_post.13`: the site of the dictionary that will read the null."""

    run: Annotated[RunOptions, FLAT]
    """Where the checkpoint goes; its seed draws the rotations."""

    tokens: Count = 20_000
    """Tokens that drift is measured on, rounded up to whole documents; the base's activations on them are held."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded; the checkpoint has their dtype."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require text, and both models at once."""
        if not self.corpus:
            raise ConfigError("A null needs text", expected="--corpus FILE or --corpus NAME=FILE")
        if self.models.one_at_a_time:
            raise ConfigError("A null is made from both models at once", fix="Leave --one-at-a-time out")
