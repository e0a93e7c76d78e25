"""Gradients: of encode and decode, of a training step against dense autograd, of the objective against its terms."""

from dataclasses import replace

import pytest
import torch

from palimpsest.dictionaries import Dictionary, Objective, Partition, TrainConfig
from palimpsest.dictionaries.training import losses
from palimpsest.dictionaries.training.step import Jump, Plan, forward
from palimpsest.dictionaries.training.weights import Weights

D_MODEL, LATENTS, TOKENS = 6, 18, 9
K = {"relu": None, "topk": 4, "batch_topk": 3.5, "jumprelu": None}
NONE_DEAD = torch.zeros(0, dtype=torch.long)


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


def recipe(activation, **changes):
    fields = {"n_latents": LATENTS, "k": K[activation], "activation": activation, "dtype": "float32"}
    return TrainConfig(**fields | {"tokens": 100, "batch_size": TOKENS} | changes)


def random_weights(config, models, dtype=torch.float64):
    """Weights that are not initial ones, inside their bonds."""
    blank = Weights.blank(config, models, D_MODEL)
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(t.shape, generator=generator).to(dtype) * 0.7 for name, t in blank.named().items()
    }
    made = replace(blank, **tensors)
    for rows, other in made.forbidden(config):
        made.enc[rows, other] = 0
        made.dec[rows, other] = 0
    if made.threshold is not None:
        made.threshold.abs_()
    for tensor in made.named().values():
        tensor.requires_grad_(True)
    return made


def plan(dead=NONE_DEAD, density=0.0):
    return Plan(step=50, dead=dead, cut=None, density=density, precision="float32")


def data(models, dtype=torch.float64):
    return torch.randn(TOKENS, models, D_MODEL, generator=torch.Generator().manual_seed(2)).to(dtype)


