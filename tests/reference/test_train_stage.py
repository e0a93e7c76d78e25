"""Dictionary training as a stage: from a model or from a store, cut off and continued."""

from __future__ import annotations

import json
from contextlib import contextmanager

import pytest
import torch

from pair_fixture import fine_tune
from palimpsest.artifacts import open_artifact
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import TrainConfig, load_dictionary, train_dictionary
from palimpsest.errors import ArtifactError, ConfigError, NumericsError, SiteError
from palimpsest.harvest import HarvestConfig, run_harvest
from palimpsest.models import fingerprint, load_model
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.store import ActivationStore
from palimpsest.train import TrainingOptions, TrainSaeConfig, train_sae

BATCH, STEPS = 128, 20


@pytest.fixture(scope="module")
def store(base, text, tmp_path_factory):
    config = HarvestConfig(
        str(base),
        corpus=(str(text),),
        site=("resid_post.0", "resid_post.1"),
        run=RunOptions(out=tmp_path_factory.mktemp("stores") / "store"),
        corpora=CorpusOptions(max_length=128),
    )
    return run_harvest(config).path


@pytest.fixture
def config(base, text, tmp_path):
    """Training from a model, or from a store where one is given; keywords change single fields."""

    def make(out="dictionary", *, store=None, resume=False, seed=0, recipe=(), training=(), **changes):
        steps = {
            "n_latents": 40,
            "k": 4,
            "tokens": BATCH * STEPS,
            "batch_size": BATCH,
            "lr": 5e-3,
            "log_every": 1,
            "checkpoint_every": 6,
            "dead_after_tokens": 300,
        }
        source = {"model": str(base), "corpus": (str(text),)} if store is None else {"store": str(store)}
        fields = {
            "site": "resid_post.0",
            "run": RunOptions(out=tmp_path / out, resume=resume, seed=seed),
            "training": TrainingOptions(**({"block_length": 32, "shuffle": False} | dict(training))),
            "recipe": TrainConfig(**(steps | dict(recipe))),
            "models": ModelOptions(tokens_per_batch=100),
        }
        return TrainSaeConfig(**(source | fields | changes))

    return make


@contextmanager
def cut(monkeypatch, step):
    """Interrupt the training run in the report of a step."""

    @contextmanager
    def interrupting(description, total=None, unit="tokens"):
        seen = 0

        def advance(n=1, note=""):
            nonlocal seen
            seen += n
            if seen >= step * BATCH:
                raise KeyboardInterrupt

        yield advance

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("palimpsest.train.run.progress", interrupting)
        yield


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def logged(folder):
    return [json.loads(line) for line in (folder / "training.jsonl").read_text().splitlines()]


def test_a_dictionary_says_what_it_was_trained_on(config, base, text):
    made = train_sae(config(site="resid_post.50%"))
    folder = config().run.out
    loaded = load_dictionary(folder)
    assert same(made, loaded) and (loaded.d_model, loaded.n_latents, loaded.k) == (32, 40, 4)
    assert loaded.site == "resid_post.0" and loaded.view == "base"
    about = loaded.metadata
    assert (about["model"], about["revision"], about["corpus"]) == (str(base), None, [str(text)])
    assert about["tokens"] == BATCH * STEPS and about["recipe"]["k"] == 4
    assert set(about["metrics"]) == {"fve", "l0", "dead_share"}
    assert 0 < about["metrics"]["fve"] < 1 and 0 < about["metrics"]["l0"] <= 4
    manifest = open_artifact(folder, stage="dictionary").manifest
    assert manifest["inputs"]["model"]["sha256"] == fingerprint(load_model(base))
    assert [line["step"] for line in logged(folder)] == list(range(1, STEPS + 1))


def test_training_from_a_model_is_training_on_its_activations(config, base, text):
    made = train_sae(config(seed=3))
    model = load_model(base)
    acts = []
    for batch in Corpus([str(text)], model.tokenizer).blocks(32, batch_size=3, epochs=None):
        whole = model.read(batch.input_ids, ["resid_post.0"]).acts["resid_post.0"]
        acts.append(whole[batch.keep][:, None].clone())
        if sum(map(len, acts)) >= BATCH * STEPS:
            break
    recipe = TrainConfig(**{**vars(config(seed=3).recipe), "seed": 3})
    assert same(made, train_dictionary(acts, recipe))
    assert not same(made, train_sae(config("other", seed=4)))


