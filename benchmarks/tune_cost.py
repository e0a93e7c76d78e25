"""What training and running a latent adapter costs, beside LoRA, the base alone and a dense implementation.

    python benchmarks/tune_cost.py [--rounds 5] [--batch 4] [--seq 256] [--new-tokens 48] [--threads 2]
        [--device cpu] [--zoo ../shared/zoo] [--dictionary runs/zoo/dictionaries/base/topk] [--out FILE.json]

The zoo's base (site resid_post.1, its own dictionary where there is one) and a random Llama (8 layers, width 512,
vocabulary 8,192; random TopK dictionaries of 4,096 and 16,384 latents, k = 32, at half depth) take the same batch
through:

- the base's forward pass alone;
- a training step (forward, backward, AdamW) of LoRA with r = 8 on all linear layers, of the components scale,
  active-bias, gate and low-rank, and of a dense scale: z as a matrix [tokens, latents], dec(f(z)) + (x - dec(z)),
  plain autograd, as a first implementation does it. Rounds are interleaved, the median is printed.
- the dictionary's encoding of the site's activations alone: no adapter that reads latents can cost less.

Memory is what autograd saves for the backward pass (unique storages, the weights left out); it may exceed LoRA's by
the codes. Generation writes `--new-tokens` greedily with a cache, a token of the base and one of the adapted model in
turn; the median difference stands beside the edit of one token and one encoding of one token, each timed after a pass
of the base, which leaves the caches as generation does. Targets: a scale step at most 1.25 LoRA steps, saved memory at
most LoRA's plus the codes, generation at most one encoding per token more.
"""

import argparse
import copy
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from palimpsest.dictionaries import Dictionary, load_dictionary
from palimpsest.models import SiteMap, replace
from palimpsest.tune.adapter import LatentConfig, latent_layers

COMPONENTS = ("scale", "active-bias", "gate", "low-rank")
K, RANK = 32, 8
TARGET = 1.25


def sync(device):
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def clock(work, device):
    sync(device)
    started = time.perf_counter()
    work()
    sync(device)
    return time.perf_counter() - started


def interleaved(works, rounds, device):
    """The median seconds of each work; every round does all of them, after one that warms up."""
    seconds = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            seconds[name].append(clock(work, device))
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


class Dense(nn.Module):
    """A scale of latents with every matrix written out."""

    def __init__(self, dictionary):
        super().__init__()
        self.dictionary = [dictionary]
        self.s = nn.Parameter(torch.zeros(dictionary.n_latents, device=dictionary.W_dec.device))

    def forward(self, hidden):
        d = self.dictionary[0]
        x = hidden.flatten(0, 1)
        pre = ((x - d.b_dec[0]) @ d.W_enc[0] + d.b_enc).relu()
        kept = pre.topk(K, dim=1).indices
        z = torch.zeros_like(pre).scatter(1, kept, pre.gather(1, kept))
        error = (x - z @ d.W_dec[:, 0] - d.b_dec[0]).detach()
        changed = (1 + self.s) * z
        return (changed @ d.W_dec[:, 0] + d.b_dec[0] + error).view(hidden.shape)


def dense_forward(model, sites, site, dense):
    def forward(ids):
        with replace(sites, site, dense):
            return model(input_ids=ids, labels=ids).loss

    return forward


class Variant(NamedTuple):
    """A method: its loss on token ids, the module that is trained, and the tensors that are no activations."""

    loss_of: Callable[[torch.Tensor], torch.Tensor]
    module: nn.Module
    weights: list[torch.Tensor]


