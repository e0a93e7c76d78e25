"""Every public name is what it says, also after its module was imported in another way."""

import subprocess
import sys

import pytest

import palimpsest

NAMES = sorted(palimpsest.__all__)


def test_no_public_name_is_shadowed_by_a_submodule():
    submodules = {path.stem for path in __import__("pathlib").Path(palimpsest.__file__).parent.iterdir()}
    assert not {*NAMES} & submodules


@pytest.mark.parametrize(
    "first", ["", "import palimpsest.audit.overlap, palimpsest.harvest.stream, palimpsest.train.run"]
)
def test_public_names_resolve_to_functions_and_classes(first):
    script = f"{first}\nimport types, palimpsest\n" + "\n".join(
        f"from palimpsest import {name}; assert not isinstance({name}, types.ModuleType), '{name}'"
        for name in NAMES
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
