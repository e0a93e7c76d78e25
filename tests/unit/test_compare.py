"""Diffs side by side: figures come through, unlike is refused or said, and the page and chart show it."""

from __future__ import annotations

import json

import pytest

from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.diff.compare import compare_runs
from palimpsest.diff.compare_config import CompareConfig
from palimpsest.diff.result import Diff, PatchRow
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.options import RunOptions


def patched(share, positions="all"):
    """Rows as patching gives them; `share` of the whole decides all others."""

    def row(name, value, size=None, seed=None):
        return PatchRow(name, size, positions, 1 - value, value, (value - 0.02, value + 0.02), seed)

    return [
        row("none", 0.0),
        row("mean", 0.1),
        row("raw", 0.95),
        row("all", share - 0.05, 40),
        row("all+bias", share, 40),
        row("best:nu", share / 2, 4),
        row("worst:nu", share / 4, 4),
        row("random:nu", 0.03, 7, seed=0),
        row("random:nu", 0.05, 9, seed=1),
        row("directions:nu", -0.01, 4, seed=0),
        row("top:nu", 0.2, 16),
    ]


def diff_of(**changes):
    described = {
        "path": "nowhere",
        "n_latents": 4096,
        "activation": "batch_topk",
        "k": 32,
        "metadata": {"tokens": 2_000_000},
    }
    fields = {
        "summary": "",
        "method": "crosscoder",
        "pair": {"base": "base", "tuned": "math"},
        "site": "resid_post.1",
        "dictionary": described | changes.pop("dictionary", {}),
        "corpora": {"math": {"documents": 10, "tokens": 1000}},
        "tokens": 1000,
        "fve": {"base": 0.95, "tuned": 0.96, "difference": 0.5},
        "l0": 31.5,
        "dead": 7,
        "classes": {"tuned-only": 12},
        "tuned_only": {"raw": 12, "surviving": 5, "undetermined": 3, "null": 0.5, "null_raw": 9.0},
        "thresholds": {"tuned_only": 0.9},
        "confidence": 0.95,
        "resamples": 1000,
        "seed": 0,
        "gap": {"all": 0.31},
        "patching": patched(0.6),
        "seconds": {"statistics": 10.0, "patching": 20.5},
    }
    return Diff(**(fields | changes))


def write(folder, diff, *, base="b" * 64, tuned="t" * 64, corpus="c" * 64, stage="diff"):
    """A finished diff folder around figures made by hand."""
    inputs = {
        "base": {"path": diff.pair["base"], "sha256": base},
        "tuned": {"path": diff.pair["tuned"], "sha256": tuned},
        "corpus/math": {"path": "math.jsonl", "sha256": corpus},
    }
    with RunFolder(folder, stage=stage, config={}, inputs=inputs) as run:
        run.write_json("diff.json", diff.to_dict())
        run.finish()
    return str(folder)


def compared(tmp_path, *runs, **options):
    return compare_runs(CompareConfig(tuple(runs), run=RunOptions(out=tmp_path / "out", **options)))


@pytest.fixture
def two(tmp_path):
    """A crosscoder with everything, and an L1 crosscoder without patching, null or twins."""
    twins = [
        {"twin": "a", "alive": {"mean": 0.8}, "tuned_only": {"mean": 0.5}},
        {"twin": "b", "alive": {"mean": 0.6}, "tuned_only": {"mean": None}},
    ]
    one = diff_of(
        stability=twins, patching=patched(0.6) + patched(0.4, "first"), gap={"all": 0.31, "first": 1.2}
    )
    only = {"raw": 100, "surviving": 1, "undetermined": 9, "null": None, "null_raw": None}
    fve = {"base": 0.9, "tuned": None, "difference": -0.25}
    l1 = {"activation": "relu", "k": None, "metadata": {}}
    other = diff_of(dictionary=l1, tuned_only=only, fve=fve, patching=[], gap={})
    return write(tmp_path / "batch", one), write(tmp_path / "l1", other)


