"""Latent Scaling of all latents in one pass, against encoding alone and against the direct computation.

    python benchmarks/latent_scaling.py [--latents 16384] [--d-model 256] [--k 32] [--tokens 16384] [--runs 5]
                                        [--threads 2] [--device cpu] [--out FILE.json]

A random BatchTopK crosscoder reads random activations of two models, batch after batch. Timed, the best of `--runs`:

- encoding the tokens (what any reading of them costs);
- the whole Latent Scaling pass: encoding, the reconstructions of both models and the sums of all six β of every
  latent, for 64 groups of documents (so that intervals come out of the same pass);
- the direct computation, as the paper's code does it: for the error target of a model a tensor
  [latents, batch, d_model] holds x - (x̂ - f d) of every latent, from which β is the closed form. It is timed on
  `--direct-tokens` tokens, in slices of latents that fit into 1 GiB, and scaled to all tokens.

The six β of all alive latents must agree (largest difference, relative to 1); the direct ones are computed in float32
as ours. Peak memory of our sums is printed beside that of the direct tensor at the same batch size.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from palimpsest.dictionaries import Dictionary
from palimpsest.diff.methods import Method
from palimpsest.diff.scaling import ScalingSums, betas, geometry, with_means
from palimpsest.diff.text import GROUPS
from palimpsest.options import parse_count

SLICE_BYTES = 1 << 30


def crosscoder(d_model, n_latents, k, sample):
    """Random directions, with the threshold at which k latents are active on average."""
    made = Dictionary(d_model, n_latents, activation="batch_topk", k=k, models=2, view="pair")
    made.requires_grad_(False)
    made.W_dec.mul_(0.5 + torch.rand(n_latents, 2, 1))
    pre = made.pre_activations(made.flatten_input(sample))
    made.threshold.fill_(pre.flatten().kthvalue(pre.numel() - k * len(sample)).values)
    return made


def best(runs, work):
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def scaling_pass(method, batches, documents):
    sums = ScalingSums(method)
    for x, document in zip(batches, documents, strict=True):
        codes = method.codes(x)
        sums.add(document % GROUPS, x, codes, method.dictionary.decode(codes))
    return sums


def direct(dictionary, x):
    """The six β sums of every latent by their definitions: numerators Σ f (d · Y) and Σ f²."""
    codes = dictionary.encode(x)
    dense, made = codes.dense(), dictionary.decode(codes)
    d = dictionary.W_dec[:, 1]
    n_latents, d_model = d.shape
    step = max(1, SLICE_BYTES // (4 * x.shape[0] * d_model))
    found = {name: [] for name in ("activation", "reconstruction", "error")}
    for start in range(0, n_latents, step):
        some = slice(start, start + step)
        f = dense[:, some]
        for name, parts in found.items():
            both = []
            for m in range(2):
                if name == "error":
                    own = f.T[:, :, None] * dictionary.W_dec[some, m][:, None, :]
                    target = (x[:, m] - made[:, m])[None] + own
                    sums = torch.einsum("tn,ntd->nd", f, target)
                else:
                    sums = f.T @ (x[:, m] if name == "activation" else made[:, m])
                both.append((d[some] * sums).sum(1))
            parts.append(torch.stack(both))
    return {name: torch.cat(parts, 1) for name, parts in found.items()}, dense.square().sum(0)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=parse_count, default=16384)
    parser.add_argument("--d-model", type=int, default=256)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--tokens", type=parse_count, default=16384)
    parser.add_argument("--direct-tokens", type=parse_count, default=256)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    x = torch.randn(options.tokens, 2, options.d_model, device=options.device)
    dictionary = crosscoder(options.d_model, options.latents, options.k, x[:256].cpu()).to(options.device)
    method = Method(dictionary)
    batches, documents = (
        x.split(options.batch),
        torch.arange(options.tokens).div(100, rounding_mode="floor").split(options.batch),
    )
    with torch.inference_mode():
        scaling_pass(method, batches[:1], documents[:1])
        encode = best(options.runs, lambda: [method.codes(one) for one in batches])
        ours = best(options.runs, lambda: scaling_pass(method, batches, documents))
        few = x[: options.direct_tokens]
        slow = best(1, lambda: direct(dictionary, few)) * options.tokens / options.direct_tokens
        expected, squares = direct(dictionary, few)
        sums = scaling_pass(method, [few], [torch.zeros(len(few), dtype=torch.long)])
        total = with_means(
            method, sums.finish(), few.sum(0)[None].expand(GROUPS, -1, -1).cpu().double().numpy()
        ).sum(0)
        found = betas(total, geometry(method), len(few) * GROUPS)
    alive = (squares > 0).cpu()
    scale = (dictionary.W_dec[:, 1].square().sum(1) * squares).cpu()
    difference = max(
        (torch.from_numpy(found[name]) - expected[name].cpu() / scale)[:, alive].abs().max().item()
        for name in expected
    )
    row = {
        "latents": options.latents,
        "d_model": options.d_model,
        "tokens": options.tokens,
        "encode_s": encode,
        "scaling_pass_s": ours,
        "pass_over_encode": ours / encode,
        "direct_s": slow,
        "direct_over_ours": slow / ours,
        "largest_difference": difference,
        "our_sums_bytes": GROUPS * options.latents * 6 * 8,
        "direct_tensor_bytes": 4 * options.latents * options.batch * options.d_model,
    }
    print(
        f"{options.latents:,} latents, width {options.d_model}, k {options.k}, {options.tokens:,} tokens, "
        f"{options.device}"
    )
    print(f"encoding                          {encode:8.2f} s")
    print(
        f"Latent Scaling, all latents       {ours:8.2f} s   {ours / encode:.2f} x encoding (target: at most 1.5)"
    )
    print(f"direct [latents, batch, d_model]  {slow:8.1f} s   {slow / ours:.0f} x ours (target: at least 50)")
    print(f"largest difference of a β         {difference:.1e}     (target: at most 1e-5)")
    print(
        f"sums {row['our_sums_bytes'] / 2**20:.0f} MiB; "
        f"the direct tensor would be {row['direct_tensor_bytes'] / 2**30:.1f} GiB"
    )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
