"""The latents behind each corpus' change: the strongest contributions, with example tokens."""

from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from palimpsest.report.display import (
    Cell,
    Scale,
    count,
    decimal,
    finite,
    measure,
    missing,
    percent,
    visible,
    visible_tail,
    visible_token,
)

LIST_LENGTH = -1
"""The row that stands for lists of different length rather than for a latent."""
SHOWN = 50
_ALL_SHOWN = 600
_CONTEXT = 72


@dataclass(frozen=True)
class Example:
    """One token with its surroundings, and how strongly the latent fired there in both models."""

    event: str
    before: str
    token: str
    after: str
    base: str
    tuned: str
    document: str


@dataclass(frozen=True)
class LatentRow:
    """One latent of one corpus, ready to print; bar widths are percentages of the strongest row."""

    latent: int
    contribution: Cell
    bar_left: float
    bar_entered: float
    entered: Cell
    left: Cell
    rate: tuple[Cell, Cell]
    mean: tuple[Cell, Cell]
    change: Cell
    q: Cell
    examples: list[Example]


@dataclass(frozen=True)
class LatentPanel:
    """All that the report shows of one corpus' latents."""

    name: str
    role: str
    rows: list[LatentRow]
    total: int
    covered: str
    list_length: str
    selected: int


def _examples(raw: Any, limit: int) -> list[Example]:
    found = []
    for item in (raw or [])[:limit]:
        base, tuned = finite(item.get("base")), finite(item.get("tuned"))
        found.append(
            Example(
                event="entered" if item.get("event") == "entered" else "left",
                before=visible_tail(item.get("before") or "", _CONTEXT),
                token=visible_token(item.get("token") or ""),
                after=visible(item.get("after") or "", _CONTEXT),
                base="—" if base is None else decimal(base, 2),
                tuned="—" if tuned is None else decimal(tuned, 2),
                document="—" if item.get("document") is None else count(item["document"]),
            )
        )
    return found


def _row(raw: dict[str, Any], total: float, widest: float, changes: Scale, examples: int) -> LatentRow:
    contribution = finite(raw["contribution"])
    share = "" if contribution is None or not total else f"{percent(contribution / total)} of all"
    selected = bool(raw.get("selected"))
    unselected = "" if selected else "not selected"

    def bar(name: str) -> float:
        return round(100 * max(finite(raw.get(name)) or 0.0, 0.0) / widest, 2) if widest else 0.0

    q = finite(raw.get("q"))
    return LatentRow(
        latent=int(raw["latent"]),
        contribution=missing()
        if contribution is None
        else Cell(decimal(contribution, 4), share, contribution),
        bar_left=bar("contribution_left"),
        bar_entered=bar("contribution_entered"),
        entered=measure(raw.get("entered"), style="percent", digits=2),
        left=measure(raw.get("left"), style="percent", digits=2),
        rate=(
            measure(raw.get("rate_base"), style="percent", digits=2),
            measure(raw.get("rate_tuned"), style="percent", digits=2),
        ),
        mean=(measure(raw.get("mean_base"), digits=3), measure(raw.get("mean_tuned"), digits=3)),
        change=measure(
            raw.get("change"),
            [raw.get("change_lo"), raw.get("change_hi")],
            signed=True,
            scale=changes,
            reason=unselected,
        ),
        q=missing(unselected) if q is None else Cell("< 0.001" if q < 0.001 else decimal(q), "", q),
        examples=_examples(raw.get("examples"), examples),
    )


def _panel(table: pa.Table, name: str, role: str, shown: int, examples: int) -> LatentPanel:
    mine = table.filter(pc.field("dataset") == name)
    latents = mine.filter(pc.field("latent") != LIST_LENGTH).sort_by(
        [("contribution", "descending"), ("latent", "ascending")]
    )
    total = _total(mine)
    lengths = _total(mine.filter(pc.field("latent") == LIST_LENGTH))
    top = sorted(
        latents.slice(0, shown).to_pylist(),
        key=lambda raw: -(finite(raw["contribution"]) or 0.0),
    )
    widest = max((finite(raw["contribution"]) or 0.0 for raw in top), default=0.0)
    ends = [finite(raw.get(key)) for raw in top for key in ("change", "change_lo", "change_hi")]
    changes = Scale.over(ends)
    held = sum(finite(raw["contribution"]) or 0.0 for raw in top)
    selected = latents["selected"].to_pylist() if "selected" in latents.column_names else []
    return LatentPanel(
        name=visible(name, 48),
        role=role,
        rows=[_row(raw, total, widest, changes, examples) for raw in top],
        total=latents.num_rows,
        covered=percent(held / total) if total else "",
        list_length="" if not lengths or not total else percent(lengths / total),
        selected=sum(map(bool, selected)),
    )


def _total(rows: pa.Table) -> float:
    return sum(finite(value) or 0.0 for value in rows["contribution"].to_pylist())


def latent_panels(latents: pa.Table, datasets: list[tuple[str, str]]) -> list[LatentPanel]:
    """One panel per corpus that has latents, tasks first.

    Args:
        latents: The table of `latents.parquet`.
        datasets: Name and role of each corpus, in the audit's order.
    """
    if latents.num_rows == 0:
        return []
    shown = max(5, min(SHOWN, _ALL_SHOWN // max(len(datasets), 1)))
    examples = 5 if len(datasets) <= 12 else 3
    ordered = sorted(datasets, key=lambda item: item[1] == "general")
    panels = [_panel(latents, name, role, shown, examples) for name, role in ordered]
    return [panel for panel in panels if panel.rows]
