"""What must start fast starts without torch: the package itself, the report and the command line."""

import json

import pytest

from helpers import python_source

CODE = """
import importlib, json, sys
importlib.import_module(sys.argv[1])
print(json.dumps([name for name in ("torch", "transformers", "peft", "datasets") if name in sys.modules]))
"""


@pytest.mark.parametrize(
    "module",
    [
        "palimpsest",
        "palimpsest.errors",
        "palimpsest.log",
        "palimpsest.stats",
        "palimpsest.options",
        "palimpsest.artifacts",
        "palimpsest.findings",
        "palimpsest.display.notebook",
        "palimpsest.latents",
        "palimpsest.report",
        "palimpsest.web",
        "palimpsest.cli",
    ],
)
def test_imports_neither_torch_nor_transformers(module):
    done = python_source(CODE, module)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_a_heavy_import_would_be_seen():
    done = python_source(CODE, "peft")
    assert "torch" in json.loads(done.stdout)
