"""What a battery refuses, and what it says then."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from audit_world import WORDS, edited, make_dictionary, make_world, write_corpus
from battery_world import MODELS, audit, calibrate, make, reseal
from palimpsest.audit.battery import Battery, BatteryConfig
from palimpsest.audit.calibration import nulls_needed
from palimpsest.audit.nulls.config import CalibrateConfig
from palimpsest.errors import ArtifactError, ConfigError, CorpusError, DictionaryError, PairError
from palimpsest.options import CorpusOptions, RunOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return make_world(tmp_path_factory.mktemp("errors"), tiny_llama(seed=3), tiny_tokenizer)


@pytest.fixture(scope="module")
def battery(world):
    return make(world, world.root / "battery")


@pytest.fixture(scope="module")
def few(world, battery, tmp_path_factory):
    """A copy with too few nulls for a verdict."""
    copy = shutil.copytree(battery, tmp_path_factory.mktemp("few") / "battery")
    calibrate(copy, nulls=3)
    return copy


def refused(error, match, world, battery, out, **changes):
    with pytest.raises(error, match=match) as caught:
        audit(world, battery, out, **changes)
    assert not out.exists(), "something was written before the refusal"
    return caught.value


def test_another_base(world, battery, tiny_llama, tmp_path):
    other = str(tiny_llama(seed=4))
    error = refused(PairError, "another base", world, battery, tmp_path / "run", base=other, tuned=other)
    assert world.base in str(error) and other in str(error) and "weights" in str(error)


def test_another_base_under_the_same_path(world, battery, tmp_path, monkeypatch):
    """Calibration loads the base by its path, where other weights may lie by now."""
    copy = shutil.copytree(battery, tmp_path / "battery")
    base = edited(world.base, tmp_path / "base", lambda model: model.lm_head.weight.mul_(1.01))
    description = json.loads((copy / "battery.json").read_text())
    description["base"]["path"] = base
    (copy / "battery.json").write_text(json.dumps(description))
    reseal(copy)
    with pytest.raises(PairError, match="another base"):
        calibrate(copy)
    assert not (copy / "null-cache").exists()


@pytest.mark.parametrize("change", ["token", "template"])
def test_another_tokenizer(world, battery, tmp_path, change):
    base = shutil.copytree(world.base, tmp_path / "base")
    tuned = shutil.copytree(world.tuned, tmp_path / "tuned")
    for folder in (base, tuned):
        if change == "template":
            place = next(
                path
                for path in (folder / "chat_template.jinja", folder / "tokenizer_config.json")
                if path.exists()
            )
            place.write_text(place.read_text().replace("message['content']", "message['content'] | trim"))
        else:
            path = folder / "tokenizer.json"
            data = json.loads(path.read_text())
            vocabulary = data["model"]["vocab"]
            a, b = list(vocabulary)[-2:]
            vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
            path.write_text(json.dumps(data))
    error = refused(
        PairError, "another tokenizer", world, battery, tmp_path / "run", base=str(base), tuned=str(tuned)
    )
    assert "make the battery again" in str(error)


def test_a_dictionary_that_was_trained_anew(world, tmp_path):
    folder = shutil.copytree(world.dictionary, tmp_path / "dictionary")
    made = make(world, tmp_path / "battery", dictionary=(str(folder),))
    shutil.rmtree(folder)
    make_dictionary(folder, "relu")
    error = refused(DictionaryError, "is not the dictionary", world, made, tmp_path / "run")
    assert str(folder) in str(error) and "sha256" in str(error) and "--dictionary" in str(error)
    with pytest.raises(DictionaryError, match="is not the dictionary"):
        calibrate(made)


def test_a_dictionary_that_was_edited(world, tmp_path):
    folder = shutil.copytree(world.dictionary, tmp_path / "dictionary")
    made = make(world, tmp_path / "battery", dictionary=(str(folder),))
    weights = next(folder.glob("*.safetensors"))
    tensors = load_file(weights)
    save_file(tensors | {"b_enc": tensors["b_enc"] + 0.01}, weights)
    refused(ArtifactError, "changed after it was written", world, made, tmp_path / "run")


def test_a_dictionary_that_is_gone_or_moved(world, tmp_path):
    folder = shutil.copytree(world.dictionary, tmp_path / "dictionary")
    made = make(world, tmp_path / "battery", dictionary=(str(folder),))
    moved = shutil.move(folder, tmp_path / "elsewhere")
    error = refused(DictionaryError, "is gone", world, made, tmp_path / "run")
    assert "--dictionary" in str(error)
    found = audit(world, made, tmp_path / "run", dictionary=str(moved))
    assert found["dictionary"]["path"] == str(moved)


def test_another_dictionary_than_the_batterys(world, battery, tmp_path):
    other = make_dictionary(tmp_path / "other", "relu")
    refused(DictionaryError, "is not the dictionary", world, battery, tmp_path / "run", dictionary=other)


@pytest.mark.parametrize("part", ["loss", "indices.dictionary"])
def test_numbers_that_changed_name_the_versions(world, battery, tmp_path, part):
    """What a library that computes otherwise would do to the cached readings."""
    copy = shutil.copytree(battery, tmp_path / "battery")
    path = copy / "base" / "000.safetensors"
    tensors = load_file(path)
    tensors[part] = tensors[part] + 0.05 if part == "loss" else (tensors[part] + 1) % 96
    save_file(tensors, path)
    reseal(copy)
    error = refused(ArtifactError, "no longer gives the numbers", world, copy, tmp_path / "run")
    assert f"torch {torch.__version__.split('+')[0]}" in str(error) and "transformers" in str(error)
    with pytest.raises(ArtifactError, match="no longer gives the numbers"):
        calibrate(copy)


def test_numbers_that_moved_within_rounding_are_accepted(world, battery, tmp_path):
    copy = shutil.copytree(battery, tmp_path / "battery")
    path = copy / "base" / "000.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"loss": tensors["loss"] + 2e-4}, path)
    refused(ArtifactError, "changed after it was written", world, copy, tmp_path / "run")
    reseal(copy)
    assert audit(world, copy, tmp_path / "run")["loss_measured"]


def test_text_that_does_not_fit_its_readings(world, battery, tmp_path):
    copy = shutil.copytree(battery, tmp_path / "battery")
    shutil.copy(copy / "text" / "001.safetensors", copy / "text" / "002.safetensors")
    reseal(copy)
    with pytest.raises(ArtifactError, match="do not fit the text"):
        audit(world, copy, tmp_path / "run")


def test_a_declared_name_that_is_not_there(world, battery, tmp_path):
    options = {"declared": ("digits", "history"), "null": "spectrum"}
    error = refused(ConfigError, "not in the battery", world, battery, tmp_path / "run", **options)
    assert "history" in str(error) and "general, letters, digits" in str(error)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"general": "general.jsonl"}, "--general"),
        ({"task": ("a=b.jsonl",)}, "--task"),
        ({"site": "resid_post.1"}, "--site"),
        ({"legacy": True}, "--legacy"),
        ({"controls": True}, "--controls"),
        ({"corpora": CorpusOptions(max_length=64)}, "options of text"),
    ],
)
def test_what_a_battery_fixes_cannot_be_given(world, battery, tmp_path, changes, flag):
    error = refused(ConfigError, "A battery fixes", world, battery, tmp_path / "run", **changes)
    assert flag in str(error)


def test_too_few_documents(world, tmp_path):
    short = write_corpus(tmp_path / "short.jsonl", WORDS["letters"], documents=12)
    with pytest.raises(CorpusError, match="corpus short has too few documents") as caught:
        make(world, tmp_path / "battery", task=(f"short={short}",))
    assert "9 audited" in str(caught.value) and "3 set aside" in str(caught.value)
    assert make(world, tmp_path / "whole", task=(f"short={short}",), set_aside=0.0)
    with pytest.raises(CorpusError, match="--tokens"):
        make(world, tmp_path / "capped", tokens=60)
    same = world.corpora["general"]
    with pytest.raises(CorpusError, match="copies of others left out") as caught:
        make(world, tmp_path / "copied", task=(f"twin={same}",))
    assert "corpus twin" in str(caught.value) and " 0 copies" not in str(caught.value)


def test_no_text_to_train_nulls_on(world, tmp_path):
    made = make(world, tmp_path / "battery", set_aside=0.0)
    with pytest.raises(CorpusError, match="no text to train nulls on") as caught:
        calibrate(made)
    assert "--null-corpus" in str(caught.value)
    short = write_corpus(tmp_path / "short.jsonl", WORDS["letters"], documents=1)
    with pytest.raises(CorpusError, match="Too little text to train nulls on short"):
        calibrate(made, null_corpus=(f"short={short}",), block_length=64)
    with pytest.raises(CorpusError, match="Too little text to train nulls on neutral"):
        calibrate(made, null_corpus=(f"neutral={world.corpora['general']}",), nulls=1)
    fresh = write_corpus(tmp_path / "fresh.jsonl", WORDS["digits"], documents=40, seed=99)
    calibrate(made, null_corpus=(f"neutral={fresh}",), nulls=1)


def test_a_gate_with_too_few_nulls(world, few, tmp_path):
    options = {"fail_on": ("undeclared",), "declared": ("digits",)}
    error = refused(
        ConfigError, "Too few nulls for a gate at level 0.05", world, few, tmp_path / "run", **options
    )
    assert f"at least {nulls_needed(0.05)} nulls" in str(error)
    assert "2 for general, 2 for letters, 2 for digits" in str(error)
    assert f"palimpsest battery calibrate {few} --nulls" in str(error)
    found = audit(world, few, tmp_path / "run", declared=("digits",))
    assert {task["verdict"] for task in found["tasks"]} == {"refused"}
    assert all(task["kind"] is None and task["q"] is None for task in found["tasks"])


def test_a_gate_without_nulls(world, battery, tmp_path):
    for options in ({"fail_on": ("undeclared",)}, {"declared": ("digits",)}):
        error = refused(ConfigError, "has no nulls", world, battery, tmp_path / "run", **options)
        assert f"palimpsest battery calibrate {battery}" in str(error)
    few_spectrum = {"fail_on": ("undeclared",), "null": "spectrum", "spectrum_nulls": 2}
    refused(ConfigError, "Too few nulls", world, battery, tmp_path / "run", **few_spectrum)


def test_a_gate_on_damage_needs_losses_and_trained_nulls(world, battery, few, tmp_path):
    silent = make(world, tmp_path / "silent", loss=False)
    calibrate(silent, nulls=1)
    cases = [(few, {"loss": False}), (silent, {}), (battery, {"null": "spectrum", "spectrum_nulls": 12})]
    for where, changes in cases:
        options = {"fail_on": ("damaged",), **changes}
        refused(ConfigError, "gate on damage needs losses", world, where, tmp_path / "run", **options)


def test_a_gate_needs_a_battery():
    from palimpsest.audit.config import CalibrationOptions

    with pytest.raises(ConfigError, match="needs a battery"):
        CalibrationOptions(fail_on=("undeclared",))
    with pytest.raises(ConfigError, match="no level"):
        CalibrationOptions(battery="battery", alpha=0.7)


def test_an_unfinished_battery(world, battery, tmp_path):
    copy = shutil.copytree(battery, tmp_path / "battery")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"status": "running", "finished": None}))
    error = refused(ArtifactError, "is not finished", world, copy, tmp_path / "run")
    assert "--resume" in str(error)
    with pytest.raises(ArtifactError, match="is not finished"):
        calibrate(copy)


def test_what_is_no_battery(world, battery, few, tmp_path):
    refused(ArtifactError, "There is no folder", world, tmp_path / "nowhere", tmp_path / "run")
    refused(ArtifactError, "written by another verb", world, few / "calibration", tmp_path / "run")
    copy = shutil.copytree(battery, tmp_path / "battery")
    description = json.loads((copy / "battery.json").read_text())
    (copy / "battery.json").write_text(json.dumps(description | {"schema": 99}))
    reseal(copy)
    refused(ArtifactError, "another schema", world, copy, tmp_path / "run")


def test_lists_longer_than_the_nulls(world, few, tmp_path):
    with pytest.raises(ConfigError, match="longer than the lists") as caught:
        audit(world, few, tmp_path / "run", k=14, k_max=20)
    assert "at most 12" in str(caught.value)


def test_a_k_of_the_battery_is_checked_before_models_are_loaded(world, battery, tmp_path):
    refused(
        DictionaryError,
        "larger than the number of latents",
        world,
        battery,
        tmp_path / "run",
        k=97,
        k_max=120,
    )


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"general": None, "task": ()}, "from files or from a preset"),
        ({"preset": "original"}, "from files or from a preset"),
        ({"task": ()}, "at least one task"),
        ({"task": ("general=a.jsonl",)}, "different names"),
        ({"task": ("a=a.jsonl", "a=b.jsonl")}, "different names"),
        ({"set_aside": 1.0}, "no share"),
        ({"set_aside": -0.1}, "no share"),
        ({"dictionary": ()}, "needs a dictionary"),
    ],
)
def test_options_of_make(tmp_path, changes, match):
    fields = {
        "base": "base",
        "dictionary": ("sae",),
        "general": "general.jsonl",
        "task": ("math=math.jsonl",),
    }
    with pytest.raises(ConfigError, match=match):
        BatteryConfig(**{**fields, "run": RunOptions(out=tmp_path), **changes})


def test_options_of_calibrate():
    with pytest.raises(ConfigError, match="different names"):
        CalibrateConfig("battery", null_corpus=("a=x.jsonl", "a=y.jsonl"))
    with pytest.raises(ConfigError, match="negative"):
        CalibrateConfig("battery", seed=-1)
    with pytest.raises(ConfigError, match="need a method"):
        CalibrateConfig("battery", methods=())


def test_two_dictionaries_of_one_site(world, tmp_path):
    other = make_dictionary(tmp_path / "other", "relu")
    with pytest.raises(DictionaryError, match="Two dictionaries read"):
        make(world, tmp_path / "battery", dictionary=(world.dictionary, other))
    assert not (tmp_path / "battery").exists()


def test_missing_text_is_said_before_models_are_loaded(world, tmp_path):
    with pytest.raises(CorpusError, match=r"missing\.jsonl does not exist"):
        make(world, tmp_path / "battery", general=str(tmp_path / "missing.jsonl"), base="nowhere")


def test_a_battery_says_what_it_is(battery):
    assert repr(Battery(battery)) == f"Battery({battery}, general, letters, digits)"
    assert MODELS.device == "cpu"
