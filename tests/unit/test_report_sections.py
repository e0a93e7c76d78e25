"""The sections of every stage: the numbers of the data are drawn, nothing missing is invented, nothing hostile runs."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import vl_convert

import report_runs as made
from palimpsest.report.draw import Page, draw_section
from palimpsest.report.merge import OTHER, STAGES
from palimpsest.report.parts import Chart, Figures, Prose, Run, Section, Table, Template
from palimpsest.report.sections import diff, examples, labels, marks, other, reading, trajectory
from palimpsest.report.sections.diff_charts import null_band
from palimpsest.report.sections.steer import changes_text
from palimpsest.report.theme import LIGHT, vega_config

LIMIT = 150_000
BIDI = re.compile("[\u202a-\u202e\u2066-\u2069\u200b\x00-\x08\x1b]")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return made.all_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def shown(runs: dict[str, Run]) -> Callable[[str], list[Section]]:
    """The sections of a stage's run, made once."""
    return cache(lambda stage: module_of(runs[stage]).sections(runs[stage]))


def module_of(run: Run) -> Any:
    return import_module(STAGES[run.stage][1] if run.stage in STAGES else OTHER)


def spec_of(chart: Chart) -> dict[str, Any]:
    spec = chart.chart.properties(width=330, height=chart.height).to_dict()
    return {**spec, "config": vega_config(LIGHT.__getitem__, "sans-serif")}


def charts(sections: list[Section]) -> dict[str, Chart]:
    return {block.name: block for one in sections for block in one.blocks if isinstance(block, Chart)}


def tables(sections: list[Section]) -> dict[str, Table]:
    return {block.name: block for one in sections for block in one.blocks if isinstance(block, Table)}


def values(chart: Chart) -> list[list[dict[str, Any]]]:
    """The rows of each layer of a chart, in order."""
    spec = chart.chart.to_dict()
    found = [layer.get("data") or spec.get("data") or {} for layer in spec.get("layer", [spec])]
    return [one["values"] if "values" in one else spec["datasets"][one["name"]] for one in found]


def rows_with(chart: Chart, *keys: str) -> list[dict[str, Any]]:
    """The rows of the first layer that has some keys."""
    return next((rows for rows in values(chart) if rows and all(key in rows[0] for key in keys)), [])


def again(run: Run, data: dict[str, Any]) -> Run:
    return Run(run.artifact, run.name, data)


def text_of(section: Section) -> str:
    parts = [section.title, section.lead, section.verdict]
    for block in section.blocks:
        if isinstance(block, Prose):
            parts += [*block.paragraphs, block.command]
        if isinstance(block, Figures):
            parts += [" ".join(item) for item in block.items]
    return "\n".join(parts)


STAGE_NAMES = (
    "diff", "diff-compare", "tune", "explain", "explain-compare", "steer", "evaluation", "store", "examples", "labels"
)  # fmt: skip


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_every_chart_compiles_and_is_small_and_every_column_has_values(shown, stage):
    sections = shown(stage)
    assert sections and len({one.id for one in sections}) == len(sections)
    for chart in charts(sections).values():
        spec = spec_of(chart)
        assert "<svg" in vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])
        assert len(json.dumps(spec)) < LIMIT
        assert chart.title and chart.caption and chart.spoken
    for table in tables(sections).values():
        for column in table.columns:
            assert any(column.key in row for row in table.rows), (table.name, column.key)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_nothing_of_a_damaged_run_crashes(runs, stage):
    rng = random.Random(stage)
    for _ in range(3):
        broken = again(runs[stage], made.damaged(dict(runs[stage].data), rng))
        sections = module_of(broken).sections(broken)
        assert sections and all(one.title for one in sections)
        for chart in charts(sections).values():
            json.dumps(chart.chart.to_dict(validate=False), allow_nan=False)


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_run_that_says_nothing_has_sections_without_invented_numbers(runs, stage):
    empty = again(runs[stage], {})
    sections = module_of(empty).sections(empty)
    said = " ".join(text_of(one) for one in sections)
    assert sections and "nan" not in said.lower() and "None" not in said


