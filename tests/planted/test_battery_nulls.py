"""Nulls of a battery: made once, resumed, extended, excluded; and the verdicts they give."""

import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from audit_world import D_MODEL, LATENTS, WORDS, assert_same, make_dictionary, write_corpus
from battery_world import audit, calibrate, counted_nulls, make, sentences, teach
from palimpsest.audit.battery import Battery
from palimpsest.audit.nulls.store import Nulls
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ArtifactError, NumericsError
from palimpsest.models import fingerprint, load_model

VERDICT = ("calibrated", "z", "p_null", "q", "kind", "declared", "verdict")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base that has learned three kinds of text, a fine-tune of it on digits, and two dictionaries."""
    root = tmp_path_factory.mktemp("nulls")
    corpora = {
        name: write_corpus(root / f"{name}.jsonl", words, documents=40) for name, words in WORDS.items()
    }
    mixed = [word for words in WORDS.values() for word in words]
    neutral = write_corpus(root / "neutral.jsonl", mixed, documents=60, seed=7)
    lines = [line for seed, name in enumerate(WORDS) for line in sentences(name, 100, seed)]
    base = teach(tiny_llama(seed=3), root / "base", tiny_tokenizer, lines, steps=100, lr=3e-3)
    tuned = teach(base, root / "tuned", tiny_tokenizer, sentences("digits", 100, 50), steps=80, lr=1e-3)
    torch.manual_seed(11)
    Dictionary(D_MODEL, LATENTS, k=6, metadata={"site": "resid_post.1"}).save_pretrained(root / "later")
    return SimpleNamespace(
        root=root, base=base, tuned=tuned, dictionary=make_dictionary(root / "dictionary"), corpora=corpora,
        neutral=f"neutral={neutral}", later=str(root / "later"),
    )  # fmt: skip


@pytest.fixture(scope="module")
def blank(world):
    """A battery without nulls; tests calibrate copies of it."""
    return make(world, world.root / "battery", dictionary=(world.dictionary, world.later))


@pytest.fixture
def battery(blank, tmp_path):
    return shutil.copytree(blank, tmp_path / "battery")


@pytest.fixture(scope="module")
def four(blank, tmp_path_factory):
    """A copy with the nulls of its own set-aside text."""
    battery = shutil.copytree(blank, tmp_path_factory.mktemp("four") / "battery")
    calibrate(battery)
    return battery


@pytest.fixture(scope="module")
def judged(world, blank, tmp_path_factory):
    """A copy with a dozen nulls long enough to be compared with."""
    battery = shutil.copytree(blank, tmp_path_factory.mktemp("judged") / "battery")
    calibrate(
        battery, nulls=12, steps=(10, 20), batch_size=4, block_length=32, full_lr=(0.005, 0.01, 0.02),
        lora_lr=(2e-3, 4e-3),
    )  # fmt: skip
    return battery


@pytest.fixture(scope="module")
def verdict(world, judged):
    return audit(world, judged, world.root / "undeclared")


def figures(battery):
    return load_file(battery / "calibration" / "nulls.safetensors")


def assert_same_nulls(found, expected):
    mine, other = figures(found), figures(expected)
    assert mine.keys() == other.keys()
    for key, array in mine.items():
        np.testing.assert_array_equal(array, other[key], key)
    skip = ("seconds_training", "seconds_measuring")
    for a, b in zip(Nulls(found).records, Nulls(expected).records, strict=True):
        assert {k: v for k, v in a.items() if k not in skip} == {k: v for k, v in b.items() if k not in skip}


def test_nulls_leave_figures_of_every_document(four):
    nulls, battery = Nulls(four), Battery(four)
    assert [record["family"] for record in nulls.records] == ["general", "letters", "digits", "general"]
    assert {record["method"] for record in nulls.records} == {"full", "lora"}
    assert {record["steps"] for record in nulls.records} == {2, 3}
    for record in nulls.records:
        found = nulls.figures(record)
        for index, name in enumerate(battery.names):
            documents = battery.row(name)["documents"]
            for reader in ("dictionary", "resid_post.1"):
                overlap = found[f"overlap/{reader}/{index}"]
                assert overlap.shape == (documents, 12) and 0.2 < overlap[:, 4].mean() < 1
            assert found[f"loss/{index}"].shape == (documents,) and np.abs(found[f"loss/{index}"]).max() > 0
            assert np.isnan(found[f"drift/{index}"]).all(), "this battery keeps no activations"
    assert not list(four.rglob("model*.safetensors")), "the models of nulls are never kept"


def test_calibrating_again_makes_nothing_and_interruptions_lose_nothing(battery, four, monkeypatch):
    with counted_nulls(monkeypatch, stop_at=3) as names, pytest.raises(KeyboardInterrupt):
        calibrate(battery)
    assert len(names) == 3 and len(list((battery / "null-cache").iterdir())) == 2
    assert not (battery / "calibration").exists()
    with counted_nulls(monkeypatch) as again:
        calibrate(battery)
    assert names[:2] + again == [record["name"] for record in Nulls(four).records]
    assert_same_nulls(battery, four)
    with counted_nulls(monkeypatch) as none:
        calibrate(battery)
    assert none == []
    with counted_nulls(monkeypatch) as all_again:
        calibrate(battery, overwrite=True)
    assert len(all_again) == 4
    assert_same_nulls(battery, four)


def test_more_nulls_extend_fewer(four, tmp_path, monkeypatch):
    battery = shutil.copytree(four, tmp_path / "battery")
    with counted_nulls(monkeypatch) as names:
        calibrate(battery, nulls=6)
    assert len(names) == 2
    before, after = figures(four), figures(battery)
    assert len(Nulls(battery).records) == 6 and before.keys() < after.keys()
    for key, array in before.items():
        np.testing.assert_array_equal(after[key], array)
    with counted_nulls(monkeypatch) as names:
        calibrate(battery)
    assert names == [] and len(Nulls(battery).records) == 4


@pytest.mark.parametrize("change", [{"seed": 1}, {"batch_size": 6}, {"block_length": 24}, {"k_max": 8}])
def test_other_options_make_other_nulls(four, tmp_path, monkeypatch, change):
    battery = shutil.copytree(four, tmp_path / "battery")
    with counted_nulls(monkeypatch) as names:
        calibrate(battery, nulls=1, **change)
    assert len(names) == 1


def test_measuring_with_kl_gives_the_same_figures_and_kl(battery, four):
    calibrate(battery, nulls=1, kl=True)
    found, expected = figures(battery), figures(four)
    assert (found["0000/kl/0"] > 0).all() and not expected["0000/kl/0"].any()
    for key in ("overlap/dictionary/1", "loss/1"):
        np.testing.assert_allclose(found[f"0000/{key}"], expected[f"0000/{key}"], atol=1e-5)
    assert (found["0000/drift/0"] > 0).all()


def test_a_null_that_diverged_is_left_out_and_named(world, battery):
    options = {"methods": ("full",), "full_lr": (0.0025, 300.0), "steps": (3,)}
    done = calibrate(battery, nulls=4, **options)
    nulls = Nulls(battery)
    wild = [record["name"] for record in nulls.records if record["lr"] == 300.0]
    assert 1 <= len(wild) <= 3 and [record["name"] for record in nulls.excluded] == wild
    for record in nulls.excluded:
        assert record["reason"] and record["name"] in done.manifest["summary"]
        assert not nulls.figures({"index": int(record["name"][5:8])})
    assert f"{len(wild)} diverged" in done.manifest["summary"]
    found = audit(world, battery, battery.parent / "run")["calibration"]
    assert found["nulls"] == 4 - len(wild) and found["excluded"] == nulls.excluded
    with pytest.raises(NumericsError, match="Every null diverged"):
        calibrate(battery, nulls=2, methods=("full",), full_lr=(300.0,), steps=(3,))


@pytest.mark.slow
def test_two_workers_make_the_same_nulls(battery, four):
    calibrate(battery, workers=2)
    assert_same_nulls(battery, four)


def test_neutral_text_judges_every_corpus(world, battery):
    done = calibrate(battery, nulls=7, null_corpus=(world.neutral,), steps=(4, 5), block_length=32)
    assert {record["family"] for record in Nulls(battery).records} == {"neutral"}
    assert "too few" not in done.manifest["summary"]
    found = audit(world, battery, battery.parent / "run")["calibration"]
    assert found["families"] == {"neutral": 7}
    for domain in found["domains"]:
        assert domain["refused"] is None and domain["features"]["nulls"] == domain["loss"]["nulls"] == 7


def test_a_null_never_judges_the_corpus_it_was_trained_on(world, battery):
    """A null corpus that has the name of a corpus counts as that corpus' kind of text."""
    digits = f"digits={world.corpora['digits']}"
    done = calibrate(battery, nulls=8, null_corpus=(digits, world.neutral), steps=(4, 5), block_length=32)
    assert "too few for a verdict at level 0.05 on digits" in done.manifest["summary"]
    domains = {d["name"]: d for d in audit(world, battery, battery.parent / "run")["calibration"]["domains"]}
    assert domains["general"]["features"]["nulls"] == domains["letters"]["features"]["nulls"] == 8
    assert (
        domains["digits"]["verdict"] == "refused" and "4 nulls judge it and 7" in domains["digits"]["refused"]
    )


