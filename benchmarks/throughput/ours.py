"""Palimpsest, through its public interface only."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from throughput import contest
from throughput.clock import Clock
from throughput.fitted import Fitted, Weights

FAMILIES: dict[str, dict[str, Any]] = {
    "topk": {"activation": "topk"},
    "batch_topk": {"activation": "batch_topk"},
    "matryoshka": {"activation": "batch_topk"},
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "crosscoder": {"activation": "batch_topk"},
    "diff": {"activation": "batch_topk", "view": "diff"},
}


class NotYetError(Exception):
    """This version of palimpsest cannot train it; the row says why."""


def config(job: dict[str, Any], tokens: int, batch: int, log_every: int):
    """The recipe: defaults, but for sizes, schedule, and the dead latents of timed runs (as far away as peers')."""
    from palimpsest import TrainConfig
    from palimpsest.errors import PalimpsestError

    chosen = {
        "n_latents": job["latents"],
        "k": job["k"],
        "tokens": tokens,
        "batch_size": batch,
        "warmup": contest.WARM_UP,
        "decay": contest.DECAY,
        "dtype": job["dtype"],
        "device": job["device"],
        "seed": job["seed"],
        "log_every": log_every,
        **FAMILIES[job["family"]],
    }
    if job["lr"] is not None:
        chosen["lr"] = job["lr"]
    if not job["quality"]:
        chosen["dead_after_tokens"] = 10_000_000
    if job["family"] == "matryoshka":
        chosen["prefixes"] = contest.prefixes(job["latents"])
    if missing := set(chosen) - {field.name for field in fields(TrainConfig)}:
        raise NotYetError(f"TrainConfig has no {', '.join(sorted(missing))}")
    try:
        return TrainConfig(**chosen)
    except PalimpsestError as error:
        raise NotYetError(str(error)) from error


def train(job: dict[str, Any], clock: Clock) -> Fitted:
    from palimpsest import train_dictionary

    every = job.get("log_every", 1)
    # The clock hears of every step from the trainer, so a stream that is read ahead does not mislead it.
    clock.marked = True
    chosen = config(job, job["schedule"] * clock.batch, clock.batch, every)
    dictionary = train_dictionary(clock, chosen, on_step=lambda row: clock.mark(row["tokens"]))

    def infer(flat: Tensor) -> tuple[Tensor, Tensor]:
        x = flat.view(len(flat), job["models"], -1)
        output, codes = dictionary(x)
        return output.flatten(1), codes.l0()

    if job["family"] == "topk":
        return Fitted(infer, None)
    encoder = dictionary.W_enc.reshape(-1, dictionary.n_latents)
    shift = dictionary.b_dec.flatten() if dictionary.apply_b_dec_to_input else 0.0
    decoder = dictionary.W_dec.reshape(dictionary.n_latents, -1)
    return Fitted(infer, Weights(encoder, dictionary.b_enc, decoder, dictionary.b_dec.flatten(), shift))


def whole_run(job: dict[str, Any], x: Tensor, batch: int, steps: int) -> float:
    """Seconds of one whole `train_dictionary` call, start and end included."""
    import time

    from palimpsest import train_dictionary

    chosen = config(job, steps * batch, batch, 10**9)
    pieces = x.split(batch)
    started = time.perf_counter()
    train_dictionary((pieces[i % len(pieces)] for i in range(steps)), chosen)
    if x.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started


def backend(device: str) -> str:
    """Which kernels are in use, where this version has them."""
    try:
        from palimpsest.dictionaries import kernels

        return str(kernels.backend(torch.device(device)))
    except (ImportError, AttributeError, TypeError):
        return "PyTorch operators"
