"""Overlap for every k against sets counted one k at a time, and its exact split into latents."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from paired_streams import (
    Letters,
    codes_of,
    measure_of,
    overlap,
    random_dictionary,
    strongest,
    sums_of,
    texts,
)
from palimpsest.audit.estimate import CorpusEstimates, Settings
from palimpsest.audit.latent_table import LENGTH_ROW, latent_rows
from palimpsest.audit.overlap import churn, match, overlap_counts, overlap_curve, value_change
from palimpsest.dictionaries import Codes
from palimpsest.dictionaries.activations import above


def tops(dense, k_max):
    """Lists of dense activations, through the same codes as a dictionary's."""
    return above(torch.as_tensor(np.asarray(dense), dtype=torch.float32), None).top(k_max)


@st.composite
def pairs(draw):
    """Two dense matrices of few distinct values: ties, short lists and empty ones, and a longest k."""
    shape = draw(st.tuples(st.integers(1, 4), st.integers(1, 7)))
    values = st.sampled_from([-1.0, 0.0, 0.0, 0.5, 0.5, 1.0, 2.0])
    a, b = (draw(arrays.arrays(np.float64, shape, elements=values)) for _ in range(2))
    return a, b, draw(st.integers(1, 10))


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_every_k_equals_the_sets_of_that_k(case):
    a, b, k_max = case
    base, tuned = tops(a, k_max), tops(b, k_max)
    matches = match(base, tuned)
    counts = overlap_counts(matches)
    curve = overlap_curve(counts, matches.longer)
    assert counts.shape == curve.shape == (len(a), k_max)
    for token, (x, y) in enumerate(zip(a, b, strict=True)):
        for k in range(1, k_max + 1):
            mine, other = set(strongest(x, k)), set(strongest(y, k))
            assert counts[token, k - 1] == len(mine & other)
            expected = overlap(x, y, k)
            assert curve[token, k - 1].item() == pytest.approx(expected, nan_ok=True)
    assert (counts.diff(dim=1) >= 0).all() and (counts.diff(dim=1) <= 2).all()


@settings(max_examples=150, deadline=None)
@given(pairs())
def test_what_left_entered_and_the_lengths_make_up_the_rest(case):
    a, b, k_max = case
    base, tuned = tops(a, k_max), tops(b, k_max)
    matches = match(base, tuned)
    curve = overlap_curve(overlap_counts(matches), matches.longer)
    for k in range(1, k_max + 1):
        found = churn(matches, base, tuned, k)
        for token, (x, y) in enumerate(zip(a, b, strict=True)):
            mine, other = strongest(x, k), strongest(y, k)
            assert set(base.indices[token, :k][found.left[token]].tolist()) == set(mine) - set(other)
            assert set(tuned.indices[token, :k][found.entered[token]].tolist()) == set(other) - set(mine)
            assert found.length_gap[token] == abs(len(mine) - len(other))
            assert found.k_t[token] == max(1, len(mine), len(other))
        churned = (found.left.sum(1) + found.entered.sum(1) + found.length_gap).double()
        listed = matches.longer > 0
        share = churned / (2 * found.k_t)
        torch.testing.assert_close(1 - curve[listed, k - 1], share[listed], rtol=0, atol=1e-12)
        assert (churned[~listed] == 0).all()


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_swapping_the_models_changes_only_the_direction(case):
    a, b, k_max = case
    base, tuned = tops(a, k_max), tops(b, k_max)
    there, back = match(base, tuned), match(tuned, base)
    assert torch.equal(overlap_counts(there), overlap_counts(back))
    for k in range(1, k_max + 1):
        forth, reverse = churn(there, base, tuned, k), churn(back, tuned, base, k)
        assert torch.equal(forth.left, reverse.entered) and torch.equal(forth.entered, reverse.left)
        assert torch.equal(forth.length_gap, reverse.length_gap) and torch.equal(forth.k_t, reverse.k_t)
        changed = value_change(there, base, tuned, k), value_change(back, tuned, base, k)
        torch.testing.assert_close(*changed, equal_nan=True)


@settings(max_examples=100, deadline=None)
@given(pairs())
def test_value_change_is_that_of_the_shared_latents(case):
    a, b, k_max = case
    base, tuned = tops(a, k_max), tops(b, k_max)
    for k in range(1, k_max + 1):
        found = value_change(match(base, tuned), base, tuned, k)
        for token, (x, y) in enumerate(zip(a, b, strict=True)):
            both = sorted(set(strongest(x, k)) & set(strongest(y, k)))
            expected = np.abs(x[both] - y[both]).sum() / (x[both] + y[both]).sum() if both else np.nan
            assert found[token].item() == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_equal_values_at_other_ranks_are_no_value_change():
    """A latent that entered at the top moves the others down: values of equal rank differ, latents do not."""
    base = tops([[0.0, 5.0, 4.0, 3.0, 0.0]], 4)
    tuned = tops([[0.0, 5.0, 4.0, 3.0, 9.0]], 4)
    matches = match(base, tuned)
    assert value_change(matches, base, tuned, 4).item() == 0
    by_rank = (base.values[:, :3] - tuned.values[:, :3]).abs().sum() / 1.0
    assert by_rank > 1
    assert overlap_counts(matches).tolist() == [[0, 1, 2, 3]]
    halved = tops([[0.0, 2.5, 4.0, 3.0, 9.0]], 4)
    assert value_change(match(base, halved), base, halved, 4).item() == pytest.approx(2.5 / 21.5)


