"""The difference of two means as a steering vector: only its strength is chosen, on training data.

Source: Rimsky et al., Steering Llama 2 via Contrastive Activation Addition (https://arxiv.org/abs/2312.06681); Marks
and Tegmark (https://arxiv.org/abs/2310.06824) for the difference of means as a direction.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from palimpsest.artifacts import Artifact, RunFolder, open_artifact
from palimpsest.log import log
from palimpsest.models import LanguageModel
from palimpsest.options import RUN_ONLY, config_dict
from palimpsest.tune.card import write_card
from palimpsest.tune.config import TuneConfig
from palimpsest.tune.contrast import Contrast
from palimpsest.tune.data import TuneData
from palimpsest.tune.entries import Entries, Log
from palimpsest.tune.penalties import ADAPTER, layers_of
from palimpsest.tune.prepare import attach, parameters
from palimpsest.tune.run import RESULT, SCHEMA, STAGE, measure
from palimpsest.tune.summary import summarise
from palimpsest.tune.training import hushed
from palimpsest.tune.versions import rank

STRENGTHS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Lengths of the vector that are tried, as multiples of the mean length of the activations at the site."""


class Tried(NamedTuple):
    """One vector and what it does on training rows."""

    site: str
    strength: float
    value: float


def make_diffmean(
    config: TuneConfig,
    language: LanguageModel,
    data: TuneData,
    contrasts: Mapping[str, Contrast],
    *,
    resume: bool = False,
) -> Artifact:
    """Save the difference of means as an adapter of component `vector`, with the files of any other fine-tune.

    Every site and strength of a small grid is tried on training rows; the one with the lowest objective is kept, even
    where the base itself is lower.

    Args:
        config: Options of a `vector`; dictionaries and sites stand in the order of `contrasts`.
        language: The base; it is left as it was.
        data: Training rows choose, held-out rows measure.
        contrasts: By site.
        resume: Keep a finished folder.
    """
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config, drop=RUN_ONLY) | {"method": "diffmean"},
        inputs=data.inputs,
        models={"base": config.model},
        seed=config.run.seed,
        device=str(language.device),
        resume=resume,
    ) as run:
        if run.already_complete:
            return open_artifact(config.run.out, verify=False)
        started = time.perf_counter()
        tried = [
            one for place in range(len(contrasts)) for one in _grid(config, place, language, data, contrasts)
        ]
        best = min(tried, key=lambda one: rank(one.value))
        run.timing("train", time.perf_counter() - started)
        log.info("diffmean: %s of %s", best.strength, best.site)
        place = list(contrasts).index(best.site)
        _write(_at(config, place), language, data, contrasts[best.site], best, tried, run)
        return run.finish()


def _at(config: TuneConfig, place: int) -> TuneConfig:
    """The same fine-tune at one of its sites."""
    site = config.site[place : place + 1]
    return replace(config, dictionary=config.dictionary[place : place + 1], site=site)


def _grid(
    config: TuneConfig, place: int, language: LanguageModel, data: TuneData, contrasts: Mapping[str, Contrast]
) -> list[Tried]:
    """Every strength at one site, measured on training rows."""
    site, contrast = list(contrasts.items())[place]
    training = replace(data, heldout=data.train, retain_heldout=data.retain, general=[])
    yardstick = measure(config, language, training)
    model = attach(_at(config, place), language)
    try:
        found = []
        for strength in STRENGTHS:
            _set(model, contrast, strength)
            found.append(Tried(site, strength, yardstick.measure(model).value))
        return found
    finally:
        model.unload()


@torch.no_grad()
def _set(model: Any, contrast: Contrast, strength: float) -> None:
    (layer,) = layers_of(model)
    (weight,) = layer.component(ADAPTER).parameters()
    weight.copy_(contrast.direction * (strength * contrast.norm))


def _write(
    config: TuneConfig,
    language: LanguageModel,
    data: TuneData,
    contrast: Contrast,
    best: Tried,
    tried: list[Tried],
    run: RunFolder,
) -> None:
    model = attach(config, language)
    try:
        yardstick = measure(config, language, data)
        before = yardstick.before(model)
        _set(model, contrast, best.strength)
        figures = summarise(before, yardstick.measure(model), seed=config.run.seed)
        adapter = model.peft_config[ADAPTER]
        ((dictionary, site),) = adapter.target_hooks
        result = {
            "schema": SCHEMA,
            "component": "vector",
            "objective": config.objective.objective,
            "method": "diffmean",
            "model": config.model,
            "sites": [{"site": site, "dictionary": dictionary, "sha256": adapter.hashes[site], "latents": 0}],
            **figures,
            "parameters": parameters(model),
            "latents_moved": None,
            "lr": None,
            "steps": 0,
            "seconds": run_seconds(run),
            "stopped": None,
            "rows": {"train": len(data.train), "heldout": min(len(data.heldout), config.objective.eval_rows)},
            "lm_eval": None,
            "notes": data.notes,
            "strength": best.strength,
            "tried": [one._asdict() for one in tried],
        }
        with hushed():
            model.save_pretrained(str(run.path), selected_adapters=[ADAPTER], save_embedding_layers=False)
    finally:
        model.unload()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        run.adopt(name)
    Entries(run, 0).write(0, {name: [] for name in ("site", "latent", "value", "gradient", "firings")})
    reports = Log(run, 0)
    for one in tried:
        reports.add(0, one._asdict())
    reports.close()
    run.write_json(RESULT, result)
    write_card(run.path, result)


def run_seconds(run: RunFolder) -> float:
    """What choosing the vector took."""
    from palimpsest.artifacts.reading import read_manifest

    run.update()
    return float(read_manifest(run.path)["timings"]["train"])
