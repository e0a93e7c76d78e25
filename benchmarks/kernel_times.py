"""What each sparse kernel costs beside the encode GEMM, with the PyTorch operators and with the C++ ones.

    python benchmarks/kernel_times.py [--latents 4096] [--d 256] [--k 32] [--batch 4096] [--models 1] [--threads N]
                                 [--runs 9] [--out FILE.json]
    python benchmarks/kernel_times.py --dictionary DICT --store STORE      # agreement on real activations only

Backends are timed in turn; the median of the runs is reported. GB/s counts what a kernel must at least touch: one
gathered row per entry, or the tile once. `x GEMM` is the time over that of the products alone, in the same tiles and
the same precision; for encode kernels it is what selection adds. Agreement is the share of fp32 selections that the
bf16 GEMM leads to.
"""

import argparse
import json
import platform
import statistics
import time
from pathlib import Path

import torch

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.kernels import torch_ops


def sample(batch, features, latents, seed=0):
    """Activations that are sparse sums of directions plus noise, and an encoder that has half learned them."""
    made = torch.Generator().manual_seed(seed)
    directions = torch.randn(latents, features, generator=made)
    directions /= directions.norm(dim=1, keepdim=True)
    active = torch.randint(0, latents, (batch, 24), generator=made)
    x = (directions[active] * torch.rand(batch, 24, 1, generator=made)).sum(dim=1) * 3
    x += 0.2 * torch.randn(batch, features, generator=made)
    weight = directions + 0.5 * torch.randn(latents, features, generator=made) / features**0.5
    return x.contiguous(), weight.contiguous(), 0.1 * torch.randn(latents, generator=made)


def products_alone(x, weight, precision):
    for _ in torch_ops.products(x, weight, precision):
        pass


def cases(options):
    """Name, work, bytes it must touch, and the GEMM that it contains."""
    features = options.d * options.models
    x, weight, bias = sample(options.batch, features, options.latents)
    scale = 0.5 + torch.rand(options.latents)
    k, count = options.k, options.k * options.batch
    value, index = (part.reshape(-1) for part in kernels.encode_topk(x, weight, bias, k))
    crow = torch.arange(options.batch + 1) * k
    grouped = kernels.by_latent(crow, index, options.latents)
    sorted_value = value[grouped.place]
    smallest = float(kernels.encode_batch_topk(x, weight, bias, count)[1])
    threshold = torch.full((options.latents,), smallest)
    gather, tile = 4 * count * features, 4 * options.batch * options.latents
    yield "row_sum by token", lambda: kernels.row_sum(crow, index, value, weight), gather, None
    by_latent = grouped.crow, grouped.token, sorted_value
    yield "row_sum by latent", lambda: kernels.row_sum(*by_latent, x), gather, None
    yield "row_dot", lambda: kernels.row_dot(crow, index, x, weight), gather, None
    yield "by_latent", lambda: kernels.by_latent(crow, index, options.latents), 32 * count, None
    for precision in kernels.PRECISIONS:
        share = tile if precision == "float32" else tile // 2
        common = {"precision": precision}
        yield (f"GEMM {precision}", lambda p=precision: products_alone(x, weight, p), share, None)
        for name, ranked in (("", None), (" scaled", scale)):
            arguments = common | {"scale": ranked}
            yield (
                f"encode_topk{name} {precision}",
                lambda a=arguments: kernels.encode_topk(x, weight, bias, k, **a),
                share,
                precision,
            )
        arguments = common | {"guess": 0.9 * smallest}
        yield (
            f"encode_batch_topk {precision}",
            lambda a=arguments: kernels.encode_batch_topk(x, weight, bias, count, **a),
            share,
            precision,
        )
    yield "encode_above", lambda: kernels.encode_above(x, weight, bias, threshold), tile, "float32"
    rows, gradient = weight.clone(), torch.randn_like(weight)
    yield "normalise_rows_", lambda: kernels.normalise_rows_(rows), 8 * rows.numel(), None
    yield "project_rows_", lambda: kernels.project_rows_(gradient, rows), 12 * rows.numel(), None


