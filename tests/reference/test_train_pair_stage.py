"""Dictionaries of a pair as a stage: from both models or a store of both, variants, evaluation, resume."""

from __future__ import annotations

import json

import pytest
import torch

from palimpsest.artifacts import open_artifact
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Partition, TrainConfig, load_dictionary, train_dictionary
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.harvest import HarvestConfig, Harvester, run_harvest
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions
from palimpsest.store import ActivationStore
from palimpsest.train import (
    TrainingOptions,
    TrainPairConfig,
    TrainSaeConfig,
    train_pair,
    train_sae,
    train_variants,
)
from palimpsest.train.config import variants

BATCH, STEPS = 128, 16
SITE = "resid_post.0"


@pytest.fixture(scope="module")
def store(base, tuned, text, tmp_path_factory):
    config = HarvestConfig(
        str(base),
        tuned=str(tuned),
        corpus=(str(text),),
        site=(SITE,),
        run=RunOptions(out=tmp_path_factory.mktemp("stores") / "pairs"),
        corpora=CorpusOptions(max_length=128),
        store_dtype="float32",
    )
    return run_harvest(config).path


@pytest.fixture
def config(base, tuned, text, tmp_path):
    """A crosscoder of the live pair, or of a store where one is given; keywords change single fields."""

    def make(out="dictionary", *, store=None, recipe=(), training=(), resume=False, seed=0, **changes):
        sizes = {
            "n_latents": 40,
            "k": 4,
            "activation": "batch_topk",
            "tokens": BATCH * STEPS,
            "batch_size": BATCH,
            "lr": 5e-3,
            "log_every": 1,
            "checkpoint_every": 6,
        }
        live = {"base": str(base), "tuned": str(tuned), "corpus": (str(text),)}
        fields = {
            "site": SITE,
            "run": RunOptions(out=tmp_path / out, resume=resume, seed=seed),
            "training": TrainingOptions(**({"block_length": 32} | dict(training))),
            "recipe": TrainConfig(**(sizes | dict(recipe))),
            "models": ModelOptions(tokens_per_batch=100),
        }
        source = live if store is None else {"store": str(store)}
        return TrainPairConfig(**(source | fields | changes))

    return make


def as_sae(config, **changes):
    kept = {name: getattr(config, name) for name in ("site", "run", "training", "recipe", "models")}
    return TrainSaeConfig(**kept | changes)


def same(a, b):
    return all(torch.equal(tensor, b.state_dict()[name]) for name, tensor in a.state_dict().items())


def live_activations(base, tuned, text):
    pair = load_pair(base, tuned)
    blocks = Corpus([str(text)], pair.base.tokenizer).blocks(32, batch_size=3, epochs=None)
    seen = 0
    for paired in Harvester(pair, [SITE], loss=False).stream("check", blocks):
        yield paired.acts[SITE]
        seen += paired.tokens
        if seen > BATCH * STEPS:
            return


@pytest.mark.parametrize("view", ["pair", "diff"])
def test_training_from_a_pair_is_training_on_its_activations(config, base, tuned, text, view):
    made = train_pair(config(view=view, training={"shuffle": False}))
    acts = list(live_activations(base, tuned, text))
    if view == "diff":
        acts = [x[:, 1:] - x[:, :1] for x in acts]
    assert same(made, train_dictionary(acts, config(view=view).recipe))
    assert (made.view, made.models, made.d_model) == (view, 2 if view == "pair" else 1, 32)
    loaded = load_dictionary(config().run.out)
    assert same(made, loaded)
    about = loaded.metadata
    assert (about["base"], about["tuned"], about["site"]) == (str(base), str(tuned), SITE)
    inputs = open_artifact(config().run.out, stage="dictionary").manifest["inputs"]
    assert set(inputs) == {"corpus", "base", "tuned"} and inputs["base"] != inputs["tuned"]


def test_every_view_of_a_store(config, store):
    acts = list(ActivationStore(store).stream(SITE, seed=0, epochs=9))
    views = {
        "pair": acts,
        "diff": [x[:, 1:] - x[:, :1] for x in acts],
        "base": [x[:, :1] for x in acts],
        "tuned": [x[:, 1:] for x in acts],
    }
    for view, rows in views.items():
        wanted = config(view, store=store, training={"shuffle": False})
        if view in ("pair", "diff"):
            made = train_pair(config(view, store=store, view=view, training={"shuffle": False}))
        else:
            made = train_sae(as_sae(wanted, store=str(store), side=view))
        assert same(made, train_dictionary(rows, wanted.recipe)), view
        assert made.view == view


