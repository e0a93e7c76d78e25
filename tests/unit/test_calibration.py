"""The calibrated statistic against direct computation, the verdict table, multiplicity by hand, refusals."""

import json
from dataclasses import asdict, replace
from itertools import product

import numpy as np
import pytest
from scipy import stats

from palimpsest.audit.calibration import Level, Panel, calibrate, kind_of, nulls_needed, verdict_of
from palimpsest.audit.calibration.grid import maximum, null_maxima
from palimpsest.audit.calibration.intervals import Resamples
from palimpsest.audit.calibration.sentences import audit_sentence, corpus_sentence
from palimpsest.audit.calibration.statistic import FLOOR, contrasts, fit, judge, measure
from palimpsest.audit.calibration.verdicts import Evidence, adjusted
from palimpsest.errors import ConfigError, NumericsError
from palimpsest.findings import DomainFinding, NullTest

NAMES = ("general", "math", "code", "web")
LEVEL = Level(resamples=50)


def panel_of(seed=0, *, nulls=12, names=NAMES, grid=(("resid_post.1", 5),), families=None, documents=(9, 14)):
    rng = np.random.default_rng(seed)
    overlap, loss = {}, {}
    for i, name in enumerate(names):
        shape = (nulls + 1, documents[i % 2])
        overlap[name] = rng.beta(6, 2, (*shape, len(grid)))
        loss[name] = rng.normal(0.1, 0.3, shape)
        overlap[name][:, 0], loss[name][:, 1] = np.nan, np.nan
    families = families or tuple(("other", *names[1:])[i % len(names)] for i in range(nulls))
    return Panel(overlap, loss, tuple(grid), families)


def calibrated(panel, **changes):
    return calibrate(
        panel, **({"delta_loss_ci": None, "declared": [], "settings": LEVEL, "battery": {}} | changes)
    )


def contrast_by_loop(panel, name, g=0):
    found = []
    for model in range(1 + panel.nulls):
        change = {n: np.log(1 - np.nanmean(v[model, :, g])) for n, v in panel.overlap.items()}
        found.append(change.pop(name) - np.median(list(change.values())))
    return np.array(found)


def test_contrasts_and_drift_equal_a_loop():
    panel = panel_of(grid=(("a", 1), ("a", 5), ("b", 1)))
    measured = measure(panel)
    for g in range(3):
        np.testing.assert_allclose(
            measured.drift[g], [np.log(1 - np.nanmean(v[:, g])) for v in panel.overlap["general"]]
        )
        for name in NAMES:
            np.testing.assert_allclose(measured.contrast[name][g], contrast_by_loop(panel, name, g))
    np.testing.assert_allclose(measured.loss["web"], np.nanmean(panel.loss["web"], 1))


@pytest.mark.parametrize("matched", [False, True])
def test_regression_and_leave_one_out_equal_refits(matched):
    rng = np.random.default_rng(1)
    x, y = rng.normal(-2, 0.5, (3, 11)), rng.normal(size=(3, 11))
    found = judge(x, y, matched=matched)

    def columns(x):
        return np.stack([np.ones_like(x)] + ([] if matched else [x]), 1)

    def refit(x, y):
        return np.linalg.lstsq(columns(x), y, rcond=None)[0]

    for row in range(3):
        nx, ny = x[row, 1:], y[row, 1:]
        design, at = columns(nx), columns(x[row, :1])
        line = refit(nx, ny)
        residuals = ny - design @ line
        freedom = len(nx) - design.shape[1]
        variance = residuals @ residuals / freedom * (1 + at @ np.linalg.inv(design.T @ design) @ at.T)[0, 0]
        residual = y[row, 0] - (at @ line)[0]
        assert found.freedom == freedom
        assert found.expected[row] == pytest.approx((at @ line)[0])
        assert found.z[row] == pytest.approx(residual / np.sqrt(variance))
        assert found.p[row] == pytest.approx(2 * stats.t.sf(abs(residual) / np.sqrt(variance), freedom))
        left = []
        for r in range(len(nx)):
            keep = np.arange(len(nx)) != r
            left.append(ny[r] - (columns(nx[r : r + 1]) @ refit(nx[keep], ny[keep]))[0])
        np.testing.assert_allclose(found.left_out[row], left)
        rank = (1 + (np.abs(left) >= abs(residual)).sum()) / (len(nx) + 1)
        assert found.p_rank[row] == pytest.approx(rank)


