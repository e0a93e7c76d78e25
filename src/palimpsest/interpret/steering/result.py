"""What steering left: texts side by side, and what each strength costs. Plain JSON values throughout."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from palimpsest.display.notebook import Card, Measured, Rich, Table
from palimpsest.findings import Range, known_fields
from palimpsest.interpret.steering.changes import Change

SCHEMA = 1

FEWEST_DOCUMENTS = 6
"""Documents of an interval: resampling fewer says nothing."""


@dataclass(frozen=True)
class Steered(Rich):
    """What base, tuned and steered model wrote after one prompt, with one seed."""

    prompt: str
    base: str
    """Continuation by the base as it is."""
    tuned: str | None
    """By the tuned model as it is; None where there is one model only."""
    steered: str
    """By the steered model."""
    side: str
    """Which model was steered: base or tuned."""
    changes: list[dict[str, Any]]
    """`latent`, `mode` and `value` of each change."""
    tokens: str = "all"
    """Which tokens were edited."""
    seed: int = 0
    temperature: float = 0.0

    @property
    def unsteered(self) -> str:
        """The continuation of the same model without steering."""
        return self.tuned if self.side == "tuned" and self.tuned is not None else self.base

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def _card(self) -> Card:
        facts = {"edited tokens": self.tokens, "seed": self.seed, "temperature": self.temperature}
        name = f"{written(self.changes)} in the {self.side} model"
        return Card("Steering", name, self.prompt, facts, [_texts([asdict(self)], self.side)])


@dataclass(frozen=True)
class Cost:
    """What changes cost on held-out text, in nats per token; intervals are bootstraps over documents."""

    loss: float
    """Cross-entropy of the steered model."""
    perplexity_ratio: float | None
    """Perplexity of the steered model over that of the same model unsteered: exp of the difference in loss. None where
    no number is large enough."""
    perplexity_ratio_ci: Range | None
    """None where there are too few documents."""
    kl: float
    """KL(unsteered ‖ steered) of the predictions."""
    kl_ci: Range | None


@dataclass(frozen=True)
class Strength(Cost):
    """One strength of a sweep."""

    strength: float
    changes: list[dict[str, Any]]
    """The changes at this strength."""
    ok: bool
    """Not above the guard."""
    texts: list[str]
    """Steered continuations of the prompts, in their order."""
    watch: list[dict[str, Any]] = field(default_factory=list)
    """Per watched text: `text` and `change`, the mean over prompts of its log-probability's change, in nats."""
    controls: list[dict[str, Any]] = field(default_factory=list)
    """The same changes on other latents, at this strength: `latents`, the fields of `Cost`, `watch`."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Strength:
        """What `asdict` gave; keys of later versions are ignored."""
        row = known_fields(cls, data)
        for key in ("perplexity_ratio_ci", "kl_ci"):
            low, high = row[key] or (None, None)
            row[key] = None if low is None or high is None else (low, high)
        return cls(**row)


@dataclass(frozen=True)
class SteeringRun(Rich):
    """The content of `steer.json`."""

    summary: str
    pair: dict[str, Any]
    """`base` and `tuned` (None where there is one model)."""
    site: str
    dictionary: dict[str, Any]
    side: str
    """Which model is steered."""
    tokens: str
    """Which tokens are edited: all, generated or prompt ones, special ones never."""
    changes: list[dict[str, Any]]
    """`latent`, `mode` and `value` of each change, at strength 1."""
    prompts: list[dict[str, Any]]
    """`prompt`, `base`, `tuned`, `steered`, at strength 1."""
    sweep: list[Strength]
    unsteered: dict[str, Any] | None
    """`loss`, `documents` and `tokens` of the sweep's text under the model as it is."""
    guard: dict[str, Any]
    """`ratio`, and `largest_ok`: the largest strength up to which no perplexity ratio passes it, or None."""
    controls: list[dict[str, Any]]
    """Per changed latent: `latent`, its `rate`, `mean` and `norm`, and those of its `matched` latents."""
    watch: list[dict[str, Any]]
    """Per watched text, at strength 1: `text`, `change`, and per prompt `unsteered` and `steered` log-probability."""
    decoding: dict[str, Any]
    """`max_new_tokens`, `temperature`, `seed`, `chat`."""
    seed: int
    confidence: float
    resamples: int
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SteeringRun:
        """What `to_dict` gave; keys of later versions are ignored."""
        known = known_fields(cls, data)
        known["sweep"] = [Strength.from_dict(row) for row in known["sweep"]]
        return cls(**known)

    def _card(self) -> Card:
        tables = [_strengths(self.sweep)] if self.sweep else []
        tables += [_texts(self.prompts, self.side)] if self.prompts else []
        facts = {"edited tokens": self.tokens, "guard": f"{self.guard['ratio']:g} times the perplexity"}
        name = f"{written(self.changes)} in the {self.side} model"
        return Card("Steering", name, self.summary, facts | self.decoding, tables, notes=self.notes)


def written(changes: list[dict[str, Any]]) -> str:
    """Changes as they stand on the command line."""
    return " ".join(str(Change(**one)) for one in changes)


def _texts(rows: list[dict[str, Any]], side: str) -> Table:
    cells, sides = [], []
    for row in rows:
        for name in ("base", "tuned", "steered"):
            if row[name] is not None:
                cells.append((row["prompt"], name, row[name]))
                sides.append(side if name == "steered" else name)
    return Table(("prompt", "", "continuation"), cells, "Side by side", sides)


def _strengths(rows: list[Strength]) -> Table:
    cells = [
        (
            f"{row.strength:g}",
            row.loss,
            Measured(row.perplexity_ratio, row.perplexity_ratio_ci),
            Measured(row.kl, row.kl_ci),
            "yes" if row.ok else "no",
        )
        for row in rows
    ]
    return Table(("strength", "loss", "perplexity ratio", "KL", "within the guard"), cells, "Strengths")


__all__ = ["FEWEST_DOCUMENTS", "SCHEMA", "Cost", "Steered", "SteeringRun", "Strength", "written"]
