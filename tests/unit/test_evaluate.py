"""The numbers of an evaluation that need no model: histograms, sums, intervals, chunks, the result's JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from helpers import assert_close
from palimpsest.corpus import Corpus
from palimpsest.dictionaries import Dictionary
from palimpsest.errors import ConfigError, CorpusError
from palimpsest.evaluate import EvaluateConfig, Evaluation, evaluation_batches
from palimpsest.evaluate import splice as splice_module
from palimpsest.evaluate.estimate import Settings, estimate_model, finish_evaluation, histogram
from palimpsest.evaluate.splice import predictions
from palimpsest.evaluate.sums import (
    COLUMNS,
    CodeSums,
    DocumentSums,
    DocumentTable,
    reconstruction_columns,
)
from palimpsest.models.sites import Head
from palimpsest.options import RunOptions
from palimpsest.stats import percentile_interval
from text_fixture import write_words


@pytest.fixture
def table():
    """Sums of twelve documents of different lengths, every loss above the original's."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 40, 12)
    sums = np.zeros((12, len(COLUMNS)))
    values = {
        "tokens": 1,
        "residual": rng.uniform(0.1, 0.4, 12),
        "centred": rng.uniform(0.8, 1.2, 12),
        "sized": 1,
        "cosine": 0.9,
        "norm_ratio": 0.8,
        "predicted": 1,
        "ce_original": rng.uniform(2, 3, 12),
        "ce_spliced": rng.uniform(3, 4, 12),
        "ce_zero": rng.uniform(7, 9, 12),
        "ce_mean": rng.uniform(5, 6, 12),
        "kl_spliced": rng.uniform(0.5, 1, 12),
        "kl_zero": rng.uniform(4, 6, 12),
        "kl_mean": rng.uniform(2, 3, 12),
    }
    for name, value in values.items():
        sums[:, COLUMNS.index(name)] = tokens * value
    return DocumentTable(np.arange(12), sums)


def codes(tokens, fires=(3, 0, 5, 1)):
    l0 = np.zeros(len(fires) + 1, np.int64)
    l0[1], l0[3] = tokens - 4, 4
    return np.asarray(fires), l0


def estimate(table, *, loss=True, **settings):
    tokens = int(table.sums[:, 0].sum())
    return estimate_model("model", "m", table, codes(tokens), Settings(**settings), loss=loss)


def evaluation(table, **settings):
    found, notes = estimate(table, **settings)
    described = Dictionary(8, 4, k=2, metadata={"site": "resid_post.0"}).describe()
    return finish_evaluation(described, "resid_post.0", [found], Settings(**settings), (12, 240, 7), notes)


def test_figures_are_ratios_of_sums_over_tokens(table):
    found, notes = estimate(table)
    sums = dict(zip(COLUMNS, table.sums.sum(0), strict=True))
    assert notes == []
    assert found.fve == pytest.approx(1 - sums["residual"] / sums["centred"], abs=1e-12)
    assert (found.cosine, found.norm_ratio) == (pytest.approx(0.9), pytest.approx(0.8))
    assert found.splice.ce["zero"] == pytest.approx(sums["ce_zero"] / sums["tokens"])
    for name in ("zero", "mean"):
        gap, left = (sums[f"ce_{one}"] - sums["ce_original"] for one in (name, "spliced"))
        assert found.splice.ce_recovered[name] == pytest.approx((gap - left) / gap, abs=1e-12)
        kept = 1 - sums["kl_spliced"] / sums[f"kl_{name}"]
        assert found.splice.kl_recovered[name] == pytest.approx(kept, abs=1e-12)


def test_intervals_resample_documents(table):
    found, _ = estimate(table, resamples=400, seed=3)
    weights = np.random.default_rng([3, 11]).multinomial(12, np.full(12, 1 / 12), size=400)
    samples = weights @ table.sums
    column = {name: samples[:, index] for index, name in enumerate(COLUMNS)}
    expected = {
        "fve": 1 - column["residual"] / column["centred"],
        "ce": (column["ce_mean"] - column["ce_spliced"]) / (column["ce_mean"] - column["ce_original"]),
        "kl": (column["kl_zero"] - column["kl_spliced"]) / column["kl_zero"],
    }
    intervals = {
        key: tuple(map(float, percentile_interval(value, 0.95, 12))) for key, value in expected.items()
    }
    assert found.fve_ci == pytest.approx(intervals["fve"])
    assert found.splice.ce_recovered_ci["mean"] == pytest.approx(intervals["ce"])
    assert found.splice.kl_recovered_ci["zero"] == pytest.approx(intervals["kl"])
    assert found.fve_ci[0] < found.fve < found.fve_ci[1]


