"""Typed results as they lie on disk: what a measure wrote and a report reads. No torch."""

from dataclasses import asdict, dataclass, field, fields
from typing import Any

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
    r2_delta: float
    """1 - E‖Δh - (z_f - z_b) W_dec‖² / E‖Δh‖²."""
    r2_delta_ci: Range
    blind: bool
    relative_drift: float
    relative_drift_ci: Range
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
    relative_drift: float
    relative_drift_ci: Range
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
class ControlFinding:
    """The same measures through a basis that learned nothing: random directions, components, neurons."""

    name: str
    datasets: list[dict[str, Any]]
    tasks: list[dict[str, Any]]


@dataclass(frozen=True)
class AuditFinding:
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
    latents: str = "latents.parquet"
    curve: str = "curve.parquet"
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "AuditFinding":
        """The finding that `to_dict` gave; keys of later versions are ignored."""
        data = _known(cls, data)
        data["datasets"] = [CorpusFinding(**_known(CorpusFinding, row)) for row in data["datasets"]]
        data["tasks"] = [TaskFinding(**_known(TaskFinding, row)) for row in data["tasks"]]
        data["controls"] = [ControlFinding(**_known(ControlFinding, row)) for row in data.get("controls", [])]
        return cls(**data)


def _known(kind: type, data: dict[str, Any]) -> dict[str, Any]:
    names = {f.name for f in fields(kind)}
    return {key: value for key, value in data.items() if key in names}