def test_the_diff_curve_holds_the_measured_shares_and_the_null_band(shown):
    chart = charts(shown("diff"))["diff-kl-all"]
    rows = [row for row in rows_with(chart, "series") if row["series"] == "attribution"]
    assert [(row["x"], row["y"]) for row in rows] == [(1, 0.05), (4, 0.1), (16, 0.3), (90, 0.55)]
    assert rows[1]["lo"] == pytest.approx(0.05) and rows[1]["hi"] == pytest.approx(0.15)
    band = rows_with(chart, "sets")
    assert [row["sets"] for row in band] == [2, 1]
    assert band[0]["lo"] == pytest.approx(0.0) and band[0]["hi"] == pytest.approx(0.12)
    assert band[0]["x"] == pytest.approx(math.sqrt(110), rel=1e-3) and band[0]["y"] == pytest.approx(0.06)
    levels = {row["label"]: row["y"] for row in rows_with(chart, "label")}
    assert {k: v for k, v in levels.items() if v > 0.5} == {"true difference (99%)": 0.99, "all latents and bias (60%)": 0.6}  # fmt: skip  # noqa: E501


def test_the_null_band_is_empty_without_random_sets(runs):
    assert (
        null_band([made.patch_row("best:nu", 0.3, 4), {"set": None}, {"set": "random:nu", "share": None}])
        == []
    )


def test_both_directions_stand_beside_random_sets(shown):
    drawn = charts(shown("diff"))
    put, out = (rows_with(drawn[f"diff-halves-{key}-all"], "value")[0] for key in ("patching", "removal"))
    assert (put["value"], put["null_lo"], put["null_hi"], put["next"], put["directions"]) == (0.3, 0.05, 0.2, 0.1, -0.01)  # fmt: skip  # noqa: E501
    assert (out["value"], out["null_lo"], out["next"], out["directions"]) == (0.4, 0.1, None, None)


def test_the_maps_count_every_latent_and_mark_the_new_ones_inside_the_limits(shown):
    chart = charts(shown("diff"))["diff-map-nu-error"]
    alive = made.diff_latents()["nu_error"].drop_null()
    assert sum(row["n"] for row in rows_with(chart, "n")) == len(alive)
    new = [row for rows in values(chart) for row in rows if row.get("class") == "tuned-only"]
    assert {row["latent"] for row in new} == {1, 2}
    box = next(rows[0] for rows in values(chart) if rows and "x2" in rows[0] and "n" not in rows[0])
    inside = [row["latent"] for row in new if box["x"] <= row["x"] <= box["x2"] and row["y"] <= box["y2"]]
    assert (box["x"], box["y2"]) == (0.9, 0.2) and inside == [1]


def test_the_verdict_of_a_diff_names_its_nulls(shown, runs):
    first = shown("diff")[0]
    assert "1 of 100 latents is new" in first.verdict and "null pairs give 0.5)" in first.verdict
    # What is recovered is recovered by all latents, also where none of them is new.
    assert "all latents, new or not, recover 60.0% of the KL" in first.verdict
    assert "random sets of the same weight: 10.7%" in first.verdict
    data = dict(runs["diff"].data) | {
        "nulls": [],
        "tuned_only": {"surviving": 3, "null": None},
        "patching": [],
        "removal": [],
        "attribution": [],
    }
    weak = {**data, "tuned_only": {"surviving": 3, "null": 121.5}}
    found = diff.sections(again(runs["diff"], weak))[0].verdict
    assert "(null pairs give 121.5, so that none need be)" in found
    sections = diff.sections(again(runs["diff"], data))
    assert sections[0].verdict == "3 of 100 latents are new to the tuned model (no null was given)."
    said = " ".join(text_of(one) for one in sections)
    assert "palimpsest diff null" in said and "was not measured in this run" in said


