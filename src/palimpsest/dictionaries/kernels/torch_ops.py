"""The kernels in plain PyTorch, on any device and for any float type; what the other backends must equal."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from palimpsest.dictionaries.kernels.entries import Grouped, Sparse, rows_of

TILE_BYTES = 1 << 25
"""Scratch for pre-activations: more rows make the GEMM faster, more memory leaves the last-level cache."""

LEAST_ROWS = 256
"""Tokens per tile at least: a GEMM of fewer rows spends its time on packing the weights."""

MARGIN = 2.0**-6
"""What a bf16 pre-activation may be off, as a share of the cut: 2^-9 by its own rounding, the rest by its inputs'."""

GATHERED = 1 << 24
"""Elements that a product of gathered rows may hold at once."""

_kept = threading.local()

with warnings.catch_warnings():
    # PyTorch announces once per process that compressed sparse rows are in beta.
    warnings.simplefilter("ignore")
    torch.sparse_csr_tensor([0, 0], [], [], (1, 1))


def row_sum(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    rows: Float[Tensor, "n_rows d"],
) -> Float[Tensor, "n d"]:
    """See `kernels.row_sum`."""
    if index.numel() == 0:
        return rows.new_zeros(crow.shape[0] - 1, rows.shape[1])
    return F.embedding_bag(index, rows, crow, mode="sum", per_sample_weights=value, include_last_offset=True)


