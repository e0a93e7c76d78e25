"""Latent Scaling in one pass against least squares solved latent by latent on dense matrices."""

import numpy as np
import pytest
import torch

from palimpsest.dictionaries import Dictionary
from palimpsest.diff.methods import Method
from palimpsest.diff.scaling import (
    COLUMNS,
    ScalingSums,
    betas,
    geometry,
    scale_latents,
    with_means,
    without_own,
)
from palimpsest.diff.text import GROUPS

D, N, TOKENS, BATCH = 12, 40, 600, 150


def crosscoder(activation="batch_topk"):
    k = None if activation == "relu" else 5
    made = Dictionary(D, N, activation=activation, k=k, models=2, view="pair").double()
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(N, 2, 1) * 2)
        made.W_dec[0, 1], made.W_dec[1, 0] = 0, 0
        made.b_dec.normal_()
        made.b_enc.normal_(-0.5, 0.3)
        if made.threshold is not None:
            made.threshold.uniform_(0.2, 0.6)
    return made


def sae(view):
    made = Dictionary(D, N, activation="topk", k=5, view=view).double()
    with torch.no_grad():
        made.W_dec.mul_(torch.rand(N, 1, 1) * 2 + 0.1)
        made.b_dec.normal_()
    return made


def pair_of_activations(seed=0):
    x = torch.randn(TOKENS, 2, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 0.7
    x[:, 1] += 0.5 * x[:, 0]
    return x


def streamed(method, x):
    """The sums with what the means need, and the tokens of each group."""
    sums, document = ScalingSums(method), torch.arange(TOKENS) // 7
    with torch.no_grad():
        for rows in torch.arange(TOKENS).split(BATCH):
            codes = method.codes(x[rows])
            made = method.dictionary.decode(codes) if method.kind == "crosscoder" else None
            sums.add(document[rows] % GROUPS, x[rows], codes, made)
    activations, group = torch.zeros(GROUPS, 2, D, dtype=x.dtype), document % GROUPS
    activations.index_add_(0, group, x)
    return with_means(method, sums.finish(), activations.numpy()), np.bincount(group, minlength=GROUPS)


def total(method, x):
    """β over all tokens."""
    sums, tokens = streamed(method, x)
    return betas(sums.sum(0), geometry(method), tokens.sum())


def least_squares(code, direction, target):
    """argmin_b Σ‖b f d - Y‖² by a solver that knows no closed form."""
    column = (code[:, None] * direction[None]).reshape(-1, 1)
    return torch.linalg.lstsq(column, target.reshape(-1, 1)).solution.item()


@pytest.mark.parametrize("activation", ["batch_topk", "relu"])
def test_every_beta_of_a_crosscoder_is_the_least_squares_solution(activation):
    dictionary, x = crosscoder(activation), pair_of_activations()
    method = Method(dictionary)
    found = total(method, x)
    with torch.no_grad():
        codes = dictionary.encode(x)
        dense, made = codes.dense(), dictionary.decode(codes)
    checked = 0
    for j in range(N):
        direction = dictionary.W_dec[j, 1].detach()
        if dense[:, j].sum() == 0 or direction.norm() == 0:
            assert np.isnan(found["error"][:, j]).all()
            continue
        checked += 1
        for m in range(2):
            own = dense[:, j, None] * dictionary.W_dec[j, m].detach()
            targets = {
                "activation": x[:, m],
                "centred": x[:, m] - x[:, m].mean(0),
                "reconstruction": made[:, m],
                "error": x[:, m] - (made[:, m] - own),
            }
            for name, target in targets.items():
                expected = least_squares(dense[:, j], direction, target)
                assert found[name][m, j] == pytest.approx(expected, rel=1e-8, abs=1e-10), (name, j, m)
    assert checked > N // 2


@pytest.mark.parametrize("view", ["base", "tuned", "diff"])
def test_other_dictionaries_have_the_activation_ratio_only(view):
    dictionary, x = sae(view), pair_of_activations()
    method = Method(dictionary)
    found = total(method, x)
    signal = x[:, 1] - x[:, 0] if view == "diff" else x[:, 1]
    with torch.no_grad():
        dense = dictionary.encode(signal).dense()
    for j in range(N):
        if dense[:, j].sum() == 0:
            continue
        for m in range(2):
            expected = least_squares(dense[:, j], dictionary.W_dec[j, 0].detach(), x[:, m])
            assert found["activation"][m, j] == pytest.approx(expected, rel=1e-8)
    assert np.isnan(found["reconstruction"]).all() and np.isnan(found["error"]).all()


def test_the_tuned_error_holds_each_latents_own_contribution_once():
    # With no error at all β^ε of the tuned model is exactly 1: the latent's own contribution put back.
    dictionary = crosscoder()
    method = Method(dictionary)
    with torch.no_grad():
        x = pair_of_activations()
        codes = dictionary.encode(x)
        sums = ScalingSums(method)
        made = dictionary.decode(codes)
        sums.add(torch.zeros(TOKENS, dtype=torch.long), made, codes, made)
    both = with_means(method, sums.finish(), np.zeros((GROUPS, 2, D)))
    found = betas(both.sum(0), geometry(method), TOKENS)
    known = np.isfinite(found["error"][1])
    assert known.sum() > N // 2
    np.testing.assert_allclose(found["error"][1][known], 1, atol=1e-9)


def test_token_normalisation_is_undone_in_the_codes():
    dictionary = Dictionary(D, N, activation="topk", k=5, view="tuned", input_norm="layer_norm").double()
    method, x = Method(dictionary), pair_of_activations()
    found = total(method, x)
    with torch.no_grad():
        codes = dictionary.encode(x[:, 1])
        dense = codes.dense() * codes.norm.scale
    j = int(dense.sum(0).argmax())
    expected = least_squares(dense[:, j], dictionary.W_dec[j, 0].detach(), x[:, 1])
    assert found["activation"][1, j] == pytest.approx(expected, rel=1e-8)


def test_intervals_are_those_of_a_bootstrap_over_groups_of_documents():
    dictionary, x = crosscoder(), pair_of_activations()
    method = Method(dictionary)
    (sums, tokens), fixed = streamed(method, x), geometry(method)
    found = scale_latents(sums, fixed, tokens, resamples=800, seed=3)
    rng = np.random.default_rng(0)
    draws = rng.integers(0, GROUPS, (3000, GROUPS))
    j = int(np.nanargmax(np.where(np.isfinite(found.nu["error"]), found.groups, 0)))
    counts = np.array([tokens[rows].sum() for rows in draws])[:, None]
    again = betas(np.stack([sums[rows].sum(0) for rows in draws]), fixed, counts)
    ratio = again["error"][0][:, j] / again["error"][1][:, j]
    width = found.hi["error"][j] - found.lo["error"][j]
    low, high = np.percentile(ratio, [2.5, 97.5])
    assert found.lo["error"][j] == pytest.approx(low, abs=0.2 * width)
    assert found.hi["error"][j] == pytest.approx(high, abs=0.2 * width)


def test_a_latent_of_one_document_has_a_ratio_but_no_interval():
    sums = np.zeros((GROUPS, 1, len(COLUMNS) + 2))
    sums[3] = [[2.0, 1.0, 1.0, 2.0, 1.0, 2.0, 0.0, 0.0]]
    found = scale_latents(sums, geometry(Method(crosscoder())).of(np.array([5])), np.full(GROUPS, 9))
    assert found.nu["activation"][0] == 0.5 and found.groups[0] == 1
    assert np.isnan(found.lo["activation"][0]) and np.isnan(found.beta_tuned_lo["error"][0])


def test_a_latent_whose_contribution_is_taken_out_of_the_base_has_the_ratios_that_this_gives():
    dictionary, x = crosscoder(), pair_of_activations()
    method, j = Method(dictionary), 7
    (sums, tokens), fixed = streamed(method, x), geometry(method)
    found = without_own(scale_latents(sums, fixed, tokens, resamples=100), fixed)
    with torch.no_grad():
        codes = dictionary.encode(x)
        dense, made = codes.dense(), dictionary.decode(codes)
        own = dense[:, j, None] * dictionary.W_dec[j, 0]
        direction = dictionary.W_dec[j, 1]
        tuned = dense[:, j, None] * direction
    # Base and its reconstruction lose the same, so the error with nothing put back is the old one.
    base = least_squares(dense[:, j], direction, x[:, 0] - made[:, 0])
    other = least_squares(dense[:, j], direction, x[:, 1] - made[:, 1] + tuned)
    assert found.nu["error"][j] == pytest.approx(base / other, rel=1e-6)
    base = least_squares(dense[:, j], direction, made[:, 0] - own)
    assert found.nu["reconstruction"][j] == pytest.approx(
        base / least_squares(dense[:, j], direction, made[:, 1]), rel=1e-6
    )


def test_the_mean_of_resampled_documents_is_resampled_with_them():
    """A latent that always fires and does not vary between documents is known as well as its documents allow."""
    rng, latents = np.random.default_rng(0), 300
    fixed, tokens = geometry(Method(crosscoder())).of(np.full(latents, 5)), np.full(GROUPS, 50.0)
    fixed = fixed._replace(squared=np.ones(latents), own=np.ones((2, latents)))
    sums = np.zeros((GROUPS, latents, len(COLUMNS) + 2))
    for group in range(GROUPS):
        f = rng.gamma(2, 0.5, (50, latents))
        offset = rng.normal(0, 1, latents)  # of the document, the same in both models
        base, tuned = 0.3 * f + offset + rng.normal(0, 0.2, f.shape), f + offset + rng.normal(0, 0.2, f.shape)
        columns = [f * f, f, f * base, f * tuned, f * base, f * tuned, base, tuned]
        sums[group] = np.stack([column.sum(0) for column in columns], 1)
    found = scale_latents(sums, fixed, tokens.astype(int), resamples=400, seed=1)
    covered = (found.lo["centred"] <= found.nu["centred"]) & (found.nu["centred"] <= found.hi["centred"])
    truth = 0.3
    truly = np.mean((found.lo["centred"] <= truth) & (truth <= found.hi["centred"]))
    assert covered.all() and 0.9 <= truly <= 0.99
    assert np.median(found.hi["centred"] - found.lo["centred"]) < 0.6
