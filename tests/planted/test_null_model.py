"""A null drifts as far as its fine-tune, in other directions, and reads as an ordinary checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from audit_world import WORDS, edited, write_corpus
from helpers import assert_close
from pair_fixture import adapt, fine_tune, load_hf, lora, save
from palimpsest.artifacts import open_artifact
from palimpsest.diff.null_config import NullConfig
from palimpsest.diff.null_model import RECORD, STAGE, make_null
from palimpsest.errors import ArtifactError, ConfigError, NumericsError
from palimpsest.models import load_pair, weight_deltas
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

SITE = "resid_post.0"


@pytest.fixture
def base(tiny_llama):
    return tiny_llama(seed=3)


@pytest.fixture
def text(tmp_path):
    words = WORDS["general"] + WORDS["digits"]
    return write_corpus(tmp_path / "text.jsonl", words, documents=30)


def config_of(base, tuned, text, out, **changes):
    run = {key: changes.pop(key) for key in ("seed", "resume", "overwrite") if key in changes}
    fields = {"corpus": (text,), "site": SITE, "tokens": 10**6, "models": ModelOptions(tokens_per_batch=256)}
    return NullConfig(str(base), str(tuned), run=RunOptions(out=out, **run), **(fields | changes))


def record_of(folder):
    return json.loads((folder / RECORD).read_text())


def drift_of(base, other, text, tokenizer, dtype=torch.float32):
    """The relative drift again, with transformers alone: one document at a time, without its BOS."""
    models = [load_hf(folder).to(dtype) for folder in (base, other)]
    moved = norm = 0.0
    for row in Path(text).read_text().splitlines():
        sentence = tokenizer.bos_token + json.loads(row)["text"]
        ids = tokenizer(sentence, add_special_tokens=False, return_tensors="pt").input_ids
        # hidden_states[1] is what the first of two layers writes.
        h_base, h = (
            model(ids, output_hidden_states=True).hidden_states[1][0, 1:].double() for model in models
        )
        moved, norm = moved + (h - h_base).square().sum(), norm + h_base.square().sum()
    return float(moved / norm) ** 0.5


@torch.no_grad()
def test_a_null_drifts_as_far_in_other_directions(base, text, tiny_tokenizer, tmp_path):
    tuned = fine_tune(base, tmp_path / "tuned", tiny_tokenizer, scale=0.02)
    folder = make_null(config_of(base, tuned, text, tmp_path / "null", seed=5))
    found = record_of(folder)
    assert found["drift"]["tuned"] == pytest.approx(drift_of(base, tuned, text, tiny_tokenizer), rel=1e-4)
    assert found["drift"]["null"] == pytest.approx(drift_of(base, folder, text, tiny_tokenizer), rel=1e-4)
    assert found["drift"]["null"] == pytest.approx(found["drift"]["tuned"], rel=0.003)
    assert (found["seed"], found["site"], found["dtype"]) == (5, SITE, "float32")
    assert (found["base"], found["tuned"]) == (str(base), str(tuned))

    mine, change, null = (dict(load_hf(one).named_parameters()) for one in (base, tuned, folder))
    for name, weight in mine.items():
        own, other = change[name] - weight, null[name] - weight
        assert_close(other.norm(), found["alpha"] * own.norm(), atol=1e-4)
        if own.dim() == 2:
            # A random direction's cosine has a standard deviation of 1/√(entries).
            assert abs((own * other).sum() / own.norm() / other.norm()) < 6 / own.numel() ** 0.5


def test_a_null_is_a_pair_and_a_finished_folder(base, text, tiny_tokenizer, tmp_path):
    tuned = fine_tune(base, tmp_path / "tuned", tiny_tokenizer, scale=0.02)
    out = tmp_path / "null"
    assert make_null(config_of(base, tuned, text, out)) == out
    artifact = open_artifact(out, stage=STAGE)
    assert {"config.json", "model.safetensors", "tokenizer.json", RECORD} <= artifact.files.keys()
    pair = load_pair(base, out)
    assert all(row.norm_delta > 0 for row in weight_deltas(pair))
    assert pair.tuned.tokenizer.chat_template == tiny_tokenizer.chat_template

    before = (out / "model.safetensors").read_bytes()
    assert make_null(config_of(base, tuned, text, out, resume=True)) == out
    with pytest.raises(ArtifactError, match="overwrite"):
        make_null(config_of(base, tuned, text, out))
    make_null(config_of(base, tuned, text, out, overwrite=True))
    assert (out / "model.safetensors").read_bytes() == before
    make_null(config_of(base, tuned, text, out, overwrite=True, seed=1))
    assert (out / "model.safetensors").read_bytes() != before


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_gives_the_null_of_its_merge(base, text, tiny_tokenizer, tmp_path, extra):
    merged = adapt(base, tmp_path / "adapter", lora(**extra), scale=0.2).merge_and_unload()
    full = save(merged, tmp_path / "merged", tiny_tokenizer)
    found = make_null(config_of(base, tmp_path / "adapter", text, tmp_path / "a"))
    expected = make_null(config_of(base, full, text, tmp_path / "b"))
    one, two = (dict(load_hf(folder).named_parameters()) for folder in (found, expected))
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert_close(weight, two[name], atol=1e-4)
    assert record_of(found)["alpha"] == pytest.approx(record_of(expected)["alpha"], rel=1e-3)
    # And its weights moved at all.
    assert weight_deltas(load_pair(base, found))[0].norm_delta > 0


@torch.no_grad()
def test_drift_is_matched_in_the_dtype_that_is_written(base, text, tiny_tokenizer, tmp_path):
    """Bfloat16 swallows changes far below a weight's last digit: α has to make up for them."""
    tuned = fine_tune(base, tmp_path / "tuned", tiny_tokenizer, scale=0.001)
    options = ModelOptions(dtype="bfloat16", tokens_per_batch=256)
    folder = make_null(config_of(base, tuned, text, tmp_path / "null", models=options))
    found = record_of(folder)
    stored = json.loads((folder / "config.json").read_text())
    assert found["dtype"] == stored["dtype"] == "bfloat16"
    expected = [drift_of(base, one, text, tiny_tokenizer, torch.bfloat16) for one in (tuned, folder)]
    assert found["drift"]["null"] == pytest.approx(expected[1], rel=0.05)
    assert expected[1] == pytest.approx(expected[0], rel=0.1)


