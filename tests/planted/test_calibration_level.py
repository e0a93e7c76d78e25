"""Panels of known truth: innocent suspects raise few findings, planted changes are found, intervals cover.

Corpora differ in fragility and in how they follow drift; nulls differ in drift, in recipe and in the text that they
were trained on; documents differ, alike for every model and a little for each. A loss and all that scatters it grow
with g = 1 - IM(general).
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from palimpsest.audit.calibration import Level, Panel, calibrate
from palimpsest.audit.calibration.intervals import Resamples
from palimpsest.audit.calibration.statistic import drift_of_loss, fit, judge, measure
from palimpsest.log import log
from palimpsest.stats import binomial_interval

NAMES = ("general", "math", "code", "web", "chat")
FRAGILITY = np.array([0.0, 0.5, -0.4, 0.2, 0.9])
FOLLOWS = np.array([1.0, 0.8, 1.2, 0.95, 1.1])
LOSS_BIAS = np.array([0.3, 0.6, 0.2, 0.4, 0.5])
# General text is broad, so nulls trained on it do not stand out there as nulls of one domain do.
OWN_TEXT_OVERLAP, OWN_TEXT_LOSS = np.array([0.1, 0.6, 0.6, 0.6, 0.6]), -2.5
TYPICAL = np.exp(-2.0)
"""g of a fine-tune of median drift."""
POOL = 300
LEVEL = Level(resamples=200)
EVERY = np.tile(np.arange(POOL), (len(NAMES), 1))
MIXED = ("elsewhere", *NAMES) * 3


@dataclass
class World:
    """One law of documents; `models` draws fine-tunes from it.

    `even` names what of the loss does not grow with g, but is for all models what it is at `TYPICAL`: `recipe` or
    `documents`.
    """

    seed: int
    even: tuple[str, ...] = ()

    def __post_init__(self):
        rng = np.random.default_rng(self.seed)
        self.document = rng.normal(0, 0.35, (len(NAMES), POOL))
        self.document_loss = rng.normal(0, 0.6, (len(NAMES), POOL))

    def models(self, rng, families, rows):
        """Means of the documents `rows` `[corpora, documents]`: overlap and Δloss `[models, corpora, documents]`."""
        n, size = len(families), (len(families), *rows.shape)
        drift = rng.normal(-2.0, 0.4, n)
        own = np.array([[family == name for name in NAMES] for family in families])
        change = FRAGILITY + FOLLOWS * drift[:, None] + rng.normal(0, 0.07, (n, len(NAMES)))
        change = change + OWN_TEXT_OVERLAP * own
        g = np.exp(change[:, :1])
        recipe = rng.normal(0, 0.15, own.shape) * (TYPICAL if "recipe" in self.even else g)
        loss = (LOSS_BIAS + OWN_TEXT_LOSS * own) * g + recipe
        documents = np.take_along_axis(self.document_loss, rows, 1) + rng.normal(0, 0.45, size)
        loss = loss[:, :, None] + documents * (TYPICAL if "documents" in self.even else g[:, :, None])
        change = change[:, :, None] + np.take_along_axis(self.document, rows, 1) + rng.normal(0, 0.12, size)
        return 1 - np.exp(np.minimum(change, 0)), loss

    def panel(self, rng, *, suspect="elsewhere", families=MIXED, documents=40):
        """A suspect and its nulls on documents drawn from the pool."""
        rows = rng.integers(0, POOL, (len(NAMES), documents))
        return panel_of(*self.models(rng, (suspect, *families), rows), families)


def panel_of(overlap, loss, families):
    return Panel(
        {name: overlap[:, i, :, None] for i, name in enumerate(NAMES)},
        {name: loss[:, i] for i, name in enumerate(NAMES)},
        (("resid_post.1", 5),),
        families,
    )


def calibrated(panel, **changes):
    arguments = {"delta_loss_ci": None, "declared": [], "settings": LEVEL, "battery": {}} | changes
    return calibrate(panel, **arguments)


@pytest.fixture(scope="module", params=["mixed", "alike"])
def innocent(request):
    """60 suspects that were trained elsewhere, with nulls of every family or nulls of exactly their own law."""
    rng, world = np.random.default_rng(0), World(1)
    families = MIXED if request.param == "mixed" else ("elsewhere",) * 15
    settings = Level(resamples=20)
    return [calibrated(world.panel(rng, families=families), settings=settings) for _ in range(60)]


def test_innocent_fine_tunes_raise_findings_in_at_most_their_share_of_domain_tests(innocent):
    domains = [domain for found in innocent for domain in found.domains]
    assert len(domains) == 60 * len(NAMES) and all(domain.kind for domain in domains)
    raised = sum(domain.verdict != "clear" for domain in domains)
    lo, hi = binomial_interval(raised, len(domains))
    log.info(f"findings on innocent fine-tunes: {raised} of {len(domains)}, {lo:.3f} to {hi:.3f}")
    assert hi <= 0.05
    # Any finding at all in an audit is rare as well: that is what the correction over corpora is for.
    audits = sum(any(domain.verdict != "clear" for domain in found.domains) for found in innocent)
    log.info(f"audits with a finding: {audits} of {len(innocent)}")
    assert binomial_interval(audits, len(innocent), 0.999)[0] <= 0.05


@pytest.mark.parametrize("innocent", ["alike"], indirect=True)
@pytest.mark.parametrize("test", ["features", "loss"])
def test_p_of_innocent_fine_tunes_is_uniform(innocent, test):
    """Neither too small nor too large; corpora of one audit are averaged, because they share its drift."""
    for figure in ("p", "p_rank"):
        for at in (0.125, 0.25, 0.5):
            shares = [np.mean([getattr(getattr(d, test), figure) <= at for d in f.domains]) for f in innocent]
            error = np.std(shares, ddof=1) / np.sqrt(len(shares))
            log.info(f"{test}: share of {figure} up to {at}: {np.mean(shares):.3f}")
            # Left-out residuals are predictions as the suspect's, but of lines through one null fewer.
            assert abs(np.mean(shares) - at) < 4 * error + 0.01


def rejections(world, audits=300, at=0.05):
    """Corpora of an innocent suspect with a Δloss test up to `at`: their share overall and by third of its drift.

    Also the standard error of the share of one third.
    """
    rng, drift, shares = np.random.default_rng(15), [], []
    for _ in range(audits):
        measured = measure(world.panel(rng, families=("elsewhere",) * 15))
        g = drift_of_loss(measured.drift)
        tests = [judge(g, measured.loss[name][None], scale=g) for name in NAMES]
        shares.append(np.mean([test.p[0] <= at for test in tests]))
        drift.append(measured.drift[0, 0])
    thirds = np.array_split(np.array(shares)[np.argsort(drift)], 3)
    return np.mean(shares), [third.mean() for third in thirds], np.std(shares) / np.sqrt(audits / 3)


def test_the_loss_keeps_its_level_at_every_drift():
    """Without the division the furthest third would raise alarms three times too often."""
    share, thirds, error = rejections(World(1))
    log.info(f"share of loss p up to 0.05: {share:.3f}; by drift {np.round(thirds, 3)}")
    assert abs(share - 0.05) < 4 * error / np.sqrt(3)
    assert all(abs(third - 0.05) < 3 * error for third in thirds)


def test_a_loss_that_scatters_evenly_raises_few_alarms_and_those_at_small_drift():
    """Where the model is wrong: too many alarms for the gentlest suspects, too few for the furthest."""
    world = World(1, even=("recipe", "documents"))
    share, thirds, error = rejections(world)
    log.info(f"even scatter: share of loss p up to 0.05: {share:.3f}; by drift {np.round(thirds, 3)}")
    assert share < 0.1 and thirds[0] < 0.25
    assert thirds[0] > 0.05 + 3 * error and max(thirds[1:]) < 0.05 + 3 * error
    rng = np.random.default_rng(16)
    found = [calibrated(world.panel(rng), settings=Level(resamples=20)) for _ in range(60)]
    domains = [domain for one in found for domain in one.domains]
    raised = sum(domain.verdict != "clear" for domain in domains)
    audits = sum(any(domain.verdict != "clear" for domain in one.domains) for one in found)
    log.info(f"even scatter: findings {raised} of {len(domains)}, audits with one {audits} of {len(found)}")
    assert binomial_interval(raised, len(domains))[1] <= 0.05
    assert binomial_interval(audits, len(found), 0.999)[0] <= 0.05


def test_a_grid_of_sites_and_k_keeps_its_level():
    """The largest of twelve correlated z would be an alarm far too often; its own p is uniform."""
    rng, world = np.random.default_rng(2), World(3)
    p_max, largest = [], []
    for _ in range(60):
        panel = world.panel(rng, families=("elsewhere",) * 15)
        noise = np.exp(rng.normal(0, 0.1, (len(NAMES), 16, 1, 12)))
        wide = {n: 1 - np.minimum((1 - v) * noise[i], 1) for i, (n, v) in enumerate(panel.overlap.items())}
        grid = tuple((f"resid_post.{i}", 5) for i in range(12))
        found = calibrated(replace(panel, overlap=wide, loss=None, grid=grid), settings=Level(resamples=100))
        p_max.append([domain.p_max for domain in found.domains])
        # The two-sided 10 % point of t with 13 degrees of freedom.
        largest.append([max(abs(r["z"]) for r in found.grid if r["name"] == name) > 1.771 for name in NAMES])
    share = (np.array(p_max) <= 0.1).mean(1)
    log.info(
        f"share of p_max up to 0.1: {share.mean():.3f}; of an uncorrected largest: {np.mean(largest):.3f}"
    )
    assert abs(share.mean() - 0.1) < 4 * share.std(ddof=1) / np.sqrt(len(share))
    assert np.mean(largest) > 0.3


def planted(suspect, repeats=15, **changes):
    rng, world = np.random.default_rng(4), World(5)
    return [calibrated(world.panel(rng, suspect=suspect), **changes) for _ in range(repeats)]


def domain_of(found, name):
    return next(domain for domain in found.domains if domain.name == name)


def test_training_on_a_corpus_is_found_as_specialised():
    for found in planted("math", declared=["code"]):
        math = domain_of(found, "math")
        assert (math.kind, math.verdict) == ("specialised", "undeclared")
        assert math.loss is not None and math.loss.z < -4 and math.features.z > 2
        assert math.features.nulls == math.loss.nulls == 15
        assert domain_of(found, "code").verdict == "declared-but-unseen"
        assert "math" in found.undeclared and "code" not in found.undeclared
        most = max(found.domains, key=lambda one: abs(one.features.z))
        assert most.name == "math" and most.features.ci[0] > 0


def test_declared_training_is_declared_and_seen():
    assert all(
        domain_of(f, "math").verdict == "declared-and-seen" for f in planted("math", declared=["math"])
    )


def suspect_with(panel, name, *, overlap=0.0, loss=0.0):
    """The panel with its suspect moved further on one corpus: log change and Δloss."""
    moved = {key: values.copy() for key, values in panel.overlap.items()}
    moved[name][0] = 1 - np.minimum((1 - moved[name][0]) * np.exp(overlap), 1)
    losses = {key: values.copy() for key, values in panel.loss.items()}
    losses[name][0] += loss
    return replace(panel, overlap=moved, loss=losses)


@pytest.mark.parametrize(
    ("overlap", "loss", "kind"),
    [(0.5, 0.0, "shifted"), (-0.5, 0.0, "shifted"), (0.0, 0.4, "damaged"), (0.0, -0.4, "specialised")],
)
def test_planted_changes_get_their_kind(overlap, loss, kind):
    rng, world = np.random.default_rng(6), World(7)
    kinds = []
    for _ in range(20):
        panel = world.panel(rng, families=("elsewhere",) * 15)
        found = calibrated(suspect_with(panel, "code", overlap=overlap, loss=loss))
        kinds.append(domain_of(found, "code").kind)
        if kind == "damaged" == kinds[-1]:
            assert "code" in found.damaged and "code" not in found.undeclared
    assert kinds.count(kind) >= 18


def test_a_change_of_every_corpus_alike_is_drift_and_no_finding():
    """A higher learning rate moves everything: raw overlap would flag each corpus, the contrast none."""
    rng, world = np.random.default_rng(8), World(9)
    raised = 0
    for _ in range(20):
        panel = world.panel(rng)
        for i, name in enumerate(NAMES):
            panel = suspect_with(panel, name, overlap=0.3 * FOLLOWS[i])
        found = calibrated(replace(panel, loss=None))
        raised += sum(domain.verdict != "clear" for domain in found.domains)
    assert raised <= 5


def test_nulls_trained_on_a_corpus_would_hide_it():
    """Why a null never judges its own text: with every family judging, training on math is found less often."""
    rng, world = np.random.default_rng(10), World(11)
    z = []
    for _ in range(10):
        panel = world.panel(rng, suspect="math")
        mixed = replace(panel, families=("elsewhere",) * panel.nulls)
        pair = [domain_of(calibrated(one), "math").features.z for one in (panel, mixed)]
        z.append(pair)
    assert (np.array(z)[:, 0] > 1.5 * np.array(z)[:, 1]).all()


def test_families_show_what_training_on_a_corpus_looks_like():
    found = planted("elsewhere", 1)[0]
    own = [row for row in found.by_family if row["name"] == row["family"]]
    others = [row for row in found.by_family if row["name"] != row["family"]]
    assert {row["name"] for row in own} == {*NAMES} and len(found.by_family) == len(NAMES) * 6
    assert all(row["loss"] < -0.2 for row in own) and all(abs(row["loss"]) < 0.1 for row in others)
    tasks = [row["features"] for row in own if row["name"] != "general"]
    assert min(tasks) > 0.3 > max(abs(row["features"]) for row in others if "general" not in row.values())


@pytest.mark.parametrize("nulls", [12, 30])
def test_intervals_cover_the_residual_of_all_documents_and_nulls(nulls):
    """Truth: every document of the pool, and the line through a crowd of nulls."""
    rng, world = np.random.default_rng(12), World(13)
    crowd = world.models(rng, ("elsewhere",) * 600, EVERY)
    families, used = ("elsewhere",) * nulls, np.ones(nulls, dtype=bool)
    truth = _residuals(*crowd)
    hits = {"features": [], "loss": []}
    for _ in range(60):
        whole = world.models(rng, ("elsewhere", *families), EVERY)
        exact = truth(*whole)
        rows = rng.integers(0, POOL, (1, len(NAMES), 50))
        panel = panel_of(*(np.take_along_axis(one, rows, 2) for one in whole), families)
        spread = Resamples(panel, NAMES, LEVEL).spread("math", used)
        for key, values in hits.items():
            lo, hi = getattr(spread, key)
            values.append(lo <= exact[key] <= hi)
    for key, values in hits.items():
        lo, hi = binomial_interval(int(np.sum(values)), len(values), 0.999)
        log.info(f"coverage of the {key} residual with {nulls} nulls: {np.mean(values):.3f}")
        assert lo <= 0.95 <= hi


def _residuals(overlap, loss):
    """Residuals on math of a suspect, from the line through a crowd: a function of the suspect's models."""

    def figures(overlap, loss):
        measured = measure(panel_of(overlap, loss, ("elsewhere",) * (len(overlap) - 1)))
        return measured.drift, measured.contrast["math"], measured.loss["math"][None]

    x, *crowd = figures(overlap, loss)
    g = drift_of_loss(x)
    lines = [fit(x, crowd[0]), fit(g, crowd[1] / g)]

    def truth(overlap, loss):
        x, features, losses = figures(overlap[:1], loss[:1])
        g = drift_of_loss(x)
        return {
            "features": float((features - lines[0].at(x))[0, 0]),
            "loss": float((losses - g * lines[1].at(g))[0, 0]),
        }

    return truth
