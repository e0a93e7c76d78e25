"""Patching where the answer is known: perfect dictionaries, a planted direction, nothing at all, and bad input."""

from __future__ import annotations

import json
from types import SimpleNamespace
from zlib import crc32

import numpy as np
import pytest
import torch

from audit_world import edited, plant, write_corpus
from helpers import assert_close
from pair_fixture import fine_tune
from palimpsest.dictionaries import Dictionary
from palimpsest.diff.config import DiffConfig, PatchOptions
from palimpsest.diff.methods import Method
from palimpsest.diff.patching import Candidates, effects, patch_pair
from palimpsest.diff.patching.estimate import Totals
from palimpsest.diff.patching.sets import curve, halves, plan
from palimpsest.diff.text import Texts
from palimpsest.errors import ConfigError, CorpusError, NumericsError, SiteError
from palimpsest.evaluate.estimate import Settings
from palimpsest.evaluate.sums import DocumentTable
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions, RunOptions

SITE, D_MODEL, LATENTS, PLANTED = "resid_post.0", 32, 96, 17
KINDS = {
    "crosscoder": ("pair", 2),
    "diff-sae": ("diff", 1),
    "tuned-sae": ("tuned", 1),
    "base-sae": ("base", 1),
}
WORDS = [str(n) for n in range(7, 4000, 211)]


@pytest.fixture(scope="module")
def base(tiny_llama):
    return tiny_llama()


@pytest.fixture(scope="module")
def tuned(base, tmp_path_factory, tiny_tokenizer):
    return load_pair(base, fine_tune(base, tmp_path_factory.mktemp("tuned"), tiny_tokenizer))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("text") / "digits.jsonl", WORDS, documents=40)


def config(**changes):
    return DiffConfig(
        "base",
        "tuned",
        dictionary="d",
        corpus=("c",),
        run=RunOptions(out="out"),
        resamples=300,
        patching=PatchOptions(**{"random_sets": 2} | changes),
        models=ModelOptions(tokens_per_batch=400),
    )


def texts_of(pair, corpus, **options):
    return Texts([corpus], pair.tokenizer, CorpusOptions(**{"max_length": 48} | options), 512)


def identity(kind):
    """Every signed direction, all of them kept: whatever it reads, it reconstructs; a latent is a neuron's sign."""
    view, models = KINDS[kind]
    width = models * D_MODEL
    made = Dictionary(D_MODEL, 2 * width, k=width, models=models, view=view)
    signed = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        made.W_dec.copy_(signed.view(-1, models, D_MODEL))
        made.W_enc.copy_(signed.T.reshape(models, D_MODEL, -1))
    return made.requires_grad_(False)


