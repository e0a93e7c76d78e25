"""The page's tables: every number with its interval, or with the reason why there is none."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from palimpsest.report.display import Cell, Scale, count, finite, measure, pair_of

Audit = dict[str, Any]
FEW = "no interval: too few documents"


@dataclass(frozen=True)
class Column:
    """A column of a table of measures: its head, what it means, and how to read a row's cell."""

    head: str
    meaning: str
    value: str
    interval: str | None = None
    style: str = "decimal"
    digits: int = 3
    signed: bool = False
    reference: float | None = 0.0
    reason: str = "not recorded"


def dig(record: Any, *keys: str) -> Any:
    """A nested value, or None as soon as one level is null or absent."""
    for key in keys:
        if not isinstance(record, dict):
            return None
        record = record.get(key)
    return record


def task_columns(audit: Audit) -> list[Column]:
    """The measures of a task, in reading order."""
    no_loss = "loss was not measured" if audit.get("loss_measured") is False else "not recorded"
    no_kl = "not recorded" if audit.get("kl_measured") else "run with --kl"
    rate = {"style": "percent", "digits": 1}
    return [
        Column("IDR_rel", "1 − task / general overlap", "idr", "ci", signed=True, **rate),
        Column("IDR_abs", "general − task overlap", "idr_abs", "idr_abs_ci", signed=True, **rate),
        Column(
            "Churn ratio",
            "change on the task / change on general",
            "churn_ratio",
            "churn_ratio_ci",
            digits=2,
            reference=1.0,
        ),
        Column(
            "Δloss",
            "nats per token, tuned − base",
            "delta_loss",
            "delta_loss_ci",
            signed=True,
            reason=no_loss,
        ),
        Column("KL", "nats per token, of the predictions", "kl", "kl_ci", reason=no_kl),
        Column("Drift", "‖Δh‖ / ‖h‖ at the site", "relative_drift", "relative_drift_ci"),
    ]


def dataset_columns(audit: Audit) -> list[Column]:
    """The measures of a corpus that have an interval."""
    columns = {column.head: column for column in task_columns(audit)}
    return [
        Column("R²_Δ", "share of Δh explained", "r2_delta", "r2_delta_ci", digits=2),
        columns["Δloss"],
        columns["KL"],
        columns["Drift"],
        Column(
            "Value change",
            "of latents in both lists",
            "value_change",
            "value_change_ci",
            style="percent",
            digits=1,
        ),
    ]


def column_cells(rows: list[Audit], column: Column) -> list[Cell]:
    """One column's cells on one common scale."""
    ends = [pair_of(row.get(column.interval)) if column.interval else None for row in rows]
    values = [finite(row.get(column.value)) for row in rows]
    marks = [*values, *(end for pair in ends if pair for end in pair)]
    if column.reference is not None:
        marks.append(column.reference)
    scale = Scale.over(marks, zero=column.reference == 0.0)
    cells = []
    for value, interval in zip(values, ends, strict=True):
        cell = measure(
            value,
            interval,
            style=column.style,
            digits=column.digits,
            signed=column.signed,
            scale=scale,
            reference=column.reference,
            reason=column.reason,
        )
        if column.interval and interval is None and not cell.missing:
            cell = Cell(cell.text, FEW, cell.sort)
        cells.append(cell)
    return cells


def _side(interval: tuple[float, float] | None) -> int:
    if interval is None:
        return 0
    return (interval[0] > 0) - (interval[1] < 0)


def reading(task: Audit) -> str:
    """What a task's two main intervals say against zero, and no more than that."""
    idr, loss = pair_of(task.get("ci")), pair_of(task.get("delta_loss_ci"))
    if idr is None:
        latents = "no interval for its latents"
    else:
        latents = {
            1: "latents moved more than on general text",
            -1: "latents moved less than on general text",
        }.get(_side(idr), "latents not clearly different from general text")
    if loss is None:
        return latents
    changed = {1: "loss rose", -1: "loss fell"}.get(_side(loss), "no clear change of loss")
    return f"{latents}; {changed}"


def task_table(audit: Audit) -> Audit:
    """Heads and rows of the table of tasks."""
    tasks, columns = audit.get("tasks") or [], task_columns(audit)
    cells = [column_cells(tasks, column) for column in columns]
    floors = [
        measure(t.get("minimum_detectable_idr"), style="percent", reason="not recorded", digits=1)
        for t in tasks
    ]
    exchange = [measure(t.get("p_exchange"), digits=4, reason="not recorded") for t in tasks]
    heads = [{"head": c.head, "meaning": c.meaning} for c in columns]
    heads.append({"head": "Detectable", "meaning": "smallest visible IDR_rel"})
    heads.append({"head": "p_exchange", "meaning": "do these two sets of text behave differently?"})
    rows = [
        {
            "name": task.get("name"),
            "reading": reading(task),
            "cells": [column[i] for column in [*cells, floors, exchange]],
        }
        for i, task in enumerate(tasks)
    ]
    return {
        "heads": heads,
        "rows": rows,
        "calibrated": any(finite(t.get("calibrated")) is not None for t in tasks),
    }


