"""Reading results that may be incomplete: what is absent, null or of another kind is None, never an error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from palimpsest.errors import ArtifactError
from palimpsest.report.display import NOT_MEASURED, count, decimal, finite, pair_of, percent
from palimpsest.report.parts import Prose, Run

if TYPE_CHECKING:
    import pyarrow as pa

Row = dict[str, Any]
INLINE = 2000
"""Rows of a table of latents that stand on the page."""
_LONGEST_LINE = 1_000_000
_LINES = 100_000


def dig(record: Any, *keys: str) -> Any:
    """A nested value, or None as soon as one level is no mapping."""
    for key in keys:
        if not isinstance(record, Mapping):
            return None
        record = record.get(key)
    return record


def mapping(value: Any) -> Mapping[str, Any]:
    """The value where it is a mapping, else an empty one."""
    return value if isinstance(value, Mapping) else {}


def rows_of(value: Any) -> list[Mapping[str, Any]]:
    """The mappings of a list; anything else gives none."""
    return [one for one in value if isinstance(one, Mapping)] if isinstance(value, (list, tuple)) else []


def items_of(value: Any) -> list[Any]:
    """The entries of a list; anything else has none."""
    return list(value) if isinstance(value, (list, tuple)) else []


def words_of(value: Any) -> list[str]:
    """The texts of a list."""
    return [str(one) for one in value if one is not None] if isinstance(value, (list, tuple)) else []


def figure(record: Any, *keys: str) -> float | None:
    """A nested finite number, or None."""
    return finite(dig(record, *keys))


def rounded(value: Any, digits: int = 4) -> float | None:
    """A number with few digits, so that a chart's data stay small."""
    number = finite(value)
    return None if number is None else float(f"{number:.{digits}g}")


def ends(record: Any, *keys: str) -> tuple[float | None, float | None]:
    """The rounded ends of a nested interval; two None without one."""
    pair = pair_of(dig(record, *keys))
    return (None, None) if pair is None else (rounded(pair[0]), rounded(pair[1]))


def share_text(value: Any, interval: Any = None, digits: int = 1) -> str:
    """A share with its interval, in percent."""
    number, pair = finite(value), pair_of(interval)
    if number is None:
        return NOT_MEASURED
    beside = "" if pair is None else f" [{percent(pair[0], digits)}, {percent(pair[1], digits)}]"
    return percent(number, digits) + beside


def number_text(value: Any, interval: Any = None, digits: int = 3, signed: bool = False) -> str:
    """A number with its interval."""
    number, pair = finite(value), pair_of(interval)
    if number is None:
        return NOT_MEASURED
    beside = (
        "" if pair is None else f" [{decimal(pair[0], digits, signed)}, {decimal(pair[1], digits, signed)}]"
    )
    return decimal(number, digits, signed) + beside


def count_text(value: Any) -> str:
    """A whole number, or that it was not measured."""
    return count(value)


def slug(*parts: object) -> str:
    """An identifier of letters, digits and dashes."""
    text = "-".join(str(part) for part in parts)
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "part"


def table_of(run: Run, name: Any) -> pa.Table | None:
    """A Parquet file of the run; None where there is none that can be read."""
    try:
        return run.artifact.read_table(str(name)) if name else None
    except ArtifactError:
        return None


def columns_of(table: pa.Table | None, names: Iterable[str]) -> dict[str, list[Any]]:
    """Some columns as lists; those that are absent are lists of None."""
    if table is None:
        return {name: [] for name in names}
    return {
        name: table[name].to_pylist() if name in table.column_names else [None] * table.num_rows
        for name in names
    }


def json_lines(run: Run, name: str) -> list[Row]:
    """The objects of a JSONL file; lines that are none are passed over."""
    try:
        path = run.artifact.file(name)
        with path.open(encoding="utf-8", errors="replace") as file:
            lines = [line for _, line in zip(range(_LINES), file, strict=False)]
    except (ArtifactError, OSError):
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line) if len(line) < _LONGEST_LINE else None
        except ValueError:
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def notes(run: Run) -> list[Prose]:
    """The notes that a run left for its reader."""
    listed = words_of(run.data.get("notes"))
    return [Prose(listed, "note")] if listed else []


def summary(run: Run) -> str:
    """The run's own sentence."""
    return str(run.data.get("summary") or "").strip()


def in_full(run: Run) -> list[Prose]:
    """The run's own summary, for below a shorter sentence."""
    text = summary(run)
    return [Prose([text], "folded")] if text else []


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Places for labels: as near to the values as they can be with at least `gap` between two."""
    order = sorted(range(len(values)), key=lambda place: values[place])
    placed = [float(value) for value in values]
    for _ in range(60):
        moved = False
        for low, high in zip(order, order[1:], strict=False):
            missing = gap - (placed[high] - placed[low])
            if missing > 1e-9 * max(gap, 1.0):
                placed[low] -= missing / 2
                placed[high] += missing / 2
                moved = True
        if not moved:
            break
    return placed