def everything(made, rankings=None, seed=0):
    """All latents alive, of equal mass, in a random order."""
    order = np.random.default_rng(seed).permutation(made.n_latents)
    rankings = {"activation_change": order} if rankings is None else rankings
    return Candidates(
        np.arange(made.n_latents), np.ones(made.n_latents), rankings, np.zeros(made.d_model, np.float32)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_dictionary_recovers_everything(kind, tuned, corpus):
    made = identity(kind)
    texts = texts_of(tuned, corpus, all_positions=True)
    found = patch_pair(Method(made), tuned, SITE, texts, everything(made), config())
    gap = found.gap["all"]
    assert gap > 1e-3 and found.row("none").kl == gap and found.row("none").share == 0
    for name in ("raw", "all", "all+bias"):
        assert abs(found.row(name).kl) < 1e-3 * gap and found.row(name).share == pytest.approx(1, abs=1e-3)
    assert found.row("error").share == pytest.approx(0, abs=1e-3)
    for name in ("raw", "all+bias"):
        assert found.row(name, removed=True).share == pytest.approx(1, abs=1e-3)
    scrambled = [row.share for row in found.added if row.set.startswith("directions:")]
    assert len(scrambled) == 2 and max(scrambled) < 0.5
    sizes = [row.size for row in found.added if row.set.startswith("top:")]
    assert sizes == curve(made.n_latents)
    top = found.row("top:activation_change")
    assert top.size == made.n_latents and top.share == pytest.approx(1, abs=1e-3)


def test_a_wrong_bias_is_all_that_bias_adds(tuned, corpus):
    """A dictionary that writes nothing but the negative of the mean difference moves away from the tuned model."""
    made = identity("diff-sae")
    made.W_enc.zero_()
    texts = texts_of(tuned, corpus)
    mean = np.full(D_MODEL, 0.3, np.float32)
    made.b_dec.fill_(0.3)
    chosen = everything(made)
    found = patch_pair(
        Method(made), tuned, SITE, texts, Candidates(chosen.alive, chosen.mass, {}, mean), config()
    )
    assert found.row("bias").kl == found.row("all+bias").kl == found.row("mean").kl != found.gap["all"]
    assert found.row("all").kl == found.gap["all"]
    assert found.row("bias").share < -0.05
    assert {row.set for row in found.removed} == {"all", "all+bias", "raw"}


def planted_crosscoder(direction):
    """Latent 17 is the planted direction; the others fire as often, and what they write is in no model."""
    torch.manual_seed(3)
    made = Dictionary(D_MODEL, LATENTS, activation="relu", models=2, view="pair")
    with torch.no_grad():
        made.W_dec[:, 1] = made.W_dec[:, 0] + 0.1 * torch.randn(LATENTS, D_MODEL)
        made.W_dec[PLANTED, 0], made.W_dec[PLANTED, 1] = 0, direction
        reader = direction / direction.square().sum()
        made.W_enc[0, :, PLANTED], made.W_enc[1, :, PLANTED] = -reader, reader
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def planted(base, tmp_path_factory, corpus, tiny_tokenizer):
    """A fine-tune that writes one direction on digits, a crosscoder that knows it, and what patching finds."""
    torch.manual_seed(2)
    direction = torch.nn.functional.normalize(torch.randn(D_MODEL), dim=0)
    folder = edited(
        base, tmp_path_factory.mktemp("planted") / "tuned", lambda hf: plant(hf, tiny_tokenizer, direction)
    )
    pair, made = load_pair(base, folder), planted_crosscoder(direction)
    method, texts = Method(made), texts_of(load_pair(base, folder), corpus)
    order = np.concatenate([[PLANTED], np.delete(np.arange(LATENTS), PLANTED)])
    acts = [pair.side(side).read(texts_ids(texts), [SITE]).acts[SITE][0, 1:] for side in ("base", "tuned")]
    codes = made.encode(torch.stack(acts, 1)).dense()
    mass = (codes.sum(0) * method.change.norm(dim=1)).numpy()
    chosen = Candidates(
        np.flatnonzero(mass > 0), mass, {"attribution": order[mass[order] > 0]}, np.zeros(D_MODEL, np.float32)
    )
    found = patch_pair(method, pair, SITE, texts, chosen, config(top_share=0.02, random_sets=4))
    return SimpleNamespace(pair=pair, method=method, texts=texts, chosen=chosen, found=found)


def texts_ids(texts):
    first = next(one for one in texts.corpora[0].documents() if crc32(one.token_ids.tobytes()) % 2 == 0)
    return torch.from_numpy(first.token_ids).long()[None]


def test_the_planted_latent_is_the_cause(planted):
    found = planted.found
    assert PLANTED in planted.chosen.alive and found.gap["all"] > 0.01
    rows = {row.size: row for row in found.added if row.set == "top:attribution"}
    assert rows[1].share == pytest.approx(1, abs=0.05)
    assert found.row("best:attribution").share > 0.9
    assert found.row("worst:attribution").share < 0.1
    others = [row.share for row in found.added if row.set.startswith(("random:", "directions:"))]
    # A random set of that weight holds the planted latent now and then.
    assert len(others) == 8 and sorted(others)[-2] < 0.4 and np.median(others) < 0.1
    # Taken out of the tuned model, it leaves what the base's activations give, but for the unedited BOS.
    assert found.row("best:attribution", removed=True).share == pytest.approx(1, abs=0.1)
    assert found.row("raw", removed=True).share == pytest.approx(1, abs=0.01)


def test_intervals_hold_their_share(planted):
    for row in planted.found.added + planted.found.removed:
        assert row.ci is not None and row.ci[0] <= row.share <= row.ci[1]
    wide = [row.ci[1] - row.ci[0] for row in planted.found.added if row.set == "worst:attribution"]
    assert 0 < wide[0] < 2
    assert planted.found.row("none").ci == (0, 0)


def test_an_interval_covers_the_truth_as_often_as_it_says():
    """The bootstrap of a ratio of sums over documents of very different lengths, against a known share."""
    rng, truth, inside, runs = np.random.default_rng(0), 0.7, 0, 120
    variants = plan(everything(identity("diff-sae"), {}), PatchOptions(), 0, template=False, sets={})[:2]
    for _ in range(runs):
        tokens = rng.integers(5, 200, 30)
        none = tokens * rng.gamma(4, 0.25, 30)
        kl = none * (1 - truth) * rng.gamma(4, 0.25, 30)
        width = len(effects.COLUMNS) + 2 * len(variants)
        sums = np.zeros((30, width))
        sums[:, 0], sums[:, len(effects.COLUMNS)], sums[:, len(effects.COLUMNS) + 1] = tokens, none, kl
        table = DocumentTable(np.arange(30), sums)
        totals = Totals(table, variants, ["c"], Settings(0.9, 300, 0), moved=True)
        lo, hi = totals.rows("all")[1].ci
        inside += lo <= truth <= hi
    assert 0.8 <= inside / runs <= 0.97


@pytest.mark.parametrize("seed", range(3))
def test_identical_models_have_no_share(base, corpus, seed):
    pair = load_pair(base, base)
    made = Dictionary(D_MODEL, LATENTS, k=4, models=2, view="pair")
    found = patch_pair(
        Method(made), pair, SITE, texts_of(pair, corpus), everything(made, seed=seed), config()
    )
    assert abs(found.gap["all"]) < 1e-6 and abs(found.base_kl["all"]) < 1e-6
    assert all(row.share is None and row.ci is None for row in found.added + found.removed)
    assert all(set(row.by_corpus.values()) == {None} for row in found.added)
    assert "no KL gap" in found.notes[0]


def test_greedy_continuations(tuned, base, corpus):
    """With a perfect dictionary the patched model is the tuned one; base and tuned are those of transformers."""
    made = identity("diff-sae")
    texts = texts_of(tuned, corpus, all_positions=True)
    found = patch_pair(Method(made), tuned, SITE, texts, everything(made), config(generate=2))
    assert len(found.samples) == 2
    sample, tokenizer = found.samples[0], tuned.tokenizer
    first = next(one for one in texts.corpora[0].documents() if crc32(one.token_ids.tobytes()) % 2 == 0)
    prompt = torch.from_numpy(first.token_ids[:32]).long()[None]
    assert sample["prompt"] == tokenizer.decode(prompt[0]) and sample["corpus"] == "digits"
    for side in ("base", "tuned"):
        made_by = tuned.side(side).model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
        )
        assert sample[side] == tokenizer.decode(made_by[0, prompt.shape[1] :])
    assert sample["patched"] == sample["tuned"] != sample["base"]


