"""The calibration on the page: the verdict first and in words, what it rests on, what it leaves open."""

from __future__ import annotations

import json
from typing import Any

import pytest

import audit_fixture as fixture
from palimpsest.findings import AuditFinding
from palimpsest.report import chart_png, render
from palimpsest.report.audit_sections import audit_sections
from palimpsest.report.charts import chart_height
from palimpsest.report.display import decimal
from palimpsest.report.draw import charts_of
from palimpsest.report.facts import callouts as page_callouts
from palimpsest.report.null_charts import null_rows, strip_text, suspect_rows
from palimpsest.report.pictures import page_spec
from palimpsest.report.verdicts import (
    BADGES,
    badge,
    calibration,
    callouts,
    family_table,
    grid_table,
    null_table,
    p_cell,
    point_table,
    spectrum_table,
    task_marks,
)

Audit = dict[str, Any]


@pytest.fixture
def audit() -> Audit:
    return fixture.make_audit(calibrated=True)


def _page(audit: Audit) -> fixture.Page:
    return fixture.Page(render(audit, fixture.make_curve(), fixture.make_latents(4)))


def _specs(audit: Audit) -> dict[str, Any]:
    sections = audit_sections(audit, fixture.make_curve(), fixture.make_latents(4))
    return {chart.name: page_spec(chart) for chart in charts_of(sections)}


def test_the_fixture_is_what_an_audit_writes(audit: Audit) -> None:
    assert AuditFinding.from_dict(audit).to_dict()["calibration"] == audit["calibration"]
    refused = AuditFinding.from_dict(fixture.make_audit(calibrated=True, refused=True)).calibration
    assert refused is not None and refused.refused == ["web"] and refused.undeclared == []


def test_the_verdict_stands_before_everything_else(audit: Audit) -> None:
    text = _page(audit).text
    found = audit["calibration"]
    places = [text.index(found["sentence"], text.index("Palimpsest audit"))]
    places += [text.index(one["sentence"]) for one in found["domains"] if one["verdict"] == "undeclared"]
    places += [text.index(words) for words in ("Raw figures:", "What it does not say")]
    places += [text.index(words) for words in ("Fine-tunes that were trained", "Tasks against general text")]
    assert places == sorted(places)
    for one in found["domains"]:
        assert one["sentence"] in text and BADGES[one["verdict"]].words in text
    assert text.count(found["sentence"]) == 1


def test_a_summary_of_its_own_keeps_its_place(audit: Audit) -> None:
    audit["summary"] = "Another summary."
    text = _page(audit).text
    assert text.index("Another summary.") < text.index(audit["calibration"]["sentence"])
    assert "Raw figures:" not in text


def test_it_says_what_a_verdict_is_and_is_not(audit: Audit) -> None:
    text = _page(audit).text
    assert "It speaks of these 4 corpora only." in text and "it says nothing about intent" in text
    assert "It is no verdict." not in text
    assert "Innocent is what the nulls are." in text and "log(1 − overlap)" in text


def test_without_a_calibration_nothing_of_it_is_there() -> None:
    page = _page(fixture.make_audit())
    assert "It is no verdict." in page.text
    for word in ("innocent", "undeclared", "Calibrated", "Raw figures"):
        assert word not in page.text
    assert not any("verdict" in style for style in page.styles)
    keyless = fixture.make_audit()
    del keyless["calibration"]
    assert _page(keyless).text == page.text


def test_every_verdict_has_words_and_a_mark_of_its_own() -> None:
    assert len({one.words for one in BADGES.values()}) == len(BADGES) == 7
    assert {"alarm"} == {one.style for name, one in BADGES.items() if name == "undeclared"}
    assert all(one.style != "alarm" for name, one in BADGES.items() if name != "undeclared")
    strange = badge("<b>new</b>" + "x" * 50)
    assert strange.style == "open" and strange.words.startswith("<b>new</b>") and len(strange.words) == 20
    assert badge(None) == BADGES["refused"]


