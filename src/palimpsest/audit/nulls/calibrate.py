"""`battery calibrate` as a stage: train the nulls of a base once, and keep what they do to its battery."""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from palimpsest.artifacts import Artifact, RunFolder, input_entry, open_artifact
from palimpsest.audit.battery.make import CACHE, CALIBRATION
from palimpsest.audit.calibration import nulls_needed
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.audit.nulls.recipes import NullRecipe, make_recipes
from palimpsest.audit.nulls.store import FIGURES, RECORDS, Nulls, save_nulls
from palimpsest.audit.nulls.work import Workshop, cache_file, load_null, save_null, start_worker, work
from palimpsest.errors import ArtifactError, NumericsError
from palimpsest.log import log, progress
from palimpsest.options import config_dict

SMALL = 100_000_000
"""Parameters up to which several nulls are trained at once on a CPU."""

REPEATS = 4
"""Passes over its text beyond which a null is no longer like a fine-tune on enough of it."""

Job = tuple[NullRecipe, Path]


def calibrate_battery(config: CalibrateConfig) -> Artifact:
    """Train and measure the nulls of a battery; finished ones are found in its cache and not made again.

    Raises:
        PalimpsestError: The battery, its base or the null corpora cannot be used.
        NumericsError: Every null diverged.
    """
    shop = Workshop(config)
    shop.check()
    families = shop.families()
    texts = {family: text_hash(shop, family) for family in families}
    recipes = recipes_of(config, families)
    if strange := [name for name in families if name not in shop.battery.names]:
        log.warning("%s: no corpus of the battery, so these nulls judge every corpus.", ", ".join(strange))
    _warn_of_repeats(config, shop, families)
    jobs = [(recipe, cache_file(config.path, config, recipe, texts[recipe.family])) for recipe in recipes]
    if config.overwrite:
        for _, path in jobs:
            path.unlink(missing_ok=True)
    todo = [job for job in jobs if not job[1].exists()]
    (config.path / CACHE).mkdir(exist_ok=True)
    if len(todo) < len(jobs):
        log.warning("%d of %d nulls were made earlier and are used again.", len(jobs) - len(todo), len(jobs))
    make_nulls(config, shop, todo)
    return _collect(config, shop, jobs)


def recipes_of(config: CalibrateConfig, families: Sequence[str]) -> list[NullRecipe]:
    """What a config trains on these families of text."""
    return make_recipes(
        config.nulls,
        families,
        full_lr=config.full_lr,
        lora_lr=config.lora_lr,
        steps=config.steps,
        methods=config.methods,
        seed=config.seed,
    )


def worker_count(config: CalibrateConfig, shop: Workshop, jobs: int) -> int:
    """How many nulls are trained at once."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.workers is not None:
        return max(1, min(config.workers, jobs))
    size = sum(parameter.numel() for parameter in shop.model.model.parameters())
    alone = shop.model.device.type != "cpu" or size > SMALL
    return 1 if alone else max(1, min(cores, jobs))


def _warn_of_repeats(config: CalibrateConfig, shop: Workshop, families: Sequence[str]) -> None:
    """A null that learns its text by heart damages the rest more than a fine-tune on enough text would."""
    for family in families:
        blocks = len(shop.blocks(family))
        epochs = max(config.steps) * config.batch_size / blocks
        if epochs > REPEATS:
            log.warning(
                "The longest nulls read the text of %s %.0f times over; more text (--null-corpus) makes truer nulls.",
                family,
                epochs,
            )


def make_nulls(config: CalibrateConfig, shop: Workshop, todo: Sequence[Job]) -> None:
    """Train and measure nulls, several at once where that pays; each is kept as soon as it is done.

    Raises:
        NumericsError: A worker process died.
    """
    if not todo:
        return
    workers = worker_count(config, shop, len(todo))
    with progress("training nulls", len(todo), unit="nulls") as advance:
        if workers == 1:
            for recipe, path in todo:
                record, figures = shop.make(recipe)
                save_null(path, record, figures)
                advance(1)
            return
        threads = max(1, torch.get_num_threads() // workers)
        pool = ProcessPoolExecutor(
            workers, mp_context=get_context("spawn"), initializer=start_worker, initargs=(config, threads)
        )
        try:
            futures = [pool.submit(work, recipe, path) for recipe, path in todo]
            for future in as_completed(futures):
                future.result()
                advance(1)
        except BrokenProcessPool as error:
            raise NumericsError(
                "A process that trained a null ended without a word, most often for want of memory",
                fix="Run the command again with --workers 1; finished nulls are kept",
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _collect(config: CalibrateConfig, shop: Workshop, jobs: Sequence[Job]) -> Artifact:
    """Put the nulls together as an artifact of their own inside the battery."""
    found = [load_null(path) for _, path in jobs]
    records = [record for record, _ in found]
    used = [record for record in records if record["diverged"] is None]
    if not used:
        raise NumericsError(
            "Every null diverged",
            found=records[0]["diverged"] if records else "no null",
            fix="Lower --full-lr and --lora-lr",
        )
    folder = config.path / CALIBRATION
    if _same_nulls(config.path, records):
        return open_artifact(folder, stage=CALIBRATION)
    with RunFolder(
        folder,
        stage=CALIBRATION,
        config=config_dict(config, drop=("overwrite", "workers")),
        inputs={"battery": input_entry(config.path)},
        seed=config.seed,
        device=str(shop.model.device),
        overwrite=folder.exists(),
    ) as run:
        run.write_json(RECORDS, records)
        save_nulls(run.file(FIGURES), {record["index"]: figures for record, figures in found if figures})
        return run.finish(summary=describe(shop.battery.names, records))


def _same_nulls(battery: Path, records: list[dict[str, Any]]) -> bool:
    """Whether these very nulls are in place: writing them again would make a new artifact of nothing new."""
    try:
        return Nulls(battery).records == records
    except ArtifactError:
        return False


def describe(names: Sequence[str], records: Sequence[dict[str, Any]]) -> str:
    """How many nulls of which family there are, and which corpora they can judge."""
    used = [record for record in records if record["diverged"] is None]
    families = Counter(record["family"] for record in used)
    need = nulls_needed(0.05)
    parts = [f"{len(used)} nulls: " + ", ".join(f"{count} on {name}" for name, count in families.items())]
    if lost := [record["name"] for record in records if record["diverged"] is not None]:
        parts.append(f"{len(lost)} diverged and are left out: {', '.join(lost)}")
    short = [name for name in names if len(used) - families[name] < need]
    if short:
        parts.append(f"too few for a verdict at level 0.05 on {', '.join(short)} (need {need})")
    return "; ".join(parts) + "."


def text_hash(shop: Workshop, family: str) -> str:
    """SHA-256 of the blocks that a family's nulls are trained on."""
    return hashlib.sha256(shop.blocks(family).numpy().tobytes()).hexdigest()
