"""Checks of the Triton kernels against the PyTorch path; `test_triton.py` runs them.

As a program it writes `{check: failure or null}` as JSON: with the argument `interpret` of all checks on CPU in
Triton's interpreter, with `compile` of compiling every kernel for a GPU that need not be there. Which of the two triton
does is settled when it is imported, so each needs a process of its own.
"""

from __future__ import annotations

import json
import os
import sys
import traceback

import pytest
import torch

CHECKS: dict = {}
INTERPRETED = {"tokens": 11, "latents": 150, "d": 21}
REAL = {"tokens": 1000, "latents": 5003, "d": 300}


def check(function):
    CHECKS[function.__name__] = function
    return function


def sparse_case(world, device, density=0.1, dtype=torch.float32):
    """Random entries with an empty row at each end and one full row, and what they are as a matrix."""
    tokens, latents = world["tokens"], world["latents"]
    dense = torch.randn(tokens, latents) * (torch.rand(tokens, latents) < density)
    dense[0] = dense[-1] = 0
    dense[2] = torch.randn(latents)
    csr = dense.to_sparse_csr()
    parts = csr.crow_indices(), csr.col_indices(), csr.values().to(dtype)
    return dense.to(device), *(part.to(device) for part in parts)


def weights(world, device, integers=False):
    """Random activations, encoder and bias whose products are exact in fp32, however they are summed.

    Both paths then see the same pre-activations, so that they must select the same. Integers give many ties.
    """
    shape, tokens = (world["latents"], world["d"]), (world["tokens"], world["d"])
    if integers:
        x = torch.randint(-2, 3, tokens).float()
        weight, bias = torch.randint(-1, 2, shape).float(), torch.randint(-1, 2, shape[:1]).float()
    else:
        x, weight, bias = (torch.randn(size).mul(8).round() / 8 for size in (tokens, shape, shape[:1]))
    return x.to(device), weight.to(device), bias.to(device)


def close(found, expected, rtol=1e-4, atol=1e-4):
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, check_dtype=False)


def scatter(sparse, tokens, latents):
    row = torch.arange(tokens, device=sparse.index.device).repeat_interleave(sparse.crow.diff())
    dense = torch.zeros(tokens, latents, device=sparse.value.device)
    return dense.index_put_((row, sparse.index), sparse.value, accumulate=True)


