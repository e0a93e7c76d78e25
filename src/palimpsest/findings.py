"""Typed results as they lie on disk: what a measure wrote and a report reads. No torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from palimpsest.display.notebook import Card, Measured, Rich, Table

Range = tuple[float, float]
"""Lower and upper end of an interval."""

SCHEMA = 1


@dataclass(frozen=True)
class CorpusFinding:
    """What the two models show on one corpus.

    Shares and means are document means (token means in legacy mode); `ci` entries are percentile bootstrap
    intervals over documents.
    """

    name: str
    role: str
    """`general` or `task`."""
    source: str
    documents: int
    tokens: int
    skipped_tokens: int
    """Tokens on which no latent is active in either model."""
    short_tokens: int
    """Tokens on which a list holds fewer than k latents."""
    bad_rows: int
    intersection_mean: dict[str, float]
    ci: dict[str, Range]
    list_length_share: float
    """The part of 1 - intersection mean that comes from lists of different length."""
    value_change: float
    value_change_ci: Range
    fve: dict[str, float]
    l0: dict[str, float]
    r2_delta: float | None = None
    """1 - E‖Δh - (z_f - z_b) W_dec‖² / E‖Δh‖²; None where a battery keeps no activations of its base."""
    r2_delta_ci: Range | None = None
    blind: bool = False
    relative_drift: float | None = None
    relative_drift_ci: Range | None = None
    loss: dict[str, float] | None = None
    delta_loss: float | None = None
    delta_loss_ci: Range | None = None
    kl: float | None = None
    kl_ci: Range | None = None


@dataclass(frozen=True)
class TaskFinding:
    """One task corpus against the general corpus, at the primary k."""

    name: str
    k: int
    idr: float
    """1 - IM(task) / IM(general)."""
    ci: Range
    idr_abs: float
    idr_abs_ci: Range
    churn_ratio: float
    churn_ratio_ci: Range
    minimum_detectable_idr: float
    """Smallest true |idr| that these documents would show with 80 % probability."""
    p_exchange: float
    """Permutation of documents: do the two texts behave differently? Fragility alone makes this small."""
    relative_drift: float | None = None
    relative_drift_ci: Range | None = None
    delta_loss: float | None = None
    delta_loss_ci: Range | None = None
    kl: float | None = None
    kl_ci: Range | None = None
    calibrated: float | None = None
    z: float | None = None
    p_null: float | None = None
    q: float | None = None
    kind: str | None = None
    declared: bool | None = None
    verdict: str | None = None


@dataclass(frozen=True)
class NullTest:
    """One statistic of one corpus beside what innocent fine-tunes of the same drift give."""

    statistic: float
    """c_D for features, Δloss in nats per token for the loss."""
    expected: float
    """The nulls' regression at the drift of the suspect."""
    residual: float
    """statistic - expected: the calibrated figure."""
    ci: Range
    """Interval of the residual over documents and nulls."""
    band: Range
    """Where the statistic of an innocent fine-tune of this drift falls with probability 1 - alpha."""
    z: float
    """Residual over the prediction's standard deviation."""
    p: float
    """Two-sided t tail of z."""
    p_rank: float
    """Two-sided rank among the leave-one-out residuals of the nulls; never below 1 / (nulls + 1)."""
    p_adjusted: float
    """p after Holm's correction within the corpus."""
    rejects: bool
    nulls: int
    """How many nulls calibrate this corpus: those that were not trained on its kind of text."""


@dataclass(frozen=True)
class DomainFinding:
    """The verdict on one corpus, the general one included."""

    name: str
    role: str
    declared: bool
    features: NullTest | None = None
    loss: NullTest | None = None
    p: float | None = None
    """Smaller Holm-adjusted p of the two tests."""
    q: float | None = None
    """p after Benjamini-Hochberg over the corpora."""
    p_max: float | None = None
    """Family-wise p of the largest |z| over every site and k."""
    kind: str | None = None
    """`specialised`, `damaged`, `shifted` or `unchanged`; None where the verdict was refused."""
    verdict: str = "refused"
    sentence: str = ""
    refused: str | None = None
    """Why there is no verdict."""


@dataclass(frozen=True)
class CalibrationFinding(Rich):
    """What the nulls say of the whole audit."""

    battery: dict[str, Any]
    """Path and sha256."""
    source: str
    """`trained` or `spectrum`: which nulls decide."""
    alpha: float
    declared: list[str]
    nulls: int
    families: dict[str, int]
    """Nulls by the kind of text that they were trained on."""
    excluded: list[dict[str, Any]]
    """Nulls that diverged: name, family, reason."""
    drift: dict[str, Any]
    """log(1 - IM(general)): `suspect`, and `nulls` as its smallest and largest."""
    extrapolated: bool
    """The suspect drifted further, or less far, than every null."""
    domains: list[DomainFinding]
    grid: list[dict[str, Any]] = field(default_factory=list)
    """z of the features for every corpus, site and k: `name`, `site`, `k`, `z`."""
    by_family: list[dict[str, Any]] = field(default_factory=list)
    """`name`, `family`, `nulls`, mean `features` and `loss` residual of each family of nulls, own text included."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Every null: `name`, `family`, `method`, `lr`, `steps`, `drift`, and per corpus `features`, `loss`."""
    spectrum: dict[str, Any] | None = None
    """The spectrum nulls of this suspect: `nulls`, `drift`, and per corpus z and p of the features."""
    sentence: str = ""

    def _card(self) -> Card:
        table = _verdicts(self)
        return Card(
            "Calibration",
            f"{self.nulls} {self.source} nulls at level {self.alpha:g}",
            self.sentence,
            {"declared": ", ".join(self.declared), "nulls by their text": self.families},
            [table],
            {"In words": [one.sentence for one in self.domains if one.sentence]},
        )

    @property
    def undeclared(self) -> list[str]:
        """Corpora that the fine-tune specialised on, or shifted, without saying so."""
        return [one.name for one in self.domains if one.verdict == "undeclared"]

    @property
    def damaged(self) -> list[str]:
        """Corpora on which the loss rose beyond the nulls."""
        return [one.name for one in self.domains if one.kind == "damaged"]

    @property
    def refused(self) -> list[str]:
        """Corpora without a verdict."""
        return [one.name for one in self.domains if one.verdict == "refused"]


