"""Sparse kernels of a training step, each with the backend that is fastest where its tensors live.

A selection of latents is never more than its entries: no function here holds the [tokens, latents] matrix. The
backends are plain PyTorch (everywhere), a C++ extension built on first use (CPU, fp32) and Triton (CUDA); all give
the same results. `features` is models * d_model; indices are int64; tensors are contiguous.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from importlib import import_module, util
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor

from palimpsest.dictionaries.kernels import torch_ops
from palimpsest.dictionaries.kernels.entries import Grouped, Sparse
from palimpsest.errors import ConfigError

BACKENDS = ("torch", "native", "triton")
"""Names that `use` and the environment variable PALIMPSEST_KERNELS take, beside auto."""

PRECISIONS = ("float32", "bfloat16")
"""Types that the encode GEMM may run in."""

_forced: ContextVar[str | None] = ContextVar("forced", default=None)


@contextmanager
def use(name: str) -> Iterator[None]:
    """Force one backend inside the block, in this thread.

    Args:
        name: One of `BACKENDS`, or auto.

    Raises:
        ConfigError: The name is none of these, or the backend cannot be had here.
    """
    _demand(name, "kernels.use")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def backend(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Which backend serves tensors of this device and type.

    Raises:
        ConfigError: PALIMPSEST_KERNELS names none, or one that cannot be had here.
    """
    kind = torch.device(device).type
    wanted = _forced.get() or _from_environment()
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and kind == "cuda"):
        return "torch"
    if wanted != "auto":
        return "torch" if wanted == "native" and kind != "cpu" else wanted
    if kind == "cuda" and _module("triton") is not None:
        return "triton"
    if kind == "cpu" and _module("native") is not None:
        return "native"
    return "torch"


def _from_environment() -> str:
    name = os.environ.get("PALIMPSEST_KERNELS", "auto") or "auto"
    if name != "auto":
        _demand(name, "PALIMPSEST_KERNELS")
    return name


def _demand(name: str, source: str) -> None:
    if name not in (*BACKENDS, "auto"):
        raise ConfigError(
            f"{source} names no backend", expected=" | ".join((*BACKENDS, "auto")), found=repr(name)
        )
    if name != "auto" and _module(name) is None:
        raise ConfigError(
            f"{source} asks for the {name} kernels, which cannot be had here",
            fix="install a C++ compiler" if name == "native" else "install triton, or use torch",
        )


@cache
def _module(name: str) -> ModuleType | None:
    """The backend's module, or None where it cannot work; a build is tried once per process."""
    if name == "torch":
        return torch_ops
    if name == "native":
        native = import_module(f"{__name__}.native")
        return native if native.available() else None
    if util.find_spec("triton") is None or util.find_spec(f"{__name__}.triton_ops") is None:
        return None
    return import_module(f"{__name__}.triton_ops")


def _ops(tensor: Tensor) -> ModuleType:
    return _module(backend(tensor.device, tensor.dtype)) or torch_ops


@torch.no_grad()
def row_sum(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    value: Float[Tensor, " entries"],
    rows: Float[Tensor, "n_rows d"],
) -> Float[Tensor, "n d"]:
    """out[i] = Σ over the entries e of row i of value[e] · rows[index[e]]; a row without entries is 0."""
    return _ops(rows).row_sum(crow, index, value, rows)


@torch.no_grad()
def row_dot(
    crow: Int[Tensor, " n_and_one"],
    index: Int[Tensor, " entries"],
    left: Float[Tensor, "n d"],
    right: Float[Tensor, "n_rows d"],
) -> Float[Tensor, " entries"]:
    """out[e] = left[row of e] · right[index[e]]."""
    return _ops(left).row_dot(crow, index, left, right)


