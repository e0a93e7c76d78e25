"""The options of an explanation of a latent adapter, and of a comparison of two. Imports no torch."""

from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, Number, RunOptions


@Parameter(group="Text")
@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What is read."""

    corpus: tuple[str, ...] = ()
    """Text of the kind that the adapter was trained on, and that it has not seen; `NAME=FILE`, several are allowed."""

    general: tuple[str, ...] = ()
    """General text: do the top latents fire more on --corpus than on this?"""

    tokens: Count = 200_000
    """Tokens of each corpus that the rankings are made from."""

    def require(self) -> None:
        """Refuse to read nothing.

        Raises:
            ConfigError: There is no corpus.
        """
        if not self.corpus:
            raise ConfigError("There is nothing to explain the adapter on", fix="Pass --corpus FILE")


@Parameter(group="Causal check")
@dataclass(frozen=True, kw_only=True)
class CausalOptions:
    """How the latents are tested: a half of the documents ranks and chooses, the other half is reported."""

    pairs: tuple[str, ...] = ()
    """Preference pairs (`prompt`, `chosen`, `rejected`) that an adapter trained on pairs is judged by; by default the
    held-out data of its training, where they still are."""

    beta: Number | None = None
    """Strength of the reference in that loss; by default that of the training (0.1)."""

    keep: Number = 0.95
    """Share of the effect that the pruned adapter keeps."""

    eval_rows: Count = 128
    """Documents, or pairs, on which losses are measured, half of them for choosing."""

    points: Count = 8
    """Numbers of latents in a curve, from 1 to all that do something, evenly spaced on a logarithmic axis."""

    random_orders: Count = 3
    """Random orders of the latents that fire, which the ranking is read against."""

    resamples: Count = 1000
    """Bootstrap resamples of documents behind every interval."""

    permutations: Count = 200
    """Shuffles and random sets behind every control."""

    confidence: Number = 0.95
    """Level of the intervals."""

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        if not 0 < self.keep <= 1:
            raise ConfigError(
                "--keep is a share of the effect", expected="above 0, at most 1", found=self.keep
            )
        if not 0 < self.confidence < 1:
            raise ConfigError("The confidence is a probability", expected="0 to 1", found=self.confidence)
        if self.eval_rows < 8:
            raise ConfigError(
                "Two halves of so few documents have no intervals",
                expected="at least 8",
                found=self.eval_rows,
            )
        if self.points < 2:
            raise ConfigError("A curve has several points", expected="at least 2", found=self.points)


@Parameter(group="Controls")
@dataclass(frozen=True, kw_only=True)
class ControlOptions:
    """Other adapters through the same dictionaries, which this one is read against."""

    twin: str | None = None
    """Adapter trained on the same data with another seed: do the two move the same latents?"""

    other: str | None = None
    """Adapter trained on other data: what the twin's agreement is read against."""

    shuffled: str | None = None
    """Adapter trained on shuffled data: how much of an effect is none of the data's doing?"""


@Parameter(group="Labels")
@dataclass(frozen=True, kw_only=True)
class LabelOptions:
    """Where descriptions of latents come from."""

    labels: Path | None = None
    """File of labels, read and added to: {Neuronpedia id or site: {latent: label}}; by default one in ~/.cache."""

    offline: bool = False
    """Ask no server for labels; HF_HUB_OFFLINE does the same."""


@dataclass(frozen=True)
class ExplainConfig:
    """An explanation of one latent adapter."""

    adapter: str
    """Folder of the adapter, as `palimpsest tune` or peft writes it."""

    _: KW_ONLY

    run: Annotated[RunOptions, FLAT]
    """Where the explanation goes."""

    model: str | None = None
    """The base model: a folder or a hub id; by default the one that the adapter names."""

    read: Annotated[ReadOptions, FLAT] = field(default_factory=ReadOptions)
    """What is read."""

    causal: Annotated[CausalOptions, FLAT] = field(default_factory=CausalOptions)
    """How the latents are tested."""

    controls: Annotated[ControlOptions, FLAT] = field(default_factory=ControlOptions)
    """Other adapters that this one is read against."""

    labels: Annotated[LabelOptions, FLAT] = field(default_factory=LabelOptions)
    """Where descriptions of latents come from."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the model is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require text."""
        self.read.require()


@dataclass(frozen=True)
class ExplainCompareConfig:
    """A comparison of two latent adapters through the same dictionaries."""

    a: str
    """Folder of an adapter."""

    b: str
    """Folder of another one."""

    _: KW_ONLY

    run: Annotated[RunOptions, FLAT]
    """Where the comparison goes."""

    model: str | None = None
    """The base model: a folder or a hub id; by default the one that the first adapter names."""

    read: Annotated[ReadOptions, FLAT] = field(default_factory=ReadOptions)
    """What is read."""

    strong: Number = 0.5
    """A latent moved if it is among the fewest that hold this share of an adapter's effect …"""

    weak: Number = 0.9
    """… and did not if it is outside the fewest that hold this share of the other's."""

    permutations: Count = 200
    """Shuffles behind the agreement that chance gives."""

    labels: Annotated[LabelOptions, FLAT] = field(default_factory=LabelOptions)
    """Where descriptions of latents come from."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How the model is loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require text, two adapters and an order of the lines."""
        self.read.require()
        if Path(self.a).resolve() == Path(self.b).resolve():
            raise ConfigError("An adapter is compared with itself", found=self.a)
        if not 0 < self.strong <= self.weak < 1:
            raise ConfigError(
                "No latent could pass", expected="0 < --strong ≤ --weak < 1", found=(self.strong, self.weak)
            )