def test_nulls_of_an_earlier_battery_are_refused(world, battery, four):
    other = make(world, battery.parent / "other", tokens=600)
    shutil.copytree(four / "calibration", other / "calibration")
    shutil.copytree(four / "null-cache", other / "null-cache")
    with pytest.raises(ArtifactError, match="earlier battery"):
        audit(world, other, battery.parent / "run")
    calibrate(other, nulls=1)
    assert len(Nulls(other).records) == 1


def test_a_moved_battery_keeps_its_nulls(four, tmp_path, monkeypatch):
    moved = shutil.move(shutil.copytree(four, tmp_path / "here"), tmp_path / "there")
    assert len(Nulls(moved).records) == 4
    with counted_nulls(monkeypatch) as names:
        calibrate(moved)
    assert names == []


def test_calibrating_leaves_the_battery_as_it_was(blank, four):
    assert (four / "manifest.json").read_bytes() == (blank / "manifest.json").read_bytes()
    assert fingerprint(load_model(Battery(four).base["path"])) == Battery(blank).base["fingerprint"]


def test_verdicts_are_complete_and_name_the_hidden_domain(verdict):
    calibration = verdict["calibration"]
    domains = {domain["name"]: domain for domain in calibration["domains"]}
    assert list(domains) == ["general", "letters", "digits"]
    assert domains["digits"]["kind"] == "specialised" and domains["digits"]["verdict"] == "undeclared"
    assert domains["digits"]["q"] < 0.01 and domains["digits"]["loss"]["z"] < -4
    assert [task["name"] for task in verdict["tasks"]] == ["letters", "digits"]
    for task in verdict["tasks"]:
        domain = domains[task["name"]]
        assert all(task[key] is not None for key in VERDICT)
        assert task["calibrated"] == domain["features"]["residual"] and task["z"] == domain["features"]["z"]
        assert task["p_null"] == domain["features"]["p"]
        for key in ("q", "kind", "declared", "verdict"):
            assert task[key] == domain[key]
        assert task["declared"] is False
    assert verdict["summary"].startswith(calibration["sentence"]) and "digits" in calibration["sentence"]
    general = {row["name"]: row for row in verdict["datasets"]}["general"]
    assert math.exp(calibration["drift"]["suspect"]) == pytest.approx(
        1 - general["intersection_mean"]["5"], abs=1e-6
    )
    for domain in calibration["domains"]:
        corpus = next(row for row in verdict["datasets"] if row["name"] == domain["name"])
        assert domain["loss"]["statistic"] == pytest.approx(corpus["delta_loss"], abs=1e-5)