def test_every_figure_comes_through(tmp_path, two):
    found = compared(tmp_path, *two)
    one, other = found.rows
    assert (one.name, one.method, one.activation, one.k, one.l0) == (
        "batch",
        "crosscoder",
        "batch_topk",
        32,
        31.5,
    )
    assert (one.raw, one.surviving, one.undetermined, one.null, one.null_raw) == (12, 5, 3, 0.5, 9.0)
    assert (one.trained_tokens, one.latents, one.diff_seconds, one.train_seconds) == (
        2_000_000,
        4096,
        30.5,
        None,
    )
    assert one.fve == {"base": 0.95, "tuned": 0.96, "difference": 0.5}
    assert one.stability == {"alive": pytest.approx(0.7), "tuned_only": 0.5}
    assert {place: row.share for place, row in one.recovered.items()} == {"all": 0.6, "first": 0.4}
    assert one.recovered["all"].ci == pytest.approx((0.58, 0.62))
    assert [(half.ranking, half.positions) for half in one.halves] == [("nu", "all"), ("nu", "first")]
    half = one.halves[0]
    assert (half.size, half.best, half.worst) == (4, 0.3, 0.15)
    assert half.best_ci == pytest.approx((0.28, 0.32)) and half.worst_ci == pytest.approx((0.13, 0.17))
    assert half.random == pytest.approx(0.04) and half.random_range == (0.03, 0.05)
    assert half.directions == -0.01
    assert (other.null, other.stability, other.recovered, other.halves) == (None, {}, {}, [])
    assert other.trained_tokens is None
    assert found.gap == {"all": 0.31, "first": 1.2}
    assert [(row.set, row.positions) for row in found.baselines] == [
        ("mean", "all"),
        ("raw", "all"),
        ("mean", "first"),
        ("raw", "first"),
    ]


def test_the_folder_holds_the_comparison(tmp_path, two):
    found = compared(tmp_path, *two)
    folder = open_artifact(tmp_path / "out", stage="diff-compare")
    assert folder.files.keys() == {"compare.json", "compare.md", "kl_share.svg", "kl_share.png"}
    assert folder.read_json("compare.json") == json.loads(json.dumps(found.to_dict()))
    assert folder.file("compare.md").read_text() == found.markdown
    assert folder.inputs.keys() == {"diff/batch", "diff/l1"}
    assert folder.file("kl_share.png").read_bytes().startswith(b"\x89PNG")
    assert compared(tmp_path, *two, resume=True) == found
    with pytest.raises(ArtifactError, match="overwrite"):
        compared(tmp_path, *two)


def test_the_page_shows_it(tmp_path, two):
    page = compared(tmp_path, *two).markdown
    lines = page.splitlines()
    (batch,) = [line for line in lines if line.startswith("| batch | crosscoder (batch_topk) | 4,096")]
    assert batch == (
        "| batch | crosscoder (batch_topk) | 4,096 | 32 | 31.5 | 2,000,000 | 0.950 / 0.960 / 0.500 | 12 / 5 / 0.5 "
        "| – | 0.70 / 0.50 | – / 30 |"
    )
    (l1,) = [line for line in lines if line.startswith("| l1 | crosscoder (relu) | 4,096")]
    assert "| – | 31.5 | – | 0.900 / – / -0.250 | 100 / 1 / – | – | – / – |" in l1
    assert "| batch | crosscoder (batch_topk) | 60.0% [58.0%, 62.0%] | 40.0% [38.0%, 42.0%] |" in lines
    assert "| l1 | crosscoder (relu) | – | – |" in lines
    assert "| *raw* | no dictionary | 95.0% [93.0%, 97.0%] | 95.0% [93.0%, 97.0%] |" in lines
    assert (
        "| batch | nu | all | 4 | 30.0% [28.0%, 32.0%] | 15.0% [13.0%, 17.0%] | 4.0% [3.0%, 5.0%] | -1.0% |"
        in lines
    )
    # A table's rows have as many cells as its head.
    for above, line in zip(lines, lines[1:], strict=False):
        if above.startswith("|") and line.startswith("|"):
            assert above.count("|") == line.count("|")
    # The guide speaks of the methods that are there.
    assert "**L1 crosscoder.**" in page and "BatchTopK and its kin" in page and "diff-SAE.**" not in page
    assert max(map(len, lines)) < 500


def test_the_chart_has_a_point_for_every_share(tmp_path, two):
    compared(tmp_path, *two)
    svg = (tmp_path / "out" / "kl_share.svg").read_text()
    assert (
        svg.startswith("<svg")
        and "batch: crosscoder (batch_topk)" in svg
        and "first tokens of each answer" in svg
    )
    assert "l1:" not in svg  # it recovers nothing that was measured
    # Values carry their label for screen readers: a point each, and where its whisker begins and ends.
    label = "share of the KL gap that all latents and the bias recover"
    for share, low, high in (("60%", 0.58, 0.62), ("40%", 0.38, 0.42)):
        assert svg.count(f'"{label}: {share}; diff:') == 1
        assert svg.count(f'"{label}: {low}; diff: batch: crosscoder (batch_topk); high: {high};') == 1


def test_without_any_patching_there_is_no_chart(tmp_path):
    runs = [write(tmp_path / name, diff_of(patching=[], gap={})) for name in ("a", "b")]
    found = compared(tmp_path, *runs)
    assert "KL gap that is recovered" not in found.markdown and "rankings" not in found.markdown
    assert open_artifact(tmp_path / "out").files.keys() == {"compare.json", "compare.md"}


