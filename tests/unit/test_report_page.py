"""One page of many runs: which runs it takes, how they are merged, what is written, and that nothing in it is markup."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

import audit_fixture as fixture
from latents_fixture import HOSTILE, make_examples, make_labels
from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.report import build_report
from palimpsest.report.build import Report, write_report
from palimpsest.report.cards import MOST, cards_by_run, decks, draw_cards, evidence_of
from palimpsest.report.data_table import Cards, ordered, table_view
from palimpsest.report.draw import Page, charts_of, draw_section, tables_of, unique
from palimpsest.report.markdown import grid, plain
from palimpsest.report.merge import comparable_audits, main_data, open_runs, sections_of
from palimpsest.report.page import LIMIT, Source, render_page
from palimpsest.report.parts import Column, Figures, Method, Prose, Run, Section, Table, Template
from palimpsest.report.reproduce import Recipe, as_toml, recipe
from report_runs import EVIL, all_runs, audit_data, diff_data, diff_latents, make_run, poisoned

HIDDEN = re.compile("[\u202a-\u202e\u2066-\u2069\u200b-\u200f\u2028\u2029\x00-\x08\x0b-\x1f\x7f]")


@pytest.fixture(scope="module")
def audits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("audits")
    parts = fixture.make_curve(), fixture.make_latents(6)
    judged = fixture.make_audit(calibrated=True)
    return {
        "plain": fixture.write_audit(root / "plain", fixture.make_audit(), *parts),
        "judged": fixture.write_audit(root / "judged", judged, *parts),
        "again": fixture.write_audit(root / "again", judged, *parts),
        "hostile": fixture.write_audit(root / "hostile", *fixture.make_hostile(calibrated=True)),
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Run]:
    return all_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("examples")
    return {
        "examples": make_examples(root / "examples", 120, 12),
        "labels": make_labels(root / "labels", [0, 1, 2]),
    }


def _anchors(html: str) -> tuple[list[str], list[str]]:
    page = fixture.Page(html)
    ids = [value for _, name, value in page.attributes if name == "id"]
    links = [value[1:] for _, name, value in page.attributes if name == "href" and value.startswith("#")]
    return ids, links


def _section(**changes: Any) -> Section:
    return Section(**{"id": "one", "title": "One", "order": "evidence", "run": "run", **changes})


def _source(name: str = "run", stage: str = "diff") -> Source:
    return Source(
        name, stage, ("base/", "tuned/"), "resid_post.1", Recipe(name, stage, "palimpsest diff", [])
    )


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
    report = build_report(audits["plain"], tmp_path / "report").parent
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
    ids, links = _anchors(html)
    assert len(ids) == len(set(ids))
    assert set(links) <= set(ids)
    assert {"judged-tasks", "again-tasks"} & set(ids) and "again-calibration" in links


def test_charts_and_tables_get_names_of_their_own() -> None:
    table = Table("t", "T", [Column("a", "A")], [{"a": 1}])
    sections = [_section(run=name, blocks=[table]) for name in ("one", "two", "two")]
    found = [block.name for _, block in tables_of(unique(sections))]
    assert len(set(found)) == 3 and all(re.fullmatch(r"[\w-]+", name) for name in found)
    wild = unique([_section(id='"><script>', run=EVIL, blocks=[Table(EVIL, "T", [], [])])])
    assert re.fullmatch(r"[\w-]+", wild[0].id) and re.fullmatch(r"[\w-]+", tables_of(wild)[0][1].name)


def test_the_page_goes_from_verdicts_to_methods() -> None:
    orders = ["method", "tables", "latents", "evidence", "verdict"]
    sections = unique([_section(id=one, title=f"Part {one}", order=one, lead="Words.") for one in orders])
    assert [one.order for one in sections] == orders[::-1]
    text = fixture.Page(render_page([_source()], sections)).text
    places = [text.index(f"Part {one}", text.index("Reproduce")) for one in orders[::-1]]
    assert places == sorted(places)


# The page


def test_the_leading_audit_stands_on_top_and_every_run_says_what_it_found(
    audits: dict[str, Path], runs: dict[str, Run]
) -> None:
    text = fixture.Page(Report.of([runs["diff"].path, audits["judged"]]).html()).text
    sentence = fixture.make_audit(calibrated=True)["calibration"]["sentence"]
    first = text.index(sentence)
    assert first < text.index("web: shifted, undeclared") < text.index("What each run found".split()[0])
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
    sections = unique([_section(run=name, lead="x", methods=[method]) for name in "ab"])
    text = fixture.Page(render_page([_source("a"), _source("b")], sections)).text
    assert text.count("They are alike.") == 1 and "Not always." in text and "Random ones." in text


def test_every_kind_of_block_is_drawn_and_an_empty_one_says_so() -> None:
    blocks = [
        Prose(["Plain words."]),
        Prose(["Look out."], "callout"),
        Prose(["Nothing yet."], "empty", "palimpsest examples base tuned"),
        Figures([("share", "12% [10%, 14%]", "of all")]),
        Table("none", "Empty one", [Column("a", "A")], []),
    ]
    html = render_page([_source()], unique([_section(blocks=blocks)]))
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
        _section(blocks=[Table("t", "T", [Column("a", "A")], [{"a": 1}], total=69998)]), Page(), named=False
    ))).text  # fmt: skip


# Cards of latents


def _with_cards(examples: dict[str, Path], tmp_path: Path) -> tuple[list[Run], list[Section]]:
    data = {**diff_data(), "dictionary": {"path": "dictionary", "sha256": "0" * 64}}
    make_run(tmp_path / "kin", "diff", data, "diff.json", {"latents.parquet": diff_latents()})
    strange = {**data, "dictionary": {"path": "other", "sha256": "f" * 64}}
    make_run(tmp_path / "strange", "diff", strange, "diff.json", {"latents.parquet": diff_latents()})
    runs = open_runs([*examples.values(), tmp_path / "kin", tmp_path / "strange"])
    return runs, unique(sections_of(runs))


def test_tables_link_to_cards_of_their_own_dictionary_only(examples: dict[str, Path], tmp_path: Path) -> None:
    runs, sections = _with_cards(examples, tmp_path)
    (deck,) = decks(runs, sections)
    assert deck.runs == {"examples", "labels", "kin"}
    alive = {i for i in range(120) if i % 10 != 9}
    assert set(deck.chosen) == alive
    shown = cards_by_run([deck])
    assert set(shown) == {"examples", "labels", "kin"} and set(shown["kin"].shown) == alive
    drawn = {
        one.run: str(draw_section(one, Page(shown), named=True))
        for one in sections
        if one.id.endswith("table")
    }
    assert 'href="#latent-' in drawn["kin"] and 'href="#latent-' not in drawn["strange"]


def test_a_card_says_what_other_runs_found(examples: dict[str, Path], tmp_path: Path) -> None:
    runs, sections = _with_cards(examples, tmp_path)
    (deck,) = decks(runs, sections)
    evidence = evidence_of(deck, sections)
    assert {name for name, _ in evidence[1]} == {"kin"}
    table = diff_latents().to_pylist()
    facts = dict(evidence[1][0][1])
    assert facts["Δnorm"] == pytest.approx(table[1]["delta_norm"], rel=1e-5)
    html, count = draw_cards([deck], sections, 10**8)
    page = fixture.Page(html)
    assert count == 108 and page.tags.count("template") == 108
    assert "What other runs found" in page.text and "numbers in sums 1" in page.text


def test_latents_of_a_table_come_before_all_others(examples: dict[str, Path]) -> None:
    runs = open_runs([examples["examples"]])
    rows = [{"latent": one} for one in (77, 5, 109, 9999, None, 5)]
    section = _section(run="examples", blocks=[Table("t", "T", [Column("latent", "l", "latent")], rows)])
    (deck,) = decks(runs, unique([section]))
    place = [deck.chosen.index(one) for one in (77, 5)]
    # They take turns with the latents that differ most; a dead one and one that does not exist have no card.
    assert max(place) <= 3 and 109 not in deck.chosen and 9999 not in deck.chosen
    assert len(deck.chosen) == len(set(deck.chosen)) == 108 <= MOST


@pytest.mark.parametrize("room", [60_000, 250_000, 450_000])
def test_cards_take_no_more_room_than_there_is(examples: dict[str, Path], room: int) -> None:
    runs = open_runs([examples["examples"]])
    (deck,) = decks(runs, [])
    html, count = draw_cards([deck], [], room)
    assert len(html.encode()) <= room and 0 < count <= 108
    if room > 400_000:
        assert count == 108
    shown = [int(one) for one in re.findall(r'data-latent="(\d+)"', html)]
    assert shown == list(deck.chosen[:count])


def test_a_page_with_cards_stays_below_its_limit(examples: dict[str, Path]) -> None:
    html = Report.of([examples["examples"]]).html()
    assert len(html.encode()) < LIMIT < 10_000_000
    bare = render_page([_source("examples", "examples")], [])
    small = len(bare.encode()) + 500_000
    runs = open_runs([examples["examples"]])
    (deck,) = decks(runs, [])

    def draw(room: int) -> Any:
        return draw_cards([deck], [], room)[0]

    page = render_page([_source("examples", "examples")], [], cards_by_run([deck]), draw, small)
    assert "<template" in page and len(page.encode()) <= small


# What is written


def test_the_folder_holds_everything_and_says_so(
    examples: dict[str, Path], audits: dict[str, Path], tmp_path: Path
) -> None:
    written = write_report([audits["judged"], *examples.values()], tmp_path / "out")
    assert written.page == tmp_path / "out" / "report.html" and "web" in written.summary
    artifact = open_artifact(tmp_path / "out", stage="report")
    charts = charts_of(Report.of([audits["judged"], *examples.values()]).sections)
    assert written.plots == len(charts) >= 8
    for chart in charts:
        png = artifact.file(f"plots/{chart.name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and b"<svg" in artifact.file(f"plots/{chart.name}.svg").read_bytes()
    for name in ("latents.parquet", "examples.parquet", "vocab.parquet", "examples.json"):
        assert artifact.file(name).read_bytes() == (examples["examples"] / name).read_bytes()
    assert set(artifact.inputs) == {"run/0", "run/1", "run/2"}
    again = write_report([audits["judged"], *examples.values()], tmp_path / "out", resume=True)
    assert again == written
    with pytest.raises(ArtifactError, match="--overwrite"):
        write_report(audits["judged"], tmp_path / "out")
    assert write_report(audits["judged"], tmp_path / "out", overwrite=True).plots == 7


def test_a_report_never_overwrites_what_it_reads(audits: dict[str, Path], tmp_path: Path) -> None:
    run = fixture.write_audit(
        tmp_path / "audit", fixture.make_audit(), fixture.make_curve(), fixture.make_latents(3)
    )
    with pytest.raises(ArtifactError):
        build_report(run, run, overwrite=True)
    assert (run / "audit.json").exists()


def test_several_runs_need_a_place(audits: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--out DIR"):
        build_report([audits["judged"], audits["plain"]])
    page = build_report([audits["judged"], audits["plain"]], tmp_path / "page.html")
    assert page == tmp_path / "page.html" and list(tmp_path.iterdir()) == [page]


def test_the_json_holds_every_table_and_verdict(runs: dict[str, Run], tmp_path: Path) -> None:
    paths = [run.path for run in runs.values()]
    folder = build_report(paths, tmp_path / "out").parent
    found = json.loads((folder / "report.json").read_text("utf-8"))
    report = Report.of(paths)
    assert {one["name"] for one in found["runs"]} == {run.name for run in report.runs}
    for one in found["runs"]:
        run = next(run for run in report.runs if run.name == one["name"])
        assert one["data"] == json.loads(json.dumps(dict(run.data))) and one["stage"] == run.stage
    tables = {table["name"]: table for one in found["sections"] for table in one["tables"]}
    for _, table in tables_of(report.sections):
        rows = tables[table.name]["rows"]
        assert len(rows) == len(table.rows)
        key = table.columns[0].key
        assert [row[key] for row in rows] == [
            None if isinstance(row.get(key), float) and not np.isfinite(row[key]) else row.get(key)
            for row in table.rows
        ]
    assert [one["sentence"] for one in found["verdicts"]] == [
        one.verdict for one in report.sections if one.verdict
    ]


def test_a_second_person_can_repeat_a_run(tmp_path: Path) -> None:
    config: Mapping[str, Any] = {
        "base": 'a "quoted"\n\u2028 path', "corpus": ["x=1", "y"], "top_k": 3, "site": None,
        "run": {"seed": 7, "out": "x"}, "models": {"dtype": "auto", "load_kwargs": {}}, "flag": False, "none": [],
    }  # fmt: skip
    wanted = {
        "base": config["base"],
        "corpus": ["x=1", "y"],
        "top-k": 3,
        "seed": 7,
        "dtype": "auto",
        "flag": False,
    }
    assert tomllib.loads(as_toml(config)) == wanted
    with RunFolder(tmp_path / "a b", stage="diff", config=config, inputs={}) as run:
        run.write_json("diff.json", {"summary": "s"})
        run.finish()
    found = recipe(open_runs([tmp_path / "a b"])[0])
    assert found.command == f"palimpsest diff --config diff.toml --out '{tmp_path}/a b'"
    assert ("seed", 7) not in found.rows and ("palimpsest", "0.1.0") in found.rows


# Hostile text


def _hostile_paths(root: Path, audits: dict[str, Path]) -> list[Path]:
    paths = [audits["hostile"]]
    paths.append(make_examples(root / "examples", 60, 8, hostile=True))
    paths.append(make_labels(root / "labels", list(range(40)), hostile=True))
    bad = poisoned(diff_data())
    bad["latents"] = "latents.parquet"
    paths.append(make_run(root / "diff", "diff", bad, "diff.json", {"latents.parquet": diff_latents()}).path)
    return paths


def test_hostile_runs_add_nothing_to_the_page(audits: dict[str, Path], tmp_path: Path) -> None:
    html = Report.of(_hostile_paths(tmp_path, audits)).html()
    page = fixture.Page(html)
    assert not {"img", "iframe", "object", "embed", "base", "form", "link"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    links = [value for _, name, value in page.attributes if name in ("href", "src", "action")]
    assert all(value.startswith("#") for value in links)
    # Ours: the data of charts, of tables, the chart library and the page's own scripts.
    kinds = [value for tag, name, value in page.attributes if tag == "script" and name == "type"]
    assert page.tags.count("script") == len(kinds) + 5 and set(kinds) == {"application/json", "text/plain"}
    assert not HIDDEN.search(html.split('<script type="text/plain"')[0])
    assert "{{ 7*7 }}" in page.text and len(html.encode()) < 10_000_000


def test_hostile_runs_add_nothing_to_the_markdown(audits: dict[str, Path], tmp_path: Path) -> None:
    folder = build_report(_hostile_paths(tmp_path / "in", audits), tmp_path / "out").parent
    text = (folder / "report.md").read_text("utf-8")
    assert not HIDDEN.search(text)
    kinds: set[str] = set()
    addresses: list[str] = []

    def walk(tokens: list[Any]) -> None:
        for token in tokens:
            kinds.add(token.type)
            addresses.extend(str(token.attrs[key]) for key in ("href", "src") if key in token.attrs)
            walk(token.children or [])

    walk(MarkdownIt("gfm-like", {"linkify": False, "html": True}).parse(text))
    assert not {"html_block", "fence", "code_block", "blockquote_open", "link_open"} & kinds
    assert all(re.fullmatch(r"plots/[\w-]+\.png", one) for one in addresses) and addresses
    assert not re.search(r"(?<!\\):(?=//)|www\.", text)


@pytest.mark.parametrize("text", [*HOSTILE, *fixture.HOSTILE[:9], "- a", "1. x", "+ b", "=== ", "[x]: /y", "@me",
                                  "<!-- -->", "a | b", "***", "http://x.y", "www.x.y", "~~~", "![a](b)", "\\*a*"])  # fmt: skip
def test_no_text_is_markdown(text: str) -> None:
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    tokens = parser.parse(plain(text) or "x")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    inner = [token for token in tokens[1].children or [] if token.content != "<!-- -->"]
    assert {token.type for token in inner} <= {"text", "text_special"}
    (table,) = [t for t in parser.parse(grid(["a", "b"], [[text, text]])) if t.type == "tbody_open"]
    assert table is not None


def test_templates_are_given_what_they_need_and_no_more() -> None:
    context = {"callouts": [{"title": EVIL, "text": EVIL}]}
    html = str(draw_section(_section(blocks=[Template("callouts.html.j2", context)]), Page(), named=False))
    assert "<script" not in html and "<img" not in html and "&lt;script" in html
