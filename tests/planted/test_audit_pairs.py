"""Audits of tiny random models: nothing where nothing changed, the planted latent where one was planted."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from audit_world import PLANTED, SITE, WORDS, add_noise, audited, edited, make_world, write_corpus
from palimpsest.audit.sums import Accumulator, Measure
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import load_dictionary
from palimpsest.harvest import Harvester
from palimpsest.log import log
from palimpsest.models import load_pair
from palimpsest.options import ModelOptions


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return make_world(tmp_path_factory.mktemp("audit"), tiny_llama(seed=3), tiny_tokenizer)


@pytest.fixture(scope="module")
def planted(world):
    return audited(world, world.root / "run")


@pytest.mark.parametrize("tokens_per_batch", [64, 4096])
def test_a_model_against_itself_shows_nothing(world, tmp_path, tokens_per_batch):
    found = audited(world, tmp_path / "run", tuned=world.base, tokens_per_batch=tokens_per_batch, kl=True)
    for corpus in found.json["datasets"]:
        assert all(value == 1 for value in corpus["intersection_mean"].values())
        assert corpus["delta_loss_ci"] == [0, 0] and abs(corpus["kl"]) < 1e-6
        assert corpus["relative_drift"] == 0 and corpus["r2_delta"] is None and not corpus["blind"]
    for task in found.json["tasks"]:
        assert task["idr"] == 0 and task["ci"] == [0, 0] and task["p_exchange"] == 1
        assert task["churn_ratio"] is None and task["churn_ratio_ci"] == [None, None]
    assert not any(row["selected"] for row in found.latents)
    assert found.json["warnings"] == ["The two models have the same weights."]


def test_a_model_against_itself_in_other_batches_shows_only_rounding(world):
    """The tuned side's activations come from other batches: what is left is the noise floor of the numerics."""
    dictionary = load_dictionary(world.dictionary)
    pair = load_pair(world.base, world.base, ModelOptions(device="cpu"))
    corpus = Corpus(world.corpora["digits"], pair.tokenizer)
    harvester = Harvester(pair, [SITE])
    alone = {}
    for batch in harvester.stream("alone", corpus.batches(1)):
        for i in range(batch.tokens):
            alone[int(batch.document[i]), int(batch.position[i])] = batch.acts[SITE][i, 1], batch.loss[i, 1]
    accumulator = Accumulator(Measure("dictionary", dictionary, SITE, k_max=12))
    for batch in harvester.stream("together", corpus.batches(4096)):
        places = zip(batch.document.tolist(), batch.position.tolist(), strict=True)
        acts, loss = (torch.stack(column) for column in zip(*(alone[place] for place in places), strict=True))
        acts, loss = torch.stack([batch.acts[SITE][:, 0], acts], 1), torch.stack([batch.loss[:, 0], loss], 1)
        accumulator.add(replace(batch, acts={SITE: acts}, loss=loss))
    sums = accumulator.finish()
    assert len(sums.documents) == 24 and sums.columns["tokens"].sum() > 500
    assert (sums.overlap.sum(0) / sums.columns["listed"].sum() >= 0.999).all()
    delta = sums.columns["loss_tuned"] - sums.columns["loss_base"]
    assert np.abs(delta / sums.columns["predicted"]).max() < 1e-5


def test_the_planted_domain_and_latent_are_found(planted):
    tasks = {task["name"]: task for task in planted.json["tasks"]}
    assert tasks["digits"]["ci"][0] > 0.1
    assert tasks["digits"]["idr"] > 5 * abs(tasks["letters"]["idr"])
    assert tasks["digits"]["p_exchange"] < 0.01
    assert "digits" in planted.json["summary"]
    rows = [row for row in planted.latents if row["dataset"] == "digits" and row["latent"] >= 0]
    row = rows[0]
    assert row["latent"] == PLANTED
    assert row["selected"] and row["q"] < 0.01 and row["change_lo"] > 0.5 and row["entered"] > row["left"]
    assert row["rate_tuned"] > row["rate_base"] + 0.4
    tokens = [example["token"] for example in row["examples"] if example["event"] == "entered"]
    assert tokens and all(any(c.isdigit() for c in token) for token in tokens)
    elsewhere = [r for r in planted.latents if r["dataset"] == "letters" and r["latent"] == PLANTED]
    assert sum(r["contribution"] for r in elsewhere) < 0.2 * row["contribution"]


def test_contributions_in_the_table_sum_to_the_lost_overlap(planted):
    for corpus in planted.json["datasets"]:
        rows = [row for row in planted.latents if row["dataset"] == corpus["name"]]
        lost = 1 - corpus["intersection_mean"]["5"]
        assert sum(row["contribution"] for row in rows) == pytest.approx(lost, abs=1e-9)
        assert rows[0]["latent"] == -1
        assert rows[0]["contribution"] == pytest.approx(corpus["list_length_share"], abs=1e-12)


def test_noise_in_the_weights_moves_no_domain_in_particular(world, tmp_path):
    """Every corpus is drawn from the same words, so its true rate is zero."""
    corpora = {
        name: write_corpus(tmp_path / f"{name}.jsonl", WORDS["general"], seed=seed, documents=30)
        for seed, name in enumerate(("general", "a", "b", "c"), start=20)
    }
    tasks = tuple(f"{name}={corpora[name]}" for name in "abc")
    alarms, p, seeds = 0, [], 6
    for seed in range(seeds):
        tuned = edited(world.base, tmp_path / f"noise{seed}", lambda model, s=seed: add_noise(model, 0.01, s))
        found = audited(
            world,
            tmp_path / f"run{seed}",
            tuned=tuned,
            general=corpora["general"],
            task=tasks,
            seed=seed,
            loss=False,
        )
        assert 0.5 < found.json["datasets"][0]["intersection_mean"]["5"] < 0.99
        alarms += sum(not task["ci"][0] <= 0 <= task["ci"][1] for task in found.json["tasks"])
        p += [task["p_exchange"] for task in found.json["tasks"]]
    log.info("%d of %d intervals exclude zero; p_exchange %s", alarms, 3 * seeds, np.round(np.sort(p), 2))
    assert alarms <= stats.binom.ppf(0.9999, 3 * seeds, 0.07)


def test_general_text_as_a_task_differs_by_sampling_alone(world, tmp_path):
    """The two are resampled independently, so the estimate is exactly zero and its interval is not."""
    found = audited(world, tmp_path / "run", task=(f"same={world.corpora['general']}",), loss=False)
    (task,) = found.json["tasks"]
    assert task["idr"] == 0 and task["ci"][0] < 0 < task["ci"][1]
    assert task["churn_ratio"] == 1 and task["p_exchange"] > 0.9
    assert task["minimum_detectable_idr"] == pytest.approx(
        2.8 * (task["ci"][1] - task["ci"][0]) / 3.92, rel=0.2
    )