def test_few_documents_have_no_interval(table):
    few = DocumentTable(table.documents[:9], table.sums[:9])
    found, notes = estimate(few)
    assert found.fve_ci is None and found.splice.ce_recovered_ci == {"zero": None, "mean": None}
    assert found.splice.ce_recovered["zero"] is not None and "9 documents are too few" in notes[0]
    assert estimate(few, confidence=0.9)[0].fve_ci is not None


def test_a_baseline_that_changes_nothing_gives_no_ratio(table):
    sums = table.sums.copy()
    for name in ("ce_zero", "ce_spliced"):
        sums[:, COLUMNS.index(name)] = sums[:, COLUMNS.index("ce_original")]
    sums[:, COLUMNS.index("kl_zero")] = 0
    found, notes = estimate(DocumentTable(table.documents, sums))
    assert found.splice.ce_recovered == {"zero": None, "mean": pytest.approx(1)}
    assert found.splice.kl_recovered["zero"] is None and found.splice.ce_recovered_ci["zero"] is None
    assert len(notes) == 1 and "zero ablation" in notes[0]


def test_without_losses_or_predictions_there_is_no_splice(table):
    assert estimate(table, loss=False)[0].splice is None
    sums = table.sums.copy()
    sums[:, COLUMNS.index("predicted") :] = 0
    found, notes = estimate(DocumentTable(table.documents, sums))
    assert found.splice is None and "prediction" in notes[0]


def test_no_variance_has_no_fve(table):
    sums = table.sums.copy()
    sums[:, COLUMNS.index("centred")] = 0
    assert estimate(DocumentTable(table.documents, sums))[0].fve is None


def test_l0_and_dead(table):
    found, _ = estimate(table)
    tokens = int(table.sums[:, 0].sum())
    assert found.l0 == pytest.approx((tokens - 4 + 12) / tokens)
    assert found.l0_quantiles == {"0.05": 1, "0.25": 1, "0.5": 1, "0.75": 1, "0.95": 1}
    assert (found.dead, found.dead_share, found.density.never) == (1, 0.25, 1)


@pytest.mark.parametrize(
    ("fires", "tokens", "bins"),
    [
        ([1000], 1000, {31: 1}),
        ([1], 1000, {20: 1}),
        ([10, 100], 1000, {24: 1, 28: 1}),
        ([9, 11], 1000, {23: 1, 24: 1}),
        ([1], 10**9, {0: 1}),
        ([0, 0, 7], 1000, {23: 1}),
    ],
)
def test_histogram(fires, tokens, bins):
    density = histogram(np.array(fires), tokens)
    assert {index: count for index, count in enumerate(density.counts) if count} == bins
    assert density.never == fires.count(0) and len(density.edges) == 33
    assert (density.edges[0], density.edges[24], density.edges[-1]) == (-8, -2, 0)


def test_the_result_survives_json(table):
    whole = evaluation(table)
    again = Evaluation.from_dict(json.loads(json.dumps(whole.to_dict())) | {"later": 1})
    assert again == whole and again.side("model").fve_ci == whole.models[0].fve_ci
    few = evaluation(DocumentTable(table.documents[:3], table.sums[:3]))
    assert Evaluation.from_dict(json.loads(json.dumps(few.to_dict()))) == few
    with pytest.raises(KeyError):
        whole.side("tuned")


def test_metrics_are_flat(table):
    whole = evaluation(table)
    assert set(whole.metrics) == {
        "tokens",
        "fve",
        "l0",
        "dead_share",
        *(f"{kind}_recovered_{name}" for kind in ("ce", "kl") for name in ("zero", "mean")),
    }
    assert whole.metrics["fve"] == whole.models[0].fve and "FVE 0.7" in whole.summary


def test_a_document_in_two_batches_is_one_row():
    sums = DocumentSums(2)
    sums.add(torch.tensor([4, 1, 4]), torch.tensor([[1.0, 10], [2, 20], [3, 30]]))
    sums.add(torch.tensor([1, 7]), torch.tensor([[5.0, 50], [6, 60]]))
    table = sums.finish()
    assert table.documents.tolist() == [1, 4, 7]
    assert table.sums.tolist() == [[7, 70], [4, 40], [6, 60]]
    assert DocumentSums(2).finish().sums.shape == (0, 2)


