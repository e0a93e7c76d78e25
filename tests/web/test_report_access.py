"""Nothing on a merged report is in a reader's way: axe-core finds no serious fault, light or dark, wide or narrow."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from palimpsest.report.build import Report
from report_pages import ARGUMENTS, Opened, merged_paths

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
axe_api = pytest.importorskip("axe_playwright_python.sync_playwright", reason="axe is not installed")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("access")
    path = folder / "merged.html"
    path.write_text(Report.of(merged_paths(folder / "in")).html(), "utf-8")
    return path


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_nothing_serious_stands_in_the_way_of_anyone(
    browser: Any, merged: Path, scheme: str, width: int
) -> None:
    with Opened(browser, merged, width, scheme) as opened:
        _check(opened.page)


def _check(page: Any) -> None:
    # The drawings are pictures to a reader, who hears their labels.
    assert _serious(page, {"exclude": [[".plot"]]}) == []
    page.locator(".data a[href^='#latent-']").first.click()
    assert _serious(page, {"include": [["dialog"]]}) == []


def _serious(page: Any, part: dict[str, Any]) -> list[tuple[str, str]]:
    rules = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
    results = axe_api.Axe().run(page, part, {"resultTypes": ["violations"], "runOnly": rules})
    found = results.response["violations"]
    return [
        (one["id"], node["html"][:160])
        for one in found
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"][:3]
    ]


def test_a_fault_is_found(browser: Any, merged: Path, tmp_path: Path) -> None:
    mark = '<main id="content">'
    worse = merged.read_text("utf-8").replace(mark, mark + '<button type="button"></button>')
    (tmp_path / "worse.html").write_text(worse, "utf-8")
    with Opened(browser, tmp_path / "worse.html") as opened:
        assert [name for name, _ in _serious(opened.page, {"include": [["main > button"]]})] == [
            "button-name"
        ]
