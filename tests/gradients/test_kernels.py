"""Gradients of the two sparse ends of a step: against numbers, and against dense autograd."""

import pytest
import torch

from palimpsest.dictionaries import kernels
from palimpsest.dictionaries.kernels import native
from palimpsest.dictionaries.kernels.autograd import decode, encode_values

TOKENS, FEATURES, LATENTS = 9, 7, 30


def setting(dtype, tokens=TOKENS, features=FEATURES, latents=LATENTS, count=40):
    x = torch.randn(tokens, features, dtype=dtype)
    encoder, decoder = (torch.randn(latents, features, dtype=dtype) for _ in range(2))
    b_enc, b_dec = torch.randn(latents, dtype=dtype), torch.randn(features, dtype=dtype)
    sparse, _ = kernels.encode_batch_topk(x, encoder, b_enc, count)
    return [x, encoder, b_enc, decoder, b_dec], sparse, kernels.by_latent(sparse.crow, sparse.index, latents)


def test_encode_values_gradcheck():
    (x, encoder, b_enc, *_), sparse, grouped = setting(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (x, encoder, b_enc)]

    def run(x, encoder, b_enc):
        return encode_values(x, encoder, b_enc, sparse.crow, sparse.index, grouped)

    assert torch.autograd.gradcheck(run, leaves)


def test_decode_gradcheck():
    (_, _, _, decoder, b_dec), sparse, grouped = setting(torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (sparse.value.clone(), decoder, b_dec)]

    def run(value, decoder, b_dec):
        return decode(value, decoder, b_dec, sparse.crow, sparse.index, grouped)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_both_ends_against_dense_autograd(backend, given):
    if backend == "native" and not native.available():
        pytest.skip("the C++ kernels cannot be built here: no compiler")
    leaves, sparse, grouped = setting(torch.float32, 50, 37, 200, 600)
    for leaf in leaves:
        leaf.requires_grad_()
    x, encoder, b_enc, decoder, b_dec = leaves
    mask = torch.zeros(50, 200)
    mask[torch.arange(50).repeat_interleave(sparse.crow.diff()), sparse.index] = 1
    expected = ((x @ encoder.T + b_enc).relu() * mask) @ decoder + b_dec
    target = torch.randn(50, 37)
    with kernels.use(backend):
        pattern = sparse.crow, sparse.index, grouped
        value = encode_values(x, encoder, b_enc, *pattern, sparse.value if given else None)
        output = decode(value, decoder, b_dec, *pattern)
        found = torch.autograd.grad((output - target).square().mean(), leaves)
    torch.testing.assert_close(output, expected, atol=1e-4, rtol=1e-5)
    wanted = torch.autograd.grad((expected - target).square().mean(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().max() > 0
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_padding_has_no_gradient():
    x, weight, bias = torch.randn(6, 5), torch.randn(20, 5), torch.full((20,), -4.0)
    bias[3], bias[0] = 2.0, -9.0
    value, index = (part.reshape(-1) for part in kernels.encode_topk(x, weight, bias, 8))
    crow = torch.arange(7) * 8
    grouped = kernels.by_latent(crow, index, 20)
    weight.requires_grad_()
    bias.requires_grad_()
    found = encode_values(x, weight, bias, crow, index, grouped, value)
    assert (value == 0).any() and torch.equal(found, value)
    found.sum().backward()
    expected = ((x @ weight.T + bias) > 0).float().sum(dim=0)
    assert torch.equal(bias.grad, expected) and not weight.grad[0].any()


def test_only_wanted_gradients_are_computed():
    (x, encoder, b_enc, decoder, b_dec), sparse, grouped = setting(torch.float32)
    pattern = sparse.crow, sparse.index, grouped
    encoder.requires_grad_()
    value = encode_values(x, encoder, b_enc, *pattern, sparse.value)
    decode(value, decoder, b_dec, *pattern).sum().backward()
    assert encoder.grad is not None and x.grad is None and decoder.grad is None
