"""Intervals cover, tests keep their level, multiplicity is controlled: simulated and against scipy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from scipy import stats

from palimpsest.log import log
from palimpsest.stats import (
    benjamini_hochberg,
    binomial_interval,
    exchange_p,
    holm,
    mean_t,
    minimum_detectable,
    percentile_interval,
    resample_weights,
    weighted_mean,
)

REPEATS = 400


def within(hits, repeats, probability, slack=0.0):
    """Whether a count is one that a binomial of that probability (± slack) gives all but once in 10 000."""
    lo = stats.binom.ppf(5e-5, repeats, probability - slack)
    hi = stats.binom.ppf(1 - 5e-5, repeats, probability + slack)
    return lo <= hits <= hi


def interval_of(values, rng, resamples=400, confidence=0.95):
    weights = resample_weights(len(values), resamples, rng)
    return percentile_interval(weighted_mean(weights, values), confidence)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("documents", [25, 80])
def test_bootstrap_intervals_of_means_cover(documents, confidence):
    """Documents of very unequal overlap: a percentile interval of 25 of them may be a little short."""
    rng = np.random.default_rng(1)
    truth = 6 / 8
    hits = 0
    for _ in range(REPEATS):
        lo, hi = interval_of(rng.beta(6, 2, documents), rng, confidence=confidence)
        hits += lo <= truth <= hi
    log.info(f"coverage of {documents} documents at {confidence:.0%}: {hits / REPEATS:.3f}")
    assert within(hits, REPEATS, confidence - 0.01, slack=0.015)


def test_intervals_of_tokens_would_not_cover():
    """Tokens of a document share its mean; the interval over documents covers, one over tokens cannot."""
    rng = np.random.default_rng(2)
    hits = {"documents": 0, "tokens": 0}
    for _ in range(200):
        tokens = rng.normal(0.8, 0.1, (20, 1)) + rng.normal(0, 0.1, (20, 15))
        for unit, values in (("documents", tokens.mean(1)), ("tokens", tokens.ravel())):
            lo, hi = interval_of(values, rng, 200)
            hits[unit] += lo <= 0.8 <= hi
    assert hits["documents"] > 0.88 * 200 and hits["tokens"] < 0.7 * 200


def test_documents_without_a_value_are_left_out_of_every_resample():
    rng = np.random.default_rng(3)
    weights = resample_weights(30, 500, rng)
    values = rng.normal(size=(30, 2))
    values[::3, 0] = np.nan
    values[:, 1] = np.nan
    found = weighted_mean(weights, values)
    kept = np.isfinite(values[:, 0])
    direct = [np.repeat(values[kept, 0], w[kept].astype(int)).mean() for w in weights]
    np.testing.assert_allclose(found[:, 0], direct)
    lo, hi = percentile_interval(found)
    assert lo[0] < np.nanmean(values[:, 0]) < hi[0]
    assert np.isnan(lo[1]) and np.isnan(hi[1])


def test_intervals_with_missing_documents_cover():
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(REPEATS):
        values = np.where(rng.random(60) < 0.3, np.nan, rng.exponential(1.0, 60))
        lo, hi = interval_of(values, rng, 300)
        hits += lo <= 1.0 <= hi
    log.info(f"coverage with a third of the documents missing: {hits / REPEATS:.3f}")
    assert within(hits, REPEATS, 0.93, slack=0.025)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 200), st.integers(1, 50), st.integers(0, 999), st.floats(0.1, 3))
def test_weights_draw_as_many_documents_as_there_are(n, resamples, seed, value):
    weights = resample_weights(n, resamples, np.random.default_rng(seed))
    assert weights.shape == (resamples, n) and (weights == weights.round()).all() and (weights >= 0).all()
    assert (weights.sum(1) == n).all()
    assert (weighted_mean(weights, np.ones(n)) == 1).all()
    assert (weighted_mean(weights, np.zeros((n, 3))) == 0).all()
    np.testing.assert_allclose(weighted_mean(weights, np.full((n, 2, 3), value)), value)


def test_one_draw_serves_every_quantity():
    """A resample keeps a document's two values together, so what always differs by one still does."""
    rng = np.random.default_rng(0)
    weights, values = resample_weights(40, 300, rng), rng.normal(size=40)
    np.testing.assert_allclose(weighted_mean(weights, values + 1) - weighted_mean(weights, values), 1.0)
    assert weighted_mean(weights, values).std() == pytest.approx(values.std() / np.sqrt(40), rel=0.15)