def gradients(weights, scalar):
    held = weights.named()
    found = torch.autograd.grad(scalar, list(held.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(t) if g is None else g for g, (n, t) in zip(found, held.items(), strict=True)}


CASES = {
    "topk": recipe("topk"),
    "topk unsquared": recipe("topk", objective=Objective(error="unsquared")),
    "batch_topk": recipe("batch_topk"),
    "matryoshka": recipe("batch_topk", prefixes=(3, 9, LATENTS)),
    "matryoshka topk": recipe("topk", prefixes=(3, 9, LATENTS)),
    "relu": recipe("relu"),
    "relu concat": recipe("relu", objective=Objective(sparsity="l1_concat")),
    "relu mixed": recipe("relu", objective=Objective(sparsity="l1_mixed")),
    "relu tanh": recipe("relu", objective=Objective(sparsity="tanh")),
    "jumprelu": recipe("jumprelu"),
    "jumprelu l1": recipe("jumprelu", objective=Objective(sparsity="l1_sum")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("models", [1, 2])
def test_the_objective_is_the_weighted_sum_of_the_reported_terms(case, models):
    config = CASES[case]
    if models == 2 and config.activation in ("relu", "jumprelu"):
        config = replace(config, partition=Partition(base_only=1, tuned_only=2, shared=3))
    weights = random_weights(config, models)
    result = forward(weights, data(models), config, plan(torch.tensor([1, 5, 11]))).losses
    expected = {
        "relu": {"reconstruction", "sparsity"},
        "jumprelu": {"reconstruction", "sparsity", "preact"},
    }.get(config.activation, {"reconstruction", "auxk"})
    assert set(result.terms) == set(result.weights) == expected
    total = gradients(weights, result.total())
    parts = {name: gradients(weights, term) for name, term in result.terms.items()}
    for name, whole in total.items():
        weighted = sum(result.weights[term] * parts[term][name] for term in parts)
        torch.testing.assert_close(whole, weighted, atol=1e-12, rtol=1e-9)
    for term, part in parts.items():
        assert max(g.abs().max() for g in part.values()) > 0, term


def dense_terms(weights, x, config):
    """The same objective on dense matrices, written out; which latents survive is found here once more."""
    tokens, models, _ = x.shape
    flat = x.flatten(1)
    pre = (flat - weights.b_dec) @ weights.enc.T + weights.b_enc
    norms = weights.dec.view(LATENTS, models, -1).norm(dim=2)
    score = (pre * norms.sum(1) if models > 1 else pre).detach()
    if config.activation == "topk":
        kept = score >= score.sort(dim=1, descending=True).values[:, [int(config.k) - 1]]
    elif config.activation == "batch_topk":
        kept = score >= score.flatten().sort(descending=True).values[int(config.k * tokens) - 1]
    else:
        kept = torch.ones_like(score, dtype=torch.bool)
    values = pre * (kept & (pre > 0))
    errors = []
    for end in config.prefixes or (LATENTS,):
        difference = x - (values[:, :end] @ weights.dec[:end] + weights.b_dec).view(x.shape)
        spread = x - x.mean(0)
        if models == 1:
            errors.append(difference.square().sum() / spread.square().sum())
        else:
            errors.append(difference.norm(dim=2).mean() / spread.norm(dim=2).mean())
    terms = {"reconstruction": sum(errors) / len(errors)}
    if config.activation == "relu":
        terms["sparsity"] = (values * norms.sum(1)).sum(1).mean() / flat.norm(dim=1).mean()
    return terms


@pytest.mark.parametrize("case", ["topk", "batch_topk", "matryoshka", "matryoshka topk", "relu"])
@pytest.mark.parametrize("models", [1, 2])
def test_a_sparse_step_is_the_dense_one(case, models):
    config = CASES[case]
    weights, x = random_weights(config, models), data(models)
    made = forward(weights, x, config, plan()).losses.terms
    dense = dense_terms(weights, x, config)
    assert set(made) == set(dense)
    for name, term in dense.items():
        torch.testing.assert_close(made[name], term, atol=1e-7, rtol=1e-7)
        found, expected = gradients(weights, made[name]), gradients(weights, term)
        for tensor in expected:
            torch.testing.assert_close(found[tensor], expected[tensor], atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("case", ["relu", "jumprelu", "jumprelu l1"])
def test_entries_give_what_dense_matrices_give(case):
    config = CASES[case]
    weights, x = random_weights(config, 2), data(2)
    dead = torch.tensor([2, 7])
    sparse, dense = (forward(weights, x, config, plan(dead, density=d)) for d in (0.0, 1.0))
    assert set(sparse.losses.terms) == set(dense.losses.terms)
    assert torch.equal(sparse.active, dense.active) and sparse.active.sum() > 0
    for name, term in dense.losses.terms.items():
        torch.testing.assert_close(sparse.losses.terms[name], term)
        for found, expected in zip(
            gradients(weights, sparse.losses.terms[name]).values(),
            gradients(weights, term).values(),
            strict=True,
        ):
            torch.testing.assert_close(found, expected)


def test_the_threshold_learns_from_the_window_around_it():
    pre = torch.tensor([[0.2, 0.9], [1.4, 3.0], [0.6, -1.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([0.5, 1.0], dtype=torch.float64, requires_grad=True)
    upstream = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=torch.float64)
    values = Jump.apply(pre, threshold.expand_as(pre), 0.8)
    assert values.tolist() == [[0, 0], [1.4, 3.0], [0.6, 0]]
    values.backward(upstream)
    assert pre.grad.tolist() == [[0, 0], [3, 4], [5, 0]]
    # Inside 0.5 ± 0.4: rows 0 and 2. Inside 1.0 ± 0.4: row 0.
    expected = torch.tensor([-(0.5 / 0.8) * (1 + 5), -(1.0 / 0.8) * 2], dtype=torch.float64)
    torch.testing.assert_close(threshold.grad, expected)


@pytest.mark.parametrize("models", [1, 2])
def test_auxk_trains_the_encoder_of_dead_latents_only(models):
    config = recipe("topk")
    weights = random_weights(config, models)
    dead = torch.tensor([1, 5, 11])
    result = forward(weights, data(models), config, plan(dead)).losses
    grad = gradients(weights, result.terms["auxk"])
    touched = grad["enc"].abs().sum(1) > 0
    alive = [i for i in range(LATENTS) if i not in dead.tolist()]
    assert touched[dead].any() and not touched[alive].any()
    assert torch.equal(touched, grad["dec"].abs().sum(1) > 0)


def test_auxk_explains_the_residual_without_the_bias():
    residual, output = torch.randn(30, 5), torch.randn(30, 5, requires_grad=True)
    assert losses.auxk(residual, residual).item() == 0
    expected = (residual - output).square().sum() / (residual - residual.mean(0)).square().sum()
    torch.testing.assert_close(losses.auxk(residual, output), expected)
    moving = residual.clone().requires_grad_()
    losses.auxk(moving, output).backward()
    assert moving.grad is None and output.grad is not None


def test_what_a_latent_is_charged():
    norms = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    assert losses.latent_charge(norms, "l1_sum").tolist() == [7, 2]
    torch.testing.assert_close(losses.latent_charge(norms, "l1_concat"), torch.tensor([5.0, 2.0]))
    torch.testing.assert_close(losses.latent_charge(norms, "l1_mixed"), torch.tensor([5.7, 2.2]))
    shares = torch.tensor([0.5, 1.0])
    assert losses.latent_charge(norms, "tanh", shares).tolist() == [3.5, 2]


def test_bonds_are_kept_by_the_gradients():
    config = recipe("batch_topk", partition=Partition(base_only=2, tuned_only=3, shared=4))
    weights = random_weights(config, 2)
    with torch.no_grad():
        weights.dec[5:9, D_MODEL:] = weights.dec[5:9, :D_MODEL]
    forward(weights, data(2), config, plan()).losses.total().backward()
    free = weights.dec.grad.clone()
    weights.constrain_gradients(config)
    for grad in (weights.enc.grad, weights.dec.grad):
        assert not grad[:2, D_MODEL:].any() and not grad[2:5, :D_MODEL].any()
        assert grad[:2, :D_MODEL].any() and grad[2:5, D_MODEL:].any()
    base, tuned = weights.dec.grad[5:9].split(D_MODEL, dim=1)
    assert torch.equal(base, tuned) and base.any()
    torch.testing.assert_close(base, (free[5:9, :D_MODEL] + free[5:9, D_MODEL:]) / 2)
    assert torch.equal(weights.dec.grad[9:], free[9:])
