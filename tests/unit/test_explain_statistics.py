"""The numbers behind an explanation: orders, shares, agreement and its null, halves of documents, labels."""

from __future__ import annotations

import json
from pathlib import Path
from urllib.error import HTTPError, URLError

import numpy as np
import pytest

from palimpsest import labelcache as label_module
from palimpsest.errors import ConfigError
from palimpsest.labelcache import LENGTH, Wanted, find_labels, neuronpedia_id, tidy
from palimpsest.options import RunOptions
from palimpsest.tune.explain.compare import moved_classes
from palimpsest.tune.explain.compare_text import cell
from palimpsest.tune.explain.result import (
    AdapterComparison,
    Agreement,
    Controls,
    CurvePoint,
    Explanation,
    Objective,
    Pruned,
)
from palimpsest.tune.explain.result import Concentration as Held
from palimpsest.tune.explain.statistics import (
    Activity,
    Effect,
    Settings,
    agreement,
    grid,
    holders,
    per_value,
    random_orders,
    smallest,
    specificity,
    strongest_first,
)
from palimpsest.tune.explain.summary import summarise
from palimpsest.tune.explain.texts import GROUPS, split_groups
from palimpsest.tune.explain_config import CausalOptions, ExplainCompareConfig, ExplainConfig, ReadOptions

SETTINGS = Settings(permutations=100, resamples=400)
GEMMA = "gemma-2-2b/20-gemmascope-res-16k"


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_orders_break_ties_by_the_second_figure_and_then_by_number():
    assert strongest_first(np.array([1.0, 3.0, 1.0, 3.0])).tolist() == [1, 3, 0, 2]
    assert strongest_first(np.array([1.0, 3.0, 1.0, 3.0]), np.array([0.0, 1, 5, 2])).tolist() == [3, 1, 2, 0]


def test_holders_are_the_fewest(rng):
    effect = rng.random(40) ** 3
    for share in (0.1, 0.5, 0.9, 1.0):
        n = holders(effect, share)
        held = np.sort(effect)[::-1]
        assert held[:n].sum() >= share * effect.sum() * (1 - 1e-9)
        assert n == 1 or held[: n - 1].sum() < share * effect.sum()
    assert holders(np.zeros(5), 0.5) == 0
    assert holders(np.full(10, 0.1), 1.0) == 10


def test_a_grid_rises_from_one_to_the_last():
    assert grid(1, 10) == [1] and grid(0, 10) == []
    found = grid(1000, 8)
    assert found[0] == 1 and found[-1] == 1000 and found == sorted(set(found)) and len(found) == 8
    assert grid(3, 10) == [1, 2, 3]


@pytest.mark.parametrize("needed", [1, 2, 3, 17, 30, 37, 38])
def test_the_smallest_number_is_found_and_each_is_measured_once(needed):
    measured = []

    def share(n):
        measured.append(n)
        return float(n >= needed)

    assert smallest(share, [1, 4, 16, 38], 0.95) == needed
    assert len(measured) == len(set(measured)) and len(measured) <= 10


def test_no_number_is_none_and_a_large_one_is_found_to_its_precision():
    assert smallest(lambda n: 0.0, [1, 2, 4], 0.5) is None
    assert smallest(lambda n: 1 - 1e-9 if n == 4 else 0.0, [1, 2, 4], 1.0) == 4, "all of it, but for rounding"
    found = smallest(lambda n: n / 10_000, [1, 100, 10_000], 0.95)
    assert found is not None and 9500 <= found <= 9500 * 1.05


def test_shares_and_intervals_against_a_plain_bootstrap(rng):
    units = rng.integers(5, 50, 30).astype(float)
    base = units * (2 + 0.1 * rng.standard_normal(30))
    full, part = base - units * 0.2 + rng.standard_normal(30), base - units * 0.1 + rng.standard_normal(30)
    effect = Effect(base, full, units, Settings(resamples=3000))
    assert effect.present and effect.difference == pytest.approx((base - full).sum() / units.sum())
    found = effect.share(part)
    assert found is not None
    share, ci = found
    assert share == pytest.approx((base - part).sum() / (base - full).sum())
    drawn = rng.integers(0, 30, (4000, 30))
    ratios = (base - part)[drawn].sum(1) / (base - full)[drawn].sum(1)
    # Drawing numerator and denominator apart would widen it severalfold.
    assert ci == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.03)
    assert effect.share(full) == (1.0, (1.0, 1.0)) and effect.share(base) == (0.0, (0.0, 0.0))


