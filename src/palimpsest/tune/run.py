"""A fine-tune as a stage: a config in, an adapter folder with its figures out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from palimpsest.artifacts import Artifact, RunFolder, check_claim, input_entry, open_artifact
from palimpsest.artifacts.reading import read_manifest
from palimpsest.errors import NumericsError
from palimpsest.log import log
from palimpsest.models import LanguageModel, fingerprint
from palimpsest.options import RUN_ONLY, config_dict
from palimpsest.tune.adapter import LatentLayer
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.data import PLAIN, TuneData, load_data
from palimpsest.tune.measure import Yardstick
from palimpsest.tune.movers import Movers
from palimpsest.tune.objectives import make_trainer
from palimpsest.tune.penalties import ADAPTER, decoder_norms, layers_of
from palimpsest.tune.prepare import attach, check_options, open_base, parameters
from palimpsest.tune.rows import evenly
from palimpsest.tune.summary import summarise
from palimpsest.tune.training import hushed, newest_checkpoint, restore, still

STAGE = "tune"

RESULT = "tune.json"

SCHEMA = 1
"""Of `tune.json`."""

CHECKPOINTS = "checkpoints"

TIMING = "train"

NAMED = 20
"""Latents of each site that the card names in words, where there are any."""

BESIDE = ("track", "track_latents")
"""Options that change nothing of the result: a run may go on with others."""


class Trained(NamedTuple):
    """What training left, beside the adapter in the model.

    Attributes:
        steps: Optimiser steps whose effect is in the adapter.
        seconds: In the loop, of this process.
        stopped: Why it ended early, or None.
    """

    steps: int
    seconds: float
    stopped: str | None


def run_tune(config: TuneConfig, language: LanguageModel | None = None) -> Artifact:
    """Train an adapter and save it with its figures to `config.run.out`, in a form that peft loads.

    Args:
        config: The run.
        language: The base model, where it is loaded already; it is left as it was.

    Returns:
        The finished folder.

    Raises:
        NumericsError: A loss or a gradient was not finite. The adapter of the last good step is saved all the same.
        PalimpsestError: Bad input. An interrupted run continues with `resume` from its last checkpoint and gives the
            same weights as an uninterrupted one.
    """
    check_options(config)
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    language = open_base(config) if language is None else language
    data = load_data(config, language)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config, drop=(*RUN_ONLY, *BESIDE)),
        inputs=_inputs(config, language, data),
        models={"base": config.model},
        seed=config.run.seed,
        device=str(language.device),
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if not run.already_complete:
            for note in data.notes:
                log.warning("%s.", note)
            model = attach(config, language)
            try:
                _tune(config, language, model, data, run)
            finally:
                model.unload()
        made = open_artifact(config.run.out, verify=False) if run.already_complete else run.finish()
    stopped = made.read_json(RESULT)["stopped"]
    if stopped is not None:
        raise NumericsError(
            f"Training stopped early: {stopped}",
            found=f"the adapter of the last good step, in {config.run.out}",
            fix="Lower --lr, or look at the row of that step",
        )
    return made


def train(
    config: TuneConfig,
    model: Any,
    tokenizer: Any,
    data: TuneData,
    folder: Path,
    callbacks: Sequence[Any] = (),
) -> Trained:
    """Train the adapter of a peft model in place.

    Args:
        config: The run; with `resume` it goes on from the newest complete checkpoint, if there is one.
        model: A peft model with one new adapter.
        tokenizer: Of the model.
        data: Rows to learn from.
        folder: Where checkpoints go.
        callbacks: Of transformers, added behind our own.
    """
    with hushed(), still(model):
        trainer = make_trainer(config, model, tokenizer, data, folder)
        for one in callbacks:
            trainer.add_callback(one)
        checkpoint = newest_checkpoint(folder) if config.run.resume else None
        started = time.perf_counter()
        try:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            restore(trainer)
    seconds, fault = time.perf_counter() - started, trainer.guard.fault
    if fault is None:
        return Trained(trainer.state.global_step, seconds, None)
    return Trained(trainer.guard.steps, seconds, f"the loss or its gradient was not finite at step {fault}")


def measure(config: TuneConfig, language: LanguageModel, data: TuneData) -> Yardstick:
    """What held-out rows and general text are measured with; of each at most `eval_rows`, evenly spaced.

    Under a scope that plain text says nothing about, general text is left out.
    """
    most = config.objective.eval_rows
    reward = None
    if config.objective.reward is not None:
        from palimpsest.tune.objectives.rewards import load_reward

        reward = load_reward(config.objective.reward)
    return Yardstick(
        language,
        config.objective,
        evenly(data.heldout, most),
        general=evenly(data.general, most) if config.adapter.scope in PLAIN else [],
        retain=evenly(data.retain_heldout, most),
        reward=reward,
        tokens_per_batch=config.models.tokens_per_batch,
    )


def _tune(
    config: TuneConfig, language: LanguageModel, model: Any, data: TuneData, run: RunFolder
) -> dict[str, Any]:
    """Measure, train, measure, write."""
    yardstick = measure(config, language, data)
    # The base's tasks come first: one that cannot be run ends the run before it has cost anything.
    tasks = _benchmark(config, language, model, base=True)
    before = yardstick.before(model)
    layers = layers_of(model)
    with Movers(
        run, layers, config.log, steps=config.schedule.steps, config=config_dict(config), adapter=ADAPTER
    ) as movers:
        started = time.perf_counter()
        try:
            trained = train(config, model, language.tokenizer, data, run.part(CHECKPOINTS), [movers])
        except BaseException:
            run.timing(TIMING, time.perf_counter() - started)
            run.update()
            raise
        run.timing(TIMING, trained.seconds)
        run.update()
        movers.write(trained.steps)
        moved = movers.moved() if layers else None
    figures = summarise(before, yardstick.measure(model), seed=config.run.seed)
    result = {
        "schema": SCHEMA,
        "component": config.adapter.component,
        "objective": config.objective.objective,
        "method": config.adapter.component,
        "model": config.model,
        "sites": [_site(layer, model) for layer in layers],
        **figures,
        "parameters": parameters(model),
        "latents_moved": None if config.adapter.component == "vector" else moved,
        "lr": config.lr,
        "steps": trained.steps,
        "seconds": read_manifest(run.path)["timings"][TIMING],
        "stopped": trained.stopped,
        "rows": {"train": len(data.train), "heldout": min(len(data.heldout), config.objective.eval_rows)},
        "lm_eval": None
        if tasks is None
        else {"base": tasks, "tuned": _benchmark(config, language, model, base=False)},
        "notes": data.notes,
    }
    _write(run, model, result)
    return result


def _site(layer: LatentLayer, model: Any) -> dict[str, Any]:
    """What `tune.json` says of a site."""
    config = model.peft_config[ADAPTER]
    names = {site: name for name, site in config.target_hooks}
    site = layer.places[ADAPTER].site
    return {
        "site": site,
        "dictionary": names[site],
        "sha256": config.hashes[site],
        "latents": layer.component(ADAPTER).n,
    }


def _benchmark(config: TuneConfig, language: LanguageModel, model: Any, *, base: bool) -> Any:
    """Tasks of lm-evaluation-harness, where some were asked for."""
    asked = config.log
    if not asked.lm_eval:
        return None
    from palimpsest.tune.harness import run_lm_eval

    return run_lm_eval(
        model, language.tokenizer, asked.lm_eval, asked.lm_eval_limit, asked.lm_eval_path, base=base
    )


def _write(run: RunFolder, model: Any, result: dict[str, Any]) -> None:
    """The adapter as peft writes it, the figures, and a card of them."""
    from palimpsest.tune.card import write_card

    model.save_pretrained(str(run.path), selected_adapters=[ADAPTER], save_embedding_layers=False)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        run.adopt(name)
    run.write_json(RESULT, result)
    write_card(run.path, result, labels=_labels(model))


def _labels(model: Any) -> dict[str, dict[int, str]]:
    """What the strongest latents stand for, where a dictionary has an id at Neuronpedia or a cache knows it."""
    from palimpsest.labelcache import Wanted, find_labels, neuronpedia_id

    wanted = []
    for layer in layers_of(model):
        component, source = layer.component(ADAPTER), neuronpedia_id(layer.dictionary.metadata)
        strength = component.values().abs() * (decoder_norms(layer) if component.n else 1)
        best = strength.topk(min(NAMED, component.n)).indices
        wanted += [Wanted(layer.site, latent, source) for latent in component.latents[best].tolist()]
    found: dict[str, dict[int, str]] = {}
    for (site, latent), label in find_labels(wanted).items():
        found.setdefault(site, {})[latent] = label
    return found


def _inputs(config: TuneConfig, language: LanguageModel, data: TuneData) -> dict[str, dict[str, Any]]:
    def entry(path: str) -> dict[str, Any]:
        return input_entry(path) if Path(path).exists() else {"path": path, "sha256": None}

    dictionaries = {f"dictionary/{place}": entry(path) for place, path in enumerate(config.dictionary)}
    model = {"path": config.model, "sha256": fingerprint(language)}
    return {"model": model} | dictionaries | data.inputs


__all__ = ["RESULT", "STAGE", "Trained", "measure", "run_tune", "train"]