def test_latents_of_a_diff_come_by_the_size_of_their_share(shown):
    table = tables(shown("diff"))["diff-latents"]
    shares = [abs(row["causal_share"]) for row in table.rows]
    assert table.total == 100 == len(table.rows) and shares == sorted(shares, reverse=True)
    assert table.rows[0]["latent"] == 3 and table.rows[0]["label"] == "sums"
    keys = [column.key for column in table.columns]
    assert "stability" not in keys and "nu_error" in keys and "rate[math]" in keys
    assert {column.key: column.side for column in table.columns if column.side} == {"rate_base": "base", "rate_tuned": "tuned"}  # fmt: skip  # noqa: E501


@pytest.mark.parametrize("gone", [["causal_share"], ["causal_share", "activation_change"], ["class", "verdict"], ["nu_error", "delta_norm"]])  # fmt: skip  # noqa: E501
def test_older_tables_of_latents_are_shown_as_far_as_they_go(runs, tmp_path, gone):
    table = made.diff_latents().drop_columns(gone)
    run = made.make_run(tmp_path / "old", "diff", made.diff_data(), "diff.json", {"latents.parquet": table})
    shown = tables(diff.sections(run))["diff-latents"]
    assert len(shown.rows) == 100 and not set(gone) & {column.key for column in shown.columns}


def test_no_latents_and_no_table_of_them_leave_the_rest(runs, tmp_path):
    empty = made.diff_latents().slice(0, 0)
    run = made.make_run(tmp_path / "none", "diff", made.diff_data(), "diff.json", {"latents.parquet": empty})
    bare = made.make_run(tmp_path / "bare", "diff", made.diff_data(), "diff.json")
    for one in (run, bare):
        sections = diff.sections(one)
        assert "diff-latents" not in tables(sections) and "diff-kl-all" in charts(sections)
        assert not any(name.startswith("diff-map") for name in charts(sections))


def test_sixty_five_thousand_latents_stay_small(tmp_path):
    table = made.diff_latents(65_536)
    run = made.make_run(tmp_path / "big", "diff", made.diff_data(), "diff.json", {"latents.parquet": table})
    sections = diff.sections(run)
    shown = tables(sections)["diff-latents"]
    assert len(shown.rows) == 2000 and shown.total == 65_536
    maps = [chart for name, chart in charts(sections).items() if name.startswith("diff-map")]
    assert len(maps) == 2 and all(len(json.dumps(spec_of(one))) < LIMIT for one in maps)
    assert all("250" in one.caption for one in maps)


def test_compared_diffs_show_every_share_with_its_interval(shown):
    sections = shown("diff-compare")
    rows = rows_with(charts(sections)["compare-kl-all"], "value")
    assert [(row["name"], row["value"], row["lo"]) for row in rows] == [
        ("cross", 0.6, 0.55),
        ("step", 0.87, 0.82),
    ]
    assert (
        "step recovers most of the KL (87.0%)" in sections[0].verdict
        and "cross 1 (null 0.5)" in sections[0].verdict
    )
    found = tables(sections)["compare-found"].rows[0]
    assert (found["diff"] if "diff" in found else found["name"], found["surviving"], found["null"]) == (
        "cross",
        1,
        0.5,
    )


def test_movers_are_the_latents_that_ended_farthest_from_zero(shown):
    sections = shown("tune")
    rows = rows_with(charts(sections)["tune-movers"], "series")
    ended = {row["series"]: row["y"] for row in rows if row["x"] == 40}
    assert ended["11"] == pytest.approx(24) and ended["0"] == pytest.approx(-20) and len(ended) == 8
    assert not {"4", "5", "6"} & set(ended)
    loss = rows_with(charts(sections)["tune-loss"], "y")
    assert [(row["x"], row["y"]) for row in loss] == [(10, 2.9), (20, 2.8), (40, 2.6)]
    table = tables(sections)["tune-latents"]
    assert table.rows[0]["latent"] == 11
    assert table.rows[0]["firings"] == 33 and table.total == 12
    assert "lowers its objective: −0.1000 [−0.2000, −0.0500]" in sections[0].verdict


