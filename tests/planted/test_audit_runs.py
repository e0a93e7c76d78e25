"""How an audit is carried out does not change its numbers, and its folder is what readers expect."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from audit_world import (
    LATENTS,
    SITE,
    WORDS,
    assert_same,
    audited,
    config_of,
    make_dictionary,
    make_world,
    write_corpus,
)
from palimpsest.artifacts import open_artifact
from palimpsest.audit import measure, run_audit
from palimpsest.dictionaries import load_dictionary
from palimpsest.errors import ArtifactError, ConfigError, CorpusError, DictionaryError
from palimpsest.models.sites import Head

KEYS = """schema summary command warnings pair site dictionary k ks mode tokens loss_measured kl_measured confidence
    resamples seed datasets tasks controls layers layers_note calibration latents curve"""
DATASET_KEYS = """name role source documents tokens skipped_tokens short_tokens bad_rows intersection_mean ci
    list_length_share value_change value_change_ci fve l0 r2_delta r2_delta_ci blind loss delta_loss delta_loss_ci kl
    kl_ci relative_drift relative_drift_ci"""
TASK_KEYS = """name k idr ci idr_abs idr_abs_ci churn_ratio churn_ratio_ci minimum_detectable_idr calibrated z p_null
    p_exchange q delta_loss delta_loss_ci kl kl_ci relative_drift relative_drift_ci kind declared verdict"""
NEED_BATTERY = ("calibrated", "z", "p_null", "q", "kind", "declared", "verdict")
CURVE_COLUMNS = "dataset role k intersection_mean lo hi idr idr_lo idr_hi idr_abs churn_ratio"
LATENT_COLUMNS = """dataset latent contribution contribution_entered contribution_left entered left rate_base rate_tuned
    mean_base mean_tuned selected contribution_held_out change change_lo change_hi p q examples"""


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return make_world(tmp_path_factory.mktemp("audit"), tiny_llama(seed=3), tiny_tokenizer)


@pytest.fixture(scope="module")
def plain(world):
    return audited(world, world.root / "run", kl=True, controls=True)


def keys(text):
    return set(text.split())


def test_the_folder_holds_what_readers_expect(plain):
    found = plain.json
    assert found.keys() == keys(KEYS) and found["schema"] == 1
    assert found["pair"].keys() == keys(
        "base tuned kind dtype d_model n_layers fingerprint_base fingerprint_tuned"
    )
    assert found["dictionary"].keys() == keys("path latents k activation site sha256")
    assert [row["name"] for row in found["datasets"]] == ["general", "letters", "digits"]
    ks = [str(k) for k in range(1, 13)]
    assert found["ks"] == list(range(1, 13))
    for row in found["datasets"]:
        assert row.keys() == keys(DATASET_KEYS)
        assert list(row["intersection_mean"]) == list(row["ci"]) == ks
        for k in ks:
            lo, hi = row["ci"][k]
            assert 0 <= lo <= row["intersection_mean"][k] <= hi <= 1
        assert row["fve"].keys() == row["l0"].keys() == row["loss"].keys() == {"base", "tuned"}
        assert row["documents"] == 24 and row["skipped_tokens"] == row["bad_rows"] == 0
    for task in found["tasks"]:
        assert task.keys() == keys(TASK_KEYS)
        assert all(task[name] is None for name in NEED_BATTERY)
        assert all(task[name] is not None for name in keys(TASK_KEYS) - {*NEED_BATTERY})
    assert {layer["layer"] for layer in found["layers"]} == {0, 1, None}
    assert all(layer.keys() == keys("layer norm_base norm_delta relative") for layer in found["layers"])
    assert plain.folder.manifest["status"] == "complete"
    assert {"audit.json", "curve.parquet", "latents.parquet"} == set(plain.folder.manifest["files"])


def test_tables_hold_what_readers_expect(plain):
    assert len(plain.curve) == 3 * 12
    assert all(row.keys() == keys(CURVE_COLUMNS) for row in plain.curve)
    by_corpus = {row["name"]: row for row in plain.json["datasets"]}
    by_task = {row["name"]: row for row in plain.json["tasks"]}
    for row in plain.curve:
        corpus = by_corpus[row["dataset"]]
        assert row["intersection_mean"] == corpus["intersection_mean"][str(row["k"])]
        assert [row["lo"], row["hi"]] == corpus["ci"][str(row["k"])]
        assert (row["idr"] is None) == (row["role"] == "general")
        if row["role"] == "task" and row["k"] == 5:
            task = by_task[row["dataset"]]
            assert [row["idr"], row["idr_lo"], row["idr_hi"]] == [task["idr"], *task["ci"]]
            assert [row["idr_abs"], row["churn_ratio"]] == [task["idr_abs"], task["churn_ratio"]]
    assert all(row.keys() == keys(LATENT_COLUMNS) for row in plain.latents)
    example = next(row["examples"][0] for row in plain.latents if row["examples"])
    assert example.keys() == keys("before token after base tuned document event")
    assert {row["latent"] for row in plain.latents} <= set(range(-1, LATENTS))
    for row in plain.latents:
        assert (row["q"] is not None) == row["selected"] == (row["change"] is not None)


def test_controls_go_through_the_same_machinery(plain):
    controls = {row["name"]: row for row in plain.json["controls"]}
    assert list(controls) == ["random", "pca", "neurons"]
    for control in controls.values():
        assert [row["name"] for row in control["datasets"]] == ["general", "letters", "digits"]
        assert all(
            row.keys() == keys("name intersection_mean ci fve r2_delta") for row in control["datasets"]
        )
        assert [row["name"] for row in control["tasks"]] == ["letters", "digits"]
        for task in control["tasks"]:
            assert {"name", "k", "idr", "ci", "idr_abs", "churn_ratio"} <= task.keys()
        digits = control["tasks"][1]
        assert digits["ci"][0] > 0, "the planted direction moves every basis on its own tokens"
    explained = {name: row["datasets"][0]["fve"]["base"] for name, row in controls.items()}
    assert explained["pca"] > explained["neurons"] and explained["pca"] > 0.8


def test_a_run_is_reproducible_and_batches_do_not_matter(world, plain, tmp_path):
    again = audited(world, tmp_path / "again", kl=True, controls=True)
    assert {**again.json, "command": ""} == {**plain.json, "command": ""}
    assert again.latents == plain.latents and again.curve == plain.curve
    other = audited(world, tmp_path / "batches", kl=True, tokens_per_batch=64)
    assert_same(other.json["datasets"], plain.json["datasets"], 2e-5)
    assert_same(other.json["tasks"], plain.json["tasks"], 2e-4)
    seeded = audited(world, tmp_path / "seed", kl=True, seed=1)
    assert [t["idr"] for t in seeded.json["tasks"]] == [t["idr"] for t in plain.json["tasks"]]
    assert [t["ci"] for t in seeded.json["tasks"]] != [t["ci"] for t in plain.json["tasks"]]


def test_one_model_at_a_time_gives_the_same_numbers(world, plain, tmp_path):
    found = audited(world, tmp_path / "run", kl=True, controls=True, one_at_a_time=True)
    assert found.json["layers"] is None and "never in memory together" in found.json["layers_note"]
    skipped = {"command": "", "layers": None, "layers_note": None}
    assert {**found.json, **skipped} == {**plain.json, **skipped}
    assert found.latents == plain.latents and found.curve == plain.curve
    assert not (tmp_path / "run" / "parts").exists()


def interrupt(monkeypatch, place):
    """The measuring of one corpus is cut short; returns how many were measured."""
    calls, whole = [], measure.measure_corpus

    def stopped(harvester, corpus, *rest):
        calls.append(corpus.name)
        if len(calls) == place:
            raise KeyboardInterrupt
        return whole(harvester, corpus, *rest)

    monkeypatch.setattr(measure, "measure_corpus", stopped)
    return calls


@pytest.mark.parametrize("one_at_a_time", [False, True])
def test_an_interrupted_audit_resumes_to_the_same_bytes(world, tmp_path, monkeypatch, one_at_a_time):
    options = {"kl": True, "one_at_a_time": one_at_a_time}
    whole = audited(world, tmp_path / "whole", **options)
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        run_audit(config_of(world, out, **options))
    assert json.loads((out / "manifest.json").read_text())["status"] == "running"
    assert not (out / "audit.json").exists()
    with pytest.raises(ArtifactError, match="finish"):
        open_artifact(out, stage="audit")
    with pytest.raises(ArtifactError, match="--resume"):
        run_audit(config_of(world, out, **options))
    with monkeypatch.context() as patch:
        calls = interrupt(patch, 0)
        command = whole.json["command"]
        run_audit(config_of(world, out, resume=True, **options), command=command)
    assert calls == ["letters", "digits"]
    for name in ("audit.json", "curve.parquet", "latents.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_resuming_with_other_text_or_options_is_refused(world, tmp_path, monkeypatch):
    corpus = write_corpus(tmp_path / "letters.jsonl", WORDS["letters"])
    changes = {"task": (f"letters={corpus}",)}
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupt(patch, 2)
        run_audit(config_of(world, out, **changes))
    with pytest.raises(ArtifactError, match=r"config\.k\b"):
        run_audit(config_of(world, out, resume=True, k=4, **changes))
    write_corpus(tmp_path / "letters.jsonl", WORDS["letters"], seed=9)
    with pytest.raises(ArtifactError, match=r"inputs\.letters"):
        run_audit(config_of(world, out, resume=True, **changes))
    assert audited(world, out, overwrite=True, **changes).json["tasks"][0]["name"] == "letters"


def test_resuming_a_finished_audit_runs_nothing(world, plain, monkeypatch):
    before = (plain.folder.path / "audit.json").read_bytes()
    calls = interrupt(monkeypatch, 1)
    run_audit(config_of(world, plain.folder.path, kl=True, controls=True, resume=True))
    assert calls == [] and (plain.folder.path / "audit.json").read_bytes() == before


@pytest.mark.parametrize("activation", ["relu", "jumprelu", "batch_topk"])
def test_every_activation_is_audited(world, tmp_path, activation):
    dictionary = make_dictionary(tmp_path / "dictionary", activation)
    found = audited(world, tmp_path / "run", dictionary=dictionary, loss=False)
    assert found.json["dictionary"]["activation"] == activation
    digits = found.json["datasets"][2]
    assert 2 < digits["l0"]["base"] < 60
    assert found.json["tasks"][1]["ci"][0] > 0
    rows = [row for row in found.latents if row["dataset"] == "digits"]
    assert sum(r["contribution"] for r in rows) == pytest.approx(
        1 - digits["intersection_mean"]["5"], abs=1e-9
    )


def test_without_losses_the_head_never_runs(world, plain, tmp_path, monkeypatch):
    from palimpsest.models import load as loading

    monkeypatch.setattr(loading, "verify_sites", lambda model: None)

    def refuse(*_):
        raise AssertionError("the head ran")

    monkeypatch.setattr(Head, "logits", refuse)
    ran = []
    pair_loader = loading._readable

    def watched(name, hf_model, tokenizer):
        hf_model.lm_head.register_forward_pre_hook(refuse)
        hf_model.model.layers[1].register_forward_pre_hook(lambda *_: ran.append(name))
        return pair_loader(name, hf_model, tokenizer)

    monkeypatch.setattr(loading, "_readable", watched)
    found = audited(world, tmp_path / "run", loss=False)
    assert ran == [], "the layer after the site ran"
    assert found.json["loss_measured"] is found.json["kl_measured"] is False
    for row in found.json["datasets"] + found.json["tasks"]:
        assert row["delta_loss"] is row["delta_loss_ci"] is row["kl"] is row["kl_ci"] is None
    assert all(row["loss"] is None for row in found.json["datasets"])
    assert any("cannot tell" in warning for warning in found.json["warnings"])
    assert not any("cannot tell" in warning for warning in plain.json["warnings"])
    assert [t["idr"] for t in found.json["tasks"]] == pytest.approx([t["idr"] for t in plain.json["tasks"]])
    with pytest.raises(AssertionError, match="the head ran"):
        audited(world, tmp_path / "head", loss=True)


def test_legacy_mode_is_the_original_on_whole_models(world, tiny_tokenizer, tmp_path):
    """From transformers' own hidden states, dense codes and torch.topk at every position, BOS included."""
    from transformers import AutoModelForCausalLM

    dictionary = load_dictionary(world.dictionary)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in (world.base, world.tuned)]
    means = {}
    for name, path in world.corpora.items():
        counts = []
        for line in Path(path).read_text().splitlines():
            text = tiny_tokenizer.bos_token + json.loads(line)["text"]
            ids = tiny_tokenizer(text, return_tensors="pt").input_ids
            tops = []
            for model in models:
                with torch.no_grad():
                    h = model(ids, output_hidden_states=True).hidden_states[1][0]
                dense = dictionary.encode(h).dense()
                assert (dense > 0).sum(1).min() >= 5
                tops.append(dense.topk(5, dim=1).indices.tolist())
            counts += [len(set(a) & set(b)) for a, b in zip(*tops, strict=True)]
        means[name] = np.mean(counts), len(counts)
    found = audited(world, tmp_path / "run", legacy=True, loss=False).json
    assert found["mode"] == "legacy" and found["tokens"] == "all"
    for row in found["datasets"]:
        expected, tokens = means[row["name"]]
        assert row["tokens"] == tokens
        assert row["intersection_mean"]["5"] == pytest.approx(expected, abs=2.5 / tokens)
    for task in found["tasks"]:
        lost = (means["general"][0] - means[task["name"]][0]) / 5
        assert task["idr_abs"] == pytest.approx(lost, abs=2e-3)


def test_bad_input_is_refused_before_anything_is_written(world, tmp_path):
    few = write_corpus(tmp_path / "few.jsonl", WORDS["letters"], documents=5)
    cases = [
        (CorpusError, "too few documents", {"task": (f"few={few}",)}),
        (CorpusError, "missing.jsonl does not exist", {"general": str(tmp_path / "missing.jsonl")}),
        (DictionaryError, "another site", {"site": "resid_post.1"}),
        (DictionaryError, "larger than the number of latents", {"k": 97, "k_max": 120}),
        (ConfigError, "different names", {"task": (f"general={few}",)}),
        (ConfigError, "whole forward", {"loss": False, "kl": True}),
    ]
    for error, message, changes in cases:
        with pytest.raises(error, match=message):
            run_audit(config_of(world, tmp_path / "run", **changes))
        assert not (tmp_path / "run").exists(), message
    config = config_of(world, tmp_path / "run", site="resid_post.1", force_site=True, loss=False)
    assert (
        run_audit(replace(config, task=config.task[:1])).read_json("audit.json")["site"]
        == "resid_post.1"
        != SITE
    )
