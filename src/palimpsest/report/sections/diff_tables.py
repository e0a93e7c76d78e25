"""The tables of a diff: its latents, every patched set, the null diffs, and how stable latents are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from palimpsest.report.display import finite, pair_of
from palimpsest.report.parts import Column, Run, Table
from palimpsest.report.sections.reading import INLINE, Row, dig, figure, mapping, rounded, rows_of

PLACES = {"all": "all predictions", "first": "first answer tokens"}
ORDERS = ("causal_share", "activation_change", "rate")

_PLAIN = (
    Column("latent", "latent", "latent"),
    Column("label", "label"),
    Column("causal_share", "causal share", "share", "of the KL gap, by gradients", 2),
    Column("class", "class"),
    Column("verdict", "verdict", meaning="of Latent Scaling"),
    Column("delta_norm", "Δnorm", "number", "1: only the tuned model writes it"),
    Column("nu_error", "ν error", "number", "near 1: the base's error holds it", 2, ("nu_error_lo", "nu_error_hi")),
    Column(
        "nu_reconstruction",
        "ν reconstruction",
        "number",
        "near 1: the base's latents write it",
        2,
        ("nu_reconstruction_lo", "nu_reconstruction_hi"),
    ),
    Column("nu_centred", "ν centred", "number", "base / tuned activation", 2, ("nu_centred_lo", "nu_centred_hi")),
    Column("rate_base", "fires, base", "share", digits=2, side="base"),
    Column("rate_tuned", "fires, tuned", "share", digits=2, side="tuned"),
    Column("mean_base", "mean, base", "number", "where it fires", 2, side="base"),
    Column("mean_tuned", "mean, tuned", "number", "where it fires", 2, side="tuned"),
    Column("rate", "fires", "share", "joint code", 2),
    Column("activation_change", "change", "number", "per token, moves the base", 4),
    Column("decoder_cosine", "cosine", "number", "of the two decoder rows", 2),
    Column("stability", "stability", "number", "cosine with its closest twin", 2),
    Column("template_share", "template", "share", "of its activation", 0),
)  # fmt: skip


def latent_table(run: Run, found: pa.Table | None) -> Table | None:
    """The latents of a diff, those of the largest attributed share first; 2,000 at most, `total` says how many."""
    if found is None or "latent" not in found.column_names or found.num_rows == 0:
        return None
    table: pa.Table = _labelled(run, found)
    key = next((name for name in ORDERS if name in table.column_names and _varies(table, name)), "latent")
    columns = [one for one in _columns(table) if one.key in table.column_names and _any(table, one.key)]
    columns = columns if any(one.key == "latent" for one in columns) else [_PLAIN[0], *columns]
    kept = _strongest(table, key).select(_keys(columns, table))
    rows = [{name: _plain(value) for name, value in row.items()} for row in kept.to_pylist()]
    return Table(
        "diff-latents",
        "Latents",
        columns,
        rows,
        caption=_caption(key, len(rows), table.num_rows),
        sort=None if key == "causal_share" else (key, key != "latent"),
        total=table.num_rows,
    )


def _caption(key: str, shown: int, total: int) -> str:
    order = {
        "causal_share": "by the size of the share of the KL gap that gradients attribute to them",
        "activation_change": "by how much they move the base",
        "rate": "by how often they fire",
    }.get(key, "by number")
    which = f"The first {shown:,} of {total:,} latents" if shown < total else f"All {total:,} latents"
    return f"{which}, {order}. The run's latents.parquet holds every column of all of them."


def _columns(table: pa.Table) -> list[Column]:
    corpora = [name for name in table.column_names if name.startswith("rate[") and name.endswith("]")]
    behaviours = [name for name in table.column_names if name.startswith("behaviour[")]
    rates = [Column(name, f"fires on {name[5:-1]}", "share", digits=2) for name in corpora]
    shares = [Column(name, name[10:-1], "share", "of this behaviour", 2) for name in behaviours]
    return [*_PLAIN[:3], *shares, *_PLAIN[3:], *rates]


def _keys(columns: Sequence[Column], table: pa.Table) -> list[str]:
    ends = [key for one in columns for key in one.interval or ()]
    return [key for key in dict.fromkeys([*(one.key for one in columns), *ends]) if key in table.column_names]


def _labelled(run: Run, table: pa.Table) -> pa.Table:
    named = [(row.get("latent"), row.get("label")) for row in rows_of(run.data.get("ranked"))]
    labels = {int(one): text for one, text in named if isinstance(one, int) and isinstance(text, str)}
    if not labels or "label" in table.column_names:
        return table
    texts = pa.array([labels.get(one) for one in table["latent"].to_pylist()], pa.string())
    return table.append_column("label", texts)


def _floats(table: pa.Table, name: str) -> np.ndarray:
    try:
        return np.asarray(table[name].to_numpy(zero_copy_only=False), float)
    except (TypeError, ValueError):
        return np.full(table.num_rows, np.nan)


def _varies(table: pa.Table, name: str) -> bool:
    values = _floats(table, name)
    return bool(np.any(np.isfinite(values) & (values != 0)))


def _any(table: pa.Table, name: str) -> bool:
    column = table[name]
    if pa.types.is_floating(column.type):
        return bool(np.isfinite(_floats(table, name)).any())
    return column.null_count < table.num_rows


def _strongest(table: pa.Table, key: str) -> pa.Table:
    values = _floats(table, key)
    strength = -np.abs(np.nan_to_num(values, nan=0.0)) if key != "latent" else values
    return table.take(pa.array(np.argsort(strength, kind="stable")[:INLINE]))


def _plain(value: Any) -> Any:
    return rounded(value) if isinstance(value, float) else value


def set_table(run: Run) -> Table | None:
    """Every set that was patched in or taken out."""
    rows = []
    for direction, key in (("put in", "patching"), ("taken out", "removal")):
        for one in rows_of(run.data.get(key)):
            pair = pair_of(one.get("ci"))
            rows.append(
                {
                    "set": one.get("set"),
                    "direction": direction,
                    "positions": PLACES.get(str(one.get("positions")), one.get("positions")),
                    "size": one.get("size"),
                    "share": rounded(one.get("share")),
                    "lo": pair and rounded(pair[0]),
                    "hi": pair and rounded(pair[1]),
                    "kl": rounded(one.get("kl")),
                    "seed": one.get("seed"),
                }
            )
    columns = [
        Column("set", "set"),
        Column("share", "share of the KL", "share", "recovered, or lost without it", 1, ("lo", "hi")),
        Column("size", "latents", "count"),
        Column("direction", "direction", meaning="into the base, or out of the tuned model"),
        Column("positions", "measured at"),
        Column("kl", "KL", "number", "nats per prediction", 4),
        Column("seed", "seed", "count"),
    ]
    caption = (
        "best and worst halve the strongest latents by a ranking; random and directions are their controls."
    )
    name = "diff-sets"
    return Table(name, "Every set of latents", columns, rows, caption) if rows else None


def null_table(run: Run) -> Table | None:
    """The null diffs beside this one: what the same recipe finds where nothing new was learnt."""
    own: Row = {"name": "this diff", "raw": None, "surviving": None, "undetermined": None}
    own |= {key: dig(run.data, "tuned_only", key) for key in ("raw", "surviving", "undetermined")}
    own |= {"tuned": dig(run.data, "pair", "tuned"), "tokens": run.data.get("tokens")}
    nulls = [
        {
            "name": "null",
            **{key: one.get(key) for key in ("tuned", "tokens", "raw", "surviving", "undetermined")},
        }
        for one in rows_of(run.data.get("nulls"))
    ]
    if not nulls:
        return None
    columns = [
        Column("name", ""),
        Column("tuned", "tuned model"),
        Column("raw", "look tuned-only", "count"),
        Column("surviving", "survive", "count", "tuned-specific"),
        Column("undetermined", "undetermined", "count"),
        Column("tokens", "tokens", "count"),
    ]
    caption = "A count means something only beside what a pair without anything new gives."
    return Table("diff-nulls", "Beside null diffs", columns, [own, *nulls], caption)


def check_table(run: Run) -> Table | None:
    """Sensitivity of the rule, stability against twins, and the two artefacts of crosscoders, as one list."""
    data = run.data
    rows: list[Row] = []

    def add(name: str, value: float | None, meaning: str, kind: str) -> None:
        if value is not None:
            rows.append({"check": name, kind: rounded(value), "meaning": meaning})

    seen = mapping(dig(data, "tuned_only", "sensitivity"))
    add(
        "the rule passes",
        finite(seen.get("tuned-specific")),
        "of latents that were taken out of the base",
        "share",
    )
    add("and leaves open", finite(seen.get("undetermined")), "of them", "share")
    for twin in rows_of(data.get("stability")):
        for key, name in (("alive", "latents"), ("tuned_only", "tuned-only latents")):
            share, cosine = figure(twin, key, "above_0.7"), figure(twin, key, "mean")
            add(f"{name} found again", share, "by another seed, with cosine above 0.7", "share")
            add(f"{name}, mean cosine", cosine, "with the closest latent of another seed", "number")
    artefacts = mapping(data.get("artefacts"))
    texts = {
        "shrinkage": "tuned-only latents whose ν of the error is near 1",
        "decoupling": "tuned-only latents whose ν of the reconstruction is near 1",
        "split_pairs": "pairs of a tuned-only and a base-only latent along one direction",
    }
    for key, meaning in texts.items():
        add(key.replace("_", " "), finite(artefacts.get(key)), meaning, "number")
    if not rows:
        return None
    columns = [
        Column("check", "check"),
        Column("share", "share", "share", digits=0),
        Column("number", "number", "number", digits=2),
        Column("meaning", "meaning"),
    ]
    return Table("diff-checks", "Can the count be trusted?", columns, rows)