def test_an_adapter_without_a_clear_change_is_not_said_to_have_one(runs):
    data = dict(runs["tune"].data)
    data["objective_value"] = {**data["objective_value"], "ci": [-0.2, 0.1]}
    assert "does not clearly change" in module_of(runs["tune"]).sections(again(runs["tune"], data))[0].verdict


def test_a_word_and_a_sign_do_not_contradict_each_other(runs):
    # Here a positive difference lowers the objective, so that neither a plus nor a minus may stand beside the word.
    for value, ci, said in (
        (0.1, [0.05, 0.2], "lowers its objective (by 0.1000 [0.0500, 0.2000]"),
        (-0.1, [-0.2, -0.05], "raises its objective (by 0.1000 [0.0500, 0.2000]"),
    ):
        data = dict(runs["explain"].data)
        data["objective"] = {**data["objective"], "difference": value, "ci": ci, "present": True}
        assert said in module_of(runs["explain"]).sections(again(runs["explain"], data))[0].verdict


def test_kept_curves_stand_beside_magnitude_and_random_orders(shown):
    drawn = charts(shown("explain"))
    band = next(rows for rows in values(drawn["explain-keep"]) if rows and rows[0].get("series") == "random")
    assert [row["y"] for row in band] == [pytest.approx(0.3 * s) for s in (0.1, 0.3, 0.7, 1.0)]
    assert band[3]["lo"] == pytest.approx(0.2)
    kept = [
        row
        for rows in values(drawn["explain-keep"])
        for row in rows
        if row.get("series") == "strongest by effect"
    ]
    assert {(row["x"], row["y"]) for row in kept} == {(1, 0.1), (4, 0.3), (16, 0.7), (64, 1.0)}
    left = rows_with(drawn["explain-ablate"], "series")
    assert [row["y"] for row in left] == [0.9, 0.7, pytest.approx(0.3), 0.0]


def test_concentration_is_the_share_that_the_strongest_hold(shown):
    chart = charts(shown("explain"))["explain-concentration"]
    effects = np.arange(64, 10, -1.0)
    held = {row["x"]: row["y"] for row in next(rows for rows in values(chart) if len(rows) > 10)}
    assert held[1] == pytest.approx(64 / effects.sum(), rel=1e-3) and held[54] == 1.0
    assert held[10] == pytest.approx(effects[:10].sum() / effects.sum(), rel=1e-3)


def test_controls_of_an_adapter_show_the_range_of_their_nulls(shown, runs):
    drawn = charts(shown("explain"))
    rows = {
        row["name"]: row for rows in values(drawn["explain-specificity"]) for row in rows if "name" in row
    }
    assert rows["top latents"]["lo"] == 1.4 and rows["top latents"]["null_lo"] is None
    assert (rows["shuffled values"]["null_lo"], rows["shuffled values"]["null_hi"]) == (1.2, 1.6)
    agreement = {row["name"]: row for row in rows_with(drawn["explain-agreement"], "name")}
    assert agreement["other seed: top latents"]["null_hi"] == 0.4
    data = dict(runs["explain"].data) | {"controls": {}, "specificity": None}
    said = " ".join(text_of(one) for one in module_of(runs["explain"]).sections(again(runs["explain"], data)))
    assert "--twin ADAPTER" in said