def test_an_effect_of_nothing_or_of_rounding_has_no_shares(rng):
    base, units = 100 + rng.random(20), np.full(20, 10.0)
    nothing = Effect(base, base.copy(), units, SETTINGS)
    assert not nothing.present and nothing.difference == 0 and nothing.ci == (0.0, 0.0)
    rounding = Effect(base, base * (1 - 1e-8), units, SETTINGS)
    assert rounding.ci[0] > 0 and not rounding.present and rounding.share(base) is None
    noise = Effect(base, base + rng.standard_normal(20), units, SETTINGS)
    assert not noise.present
    worse = Effect(base, base + 5, units, SETTINGS)
    assert worse.present and worse.difference < 0
    share, ci = worse.share(base + 2.5)
    assert share == pytest.approx(0.5) and ci == pytest.approx((0.5, 0.5))


def test_random_orders_begin_with_the_candidates():
    candidates = np.arange(20) % 2 == 0
    found = list(random_orders(candidates, 3, 7))
    assert len({tuple(one) for one in found}) == 3
    for one in found:
        assert sorted(one) == list(range(20)) and candidates[one[:10]].all()
    assert np.array_equal(found[0], next(random_orders(candidates, 1, 7)))


def test_agreement_of_the_same_of_noise_and_of_the_opposite(rng):
    a, firing = rng.standard_normal(400), np.arange(400) < 300
    weight = rng.random(400)
    b = a + 0.3 * rng.standard_normal(400)
    same = agreement((a, b), (np.abs(a) * weight, np.abs(b) * weight), firing, 30, SETTINGS, unit=weight)
    assert same.latents == 300 and same.cosine == pytest.approx(
        a[:300] @ b[:300] / np.linalg.norm(a[:300]) / np.linalg.norm(b[:300])
    )
    assert same.null_cosine and same.null_spearman and same.null_overlap
    assert same.cosine > 0.9 > same.null_cosine[1] and same.spearman > 0.9 > same.null_spearman[1]
    assert same.overlap > same.null_overlap[1]
    c = rng.standard_normal(400)
    none = agreement((a, c), (np.abs(a), np.abs(c)), firing, 30, SETTINGS)
    assert abs(none.cosine) < 0.2 and none.null_cosine[0] < 0 < none.null_cosine[1]
    other = agreement((a, -a), (np.abs(a), np.abs(a)), firing, 30, SETTINGS)
    assert other.cosine == pytest.approx(-1) and other.spearman == pytest.approx(-1) and other.overlap == 1


def test_agreement_of_biases_is_read_against_shuffles_not_against_zero(rng):
    """Values that are all above 0 have a large cosine whatever they are."""
    a, b = 1 + 0.1 * rng.standard_normal(200), 1 + 0.1 * rng.standard_normal(200)
    found = agreement((a, b), (a, b), np.ones(200, bool), 20, SETTINGS)
    assert found.cosine > 0.95 and found.null_cosine[0] < found.cosine < found.null_cosine[1] + 0.005


def test_agreement_on_nothing():
    none = np.zeros(4)
    found = agreement((none, none), (none, none), np.zeros(4, bool), 3, SETTINGS)
    assert (found.latents, found.cosine, found.spearman, found.overlap) == (0, None, None, 0.0)
    assert found.null_cosine is None
    still = agreement((none, none), (none, none), np.ones(4, bool), 3, SETTINGS)
    assert still.cosine is None and still.latents == 4


def _activity(rng, means, tokens=200):
    """Sums of latents in groups; a group of documents is more or less active as a whole."""
    level = 1 + 0.1 * rng.standard_normal((2 * GROUPS, 1))
    return Activity(np.abs(level * means * tokens), np.full(2 * GROUPS, float(tokens)))


