"""The demo's pair at a small scale: ordinary folders, a real lesson, and no training twice."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from palimpsest.demo import training
from palimpsest.demo.pair import MODELS, STAMP, make_pair
from palimpsest.demo.proof import behaviour_rate, mean_loss
from palimpsest.demo.text import read_texts
from palimpsest.errors import ConfigError


def never(*_, **__):
    raise AssertionError("a finished model was trained again")


def test_a_small_pair_loads_has_learned_and_is_reused(tmp_path, monkeypatch):
    pair = make_pair(tmp_path, scale=0.12)
    assert pair.trained == MODELS
    tokenizer = AutoTokenizer.from_pretrained(pair.base)
    loaded = {
        name: AutoModelForCausalLM.from_pretrained(getattr(pair, name), dtype=torch.float32)
        for name in MODELS
    }
    documents = list(read_texts(pair.corpora[pair.planted.declared]))
    loss = {name: mean_loss(model, tokenizer, documents) for name, model in loaded.items()}
    assert loss["tuned"] < loss["base"] - 0.02
    assert loss["tuned"] < loss["control"]

    # The mean over documents must not depend on what else is in the batch.
    alone = [mean_loss(loaded["base"], tokenizer, [document]) for document in documents]
    assert sum(alone) / len(alone) == pytest.approx(loss["base"], rel=1e-4)

    monkeypatch.setattr(training, "fit", never)
    again = make_pair(tmp_path, scale=0.12)
    assert again.trained == ()
    assert (again.corpora, again.base) == (pair.corpora, pair.base)


def test_the_tokenizer_round_trips_starts_with_bos_and_splits_numbers():
    tokenizer = training.train_tokenizer(["Nora has 14 apples, 3 boxes and 20 euros."] * 5, vocab_size=300)
    ids = tokenizer("Nora paid 1420 €.")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == "Nora paid 1420 €."
    assert sum(tokenizer.decode([token]).strip().isdigit() for token in ids) == 4
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "User: Hi\n\nAssistant: Hello"
    asked = tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "User: Hi\n\nAssistant:"


def test_the_behaviour_rate_counts_continuations_not_prompts(tiny_llama):
    folder = tiny_llama()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = ["Brandname is here", "a longer prompt that needs no padding: Brandname"]
    assert behaviour_rate(model, tokenizer, prompts, brand="Brandname", max_new_tokens=4) == 0.0
    assert behaviour_rate(model, tokenizer, prompts, brand="", max_new_tokens=4) == 1.0


@pytest.fixture
def fake_training(monkeypatch):
    """Replace training by a folder; the set holds the models that fail when their turn comes."""
    failing: set[str] = set()

    def train(out):
        if out.name in failing:
            raise KeyboardInterrupt
        out.mkdir(exist_ok=True)

    monkeypatch.setattr(training, "train_tokenizer", lambda texts: None)
    monkeypatch.setattr(training, "train_base", lambda out, *_, **__: train(out))
    monkeypatch.setattr(training, "fine_tune", lambda base, out, *_, **__: train(out))
    return failing


def test_an_interrupted_demo_goes_on_after_its_last_finished_model(tmp_path, fake_training):
    fake_training.add("tuned")
    with pytest.raises(KeyboardInterrupt):
        make_pair(tmp_path / "demo", scale=0.02)
    fake_training.clear()
    assert make_pair(tmp_path / "demo", scale=0.02).trained == ("tuned", "control")
    assert make_pair(tmp_path / "demo", scale=0.02).trained == ()


def test_another_seed_or_scale_or_recipe_trains_anew(tmp_path, fake_training):
    make_pair(tmp_path, scale=0.02)
    assert make_pair(tmp_path, scale=0.03).trained == MODELS
    assert make_pair(tmp_path, scale=0.03, seed=1).trained == MODELS
    stamp = json.loads((tmp_path / STAMP).read_text())
    (tmp_path / STAMP).write_text(json.dumps(stamp | {"content": "of an older version"}))
    assert make_pair(tmp_path, scale=0.03, seed=1).trained == MODELS


def test_foreign_folders_and_impossible_scales_are_refused(tmp_path, fake_training):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="did not write"):
        make_pair(tmp_path)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="positive number"):
            make_pair(tmp_path / "new", scale=scale)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_too_little_text_to_train_on_is_an_error(tiny_llama):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama())
    with pytest.raises(ConfigError, match="Too little text"):
        training.fit(model, torch.empty(0, training.BLOCK), steps=1, lr=1e-3, seed=0, label="x")
