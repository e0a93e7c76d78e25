"""The result as Markdown tables and as a plot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from throughput import summary
from throughput.contest import OURS, REQUIRED_SHARE

Row = dict[str, Any]

SHORT = {"float32": "fp32", "bfloat16": "bf16", "fastest": "fastest"}

FAIRNESS = """\
- Every contestant gets the same rows in the same order, the same batch, k, latents, threads and schedule (linear
  warm-up, constant, linear decay); no one shuffles, reads from disk or runs a language model.
- Peers get what their packages offer and more: activations in the scale that their own pipelines bring them to, fused
  Adam for eai-sparsify and the dense recipe, a threshold that starts early enough for a short run, and for
  topk, batch_topk and crosscoder the best learning rate of a small sweep (`--sweep`), while ours is the default.
- No one pays for AuxK in the timed runs: latents count as dead after 10M tokens (sae-lens: 1000 steps).
- bf16 is autocast for peers and the encoder's product for ours.
- eai-sparsify's step is written around its `SparseCoder`, because its trainer needs a language model; its default
  optimiser (signum) is replaced by Adam, which everybody else has.
- The crosscoder's peer is the published recipe, dense, not the authors' code.
- relu and jumprelu have no fixed L0: their speed depends on how many latents fire, which differs between libraries.
"""


def table(header: list[str], rows: list[list[Any]]) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return [*lines, *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows), ""]


def yes(met: bool | None) -> str:
    return "" if met is None else "yes" if met else "**no**"


def rate(lr: float | None) -> str:
    return "default" if lr is None else f"{lr:g}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def markdown(result: Row) -> str:
    """All tables of a run, with the machine, the versions and what is missing."""
    lines = ["# Training throughput", "", *about(result)]
    if result["speed"]:
        lines += required(result) + speed(result) + rooflines(result)
    lines += quality(result) + growth(result) + profiles(result) + absent(result)
    return "\n".join([*lines, "## Fairness", "", FAIRNESS, ""])


def about(result: Row) -> list[str]:
    machine, chosen = result["machine"], result["settings"]
    versions = ", ".join(
        f"{found['package']} {found['version']}"
        for found in result.get("versions", {}).values()
        if found.get("version")
    )
    peaks = ", ".join(
        f"{SHORT[dtype]} {best:,.0f} GFLOP/s"
        for dtype in ("float32", "bfloat16")
        if (best := summary.peak(result, dtype))
    )
    lines = [
        f"{machine['cpu']}, {machine['threads']} threads of {machine['cores']} cores, {machine['memory_gib']} GiB; "
        f"{machine.get('gpu') or 'no GPU'}; {machine['system']}; "
        f"{machine['date']}; load {machine['load_at_start']} at start.",
        f"Packages: {versions}.",
        f"Batch {chosen['batch']:,}, k {chosen['k']}, {chosen['rows']:,} rows in memory; "
        "medians of interleaved rounds. "
        f"Matrix products at best: {peaks or 'not measured'}. The run took {result.get('seconds', 0):.0f} s.",
    ]
    if result["quick"]:
        lines.append("**A smoke run at toy sizes: none of these figures means anything.**")
    return [*lines, ""]


def required(result: Row) -> list[str]:
    rows = [
        [
            f"{v['latents']:,}",
            v["family"],
            SHORT[v["mode"]],
            f"{v['ours']:,.0f}",
            f"{v['peer']} ({SHORT[v['peer_dtype']]})",
            f"{v['theirs']:,.0f}",
            f"{v['ratio']:.1f}× ({v['ratios'][0]:.1f}–{v['ratios'][1]:.1f})",
            f"{v['needed']:.0f}×",
            yes(v["met"]),
        ]
        for v in summary.verdicts(result)
    ]
    header = [
        "latents",
        "family",
        "dtype",
        "ours",
        "fastest peer",
        "tokens/s",
        "ratio (rounds)",
        "required",
        "met",
    ]
    lines = ["## Ours against the fastest peer", "", *table(header, rows)]
    rows = [
        [
            q["family"],
            SHORT[q["dtype"]],
            rate(q["lr"]),
            f"{q['ours']:.4f}",
            q["peer"],
            f"{q['theirs']:.4f}",
            yes(q["met"]),
        ]
        for q in summary.equal_quality(result)
    ]
    header = ["family", "ours in", "lr", "FVE at k", "best peer", "FVE at k", "equal or better"]
    return [*lines, "At equal tokens and exactly k latents per token:", "", *table(header, rows)]


def speed(result: Row) -> list[str]:
    lines = []
    found = summary.speeds(result)
    gpu = any(row.get("gpu_mib") for row in found)
    for latents in sorted({row["latents"] for row in found}):
        here = [row for row in found if row["latents"] == latents]
        rows = []
        for row in sorted(here, key=lambda r: (r["family"], -r.get("median", 0))):
            if "median" not in row:
                rows.append([row["name"], SHORT[row["dtype"]], "–", row["status"], "", ""])
                continue
            memory = row["gpu_mib"] if gpu else row["peak_mib"]
            spread = f"{row['least']:,.0f}–{row['most']:,.0f}"
            rows.append(
                [
                    row["name"],
                    SHORT[row["dtype"]],
                    f"{row['median']:,.0f}",
                    spread,
                    row["rounds"],
                    f"{memory:,.0f}",
                ]
            )
        header = [
            "contestant",
            "dtype",
            "tokens/s",
            "spread",
            "rounds",
            "peak GPU MiB" if gpu else "peak MiB",
        ]
        lines += [f"## {latents:,} latents, width {here[0]['d_model']}", "", *table(header, rows)]
    return lines


def rooflines(result: Row) -> list[str]:
    dtype, least = REQUIRED_SHARE[result["settings"]["device"].split(":")[0]]
    rows = [
        [
            f"{row['latents']:,}",
            row["family"],
            SHORT[row["dtype"]],
            percent(row["share_float32"]),
            percent(row.get("paired_float32")),
            percent(row.get("share_bfloat16")),
            yes(row["met"]),
        ]
        for row in summary.roofline(result)
    ]
    header = [
        "latents",
        "ours",
        "dtype",
        "of fp32",
        "of fp32, same round",
        "of bf16",
        f"≥ {least:.0%} of {SHORT[dtype]}",
    ]
    note = "Tokens/s × 2·d·models·latents over the best matrix product of the run, or of the same round."
    return ["## Share of the encode roofline", "", note, "", *table(header, rows)]


def quality(result: Row) -> list[str]:
    rows = [
        [
            row["name"],
            SHORT[row["dtype"]],
            rate(row["lr"]),
            f"{row['fve']:.4f}",
            f"{row['l0']:.1f}",
            f"{row['fve_at_k']:.4f}",
        ]
        for row in result["quality"]
        if row["status"] == "ok"
    ]
    if not rows:
        return []
    chosen = result["settings"]["quality"]
    note = (
        f"{chosen['steps'] * chosen['batch']:,} tokens each in batches of {chosen['batch']:,}, "
        f"{chosen['latents']:,} latents, {result['settings']['held_out']:,} held-out rows. "
        "FVE and L0 as the library infers; at k: the k·n strongest activations."
    )
    header = ["contestant", "dtype", "lr", "FVE", "L0", "FVE at k"]
    return ["## Quality after equal tokens", "", note, "", *table(header, rows)]


def growth(result: Row) -> list[str]:
    lines = []
    for row in result["scaling"]:
        if row["status"] != "ok":
            continue
        for key, unit, what in (("by_tokens", "tokens", "s"), ("by_latents", "latents", "s per step")):
            points = row[key]
            header = [unit, *(f"{size:,}" for size, _ in points)]
            title = (
                f"{row['name']}, {SHORT[row['dtype']]}: cost grows as {unit}^{summary.exponent(points):.2f}"
            )
            lines += [title, "", *table(header, [[what, *(f"{cost:.3g}" for _, cost in points)]])]
    return ["## Growth", "", *lines] if lines else []


def profiles(result: Row) -> list[str]:
    rows = []
    for row in result["profile"]:
        if row["status"] != "ok":
            continue
        top = [(n, share) for n, share in row["operators"] if share >= 0.02]
        parts = ", ".join(f"{name} {share:.0%}" for name, share in top)
        rest = f"{row['outside']:.0%}"
        rows.append(
            [f"{row['latents']:,}", row["family"], SHORT[row["dtype"]], f"{row['step_s']:.3f}", parts, rest]
        )
    header = ["latents", "ours", "dtype", "s per step", "self time", "outside of any operator"]
    note = "Under the profiler, so slower than timed; shares of the wall time of a step."
    return ["## Where a step goes", "", note, "", *table(header, rows)] if rows else []


def absent(result: Row) -> list[str]:
    rows = [
        [
            row["name"],
            SHORT.get(row.get("dtype", ""), ""),
            row["part"],
            row["status"],
            row["reason"].replace("|", "/")[:160],
        ]
        for row in summary.missing(result)
    ]
    header = ["contestant", "dtype", "in", "status", "reason"]
    return ["## Without a figure", "", *table(header, rows)] if rows else []


def plot(result: Row, stem: Path, suffixes: tuple[str, ...] = (".svg", ".png")) -> list[Path]:
    """Bars of tokens/s, and the growth of ours, as SVG and PNG beside each other."""
    import altair as alt

    bars = [
        {
            "contestant": f"{row['name']} {SHORT[row['dtype']]}",
            "tokens/s": row["median"],
            "latents": f"{row['latents']:,} latents",
            "who": "ours" if row["library"] == OURS else "peer",
            "least": row["least"],
            "most": row["most"],
        }
        for row in summary.speeds(result)
        if "median" in row
    ]
    if not bars:
        return []
    bars.sort(key=lambda bar: -bar["tokens/s"])
    charts = []
    for latents in dict.fromkeys(bar["latents"] for bar in bars):
        base = alt.Chart(alt.Data(values=[bar for bar in bars if bar["latents"] == latents]))
        y = alt.Y("contestant:N", sort=None, title=None, axis=alt.Axis(labelLimit=260))
        body = base.mark_bar().encode(
            x=alt.X("tokens/s:Q", title=f"tokens/s, {latents}"),
            y=y,
            color=alt.Color(
                "who:N", title=None, scale=alt.Scale(domain=["ours", "peer"], range=["#1b6ca8", "#b8b8b8"])
            ),
        )
        spread = base.mark_rule(color="black").encode(x="least:Q", x2="most:Q", y=y)
        charts.append((body + spread).properties(width=330))
    for key, unit, title in (
        ("by_tokens", "tokens", "seconds"),
        ("by_latents", "latents", "seconds per step"),
    ):
        points = [
            {"size": size, "cost": cost, "ours": row["name"]}
            for row in result["scaling"]
            if row["status"] == "ok"
            for size, cost in row[key]
        ]
        if points:
            line = alt.Chart(alt.Data(values=points)).mark_line(point=True)
            x = alt.X("size:Q", title=unit, scale=alt.Scale(type="log"))
            y = alt.Y("cost:Q", title=title, scale=alt.Scale(type="log"))
            charts.append(line.encode(x=x, y=y, color="ours:N").properties(width=330, height=220))
    chart = alt.concat(*charts, columns=2).resolve_scale(color="independent")
    made = [stem.with_suffix(suffix) for suffix in suffixes]
    for path in made:
        chart.save(str(path))
    return made
