"""The content of `explain.json` and of `compare.json`, typed. No torch."""

from dataclasses import asdict, dataclass, field, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from palimpsest.display.notebook import Card, Rich
from palimpsest.findings import Range

SCHEMA = 1

RANKINGS = ("effect", "value", "absolute", "weighted")
"""Activation-weighted effect; the raw value; |value|; |value| times the decoder norm."""


@dataclass(frozen=True)
class SiteAbout:
    """One site of the adapter."""

    site: str
    dictionary: str
    sha256: str
    latents: int
    """Latents of the dictionary."""
    edited: int
    """Latents that the adapter may change."""
    neuronpedia: str | None = None


@dataclass(frozen=True)
class CorpusAbout:
    """One text that was read."""

    name: str
    role: str
    """`corpus` or `general`."""
    source: str
    documents: int
    tokens: int
    edited: int
    """Tokens that the adapter edits: every mean is over these."""


@dataclass(frozen=True)
class RankedLatent:
    """One latent."""

    site: str
    latent: int
    value: float
    """Signed number per latent, as the component has it: g(s) of scale, b of a bias, the length of a row."""
    norm: float
    """Length of its decoder row."""
    effect: float
    """Mean over edited tokens of |change of z| times `norm`."""
    share: float
    """Its part of the effect of all latents."""
    rate: dict[str, float | None]
    """Share of edited tokens on which it fires, by text."""
    activation: dict[str, float | None]
    """Mean activation over edited tokens, zeros included, by text."""
    label: str | None = None


@dataclass(frozen=True)
class Ranking:
    """The strongest latents by one figure, strongest first."""

    by: str
    """One of `RANKINGS`."""
    latents: list[RankedLatent]


@dataclass(frozen=True)
class Concentration:
    """How few latents hold the effect, over all documents of the corpora."""

    latents: int
    """Latents that the adapter may change."""
    moved: int
    """Of them those whose value is not 0."""
    firing: int | None
    """Of them those that fire on the corpora."""
    effective: int
    """Of them those with an effect."""
    effect: float
    """Sum of all effects: an upper bound of the mean length of the edit."""
    half: int
    """The fewest latents that hold 50 % of it."""
    most: int
    """The fewest latents that hold 90 % of it."""


@dataclass(frozen=True)
class Objective:
    """What the adapter changes in the objective, on the half of the documents that is reported."""

    name: str
    """`text`: next-token loss; `pairs`: DPO loss."""
    unit: str
    chosen_on: int
    """Documents, or pairs, that the ranking's length was chosen on."""
    reported_on: int
    """Documents, or pairs, that figures are of."""
    base: float
    full: float
    difference: float
    """base - full: above 0 where the adapter lowers the loss."""
    ci: Range
    present: bool
    """Whether the difference can be told from 0; without one there are no shares."""
    chosen_difference: float = 0.0
    """The same on the documents, or pairs, that choose."""
    chosen_present: bool = True
    margin: float | None = None
    """pairs: mean of log p/p_ref(chosen) - log p/p_ref(rejected)."""


@dataclass(frozen=True)
class CurvePoint:
    """(L_base - L) / (L_base - L_full) with `n` latents kept, or taken out."""

    kind: str
    """`keep`, `ablate` (by effect), `magnitude` (keep, by |value|) or `random` (keep; the mean of several orders)."""
    n: int
    share: float | None
    ci: Range | None
    """Bootstrap over documents; of `random` the range over the orders."""


@dataclass(frozen=True)
class Pruned:
    """The smaller adapter: its size is chosen on one half of the documents, its share measured on the other."""

    keep: float
    """Share that was asked for."""
    n: int
    share: float
    ci: Range
    magnitude_n: int | None
    """Latents that the ranking by |value| needs on the same documents."""
    magnitude_share: float | None
    random_n: int | None
    """Latents that a random order of the firing latents needs: the median of several."""
    random_range: tuple[int, int] | None
    random_share: float | None
    path: str | None
    """Folder of the pruned adapter, inside the run."""
    reload_error: float | None
    """Largest difference in a document's loss between the adapter read back and the mask, in nats per token."""


@dataclass(frozen=True)
class Ratio:
    """Activation on the corpora over activation on general text, of a set of latents."""

    ratio: float | None
    ci: Range | None
    """Over documents for the top latents; of sets, the range that holds 95 % of them."""


