"""What an evaluation found, as it lies on disk in `evaluation.json`. No torch."""

from dataclasses import asdict, dataclass, field
from typing import Any

from palimpsest.display.notebook import Card, Measured, Rich, Table
from palimpsest.findings import Range, known_fields

SCHEMA = 1

LOWEST_DECADE = -8
BINS_PER_DECADE = 4


@dataclass(frozen=True)
class Density:
    """How often latents fire: a histogram of log10(tokens on which a latent fires / tokens)."""

    counts: list[int]
    """Latents per bin, from 10^-8 to 1 in steps of a quarter of a decade; rarer ones are in the first bin."""
    never: int
    """Latents that never fire in the measured tokens."""

    @property
    def edges(self) -> list[float]:
        """The ends of the bins, in log10."""
        return [LOWEST_DECADE + i / BINS_PER_DECADE for i in range(len(self.counts) + 1)]


@dataclass(frozen=True)
class Splice:
    """How one model predicts when the site holds something else; see `docs/measures/reconstruction.md`.

    `ce` holds nats per token for `original`, `spliced`, `zero` and `mean`; `kl` is KL(original ‖ replaced) for the
    last three. `…_recovered` and their intervals are by baseline, `zero` and `mean`; None where a baseline
    changes nothing that could be recovered.
    """

    predictions: int
    """Tokens with a prediction: measured ones that are not the first of their sequence."""
    ce: dict[str, float | None]
    kl: dict[str, float | None]
    ce_recovered: dict[str, float | None]
    ce_recovered_ci: dict[str, Range | None]
    kl_recovered: dict[str, float | None]
    kl_recovered_ci: dict[str, Range | None]


@dataclass(frozen=True)
class ModelEvaluation:
    """One model through the dictionary; of a crosscoder, `l0`, `dead` and `density` are of its joint codes."""

    side: str
    """`model` (the only one), `base` or `tuned`."""
    name: str
    fve: float | None
    """1 - Σ‖x - x̂‖² / Σ‖x - mean x‖², a constant error counted; None where x never varies."""
    fve_ci: Range | None
    cosine: float | None
    """Mean cosine of x and x̂ over tokens; x̂ = 0 counts as 0."""
    norm_ratio: float | None
    """Mean of ‖x̂‖ / ‖x‖ over tokens."""
    l0: float
    """Latents active per token."""
    l0_quantiles: dict[str, int]
    """By their level, as in `0.5`: the smallest L0 that this share of tokens does not exceed."""
    dead: int
    """Latents that never fire in the measured tokens."""
    dead_share: float
    density: Density
    splice: Splice | None = None


@dataclass(frozen=True)
class Evaluation(Rich):
    """The content of `evaluation.json`."""

    summary: str
    dictionary: dict[str, Any]
    site: str
    view: str
    documents: int
    tokens: int
    """Tokens measured: those that everything here is a sum or a mean over."""
    passed_tokens: int
    """Tokens (BOS, special, masked, no padding) that are not measured and pass through unspliced."""
    masking: str
    """Which tokens are measured."""
    confidence: float
    resamples: int
    seed: int
    models: list[ModelEvaluation]
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def _card(self) -> Card:
        described = self.dictionary
        known = {key: described.get(key) for key in ("path", "activation", "k")}
        return Card(
            "Evaluation",
            f"of a dictionary at {self.site}, view {self.view}",
            self.summary,
            {
                **known,
                "latents": described.get("n_latents"),
                "tokens": self.tokens,
                "measured": self.masking,
                "intervals": f"{self.confidence:.0%} over documents",
            },
            [_fidelity(self.models), _spliced(self.models)],
            notes=self.notes,
        )

    def side(self, side: str) -> ModelEvaluation:
        """The figures of one side.

        Raises:
            KeyError: It was not measured.
        """
        found = {one.side: one for one in self.models}
        return found[side]

    @property
    def metrics(self) -> dict[str, int | float | None]:
        """The headline figures under flat names, as a dictionary's metadata keep them.

        With several models each name ends in its side, as in `fve_tuned`.
        """
        found: dict[str, int | float | None] = {"tokens": self.tokens}
        for one in self.models:
            end = f"_{one.side}" if len(self.models) > 1 else ""
            figures: dict[str, float | None] = {"fve": one.fve, "l0": one.l0, "dead_share": one.dead_share}
            if one.splice is not None:
                for baseline in ("zero", "mean"):
                    figures[f"ce_recovered_{baseline}"] = one.splice.ce_recovered[baseline]
                    figures[f"kl_recovered_{baseline}"] = one.splice.kl_recovered[baseline]
            found |= {f"{name}{end}": value for name, value in figures.items()}
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Evaluation":
        """The evaluation that `to_dict` gave; keys of later versions are ignored."""
        known = known_fields(cls, data)
        known["models"] = [_model(row) for row in data["models"]]
        return cls(**known)


def _fidelity(models: list[ModelEvaluation]) -> Table:
    rows = [
        (
            one.side,
            one.name,
            Measured(one.fve, one.fve_ci),
            Measured(one.l0, digits=1),
            f"{one.dead:,} ({one.dead_share:.1%})",
            one.cosine,
            one.norm_ratio,
        )
        for one in models
    ]
    columns = ("", "model", "FVE", "L0", "dead latents", "cosine", "‖x̂‖/‖x‖")
    return Table(columns, rows, "What it reconstructs", sides=[one.side for one in models])


def _spliced(models: list[ModelEvaluation]) -> Table:
    rows, sides = [], []
    for one in models:
        if one.splice is None:
            continue
        splice = one.splice
        shares = (
            Measured(getattr(splice, f"{name}_recovered")[key], getattr(splice, f"{name}_recovered_ci")[key])
            for name in ("ce", "kl")
            for key in ("zero", "mean")
        )
        rows.append((one.side, splice.ce.get("original"), splice.ce.get("spliced"), *shares))
        sides.append(one.side)
    against = ("CE recovered, zero", "CE recovered, mean", "KL recovered, zero", "KL recovered, mean")
    return Table(
        ("", "CE as it is", "CE spliced", *against), rows, "What splicing it in keeps", sides, scale="table"
    )


def _model(row: dict[str, Any]) -> ModelEvaluation:
    known = known_fields(ModelEvaluation, row)
    known["fve_ci"] = _range(row["fve_ci"])
    known["density"] = Density(**known_fields(Density, row["density"]))
    if row.get("splice") is not None:
        splice = known_fields(Splice, row["splice"])
        for name in ("ce_recovered_ci", "kl_recovered_ci"):
            splice[name] = {key: _range(value) for key, value in splice[name].items()}
        known["splice"] = Splice(**splice)
    return ModelEvaluation(**known)


def _range(value: Any) -> Range | None:
    return None if value is None else (float(value[0]), float(value[1]))