@dataclass(frozen=True)
class ControlFinding:
    """The same measures through a basis that learned nothing: random directions, components, neurons."""

    name: str
    datasets: list[dict[str, Any]]
    tasks: list[dict[str, Any]]


@dataclass(frozen=True)
class AuditFinding(Rich):
    """The content of `audit.json`."""

    summary: str
    command: str
    pair: dict[str, Any]
    site: str
    dictionary: dict[str, Any]
    k: int
    ks: list[int]
    mode: str
    """`macro` (document means) or `legacy` (pooled counts)."""
    tokens: str
    """`content` or `all`."""
    loss_measured: bool
    kl_measured: bool
    confidence: float
    resamples: int
    seed: int
    datasets: list[CorpusFinding]
    tasks: list[TaskFinding]
    controls: list[ControlFinding] = field(default_factory=list)
    layers: list[dict[str, Any]] | None = None
    layers_note: str | None = None
    warnings: list[str] = field(default_factory=list)
    calibration: CalibrationFinding | None = None
    latents: str = "latents.parquet"
    curve: str = "curve.parquet"
    schema: int = SCHEMA

    def _card(self) -> Card:
        tables = [_corpora(self), _tasks(self)]
        return Card(
            "Audit",
            f"{self.pair['tuned']} against {self.pair['base']} at {self.site}",
            self.summary,
            {
                "k": self.k,
                "intervals": f"{self.confidence:.0%} over documents",
                "dictionary": self.dictionary.get("path"),
            },
            tables if self.calibration is None else [_verdicts(self.calibration), *tables],
            notes=self.warnings,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AuditFinding":
        """The finding that `to_dict` gave; keys of later versions are ignored."""
        data = known_fields(cls, data)
        data["datasets"] = [CorpusFinding(**known_fields(CorpusFinding, row)) for row in data["datasets"]]
        data["tasks"] = [TaskFinding(**known_fields(TaskFinding, row)) for row in data["tasks"]]
        data["controls"] = [
            ControlFinding(**known_fields(ControlFinding, row)) for row in data.get("controls", [])
        ]
        if data.get("calibration") is not None:
            data["calibration"] = _calibration(data["calibration"])
        return cls(**data)


def _calibration(data: dict[str, Any]) -> CalibrationFinding:
    domains: list[DomainFinding] = []
    for row in data["domains"]:
        known = known_fields(DomainFinding, row)
        for key in ("features", "loss"):
            if known.get(key) is not None:
                known[key] = NullTest(**known_fields(NullTest, known[key]))
        domains.append(DomainFinding(**known))
    known = known_fields(CalibrationFinding, data)
    known["domains"] = domains
    return CalibrationFinding(**known)


def _verdicts(found: CalibrationFinding) -> Table:
    rows = []
    for one in found.domains:
        tests = [
            None if test is None else Measured(test.residual, test.ci, signed=True)
            for test in (one.features, one.loss)
        ]
        rows.append((one.name, one.verdict, one.kind, *tests, one.q))
    columns = ("corpus", "verdict", "kind", "overlap beyond nulls", "Δloss beyond nulls", "q")
    return Table(columns, rows, "Beside innocent fine-tunes")


def _corpora(found: AuditFinding) -> Table:
    overlap = f"shared top-{found.k} latents"
    rows = [
        (
            one.name,
            one.role,
            one.documents,
            Measured(one.intersection_mean.get(str(found.k)), one.ci.get(str(found.k)), "percent", 1),
            Measured(one.delta_loss, one.delta_loss_ci, signed=True),
            Measured(one.relative_drift, one.relative_drift_ci),
        )
        for one in found.datasets
    ]
    columns = ("corpus", "role", "documents", overlap, "Δloss, nats per token", "‖Δh‖/‖h‖")
    return Table(columns, rows, "Every text")


def _tasks(found: AuditFinding) -> Table:
    rows = [
        (
            one.name,
            Measured(one.idr, one.ci, "percent", 1, signed=True),
            Measured(one.churn_ratio, one.churn_ratio_ci),
            Measured(one.minimum_detectable_idr, None, "percent", 1),
        )
        for one in found.tasks
    ]
    columns = ("task", "IDR against general text", "churn ratio", "smallest IDR that would show")
    return Table(columns, rows, "Tasks against general text", folded=found.calibration is not None)


def known_fields(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    """What of stored data a dataclass has fields for; keys of later versions are left out."""
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in data.items() if key in names}