def row_dot(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n_rows d"],
) -> Float[Tensor, " entries"]:
    """See `kernels.row_dot`."""
    sparse = left.device.type == "cpu" and left.dtype in (torch.float32, torch.float64)
    if sparse and 0 < index.shape[0] <= left.shape[0] * right.shape[0]:
        # Ten times faster than gathering both sides. Not on GPUs: cuSPARSE demands sorted entries without repeats.
        # Not with more entries than the matrix has places (repeats again): PyTorch would cut them off.
        pattern = torch.sparse_csr_tensor(
            crow, index, left.new_zeros(index.shape[0]), (left.shape[0], right.shape[0])
        )
        return torch.sparse.sampled_addmm(pattern, left, right.T, beta=0.0, out=pattern).values()
    row = rows_of(crow, index.shape[0])
    step = max(1, GATHERED // max(1, left.shape[1]))
    parts = [
        (left[row[start : start + step]] * right[index[start : start + step]]).sum(dim=1)
        for start in range(0, index.shape[0], step)
    ]
    return torch.cat(parts) if parts else left.new_zeros(0)


def by_latent(crow: Int[Tensor, " n_and_one"], index: Int[Tensor, " entries"], n_latents: int) -> Grouped:
    """See `kernels.by_latent`."""
    small = index.to(torch.int16 if n_latents < 1 << 15 else torch.int32)
    place = torch.sort(small, stable=True).indices
    ends = torch.bincount(index, minlength=n_latents).cumsum(0)
    return Grouped(F.pad(ends, (1, 0)), rows_of(crow, index.shape[0])[place], place)


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
    """See `kernels.encode_topk`."""
    n_latents = weight.shape[0]
    approximate = precision == "bfloat16"
    wanted = min(n_latents, candidates(k) if approximate else k)
    value, index = x.new_empty(x.shape[0], k), torch.empty(x.shape[0], k, dtype=torch.long, device=x.device)
    for part, pre in tiles(x, weight, bias, precision):
        score = pre if scale is None else pre * scale
        if approximate:
            latent = _largest(score, wanted)[1].sort(dim=1).values
            crow = torch.arange(latent.shape[0] + 1, device=x.device) * wanted
            pre = row_dot(crow, latent.reshape(-1), x[part], weight).view_as(latent) + bias[latent]
            score = pre if scale is None else pre * scale[latent]
            best, place = strongest(score, k, exact)
            index[part] = latent.gather(1, place)
        else:
            best, place = strongest(score, k, exact)
            index[part] = place
        value[part] = best if scale is None else pre.gather(1, place)
        padding = ~(best > 0)
        value[part].masked_fill_(padding, 0)
        index[part].masked_fill_(padding, 0)
    return value, index


def candidates(k: int) -> int:
    """How many latents the bf16 GEMM proposes for a row of k."""
    return k + max(8, k // 4)


def strongest(
    score: Float[Tensor, "tokens latents"], k: int, exact: bool
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]]:
    """The k largest entries of each row, largest first.

    Args:
        score: What is ranked.
        k: At most the number of columns.
        exact: Settle ties of positive entries by the smaller column.
    """
    if not exact:
        return _largest(score, k)
    best, place = _largest(score, min(k + 1, score.shape[1]))
    tied = ((best[:, 1:] == best[:, :-1]) & (best[:, 1:] > 0)).any(dim=1).nonzero().squeeze(1)
    best, place = best[:, :k].contiguous(), place[:, :k].contiguous()
    if tied.numel():
        settled = score[tied].sort(dim=1, descending=True, stable=True)
        best[tied], place[tied] = settled.values[:, :k], settled.indices[:, :k]
    return best, place


def _largest(score: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`torch.topk`, on CPU through the maxima of groups of columns where these are many.

    The k largest entries lie in the k groups of largest maxima, since each of those holds an entry as large.
    """
    tokens, columns = score.shape
    size = 1
    while columns % (2 * size) == 0 and 4 * size * size * k <= columns:
        size *= 2
    if size == 1 or score.device.type != "cpu":
        return torch.topk(score, k, dim=1)
    groups = score.view(tokens, size, columns // size)
    chosen = groups.amax(dim=1).topk(k, dim=1, sorted=False).indices
    within = groups.gather(2, chosen[:, None].expand(-1, size, -1)).view(tokens, -1)
    best, place = within.topk(k, dim=1)
    return best, (place // k) * (columns // size) + chosen.gather(1, place % k)


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
    if count == 0 or x.shape[0] == 0:
        crow = torch.zeros(x.shape[0] + 1, dtype=torch.long, device=x.device)
        return Sparse(crow, crow[:0], x.new_zeros(0)), x.new_tensor(torch.inf)
    approximate = precision == "bfloat16"
    bound = max(0.0, guess or 0.0)
    if approximate:
        bound *= 1 - 2 * MARGIN
    while True:
        place, pre, score, complete = _above_bound(x, weight, bias, count, scale, precision, bound)
        if complete or bound == 0:
            break
        bound = 0.0
    row = place // weight.shape[0]
    crow = torch.searchsorted(row, torch.arange(x.shape[0] + 1, device=x.device))
    index = place % weight.shape[0]
    if approximate:
        pre = row_dot(crow, index, x, weight) + bias[index]
        score = pre if scale is None else pre * scale[index]
    kept = _first_largest(score, count)
    before = torch.zeros(score.shape[0] + 1, dtype=torch.long, device=x.device)
    torch.cumsum(kept, dim=0, out=before[1:])
    smallest = torch.where(kept, score, torch.inf)
    smallest = smallest.amin() if smallest.numel() else x.new_tensor(torch.inf)
    return Sparse(before[crow], index[kept], pre[kept]), smallest


def _above_bound(
    x: Tensor, weight: Tensor, bias: Tensor, count: int, scale: Tensor | None, precision: str, bound: float
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Place (row * latents + latent), pre-activation and score of all entries that may be among the largest.

    Whenever twice the wanted number is at hand, the surplus goes and the bound rises. Last comes whether the
    bound at the start was low enough, so that nothing can be missing.
    """
    margin = MARGIN if precision == "bfloat16" else 0.0
    parts: list[tuple[Tensor, ...]] = []
    held, raised, n_latents = 0, bound, weight.shape[0]
    for part, pre in tiles(x, weight, bias, precision):
        score = pre if scale is None else pre * scale
        place = _places(score, raised)
        flat = place + part.start * n_latents
        parts.append((flat, pre.reshape(-1)[place], score.reshape(-1)[place]))
        held += place.shape[0]
        if held > 2 * count:
            parts = [_tightened(parts, count, margin)]
            held = parts[0][0].shape[0]
            raised = max(raised, float(parts[0][2].amin()))
    place, pre, score = (torch.cat(column) for column in zip(*parts, strict=True))
    complete = score.shape[0] >= count and float(_cut(score, count)) * (1 - margin) >= bound
    return place, pre, score, complete


def _tightened(parts: list[tuple[Tensor, ...]], count: int, margin: float) -> tuple[Tensor, ...]:
    place, pre, score = (torch.cat(column) for column in zip(*parts, strict=True))
    kept = score >= _cut(score, count) * (1 - margin)
    return place[kept], pre[kept], score[kept]


def _places(score: Tensor, bound: float) -> Int[Tensor, " entries"]:
    """Flat places of the entries above a bound, ascending; looks only into groups whose maximum is."""
    columns = score.shape[1]
    size = next((size for size in (16, 8, 4) if columns % size == 0), 1)
    flat = score.reshape(-1)
    if size == 1 or score.device.type != "cpu":
        return (flat > bound).nonzero().squeeze(1)
    groups = flat.view(-1, size)
    hit = (groups.amax(dim=1) > bound).nonzero().squeeze(1)
    inside = (groups[hit] > bound).view(-1).nonzero().squeeze(1)
    return hit[inside // size] * size + inside % size


def _cut(score: Tensor, count: int) -> Float[Tensor, ""]:
    """The count-th largest entry."""
    return torch.kthvalue(score, score.shape[0] - count + 1).values


def _first_largest(score: Float[Tensor, " entries"], count: int) -> Bool[Tensor, " entries"]:
    """Mark the `count` largest positive entries; of those that equal the cut, the earliest."""
    if score.shape[0] <= count:
        return score > 0
    cut = _cut(score, count)
    larger, equal = score > cut, score == cut
    room = count - larger.sum()
    return (larger | (equal & (equal.cumsum(0) <= room))) & (score > 0)


def encode_above(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"],
) -> Sparse:
    """See `kernels.encode_above`."""
    floor = threshold.clamp(min=0)
    crow = torch.zeros(x.shape[0] + 1, dtype=torch.long, device=x.device)
    parts: list[tuple[Tensor, Tensor]] = []
    for part, pre in tiles(x, weight, bias, "float32"):
        kept = pre > floor
        counts = kept.sum(dim=1)
        crow[part.start + 1 : part.stop + 1] = counts
        width = int(counts.max())
        value, latent = strongest(pre.masked_fill_(~kept, 0), width, exact=True)
        inside = torch.arange(width, device=x.device) < counts[:, None]
        parts.append((latent[inside], value[inside]))
    empty = torch.zeros(0, dtype=torch.long, device=x.device), x.new_zeros(0)
    index, value = (torch.cat(column) for column in zip(empty, *parts, strict=True))
    return Sparse(crow.cumsum(0), index, value)


def tiles(x: Tensor, weight: Tensor, bias: Tensor, precision: str) -> Iterator[tuple[slice, Tensor]]:
    """Pre-activations of some tokens at a time, in one reused tile, with the tokens they belong to."""
    wide = None
    for part, product in products(x, weight, precision):
        if product.dtype == x.dtype:
            yield part, product.add_(bias)
        else:
            wide = (
                torch.empty(product.shape, dtype=torch.float32, device=x.device)
                if wide is None
                else wide[: product.shape[0]]
            )
            yield part, torch.add(product, bias, out=wide)


def products(x: Tensor, weight: Tensor, precision: str) -> Iterator[tuple[slice, Tensor]]:
    """Products with the weights for some tokens at a time, in one tile that the next round overwrites."""
    if precision == "bfloat16":
        x, weight = x.bfloat16(), weight.bfloat16()
    tokens, n_latents = x.shape[0], weight.shape[0]
    size = min(max(tokens, 1), max(LEAST_ROWS, TILE_BYTES // (n_latents * x.element_size())))
    tile = _scratch(x, size * n_latents).view(size, n_latents)
    for start in range(0, tokens, size):
        part = slice(start, min(tokens, start + size))
        yield part, torch.mm(x[part], weight.T, out=tile[: part.stop - start])


def _scratch(like: Tensor, size: int) -> Tensor:
    """Memory for one tile; on CPU the thread keeps it, since fresh pages cost as much as the selection."""
    if like.device.type != "cpu" or size * like.element_size() > 4 * TILE_BYTES:
        return like.new_empty(size)
    held: dict[torch.dtype, Tensor] = _kept.__dict__.setdefault("tiles", {})
    if like.dtype not in held or held[like.dtype].shape[0] < size:
        # A tensor made in inference mode could not be written outside of it.
        with torch.inference_mode(False):
            held[like.dtype] = torch.empty(size, dtype=like.dtype, device="cpu")
    return held[like.dtype][:size]


def normalise_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.normalise_rows_`."""
    return rows.div_(rows.norm(dim=1, keepdim=True).clamp_(min=torch.finfo(rows.dtype).tiny))


def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """See `kernels.project_rows_`."""
    along = torch.einsum("nd,nd->n", gradient, rows)
    return gradient.addcmul_(along[:, None], rows, value=-1)
