"""What an audit costs beside what it cannot do without: two forward passes and two encodes.

    python benchmarks/audit_cost.py [--zoo FOLDER] [--dictionary DICT] [--runs 5] [--out FILE.json]

Audit and floor are timed in turn (interleaved), the median of the runs is reported. The floor runs both models over
the very same padded batches (with the head on every position, or stopped at the site for the truncated case) and
calls `Dictionary.encode` on the same tokens, top-k included. The audit's share is its pass: losses, overlap at every
k, latents, examples. Reading and tokenising the text, intervals and tables come on top; the last lines time whole
truncated audits in processes of their own, with their peak memory.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from palimpsest.audit.overlap import match, overlap_counts, overlap_curve
from palimpsest.audit.sums import Accumulator, Measure
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.harvest import Harvester
from palimpsest.models import load_pair

SITE = "resid_post.1"
MEMORY_DOCUMENTS = 150


def batches_of(corpus, tokens_per_batch=4096):
    return list(corpus.batches(tokens_per_batch))


@torch.inference_mode()
def floor(pair, dictionary, batches, *, head):
    """Two forward passes and two encodes, nothing else."""
    started = time.perf_counter()
    for batch in batches:
        kept = batch.keep.reshape(-1).nonzero().squeeze(1)
        for side in ("base", "tuned"):
            model = pair.side(side)
            if head:
                with model.active():
                    found = {}
                    handle = model.sites.tap(SITE).module.register_forward_hook(
                        lambda _m, _a, output, found=found: found.update(hidden=output)
                    )
                    model.model(input_ids=batch.input_ids, use_cache=False)
                    handle.remove()
                hidden = found["hidden"]
            else:
                hidden = model.read(batch.input_ids, [SITE]).acts[SITE]
            dictionary.encode(hidden.reshape(-1, hidden.shape[-1])[kept]).top(32)
    return time.perf_counter() - started


def audited(pair, dictionary, batches, *, loss):
    """The audit's whole pass: losses, overlap at all k, latents, examples, drift, FVE, R²."""
    started = time.perf_counter()
    accumulator = Accumulator(Measure("dictionary", dictionary, SITE))
    for paired in Harvester(pair, [SITE], loss=loss).stream("benchmark", batches):
        accumulator.add(paired)
    accumulator.finish()
    return time.perf_counter() - started


def ratio(pair, dictionary, batches, runs, *, loss):
    floors, audits = [], []
    for _ in range(runs):
        floors.append(floor(pair, dictionary, batches, head=loss))
        audits.append(audited(pair, dictionary, batches, loss=loss))
    return {
        "floor_s": statistics.median(floors),
        "audit_s": statistics.median(audits),
        "ratio": statistics.median(audits) / statistics.median(floors),
        "ratios": [a / f for a, f in zip(audits, floors, strict=True)],
    }


@torch.inference_mode()
def overlap_share(pair, dictionary, batches, runs):
    """Time of the overlap at all k as a share of the encodes it follows."""
    encode, overlap = [], []
    for _ in range(runs):
        spent = [0.0, 0.0]
        for batch in batches:
            kept = batch.keep.reshape(-1).nonzero().squeeze(1)
            hidden = [
                pair.side(s).read(batch.input_ids, [SITE]).acts[SITE].flatten(0, 1)[kept]
                for s in ("base", "tuned")
            ]
            t0 = time.perf_counter()
            lists = [dictionary.encode(h).top(32) for h in hidden]
            t1 = time.perf_counter()
            matches = match(*lists)
            overlap_curve(overlap_counts(matches), matches.longer)
            spent[0] += t1 - t0
            spent[1] += time.perf_counter() - t1
        encode.append(spent[0])
        overlap.append(spent[1])
    return statistics.median(overlap) / statistics.median(encode)