def test_infinite_resamples_do_not_decide_an_interval_alone():
    samples = np.tile(np.arange(1000.0)[:, None], 2)
    samples[:100, 1] = np.nan
    lo, hi = percentile_interval(samples, 0.9)
    np.testing.assert_allclose([lo[0], hi[0]], np.percentile(samples[:, 0], [5, 95]))
    np.testing.assert_allclose([lo[1], hi[1]], np.percentile(samples[100:, 1], [5, 95]))


def test_exchange_keeps_its_level_and_finds_a_shift():
    rng = np.random.default_rng(5)
    null, shifted = [], []
    for _ in range(REPEATS):
        a, b = rng.beta(8, 2, 22), rng.beta(8, 2, 31)
        null.append(exchange_p(a, b, 199, rng))
        shifted.append(exchange_p(a - 0.15, b, 199, rng) if len(shifted) < 60 else 0.0)
    level = np.mean(np.array(null) <= 0.05)
    log.info(f"level of the exchange test at 5 %: {level:.3f}, at 20 %: {np.mean(np.array(null) <= 0.2):.3f}")
    assert within(round(level * REPEATS), REPEATS, 0.05)
    assert within(int(np.sum(np.array(null) <= 0.2)), REPEATS, 0.2)
    assert np.mean(np.array(shifted[:60]) <= 0.05) > 0.8


def test_exchange_is_two_sided_exact_and_ignores_documents_without_value():
    rng = np.random.default_rng(6)
    a, b = np.array([0.1, 0.2, 0.3]), np.array([0.7, 0.8, 0.9])
    # 20 ways to choose three of six; the observed one and its mirror are the most extreme.
    assert exchange_p(a, b, 9999, rng) == pytest.approx(0.1)
    assert exchange_p(b, a, 9999, rng) == pytest.approx(0.1)
    padded = np.concatenate([a, [np.nan, np.nan]])
    assert exchange_p(padded, b, 9999, rng) == pytest.approx(0.1)
    assert exchange_p(np.ones(8), np.ones(9), 300, rng) == 1
    assert np.isnan(exchange_p(np.array([0.5, np.nan]), b, 99, rng))


def test_exchange_in_pieces_is_the_same_test():
    """Two large sets go through in several batches of permutations."""
    rng = np.random.default_rng(7)
    a, b = rng.normal(size=30_000), rng.normal(0.05, 1, 40_000)
    assert exchange_p(a, b, 99, rng) == pytest.approx(0.02)


samples = arrays.arrays(
    np.float64, st.tuples(st.integers(2, 30), st.just(3)), elements=st.floats(-5, 5, width=16)
)


@settings(max_examples=80, deadline=None)
@given(samples, st.sampled_from([0.8, 0.95]))
def test_mean_t_equals_scipy(values, confidence):
    n = len(values)
    found = mean_t(values.sum(0), (values**2).sum(0), n, confidence)
    for column in range(3):
        mean, lo, hi, p = (float(part[column]) for part in found)
        x = values[:, column]
        assert mean == pytest.approx(x.mean(), abs=1e-9)
        if x.std() < 1e-3 * max(1, abs(x.mean())):
            continue
        expected = stats.ttest_1samp(x, 0.0)
        assert p == pytest.approx(expected.pvalue, rel=1e-5, abs=1e-9)
        assert (lo, hi) == pytest.approx(tuple(expected.confidence_interval(confidence)), rel=1e-5, abs=1e-7)


def test_mean_t_without_spread_or_documents():
    mean, lo, hi, p = mean_t(np.array([0.0, 8.0]), np.array([0.0, 16.0]), 4)
    assert mean.tolist() == lo.tolist() == hi.tolist() == [0.0, 2.0]
    assert p.tolist() == [1.0, 0.0]
    for n in (0, 1):
        mean, lo, hi, p = mean_t(np.array([3.0]), np.array([9.0]), n)
        assert mean == [3.0] and np.isnan([lo, hi, p]).all()


