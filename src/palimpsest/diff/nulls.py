"""What finished diffs of null pairs found: pairs whose tuned model holds nothing new."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palimpsest.artifacts import open_artifact
from palimpsest.diff.result import Diff


def null_rows(paths: Sequence[str]) -> list[dict[str, Any]]:
    """One row per null diff: `path`, `tuned`, `method`, `latents`, `raw`, `surviving`, `undetermined`.

    Raises:
        ArtifactError: A folder is no finished diff.
    """
    rows = []
    for path in paths:
        found = Diff.from_dict(open_artifact(path, stage="diff").read_json("diff.json"))
        row = {"path": path, "tuned": found.pair["tuned"], "method": found.method}
        row |= {
            "latents": found.dictionary.get("n_latents"),
            "activation": found.dictionary.get("activation"),
        }
        rows.append(row | {key: found.tuned_only[key] for key in ("raw", "surviving", "undetermined")})
    return rows


def null_count(rows: Sequence[dict[str, Any]], key: str) -> float | None:
    """Mean number of latents over the null diffs; None without any."""
    return sum(row[key] for row in rows) / len(rows) if rows else None
