"""Labels of latents, as a labels folder holds them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.artifacts import open_artifact
from palimpsest.latents.schema import LABELS, LABELS_ABOUT, LABELS_STAGE
from palimpsest.log import log


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


def read_labels(folders: Sequence[str | Path], dictionary: str | None = None) -> dict[int, Label]:
    """Labels by latent; of two labels of one latent the one with the better score counts, else the later one.

    Args:
        folders: Written by `palimpsest label`.
        dictionary: Hash of the dictionary whose latents are meant. Labels of another one are left out, with a warning:
            its latents have the same numbers and other meanings. A folder that tells no hash is taken at its word.

    Raises:
        ArtifactError: A folder is unfinished, edited or holds no labels.
    """
    found: dict[int, Label] = {}
    for folder in folders:
        artifact = open_artifact(folder, stage=LABELS_STAGE, verify=False)
        if dictionary is not None and _strange(artifact.read_json(LABELS_ABOUT), dictionary):
            log.warning("The labels in %s are those of another dictionary: they are left out.", folder)
            continue
        table = artifact.read_table(LABELS)
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


def _strange(about: Any, dictionary: str) -> bool:
    """Whether labels say that they are another dictionary's."""
    labelled = about.get("dictionary") if isinstance(about, dict) else None
    said = labelled.get("sha256") if isinstance(labelled, dict) else None
    return said is not None and said != dictionary
