"""The kernels in C++ for CPU and fp32, called on raw pointers; Python's lock is released while they run.

The GEMM stays PyTorch's, tile by tile; selection reads each tile while it is in the cache.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries.kernels import build, torch_ops
from palimpsest.dictionaries.kernels.entries import Grouped, Sparse

INCOMPLETE = -3
"""The batch's guess was too high: entries are missing."""

_POINTER, _LONG, _INT, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple] = {
    "row_sum": (_LONG, *[_POINTER] * 4, *[_LONG] * 3, _POINTER, _INT),
    "row_dot": (_LONG, *[_POINTER] * 4, *[_LONG] * 3, _POINTER, _INT),
    "by_latent": (_LONG, *[_POINTER] * 2, *[_LONG] * 2, *[_POINTER] * 3, _INT),
    "topk": (
        *(_LONG, _POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _LONG, _LONG),
        *(_POINTER, _POINTER, _LONG, _POINTER, _POINTER, _INT),
    ),
    "batch_new": (_POINTER, _LONG, _FLOAT, _FLOAT),
    "batch_free": (None, _POINTER),
    "batch_add": (_LONG, _POINTER, _POINTER, _INT, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "batch_finish": (_LONG, _POINTER, _POINTER, _POINTER, _LONG, *[_POINTER] * 6, _INT),
    "above_add": (_LONG, _POINTER, _POINTER, _LONG, _LONG, _POINTER, _POINTER, _INT),
    "above_finish": (None, *[_POINTER] * 4),
    "normalise_rows": (None, _POINTER, _LONG, _LONG, _INT),
    "project_rows": (None, _POINTER, _POINTER, _LONG, _LONG, _INT),
}


@cache
def _functions() -> dict[str, ctypes._NamedFuncPointer] | None:
    """The compiled functions by name; None where there is no compiler. Tried once per process."""
    library = build.library()
    if library is None:
        return None
    found = {}
    for name, (result, *arguments) in _SIGNATURES.items():
        found[name] = library[f"palimpsest_{name}"]
        found[name].restype, found[name].argtypes = result, arguments
    return found


def available() -> bool:
    """Whether these kernels work here; builds them on the first call."""
    return _functions() is not None


def _call(name: str, *arguments: object) -> int:
    functions = _functions()
    assert functions is not None
    result = functions[name](*arguments) or 0
    if result == -1:
        raise MemoryError(f"not enough memory in {name}")
    if result == -2:
        raise IndexError(f"index out of range in {name}")
    return result


def _at(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def row_sum(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    rows: Float[Tensor, "n_rows d"],
) -> Float[Tensor, "n d"]:
    """See `kernels.row_sum`."""
    (value, rows), (crow, index) = _floats(value, rows), _entries(crow, index, value)
    n, d = crow.shape[0] - 1, rows.shape[1]
    out = rows.new_empty(n, d)
    inputs = _at(crow), _at(index), _at(value), _at(rows)
    _call("row_sum", *inputs, n, rows.shape[0], d, _at(out), torch.get_num_threads())
    return out


def row_dot(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n_rows d"],
) -> Float[Tensor, " entries"]:
    """See `kernels.row_dot`."""
    (left, right), (crow, index) = _floats(left, right), _entries(crow, index)
    _same(left.shape[1], right.shape[1], "width")
    _same(left.shape[0], crow.shape[0] - 1, "rows")
    out = left.new_empty(index.shape[0])
    inputs = _at(crow), _at(index), _at(left), _at(right)
    sizes = left.shape[0], right.shape[0], left.shape[1]
    _call("row_dot", *inputs, *sizes, _at(out), torch.get_num_threads())
    return out


def by_latent(crow: Int[Tensor, " n_and_one"], index: Int[Tensor, " entries"], n_latents: int) -> Grouped:
    """See `kernels.by_latent`."""
    crow, index = _entries(crow, index)
    grouped = Grouped(index.new_empty(n_latents + 1), torch.empty_like(index), torch.empty_like(index))
    outputs = [_at(part) for part in grouped]
    sizes = crow.shape[0] - 1, n_latents
    _call("by_latent", _at(crow), _at(index), *sizes, *outputs, torch.get_num_threads())
    return grouped


def encode_topk(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    k: int,
    *,
    scale: Float[Tensor, " latents"] | None = None,
    precision: str = "float32",
    exact: bool = False,
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """See `kernels.encode_topk`; ties are always settled here."""
    del exact
    x, weight, bias, scale = _contiguous(x, weight, bias, scale)
    m, d = weight.shape
    value, index = x.new_empty(x.shape[0], k), torch.empty(x.shape[0], k, dtype=torch.long, device="cpu")
    rough = precision == "bfloat16"
    wanted = min(m, torch_ops.candidates(k)) if rough else k
    for part, tile in torch_ops.products(x, weight, precision):
        start = _at(x[part]) if rough else None
        sizes = tile.shape[0], m, _at(bias), _at(scale), k, wanted
        outputs = _at(value[part]), _at(index[part]), torch.get_num_threads()
        _call("topk", _at(tile), rough, *sizes, start, _at(weight), d, *outputs)
    return value, index


def encode_batch_topk(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    count: int,
    *,
    scale: Float[Tensor, " latents"] | None = None,
    precision: str = "float32",
    guess: float | None = None,
) -> tuple[Sparse, Float[Tensor, ""]]:
    """See `kernels.encode_batch_topk`."""
    x, weight, bias, scale = _contiguous(x, weight, bias, scale)
    rough = precision == "bfloat16"
    margin = torch_ops.MARGIN if rough else 0.0
    start = max(0.0, guess or 0.0) * (1 - 2 * margin)
    most = min(count, x.shape[0] * weight.shape[0])
    crow = torch.empty(x.shape[0] + 1, dtype=torch.long, device="cpu")
    index, value, smallest = crow.new_empty(most), x.new_empty(most), x.new_empty(())
    kept = INCOMPLETE
    while kept == INCOMPLETE:
        with _batch(count, start, margin) as batch:
            for _, tile in torch_ops.products(x, weight, precision):
                sizes = tile.shape[0], weight.shape[0], _at(bias), _at(scale), torch.get_num_threads()
                _call("batch_add", batch, _at(tile), rough, *sizes)
            inputs = _at(x) if rough else None, _at(weight), weight.shape[1], _at(bias), _at(scale)
            outputs = _at(crow), _at(index), _at(value), _at(smallest)
            kept = _call("batch_finish", batch, *inputs, *outputs, torch.get_num_threads())
        start = 0.0
    return Sparse(crow, index[:kept], value[:kept]), smallest


def encode_above(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"],
) -> Sparse:
    """See `kernels.encode_above`."""
    x, weight, bias, floor = _contiguous(x, weight, bias, threshold)
    crow, held = torch.empty(x.shape[0] + 1, dtype=torch.long, device="cpu"), 0
    with _batch(0, 0.0, 0.0) as batch:
        for _, tile in torch_ops.products(x, weight, "float32"):
            sizes = tile.shape[0], weight.shape[0], _at(bias), _at(floor), torch.get_num_threads()
            held = _call("above_add", batch, _at(tile), *sizes)
        index, value = crow.new_empty(held), x.new_empty(held)
        _call("above_finish", batch, _at(crow), _at(index), _at(value))
    return Sparse(crow, index, value)


def largest(
    pre: Float[Tensor, "tokens latents"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """See `kernels.largest`."""
    (pre,) = _floats(pre)
    tokens, m = pre.shape
    value, index = pre.new_empty(tokens, k), torch.empty(tokens, k, dtype=torch.long, device="cpu")
    bias = _zeros(m)
    outputs = _at(value), _at(index), torch.get_num_threads()
    _call("topk", _at(pre), False, tokens, m, _at(bias), None, k, k, None, None, 0, *outputs)
    return value, index


def above(pre: Float[Tensor, "tokens latents"], threshold: Float[Tensor, " latents"]) -> Sparse:
    """See `kernels.above`."""
    pre, floor = _floats(pre, threshold)
    tokens, m = pre.shape
    _same(floor.shape[0], m, "thresholds")
    bias, crow = _zeros(m), torch.empty(tokens + 1, dtype=torch.long, device="cpu")
    with _batch(0, 0.0, 0.0) as batch:
        sizes = tokens, m, _at(bias), _at(floor), torch.get_num_threads()
        held = _call("above_add", batch, _at(pre), *sizes)
        index, value = crow.new_empty(held), pre.new_empty(held)
        _call("above_finish", batch, _at(crow), _at(index), _at(value))
    return Sparse(crow, index, value)


@cache
def _zeros(size: int) -> Tensor:
    """The bias of what has one already."""
    return torch.zeros(size, dtype=torch.float32, device="cpu")


@contextmanager
def _batch(count: int, start: float, margin: float) -> Iterator[int]:
    """Where the entries of a batch are gathered; freed at the end."""
    batch = _call("batch_new", count, start, margin)
    if not batch:
        raise MemoryError("not enough memory for a batch")
    try:
        yield batch
    finally:
        _call("batch_free", batch)


def _contiguous(x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor | None):
    """What an encode function works on, in the form that C++ reads."""
    x, weight, bias = _floats(x, weight, bias)
    _same(x.shape[1], weight.shape[1], "width")
    _same(bias.shape[0], weight.shape[0], "biases")
    if scale is not None:
        (scale,) = _floats(scale)
        _same(scale.shape[0], weight.shape[0], "scales or thresholds")
    return x, weight, bias, scale


def _floats(*tensors: Tensor) -> list[Tensor]:
    """Contiguous tensors, once they are what C++ will take them for."""
    for tensor in tensors:
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise TypeError(f"native kernels read float32 on the CPU, not {tensor.dtype} on {tensor.device}")
    return [tensor.contiguous() for tensor in tensors]


def _entries(crow: Tensor, index: Tensor, value: Tensor | None = None) -> tuple[Tensor, Tensor]:
    for tensor in (crow, index):
        if tensor.dtype != torch.long or tensor.device.type != "cpu":
            raise TypeError(
                f"native kernels read int64 indices on the CPU, not {tensor.dtype} on {tensor.device}"
            )
    _same(int(crow[-1]), index.shape[0], "entries")
    if value is not None:
        _same(value.shape[0], index.shape[0], "values")
    return crow.contiguous(), index.contiguous()


def _same(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise ValueError(f"{found} {what} where {expected} belong")


def normalise_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.normalise_rows_`."""
    if not rows.is_contiguous() or rows.dtype != torch.float32:
        return torch_ops.normalise_rows_(rows)
    _call("normalise_rows", _at(rows), *rows.shape, torch.get_num_threads())
    return rows


def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.project_rows_`."""
    plain = gradient.is_contiguous() and rows.is_contiguous() and gradient.shape == rows.shape
    if not plain or {gradient.dtype, rows.dtype} != {torch.float32}:
        return torch_ops.project_rows_(gradient, rows)
    _call("project_rows", _at(gradient), _at(rows), *gradient.shape, torch.get_num_threads())
    return gradient
