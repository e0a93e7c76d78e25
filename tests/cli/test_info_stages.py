"""`palimpsest info` on what every stage writes."""

import ast
import json

import pytest

from helpers import PACKAGE
from latents_fixture import make_examples
from palimpsest.artifacts import RunFolder
from palimpsest.artifacts.contents import NOTABLE
from palimpsest.cli import main

HOSTILE = "\x1b[31mred\u202e</script>"


def stages_of_the_source() -> set[str]:
    """Every stage that some module writes: its constants called …STAGE, and literals handed to a RunFolder."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            value = None
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                value = node.value if name.endswith("STAGE") or name in ("SEVERAL", "CALIBRATION") else None
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "RunFolder":
                value = next((one.value for one in node.keywords if one.arg == "stage"), None)
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                found.add(value.value)
    return found


def test_every_stage_is_explained():
    stages = stages_of_the_source()
    assert {
        "audit",
        "battery",
        "calibration",
        "examples",
        "labels",
        "steer",
        "report",
        "tune-sweep",
    } <= stages
    # A dictionary is told by its own header.
    assert stages - {"dictionary"} == set(NOTABLE)


def _written(folder, stage):
    """A folder of a stage whose main file holds everything that is told of it."""
    name, paths = NOTABLE[stage]
    content = {}
    for path in paths:
        first, _, rest = path.partition(".")
        content[first] = {rest: [f"{first} {HOSTILE}"]} if rest else f"{first} {HOSTILE}"
    content["not_told"] = "secret"
    with RunFolder(folder, stage=stage, config={}, inputs={}) as run:
        run.write_json(name, content)
        run.finish(summary=f"Found it. {HOSTILE}")
    return content


@pytest.mark.parametrize("stage", sorted(NOTABLE))
def test_what_a_stage_found_is_told(stage, tmp_path, capsys):
    content = _written(tmp_path / "run", stage)
    assert main(["info", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr()
    assert shown.err == "" and f"{stage} (complete" in shown.out and NOTABLE[stage][0] in shown.out
    assert "summary: " in shown.out and "secret" not in shown.out
    for key in content:
        assert key == "not_told" or f"  {key}: {key} " in shown.out
    assert "\x1b" not in shown.out and "\u202e" not in shown.out
    assert main(["info", str(tmp_path / "run"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert set(told["content"]) == {"summary", *content} - {"not_told"}


def test_examples_are_told(tmp_path, capsys):
    make_examples(tmp_path / "examples", hostile=True)
    assert main(["info", str(tmp_path / "examples")]) == 0
    shown = capsys.readouterr().out
    assert "180 of 200 latents fire" in shown and "site: resid_post.1" in shown and "alive: 180" in shown


def test_a_stage_of_a_later_version_is_listed(tmp_path, capsys):
    with RunFolder(tmp_path / "run", stage="sonar", config={}, inputs={}) as run:
        run.write_json("sonar.json", {"summary": "ping"})
        run.finish()
    assert main(["info", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    assert "sonar (complete" in shown and "file sonar.json" in shown and "ping" not in shown
