"""Dictionary training as a stage: a config in, a dictionary folder out."""

import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from palimpsest.artifacts import RunFolder, check_claim
from palimpsest.buffer import ShuffleBuffer, buffer_capacity, prefetch
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import (
    Dictionary,
    TrainConfig,
    checkpoint_position,
    load_dictionary,
    native,
    push_dictionary,
    train_dictionaries,
    train_dictionary,
)
from palimpsest.dictionaries.training.loop import SEVERAL
from palimpsest.errors import ConfigError
from palimpsest.evaluate import evaluate_dictionary, evaluation_batches
from palimpsest.evaluate.text import CorpusBatches
from palimpsest.log import progress
from palimpsest.models import ModelPair
from palimpsest.options import RUN_ONLY, config_dict
from palimpsest.train.config import TrainPairConfig, TrainSaeConfig, variants
from palimpsest.train.source import ActivationSource, Stream, open_source
from palimpsest.train.tracking import Tracks

EVALUATION = "evaluation.json"

VARIANTS = "variants.json"
"""What a folder of several dictionaries holds, in short."""

BESIDE = ("track", "push", "log_every", "checkpoint_every")
"""Options that change nothing of the result: a run may go on with others."""

BUFFER_SHARE = 16
"""The shuffle buffer holds at most this part of the run: what it holds at the end was read for nothing."""


def train_sae(config: TrainSaeConfig) -> Dictionary:
    """Train a sparse autoencoder of one model and save it, with its origin and its metrics, to `config.run.out`.

    Raises:
        PalimpsestError: Bad input, or NaN in the activations. An interrupted run continues with `resume`
            from its last checkpoint and gives the same weights as an uninterrupted one.
    """
    return _only(config)


def train_pair(config: TrainPairConfig) -> Dictionary:
    """Train a diff-SAE or a crosscoder of a pair; saves and raises as `train_sae`."""
    return _only(config)


def train_variants(config: TrainSaeConfig | TrainPairConfig) -> dict[str, Dictionary]:
    """Train all of `config.training.variant` on one stream; each goes to a folder of its name in `config.run.out`.

    Raises:
        PalimpsestError: As `train_sae`; or there are no variants.
    """
    if not config.training.variant:
        raise ConfigError(
            "There are no variants to train", expected="training.variant, as in ('k=16', 'k=64')"
        )
    return _train(config)


def _only(config: TrainSaeConfig | TrainPairConfig) -> Dictionary:
    if config.training.variant:
        raise ConfigError("This call trains one dictionary", fix="Call train_variants for several")
    return _train(config)[""]