def real(dictionary, store, batch, batches=8):
    """A trained encoder and centred activations at its site, as the trainer's encode step sees them."""
    from palimpsest.buffer import ShuffleBuffer
    from palimpsest.dictionaries import load_dictionary
    from palimpsest.store import ActivationStore

    made, held = load_dictionary(dictionary), ActivationStore(store)
    rows = ShuffleBuffer(
        lambda position: held.stream(made.site, position, seed=0),
        capacity=4 * batch,
        batch_size=batch,
        seed=0,
    )
    weight = made.W_enc.flatten(0, 1).T.contiguous()
    for _, acts in zip(range(batches), rows, strict=False):
        sides = {"base": acts[:, :1], "tuned": acts[:, -1:], "diff": acts[:, -1:] - acts[:, :1], "pair": acts}
        yield sides[made.view].float().flatten(1) - made.b_dec.view(-1), weight, made.b_enc


def agreement(x, weight, bias, k):
    """Share of the fp32 selections that bf16 finds, for topk and batch_topk."""
    batch, latents = len(x), len(weight)
    found = {}
    for name in ("topk", "batch_topk"):
        kept = []
        for precision in kernels.PRECISIONS:
            mask = torch.zeros(batch, latents, dtype=torch.bool)
            if name == "topk":
                value, index = kernels.encode_topk(x, weight, bias, k, precision=precision)
                mask.scatter_(1, index, value > 0)
            else:
                entries, _ = kernels.encode_batch_topk(x, weight, bias, k * batch, precision=precision)
                mask[torch.arange(batch).repeat_interleave(entries.crow.diff()), entries.index] = True
            kept.append(mask)
        found[name] = float((kept[0] & kept[1]).sum() / kept[0].sum())
    return found


def measure(options, backends):
    rows = []
    for name, work, touched, gemm in cases(options):
        times = {backend: [] for backend in backends}
        for turn in range(options.runs + 1):
            for backend in backends:
                with kernels.use(backend):
                    started = time.perf_counter()
                    work()
                    if turn:
                        times[backend].append(time.perf_counter() - started)
        row = {"name": name, "gemm": gemm}
        for backend, taken in times.items():
            middle = statistics.median(taken)
            row[backend] = {"ms": middle * 1e3, "best_ms": min(taken) * 1e3, "GB/s": touched / middle / 1e9}
        rows.append(row)
    alone = {row["name"]: row for row in rows}
    for row in rows:
        if row["gemm"]:
            for backend in backends:
                base = alone[f"GEMM {row['gemm']}"][backend]
                row[backend]["x GEMM"] = row[backend]["ms"] / base["ms"]
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("latents", 4096),
        ("d", 256),
        ("k", 32),
        ("batch", 4096),
        ("models", 1),
        ("runs", 9),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dictionary", type=Path)
    parser.add_argument("--store", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.dictionary:
        shares = [
            agreement(*each, options.k) for each in real(options.dictionary, options.store, options.batch)
        ]
        for name in shares[0]:
            print(f"bf16 {name} agrees on {statistics.mean(share[name] for share in shares):.4%}")
        return
    backends = ["torch", "native"] if kernels.backend("cpu") == "native" else ["torch"]
    rows = measure(options, backends)
    print(
        f"d {options.d} x {options.models}, {options.latents} latents, k {options.k}, batch {options.batch}"
    )
    print(f"{'kernel':32}" + "".join(f"{b + ' ms':>12}{'GB/s':>8}{'x GEMM':>8}" for b in backends))
    for row in rows:
        line = f"{row['name']:32}"
        for backend in backends:
            found = row[backend]
            ratio = f"{found['x GEMM']:.2f}" if "x GEMM" in found else ""
            line += f"{found['ms']:12.2f}{found['GB/s']:8.1f}{ratio:>8}"
        print(line)
    agreed = agreement(*sample(options.batch, options.d * options.models, options.latents, seed=1), options.k)
    print(", ".join(f"bf16 {name} agrees on {share:.4%}" for name, share in agreed.items()))
    if options.out:
        machine = {"cpu": cpu_name(), "threads": options.threads, "torch": torch.__version__}
        sizes = {name: value for name, value in vars(options).items() if name != "out"}
        report = {"machine": machine, "sizes": sizes, "rows": rows, "agreement": agreed}
        options.out.write_text(json.dumps(report, indent=2))


def cpu_name():
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.is_file() else []
    return names[0].split(":")[1].strip() if names else platform.processor()


if __name__ == "__main__":
    main()