@torch.no_grad()
def by_latent(crow: Int[Tensor, " n_and_one"], index: Int[Tensor, " entries"], n_latents: int) -> Grouped:
    """The entries ordered by latent, stably; `index` must be below `n_latents`."""
    ops = _module(backend(index.device)) or torch_ops
    return ops.by_latent(crow, index, n_latents)


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
    """The k largest scores of each token, then ReLU.

    Pre-activations are h = x @ weight.T + bias; the score is h, or h · scale. Of each row the k largest scores are
    kept, strongest first; where the score is not positive the entry is padding: value 0, latent 0.

    Args:
        x: Activations, models side by side.
        weight: Encoder, one row per latent.
        bias: Encoder bias.
        k: From 1 to the number of latents.
        scale: Weight of each latent in the ranking, not negative (a crosscoder's decoder norms).
        precision: Type of the GEMM. In bfloat16 it proposes somewhat more than k latents, whose scores are then
            computed in fp32; the selection agrees with that of fp32 on at least 99 % of the entries, the values
            exactly. Rounding is relative to x · weight: take a large common mean out of x first.
        exact: Equal scores go by the smaller latent. Without it, ties are settled in any order.

    Returns:
        h (never scaled) and latents.

    Source: Gao et al., Scaling and evaluating sparse autoencoders (https://arxiv.org/abs/2406.04093).
    """
    _check(x, precision)
    return _ops(x).encode_topk(x, weight, bias, k, scale=scale, precision=precision, exact=exact)


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
    """The `count` largest positive scores of the whole batch; see `encode_topk` for what a score is.

    Exact whatever the guess: a wrong one costs time only. Of scores that equal the cut the earliest are kept (by
    token, then by latent).

    Args:
        x: Activations, models side by side.
        weight: Encoder, one row per latent.
        bias: Encoder bias.
        count: How many to keep; fewer are, where fewer are positive.
        scale: Weight of each latent in the ranking, not negative.
        precision: Type of the GEMM.
        guess: A score below which nothing is likely to be kept, such as 0.9 of the last step's smallest.

    Returns:
        Entries by token and inside a token by latent, with their h; and the smallest kept score, infinity when
        nothing is kept.

    Source: Bussmann et al., BatchTopK Sparse Autoencoders (https://arxiv.org/abs/2412.06410).
    """
    _check(x, precision)
    ops = _ops(x)
    return ops.encode_batch_topk(x, weight, bias, count, scale=scale, precision=precision, guess=guess)


@torch.no_grad()
def encode_above(
    x: Float[Tensor, "tokens features"],
    weight: Float[Tensor, "latents features"],
    bias: Float[Tensor, " latents"],
    threshold: Float[Tensor, " latents"],
) -> Sparse:
    """Pre-activations above max(threshold, 0): inference of relu, jumprelu and batch_topk.

    Entries are ordered strongest first inside a token, ties by the smaller latent.
    """
    return _ops(x).encode_above(x, weight, bias, threshold)


@torch.no_grad()
def largest(
    pre: Float[Tensor, "tokens latents"], k: int
) -> tuple[Float[Tensor, "tokens k"], Int[Tensor, "tokens k"]] | None:
    """`encode_topk` for scores that are there already, ties by the smaller latent; None where PyTorch is to do it."""
    ops = _ops(pre)
    return ops.largest(pre, k) if pre.dtype == torch.float32 and hasattr(ops, "largest") else None


@torch.no_grad()
def above(pre: Float[Tensor, "tokens latents"], threshold: Float[Tensor, " latents"]) -> Sparse | None:
    """`encode_above` for pre-activations that are there already; None where PyTorch is to do it."""
    ops = _ops(pre)
    return ops.above(pre, threshold) if pre.dtype == torch.float32 and hasattr(ops, "above") else None


@torch.no_grad()
def normalise_rows_(rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Scale every row to norm 1, in place; a row of zeros stays."""
    return _ops(rows).normalise_rows_(rows)


@torch.no_grad()
def project_rows_(gradient: Float[Tensor, "n d"], rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """Take from each gradient row its component along the unit row beside it, in place."""
    return _ops(gradient).project_rows_(gradient, rows)


def _check(x: Tensor, precision: str) -> None:
    if precision not in PRECISIONS:
        raise ConfigError(
            "unknown precision of the encode GEMM", expected=" | ".join(PRECISIONS), found=repr(precision)
        )
    if precision == "bfloat16" and x.dtype == torch.float64:
        raise ConfigError("a bfloat16 GEMM of float64 activations", expected="float32 activations")


__all__ = [
    "BACKENDS",
    "PRECISIONS",
    "Grouped",
    "Sparse",
    "above",
    "backend",
    "by_latent",
    "encode_above",
    "encode_batch_topk",
    "encode_topk",
    "largest",
    "normalise_rows_",
    "project_rows_",
    "row_dot",
    "row_sum",
    "use",
]
