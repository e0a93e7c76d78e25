"""One page of many runs: which runs it takes, how they are merged, what is written; nothing in it is markup."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import audit_fixture as fixture
from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.report.build import Report
from palimpsest.report.data_table import Cards, ordered, table_view
from palimpsest.report.draw import Page, draw_section, tables_of, unique
from palimpsest.report.merge import comparable_audits, main_data, open_runs
from palimpsest.report.page import render_page
from palimpsest.report.parts import Column, Figures, Method, Prose, Run, Table
from report_parts import anchors, section, source
from report_runs import EVIL, audit_data, make_run

# Which runs


def test_runs_are_opened_once_with_verdicts_first(audits: dict[str, Path], runs: dict[str, Run]) -> None:
    diff = runs["diff"].path
    found = open_runs([diff, audits["plain"], audits["judged"], audits["judged"] / "." / ""])
    assert [run.name for run in found] == ["judged", "plain", diff.name]
    assert found[0].data["calibration"] and found[2].data["method"] == "crosscoder"


def test_names_are_as_short_as_they_may_be(tmp_path: Path) -> None:
    for place in ("a/run", "b/run", "c"):
        make_run(tmp_path / place, "steer", {"summary": place}, "steer.json")
    names = {run.name for run in open_runs([tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c"])}
    assert names == {"a/run", "b/run", "c"}


def test_a_folder_stands_for_the_finished_runs_below_it(tmp_path: Path) -> None:
    make_run(tmp_path / "x" / "one", "steer", {}, "steer.json")
    make_run(tmp_path / "x" / "one" / "inner", "steer", {}, "steer.json")
    make_run(tmp_path / "two", "steer", {}, "steer.json")
    make_run(tmp_path / "store", "store", {}, "store.json")
    with RunFolder(tmp_path / "begun", stage="steer", config={}, inputs={}):
        pass
    assert [run.name for run in open_runs([tmp_path])] == ["two", "one"]


def test_what_is_no_run_is_refused_with_a_way_on(tmp_path: Path, audits: dict[str, Path]) -> None:
    with RunFolder(tmp_path / "begun", stage="diff", config={}, inputs={}):
        pass
    (tmp_path / "empty").mkdir()
    report = make_run(tmp_path / "report", "report", {}, "report.json").path
    faults = {
        tmp_path / "begun": "--resume",
        tmp_path / "empty": "no finished run lies below",
        tmp_path / "absent": "no folder",
        audits["plain"] / "audit.json": "Pass .*plain instead",
        report: "the runs that it was made from",
    }
    for path, words in faults.items():
        with pytest.raises(ArtifactError, match=words):
            open_runs([path])
    with pytest.raises(ConfigError, match="No run"):
        open_runs([])


def test_a_main_file_that_is_no_object_is_named(tmp_path: Path) -> None:
    with RunFolder(tmp_path / "diff", stage="diff", config={}, inputs={}) as run:
        run.write_json("diff.json", [1])
        run.finish()
    with pytest.raises(ArtifactError, match=r"diff\.json is no result"):
        open_runs([tmp_path / "diff"])
    with RunFolder(tmp_path / "none", stage="diff", config={}, inputs={}) as run:
        run.finish()
    with pytest.raises(ArtifactError, match=r"holds no diff\.json"):
        open_runs([tmp_path / "none"])


def test_an_unknown_stage_is_shown_all_the_same(tmp_path: Path) -> None:
    run = make_run(tmp_path / "new", "future", {"summary": "It found seven."}, "future.json")
    assert main_data(run.artifact) == {"summary": "It found seven."}
    html = Report.of([run.path]).html()
    assert "It found seven." in fixture.Page(html).text


def test_audits_of_one_base_are_compared_and_others_are_not(tmp_path: Path) -> None:
    made = [make_run(tmp_path / str(i), "audit", audit_data(i / 10), "audit.json") for i in range(2)]
    other = audit_data()
    other["pair"] = {**other["pair"], "base": "elsewhere/", "fingerprint_base": "0"}
    alone = make_run(tmp_path / "alone", "audit", other, "audit.json")
    assert [[run.name for run in group] for group in comparable_audits([*made, alone])] == [["0", "1"]]
    assert comparable_audits([made[0], alone]) == []


# Names and addresses


def test_equal_names_give_way_and_every_link_leads_somewhere(audits: dict[str, Path]) -> None:
    html = Report.of([audits["judged"], audits["again"], audits["plain"]]).html()
    ids, links = anchors(html)
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    assert {"judged-tasks", "again-tasks"} & set(ids) and "again-calibration" in links


def test_charts_and_tables_get_names_of_their_own() -> None:
    table = Table("t", "T", [Column("a", "A")], [{"a": 1}])
    sections = [section(run=name, blocks=[table]) for name in ("one", "two", "two")]
    found = [block.name for _, block in tables_of(unique(sections))]
    assert len(set(found)) == 3 and all(re.fullmatch(r"[\w-]+", name) for name in found)
    wild = unique([section(id='"><script>', run=EVIL, blocks=[Table(EVIL, "T", [], [])])])
    assert re.fullmatch(r"[\w-]+", wild[0].id) and re.fullmatch(r"[\w-]+", tables_of(wild)[0][1].name)


def test_the_page_goes_from_verdicts_to_methods() -> None:
    orders = ["method", "tables", "latents", "evidence", "verdict"]
    sections = unique([section(id=one, title=f"Part {one}", order=one, lead="Words.") for one in orders])
    assert [one.order for one in sections] == orders[::-1]
    text = fixture.Page(render_page([source()], sections)).text
    places = [text.index(f"Part {one}", text.index("Reproduce")) for one in orders[::-1]]
    assert places == sorted(places)


# The page


def test_the_leading_audit_stands_on_top_and_every_run_says_what_it_found(
    audits: dict[str, Path], runs: dict[str, Run]
) -> None:
    text = fixture.Page(Report.of([runs["diff"].path, audits["judged"]]).html()).text
    sentence = fixture.make_audit(calibrated=True)["calibration"]["sentence"]
    first = text.index(sentence)
    assert first < text.index("web: shifted, undeclared") < text.index("What this says")
    assert text.count("Reproduce this") == 2 and "Fingerprints and versions" in text


def test_several_judged_audits_are_summed_up(audits: dict[str, Path]) -> None:
    html = Report.of([audits["judged"], audits["again"]]).html()
    head = re.search(r"<h1[^>]*>(.*?)</h1>", html)
    assert head is not None and head[1] == "Undeclared: web in judged; web in again"
    assert html.count('class="verdicts"') == 2 and html.count("<h2>What this says</h2>") == 1


def test_the_method_of_equal_audits_is_told_once(audits: dict[str, Path]) -> None:
    html = Report.of([audits["judged"], audits["again"], audits["plain"]]).html()
    assert html.count("Calibration.</b> c_D") == 1
    # The one without nulls says less, and is told apart.
    assert html.count("<b>Overlap.</b>") == 2


def test_equal_methods_stand_once() -> None:
    method = Method("Twins", ["They are alike."], ["Not always."], "Random ones.")
    sections = unique([section(run=name, lead="x", methods=[method]) for name in "ab"])
    text = fixture.Page(render_page([source("a"), source("b")], sections)).text
    assert text.count("They are alike.") == 1 and "Not always." in text and "Random ones." in text


def test_every_kind_of_block_is_drawn_and_an_empty_one_says_so() -> None:
    blocks = [
        Prose(["Plain words."]),
        Prose(["Look out."], "callout"),
        Prose(["Nothing yet."], "empty", "palimpsest examples base tuned"),
        Figures([("share", "12% [10%, 14%]", "of all")]),
        Table("none", "Empty one", [Column("a", "A")], []),
    ]
    html = render_page([source()], unique([section(blocks=blocks)]))
    page = fixture.Page(html)
    for words in (
        "Plain words.",
        "Look out.",
        "palimpsest examples base tuned",
        "Nothing to show.",
        "of all",
    ):
        assert words in page.text
    assert "<b>12%</b><i>[10%, 14%]</i>" in html and "data-rows=" in html


def test_a_single_run_without_verdicts_says_its_summary(examples: dict[str, Path]) -> None:
    html = Report.of([examples["examples"]]).html()
    summary = open_artifact(examples["examples"]).manifest["summary"]
    assert summary in fixture.Page(html).text


# Tables


def _rows(n: int = 40) -> list[dict[str, Any]]:
    rng = np.random.default_rng(1)
    rows: list[dict[str, Any]] = [
        {"latent": i, "share": float(rng.random()), "name": f"n{i % 7}"} for i in range(n)
    ]
    rows[3]["share"] = None
    rows[4]["share"] = float("nan")
    return rows


@pytest.mark.parametrize("descending", [True, False])
def test_rows_are_ordered_with_missing_values_last(descending: bool) -> None:
    columns = [Column("latent", "latent", "latent"), Column("share", "share", "share", digits=1)]
    table = Table("t", "T", columns, _rows(), sort=("share", descending), shown=5)
    found = [row["latent"] for row in ordered(table)]
    known = [row for row in _rows() if row["latent"] not in (3, 4)]
    wanted = sorted(known, key=lambda row: row["share"], reverse=descending)
    assert found == [row["latent"] for row in wanted] + [3, 4]
    view = table_view(table, Cards("latent-", {wanted[0]["latent"]}))
    assert [row[0].text for row in view.rows] == [str(row["latent"]) for row in wanted[:5]]
    assert [bool(row[0].address) for row in view.rows] == [True, False, False, False, False]
    assert len(view.data["rows"]) == 40 and view.beyond == 0


def test_cells_are_what_their_column_says() -> None:
    columns = [
        Column("t", "t"), Column("n", "n", "number", digits=2), Column("s", "s", "share", digits=1),
        Column("c", "c", "count"), Column("k", "k", "token"), Column("w", "w", "words"),
        Column("m", "m", "number", digits=2, interval=("lo", "hi"), side="tuned"),
    ]  # fmt: skip
    row = {
        "t": "a\nb", "n": -1.005e-5, "s": 0.1234567891, "c": 12345.0, "k": " x", "w": [" a", "b"], "m": 1.0,
        "lo": 0.5, "hi": 1.5,
    }  # fmt: skip
    far = {"m": 2.0, "lo": None, "hi": 3.0}
    view = table_view(Table("t", "T", columns, [row, far, {}]), Cards())
    texts = [item.text or list(item.words) for item in view.rows[0][:6]]
    assert texts == ["a↵b", "−1.0e−05", "12.3%", "12,345", "␣x", ["␣a", "b"]]
    cell = view.rows[0][6].cell
    assert cell is not None and (cell.text, cell.note) == ("1.00", "[0.50, 1.50]")
    assert view.rows[0][6].style == "num tuned" and cell.whisker is not None
    assert view.data["rows"][0] == ["a↵b", -1.005e-5, 0.123457, 12345, "␣x", ["␣a", "b"], [1, 0.5, 1.5]]
    assert view.rows[1][6].cell is not None and view.rows[1][6].cell.whisker is None
    assert {item.kind for item in view.rows[2]} == {"missing"}


def test_one_far_interval_does_not_press_the_others_together() -> None:
    rows = [{"v": i / 100, "lo": i / 100 - 0.01, "hi": i / 100 + 0.01} for i in range(200)]
    rows.append({"v": 1e6, "lo": 9e5, "hi": 2e6})
    columns = [Column("v", "v", "number", interval=("lo", "hi"))]
    view = table_view(Table("t", "T", columns, rows, shown=201), Cards())
    marks = [row[0].cell.whisker for row in view.rows if row[0].cell]
    assert marks[150].mid - marks[50].mid > 30
    assert all(0 <= place <= 100 for mark in marks for place in (mark.low, mark.mid, mark.high))


def test_rows_beyond_the_page_are_counted() -> None:
    view = table_view(Table("t", "T", [Column("a", "A")], [{"a": 1}] * 3, total=70000), Cards())
    assert (view.count, view.beyond) == (3, 69997)
    assert "69,997 more rows" in fixture.Page(str(draw_section(
        section(blocks=[Table("t", "T", [Column("a", "A")], [{"a": 1}], total=69998)]), Page(), named=False
    ))).text  # fmt: skip
