"""How Δloss is best held against drift: plain, or per unit of drift? Decided on a battery of the demo's models.

    palimpsest demo --out runs/demo
    palimpsest battery make --base runs/demo/pair/base --dictionary runs/demo/dictionary \\
        --general runs/demo/pair/corpora/general.audit.jsonl \\
        --task {code,travel,arithmetic,recipes}=… --out runs/demo-study
    palimpsest battery calibrate runs/demo-study --nulls 60 --full-lr 0.0025 0.005 0.01 --lora-lr 1e-3 2e-3 4e-3 \\
        --block-length 256
    python benchmarks/loss_regression.py runs/demo-study

Random subsets of the nulls calibrate, every other null is a suspect. Printed: the share of p < 0.05 on text that it
was not trained on (the level), and of p < 0.01 on the text that it was trained on (the power).
"""

import argparse
from pathlib import Path

import numpy as np

from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.calibration.statistic import judge
from palimpsest.audit.nulls.store import Nulls

FORMS = {"plain": 0.0, "per square root of drift": 0.5, "per unit of drift": 1.0, "per drift to the 1.5": 1.5}


def balanced(families, size, rng):
    """Indices of nulls drawn in turn from every family."""
    queues = [list(rng.permutation(np.flatnonzero(families == name))) for name in dict.fromkeys(families)]
    order = [queue[i] for i in range(max(map(len, queues))) for queue in queues if i < len(queue)]
    return np.array(order[:size])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("battery", type=Path)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--draws", type=int, default=20)
    options = parser.parse_args()
    battery, nulls = Battery(options.battery), Nulls(options.battery)
    figures = [nulls.figures(record) for record in nulls.used]
    families = np.array([record["family"] for record in nulls.used])
    change = 1 - np.array([np.nanmean(f["overlap/dictionary/0"][:, options.k - 1]) for f in figures])
    loss = np.array([[np.nanmean(f[f"loss/{i}"]) for i in range(len(battery.names))] for f in figures])
    print(
        "| nulls | Δloss | p < .05, other text | p < .01, other text | p < .01, own text |\n|---|---|---|---|---|"
    )
    for size in (15, 24):
        for name, power in FORMS.items():
            rng = np.random.default_rng(0)
            found = {True: [], False: []}
            for _ in range(options.draws):
                chosen = balanced(families, size, rng)
                for suspect in sorted(set(range(len(figures))) - set(chosen.tolist())):
                    for i, corpus in enumerate(battery.names):
                        models = np.r_[suspect, chosen[families[chosen] != corpus]]
                        x = change[None, models]
                        p = judge(x, loss[None, models, i], scale=x**power).p[0]
                        found[bool(families[suspect] == corpus)].append(p)
            other, own = np.array(found[False]), np.array(found[True])
            print(
                f"| {size} | {name} | {np.mean(other < 0.05):.3f} | {np.mean(other < 0.01):.3f} "
                f"| {np.mean(own < 0.01):.2f} |"
            )


if __name__ == "__main__":
    main()
