"""How fast a store is read: store → shuffle buffer → batches of 4096, against what a trainer takes.

    python benchmarks/store_read.py [--bytes 512M] [--runs 3] [--threads 1] [--folder FOLDER] [--out FILE.json]

For each width and number of models a bfloat16 store of random rows is written, then read in five ways: `stream` alone,
`stream` through a `ShuffleBuffer` in bf16 and in fp32 (what training does), the same behind `prefetch`, and
`batches` (rows with labels, shuffled in a window of shards). The first epoch, which checks every shard's hash and
fills the buffer, is timed apart from as many rows after it (the fastest of `--runs`: what else runs on the machine
can only slow it). The files are in the system's cache: this measures our code, not a disk. `stall` is the longest
wait for one batch after the first. The last line is how many times faster than a trainer of `--rate` tokens/s the
slowest of the paths that training uses is.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from palimpsest.artifacts import RunFolder
from palimpsest.buffer import ShuffleBuffer, buffer_capacity, prefetch
from palimpsest.options import parse_count
from palimpsest.store import ActivationStore, StoreWriter

BATCH = 4096
SITE = "resid_post.1"
SHAPES = ((256, 1), (256, 2), (2304, 1), (2304, 2))


def write(path, d_model, models, size):
    """A store of about `size` bytes of random rows; gives the rows per second too."""
    rows = max(8 * BATCH, size // (2 * d_model * models) // BATCH * BATCH)
    acts = torch.randn(BATCH, models, d_model)
    labels = {name: torch.arange(BATCH) for name in ("token_ids", "position")}
    started = time.perf_counter()
    with RunFolder(path, stage="store", config={"rows": rows}) as folder:
        writer = StoreWriter(folder, sites=[SITE], models=("base", "tuned")[:models], d_model=d_model)
        for start in range(0, rows, BATCH):
            writer.append({SITE: acts}, document=torch.arange(start, start + BATCH), **labels)
        writer.finish()
    return rows / (time.perf_counter() - started)


def buffered(store, dtype, *, ahead, seed):
    def source(position):
        stream = store.stream(SITE, position, seed=seed, epochs=2)
        return prefetch(stream) if ahead else stream

    capacity = buffer_capacity(BATCH, len(store.models), store.d_model, dtype)
    return ShuffleBuffer(source, capacity=capacity, batch_size=BATCH, seed=seed, dtype=dtype)


WAYS = {
    "stream": lambda store, seed: store.stream(SITE, seed=seed, epochs=2),
    "buffer bf16": lambda store, seed: buffered(store, torch.bfloat16, ahead=False, seed=seed),
    "buffer fp32": lambda store, seed: buffered(store, torch.float32, ahead=False, seed=seed),
    "prefetch + buffer bf16": lambda store, seed: buffered(store, torch.bfloat16, ahead=True, seed=seed),
    "batches": lambda store, seed: (batch.acts for batch in store.batches(BATCH, SITE, seed=seed)),
}
TRAINING = ("buffer bf16", "buffer fp32")


def timed(store, way, seed, *, steady):
    """Rows per second, and the longest wait in seconds for a batch but the first; `steady` counts from there."""
    rows, stall = 0, 0.0
    started = last = time.perf_counter()
    for batch in WAYS[way](store, seed):
        now = time.perf_counter()
        if rows or not steady:
            stall = max(stall, now - last) if rows else stall
            rows += len(batch)
        else:
            # The first batch comes when the buffer is full.
            started, rows = now, 1
        last = now
        if rows > store.rows:
            break
    return rows / (time.perf_counter() - started), stall


def measured(path, way, runs):
    store = ActivationStore(path)
    row = store.d_model * len(store.models) * store.dtype.itemsize
    first, first_stall = timed(store, way, 0, steady=False)
    later = [timed(store, way, seed, steady=True) for seed in range(1, runs + 1)]
    rate = max(rate for rate, _ in later)
    return {
        "way": way,
        "d_model": store.d_model,
        "models": len(store.models),
        "rows": store.rows,
        "rows_per_s": rate,
        "rows_per_s_median": statistics.median(rate for rate, _ in later),
        "gb_per_s": rate * row / 1e9,
        "stall_ms": 1e3 * min(stall for _, stall in later),
        "first_epoch_rows_per_s": first,
        "first_epoch_stall_ms": 1e3 * first_stall,
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--bytes", default="512M", help="size of each store")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=100_000, help="tokens/s that training takes at d 256")
    parser.add_argument("--folder", help="where the stores are written; a temporary folder by default")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    results, writing = [], []
    for d_model, models in SHAPES:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            path = Path(folder) / "store"
            rate = write(path, d_model, models, parse_count(arguments.bytes))
            writing.append({"d_model": d_model, "models": models, "rows_per_s": rate})
            print(f"d_model {d_model}, models {models}: written at {rate / 1e3:.0f}k rows/s")
            for way in WAYS:
                one = measured(path, way, arguments.runs)
                results.append(one)
                print(
                    f"  {way:24} {one['rows_per_s'] / 1e3:8.0f}k rows/s {one['gb_per_s']:6.2f} GB/s "
                    f"stall {one['stall_ms']:6.0f} ms   first epoch {one['first_epoch_rows_per_s'] / 1e3:7.0f}k rows/s "
                    f"stall {one['first_epoch_stall_ms']:6.0f} ms",
                    flush=True,
                )
    narrow = [one for one in results if one["d_model"] == 256 and one["way"] in TRAINING]
    slowest = min(min(one["rows_per_s"], one["first_epoch_rows_per_s"]) for one in narrow)
    factor = slowest / arguments.rate
    print(
        f"at d 256 the slowest path of training is {factor:.1f} times a trainer of {arguments.rate:,.0f} tokens/s"
    )
    if arguments.out:
        report = {"machine": machine, "reading": results, "writing": writing, "times_the_trainer": factor}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
