"""What `palimpsest examples` costs beside what it needs: reading and encoding the same tokens in both models.

    python benchmarks/examples_cost.py [--zoo FOLDER --dictionary DICT] [--runs 3] [--out FILE.json]
    python benchmarks/examples_cost.py --random [--d-model 512 --layers 8 --latents 16384 --k 32 --vocab 8192]

Floor and stage are timed in turn (interleaved), medians are reported. The floor (a) runs both models up to the site
over the stage's own padded batches, tokenised beforehand, and calls `Dictionary.encode` on the measured tokens; (b) is
its encoding alone. The stage (c) is everything from the first batch to the last table, tokenising included, models
loaded beforehand in both. Each case also runs in a process of its own for its peak memory.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from palimpsest.dictionaries import Dictionary
from palimpsest.interpret.examples import ExamplesConfig, run_examples
from palimpsest.interpret.examples.collect import read_acts
from palimpsest.interpret.examples.text import Texts
from palimpsest.interpret.subject import open_subject
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions


def random_world(folder, args):
    """A random Llama with a fine-tune of it, a random dictionary, and random words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = [f"w{number}" for number in range(args.vocab - 2)]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<s>", "<unk>", *words])}, "<unk>"))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.WhitespaceSplit(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", unk_token="<unk>")
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.d_model,
        intermediate_size=4 * args.d_model,
        num_hidden_layers=args.layers,
        num_attention_heads=args.d_model // 64,
        max_position_embeddings=1024,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for name in ("base", "tuned"):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * parameter.std() * torch.randn_like(parameter))
    site = f"resid_post.{args.layers // 2 - 1}"
    Dictionary(args.d_model, args.latents, k=args.k, metadata={"site": site}).save_pretrained(folder / "sae")
    rng = np.random.default_rng(0)
    rare = rng.zipf(1.2, 4 * args.tokens) % len(words)
    with (folder / "text.jsonl").open("w") as file:
        for start in range(0, len(rare) - 256, 256):
            file.write(json.dumps({"text": " ".join(words[i] for i in rare[start : start + 256])}) + "\n")
    return str(folder / "base"), str(folder / "tuned"), str(folder / "sae"), (str(folder / "text.jsonl"),)


def config_of(world, out, args):
    base, tuned, dictionary, corpus = world
    return ExamplesConfig(
        base,
        tuned,
        dictionary=dictionary,
        corpus=corpus,
        run=RunOptions(out=Path(out), overwrite=True),
        tokens=args.tokens,
        lens=args.lens,
        models=ModelOptions(device=args.device),
    )


@torch.inference_mode()
def floor(config):
    """Seconds of reading and encoding, of encoding alone; tokens; processor seconds of loading and of the work."""
    loading = time.process_time()
    subject = open_subject(config.base, config.tuned, config.dictionary, None, config.models)
    texts = Texts(config.corpus, subject.tokenizer, CorpusOptions(), subject.model("base").context)
    share = config.tokens // len(texts.corpora)
    batches = [
        (batch, texts.measured(batch).reshape(-1).nonzero().squeeze(1))
        for corpus in range(len(texts.corpora))
        for batch in texts.batches(corpus, share, config.models.tokens_per_batch)
    ]
    device, encoding = subject.dictionary.device, 0.0
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    loading = time.process_time() - loading
    started, work = time.perf_counter(), time.process_time()
    for batch, places in batches:
        acts = [read_acts(subject.model(side), subject.site, batch, places, device) for side in subject.sides]
        stacked = torch.stack(acts, 1)
        wait()
        before = time.perf_counter()
        subject.own_signals(stacked, check=False)
        wait()
        encoding += time.perf_counter() - before
    tokens = sum(len(places) for _, places in batches)
    return time.perf_counter() - started, encoding, tokens, loading, time.process_time() - work


def stage(config):
    """Seconds of each phase, and processor seconds of the whole."""
    started = time.process_time()
    found = run_examples(config).read_json("examples.json")["seconds"]
    return found, time.process_time() - started


