"""Labels of latents, as a labels folder holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from palimpsest.artifacts import open_artifact
from palimpsest.latents.schema import LABELS, LABELS_STAGE


@dataclass(frozen=True)
class Label:
    """What a latent is said to stand for, and how well that fits.

    Attributes:
        text: The label.
        provider: Who gave it.
        score: Balanced accuracy on texts that it was not made from; None where nothing judged it.
        ci: Interval of the score.
        n: Texts that were judged.
        random: The score against texts drawn at random.
        similar: The score against texts of latents that fire alike.
    """

    text: str
    provider: str
    score: float | None = None
    ci: tuple[float, float] | None = None
    n: int = 0
    random: float | None = None
    similar: float | None = None


def read_labels(folders: Sequence[str | Path]) -> dict[int, Label]:
    """Labels by latent; of two labels of one latent the one with the better score counts, else the later one.

    Raises:
        ArtifactError: A folder is unfinished, edited or holds no labels.
    """
    found: dict[int, Label] = {}
    for folder in folders:
        table = open_artifact(folder, stage=LABELS_STAGE, verify=False).read_table(LABELS)
        for row in table.to_pylist():
            if not row["label"]:
                continue
            interval = (row["score_lo"], row["score_hi"])
            label = Label(
                row["label"],
                row["provider"] or "",
                row["score"],
                None if None in interval else interval,
                row["n"] or 0,
                row["score_random"],
                row["score_similar"],
            )
            other = found.get(row["latent"])
            if other is None or (label.score is None, -(label.score or 0)) <= (
                other.score is None,
                -(other.score or 0),
            ):
                found[row["latent"]] = label
    return found
