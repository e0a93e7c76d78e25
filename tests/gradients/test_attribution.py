"""Integrated gradients against a dense model in float64, finite differences and their own completeness."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from helpers import assert_close, assert_not_close
from pair_fixture import fine_tune, load_hf
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.diff.attribution import integrate
from palimpsest.diff.attribution.integrate import Integrator, Item, Sums
from palimpsest.diff.methods import Method
from palimpsest.diff.text import Texts
from palimpsest.models import load_pair
from palimpsest.options import CorpusOptions, ModelOptions
from random_dictionaries import D_MODEL, dense_codes, make
from text_fixture import write_words

SITE, LAYER = "resid_post.1", 1
OPTIONS = ModelOptions(device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory, tiny_llama, tiny_tokenizer):
    """A base and a fine-tune of three layers, with one padded batch of text."""
    root = tmp_path_factory.mktemp("attribution")
    base = tiny_llama(seed=1, num_hidden_layers=3, hidden_size=D_MODEL, num_attention_heads=2)
    tuned = fine_tune(base, root / "tuned", tiny_tokenizer, scale=0.1)
    texts = Texts([str(write_words(root / "words.jsonl"))], tiny_tokenizer, CorpusOptions(max_length=40), 512)
    batch = next(Corpus(root / "words.jsonl", tiny_tokenizer, max_length=40).batches(300))
    return SimpleNamespace(
        base=base, tuned=tuned, pair=load_pair(base, tuned, OPTIONS), texts=texts, batch=batch
    )


def item_of(world, sign=False):
    """Every measured prediction but a few, so that which ones count matters."""
    places = world.texts.places(world.batch)
    flat = places.flat[places.measured & (places.flat % world.batch.input_ids.shape[1] > 0)][5:]
    signs = torch.where(torch.arange(len(flat)) % 3 == 0, -1.0, 1.0) if sign else None
    return Item(0, world.batch, places, flat - 1, signs)


def dense_path(world):
    """Site activations of base and tuned, float64, with hooks of our own on transformers' models."""
    acts, logits = [], torch.empty(0)
    models = [load_hf(folder).double() for folder in (world.base, world.tuned)]
    for model in models:
        layer = model.model.layers[LAYER]
        handle = layer.register_forward_hook(lambda _m, _i, out: acts.append(first(out).detach()))
        logits = model(world.batch.input_ids).logits.detach()
        handle.remove()
    return models[1], acts, logits


def first(output):
    return output[0] if isinstance(output, tuple) else output


def dense_objective(model, hidden, logits, item):
    """F of each prediction by the definition, from all logits at once."""
    layer = model.model.layers[LAYER]
    handle = layer.register_forward_hook(
        lambda _m, _i, out: (hidden, *out[1:]) if isinstance(out, tuple) else hidden
    )
    log_q = model(item.batch.input_ids).logits.flatten(0, 1)[item.before].log_softmax(-1)
    handle.remove()
    if item.sign is None:
        log_p = logits.flatten(0, 1)[item.before].log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    return -item.sign * log_q[torch.arange(len(item.ids)), item.ids]


def dense_gradients(world, item, mask, steps):
    """The mean of ∂F/∂h over midpoints, by autograd through the whole model in float64."""
    model, (base, tuned), logits = dense_path(world)
    edited = torch.zeros(base.shape[:2], dtype=torch.bool).flatten()
    edited[item.places.flat] = True
    step = (tuned - base) * edited.view(*base.shape[:2], 1)
    total = torch.zeros_like(base)
    for index in range(steps):
        hidden = (base + (index + 0.5) / steps * step).requires_grad_()
        value = dense_objective(model, hidden, logits, item)[mask].sum()
        total += torch.autograd.grad(value, hidden)[0] / steps
    ends = [dense_objective(model, base + alpha * step, logits, item).detach() for alpha in (0, 1)]
    return total.flatten(0, 1)[item.places.flat], torch.stack(ends, 1)


@pytest.mark.parametrize("sign", [False, True], ids=["kl", "answers"])
def test_gradients_and_values_are_those_of_the_dense_model(world, sign):
    item = item_of(world, sign)
    some = torch.arange(len(item.before)) % 4 == 1
    masks = [torch.ones_like(some), some]
    integrator = Integrator(Method(make(view="diff")), world.pair, SITE, steps=3)
    path = integrator.path(item)
    found = integrator.gradients(path, item, masks)
    values = integrator.values(path, item, [torch.zeros_like(path.step), path.step])
    for gradient, mask in zip(found, masks, strict=True):
        expected, ends = dense_gradients(world, item, mask, 3)
        assert_close(gradient.double(), expected, rtol=1e-3, atol=2e-6)
        assert_close(values, ends, rtol=1e-4, atol=1e-5)
    assert_not_close(found[0], found[1])


