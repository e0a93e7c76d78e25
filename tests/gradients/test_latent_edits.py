"""Gradients of edits in float64 against finite differences, through one adapted layer and through two."""

from __future__ import annotations

import pytest
import torch

from latent_world import D_MODEL, KINDS, LATENTS, K, adapted, dictionary, tiny, tokens
from palimpsest import edits
from palimpsest.tune.adapter import latent_layers
from palimpsest.tune.adapter.components import make_component
from palimpsest.tune.adapter.components.shapes import TRANSFORMS, one_sided, soft_threshold

DTYPE = torch.float64


def double(activation="topk", seed=0, **extra):
    return dictionary(activation, seed, **extra).double()


def differences(loss, parameter, places, step=1e-6):
    """Central differences of a loss at some places of a tensor."""
    flat, found = parameter.data.view(-1), []
    for place in places:
        before = float(flat[place])
        flat[place] = before + step
        up = float(loss())
        flat[place] = before - step
        down = float(loss())
        flat[place] = before
        found.append((up - down) / (2 * step))
    return torch.tensor(found, dtype=DTYPE)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("second", [None, "mlp_out.2", "resid_post.2"])
def test_numbers_of_one_and_of_two_layers(kind, second):
    hooks = [(double(seed=0), "resid_post.0")] + ([(double(seed=1), second)] if second else [])
    model = adapted(kind, *hooks, base=tiny("GPT2", DTYPE), skip_ids=[]).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, one in sorted(model.named_parameters()):
            if one.requires_grad:
                one.add_(0.2 * torch.randn(one.shape, generator=generator, dtype=DTYPE))
                if "threshold" in name:
                    one.abs_()
    ids = tokens(2, 6)

    def loss():
        # The library's own loss is float32, as are the norms of most families; GPT-2's are not.
        logits = model(input_ids=ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    loss().backward()
    checked = 0
    for name, one in model.named_parameters():
        if not one.requires_grad:
            continue
        gradient = one.grad.view(-1)
        largest = gradient.abs().topk(min(4, len(gradient))).indices
        places = torch.cat([largest, torch.randint(len(gradient), (3,), generator=generator)]).tolist()
        with torch.no_grad():
            expected = differences(loss, one, places)
        torch.testing.assert_close(
            gradient[places], expected, rtol=2e-4, atol=1e-7, msg=lambda text, n=name: f"{n}: {text}"
        )
        checked += int(largest.numel() > 0 and float(gradient.abs().max()) > 0)
    assert checked


@pytest.mark.parametrize("activation", ["topk", "relu", "jumprelu", "batch_topk", "gated"])
@pytest.mark.parametrize("norm", [None, "layer_norm", "unit_rms"])
def test_what_lies_below_gets_the_true_gradient(activation, norm):
    """h -> h + g z(h) W_dec: the gradient in h counts the identity and the codes, with the selection held fixed."""
    made = double(activation, **({} if norm is None else {"input_norm": norm}))
    component = make_component("scale", made).double()
    with torch.no_grad():
        component.weight.normal_(generator=torch.Generator().manual_seed(0))
    hidden = torch.randn(4, D_MODEL, dtype=DTYPE, requires_grad=True)
    weights = torch.randn(4, D_MODEL, dtype=DTYPE)

    def loss():
        reading = edits.read(made, hidden)
        return ((hidden + edits.write(made, component(reading), reading)) * weights).sum()

    loss().backward()
    places = list(range(0, 4 * D_MODEL, 7))
    with torch.no_grad():
        expected = differences(loss, hidden, places, step=1e-7)
    torch.testing.assert_close(hidden.grad.view(-1)[places], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_can_be_taken(kind):
    """A component that is the identity must not be a stationary point."""
    made = double()
    component = make_component(kind, made, rank={"mlp": 8, "low-rank": 4}.get(kind)).double()
    hidden = torch.randn(20, D_MODEL, dtype=DTYPE)
    reading = None if component.constant else edits.read(made, hidden)
    delta = edits.write(made, component(reading), reading)
    assert not delta.any()
    (delta * torch.randn(20, D_MODEL, dtype=DTYPE)).sum().backward()
    assert component.weight.grad.abs().max() > 1e-6


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_begin_at_the_identity_and_move(name):
    s = torch.zeros(3, dtype=DTYPE, requires_grad=True)
    g = TRANSFORMS[name](s)
    assert not g.any()
    (-g).sum().backward()  # descent raises s
    assert (s.grad < 0).all()


def test_a_one_sided_number_does_not_sink_and_is_not_stuck():
    s = torch.tensor([-0.5, 0.0, 0.5], requires_grad=True)
    one_sided(s).sum().backward()  # descent would lower s
    assert s.grad.tolist() == [0, 1, 1]
    s.grad = None
    (-one_sided(s)).sum().backward()  # descent raises s
    assert s.grad.tolist() == [-1, -1, -1]


def test_a_soft_threshold_is_open_at_its_border():
    a = torch.tensor([0.0, 0.2, -0.9, 0.9], dtype=DTYPE, requires_grad=True)
    t = torch.tensor([0.0, 0.5, 0.5, 0.5], dtype=DTYPE, requires_grad=True)
    made = soft_threshold(a, t)
    torch.testing.assert_close(made.detach(), torch.tensor([0.0, 0.0, -0.4, 0.4], dtype=DTYPE))
    made.sum().backward()
    assert a.grad.tolist() == [1, 0, 1, 1]
    assert t.grad.tolist() == [0, 0, 1, -1]
    # The usual form has no gradient where everything begins.
    usual = torch.zeros(1, requires_grad=True)
    torch.nn.functional.softshrink(usual, 0.0).sum().backward()
    assert usual.grad.item() == 0


@pytest.mark.parametrize("kind", ["scale", "active-bias", "relu-bias", "lerp", "gate", "low-rank", "mlp"])
def test_against_the_dense_formula(kind):
    """dec(f(z)) - dec(z) with f written on the full [tokens, latents] matrix."""
    made = double()
    component = make_component(kind, made, rank={"mlp": 8, "low-rank": 4}.get(kind)).double()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for one in component.parameters():
            one.add_(0.3 * torch.randn(one.shape, generator=generator, dtype=DTYPE))
    hidden = torch.randn(30, D_MODEL, dtype=DTYPE)
    reading = edits.read(made, hidden)
    found = edits.write(made, component(reading), reading)
    z = made.encode(hidden).dense()
    p = {name: one.detach() for name, one in component.named_parameters()}
    w, fires = p["weight"], z > 0
    if kind == "scale":
        f = (1 + w) * z
    elif kind == "active-bias":
        f = z + w * fires
    elif kind == "relu-bias":
        f = (z + w).relu()
    elif kind == "lerp":
        f = z + (2 * w.sigmoid() - 1) * (p["target"] - z)
    elif kind == "gate":
        a = hidden @ w.T + p["bias"]
        a = a.sign() * (a.abs() - p["threshold"].clamp(min=0)).clamp(min=0)
        f = torch.where(fires, (z + a).relu(), z)
    elif kind == "low-rank":
        f = z + z @ p["down"] @ w.T
    else:
        f = z + torch.nn.functional.gelu(z @ p["down"] + p["shift"]) @ w.T
    expected = (f - z) @ made.W_dec[:, 0]
    torch.testing.assert_close(found.detach(), expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().max() > 1e-3
    assert (fires.sum(1) <= K).all()
    assert z.shape[1] == LATENTS


def test_nothing_as_wide_as_the_latents_is_kept_for_the_backward_pass():
    model = adapted("scale", (dictionary("relu"), "resid_post.1"), skip_ids=[]).train()
    layer, kept = latent_layers(model)[0], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        layer.edit(torch.randn(2, 50, D_MODEL), ["default"])
    assert kept
    assert not [shape for shape in kept if len(shape) > 1 and shape[-1] == LATENTS and shape[0] >= 50]