def overlap_cells(audit: Audit, datasets: Iterable[Audit]) -> list[Cell]:
    """Intersection mean at the primary k: a share of the list, or in legacy mode a count out of k."""
    k, legacy = str(audit.get("k")), audit.get("mode") == "legacy"
    rows = [{"v": dig(d, "intersection_mean", k), "ci": dig(d, "ci", k)} for d in datasets]
    style, digits = ("decimal", 3) if legacy else ("percent", 1)
    return column_cells(rows, Column("", "", "v", "ci", style=style, digits=digits, reference=None))


def _both(record: Audit, field: str, digits: int, reason: str = "not recorded") -> tuple[Cell, Cell]:
    base, tuned = (
        measure(dig(record, field, model), digits=digits, reason=reason) for model in ("base", "tuned")
    )
    return base, tuned


def dataset_table(audit: Audit) -> Audit:
    """Heads and rows of the table of corpora."""
    datasets, columns = audit.get("datasets") or [], dataset_columns(audit)
    cells = [column_cells(datasets, column) for column in columns]
    no_loss = "loss was not measured" if audit.get("loss_measured") is False else "not recorded"
    rows = []
    for i, (data, overlap) in enumerate(zip(datasets, overlap_cells(audit, datasets), strict=True)):
        left_out = [
            (data.get("skipped_tokens"), "tokens on which nothing fires"),
            (data.get("bad_rows"), "bad rows"),
        ]
        rows.append(
            {
                "name": data.get("name"),
                "role": data.get("role"),
                "source": data.get("source"),
                "blind": bool(data.get("blind")),
                "documents": count(data.get("documents")),
                "tokens": count(data.get("tokens")),
                "left_out": ", ".join(f"{count(n)} {what}" for n, what in left_out if n),
                "overlap": overlap,
                "fve": _both(data, "fve", 3),
                "l0": _both(data, "l0", 1),
                "loss": _both(data, "loss", 3, no_loss),
                "cells": [column[i] for column in cells],
            }
        )
    return {"heads": [{"head": c.head, "meaning": c.meaning} for c in columns], "rows": rows}


def curve_table(audit: Audit) -> Audit | None:
    """The intersection means at a few k, for readers without the chart."""
    datasets, ks = audit.get("datasets") or [], [int(k) for k in audit.get("ks") or []]
    wanted = [k for k in (1, 2, 3, 5, 8, 10, 16, 20, 32, 64, 128) if k in ks]
    if not wanted or not datasets:
        return None
    legacy = audit.get("mode") == "legacy"
    rows = []
    for data in datasets:
        cells = [
            measure(
                dig(data, "intersection_mean", str(k)),
                dig(data, "ci", str(k)),
                style="decimal" if legacy else "percent",
                digits=3 if legacy else 1,
            )
            for k in wanted
        ]
        rows.append({"name": data.get("name"), "role": data.get("role"), "cells": cells})
    return {"ks": wanted, "rows": rows}


CONTROL_NAMES = {
    "random": "random dictionary",
    "pca": "PCA basis",
    "neurons": "neuron basis",
}


def control_table(audit: Audit) -> Audit | None:
    """The same measures through other bases beside the dictionary: what the dictionary adds."""
    controls = audit.get("controls") or []
    if not controls:
        return None
    k, legacy = str(audit.get("k")), audit.get("mode") == "legacy"
    style, digits = ("decimal", 3) if legacy else ("percent", 1)
    sources = [audit, *controls]
    heads = ["this dictionary", *(CONTROL_NAMES.get(c.get("name"), c.get("name")) for c in controls)]
    groups = []
    overlaps, ratios = [], []
    for data in audit.get("datasets") or []:
        found = [_named(source.get("datasets"), data.get("name")) for source in sources]
        overlaps.append(
            {
                "name": data.get("name"),
                "cells": [
                    measure(dig(d, "intersection_mean", k), dig(d, "ci", k), style=style, digits=digits)
                    for d in found
                ],
            }
        )
        ratios.append(
            {"name": data.get("name"), "cells": [measure(dig(d, "r2_delta"), digits=2) for d in found]}
        )
    idrs = []
    for task in audit.get("tasks") or []:
        found = [_named(source.get("tasks"), task.get("name")) for source in sources]
        cells = [measure(dig(t, "idr"), dig(t, "ci"), style="percent", digits=1, signed=True) for t in found]
        idrs.append({"name": task.get("name"), "cells": cells})
    for title, rows in (
        (f"Overlap at k = {k}", overlaps),
        ("IDR_rel", idrs),
        ("R²_Δ (share of Δh explained)", ratios),
    ):
        if rows:
            groups.append({"title": title, "rows": rows})
    return {"heads": heads, "groups": groups}


def _named(items: Any, name: Any) -> Audit:
    return next((item for item in items or [] if item.get("name") == name), {})


def layer_table(audit: Audit) -> list[Audit]:
    """Weight change per layer as cells."""
    return [
        {
            "layer": "rest of the model" if item.get("layer") is None else f"layer {item['layer']}",
            "relative": measure(item.get("relative"), style="percent", digits=2),
            "delta": measure(item.get("norm_delta"), digits=2),
            "base": measure(item.get("norm_base"), digits=1),
        }
        for item in audit.get("layers") or []
    ]