@pytest.mark.parametrize("sign", [False, True], ids=["kl", "answers"])
def test_a_gradient_agrees_with_finite_differences(world, sign):
    item = item_of(world, sign)
    integrator = Integrator(Method(make(view="diff")), world.pair, SITE, steps=1)
    path = integrator.path(item)
    (gradient,) = integrator.gradients(path, item, [torch.ones(len(item.before), dtype=torch.bool)])
    for seed in range(3):
        direction = torch.randn(path.step.shape, generator=torch.Generator().manual_seed(seed))
        variants = [0.5 * path.step + side * 2e-3 * direction for side in (1, -1)]
        up, down = integrator.values(path, item, variants).sum(0)
        assert float((up - down) / 4e-3) == pytest.approx(float((gradient * direction).sum()), rel=0.02)


@pytest.mark.parametrize("view", ["pair", "diff", "tuned", "base"])
def test_shares_are_those_of_dense_entries_and_add_up(world, view):
    dictionary = make(view=view)
    item, method = item_of(world), Method(dictionary)
    integrator = Integrator(method, world.pair, SITE, steps=2)
    path = integrator.path(item)
    (gradient,) = integrator.gradients(path, item, [torch.ones(len(item.before), dtype=torch.bool)])
    sums = Sums(method)
    sums.add(path, gradient, integrator.shares(path, gradient), torch.zeros(1, 2))
    base = path.base.flatten(0, 1)[path.flat]
    tuned = base + path.step
    if view == "pair":
        entries = dense_codes(dictionary, torch.stack([base, tuned], 1))
        change, bias = (
            dictionary.W_dec[:, 1] - dictionary.W_dec[:, 0],
            dictionary.b_dec[1] - dictionary.b_dec[0],
        )
    else:
        change = dictionary.W_dec[:, 0]
        bias = dictionary.b_dec[0] if view == "diff" else torch.zeros(D_MODEL)
        read = [path.step] if view == "diff" else [tuned, base]
        entries = dense_codes(dictionary, read[0])
        entries = entries if view == "diff" else entries - dense_codes(dictionary, read[1])
    expected = -torch.einsum("tl,ld,td->l", entries, change.double(), gradient.double())
    assert_close(sums.latents, expected, rtol=1e-3, atol=1e-6)
    assert sums.bias == pytest.approx(-float((gradient @ bias).sum()), rel=1e-4)
    rest = path.step.double() - entries @ change.double() - bias.double()
    error = -float((gradient.double() * rest).sum())
    assert sums.whole == pytest.approx(float(expected.sum()) + sums.bias + error, rel=1e-4)


def test_the_parts_make_the_gap_as_the_steps_grow(world):
    item = item_of(world)
    missed = []
    for steps in (1, 4, 32):
        integrator = Integrator(Method(make(view="diff")), world.pair, SITE, steps)
        path = integrator.path(item)
        (gradient,) = integrator.gradients(path, item, [torch.ones(len(item.before), dtype=torch.bool)])
        ends = integrator.values(path, item, [torch.zeros_like(path.step), path.step]).sum(0)
        missed.append(abs(1 + float((gradient * path.step).sum() / (ends[0] - ends[1]))))
    assert missed[0] > missed[1] > missed[2] and missed[2] < 1e-3


def test_logits_in_chunks_change_nothing(world, monkeypatch):
    item = item_of(world)
    assert len(item.before) > 130
    masks = [torch.ones(len(item.before), dtype=torch.bool)]
    integrator = Integrator(Method(make(view="diff")), world.pair, SITE, steps=1)
    path = integrator.path(item)
    (whole,) = integrator.gradients(path, item, masks)
    monkeypatch.setattr(integrate, "LOGIT_BYTES", 1)
    assert_close(integrator.gradients(path, item, masks)[0], whole, rtol=1e-5, atol=1e-7)


def test_parameters_collect_no_gradients_and_stay_trainable(world):
    item, model = item_of(world), world.pair.tuned.model
    before = [parameter.requires_grad for parameter in model.parameters()]
    integrator = Integrator(Method(make(view="diff")), world.pair, SITE, steps=1)
    with torch.no_grad():
        integrator.gradients(integrator.path(item), item, [torch.ones(len(item.before), dtype=torch.bool)])
    assert any(before) and [parameter.requires_grad for parameter in model.parameters()] == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_in_bfloat16_give_about_the_same(world):
    pair = load_pair(world.base, world.tuned, ModelOptions(device="cpu", dtype="bfloat16"))
    item, found = item_of(world), []
    for one in (world.pair, pair):
        integrator = Integrator(Method(make(view="diff")), one, SITE, steps=2)
        path = integrator.path(item)
        (gradient,) = integrator.gradients(path, item, [torch.ones(len(item.before), dtype=torch.bool)])
        assert gradient.dtype == torch.float32
        found.append(gradient.flatten().numpy())
    assert np.corrcoef(*found)[0, 1] > 0.98


def test_a_dictionary_that_gives_nan_is_named(world):
    dictionary = Dictionary(D_MODEL, 8, activation="topk", k=2, view="diff")
    method = Method(dictionary)
    method.change = torch.full_like(method.change, torch.nan)
    with pytest.raises(Exception, match="dictionary gives NaN or infinity at .*document"):
        Integrator(method, world.pair, SITE, steps=1).path(item_of(world))
