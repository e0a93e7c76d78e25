"""A battery's audit equals a direct audit of the same documents, whatever of the base was cached."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from audit_world import D_MODEL, LATENTS, WORDS, assert_same, audited, make_world, write_corpus
from battery_world import audit_config, battery_config, make
from pair_fixture import adapt, lora
from palimpsest.audit import run_audit
from palimpsest.audit.battery import Battery, make_battery
from palimpsest.audit.battery import make as making
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ArtifactError
from palimpsest.harvest.cached import select_rows
from palimpsest.models import load_model

NEED_BASE = ("r2_delta", "r2_delta_ci", "relative_drift", "relative_drift_ci")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    world = make_world(tmp_path_factory.mktemp("battery"), tiny_llama(seed=3), tiny_tokenizer)
    adapt(world.base, world.root / "adapter", lora())
    world.tunes = {"full": world.tuned, "lora": str(world.root / "adapter")}
    return world


@pytest.fixture(scope="module")
def battery(world):
    """Everything is audited, so that a direct audit of the files reads the same documents."""
    return make(world, world.root / "codes", set_aside=0.0)


@pytest.fixture(scope="module")
def kept(world):
    return make(world, world.root / "kept", set_aside=0.0, keep_activations=True, controls=True)


@pytest.fixture(scope="module")
def direct(world):
    """Direct audits by kind of fine-tune, made once."""
    made = {}

    def of(kind):
        if kind not in made:
            options = {"kl": True, "controls": True, "tuned": world.tunes[kind]}
            made[kind] = audited(world, world.root / f"direct-{kind}", **options)
        return made[kind]

    return of


def with_battery(world, battery, out, **changes):
    folder = run_audit(audit_config(world, battery, out, **changes))
    tables = [folder.read_table(name).to_pylist() for name in ("curve.parquet", "latents.parquet")]
    return SimpleNamespace(json=folder.read_json("audit.json"), curve=tables[0], latents=tables[1])


def without(rows, *keys):
    return [{key: value for key, value in row.items() if key not in keys} for row in rows]


def by_latent(rows):
    return {(row["dataset"], row["latent"]): row for row in rows}


def assert_same_latents(found, expected, tolerance):
    mine, other = by_latent(found), by_latent(expected)
    assert mine.keys() == other.keys() and len(mine) > 100
    for key, row in mine.items():
        assert_same(row, other[key], tolerance, str(key))


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_battery_gives_the_figures_of_a_direct_audit(world, battery, direct, tmp_path, kind):
    expected = direct(kind)
    found = with_battery(world, battery, tmp_path / "run", tuned=world.tunes[kind])
    unknown = (*NEED_BASE, "blind", "kl", "kl_ci")
    assert all(
        row["relative_drift"] > 0.01 and row["r2_delta"] is not None for row in expected.json["datasets"]
    )
    for row in found.json["datasets"]:
        assert row["blind"] is False and all(row[key] is None for key in unknown if key != "blind")
    for row in found.json["tasks"]:
        assert all(row[key] is None for key in unknown if key in row)
    for key in ("datasets", "tasks"):
        assert_same(without(found.json[key], *unknown), without(expected.json[key], *unknown), 1e-6)
    for key in ("pair", "site", "dictionary", "ks", "layers", "mode", "tokens"):
        assert found.json[key] == expected.json[key], key
    assert_same(found.curve, expected.curve, 1e-6)
    assert_same_latents(found.latents, expected.latents, 1e-6)
    assert found.json["calibration"] is None
    assert any("has no nulls" in warning for warning in found.json["warnings"])


def test_batches_do_not_matter(world, battery, direct, tmp_path):
    """The base was read in other batches than the tuned model is."""
    models = battery_config(world, tmp_path).models
    found = with_battery(
        world, battery, tmp_path / "run", models=models.__class__(device="cpu", tokens_per_batch=90)
    )
    unknown = (*NEED_BASE, "blind", "kl", "kl_ci")
    for key in ("datasets", "tasks"):
        tolerance = {"datasets": 2e-5, "tasks": 2e-4}[key]
        assert_same(
            without(found.json[key], *unknown), without(direct("full").json[key], *unknown), tolerance
        )


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_kept_activations_bring_what_needs_them(world, kept, direct, tmp_path, kind):
    found = with_battery(world, kept, tmp_path / "run", tuned=world.tunes[kind]).json
    expected = direct(kind).json
    for row, other in zip(found["datasets"], expected["datasets"], strict=True):
        assert row["relative_drift"] == pytest.approx(other["relative_drift"], abs=2e-3)
        assert row["relative_drift_ci"] == pytest.approx(other["relative_drift_ci"], abs=3e-3)
        assert row["r2_delta"] == pytest.approx(other["r2_delta"], abs=0.02)
        assert row["blind"] == other["blind"]
    loose = (*NEED_BASE, "kl", "kl_ci")
    for key in ("datasets", "tasks"):
        assert_same(without(found[key], *loose), without(expected[key], *loose), 1e-6)


def test_controls_come_from_the_battery(world, kept, battery, direct, tmp_path):
    found = with_battery(world, kept, tmp_path / "run").json["controls"]
    expected = direct("full").json["controls"]
    assert [control["name"] for control in found] == ["random", "pca", "neurons"]
    for control, other in zip(found, expected, strict=True):
        assert_same(control["tasks"], other["tasks"], 1e-5)
        assert_same(without(control["datasets"], "r2_delta"), without(other["datasets"], "r2_delta"), 1e-5)
        for row, direct_row in zip(control["datasets"], other["datasets"], strict=True):
            assert row["r2_delta"] == pytest.approx(direct_row["r2_delta"], abs=0.03)
    assert with_battery(world, battery, tmp_path / "codes").json["controls"] == []


def test_controls_without_activations_say_nothing_of_transfer(world, tmp_path):
    battery = make(world, tmp_path / "battery", set_aside=0.0, controls=True)
    controls = with_battery(world, battery, tmp_path / "run").json["controls"]
    assert len(controls) == 3
    assert all(row["r2_delta"] is None for control in controls for row in control["datasets"])


def test_kl_runs_the_base_again_and_agrees_everywhere(world, battery, direct, tmp_path):
    found, expected = with_battery(world, battery, tmp_path / "run", kl=True), direct("full")
    assert_same(found.json["datasets"], expected.json["datasets"], 1e-6)
    assert_same(found.json["tasks"], expected.json["tasks"], 1e-6)
    assert found.json["kl_measured"] and found.json["datasets"][0]["kl"] > 0


def test_without_losses_the_tuned_model_stops_at_the_site(world, battery, direct, tmp_path, monkeypatch):
    from palimpsest.models import load as loading

    monkeypatch.setattr(loading, "verify_sites", lambda model: None)
    ran, readable = [], loading._readable

    def watched(name, hf_model, tokenizer):
        if name == world.tuned:
            hf_model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append("layer 1"))
            hf_model.lm_head.register_forward_pre_hook(lambda *_: ran.append("head"))
        return readable(name, hf_model, tokenizer)

    monkeypatch.setattr(loading, "_readable", watched)
    found = with_battery(world, battery, tmp_path / "run", loss=False).json
    assert ran == []
    assert found["loss_measured"] is False
    assert all(row["loss"] is row["delta_loss"] is None for row in found["datasets"])
    assert all(row["delta_loss"] is row["delta_loss_ci"] is None for row in found["tasks"])
    skip = (*NEED_BASE, "blind", "kl", "kl_ci", "loss", "delta_loss", "delta_loss_ci")
    for key in ("datasets", "tasks"):
        assert_same(without(found[key], *skip), without(direct("full").json[key], *skip), 1e-6)
    with_battery(world, battery, tmp_path / "whole")
    assert "layer 1" in ran, "the watch does not see a whole pass"


def test_a_battery_without_losses_measures_none(world, tmp_path):
    battery = make(world, tmp_path / "battery", set_aside=0.0, loss=False)
    assert "loss" not in load_file(battery / "base" / "000.safetensors")
    found = with_battery(world, battery, tmp_path / "run").json
    assert found["loss_measured"] is False and found["datasets"][0]["delta_loss"] is None


def test_the_base_is_cached_in_compact_tables(world, battery, kept):
    tensors = load_file(battery / "base" / "002.safetensors")
    row = Battery(battery).row("digits")
    assert tensors["indices.dictionary"].dtype == torch.int16
    assert len(tensors["loss"]) == len(tensors["residual.dictionary"]) == row["tokens"]
    assert not any(name.startswith("acts") for name in tensors)
    acts = load_file(kept / "base" / "002.safetensors")["acts.resid_post.0"]
    assert acts.dtype == torch.bfloat16 and acts.shape == (row["tokens"], D_MODEL)


def test_two_dictionaries_are_read_at_two_sites(world, direct, tmp_path):
    torch.manual_seed(11)
    other = Dictionary(D_MODEL, LATENTS, k=6, metadata={"site": "resid_post.1"})
    other.save_pretrained(tmp_path / "later")
    battery = make(
        world, tmp_path / "battery", set_aside=0.0, dictionary=(world.dictionary, str(tmp_path / "later"))
    )
    opened = Battery(battery)
    assert opened.sites == ["resid_post.0", "resid_post.1"]
    model = load_model(world.base)
    for name in opened.names:
        side = opened.base_side(name)
        for batch in opened.text(name).batches(64):
            kept = batch.keep.reshape(-1)
            documents = batch.document.reshape(-1)[kept]
            hidden = model.read(batch.input_ids, opened.sites).acts["resid_post.1"]
            fresh = other.encode(hidden.reshape(-1, D_MODEL)[kept]).dense()
            cached = select_rows(side.codes["resid_post.1"].codes, side.rows(documents)).dense()
            torch.testing.assert_close(cached, fresh, atol=1e-5, rtol=1e-5)
    found = with_battery(world, battery, tmp_path / "run").json
    unknown = (*NEED_BASE, "blind", "kl", "kl_ci")
    assert_same(
        without(found["datasets"], *unknown), without(direct("full").json["datasets"], *unknown), 1e-6
    )


def documents_of(documents):
    return [tuple(document.token_ids.tolist()) for document in documents]


def test_set_aside_documents_are_never_audited(world, tiny_tokenizer, tmp_path):
    battery, again = (Battery(make(world, tmp_path / name)) for name in ("one", "two"))
    for name in battery.names:
        whole = documents_of(Corpus(world.corpora[name], tiny_tokenizer, name=name).documents())
        aside = documents_of(battery.aside(name))
        audited_ones = [
            tuple(ids[mask].tolist())
            for batch in battery.text(name).batches()
            for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True)
        ]
        assert len(aside) == 7 and len(audited_ones) == 17
        assert not set(aside) & set(audited_ones) and sorted(aside + audited_ones) == sorted(whole)
        # Both parts come from the whole of the corpus, not one from its end.
        assert whole.index(aside[0]) < 6 and whole.index(aside[-1]) > 18
        assert documents_of(again.aside(name)) == aside
        row = battery.row(name)
        assert (row["documents"], row["aside_documents"]) == (17, 7)
        assert row["aside_tokens"] == sum(map(len, aside))


@pytest.mark.parametrize("share", [0.0, 0.3])
def test_token_caps_hold(world, tmp_path, share):
    long = write_corpus(tmp_path / "long.jsonl", WORDS["letters"], documents=120)
    config = {"general": long, "task": (f"digits={world.corpora['digits']}",), "set_aside": share}
    battery = Battery(make(world, tmp_path / "battery", tokens=400, aside_tokens=150, **config))
    row = battery.row("general")
    assert 350 < row["tokens"] <= 400
    measured = sum(int(batch.keep.sum()) for batch in battery.text("general").batches())
    assert measured == row["tokens"]
    aside = sum(map(len, battery.aside("general")))
    assert aside == row["aside_tokens"] <= 150
    assert (aside > 100) == (share > 0)


def interrupted(monkeypatch, config, place):
    """Make a battery and stop before the corpus at that place is read."""
    read, seen = making._read, []

    def stopping(*arguments):
        seen.append(arguments)
        if len(seen) > place:
            raise KeyboardInterrupt
        return read(*arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(making, "_read", stopping)
        make_battery(config)


@pytest.mark.parametrize("lost", [None, "000"])
def test_a_resumed_battery_is_the_uninterrupted_one(world, kept, tmp_path, monkeypatch, lost):
    options = {"set_aside": 0.0, "keep_activations": True, "controls": True}
    out = tmp_path / "battery"
    interrupted(monkeypatch, battery_config(world, out, **options), 2)
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    with pytest.raises(ArtifactError, match="--resume"):
        make_battery(battery_config(world, out, **options))
    if lost is not None:
        (out / "base" / f"{lost}.safetensors").unlink()
    before = {path.name: path.stat().st_mtime_ns for path in (out / "base").iterdir()}
    assert make(world, out, resume=True, **options) == out
    files = sorted(path.relative_to(kept) for path in kept.rglob("*") if path.is_file())
    for path in files:
        if path != Path("manifest.json") and path.parts[0] != "controls":
            assert (out / path).read_bytes() == (kept / path).read_bytes(), path
    assert sorted(path.relative_to(out) for path in out.rglob("*") if path.is_file()) == files
    for name, time in before.items():
        assert (out / "base" / name).stat().st_mtime_ns == time, f"{name} was read again"


def test_resuming_with_other_text_is_refused(world, tmp_path, monkeypatch):
    out = tmp_path / "battery"
    interrupted(monkeypatch, battery_config(world, out), 1)
    with pytest.raises(ArtifactError, match=r"config\.set_aside"):
        make(world, out, resume=True, set_aside=0.1)
    finished = make(world, out, resume=True)
    before = (finished / "battery.json").read_bytes()
    with pytest.raises(ArtifactError, match="already holds a finished run"):
        make(world, out)
    make(world, out, resume=True)
    assert (finished / "battery.json").read_bytes() == before


def test_text_that_changed_since_the_interruption_is_refused(world, tmp_path, monkeypatch):
    """Base readings of one text beside documents of another would be silently wrong."""
    corpus = write_corpus(tmp_path / "letters.jsonl", WORDS["letters"])
    options = {"task": (f"letters={corpus}",)}
    out = tmp_path / "battery"
    interrupted(monkeypatch, battery_config(world, out, **options), 1)
    write_corpus(tmp_path / "letters.jsonl", WORDS["letters"], seed=9)
    with pytest.raises(ArtifactError, match=r"inputs\.corpus letters"):
        make(world, out, resume=True, **options)