def test_the_order_of_verdicts_puts_the_undeclared_first(audit: Audit) -> None:
    shown = calibration(audit)
    assert shown is not None
    assert [row["name"] for row in shown["verdicts"]] == ["web", "math", "code", "general"]


def test_the_table_prints_both_tests_with_their_intervals(audit: Audit) -> None:
    text = _page(audit).text
    for one in audit["calibration"]["domains"]:
        for key in ("features", "loss"):
            test = one[key]
            low, high = (decimal(end, signed=True) for end in test["ci"])
            assert f"{decimal(test['residual'], signed=True)} [{low}, {high}]" in text
            assert decimal(test["z"], 2, True) in text
    table = null_table(audit["calibration"])
    cells = {g["name"]: [row["cells"] for row in g["rows"]] for g in table["groups"]}
    assert cells["web"][0][6].note == "beyond the nulls" and cells["web"][1][6].note == ""
    assert [cell.text for cell in cells["math"][0][4:8]] == ["< 0.001", "0.053", "< 0.001", "18"]
    assert cells["math"][0][2].whisker.high < cells["math"][0][2].whisker.reference


def test_a_refused_corpus_says_why_and_shows_no_number() -> None:
    audit = fixture.make_audit(calibrated=True, refused=True)
    table = null_table(audit["calibration"])
    web = table["groups"][-1]
    assert web["badge"] == BADGES["refused"] and web["q"].missing and web["p_max"].missing
    assert all(row["cells"] is None and "7 are needed" in row["reason"] for row in web["rows"])
    text = _page(audit).text
    assert "verdict refused" in text and "no test: 5 nulls judge it" in text
    marks = task_marks(audit)
    assert marks[-1]["cell"].missing and marks[-1]["badge"] == BADGES["refused"]
    assert marks[0]["cell"].note == "z −11.68, q < 0.001"


def test_a_missing_loss_is_no_refusal(audit: Audit) -> None:
    for one in audit["calibration"]["domains"]:
        one["loss"] = None
    for point in audit["calibration"]["points"]:
        point["loss"] = None
    assert null_table(audit["calibration"])["groups"][0]["rows"][1]["reason"] == "its loss was not judged"
    assert set(_specs(audit)) & {"nulls_features", "nulls_loss"} == {"nulls_features"}
    table = point_table(audit["calibration"])
    assert table is not None and [group["span"] for group in table["groups"]] == [4]
    assert "no test: its loss was not judged" in _page(audit).text


def test_families_stay_apart_and_own_text_is_marked(audit: Audit) -> None:
    table = family_table(audit["calibration"])
    assert table is not None and [head["meaning"] for head in table["heads"]] == ["6 nulls"] * 4
    for group in table["groups"]:
        for i, row in enumerate(group["rows"]):
            assert [bool(cell.note) for cell in row["cells"]] == [j == i for j in range(4)]
    page = _page(audit)
    assert "code-6 (code): its loss diverged at step 12" in page.text
    audit["calibration"].update(excluded=[], by_family=[])
    assert "left outnone" in _page(audit).text
    assert family_table(audit["calibration"]) is None


def test_a_family_that_is_no_corpus_is_on_no_own_text(audit: Audit) -> None:
    for row in audit["calibration"]["by_family"]:
        row["family"] = "other" if row["family"] == "general" else row["family"]
    table = family_table(audit["calibration"])
    assert table is not None and not table["groups"][0]["rows"][0]["cells"][0].note


def test_drift_outside_the_nulls_is_called_out_once(audit: Audit) -> None:
    assert callouts(audit) == []
    audit["calibration"]["extrapolated"] = True
    (found,) = callouts(audit)
    assert "12.7%" in found["text"] and "5.1% to 22.3%" in found["text"]
    assert page_callouts(audit)[0] == found
    audit["warnings"] = ["Its drift lies outside its nulls': the verdict extrapolates."]
    titles = [one["title"] for one in page_callouts(audit)]
    assert titles.count("Outside the range of the nulls") == 1


