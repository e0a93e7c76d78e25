"""A table of several adapters of one base, for JSON, Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from palimpsest.dictionaries.publish import plain_text
from palimpsest.display.notebook import Card, Measured, Rich, Table

SCHEMA = 1


@dataclass(frozen=True)
class Line:
    """One adapter.

    Attributes:
        name: Its folder.
        objective: Held-out objective as in `tune.json`; lower is better.
        heldout_loss: As in `tune.json`, nats per token; None where there is no text.
        kl: KL(base || tuned) on general text, nats per token; None without general text.
        kl_ci: Its interval.
        parameters: Numbers that were trained.
        latents_moved: None for adapters without latents.
        seconds: Of training, or of choosing where nothing is trained.
        lr: Learning rate, None where nothing is trained.
        component: What was trained.
        l1: Weight of the penalty.
        latents_needed: The fewest latents that keep 95 % of the effect; None where that says nothing.
        stopped: Why training ended early.
        note: What else there is to know.
        best: It has the lowest held-out objective.
    """

    name: str
    objective: dict[str, Any]
    heldout_loss: dict[str, Any] | None
    kl: float | None
    kl_ci: list[float | None] | None
    parameters: int
    latents_moved: int | None
    seconds: float
    lr: float | None
    component: str
    l1: float = 0.0
    latents_needed: int | None = None
    stopped: str | None = None
    note: str = ""
    best: bool = False


@dataclass(frozen=True)
class Board(Rich):
    """The content of `leaderboard.json` or `baselines.json`.

    Attributes:
        title: What is compared.
        model: The base.
        kind: Of the objective.
        unit: What it counts.
        rows: Held-out rows.
        lines: One per adapter.
        notes: What a reader should know.
    """

    title: str
    model: str
    kind: str
    unit: str
    rows: int
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def _card(self) -> Card:
        rows = [
            (
                line.name + (" *" if line.best else ""),
                line.objective.get("before"),
                line.objective.get("after"),
                Measured(line.objective.get("difference"), line.objective.get("ci"), digits=4, signed=True),
                Measured(line.kl, line.kl_ci, digits=4),
                line.parameters,
                line.latents_moved,
                line.lr,
                Measured(line.seconds, digits=0),
            )
            for line in self.lines
        ]
        columns = (
            "adapter",
            "before",
            "after",
            "difference",
            "KL from the base",
            "parameters",
            "moved",
            "lr",
            "s",
        )
        facts = {
            "base": self.model,
            "objective": f"{self.kind}: {self.unit}, lower is better",
            "rows": self.rows,
        }
        return Card(self.title, facts=facts, tables=[Table(columns, rows)], notes=self.remarks())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def cells(self) -> tuple[list[str], list[list[str]]]:
        """Names of the columns, and each line as text."""
        with_l1 = any(line.l1 for line in self.lines)
        apart = any(line.heldout_loss is not None and not _same(line) for line in self.lines)
        with_needed = any(line.latents_needed is not None for line in self.lines)
        columns: list[tuple[str, Any]] = [
            ("adapter", lambda line: line.name + (" *" if line.best else "")),
            ("objective", lambda line: _change(line.objective)),
            ("difference", lambda line: _signed(line.objective)),
            *([("held-out loss", lambda line: _loss(line.heldout_loss))] if apart else []),
            ("KL", lambda line: _with_interval(line.kl, line.kl_ci)),
            ("parameters", lambda line: f"{line.parameters:,}"),
            ("moved", lambda line: _count(line.latents_moved)),
            *([("needed", lambda line: _count(line.latents_needed))] if with_needed else []),
            ("lr", lambda line: "–" if line.lr is None else f"{line.lr:g}"),
            *([("l1", lambda line: f"{line.l1:g}")] if with_l1 else []),
            ("seconds", lambda line: f"{line.seconds:.0f}"),
        ]
        return [name for name, _ in columns], [[show(line) for _, show in columns] for line in self.lines]

    def remarks(self) -> list[str]:
        """What stands below the table."""
        own = [
            f"{line.name}: {line.stopped or line.note}" for line in self.lines if line.stopped or line.note
        ]
        return [*own, *self.notes]

    @property
    def markdown(self) -> str:
        """The table with its unit and its notes; names are others' text."""
        names, rows = self.cells()
        lines = [
            f"# {self.title}",
            "",
            f"Base: {plain_text(self.model)}. Objective ({self.kind}): {self.unit}; lower is better, before → after on "
            f"{self.rows} held-out rows, differences with 95 % intervals over rows. KL: KL(base ‖ tuned) on general "
            "text, nats per token.",
            "",
            _row(names),
            _row(["---", *["---:"] * (len(names) - 1)]),
            *(_row([plain_text(row[0]), *row[1:]]) for row in rows),
            "",
            *(f"- {plain_text(remark)}" for remark in self.remarks()),
        ]
        return "\n".join(lines).rstrip() + "\n"


def _same(line: Line) -> bool:
    """Whether the objective is the held-out loss itself."""
    return line.heldout_loss is not None and line.heldout_loss["after"] == line.objective["after"]


def _loss(found: dict[str, Any] | None) -> str:
    return "–" if found is None else _change(found)


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "–" if value is None or value != value else f"{value:.4f}"


def _change(found: dict[str, Any]) -> str:
    return f"{_number(found['before'])} → {_number(found['after'])}"


def _signed(found: dict[str, Any]) -> str:
    difference = found["difference"]
    if difference is None or difference != difference:
        return "–"
    return f"{difference:+.4f}" + _interval(found["ci"])


def _with_interval(value: float | None, ends: Sequence[float | None] | None) -> str:
    return _number(value) + ("" if value is None else _interval(ends))


def _interval(ends: Sequence[float | None] | None) -> str:
    known = [] if ends is None else [end for end in ends if end is not None and end == end]
    return f" [{known[0]:.4f}, {known[1]:.4f}]" if len(known) == 2 else ""


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"
