"""Random changes keep a fine-tune's sizes and lose its directions; α is found or refused."""

from __future__ import annotations

import math

import pytest
import torch

from helpers import assert_close, randomize
from pair_fixture import adapt, fine_tune, load_hf, lora, save
from palimpsest.errors import NumericsError, PairError
from palimpsest.models import load_model, load_pair
from palimpsest.models.spectrum import SpectrumNull, base_deltas, bisect_alpha
from palimpsest.options import ModelOptions

EMBEDDINGS = {"model.embed_tokens.weight", "lm_head.weight"}


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def base(request, tiny_llama):
    return tiny_llama(tie_word_embeddings=request.param, attention_bias=True)


@pytest.fixture
def tuned(base, tiny_tokenizer, tmp_path):
    return fine_tune(base, tmp_path / "tuned", tiny_tokenizer)


def weights(folder):
    return {name: p.detach() for name, p in load_hf(folder).named_parameters()}


def sorted_rows(matrix):
    return sorted(map(tuple, matrix.tolist()))


def test_sizes_are_kept_and_directions_are_not(base, tuned):
    pair = load_pair(base, tuned)
    deltas = base_deltas(pair)
    mine, other = weights(base), weights(tuned)
    assert deltas.keys() == mine.keys()
    null = SpectrumNull(pair.base, deltas, seed=1)
    for name, delta in deltas.items():
        assert_close(delta, other[name] - mine[name])
        found = null.rotated[name]
        assert_close(found.norm(), delta.norm())
        assert not torch.allclose(found, delta, atol=1e-3)
        if name in EMBEDDINGS:
            assert sorted_rows(found) == sorted_rows(delta)
        elif delta.dim() == 1:
            assert torch.equal(found.sort().values, delta.sort().values)
        else:
            assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(delta), atol=1e-5)
            # Neither side's directions are left: the entries are spread as a rotation spreads them.
            cosine = (found * delta).sum() / delta.norm().square()
            assert abs(cosine) < 6 / math.sqrt(delta.numel())


def test_rotations_are_uniform():
    """Columns of ΔW with one entry each come out with the moments of a uniform rotation, signs included."""
    from palimpsest.models.spectrum import _generator, _rotated

    delta = torch.zeros(6, 3)
    delta[0, 0] = 1.0
    drawn = torch.stack([_rotated(delta, _generator(seed, "weight")) for seed in range(3000)])
    assert drawn.mean(0).abs().max() < 0.04
    assert_close(drawn.square().mean(0), torch.full((6, 3), 1 / 18), atol=0.008, rtol=0)
    assert_close(_rotated(delta.T, _generator(5, "weight")), drawn[5].T)


def test_a_seed_gives_one_change(base, tuned):
    pair = load_pair(base, tuned)
    deltas = base_deltas(pair)
    first = SpectrumNull(pair.base, deltas, seed=1).rotated
    again = SpectrumNull(load_model(base), dict(reversed(deltas.items())), seed=1).rotated
    other = SpectrumNull(pair.base, deltas, seed=2).rotated
    for name in deltas:
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_move_by_alpha_and_come_back(base, tuned, dtype):
    pair = load_pair(base, tuned, ModelOptions(dtype=dtype))
    model = pair.base
    null = SpectrumNull(model, base_deltas(pair), seed=1)
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}

    def moved(alpha):
        with null.at(alpha):
            return {name: p.detach().clone() for name, p in model.model.named_parameters()}

    def check_restored():
        now = dict(model.model.named_parameters())
        assert now.keys() == before.keys()
        assert all(torch.equal(now[name], weight) for name, weight in before.items())

    assert all(torch.equal(weight, before[name]) for name, weight in moved(0.0).items())
    for name, weight in moved(0.7).items():
        assert weight.dtype == getattr(torch, dtype)
        expected = torch.add(before[name].float(), null.rotated[name], alpha=0.7)
        assert torch.equal(weight, expected.to(weight.dtype))
    check_restored()
    ids = torch.arange(30)[None]
    still = model.read(ids, ["resid_post.1"]).acts["resid_post.1"]
    for fault in (ValueError, KeyboardInterrupt):
        with pytest.raises(fault), null.at(1.0):
            assert not torch.equal(model.read(ids, ["resid_post.1"]).acts["resid_post.1"], still)
            raise fault
    check_restored()
    assert torch.equal(model.read(ids, ["resid_post.1"]).acts["resid_post.1"], still)


