"""The device side of the Triton backend: what one program of each kernel does. Launched by its neighbours only.

Scores are ranked by keys: the bits of a positive fp32 score as int32, whose order is that of the scores; 0 for a score
that is not positive, -1 for a place that does not exist. NaN ranks above infinity, so that it is never lost.

Kernels carry `no_type_check`: a checking wrapper would hide their source from the compiler.
"""

# pyright: reportMissingImports=false
from typing import no_type_check

import triton
import triton.language as tl

DIGIT_BITS = 8
"""Bits of the key that one pass of the radix selection settles; kernels hold the number itself, as 8, 255 and 256."""


@triton.jit
@no_type_check
def sum_rows(plan, index, value, rows, out, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """One piece of a row, one slice of its columns: out[target] = Σ value[e] · rows[index[e]]."""
    piece = plan + tl.program_id(0) * 3
    begin = tl.load(piece)
    end = tl.load(piece + 1)
    target = tl.load(piece + 2)
    if target >= 0:
        lane = tl.arange(0, ENTRIES)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wide = column < d
        total = tl.zeros([ENTRIES, COLUMNS], dtype=out.dtype.element_ty)
        for start in range(begin, end, ENTRIES):
            entry = start + lane
            live = entry < end
            row = tl.load(index + entry, mask=live, other=0)
            weight = tl.load(value + entry, mask=live, other=0.0).to(total.dtype)
            here = rows + row[:, None] * d + column[None, :]
            block = tl.load(here, mask=live[:, None] & wide[None, :], other=0.0).to(total.dtype)
            total += weight[:, None] * block
        tl.store(out + target * d + column, tl.sum(total, axis=0), mask=wide)


@triton.jit
@no_type_check
def merge_rows(pieces, out, d, COLUMNS: tl.constexpr):
    """Add up the pieces of one long row, in order: the result does not depend on the scheduler."""
    piece = pieces + tl.program_id(0) * 3
    begin = tl.load(piece)
    end = tl.load(piece + 1)
    target = tl.load(piece + 2)
    if target >= 0:
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wide = column < d
        total = tl.zeros([COLUMNS], dtype=out.dtype.element_ty)
        for row in range(begin, end):
            total += tl.load(out + row * d + column, mask=wide, other=0.0)
        tl.store(out + target * d + column, total, mask=wide)


@triton.jit
@no_type_check
def dot_rows(plan, left, right, index, out, d, ENTRIES: tl.constexpr, COLUMNS: tl.constexpr):
    """One piece of a row, one slice of the columns: out[e, slice] = left[row] · right[index[e]] there."""
    piece = plan + tl.program_id(0) * 3
    begin = tl.load(piece)
    end = tl.load(piece + 1)
    source = tl.load(piece + 2)
    if source >= 0:
        lane = tl.arange(0, ENTRIES)
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        wide = column < d
        mine = tl.load(left + source * d + column, mask=wide, other=0.0).to(out.dtype.element_ty)
        for start in range(begin, end, ENTRIES):
            entry = start + lane
            live = entry < end
            row = tl.load(index + entry, mask=live, other=0)
            here = right + row[:, None] * d + column[None, :]
            block = tl.load(here, mask=live[:, None] & wide[None, :], other=0.0).to(mine.dtype)
            dot = tl.sum(block * mine[None, :], axis=1)
            tl.store(out + entry * tl.num_programs(1) + tl.program_id(1), dot, mask=live)


@triton.jit
@no_type_check
def normalise(rows, d, tiny, COLUMNS: tl.constexpr):
    """Scale one row to norm 1, in place."""
    row = rows + tl.program_id(0).to(tl.int64) * d
    square = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        block = tl.load(row + column, mask=column < d, other=0.0).to(tl.float32)
        square += block * block
    factor = 1.0 / tl.maximum(tl.sqrt(tl.sum(square, axis=0)), tiny)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        block = tl.load(row + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(row + column, block * factor, mask=column < d)


@triton.jit
@no_type_check
def project(gradient, rows, d, COLUMNS: tl.constexpr):
    """Take from one gradient row its component along the row beside it, in place."""
    offset = tl.program_id(0).to(tl.int64) * d
    product = tl.zeros([COLUMNS], dtype=tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mine = tl.load(gradient + offset + column, mask=column < d, other=0.0).to(tl.float32)
        product += mine * tl.load(rows + offset + column, mask=column < d, other=0.0).to(tl.float32)
    along = tl.sum(product, axis=0)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        mine = tl.load(gradient + offset + column, mask=column < d, other=0.0).to(tl.float32)
        other = tl.load(rows + offset + column, mask=column < d, other=0.0).to(tl.float32)
        tl.store(gradient + offset + column, mine - along * other, mask=column < d)


@triton.jit
@no_type_check
def key_of(score):
    """See the module: int32 whose order is that of the positive scores."""
    bits = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return tl.where(score <= 0.0, 0, bits)


@triton.jit
@no_type_check
def group_keys(tile, scale, keys, latents, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key of each group of neighbouring latents, in one row of a tile of pre-activations."""
    row = tl.program_id(0).to(tl.int64)
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = latent < latents
    score = tl.load(tile + row * latents + latent, mask=real, other=0.0).to(tl.float32)
    if scale is not None:
        score = score * tl.load(scale + latent, mask=real, other=0.0).to(tl.float32)
    key = tl.where(real, key_of(score), -1)
    groups = (latents + GROUP - 1) // GROUP
    group = tl.program_id(1) * (BLOCK // GROUP) + tl.arange(0, BLOCK // GROUP)
    if GROUP > 1:
        key = tl.max(tl.reshape(key, [BLOCK // GROUP, GROUP]), axis=1)
    tl.store(keys + row * groups + group, key, mask=group < groups)


@triton.jit
@no_type_check
def member_keys(tile, scale, chosen, keys, latents, count, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """The keys of all members of the chosen groups; a group is numbered through the whole tile."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = at < count
    groups = (latents + GROUP - 1) // GROUP
    group = tl.load(chosen + at, mask=live, other=0)
    member = tl.arange(0, GROUP)
    latent = (group % groups)[:, None] * GROUP + member[None, :]
    real = live[:, None] & (latent < latents)
    score = tl.load(tile + (group // groups)[:, None] * latents + latent, mask=real, other=0.0).to(tl.float32)
    if scale is not None:
        score = score * tl.load(scale + latent, mask=real, other=0.0).to(tl.float32)
    place = at.to(tl.int64)[:, None] * GROUP + member[None, :]
    tl.store(keys + place, tl.where(real, key_of(score), -1), mask=live[:, None])


@triton.jit
@no_type_check
def pick(keys, chosen, columns, wanted, BLOCK: tl.constexpr):
    """Columns of the `wanted` largest keys of one row, ascending; of equal keys the first.

    The cut is searched bit by bit over keys that stay in registers; the row is read once.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    key = tl.load(keys + row * columns + column, mask=column < columns, other=-1)
    cut = tl.program_id(0) * 0
    for step in range(31):
        tried = cut | (1 << (30 - step))
        cut = tl.where(tl.sum((key >= tried).to(tl.int32), axis=0) >= wanted, tried, cut)
    larger = (key > cut).to(tl.int32)
    equal = (key == cut).to(tl.int32)
    room = wanted - tl.sum(larger, axis=0)
    kept = larger | (equal & (tl.cumsum(equal, axis=0) <= room).to(tl.int32))
    place = tl.cumsum(kept, axis=0) - 1
    tl.store(chosen + row * wanted + place, column.to(tl.int64), mask=kept > 0)


@triton.jit
@no_type_check
def count_digits(keys, state, counts, size, SHIFT: tl.constexpr, BLOCK: tl.constexpr):
    """How often each digit occurs among the keys that share the digits settled so far (state[0])."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + at, mask=at < size, other=-1)
    settled = tl.load(state)
    # The highest digit has nothing above it to compare; a shift by 32 would be undefined.
    same = key >= 0
    if SHIFT < 24:
        same = same & ((key >> (SHIFT + 8)) == (settled >> (SHIFT + 8)))
    digit = tl.where(same, (key >> SHIFT) & 255, 256)
    # Twice the digits, as a histogram's bins are a power of two and keys that do not count need one.
    count = tl.histogram(digit, 512)
    bin = tl.arange(0, 512)
    tl.atomic_add(counts + bin, count, mask=(bin < 256) & (count > 0))


@triton.jit
@no_type_check
def settle_digit(state, counts, SHIFT: tl.constexpr):
    """Find the digit of the cut: state is (digits settled, how many are still wanted among their equals)."""
    downward = tl.arange(0, 256)
    digit = 255 - downward
    count = tl.load(counts + digit)
    settled = tl.load(state)
    wanted = tl.load(state + 1)
    passed = (tl.cumsum(count, axis=0) < wanted).to(tl.int32)
    found = 255 - tl.sum(passed, axis=0)
    tl.store(counts + digit, tl.zeros_like(count))
    tl.debug_barrier()
    tl.store(state, settled | (found << SHIFT))
    tl.store(state + 1, wanted - tl.sum(count * passed, axis=0))


@triton.jit
@no_type_check
def count_kept(keys, state, counts, size, BLOCK: tl.constexpr):
    """Keys above the cut and keys equal to it, in one block."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + at, mask=at < size, other=-1)
    cut = tl.load(state)
    tl.store(counts + tl.program_id(0), tl.sum((key > cut).to(tl.int32), axis=0))
    tl.store(counts + tl.num_programs(0) + tl.program_id(0), tl.sum((key == cut).to(tl.int32), axis=0))


@triton.jit
@no_type_check
def write_kept(keys, state, ends, kept, size, BLOCK: tl.constexpr):
    """Places of the keys above the cut and of the first that equal it, ascending.

    `ends` are the running sums of what `count_kept` found.
    """
    block = tl.program_id(0)
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + at, mask=at < size, other=-1)
    cut = tl.load(state)
    room = tl.load(state + 1)
    larger = (key > cut).to(tl.int32)
    equal = (key == cut).to(tl.int32)
    larger_before = tl.load(ends + block) - tl.sum(larger, axis=0)
    equal_before = tl.load(ends + tl.num_programs(0) + block) - tl.sum(equal, axis=0)
    rank = equal_before + tl.cumsum(equal, axis=0) - equal
    chosen = larger | (equal & (rank < room).to(tl.int32))
    place = larger_before + tl.minimum(equal_before, room) + tl.cumsum(chosen, axis=0) - 1
    tl.store(kept + place, at, mask=chosen > 0)


@triton.jit
@no_type_check
def count_above(tile, floor, counts, latents, BLOCK: tl.constexpr):
    """How many latents of one row and one block of columns are above their floor."""
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = latent < latents
    here = tile + tl.program_id(0).to(tl.int64) * latents + latent
    over = tl.load(here, mask=real, other=0.0) > tl.load(floor + latent, mask=real, other=0.0)
    at = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    tl.store(counts + at, tl.sum(over.to(tl.int32), axis=0))


@triton.jit
@no_type_check
def write_above(tile, floor, ends, index, value, latents, BLOCK: tl.constexpr):
    """Latents above their floor and their pre-activations, by row and inside a row by latent."""
    latent = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = latent < latents
    here = tile + tl.program_id(0).to(tl.int64) * latents + latent
    pre = tl.load(here, mask=real, other=0.0)
    over = (pre > tl.load(floor + latent, mask=real, other=0.0)).to(tl.int32)
    end = tl.load(ends + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1))
    place = end - tl.sum(over, axis=0) + tl.cumsum(over, axis=0) - 1
    tl.store(index + place, latent.to(tl.int64), mask=over > 0)
    tl.store(value + place, pre, mask=over > 0)