def test_declaring_changes_verdicts_and_nothing_else(world, judged, verdict, tmp_path):
    found = audit(world, judged, tmp_path / "run", declared=("digits", "letters"))
    rows = {task["name"]: task for task in found["tasks"]}
    assert rows["digits"]["verdict"] == "declared-and-seen" and rows["digits"]["declared"] is True
    assert rows["letters"]["verdict"].startswith("declared-but") or rows["letters"]["kind"] == "shifted"
    for task, other in zip(found["tasks"], verdict["tasks"], strict=True):
        for key in ("calibrated", "z", "p_null", "q", "kind"):
            assert task[key] == other[key]


def test_the_grid_holds_every_site(verdict):
    grid = verdict["calibration"]["grid"]
    points = {(row["site"], row["k"]) for row in grid}
    ks = (1, 2, 5, 10)
    assert points == {(site, k) for site in ("resid_post.0", "resid_post.1") for k in ks}
    assert len(grid) == 3 * len(points)
    primary = {row["name"]: row["z"] for row in grid if (row["site"], row["k"]) == ("resid_post.0", 5)}
    for task in verdict["tasks"]:
        assert primary[task["name"]] == pytest.approx(task["z"])
    assert all(0 < domain["p_max"] <= 1 for domain in verdict["calibration"]["domains"])


