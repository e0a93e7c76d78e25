"""The options of `palimpsest examples`: which latents, of which models, over which text, and how much is kept."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, RunOptions

LONGEST = 2048
"""Tokens on either side of an example at most."""


@dataclass(frozen=True)
class ExamplesConfig:
    """What every latent of a dictionary fires on, in the base and in the tuned model."""

    base: str
    """The base model: a folder or hub id."""

    tuned: str | None = None
    """Its fine-tune, a full checkpoint or a PEFT adapter; without it an SAE is read on one model alone."""

    _: KW_ONLY

    dictionary: str
    """An SAE, a crosscoder or a diff-SAE: a folder or hub id."""

    corpus: tuple[str, ...]
    """Text to read, each optionally named: `math=math.jsonl`; every corpus gets an equal share of the tokens."""

    run: Annotated[RunOptions, FLAT]
    """Where the results go."""

    site: str | None = None
    """Where activations are read, as in `resid_post.13`; the dictionary's own site by default."""

    tokens: Count = 1_000_000
    """Tokens to measure, rounded up to whole documents; fewer where the text ends."""

    template: bool = False
    """Measure chat-template and special tokens too, all but the BOS that begins a sequence."""

    tops: Count = 20
    """Strongest examples of each latent, one per document."""

    bins: int = 5
    """Quantile bins that a random sample of each latent's firings is split into; 0 for none."""

    per_bin: Count = 4
    """Examples in each bin."""

    before: int = 24
    """Tokens of the text that are kept before each example …"""

    after: int = 12
    """… and after it."""

    lens: Annotated[bool, Parameter(negative="--no-lens")] = True
    """Read each decoder row through the models' heads: which tokens does it promote and suppress?"""

    neighbours: int = 8
    """Latents that fire on the same tokens, named for each latent; 0 for none."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require text, and numbers that the tables can hold."""
        if not self.corpus:
            raise ConfigError("Examples need text", expected="--corpus FILE or --corpus NAME=FILE")
        if self.site is not None and not self.site.strip():
            raise ConfigError("--site is empty", expected="an address such as resid_post.13")
        limits = {
            "tops": (1, 1000),
            "bins": (0, 100),
            "per_bin": (1, 1000),
            "before": (0, LONGEST),
            "after": (0, LONGEST),
            "neighbours": (0, 100),
        }
        for name, (least, most) in limits.items():
            value = getattr(self, name)
            if not least <= value <= most:
                flag = name.replace("_", "-")
                raise ConfigError(f"--{flag} is out of range", expected=f"{least} to {most}", found=value)
