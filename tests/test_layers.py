"""Who may import whom: a module imports only lower ranks, and the low ranks never see torch."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from helpers import PACKAGE

RANKS = {
    0: ("display", "errors", "hub", "lazy", "log", "neuronpedia", "sitenames", "stats"),
    1: ("artifacts", "findings", "options", "trackers"),
    2: ("models", "corpus", "store", "buffer", "dictionaries", "labelcache", "latents"),
    3: ("edits", "harvest", "evaluate"),
    4: ("audit", "diff", "train", "tune", "verify", "interpret"),
    5: ("report",),
    6: ("demo", "web"),
    7: ("cli",),
    # The package itself and `python -m palimpsest` may see everything; nothing may import them.
    8: ("__init__", "__main__"),
}
RANK = {name: rank for rank, names in RANKS.items() for name in names}
LIGHT = {*RANKS[0], *RANKS[1], "latents", "report"}
# peft must know our own adapters before it reads one, and models/ ranks below them: one table of names, see design.md.
NAMED = {("models/adapters.py", "palimpsest.tune.adapter")}
HEAVY = {"torch", "transformers", "peft", "interp_engine", "datasets", "accelerate", "safetensors.torch"}


def part_of(path: Path) -> str:
    """Return the top-level module or package that a file belongs to."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(tree: ast.AST, path: Path) -> list[tuple[int, str]]:
    """List every import of a file, wherever it stands, as (line, absolute dotted name)."""
    package = ("palimpsest", *path.relative_to(PACKAGE).parent.parts)
    found: list[tuple[int, str]] = []
    file = path.relative_to(PACKAGE).as_posix()
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and re.fullmatch(r"palimpsest(\.\w+)+", str(node.value)):
            # A module's name as text is there to be imported.
            found += [(node.lineno, node.value)] if (file, node.value) not in NAMED else []
        elif isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*start, *([node.module] if node.module else [])])
            if module == "palimpsest":
                found += [(node.lineno, f"palimpsest.{alias.name}") for alias in node.names]
            else:
                found.append((node.lineno, module))
    return found


def faults(source: str, path: Path) -> list[str]:
    """List the imports of one file that its rank forbids."""
    here = part_of(path)
    if here not in RANK:
        return [f"{here} has no rank: give it one in {Path(__file__).name}"]
    wrong = []
    for line, name in imported(ast.parse(source), path):
        where = f"{path.relative_to(PACKAGE)}:{line}: {name}"
        root, *rest = name.split(".")
        if root != "palimpsest":
            if here in LIGHT and any(name == heavy or name.startswith(f"{heavy}.") for heavy in HEAVY):
                wrong.append(f"{where}: {here} does without it")
            continue
        there = rest[0] if rest else "__init__"
        # A name of the package itself (`__version__`, a lazy export) is an import of the package.
        rank = RANK.get(there, RANK["__init__"])
        if there != here and rank >= RANK[here]:
            wrong.append(f"{where}: rank {rank} from rank {RANK[here]}")
        elif here == "report" and there != here and there not in LIGHT:
            wrong.append(f"{where}: the report reads artifacts and findings only")
    return wrong


FILES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_only_lower_ranks(path):
    assert faults(path.read_text(), path) == []


def test_every_ranked_name_exists_once():
    parts = [*PACKAGE.glob("*.py"), *(init.parent for init in PACKAGE.glob("*/__init__.py"))]
    present = [part_of(path) for path in parts]
    assert len(present) == len(set(present))
    assert set(present) <= set(RANK)


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("store.py", "from palimpsest.harvest import run_harvest"),
        ("store.py", "def f():\n    import palimpsest.audit.overlap"),
        ("store.py", "from . import harvest"),
        ("store.py", "from palimpsest import load_pair"),
        ("store.py", "from palimpsest.corpus import Corpus"),
        ("models/load.py", "from ..dictionaries import Dictionary"),
        ("log.py", "from palimpsest import stats"),
        ("artifacts/disk.py", "import torch.nn"),
        ("findings.py", "def f():\n    from transformers import AutoModel"),
        ("report/build.py", "from palimpsest.store import ActivationStore"),
        ("report/build.py", "import torch"),
        ("models/load.py", "from importlib import import_module\nimport_module('palimpsest.tune.adapter')"),
        ("models/adapters.py", "OWN = {'OTHER': 'palimpsest.audit'}"),
        ("unranked.py", ""),
    ],
)
def test_a_forbidden_import_is_found(file, source):
    assert len(faults(source, PACKAGE / file)) == 1


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "store.py",
            "from palimpsest.artifacts import RunFolder\nfrom palimpsest import errors\nimport torch",
        ),
        ("models/load.py", "from .pair import ModelPair\nfrom palimpsest.models import sites"),
        ("report/build.py", "from palimpsest.findings import Finding"),
        ("cli/audit.py", "from palimpsest.audit import run_audit"),
        ("models/adapters.py", "OWN = {'LATENT': 'palimpsest.tune.adapter'}"),
        ("__main__.py", "from palimpsest.cli import main"),
    ],
)
def test_a_permitted_import_passes(file, source):
    assert faults(source, PACKAGE / file) == []
