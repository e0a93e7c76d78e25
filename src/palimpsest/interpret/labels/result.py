"""What a run of labels found, as a folder holds it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from palimpsest.artifacts import open_artifact
from palimpsest.display.notebook import Card, Measured, Rich, Table
from palimpsest.interpret.labels.scoring import Score
from palimpsest.latents.schema import LABELS, LABELS_ABOUT, LABELS_STAGE, label_schema

if TYPE_CHECKING:
    import pyarrow

SCHEMA = 1
SCORES = {
    "score": "value",
    "score_lo": "lo",
    "score_hi": "hi",
    "score_random": "random",
    "score_similar": "similar",
}


@dataclass(frozen=True)
class LabelRow:
    """The label of one latent.

    Attributes:
        latent: Its number.
        label: What it is said to stand for.
        provider: By whom.
        score: Balanced accuracy on `n` texts that the label was not made from; None where nothing judged it.
        score_lo: Its interval …
        score_hi: … over texts.
        n: Texts that were judged.
        score_random: Against random negatives alone.
        score_similar: Against negatives of latents that fire on similar text.
    """

    latent: int
    label: str
    provider: str
    score: float | None = None
    score_lo: float | None = None
    score_hi: float | None = None
    n: int = 0
    score_random: float | None = None
    score_similar: float | None = None

    @classmethod
    def of(cls, latent: int, label: str, provider: str, found: Score | None) -> LabelRow:
        """A label with its score, if there is one."""
        if found is None:
            return cls(latent, label, provider)
        scores: dict[str, Any] = {name: getattr(found, ours) for name, ours in SCORES.items()}
        return cls(latent, label, provider, n=found.n, **scores)


@dataclass(frozen=True)
class Labelling(Rich):
    """Labels of latents and how well they fit.

    Attributes:
        summary: One sentence.
        provider: Who labelled.
        model: With which model, or None.
        judge: Who judged; `none` for nobody.
        judge_model: With which model, or None.
        examples: The examples folder.
        dictionary: Its path and hash.
        rows: The labels, the latents that were wanted most first.
        counts: Latents that were asked about, labelled, without label, missing, scored; texts that were judged.
        score: Mean balanced accuracy over latents, and against each kind of negative.
        control: The same with labels dealt out to wrong latents: `shuffled` its mean, `runs` each control, `above` by
            how much the own labels are better.
        doubt: Mean chance of a negative that the latent fires there after all.
        notes: What a reader should know.
        confidence: Coverage of the intervals.
        seed: Of the random choices.
        seconds: What it took.
    """

    summary: str
    provider: str
    model: str | None
    judge: str
    judge_model: str | None
    examples: str
    dictionary: dict[str, Any]
    rows: list[LabelRow]
    counts: dict[str, int]
    score: dict[str, Any]
    control: dict[str, Any]
    doubt: float | None
    notes: list[str]
    confidence: float
    seed: int
    seconds: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        return self.about() | {"rows": [asdict(row) for row in self.rows]}

    def _card(self) -> Card:
        rows = [
            (
                Measured(row.latent, digits=0),
                row.label,
                Measured(row.score, (row.score_lo, row.score_hi)),
                Measured(row.score_random),
                Measured(row.score_similar),
            )
            for row in self.rows
        ]
        facts = {"model": self.model, "judge": self.judge, "examples": self.examples, **self.counts}
        columns = ("latent", "label", "balanced accuracy", "against random", "against similar")
        return Card(
            "Labels", f"by {self.provider}", self.summary, facts, [Table(columns, rows)], notes=self.notes
        )

    def about(self) -> dict[str, Any]:
        """The content of `labels.json`: everything but the rows."""
        values = {name: value for name, value in vars(self).items() if name != "rows"}
        return {"schema": SCHEMA, "scored": self.score["n"] > 0} | values

    def table(self) -> pyarrow.Table:
        """The content of `labels.parquet`, in the order of the rows."""
        import pyarrow as pa

        return pa.Table.from_pylist([asdict(row) for row in self.rows], schema=label_schema())


def read_labelling(path: str | Path) -> Labelling:
    """What a finished run of labels found.

    Raises:
        ArtifactError: The folder is unfinished, edited, or another stage's.
    """
    artifact = open_artifact(path, stage=LABELS_STAGE)
    about = artifact.read_json(LABELS_ABOUT)
    rows = [LabelRow(**row) for row in artifact.read_table(LABELS).to_pylist()]
    return Labelling(
        **{name: value for name, value in about.items() if name not in ("schema", "scored")}, rows=rows
    )
