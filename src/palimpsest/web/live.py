"""What a training run has reported so far: of a dictionary, or of an adapter; while it runs and afterwards."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from palimpsest.artifacts import Artifact, disk
from palimpsest.display.text import finite
from palimpsest.web.plots import Line, Plot, plot, short
from palimpsest.web.runs import Entry

LARGEST_LOG = 16 << 20
LARGEST_TABLE = 64 << 20
MOST_LINES = 6
MOST_MOVERS = 12
FOLLOWED = 5
QUIET_SECONDS = 120
PARTS = "movers"
LOGS = {"tune": "log.jsonl", "dictionary": "training.jsonl", "dictionaries": "training.jsonl"}

DICTIONARY = (
    ("loss", "Loss", False),
    ("fve", "Explained variance (FVE)", False),
    ("l0", "Latents per token (L0)", True),
    ("dead_share", "Share of dead latents", True),
)
ADAPTER = (
    ("loss", "Loss", False),
    ("eval_loss", "Held-out loss", False),
    ("rewards/margins", "Reward margin", True),
    ("reward", "Reward", True),
    ("grad_norm", "Gradient norm", True),
)
"""Keys of the log, what they are called, and whether their axis begins at zero."""


@dataclass(frozen=True)
class Progress:
    """What is known of a training run.

    Attributes:
        state: `running`, `quiet` (nothing was written for a while), `interrupted` or `complete`.
        said: The state in a sentence.
        done: How far it is, 0 to 1; None where the end is not known.
        figures: The last reported numbers.
        plots: Of the reports so far.
        movers: Latents that changed most, the strongest first.
        movers_at: Step of those values; None where there are none.
        several: Last loss, FVE, L0 and share of dead latents of each dictionary, where there are several.
    """

    state: str
    said: str
    done: float | None
    figures: Sequence[tuple[str, str]]
    plots: Sequence[Plot]
    movers: Sequence[Mapping[str, Any]]
    movers_at: int | None
    several: Sequence[tuple[str, Sequence[str]]] = ()


def progress(entry: Entry, artifact: Artifact) -> Progress:
    """Read what a run wrote; a line that is being written is left for the next time."""
    path = entry.path / LOGS[entry.stage]
    rows = read_log(path)
    unit, total = _end(entry.stage, artifact.config)
    last = max((number for row in rows if (number := finite(row.get(unit))) is not None), default=0.0)
    over = entry.status == "complete"
    plots = _dictionary_plots(rows, total, over) if unit == "tokens" else _adapter_plots(rows, total, over)
    movers, at, history = _movers(entry.path)
    if history is not None:
        plots = [*plots, history]
    state, said = _state(entry, path, rows)
    return Progress(
        state,
        said,
        1.0 if over else min(1.0, last / total) if total else None,
        _figures(rows, unit, total),
        plots,
        movers,
        at,
        _several(rows),
    )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Reports, one per line; of a very long log the end."""
    try:
        size = path.stat().st_size
        with path.open("rb") as handle:
            if size > LARGEST_LOG:
                handle.seek(size - LARGEST_LOG)
                handle.readline()
            lines = handle.read(LARGEST_LOG).split(b"\n")
    except OSError:
        return []
    rows = []
    for line in lines[:-1]:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _end(stage: str, config: Mapping[str, Any]) -> tuple[str, float | None]:
    """What is counted, and up to where."""
    part, key = ("schedule", "steps") if stage == "tune" else ("recipe", "tokens")
    inner = config.get(part)
    total = finite(inner.get(key)) if isinstance(inner, Mapping) else None
    return ("step" if stage == "tune" else "tokens"), total if total and total > 0 else None


def _dictionary_plots(rows: list[dict[str, Any]], total: float | None, over: bool) -> list[Plot]:
    names = list(dict.fromkeys(str(row.get("name") or "") for row in rows))[:MOST_LINES]
    sided = len(names) == 1 and any("fve_tuned" in row for row in rows)
    found = []
    for key, title, zero in DICTIONARY:
        if sided and key == "fve":
            lines = [Line(side, _points(rows, "tokens", f"fve_{side}"), side) for side in ("base", "tuned")]
        else:
            lines = [
                Line(
                    name,
                    _points((r for r in rows if str(r.get("name") or "") == name), "tokens", key),
                    f"s{i % 5}",
                )
                for i, name in enumerate(names)
            ]
        found.append(plot(title, lines, "tokens", end=None if over else total, zero=zero))
    return [one for one in found if one is not None]


def _adapter_plots(rows: list[dict[str, Any]], total: float | None, over: bool) -> list[Plot]:
    found = [
        plot(title, [Line("", _points(rows, "step", key))], "steps", end=None if over else total, zero=zero)
        for key, title, zero in ADAPTER
    ]
    return [one for one in found if one is not None][:4]


