"""Tables of docs/results.md from the audits that recipes/zoo.sh wrote.

python benchmarks/zoo_table.py [runs/zoo] > tables.md
"""

import sys
from pathlib import Path

from palimpsest.artifacts import open_artifact
from palimpsest.findings import AuditFinding

ORDER = ("math", "code", "math-lora", "math-mixed", "code-gentle", "general", "math-step25", "math-step75")
TRUTH = {
    "math": "math",
    "code": "code",
    "math-lora": "math",
    "math-mixed": "math",
    "code-gentle": "code",
    "general": "nothing new",
    "math-step25": "math",
    "math-step75": "math",
}
KS = (1, 2, 5, 10, 20, 32)


def finding(folder):
    return AuditFinding.from_dict(open_artifact(folder, stage="audit").read_json("audit.json"))


def pct(value, ci):
    return f"{value:+.1%} [{ci[0]:+.1%}, {ci[1]:+.1%}]"


def num(value, ci, sign=""):
    return f"{value:{sign}.3f} [{ci[0]:{sign}.3f}, {ci[1]:{sign}.3f}]"


def table(header, rows):
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell) for cell in row) + " |")
    print()


def main(root):
    audits = {name: finding(root / name) for name in ORDER}
    print("### Overlap and loss, k = 5\n")
    rows = []
    for name, audit in audits.items():
        tasks = {task.name: task for task in audit.tasks}
        for corpus in audit.datasets:
            task = tasks.get(corpus.name)
            rows.append(
                (
                    f"{name} (trained: {TRUTH[name]})" if corpus.role == "general" else "",
                    corpus.name,
                    num(corpus.intersection_mean["5"], corpus.ci["5"]),
                    pct(task.idr, task.ci) if task else "",
                    num(task.idr_abs, task.idr_abs_ci, "+") if task else "",
                    num(task.churn_ratio, task.churn_ratio_ci) if task else "",
                    num(corpus.delta_loss, corpus.delta_loss_ci, "+"),
                    num(corpus.kl, corpus.kl_ci),
                    num(corpus.r2_delta, corpus.r2_delta_ci, "+"),
                    num(corpus.relative_drift, corpus.relative_drift_ci),
                )
            )
    table(
        ("fine-tune", "text", "IM", "IDR_rel", "IDR_abs", "churn ratio", "Δloss", "KL", "R²_Δ", "‖Δh‖/‖h‖"),
        rows,
    )
    print("### What the largest raw IDR names\n")
    rows = []
    for name, audit in audits.items():
        worst = max(audit.tasks, key=lambda t: t.idr)
        learned = [c.name for c in audit.datasets if c.delta_loss_ci[1] < 0]
        rows.append((name, TRUTH[name], f"{worst.name} ({worst.idr:+.1%})", ", ".join(learned) or "none"))
    table(("fine-tune", "trained on", "largest IDR_rel", "texts whose loss fell"), rows)
    print("### Every k: IDR_rel of math and of code text\n")
    rows = []
    for name in ORDER[:6]:
        curve = open_artifact(root / name).read_table("curve.parquet").to_pylist()
        for task in ("math", "code"):
            found = {row["k"]: row["idr"] for row in curve if row["dataset"] == task}
            rows.append((name, task, *(f"{found[k]:+.1%}" for k in KS)))
    table(("fine-tune", "text", *(f"k={k}" for k in KS)), rows)
    print("### Controls: the same measure through bases that learned nothing, IDR_rel at k = 5\n")
    rows = []
    for name in ORDER[:6]:
        audit = audits[name]
        bases = {"dictionary": {t.name: t.idr for t in audit.tasks}} | {
            c.name: {t["name"]: t["idr"] for t in c.tasks} for c in audit.controls
        }
        for basis, idr in bases.items():
            r2 = (
                audit.datasets[0].r2_delta
                if basis == "dictionary"
                else next(c.datasets[0]["r2_delta"] for c in audit.controls if c.name == basis)
            )
            rows.append(
                (
                    name if basis == "dictionary" else "",
                    basis,
                    *(f"{idr[t]:+.1%}" for t in ("math", "code", "web")),
                    f"{r2:+.2f}",
                )
            )
    table(("fine-tune", "basis", "math", "code", "web", "R²_Δ on general"), rows)
    print("### FVE and L0 of the dictionary\n")
    rows = [
        (
            name,
            c.name,
            f"{c.fve['base']:.3f}",
            f"{c.fve['tuned']:.3f}",
            f"{c.l0['base']:.1f}",
            f"{c.l0['tuned']:.1f}",
        )
        for name, audit in list(audits.items())[:6]
        for c in audit.datasets
    ]
    table(("fine-tune", "text", "FVE base", "FVE tuned", "L0 base", "L0 tuned"), rows)
    legacy = finding(root / "math-legacy")
    print("### The original's figures (`--legacy`) on `math`: counts of 5, all positions, pooled tokens\n")
    table(
        ("text", "IM", "IDR_rel", "IDR_abs", "churn ratio"),
        [
            (
                c.name,
                f"{c.intersection_mean['5']:.3f}",
                *((f"{t.idr:+.1%}", f"{t.idr_abs:+.3f}", f"{t.churn_ratio:.2f}") if t else ("", "", "")),
            )
            for c in legacy.datasets
            for t in [next((t for t in legacy.tasks if t.name == c.name), None)]
        ],
    )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo"))
