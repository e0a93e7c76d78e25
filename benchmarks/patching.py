"""How fast sets of latents are patched: one lower half and batched upper halves, against one full forward per set.

    python benchmarks/patching.py [--layers 8] [--d-model 256] [--latents 4096] [--site resid_post.50%]
        [--sets 32] [--tokens 1024] [--vocab 4096] [--device cpu] [--threads 2] [--zoo ../shared/zoo] [--out FILE.json]

Ours is what `palimpsest diff` does with a batch: base and tuned run once, their codes are written once a set, and
the tuned model's layers above the site run on several sets at a time, with the tuned model's own logits computed once
for 16 sets. The plain way runs both models and encodes once too, then for each set the whole tuned model with the site
replaced, and its KL with logits computed anew. Both read the same text and must give the same KL. `alone` is the plain
way for one set at a time from the start, both models included, as separate evaluations would do it. A random Llama and,
where it is there, the zoo's base and math models are measured, with a random diff-SAE.
"""

import argparse
import copy
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from palimpsest.corpus import TokenBatch
from palimpsest.dictionaries import Dictionary
from palimpsest.diff.methods import Method
from palimpsest.diff.patching.effects import COLUMNS, Patcher, predicted_places
from palimpsest.diff.patching.sets import WHOLE, Variant
from palimpsest.diff.text import Places
from palimpsest.evaluate.splice import head_input_with, predictions
from palimpsest.models import LanguageModel, ModelPair, SiteMap, load_pair
from palimpsest.options import ModelOptions

SEQ = 256


