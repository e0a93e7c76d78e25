"""Gradients: of encode and decode, and of the objective against the terms that are reported."""

import pytest
import torch

from palimpsest.dictionaries import Dictionary, TrainConfig, losses
from palimpsest.dictionaries.step import forward

D_MODEL, LATENTS, TOKENS = 6, 18, 7
K = {"relu": None, "topk": 4, "batch_topk": 3.5, "jumprelu": None}


def make(activation, models=1):
    view = "pair" if models > 1 else "base"
    made = Dictionary(
        D_MODEL, LATENTS, activation=activation, k=K[activation], models=models, view=view
    ).double()
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn_like(tensor) * 0.7)
        if made.threshold is not None:
            made.threshold.abs_()
    return made


@pytest.mark.parametrize("activation", K)
@pytest.mark.parametrize("models", [1, 2])
def test_encode_and_decode_have_exact_gradients(activation, models):
    made = make(activation, models)
    shape = (TOKENS, D_MODEL) if models == 1 else (TOKENS, models, D_MODEL)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    names = [name for name, _ in made.named_parameters() if name != "threshold"]

    def run(x, *parameters):
        weights = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(made, weights, (x,))[0]

    parameters = [made.get_parameter(name).detach().clone().requires_grad_() for name in names]
    assert torch.autograd.gradcheck(run, (x, *parameters))


def gradients(made, scalar):
    found = torch.autograd.grad(scalar, list(made.parameters()), retain_graph=True, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, made.parameters(), strict=True)]


@pytest.mark.parametrize("activation", ["topk", "batch_topk", "relu"])
def test_the_objective_is_the_weighted_sum_of_the_reported_terms(activation):
    made = make(activation).float()
    config = TrainConfig(
        n_latents=LATENTS, k=K[activation], activation=activation, tokens=100, batch_size=TOKENS
    )
    dead = torch.tensor([1, 5, 11])
    result = forward(made, torch.randn(TOKENS, D_MODEL), config, K[activation] or 0, dead).losses
    assert (
        set(result.terms)
        == set(result.weights)
        == ({"reconstruction", "l1"} if activation == "relu" else {"reconstruction", "auxk"})
    )
    total = gradients(made, result.total())
    parts = [[w * g for g in gradients(made, result.terms[n])] for n, w in result.weights.items()]
    for whole, *pieces in zip(total, *parts, strict=True):
        torch.testing.assert_close(whole, sum(pieces), atol=1e-6, rtol=1e-5)
    assert max(g.abs().max() for g in parts[1]) > 0


def test_auxk_trains_the_encoder_of_dead_latents_only():
    made = make("topk").float()
    config = TrainConfig(n_latents=LATENTS, k=4, tokens=100, batch_size=TOKENS)
    dead = torch.tensor([1, 5, 11])
    result = forward(made, torch.randn(TOKENS, D_MODEL), config, 4, dead).losses
    grad = dict(
        zip([n for n, _ in made.named_parameters()], gradients(made, result.terms["auxk"]), strict=True)
    )
    touched = grad["W_enc"].abs().sum((0, 1)) > 0
    assert touched[dead].any() and not touched[[i for i in range(LATENTS) if i not in dead.tolist()]].any()
    assert torch.equal(touched, grad["W_dec"].abs().sum((1, 2)) > 0)


def test_auxk_explains_the_residual_without_the_bias():
    residual, output = torch.randn(30, 5), torch.randn(30, 5, requires_grad=True)
    assert losses.auxk(residual, residual).item() == 0
    expected = (residual - output).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(losses.auxk(residual, output), expected)
    moving = residual.clone().requires_grad_()
    losses.auxk(moving, output).backward()
    assert moving.grad is None and output.grad is not None


def test_training_forward_matches_the_dictionary():
    made = make("topk").float()
    config = TrainConfig(n_latents=LATENTS, k=4, tokens=100, batch_size=TOKENS)
    x = torch.randn(TOKENS, D_MODEL)
    none = torch.zeros(0, dtype=torch.long)
    trained = forward(made, x, config, 4, none)
    output, codes = made(x)
    torch.testing.assert_close(trained.losses.terms["reconstruction"], losses.reconstruction(x, output))
    assert torch.equal(trained.active, (codes.dense() > 0).float().sum(0))