def line_and_error(x, y, at):
    """Prediction at `at` of least squares of `y` on `x`, and the standard deviation of one more point there."""
    design, row = np.stack([np.ones_like(x), x], 1), np.array([1.0, at])
    line = np.linalg.lstsq(design, y, rcond=None)[0]
    variance = ((y - design @ line) ** 2).sum() / (len(x) - 2)
    return row @ line, np.sqrt(variance * (1 + row @ np.linalg.inv(design.T @ design) @ row))


def test_a_scale_is_divided_by_and_given_back_at_the_suspects():
    rng = np.random.default_rng(18)
    x, y, scale = rng.normal(-2, 0.5, (3, 11)), rng.normal(size=(3, 11)), rng.uniform(0.1, 2, (3, 11))
    found = judge(x, y, scale=scale)
    for row in range(3):
        ratio, unit, nx = y[row] / scale[row], scale[row, 0], x[row, 1:]
        predicted, error = line_and_error(nx, ratio[1:], x[row, 0])
        residual = y[row, 0] - predicted * unit
        assert found.expected[row] == pytest.approx(predicted * unit)
        assert found.residual[row] == pytest.approx(residual)
        assert found.error[row] == pytest.approx(error * unit)
        assert found.z[row] == pytest.approx(residual / (error * unit))
        assert found.p[row] == pytest.approx(2 * stats.t.sf(abs(residual) / (error * unit), 8))
        whole = [(ratio[r + 1] - line_and_error(nx, ratio[1:], nx[r])[0]) * unit for r in range(10)]
        np.testing.assert_allclose(found.residuals[row], whole)
        left = []
        for r in range(10):
            keep = np.arange(10) != r
            left.append((ratio[r + 1] - line_and_error(nx[keep], ratio[1:][keep], nx[r])[0]) * unit)
        np.testing.assert_allclose(found.left_out[row], left)
        assert found.p_rank[row] == pytest.approx((1 + (np.abs(left) >= abs(residual)).sum()) / 11)
    even = judge(x, y)
    for one, other in zip(judge(x, y, scale=np.full_like(x, 0.3)), even, strict=True):
        np.testing.assert_allclose(one, other)
    assert not np.allclose(found.z, even.z)


def test_weights_of_the_regression_are_repetitions():
    rng = np.random.default_rng(2)
    x, y, weights = rng.normal(size=(1, 8)), rng.normal(size=(1, 8)), np.array([[2.0, 0, 1, 1, 0, 3, 0, 1]])
    repeated = [np.repeat(one[0], weights[0].astype(int))[None] for one in (x, y)]
    at = np.array([[0.3, -1.0]])
    np.testing.assert_allclose(fit(x, y, weights).at(at), fit(*repeated).at(at))
    np.testing.assert_allclose(
        fit(*repeated).at(at)[0], np.polyval(np.polyfit(*(r[0] for r in repeated), 1), at[0])
    )


