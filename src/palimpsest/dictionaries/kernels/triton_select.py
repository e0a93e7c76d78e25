"""Encoding with selection in Triton: a GEMM per tile of tokens, then exact selection on the tile.

Selection has two levels. Of every group of neighbouring latents only the largest key is kept; the `wanted` groups of
largest keys (of equal ones the first) hold the `wanted` largest members, since each of them holds one as large and an
earlier one. So the tile is read once, and again only inside those groups.
"""

# pyright: reportMissingImports=false
from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries.kernels import triton_kernels
from palimpsest.dictionaries.kernels.entries import Sparse
from palimpsest.dictionaries.kernels.torch_ops import candidates
from palimpsest.dictionaries.kernels.triton_rows import ceil_div, launch, power_of_two, row_dot

TILE_BYTES = 512 << 20
"""Scratch for pre-activations: 2048 tokens of 131,072 latents in bf16, enough rows that the GEMM is not bound by
reading its weights."""

IN_REGISTERS = 1 << 14
"""Keys that one program ranks."""

SCAN = 4096
"""Keys per program of the passes over a whole batch."""


@torch.no_grad()
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
    """See `kernels.encode_topk`.

    Ties go by the smaller latent without `exact` too, except beyond what one program ranks (`IN_REGISTERS`).
    """
    tokens, latents = x.shape[0], weight.shape[0]
    rough = precision == "bfloat16"
    wanted = min(latents, candidates(k)) if rough else k
    proposed = torch.empty(tokens, wanted, dtype=torch.long, device=x.device)
    pre = torch.empty(tokens, wanted, dtype=torch.float32, device=x.device)
    for part, tile in _tiles(x, weight, bias, rough):
        proposed[part] = _row_candidates(tile, scale, wanted, exact)
        if not rough:
            torch.gather(tile, 1, proposed[part], out=pre[part])
    if rough:
        crow = torch.arange(tokens + 1, device=x.device) * wanted
        pre = row_dot(crow, proposed.view(-1), x, weight).view(tokens, wanted) + bias[proposed]
    score = pre if scale is None else pre * scale[proposed]
    # Candidates come by latent, so a stable order settles ties.
    best, order = score.sort(dim=1, descending=True, stable=True)
    order, padding = order[:, :k], best[:, :k] <= 0
    return pre.gather(1, order).masked_fill_(padding, 0), proposed.gather(1, order).masked_fill_(padding, 0)


@torch.no_grad()
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
    """See `kernels.encode_batch_topk`.

    There are always `count` entries: where fewer scores are positive, the rest have value 0, so that no size
    depends on the data and the host waits for nothing. The guess is not needed.
    """
    del guess
    (tokens, _), latents = x.shape, weight.shape[0]
    rough = precision == "bfloat16"
    count = min(count, tokens * latents)
    wanted = min(candidates(count), tokens * latents) if rough else count
    key = torch.empty(0, dtype=torch.int32, device=x.device)
    place = torch.empty(0, dtype=torch.long, device=x.device)
    for part, tile in _tiles(x, weight, bias, rough):
        here, at = _tile_candidates(tile, scale, min(wanted, tile.numel()))
        key, place = torch.cat([key, here]), torch.cat([place, at + part.start * latents])
        if key.shape[0] > wanted:
            kept = _largest(key, wanted)
            key, place = key[kept], place[kept]
    row, latent = place // latents, place % latents
    pre = score = key.view(torch.float32)
    if rough or scale is not None:
        pre = row_dot(_bounds(row, tokens), latent, x, weight) + bias[latent]
    if rough:
        score = pre if scale is None else pre * scale[latent]
        kept = _largest(torch.where(score <= 0, 0, score).view(torch.int32), count)
        row, latent, pre, score = row[kept], latent[kept], pre[kept], score[kept]
    smallest = torch.where(score <= 0, torch.inf, score)
    smallest = smallest.amin() if count else smallest.new_full((), torch.inf)
    return Sparse(_bounds(row, tokens), latent, torch.where(score <= 0, 0, pre)), smallest


