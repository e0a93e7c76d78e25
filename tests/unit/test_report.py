"""The report of an audit: nothing runs, nothing is fetched, nothing missing is invented."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

import audit_fixture as fixture
from palimpsest.errors import ArtifactError
from palimpsest.report import build_report, chart_png, render
from palimpsest.report.display import (
    Scale,
    count,
    decimal,
    measure,
    percent,
    visible,
    visible_tail,
    visible_token,
)
from palimpsest.report.page import inert_json
from palimpsest.report.tables import reading, task_table

Page = fixture.Page
LOADING = {
    "src",
    "href",
    "action",
    "formaction",
    "data",
    "poster",
    "srcset",
    "background",
    "ping",
    "xlink:href",
}


@pytest.fixture(scope="module")
def plain() -> str:
    return render(fixture.make_audit(), fixture.make_curve(), fixture.make_latents())


@pytest.fixture(scope="module")
def hostile() -> str:
    return render(*fixture.make_hostile())


@pytest.fixture(scope="module")
def verdicts() -> str:
    audit = fixture.make_audit(calibrated=True)
    audit["calibration"]["spectrum"] = fixture.make_spectrum()
    return render(audit, fixture.make_curve(), fixture.make_latents())


@pytest.fixture(scope="module")
def hostile_verdicts() -> str:
    return render(*fixture.make_hostile(calibrated=True))


def _emptied(value: Any) -> Any:
    """The same structure with every number, interval and measurement null."""
    if isinstance(value, dict):
        return {key: _emptied(item) for key, item in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [_emptied(item) for item in value]
    return value if isinstance(value, str) else None


def test_the_answer_stands_first_and_is_no_verdict(plain: str) -> None:
    text = Page(plain).text
    summary = fixture.make_audit()["summary"]
    assert text.index(summary) < text.index("What it does not say") < text.index("Tasks against general text")
    assert "It is no verdict." in text
    assert "do these two sets of text behave differently?" in text


def test_every_estimate_carries_its_interval(plain: str) -> None:
    text = Page(plain).text
    for task in fixture.make_audit()["tasks"]:
        low, high = task["ci"]
        assert percent(task["idr"], signed=True) in text
        assert f"[{percent(low, signed=True)}, {percent(high, signed=True)}]".replace("%,", ",") in text
        assert decimal(task["delta_loss"], signed=True) in text


def test_a_blind_dictionary_is_called_out(plain: str) -> None:
    assert "This dictionary is blind here" in Page(plain).text
    audit = fixture.make_audit()
    for data in audit["datasets"]:
        data["blind"] = False
    assert (
        "This dictionary is blind here"
        not in Page(render(audit, fixture.make_curve(), fixture.make_latents())).text
    )


def test_the_page_loads_nothing_and_stays_small(
    plain: str, hostile: str, verdicts: str, hostile_verdicts: str
) -> None:
    for source in (plain, hostile, verdicts, hostile_verdicts):
        page = Page(source)
        loads = [(t, n, v) for t, n, v in page.attributes if n in LOADING and not v.startswith("#")]
        assert loads == []
        assert not {"link", "img", "iframe", "object", "embed", "base", "form", "video", "audio"} & set(
            page.tags
        )
        assert not re.search(r"@import|url\(", "".join(page.styles))
        assert not any(v.startswith(("http:", "https:", "//")) for _, _, v in page.attributes)
        policy = next(v for t, n, v in page.attributes if n == "content" and "default-src" in v)
        assert (
            "default-src 'none'" in policy
            and "unsafe-inline'; img-src" in policy
            and "unsafe-eval" not in policy
        )
        assert len(source.encode()) < 5_000_000


@pytest.mark.parametrize("pair", [("plain", "hostile"), ("verdicts", "hostile_verdicts")])
def test_hostile_text_adds_no_element_and_no_attribute(
    pair: tuple[str, str], request: pytest.FixtureRequest
) -> None:
    calm, wild = (Page(request.getfixturevalue(name)) for name in pair)
    assert len(wild.scripts) == len(calm.scripts)
    assert set(wild.tags) <= set(calm.tags)
    assert not [name for _, name, _ in wild.attributes if name.startswith("on")]
    assert {name for _, name, _ in wild.attributes} <= {name for _, name, _ in calm.attributes}
    assert "{{ 7*7 }}" in wild.text and "<img src=x" in wild.text


@pytest.mark.parametrize("name", ["hostile", "hostile_verdicts"])
def test_hostile_text_keeps_no_invisible_character(name: str, request: pytest.FixtureRequest) -> None:
    before_scripts = request.getfixturevalue(name).split('<script type="application/json"')[0]
    assert not re.search(
        "[\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029\x00-\x08\x0b-\x1f\x7f]", before_scripts
    )
    assert "⟨U+202E⟩" in before_scripts and "⟨U+001B⟩" in before_scripts


@pytest.mark.parametrize("name", ["hostile", "hostile_verdicts"])
def test_inline_json_survives_and_cannot_close_its_element(name: str, request: pytest.FixtureRequest) -> None:
    data = Page(request.getfixturevalue(name)).scripts[0]
    assert "<" not in data and data.isascii()
    assert "</script>" in json.dumps(json.loads(data)["specs"]["overlap"])
    tricky = "</script>\u2028\ud800&'\""
    assert json.loads(inert_json([tricky])) == [tricky] and "<" not in inert_json([tricky])


def test_nulls_are_named_with_their_reason() -> None:
    audit = _emptied(fixture.make_audit())
    audit |= {"loss_measured": False, "kl_measured": False, "k": 5, "ks": [1, 5], "warnings": []}
    latents = fixture.make_latents(3).to_pylist()
    for row in latents:
        row.update({key: None for key, value in row.items() if isinstance(value, float)})
    page = Page(
        render(
            audit,
            fixture.make_curve().slice(0, 0),
            pa.Table.from_pylist(latents, schema=fixture.LATENT_SCHEMA),
        )
    )
    assert "not measured (loss was not measured)" in page.text
    assert "not measured (run with --kl)" in page.text
    assert "nan" not in page.text.lower().split() and "None" not in page.text


def test_an_estimate_without_an_interval_says_so() -> None:
    audit = fixture.make_audit()
    audit["tasks"][0].update(ci=None, delta_loss_ci=[None, 0.1])
    assert task_table(audit)["rows"][0]["cells"][0].note == "no interval: too few documents"
    assert reading(audit["tasks"][0]) == "no interval for its latents"
    assert reading(audit["tasks"][1]) == "latents moved more than on general text; loss rose"


def test_legacy_counts_are_not_percentages() -> None:
    audit = fixture.make_audit(legacy=True)
    text = Page(render(audit, fixture.make_curve(legacy=True), fixture.make_latents())).text
    mean = audit["datasets"][0]["intersection_mean"]["5"]
    assert mean > 4 and decimal(mean) in text and percent(mean) not in text
    assert "as a count out of k" in text and "pooled over all tokens" in text


@pytest.mark.parametrize(
    "missing", ["tasks", "controls", "layers", "datasets", "warnings", "pair", "dictionary"]
)
def test_missing_parts_leave_a_page(missing: str) -> None:
    whole = fixture.make_audit()
    gone = {key: value for key, value in whole.items() if key != missing}
    none = {**whole, missing: None}
    pages = [Page(render(a, fixture.make_curve(), fixture.make_latents(4))) for a in (gone, none)]
    assert all(fixture.make_audit()["summary"] in page.text for page in pages)
    if missing == "tasks":
        assert "--task NAME=FILE" in pages[0].text
    if missing == "controls":
        assert "Controls: what the dictionary adds" not in pages[0].text


def test_latents_are_ranked_cut_and_accounted_for() -> None:
    table = fixture.make_latents(80)
    page = Page(render(fixture.make_audit(), fixture.make_curve(), table))
    assert "The 50 strongest of 80 latents" in page.text and "lists of different length add 2.0%" in page.text
    rows = [row for row in table.to_pylist() if row["dataset"] == "math" and row["latent"] >= 0]
    ranked = sorted(rows, key=lambda row: -row["contribution"])
    numbers = [float(v) for t, n, v in page.attributes if t == "th" and n == "data-sort"][:50]
    assert numbers == [row["latent"] for row in ranked[:50]]


def test_many_corpora_stay_under_the_size_limit() -> None:
    audit, rows = fixture.make_audit(), fixture.make_latents(60).to_pylist()
    long = "&<'\"" * 40
    for row in rows:
        for example in row["examples"] or []:
            example.update(before=long, token=long, after=long)
    audit["datasets"] = [
        {**copy.deepcopy(audit["datasets"][i % 4]), "name": f"corpus {i}"} for i in range(24)
    ]
    many = [{**row, "dataset": f"corpus {i}"} for i in range(24) for row in rows if row["dataset"] == "math"]
    page = render(audit, fixture.make_curve(), pa.Table.from_pylist(many, schema=fixture.LATENT_SCHEMA))
    assert len(page.encode()) < 5_000_000 and page.count('class="panel"') == 24


def test_text_is_shown_as_it_is() -> None:
    assert visible("a\n\tb\x1b") == "a↵⇥b⟨U+001B⟩"
    assert visible("a\u202eb\u00adc\ud800") == "a⟨U+202E⟩b⟨U+00AD⟩c⟨U+D800⟩"
    assert visible("naïve 数学 🙂") == "naïve 数学 🙂"
    assert (
        visible("x" * 50, 10) == "x" * 9 + "…" and visible_tail("x" * 50 + "yz", 10) == "…" + "x" * 7 + "yz"
    )
    assert [visible_token(t) for t in (" 12", "\n", "", "  ", "a b")] == ["␣12", "↵", "∅", "␣␣", "a b"]


def test_numbers_keep_sign_and_scale() -> None:
    assert decimal(-0.1994, signed=True) == "−0.199" and decimal(0.0, signed=True) == "0.000"
    assert (
        decimal(0.00012) == "1.2e−04"
        and percent(-0.0391, signed=True) == "−3.9%"
        and count(61234) == "61,234"
    )
    scale = Scale.over([1.0, 3.0])
    assert scale.low < 0 < scale.at(0.0) < scale.at(1.0) < scale.at(3.0) < 100
    cell = measure(2.0, [1.0, 3.0], scale=scale)
    assert cell.whisker is not None and cell.whisker.low < cell.whisker.mid < cell.whisker.high
    assert measure(float("nan")).missing and measure(None, reason="why").note == "(why)"


def test_charts_become_pictures() -> None:
    audit, curve = fixture.make_audit(), fixture.make_curve()
    assert chart_png(audit, curve, "tasks", scale=1).startswith(b"\x89PNG")
    with pytest.raises(KeyError):
        chart_png({**audit, "layers": None}, curve, "layers")


def test_report_of_a_folder(tmp_path: Path) -> None:
    parts = fixture.make_audit(), fixture.make_curve(), fixture.make_latents(5)
    running = fixture.write_audit(tmp_path / "running", *parts, finish=False)
    done = fixture.write_audit(tmp_path / "done", *parts)
    assert build_report(running) == running / "report.html"
    first, second = build_report(done), build_report(done)
    assert first == second == done / "report.html"
    assert build_report(done, tmp_path / "page.html") == tmp_path / "page.html"
    assert build_report(done, tmp_path / "folder") == tmp_path / "folder" / "report.html"
    assert parts[0]["summary"] in first.read_text("utf-8")
    (done / "audit.json").write_text("{}")
    with pytest.raises(ArtifactError, match=r"audit\.json"):
        build_report(done)


def test_other_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError):
        build_report(tmp_path)
    assert not list(tmp_path.iterdir())
