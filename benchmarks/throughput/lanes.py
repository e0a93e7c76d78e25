"""The processes that hold the libraries, and the plan of jobs they are given."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from throughput import contest

HERE = Path(__file__).resolve().parents[1]


START = """import sys
sys.path.insert(0, sys.argv[1])
import throughput.worker
sys.path.remove(sys.argv[1])
throughput.worker.main(sys.argv[2])
"""
"""What a worker begins with. Modules of the package are found through it once it is imported."""


class Lane:
    """One library in one process; started at the first job, each job in a fork of it."""

    def __init__(self, library: str, python: Path, threads: int, verbose: bool = False) -> None:
        self.library, self.python, self.threads, self.verbose = library, python, threads, verbose
        self.process: subprocess.Popen[str] | None = None
        self.about: dict[str, Any] = {}

    def start(self) -> dict[str, Any]:
        """Import the library in its own environment; returns its version or why it is missing."""
        if self.about:
            return self.about
        if not self.python.exists():
            self.about = {
                "status": "missing",
                "reason": f"no environment at {self.python}: run benchmarks/peers.sh",
            }
            return self.about
        environment = {
            **os.environ,
            "PYTHONWARNINGS": "ignore",
            "OMP_NUM_THREADS": str(self.threads),
            "MKL_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "WANDB_MODE": "disabled",
        }
        if self.verbose:
            environment["BENCH_VERBOSE"] = "1"
        self.process = subprocess.Popen(
            [str(self.python), "-c", START, str(HERE), self.library],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if self.verbose else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.about = self._answer()
        return self.about

    def run(self, job: dict[str, Any]) -> dict[str, Any]:
        """Carry out a job, or say why not."""
        about = self.start()
        if about["status"] != "ok":
            return about
        assert self.process is not None and self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**job, "threads": self.threads}) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return {"status": "failed", "reason": "the process that holds the library has ended"}
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process is not None and self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            return {"status": "failed", "reason": f"the process ended with code {self.process.wait()}"}
        return json.loads(line)

    def stop(self) -> None:
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
            self.process.wait()
            self.process = None


class Lanes:
    """A lane per library and slot; slots let untimed work run side by side.

    On a GPU every job gets a new process, because importing a library may already open the device.
    """

    def __init__(self, peers: Path, device: str, verbose: bool = False) -> None:
        self.peers, self.device, self.verbose = peers, device, verbose
        self.lanes: dict[tuple[str, int, int], Lane] = {}
        self.versions: dict[str, dict[str, Any]] = {}

    def run(self, library: str, job: dict[str, Any], threads: int, slot: int = 0) -> dict[str, Any]:
        key = (library, threads, slot)
        if key not in self.lanes:
            python = Path(sys.executable) if contest.lane(library) == "own" else self.peers
            self.lanes[key] = Lane(library, python, threads, self.verbose)
        lane = self.lanes[key]
        found = lane.run({**job, "device": self.device})
        self.versions.setdefault(library, lane.about)
        if self.device.startswith("cuda"):
            lane.stop()
            del self.lanes[key]
        return found

    def stop(self) -> None:
        for lane in self.lanes.values():
            lane.stop()
        self.lanes.clear()
