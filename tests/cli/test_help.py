"""What the command line says before it does anything, and what saying it costs."""

import dataclasses
import typing

import pytest
from cyclopts import Parameter

from helpers import python_source
from palimpsest.audit.config import AuditConfig
from palimpsest.cli import VERBS, main
from palimpsest.evaluate.config import EvaluateConfig
from palimpsest.harvest.config import HarvestConfig
from palimpsest.interpret.examples.config import ExamplesConfig
from palimpsest.interpret.labels.config import LabelConfig
from palimpsest.interpret.steering.config import SteerConfig
from palimpsest.train.config import TrainPairConfig, TrainSaeConfig
from palimpsest.tune.explain_config import ExplainCompareConfig, ExplainConfig

HEAVY = ("torch", "transformers", "cyclopts", "rich", "numpy", "pyarrow", "scipy", "jinja2")
CONFIGS = {
    ("audit",): AuditConfig,
    ("evaluate",): EvaluateConfig,
    ("examples",): ExamplesConfig,
    ("explain",): ExplainConfig,
    ("explain", "compare"): ExplainCompareConfig,
    ("harvest",): HarvestConfig,
    ("label",): LabelConfig,
    ("steer",): SteerConfig,
    ("train", "sae"): TrainSaeConfig,
    ("train", "diff-sae"): TrainPairConfig,
    ("train", "crosscoder"): TrainPairConfig,
}


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")


def _flags(config: type) -> list[str]:
    """Every flag of a config dataclass, read from the dataclass itself."""
    found = []
    hints = typing.get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        bare, *extras = typing.get_args(hints[field.name]) or (hints[field.name],)
        parameters = [extra for extra in extras if isinstance(extra, Parameter)]
        if any(parameter.parse is False for parameter in parameters):
            continue
        if dataclasses.is_dataclass(bare):
            found += _flags(bare)
            continue
        names = [name for parameter in parameters for name in parameter.name or ()]
        found += names or ["--" + field.name.replace("_", "-")]
    return found


def test_help_lists_every_verb(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr()
    for verb, line in VERBS.items():
        assert f"  {verb}" in shown.out and line in shown.out
    assert "--config" in shown.out and "130" in shown.out and shown.err == ""


def test_version_is_the_installed_one(capsys):
    from importlib.metadata import version

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"palimpsest {version('palimpsest-lm')}\n"


def test_no_argument_is_a_usage_error(capsys):
    assert main([]) == 2
    assert "Usage: palimpsest VERB" in capsys.readouterr().out


def test_unknown_verb_suggests(capsys):
    assert main(["audti"]) == 2
    shown = capsys.readouterr()
    assert "'audti'" in shown.err and "Did you mean 'audit'?" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    "verb",
    [
        *VERBS,
        "train sae",
        "train diff-sae",
        "train crosscoder",
        *(f"battery {verb}" for verb in ("make", "calibrate", "show", "list")),
    ],
)
def test_every_verb_has_help(verb, capsys):
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr()
    assert f"Usage: palimpsest {verb}" in shown.out and shown.err == ""
    if verb not in ("train", "battery"):
        assert all(flag in shown.out for flag in ("--json", "--quiet", "--verbose", "--config"))


@pytest.mark.parametrize("verb", CONFIGS, ids=" ".join)
def test_help_names_every_config_field_with_its_meaning(verb, capsys):
    flags = _flags(CONFIGS[verb])
    assert {"--out", "--seed"} <= set(flags) and (
        {"--max-length", "--dtype"} <= set(flags) or verb == ("label",)
    )
    main([*verb, "--help"])
    shown = capsys.readouterr().out
    rows = [line.strip("│* ").rstrip() for line in shown.splitlines() if line.startswith("│")]
    for flag in flags:
        row = next((row for row in rows if flag in row.split()), None)
        assert row is not None, f"{flag} is not in the help"
        assert len(row.partition(flag)[2].split()) > 2, f"{flag} has no meaning: {row}"


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["audit", "base", "tuned", "--dictionery", "sae", "--out", "x"], "--dictionary"),
        (["harvest", "base", "--corpuss", "x"], "--corpus"),
        (["train", "sae", "--site", "s", "--out", "x", "--store", "y", "--latent", "64"], "--latents"),
        (["train", "sea"], "sae"),
        (["report", "run", "--jsn"], "--json"),
    ],
)
def test_unknown_flag_suggests(arguments, near, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert f"Did you mean {near}" in shown.err.replace('"', "")
    assert "--help" in shown.err and shown.out == ""


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["audit"], "--base"),
        (["audit", "base"], "--tuned"),
        (["audit", "base", "tuned"], "--out"),
        (["harvest", "base"], "--corpus"),
        (["evaluate"], "--dictionary"),
        (["evaluate", "sae", "--model", "base"], "--corpus"),
        (["train", "sae"], "--site"),
        (["train"], "palimpsest train sae"),
        (["report"], "--run"),
        (["info"], "--path"),
    ],
)
def test_missing_argument_is_named(arguments, missing, capsys):
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert missing in shown.err and shown.err.count("\n") == 1 and shown.out == ""


def test_top_level_help_imports_nothing_heavy():
    code = f"""
import sys
from palimpsest.cli import main
assert main(["--help"]) == 0 and main(["--version"]) == 0 and main(["nonsense"]) == 2 and main([]) == 2
print("LOADED", sorted(name for name in {HEAVY} if name in sys.modules))
"""
    done = python_source(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_help_of_a_verb_imports_no_torch():
    code = f"""
import sys
from palimpsest.cli import main
for verb in {[*VERBS, "train sae", "battery make", "battery calibrate", "battery show", "battery list"]}:
    assert main([*verb.split(), "--help"]) == 0
print("LOADED", sorted(name for name in ("torch", "transformers", "datasets", "scipy") if name in sys.modules))
"""
    done = python_source(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


def test_the_installed_command_and_the_module_are_the_same(command):
    shown = command("--version")
    assert shown.code == 0 and shown.out.startswith("palimpsest ") and shown.err == ""
    assert command("audti").code == 2