def test_identical_models_have_a_row_without_a_share(tmp_path):
    no_gap = [PatchRow("all+bias", 40, "all", 0.0, None, None)]
    runs = [write(tmp_path / name, diff_of(patching=no_gap, gap={"all": 0.0})) for name in ("a", "b")]
    found = compared(tmp_path, *runs)
    assert "| a | crosscoder (batch_topk) | – |" in found.markdown
    assert "kl_share.svg" not in open_artifact(tmp_path / "out").files


def test_seconds_of_training_are_read_where_the_dictionary_lies(tmp_path):
    for name, timings in (("timed", {"train": 12.5, "evaluate": 3.0}), ("untimed", {})):
        with RunFolder(tmp_path / name, stage="dictionary", config={}) as run:
            for step, seconds in timings.items():
                run.timing(step, seconds)
            run.finish()
    runs = [
        write(tmp_path / f"diff-{name}", diff_of(dictionary={"path": str(tmp_path / name)}))
        for name in ("timed", "untimed")
    ]
    assert [row.train_seconds for row in compared(tmp_path, *runs).rows] == [12.5, None]


@pytest.mark.parametrize(
    ("changes", "folder", "what"),
    [
        ({}, {"tuned": "x" * 64}, "tuned model"),
        ({}, {"base": "x" * 64}, "base model"),
        ({"site": "resid_post.2"}, {}, "site"),
    ],
)
def test_other_pairs_and_sites_are_refused(tmp_path, changes, folder, what):
    runs = [write(tmp_path / "a", diff_of()), write(tmp_path / "b", diff_of(**changes), **folder)]
    with pytest.raises(ConfigError, match=f"a and b are not of the same {what}"):
        compared(tmp_path, *runs)
    assert not (tmp_path / "out").exists()


def test_a_pair_is_known_by_its_weights_and_not_by_its_path(tmp_path):
    moved = diff_of(pair={"base": "elsewhere/base", "tuned": "elsewhere/math"})
    assert compared(tmp_path, write(tmp_path / "a", diff_of()), write(tmp_path / "b", moved)).notes == []
    # Without weights the path has to do.
    unknown = [
        write(tmp_path / name, diff, base=None, tuned=None) for name, diff in (("c", diff_of()), ("d", moved))
    ]
    with pytest.raises(ConfigError, match="base model"):
        compared(tmp_path, *unknown, overwrite=True)


@pytest.mark.parametrize(
    ("changes", "folder", "note"),
    [
        ({}, {}, None),
        ({"tokens": 2000}, {}, "different measured tokens (a: 1,000; b: 2,000)."),
        ({}, {"corpus": "d" * 64}, "different corpora (a: math cccccccc (10 documents); b: math dddddddd"),
        ({"corpora": {"code": {"documents": 3, "tokens": 9}}}, {}, "different corpora"),
        ({"dictionary": {"metadata": {"tokens": 5}}}, {}, "different training tokens (a: 2,000,000; b: 5)."),
        ({"dictionary": {"n_latents": 64}}, {}, "different numbers of latents"),
        ({"thresholds": {"tuned_only": 0.8}}, {}, "different thresholds"),
        ({"confidence": 0.9}, {}, "different confidence levels"),
        ({"patched": {"predictions": {"all": 7}}}, {}, "different predictions of the causal test"),
    ],
)
def test_other_budgets_are_said(tmp_path, changes, folder, note):
    runs = [write(tmp_path / "a", diff_of()), write(tmp_path / "b", diff_of(**changes), **folder)]
    found = compared(tmp_path, *runs)
    assert len(found.notes) == (note is not None)
    if note is not None:
        assert note in found.notes[0] and found.notes[0] in found.markdown


def test_folders_of_one_name_keep_apart(tmp_path):
    runs = [write(tmp_path / where / "diff|1", diff_of()) for where in ("a", "b")]
    found = compared(tmp_path, *runs)
    assert [row.name for row in found.rows] == runs
    assert "diff\\|1" in found.markdown


def test_what_is_no_diff_is_refused(tmp_path):
    one = write(tmp_path / "a", diff_of())
    with pytest.raises(ArtifactError, match="another verb"):
        compared(tmp_path, one, write(tmp_path / "b", diff_of(), stage="evaluation"))
    with pytest.raises(ArtifactError, match="no folder"):
        compared(tmp_path, one, str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="several diffs"):
        CompareConfig((one,), run=RunOptions(out=tmp_path / "out"))
    with pytest.raises(ConfigError, match="with itself"):
        CompareConfig((one, f"{one}/../a"), run=RunOptions(out=tmp_path / "out"))