def test_specificity_finds_planted_latents_and_nothing_without_them(rng):
    general = rng.random(300) + 0.1
    special = np.arange(300) < 6
    corpus, firing = np.where(special, 4 * general, general), np.ones(300, bool)
    values = np.where(special, 1.0, 0.02 * rng.standard_normal(300))
    activity = (_activity(rng, corpus), _activity(rng, general))
    found = specificity(corpus * np.abs(values), values, corpus, firing, activity, 6, SETTINGS)
    assert found.top.ratio == pytest.approx(4, rel=0.15) and found.top.ci[0] < 4 < found.top.ci[1]
    assert found.random.ratio == pytest.approx(1, abs=0.2) and found.p < 0.05
    values = rng.standard_normal(300)
    null = specificity(corpus * np.abs(values), values, corpus, firing, activity, 6, SETTINGS)
    assert null.p > 0.05


def test_shuffling_values_shows_what_ranking_by_activity_does_alone(rng):
    """Latents that are busy on the corpus rank high whatever their values: random sets miss that, shuffles do not."""
    corpus, general = rng.random(300) ** 4 * 9, rng.random(300) + 0.5
    values, firing = rng.standard_normal(300), np.ones(300, bool)
    activity = (_activity(rng, corpus), _activity(rng, general))
    found = specificity(corpus * np.abs(values), values, corpus, firing, activity, 8, SETTINGS)
    assert found.top.ratio > found.random.ci[1], "random sets alone would call this specific"
    assert found.permuted.ratio > found.random.ci[1] and found.p > 0.05


def test_specificity_of_latents_that_are_silent_on_general_text(rng):
    corpus, general = np.ones(10), np.r_[np.zeros(3), np.ones(7)]
    activity = (_activity(rng, corpus), _activity(rng, general))
    effect = np.r_[np.ones(3), np.full(7, 0.01)]
    found = specificity(effect, effect, corpus, np.ones(10, bool), activity, 3, SETTINGS)
    assert found.top.ratio is None and found.top.ci is None
    assert specificity(effect, effect, corpus, np.zeros(10, bool), activity, 3, SETTINGS) is None


def test_what_a_value_does_where_it_is_zero_is_guessed_from_activity():
    effect, values = np.array([2.0, 6.0, 0.0, 0.0]), np.array([-1.0, 2.0, 0.0, 5.0])
    found = per_value(effect, values, np.array([4.0, 6.0, 10.0, 0.0]))
    assert found.tolist() == [2.0, 3.0, 5.0, 0.0]


