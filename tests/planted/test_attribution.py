"""A planted direction gets the whole gap and putting it in agrees; a pair without a change gets nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from audit_world import D_MODEL, LATENTS, PLANTED, SITE, WORDS, add_noise, edited, plant, write_corpus
from helpers import assert_close
from pair_fixture import adapt, load_hf, lora
from palimpsest.dictionaries import Dictionary
from palimpsest.diff.attribution import attribute_pair
from palimpsest.diff.attribution.behaviours import Differing, groups
from palimpsest.diff.config import AttributionOptions, DiffConfig
from palimpsest.diff.methods import Method
from palimpsest.diff.text import Texts
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

OPPOSITE = PLANTED + 1


def dictionary_of(direction, view):
    """Latent 17 reads and writes the planted direction, 18 its negative; the others are small and random."""
    made = Dictionary(D_MODEL, LATENTS, activation="relu", view=view, models=1 + (view == "pair"))
    with torch.no_grad():
        decoys = 0.05 * torch.randn(LATENTS, D_MODEL, generator=torch.Generator().manual_seed(4))
        decoys[PLANTED], decoys[OPPOSITE] = direction, -direction
        made.W_enc.copy_(torch.stack([-decoys.T, decoys.T]) if view == "pair" else decoys.T[None])
        made.W_dec.zero_()[:, -1] = decoys
        for parameter in (made.b_enc, made.b_dec):
            parameter.zero_()
    return made


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    root = tmp_path_factory.mktemp("attribution")
    corpora = {name: write_corpus(root / f"{name}.jsonl", words) for name, words in WORDS.items()}
    direction = torch.nn.functional.normalize(
        torch.randn(D_MODEL, generator=torch.Generator().manual_seed(2)), dim=0
    )
    base = tiny_llama(seed=3, num_hidden_layers=3)
    tuned = edited(base, root / "planted", lambda model: plant(model, tiny_tokenizer, direction))
    return SimpleNamespace(
        root=root, base=base, tuned=tuned, corpora=corpora, direction=direction, tokenizer=tiny_tokenizer
    )


def attributed(world, tuned, view="diff", corpora=("general", "digits"), per_batch=512, bos=None, **options):
    fields = {"attribution_tokens": 800, "steps": 8, "differing": 0.1}
    config = DiffConfig(
        str(world.base),
        str(tuned),
        dictionary="",
        corpus=tuple(f"{name}={world.corpora[name]}" for name in corpora),
        run=RunOptions(out=world.root / "run"),
        attribution=AttributionOptions(**(fields | options)),
        models=ModelOptions(device="cpu", tokens_per_batch=per_batch),
    )
    pair = load_pair(world.base, tuned, config.models)
    texts = Texts(config.corpus, pair.tokenizer, CorpusOptions(prepend_bos=bos), pair.tuned.context)
    return attribute_pair(Method(dictionary_of(world.direction, view)), pair, SITE, texts, config)


@pytest.fixture(scope="module")
def found(world):
    return attributed(world, world.tuned)


def test_the_planted_latent_gets_the_gap(found):
    kl = found.found[0]
    assert kl.objective == "kl" and kl.gap > 0.05 and kl.units > 200 and kl.steps == 8
    assert abs(kl.incomplete) < 0.02
    assert found.causal_share[PLANTED] > 0.9
    # Both together write the change exactly.
    assert found.causal_share[[PLANTED, OPPOSITE]].sum() == pytest.approx(1 - kl.incomplete, abs=1e-3)
    assert kl.latents == pytest.approx(found.causal_share.sum()) and kl.bias == 0
    assert kl.latents + kl.bias + kl.error + kl.incomplete == pytest.approx(1)
    assert kl.top[0] == {"latent": PLANTED, "share": pytest.approx(found.causal_share[PLANTED])}


def test_putting_the_latent_in_and_taking_it_out_agrees(found):
    rows = found.found[0].verified
    assert [row["size"] for row in rows] == [1, 3, 10, 30]
    assert rows[0]["predicted"] == pytest.approx(found.causal_share[PLANTED])
    for row in rows[:1]:
        assert row["added"] > 0.9 and row["removed"] == pytest.approx(row["predicted"], abs=0.15)


def test_the_first_behaviour_is_the_planted_one(found):
    first = found.behaviours[0]
    assert PLANTED in first.latents[:2] and first.share > 0.7 and first.tokens > 10
    assert 0 < len(first.contexts) <= 5 and len(found.behaviours) <= 10
    for context in first.contexts:
        assert context["corpus"] == "digits" and context["kl"] > 0


def test_behaviours_of_all_predictions_have_the_shares_of_the_gap(world):
    everything = attributed(world, world.tuned, differing=1.0)
    for behaviour in everything.behaviours:
        assert behaviour.share == pytest.approx(everything.causal_share[behaviour.latents].sum(), rel=1e-3)
    shares = [behaviour.share for behaviour in everything.behaviours]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.7


def test_contexts_are_the_text_of_the_documents(world, found):
    rows = [json.loads(line)["text"] for line in Path(world.corpora["digits"]).read_text().splitlines()]
    for context in found.behaviours[0].contexts:
        text = context["before"] + context["token"] + context["after"]
        assert text.removeprefix("<s>").strip() in rows[context["document"]]


def test_a_crosscoder_and_small_batches_give_the_same(world, found):
    other = attributed(world, world.tuned, view="pair", per_batch=40)
    assert_close(other.causal_share, found.causal_share, atol=1e-4)
    assert other.found[0].gap == pytest.approx(found.found[0].gap, rel=1e-4)
    assert [one.latents for one in other.behaviours] == [one.latents for one in found.behaviours]


def test_a_pair_without_a_change_has_nothing_to_attribute(world):
    null = attributed(world, world.base)
    kl = null.found[0]
    assert kl.gap == 0 and kl.top == [] and kl.verified == [] and null.behaviours == []
    assert kl.latents == kl.bias == kl.error == kl.incomplete == 0
    assert not null.causal_share.any()


def test_a_change_that_the_dictionary_does_not_hold_is_its_error(world):
    def turn(model):
        add_noise(model, 0.01, 3)

    other = attributed(world, edited(world.base, world.root / "noise", turn), corpora=("letters",))
    assert other.found[0].gap > 0 and abs(other.causal_share[PLANTED]) < 0.2
    assert abs(other.found[0].error) > 0.5


def test_a_named_behaviour_goes_to_the_planted_latent(world):
    rng = np.random.default_rng(0)
    path = world.root / "answers.jsonl"
    rows = [
        {
            "prompt": " ".join(rng.choice(WORDS["digits"], 5)),
            "wanted": " the river",
            "unwanted": " jump zebras",
        }
        for _ in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = attributed(world, world.tuned, bos=False, behaviour=(f"river={path}",), steps=16)
    assert [one.objective for one in result.found] == ["kl", "river"]
    answers, share = result.found[1], result.by_behaviour["river"]
    assert answers.units == 12 and abs(answers.gap) > 0.01
    assert answers.gap == pytest.approx(answer_gap(world, rows), rel=1e-3)
    assert share[[PLANTED, OPPOSITE]].sum() == pytest.approx(1, abs=0.05)
    assert answers.verified[0]["added"] == pytest.approx(share[PLANTED], abs=0.2)
    null = attributed(world, world.base, behaviour=(f"river={path}",))
    assert null.found[1].gap == 0 and not null.by_behaviour["river"].any()


def answer_gap(world, rows):
    """The mean of [log p(wanted) - log p(unwanted)] of tuned minus base, with transformers alone.

    Only the first layer differs, so the base is the tuned model with the base's activations. Without a BOS, whose
    activations stay the base's, the other end is the tuned model.
    """
    means = []
    for folder in (world.base, world.tuned):
        model = load_hf(folder).double().requires_grad_(False)
        differences = []
        for row in rows:
            prompt = row["prompt"]
            start = len(world.tokenizer(prompt).input_ids)
            sums = []
            for answer in (row["wanted"], row["unwanted"]):
                ids = world.tokenizer(prompt + answer, return_tensors="pt").input_ids
                log_p = model(ids).logits[0, start - 1 : -1].log_softmax(-1)
                sums.append(float(log_p.gather(1, ids[0, start:, None]).sum()))
            differences.append(sums[0] - sums[1])
        means.append(np.mean(differences))
    return means[1] - means[0]


def test_an_adapter_is_attributed_as_its_merged_checkpoint(world):
    model = adapt(world.base, world.root / "adapter", lora())
    merged = world.root / "merged"
    shutil.copytree(world.base, merged)
    model.merge_and_unload().save_pretrained(merged)
    folders = (world.root / "adapter", merged)
    results = [attributed(world, folder, corpora=("digits",), attribution_tokens=200) for folder in folders]
    assert results[0].found[0].gap == pytest.approx(results[1].found[0].gap, rel=1e-3)
    assert_close(results[0].causal_share, results[1].causal_share, rtol=1e-2, atol=1e-3)


def test_columns_that_go_together_are_one_group_and_independent_ones_are_not():
    rng = np.random.default_rng(1)
    shared = rng.random((200, 2)) * (rng.random((200, 2)) < 0.2)
    noise = 0.02 * rng.random((200, 7))
    table = np.concatenate([shared[:, [0] * 4], shared[:, [1] * 3]], axis=1) + noise
    found = {tuple(group) for group in groups(np.concatenate([table, np.zeros((200, 1))], axis=1))}
    assert found == {(0, 1, 2, 3), (4, 5, 6)}
    sparse = rng.random((400, 12)) * (rng.random((400, 12)) < 0.05)
    assert all(len(group) == 1 for group in groups(sparse))
    assert groups(np.zeros((5, 3))) == []


@pytest.mark.parametrize(("share", "kept"), [(0.5, 2), (0.01, 1), (1.0, 3)])
def test_differing_predictions_are_those_of_largest_kl(share, kept):
    kl = np.array([0.1, 0.0, 0.5, 0.3])
    chosen = Differing(kl, share)._chosen
    assert chosen.sum() == kept and not chosen[1] and chosen[2]
