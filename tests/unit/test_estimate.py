"""Estimates: against numbers worked out by hand, the original's definition, and simulated truth."""

import numpy as np
import pytest
import torch
from scipy import stats

from paired_streams import codes_of, measure_of, random_dictionary, sums_of, texts
from palimpsest.audit.estimate import CorpusEstimates, Settings, compare, curve_rows, exchange
from palimpsest.audit.sums import COLUMNS, CorpusSums
from palimpsest.log import log

REPEATS = 300


def sums_from(overlaps, tokens=None, counts=None, **columns):
    """Sums of documents whose mean overlap per k is given `[documents, k]`, all tokens listed."""
    overlaps = np.atleast_2d(np.asarray(overlaps, float))
    tokens = np.full(len(overlaps), 4.0) if tokens is None else np.asarray(tokens, float)
    table = {name: np.zeros(len(overlaps)) for name in COLUMNS} | {"tokens": tokens, "listed": tokens.copy()}
    counts = np.zeros_like(overlaps) if counts is None else np.asarray(counts, float)
    totals = {name: np.asarray(values, float) for name, values in columns.items()}
    listed = totals.get("listed", tokens)[:, None]
    return CorpusSums(np.arange(len(overlaps)), table | totals, overlaps * listed, counts)


def estimates(sums, *, pooled=False, k=1, resamples=400, stream=0, seed=0, confidence=0.95):
    return CorpusEstimates(sums, Settings(k, pooled, confidence, resamples, seed), stream)


