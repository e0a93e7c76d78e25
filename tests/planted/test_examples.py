"""Examples where the answer is known: a direction that the fine-tune writes on digits; a fine-tune that is the base."""

from __future__ import annotations

import pytest

from audit_world import LATENTS, PLANTED, make_world
from palimpsest.interpret.examples import ExamplesConfig, run_examples
from palimpsest.latents import LatentIndex, Query
from palimpsest.options import ModelOptions, RunOptions


def examples_of(world, tuned, out):
    config = ExamplesConfig(
        world.base,
        tuned,
        dictionary=world.dictionary,
        corpus=tuple(f"{name}={path}" for name, path in world.corpora.items()),
        run=RunOptions(out=world.root / out),
        tops=10,
        models=ModelOptions(device="cpu", tokens_per_batch=512),
    )
    return LatentIndex.open(run_examples(config).path)


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    return make_world(tmp_path_factory.mktemp("planted-examples"), tiny_llama(seed=3), tiny_tokenizer)


@pytest.fixture(scope="module")
def planted(world):
    return examples_of(world, world.tuned, "planted-run")


@pytest.fixture(scope="module")
def null(world):
    return examples_of(world, world.base, "null-run")


def test_the_planted_latent_fires_on_digits_in_the_tuned_model(planted):
    row = planted.row(PLANTED)
    assert row["rate[digits]"] > 0.8 > 2 * max(row["rate[general]"], row["rate[letters]"])
    assert row["rate_tuned"] > 2 * row["rate_base"]
    found = planted.examples(PLANTED, kind=0)
    assert len(found) == 10
    for one in found:
        assert one.corpus == "digits"
        assert one.tuned is not None and one.base is not None and one.tuned > one.base + 1
        assert any(char.isdigit() for char in "".join(one.tokens))
    assert sum(token.strip().isdigit() for token in row["tokens"]) >= len(row["tokens"]) / 2


def test_no_latent_differs_more(planted):
    page = planted.search(Query(sort="rate_tuned", descending=True, limit=LATENTS))
    change = {row["latent"]: row["rate_tuned"] - row["rate_base"] for row in page.rows}
    assert max(change, key=lambda latent: change[latent]) == PLANTED


def test_other_latents_have_no_taste_for_digits(planted, world):
    """The share of digits among the strongest examples of the other latents is about that of the corpora."""
    others = [int(latent) for latent in planted.latents if latent != PLANTED]
    hits = [one.corpus == "digits" for latent in others for one in planted.examples(latent, kind=0)]
    assert sum(hits) / len(hits) < 0.6


def test_the_same_model_twice_differs_nowhere(null):
    page = null.search(Query(limit=LATENTS))
    assert page.total > 50
    assert all(row["rate_base"] == row["rate_tuned"] for row in page.rows)
    for latent in null.latents[:20]:
        assert all(one.base == one.tuned == one.value for one in null.examples(int(latent)))
        assert max(map(abs, null.row(int(latent))["changed_logits"])) == 0
    # In the base the planted latent is one like the others.
    assert null.row(PLANTED)["rate[digits]"] < 0.6 if PLANTED in null.latents else True