@torch.no_grad()
def encode_above(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"],
) -> Sparse:
    """See `kernels.encode_above`. The host waits once per tile, for the number of its entries."""
    floor = threshold.float().clamp(min=0)
    latents, device = weight.shape[0], x.device
    block = min(2048, power_of_two(latents))
    crow = torch.zeros(x.shape[0] + 1, dtype=torch.long, device=device)
    indices = [torch.empty(0, dtype=torch.long, device=device)]
    values = [torch.empty(0, dtype=torch.float32, device=device)]
    for part, tile in _tiles(x, weight, bias, False):
        grid = tile.shape[0], ceil_div(latents, block)
        counts = torch.empty(grid, dtype=torch.int32, device=device)
        launch(triton_kernels.count_above, grid, tile, floor, counts, latents, BLOCK=block)
        crow[part.start + 1 : part.stop + 1] = counts.sum(dim=1)
        ends = counts.view(-1).cumsum(0)
        size = int(ends[-1])
        index = torch.empty(size, dtype=torch.long, device=device)
        value = torch.empty(size, dtype=torch.float32, device=device)
        launch(triton_kernels.write_above, grid, tile, floor, ends, index, value, latents, BLOCK=block)
        order = value.sort(descending=True, stable=True).indices
        row = torch.repeat_interleave(counts.sum(dim=1), output_size=size)
        order = order[row[order].sort(stable=True).indices]
        indices.append(index[order])
        values.append(value[order])
    return Sparse(crow.cumsum(0), torch.cat(indices), torch.cat(values))


def _bounds(row: Int[Tensor, " entries"], rows: int) -> Int[Tensor, " rows_and_one"]:
    """Where each row starts among ordered entries."""
    return torch.searchsorted(row, torch.arange(rows + 1, device=row.device))


