"""A folder with a pair, corpora and a dictionary, and the two ways to call the command line in it."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from helpers import REPOSITORY

WORDS = (
    "river",
    "mill",
    "counts",
    "sacks",
    "of",
    "flour",
    "and",
    "returns",
    "sum",
    "seven",
    "apples",
    "left",
)
ENVIRONMENT = {
    "PYTHONPATH": str(REPOSITORY / "src"),
    "PALIMPSEST_QUIET": "0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "COLUMNS": "120",
}


class Result(NamedTuple):
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


def write_corpus(path: Path, documents: int, *, seed: int, words: int = 20) -> Path:
    """Write a JSONL corpus of random sentences."""
    rng = random.Random(seed)
    rows = [{"text": " ".join(rng.choices(WORDS, k=words))} for _ in range(documents)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def edit_weights(folder: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a model folder's weights."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, tiny_llama) -> Path:
    """Make `base`, `tuned` (base with noise), `sae`, and the corpora `general`, `math` and `code`."""
    import torch

    from palimpsest.dictionaries import Dictionary

    root = tmp_path_factory.mktemp("cli")
    for name in ("base", "tuned"):
        shutil.copytree(tiny_llama(), root / name)

    def perturb(weights: dict) -> None:
        generator = torch.Generator().manual_seed(3)
        for key in sorted(weights):
            weights[key] += 0.02 * torch.randn(weights[key].shape, generator=generator)

    edit_weights(root / "tuned", perturb)
    torch.manual_seed(1)
    Dictionary(32, 64, k=8, metadata={"site": "resid_post.0"}).save_pretrained(root / "sae")
    for seed, name in enumerate(("general", "math", "code")):
        write_corpus(root / f"{name}.jsonl", 14, seed=seed)
    return root


@pytest.fixture
def call(workplace, monkeypatch, capsys) -> Iterator[Callable[..., Result]]:
    """Yield a function that runs a command line in this process, in the folder of the pair."""
    from palimpsest import log
    from palimpsest.cli import main

    monkeypatch.chdir(workplace)
    monkeypatch.setenv("COLUMNS", "120")
    handlers, level = log.log.handlers[:], log.log.level

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    yield run
    log.log.handlers[:] = handlers
    log.log.setLevel(level)
    log.quiet(False)


@pytest.fixture(scope="session")
def start(workplace) -> Callable[..., subprocess.Popen]:
    """Return a function that starts a command line as a process of its own, in the folder of the pair."""

    def run(*arguments: object) -> subprocess.Popen:
        command = [sys.executable, "-m", "palimpsest", *map(str, arguments)]
        pipe = subprocess.PIPE
        environment = os.environ | ENVIRONMENT
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, cwd=workplace, env=environment)

    return run


@pytest.fixture(scope="session")
def command(start) -> Callable[..., Result]:
    """Return a function that runs a command line as a process of its own to its end."""

    def run(*arguments: object) -> Result:
        process = start(*arguments)
        out, err = process.communicate(timeout=120)
        return Result(process.returncode, out, err)

    return run


@pytest.fixture
def audit_args() -> list[str]:
    """Return an audit of the pair that lacks only its corpora and its --out."""
    return ["audit", "base", "tuned", "--dictionary", "sae", "--resamples", "100", "--k-max", "8"]