def test_halves_and_curves():
    alive = np.arange(100)
    by_norm, by_nu = alive[::-1].copy(), np.roll(alive, 7)[:95]
    chosen = Candidates(
        alive, np.ones(100), {"delta_norm": by_norm, "nu": by_nu, "few": alive[:1]}, np.zeros(2, np.float32)
    )
    found = halves(chosen, 0.08)
    assert found["delta_norm"][0].tolist() == [99, 98, 97, 96]
    assert found["delta_norm"][1].tolist() == [95, 94, 93, 92]
    assert "few" not in found
    # The top by Δnorm is 92 to 99; by ν 93 … 99 come first and 92 is not ranked: equal halves of those.
    assert [half.tolist() for half in found["nu|delta_norm"]] == [[93, 94, 95], [96, 97, 98]]
    assert [len(half) for half in halves(chosen, 0.001)["nu"]] == [1, 1]
    assert [len(half) for half in halves(chosen, 1.0)["nu"]] == [47, 47]
    assert [curve(n) for n in (0, 1, 2, 4, 5, 64, 300)] == [
        [],
        [1],
        [1, 2],
        [1, 4],
        [1, 4, 5],
        [1, 4, 16, 64],
        [1, 4, 16, 64, 256, 300],
    ]


def test_random_sets_have_the_mass_of_the_best_half():
    rng = np.random.default_rng(1)
    alive, mass = np.arange(500, 1500), rng.pareto(1.5, 2000)
    chosen = Candidates(alive, mass, {"nu": rng.permutation(alive)}, np.zeros(2, np.float32))
    variants = plan(chosen, PatchOptions(top_share=0.2, random_sets=5), 0, template=True, sets={})
    best = next(one for one in variants if one.name == "best:nu")
    drawn = [one for one in variants if one.name == "random:nu" and not one.removed]
    assert [one.seed for one in drawn] == [0, 1, 2, 3, 4]
    assert len({tuple(one.latents) for one in drawn}) == 5
    for one in drawn:
        assert set(one.latents) <= set(alive) and len(set(one.latents)) == one.size
        wanted, made = mass[best.latents].sum(), mass[one.latents].sum()
        assert abs(made - wanted) <= abs(made - mass[one.latents[-1]] - wanted)
        assert abs(made - wanted) <= mass[alive].max()
    scrambled = [one for one in variants if one.name == "directions:nu"]
    assert all(np.array_equal(one.latents, best.latents) for one in scrambled)
    assert len({one.scramble for one in scrambled}) == 5 and not any(one.removed for one in scrambled)
    again = plan(chosen, PatchOptions(top_share=0.2, random_sets=5), 0, template=True, sets={})
    other = plan(chosen, PatchOptions(top_share=0.2, random_sets=5), 1, template=True, sets={})
    same = [
        all(np.array_equal(a.latents, b.latents) for a, b in zip(variants, plan_, strict=True) if a.seed == 0)
        for plan_ in (again, other)
    ]
    assert same == [True, False]


