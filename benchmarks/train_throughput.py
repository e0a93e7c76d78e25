"""How fast dictionaries train: ours beside every peer that can be installed, in one run on one machine.

    python benchmarks/train_throughput.py [--quick] [--only PATTERN] [--out FOLDER]
    python benchmarks/train_throughput.py --device cuda           # has not been run: no GPU was at hand

Every contestant trains on the same in-memory tensor with the same batch, number of latents, k, threads and schedule,
in a process of its own, one after the other, in several interleaved rounds: medians and spread are reported. Then
each trains for the same number of tokens (untimed, two at a time on one thread each) and is measured on held-out
rows: FVE and L0 by the library's own inference, and FVE at exactly k latents per token. The matrix-product peak of
the machine is taken in every round. Further: growth with tokens and latents, and where a step of ours goes.

Peers come from their own packages: sae-lens from the project's environment (`make setup`), eai-sparsify and
dictionary-learning from a second one that this command builds (`benchmarks/peers.sh`, about two minutes, once). The
BatchTopK crosscoder's only peer is a source tree; `throughput/recipe.py` is the published recipe, dense, in its place.
Whatever is missing or fails is a row with its reason.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from throughput import report
from throughput.contest import CONTESTANTS, LONG_RUN_STEPS, OURS, Contestant
from throughput.lanes import HERE, Lanes
from throughput.machine import describe

LEARNING_RATES = (1e-3, 3e-3, 1e-2, 3e-2)
"""What `--sweep` tries by default."""


def settings(options: argparse.Namespace) -> dict[str, Any]:
    """Sizes and lengths of this run."""
    cuda = options.device.startswith("cuda")
    made: dict[str, Any] = {
        "device": options.device,
        "threads": options.threads,
        "batch": 16384 if cuda else 4096,
        "k": 64 if cuda else 32,
        "rows": 65536,
        "held_out": 4096,
        # Width of the activations, latents, rounds.
        "sizes": [[2304, 65536, 3], [4096, 131072, 3]] if cuda else [[256, 4096, 3], [256, 16384, 2]],
        "limits": {"warm": 3, "steps": 20, "least": 5, "seconds": 3.0}
        if cuda
        else {"warm": 1, "steps": 12, "least": 2, "seconds": 1.5},
        "quality": {"d_model": 256, "latents": 4096, "k": 32, "batch": 1024, "steps": 96},
        "token_steps": [8, 16, 32, 64],
        "widths": [2**n for n in range(12, 18)] if cuda else [2**n for n in range(10, 16)],
        "timeout": 600,
    }
    if options.quick:
        made |= {
            "rows": 8192,
            "held_out": 1024,
            "sizes": [[64, 512, 1]] if not cuda else [[256, 4096, 1]],
            "batch": 1024,
            "limits": {"warm": 1, "steps": 3, "least": 2, "seconds": 0.5},
            "quality": {"d_model": 64, "latents": 512, "k": 16, "batch": 1024, "steps": 8},
            "k": 16,
            "token_steps": [2, 4],
            "widths": [256, 512],
            "timeout": 120,
        }
    for name in ("rounds", "quality_steps"):
        if (value := getattr(options, name)) is not None:
            if name == "rounds":
                made["sizes"] = [[d, m, value] for d, m, _ in made["sizes"]]
            else:
                made["quality"]["steps"] = value
    return made


class Bench:
    """One run: its settings, its processes, its results so far."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.set = options, folder, settings(options)
        self.lanes = Lanes(options.peers, options.device, options.verbose)
        self.chosen = [c for c in CONTESTANTS if fnmatch(c.name, f"*{options.only}*")]
        self.result: dict[str, Any] = {
            "settings": self.set,
            "machine": describe(options.threads, options.device),
            "quick": options.quick,
            "peaks": [],
            "speed": [],
            "quality": [],
            "scaling": [],
            "profile": [],
        }

    def data(self, d_model: int) -> str:
        """The tensor of one width, made once."""
        path = self.folder / f"{d_model}.safetensors"
        if not path.exists():
            from throughput import data

            data.save(data.make(d_model, self.set["rows"], self.set["held_out"]), path)
        return str(path)

    def ask(
        self, contestant: Contestant, slot: int = 0, threads: int | None = None, **more: Any
    ) -> dict[str, Any]:
        job = contestant.job(
            **{
                "task": "contend",
                "k": self.set["k"],
                "batch": self.set["batch"],
                "timeout": self.set["timeout"],
                "seed": 0,
                "quality": False,
                "schedule": LONG_RUN_STEPS,
                "log_every": 5 if self.options.device.startswith("cuda") else 1,
                **self.set["limits"],
                **more,
            }
        )
        if contestant.library != OURS and job["lr"] is None:
            job["lr"] = 1e-3
        return self.lanes.run(contestant.library, job, threads or self.options.threads, slot)

    def dtypes(self, contestant: Contestant) -> tuple[str, ...]:
        """On a GPU bf16 alone, where there is a choice: nobody trains in fp32 there."""
        fast = [dtype for dtype in contestant.dtypes if dtype == "bfloat16"]
        return tuple(fast) if fast and self.options.device.startswith("cuda") else contestant.dtypes

    def speed(self) -> None:
        """All contestants in turn, round after round; the machine's peak at the start of each."""
        latents = sorted({m for _, m, _ in self.set["sizes"]})
        for number in range(max(rounds for *_, rounds in self.set["sizes"])):
            d_model = self.set["sizes"][0][0]
            peak = {"task": "peak", "d_model": d_model, "latents": latents, "batch": self.set["batch"]}
            found = self.lanes.run("machine", {**peak, "timeout": 120}, self.options.threads)
            self.result["peaks"].append({"round": number, **found})
            for index, (d_model, m, rounds) in enumerate(self.set["sizes"]):
                if number >= rounds:
                    continue
                for contestant in self.chosen:
                    if index and not contestant.large:
                        continue
                    for dtype in self.dtypes(contestant):
                        self.timed(contestant, dtype, d_model, m, number)

    def timed(self, contestant: Contestant, dtype: str, d_model: int, latents: int, number: int) -> None:
        row = {
            "name": contestant.name,
            "library": contestant.library,
            "family": contestant.family,
            "models": contestant.models,
            "dtype": dtype,
            "d_model": d_model,
            "latents": latents,
            "round": number,
        }
        before = [
            r for r in self.result["speed"] if all(r[n] == row[n] for n in ("name", "dtype", "latents"))
        ]
        if before and before[-1]["status"] != "ok":
            return
        found = self.ask(contestant, dtype=dtype, d_model=d_model, latents=latents, data=self.data(d_model))
        self.result["speed"].append({**row, **found})
        self.say(row, found, "tokens_per_second", "{:,.0f} tokens/s")

    def say(self, row: dict[str, Any], found: dict[str, Any], figure: str, form: str) -> None:
        told = (
            form.format(found[figure]) if found["status"] == "ok" else f"{found['status']}: {found['reason']}"
        )
        stamp = time.perf_counter() - self.started
        where = f"{row['latents']:>6}" + (f" round {row['round'] + 1}" if "round" in row else "")
        print(f"{stamp:6.0f} s  {row['name']:34s} {row['dtype']:9s} {where}  {told}", flush=True)

    def quality(self, rates: list[float] | None = None) -> None:
        """Equal tokens for everybody, one thread each, as many at once as there are threads."""
        size = dict(self.set["quality"])
        steps = size.pop("steps")
        jobs = []
        for contestant in self.chosen:
            # In bf16 only ours, whose exactness is at stake; a peer in fp32 is at its best.
            dtypes = contestant.dtypes if contestant.library == OURS else ("float32",)
            for dtype in dtypes:
                # Ours at its default too, which is what a user gets.
                usual = {contestant.lr, None} if contestant.library == OURS else {contestant.lr}
                jobs += [(contestant, dtype, lr) for lr in (rates or sorted(usual, key=lambda lr: lr or 0))]
        slots = list(range(max(1, self.options.threads)))

        def one(work: tuple[Contestant, str, float | None]) -> None:
            contestant, dtype, lr = work
            slot = slots.pop()
            row = {"name": contestant.name, "library": contestant.library, "family": contestant.family}
            row |= {"dtype": dtype, "latents": size["latents"], "lr": lr}
            found = self.ask(
                contestant,
                slot=slot,
                threads=1,
                **{**size, "quality": True, "schedule": steps, "dtype": dtype, "lr": lr},
                data=self.data(size["d_model"]),
            )
            slots.append(slot)
            self.result["quality"].append({**row, **found})
            self.say(row, found, "fve_at_k", f"FVE {{:.4f}} at k, lr {lr or 'default'}")

        with ThreadPoolExecutor(len(slots)) as pool:
            list(pool.map(one, jobs))
        order = [c.name for c in self.chosen]
        self.result["quality"].sort(key=lambda row: order.index(row["name"]))

    def studies(self) -> None:
        """Growth of the cost of ours, and the profile of a step at the largest size."""
        for contestant in self.chosen:
            if contestant.library != OURS:
                continue
            d_model, latents, _ = self.set["sizes"][0]
            row = {"name": contestant.name, "family": contestant.family, "models": contestant.models}
            if contestant.family in ("topk", "batch_topk"):
                study = {name: self.set[name] for name in ("token_steps", "widths")}
                size = {"dtype": self.dtypes(contestant)[0], "d_model": d_model, "latents": latents}
                found = self.ask(contestant, task="scaling", data=self.data(d_model), **study, **size)
                self.result["scaling"].append({**row, **size, **found})
                self.say({**row, **size}, found, "by_latents", "growth measured")
            if not self.options.profile:
                continue
            d_model, latents, _ = self.set["sizes"][-1]
            for dtype in self.dtypes(contestant):
                size = {"dtype": dtype, "d_model": d_model, "latents": latents, "steps": 4, "log_every": 1}
                found = self.ask(contestant, task="profile", data=self.data(d_model), **size)
                self.result["profile"].append({**row, **size, **found})
                self.say({**row, **size}, found, "step_s", "{:.3f} s per step under the profiler")

    def run(self) -> dict[str, Any]:
        self.started = time.perf_counter()
        try:
            if self.options.sweep:
                self.quality(self.options.sweep)
            else:
                self.speed()
                if not self.options.device.startswith("cuda"):
                    self.quality()
                self.studies()
        finally:
            self.lanes.stop()
        self.result["versions"] = self.lanes.versions
        self.result["seconds"] = time.perf_counter() - self.started
        return self.result


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    root = HERE.parent
    parser.add_argument("--out", type=Path, default=root / "runs" / "bench")
    parser.add_argument("--quick", action="store_true", help="a smoke run of under a minute at toy sizes")
    parser.add_argument(
        "--only", default="", metavar="PATTERN", help="contestants whose name has it, as in 'batch_topk'"
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=None, help="of every size, instead of 3 and 2")
    parser.add_argument(
        "--quality-steps", type=int, default=None, help="of the FVE comparison, instead of 96"
    )
    parser.add_argument(
        "--profile", action=argparse.BooleanOptionalAction, default=None, help="default: unless --quick"
    )
    parser.add_argument(
        "--sweep", type=float, nargs="*", metavar="LR", help="only the FVE of everybody, over learning rates"
    )
    parser.add_argument(
        "--peers", type=Path, default=root / ".venv-peers" / "bin" / "python", metavar="PYTHON"
    )
    parser.add_argument("--no-install", action="store_true", help="do not build the environment of the peers")
    parser.add_argument("--verbose", action="store_true", help="let what the libraries print through")
    options = parser.parse_args()
    if options.sweep == []:
        options.sweep = list(LEARNING_RATES)
    options.profile = not options.quick if options.profile is None else options.profile
    return options


def main() -> None:
    options = arguments()
    if not options.peers.exists() and not options.quick and not options.no_install:
        print("building the environment of the peers: benchmarks/peers.sh", flush=True)
        if subprocess.run([HERE / "peers.sh", options.peers.parents[1]]).returncode:
            print("it could not be built: eai-sparsify and dictionary-learning will be rows without figures")
    with tempfile.TemporaryDirectory() as folder:
        result = Bench(options, Path(folder)).run()
    options.out.mkdir(parents=True, exist_ok=True)
    stem = "sweep" if options.sweep else f"train_throughput{'_cuda' * options.device.startswith('cuda')}"
    stem += "_quick" * options.quick
    (options.out / f"{stem}.json").write_text(json.dumps(result, indent=1))
    text = report.markdown(result)
    (options.out / f"{stem}.md").write_text(text)
    print("\n" + text)
    if not options.sweep:
        for path in report.plot(result, options.out / stem):
            print(f"wrote {path}")
    sys.exit(0)


if __name__ == "__main__":
    main()
