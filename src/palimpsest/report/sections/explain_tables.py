"""The tables of explained adapters: their latents, what pruning kept, and what two adapters moved."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from palimpsest.report.display import finite
from palimpsest.report.parts import Column, Run, Table
from palimpsest.report.sections.reading import (
    INLINE,
    Row,
    ends,
    items_of,
    mapping,
    rounded,
    rows_of,
    slug,
    words_of,
)


def latent_table(run: Run, table: pa.Table | None) -> Table | None:
    """The latents of the largest effect; 2,000 at most, `total` says how many have any."""
    if table is None or not {"latent", "effect"} <= set(table.column_names):
        return None
    effects = np.nan_to_num(np.asarray(table["effect"].to_numpy(zero_copy_only=False), float))
    alive = int((effects > 0).sum())
    order = np.argsort(-effects, kind="stable")[: min(INLINE, alive)]
    labels = {
        (str(row.get("site")), str(row.get("latent"))): str(row.get("label"))
        for one in rows_of(run.data.get("rankings"))
        for row in rows_of(one.get("latents"))
        if row.get("label")
    }
    rows = []
    for raw in table.take(pa.array(order)).to_pylist():
        row: Row = {key: rounded(value) if isinstance(value, float) else value for key, value in raw.items()}
        rows.append({**row, "label": labels.get((str(raw.get("site")), str(raw["latent"])))})
    if not rows:
        return None
    names = [name for name in table.column_names if "." in name]
    several = len({row.get("site") for row in rows}) > 1
    columns = [
        Column("latent", "latent", "latent"),
        *([Column("site", "site")] if several else []),
        *([Column("label", "label")] if labels else []),
        Column("effect", "effect", "number", "mean length added per token", 4),
        Column("share", "share", "share", "of the whole effect", 2),
        Column("value", "value", "number", "signed", 4),
        Column("norm", "decoder norm", "number", digits=2),
        *(_text_column(name) for name in names),
    ]
    caption = (
        f"The {len(rows):,} latents of the largest effect of {alive:,} with any; latents.parquet holds all."
    )
    return Table("explain-latents", "Latents by effect", columns, rows, caption, total=alive)


def _text_column(name: str) -> Column:
    kind, _, text = name.partition(".")
    if kind == "rate":
        return Column(name, f"fires on {text}", "share", digits=2)
    return Column(name, f"{kind} on {text}", "number", "mean", 3)


def pruned_table(run: Run) -> Table | None:
    """How many latents keep the wanted share, by effect, by value and at random."""
    found = mapping(run.data.get("pruned"))
    low, high = ends(found, "ci")
    rows: list[Row] = [
        {"by": "effect", "n": found.get("n"), "share": rounded(found.get("share")), "lo": low, "hi": high}
    ]
    rows += [
        {
            "by": "size of the value",
            "n": found.get("magnitude_n"),
            "share": rounded(found.get("magnitude_share")),
        },
        {"by": "random orders", "n": found.get("random_n"), "share": rounded(found.get("random_share"))},
    ]
    rows = [row for row in rows if finite(row["n"]) is not None]
    if not rows:
        return None
    keep = finite(found.get("keep"))
    wanted = "the wanted share" if keep is None else f"{keep:.0%}"
    columns = [
        Column("by", "chosen by"),
        Column("n", "latents", "count"),
        Column("share", "keep", "share", "of the effect on other documents", 1, ("lo", "hi")),
    ]
    caption = (
        f"The fewest latents that keep {wanted} on the documents that choose; the share is of the others."
    )
    return Table("explain-pruned", "How many are needed?", columns, rows, caption)


def moved_tables(run: Run) -> list[Table]:
    """Latents that moved in one adapter, in both, or in opposite directions."""
    names = [one.rsplit("/", 1)[-1] or one for one in words_of(run.data.get("adapters"))] or [
        "first",
        "second",
    ]
    first, second = (*names, "second")[:2]
    titles = {
        "only_a": f"Only in {first}",
        "only_b": f"Only in {second}",
        "both": "In both",
        "opposite": "In opposite directions",
    }
    counts, tables = mapping(run.data.get("counts")), []
    for key, moved in mapping(run.data.get("moved")).items():
        rows = [_moved(row) for row in rows_of(moved)]
        if not rows:
            continue
        columns = [
            Column("latent", "latent", "latent"),
            Column("site", "site"),
            Column("label", "label"),
            Column("value_a", f"value, {first}", "number", digits=4),
            Column("value_b", f"value, {second}", "number", digits=4),
            Column("share_a", f"effect, {first}", "share", "of the whole", 2),
            Column("share_b", f"effect, {second}", "share", "of the whole", 2),
        ]
        total = finite(counts.get(key))
        name = slug("explain-moved", key)
        many = None if total is None else max(int(total), len(rows))
        tables.append(Table(name, titles.get(key, key), columns, rows, total=many))
    return tables


def _moved(row: Any) -> Row:
    found: Row = {key: row.get(key) for key in ("latent", "site", "label")}
    for key in ("value", "share"):
        both = [*items_of(row.get(f"{key}s")), None, None]
        found |= {f"{key}_a": rounded(both[0]), f"{key}_b": rounded(both[1])}
    return found
