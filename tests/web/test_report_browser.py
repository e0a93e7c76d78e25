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
    for name, parts in (("plain", calm), ("hostile", fixture.make_hostile())):
        paths[name] = folder / f"{name}.html"
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
        self.page.wait_for_function(
            "[...document.querySelectorAll('[data-chart]')].every(f => f.matches('.drawn'))"
        )

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()


@pytest.mark.parametrize("name", ["plain", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_opens_draws_and_fits(browser: Any, pages: dict[str, Path], name: str, scheme: str) -> None:
    with Opened(browser, pages[name], scheme=scheme) as opened:
        page = opened.page
        assert opened.complaints == []
        assert [url for url in opened.requests if not url.startswith(("file:", "data:"))] == []
        assert page.locator("figure svg").count() == 5
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


def test_hostile_text_stays_text_when_touched(browser: Any, pages: dict[str, Path]) -> None:
    with Opened(browser, pages["hostile"]) as opened:
        page = opened.page
        for tab in page.get_by_role("tab").all():
            tab.click()
        page.locator("[data-chart=overlap] .mark-symbol path").first.hover(force=True)
        page.mouse.move(300, 300)
        page.keyboard.press("Tab")
        assert page.evaluate("window.__pwned") is None and opened.complaints == []
        assert page.locator("main img, main script, header script, header img").count() == 0


def test_the_policy_stops_what_slips_in(browser: Any, pages: dict[str, Path], tmp_path: Path) -> None:
    planted = pages["plain"].read_text("utf-8").replace("<main>", "<main><script>window.__pwned=1</script>")
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