def _train(config: TrainSaeConfig | TrainPairConfig) -> dict[str, Dictionary]:
    """Dictionaries by the name of their variant; without variants the one dictionary, under no name."""
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    source = open_source(config)
    held_out = _held_out(config, source)
    view = config.side if isinstance(config, TrainSaeConfig) else "diff" if config.view == "diff" else "base"
    recipe = replace(config.recipe, seed=config.run.seed, device=source.device, view=view)
    training = config.training
    if training.expansion is not None:
        # From here on the number itself is what the run is known by.
        recipe = replace(recipe, n_latents=training.expansion * source.width)
        training = replace(training, expansion=None)
    settled = replace(config, recipe=recipe, training=training)
    recipes = variants(recipe, config.training.variant) or {"": recipe}
    with RunFolder(
        config.run.out,
        stage=native.STAGE if "" in recipes else SEVERAL,
        config=config_dict(settled, drop=(*RUN_ONLY, *BESIDE)),
        inputs=source.inputs | ({} if held_out is None else {"eval_corpus": held_out.corpus.fingerprint()}),
        seed=config.run.seed,
        device=source.device,
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            made = {name: load_dictionary(config.run.out / name) for name in recipes}
        else:
            started = time.perf_counter()
            made = _run_training(config, source, recipes, run)
            run.timing("train", time.perf_counter() - started)
            evaluations = {name: _evaluate(config, source, one, held_out) for name, one in made.items()}
            _write(run, made, evaluations, source)
            run.finish()
    if config.training.push is not None:
        push_dictionary(made[""], config.training.push)
    return made


def _run_training(
    config: TrainSaeConfig | TrainPairConfig,
    source: ActivationSource,
    recipes: Mapping[str, TrainConfig],
    run: RunFolder,
) -> dict[str, Dictionary]:
    recipe = next(iter(recipes.values()))
    start = checkpoint_position(run.path)
    stream, close = _stream(config, source, recipe, start)
    with ExitStack() as stack:
        stack.callback(close)
        tracks = Tracks(run, start, config.training.track, config_dict(config))
        stack.callback(tracks.close)
        with progress(f"training on {config.site}", recipe.tokens) as advance:
            advance(start)
            seen = start

            def on_step(figures: Mapping[str, Any]) -> None:
                nonlocal seen
                advance(figures["tokens"] - seen, note=note(figures))
                seen = figures["tokens"]
                tracks.add(figures)

            if "" in recipes:
                made = {
                    "": train_dictionary(stream, recipe, out=run, on_step=on_step, metadata=source.metadata)
                }
            else:
                made = train_dictionaries(stream, recipes, out=run, on_step=on_step, metadata=source.metadata)
        tracks.write_table()
        return made


def note(figures: Mapping[str, Any]) -> str:
    """The figures of a step in one line."""
    names = {"name": "", "loss": "loss", "fve": "FVE", "fve_base": "base", "fve_tuned": "tuned", "l0": "L0"}
    shown = [
        f"{label} {value:.3g}" if isinstance(value := figures[key], float) else str(value)
        for key, label in names.items()
        if key in figures
    ]
    return " ".join([*shown, f"dead {figures['dead_share']:.1%}"]).strip()


def _stream(
    config: TrainSaeConfig | TrainPairConfig, source: ActivationSource, recipe: TrainConfig, start: int
) -> tuple[Iterable[Tensor], Any]:
    """The batches of a run, and what closes them: mixed in a buffer, or as they come where that is asked for."""
    on_gpu = torch.device(recipe.device).type == "cuda"

    def ahead(position: int) -> Stream:
        # A model on the CPU works on the same cores as the trainer: reading ahead would only fight it.
        stream = source.stream(position)
        device = recipe.device if on_gpu else None
        return prefetch(stream, device=device) if source.from_disk or on_gpu else stream

    if not config.training.shuffle:
        stream = source.stream(start)
        return stream, stream.close  # pyright: ignore[reportAttributeAccessIssue]
    dtype = torch.bfloat16 if config.training.buffer_dtype == "bfloat16" else torch.float32
    capacity = config.training.buffer or min(
        buffer_capacity(recipe.batch_size, source.models, source.width, dtype), recipe.tokens // BUFFER_SHARE
    )
    buffer = ShuffleBuffer(
        ahead,
        capacity=max(capacity, 2 * recipe.batch_size),
        batch_size=recipe.batch_size,
        seed=config.run.seed,
        device=recipe.device,
        dtype=dtype,
        drop_last=True,
    )
    return buffer, buffer.close


def _held_out(config: TrainSaeConfig | TrainPairConfig, source: ActivationSource) -> CorpusBatches | None:
    """The text that the result is measured on, read before anything is trained; None where none was given."""
    if not config.training.eval_corpus or source.live is None:
        return None
    model = source.live.base if isinstance(source.live, ModelPair) else source.live
    options = config.corpora
    if model.context is not None and options.max_length > model.context:
        options = replace(options, max_length=model.context)
    corpus = Corpus(list(config.training.eval_corpus), model.tokenizer, options=options)
    return evaluation_batches(corpus, config.training.eval_tokens, config.models.tokens_per_batch)


def _evaluate(
    config: TrainSaeConfig | TrainPairConfig,
    source: ActivationSource,
    dictionary: Dictionary,
    held_out: CorpusBatches | None,
) -> dict[str, Any] | None:
    """Figures on held-out text, also put into the dictionary's metadata."""
    if held_out is None or source.live is None:
        return None
    found = evaluate_dictionary(dictionary, source.live, held_out, seed=config.run.seed)
    dictionary.metadata["evaluation"] = found.metrics | {"corpus": list(config.training.eval_corpus)}
    return found.to_dict()


def _write(
    run: RunFolder,
    made: Mapping[str, Dictionary],
    evaluations: Mapping[str, dict[str, Any] | None],
    source: ActivationSource,
) -> None:
    """The dictionary in the run's own folder, or each of several in a folder of its name."""
    for name, dictionary in made.items():
        if not name:
            native.write_files(run, dictionary)
        else:
            native.save(dictionary, run.path / name, overwrite=True, inputs=source.inputs)
        if evaluations[name] is not None:
            run.write_json(f"{name}-{EVALUATION}" if name else EVALUATION, evaluations[name])
    if "" not in made:
        figures = {name: {"k": one.k, **one.metadata["metrics"]} for name, one in made.items()}
        first = next(iter(made.values()))
        run.write_json(VARIANTS, {"site": first.site, "view": first.view, "dictionaries": figures})