@pytest.mark.parametrize("activation", ["topk", "relu"])
def test_code_sums_are_those_of_the_dense_matrix(activation):
    torch.manual_seed(2)
    dictionary = Dictionary(8, 24, activation=activation, k=5 if activation == "topk" else None)
    with torch.no_grad():
        dictionary.b_enc.copy_(torch.randn(24) - 1.5)
    dictionary.requires_grad_(False)
    sums = CodeSums(24, torch.device("cpu"))
    dense = []
    for size in (30, 1, 12):
        batch = dictionary.encode(torch.randn(size, 8))
        sums.add(batch)
        dense.append(batch.dense() > 0)
    active = torch.cat(dense)
    assert sums.fires().tolist() == active.sum(0).tolist()
    assert sums.l0().tolist() == torch.bincount(active.sum(1), minlength=25).tolist()
    assert 0 in sums.fires() and sums.l0()[5] < 43  # padded rows of topk are not counted as latent 0


def test_reconstruction_columns():
    torch.manual_seed(0)
    x, made, mean = torch.randn(6, 8), torch.randn(6, 8), torch.randn(8)
    x[2], made[4] = 0, 0
    found = dict(zip(COLUMNS, reconstruction_columns(x, made, mean).T, strict=False))
    assert_close(found["residual"], ((x - made) ** 2).sum(1).double())
    assert_close(found["centred"], ((x - mean) ** 2).sum(1).double())
    assert found["sized"].tolist() == [1, 1, 0, 1, 1, 1]
    cosine = torch.nn.functional.cosine_similarity(x, made).double()
    assert_close(found["cosine"], cosine)
    assert (found["cosine"][4], found["norm_ratio"][4], found["norm_ratio"][2]) == (0, 0, 0)
    assert_close(found["norm_ratio"][0], (made[0].norm() / x[0].norm()).double())


@pytest.mark.parametrize("size", [1, 64 << 20])
def test_predictions_are_direct_ones_whatever_the_chunk(monkeypatch, size):
    monkeypatch.setattr(splice_module, "LOGIT_BYTES", size)
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 30)
    head = Head(module, 0.5, 5.0)
    inputs = [4 * torch.randn(150, 8) for _ in range(3)]
    ids = torch.randint(30, (150,))
    found = predictions(head, inputs[0], inputs[1:], ids)
    with torch.no_grad():
        log_p = [(5 * torch.tanh(0.5 * module(one).double() / 5)).log_softmax(-1) for one in inputs]
    expected = torch.stack([-one.gather(1, ids[:, None])[:, 0] for one in log_p], 1)
    divergence = [(log_p[0].exp() * (log_p[0] - one)).sum(-1) for one in log_p[1:]]
    assert_close(found.ce.double(), expected, rtol=1e-5, atol=1e-5)
    assert_close(found.kl.double(), torch.stack(divergence, 1), rtol=1e-4, atol=1e-5)
    assert predictions(head, inputs[0], inputs[:1], ids).kl.abs().max() == 0


def test_the_first_documents_that_hold_the_tokens(tmp_path, tiny_tokenizer):
    corpus = Corpus(write_words(tmp_path / "words.jsonl"), tiny_tokenizer, max_length=64)
    kept = [int((document.special == 0).sum()) for document in corpus.documents()]
    for tokens, documents in (
        (1, 1),
        (kept[0], 1),
        (kept[0] + 1, 2),
        (sum(kept[:4]), 4),
        (None, 10),
        (10**6, 10),
    ):
        batches = evaluation_batches(corpus, tokens, 128)
        for _ in range(2):  # it can be passed over again
            found = torch.cat([batch.document[batch.keep] for batch in batches])
            assert len(found) == sum(kept[:documents]) and found.max() == documents - 1
    limited = Corpus(corpus.sources, tiny_tokenizer, max_length=64, max_documents=2)
    assert sum(int(batch.keep.sum()) for batch in evaluation_batches(limited, 10**6)) == sum(kept[:2])
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(CorpusError):
        evaluation_batches(Corpus(tmp_path / "empty.jsonl", tiny_tokenizer), 10)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "none of them"),
        ({"base": "b"}, "--model and --base"),
        ({"model": None, "base": "b"}, "found: --base|Found: --base"),
        ({"model": None, "tuned": "t"}, "Found: --tuned"),
        ({"corpus": ()}, "needs text"),
        ({"confidence": 1.0}, "coverage"),
        ({"resamples": 10}, "resamples"),
    ],
)
def test_configs_that_contradict_themselves(tmp_path, changes, words):
    fields = {"model": "m", "corpus": ("text.jsonl",), "run": RunOptions(out=tmp_path / "out")}
    EvaluateConfig("d", **fields)
    with pytest.raises(ConfigError, match=words):
        EvaluateConfig("d", **(fields | changes))