def test_random_directions_are_as_long_as_the_changes(tuned, corpus):
    made = identity("diff-sae")
    texts = texts_of(tuned, corpus)
    batch = next(iter(texts.pass_over(500, 400, "even")))[1]
    patcher = effects.Patcher(Method(made), tuned, SITE, texts, np.zeros(D_MODEL, np.float32))
    step = patcher.read(batch)
    chosen = everything(made, {"nu": np.array([3, 5])})
    variants = plan(chosen, PatchOptions(top_share=1.0, random_sets=2), 0, template=False, sets={})
    one, two = (patcher.change(step, v) for v in variants if v.name == "directions:nu")
    alone = patcher.change(step, next(v for v in variants if v.name == "best:nu"))
    assert_close(one.norm(dim=1), alone.norm(dim=1), rtol=1e-4)
    assert torch.linalg.matrix_rank(one) == 1 and not torch.allclose(one, two)
    assert (torch.nn.functional.cosine_similarity(one, alone, dim=1).abs() < 0.9).all()


def test_a_text_without_markup_has_no_template_row(tuned, tmp_path):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps({"text": f"seven apples and {n} pears"}) + "\n" for n in range(8)))
    made = identity("diff-sae")
    texts = texts_of(tuned, str(path))
    found = patch_pair(Method(made), tuned, SITE, texts, everything(made), config())
    with pytest.raises(KeyError):
        found.row("template")
    assert 0 < found.documents < 8 and found.row("all").ci is None and "too few" in found.notes[0]
    assert set(found.predictions) == {"all"}