@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["lm_head"]}, {"use_dora": True}])
def test_an_adapter_counts_as_what_merging_it_adds(tiny_llama, tiny_tokenizer, tmp_path, extra):
    base = tiny_llama()
    merged = adapt(base, tmp_path / "adapter", lora(**extra)).merge_and_unload()
    full = save(merged, tmp_path / "merged", tiny_tokenizer)
    pair, reference = load_pair(base, tmp_path / "adapter"), load_pair(base, full)
    deltas, expected = base_deltas(pair), base_deltas(reference)
    assert deltas.keys() == expected.keys()
    assert ("lm_head.weight" in deltas) == ("modules_to_save" in extra)
    assert not any("norm" in name or "embed" in name for name in deltas)
    for name, delta in deltas.items():
        assert_close(delta, expected[name], atol=1e-5)

    null, plain = SpectrumNull(pair.base, deltas, 1), SpectrumNull(reference.base, deltas, 1)
    ids, site = torch.arange(30)[None], "resid_post.1"
    with torch.inference_mode():
        tuned = pair.tuned.read(ids, [site]).acts[site]
        before = pair.base.read(ids, [site]).acts[site]
        with null.at(0.5), plain.at(0.5):
            found = pair.base.read(ids, [site], head=True)
            wanted = reference.base.read(ids, [site], head=True)
            assert_close(found.acts[site], wanted.acts[site])
            logits = [
                model.head.logits(reading.head_input[0])
                for model, reading in ((pair.base, found), (reference.base, wanted))
            ]
            assert_close(*logits, atol=1e-5)
            assert not torch.allclose(found.acts[site], before, atol=1e-3)
    assert torch.equal(pair.base.read(ids, [site]).acts[site], before)
    assert torch.equal(pair.tuned.read(ids, [site]).acts[site], tuned)
    with pytest.raises(ValueError, match="base side"):
        SpectrumNull(pair.tuned, deltas, 1)


def test_added_vocabulary_is_left_out(tiny_llama, tiny_tokenizer, tmp_path):
    base = tiny_llama()
    bigger = load_hf(base)
    bigger.resize_token_embeddings(len(tiny_tokenizer) + 3, mean_resizing=False)
    randomize(bigger, seed=5)
    pair = load_pair(base, save(bigger, tmp_path / "bigger", tiny_tokenizer))
    deltas = base_deltas(pair)
    assert deltas["lm_head.weight"].shape == (len(tiny_tokenizer), 32)
    with SpectrumNull(pair.base, deltas, 1).at(1.0):
        pass

    # And the other way round: rows that only the base has stay what they are.
    pair = load_pair(tmp_path / "bigger", base)
    deltas = base_deltas(pair)
    before = pair.base.model.lm_head.weight.detach().clone()
    with SpectrumNull(pair.base, deltas, 1).at(1.0):
        now = pair.base.model.lm_head.weight.detach()
        assert torch.equal(now[-3:], before[-3:])
        assert sorted_rows(now[:-3] - before[:-3]) != sorted_rows(torch.zeros_like(now[:-3]))


def test_a_pair_held_one_at_a_time_gives_the_same_deltas(base, tuned):
    lean = load_pair(base, tuned, ModelOptions(one_at_a_time=True))
    found, expected = base_deltas(lean), base_deltas(load_pair(base, tuned))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_stacks_of_matrices_are_rotated_one_by_one():
    from palimpsest.models.spectrum import _generator, _randomized

    stack = torch.randn(3, 4, 6)
    found = _randomized(stack, _generator(0, "experts"), rows=False)
    assert_close(torch.linalg.svdvals(found), torch.linalg.svdvals(stack), atol=1e-5)


def test_what_cannot_be_randomised_is_refused(tiny_llama):
    base = tiny_llama()
    pair = load_pair(base, base)
    with pytest.raises(NumericsError, match="same weights"):
        base_deltas(pair)
    head = torch.ones_like(pair.base.model.lm_head.weight)
    for deltas in ({}, {"lm_head.weight": torch.zeros_like(head)}):
        with pytest.raises(NumericsError, match="same weights"):
            SpectrumNull(pair.base, deltas, 0)
    with pytest.raises(NumericsError, match="not finite"):
        SpectrumNull(pair.base, {"lm_head.weight": head * float("nan")}, 0)
    for deltas in (
        {"other.weight": head},
        {"lm_head.weight": torch.ones(400, 32)},
        {"lm_head.weight": head[0]},
    ):
        with pytest.raises(PairError, match="not changes of"):
            SpectrumNull(pair.base, deltas, 0)


def falling(alpha):
    return 0.15 + 0.85 / (1 + alpha**1.3)


@pytest.mark.parametrize("target", [0.16, 0.3, 0.577, 0.9, 0.99, 0.9995])
def test_alpha_is_found(target):
    asked = []
    alpha = bisect_alpha(lambda a: asked.append(a) or falling(a), target)
    assert abs(falling(alpha) - target) <= 0.002
    assert len(asked) <= 16
    assert alpha in asked


def test_alpha_is_found_through_noise_and_steps():
    noise = torch.randn(100, generator=torch.Generator().manual_seed(0)).tolist()
    alpha = bisect_alpha(lambda a: falling(a) + 0.01 * noise.pop(), 0.4)
    assert abs(falling(alpha) - 0.4) < 0.04
    alpha = bisect_alpha(lambda a: 0.9 if a < 3 else 0.2, 0.5)
    assert 2.9 < alpha < 3.1


@pytest.mark.parametrize("target", [0.1, 1.01])
def test_an_overlap_that_no_change_has_is_refused(target):
    with pytest.raises(NumericsError, match="the size of the fine-tune"):
        bisect_alpha(falling, target, what="size")


def test_an_overlap_that_is_no_number_is_refused():
    with pytest.raises(NumericsError, match="not a number"):
        bisect_alpha(lambda alpha: float("nan"), 0.5)
