"""The smaller adapter: written as peft writes one, read back, and compared with the mask that it stands for."""

from __future__ import annotations

import copy
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from palimpsest.artifacts import RunFolder
from palimpsest.tune.explain.causal import Needed, Orders
from palimpsest.tune.explain.probe import Probe
from palimpsest.tune.explain.result import Pruned
from palimpsest.tune.explain.subject import NAME, Subject, attach

FOLDER = "pruned"
AGAIN = "reloaded"
"""Name of the pruned adapter once it is read back."""


def prune(
    subject: Subject, probe: Probe, orders: Orders, found: Needed, keep: float, run: RunFolder
) -> Pruned | None:
    """Write the adapter that keeps the fewest latents, and say what it is worth on the documents that chose nothing.

    Args:
        subject: The adapter.
        probe: The half of the documents that reports.
        orders: Of the latents.
        found: How many of each order the other half asks for.
        keep: The share that was asked for.
        run: Where the folder `pruned` goes.

    Returns:
        None where there is no effect, or no number of latents keeps that share.
    """
    if found.effect is None or not probe.effect.present:
        return None
    losses = probe.first(orders.effect, found.effect)
    share = probe.effect.share(losses)
    assert share is not None
    shutil.rmtree(run.path / FOLDER, ignore_errors=True)
    write_pruned(subject, orders.effect[: found.effect], run.path / FOLDER)
    run.adopt(FOLDER)
    difference = _read_back(subject, run.path / FOLDER, probe, losses)
    random = [one for one in found.random if one is not None]
    middle = sorted(random)[len(random) // 2] if random else None
    kept = [
        None if n is None else probe.effect.point(probe.first(order, n))
        for order, n in zip(orders.random, found.random, strict=True)
    ]
    shares = [one for one in kept if one is not None]
    return Pruned(
        keep=keep,
        n=found.effect,
        share=share[0],
        ci=share[1],
        magnitude_n=found.magnitude,
        magnitude_share=None
        if found.magnitude is None
        else probe.effect.point(probe.first(orders.magnitude, found.magnitude)),
        random_n=middle,
        random_range=(min(random), max(random)) if random else None,
        random_share=float(np.mean(shares)) if shares else None,
        path=FOLDER,
        reload_error=difference,
    )


def write_pruned(subject: Subject, places: NDArray, folder: Path) -> None:
    """Write an adapter with some latents of another: a folder that peft loads by itself.

    Args:
        subject: The adapter.
        places: Its latents that stay, as `Latents` counts them.
        folder: Where it goes.
    """
    latents = subject.latents
    kept = latents.by_site(np.sort(places[latents.editable[places]]))
    config = _config(subject, kept)
    model: Any = subject.model
    model.add_adapter(FOLDER, config)
    try:
        for site, layer in zip(latents.sites, latents.layers, strict=True):
            if site in kept:
                own = layer.component(latents.adapter)
                chosen = own.latents.new_tensor(kept[site])
                layer.component(FOLDER).load_state_dict(own.restricted(chosen).state_dict())
        with tempfile.TemporaryDirectory() as scratch:
            # peft writes an adapter that is not called `default` into a folder of its name, beside a card of its own.
            model.save_pretrained(scratch, selected_adapters=[FOLDER])
            shutil.copytree(Path(scratch) / FOLDER, folder, dirs_exist_ok=True)
    finally:
        model.delete_adapter(FOLDER)
        model.set_adapter(NAME)


def _config(subject: Subject, kept: dict[str, list[int]]) -> Any:
    """The configuration with these latents alone; local paths are made to hold from anywhere."""
    config: Any = copy.deepcopy(subject.config)
    config.target_hooks = [
        [_absolute(name, subject.path), site] for name, site in config.target_hooks if site in kept
    ]
    config.hashes = {site: digest for site, digest in config.hashes.items() if site in kept}
    config.latents, config.forbid, config.target_modules = kept, None, None
    config.inference_mode = True
    config.base_model_name_or_path = _absolute(subject.base, subject.path)
    return config


def _absolute(name: str, adapter: str) -> str:
    places = (Path(name), Path(adapter) / name, Path(adapter).parent / name)
    return next((str(one.resolve()) for one in places if one.exists()), name)


def _read_back(subject: Subject, folder: Path, probe: Probe, losses: NDArray) -> float:
    """Largest difference in a document's loss between the folder, read again, and the mask."""
    attach(subject, str(folder), AGAIN)
    try:
        again = probe.of(AGAIN)
    finally:
        subject.model.delete_adapter(AGAIN)
        subject.model.set_adapter(NAME)
    return float(np.max(np.abs(again - losses) / np.maximum(probe.effect.units, 1e-12)))