def _points(rows: Iterable[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    pairs = [(finite(row.get(x)), finite(row.get(y))) for row in rows]
    return [(one, other) for one, other in pairs if one is not None and other is not None]


def _figures(rows: list[dict[str, Any]], unit: str, total: float | None) -> list[tuple[str, str]]:
    if not rows:
        return []
    several = len({str(row.get("name") or "") for row in rows}) > 1
    reached = max((number for row in rows if (number := finite(row.get(unit))) is not None), default=0.0)
    names = {"loss": "loss", "fve": "FVE", "l0": "L0", "dead_share": "dead", "grad_norm": "gradient norm"}
    names |= {"rewards/margins": "margin", "tokens_per_second": "tokens per second"}
    found = [(unit, short(reached) + (f" of {short(total)}" if total else ""))]
    # The last report may be a summary that lacks what the earlier ones have.
    for key, label in names.items():
        if several and key != "tokens_per_second":
            continue  # one of several says little; they stand in a table
        known = [number for row in rows[-20:] if (number := finite(row.get(key))) is not None]
        if known:
            text = f"{100 * known[-1]:.1f}%" if key == "dead_share" else short(float(f"{known[-1]:.4g}"))
            found.append((label, text))
    return found


def _several(rows: list[dict[str, Any]]) -> list[tuple[str, list[str]]]:
    """The last report of each dictionary of several."""
    last = {str(row["name"]): row for row in rows if row.get("name")}
    if len(last) < 2:
        return []

    def said(row: Mapping[str, Any], key: str) -> str:
        number = finite(row.get(key))
        if number is None:
            return "–"
        return f"{100 * number:.1f}%" if key == "dead_share" else short(float(f"{number:.4g}"))

    return [(name, [said(row, key) for key, _, _ in DICTIONARY]) for name, row in last.items()][:20]


def _state(entry: Entry, path: Path, rows: list[dict[str, Any]]) -> tuple[str, str]:
    if entry.status == "complete":
        return "complete", "Finished."
    try:
        age = time.time() - path.stat().st_mtime
    except OSError:
        age = None
    ago = "" if age is None else f"last report {_ago(age)}"
    if not _locked(entry.path):
        return "interrupted", f"Interrupted; its command with --resume goes on{'; ' + ago if ago else ''}."
    if age is None or not rows:
        return "running", "Running; it has not reported yet."
    return ("quiet" if age > QUIET_SECONDS else "running"), f"Running; {ago}."


def _locked(folder: Path) -> bool:
    """Whether the process that wrote the lock lives, as far as this machine can tell; nothing is touched."""
    try:
        text = (folder / disk.LOCK).read_text("utf-8")[:40]
    except (OSError, ValueError):
        return False
    number = text.removeprefix("process ").strip()
    return (
        not number.isascii()
        or not number.isdigit()
        or Path("/proc").is_dir() is False
        or Path("/proc", number).exists()
    )


def _ago(seconds: float) -> str:
    if seconds < 90:
        return f"{max(0, seconds):.0f} s ago"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min ago"
    return f"{seconds / 3600:.0f} h ago" if seconds < 172_800 else f"{seconds / 86_400:.0f} days ago"


def _movers(folder: Path) -> tuple[list[dict[str, Any]], int | None, Plot | None]:
    """Latents of an adapter that moved most by the last entry on disk, and how they got there."""
    parts = sorted((folder / disk.PARTS / PARTS).glob("[0-9]*.parquet"))
    paths = parts[-8:] if parts else [folder / "latents.parquet"]
    table = _read(paths)
    if table is None or table.num_rows == 0:
        return [], None, None
    import numpy as np

    steps = table["step"].to_numpy()
    last = int(steps.max())
    now = table.filter(steps == last)
    values = np.nan_to_num(now["value"].to_numpy(zero_copy_only=False), nan=np.inf)
    best = np.argsort(-np.abs(values), kind="stable")[:MOST_MOVERS]
    rows = now.take(best).to_pylist()
    history = []
    for i, row in enumerate(rows[:FOLLOWED]):
        mine = table.filter(
            (table["latent"].to_numpy() == row["latent"])
            & (np.asarray(table["site"].to_pylist(), object) == row["site"])
        )
        points = list(zip(mine["step"].to_pylist(), mine["value"].to_pylist(), strict=True))
        history.append(Line(f"{row['latent']}", [p for p in points if None not in p], f"s{i}"))
    moving = [one for one in history if len(one.points) > 1]
    return rows, last, plot("Values of the strongest movers", moving, "steps", zero=True)


def _read(paths: Sequence[Path]) -> Any:
    import pyarrow
    import pyarrow.parquet as pq

    found = []
    for path in paths:
        try:
            if path.is_symlink() or path.stat().st_size > LARGEST_TABLE:
                continue
            table = pq.read_table(path)
            if {"step", "site", "latent", "value"} <= set(table.column_names):
                found.append(table)
        except (OSError, pyarrow.ArrowException):
            # It is being replaced; the next look sees it whole.
            continue
    return pyarrow.concat_tables(found) if found else None
