"""How the cost of ours grows, and where the time of a step goes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from throughput import data
from throughput.clock import Clock
from throughput.ours import train, whole_run

OPERATORS = 12

KERNELS = ("row_sum", "row_dot", "by_latent", "encode_topk", "encode_batch_topk", "encode_above")
"""Primitives of `palimpsest.dictionaries.kernels`; those of C++ are no operators, so they are named to the profiler."""


def scaling(job: dict[str, Any]) -> dict[str, Any]:
    """Seconds of whole runs against tokens at one width, and of a step against latents."""
    x, _ = data.load(Path(job["data"]), job["view"])
    x, batch = x.to(job["device"]), job["batch"]
    whole_run(job, x, batch, 2)
    by_tokens = [[steps * batch, whole_run(job, x, batch, steps)] for steps in job["token_steps"]]
    by_latents = []
    for latents in job["widths"]:
        clock = Clock(
            x, batch, warm=job["warm"], steps=job["steps"], least=job["least"], seconds=job["seconds"]
        )
        train({**job, "latents": latents}, clock)
        by_latents.append([latents, batch / clock.rate()["tokens_per_second"]])
    return {"by_tokens": by_tokens, "by_latents": by_latents}


def name_kernels() -> None:
    """Let every kernel of every backend show under its name; for the rest of this process."""
    import functools
    import importlib

    import torch

    for backend in ("torch_ops", "native", "triton_ops"):
        try:
            module = importlib.import_module(f"palimpsest.dictionaries.kernels.{backend}")
        except ImportError:
            continue
        for kernel in KERNELS:
            if (plain := getattr(module, kernel, None)) is None:
                continue

            def named(*args, plain=plain, label=f"kernel {kernel}", **more):
                with torch.profiler.record_function(label):
                    return plain(*args, **more)

            setattr(module, kernel, functools.wraps(plain)(named))


def profile(job: dict[str, Any]) -> dict[str, Any]:
    """Self time of the operators of a few steps, as shares of their wall time.

    A kernel's self time is its own work without the operators that it calls (an encoder's matrix product stays
    `aten::mm`). What is outside of any operator is Python and whatever else the profiler cannot see.
    """
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    x, _ = data.load(Path(job["data"]), job["view"])
    cuda = job["device"].startswith("cuda")
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if cuda else [])
    clock = Clock(x.to(job["device"]), job["batch"], warm=job["warm"], steps=job["steps"], least=job["steps"])
    # The profiler starts with the first timed step; it is told of steps by the clock.
    profiler = profiled(activities=kinds, acc_events=True)
    state = {"started": 0.0, "stopped": 0.0, "steps": 0}
    heard = clock.mark

    def mark(tokens: int | None = None) -> None:
        heard(tokens)
        if len(clock.times) == clock.warm:
            profiler.start()
            state["started"] = time.perf_counter()
        elif len(clock.times) == clock.warm + job["steps"]:
            state["stopped"] = time.perf_counter()
            state["steps"] = job["steps"]
            profiler.stop()

    clock.mark = mark
    name_kernels()
    train(job, clock)
    if cuda:
        torch.cuda.synchronize()
    wall = (state["stopped"] - state["started"]) * 1e6
    name = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = sorted(
        ((event.key, float(getattr(event, name))) for event in profiler.key_averages()),
        key=lambda row: -row[1],
    )
    # Whole-step annotations hold the operators inside them and would count twice.
    rows = [(key, spent) for key, spent in rows if not key.startswith("ProfilerStep")]
    shares = [[key, spent / wall] for key, spent in rows[:OPERATORS]]
    seen = sum(spent for _, spent in rows) / wall
    return {
        "step_s": wall / 1e6 / max(state["steps"], 1),
        "operators": [*shares, ["other operators", seen - sum(share for _, share in shares)]],
        "outside": max(0.0, 1 - seen),
    }