def test_mean_t_keeps_its_level():
    rng = np.random.default_rng(8)
    values = rng.normal(size=(12, 4000))
    p = mean_t(values.sum(0), (values**2).sum(0), 12)[3]
    assert within(int((p < 0.05).sum()), 4000, 0.05)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 1), st.just(np.nan)), min_size=1, max_size=30))
def test_adjusted_p_equals_scipy_and_skips_what_is_missing(p):
    p = np.array(p)
    q = benjamini_hochberg(p)
    known = np.isfinite(p)
    assert np.isnan(q[~known]).all()
    if known.any():
        np.testing.assert_allclose(q[known], stats.false_discovery_control(p[known]))
        assert (q[known] >= p[known] - 1e-12).all()


def test_false_discoveries_stay_below_the_rate():
    rng = np.random.default_rng(9)
    shares, found, raw = [], [], []
    for _ in range(REPEATS):
        z = rng.normal(size=120)
        z[:24] += 3.5
        p = 2 * stats.norm.sf(np.abs(z))
        hits = benjamini_hochberg(p) < 0.1
        shares.append(hits[24:].sum() / max(hits.sum(), 1))
        raw.append((p < 0.1)[24:].sum() / max((p < 0.1).sum(), 1))
        found.append(hits[:24].mean())
    log.info(f"false discovery rate at 10 %: {np.mean(shares):.3f}, unadjusted {np.mean(raw):.3f}")
    expected = 0.1 * 96 / 120
    assert abs(np.mean(shares) - expected) < 4 * np.std(shares) / np.sqrt(REPEATS)
    assert np.mean(raw) > 0.2 and np.mean(found) > 0.7


def test_all_nulls_are_rarely_rejected():
    rng = np.random.default_rng(10)
    alarms = sum((benjamini_hochberg(rng.random(50)) < 0.05).any() for _ in range(REPEATS))
    assert within(int(alarms), REPEATS, 0.05)


@pytest.mark.parametrize(("alpha", "power"), [(0.05, 0.8), (0.01, 0.5)])
def test_the_detectable_effect_is_found_that_often(alpha, power):
    rng = np.random.default_rng(11)
    effect = minimum_detectable(0.3, alpha=alpha, power=power)
    seen = rng.normal(effect, 0.3, 4000)
    hits = int((2 * stats.norm.sf(np.abs(seen) / 0.3) < alpha).sum())
    assert within(hits, 4000, power)
    assert minimum_detectable(0.0) == 0 and np.isnan(minimum_detectable(float("nan")))


def test_holm_by_hand():
    p = np.array([0.01, 0.04, np.nan, 0.03, 0.005])
    np.testing.assert_allclose(holm(p), [0.03, 0.06, np.nan, 0.06, 0.02])
    np.testing.assert_allclose(holm(np.array([0.6, 0.7])), [1.0, 1.0])
    assert holm(np.array([0.2])) == [0.2] and np.isnan(holm(np.array([np.nan]))).all()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.floats(0.01, 0.5))
def test_holm_rejects_what_the_step_down_procedure_rejects(p, alpha):
    p = np.array(p)
    rejected = np.zeros(len(p), dtype=bool)
    for step, i in enumerate(np.argsort(p, kind="stable")):
        if p[i] * (len(p) - step) > alpha:
            break
        rejected[i] = True
    np.testing.assert_array_equal(holm(p) <= alpha, rejected)


def test_holm_keeps_the_family_at_its_level():
    rng = np.random.default_rng(12)
    alarms = sum((holm(rng.random(5)) <= 0.05).any() for _ in range(REPEATS))
    assert within(int(alarms), REPEATS, 0.05)


@pytest.mark.parametrize(("k", "n"), [(0, 20), (3, 40), (40, 40), (7, 13)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_exact_binomial_interval_has_its_tails(k, n, confidence):
    lo, hi = binomial_interval(k, n, confidence)
    tail = (1 - confidence) / 2
    assert lo <= k / n <= hi
    assert lo == 0 if k == 0 else stats.binom.sf(k - 1, n, lo) == pytest.approx(tail)
    assert hi == 1 if k == n else stats.binom.cdf(k, n, hi) == pytest.approx(tail)


def test_binomial_interval_of_nothing_is_everything():
    assert binomial_interval(0, 0) == (0.0, 1.0)
    assert binomial_interval(2, 40)[1] == pytest.approx(0.1692, abs=1e-4)
