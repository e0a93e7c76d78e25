"""Finished passes of an interrupted run: kept as parts of its folder, read instead of being repeated."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from palimpsest.artifacts import RunFolder, disk

VERSION = 2
"""Of what the passes leave: parts of another version are computed again."""


def kept_arrays(
    run: RunFolder, name: str, seconds: dict[str, float], compute: Callable[[], dict[str, NDArray]]
) -> dict[str, NDArray]:
    """The arrays of a pass: computed, or read where an interrupted run finished it."""
    path = run.part(f"{name}.{VERSION}.safetensors")
    if path.exists():
        seconds[name] = json.loads(run.part(f"{name}.{VERSION}.seconds").read_text())
        return load_file(path)
    started = time.perf_counter()
    arrays = compute()
    seconds[name] = time.perf_counter() - started
    disk.write_bytes(run.part(f"{name}.{VERSION}.seconds"), disk.to_json(seconds[name]))
    with disk.replacing(path) as temporary:
        # Not ascontiguousarray, which makes a row of a scalar.
        save_file({key: np.asarray(value, order="C") for key, value in arrays.items()}, temporary)
    return arrays


def kept_values(
    run: RunFolder, name: str, seconds: dict[str, float], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """The same for plain values."""
    path = run.part(f"{name}.{VERSION}.json")
    if not path.exists():
        started = time.perf_counter()
        values = compute()
        values["seconds"] = time.perf_counter() - started
        disk.write_bytes(path, disk.to_json(values))
    kept = json.loads(path.read_text())
    seconds[name] = kept.pop("seconds")
    return kept