def test_examples_count_latents_by_how_often_they_fire_in_each_model(runs):
    run = runs["examples"]
    table = run.artifact.read_table("latents.parquet")
    drawn = charts(examples.sections(run))
    assert (
        sum(row["n"] for rows in values(drawn["examples-rates"]) for row in rows if "n" in row)
        == table.num_rows
    )
    base = [rows for rows in values(drawn["examples-density"]) if rows and rows[0]["side"] == "base"][0]
    assert sum(row["n"] for row in base) == sum(value > 0 for value in table["rate_base"].to_pylist())
    shown = tables(examples.sections(run))["examples-latents"]
    rates = {row["latent"]: (row["rate_base"], row["rate_tuned"]) for row in table.to_pylist()}
    z = {one: abs(b - a) / math.sqrt((a + b) / run.data["tokens"]) for one, (a, b) in rates.items()}
    assert [row["latent"] for row in shown.rows[:5]] == sorted(z, key=lambda one: -z[one])[:5]
    assert shown.rows[0]["tokens"] and shown.rows[0]["promoted"]


def test_labels_stand_beside_latents_where_they_are_given(shown, runs):
    found = labels.labels_of([runs["labels"]])
    rows = tables(examples.sections(runs["examples"], found))["examples-latents"].rows
    assert {row["latent"]: row["label"] for row in rows if row["label"]} == {
        i: f"numbers in sums {i}" for i in (1, 2, 3)
    }
    assert "label" not in [c.key for c in tables(shown("examples"))["examples-latents"].columns]


def test_examples_of_a_difference_are_ordered_by_how_often_latents_fire(tmp_path):
    from latents_fixture import make_examples

    path = make_examples(tmp_path / "diff", kind="diff", n_latents=50)
    run = Run(made.open_artifact(path), "diff", json.loads((path / "examples.json").read_text()))
    sections = examples.sections(run)
    rows = tables(sections)["examples-latents"].rows
    assert "examples-rates" not in charts(sections)
    assert [row["rate"] for row in rows] == sorted((row["rate"] for row in rows), reverse=True)


def test_scores_of_labels_are_drawn_beside_the_shuffled_control(shown):
    sections = shown("labels")
    chart = charts(sections)["labels-scores"]
    assert sum(row["n"] for row in rows_with(chart, "n")) == 3
    named = [row["label"] for rows in values(chart) for row in rows if "label" in row]
    assert "shuffled 0.51" in named and any(name.startswith("mean") for name in named)
    rows = tables(sections)["labels-table"].rows
    assert [row["score"] for row in rows] == sorted((row["score"] for row in rows), reverse=True)


def test_labels_without_scores_say_so(tmp_path):
    from latents_fixture import make_labels

    path = make_labels(tmp_path / "labels", [1, 2], scored=False)
    run = Run(made.open_artifact(path), "labels", json.loads((path / "labels.json").read_text()))
    sections = labels.sections(run)
    assert not charts(sections) and "were not scored" in text_of(sections[0])
    assert len(tables(sections)["labels-table"].rows) == 2


def test_steering_draws_strengths_in_order_with_guard_and_controls(shown):
    sections = shown("steer")
    chart = charts(sections)["steer-perplexity-ratio"]
    own = rows_with(chart, "ok")
    assert [(row["x"], row["y"]) for row in own] == [(0, 1.0), (1, 1.1), (2, 1.4), (4, 2.6)]
    assert [row["ok"] for row in own][-1] == "beyond the guard" and own[1]["lo"] == pytest.approx(1.0)
    assert [row["y"] for row in rows_with(chart, "name")] == [1.0, 1.05, 1.1, 1.2]
    assert any(row.get("label") == "guard: 1.5" for rows in values(chart) for row in rows)
    watched = rows_with(charts(sections)["steer-watch-0"], "ok")
    assert [row["y"] for row in watched] == [0, 1, 2, 4]
    assert changes_text(made.steer_data()["changes"]) == "5:add=−3 6:ablate"
    texts = next(block for one in sections for block in one.blocks if isinstance(block, Template)).context[
        "prompts"
    ]
    assert [one["name"] for one in texts[0]["texts"]] == ["base", "tuned", "tuned, steered"]
    assert texts[0]["texts"][1]["text"] == [" b", "c"]


