"""What a diff found, as it lies on disk in `diff.json`. No torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from palimpsest.display.notebook import Card, Rich
from palimpsest.findings import Range, known_fields

SCHEMA = 1


@dataclass(frozen=True)
class PatchRow:
    """One set of latents (or a baseline) put into the base, or removed from the tuned model."""

    set: str
    """Its name, as `docs/measures/patching.md` lists them: `none`, `all`, `best:delta_norm` …"""
    size: int | None
    """Latents in it; None for what is no set of latents."""
    positions: str
    """`all` measured predictions, or the `first` tokens of each answer."""
    kl: float
    """KL(tuned ‖ patched), nats per prediction."""
    share: float | None
    """Added to the base: 1 - KL / KL of `none`. Removed from the tuned model: KL / KL of `none`. None without a gap."""
    ci: Range | None
    """Of the share, over documents."""
    seed: int | None = None
    """Of a random set."""
    loss: dict[str, float] = field(default_factory=dict)
    """Cross-entropy in nats per token, by corpus."""
    by_corpus: dict[str, float | None] = field(default_factory=dict)
    """The share, by corpus."""


@dataclass(frozen=True)
class Patching:
    """The causal test; KLs are KL(tuned ‖ ·) in nats per prediction, by positions."""

    documents: int
    predictions: dict[str, int]
    gap: dict[str, float]
    """KL of `none`: the base's activations in the tuned model's upper layers."""
    base_kl: dict[str, float]
    """KL of the base model itself."""
    loss: dict[str, dict[str, float]]
    """Cross-entropy of `base` and `tuned` by corpus."""
    added: list[PatchRow] = field(default_factory=list)
    removed: list[PatchRow] = field(default_factory=list)
    samples: list[dict[str, str]] = field(default_factory=list)
    """Continuations to read: `corpus`, `prompt`, `base`, `tuned`, `patched`."""
    notes: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Patching":
        """What `dataclasses.asdict` gave."""
        known = known_fields(cls, data)
        for key in ("added", "removed"):
            known[key] = [patch_row(row) for row in known.get(key, [])]
        return cls(**known)

    def row(self, name: str, positions: str = "all", *, removed: bool = False) -> PatchRow:
        """The row of a set; of several the largest.

        Raises:
            KeyError: It was not measured.
        """
        rows = [
            one
            for one in (self.removed if removed else self.added)
            if one.set == name and one.positions == positions
        ]
        if not rows:
            raise KeyError(name)
        return max(rows, key=lambda one: one.size or 0)


@dataclass(frozen=True)
class Behaviour:
    """Latents that fire together where the models differ most."""

    latents: list[int]
    """Strongest first."""
    share: float
    """Part of the KL of the differing tokens that is attributed to them."""
    tokens: int
    """Differing tokens on which at least half of the attribution to latents is theirs."""
    contexts: list[dict[str, Any]]
    """`corpus`, `document`, `before`, `token`, `after`, `kl`: the predicted token and the text around it."""


@dataclass(frozen=True)
class Attributed:
    """What gradients integrated from base to tuned give to the latents."""

    objective: str
    """`kl`, or the name of a behaviour."""
    gap: float
    """The objective at `none` minus that at the tuned activations: per prediction for the KL, per pair of answers for
    a behaviour (tuned minus base there)."""
    units: int
    """Predictions, or pairs of answers."""
    latents: float
    """Share of the gap that is attributed to all latents."""
    bias: float
    error: float
    """Shares of the bias and of what the dictionary leaves out."""
    incomplete: float
    """1 - the sum of the three: what the steps of the integral miss."""
    steps: int
    top: list[dict[str, Any]] = field(default_factory=list)
    """`latent`, `share` of the strongest by size."""
    verified: list[dict[str, Any]] = field(default_factory=list)
    """`size`, `predicted`, `added`, `removed`: the strongest latents put in and taken out; shares of the gap."""


@dataclass(frozen=True)
class Diff(Rich):
    """The content of `diff.json`."""

    summary: str
    method: str
    pair: dict[str, str]
    site: str
    dictionary: dict[str, Any]
    corpora: dict[str, dict[str, int]]
    """By name: `documents` and measured `tokens`."""
    tokens: int
    fve: dict[str, float | None]
    """Of `base`, `tuned` and `difference` (1 - Σ‖Δh - described Δh‖² / Σ‖Δh - mean Δh‖²)."""
    l0: float
    dead: int
    classes: dict[str, int]
    tuned_only: dict[str, Any]
    """`raw`, `surviving`, `undetermined`, and `null`: the mean number surviving in the null diffs, None without any."""
    thresholds: dict[str, float]
    confidence: float
    resamples: int
    seed: int
    scaling: dict[str, Any] = field(default_factory=dict)
    artefacts: dict[str, Any] = field(default_factory=dict)
    stability: list[dict[str, Any]] = field(default_factory=list)
    nulls: list[dict[str, Any]] = field(default_factory=list)
    gap: dict[str, float] = field(default_factory=dict)
    patching: list[PatchRow] = field(default_factory=list)
    removal: list[PatchRow] = field(default_factory=list)
    patched: dict[str, Any] = field(default_factory=dict)
    """`documents`, `predictions`, `base_kl`, `loss`, `samples` of the causal test."""
    attribution: list[Attributed] = field(default_factory=list)
    behaviours: list[Behaviour] = field(default_factory=list)
    ranked: list[dict[str, Any]] = field(default_factory=list)
    """The latents to look at first: `latent`, `class`, ratios and intervals, `causal_share`, `label`, `examples`."""
    seconds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    latents: str = "latents.parquet"
    schema: int = SCHEMA

    def _card(self) -> Card:
        from palimpsest.diff.card import diff_card

        return diff_card(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Diff":
        """The diff that `to_dict` gave; keys of later versions are ignored."""
        known = known_fields(cls, data)
        for key in ("patching", "removal"):
            known[key] = [patch_row(row) for row in known.get(key, [])]
        known["attribution"] = [
            Attributed(**known_fields(Attributed, row)) for row in known.get("attribution", [])
        ]
        known["behaviours"] = [
            Behaviour(**known_fields(Behaviour, row)) for row in known.get("behaviours", [])
        ]
        return cls(**known)


def patch_row(data: dict[str, Any]) -> PatchRow:
    """A row from plain values; its interval is a pair again."""
    known = known_fields(PatchRow, data)
    if known.get("ci") is not None:
        known["ci"] = (float(known["ci"][0]), float(known["ci"][1]))
    return PatchRow(**known)