def test_inactive_latents_never_agree():
    """Three active latents each, none shared: padding with zeros would call five of eight the same."""
    a, b = torch.zeros(1, 16), torch.zeros(1, 16)
    a[0, 8:11], b[0, 11:14] = 1.0, 1.0
    matches = match(tops(a, 8), tops(b, 8))
    assert overlap_counts(matches)[0, -1] == 0
    assert len(set(a[0].topk(8).indices.tolist()) & set(b[0].topk(8).indices.tolist())) > 0


def test_padding_of_fixed_width_codes_matches_nothing():
    values = torch.tensor([[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    codes = Codes.from_fixed(values, torch.tensor([[4, 0, 0], [0, 0, 0]]), 6)
    top = codes.top(5)
    matches = match(top, top)
    assert overlap_counts(matches).tolist() == [[1] * 5, [0] * 5]
    curve = overlap_curve(overlap_counts(matches), matches.longer)
    assert curve[0].tolist() == [1.0] * 5 and curve[1].isnan().all()


CASES = {
    "full lists": ("topk", 0.0),
    "short lists": ("relu", -1.5),
    "short and empty lists": ("relu", -4.5),
    "thresholds": ("jumprelu", -1.0),
    "batch thresholds": ("batch_topk", -2.0),
}


def table_of(sums, estimates):
    share = estimates.mean("length_gap", "listed")[0]
    return latent_rows("text", sums, share, Letters(), 10, 0.95).to_pydict()


@pytest.mark.parametrize("pooled", [False, True], ids=["documents", "pooled"])
@pytest.mark.parametrize("case", CASES)
@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(1, 8), change=st.sampled_from([0.05, 0.6, 3.0]))
def test_table_rows_sum_to_the_lost_overlap(case, pooled, seed, k, change):
    activation, bias = CASES[case]
    dictionary = random_dictionary(activation, bias=bias, seed=seed % 7)
    group = texts(6, seed=seed, change=change)
    sums = sums_of([group[:2], group[2:]], measure_of(dictionary, pooled=pooled, k=k))
    estimates = CorpusEstimates(sums, Settings(k, pooled, 0.95, 100, 0), 0)
    listed = sums.columns["listed"]
    if listed.sum() == 0:
        assert pooled or np.isnan(estimates.curve.mean).all()
        return
    table = table_of(sums, estimates)
    total = sum(table["contribution"])
    per_token = sums.overlap[:, k - 1]
    with np.errstate(invalid="ignore"):
        expected = per_token.sum() / listed.sum() if pooled else np.nanmean(per_token / listed)
    assert total == pytest.approx(1 - expected, abs=1e-9)
    if not pooled:
        assert total == pytest.approx(1 - estimates.curve.mean[k - 1], abs=1e-9)
    elif sums.columns["short"].sum() == 0 and listed.sum() == sums.columns["tokens"].sum():
        assert total == pytest.approx(1 - estimates.curve.mean[k - 1] / k, abs=1e-9)
    assert table["latent"][0] == LENGTH_ROW and table["latent"].count(LENGTH_ROW) == 1
    parts = np.array(table["contribution_entered"][1:]) + np.array(table["contribution_left"][1:])
    np.testing.assert_allclose(parts, table["contribution"][1:], atol=1e-12)


def test_short_lists_really_occur_in_those_cases():
    """The cases above are what their names say, and the list-length row carries something."""
    group = texts(8, seed=2)
    for case, (activation, bias) in CASES.items():
        sums = sums_of([group], measure_of(random_dictionary(activation, bias=bias)))
        tokens, listed, short, gap = (
            sums.columns[name].sum() for name in ("tokens", "listed", "short", "length_gap")
        )
        assert (short > 0) == (gap > 0) == (case != "full lists"), case
        assert (listed < tokens) or "empty" not in case


def test_one_latent_row_by_hand():
    """Sums of one latent against sets counted token by token."""
    dictionary, group = random_dictionary("relu", bias=-2.0), texts(5, seed=4, change=0.8)
    sums = sums_of([group], measure_of(dictionary))
    estimates = CorpusEstimates(sums, Settings(3, False, 0.95, 100, 0), 0)
    table = table_of(sums, estimates)
    expected = {}
    documents = 0
    for text in group:
        z = [codes_of(dictionary, text.acts[text.keep, model]) for model in range(2)]
        lists = [(strongest(a, 3), strongest(b, 3)) for a, b in zip(*z, strict=True)]
        lists = [(a, b) for a, b in lists if a or b]
        documents += bool(lists)
        for a, b in lists:
            for latent in set(a) ^ set(b):
                weight = 1 / (2 * max(len(a), len(b)) * len(lists))
                expected[latent] = expected.get(latent, 0) + weight
    found = {latent: c for latent, c in zip(table["latent"][1:], table["contribution"][1:], strict=True) if c}
    assert found.keys() == expected.keys() and len(found) > 3
    for latent, value in found.items():
        assert value == pytest.approx(expected[latent] / documents, abs=1e-9)


def test_swapping_the_models_swaps_the_whole_table():
    dictionary, group = random_dictionary("relu", bias=-1.5), texts(6, seed=8)
    swapped = [
        type(text)(text.index, text.ids, text.keep, text.acts[:, ::-1].copy(), text.loss, text.kl)
        for text in group
    ]
    one, other = (sums_of([docs], measure_of(dictionary)) for docs in (group, swapped))
    for name in ("overlap", "counts"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    for name in ("value_change", "length_gap", "short", "delta_squares", "delta_residual"):
        np.testing.assert_allclose(one.columns[name], other.columns[name], rtol=1e-6)
    first, second = one.latents["sums"], other.latents["sums"]
    np.testing.assert_allclose(first, second[:, [1, 0, 3, 2, 5, 4, 7, 6]], atol=1e-6)
    np.testing.assert_allclose(one.latents["change"][:, 0], -other.latents["change"][:, 0], atol=1e-6)