@check
def row_sum_and_row_dot(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops, triton_rows

    for piece, dtype in ((256, torch.float32), (3, torch.float32), (7, torch.bfloat16)):
        patch.setattr(triton_rows, "PIECE", piece)
        patch.setattr(triton_rows, "DENSE_SHARE", {torch.bfloat16: 2.0})
        patch.setattr(triton_rows, "DENSE_SHARE_FP32", 2.0)
        dense, crow, index, value = sparse_case(world, device)
        rows = torch.randn(world["latents"], world["d"]).to(device, dtype)
        left = torch.randn(world["tokens"], world["d"]).to(device, dtype)
        found = triton_ops.row_sum(crow, index, value, rows)
        assert found.dtype == torch.float32 and not found[0].any() and not found[-1].any()
        close(found, dense.double() @ rows.double(), atol=1e-3)
        products = left.double() @ rows.double().T
        close(triton_ops.row_dot(crow, index, left, rows), products[dense != 0])


@check
def row_sum_of_a_frequent_latent(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops, triton_rows

    patch.setattr(triton_rows, "PIECE", 4)
    tokens = 10 * world["tokens"]
    crow = torch.tensor([0, 0, tokens, tokens], device=device)
    x, value = torch.randn(tokens, world["d"], device=device), torch.randn(tokens, device=device)
    found = triton_ops.row_sum(crow, torch.arange(tokens, device=device), value, x)
    close(found[1], value.double() @ x.double(), atol=1e-3)
    assert not found[0].any() and not found[2].any()
    again = triton_ops.row_sum(crow, torch.arange(tokens, device=device), value, x)
    assert torch.equal(found, again)


@check
def nothing_to_do(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops

    none = torch.zeros(0, dtype=torch.long, device=device)
    crow, rows = torch.zeros(4, dtype=torch.long, device=device), torch.randn(5, 7, device=device)
    assert torch.equal(triton_ops.row_sum(crow, none, rows[0, :0], rows), rows.new_zeros(3, 7))
    assert triton_ops.row_dot(crow, none, rows[:3], rows).shape == (0,)
    grouped = triton_ops.by_latent(crow, none, 5)
    assert grouped.crow.tolist() == [0] * 6 and grouped.token.shape == grouped.place.shape == (0,)
    assert triton_ops.row_sum(crow[:1], none, rows[0, :0], rows).shape == (0, 7)
    low = torch.full((5,), -100.0, device=device)
    sparse = triton_ops.encode_above(rows[:3], rows, low, low)
    assert sparse.crow.tolist() == [0] * 4 and sparse.value.shape == (0,)
    none_kept, smallest = triton_ops.encode_batch_topk(rows[:3], rows, low, 0)
    assert none_kept.value.shape == (0,) and smallest.item() == torch.inf


@check
def the_dense_path_gives_the_same(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops, triton_rows

    assert triton_rows.dense_is_faster(64, 8192) and not triton_rows.dense_is_faster(64, 65_536)
    dense, crow, index, value = sparse_case(world, device)
    # Padding of fixed-width codes: latent 0 over and over, worth nothing.
    crow = torch.cat([crow, crow[-1:] + 5])
    index, value = torch.cat([index, index.new_zeros(5)]), torch.cat([value, value.new_zeros(5)])
    rows = torch.randn(world["latents"], world["d"], device=device)
    left = torch.randn(world["tokens"] + 1, world["d"], device=device)
    patch.setattr(triton_rows, "DENSE_SHARE_FP32", 2.0)
    sums = triton_ops.row_sum(crow, index, value, rows)
    dots = triton_ops.row_dot(crow, index, left, rows)
    for tokens in (4, 10**6):
        patch.setattr(triton_rows, "DENSE_BYTES", tokens * world["latents"] * 4)
        close(triton_rows.dense_row_sum(crow, index, value, rows), sums, atol=1e-3)
        close(triton_rows.dense_row_dot(crow, index, left, rows), dots)


@check
def entries_by_latent(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops

    _, crow, index, _ = sparse_case(world, device)
    index[5:9] = world["latents"] - 1
    for n_latents in (world["latents"], 40_000):
        found, expected = (ops.by_latent(crow, index, n_latents) for ops in (triton_ops, torch_ops))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@check
def rows_of_unit_norm(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops

    rows, gradient = torch.randn(5, world["d"], device=device), torch.randn(5, world["d"], device=device)
    rows[1] = 0
    close(triton_ops.normalise_rows_(rows.clone()), torch_ops.normalise_rows_(rows.clone()))
    wide = torch.randn(3, 1030, device=device)
    assert triton_ops.normalise_rows_(wide) is wide
    close(wide.norm(dim=1), torch.ones(3, device=device))
    close(triton_ops.project_rows_(gradient.clone(), rows), torch_ops.project_rows_(gradient.clone(), rows))
    turned = torch.randn(world["d"], 5, device=device).T
    close(triton_ops.normalise_rows_(turned).norm(dim=1), torch.ones(5, device=device))


@check
def topk_with_ties(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops, triton_select

    x, weight, bias = weights(world, device, integers=True)
    scale = torch.randint(1, 3, bias.shape, device=device).float()
    # Several tiles, the last one short.
    patch.setattr(triton_select, "TILE_BYTES", 4 * world["latents"] * 4)
    for k, scaled, precision in ((3, False, "float32"), (7, True, "bfloat16"), (60, False, "bfloat16")):
        options = {"scale": scale if scaled else None, "precision": precision}
        value, index = triton_ops.encode_topk(x, weight, bias, k, **options)
        expected = torch_ops.encode_topk(x, weight, bias, k, scale=options["scale"], exact=True)
        assert torch.equal(index, expected[1])
        close(value, expected[0])


@check
def topk_of_few_positives(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops

    x, weight, bias = weights(world, device)
    bias -= 2.5 * world["d"] ** 0.5
    x[1] = -x[1].abs() * 1e-9
    for precision in ("float32", "bfloat16"):
        value, index = triton_ops.encode_topk(x, weight, bias, 40, precision=precision)
        expected = torch_ops.encode_topk(x, weight, bias, 40, exact=True)
        assert not value[1].any() and not index[1].any()
        close(value, expected[0])
        assert (index == expected[1]).float().mean() > 0.99
    k = world["latents"]
    value, index = triton_ops.encode_topk(x[:2], weight, bias, k)
    close(value, torch_ops.encode_topk(x[:2], weight, bias, k)[0])


@check
def topk_beyond_the_registers(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops, triton_select

    x, weight, bias = weights(world, device, integers=True)
    patch.setattr(triton_select, "IN_REGISTERS", 16)
    value, index = triton_ops.encode_topk(x, weight, bias, 9, exact=True)
    expected = torch_ops.encode_topk(x, weight, bias, 9, exact=True)
    close(value, expected[0])
    assert torch.equal(index, expected[1])
    close(triton_ops.encode_topk(x, weight, bias, 9)[0], expected[0])


@check
def bfloat16_agrees_with_float32(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops

    x, weight, bias = weights(world | {"d": 64, "latents": 4 * world["latents"]}, device)
    x, weight = x + torch.rand_like(x) / 8, weight + torch.rand_like(weight) / 8
    k = 12
    exact, rough = (
        triton_ops.encode_topk(x, weight, bias, k, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    kept = (rough[1][:, :, None] == exact[1][:, None, :]).any(dim=2)
    assert kept.float().mean() >= 0.99
    pre = x.double() @ weight.double().T + bias.double()
    close(rough[0], pre.gather(1, rough[1]), rtol=1e-5, atol=1e-4)


@check
def batch_topk(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops, triton_select

    scale = torch.randint(1, 3, (world["latents"],), device=device).float()
    if world is INTERPRETED:
        # What a real batch has: several blocks of keys.
        patch.setattr(triton_select, "SCAN", 256)
    patch.setattr(triton_select, "TILE_BYTES", 4 * world["latents"] * 4)
    for integers, count, scaled, precision in (
        (True, 3 * world["tokens"], False, "float32"),
        (True, 3 * world["tokens"] + 1, True, "bfloat16"),
        (False, 5 * world["tokens"], True, "float32"),
        (False, 1, False, "bfloat16"),
    ):
        x, weight, bias = weights(world, device, integers)
        chosen = scale if scaled else None
        found, smallest = triton_ops.encode_batch_topk(
            x, weight, bias, count, scale=chosen, precision=precision, guess=1e9
        )
        expected, cut = torch_ops.encode_batch_topk(x, weight, bias, count, scale=chosen)
        assert torch.equal(found.crow, expected.crow) and torch.equal(found.index, expected.index)
        close(found.value, expected.value)
        close(smallest, cut)


@check
def batch_topk_of_few_positives(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops

    x, weight, bias = weights(world, device)
    bias -= 2.5 * world["d"] ** 0.5
    count = world["tokens"] * world["latents"] // 3
    found, smallest = triton_ops.encode_batch_topk(x, weight, bias, count)
    expected, cut = torch_ops.encode_batch_topk(x, weight, bias, count)
    assert found.value.shape == (count,) and 0 < (found.value > 0).sum() == expected.value.shape[0] < count
    shape = world["tokens"], world["latents"]
    close(scatter(found, *shape), scatter(expected, *shape))
    close(smallest, cut)


@check
def encode_above(world, device, patch):
    from palimpsest.dictionaries.kernels import torch_ops, triton_ops, triton_select

    patch.setattr(triton_select, "TILE_BYTES", 4 * world["latents"] * 4)
    for integers in (True, False):
        x, weight, bias = weights(world, device, integers)
        x[1] = 0
        threshold = torch.randint(-1, 4, bias.shape, device=device).float()
        found, expected = (ops.encode_above(x, weight, bias, threshold) for ops in (triton_ops, torch_ops))
        assert torch.equal(found.crow, expected.crow) and torch.equal(found.index, expected.index)
        close(found.value, expected.value)


@check
def nan_is_not_lost(world, device, patch):
    from palimpsest.dictionaries.kernels import triton_ops

    x, weight, bias = weights(world, device)
    x[1, 0] = torch.nan
    for precision in ("float32", "bfloat16"):
        value, _ = triton_ops.encode_topk(x, weight, bias, 3, precision=precision)
        assert value[1].isnan().all() and not value[0].isnan().any()
        found, _ = triton_ops.encode_batch_topk(x, weight, bias, 9, precision=precision)
        assert found.value.isnan().all()


@check
def gradients(world, device, patch):
    from palimpsest.dictionaries import kernels
    from palimpsest.dictionaries.kernels.autograd import decode, encode_values

    world = world | {"latents": 60}
    x, weight, bias = weights(world, device)
    decoder = torch.randn_like(weight)
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias, decoder, x[0])]
    target, k = torch.randn_like(x), 6
    results = {}
    for backend in ("triton", "torch"):
        with kernels.use(backend):
            assert kernels.backend(device) == backend
            value, index = kernels.encode_topk(x, weight, bias, k, exact=True)
            crow, index = torch.arange(x.shape[0] + 1, device=device) * k, index.view(-1)
            grouped = kernels.by_latent(crow, index, world["latents"])
            given = [*leaves[:3], crow, index, grouped]
            value = encode_values(*given, value.view(-1))
            output = decode(value, leaves[3], leaves[4], crow, index, grouped)
            results[backend] = torch.autograd.grad((output - target).square().sum(), leaves)
    pre = leaves[0] @ leaves[1].T + leaves[2]
    kept = torch.zeros_like(pre).scatter(1, pre.topk(k).indices, 1.0)
    output = (pre.relu() * kept) @ leaves[3] + leaves[4]
    dense = torch.autograd.grad((output - target).square().sum(), leaves)
    for name in results:
        for found, expected in zip(results[name], dense, strict=True):
            size = expected.abs().max()
            close(found / size, expected / size)


def run(name, world, device):
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        CHECKS[name](world, device, patch)


def interpret() -> dict:
    from jaxtyping import install_import_hook

    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    with install_import_hook("palimpsest.dictionaries", "beartype.beartype"):
        return {name: failure(lambda name=name: run(name, INTERPRETED, "cpu")) for name in CHECKS}


def failure(action) -> str | None:
    try:
        action()
    except Exception:
        return traceback.format_exc()
    return None


TYPES = {
    **dict.fromkeys(("plan", "pieces", "index", "chosen", "kept", "ends"), "*i64"),
    **dict.fromkeys(("keys", "state", "counts"), "*i32"),
    **dict.fromkeys(("value", "out", "scale", "floor"), "*fp32"),
    **dict.fromkeys(("d", "latents", "columns", "wanted", "count", "size"), "i32"),
    **dict.fromkeys(("rows", "left", "right", "gradient", "tile"), "*bf16"),
    "tiny": "fp32",
}
ROWS = {"ENTRIES": 8, "COLUMNS": 256}
SCAN = {"BLOCK": 4096}
CONSTANTS = {
    "sum_rows": ROWS,
    "merge_rows": {"COLUMNS": 256},
    "dot_rows": ROWS,
    "normalise": {"COLUMNS": 1024},
    "project": {"COLUMNS": 1024},
    "group_keys": {"GROUP": 32, "BLOCK": 4096},
    "member_keys": {"GROUP": 32, "BLOCK": 64, "scale": None},
    "pick": {"BLOCK": 2048},
    "count_digits": SCAN | {"SHIFT": 16},
    "settle_digit": {"SHIFT": 16},
    "count_kept": SCAN,
    "write_kept": SCAN,
    "count_above": {"BLOCK": 2048},
    "write_above": {"BLOCK": 2048},
}


def build(function, constants) -> None:
    """Compile a kernel down to the machine code of an H100."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=function, signature=signature, constexprs=fixed)
    built = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
    assert len(built.asm["cubin"]) > 1000


def compile_all() -> dict:
    from palimpsest.dictionaries.kernels import triton_kernels

    kernels = {name for name, item in vars(triton_kernels).items() if hasattr(item, "arg_names")}
    # One has no launch of its own: it is part of others.
    assert kernels - {"key_of"} == set(CONSTANTS), "every kernel has its constants here"
    return {
        name: failure(lambda name=name: build(getattr(triton_kernels, name), CONSTANTS[name]))
        for name in CONSTANTS
    }


if __name__ == "__main__":
    json.dump({"interpret": interpret, "compile": compile_all}[sys.argv[1]](), sys.stdout)
