"""What a verification found, as plain values. No torch."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from palimpsest.display.notebook import Card, Measured, Rich, Table
from palimpsest.findings import Range, known_fields

Status = Literal["fits", "weak", "mismatch", "unexplained"]

SCHEMA = 1


@dataclass(frozen=True)
class Fit:
    """How one model goes through the dictionary as loaded; see `docs/measures/conventions.md`."""

    side: str
    """`model` (the only one), `base` or `tuned`."""
    name: str
    fve: float | None
    """1 - Σ‖x - x̂‖² / Σ‖x - mean x‖², a constant error counted; None where x never varies."""
    fve_ci: Range | None
    cosine: float | None
    """Mean cosine of x and x̂ over tokens."""
    norm_ratio: float | None
    """Mean of ‖x̂‖ / ‖x‖ over tokens."""
    mean_error: float | None
    """‖mean x̂ - mean x‖ / ‖mean x‖."""
    mean_error_rms: float | None
    """‖mean x̂ - mean x‖ / √(mean ‖x‖²)."""
    l0: float
    """Latents active per token; of a crosscoder those of its joint codes."""
    l0_quantiles: dict[str, int]
    """By their level, as in `0.5`."""
    recorded_fve: float | None = None
    """What the dictionary's metadata say of itself, where they do."""
    recorded_l0: float | None = None


@dataclass(frozen=True)
class Candidate:
    """One hypothesis: what reading the dictionary so would give on the tokens of the search."""

    kind: str
    """Such as `encoder_transposed`, `scale` or `site`; the causes of `docs/measures/conventions.md`."""
    label: str
    """What exactly was changed."""
    fve: float | None
    l0: float
    ratio: float
    """FVU so read / FVU as read before."""
    ratio_upper: float | None
    """Upper end of its 95 % interval; None where there are too few documents or it failed at the first look."""
    accepted: bool
    """Whether it passed the decision rule."""


@dataclass(frozen=True)
class Cause:
    """A named cause of a bad fit; nothing was applied."""

    kind: str
    label: str
    sentence: str
    """What is wrong and what to do."""
    fve: float
    """With this cause and those before it put right, on the tokens of the search."""


@dataclass(frozen=True)
class Verification(Rich):
    """Whether a dictionary fits, and what it looks like if not."""

    status: Status
    """`fits`; `weak` (FVE below 0.5 and no cause); `mismatch` (the cause is named); `unexplained`."""
    summary: str
    site: str
    view: str
    documents: int
    tokens: int
    """Tokens measured."""
    search_tokens: int
    """Tokens on which causes were tried; 0 without a search."""
    models: list[Fit]
    causes: list[Cause] = field(default_factory=list)
    """At most two, in the order in which they were found."""
    candidates: list[Candidate] = field(default_factory=list)
    """The best hypothesis of every kind as a single cause, best first, whether it passed the rule or not."""
    notes: list[str] = field(default_factory=list)
    seed: int = 0
    schema: int = SCHEMA

    def _card(self) -> Card:
        fits = [
            (
                one.side,
                one.name,
                Measured(one.fve, one.fve_ci),
                one.recorded_fve,
                Measured(one.l0, digits=1),
                one.recorded_l0,
                one.cosine,
                one.norm_ratio,
            )
            for one in self.models
        ]
        columns = ("", "model", "FVE", "FVE recorded", "L0", "L0 recorded", "cosine", "‖x̂‖/‖x‖")
        tried = [(one.label, one.fve, one.l0, one.ratio, one.accepted) for one in self.candidates]
        return Card(
            "Verification",
            f"{self.status}: a dictionary at {self.site}, view {self.view}",
            self.summary,
            {"tokens": self.tokens, "documents": self.documents},
            [
                Table(columns, fits, "How it fits", sides=[one.side for one in self.models]),
                Table(("read as", "FVE", "L0", "error / as read", "accepted"), tried, "Tried", folded=True),
            ],
            notes=[*(one.sentence for one in self.causes), *self.notes],
        )

    @property
    def ok(self) -> bool:
        """Whether nothing speaks against the dictionary."""
        return self.status == "fits"

    def side(self, side: str) -> Fit:
        """The figures of one model.

        Raises:
            KeyError: It was not measured.
        """
        return {one.side: one for one in self.models}[side]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Verification":
        """The verification that `to_dict` gave; keys of later versions are ignored."""
        known = known_fields(cls, data)
        fits = [known_fields(Fit, row) for row in data["models"]]
        for row in fits:
            row["fve_ci"] = None if row["fve_ci"] is None else tuple(row["fve_ci"])
        known["models"] = [Fit(**row) for row in fits]
        known["causes"] = [Cause(**known_fields(Cause, row)) for row in data.get("causes", [])]
        known["candidates"] = [
            Candidate(**known_fields(Candidate, row)) for row in data.get("candidates", [])
        ]
        return cls(**known)
