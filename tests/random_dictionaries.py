"""Dictionaries with random parameters everywhere, and what they compute, written from the definitions."""

from __future__ import annotations

import torch

from palimpsest.dictionaries import Dictionary

RULES = {"relu": None, "topk": 5, "batch_topk": 4.5, "jumprelu": None, "gated": None}
VIEWS = {"base": 1, "tuned": 1, "diff": 1, "pair": 2}
PARTITION = {"base_only": 3, "tuned_only": 4, "shared": 6}
D_MODEL, LATENTS, TOKENS = 12, 40, 33


def make(activation="topk", view="base", seed=0, dtype=torch.float32, **extra):
    """Build a dictionary whose encoder, decoder, biases and thresholds are random; bound ranges hold."""
    generator = torch.Generator().manual_seed(seed)
    models = VIEWS[view]
    made = Dictionary(
        D_MODEL, LATENTS, activation=activation, k=RULES[activation], models=models, view=view, **extra
    ).to(dtype)
    with torch.no_grad():
        for tensor in made.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.5)
        if made.threshold is not None:
            made.threshold.abs_()
        if made.layout.bound:
            base, tuned, shared = (made.partition[name] for name in ("base_only", "tuned_only", "shared"))
            made.W_enc[1, :, list(base)], made.W_dec[list(base), 1] = 0, 0
            made.W_enc[0, :, list(tuned)], made.W_dec[list(tuned), 0] = 0, 0
            made.W_dec[list(shared), 1] = made.W_dec[list(shared), 0]
    return made.requires_grad_(False)


def activations(made, tokens=TOKENS, seed=1):
    """Random activations in the shape and dtype that the dictionary reads."""
    x = torch.randn(tokens, made.models, D_MODEL, generator=torch.Generator().manual_seed(seed)) + 0.3
    return (x if made.models > 1 else x[:, 0]).to(made.dtype)


def pre_activations(made, x):
    """Σ_m (x_m - b_dec_m) @ W_enc_m in float64, without a bias."""
    x = x.double().reshape(x.shape[0], made.models, D_MODEL)
    if made.apply_b_dec_to_input:
        x = x - made.b_dec.double()
    return torch.einsum("tmd,mdl->tl", x, made.W_enc.double())


def dense_codes(made, x, weight=None):
    """Encode by the definition, densely, in float64; topk ranks by the activation times `weight`."""
    pre = pre_activations(made, x)
    if made.activation == "gated":
        opened = (pre + made.b_gate.double() > 0).double()
        return opened * (pre * made.r_mag.double().exp() + made.b_mag.double()).relu()
    pre = pre + made.b_enc.double()
    if made.activation == "topk":
        best = (pre if weight is None else pre * weight).topk(int(made.k), dim=1).indices
        return torch.zeros_like(pre).scatter_(1, best, pre.gather(1, best).relu())
    threshold = 0.0 if made.threshold is None else made.threshold.double()
    return pre.relu() * (pre > threshold)


def dense_output(made, codes, shape):
    """Decode by the definition, densely, in float64."""
    rows = torch.einsum("tl,lmd->tmd", codes.double(), made.W_dec.double()) + made.b_dec.double()
    return rows.view(shape)