def test_intervals_equal_a_loop_of_resamples():
    """The same documents for every model, other nulls, and a new line, drawn as the stage draws them."""
    panel = panel_of(3, families=("other",) * 12)
    used = np.arange(12) != 4
    found = Resamples(panel, NAMES, LEVEL)
    again = [[], []]
    draws = {}
    for i, (name, values) in enumerate(panel.overlap.items()):
        n = values.shape[1]
        draws[name] = np.random.default_rng([0, 101, i]).multinomial(n, np.full(n, 1 / n), 50)
    nulls = np.random.default_rng([0, 102, 2]).multinomial(11, np.full(11, 1 / 11), 50)
    for b in range(50):
        rows = {n: np.repeat(np.arange(len(w[b])), w[b]) for n, w in draws.items()}
        resampled = replace(
            panel,
            overlap={n: v[:, rows[n]] for n, v in panel.overlap.items()},
            loss={n: v[:, rows[n]] for n, v in panel.loss.items()},
        )
        measured = measure(resampled)
        chosen = 1 + np.repeat(np.flatnonzero(used), nulls[b])
        drift, g = measured.drift[0], np.exp(measured.drift[0])
        for i, (x, y, unit) in enumerate(
            ((drift, measured.contrast["code"][0], 1.0), (g, measured.loss["code"] / g, g[0]))
        ):
            again[i].append((y[0] - np.polyval(np.polyfit(x[chosen], y[chosen], 1), x[0])) * unit)
    spread = found.spread("code", used)
    reach = np.sqrt(8 / 7) * stats.t.ppf(0.975, 7)
    tail = 100 * stats.norm.sf(reach)
    for interval, values in zip((spread.features, spread.loss), again, strict=True):
        np.testing.assert_allclose(interval, np.percentile(values, [tail, 100 - tail]), rtol=1e-6)


def test_maximum_over_one_point_is_its_own_test_and_copies_change_nothing():
    panel = panel_of(4, families=("other",) * 12)
    measured = measure(panel)
    x, y = measured.drift, measured.contrast["math"]
    level, p = Level(resamples=20_000), judge(x, y).p[0]
    one = maximum(x, y, level, 1)
    assert one.p == pytest.approx(p, abs=0.02) and one.z == pytest.approx(judge(x, y).z)
    copies = maximum(np.repeat(x, 5, 0), np.repeat(y, 5, 0), level, 1)
    assert copies.p == pytest.approx(p, abs=0.02)
    rng = np.random.default_rng(5)
    found = judge(np.tile(x, (6, 1)), rng.normal(size=(6, 13)))
    # Six points of little correlation: each alone exceeds its 5 % point in 5 %, the largest far more often.
    beyond = (null_maxima(found, level, 1) > stats.t.isf(0.025, 10)).mean()
    assert 0.15 < beyond < 0.3


def test_a_grid_point_without_overlap_has_no_z():
    panel = panel_of(6, grid=(("a", 5), ("b", 5)))
    panel.overlap["math"][:, :, 1] = np.nan
    found = calibrated(panel)
    z = {(row["name"], row["site"]): row["z"] for row in found.grid}
    assert z["math", "b"] is None and z["math", "a"] == pytest.approx(found.domains[1].features.z)
    assert all(domain.p_max is not None for domain in found.domains)


