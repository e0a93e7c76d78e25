"""The throughput benchmark's arithmetic and its table, from a small recorded run; nothing is trained here."""

from __future__ import annotations

import copy
import sys

import pytest

from helpers import PACKAGE

BENCHMARKS = PACKAGE.parents[1] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    from throughput import contest, report, summary

    return contest, report, summary


def timed(name, family, dtype, number, rate, **more):
    library = name.split()[0]
    row = {"name": name, "library": library, "family": family, "models": 1, "dtype": dtype, "d_model": 256}
    row |= {"latents": 4096, "round": number, "status": "ok", "tokens_per_second": rate, "steps": 3}
    return {**row, "peak_mib": 500.0, "gpu_mib": None, **more}


@pytest.fixture
def result():
    speed = [
        timed("palimpsest topk", "topk", "float32", 0, 40_000.0),
        timed("eai-sparsify topk", "topk", "float32", 0, 16_000.0),
        timed("sae-lens topk", "topk", "float32", 0, 6_000.0),
        timed("palimpsest topk", "topk", "float32", 1, 50_000.0),
        timed("eai-sparsify topk", "topk", "float32", 1, 20_000.0),
        timed("sae-lens topk", "topk", "float32", 1, 8_000.0),
        timed("palimpsest topk", "topk", "bfloat16", 0, 60_000.0),
        timed("palimpsest batch_topk", "batch_topk", "float32", 0, 30_000.0),
        timed("sae-lens batch_topk", "batch_topk", "float32", 0, 10_000.0),
        timed("dictionary-learning batch_topk", "batch_topk", "float32", 0, 0.0)
        | {"status": "failed", "reason": "killed by signal 9 | out of memory"},
    ]
    quality = [
        {"name": name, "library": name.split()[0], "family": "topk", "dtype": "float32", "latents": 4096}
        | {"lr": lr, "status": "ok", "fve": fve, "l0": 32.0, "fve_at_k": fve}
        for name, lr, fve in (("palimpsest topk", None, 0.8), ("eai-sparsify topk", 3e-3, 0.79))
    ]
    return {
        "settings": {
            "device": "cpu",
            "batch": 4096,
            "k": 32,
            "rows": 65536,
            "held_out": 4096,
            "quality": {"steps": 96, "batch": 1024, "latents": 4096},
        },
        "machine": {"cpu": "a CPU", "threads": 2, "cores": 2, "memory_gib": 24.0, "system": "Linux"}
        | {"date": "today", "load_at_start": 0.1},
        "quick": False,
        "seconds": 1.0,
        "versions": {"sae-lens": {"status": "ok", "package": "sae-lens", "version": "6"}},
        "peaks": [
            {"round": 0, "status": "ok", "float32": {"a": 150.0, "b": 100.0}, "bfloat16": {"a": 300.0}},
            {"round": 1, "status": "ok", "float32": {"a": 200.0, "b": 100.0}, "bfloat16": {"a": 400.0}},
        ],
        "speed": speed,
        "quality": quality,
        "scaling": [
            {"name": "palimpsest topk", "dtype": "float32", "status": "ok"}
            | {"by_tokens": [[100, 1.0], [200, 2.0]], "by_latents": [[10, 1.0], [20, 4.0]]}
        ],
        "profile": [
            {"name": "palimpsest topk", "family": "topk", "dtype": "float32", "latents": 4096, "status": "ok"}
            | {"step_s": 0.1, "operators": [["aten::mm", 0.6], ["other operators", 0.3]], "outside": 0.1}
        ],
    }


def test_the_roofline_is_encode_work_over_the_best_product(bench, result):
    _, _, summary = bench
    row = next(r for r in summary.roofline(result) if (r["family"], r["dtype"]) == ("topk", "float32"))
    gflop = 2 * 256 * 4096 / 1e9
    assert row["share_float32"] == pytest.approx(45_000 * gflop / 200)
    assert row["share_bfloat16"] == pytest.approx(45_000 * gflop / 400)
    assert row["paired_float32"] == pytest.approx((40_000 * gflop / 150 + 50_000 * gflop / 200) / 2)
    assert not row["met"]


def test_two_models_are_twice_the_work(bench, result):
    _, _, summary = bench
    row = result["speed"][0]
    assert summary.encode_flop({**row, "models": 2}) == 2 * summary.encode_flop(row) == 4 * 256 * 4096


def test_a_ratio_is_against_the_fastest_peer_in_the_same_dtype(bench, result):
    _, _, summary = bench
    found = {(v["family"], v["mode"]): v for v in summary.verdicts(result)}
    same = found["topk", "float32"]
    assert (same["peer"], same["ratio"], same["met"]) == ("eai-sparsify topk", pytest.approx(2.5), True)
    assert same["ratios"] == [pytest.approx(2.5)] * 2
    assert found["topk", "fastest"]["ratio"] == pytest.approx(60 / 18)
    assert found["batch_topk", "float32"]["met"] is False
    assert ("topk", "bfloat16") not in found


def test_quality_is_compared_with_the_best_peer(bench, result):
    _, _, summary = bench
    assert [q["met"] for q in summary.equal_quality(result)] == [True]
    result["quality"][1]["fve_at_k"] = 0.81
    assert [q["met"] for q in summary.equal_quality(result)] == [False]


def test_growth_is_a_power(bench, result):
    _, _, summary = bench
    assert summary.exponent(result["scaling"][0]["by_tokens"]) == pytest.approx(1)
    assert summary.exponent(result["scaling"][0]["by_latents"]) == pytest.approx(2)


def test_whoever_failed_is_a_row_with_its_reason(bench, result):
    _, report, _ = bench
    text = report.markdown(result)
    assert "| dictionary-learning batch_topk | fp32 | – | failed |" in text
    assert "killed by signal 9 / out of memory" in text
    assert (
        "| 4,096 | topk | fp32 | 45,000 | eai-sparsify topk (fp32) | 18,000 | 2.5× (2.5–2.5) | 2× | yes |"
        in text
    )


def test_a_run_without_figures_is_still_a_report(bench, result):
    _, report, _ = bench
    for row in result["speed"] + result["quality"] + result["peaks"] + result["scaling"] + result["profile"]:
        row |= {"status": "missing", "reason": "not installed"}
    assert report.markdown(copy.deepcopy(result)).count("not installed") >= 7
    assert report.plot(result, BENCHMARKS / "never") == []


def test_the_plot_is_written(bench, result, tmp_path):
    _, report, _ = bench
    made = report.plot(result, tmp_path / "bench", suffixes=(".svg",))
    assert [path.name for path in made] == ["bench.svg"]
    assert "eai-sparsify topk fp32" in made[0].read_text()


def test_everybody_has_the_same_schedule_and_levels(bench):
    contest, _, _ = bench
    assert contest.prefixes(4096) == (128, 384, 896, 1920, 4096)
    factors = [contest.factor(step, 100) for step in range(100)]
    assert factors[:3] == [0.5, 1.0, 1.0]
    assert factors[80:82] == [1.0, 0.95]
    assert factors[-1] == pytest.approx(0.05)