def measured_alone(arguments, what):
    """Peak resident memory in MB of one case in a fresh process."""
    command = [sys.executable, __file__, *arguments, "--alone", what]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(found.stdout.splitlines()[-1])["peak_mb"]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo")
    parser.add_argument("--dictionary", default="runs/zoo/dictionaries/base/topk")
    parser.add_argument("--random", action="store_true")
    for name, value in (("d-model", 512), ("layers", 8), ("latents", 16384), ("k", 32), ("vocab", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--tokens", type=int, default=200_000)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--device")
    parser.add_argument("--no-lens", dest="lens", action="store_false")
    parser.add_argument("--no-memory", dest="memory", action="store_false")
    parser.add_argument("--alone", choices=("floor", "stage"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.random:
            world = random_world(Path(folder), args)
        else:
            corpora = tuple(str(args.zoo / "corpora" / f"{name}.audit.jsonl") for name in ("general", "math"))
            world = (str(args.zoo / "base"), str(args.zoo / "math"), args.dictionary, corpora)
        config = config_of(world, Path(folder) / "run", args)
        if args.alone:
            floor(config) if args.alone == "floor" else stage(config)
            # Not ru_maxrss, which a process takes over from the one that started it.
            status = Path("/proc/self/status").read_text().splitlines()
            kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
            print(json.dumps({"peak_mb": kilobytes / 1024}))
            return
        found = compare(config, args.runs)
    if args.memory:
        given = sys.argv[1:]
        found["peak_mb"] = {what: measured_alone(given, what) for what in ("floor", "stage")}
    report(found)
    if args.out:
        args.out.write_text(json.dumps(found, indent=1))


def compare(config, runs):
    floors, stages, processor = [], [], []
    for _ in range(runs):
        floors.append(floor(config))
        seconds, cpu = stage(config)
        stages.append(seconds)
        # Models are loaded in both, and the text is tokenised; that is no part of the floor.
        processor.append((cpu - floors[-1][3]) / floors[-1][4])
    totals = [sum(one.values()) for one in stages]
    both, encode = (statistics.median(one[place] for one in floors) for place in (0, 1))
    phases = {name: statistics.median(one[name] for one in stages) for name in stages[0]}
    total = statistics.median(totals)
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, device {config.models.device or 'auto'}",
        "tokens": floors[0][2],
        "forward_and_encode_s": both,
        "encode_s": encode,
        "stage_s": total,
        "phases_s": phases,
        "ratio": total / both,
        "ratio_of_processor_time": statistics.median(processor),
        "ratio_without_lens": (total - phases.get("lens", 0.0)) / both,
        "ratio_to_encode_alone": total / encode,
        "ratios": [t / f[0] for t, f in zip(totals, floors, strict=True)],
    }


def report(found):
    print(f"{found['tokens']:,} tokens, {found['machine']}")
    print(f"(a) both models up to the site, and encode   {found['forward_and_encode_s']:8.2f} s")
    print(f"(b) encode alone                             {found['encode_s']:8.2f} s")
    print(f"(c) the stage                                {found['stage_s']:8.2f} s")
    for name, seconds in found["phases_s"].items():
        print(f"      {name:<38} {seconds:8.2f} s")
    spread = f"{min(found['ratios']):.3f} to {max(found['ratios']):.3f}"
    print(f"stage / (a)  {found['ratio']:.3f} ({spread}); without the lens {found['ratio_without_lens']:.3f}")
    print(
        f"stage / (a)  {found['ratio_of_processor_time']:.3f} in processor time, loading and tokenising left out"
    )
    print(f"stage / (b)  {found['ratio_to_encode_alone']:.2f}")
    if "peak_mb" in found:
        print(
            f"peak memory  floor {found['peak_mb']['floor']:,.0f} MB, stage {found['peak_mb']['stage']:,.0f} MB"
        )


if __name__ == "__main__":
    main()