def test_what_was_written_beyond_the_guard_is_said_to_be(shown, runs):
    assert "beyond the guard, at" not in text_of(shown("steer")[0])
    data = dict(runs["steer"].data)
    data["sweep"] = [{**one, "ok": one["strength"] < 1, "perplexity_ratio": 1.7} for one in data["sweep"]]
    assert "beyond the guard, at 1.70" in text_of(
        module_of(runs["steer"]).sections(again(runs["steer"], data))[0]
    )


def test_without_a_sweep_steering_says_what_to_run(runs):
    data = dict(runs["steer"].data) | {"sweep": [], "prompts": []}
    said = " ".join(text_of(one) for one in module_of(runs["steer"]).sections(again(runs["steer"], data)))
    assert "--sweep" in said and "no prompt was given" in said


def test_an_evaluation_shows_density_and_what_is_recovered(shown):
    sections = shown("evaluation")
    base = [rows for rows in values(charts(sections)["evaluation-density"]) if rows[0]["side"] == "base"][0]
    assert sum(row["n"] for row in base) == 17 and base[20]["x"] == pytest.approx(-3.0)
    rows = {row["name"]: row for row in rows_with(charts(sections)["evaluation-recovered"], "value")}
    assert rows["tuned, CE, zero"]["lo"] == 0.97 and rows["tuned, CE, mean"]["lo"] is None


def test_any_other_run_shows_its_figures_with_their_intervals(shown, runs):
    found = dict(other.figures(runs["store"].data))
    assert found["rate"] == {"value": 0.5, "lo": 0.4, "hi": 0.6} and found["tokens"]["value"] == 5
    sections = shown("store")
    assert sections[0].lead == "A store." and "nested.rate" in {
        row["name"] for row in tables(sections)["run-settings"].rows
    }


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("math-step25", 25),
        ("checkpoint-1000", 1000),
        ("run/ckpt_7", 7),
        ("global_step12", 12),
        ("llama3-8b", None),
        ("math", None),
        ("steps", None),
    ],  # fmt: skip  # noqa: E501
)
def test_steps_are_read_from_names(name, step):
    assert trajectory.step_of(name) == step


def audits(tmp_path: Path, *names: str) -> list[Run]:
    shifts = {name: i / 100 for i, name in enumerate(names)}
    return [
        made.make_run(tmp_path / one, "audit", made.audit_data(shift), "audit.json")
        for one, shift in shifts.items()
    ]


def test_a_trajectory_is_ordered_by_step_with_the_end_last(tmp_path):
    runs = audits(tmp_path, "math", "math-step75", "math-step9", "code")
    ordered = trajectory.places(runs)
    assert [one.label for one in ordered] == ["code", "math-step9", "math-step75", "math"]
    assert {one.family for one in ordered} == {"code", "math"}
    drawn = charts(trajectory.sections(runs))
    assert set(drawn) == {f"trajectory-{key}" for key in ("idr", "loss", "z-features", "z-loss")}
    rows = rows_with(drawn["trajectory-idr"], "series")
    assert {(row["run"], row["y"], row["lo"]) for row in rows if row["series"] == "math"} == {
        ("math", 0.1, 0.09), ("math-step75", 0.11, 0.1), ("math-step9", 0.12, 0.11), ("code", 0.13, 0.12)
    }  # fmt: skip
    spec = drawn["trajectory-idr"].chart.to_dict()
    line = next(layer for layer in spec["layer"] if layer["mark"]["type"] == "line")
    assert {row["family"] for row in spec["datasets"][line["data"]["name"]]} == {"math"}
    band = next(rows for rows in values(drawn["trajectory-z-loss"]) if rows and rows[0].get("lo") == -1.96)
    assert band[0]["hi"] == 1.96


