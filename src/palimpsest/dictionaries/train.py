"""Training a dictionary on a stream of activations; knows nothing of language models."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from palimpsest.artifacts import RunFolder, disk
from palimpsest.dictionaries import native
from palimpsest.dictionaries.config import TrainConfig
from palimpsest.dictionaries.dictionary import Dictionary
from palimpsest.dictionaries.step import Forward
from palimpsest.dictionaries.trainer import Trainer, read_checkpoint
from palimpsest.errors import ConfigError, DictionaryError
from palimpsest.log import log

CHECKPOINT = "checkpoint.safetensors"


def train_dictionary(
    batches: Iterable[Float[Tensor, "tokens models d_model"]],
    config: TrainConfig,
    *,
    out: RunFolder | str | Path | None = None,
    resume: bool = False,
    on_step: Callable[[Mapping[str, Any]], None] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Dictionary:
    """Train a dictionary.

    Args:
        batches: Activations in pieces of any number of tokens, `[tokens, models, d_model]` or, for one model,
            `[tokens, d_model]`. A resumed run expects the stream from token `checkpoint_position(out)` on.
        config: The recipe.
        out: Where the dictionary and, until it is finished, its checkpoints go: a path, or a folder of stage
            "dictionary" that is already open (it is finished here). Nothing is written when absent.
        resume: Continue from the last checkpoint in `out`.
        on_step: Called every `log_every` steps with step, tokens, lr, the loss terms, fve, l0, dead share.
        metadata: Kept with the dictionary: model, revision, site, corpus.

    Returns:
        The dictionary for raw activations, without gradients. Its metadata gains tokens, recipe and metrics
        (fve and l0 of the finished dictionary on the last batch, share of dead latents).

    Raises:
        NumericsError: NaN or infinity in the activations or the loss; names the step. Checkpoints stay.
        DictionaryError: The stream changes its width, or k is larger than the number of latents.
        ConfigError: The stream is empty.
        ArtifactError: `out` cannot be used, or its checkpoint belongs to another recipe.
    """
    if out is None or isinstance(out, RunFolder):
        folder = nullcontext(out)
    else:
        recipe = {"train": _recipe(config), "metadata": dict(metadata or {})}
        folder = RunFolder(out, stage=native.STAGE, config=recipe, resume=resume, seed=config.seed)
    with folder as run:
        if run is not None and run.already_complete:
            return native.read(run.path, config.device)
        trainer, last = _loop(batches, config, run, on_step)
        made = _finish(trainer, last, metadata or {})
        if run is not None:
            native.write_files(run, made)
            run.finish()
        return made


def checkpoint_position(out: str | Path) -> int:
    """How many tokens of the stream an interrupted run has used up; 0 when it has no checkpoint.

    Raises:
        ArtifactError: The checkpoint is damaged.
    """
    path = Path(out) / disk.PARTS / CHECKPOINT
    return int(read_checkpoint(path)[1]["tokens"]) if path.exists() else 0


def _recipe(config: TrainConfig) -> dict[str, Any]:
    """What decides the result; where it runs and how often it reports do not."""
    recipe = asdict(config)
    for name in ("device", "log_every", "checkpoint_every"):
        del recipe[name]
    return recipe


def _loop(
    batches: Iterable[Tensor],
    config: TrainConfig,
    run: RunFolder | None,
    on_step: Callable[[Mapping[str, Any]], None] | None,
) -> tuple[Trainer, Tensor | None]:
    """Run all steps; returns the final state and the last batch."""
    place = None if run is None else run.part(CHECKPOINT)
    trainer = None if place is None or not place.exists() else Trainer.load(config, place)
    last, since = None, (time.monotonic(), trainer.tokens if trainer else 0)
    if trainer is None or trainer.step < config.steps:
        for x in _batches(batches, config):
            trainer = trainer or Trainer.start(config, x)
            made = trainer.advance(x)
            last = x
            done = trainer.step >= config.steps
            if trainer.step % config.log_every == 0 or done:
                trainer.check()
                since = _report(trainer, made, on_step, since)
            if place is not None and trainer.step % config.checkpoint_every == 0 and not done:
                trainer.check()
                with disk.replacing(place) as temporary:
                    trainer.save(temporary)
            if done:
                break
    if trainer is None:
        raise ConfigError("There is nothing to train on", expected="at least one batch of activations")
    trainer.check()
    if trainer.step < config.steps:
        log.warning(
            "the stream ended after %d of %d tokens: the learning rate had not come down",
            trainer.tokens,
            config.tokens,
        )
    return trainer, last


def _batches(
    batches: Iterable[Tensor], config: TrainConfig
) -> Iterator[Float[Tensor, "tokens models d_model"]]:
    """Cut the stream into batches of one size; a rest is used only when it is all there is."""
    kept: list[Tensor] = []
    count, cut = 0, False
    for piece in batches:
        x = piece[:, None] if piece.ndim == 2 else piece
        if x.ndim != 3 or (kept and x.shape[1:] != kept[0].shape[1:]):
            raise DictionaryError(
                "The stream does not hold activations of one width",
                expected="[tokens, models, d_model]" if not kept else f"[tokens, {list(kept[0].shape[1:])}]",
                found=f"shape {list(piece.shape)}",
            )
        kept.append(x.to(config.device))
        count += x.shape[0]
        if count < config.batch_size:
            continue
        joined = torch.cat(kept) if len(kept) > 1 else kept[0]
        whole = count - count % config.batch_size
        yield from joined[:whole].split(config.batch_size)
        kept, count, cut = [joined[whole:]], count - whole, True
    if count and not cut:
        yield torch.cat(kept)


def _report(
    trainer: Trainer,
    made: Forward,
    on_step: Callable[[Mapping[str, Any]], None] | None,
    since: tuple[float, int],
) -> tuple[float, int]:
    """Hand the figures of a step to the caller; the only place that waits for the device."""
    now = time.monotonic()
    if on_step is not None:
        terms = {name: float(term.detach()) for name, term in made.losses.terms.items()}
        on_step(
            {
                "step": trainer.step,
                "tokens": trainer.tokens,
                "lr": trainer.config.lr_at(trainer.step - 1),
                "loss": float(made.losses.total().detach()),
                **terms,
                "fve": 1 - terms["reconstruction"],
                "l0": float(made.active.sum()) / made.tokens,
                "dead_share": trainer.dead_share(),
                "tokens_per_second": (trainer.tokens - since[1]) / max(now - since[0], 1e-9),
            }
        )
    return now, trainer.tokens


def _finish(trainer: Trainer, last: Tensor | None, metadata: Mapping[str, Any]) -> Dictionary:
    """Fold, and measure the result the way it will be used."""
    about = {**metadata, "tokens": trainer.tokens, "recipe": _recipe(trainer.config)}
    made = trainer.finished(about)
    metrics: dict[str, Any] = {"dead_share": trainer.dead_share()}
    if last is not None:
        x = last.float()
        output, codes = made(x)
        error = (x - output).square().sum() / (x - x.mean(dim=0)).square().sum().clamp(min=1e-12)
        metrics |= {"fve": 1 - float(error), "l0": float(codes.l0().float().mean())}
    made.metadata["metrics"] = metrics
    return made