def _tiles(x: Tensor, weight: Tensor, bias: Tensor, rough: bool) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of some tokens at a time, in one reused tile, with the tokens they belong to."""
    dtype = torch.bfloat16 if rough else torch.float32
    tokens, latents = x.shape[0], weight.shape[0]
    x, weight, bias = x.to(dtype), weight.to(dtype), bias.to(dtype)
    size = TILE_BYTES // max(1, latents * x.element_size())
    size = max(1, min(tokens, size if size < 128 else size // 128 * 128))
    tile = torch.empty(size, latents, dtype=dtype, device=x.device)
    for start in range(0, tokens, size):
        part = slice(start, min(tokens, start + size))
        yield part, torch.addmm(bias, x[part], weight.T, out=tile[: part.stop - start])


def _group(columns: int, wanted: int) -> int:
    """Members per group that make both levels about equally long: a power of two near √(columns / wanted)."""
    size = 1
    while 2 * size * 2 * size * wanted <= 2 * columns and size < 64:
        size *= 2
    return size if size >= 4 else 1


def _row_candidates(
    tile: Float[Tensor, "tokens latents"], scale: Float[Tensor, " latents"] | None, wanted: int, exact: bool
) -> Int[Tensor, "tokens wanted"]:
    """The latents of the `wanted` largest scores of each row, ascending; of equal scores the smaller latent."""
    tokens, latents = tile.shape
    group = _group(latents, wanted)
    groups = ceil_div(latents, group)
    if max(groups, wanted * group if group > 1 else 0) > IN_REGISTERS:
        score = tile if scale is None else tile * scale
        if exact:
            best = score.sort(dim=1, descending=True, stable=True).indices[:, :wanted]
        else:
            best = score.topk(wanted, dim=1, sorted=False).indices
        return best.sort(dim=1).values
    keys = _group_keys(tile, scale, group)
    chosen = _pick(keys, min(wanted, groups))
    if group == 1:
        return chosen
    first = torch.arange(tokens, device=tile.device)[:, None] * groups
    members = _member_keys(tile, scale, (chosen + first).view(-1), group).view(tokens, -1)
    place = _pick(members, wanted)
    return chosen.gather(1, place // group) * group + place % group


def _tile_candidates(
    tile: Float[Tensor, "tokens latents"], scale: Float[Tensor, " latents"] | None, wanted: int
) -> tuple[Int[Tensor, " wanted"], Int[Tensor, " wanted"]]:
    """Keys and flat places of the `wanted` largest scores of a tile, by place; of equal scores the first."""
    group = _group(tile.numel(), max(1, wanted))
    groups = ceil_div(tile.shape[1], group)
    keys = _group_keys(tile, scale, group).view(-1)
    chosen = _largest(keys, min(wanted, keys.shape[0]))
    if group == 1:
        return keys[chosen], chosen
    members = _member_keys(tile, scale, chosen, group)
    kept = _largest(members, wanted)
    parent = chosen[kept // group]
    return members[kept], parent // groups * tile.shape[1] + parent % groups * group + kept % group


def _group_keys(tile: Tensor, scale: Tensor | None, group: int) -> Int[Tensor, "tokens groups"]:
    tokens, latents = tile.shape
    keys = torch.empty(tokens, ceil_div(latents, group), dtype=torch.int32, device=tile.device)
    block = min(4096, max(group, power_of_two(latents)))
    grid = tokens, ceil_div(latents, block)
    launch(triton_kernels.group_keys, grid, tile, scale, keys, latents, GROUP=group, BLOCK=block)
    return keys


def _member_keys(tile: Tensor, scale: Tensor | None, chosen: Tensor, group: int) -> Int[Tensor, " members"]:
    count = chosen.shape[0]
    keys = torch.empty(count * group, dtype=torch.int32, device=tile.device)
    block = max(1, 2048 // group)
    grid = (ceil_div(count, block),)
    sizes = tile.shape[1], count
    launch(triton_kernels.member_keys, grid, tile, scale, chosen, keys, *sizes, GROUP=group, BLOCK=block)
    return keys


def _pick(keys: Int[Tensor, "tokens columns"], wanted: int) -> Int[Tensor, "tokens wanted"]:
    """Columns of the largest keys of each row, ascending."""
    tokens, columns = keys.shape
    chosen = torch.empty(tokens, wanted, dtype=torch.long, device=keys.device)
    block = power_of_two(columns)
    warps = min(32, max(2, block // 512))
    launch(triton_kernels.pick, (tokens,), keys, chosen, columns, wanted, BLOCK=block, num_warps=warps)
    return chosen


def _largest(keys: Int[Tensor, " size"], wanted: int) -> Int[Tensor, " wanted"]:
    """Places of the `wanted` largest keys, ascending; of equal keys the first.

    A radix selection from the highest digit down: two launches per digit settle the cut on the device.
    """
    size, device = keys.shape[0], keys.device
    kept = torch.empty(wanted, dtype=torch.long, device=device)
    if wanted == 0:
        return kept
    state = torch.zeros(2, dtype=torch.int32, device=device)
    state[1] = wanted
    digits = torch.zeros(1 << triton_kernels.DIGIT_BITS, dtype=torch.int32, device=device)
    grid = (ceil_div(size, SCAN),)
    for shift in (24, 16, 8, 0):
        launch(
            triton_kernels.count_digits, grid, keys, state, digits, size, SHIFT=shift, BLOCK=SCAN, num_warps=8
        )
        launch(triton_kernels.settle_digit, (1,), state, digits, SHIFT=shift)
    counts = torch.empty(2, grid[0], dtype=torch.int32, device=device)
    launch(triton_kernels.count_kept, grid, keys, state, counts, size, BLOCK=SCAN, num_warps=8)
    ends = counts.cumsum(1)
    launch(triton_kernels.write_kept, grid, keys, state, ends, kept, size, BLOCK=SCAN, num_warps=8)
    return kept