def variants(base, dictionary, site):
    """Every method on a copy of the base."""
    made = {}
    configs = {"LoRA": LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")}
    for component in COMPONENTS:
        rank = RANK if component in ("gate", "low-rank") else None
        configs[component] = LatentConfig(target_hooks=[(dictionary, site)], component=component, rank=rank)
    for name, config in configs.items():
        model = get_peft_model(copy.deepcopy(base), config).train()
        loss_of = lambda ids, model=model: model(input_ids=ids, labels=ids).loss  # noqa: E731
        made[name] = Variant(loss_of, model, tensors_of(model))
    plain = copy.deepcopy(base).requires_grad_(False)
    dense = Dense(dictionary)
    loss_of = dense_forward(plain, SiteMap(plain, object(), "base"), site, dense)
    made["dense scale"] = Variant(loss_of, dense, tensors_of(plain, dictionary, dense))
    return made


def trained(module):
    return [one for one in module.parameters() if one.requires_grad]


def step(loss_of, ids, optimiser):
    loss_of(ids).backward()
    optimiser.step()
    optimiser.zero_grad()


def saved_bytes(variant, ids):
    """Bytes of the unique storages that autograd keeps, those of weights left out."""
    weights = {one.untyped_storage().data_ptr() for one in variant.weights}
    found = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = variant.loss_of(ids)
    total = sum(found.values())
    del loss
    return total


def tensors_of(*modules):
    return [one for module in modules for part in (module.parameters(), module.buffers()) for one in part]


def decoding(model, prompt):
    """Greedy generation with a cache, one token for each step of the iterator."""
    ids, cache = prompt, None
    while True:
        made = model(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = made.past_key_values, made.logits[:, -1:].argmax(-1)
        yield


def generation(base, adapted, dictionary, acts, arguments):
    """Median seconds per new token of the base, of what the adapter adds, and of editing and encoding one token."""
    device = arguments.device
    prompt = torch.randint(3, base.config.vocab_size, (1, 16)).to(device)
    (layer,) = latent_layers(adapted)
    found = {"base": [], "added": [], "edit": [], "encode": []}
    adapted.eval()
    one = acts[:1]
    with torch.inference_mode():
        for _ in range(arguments.rounds):
            plain, edited = decoding(base, prompt), decoding(adapted, prompt)
            next(plain), next(edited)
            for _ in range(arguments.new_tokens):
                # One after the other: other work on the machine meets all alike, and no weights stay in a cache.
                before = clock(lambda d=plain: next(d), device)
                found["encode"].append(clock(lambda: dictionary.encode(one, check=False), device))
                after = clock(lambda d=edited: next(d), device)
                found["base"].append(before)
                found["added"].append(after - before)
                next(plain)
                found["edit"].append(clock(lambda: layer.edit(one[None], ["default"]), device))
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def measured(name, base, dictionary, site, arguments):
    device = arguments.device
    ids = torch.randint(3, base.config.vocab_size, (arguments.batch, arguments.seq)).to(device)
    sites = SiteMap(base, object(), name)
    seen = []
    with torch.no_grad(), replace(sites, site, lambda hidden: seen.append(hidden) or hidden):
        base(input_ids=ids)
    acts = seen[0].flatten(0, 1)
    made = variants(base, dictionary, site)
    optimisers = {key: torch.optim.AdamW(trained(one.module), lr=1e-3) for key, one in made.items()}

    @torch.no_grad()
    def forward():
        base(input_ids=ids, labels=ids)

    @torch.no_grad()
    def encode():
        dictionary.encode(acts, check=False)

    works = {"base forward": forward, "encode": encode}
    for key, one in made.items():
        works[key] = lambda loss_of=one.loss_of, key=key: step(loss_of, ids, optimisers[key])
    seconds = interleaved(works, arguments.rounds, device)
    memory = {key: saved_bytes(one, ids) for key, one in made.items()}
    with torch.no_grad():
        codes = dictionary.encode(acts, check=False)
    row = {
        "model": name,
        "site": site,
        "latents": dictionary.n_latents,
        "tokens": ids.numel(),
        "seconds": seconds,
        "trained": {key: sum(p.numel() for p in trained(one.module)) for key, one in made.items()},
        "scale_over_lora": seconds["scale"] / seconds["LoRA"],
        "dense_over_scale": seconds["dense scale"] / seconds["scale"],
        "saved_bytes": memory,
        "codes_bytes": sum(
            one.numel() * one.element_size() for one in (codes.crow, codes.indices, codes.values)
        ),
        "one_token_s": generation(base, made["scale"].module, dictionary, acts, arguments),
    }
    show(row)
    return row


def verdict(value, target):
    return "met" if value <= target else "missed"


def show(row):
    seconds, memory, mib = row["seconds"], row["saved_bytes"], 2**20
    print(f"\n{row['model']}, {row['site']}, {row['latents']:,} latents, batch of {row['tokens']:,} tokens")
    print(f"{'':14}{'ms a step':>10}{'to LoRA':>9}{'saved MiB':>11}{'trained':>12}")
    for name, spent in seconds.items():
        kept = f"{memory[name] / mib:>11.1f}{row['trained'][name]:>12,}" if name in memory else ""
        print(f"{name:14}{1000 * spent:>10.1f}{spent / seconds['LoRA']:>9.2f}{kept}")
    ratio = row["scale_over_lora"]
    print(f"scale / LoRA {ratio:.2f} (target: at most {TARGET}: {verdict(ratio, TARGET)})")
    spent, kept = row["dense_over_scale"], memory["dense scale"] / memory["scale"]
    print(f"dense / scale {spent:.2f} in time, {kept:.2f} in saved memory")
    allowed = memory["LoRA"] + row["codes_bytes"]
    print(
        f"saved by scale {memory['scale'] / mib:.1f} MiB, by LoRA with the codes {allowed / mib:.1f} MiB "
        f"(target: no more: {verdict(memory['scale'], allowed)}); the codes are {row['codes_bytes'] / mib:.2f} MiB"
    )
    one = {name: 1e6 * found for name, found in row["one_token_s"].items()}
    print(
        f"generation {one['base']:.0f} µs a token, {one['added']:.0f} µs more with scale, of which the edit is "
        f"{one['edit']:.0f} µs; one encoding {one['encode']:.0f} µs "
        f"(target: no more: {verdict(one['added'], one['encode'])})",
        flush=True,
    )


def random_llama(arguments):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        max_position_embeddings=1024,
    )
    return LlamaForCausalLM(config).eval().to(arguments.device)


def random_dictionary(d_model, n_latents, device):
    torch.manual_seed(1)
    return Dictionary(d_model, n_latents, activation="topk", k=K).requires_grad_(False).to(device)


def zoo_rows(arguments):
    from transformers import AutoModelForCausalLM

    if not (arguments.zoo / "base").is_dir():
        print(f"no zoo at {arguments.zoo}")
        return []
    base = AutoModelForCausalLM.from_pretrained(arguments.zoo / "base", dtype=torch.float32)
    base = base.eval().to(arguments.device)
    if arguments.dictionary.is_dir():
        dictionary = load_dictionary(arguments.dictionary, device=arguments.device).requires_grad_(False)
    else:
        dictionary = random_dictionary(base.config.hidden_size, 4096, arguments.device)
    return [measured("zoo", base, dictionary, dictionary.site or "resid_post.1", arguments)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for option, value in (("rounds", 5), ("batch", 4), ("seq", 256), ("new-tokens", 48), ("threads", 2)):
        parser.add_argument(f"--{option}", type=int, default=value)
    parser.add_argument("--latents", type=int, nargs="*", default=[4096, 16384])
    parser.add_argument("--device", default="cpu")
    repository = Path(__file__).parents[1]
    parser.add_argument("--zoo", type=Path, default=repository.parent / "shared" / "zoo")
    parser.add_argument("--dictionary", type=Path, default=repository / "runs/zoo/dictionaries/base/topk")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore", FutureWarning)
    rows = zoo_rows(arguments)
    base = random_llama(arguments)
    for n_latents in arguments.latents:
        dictionary = random_dictionary(base.config.hidden_size, n_latents, arguments.device)
        rows.append(measured("random", base, dictionary, "resid_post.3", arguments))
    if arguments.out:
        machine = {
            "cpu": platform.processor() or platform.machine(),
            "device": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
            "threads": arguments.threads,
            "load": os.getloadavg()[0],
            "torch": torch.__version__,
        }
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({"machine": machine, "tune": rows}, indent=1) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