def test_copies_of_a_document_are_in_one_half_and_halves_are_of_like_size(rng):
    rows = [rng.integers(0, 99, rng.integers(2, 9)).tolist() for _ in range(60)]
    groups = split_groups([*rows, *rows[:20]])
    assert np.array_equal(groups[:20], groups[60:])
    halves = np.bincount(groups[:60] // GROUPS, minlength=2)
    assert abs(int(halves[0]) - int(halves[1])) <= 1 and groups.max() < 2 * GROUPS
    assert np.array_equal(split_groups(rows[::-1])[::-1], groups[:60]), (
        "the order of the file decides nothing"
    )


def test_classes_are_relative_to_each_adapters_own_distribution():
    a, b = np.array([6.0, 3.0, 0.5, 0.5, 0.0]), np.array([0.0, 300.0, 600.0, 50.0, 50.0])
    values = np.array([1.0, -1.0, 1.0, 1.0, 1.0]), np.ones(5)
    found = {
        name: np.flatnonzero(one).tolist() for name, one in moved_classes(values, (a, b), 0.7, 0.9).items()
    }
    assert found == {"only_a": [0], "only_b": [2], "both": [], "opposite": [1]}
    lengths = moved_classes(values, (a, b), 0.7, 0.9, signed=False)
    assert not lengths["opposite"].any(), "lengths have no direction"
    nothing = moved_classes(values, (np.zeros(5), b), 0.5, 0.9)
    assert np.flatnonzero(nothing["only_b"]).tolist() == [2] and not nothing["only_a"].any()


# Labels


def _page(text):
    return {"explanations": [{"description": text}]}


@pytest.fixture
def online(monkeypatch, tmp_path):
    """Labels are looked up, in a cache of this test."""
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "palimpsest" / "labels.json"


def test_labels_are_asked_for_once_and_kept(online):
    asked = []

    def fetch(address):
        asked.append(address)
        return _page("words about rivers")

    wanted = [Wanted("resid_post.20", 5, GEMMA), Wanted("resid_post.20", 7)]
    assert find_labels(wanted, fetch=fetch) == {("resid_post.20", 5): "words about rivers"}
    assert asked == [f"https://www.neuronpedia.org/api/feature/{GEMMA}/5"]
    assert json.loads(online.read_text()) == {GEMMA: {"5": "words about rivers"}}
    assert (
        find_labels(wanted, fetch=fetch) == {("resid_post.20", 5): "words about rivers"} and len(asked) == 1
    )


def test_offline_reads_the_cache_only(online, monkeypatch, tmp_path):
    def fetch(address):
        raise AssertionError(address)

    wanted = [Wanted("s", 1, GEMMA), Wanted("s", 2, GEMMA), Wanted("s", 3)]
    file = tmp_path / "labels.json"
    file.write_text(json.dumps({GEMMA: {"1": {"label": "one"}}, "s": {"3": "three", "2": 7}}))
    assert find_labels(wanted, file, offline=True, fetch=fetch) == {("s", 1): "one", ("s", 3): "three"}
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert find_labels(wanted, file, fetch=fetch) == {("s", 1): "one", ("s", 3): "three"}


def test_a_server_that_fails_is_left_alone(online):
    asked = []

    def fetch(address):
        asked.append(address)
        raise URLError("no route")

    wanted = [Wanted("s", latent, GEMMA) for latent in range(20)]
    assert find_labels(wanted, fetch=fetch) == {} and len(asked) == 3 and not online.exists()


@pytest.mark.parametrize(
    "page",
    [None, [], {}, {"explanations": None}, {"explanations": [3, {"description": None}]}, _page("  ")],
)
def test_pages_of_another_form_have_no_label(online, page):
    assert find_labels([Wanted("s", 1, GEMMA)], fetch=lambda address: page) == {}


def test_hostile_labels_become_one_short_printable_line(online):
    hostile = "a\x1b[31m\x00red\n| <script>\u202e" + "x" * 10_000
    found = find_labels([Wanted("s", 1, GEMMA)], fetch=lambda address: _page(hostile))[("s", 1)]
    assert found.startswith("a [31m red | <script> x") and len(found) == LENGTH and found.isprintable()
    assert tidy(None) is None and tidy({"a": 1}) is None and tidy("\x00 \n") is None
    assert cell("a|b\n<i>[x](y)*`") == r"a\|b \<i\>\[x\]\(y\)\*\`"


def test_a_file_that_was_asked_for_must_hold_labels_and_a_damaged_cache_need_not(online, tmp_path):
    for content in ("{", "[]", '{"s": []}'):
        file = tmp_path / "given.json"
        file.write_text(content)
        with pytest.raises(ConfigError, match="holds no labels"):
            find_labels((), file)
    online.parent.mkdir(parents=True)
    online.write_text("{")
    assert find_labels([Wanted("s", 1, GEMMA)], fetch=lambda address: _page("x")) == {("s", 1): "x"}


def test_only_ids_become_addresses(online):
    def fetch(address):
        raise AssertionError(address)

    for source in ("../../etc/passwd", "http://evil.example/x", "gemma-2-2b/20-x/../../y", "a b/1-c"):
        assert find_labels([Wanted("s", 1, source)], fetch=fetch) == {}


def test_requests_are_tried_again_where_that_can_help(monkeypatch):
    class Answer:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def read(self, most):
            return b'{"explanations": []}'

    def busy(code):
        return HTTPError("https://x", code, "", None, None)

    for faults, ok in (
        ([busy(503), TimeoutError()], True),
        ([busy(404)], False),
        ([URLError("x")] * 3, False),
    ):
        left = list(faults)

        def open_(request, timeout, left=left):
            assert request.full_url.startswith("https://") and 0 < timeout <= 30
            if left:
                raise left.pop(0)
            return Answer()

        monkeypatch.setattr(label_module, "urlopen", open_)
        monkeypatch.setattr(label_module.time, "sleep", lambda seconds: None)
        if ok:
            assert label_module.fetch_page("https://x") == {"explanations": []}
        else:
            with pytest.raises(OSError):
                label_module.fetch_page("https://x")
        assert left == []


@pytest.mark.parametrize(
    ("metadata", "found"),
    [
        ({}, None),
        ({"neuronpedia": GEMMA}, GEMMA),
        ({"saelens": {"neuronpedia_id": GEMMA + "/12"}}, GEMMA),
        ({"neuronpedia": 3, "saelens": "x"}, None),
        ({"neuronpedia": "nonsense"}, None),
    ],
)
def test_the_id_of_a_dictionary(metadata, found):
    assert neuronpedia_id(metadata) == found


# Results and options


def _explanation(**changes):
    fields = dict(
        summary="s",
        adapter="a",
        component="scale",
        model="m",
        sites=[],
        corpora=[],
        rankings=[],
        concentration=Held(9, 3, 8, 3, 0.5, 1, 2),
        objective=Objective("text", "nats", 4, 5, 3.0, 2.0, 1.0, (0.9, 1.1), True),
        curves=[CurvePoint("keep", 1, 0.5, (0.4, 0.6)), CurvePoint("random", 1, None, None)],
        pruned=Pruned(0.95, 2, 0.97, (0.9, 1.0), 4, 0.96, 7, (6, 8), 0.96, "pruned", 1e-7),
        specificity=None,
        controls=Controls(twin=Agreement("t", 8, 0.9, 0.8, 3, 1.0, (-0.1, 0.1), None, None)),
        confidence=0.95,
        seed=0,
    )
    return Explanation(**(fields | changes))


def test_a_result_is_the_same_after_json_and_ignores_what_is_new():
    found = _explanation()
    data = json.loads(json.dumps(found.to_dict()))
    assert Explanation.from_dict(data) == found
    assert Explanation.from_dict(data | {"later": 1}) == found and data["schema"] == 1
    compared = AdapterComparison(
        "s", ("a", "b"), ("scale", "bias"), [], [], (1.0, 2.0), 0.5, 0.9, {}, {}, found.controls.twin, 0
    )
    assert AdapterComparison.from_dict(json.loads(json.dumps(compared.to_dict()))) == compared


def test_the_summary_says_when_an_adapter_does_nothing():
    present = Objective("text", "nats", 4, 5, 3.0, 2.0, 1.0, (0.9, 1.1), True)
    absent = Objective("text", "nats", 4, 5, 3.0, 3.0, 0.0, (-0.1, 0.1), False)
    moved, still = Held(9, 3, 8, 3, 0.5, 1, 2), Held(9, 0, 8, 0, 0.0, 0, 0)
    text = summarise(moved, present, _explanation().pruned, None, Controls(), [])
    assert "lowers the objective by 1.0000" in text and "2 latents, chosen on 4 others, keep 97.0%" in text
    elsewhere = Objective("text", "nats", 4, 5, 3.0, 2.0, 1.0, (0.9, 1.1), True, -0.2)
    assert "Nothing is pruned: on the 4" in summarise(moved, elsewhere, None, None, Controls(), [])
    text = summarise(still, absent, None, None, Controls(), [])
    assert "moves none of its 9 latents" in text and "cannot be told from 0" in text and "keep" not in text
    silent = Held(9, 3, 8, 0, 0.0, 0, 0)
    assert "none of which acts on this text" in summarise(silent, absent, None, None, Controls(), [])
    worse = Objective("text", "nats", 4, 5, 2.0, 3.0, -1.0, (-1.1, -0.9), True)
    assert "RAISES the objective by 1.0000 [0.9000, 1.1000]" in summarise(
        moved, worse, None, None, Controls(), []
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: ExplainConfig("a", run=RunOptions(out=Path("x"))),
        lambda: CausalOptions(keep=0.0),
        lambda: CausalOptions(keep=1.5),
        lambda: CausalOptions(eval_rows=3),
        lambda: CausalOptions(points=1),
        lambda: CausalOptions(confidence=1.0),
        lambda: ExplainCompareConfig(
            "a", "b", run=RunOptions(out=Path("x")), read=ReadOptions(corpus=("x",)), strong=0.9, weak=0.5
        ),
        lambda: ExplainCompareConfig(
            "a", "./a", run=RunOptions(out=Path("x")), read=ReadOptions(corpus=("x",))
        ),
    ],
)
def test_options_that_mean_nothing_are_refused(make):
    with pytest.raises(ConfigError):
        make()
