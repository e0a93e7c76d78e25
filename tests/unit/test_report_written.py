"""Cards of latents, the report's folder, its JSON and Markdown: all of it there, none of it markup."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt

import audit_fixture as fixture
from latents_fixture import HOSTILE, make_examples, make_labels
from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.artifacts.disk import to_json
from palimpsest.cli import main
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.report import build_report
from palimpsest.report.build import Report, write_report
from palimpsest.report.cards import MOST, cards_by_run, decks, draw_cards, evidence_of
from palimpsest.report.draw import Page, charts_of, draw_section, tables_of, unique
from palimpsest.report.findings_json import findings
from palimpsest.report.markdown import grid, markdown, plain
from palimpsest.report.merge import open_runs, sections_of
from palimpsest.report.page import LIMIT, render_page
from palimpsest.report.parts import Column, Run, Section, Table, Template
from palimpsest.report.reproduce import as_toml, recipe
from report_parts import HIDDEN, section, source
from report_runs import EVIL, diff_data, diff_latents, make_run, poisoned

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


def _of(
    path: Path, pair: tuple[str, str], data: dict[str, Any], inputs: dict[str, Any] | None = None
) -> Path:
    about = {**diff_data(), "pair": dict(zip(("base", "tuned"), pair, strict=True)), **data}
    with RunFolder(path, stage="diff", config={}, inputs=inputs or {}) as run:
        run.write_json("diff.json", about)
        run.write_table("latents.parquet", diff_latents())
        run.finish()
    return path


def test_labels_stand_in_the_table_of_their_dictionary(examples: dict[str, Path], tmp_path: Path) -> None:
    def columns(*paths: Path) -> set[str]:
        found = dict((table.name, table) for _, table in tables_of(sections_of(open_runs(paths))))
        return {column.key for column in found["examples-latents"].columns}

    assert {"label", "score"} <= columns(*examples.values())
    about = json.loads((examples["labels"] / "labels.json").read_text())
    data = {**about, "dictionary": {"sha256": "f" * 64}}
    with RunFolder(tmp_path / "other", stage="labels", config={}, inputs={}) as run:
        run.write_json("labels.json", data)
        run.write_bytes("labels.parquet", (examples["labels"] / "labels.parquet").read_bytes())
        run.finish()
    assert "label" not in columns(examples["examples"], tmp_path / "other")


def test_latents_of_a_dictionary_trained_anew_and_of_several_are_others(
    examples: dict[str, Path], tmp_path: Path
) -> None:
    one = open_runs([examples["examples"]])[0]
    about = one.data["dictionary"]
    pair = ("base", "tuned")
    anew = {"dictionary": {"path": about["path"], "sha256": "f" * 64}}
    two = {
        "dictionary": None,
        "sites": [{"site": "a", "dictionary": about["path"]}, {"site": "b", "dictionary": "x"}],
    }
    alone = {"dictionary": None, "sites": [{"site": "a", "dictionary": about["path"], "sha256": "e" * 64}]}
    made = {
        "anew": _of(tmp_path / "anew", pair, anew),
        "two": _of(tmp_path / "two", pair, two, {"dictionary/0": {"path": "p", "sha256": about["sha256"]}}),
        "alone": _of(tmp_path / "alone", pair, alone),
        "hostile": _of(tmp_path / "hostile", ("a\0b", "c\0"), {"dictionary": {"path": "\0"}}),
    }
    found = {run.name: run.same_latents(one) for run in open_runs(made.values())}
    assert found == {"anew": False, "two": False, "alone": True, "hostile": False}


def test_findings_on_other_models_are_kept_from_a_card(examples: dict[str, Path], tmp_path: Path) -> None:
    own = open_runs([examples["examples"]])[0]
    pair = (own.data["pair"]["base"], own.data["pair"]["tuned"])
    data = {"dictionary": own.data["dictionary"]}
    kin, strange = _of(tmp_path / "kin", pair, data), _of(tmp_path / "strange", (pair[0], "another"), data)
    more = tmp_path / "more"
    with RunFolder(more, stage="examples", config={}, inputs={}) as run:
        run.write_json(
            "examples.json", {**own.data, "pair": {"base": str(Path(pair[0]).resolve()), "tuned": "another"}}
        )
        for name in ("latents.parquet", "examples.parquet", "vocab.parquet"):
            run.write_bytes(name, (own.path / name).read_bytes())
        run.finish()
    runs = open_runs([own.path, kin, strange])
    sections = unique(sections_of(runs))
    (deck,) = decks(runs, sections)
    assert deck.others == {"kin"} and {name for name, _ in evidence_of(deck, sections)[1]} == {"kin"}
    # Its numbers still lead to what the latent is, and the card says in which models it was read.
    assert set(cards_by_run([deck])) == {"examples", "kin", "strange"}
    assert f"{pair[0]} → {pair[1]}" in draw_cards([deck], sections, 10**7)[0]
    runs = open_runs([own.path, more, kin, strange])
    found = cards_by_run(decks(runs, unique(sections_of(runs))))
    assert found["kin"].prefix == found["examples"].prefix == "latent-"
    assert found["strange"].prefix == found["more"].prefix == "latent-more-"


def test_every_finding_names_its_models_where_they_differ(audits: dict[str, Path], tmp_path: Path) -> None:
    about = open_runs([audits["judged"]])[0].data["pair"]
    same = _of(tmp_path / "same", (str(Path(about["base"]).resolve()), about["tuned"]), {})
    page = fixture.Page(Report.of([audits["judged"], same]).html())
    assert "This headline is of" not in page.text and about["tuned"] in page.text
    other = _of(tmp_path / "other", (about["base"], "something-else"), {})
    page = fixture.Page(Report.of([audits["judged"], same, other]).html())
    assert "This headline is of judged" in page.text and "something-else" in page.text


def test_latents_of_a_table_come_before_all_others(examples: dict[str, Path]) -> None:
    runs = open_runs([examples["examples"]])
    rows = [{"latent": one} for one in (77, 5, 109, 9999, None, 5)]
    listed = section(run="examples", blocks=[Table("t", "T", [Column("latent", "l", "latent")], rows)])
    (deck,) = decks(runs, unique([listed]))
    place = [deck.chosen.index(one) for one in (77, 5)]
    # They take turns with the latents that differ most; a dead one and one that does not exist have no card.
    assert max(place) <= 3 and 109 not in deck.chosen and 9999 not in deck.chosen
    assert len(deck.chosen) == len(set(deck.chosen)) == 108 <= MOST


@pytest.mark.parametrize("room", [60_000, 250_000, 900_000])
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
    bare = render_page([source("examples", "examples")], [])
    small = len(bare.encode()) + 500_000
    runs = open_runs([examples["examples"]])
    (deck,) = decks(runs, [])

    def draw(room: int) -> Any:
        return draw_cards([deck], [], room)[0]

    page = render_page([source("examples", "examples")], [], cards_by_run([deck]), draw, small)
    assert "<template" in page and len(page.encode()) <= small


def test_tables_and_cards_give_way_where_many_runs_share_a_page(examples: dict[str, Path]) -> None:
    (deck,) = decks(open_runs([examples["examples"]]), [])
    rows = [{"latent": i, "text": f"{i} " + "x" * 200} for i in range(2000)]
    columns = [Column("latent", "latent", "latent"), Column("text", "text")]
    table = Table("t", "T", columns, rows, sort=("latent", True))
    sections = unique(
        [section(id=f"s{i}", run="examples", blocks=[replace(table, name=f"t{i}")]) for i in range(9)]
    )

    def draw(room: int) -> Any:
        return draw_cards([deck], [], room)[0]

    limit = 2_500_000
    for given in (draw, None):
        page = render_page([source("examples", "examples")], sections, cards_by_run([deck]), given, limit)
        assert len(page.encode()) <= limit and ("<template" in page) == (given is not None)
        text = fixture.Page(page).text
        assert "more rows are in the run's own files only" in text and "1999 xxx" in text
    assert draw_cards([deck], [], -1) == ("", 0)


def test_latents_of_an_audit_are_cut_without_a_wrong_share(audits: dict[str, Path]) -> None:
    sections = [one for one in sections_of(open_runs([audits["judged"]])) if one.id == "latents"]
    whole, cut = (
        fixture.Page(str(draw_section(sections[0], Page(most=most), named=False))) for most in (None, 2)
    )
    assert "together" in whole.text and "The 2 strongest of" in cut.text and "together" not in cut.text


# What is written


def test_the_folder_holds_everything_and_says_so(
    examples: dict[str, Path], audits: dict[str, Path], tmp_path: Path
) -> None:
    paths = list(examples.values())
    written = write_report(paths, tmp_path / "out")
    assert written.page == tmp_path / "out" / "report.html"
    artifact = open_artifact(tmp_path / "out", stage="report")
    assert written.summary == artifact.manifest["summary"]
    charts = charts_of(Report.of(paths).sections)
    assert written.plots == len(charts) >= 2
    for chart in charts:
        png = artifact.file(f"plots/{chart.name}.png").read_bytes()
        assert png.startswith(b"\x89PNG") and b"<svg" in artifact.file(f"plots/{chart.name}.svg").read_bytes()
    for name in ("latents.parquet", "examples.parquet", "vocab.parquet", "examples.json"):
        assert artifact.file(name).read_bytes() == (examples["examples"] / name).read_bytes()
    assert set(artifact.inputs) == {"run/0", "run/1"}
    assert write_report(paths, tmp_path / "out", resume=True) == written
    with pytest.raises(ArtifactError, match="--overwrite"):
        write_report(audits["judged"], tmp_path / "out")
    steer = make_run(tmp_path / "steer", "steer", {"summary": "Nothing."}, "steer.json").path
    assert write_report(steer, tmp_path / "out", overwrite=True).files.keys() == {
        "report.html", "report.json", "report.md"
    }  # fmt: skip


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


def test_the_command_says_what_was_found_and_written(
    audits: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    steer = make_run(tmp_path / "steer", "steer", {"summary": "It \x1b[31mworks."}, "steer.json").path
    arguments = ["report", str(steer), str(audits["judged"]), "--out"]
    assert main([*arguments, str(tmp_path / "page.html"), "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["report"] == str(tmp_path / "page.html") and "web (shifted)" in found["summary"]
    assert found["files"] == {"page.html": (tmp_path / "page.html").stat().st_size} and found["plots"] == 0
    assert main([*arguments, str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "report.json" in said and "7 plots as PNG and SVG" in said and "\x1b" not in said
    assert said.startswith("Undeclared: web (shifted)")
    assert main([*arguments, str(tmp_path / "out")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(arguments[:-1]) == 2 and "--out DIR" in capsys.readouterr().err


def test_the_json_holds_every_table_and_verdict(runs: dict[str, Run], tmp_path: Path) -> None:
    paths = [run.path for run in runs.values()]
    report = Report.of(paths)
    path = tmp_path / "report.json"
    path.write_bytes(to_json(findings(report.runs, report.sections, {}, {})))
    found = json.loads(path.read_text("utf-8"))
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
    report = Report.of(_hostile_paths(tmp_path / "in", audits))
    plots = {chart.name: {"png": f"plots/{chart.name}.png"} for chart in charts_of(report.sections)}
    text = markdown(report.runs, report.sections, plots)
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


MARKED = (
    *("- a", "1. x", "+ b", "=== ", "[x]: /y", "@me", "<!-- -->", "a | b", "***", "http://x.y", "www.x.y"),
    *("~~~", "![a](b)", "\\*a*", "# h", "> q", "&lt;", "a\nb"),
)


@pytest.mark.parametrize("text", [*HOSTILE, *fixture.HOSTILE[:9], *MARKED])
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
    html = str(draw_section(section(blocks=[Template("callouts.html.j2", context)]), Page(), named=False))
    assert "<script" not in html and "<img" not in html and "&lt;script" in html
