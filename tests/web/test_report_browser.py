"""The report in a real browser, from a file, with the network off."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import audit_fixture as fixture
from palimpsest.report import render

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
WIDTHS = (390, 900, 1440)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("report")
    calm = fixture.make_audit(), fixture.make_curve(), fixture.make_latents()
    paths = {}
    audit = fixture.make_audit(calibrated=True)
    audit["calibration"]["spectrum"] = fixture.make_spectrum()
    made = {
        "plain": calm,
        "hostile": fixture.make_hostile(),
        "verdicts": (audit, *calm[1:]),
        "hostile verdicts": fixture.make_hostile(calibrated=True),
    }
    for name, parts in made.items():
        paths[name] = folder / f"{name.replace(' ', '-')}.html"
        paths[name].write_text(render(*parts), "utf-8")
    return paths


class Opened:
    """A page of an offline browser, with everything that it complained about or asked for."""

    def __init__(self, browser: Any, path: Path, width: int = 1440, scheme: str = "light") -> None:
        context = browser.new_context(
            offline=True, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.as_uri())
        # Charts are drawn after the page is shown; the policy forbids a condition that the page would evaluate.
        self.page.wait_for_selector("[data-chart]:not(.drawn)", state="detached")

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()


@pytest.mark.parametrize("name", ["plain", "hostile", "verdicts", "hostile verdicts"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_draws_and_fits(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    with Opened(browser, pages[name], scheme=scheme) as opened:
        page = opened.page
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
        assert page.locator("figure svg").count() == (7 if "verdicts" in name else 5)
        assert page.locator("[data-chart=overlap] svg .mark-line path").count() == 4
        assert page.locator("[data-chart=overlap] svg .mark-area path").count() == 4
        assert page.evaluate("window.__pwned") is None
        for width in WIDTHS:
            page.set_viewport_size({"width": width, "height": 900})
            page.wait_for_timeout(150)
            widest = page.evaluate(
                "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
            )
            assert widest <= width, f"{name} overflows at {width} px"


@pytest.mark.parametrize("name", ["hostile", "hostile verdicts"])
def test_hostile_text_stays_text_when_touched(browser: Any, pages: dict[str, Path], name: str) -> None:
    with Opened(browser, pages[name]) as opened:
        page = opened.page
        for mark in page.locator("[data-chart=nulls_features] .mark-symbol path").all()[:3]:
            mark.hover(force=True)
        for tab in page.get_by_role("tab").all():
            tab.click()
        page.locator("[data-chart=overlap] .mark-symbol path").first.hover(force=True)
        page.mouse.move(300, 300)
        page.keyboard.press("Tab")
        assert page.evaluate("window.__pwned") is None and opened.complaints == []
        assert page.locator("main img, main script, header script, header img").count() == 0


def test_the_policy_stops_what_slips_in(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    mark, script = '<main id="content">', "<script>window.__pwned=1</script>"
    planted = pages["plain"].read_text("utf-8").replace(mark, mark + script)
    (tmp_path / "planted.html").write_text(planted, "utf-8")
    with Opened(browser, tmp_path / "planted.html") as opened:
        assert opened.page.evaluate("window.__pwned") is None
        assert "Content Security Policy" in " ".join(opened.complaints)


def _column(page: Any, column: int) -> list[str]:
    return page.evaluate(
        "c => [...document.querySelector('.latents').tBodies].map(b => b.rows[0].cells[c].dataset.sort)",
        column,
    )


@pytest.mark.parametrize(("name", "column"), [("Latent", 0), ("Entered", 3), ("Change", 6), ("q", 7)])
def test_columns_sort_both_ways_with_missing_values_last(
    browser: Any, pages: dict[str, Path], name: str, column: int
) -> None:
    with Opened(browser, pages["plain"]) as opened:
        panel = opened.page.locator("#latents-1")
        head = panel.get_by_role("columnheader", name=name, exact=True)
        for order, sign in (("descending", -1), ("ascending", 1)):
            head.get_by_role("button").press("Enter")
            assert head.get_attribute("aria-sort") == order
            values = _column(opened.page, column)
            known = [float(value) for value in values if value]
            assert known == sorted(known, key=lambda value: sign * value) and len(known) > 10
            assert all(values[: len(known)]) and not any(values[len(known) :])


def test_keyboard_moves_through_the_tabs(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["plain"]) as opened:
        page = opened.page
        page.get_by_role("tab", name="math").focus()
        page.keyboard.press("ArrowRight")
        assert page.get_by_role("tab", name="code").get_attribute("aria-selected") == "true"
        assert page.locator("#latents-2").is_visible() and not page.locator("#latents-1").is_visible()


def test_examples_open_and_show_both_models(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["plain"]) as opened:
        details = opened.page.locator("#latents-1 details").first
        hidden = details.locator(":scope > .example").first
        assert not hidden.is_visible()
        details.locator("summary").click()
        assert hidden.is_visible() and hidden.locator(".acts .base").inner_text().replace(".", "").isdigit()


def test_print_shows_every_corpus_on_white(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["plain"], scheme="dark") as opened:
        opened.page.emulate_media(media="print", color_scheme="dark")
        assert all(panel.is_visible() for panel in opened.page.locator(".panel").all())
        assert opened.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_without_scripts_the_numbers_are_there(browser: Any, pages: dict[str, Path]) -> None:
    context = browser.new_context(offline=True, java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["plain"].as_uri())
    assert all(panel.is_visible() for panel in page.locator(".panel").all())
    assert page.locator(".tasks tbody tr").count() == 3
    assert page.get_by_text("This chart needs scripts").first.is_visible()
    context.close()


def _luminance(colour: list[int]) -> float:
    parts = [c / 255 for c in colour]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_verdicts_are_words_that_can_be_read(browser: Any, pages: dict[str, Path], scheme: str) -> None:
    with Opened(browser, pages["verdicts"], scheme=scheme) as opened:
        page = opened.page
        words = [text.split(maxsplit=1)[1] for text in page.locator(".verdicts .badge").all_inner_texts()]
        assert words == ["undeclared", "declared and seen", "damaged", "clear"]
        colours = page.evaluate(
            """() => [...document.querySelectorAll('.verdicts .badge')].map(badge => {
                const parse = text => text.match(/[\\d.]+/g).map(Number);
                let back = badge, fill = [0, 0, 0, 0];
                while (fill[3] === 0) {
                    fill = parse(getComputedStyle(back).backgroundColor);
                    if (fill.length === 3) fill.push(1);
                    back = back.parentElement;
                }
                return [parse(getComputedStyle(badge).color).slice(0, 3), fill.slice(0, 3)];
            })"""
        )
        for ink, fill in colours:
            low, high = sorted((_luminance(ink), _luminance(fill)))
            assert (high + 0.05) / (low + 0.05) >= 4.5
        assert len({str(fill) for _, fill in colours}) >= 3


def test_the_strips_show_every_null_the_suspect_and_its_band(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["verdicts"]) as opened:
        for name in ("nulls_features", "nulls_loss"):
            figure = opened.page.locator(f"[data-chart={name}]")
            marks = figure.locator("svg .mark-symbol.role-mark > path")
            # 24 nulls and the suspect on each of four corpora.
            assert marks.count() == 4 * 25
            assert figure.locator("svg .mark-symbol.role-mark > path[opacity='0.4']").count() == 4 * 6
            rows = figure.locator("svg .mark-rect.role-mark > path")
            heights = rows.evaluate_all("all => all.map(path => path.getBBox().height)")
            assert len([h for h in heights if h >= 35]) >= 4
            spoken = figure.locator(".plot").get_attribute("aria-label")
            assert spoken is not None and "math" in spoken and "innocent" in spoken


def test_verdicts_stand_on_the_first_screen_and_on_paper(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["verdicts"], scheme="dark") as opened:
        page = opened.page
        page.set_viewport_size({"width": 1280, "height": 800})
        last = page.locator(".verdicts li").last.bounding_box()
        assert last is not None and last["y"] + last["height"] <= 800
        page.get_by_role("link", name="What this rests on").click()
        top = page.locator("#calibration").bounding_box()
        assert top is not None and 0 <= top["y"] < 100
        page.get_by_text("z of the features at every site and k").click()
        assert page.locator("table.grid tbody tr").count() == 4
        page.emulate_media(media="print", color_scheme="dark")
        assert page.locator(".verdicts li").count() == 4 and page.locator("#verdict").is_visible()
