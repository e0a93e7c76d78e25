"""The app in a real browser: search, latents, own text, steering, training; hostile text; keyboard and contrast."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import app_world as world
from latents_fixture import make_examples, make_labels
from palimpsest.artifacts import RunFolder
from palimpsest.web import ServeConfig
from palimpsest.web.bench import Bench
from palimpsest.web.server import serve

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
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("app-browser"))


@contextmanager
def served(root: Path, tools: world.StubTools | None = None, **options: Any) -> Iterator[str]:
    """The app at an address of its own, in a thread."""
    import uvicorn

    told: list[str] = []
    servers: list[uvicorn.Server] = []
    ready = threading.Event()

    class Kept(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

        def install_signal_handlers(self) -> None:  # only the main thread may
            pass

    def note(address: str) -> None:
        told.append(address)
        ready.set()

    bench = None if tools is None else Bench(lambda place: tools)
    config = ServeConfig(root=root, port=0, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(uvicorn, "Server", Kept)
        thread = threading.Thread(target=serve, args=(config, note), kwargs={"bench": bench}, daemon=True)
        thread.start()
        assert ready.wait(20)
        while not (servers and servers[0].started):
            time.sleep(0.02)
    yield told[0]
    servers[0].should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def address(root: Path) -> Iterator[str]:
    with served(root, world.StubTools()) as told:
        yield told


def until(page: Any, expression: str, arg: Any = None) -> None:
    """Wait for something on the page; its own policy lets Playwright evaluate no text inside of it."""
    for _ in range(300):
        with suppress(sync_api.Error):  # the page was left while it was asked
            if page.evaluate(expression, arg):
                return
        time.sleep(0.05)
    raise AssertionError(f"never: {expression}")


class Opened:
    """A page of the app, with everything that it complained about or asked for elsewhere."""

    def __init__(
        self,
        browser: Any,
        address: str,
        path: str = "",
        width: int = 1440,
        scheme: str = "light",
        **options: Any,
    ) -> None:
        self.base = address.partition("/?")[0]
        context = browser.new_context(
            color_scheme=scheme, viewport={"width": width, "height": 900}, **options
        )
        self.page = context.new_page()
        self.complaints: list[str] = []
        self.foreign: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._asked)
        self.page.goto(address)
        if path:
            self.page.goto(self.base + path)

    def _asked(self, request: Any) -> None:
        if not request.url.startswith((self.base + "/", "data:")):
            self.foreign.append(request.url)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.context.close()


def run_ids(browser: Any, address: str) -> dict[str, str]:
    with Opened(browser, address) as opened:
        links = opened.page.locator(".runs th a").evaluate_all(
            "all => all.map(a => [a.textContent, a.pathname])"
        )
        return {name: path.rpartition("/")[2] for name, path in links}


@pytest.fixture(scope="module")
def runs(browser: Any, address: str) -> dict[str, str]:
    return run_ids(browser, address)


def every_page(runs: dict[str, str]) -> list[str]:
    examples = runs["examples"]
    return [
        "/",
        *(f"/run/{id}" for name, id in runs.items() if name != "audits/second"),
        f"/run/{examples}/latents?lo.rate_tuned=0.5",
        f"/run/{examples}/latent/4?at=2",
        f"/compare?a={runs['audits/first']}&b={runs['audits/second']}",
        "/text?follow=4",
        "/steer?latent=4&latent=6",
        "/live",
        f"/live/{runs['training']}",
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_page_opens_fits_and_can_be_read(
    browser: Any, address: str, runs: dict[str, str], scheme: str
) -> None:
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright", reason="axe-core is not installed"
    ).Axe()
    with Opened(browser, address, scheme=scheme) as opened:
        page = opened.page
        assert page.url == opened.base + "/" and not page.evaluate("document.cookie")
        for path in every_page(runs):
            page.goto(opened.base + path)
            until(page, "[...document.querySelectorAll('[data-chart]')].every(f => f.matches('.drawn'))")
            # The report's own tests look at its pages; here it is the app's.
            if not path.startswith(f"/run/{runs['audits/first']}"):
                assert serious(axe, page) == [], path
            for width in WIDTHS if scheme == "light" else WIDTHS[:1]:
                page.set_viewport_size({"width": width, "height": 900})
                page.wait_for_timeout(50)
                widest = page.evaluate(
                    "Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)"
                )
                assert widest <= width, f"{path} overflows at {width} px"
        assert opened.complaints == [] and opened.foreign == []


def serious(axe: Any, page: Any) -> list[tuple[str, list[str]]]:
    """What axe-core finds that keeps somebody out."""
    return [
        (one["id"], [node["html"][:160] for node in one["nodes"][:3]])
        for one in axe.run(page).response["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def test_a_stranger_sees_a_sentence(browser: Any, address: str) -> None:
    context = browser.new_context()
    page = context.new_page()
    answer = page.goto(address.partition("/?")[0])
    assert answer.status == 403 and "palimpsest serve" in page.inner_text("body")
    context.close()


def test_another_page_gets_nothing(browser: Any, address: str, tmp_path: Path) -> None:
    """A page of another origin in the same browser, with the cookie in place."""
    with Opened(browser, address) as opened:
        page = opened.page.context.new_page()
        page.goto("data:text/html,<title>other</title>")
        read = "url => fetch(url, {credentials: 'include'}).then(r => r.text(), e => 'refused')"
        assert page.evaluate(read, opened.base + "/") == "refused"
        options = "{method: 'POST', mode: 'no-cors', credentials: 'include', body: 'text=x'}"
        asked: list[int] = []
        page.on("response", lambda answer: asked.append(answer.status))
        page.evaluate(
            f"url => fetch(url, {options}).then(r => r.type, e => 'refused')", opened.base + "/text"
        )
        assert asked in ([], [403])
        framed = f"data:text/html,<iframe src='{opened.base}/'></iframe>"
        page.goto(framed)
        assert "examples" not in page.frames[-1].content()


def test_search_while_typing_and_by_keyboard(browser: Any, address: str, runs: dict[str, str]) -> None:
    with Opened(browser, address, f"/run/{runs['examples']}/latents") as opened:
        page = opened.page
        field = page.get_by_role("searchbox")
        assert field.evaluate("e => e === document.activeElement")
        before = page.locator(".browser tbody tr").count()
        page.keyboard.type("numbers in sums 3", delay=15)
        until(page, "document.querySelectorAll('.browser tbody tr').length === 1")
        assert "q=numbers" in page.url and before == 50
        assert "1 latent" in page.locator("#latents .count").inner_text()
        field.fill("")
        until(page, "document.querySelectorAll('.browser tbody tr').length === 50")
        field.focus()
        page.keyboard.press("ArrowDown")
        page.keyboard.press("ArrowDown")
        second = page.locator(".browser tbody th a").nth(1)
        assert second.evaluate("e => e === document.activeElement")
        number = second.inner_text()
        page.keyboard.press("Enter")
        page.wait_for_url("**/latent/**")
        assert page.locator("h1").inner_text().startswith(f"Latent {number}")
        page.keyboard.press("ArrowRight")
        until(page, "n => !document.querySelector('h1').innerText.startsWith('Latent ' + n)", arg=number)
        page.keyboard.press("ArrowLeft")
        until(page, "n => document.querySelector('h1').innerText.startsWith('Latent ' + n)", arg=number)
        assert opened.complaints == []


def test_columns_filters_and_pages_change_the_list_in_place(
    browser: Any, address: str, runs: dict[str, str]
) -> None:
    with Opened(browser, address, f"/run/{runs['examples']}/latents") as opened:
        page = opened.page
        page.evaluate("window.kept = true")
        head = page.get_by_role("columnheader", name="Tuned")
        head.get_by_role("link").click()
        until(page, "document.querySelector('th.tuned').getAttribute('aria-sort') === 'descending'")

        def column() -> list[float]:
            return [float(one.rstrip("%")) for one in page.locator("td.tuned").all_inner_texts()]

        assert column() == sorted(column(), reverse=True)
        assert page.locator("[name=sort]").input_value() == "rate_tuned"
        page.get_by_text("Filters", exact=False).first.click()
        page.get_by_label("Fires on, tuned, at least").fill("2")
        until(page, "!document.querySelector('#latents').innerText.includes('108 latents')")
        assert min(column()) >= 2
        page.get_by_label("Fires on, tuned, at least").fill("")
        page.locator("select[name^='is.']").first.select_option("tuned-only")
        until(
            page,
            "document.querySelector('#latents .count').innerText.startsWith('20 latents') || "
            "document.querySelector('#latents .count').innerText.startsWith('18 latents')",
        )
        page.locator("select[name^='is.']").first.select_option("")
        page.get_by_role("link", name="Further →").first.click()
        until(page, "document.querySelector('#latents .count').innerText.includes('51–100')")
        assert page.evaluate("window.kept") and opened.complaints == []


def test_without_scripts_forms_and_links_do(browser: Any, address: str, runs: dict[str, str]) -> None:
    with Opened(browser, address, f"/run/{runs['examples']}/latents", java_script_enabled=False) as opened:
        page = opened.page
        page.get_by_role("searchbox").fill("numbers")
        page.get_by_role("button", name="Find").click()
        assert "q=numbers" in page.url and page.locator(".browser tbody tr").count() == 5
        page.locator(".browser tbody th a").first.click()
        page.get_by_role("link", name="After →").click()
        assert "/latent/" in page.url
        page.get_by_role("link", name="Follow it over own text").click()
        page.locator("textarea").fill("words without scripts")
        page.get_by_role("button", name="Read it").click()
        page.wait_for_url("**/job/**")
        page.wait_for_timeout(300)
        page.reload()
        page.locator(".own-text .window a").nth(1).click()
        assert page.locator(".token-list").nth(1).is_visible()


def test_own_text_by_mouse_and_keyboard(browser: Any, address: str) -> None:
    with Opened(browser, address, "/text") as opened:
        page = opened.page
        page.locator("textarea").fill("three small words")
        page.get_by_role("button", name="Read it").click()
        page.wait_for_selector("#answer [data-over]")
        tokens = page.locator(".own-text .window a")
        tokens.nth(0).click()
        assert page.locator(".token-list:visible").count() == 1
        assert "three" in page.locator(".token-list:visible h3").inner_text()
        tokens.nth(0).focus()
        page.keyboard.press("ArrowRight")
        assert "small" in page.locator(".token-list:visible h3").inner_text()
        assert opened.complaints == []


def test_steering_in_the_form(browser: Any, root: Path) -> None:
    tools = world.StubTools()
    tools.go.clear()
    with served(root, tools) as address, Opened(browser, address, "/steer?latent=4") as opened:
        page = opened.page
        slider = page.locator(".slider").first
        slider.focus()
        page.keyboard.press("End")
        assert page.locator("[name=value]").first.input_value() == "10"
        page.locator("[name=value]").first.fill("25")
        assert slider.evaluate("e => Number(e.value)") == 25
        page.get_by_role("button", name="Another latent").click()
        page.locator("[name=latent]").nth(1).fill("6")
        page.locator("[name=mode]").nth(1).select_option("ablate")
        assert page.locator("[name=value]").nth(1).is_disabled()
        page.get_by_role("button", name="Another latent").click()
        page.locator("[name=latent]").nth(2).fill("7")
        page.get_by_label("base model").check()
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector(".job.running, .job.loading")
        tools.go.set()
        page.wait_for_selector("#answer [data-over]")
        assert tools.asked[-1]["changes"] == ("4:scale=25", "6:ablate", "7:scale=4")
        assert tools.asked[-1]["side"] == "base"
        assert "base writes <b>on</b>" in page.locator(".written.steered").inner_text()
        assert page.locator(".prose-text b").count() == 0
        tools.go.clear()
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector(".job.running")
        page.get_by_role("button", name="Cancel").click()
        page.wait_for_timeout(200)
        tools.go.set()
        page.wait_for_selector(".job.cancelled")
        assert page.get_by_role("button", name="Cancel").count() == 0
        assert opened.complaints == []


def test_training_is_drawn_again(browser: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.web.pages.live.EVERY", 150)
    run = world.make_training(tmp_path / "run", 3, finished=False)
    assert run is not None
    with served(tmp_path) as address:
        id = run_ids(browser, address)["run"]
        with Opened(browser, address, f"/live/{id}") as opened:
            page = opened.page
            assert "300 of 10k" in page.locator("#progress").inner_text()
            world.report(run, range(4, 31))
            until(page, "document.querySelector('#progress').innerText.includes('3k of 10k')")
            assert page.locator("#progress svg").count() == 4
            run.finish()
            until(page, "document.querySelector('#progress').innerText.includes('Finished')")
            assert opened.complaints == []


def test_hostile_text_stays_text(browser: Any, tmp_path: Path) -> None:
    make_examples(tmp_path / "ex", n_latents=40, hostile=True)
    make_labels(tmp_path / "labels", [0, 1, 2], hostile=True)
    with RunFolder(
        tmp_path / "<img src=x onerror=window.__pwned=1>", stage="</script>", config={}, inputs={}
    ) as run:
        run.finish(summary="<script>window.__pwned=1</script>")
    with served(tmp_path, world.StubTools()) as address, Opened(browser, address) as opened:
        page = opened.page
        links = page.locator(".runs th a").evaluate_all("all => all.map(a => a.pathname)")
        assert len(links) == 3
        paths = ["/", *links, "/steer?latent=0"]
        listed = page.locator("a", has_text="Browse latents").get_attribute("href") or ""
        paths += [
            listed,
            f"{listed}?q=script",
            listed.replace("latents", "latent/0"),
            listed.replace("latents", "latent/1"),
        ]
        for path in paths:
            page.goto(opened.base + path)
            assert page.evaluate("window.__pwned") is None, path
            assert page.locator("main img, main script, header script, header img").count() == 0, path
        page.goto(opened.base + "/text")
        page.locator("textarea").fill(
            "</textarea><script>window.__pwned=1</script> <img/src=x/onerror=window.__pwned=1>"
        )
        page.get_by_role("button", name="Read it").click()
        page.wait_for_selector("#answer [data-over]")
        page.locator(".own-text .window a").first.click()
        assert page.evaluate("window.__pwned") is None and page.locator("textarea").input_value().startswith(
            "</textarea>"
        )
        assert opened.complaints == [] and opened.foreign == []


def test_a_server_that_ends_is_noticed(browser: Any, root: Path) -> None:
    with served(root) as address:
        id = run_ids(browser, address)["examples"]
        opened = Opened(browser, address, f"/run/{id}/latents")
    with opened:
        opened.page.get_by_role("searchbox").fill("river")
        until(opened.page, "document.querySelector('#latents').innerText.includes('does not answer')")


def test_steering_round_trip_with_the_zoo(browser: Any, tmp_path: Path, zoo: Path) -> None:
    """The real base, a random dictionary on it: the form, the models, the three texts."""
    import torch

    from palimpsest.dictionaries import Dictionary

    width = json.loads((zoo / "base" / "config.json").read_text())["hidden_size"]
    torch.manual_seed(0)
    dictionary = Dictionary(width, 64, k=8, metadata={"site": "resid_post.1", "model": str(zoo / "base")})
    dictionary.save_pretrained(tmp_path / "dictionary")
    (tmp_path / "runs").mkdir()
    options = {"model": True, "base": str(zoo / "base"), "dictionary": str(tmp_path / "dictionary")}
    with (
        served(tmp_path / "runs", **options) as address,
        Opened(browser, address, "/steer?latent=3") as opened,
    ):
        page = opened.page
        page.locator("[name=mode]").select_option("clamp")
        page.locator("[name=value]").fill("400")
        page.get_by_label("New tokens").fill("8")
        page.get_by_role("button", name="Write").click()
        page.wait_for_selector("#answer [data-over]", timeout=60_000)
        assert page.locator(".job.done").count() == 1, page.locator(".job").inner_text()
        base, steered = (page.locator(f".written.{name} ins").inner_text() for name in ("base", "steered"))
        assert base and steered and base != steered
        page.goto(opened.base + "/text")
        page.locator("textarea").fill("The river runs past the mill.")
        page.get_by_role("button", name="Read it").click()
        page.wait_for_selector("#answer [data-over]", timeout=60_000)
        assert page.locator(".own-text .window a").count() > 5
        assert opened.complaints == [] and opened.foreign == []