def test_steps_alone_make_a_numeric_axis_and_compile(tmp_path):
    drawn = charts(trajectory.sections(audits(tmp_path, "m-step1", "m-step30", "m-step5")))
    spec = spec_of(drawn["trajectory-loss"])
    dots = spec["layer"][-1]["encoding"]["x"]
    assert dots["field"] == "step" and dots["type"] == "quantitative"
    assert "<svg" in vl_convert.vegalite_to_svg(spec, allowed_base_urls=[])


def test_one_audit_is_no_trajectory(tmp_path):
    assert trajectory.sections(audits(tmp_path, "math")) == []


class Tags(HTMLParser):
    """Which elements and attributes a piece of HTML has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.names |= {name for name, _ in attrs}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_hostile_text_is_inert(runs, stage):
    bad = Run(runs[stage].artifact, made.EVIL, made.poisoned(dict(runs[stage].data)))
    sections = module_of(bad).sections(bad)
    page = Page()
    html = "".join(str(draw_section(one, page, named=True)) for one in sections)
    found = Tags(html)
    assert not found.tags & {"script", "img", "iframe"} and not any(
        name.startswith("on") for name in found.names
    )
    assert "window.__pwned" not in html or "&lt;script&gt;window.__pwned" in html
    assert not BIDI.search(html)
    for chart in charts(sections).values():
        said = json.dumps(chart.chart.to_dict(validate=False), ensure_ascii=False)
        assert not BIDI.search(said) and not BIDI.search(chart.title + chart.caption + chart.spoken)
        assert "signal" not in said and "expr" not in said.replace('"expression', "")


def test_hostile_audits_make_an_inert_trajectory(tmp_path):
    bad = [Run(one.artifact, f"{made.EVIL}{i}", made.poisoned(dict(one.data))) for i, one in enumerate(audits(tmp_path, "a-step1", "b"))]  # fmt: skip  # noqa: E501
    for chart in charts(trajectory.sections(bad)).values():
        assert "<svg" in vl_convert.vegalite_to_svg(spec_of(chart), allowed_base_urls=[])
        assert not BIDI.search(json.dumps(chart.chart.to_dict(), ensure_ascii=False))


def test_labels_of_lines_keep_their_distance_and_their_order():
    placed = reading.spread([0.0, 0.01, 0.02, 5.0], 1.0)
    assert placed == sorted(placed) and min(np.diff(placed)) >= 1.0 - 1e-6 and placed[3] == 5.0
    assert reading.spread([], 1.0) == [] and reading.spread([2.0], 1.0) == [2.0]


def test_cells_count_each_point_once_and_what_is_outside_at_the_edge():
    cells = marks.binned([0.1, 0.1, None, 9.0, -9.0], [0.5, 0.5, 0.5, 0.5, None], (0.0, 1.0), (0.0, 1.0))
    assert sum(row["n"] for row in cells) == 3 and max(row["n"] for row in cells) == 2
    assert any(row["x2"] == 1.0 for row in cells)
    assert marks.binned([None], [1.0], (0.0, 1.0), (0.0, 1.0)) == []


def test_numbers_that_are_none_are_words():
    assert reading.share_text(math.nan) == reading.number_text(None) == "not measured"
    assert (
        reading.share_text(0.5, [0.4, math.nan]) == "50.0%"
        and reading.number_text(-1, [-2, 0], 1) == "−1.0 [−2.0, 0.0]"
    )
    assert (
        reading.ends({"ci": [1, None]}, "ci") == (None, None)
        and reading.figure({"a": {"b": "x"}}, "a", "b") is None
    )


def test_columns_that_a_table_lacks_are_empty():
    table = pa.table({"a": [1, 2]})
    assert reading.columns_of(table, ("a", "b")) == {"a": [1, 2], "b": [None, None]}
    assert reading.columns_of(None, ("a",)) == {"a": []}
