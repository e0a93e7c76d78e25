"""Tiny batteries: how they are made, calibrated and audited with, and a base that has learned its text."""

from __future__ import annotations

import json
import shutil
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from audit_world import WORDS
from palimpsest.artifacts import Artifact, file_sha256
from palimpsest.audit import AuditConfig, run_audit
from palimpsest.audit.battery import BatteryConfig, make_battery
from palimpsest.audit.config import CalibrationOptions
from palimpsest.audit.nulls import work
from palimpsest.audit.nulls.calibrate import calibrate_battery
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

MODELS = ModelOptions(device="cpu", tokens_per_batch=512)


def battery_config(world, out, **changes) -> BatteryConfig:
    """The battery of a world's general corpus and its two tasks."""
    run = {key: changes.pop(key) for key in ("resume", "overwrite", "seed") if key in changes}
    fields = {
        "base": world.base,
        "dictionary": (world.dictionary,),
        "general": world.corpora["general"],
        "task": tuple(f"{name}={world.corpora[name]}" for name in ("letters", "digits")),
        "run": RunOptions(out=Path(out), **run),
        "models": MODELS,
        "corpora": CorpusOptions(),
    }
    return BatteryConfig(**{**fields, **changes})


def make(world, out, **changes) -> Path:
    """A finished battery's folder."""
    return make_battery(battery_config(world, out, **changes)).path


def calibrate(battery, **changes) -> Artifact:
    """Nulls so short that a dozen take seconds."""
    fields = {
        "nulls": 4,
        "full_lr": (0.0025, 0.01),
        "lora_lr": (2e-3,),
        "steps": (2, 3),
        "batch_size": 8,
        "block_length": 16,
        "k_max": 12,
        "workers": 1,
        "models": MODELS,
    }
    return calibrate_battery(CalibrateConfig(str(battery), **{**fields, **changes}))


def audit_config(world, battery, out, **changes) -> AuditConfig:
    """An audit with a battery; `declared`, `alpha`, `null`, `fail_on` and `spectrum_nulls` are its verdict's."""
    keys = ("declared", "alpha", "null", "spectrum_nulls", "fail_on")
    options = {key: changes.pop(key) for key in keys if key in changes}
    fields = {
        "base": world.base,
        "tuned": world.tuned,
        "run": RunOptions(out=Path(out)),
        "k_max": 12,
        "resamples": 400,
        "models": MODELS,
        "calibration": CalibrationOptions(battery=str(battery), **options),
    }
    return AuditConfig(**{**fields, **changes})


def audit(world, battery, out, **changes) -> dict:
    """`audit.json` of an audit with a battery."""
    return run_audit(audit_config(world, battery, out, **changes)).read_json("audit.json")


def reseal(folder) -> None:
    """Make a folder whose files were edited look as if it had been written that way."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        manifest["files"][name]["sha256"] = file_sha256(folder / name)
    path.write_text(json.dumps(manifest))


@contextmanager
def counted_nulls(monkeypatch, *, stop_at: int = 0):
    """Names of the nulls that are trained inside the block; the one of that number is interrupted."""
    names, trained = [], work.trained_null

    def counting(model, blocks, recipe, **options):
        names.append(recipe.name)
        if len(names) == stop_at:
            raise KeyboardInterrupt
        return trained(model, blocks, recipe, **options)

    with monkeypatch.context() as patch:
        patch.setattr(work, "trained_null", counting)
        yield names


def sentences(name: str, count: int, seed: int) -> list[str]:
    """Text of one kind."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS[name], 12)) for _ in range(count)]


def teach(source, folder, tokenizer, lines, *, steps: int, lr: float, seed: int = 0) -> str:
    """A copy of a model that was trained on lines of text; returns its folder."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(source, folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = [i for line in lines for i in [tokenizer.bos_token_id, *tokenizer(line).input_ids]]
    blocks = torch.tensor(ids[: len(ids) // 32 * 32]).view(-1, 32)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
    model.train()
    for _ in range(steps):
        chosen = blocks[torch.randint(len(blocks), (8,), generator=generator)]
        model(input_ids=chosen, labels=chosen).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval().save_pretrained(folder)
    return str(folder)