def peak_memory(zoo, dictionary, copies):
    """Peak resident memory of a whole audit whose corpora are `copies` times as long, in a fresh process."""
    with tempfile.TemporaryDirectory() as folder:
        files = {}
        for name in ("general", "math"):
            lines = (
                (zoo / "corpora" / f"{name}.audit.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()[:MEMORY_DOCUMENTS]
            )
            files[name] = Path(folder) / f"{name}.jsonl"
            files[name].write_text("".join(line + "\n" for line in lines * copies), encoding="utf-8")
        command = [
            sys.executable,
            __file__,
            "--child",
            str(zoo),
            str(dictionary),
            str(files["general"]),
            str(files["math"]),
            folder,
        ]
        out = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(out)


def child(zoo, dictionary, general, math, folder):
    from palimpsest import AuditConfig, CorpusOptions, ModelOptions, RunOptions, run_audit

    config = AuditConfig(
        f"{zoo}/base",
        f"{zoo}/math",
        dictionary=dictionary,
        general=general,
        task=(f"math={math}",),
        run=RunOptions(out=Path(folder) / "run"),
        corpora=CorpusOptions(max_length=192),
        models=ModelOptions(tokens_per_batch=2048),
        loss=False,
        resamples=200,
    )
    started = time.perf_counter()
    artifact = run_audit(config)
    tokens = sum(row["tokens"] for row in artifact.read_json("audit.json")["datasets"])
    print(
        json.dumps(
            {
                "tokens": tokens,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "seconds": time.perf_counter() - started,
            }
        )
    )


def main():
    if sys.argv[1:2] == ["--child"]:
        return child(*sys.argv[2:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = Path(__file__).resolve().parent
    parser.add_argument(
        "--zoo", type=Path, default=Path(os.environ.get("PALIMPSEST_ZOO", here.parents[1] / "shared" / "zoo"))
    )
    parser.add_argument(
        "--dictionary", type=Path, default=None, help="default: random directions, 4,096 latents, k 32"
    )
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--documents", type=int, default=60)
    parser.add_argument("--copies", type=int, nargs=2, default=(1, 10))
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    if not options.zoo.is_dir():
        sys.exit(
            f"There is no zoo at {options.zoo}: pass --zoo FOLDER with base/, math/, math-lora/ and corpora/ in it."
        )
    dictionary = (
        Dictionary.random(256, 4096, 32)
        if options.dictionary is None
        else load_dictionary(options.dictionary)
    )
    result = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
    }
    for kind in ("math", "math-lora"):
        pair = load_pair(options.zoo / "base", options.zoo / kind)
        corpus = Corpus(
            options.zoo / "corpora" / "general.audit.jsonl",
            pair.tokenizer,
            max_length=192,
            max_documents=options.documents,
        )
        batches = batches_of(corpus)
        audited(pair, dictionary, batches[:1], loss=True)
        result[kind] = {
            "tokens": sum(int(b.keep.sum()) for b in batches),
            "full": ratio(pair, dictionary, batches, options.runs, loss=True),
            "no_loss": ratio(pair, dictionary, batches, options.runs, loss=False),
            "overlap_share_of_encode": overlap_share(pair, dictionary, batches, options.runs),
        }
    with tempfile.TemporaryDirectory() as folder:
        saved = dictionary
        saved.metadata["site"] = SITE
        saved.save_pretrained(Path(folder) / "dictionary")
        result["memory"] = [peak_memory(options.zoo, Path(folder) / "dictionary", n) for n in options.copies]
    result["parameters"] = {
        kind: sum(
            p.numel() for p in load_pair(options.zoo / "base", options.zoo / kind).tuned.model.parameters()
        )
        for kind in ("math", "math-lora")
    }
    show(result)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))
    return None


def show(result):
    print(result["machine"])
    print("| pair | pass | floor s | audit s | ratio | runs |\n|---|---|---|---|---|---|")
    for kind in ("math", "math-lora"):
        for case in ("full", "no_loss"):
            row = result[kind][case]
            runs = ", ".join(f"{r:.2f}" for r in row["ratios"])
            print(
                f"| {kind} | {case} | {row['floor_s']:.2f} | {row['audit_s']:.2f} | {row['ratio']:.2f} | {runs} |"
            )
    for kind in ("math", "math-lora"):
        print(f"overlap of all k on {kind}: {result[kind]['overlap_share_of_encode']:.1%} of the encode")
    for row in result["memory"]:
        print(f"{row['tokens']:>9,} tokens: peak {row['peak_mib']:.0f} MiB, {row['seconds']:.0f} s")


if __name__ == "__main__":
    main()