def test_rates_by_hand():
    general = estimates(sums_from([[0.7, 0.9], [0.9, 1.0], [0.8, 0.8]]))
    task = estimates(sums_from([[0.5, 0.9], [0.7, 0.9]]), stream=1)
    np.testing.assert_allclose(general.curve.mean, [0.8, 0.9])
    np.testing.assert_allclose(task.curve.mean, [0.6, 0.9])
    found = compare(task, general)
    np.testing.assert_allclose(found.idr, [0.25, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.idr_abs, [0.2, 0.0], atol=1e-12)
    np.testing.assert_allclose(found.churn_ratio, [2.0, 1.0])


def test_documents_weigh_equally_and_those_without_lists_do_not():
    """Means over documents: 0.2 and 0.8, whatever their lengths; the third has no token with a list."""
    sums = sums_from([[0.2], [0.8], [np.nan]], tokens=[100, 2, 5], listed=[90, 2, 0])
    sums.overlap[2] = 0.0
    found = estimates(sums)
    assert found.curve.mean[0] == pytest.approx(0.5)
    assert np.isnan(found.curve.documents[2, 0])
    assert np.nanmin(found.curve.samples) == pytest.approx(0.2)
    assert np.nanmax(found.curve.samples) == pytest.approx(0.8)


def test_legacy_rates_by_hand():
    """Counts over all tokens of all documents; k itself is the scale of IDR_abs and churn."""
    general = estimates(sums_from([[0, 0]] * 2, [10, 30], [[8, 16], [28, 44]]), pooled=True, k=2)
    task = estimates(sums_from([[0, 0]] * 2, [5, 15], [[3, 8], [9, 17]]), pooled=True, k=2, stream=1)
    np.testing.assert_allclose(general.curve.mean, [0.9, 1.5])
    np.testing.assert_allclose(task.curve.mean, [0.6, 1.25])
    found = compare(task, general)
    np.testing.assert_allclose(found.idr, [1 - 0.6 / 0.9, 1 - 1.25 / 1.5])
    np.testing.assert_allclose(found.idr_abs, [0.3, 0.125])
    np.testing.assert_allclose(found.churn_ratio, [0.4 / 0.1, 0.75 / 0.5])


def original(base, tuned, k):
    """The original's figures: integer counts of equal top-k indices at every position, pooled over tokens."""
    a, b = (torch.from_numpy(z).topk(k, dim=1).indices for z in (base, tuned))
    counts = [len(set(x) & set(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    return float(np.mean(counts))


@pytest.mark.parametrize("k", [1, 5])
def test_legacy_mode_is_the_original_definition(k):
    dictionary = random_dictionary("relu", latents=40, bias=1.0)
    corpora = [texts(8, seed=seed, everything=True, longest=15, change=c) for seed, c in ((1, 0.3), (2, 0.9))]
    expected, found = [], []
    for stream, corpus in enumerate(corpora):
        z = [np.concatenate([codes_of(dictionary, text.acts[:, m]) for text in corpus]) for m in range(2)]
        assert all((codes > 0).sum(1).min() >= k for codes in z)
        expected.append(original(*z, k))
        sums = sums_of([corpus[:3], corpus[3:]], measure_of(dictionary, k=k, k_max=8, pooled=True))
        found.append(estimates(sums, pooled=True, k=k, stream=stream))
        assert found[-1].curve.mean[k - 1] == pytest.approx(expected[-1], abs=1e-12)
    assert 0.1 * k < expected[1] < expected[0] < k
    against = compare(found[1], found[0])
    assert against.idr_abs[k - 1] == pytest.approx((expected[0] - expected[1]) / k, abs=1e-12)
    assert against.churn_ratio[k - 1] == pytest.approx((k - expected[1]) / (k - expected[0]), abs=1e-12)


def test_a_corpus_against_itself_is_exactly_zero():
    """The same resamples on both sides cancel, in every resample."""
    rng = np.random.default_rng(0)
    one = estimates(sums_from(rng.beta(5, 2, (30, 6))))
    found = compare(one, estimates(one.sums))
    for value, interval in ((found.idr, found.idr_ci), (found.idr_abs, found.idr_abs_ci)):
        assert (value == 0).all() and (interval == 0).all()
    assert (found.churn_ratio == 1).all() and (found.churn_ratio_ci == 1).all()
    assert (found.minimum_detectable == 0).all()
    independent = compare(one, estimates(one.sums, stream=1))
    assert (
        (independent.idr == 0).all()
        and (independent.idr_ci[0] < 0).all()
        and (independent.idr_ci[1] > 0).all()
    )


@pytest.mark.parametrize("documents", [11, 23, 37, 50])
def test_models_that_agree_everywhere_give_zero_without_rounding(documents):
    ones = [estimates(sums_from(np.ones((documents, 3))), stream=stream) for stream in range(2)]
    found = compare(*ones)
    assert (found.idr == 0).all() and (found.idr_ci == 0).all() and (found.idr_abs_ci == 0).all()
    assert np.isnan(found.churn_ratio).all() and np.isnan(found.churn_ratio_ci).all()
    assert exchange(*ones) == 1
    same = ones[0].r2_delta()
    assert np.isnan(same[0]) and np.isnan(same[1]).all()


def test_no_overlap_at_all_has_no_rate():
    nothing = estimates(sums_from(np.zeros((12, 2))))
    some = estimates(sums_from(np.full((12, 2), 0.5)), stream=1)
    found = compare(some, nothing)
    assert (
        np.isnan(found.idr).all()
        and np.isnan(found.idr_ci).all()
        and np.isnan(found.minimum_detectable).all()
    )
    np.testing.assert_allclose(found.idr_abs, -0.5)
    np.testing.assert_allclose(compare(nothing, some).idr, 1.0)


def test_means_with_a_difference_and_per_token():
    sums = sums_from(
        np.ones((3, 1)),
        tokens=[2, 4, 10],
        loss_base=[2.0, 4.0, 0.0],
        loss_tuned=[4.0, 2.0, 0.0],
        predicted=[1.0, 2.0, 0.0],
    )
    by_document = estimates(sums).mean("loss_tuned", "predicted", minus="loss_base")
    assert by_document[0] == pytest.approx((2.0 - 1.0) / 2)
    pooled = estimates(sums, pooled=True).mean("loss_tuned", "predicted", minus="loss_base")
    assert pooled[0] == pytest.approx(0.0)
    assert by_document[1] == pytest.approx((-1.0, 2.0))
    value, interval = estimates(sums).mean("kl", "valued")
    assert np.isnan(value) and np.isnan(interval).all()


def test_explained_change_by_hand():
    sums = sums_from(np.ones((2, 1)), delta_residual=[1.0, 2.0], delta_squares=[2.0, 10.0])
    value, (lo, hi) = estimates(sums).r2_delta()
    assert value == pytest.approx(0.75) and (lo, hi) == pytest.approx((0.5, 0.8))


def test_rows_of_the_curve():
    rng = np.random.default_rng(1)
    general, task = (estimates(sums_from(rng.beta(a, 2, (25, 4))), stream=a) for a in (6, 3))
    against = compare(task, general)
    rows = curve_rows("math", "task", task, against)
    assert [row["k"] for row in rows] == [1, 2, 3, 4]
    for i, row in enumerate(rows):
        assert row["lo"] < row["intersection_mean"] == task.curve.mean[i] < row["hi"]
        assert row["idr_lo"] < row["idr"] == against.idr[i] < row["idr_hi"]
    bare = curve_rows("general", "general", general, None)
    assert all(row[name] is None for row in bare for name in ("idr", "idr_lo", "idr_abs", "churn_ratio"))
    assert rows[0].keys() == bare[0].keys()


def test_resamples_follow_the_seed_and_the_corpus():
    sums = sums_from(np.random.default_rng(2).random((20, 2)))
    one, again = estimates(sums).curve.samples, estimates(sums).curve.samples
    np.testing.assert_array_equal(one, again)
    for other in (estimates(sums, seed=1), estimates(sums, stream=1)):
        assert (other.curve.samples != one).any()


def simulated(rng, mean, documents, spread=8.0, stream=0, seed=0):
    overlaps = rng.beta(mean * spread, (1 - mean) * spread, (documents, 1))
    return estimates(sums_from(overlaps), resamples=300, stream=stream, seed=seed)


@pytest.mark.parametrize(("mine", "other", "documents"), [(0.8, 0.8, 40), (0.6, 0.85, 25)])
def test_intervals_of_the_rates_cover_the_truth(mine, other, documents):
    rng = np.random.default_rng(3)
    truth = {"idr": 1 - mine / other, "idr_abs": other - mine, "churn_ratio": (1 - mine) / (1 - other)}
    hits = dict.fromkeys(truth, 0)
    for seed in range(REPEATS):
        task = simulated(rng, mine, documents, stream=1, seed=seed)
        found = compare(task, simulated(rng, other, documents, seed=seed))
        for name, value in truth.items():
            lo, hi = getattr(found, f"{name}_ci")[:, 0]
            hits[name] += lo <= value <= hi
    log.info("coverage at %d documents: %s of %d", documents, hits, REPEATS)
    lowest, highest = stats.binom.ppf(5e-5, REPEATS, 0.925), stats.binom.ppf(1 - 5e-5, REPEATS, 0.955)
    assert all(lowest <= n <= highest for n in hits.values()), hits


def test_the_minimum_detectable_rate_is_detected_four_times_in_five():
    """At a true IDR of the size that the estimate names, the interval excludes zero about 80 % of the time."""
    rng = np.random.default_rng(4)
    general, documents = 0.8, 40
    named = [
        compare(simulated(rng, general, documents, stream=1), simulated(rng, general, documents))
        for _ in range(30)
    ]
    effect = float(np.mean([one.minimum_detectable[0] for one in named]))
    hits = 0
    for seed in range(REPEATS):
        task = simulated(rng, general * (1 - effect), documents, stream=1, seed=seed)
        lo, hi = compare(task, simulated(rng, general, documents, seed=seed)).idr_ci[:, 0]
        hits += not lo <= 0 <= hi
    log.info("power at the minimum detectable IDR of %.3f: %.3f", effect, hits / REPEATS)
    assert 0.7 < hits / REPEATS < 0.9


def test_exchange_is_at_the_primary_k():
    rng = np.random.default_rng(5)
    base = rng.random((30, 2))
    task, general = base.copy(), rng.random((30, 2))
    task[:, 1] += 1.0
    at = [
        exchange(*(estimates(sums_from(values), k=k, stream=i) for i, values in enumerate((task, general))))
        for k in (1, 2)
    ]
    assert at[0] > 0.05 and at[1] <= 0.01
