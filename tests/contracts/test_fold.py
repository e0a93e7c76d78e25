"""Folding scales and norms changes units, not the function; a crosscoder is an SAE of other dimensions."""

import pytest
import torch

from palimpsest.dictionaries import Dictionary
from palimpsest.dictionaries.fold import fold, fold_scale, folded
from palimpsest.dictionaries.native import FIELDS, build
from random_dictionaries import (
    D_MODEL,
    LATENTS,
    PARTITION,
    RULES,
    VIEWS,
    activations,
    dense_codes,
    dense_output,
    make,
    pre_activations,
)

SCALES = {"unscaled": None, "one scale": (0.37, 0.37), "two scales": (0.37, 2.4)}
CASES = [
    (rule, view, scale)
    for rule in RULES
    for view in ("base", "pair")
    for scale in SCALES
    if not (scale == "two scales" and view == "base")
]


def untied(activation, view, **extra):
    """Decoder rows of very different length in the two models, in float64."""
    made = make(activation, view, dtype=torch.float64, **extra)
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(LATENTS, made.models, 1, dtype=torch.float64) * 3 + 0.1)
        if extra.get("shared"):
            rows = list(made.partition["shared"])
            made.W_dec[rows, 1] = made.W_dec[rows, 0]
    return made


def scales(made, name):
    return None if SCALES[name] is None else torch.tensor(SCALES[name][: made.models], dtype=torch.float64)


