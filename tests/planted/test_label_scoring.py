"""Scores of labels where it is known on which tokens a latent fires."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from label_world import VOCAB, planted
from palimpsest.interpret.labels.config import LabelConfig, ScoringOptions
from palimpsest.interpret.labels.evidence import split_examples
from palimpsest.interpret.labels.negatives import POSITIVE, RANDOM, SIMILAR, TextPool
from palimpsest.interpret.labels.run import run_label
from palimpsest.interpret.labels.tokens import TokenJudge, token_label
from palimpsest.latents import LatentIndex, read_labels
from palimpsest.options import RunOptions

N = 24


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Latent j fires on token j, and on nothing else."""
    return planted(tmp_path_factory.mktemp("labels") / "single", [[j] for j in range(N)])


def _sets():
    """Four tokens of 64 for each of 48 latents; some of them are others', too."""
    rng = np.random.default_rng(3)
    return [rng.choice(VOCAB, 4, replace=False).tolist() for _ in range(48)]


def _config(examples, out, **scoring):
    return LabelConfig(
        str(examples),
        provider="tokens",
        top=N,
        run=RunOptions(out=out),
        scoring=ScoringOptions(**({"shuffles": 3} | scoring)),
    )


class Named:
    """Labels by a rule of the test."""

    def __init__(self, name):
        self.name = name

    def label(self, evidence):
        return self.name(evidence.latent)


class Always:
    """A judge that says the same of everything."""

    def __init__(self, verdict):
        self.verdict = verdict

    def judge(self, label, texts):
        return [self.verdict] * len(texts)


class Coin:
    """A judge that knows nothing, and says it again when it is asked again."""

    def judge(self, label, texts):
        return [hashlib.sha256(repr((label, text)).encode()).digest()[0] % 2 == 0 for text in texts]


def test_the_right_label_is_always_right_and_the_labels_of_others_are_worth_nothing(single, tmp_path):
    found = run_label(_config(single, tmp_path / "run"))
    assert len(found.rows) == N
    for row in found.rows:
        assert row.label == f'fires on: " tok{row.latent}"'
        assert row.score == row.score_random == row.score_similar == row.score_hi == 1.0
        assert 0.75 < row.score_lo < 1.0 and row.n >= 20
    assert found.score["mean"] == found.score["lo"] == 1.0 and found.score["n"] == N
    control = found.control
    # A wrong label fits no positive, and among the negatives those of its own latent.
    assert 0.44 < control["shuffled"] <= 0.5 and control["n"] == N
    assert len(control["runs"]) == 3 and all(0.4 < one["mean"] <= 0.5 for one in control["runs"])
    assert control["above"]["lo"] > 0.45
    kept = read_labels([tmp_path / "run"])
    assert (
        kept[5].text == found.rows[[row.latent for row in found.rows].index(5)].label and kept[5].score == 1.0
    )


def test_a_wrong_label_scores_one_half(single, tmp_path):
    wrong = Named(lambda latent: token_label([f" tok{40 + latent % 20}"]))
    found = run_label(_config(single, tmp_path / "run"), wrong, TokenJudge())
    assert found.score["mean"] == 0.5 and all(row.score == 0.5 for row in found.rows)
    assert abs(found.control["above"]["mean"]) < 0.02


def test_a_label_of_half_the_tokens_finds_half(tmp_path):
    examples = planted(tmp_path / "examples", [[j, j + 24] for j in range(N)])
    half = Named(lambda latent: token_label([f" tok{latent}"]))
    found = run_label(_config(examples, tmp_path / "run"), half, TokenJudge())
    assert 0.65 < found.score["mean"] < 0.85


@pytest.mark.parametrize("judge", [Always(True), Always(False)])
def test_a_judge_without_eyes_scores_exactly_one_half(single, tmp_path, judge):
    found = run_label(_config(single, tmp_path / "run"), judge=judge, labeller=Named(str))
    assert found.score["mean"] == found.score["lo"] == found.score["hi"] == 0.5
    assert found.control["shuffled"] == 0.5 and found.control["above"]["mean"] == 0.0


def test_a_judge_that_guesses_is_seen_to_guess(single, tmp_path):
    found = run_label(_config(single, tmp_path / "run", shuffles=1), judge=Coin(), labeller=Named(str))
    assert found.score["lo"] < 0.5 < found.score["hi"] and found.score["hi"] - found.score["lo"] < 0.15
    inside = sum(row.score_lo <= 0.5 <= row.score_hi for row in found.rows)
    assert inside >= N - 4
    assert found.control["above"]["lo"] < 0 < found.control["above"]["hi"]


def test_texts_are_what_they_are_called(single):
    index = LatentIndex.open(single)
    pool = TextPool(index, 0)
    for latent in range(N):
        shown, held = split_examples(index.examples(latent), latent, 0)
        trial = pool.trial(latent, held, 8)
        counts = {kind: trial.kinds.count(kind) for kind in (POSITIVE, RANDOM, SIMILAR)}
        assert counts == {POSITIVE: 8, RANDOM: 8, SIMILAR: 8}
        for text, kind in zip(trial.texts, trial.kinds, strict=True):
            assert (text.tokens[text.peak] == f" tok{latent}") == (kind == POSITIVE)
        held_texts = {(tuple(one.tokens), one.peak) for one in held}
        shown_texts = {(tuple(one.tokens), one.peak) for one in shown}
        positives = {
            (text.tokens, text.peak)
            for text, kind in zip(trial.texts, trial.kinds, strict=True)
            if kind == POSITIVE
        }
        assert positives <= held_texts and not positives & shown_texts
        assert trial.kinds != tuple(sorted(trial.kinds))
        assert pool.trial(latent, held, 8) == TextPool(index, 0).trial(latent, held, 8)
    assert pool.trial(3, held, 8) != TextPool(index, 1).trial(3, held, 8)


@pytest.mark.parametrize("neighbours", [0, 8])
def test_the_doubt_is_how_often_negatives_fire_after_all(tmp_path, neighbours):
    sets = _sets()
    index = LatentIndex.open(planted(tmp_path / "examples", sets, neighbours=neighbours))
    pool = TextPool(index, 0)
    wrong, doubts = [], []
    for latent, own in enumerate(sets):
        _, held = split_examples(index.examples(latent), latent, 0)
        trial = pool.trial(latent, held, 10)
        for text, kind in zip(trial.texts, trial.kinds, strict=True):
            fires = text.tokens[text.peak] in {f" tok{token}" for token in own}
            if kind == POSITIVE:
                assert fires
            else:
                wrong.append(fires)
        doubts.append(trial.doubt)
    assert len(wrong) > 450 and 0.02 < np.mean(doubts) < 0.07
    if neighbours:
        # Whoever shares a token is known, and gives no negative: the rate says more than there is.
        assert np.mean(wrong) < 0.01
    else:
        assert abs(np.mean(wrong) - np.mean(doubts)) < 0.03


def test_latents_that_fire_together_are_no_negatives(tmp_path):
    # Latent 1 fires wherever latent 0 does, and on a further token.
    examples = planted(tmp_path / "examples", [[0], [0, 1], [2], [3], [4], [5]])
    index = LatentIndex.open(examples)
    _, held = split_examples(index.examples(0), 0, 0)
    trial = TextPool(index, 0).trial(0, held, 10)
    peaks = {
        text.tokens[text.peak]
        for text, kind in zip(trial.texts, trial.kinds, strict=True)
        if kind != POSITIVE
    }
    assert peaks and not peaks & {" tok0", " tok1"}
