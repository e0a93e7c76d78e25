"""Gather-sums and dots of rows in Triton: decoding and every gradient of a step.

Columns are the outer and rows the inner axis of each grid: while one slice of columns is worked on, its share of the
gathered matrix stays in the L2 cache, so device memory is read about once and not once per entry.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries.kernels import triton_kernels
from palimpsest.dictionaries.kernels.entries import Grouped, rows_of

PIECE = 256
"""Entries that one program sums at most: a latent that fires everywhere is split over many."""

RESIDENT = 24 << 20
"""Bytes of gathered rows per slice of columns: half of the L2 cache of an H100. A slice has 64 columns at least."""

BLOCK = 2048
"""Elements that a program of four warps holds: four independent 16-byte loads of fp32 per thread."""

DENSE_SHARE = {torch.bfloat16: 0.005, torch.float16: 0.005}
"""Density k / latents from which tensor cores beat gathering: bandwidth / arithmetic, 3.35 TB/s / 600 TFLOP/s."""

DENSE_SHARE_FP32 = 0.03
"""The same for fp32 on CUDA cores: half of 3.35 TB/s / 55 TFLOP/s, as a row has twice the bytes."""

DENSE_BYTES = 256 << 20
"""Scratch of the dense path."""


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Start a kernel on the device of its first argument; an empty grid is nothing to do."""
    if all(grid):
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **options)


