"""Which rows are held out: by a checksum of their prompts, so that no prompt is on both sides."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any
from zlib import crc32

from palimpsest.errors import CorpusError
from palimpsest.tune.rows import IGNORED, KtoRow, TextRow

LEAST = 2
"""Rows that are needed to train on, and to measure on."""


def hold_out_rows(rows: Sequence[Any], share: float) -> tuple[list[Any], list[Any]]:
    """Rows to train on and rows to measure on, both in their order; the same ones whatever order they come in.

    Rows with one prompt (texts without a prompt: of the same tokens) stay together. Verdicts are held out by label.

    Args:
        rows: Of one kind.
        share: Of the rows that should be held out; the nearest that prompts allow, two rows at least, half at most.

    Raises:
        CorpusError: Verdicts of both labels cannot be on both sides.
    """
    groups: dict[int, Counter[Any]] = {}
    for row in rows:
        groups.setdefault(_checksum(row), Counter())[_label(row)] += 1
    total = sum(groups.values(), Counter[Any]())
    least = LEAST if len(total) == 1 else 1
    wanted = {label: min(max(share * n, least), n // 2) for label, n in total.items()}
    held, chosen = Counter[Any](), set[int]()

    def take(group: int) -> None:
        if all(held[label] + n <= total[label] // 2 for label, n in groups[group].items()):
            held.update(groups[group])
            chosen.add(group)

    order = sorted(groups)
    for group in order:
        after = held + groups[group]
        if sum(abs(after[one] - n) - abs(held[one] - n) for one, n in wanted.items()) < 0:
            take(group)
    # Where prompts have many rows, none may bring the share nearer; the smallest are too many then, but needed.
    for group in sorted(set(order) - chosen, key=lambda one: (groups[one].total(), one)):
        if any(held[label] < least for label in groups[group]):
            take(group)
    if len(total) > 1 and any(not held[label] for label in total):
        raise CorpusError(
            "Verdicts of both labels must be held out and trained on",
            expected="two or more rows of each label, of different prompts",
            found=", ".join(f"{n} rows with label {label}" for label, n in sorted(total.items())),
            fix="Give more rows, or --eval-data",
        )
    sides: tuple[list[Any], list[Any]] = ([], [])
    for row in rows:
        sides[_checksum(row) in chosen].append(row)
    return sides


def _checksum(row: Any) -> int:
    return crc32(" ".join(map(str, _prompt(row))).encode())


def _prompt(row: Any) -> list[int]:
    if not isinstance(row, TextRow):
        return row.prompt
    learned = next((place for place, label in enumerate(row.labels) if label != IGNORED), 0)
    # The first token is never learned: alone it is no prompt.
    return row.input_ids[:learned] if learned > 1 else row.input_ids


def _label(row: Any) -> bool | None:
    return row.label if isinstance(row, KtoRow) else None


__all__ = ["LEAST", "hold_out_rows"]
