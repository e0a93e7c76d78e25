"""The options of a diff: which pair, read through which dictionary, over which text."""

from dataclasses import KW_ONLY, dataclass, field
from typing import Annotated, Literal

from cyclopts import Parameter

from palimpsest.errors import ConfigError
from palimpsest.options import FLAT, CorpusOptions, Count, ModelOptions, Number, RunOptions


@Parameter(group="Classes")
@dataclass(frozen=True, kw_only=True)
class ClassOptions:
    """Where the lines between classes of latents are drawn."""

    tuned_only: Number = 0.9
    """Δnorm above which a latent is written by the tuned model only."""
    base_only: Number = 0.1
    """Δnorm below which a latent is written by the base only."""
    shared_from: Number = 0.4
    """Δnorm from which a latent is shared …"""
    shared_to: Number = 0.6
    """… and up to which."""
    nu_error: Number = 0.2
    """A tuned-specific latent has a smaller ν of the error than this …"""
    nu_reconstruction: Number = 0.5
    """… and a smaller ν of the reconstruction than this (crosscoders)."""
    nu_activation: Number = 0.3
    """It has a smaller ν of the activations than this (diff-SAEs and SAEs)."""
    nu_floor: Number = -0.1
    """A ν below this says nothing: the latent stays undetermined."""

    def __post_init__(self) -> None:
        """Require an order of the lines."""
        limits = (self.nu_error, self.nu_reconstruction, self.nu_activation)
        if not all(self.nu_floor < limit for limit in limits) or self.nu_activation <= 0:
            raise ConfigError(
                "No latent could pass",
                expected="every nu limit above nu-floor",
                found=(*limits, self.nu_floor),
            )
        lines = (0, self.base_only, self.shared_from, self.shared_to, self.tuned_only, 1)
        if list(lines) != sorted(lines):
            raise ConfigError(
                "The classes overlap",
                expected="0 ≤ base-only ≤ shared-from ≤ shared-to ≤ tuned-only ≤ 1",
                found=", ".join(map(str, lines[1:-1])),
            )


@Parameter(group="Patching")
@dataclass(frozen=True, kw_only=True)
class PatchOptions:
    """Which parts of the difference are put into the base, and removed from the tuned model."""

    patch: Annotated[bool, Parameter(negative="--no-patch")] = True
    """Run the tuned model's upper layers on patched activations: how much of the KL does each set recover?"""
    patch_tokens: Count = 10_000
    """Tokens whose predictions are measured, in one half of the documents."""
    positions: tuple[Literal["all", "first"], ...] = ()
    """Which predictions: all measured ones, the first answer tokens; by default both, where the text has answers."""
    first: Count = 9
    """How many tokens of each answer `first` counts."""
    top_share: Number = 0.04
    """Share of the alive latents whose better and worse half are compared."""
    random_sets: Count = 3
    """Random sets of latents, and sets of random directions, for each best half."""
    generate: int = 0
    """Prompts that base, tuned and patched model continue, as samples to read."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 < self.top_share <= 1:
            raise ConfigError(
                "top_share is a share of the latents", expected="above 0, at most 1", found=self.top_share
            )
        if self.generate < 0:
            raise ConfigError("generate counts prompts", expected="0 or more", found=self.generate)


@Parameter(group="Attribution")
@dataclass(frozen=True, kw_only=True)
class AttributionOptions:
    """Which latents explain the KL, and a behaviour that is named."""

    attribute: Annotated[bool, Parameter(negative="--no-attribute")] = True
    """Attribute the KL to latents by gradients that are integrated from base to tuned."""
    attribution_tokens: Count = 5_000
    """Tokens whose KL is attributed, in the other half of the documents."""
    steps: Count = 8
    """Points between base and tuned at which gradients are taken."""
    differing: Number = 0.05
    """Share of those tokens, the ones of largest KL, that behaviours are read from."""
    behaviour: tuple[str, ...] = ()
    """JSONL files of `prompt`, `wanted` and `unwanted` answers: attribute the difference of their log-probabilities."""

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 < self.differing <= 1:
            raise ConfigError(
                "differing is a share of the tokens", expected="above 0, at most 1", found=self.differing
            )


@dataclass(frozen=True)
class DiffConfig:
    """Which latents a fine-tune made, and whether they cause what changed."""

    base: str
    """The base model: a folder or hub id."""

    tuned: str
    """Its fine-tune: a folder or hub id of a full checkpoint or of a PEFT adapter."""

    _: KW_ONLY

    dictionary: str
    """A crosscoder or diff-SAE of this pair, or an SAE of one of its models."""

    corpus: tuple[str, ...]
    """Text to read, each optionally named: `math=math.jsonl`; every corpus gets an equal share of the tokens."""

    run: Annotated[RunOptions, FLAT]
    """Where the results go."""

    site: str | None = None
    """Where activations are read, as in `resid_post.13`; the dictionary's own site by default."""

    tokens: Count = 200_000
    """Tokens that statistics and Latent Scaling are taken over, rounded up to whole documents."""

    template: bool = False
    """Measure chat-template and special tokens too, all but the BOS that begins a sequence."""

    other_pair: bool = False
    """Read a dictionary that names other models than these."""

    twin: tuple[str, ...] = ()
    """The same dictionary trained with other seeds: how stable is each latent?"""

    null: tuple[str, ...] = ()
    """Finished diffs of null pairs (`palimpsest diff null`, a control fine-tune): what nothing new gives."""

    confidence: float = 0.95
    """Coverage of the intervals."""

    resamples: Count = 1000
    """Bootstrap resamples of documents."""

    classes: Annotated[ClassOptions, FLAT] = field(default_factory=ClassOptions)
    """Where the lines between classes of latents are drawn."""

    patching: Annotated[PatchOptions, FLAT] = field(default_factory=PatchOptions)
    """Which parts of the difference are put into the base, and removed from the tuned model."""

    attribution: Annotated[AttributionOptions, FLAT] = field(default_factory=AttributionOptions)
    """Which latents explain the KL."""

    models: Annotated[ModelOptions, FLAT] = field(default_factory=ModelOptions)
    """How models are loaded."""

    corpora: Annotated[CorpusOptions, FLAT] = field(default_factory=CorpusOptions)
    """How text is read."""

    def __post_init__(self) -> None:
        """Require text and sound intervals, and both models at once."""
        if not self.corpus:
            raise ConfigError("A diff needs text", expected="--corpus FILE or --corpus NAME=FILE")
        self._check_unused()
        if self.site is not None and not self.site.strip():
            raise ConfigError("--site is empty", expected="an address such as resid_post.13")
        if self.models.one_at_a_time:
            raise ConfigError("A diff reads both models at once", fix="Leave --one-at-a-time out")
        if not 0.5 <= self.confidence < 1:
            raise ConfigError(
                "confidence is no coverage", expected="0.5 up to below 1", found=self.confidence
            )
        if self.resamples < 100:
            raise ConfigError(
                "Too few resamples for an interval", expected="at least 100", found=self.resamples
            )

    def _check_unused(self) -> None:
        """Refuse options of a pass that is left out."""
        unused = {
            "--positions": self.patching.positions and not self.patching.patch,
            "--generate": self.patching.generate and not self.patching.patch,
            "--behaviour": self.attribution.behaviour and not self.attribution.attribute,
        }
        for flag, said in unused.items():
            if said:
                without = "--no-attribute" if flag == "--behaviour" else "--no-patch"
                raise ConfigError(f"{flag} does nothing with {without}", fix="Leave one of them out")
