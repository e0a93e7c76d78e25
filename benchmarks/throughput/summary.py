"""From single runs to medians, rooflines and ratios. Plain Python."""

from __future__ import annotations

import math
import statistics
from typing import Any

from throughput.contest import OURS, REQUIRED, REQUIRED_ON_GPU, REQUIRED_SHARE

Row = dict[str, Any]


def peak(result: Row, dtype: str, number: int | None = None) -> float | None:
    """Best GFLOP/s of all shapes, in one round or in the whole run."""
    found = [
        figure
        for row in result["peaks"]
        if row["status"] == "ok" and number in (None, row["round"])
        for figure in row[dtype].values()
    ]
    return max(found, default=None)


def encode_flop(row: Row) -> float:
    """Of the encoder's product, per token: 2 · d · models · latents."""
    return 2.0 * row["d_model"] * row["models"] * row["latents"]


def speeds(result: Row) -> list[Row]:
    """One row per contestant, dtype and size: median, spread, memory; or the reason why not."""
    groups: dict[tuple, list[Row]] = {}
    for row in result["speed"]:
        groups.setdefault((row["latents"], row["name"], row["dtype"]), []).append(row)
    made = []
    for rows in groups.values():
        first = rows[0]
        named = ("name", "library", "family", "models", "dtype", "d_model", "latents")
        entry = {name: first[name] for name in named}
        good = [row for row in rows if row["status"] == "ok"]
        failed = [row for row in rows if row["status"] != "ok"]
        if failed:
            entry |= {"status": failed[0]["status"], "reason": failed[0]["reason"]}
        if good:
            rates = [row["tokens_per_second"] for row in good]
            entry |= {
                "status": entry.get("status", "ok"),
                "median": statistics.median(rates),
                "least": min(rates),
                "most": max(rates),
                "rounds": len(rates),
                "peak_mib": max(row["peak_mib"] for row in good),
                "gpu_mib": max((row["gpu_mib"] or 0.0 for row in good), default=0.0),
                **shares(result, good),
            }
        made.append(entry)
    return made


def shares(result: Row, rows: list[Row]) -> Row:
    """Of the rooflines: against the best peak of the run, and against the peak of the same round."""
    made: Row = {}
    work = encode_flop(rows[0]) / 1e9
    for dtype in ("float32", "bfloat16"):
        best = peak(result, dtype)
        if best is None:
            continue
        made[f"share_{dtype}"] = statistics.median(r["tokens_per_second"] for r in rows) * work / best
        paired = [
            row["tokens_per_second"] * work / there
            for row in rows
            if (there := peak(result, dtype, row["round"]))
        ]
        if paired:
            made[f"paired_{dtype}"] = statistics.median(paired)
    return made


def verdicts(result: Row) -> list[Row]:
    """Ours against the fastest peer of each family and size: in fp32, in bf16, and each at its fastest.

    On a GPU against every peer by itself. A ratio is that of the medians; its spread is over the rounds.
    """
    rows = [row for row in speeds(result) if "median" in row]
    cuda = result["settings"]["device"].startswith("cuda")
    made = []
    for latents in sorted({row["latents"] for row in rows}):
        for family, needed in REQUIRED.items():
            here = [row for row in rows if (row["latents"], row["family"]) == (latents, family)]
            libraries = sorted({row["library"] for row in here} - {OURS})
            for against in [[name] for name in libraries] if cuda else [libraries]:
                for mode in ("float32", "bfloat16", "fastest"):
                    able = [row for row in here if mode in (row["dtype"], "fastest")]
                    ours = _fastest(able, [OURS])
                    peer = _fastest(able, against)
                    if ours and peer:
                        least = REQUIRED_ON_GPU[against[0]] if cuda else needed
                        made.append({"latents": latents, "family": family, "mode": mode, "needed": least})
                        made[-1] |= compare(result, ours, peer, least)
    return made


def _fastest(rows: list[Row], libraries: list[str]) -> Row | None:
    return max((r for r in rows if r["library"] in libraries), key=lambda r: r["median"], default=None)


def compare(result: Row, ours: Row, peer: Row, needed: float) -> Row:
    """The ratio of two medians, and the least and largest ratio within a round."""
    rates: list[dict[int, float]] = [
        {
            row["round"]: row["tokens_per_second"]
            for row in result["speed"]
            if row["status"] == "ok" and all(row[n] == who[n] for n in ("name", "dtype", "latents"))
        }
        for who in (ours, peer)
    ]
    ratios = [rates[0][number] / rates[1][number] for number in rates[0].keys() & rates[1].keys()]
    ratio = ours["median"] / peer["median"]
    return {
        "ours": ours["median"],
        "peer": peer["name"],
        "peer_dtype": peer["dtype"],
        "theirs": peer["median"],
        "ratio": ratio,
        "ratios": [min(ratios, default=ratio), max(ratios, default=ratio)],
        "met": ratio >= needed,
    }


def equal_quality(result: Row) -> list[Row]:
    """FVE at exactly k: ours against the best peer of the family, after equal tokens."""
    rows = [row for row in result["quality"] if row["status"] == "ok"]
    made = []
    for row in rows:
        others = [r for r in rows if r["family"] == row["family"] and r["library"] != OURS]
        if row["library"] == OURS and others:
            best = max(others, key=lambda r: r["fve_at_k"])
            made.append(
                {
                    "family": row["family"],
                    "dtype": row["dtype"],
                    "lr": row["lr"],
                    "ours": row["fve_at_k"],
                    "peer": best["name"],
                    "theirs": best["fve_at_k"],
                    "met": row["fve_at_k"] >= best["fve_at_k"],
                }
            )
    return made


def roofline(result: Row) -> list[Row]:
    """Ours at every size; the requirement is on topk and batch_topk at the largest one."""
    rows = [row for row in speeds(result) if row["library"] == OURS and "share_float32" in row]
    largest = max((row["latents"] for row in rows), default=0)
    dtype, least = REQUIRED_SHARE[result["settings"]["device"].split(":")[0]]
    return [{**row, "met": row[f"share_{dtype}"] >= least if _bound(row, largest) else None} for row in rows]


def _bound(row: Row, largest: int) -> bool:
    return row["latents"] == largest and row["family"] in REQUIRED


def exponent(points: list[list[float]]) -> float:
    """Slope of log cost against log size by least squares: 1 is linear."""
    x = [math.log(size) for size, _ in points]
    y = [math.log(cost) for _, cost in points]
    mx, my = statistics.fmean(x), statistics.fmean(y)
    spread = sum((a - mx) ** 2 for a in x)
    return sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True)) / spread


def missing(result: Row) -> list[Row]:
    """Everybody who has no figure somewhere, once per reason."""
    made: dict[tuple, Row] = {}
    for part in ("peaks", "speed", "quality", "scaling", "profile"):
        for row in result[part]:
            if row["status"] != "ok":
                entry = {"name": row.get("name", "machine"), "part": part, **row}
                made.setdefault((entry["name"], row.get("dtype"), row["reason"]), entry)
    return list(made.values())
