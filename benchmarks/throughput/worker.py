"""A process that has one library imported, and forks a fresh one for every job it reads from its input.

Started by `lanes.py`, which takes its folder out of the search path again: names beside it would hide packages.
So the import is paid once, and every contestant still runs in a process of its own: a crash, a leak or a peak of
memory is that contestant's alone. One JSON object per line in, one out. No operator runs before the fork.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import resource
import signal
import sys
import tempfile
import traceback
from importlib import metadata
from pathlib import Path
from typing import Any

MODULES = {
    "palimpsest": "palimpsest",
    "eai-sparsify": "sparsify",
    "dictionary-learning": "dictionary_learning.trainers.top_k",
    "sae-lens": "sae_lens",
    "recipe": "torch",
    "machine": "torch",
}
PACKAGES = {"palimpsest": "palimpsest-lm", "recipe": "torch", "machine": "torch"}


def about(library: str) -> dict[str, Any]:
    """Import the library; its version, or why it cannot be used."""
    package, extra = PACKAGES.get(library, library), {}
    try:
        module = importlib.import_module(MODULES[library])
        if library == "palimpsest":
            # Names are imported at first use; this one brings the whole trainer.
            module.train_dictionary  # noqa: B018
            from throughput.ours import backend

            extra["kernels"] = backend("cpu")
        # The first step of any optimiser imports it, which takes seconds.
        importlib.import_module("torch._dynamo")
        return {
            "status": "ok",
            "package": package,
            "version": metadata.version(package),
            "python": platform.python_version(),
            **extra,
        }
    except Exception as error:
        return {"status": "missing", "package": package, "reason": f"{type(error).__name__}: {error}"}


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Carry out one job in this process."""
    import torch

    torch.set_num_threads(job["threads"])
    torch.manual_seed(job.get("seed", 0))
    if job["task"] == "peak":
        from throughput.machine import matmul_peaks

        return matmul_peaks(job["device"], job["d_model"], job["latents"], job["batch"])
    if job["task"] == "scaling":
        from throughput.study import scaling

        return scaling(job)
    if job["task"] == "profile":
        from throughput.study import profile

        return profile(job)
    return contend(job)


def contend(job: dict[str, Any]) -> dict[str, Any]:
    """Train one contestant: timed, or for a fixed number of steps and then measured on held-out rows."""
    import torch

    from throughput import data
    from throughput.clock import Clock
    from throughput.fitted import measure

    x, held_out = data.load(Path(job["data"]), job["view"])
    factor = 1.0
    if job["library"] == "palimpsest":
        from throughput.ours import train
    else:
        from throughput import peers

        factor, train = peers.scale(job), peers.BUILDERS[job["library"]]
    x, held_out = (x * factor).to(job["device"]), (held_out * factor).to(job["device"])
    cuda = job["device"].startswith("cuda")
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    if job["quality"]:
        clock = Clock(x, job["batch"], steps=job["schedule"], least=job["schedule"])
    else:
        limits = {name: job[name] for name in ("warm", "steps", "least", "seconds")}
        clock = Clock(x, job["batch"], wait=wait, **limits)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    fitted = train(job, clock)
    found: dict[str, Any] = {
        "rss_before_mib": before,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "gpu_mib": torch.cuda.max_memory_allocated() / 2**20 if cuda else None,
    }
    if job["quality"]:
        tokens = clock.pulled * job["batch"]
        return {**found, "tokens": tokens, **measure(fitted, held_out, job["k"], job["models"])}
    return {**found, **clock.rate()}


def forked(job: dict[str, Any], answer: Path) -> None:
    """The child: its result, or its failure, goes to a file."""
    # What the libraries print must not reach the pipe that answers go through.
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not os.environ.get("BENCH_VERBOSE"):
        os.dup2(quiet, 2)
    try:
        found = {"status": "ok", **run(job)}
    except Exception as error:
        skipped = type(error).__name__ == "NotYetError"
        reason = str(error) if skipped else f"{type(error).__name__}: {error}"
        found = {"status": "skipped" if skipped else "failed", "reason": " ".join(reason.split())[:300]}
        found["trace"] = traceback.format_exc()[-2000:]
    answer.write_text(json.dumps(found))


def attempt(job: dict[str, Any]) -> dict[str, Any]:
    """Fork, wait, and say what became of the child."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        child = os.fork()
        if child == 0:
            signal.alarm(job["timeout"])
            try:
                forked(job, answer)
            finally:
                os._exit(0)
        _, status = os.waitpid(child, 0)
        if answer.exists() and answer.stat().st_size:
            return json.loads(answer.read_text())
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        late = number == signal.SIGALRM
        reason = f"not finished after {job['timeout']} s" if late else f"killed by signal {number}"
        return {
            "status": "failed",
            "reason": reason + (" (out of memory?)" if number == signal.SIGKILL else ""),
        }
    return {"status": "failed", "reason": "ended without an answer"}


def main(library: str) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(about(library)), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(attempt(json.loads(line))), file=answers, flush=True)