@pytest.mark.parametrize("alpha", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("matched", [False, True])
def test_nulls_needed_is_the_smallest_that_widens_by_half(alpha, matched):
    need, lost = nulls_needed(alpha, matched=matched), 1 if matched else 2
    limit = 1.5 * stats.norm.isf(alpha / 4)
    assert stats.t.isf(alpha / 4, need - lost) <= limit < stats.t.isf(alpha / 4, need - lost - 1)


def test_seven_nulls_are_needed_at_five_percent():
    assert nulls_needed(0.05) == 7 and nulls_needed(0.05, matched=True) == 6


def null_test(p=0.5, *, residual=0.1, statistic=0.1, expected=0.0, band=(-0.1, 0.1), rejects=False):
    return NullTest(
        statistic, expected, residual, (0.0, 1.0), band, np.sign(residual) * 3.0, p, 0.1, p, rejects, 12
    )


STATES = {
    # residual, interval of Δloss, rejects
    "absent": None,
    "accepted": (-0.3, (-0.4, -0.2), False),
    "fell": (-0.3, (-0.4, -0.2), True),
    "below but not fallen": (-0.3, (-0.1, 0.1), True),
    "below but risen": (-0.3, (0.1, 0.2), True),
    "rose": (0.3, (0.2, 0.4), True),
    "above but not risen": (0.3, (-0.1, 0.1), True),
    "above but fallen": (0.3, (-0.4, -0.2), True),
}
KINDS = {"fell": "specialised", "rose": "damaged"}
VERDICTS = {
    ("specialised", True): "declared-and-seen",
    ("shifted", True): "declared-and-seen",
    ("unchanged", True): "declared-but-unseen",
    ("damaged", True): "declared-but-damaged",
    ("specialised", False): "undeclared",
    ("shifted", False): "undeclared",
    ("damaged", False): "damaged",
    ("unchanged", False): "clear",
}


@pytest.mark.parametrize(
    ("features", "state", "declared"), list(product([True, False], STATES, [True, False]))
)
def test_every_combination_has_its_kind_verdict_and_sentence(features, state, declared):
    given = STATES[state]
    loss = given and null_test(residual=given[0], statistic=sum(given[1]) / 2, rejects=given[2])
    interval = given and given[1]
    kind = kind_of(features, loss, interval)
    assert kind == KINDS.get(state, "shifted" if features else "unchanged")
    verdict = verdict_of(kind, declared)
    assert verdict == VERDICTS[kind, declared]
    domain = DomainFinding(
        "math", "task", declared, null_test(rejects=features), loss or None, kind=kind, verdict=verdict
    )
    sentence = corpus_sentence(domain, interval)
    assert sentence.startswith(f"math: {kind}") and sentence.endswith(".") and "nan" not in sentence
    assert ("undeclared" in sentence) == (verdict == "undeclared")
    assert ("declared" in sentence) == (declared or verdict == "undeclared")
    assert ("features moved" in sentence) == features
    fell, rose = "its loss fell by 0.30" in sentence, "its loss rose by 0.30" in sentence
    assert (fell, rose) == (state == "fell", state == "rose")
    assert ("innocent fine-tunes of this drift" in sentence) and ("not judged" in sentence) == (loss is None)


def test_refused_has_no_kind():
    assert verdict_of(None, True) == verdict_of(None, False) == "refused"
    assert kind_of(False, null_test(rejects=True), None) == "unchanged"


def test_a_sentence_names_its_figures():
    loss = null_test(statistic=-0.2, expected=0.105, residual=-0.305, band=(0.05, 0.16), rejects=True)
    features = replace(null_test(residual=-1.0, rejects=True), z=-8.4)
    domain = DomainFinding(
        "math", "task", True, features, loss, kind="specialised", verdict="declared-and-seen"
    )
    assert corpus_sentence(domain, (-0.25, -0.15)) == (
        "math: specialised, as declared: its loss fell by 0.20 nats per token where innocent fine-tunes of this "
        "drift change it by +0.05 to +0.16, and its features moved less than theirs (z −8.4)."
    )
    still = replace(
        domain,
        declared=False,
        features=null_test(),
        loss=replace(loss, statistic=-0.001, residual=-0.106),
        kind="unchanged",
        verdict="clear",
    )
    assert corpus_sentence(still, (-0.01, 0.01)) == (
        "math: unchanged: its loss is unchanged (0.00 nats per token), which is less than innocent fine-tunes of "
        "this drift change it (+0.05 to +0.16), and its features did not move beyond theirs (z +3.0)."
    )


def test_a_sentence_says_what_the_nulls_are():
    features = replace(null_test(residual=1.0, rejects=True), z=8.4)
    domain = DomainFinding("math", "task", False, features, kind="shifted", verdict="undeclared")
    for source, nulls in (
        ("trained", "innocent fine-tunes of this drift"),
        ("spectrum", "random changes of this size"),
    ):
        assert corpus_sentence(domain, None, source) == (
            f"math: shifted, undeclared: its features moved more than those of {nulls} (z +8.4); "
            "its loss was not judged."
        )
    assert "innocent" in corpus_sentence(domain, None)


def test_the_audit_sentence_puts_the_undeclared_first():
    given = {
        "a": ("unchanged", "clear"),
        "b": (None, "refused"),
        "c": ("damaged", "damaged"),
        "d": ("unchanged", "declared-but-unseen"),
        "e": ("specialised", "declared-and-seen"),
        "f": ("shifted", "undeclared"),
    }
    domains = [DomainFinding(n, "task", False, kind=k, verdict=v) for n, (k, v) in given.items()]
    assert audit_sentence(domains, 24, None) == (
        "Undeclared: f (shifted); declared and seen: e (specialised); declared but unseen: d; damaged: c; "
        "no verdict: b; unchanged: a (24 nulls)."
    )
    assert audit_sentence(domains[:1], 1, True) == (
        "Nothing undeclared; unchanged: a (1 null). The fine-tune drifted further than every null, "
        "so the comparison extrapolates."
    )
    assert audit_sentence(domains[1:2], 3, True) == "No verdict: b (3 nulls)."


def test_multiplicity_by_hand():
    """Holm in each corpus, BH over three, then Benjamini-Bogomolov at 0.05 · 2/3 within the two findings."""
    tests = {
        "one": Evidence(null_test(0.001), null_test(0.034)),  # Holm 0.002, 0.034
        "two": Evidence(null_test(0.02), null_test(0.012)),  # Holm 0.024, 0.024
        "three": Evidence(null_test(0.04), null_test(0.9)),  # Holm 0.08, 0.9
    }
    found = adjusted(tests, 0.05)
    np.testing.assert_allclose([one.p for one in found.values()], [0.002, 0.024, 0.08])
    np.testing.assert_allclose([one.q for one in found.values()], [0.006, 0.036, 0.08])
    rejects = [(one.features.rejects, one.loss.rejects) for one in found.values()]
    # 0.034 passes 0.05 but not 0.0333; "three" would pass nothing because it is no finding.
    assert rejects == [(True, False), (True, True), (False, False)]
    np.testing.assert_allclose(found["two"].loss.p_adjusted, 0.024)
    alone = adjusted({"one": Evidence(null_test(0.04), None), "two": Evidence(null_test(0.9), None)}, 0.05)
    assert [one.q for one in alone.values()] == pytest.approx([0.08, 0.9])
    assert not alone["one"].features.rejects and adjusted({}, 0.05) == {}


def test_every_field_of_the_finding_is_filled():
    panel = panel_of(
        7, grid=(("a", 5), ("b", 5)), families=("math",) * 4 + ("code",) * 3 + ("other",) * 8, nulls=15
    )
    recipe = {"method": "lora", "lr": 1e-3, "steps": 9}
    records = [{"name": f"n{i}", "family": family, **recipe} for i, family in enumerate(panel.families)]
    excluded = [{"name": "x", "family": "math", "reason": "diverged"}]
    found = calibrated(
        panel, declared=["web"], null_records=records, excluded=excluded, battery={"path": "b"}
    )
    assert (found.battery, found.source, found.alpha, found.nulls) == ({"path": "b"}, "trained", 0.05, 15)
    assert found.families == {"math": 4, "code": 3, "other": 8} and found.excluded == excluded
    assert found.declared == ["web"] and found.spectrum is None and found.sentence
    assert [domain.name for domain in found.domains] == [*NAMES]
    assert [domain.role for domain in found.domains] == ["general", "task", "task", "task"]
    assert [domain.features.nulls for domain in found.domains] == [15, 11, 12, 15]
    assert [domain.declared for domain in found.domains] == [False, False, False, True]
    drift = np.log(1 - np.nanmean(panel.overlap["general"][:, :, 0], 1))
    assert found.drift["suspect"] == pytest.approx(drift[0])
    assert found.drift["nulls"] == pytest.approx([drift[1:].min(), drift[1:].max()])
    assert found.extrapolated == (not drift[1:].min() <= drift[0] <= drift[1:].max())
    assert len(found.grid) == 8 and {*found.grid[0]} == {"name", "site", "k", "z"}
    assert len(found.points) == 15 and found.points[3] | records[3] == found.points[3]
    assert found.points[3]["features"]["code"] == pytest.approx(contrast_by_loop(panel, "code")[4])
    assert found.points[3]["loss"]["code"] == pytest.approx(np.nanmean(panel.loss["code"][4]))
    for domain in found.domains:
        test, models = domain.features, np.concatenate([[True], panel.calibrating(domain.name)])
        direct = judge(drift[None, models], contrast_by_loop(panel, domain.name)[None, models])
        assert test.z == pytest.approx(direct.z[0]) and test.p_rank == pytest.approx(direct.p_rank[0])
        assert test.statistic - test.expected == pytest.approx(test.residual)
        reach = stats.t.isf(0.025, direct.freedom) * direct.error[0]
        assert test.band == pytest.approx((test.expected - reach, test.expected + reach))
        assert test.ci[0] < test.ci[1] and domain.p == min(test.p_adjusted, domain.loss.p_adjusted)
        g, change = np.exp(drift[models]), np.nanmean(panel.loss[domain.name], 1)[models]
        predicted, error = line_and_error(g[1:], change[1:] / g[1:], g[0])
        assert domain.loss.statistic == pytest.approx(change[0])
        assert domain.loss.expected == pytest.approx(predicted * g[0])
        assert domain.loss.z == pytest.approx((change[0] / g[0] - predicted) / error)
        reach = stats.t.isf(0.025, direct.freedom) * error * g[0]
        assert domain.loss.band == pytest.approx((predicted * g[0] - reach, predicted * g[0] + reach))
    assert json.loads(json.dumps(asdict(found), allow_nan=False))["sentence"] == found.sentence


def test_families_are_judged_by_the_others():
    panel = panel_of(8, families=("math",) * 4 + ("code",) * 4 + ("other",) * 4)
    found = calibrated(panel)
    rows = {(row["name"], row["family"]): row for row in found.by_family}
    drift, c = measure(panel).drift[0, 1:], contrast_by_loop(panel, "math")[1:]
    for family, others in (("math", slice(4, 12)), ("code", slice(8, 12))):
        own = slice(0, 4) if family == "math" else slice(4, 8)
        line = np.polyfit(drift[others], c[others], 1)
        assert rows["math", family]["features"] == pytest.approx(
            (c[own] - np.polyval(line, drift[own])).mean()
        )
        change, g = measure(panel).loss["math"][1:], np.exp(drift)
        line = np.polyfit(g[others], change[others] / g[others], 1)
        assert rows["math", family]["loss"] == pytest.approx(
            (change[own] - g[own] * np.polyval(line, g[own])).mean()
        )
        assert rows["math", family]["nulls"] == 4
    assert len(rows) == 12
    few = calibrated(panel_of(8, nulls=3, families=("math", "code", "other")))
    assert all(row["features"] is None for row in few.by_family if row["name"] == "math" != row["family"])


def test_spectrum_nulls_are_matched_judge_every_corpus_and_no_loss():
    panel = panel_of(9, nulls=6, families=("math",) * 6)
    found = calibrated(panel, source="spectrum")
    assert not found.refused and found.by_family == [] and not found.extrapolated
    math = found.domains[1]
    c = contrast_by_loop(panel, "math")
    error = c[1:].std(ddof=1) * np.sqrt(1 + 1 / 6)
    assert math.features.z == pytest.approx((c[0] - c[1:].mean()) / error)
    assert math.features.p == pytest.approx(2 * stats.t.sf(abs(math.features.z), 5))
    assert all(domain.loss is None for domain in found.domains) and found.points[0]["loss"] is None
    assert all("those of random changes of this size" in domain.sentence for domain in found.domains)
    assert all("innocent" not in domain.sentence for domain in found.domains)
    few = calibrated(panel_of(9, nulls=5), source="spectrum")
    assert few.refused == [*NAMES] and "ask for 6 spectrum nulls" in few.domains[0].refused


def test_the_given_interval_of_the_loss_decides_the_kind():
    panel = panel_of(10, families=("other",) * 12)
    panel.loss["math"][0] -= 5
    kinds = [
        calibrated(panel, delta_loss_ci=given).domains[1].kind
        for given in (None, {"math": (-6.0, -4.0)}, {"math": (-6.0, 1.0)}, {"code": (0.0, 1.0)})
    ]
    assert kinds[0] == kinds[1] == kinds[3] == "specialised" and kinds[2] != "specialised"


def test_too_few_nulls_are_counted_by_corpus():
    panel = panel_of(11, nulls=9, families=("math",) * 3 + ("other",) * 6)
    found = calibrated(panel)
    assert found.refused == ["math"]
    math = found.domains[1]
    assert (math.features, math.loss, math.kind, math.q) == (None, None, None, None)
    assert "6 nulls judge it and 7 are needed at level 0.05" in math.refused
    assert "palimpsest battery calibrate --nulls 11" in math.refused and math.refused in math.sentence
    assert [round(domain.q / domain.p, 6) for domain in found.domains if domain.q is not None][0] <= 3
    none = calibrated(panel_of(11, nulls=0, families=()))
    assert none.refused == [*NAMES] and none.drift["nulls"] is None and none.points == []
    assert "0 nulls judge it" in none.domains[0].sentence and none.sentence.startswith("No verdict: general")


def test_a_corpus_without_overlap_is_refused_and_enters_no_median():
    panel = panel_of(12)
    panel.overlap["web"][:] = np.nan
    found = calibrated(panel)
    assert found.refused == ["web"] and "web" in found.domains[3].refused
    kept = {name: values for name, values in panel.overlap.items() if name != "web"}
    without = replace(panel, overlap=kept, loss={name: panel.loss[name] for name in kept})
    for mine, other in zip(found.domains[:3], calibrated(without).domains, strict=True):
        assert mine.features.z == pytest.approx(other.features.z)
    panel.overlap["general"][:] = np.nan
    everything = calibrated(panel)
    assert everything.refused == [*NAMES] and everything.drift == {"suspect": None, "nulls": None}
    alone = panel_of(12, names=("general",), families=("other",) * 12)
    assert "no other corpus" in calibrated(alone).domains[0].refused


def test_a_null_without_a_figure_judges_nothing_that_needs_it():
    panel = panel_of(13, families=("other",) * 12)
    panel.overlap["web"][3] = np.nan
    panel.loss["math"][5] = np.nan
    found = calibrated(panel)
    assert [domain.features.nulls for domain in found.domains] == [11, 10, 11, 11]
    assert found.points[2]["features"]["math"] is None and found.points[4]["loss"]["math"] is None
    panel.loss["math"][0] = np.nan
    math = calibrated(panel).domains[1]
    assert math.loss is None and math.features.nulls == 11 and math.kind is not None


def test_one_task_is_compared_with_the_general_corpus_alone():
    panel = panel_of(14, names=("general", "math"), families=("other",) * 12)
    c = {name: measure(panel).contrast[name][0] for name in panel.names}
    np.testing.assert_allclose(c["math"], -c["general"])
    assert calibrated(panel).refused == []


def test_a_model_that_is_the_base_has_a_floor_and_no_crash():
    panel = panel_of(15, families=("other",) * 12)
    for values in panel.overlap.values():
        values[0, 1:] = 1.0
    found = calibrated(panel)
    assert found.drift["suspect"] == pytest.approx(np.log(FLOOR)) and found.extrapolated
    assert "less far than every null" in found.sentence and not found.refused
    assert all(np.isfinite([d.features.z, d.features.p, *d.features.ci]).all() for d in found.domains)


def test_nulls_that_are_all_alike_give_no_verdict():
    panel = panel_of(16, families=("other",) * 12)
    for values in panel.overlap.values():
        values[1:] = values[1]
    assert (
        calibrated(panel).refused == [*NAMES]
        and "do not differ in overlap" in calibrated(panel).domains[0].refused
    )
    for values in (*panel.overlap.values(), *panel.loss.values()):
        values[:] = np.where(np.isnan(values), np.nan, 1.0)
    assert calibrated(panel).refused == [*NAMES]
    panel = panel_of(16, families=("other",) * 12)
    for values in panel.loss.values():
        values[1:] = 0.0
    assert "do not differ in loss" in calibrated(panel).domains[0].refused


def test_one_drift_has_no_slope_and_a_null_that_carries_it_alone_is_left_out_well():
    y = np.array([[0.5, 0.1, 0.4, 0.2, 0.3]])
    flat = judge(np.full((1, 5), -2.0), y)
    assert flat.expected[0] == pytest.approx(0.25) and np.isfinite(flat.z).all()
    np.testing.assert_allclose(flat.left_out[0, 0], 0.1 - 0.3)
    lever = judge(np.array([[-2.0, -1.0, -2.0, -2.0, -2.0]]), y)
    np.testing.assert_allclose(lever.left_out[0, 0], 0.1 - 0.3)
    assert np.isfinite(lever.z).all()


def test_contrast_of_one_corpus_leaves_it_out_of_the_median():
    changes = np.array([[1.0], [5.0], [2.0], [100.0]])
    assert [contrasts(changes, i)[0] for i in range(4)] == [-4.0, 3.0, -3.0, 98.0]


def test_bad_panels_and_arguments_are_refused():
    panel = panel_of(17)
    general, math = panel.overlap["general"], panel.overlap["math"]
    shorter = {"overlap": {"general": general}, "loss": {"general": panel.loss["general"][:, 1:]}}
    cases = [
        ({"overlap": {"math": math}, "loss": None}, ConfigError, "starts with the general"),
        ({"overlap": {}, "loss": None}, ConfigError, "starts with the general"),
        ({"grid": ()}, ConfigError, "needs a site"),
        ({"loss": {"general": panel.loss["general"]}}, ConfigError, "same corpora"),
        ({"overlap": {"general": general[:5]}, "loss": None}, ConfigError, "another shape"),
        ({"overlap": {"general": general + 1}, "loss": None}, NumericsError, "no share"),
        (
            shorter,
            ConfigError,
            "documents",
        ),
        (
            {"loss": panel.loss | {"math": np.full_like(panel.loss["math"], np.inf)}},
            NumericsError,
            "infinite",
        ),
    ]
    for changes, error, words in cases:
        with pytest.raises(error, match=words):
            replace(panel, **changes)
    for changes, words in (
        ({"declared": ["poetry"]}, "poetry"),
        ({"source": "guessed"}, "guessed"),
        ({"null_records": [{}]}, "records"),
    ):
        with pytest.raises(ConfigError, match=words):
            calibrated(panel, **changes)
    for changes in ({"alpha": 0.0}, {"confidence": 1.0}, {"resamples": 0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            Level(**changes)


def test_equal_seeds_give_equal_findings():
    assert calibrated(panel_of(18)) == calibrated(panel_of(18))
    other = calibrated(panel_of(18), settings=Level(resamples=50, seed=1))
    assert other.domains[1].features.ci != calibrated(panel_of(18)).domains[1].features.ci


def still(panel, loss):
    """The panel with a suspect that kept all its lists, and whose loss is `loss` everywhere."""
    overlap = {name: np.concatenate([np.ones_like(v[:1]), v[1:]]) for name, v in panel.overlap.items()}
    losses = {name: np.concatenate([np.full_like(v[:1], loss), v[1:]]) for name, v in panel.loss.items()}
    return replace(panel, overlap=overlap, loss=losses)


@pytest.mark.parametrize("loss", [0.0, 1e-4, -1e-3])
def test_a_suspect_that_hardly_moved_is_unchanged(loss):
    for seed in range(8):
        found = calibrated(still(panel_of(seed), loss))
        assert [domain.kind for domain in found.domains] == ["unchanged"] * len(found.domains)
        assert all(domain.features.p == 1 and domain.p_max == 1 for domain in found.domains)


def test_the_prediction_of_a_small_suspect_is_small_and_its_deviation_is_a_nulls():
    rng = np.random.default_rng(3)
    g = np.concatenate([[0.004], rng.uniform(0.05, 0.2, 12)])[None]
    loss = g * (1 + 0.1 * rng.normal(size=g.shape))
    judged = judge(g, loss, scale=g)
    slope, level = np.polyfit(g[0, 1:], loss[0, 1:] / g[0, 1:], 1)
    assert judged.expected[0] == pytest.approx((level + slope * 0.004) * 0.004)
    unfloored = judge(g, loss / g)
    assert judged.error[0] == pytest.approx(unfloored.error[0] * g[0, 1:].min())
