"""What an audit with a battery costs beside what it cannot do without: one forward pass and one encode.

    python benchmarks/battery_cost.py BATTERY TUNED [--runs 5] [--out FILE.json]

The battery's own documents, base and dictionary are used. The floor runs the tuned model over the battery's batches
(with the head on every position, or stopped at the site) and calls `Dictionary.encode`, top-k included; the audit's
pass adds the comparison with the cached base, losses, overlap at every k, latents and examples. Both are timed in
turn. Calibration time and disk are read from the battery.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from palimpsest.audit.battery.folder import Battery
from palimpsest.audit.nulls.store import CALIBRATION, Nulls
from palimpsest.audit.sums import Accumulator, Measure
from palimpsest.harvest.cached import CachedHarvester
from palimpsest.models import load_pair


@torch.inference_mode()
def floor(model, site, dictionary, batches, *, head):
    started = time.perf_counter()
    for batch in (batch for one in batches.values() for batch in one):
        kept = batch.keep.reshape(-1).nonzero().squeeze(1)
        if head:
            found = {}
            with model.active():
                handle = model.sites.tap(site).module.register_forward_hook(
                    lambda _m, _a, output, found=found: found.update(hidden=output)
                )
                model.model(input_ids=batch.input_ids, use_cache=False)
                handle.remove()
            hidden = found["hidden"]
        else:
            hidden = model.read(batch.input_ids, [site]).acts[site]
        dictionary.encode(hidden.reshape(-1, hidden.shape[-1])[kept]).top(32)
    return time.perf_counter() - started


def audited(battery, model, site, dictionary, batches, *, loss):
    started = time.perf_counter()
    harvester = CachedHarvester(model, [site], battery.base_side, loss=loss)
    for name, text in batches.items():
        accumulator = Accumulator(Measure("dictionary", dictionary, site))
        for paired in harvester.stream(name, text):
            accumulator.add(paired)
        accumulator.finish()
    return time.perf_counter() - started


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("battery", type=Path)
    parser.add_argument("tuned")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    battery = Battery(options.battery)
    pair = load_pair(battery.base["path"], options.tuned)
    dictionary, site = battery.dictionaries()[0], battery.sites[0]
    batches = {name: list(battery.text(name).batches()) for name in battery.names}
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    }
    result["tokens"] = sum(int(b.keep.sum()) for one in batches.values() for b in one)
    for case, loss in (("full", True), ("no_loss", False)):
        floors, audits = [], []
        for _ in range(options.runs):
            floors.append(floor(pair.tuned, site, dictionary, batches, head=loss))
            audits.append(audited(battery, pair.tuned, site, dictionary, batches, loss=loss))
        result[case] = {
            "floor_s": statistics.median(floors),
            "audit_s": statistics.median(audits),
            "ratio": statistics.median(audits) / statistics.median(floors),
            "ratios": [a / f for a, f in zip(audits, floors, strict=True)],
        }
    result["battery_bytes"] = {
        part.name: sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
        for part in sorted(options.battery.iterdir())
        if part.is_dir()
    }
    if (options.battery / CALIBRATION).exists():
        nulls = Nulls(options.battery)
        result["nulls"] = len(nulls.records)
        result["calibration_s"] = nulls.seconds
        for part in ("training", "measuring"):
            result[f"{part}_s_per_null"] = statistics.mean(r[f"seconds_{part}"] for r in nulls.records)
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
