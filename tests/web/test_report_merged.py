"""A page of several runs in a real browser: from a file, offline, by mouse and keyboard, on paper, without scripts."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from palimpsest.report.build import Report
from palimpsest.report.data_table import ordered
from palimpsest.report.draw import unique
from palimpsest.report.page import Source, render_page
from palimpsest.report.parts import Column, Section, Table
from palimpsest.report.reproduce import Recipe
from report_pages import ARGUMENTS, Opened, merged_paths

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
WIDTHS = (390, 900, 1440)
FORMULA = '=HYPERLINK("http://x","y")'
ROWS = [
    {"latent": i, "n": (i * 37 % 11) - 5.25, "lo": (i * 37 % 11) - 6.0, "hi": (i * 37 % 11) - 4.5,
     "share": i / 1000, "fires": 1000 * i, "name": f"name {i % 4}", "words": [" a", f"w{i}"]}
    for i in range(40)
]  # fmt: skip
ROWS[7] |= {"n": None, "name": FORMULA}
ROWS[8] |= {"share": None, "name": "-1 of them, and more"}
ROWS[9] |= {"name": 'quoted "words", a comma', "words": []}
COLUMNS = [
    Column("latent", "latent", "latent"),
    Column("n", "n", "number", digits=2, interval=("lo", "hi"), side="tuned"),
    Column("share", "share", "share", digits=1, side="base"),
    Column("fires", "fires", "count"),
    Column("name", "name"),
    Column("words", "words", "words"),
]
TABLE = Table("things", "Things", COLUMNS, ROWS, sort=("share", True), shown=10)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("merged")
    sections = unique([Section("things", "All things", "tables", run="run", blocks=[TABLE])])
    source = Source("run", "diff", ("base/", "tuned/"), "", Recipe("run", "diff", "palimpsest diff", []))
    made = {
        "calm": Report.of(merged_paths(folder / "in-calm")).html(),
        "hostile": Report.of(merged_paths(folder / "in-hostile", True)).html(),
        "table": render_page([source], sections),
    }
    for name, html in made.items():
        (folder / f"{name}.html").write_text(html, "utf-8")
    return {name: folder / f"{name}.html" for name in made}


@pytest.fixture
def opened(browser: Any, pages: dict[str, Path]) -> Iterator[Callable[..., Any]]:
    """Open a page by name; what it complained about fails the test."""
    found: list[Opened] = []

    def open_page(name: str, **options: Any) -> Any:
        found.append(Opened(browser, pages[name], **options))
        return found[-1].page

    yield open_page
    for one in found:
        one.page.context.close()
        assert one.complaints == []
        assert [url for url in one.requests if not url.startswith(("file:", "data:", "blob:"))] == []


@pytest.mark.parametrize("name", ["calm", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_draws_and_fits(opened: Callable[..., Any], name: str, scheme: str) -> None:
    page = opened(name, scheme=scheme)
    assert page.locator("figure.drawn svg").count() == page.locator("[data-chart]").count() >= 10
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        page.wait_for_timeout(150)
        widest = page.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)")
        assert widest <= width, f"{name} overflows at {width} px"
    assert page.evaluate("window.__pwned") is None


def test_headings_go_down_in_steps_of_one(opened: Callable[..., Any]) -> None:
    levels = opened("calm").eval_on_selector_all(
        "h1, h2, h3, h4", "all => all.map(one => Number(one.tagName[1]))"
    )
    assert levels.count(1) == 1 and levels[0] == 1
    assert all(after - before <= 1 for before, after in zip(levels, levels[1:], strict=False))


def test_links_of_the_contents_lead_to_their_sections(opened: Callable[..., Any]) -> None:
    page = opened("calm")
    links = page.locator("nav.contents a")
    assert links.count() > 12
    for link in links.all()[1::4]:
        link.click()
        target = page.locator(str(link.get_attribute("href"))).bounding_box()
        assert target is not None and -5 <= target["y"] < 880


def test_the_first_key_leads_past_the_links(opened: Callable[..., Any]) -> None:
    page = opened("table")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#content"


def test_a_phone_has_its_contents_behind_a_button(opened: Callable[..., Any]) -> None:
    page = opened("calm", width=390)
    listed, toggle = page.locator("#contents"), page.locator("nav.contents .toggle")
    assert not listed.is_visible() and toggle.get_attribute("aria-expanded") == "false"
    toggle.focus()
    page.keyboard.press("Enter")
    assert listed.is_visible() and toggle.get_attribute("aria-expanded") == "true"
    page.keyboard.press("Escape")
    assert not listed.is_visible() and page.evaluate("document.activeElement.className") == "toggle"


def _texts(page: Any) -> list[list[str]]:
    rows = "all => all.map(row => [...row.cells].map(cell => cell.innerText.replace(/\\s+/g, ' ').trim()))"
    return page.eval_on_selector_all(".data tbody tr", rows)


def _marks(page: Any) -> list[list[Any]]:
    places = "['x1', 'x2', 'y1', 'y2'].map(name => Number(line.getAttribute(name)))"
    return page.eval_on_selector_all(
        ".data svg line", f"all => all.map(line => [line.getAttribute('class'), {places}])"
    )


def test_the_script_prints_rows_as_the_page_came(opened: Callable[..., Any]) -> None:
    page = opened("table")
    came, marks = _texts(page), _marks(page)
    assert len(came) == 10 and came[0][0] == "39" and came[0][3] == "39,000"
    page.get_by_role("searchbox").fill("x")
    page.get_by_role("searchbox").fill("")
    assert _texts(page) == came
    # A line at zero, a span and a dot in each row.
    assert _marks(page) == marks and len(marks) == 10 * 3


@pytest.mark.parametrize("key", ["latent", "n", "share", "fires", "name", "words"])
def test_every_column_sorts_both_ways_by_keyboard(opened: Callable[..., Any], key: str) -> None:
    page = opened("table")
    place = [column.key for column in COLUMNS].index(key)
    head = page.locator(".data thead th").nth(place)
    seen = {}
    for _ in range(2):
        head.get_by_role("button").focus()
        page.keyboard.press("Enter")
        order = head.get_attribute("aria-sort")
        assert page.locator(".data thead th[aria-sort]").count() == 1
        wanted = ordered(Table("t", "T", COLUMNS, ROWS, sort=(key, order == "descending")))
        shown = [int(row[0]) for row in _texts(page)]
        if key in ("name", "words"):
            values = [json.dumps(ROWS[one][key]) for one in shown]
            assert values == [json.dumps(row[key]) for row in wanted[:10]]
        else:
            assert shown == [row["latent"] for row in wanted[:10]]
        seen[order] = shown
    assert set(seen) == {"ascending", "descending"}


def test_search_and_pages(opened: Callable[..., Any]) -> None:
    page = opened("table")
    status = page.get_by_role("status")
    on, back = (page.get_by_role("button", name=name) for name in ("Further rows", "Earlier rows"))
    assert status.inner_text() == "1–10 of 40" and back.is_disabled()
    for _ in range(3):
        on.click()
    assert status.inner_text() == "31–40 of 40" and on.is_disabled()
    page.get_by_role("searchbox").fill("NAME 3")
    wanted = [row["latent"] for row in ordered(TABLE) if row["name"] == "name 3"]
    assert status.inner_text() == f"{len(wanted)} rows" and [int(r[0]) for r in _texts(page)] == wanted
    page.get_by_role("searchbox").fill("<script>")
    assert _texts(page) == [["No row holds this text."]] and status.inner_text() == "0 rows"


def test_the_csv_holds_every_row_and_no_formula(opened: Callable[..., Any]) -> None:
    page = opened("table")
    page.get_by_role("button", name="name").click()
    page.get_by_role("searchbox").fill("name 1")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "things.csv"
    assert len(Path(download.value.path()).read_text("utf-8-sig").splitlines()) == 10
    page.get_by_role("searchbox").fill("")
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    head, *rows = csv.reader(io.StringIO(Path(download.value.path()).read_text("utf-8-sig"), newline=""))
    assert head == ["latent", "n", "n from", "n to", "share", "fires", "name", "words"]
    found = {int(row[0]): row[1:] for row in rows}
    assert sorted(found) == list(range(40))
    for i, row in enumerate(ROWS):
        interval = ["", "", ""] if row["n"] is None else [row["n"], row["lo"], row["hi"]]
        numbers = [*interval, "" if row["share"] is None else row["share"], row["fires"]]
        assert [float(one) if one else "" for one in found[i][:5]] == numbers
        assert not found[i][5].startswith(("=", "+", "-", "@"))
    assert found[7][5] == "'" + FORMULA and found[8][5] == "'-1 of them, and more"
    assert found[9][5:] == ['quoted "words", a comma', ""] and found[1][0].startswith("-")


def test_a_latent_opens_and_closes_by_keyboard(opened: Callable[..., Any]) -> None:
    page = opened("calm")
    link = page.locator(".data a[href='#latent-1']").first
    link.focus()
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    assert dialog.is_visible() and page.evaluate("location.hash") == "#latent-1"
    text = dialog.inner_text()
    assert "Latent 1" in text and "numbers in sums 1" in text and "What other runs found" in text
    assert page.evaluate("document.activeElement.textContent") == "Close"
    near = dialog.locator("a[href^='#latent-']").first
    number = near.inner_text()
    near.click()
    assert f"Latent {number}" in dialog.inner_text() and page.evaluate("location.hash") == f"#latent-{number}"
    page.keyboard.press("Escape")
    assert not dialog.is_visible() and page.evaluate("location.hash") == ""
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#latent-1"


def test_an_address_opens_its_latent_and_a_wrong_one_nothing(opened: Callable[..., Any]) -> None:
    page = opened("calm", where="#latent-2")
    assert "Latent 2" in page.get_by_role("dialog").inner_text()
    page.get_by_role("button", name="Close").click()
    assert page.get_by_role("dialog").count() == 0
    for where in ("#latent-9", "#constructor", "#latent-1%22%3E%3Cimg%3E"):
        page.evaluate("where => { location.hash = where; }", where)
        page.wait_for_timeout(50)
        assert page.get_by_role("dialog").count() == 0


def test_hostile_text_stays_text_when_touched(opened: Callable[..., Any]) -> None:
    page = opened("hostile")
    for tab in page.get_by_role("tab").all():
        tab.click()
    for box in page.locator(".data").all():
        for button in box.locator("thead button").all()[:4]:
            button.click()
        if box.get_by_role("searchbox").count():
            box.get_by_role("searchbox").fill("<img")
            box.get_by_role("searchbox").fill("")
    for link in page.locator(".data a[href^='#latent-']").all()[:6]:
        link.click()
        dialog = page.get_by_role("dialog")
        assert dialog.locator("img, script, svg[onload]").count() == 0
        page.keyboard.press("Escape")
    for mark in page.locator("[data-chart] .mark-symbol path").all()[:8]:
        mark.hover(force=True)
    assert page.evaluate("window.__pwned") is None
    assert page.locator("main img, main script, header script, header img").count() == 0


def test_a_script_that_slips_in_does_not_run(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    mark = '<main id="content">'
    planted = pages["table"].read_text("utf-8").replace(mark, mark + "<script>window.__pwned=1</script>")
    (tmp_path / "planted.html").write_text(planted, "utf-8")
    with Opened(browser, tmp_path / "planted.html") as found:
        assert found.page.evaluate("window.__pwned") is None
        assert "Content Security Policy" in " ".join(found.complaints)


def test_paper_shows_the_findings_and_none_of_the_tools(opened: Callable[..., Any]) -> None:
    page = opened("calm", scheme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert not any(one.is_visible() for one in page.locator(".tools, nav, .skip").all())
    assert all(panel.is_visible() for panel in page.locator(".panel").all())
    assert (
        page.locator(".found li").first.is_visible() and page.locator("[data-chart] svg").first.is_visible()
    )


def test_without_scripts_the_tables_are_there(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(
        offline=True, java_script_enabled=False, viewport={"width": 390, "height": 900}
    )
    page = context.new_page()
    page.goto(pages["table"].as_uri())
    assert page.locator(".data tbody tr").count() == 10
    assert (
        page.get_by_text("The first 10 of 40 rows").is_visible() and not page.locator(".tools").is_visible()
    )
    page.goto(pages["calm"].as_uri())
    assert (
        page.locator("#contents").is_visible()
        and page.get_by_text("This chart needs scripts").first.is_visible()
    )
    context.close()