def random_pair(arguments):
    """A random Llama and a copy whose weights differ a little."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    width = arguments.d_model
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=arguments.vocab,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=arguments.layers,
            num_attention_heads=max(1, width // 64),
            max_position_embeddings=SEQ,
        )
    )
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.1 * parameter.std() * torch.randn_like(parameter)
    sides = {}
    for name, model in (("base", base), ("tuned", tuned)):
        model = model.eval().to(arguments.device)
        sides[name] = LanguageModel(name, model, SiteMap(model, object(), name), None)
    return ModelPair({side: lambda model=model: model for side, model in sides.items()}, None, kind="full")


class AllPlaces:
    """Every token but the first of each sequence is read and measured."""

    def places(self, batch):
        flat = torch.arange(batch.input_ids.numel())
        flat = flat[flat % SEQ > 0]
        none = torch.zeros(len(flat), dtype=torch.bool)
        return Places(flat, ~none, none, none, batch.document.reshape(-1)[flat])


def batch_of(tokens, vocab):
    ids = torch.randint(3, vocab, (tokens // SEQ, SEQ), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids, dtype=torch.bool)
    return TokenBatch(
        ids, mask, mask, torch.arange(len(ids))[:, None].expand_as(ids).clone(), torch.zeros_like(ids)
    )


def variants_of(latents, count):
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, latents, max(1, count - len(WHOLE) + 1)).astype(int)
    sets = [rng.permutation(latents)[:size] for size in sizes]
    return [Variant(name) for name in WHOLE if name != "template"] + [
        Variant(f"set {index}", chosen, len(chosen)) for index, chosen in enumerate(sets)
    ]


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


@torch.inference_mode()
def plain(patcher, batch, variants, predicted):
    """KL of each variant by a full forward pass of its own."""
    step, tuned = patcher.read(batch), patcher.pair.tuned
    before, ids = predicted - 1, batch.input_ids.reshape(-1)[predicted]
    base = step.hidden[0].flatten(0, 1)
    # The base stands at every place, as in the patched run, so that all of it is replaced.
    everywhere = torch.arange(len(base))
    places, original = step.places.flat.to(base.device), step.heads[1].flatten(0, 1)[before.to(base.device)]
    kls = []
    for variant in variants:
        rows = base.clone()
        rows[places] += patcher.change(step, variant).to(base.dtype)
        head = head_input_with(tuned, batch.input_ids, patcher.upper.site, everywhere, rows)
        kls.append(
            predictions(tuned.head, original, [head.flatten(0, 1)[before.to(base.device)]], ids).kl[:, 0]
        )
    return torch.stack(kls, 1)


def ours(patcher, batch, variants, predicted):
    columns = patcher.nats(patcher.read(batch), variants, predicted)
    return columns[:, len(COLUMNS) : len(COLUMNS) + len(variants)]


def timed(function, device, runs):
    """The result, and the seconds of the fastest run after one that warms up."""
    seconds = []
    for _ in range(runs + 1):
        sync(device)
        started = time.perf_counter()
        found = function()
        sync(device)
        seconds.append(time.perf_counter() - started)
    return found, min(seconds[1:])


def measured(name, pair, site, arguments):
    model = pair.tuned
    torch.manual_seed(2)
    made = Dictionary(model.sites.d_model, arguments.latents, k=32, view="diff").requires_grad_(False)
    method = Method(made.to(arguments.device))
    patcher = Patcher(method, pair, site, AllPlaces(), np.zeros(made.d_model, np.float32))
    batch = batch_of(arguments.tokens, model.text_config.vocab_size)
    variants = variants_of(arguments.latents, arguments.sets)
    predicted, _ = predicted_places(AllPlaces().places(batch), batch, 9)
    kl, fast = timed(lambda: ours(patcher, batch, variants, predicted), arguments.device, arguments.runs)
    expected, slow = timed(
        lambda: plain(patcher, batch, variants, predicted), arguments.device, arguments.runs
    )
    _, alone = timed(
        lambda: plain(patcher, batch, variants[-1:], predicted), arguments.device, arguments.runs
    )
    error = float(((kl.mean(0) - expected.mean(0)).abs() / expected.mean(0).clamp_min(1e-6)).max())
    row = {
        "model": name,
        "site": patcher.upper.site,
        "layers": model.sites.n_layers,
        "skipped": patcher.upper.bypassed,
        "d_model": made.d_model,
        "vocab": model.text_config.vocab_size,
        "latents": arguments.latents,
        "sets": len(variants),
        "tokens": arguments.tokens,
        "seconds": fast,
        "plain_seconds": slow,
        "sets_per_s": len(variants) / fast,
        "plain_sets_per_s": len(variants) / slow,
        "alone_sets_per_s": 1 / alone,
        "ratio": slow / fast,
        "ratio_alone": alone * len(variants) / fast,
        "largest_relative_error_of_kl": error,
    }
    print(
        f"{name:8} {row['site']:14} {row['skipped']}/{row['layers']} layers skipped: "
        f"{row['sets_per_s']:7.1f} sets/s, plain {row['plain_sets_per_s']:7.1f} sets/s, "
        f"ratio {row['ratio']:.2f}, {row['ratio_alone']:.1f} to each alone; KL differs by at most {error:.1e}",
        flush=True,
    )
    if not error <= 1e-2:
        raise SystemExit("the two ways disagree")
    return row


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, value in (("layers", 8), ("d-model", 256), ("vocab", 4096), ("latents", 4096)):
        parser.add_argument(f"--{option}", type=int, default=value)
    for option, value in (("sets", 32), ("tokens", 1024), ("threads", 2), ("runs", 1)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--site", default="resid_post.50%")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--zoo", type=Path, default=Path(__file__).parents[2] / "shared" / "zoo")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "threads": arguments.threads,
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    rows = [measured("random", random_pair(arguments), arguments.site, arguments)]
    if arguments.zoo.is_dir():
        pair = load_pair(
            arguments.zoo / "base", arguments.zoo / "math", ModelOptions(device=arguments.device)
        )
        rows.append(measured("zoo", pair, arguments.site, arguments))
    if arguments.out:
        report = {"machine": machine, "patching": rows}
        arguments.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