def test_without_losses_features_alone_are_judged(world, judged, verdict, tmp_path):
    found = audit(world, judged, tmp_path / "run", loss=False)
    for domain, other in zip(found["calibration"]["domains"], verdict["calibration"]["domains"], strict=True):
        assert domain["loss"] is None and domain["kind"] in ("shifted", "unchanged")
        assert domain["features"]["z"] == pytest.approx(other["features"]["z"], abs=1e-6)


def test_an_interrupted_audit_gives_the_same_verdict(world, judged, verdict, tmp_path):
    again = audit(world, judged, tmp_path / "again")
    assert_same(again["calibration"], verdict["calibration"], 1e-12)
    assert json.dumps(again["tasks"]) == json.dumps(verdict["tasks"])


def test_spectrum_nulls_stand_at_the_suspects_drift(world, judged, verdict, tmp_path):
    found = audit(world, judged, tmp_path / "beside", null="spectrum", spectrum_nulls=3)["calibration"]
    spectrum = found["spectrum"]
    assert found["source"] == "trained" and spectrum["nulls"] == 3
    target = 1 - math.exp(spectrum["drift"]["suspect"])
    reached = [1 - math.exp(value) for value in spectrum["drift"]["nulls"]]
    assert reached == pytest.approx([target, target], abs=0.004)
    assert_same({**found, "spectrum": None}, verdict["calibration"], 1e-12)


def test_spectrum_nulls_alone_judge_features(world, blank, tmp_path):
    """They need no calibrated battery, and no null of them says anything about a loss."""
    found = audit(world, blank, tmp_path / "run", null="spectrum", spectrum_nulls=7, declared=("digits",))
    calibration = found["calibration"]
    assert calibration["source"] == "spectrum" and calibration["families"] == {"spectrum": 7}
    for domain in calibration["domains"]:
        assert domain["loss"] is None and domain["features"]["nulls"] == 7
    assert all(task["verdict"] is not None for task in found["tasks"])


def test_an_unchanged_calibration_keeps_its_identity(four, tmp_path):
    battery = shutil.copytree(four, tmp_path / "battery")
    before = (battery / "calibration" / "manifest.json").read_bytes()
    calibrate(battery)
    assert (battery / "calibration" / "manifest.json").read_bytes() == before


def test_a_battery_made_anew_drops_its_nulls(world, four, tmp_path):
    battery = shutil.copytree(four, tmp_path / "battery")
    again = make(world, battery, dictionary=(world.dictionary, world.later), overwrite=True)
    assert not (again / "calibration").exists() and not (again / "null-cache").exists()


def test_the_base_itself_is_unchanged_everywhere(world, judged, tmp_path):
    found = audit(world, judged, tmp_path / "run", tuned=world.base)
    kinds = {domain["name"]: domain["kind"] for domain in found["calibration"]["domains"]}
    assert set(kinds.values()) == {"unchanged"}


def test_an_edited_file_of_nulls_is_refused(four, tmp_path):
    battery = shutil.copytree(four, tmp_path / "battery")
    path = battery / "calibration" / "nulls.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match="changed after it was written"):
        Nulls(battery)