def ceil_div(size: int, step: int) -> int:
    """How many steps cover a size."""
    return -(-size // step)


def power_of_two(size: int) -> int:
    """The smallest power of two that is not below a size, at least 16, which every block shape can be."""
    return max(16, 1 << (size - 1).bit_length())


def dense_is_faster(k: int | float, latents: int, dtype: torch.dtype = torch.bfloat16) -> bool:
    """Whether a dense matmul on scattered codes beats gathering rows, on a data-centre GPU.

    Gathering moves 2·k·d bytes per token (bf16), the matmul computes 2·d·latents operations: equal at k / latents =
    bandwidth / arithmetic, about 0.56 % on an H100. An estimate, not a measurement.

    Args:
        k: Active latents per token.
        latents: All of them.
        dtype: Of the gathered rows.
    """
    return k >= DENSE_SHARE.get(dtype, DENSE_SHARE_FP32) * latents


def row_sum(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    rows: Float[Tensor, "n_rows d"],
) -> Float[Tensor, "n d"]:
    """See `kernels.row_sum`; sums in fp32, in an order that does not change from run to run."""
    n, entries, (n_rows, d) = crow.shape[0] - 1, index.shape[0], rows.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    if n == 0 or d == 0 or entries == 0:
        return torch.zeros(n, d, dtype=dtype, device=rows.device)
    if rows.is_cuda and dense_is_faster(entries / n, n_rows, rows.dtype):
        return dense_row_sum(crow, index, value, rows)
    plan = _plan(crow, entries, PIECE)
    out = torch.empty(n + plan.partial, d, dtype=dtype, device=rows.device)
    columns, lanes = _blocks(rows)
    grid = (plan.pieces.shape[0], ceil_div(d, columns))
    target = torch.stack([plan.begin, plan.end, plan.target], dim=1)
    launch(
        triton_kernels.sum_rows,
        grid,
        target,
        index.contiguous(),
        value.contiguous(),
        rows.contiguous(),
        out,
        d,
        ENTRIES=lanes,
        COLUMNS=columns,
    )
    longs = _long_rows(plan, n, entries)
    launch(triton_kernels.merge_rows, (longs.shape[0], grid[1]), longs, out, d, COLUMNS=columns)
    return out[:n]


def row_dot(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n_rows d"],
) -> Float[Tensor, " entries"]:
    """See `kernels.row_dot`; sums in fp32."""
    (n, d), entries, n_rows = left.shape, index.shape[0], right.shape[0]
    dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
    if entries == 0 or d == 0:
        return torch.zeros(entries, dtype=dtype, device=left.device)
    if right.is_cuda and left.dtype == right.dtype and dense_is_faster(entries / n, n_rows, right.dtype):
        return dense_row_dot(crow, index, left, right)
    plan = _plan(crow, entries, PIECE)
    columns, lanes = _blocks(right)
    slices = ceil_div(d, columns)
    out = torch.empty(entries, slices, dtype=dtype, device=left.device)
    pieces = torch.stack([plan.begin, plan.end, plan.pieces], dim=1)
    launch(
        triton_kernels.dot_rows,
        (pieces.shape[0], slices),
        pieces,
        left.contiguous(),
        right.contiguous(),
        index.contiguous(),
        out,
        d,
        ENTRIES=lanes,
        COLUMNS=columns,
    )
    return out.view(-1) if slices == 1 else out.sum(dim=1)


def by_latent(crow: Int[Tensor, " n_and_one"], index: Int[Tensor, " entries"], n_latents: int) -> Grouped:
    """See `kernels.by_latent`; a radix sort of narrow keys, and no count that the host would wait for."""
    narrow = torch.int16 if n_latents < 1 << 15 else torch.int32
    ordered, place = torch.sort(index.to(narrow), stable=True)
    bounds = torch.arange(n_latents + 1, device=index.device, dtype=narrow)
    return Grouped(torch.searchsorted(ordered, bounds), rows_of(crow, index.shape[0])[place], place)


def normalise_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.normalise_rows_`."""
    n, d = rows.shape
    if not rows.is_contiguous():
        return rows.copy_(normalise_rows_(rows.contiguous()))
    tiny = torch.finfo(torch.float32).tiny
    launch(triton_kernels.normalise, (n,), rows, d, tiny, COLUMNS=_width(d))
    return rows


def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.project_rows_`."""
    n, d = gradient.shape
    if not gradient.is_contiguous():
        return gradient.copy_(project_rows_(gradient.contiguous(), rows))
    launch(triton_kernels.project, (n,), gradient, rows.contiguous(), d, COLUMNS=_width(d))
    return gradient


def dense_row_sum(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    rows: Float[Tensor, "n_rows d"],
) -> Float[Tensor, "n d"]:
    """`row_sum` as a matmul on scattered values, some rows at a time; bf16 rows make bf16 values."""
    n, n_rows = crow.shape[0] - 1, rows.shape[0]
    row = rows_of(crow, index.shape[0])
    step = _dense_step(n, n_rows, rows)
    out = torch.empty(
        n, rows.shape[1], dtype=torch.promote_types(value.dtype, torch.float32), device=rows.device
    )
    for start in range(0, n, step):
        stop = min(n, start + step)
        inside = (row >= start) & (row < stop)
        # One row more takes the entries of other chunks: where a chunk's entries begin is known to the device only.
        codes = torch.zeros((step + 1) * n_rows, dtype=rows.dtype, device=rows.device)
        codes.index_add_(0, torch.where(inside, row - start, step) * n_rows + index, value.to(rows.dtype))
        out[start:stop] = _wide_product(codes.view(step + 1, n_rows)[: stop - start], rows)
    return out


def dense_row_dot(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n_rows d"],
) -> Float[Tensor, " entries"]:
    """`row_dot` as a matmul of which the entries are read, some rows at a time."""
    n, n_rows = left.shape[0], right.shape[0]
    row = rows_of(crow, index.shape[0])
    step = _dense_step(n, n_rows, right)
    out = torch.zeros(
        index.shape[0], dtype=torch.promote_types(right.dtype, torch.float32), device=left.device
    )
    for start in range(0, n, step):
        stop = min(n, start + step)
        inside = (row >= start) & (row < stop)
        products = _wide_product(left[start:stop], right.T)
        found = products.view(-1)[torch.where(inside, row - start, 0) * n_rows + index]
        out = torch.where(inside, found, out)
    return out


def _dense_step(n: int, n_rows: int, rows: Tensor) -> int:
    return max(1, min(n, DENSE_BYTES // (n_rows * rows.element_size())))


def _wide_product(left: Tensor, right: Tensor) -> Tensor:
    """Matmul with an fp32 result: of narrow inputs too, where the operator can."""
    if left.dtype in DENSE_SHARE and left.is_cuda and hasattr(torch.ops.aten.mm, "dtype"):
        return torch.ops.aten.mm.dtype(left, right, torch.float32)
    return (left @ right).to(torch.promote_types(left.dtype, torch.float32))


class _Plan(NamedTuple):
    """Pieces of at most `PIECE` entries, as many as there can be; those beyond have target and row -1.

    Attributes:
        begin, end: The entries of each piece.
        target: Where its sum goes: the row itself, or a place behind the rows where the row has several pieces.
        pieces: The row of each piece.
        parts: Pieces per row.
        slots: First place behind the rows, per row with several pieces.
        partial: How many places behind the rows there can be.
    """

    begin: Tensor
    end: Tensor
    target: Tensor
    pieces: Tensor
    parts: Tensor
    slots: Tensor
    partial: int


def _plan(crow: Tensor, entries: int, limit: int) -> _Plan:
    """Cut rows into pieces on the device.

    The host knows only a bound of their number and so need not wait for it: every row is at least one piece,
    even an empty one, and each piece beyond that has a full one before it, of `limit` entries.
    """
    n = crow.shape[0] - 1
    parts = ((crow.diff() + limit - 1) // limit).clamp_(min=1)
    ends = parts.cumsum(0)
    piece = torch.arange(n + entries // limit, device=crow.device)
    row = torch.searchsorted(ends, piece, right=True)
    beyond = row >= n
    row = row.clamp_(max=n - 1)
    part = piece - (ends - parts)[row]
    begin = crow[row] + part * limit
    end = torch.minimum(begin + limit, crow[row + 1])
    several = torch.where(parts > 1, parts, 0)
    slots = n + several.cumsum(0) - several
    target = torch.where(parts[row] > 1, slots[row] + part, row)
    dead = beyond, -1
    return _Plan(
        begin, end, target.masked_fill(*dead), row.masked_fill(*dead), parts, slots, 2 * entries // limit
    )


def _long_rows(plan: _Plan, n: int, entries: int) -> Int[Tensor, "longs 3"]:
    """First and last place and target of the rows that have several pieces, padded with target -1."""
    wanted = torch.arange(1, entries // PIECE + 1, device=plan.parts.device)
    row = torch.searchsorted((plan.parts > 1).cumsum(0), wanted)
    beyond = row >= n
    row = row.clamp_(max=n - 1)
    first = plan.slots[row]
    return torch.stack([first, first + plan.parts[row], row.masked_fill(beyond, -1)], dim=1)


def _blocks(rows: Tensor) -> tuple[int, int]:
    """Columns and entries that a program takes at once."""
    n_rows, d = rows.shape
    columns = 64
    while columns < min(d, 512) and n_rows * 2 * columns * rows.element_size() <= RESIDENT:
        columns *= 2
    columns = min(columns, power_of_two(d))
    return columns, min(32, BLOCK // columns)


def _width(d: int) -> int:
    return min(1024, power_of_two(d))