def test_training_from_a_store_takes_each_row_once_an_epoch(config, store, text, base):
    made = train_sae(config(store=store, seed=2))
    held = ActivationStore(store)
    epochs = list(held.stream("resid_post.0", seed=2, epochs=7))
    assert 3 * held.rows < BATCH * STEPS < 7 * held.rows
    recipe = TrainConfig(**{**vars(config().recipe), "seed": 2})
    assert same(made, train_dictionary(epochs, recipe))
    about = load_dictionary(config().run.out).metadata
    assert same(made, load_dictionary(config().run.out))
    assert (about["model"], about["site"], about["corpus"]) == (str(base), "resid_post.0", [str(text)])
    assert about["tokens"] == BATCH * STEPS and about["metrics"]["fve"] > 0
    manifest = open_artifact(config().run.out).manifest
    assert set(manifest["inputs"]) == {"store"}
    assert not same(made, train_sae(config("other", store=store, site="resid_post.1")))


@pytest.mark.parametrize("source", ["model", "store"])
@pytest.mark.parametrize("step", [3, 9, 14])
def test_a_run_that_was_cut_gives_the_same_weights(config, store, monkeypatch, source, step):
    place = {"store": store} if source == "store" else {}
    whole = train_sae(config("whole", **place))
    with cut(monkeypatch, step):
        train_sae(config("cut", **place))
    folder = config("cut").run.out
    assert open_artifact(folder, allow_running=True).manifest["status"] == "running"
    with pytest.raises(ArtifactError, match="--resume"):
        train_sae(config("cut", **place))
    with pytest.raises(ArtifactError, match="seed"):
        train_sae(config("cut", resume=True, seed=1, **place))
    resumed = train_sae(config("cut", resume=True, **place))
    assert same(resumed, whole) and same(load_dictionary(folder), whole)
    assert resumed.metadata["metrics"] == whole.metadata["metrics"]
    assert [line["step"] for line in logged(folder)] == list(range(1, STEPS + 1))
    assert same(train_sae(config("cut", resume=True, **place)), whole)


def test_nan_activations_stop_the_training(config, base, tiny_tokenizer, tmp_path):
    folder = fine_tune(base, tmp_path / "bad", tiny_tokenizer)
    model = load_model(folder).model
    with torch.no_grad():
        model.model.embed_tokens.weight[tiny_tokenizer.convert_tokens_to_ids("y")] = torch.nan
    model.save_pretrained(folder)
    corpus = tmp_path / "odd.jsonl"
    corpus.write_text('{"text": "the river"}\n{"text": "x y"}\n')
    with pytest.raises(NumericsError, match=r"bad gives NaN or infinity at resid_pre\.0.*document 1"):
        train_sae(config(model=str(folder), corpus=(str(corpus),), site="resid_pre.0"))
    with pytest.raises(ArtifactError):
        open_artifact(config().run.out)


def test_what_cannot_be_trained(config, store, base, text, tmp_path):
    with pytest.raises(ConfigError, match="longer than the model's context.*512.*600"):
        train_sae(config(training={"block_length": 600}))
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        train_sae(config(training={"block_length": 0}))
    with pytest.raises(SiteError, match="layers run from 0 to 1"):
        train_sae(config(site="resid_post.2"))
    with pytest.raises(ConfigError, match=r"does not hold resid_post\.7.*resid_post\.0, resid_post\.1"):
        train_sae(config(store=store, site="resid_post.7"))
    assert not (tmp_path / "dictionary" / "dictionary.json").exists()
    run = RunOptions(out=tmp_path / "none")
    for source in ({}, {"model": str(base)}, {"corpus": (str(text),)}):
        with pytest.raises(ConfigError, match="Found: neither"):
            TrainSaeConfig(site="resid_post.0", run=run, **source)
    with pytest.raises(ConfigError, match="Found: both"):
        TrainSaeConfig(site="s", run=run, model=str(base), corpus=(str(text),), store=str(store))
