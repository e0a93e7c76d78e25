"""What the benchmark runs on, and how fast its matrix products are."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any


def describe(threads: int, device: str) -> dict[str, Any]:
    """The machine in words; imports no torch (versions come from the workers)."""
    model = platform.processor() or platform.machine()
    if (info := Path("/proc/cpuinfo")).exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if "model name" in line
        ]
        model = names[0] if names else model
    found = {
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": threads,
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "device": device,
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "load_at_start": round(os.getloadavg()[0], 2),
    }
    if device.startswith("cuda"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return found


def matmul_peaks(device: str, d_model: int, latents: list[int], batch: int) -> dict[str, Any]:
    """Best GFLOP/s of several tries per shape and dtype: the encode products, and squares."""
    import torch

    shapes = [(batch, d_model, m) for m in latents] + [(1024,) * 3, (2048,) * 3]
    if device.startswith("cuda"):
        torch.backends.cuda.matmul.allow_tf32 = False
        shapes += [(8192,) * 3]
    found: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        found[name] = {"x".join(map(str, s)): _best(torch, s, dtype, device) for s in shapes}
    return found


def _best(torch, shape: tuple[int, ...], dtype, device: str, seconds: float = 0.4) -> float:
    rows, inner, columns = shape
    a = torch.randn(rows, inner).to(dtype).to(device)
    # The layout of a linear layer: one row of weights per output.
    b = torch.randn(columns, inner).to(dtype).to(device)
    wait = torch.cuda.synchronize if device.startswith("cuda") else (lambda: None)
    out = torch.empty(rows, columns, dtype=dtype, device=device)
    torch.mm(a, b.T, out=out)
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < seconds:
        wait()
        begin = time.perf_counter()
        torch.mm(a, b.T, out=out)
        wait()
        best = min(best, time.perf_counter() - begin)
    return 2 * rows * inner * columns / best / 1e9