def test_first_tokens_need_answers(tuned, corpus):
    made = identity("diff-sae")
    texts = texts_of(tuned, corpus)
    with pytest.raises(CorpusError, match="--dialogue"):
        patch_pair(Method(made), tuned, SITE, texts, everything(made), config(positions=("first",)))


def test_first_tokens_alone(tuned, tmp_path):
    path = tmp_path / "chat.jsonl"
    answer = {"role": "assistant", "content": "the miller counts"}
    rows = [{"messages": [{"role": "user", "content": f"Seven or {n}?"}, answer]} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = identity("diff-sae")
    texts = texts_of(tuned, str(path))
    found = patch_pair(
        Method(made), tuned, SITE, texts, everything(made), config(positions=("first",), first=2)
    )
    assert found.predictions == {"first": 2 * found.documents} and 0 < found.documents < 12
    assert {row.positions for row in found.added} == {"first"}
    assert found.row("template", "first").share is not None


def test_sets_by_hand(tuned, corpus):
    made = identity("diff-sae")
    texts, chosen = texts_of(tuned, corpus), everything(made, {})
    few = Candidates(np.arange(10), chosen.mass, {}, chosen.mean_difference)
    method = Method(made)
    found = patch_pair(method, tuned, SITE, texts, few, config(), sets={"mine": [4, 4, 2]})
    assert found.row("mine").size == 2 and found.row("mine", removed=True).size == 2
    for sets, message in (
        ({"mine": list(range(11))}, "larger than the alive"),
        ({"mine": []}, "no latents"),
        ({"mine": [12]}, "no latents"),
        ({"raw": [1]}, "measured anyway"),
    ):
        with pytest.raises(ConfigError, match=message):
            patch_pair(method, tuned, SITE, texts, few, config(), sets=sets)


def test_nan_in_the_dictionary_is_named(tuned, corpus):
    made = identity("diff-sae")
    made.W_dec[5] = torch.nan
    with pytest.raises(NumericsError, match="dictionary gives NaN.*document"):
        patch_pair(Method(made), tuned, SITE, texts_of(tuned, corpus), everything(made), config())


def test_nan_in_a_model_is_named(base, corpus, tmp_path, tiny_tokenizer):
    pair, made = load_pair(base, fine_tune(base, tmp_path / "tuned", tiny_tokenizer)), identity("diff-sae")
    pair.tuned.model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NumericsError, match="predictions of a model.*document"):
        patch_pair(Method(made), pair, SITE, texts_of(pair, corpus), everything(made), config())


def test_nan_above_the_site_is_named(tuned, corpus, monkeypatch):
    """Activations that are too large for what is above the site, as in float16."""
    made, run = identity("diff-sae"), effects.UpperHalf.run
    made.b_dec.fill_(1e9)

    def overflowing(self, input_ids, hidden):
        return torch.where(hidden.abs().amax(-1, keepdim=True) > 1e8, torch.inf, run(self, input_ids, hidden))

    monkeypatch.setattr(effects.UpperHalf, "run", overflowing)
    with pytest.raises(NumericsError, match="patched activations of 'bias'.*document"):
        patch_pair(Method(made), tuned, SITE, texts_of(tuned, corpus), everything(made), config())


def test_a_site_that_is_not_there(tuned, corpus):
    made = identity("diff-sae")
    with pytest.raises(SiteError, match="no site"):
        patch_pair(Method(made), tuned, "resid_post.9", texts_of(tuned, corpus), everything(made), config())