def fields_of(made):
    return {name: value for name, value in made.describe().items() if name in FIELDS}


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize(("activation", "view", "scale"), CASES)
def test_folded_equals_unfolded(activation, view, scale, subtract):
    made = untied(activation, view, apply_b_dec_to_input=subtract)
    s = scales(made, scale)
    after = folded(made, scale=s)
    x = activations(made)
    per_model = torch.ones(made.models, dtype=torch.float64) if s is None else s
    shape = (-1, made.models, D_MODEL)
    seen = (x.view(shape) * per_model[:, None]).view(x.shape)

    norms = made.W_dec.norm(dim=2)
    before = dense_codes(made, seen, weight=norms.sum(1))
    relative = per_model if activation == "topk" else torch.ones_like(per_model)
    units = (norms * relative / relative.log().mean().exp() / per_model).sum(1)
    torch.testing.assert_close(after.encode(x).dense(), before * units, atol=1e-11, rtol=1e-11)
    expected = dense_output(made, before, seen.shape).view(shape) / per_model[:, None]
    torch.testing.assert_close(after(x)[0], expected.view(x.shape), atol=1e-11, rtol=1e-11)

    if activation != "topk" or scale != "two scales":
        torch.testing.assert_close(after.decoder_norms().sum(1), torch.ones(LATENTS, dtype=torch.float64))
        again = folded(after)
        torch.testing.assert_close(again.state_dict(), after.state_dict(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("view", ["base", "pair"])
def test_a_running_threshold_is_in_units_of_the_weighted_activation(view, scale):
    made = untied("batch_topk", view)
    if view == "base" and scale == "two scales":
        pytest.skip("one model has one scale")
    s = scales(made, scale)
    weights = {**made.state_dict(), "threshold": torch.tensor(0.9)}
    after = build(fields_of(made), fold(fields_of(made), weights, scale=s), "the test")
    per_model = torch.ones(made.models, dtype=torch.float64) if s is None else s
    x = activations(made)
    seen = (x.view(-1, made.models, D_MODEL) * per_model[:, None]).view(x.shape)
    pre = pre_activations(made, seen) + made.b_enc
    kept = (pre > 0) & (pre * made.W_dec.norm(dim=2).sum(1) > torch.tensor(0.9).double())
    assert 0 < kept.sum() < (pre > 0).sum()
    assert torch.equal(after.encode(x).dense() > 0, kept)
    if scale != "two scales":
        torch.testing.assert_close(
            after.threshold, (torch.tensor(0.9).double() / per_model[0]).expand(LATENTS)
        )


@pytest.mark.parametrize("activation", RULES)
def test_rows_without_length(activation):
    made = untied(activation, "pair")
    made.W_dec[5], made.W_dec[6, 0] = 0, 0
    after = folded(made)
    x = activations(made)
    before = dense_codes(made, x, weight=made.W_dec.norm(dim=2).sum(1))
    torch.testing.assert_close(after(x)[0], dense_output(made, before, x.shape), atol=1e-11, rtol=1e-11)
    assert (after.W_dec[5] == 0).all() and after.decoder_norms()[6].tolist() == [0, pytest.approx(1)]
    if activation in ("topk", "batch_topk"):
        assert (after.encode(x).dense()[:, 5] == 0).all()
    else:
        assert torch.equal(after.W_enc[..., 5], made.W_enc[..., 5])


@pytest.mark.parametrize("activation", RULES)
def test_a_scale_alone_keeps_the_activations(activation):
    made = untied(activation, "pair")
    s = torch.tensor([0.4, 1.7], dtype=torch.float64)
    after = build(fields_of(made), fold_scale(made.state_dict(), s), "the test")
    x = activations(made)
    torch.testing.assert_close(after.encode(x).dense(), made.encode(x * s[:, None]).dense())
    torch.testing.assert_close(after(x)[0] * s[:, None], made(x * s[:, None])[0])


def test_bound_latents_stay_bound():
    after = folded(untied("relu", "pair", **PARTITION), scale=torch.tensor([0.4, 1.7]))
    assert after.partition["shared"] == range(7, 13)
    torch.testing.assert_close(after.decoder_norms().sum(1), torch.ones(LATENTS, dtype=torch.float64))


@pytest.mark.parametrize("activation", RULES)
def test_a_crosscoder_of_one_model_is_the_sae(activation):
    made = make(activation)
    x = activations(made)
    sae, codes = made(x)
    crossed, same = made(x[:, None])
    assert crossed.shape == (*x.shape[:1], 1, D_MODEL) and torch.equal(crossed[:, 0], sae)
    assert torch.equal(codes.values, same.values) and torch.equal(codes.indices, same.indices)
    by_hand = dense_codes(made, x).float() @ made.W_dec[:, 0] + made.b_dec[0]
    torch.testing.assert_close(sae, by_hand, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("view", [view for view in VIEWS if view != "pair"])
def test_what_one_model_reads_does_not_depend_on_the_view(view):
    made, base = make("batch_topk", view), make("batch_topk", "base")
    x = activations(made)
    assert torch.equal(made(x)[0], base(x)[0])


@pytest.mark.parametrize("activation", RULES)
def test_a_crosscoder_of_two_is_the_sae_of_both_side_by_side(activation):
    pair = make(activation, "pair", dtype=torch.float64)
    with torch.no_grad():
        pair.W_dec.div_(2 * pair.W_dec.norm(dim=2, keepdim=True))
    sae = Dictionary(2 * D_MODEL, LATENTS, activation=activation, k=RULES[activation]).double()
    weights = {
        **pair.state_dict(),
        "W_enc": pair.W_enc.view(1, 2 * D_MODEL, LATENTS),
        "W_dec": pair.W_dec.view(LATENTS, 1, 2 * D_MODEL),
        "b_dec": pair.b_dec.view(1, -1),
    }
    sae = build(fields_of(sae), weights, "the SAE")
    x = activations(pair)
    output, codes = pair(x)
    theirs, same = sae(x.flatten(1))
    assert codes.l0().sum() > 0 and torch.equal(codes.indices, same.indices)
    torch.testing.assert_close(codes.values, same.values)
    torch.testing.assert_close(output.flatten(1), theirs)
    # The sum of two norms of 1/2 is 1, so that folding has nothing to do; the norm of both rows together is not.
    torch.testing.assert_close(folded(pair).state_dict(), pair.state_dict())
    torch.testing.assert_close(folded(sae).encode(x.flatten(1)).dense(), same.dense() * 0.5**0.5)