def test_what_is_not_measured_moves_no_drift(base, text, tiny_tokenizer, tmp_path):
    """BOS, whose activations are unlike all others, counts with all positions only."""
    tuned = fine_tune(base, tmp_path / "tuned", tiny_tokenizer, scale=0.02)
    one = record_of(make_null(config_of(base, tuned, text, tmp_path / "a")))
    all_positions = CorpusOptions(all_positions=True)
    two = record_of(make_null(config_of(base, tuned, text, tmp_path / "b", corpora=all_positions)))
    assert two["tokens"] == one["tokens"] + 30
    assert two["drift"]["tuned"] != pytest.approx(one["drift"]["tuned"], rel=1e-4)


def test_pairs_without_a_change_are_refused(base, text, tmp_path):
    shutil.copytree(base, tmp_path / "same")
    with pytest.raises(NumericsError, match="same weights"):
        make_null(config_of(base, tmp_path / "same", text, tmp_path / "null"))

    def last_layer(model):
        model.model.layers[1].mlp.down_proj.weight += 0.1

    later = edited(base, tmp_path / "later", last_layer)
    with pytest.raises(NumericsError, match=f"at {SITE} as they were"):
        make_null(config_of(base, later, text, tmp_path / "null", overwrite=True))
    found = make_null(config_of(base, later, text, tmp_path / "other", site="resid_post.1"))
    deltas = {row.layer: row.norm_delta for row in weight_deltas(load_pair(base, found))}
    assert deltas[1] > 0 and deltas[0] == deltas[None] == 0


def test_options_that_cannot_work_are_refused(base, text, tmp_path):
    with pytest.raises(ConfigError, match="needs text"):
        config_of(base, base, text, tmp_path / "null", corpus=())
    with pytest.raises(ConfigError, match="at once"):
        config_of(base, base, text, tmp_path / "null", models=ModelOptions(one_at_a_time=True))
