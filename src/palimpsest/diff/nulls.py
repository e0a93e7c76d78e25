"""What finished diffs of null pairs found: pairs whose tuned model holds nothing new."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from palimpsest.artifacts import open_artifact
from palimpsest.diff.result import Diff
from palimpsest.errors import ConfigError

COMPARED = ("n_latents", "activation", "k")
"""Figures of a dictionary that a null should share."""


def null_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """One row per null diff: what it is of, and `raw`, `surviving`, `undetermined`.

    Raises:
        ArtifactError: A folder is no finished diff.
    """
    rows = []
    for path in paths:
        artifact = open_artifact(path, stage="diff")
        found = Diff.from_dict(artifact.read_json("diff.json"))
        row = {"path": path, "base": found.pair["base"], "tuned": found.pair["tuned"], "method": found.method}
        row |= {"site": found.site, "tokens": found.tokens, "thresholds": found.thresholds}
        row |= {"weights": {side: artifact.inputs.get(side, {}).get("sha256") for side in ("base", "tuned")}}
        row |= {key: found.dictionary.get(key) for key in COMPARED}
        row["trained_on"] = (found.dictionary.get("metadata") or {}).get("tokens")
        rows.append(row | {key: found.tuned_only[key] for key in ("raw", "surviving", "undetermined")})
    return rows


def check_nulls(
    rows: Sequence[dict[str, Any]], method: str, site: str, weights: dict[str, str | None]
) -> None:
    """Refuse diffs that say nothing of this one.

    Args:
        rows: Of `null_rows`.
        method: Of this diff.
        site: Of this diff.
        weights: Fingerprints of its `base` and `tuned`.

    Raises:
        ConfigError: Another method, site or base, or a diff of this very pair.
    """
    folders = [str(Path(row["path"]).resolve()) for row in rows]
    if len(set(folders)) < len(folders):
        raise ConfigError("A null is given twice", expected="different folders", found=", ".join(folders))
    for row in rows:
        name, other = row["path"], row["weights"]
        for what, mine, theirs in (("method", method, row["method"]), ("site", site, row["site"])):
            if mine != theirs:
                raise ConfigError(f"The null {name} is of another {what}", expected=mine, found=theirs)
        if other["base"] is not None and other["base"] != weights["base"]:
            raise ConfigError(
                f"The null {name} has another base", expected="a diff from the same base", found=row["base"]
            )
        if other["tuned"] is not None and other["tuned"] == weights["tuned"]:
            raise ConfigError(
                f"The null {name} is a diff of this very pair",
                expected="a pair in which nothing new was learnt",
                fix="Make one with palimpsest diff null, or fine-tune the base on text that it knows",
            )


def null_notes(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> list[str]:
    """Where a null was made otherwise than this diff.

    Args:
        rows: Of `null_rows`.
        found: The same figures of this diff.
    """
    notes = []
    for row in rows:
        other = [key for key in (*COMPARED, "trained_on", "tokens", "thresholds") if row[key] != found[key]]
        if other:
            said = ", ".join(f"{key} {row[key]} instead of {found[key]}" for key in other)
            notes.append(f"The null {row['path']} differs in {said}.")
    return notes


def null_count(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean number of latents over the null diffs; None without any."""
    return sum(row[key] for row in rows) / len(rows) if rows else None
