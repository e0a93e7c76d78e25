"""What the statistics of a calibration cost: 10 domains, 24 nulls, 2,000 resamples, on one thread.

    OMP_NUM_THREADS=1 python benchmarks/calibration_cost.py [--domains 10] [--nulls 24] [--documents 100 200]

Times `calibrate()` on a synthetic panel (overlap and loss, three sites of eight k each) and prints JSON: the median of
the runs in seconds, and the peak memory of the process.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import time

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np  # noqa: E402

from palimpsest.audit.calibration import Level, Panel, calibrate  # noqa: E402

SITES, KS = 3, 8


def panel_of(domains, nulls, documents, seed=0):
    rng = np.random.default_rng(seed)
    names = ["general", *(f"domain-{i}" for i in range(domains))]
    drift = rng.normal(-2.0, 0.4, nulls + 1)
    overlap, loss = {}, {}
    for name in names:
        change = drift + rng.normal(0, 0.3) + rng.normal(0, 0.05, nulls + 1)
        noise = rng.normal(0, 0.2, (1, documents, 1)) + rng.normal(
            0, 0.05, (nulls + 1, documents, SITES * KS)
        )
        overlap[name] = 1 - np.exp(np.minimum(change[:, None, None] + noise, 0.0))
        loss[name] = 0.5 * np.exp(drift)[:, None] + rng.normal(0, 0.1, (nulls + 1, documents))
    families = tuple(names[i % len(names)] for i in range(nulls))
    grid = tuple((f"resid_post.{site}", k) for site in range(SITES) for k in range(1, KS + 1))
    return Panel(overlap, loss, grid, families)


def seconds(panel, level):
    started = time.perf_counter()
    found = calibrate(panel, delta_loss_ci=None, declared=[], settings=level, battery={})
    assert not found.refused
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--domains", type=int, default=10)
    parser.add_argument("--nulls", type=int, default=24)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--documents", type=int, nargs="+", default=[100, 200])
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    level = Level(resamples=args.resamples)
    timed = {}
    for documents in args.documents:
        panel = panel_of(args.domains, args.nulls, documents)
        timed[documents] = round(statistics.median(seconds(panel, level) for _ in range(args.runs)), 3)
    figures = {
        "domains": args.domains,
        "nulls": args.nulls,
        "resamples": args.resamples,
        "grid": SITES * KS,
        "threads": int(os.environ["OMP_NUM_THREADS"]),
        "machine": platform.machine(),
        "seconds_by_documents": timed,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