def test_the_buffer_mixes_and_resumes(config, store, monkeypatch):
    mixed = train_pair(config("mixed", store=store, training={"buffer": 512}))
    assert not same(mixed, train_pair(config("plain", store=store, training={"shuffle": False})))

    class StopError(Exception):
        pass

    def stopping(*arguments):
        raise StopError

    with monkeypatch.context() as patch:
        from palimpsest.train.tracking import Tracks

        before = Tracks.add
        patch.setattr(Tracks, "add", lambda self, f: stopping() if f["step"] == 9 else before(self, f))
        with pytest.raises(StopError):
            train_pair(config("cut", store=store, training={"buffer": 512}))
    resumed = train_pair(config("cut", store=store, training={"buffer": 512}, resume=True))
    assert same(resumed, mixed)
    lines = (config("cut").run.out / "training.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    table = open_artifact(config("cut").run.out).read_table("training.parquet")
    assert table.num_rows == STEPS
    assert {"fve", "fve_base", "fve_tuned", "l0", "dead_share", "tokens_per_second"} <= set(
        table.column_names
    )


def test_variants_are_the_dictionaries_trained_alone(config, store):
    texts = ("k=2", "latents=64,lr=1e-3,activation=topk")
    made = train_variants(config("both", store=store, training={"variant": texts}))
    assert list(made) == ["k2", "latents64-lr1e-3-activationtopk"]
    alone = train_pair(config("alone", store=store, recipe={"k": 2}))
    assert same(made["k2"], alone) and same(load_dictionary(config("both").run.out / "k2"), alone)
    assert made["latents64-lr1e-3-activationtopk"].n_latents == 64
    names = {
        json.loads(line)["name"]
        for line in (config("both").run.out / "training.jsonl").read_text().splitlines()
    }
    assert names == set(made)
    again = train_variants(config("both", store=store, training={"variant": texts}, resume=True))
    assert same(again["k2"], alone)


def test_a_finished_dictionary_is_measured_on_held_out_text(config, text, base, tuned):
    made = train_pair(config(training={"eval_corpus": (str(text),), "eval_tokens": 400}))
    found = made.metadata["evaluation"]
    assert {"fve_base", "fve_tuned", "ce_recovered_zero_tuned", "kl_recovered_mean_base"} <= set(found)
    assert load_dictionary(config().run.out).metadata["evaluation"] == found
    stored = open_artifact(config().run.out).read_json("evaluation.json")
    assert stored["view"] == "pair" and stored["tokens"] == found["tokens"] >= 400


def test_a_store_is_checked_against_the_models(config, store, base, tuned, adapter):
    train_pair(config("right", store=store, base=str(base), tuned=str(tuned)))
    with pytest.raises(ArtifactError, match="tuned"):
        train_pair(config("wrong", store=store, base=str(base), tuned=str(base)))
    with pytest.raises(ArtifactError, match="base"):
        train_sae(as_sae(config("sae"), store=str(store), model=str(tuned)))
    train_sae(as_sae(config("side"), store=str(store), model=str(tuned), side="tuned"))


def test_expansion_counts_latents_per_dimension(config, store):
    unsaid = {"n_latents": TrainConfig.n_latents}
    made = train_pair(config(store=store, training={"expansion": 3}, recipe=unsaid))
    assert made.n_latents == 96
    with pytest.raises(ConfigError, match="said twice"):
        config(store=store, training={"expansion": 3})


def test_what_cannot_be_trained(config, store, base, text, tmp_path):
    for changes, problem in (
        ({"base": None}, "two models"),
        ({"corpus": ()}, "Found: neither"),
        ({"store": str(store), "corpus": (str(text),)}, "Found: both"),
        ({"view": "diff", "recipe": {"partition": Partition(shared=2)}}, "Only a crosscoder"),
        ({"models": ModelOptions(one_at_a_time=True)}, "side by side"),
        ({"training": {"push": "a/b", "variant": ("k=2",)}}, "uploads one"),
        ({"training": {"expansion": 0}}, "above 0"),
        ({"training": {"buffer": 0}}, "above 0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            config(**changes)
    with pytest.raises(ConfigError, match="Add --base and --tuned"):
        config(store=store, training={"eval_corpus": (str(text),)})
    single = run_harvest(
        HarvestConfig(str(base), corpus=(str(text),), site=(SITE,), run=RunOptions(out=tmp_path / "single"))
    ).path
    with pytest.raises(ConfigError, match="holds one model"):
        train_pair(config(store=single))
    with pytest.raises(ConfigError, match="holds one model"):
        train_sae(as_sae(config(), store=str(single), side="tuned"))
    with pytest.raises(ConfigError, match="train_variants"):
        train_pair(config(store=store, training={"variant": ("k=2",)}))
    with pytest.raises(ConfigError, match="no variants"):
        train_variants(config(store=store))
    assert not (tmp_path / "dictionary" / "dictionary.json").exists()


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (("k",), "cannot be read"),
        (("kk=3",), "changes nothing.*kk"),
        (("k=3", "k=3"), "same name"),
        (("device=cuda",), "changes nothing"),
        (("k=50",), "does not fit"),
    ],
)
def test_variants_that_mean_nothing(texts, problem):
    with pytest.raises(ConfigError, match=problem):
        variants(TrainConfig(n_latents=40, k=4), texts)


def test_a_variant_reaches_every_group():
    made = variants(TrainConfig(), ("auxk_alpha=0.5,shared=8,seed=3", "plain:compute-dtype=float32"))
    assert list(made) == ["auxk_alpha0.5-shared8-seed3", "plain"]
    first, second = made.values()
    assert (first.objective.auxk_alpha, first.partition.shared, first.seed) == (0.5, 8, 3)
    assert second.dtype == "float32"


def test_trackers_get_what_the_log_holds(config, store, monkeypatch):
    import sys
    from types import SimpleNamespace

    calls = []

    def init(**about):
        calls.append(("init", about["project"], about["config"]["recipe"]["k"]))
        log = lambda figures, step: calls.append(("log", step, figures))  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: calls.append(("finish",)))

    monkeypatch.setitem(sys.modules, "trackio", SimpleNamespace(init=init))
    train_pair(config(store=store, training={"track": ("trackio",)}))
    assert calls[0] == ("init", "palimpsest", 4) and calls[-1] == ("finish",)
    lines = [json.loads(line) for line in (config().run.out / "training.jsonl").read_text().splitlines()]
    assert [call[1] for call in calls[1:-1]] == [line["tokens"] for line in lines]
    assert calls[3][2]["fve_tuned"] == lines[2]["fve_tuned"]