@dataclass(frozen=True)
class Specificity:
    """Do the latents that the adapter uses belong to its data?"""

    n: int
    top: Ratio
    """The n latents of the largest effect, chosen on one half of the documents, measured on the other."""
    random: Ratio
    """Sets of n latents that fire."""
    permuted: Ratio
    """The n of the largest effect after the values are shuffled among the latents that fire: what ranking by activity
    alone gives."""
    p: float
    """Share of the shuffles with a ratio at least as large; never below 1 / (shuffles + 1)."""


@dataclass(frozen=True)
class Agreement:
    """Two adapters, on the latents that fire in both."""

    adapter: str
    latents: int
    cosine: float | None
    """Of their values."""
    spearman: float | None
    top_n: int
    overlap: float
    """Share of the n latents of the largest effect that both have."""
    null_cosine: Range | None
    """What 95 % of the shuffles of one adapter's values among those latents give."""
    null_spearman: Range | None
    null_overlap: Range | None


@dataclass(frozen=True)
class Shuffled:
    """An adapter trained on shuffled data."""

    adapter: str
    effect: float
    """Beside `concentration.effect`."""
    difference: float | None
    ci: Range | None
    """L_base - L of it on the reported documents."""
    share: float | None
    """That over what the explained adapter does."""


@dataclass(frozen=True)
class Controls:
    """What the explained adapter is read against."""

    twin: Agreement | None = None
    other: Agreement | None = None
    shuffled: Shuffled | None = None


@dataclass(frozen=True)
class Explanation(Rich):
    """The content of `explain.json`."""

    summary: str
    adapter: str
    component: str
    model: str
    sites: list[SiteAbout]
    corpora: list[CorpusAbout]
    rankings: list[Ranking]
    concentration: Concentration
    objective: Objective
    curves: list[CurvePoint]
    pruned: Pruned | None
    specificity: Specificity | None
    controls: Controls
    confidence: float
    seed: int
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def _card(self) -> Card:
        from palimpsest.tune.explain.card import explanation_card

        return explanation_card(self)

    def ranking(self, by: str = "effect") -> list[RankedLatent]:
        """The strongest latents by one of `RANKINGS`."""
        return next(one.latents for one in self.rankings if one.by == by)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Explanation":
        """The explanation that `to_dict` gave; keys of later versions are ignored."""
        return _typed(cls, data)


@dataclass(frozen=True)
class Moved:
    """One latent in two adapters."""

    site: str
    latent: int
    values: tuple[float, float]
    effects: tuple[float, float]
    shares: tuple[float, float]
    """Of each adapter's whole effect."""
    label: str | None = None


@dataclass(frozen=True)
class AdapterComparison(Rich):
    """The content of `compare.json`."""

    summary: str
    adapters: tuple[str, str]
    components: tuple[str, str]
    sites: list[SiteAbout]
    corpora: list[CorpusAbout]
    effects: tuple[float, float]
    """Sum of all effects of each."""
    strong: float
    weak: float
    counts: dict[str, int]
    """Latents by class: `only_a`, `only_b`, `both`, `opposite` (both, with other signs)."""
    moved: dict[str, list[Moved]]
    """The strongest of each class."""
    agreement: Agreement
    seed: int
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def _card(self) -> Card:
        from palimpsest.tune.explain.card import comparison_card

        return comparison_card(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AdapterComparison":
        """The comparison that `to_dict` gave; keys of later versions are ignored."""
        return _typed(cls, data)


def _typed(kind: Any, value: Any) -> Any:
    """A value read from JSON as the type that a field is annotated with."""
    if get_origin(kind) in (Union, UnionType):
        inner = [one for one in get_args(kind) if one is not type(None)]
        return None if value is None else _typed(inner[0], value)
    if is_dataclass(kind):
        hints = get_type_hints(kind)
        made: Any = kind
        return made(**{name: _typed(hints[name], one) for name, one in value.items() if name in hints})
    if get_origin(kind) is list:
        return [_typed(get_args(kind)[0], one) for one in value]
    if get_origin(kind) is tuple:
        return tuple(value)
    if get_origin(kind) is dict:
        return {key: _typed(get_args(kind)[1], one) for key, one in value.items()}
    return value