def test_the_grid_marks_the_primary_site_and_k(audit: Audit) -> None:
    table = grid_table(audit, audit["calibration"])
    assert table is not None
    assert [(one["site"], one["span"]) for one in table["sites"]] == [
        ("resid_post.1", 3),
        ("resid_post.2", 3),
    ]
    assert [column["primary"] for column in table["columns"]] == [True] + [False] * 5
    shown = {(row["name"], c["label"]): cell.sort for row in table["rows"]
             for c, cell in zip(table["columns"], row["cells"], strict=True)}  # fmt: skip
    for row in audit["calibration"]["grid"]:
        assert shown[row["name"], f"{row['site']}, k = {row['k']}"] == row["z"]
    assert grid_table(audit, {}) is None


def test_spectrum_nulls_stand_beside_and_alone(audit: Audit) -> None:
    found = audit["calibration"]
    assert spectrum_table(found) is None
    found["spectrum"] = fixture.make_spectrum()
    table = spectrum_table(found)
    assert table is not None and table["nulls"] == "16" and table["drift"] == "12.1% to 13.3%"
    assert [cell.text for cell in table["rows"][1]["cells"]] == ["−7.90", "< 0.001"]
    assert "Random rotations of this weight change" in _page(audit).text
    found.update(source="spectrum", by_family=[], points=[])
    for one in found["domains"]:
        one["loss"] = None
    text = _page(audit).text
    assert spectrum_table(found) is None and "There are no trained nulls." in text
    assert (
        "no test: random changes only raise the loss" in text
        and "innocent fine-tunes of the same base" not in text
    )


def test_chart_rows_hold_every_null_and_say_which_are_used(audit: Audit) -> None:
    found = audit["calibration"]
    rows = null_rows(found, "features")
    assert len(rows) == 24 * 4
    assert all(row["own"] == (row["family"] == row["corpus"]) for row in rows)
    assert {row["used"] for row in rows if row["own"]} == {"no: trained on this text"}
    point = found["points"][3]
    shown = {row["corpus"]: row["value"] for row in rows if row["null"] == point["name"]}
    assert shown == point["features"]
    suspects = suspect_rows(found, "loss")
    assert [row["value"] for row in suspects] == [one["loss"]["statistic"] for one in found["domains"]]
    spoken = strip_text(found, "features")
    assert spoken.count(";") == 3 and "math: −0.314, innocent −0.085 to 0.017" in spoken
    found["domains"][0]["features"] = None
    assert strip_text(found, "features").startswith("general: no figure; ")


def test_the_strips_are_charts_and_pictures(audit: Audit) -> None:
    curve = fixture.make_curve()
    specs = _specs(audit)
    text = json.dumps(specs["nulls_features"])
    assert "var(--" not in text and '"diamond"' in text and "datum.own" in text
    assert chart_height("nulls_features", audit) == 4 * (4 * 10 + 14)
    for name in ("nulls", "nulls_loss"):
        assert chart_png(audit, curve, name, scale=1).startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        chart_png(fixture.make_audit(), curve, "nulls")


def test_nothing_measured_leaves_a_page_without_inventions(audit: Audit) -> None:
    found = audit["calibration"]
    for one in found["domains"]:
        one["features"] = dict.fromkeys(one["features"])
        one["loss"] = {key: float("nan") for key in one["loss"]}
    found.update(drift={}, alpha=None, nulls=None, battery=None, families=None, declared=None)
    found["points"] = [dict.fromkeys(point) for point in found["points"]]
    text = _page(audit).text
    assert "nan" not in text.lower().split() and "None" not in text
    bare = {**fixture.make_audit(), "calibration": {}}
    assert "Beside innocent fine-tunes" in _page(bare).text
    assert calibration(fixture.make_audit()) is None


def test_small_p_values_are_bounds() -> None:
    assert [p_cell(p).text for p in (0.0009, 0.001, 0.0526)] == ["< 0.001", "0.001", "0.053"]
    assert p_cell(None).missing and p_cell(float("nan")).missing


def test_the_battery_can_be_found_again(audit: Audit) -> None:
    assert "cd" * 32 in _page(audit).text and "battery sha256" not in _page(fixture.make_audit()).text
