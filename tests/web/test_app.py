"""The app without a browser: who gets in, what is refused, what a folder in any state looks like."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import app_world as world
from helpers import REPOSITORY
from latents_fixture import make_examples, make_labels
from palimpsest.artifacts import RunFolder
from palimpsest.errors import ConfigError
from palimpsest.latents import LatentIndex, Query
from palimpsest.options import ModelOptions
from palimpsest.web import ServeConfig
from palimpsest.web.bench import MOST_WAITING
from palimpsest.web.plots import Line, plot

OWN = {"Sec-Fetch-Site": "same-origin"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    return world.client_of(world.app_of(root))


def ids(client: Any) -> dict[str, str]:
    """Ids of the runs by their names."""
    found = re.findall(r'href="/run/([0-9a-f]{12})"><bdi>([^<]*)</bdi>', client.get("/").text)
    return {name: id for id, name in found}


def latents_on(page: str) -> list[int]:
    return [int(one) for one in re.findall(r'/latent/(\d+)\?[^"]*at=', page)]


def words(page: str) -> str:
    """The text of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


# the door


@pytest.mark.parametrize(
    "path", ["/", "/run/0", "/static/app.css", "/nowhere", "/text", "/?token=", "/?token=x"]
)
def test_without_the_token_nothing_is_told(root: Path, path: str) -> None:
    stranger = world.client_of(world.app_of(root), entered=False)
    answer = stranger.get(path)
    assert answer.status_code == 403 and "examples" not in answer.text
    assert "set-cookie" not in answer.headers
    assert stranger.get("/").status_code == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(root: Path) -> None:
    client = world.client_of(world.app_of(root), entered=False)
    answer = client.get(f"/live?token={world.TOKEN}")
    assert answer.status_code == 303 and answer.headers["location"] == "/live"
    cookie = answer.headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=Strict" in cookie and world.TOKEN not in cookie
    assert client.get("/live").status_code == 200
    other = world.client_of(world.app_of(root), entered=False)
    other.cookies.set("palimpsest-8765", "guessed")
    assert other.get("/").status_code == 403
    # The cookie of one server does not open another.
    other.cookies.set("palimpsest-8765", client.cookies["palimpsest-8765"])
    assert other.get("/").status_code == 403


def test_the_first_address_leads_nowhere_else(root: Path) -> None:
    client = world.client_of(world.app_of(root), entered=False)
    answer = client.get(f"http://{world.HOST}//evil.example/x?token={world.TOKEN}")
    assert answer.headers["location"] in ("/", "/evil.example/x")
    # From a link in another page the cookie would not be sent along a redirect: our own page goes on.
    answer = client.get(f"/?token={world.TOKEN}", headers={"Sec-Fetch-Site": "cross-site"})
    assert answer.status_code == 200 and 'url=/"' in answer.text and world.TOKEN not in answer.text


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example:8765"},
        {"Host": "127.0.0.1"},
        {"Host": "127.0.0.1:80"},
        {"Host": "127.0.0.1.evil.example:8765"},
        {"Host": "localhost:8765@evil.example"},
        {"Host": ""},
        {"Origin": "http://evil.example"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Origin": "null"},
        {"Origin": "https://127.0.0.1:8765"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
)
def test_a_foreign_request_gets_nothing_even_with_the_cookie(client: Any, headers: dict[str, str]) -> None:
    answer = client.get("/", headers=headers)
    assert answer.status_code == 403 and "examples" not in answer.text
    assert "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["localhost:8765", "[::1]:8765", "LOCALHOST:8765"])
def test_this_machine_has_several_names(client: Any, host: str) -> None:
    assert client.get("/live", headers={"Host": host}).status_code == 200


def test_what_is_sent_says_where_it_comes_from(root: Path) -> None:
    client = world.client_of(world.app_of(root, world.StubTools()))
    fields = {"text": "some text"}
    assert client.post("/text", data=fields).status_code == 403
    assert client.post("/text", data=fields, headers={"Origin": "null"}).status_code == 403
    for headers in (OWN, OWN | {"Origin": "null"}, {"Origin": f"http://{world.HOST}"}):
        assert client.post("/text", data=fields, headers=headers).status_code == 303
    for method in ("PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"):
        assert client.request(method, "/", headers=OWN).status_code == 405
    assert client.post("/", headers=OWN, data=fields).status_code == 405


@pytest.mark.parametrize("path", ["/", "/nowhere", "/static/app.js", "/?token=wrong"])
def test_every_answer_says_what_it_may_do(client: Any, path: str) -> None:
    headers = client.get(path).headers
    policy = headers["content-security-policy"]
    assert (
        "default-src 'none'" in policy
        and "frame-ancestors 'none'" in policy
        and "script-src 'self';" in policy
    )
    assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
    assert "server" not in headers and "x-powered-by" not in headers


def test_pages_hold_no_inline_script(client: Any) -> None:
    for path in ["/", *(f"/run/{id}" for id in ids(client).values())]:
        page = client.get(path).text
        scripts = re.findall(r"<script([^>]*)>", page)
        assert all("src=" in one or 'type="application/json"' in one for one in scripts), path
        assert not re.search(r"\son\w+\s*=", re.sub(r"<script.*?</script>", "", page, flags=re.S)), path
        assert not re.search(r'(src|href)="(https?:)?//', page), path


# limits


def test_long_and_strange_questions_are_refused(client: Any) -> None:
    latents = f"/run/{ids(client)['examples']}/latents"
    wanted = {
        f"{latents}?q={'x' * 201}": 413,
        f"{latents}?q={'x' * 4001}": 414,
        f"/{'x' * 500}": 414,
        f"{latents}?{'&'.join(['a=1'] * 300)}": 400,
        f"{latents}?sort=label": 400,
        f"{latents}?sort=__class__": 400,
        f"{latents}?lo.rate=nan": 400,
        f"{latents}?lo.rate=1e999": 400,
        f"{latents}?hi.nothing=3": 400,
        f"{latents}?is.rate=3": 400,
        f"{latents}?page=0": 400,
        f"{latents}?page=1.5": 400,
        f"{latents}?page=99999": 200,
        f"{latents}?q=%00%ff%f0%9f%98%80": 200,
        f"{latents}?q=%2528(": 200,
        f"{latents}?unknown=field": 200,
    }
    for path, status in wanted.items():
        answer = client.get(path)
        assert answer.status_code == status, (path[:80], answer.status_code)
        assert "Traceback" not in answer.text and ".py" not in answer.text


def test_what_is_sent_has_limits(root: Path) -> None:
    tools = world.StubTools()
    client = world.client_of(world.app_of(root, tools))

    def send(path: str, **fields: str) -> tuple[int, str]:
        answer = client.post(path, data=fields, headers=OWN)
        return answer.status_code, words(answer.text)

    assert send("/text", text="x" * 300_000)[0] == 413
    assert send("/text", text="x" * 30_000)[0] == 413
    assert send("/text", text=" \n ")[0] == 400
    assert send("/text", text="a", follow="-1")[0] == 400
    assert send("/text", text="a", follow="٣")[0] == 400
    assert send("/text", text="a", on="nothing")[0] == 404
    assert send("/steer", prompt="")[0] == 400
    assert send("/steer", prompt="a", max_new_tokens="100000")[0] == 400
    assert send("/steer", prompt="a", temperature="-1")[0] == 400
    assert send("/steer", prompt="a", side="other")[0] == 400
    assert send("/steer", prompt="a", latent="1", mode="explode", value="1")[0] == 400
    assert send("/steer", prompt="a", latent="1", mode="scale", value="1e300")[0] == 400
    assert send("/steer", prompt="a", latent="1", mode="scale", value="")[0] == 400
    assert tools.asked == []
    answer = client.post("/text", content=b"{}", headers=OWN | {"Content-Type": "application/json"})
    assert answer.status_code == 400


@pytest.mark.parametrize(
    "path",
    [
        "/run/../../etc/passwd",
        "/run/..%2f..%2fetc%2fpasswd",
        "/run/%2e%2e",
        "/run/%2fetc%2fpasswd",
        "/run/....//",
        "/run/examples",
        "/static/../app.py",
        "/static/..%2fapp.py",
        "/static/app.css%00.py",
        "/static/app.py",
        "/live/%2e%2e%2f%2e%2e",
        "/job/..%2f..",
        "/run/C:\\windows",
    ],
)
def test_addresses_are_no_paths(client: Any, path: str) -> None:
    answer = client.get(path)
    assert answer.status_code in (404, 403) and "root:" not in answer.text and "import" not in answer.text


# folders in any state


def test_the_list_has_every_run_once(client: Any) -> None:
    assert set(ids(client)) == {
        "examples",
        "labels",
        "diffs/one",
        "audits/first",
        "audits/second",
        "training",
    }
    assert len(set(ids(client).values())) == 6
    part = client.get("/?q=diff", headers={"X-Fragment": "1"}).text
    assert "<html" not in part and "diffs/one" in part and "audits/first" not in part
    assert "No run holds this text" in client.get("/?q=zzzz").text


def test_links_that_leave_the_folder_lead_nowhere(tmp_path: Path) -> None:
    outside = make_examples(tmp_path / "outside", n_latents=20)
    served = tmp_path / "served"
    inside = make_examples(served / "inside", n_latents=20)
    (served / "linked").symlink_to(outside)
    (served / "half").mkdir()
    (served / "half" / "manifest.json").symlink_to(outside / "manifest.json")
    client = world.client_of(world.app_of(served))
    assert set(ids(client)) == {"inside"}
    path = f"/run/{ids(client)['inside']}/latents"
    assert client.get(path).status_code == 200
    (inside / "examples.parquet").unlink()
    (inside / "examples.parquet").symlink_to(outside / "examples.parquet")
    stranger = world.client_of(world.app_of(served))
    answer = stranger.get(path)
    assert answer.status_code == 410 and "link" in answer.text


def test_unfinished_damaged_and_foreign_folders(tmp_path: Path) -> None:
    running = RunFolder(tmp_path / "running", stage="examples", config={}, inputs={})
    for name, text in {"cut": '{"schema": 1, "sta', "deep": "[" * 100_000, "newer": '{"schema": 99}'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "manifest.json").write_text(text)
    (tmp_path / "extension").mkdir()
    (tmp_path / "extension" / "manifest.json").write_text(
        '{"name": "another program", "manifest_version": 3}'
    )
    broken = make_examples(tmp_path / "broken", n_latents=20)
    (broken / "latents.parquet").write_bytes(b"PAR1 and nothing else")
    about = make_examples(tmp_path / "about", n_latents=20)
    (about / "examples.json").write_text("[]")
    client = world.client_of(world.app_of(tmp_path))
    found = ids(client)
    assert set(found) == {"running", "cut", "deep", "newer", "broken", "about"}
    for name in ("running", "cut", "deep", "newer"):
        answer = client.get(f"/run/{found[name]}")
        assert answer.status_code == 200, name
        assert ("not finished" if name == "running" else "damaged") in client.get(
            f"/?q={name}"
        ).text + answer.text
        assert client.get(f"/run/{found[name]}/latents").status_code == 404
    for name in ("broken", "about"):
        assert client.get(f"/run/{found[name]}/latents").status_code == 410
        assert client.get(f"/run/{found[name]}/latent/3").status_code == 410
        assert client.get(f"/run/{found[name]}").status_code == 200
    running.close()


def test_an_empty_folder_says_what_to_run(tmp_path: Path) -> None:
    client = world.client_of(world.app_of(tmp_path))
    assert "palimpsest audit" in client.get("/").text
    assert "palimpsest train" in client.get("/live").text
    assert "palimpsest audit" in client.get("/compare").text
    assert "--model" in client.get("/text").text and "--model" in client.get("/steer").text
    assert client.post("/text", data={"text": "a"}, headers=OWN).status_code == 404
    client = world.client_of(world.app_of(tmp_path, world.StubTools()))
    assert "palimpsest examples" in client.get("/steer").text


def test_a_run_that_goes_away_while_it_is_read(tmp_path: Path) -> None:
    for name in ("kept", "gone"):
        make_examples(tmp_path / name, n_latents=60)
    client = world.client_of(world.app_of(tmp_path))
    found = ids(client)
    seen: list[tuple[str, int]] = []
    go = threading.Event()

    def ask(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not go.is_set():
            name = ("kept", "gone")[int(rng.integers(2))]
            path = [
                f"/run/{found[name]}/latents?q=river",
                f"/run/{found[name]}/latent/{rng.integers(60)}",
                f"/run/{found[name]}",
                "/",
            ][int(rng.integers(4))]
            seen.append((name if path != "/" else "list", client.get(path).status_code))

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for one in threads:
        one.start()
    time.sleep(0.4)
    shutil.rmtree(tmp_path / "gone")
    time.sleep(0.4)
    go.set()
    for one in threads:
        one.join()
    assert {status for name, status in seen if name == "gone"} <= {200, 404, 410}
    assert {status for name, status in seen if name == "kept"} <= {200, 404}
    assert {status for name, status in seen if name == "list"} <= {200}
    assert client.get(f"/run/{found['gone']}/latents").status_code in (404, 410)
    assert client.get(f"/run/{found['kept']}/latents").status_code == 200


def test_a_run_that_is_made_again_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("palimpsest.web.runs.RESCAN_SECONDS", 0.0)
    make_examples(tmp_path / "run", n_latents=20)
    client = world.client_of(world.app_of(tmp_path))
    path = f"/run/{ids(client)['run']}/latents"
    assert "18 latents" in client.get(path).text
    shutil.rmtree(tmp_path / "run")
    make_examples(tmp_path / "run", n_latents=40, seed=1)
    assert "36 latents" in client.get(path).text
    make_labels(tmp_path / "labels", [3])
    assert "numbers in sums" in client.get(f"{path}?q=numbers").text


def test_nothing_in_the_folder_changes(root: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(one): (one.stat().st_mtime_ns, one.stat().st_size) for one in sorted(root.rglob("*"))}

    before = state()
    client = world.client_of(world.app_of(root, world.StubTools()))
    found = ids(client)
    for path in [
        "/",
        "/text",
        "/steer",
        "/live",
        f"/live/{found['training']}",
        *(f"/run/{id}" for id in found.values()),
    ]:
        assert client.get(path).status_code == 200
    client.get(f"/run/{found['examples']}/latent/3")
    client.get(f"/compare?a={found['audits/first']}&b={found['audits/second']}")
    job = client.post("/text", data={"text": "one two"}, headers=OWN).headers["location"]
    done(client, job)
    assert state() == before


@pytest.mark.parametrize("kind", ["sae", "crosscoder", "diff"])
def test_hostile_text_is_only_text(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "<img src=x onerror=alert(1)>"
    make_examples(folder / "ex", n_latents=60, hostile=True, kind=kind)
    make_labels(folder / "labels", [0, 1, 2], hostile=True)
    if kind == "sae":
        world.make_audit(folder / "audit", hostile=True)
    with RunFolder(folder / "other", stage="</script><script>", config={"<b>": "<i>"}, inputs={}) as run:
        run.finish(summary="</td><script>window.__pwned=1</script>\u202e\x1b[31m{{ 7*7 }}")
    tools = world.StubTools()
    client = world.client_of(world.app_of(tmp_path, tools))
    listed = client.get("/").text
    runs = sorted(set(re.findall(r"/run/([0-9a-f]{12})", listed)))
    assert len(runs) == 3 + (kind == "sae")
    pages = ["/", f"/compare?a={runs[0]}&b={runs[1]}", "/steer?latent=0", "/text?follow=0"]
    pages += [f"/run/{one}" for one in runs]
    browsable = [one for one in runs if f"/run/{one}/latents" in listed]
    pages += [f"/run/{one}/latents" for one in browsable]
    pages += [f"/run/{one}/latent/{latent}" for one in browsable for latent in (0, 1, 2)]
    pages.append(
        done(client, send(client, "/text", text="<script>window.__pwned=1</script> \u202e{{ 7*7 }}"))
    )
    pages.append(
        done(client, send(client, "/steer", prompt="</textarea><script>1</script>", latent="0", value="2"))
    )
    for path in pages:
        answer = client.get(path)
        page = answer.text
        assert answer.status_code == 200, path
        assert "<script>window" not in page and "<script>1" not in page and "<img src=x" not in page, path
        assert not {"\u202e", "\u2066", "\u200b", "\x1b", "\x00"} & set(page.replace(_fields(page), "")), path
        assert "<b>" not in page or "<b>on</b>" not in page, path
        assert "javascript:alert" not in re.sub(r">[^<]*<", "><", page), path
    assert all("</script><script>" not in client.get(path).text for path in pages)


def _fields(page: str) -> str:
    """What the reader typed goes back into its field as it was."""
    found = re.search(r"<textarea[^>]*>(.*?)</textarea>", page, re.S)
    return found[1] if found else "\n\n"


# latents


def test_search_filters_and_order_are_those_of_the_table(client: Any, root: Path) -> None:
    address = f"/run/{ids(client)['examples']}/latents"
    index = LatentIndex.open(root / "examples")
    base, tuned = index.values("rate_base"), index.values("rate_tuned")
    rows = {int(one): at for at, one in enumerate(index.latents)}
    shown = latents_on(
        client.get(f"{address}?lo.rate_tuned=1&hi.rate_base=2&sort=rate_change&order=asc").text
    )
    fits = [one for one, at in rows.items() if tuned[at] >= 0.01 and base[at] <= 0.02]
    fits.sort(key=lambda one: (tuned[rows[one]] - base[rows[one]], one))
    assert shown == fits[:50] and 5 < len(fits) < len(index)
    both = client.get(f"{address}?is.diffs/one: class=tuned-only&sort=latent").text
    assert latents_on(both) == [one for one in rows if one % 6 == 0]
    joined = latents_on(client.get(f"{address}?sort=diffs/one: Δnorm&order=desc").text)
    known = sorted((one for one in rows if one % 2 == 0), reverse=True)
    # Latents that the diff does not know come last.
    assert joined == known[:50] and len(known) >= 50
    assert latents_on(client.get(f"{address}?q=7").text) == [7]
    assert (
        latents_on(client.get(f"{address}?q=NUMBERS in").text)
        and "No alive latent" in client.get(f"{address}?q=zz").text
    )
    pages = [latents_on(client.get(f"{address}?sort=latent&page={n}").text) for n in (1, 2, 3)]
    assert sum(pages, []) == list(rows)


def test_a_joined_column_belongs_to_its_latents(tmp_path: Path) -> None:
    index = LatentIndex.open(make_examples(tmp_path / "run", n_latents=30))
    index.join("there", np.array([2, 9, 28, 500]), [0.5, 1.0, None, 2.0])
    index.join("word", np.array([3, 2]), ["b", "a"])
    found = {row["latent"]: (row["there"], row["word"]) for row in index.search(Query(limit=99)).rows}
    assert found[2] == (0.5, "a") and found[3] == (None, "b") and found[28] == (None, None)
    assert 9 not in found and len(found) == 27
    assert [row["latent"] for row in index.search(Query(where=(("word", "=", "b"),))).rows] == [3]
    with pytest.raises(ConfigError):
        index.search(Query(sort="word"))


def test_a_latent_shows_its_examples_labels_and_evidence(client: Any, root: Path) -> None:
    address = f"/run/{ids(client)['examples']}"
    page = client.get(f"{address}/latent/4").text
    index = LatentIndex.open(root / "examples")
    assert page.count('class="window"') == len(index.examples(4))
    assert "numbers in sums 4" in page and "balanced accuracy" in page
    assert "diffs/one" in page and "shared" in page and "Δnorm" in page
    assert f"{address}/latent/{index.row(4)['neighbours'][0]}" in page or index.row(4)["neighbours"][0] == 4
    assert client.get(f"{address}/latent/9").status_code == 404  # dead
    assert client.get(f"{address}/latent/5000").status_code == 404
    assert client.get(f"{address}/latent/x").status_code == 400
    assert client.get(f"/run/{ids(client)['diffs/one']}/latent/4").status_code == 404


def test_one_turns_over_latents_in_the_order_of_the_search(client: Any) -> None:
    address = f"/run/{ids(client)['examples']}"
    listed = client.get(f"{address}/latents?q=river&sort=rate&order=desc").text
    order = latents_on(listed)
    links = re.findall(rf'href="({address}/latent/{order[3]}\?[^"]+)"', listed)
    page = client.get(links[0].replace("&amp;", "&")).text
    back, on = (re.search(rf'/latent/(\d+)\?[^"]*" rel="{rel}"', page) for rel in ("prev", "next"))
    assert back and on and (int(back[1]), int(on[1])) == (order[2], order[4])
    first = client.get(f"{address}/latent/{order[0]}?q=river&sort=rate&order=desc&at=0").text
    assert 'rel="prev"' not in first and 'rel="next"' in first
    # A place that no longer is this latent's says nothing.
    assert 'rel="next"' not in client.get(f"{address}/latent/{order[0]}?q=river&at=5").text


def test_tables_of_a_run_lead_to_its_latents(client: Any) -> None:
    found = ids(client)
    page = client.get(f"/run/{found['examples']}").text
    assert f'data-cards="/run/{found["examples"]}/latent/"' in page


def test_two_audits_are_compared(client: Any) -> None:
    found = ids(client)
    page = client.get(f"/compare?a={found['audits/first']}&b={found['audits/second']}").text
    assert "Tasks of both audits" in page and page.count('class="whisker"') >= 4
    assert "<code>seed</code>" in page and "<code>k</code>" not in page
    assert "nothing to compare" in client.get(f"/compare?a={found['labels']}&b={found['labels']}").text
    other = client.get(f"/compare?a={found['labels']}&b={found['audits/first']}")
    assert other.status_code == 200 and "different stages" in other.text
    assert client.get(f"/compare?a={found['labels']}&b=nothing").status_code == 404


# models


def send(client: Any, path: str, **fields: Any) -> str:
    answer = client.post(path, data=fields, headers=OWN)
    assert answer.status_code == 303, words(answer.text)
    return answer.headers["location"]


def done(client: Any, job: str) -> str:
    for _ in range(200):
        if "data-over" in client.get(job, headers={"X-Fragment": "1"}).text:
            return job
        time.sleep(0.02)
    raise AssertionError("the job is not over")


def test_own_text_shows_both_models_token_by_token(root: Path) -> None:
    client = world.client_of(world.app_of(root, world.StubTools()))
    page = client.get(done(client, send(client, "/text", text="three small words"))).text
    assert page.count('class="token-list"') == 3 and page.count("token-list") >= 3
    lists = re.findall(r'id="token-(\d)">(.*?)</div>\n', page, re.S)
    assert "2.00" in lists[0][1] and "3.00" in lists[0][1] and "numbers in sums 4" in lists[0][1]
    # The tuned model's list is whole and lacks latent 6: it is silent there.
    assert "0.00" in lists[0][1]
    assert "base 2.000" in words(page) and "tuned 1.000" in words(page)
    followed = client.get(done(client, send(client, "/text", text="three small words", follow="6"))).text
    assert followed.count('class="b9 t9"') == 3 and 'value="6"' in followed


def test_steering_writes_three_texts_and_the_command(root: Path) -> None:
    tools = world.StubTools()
    client = world.client_of(world.app_of(root, tools))
    fields = {
        "prompt": "Once 'upon'\r\na time ",
        "latent": ["4", "", "7", "12"],
        "mode": ["scale", "add", "add", "ablate"],
        "value": ["2.5", "1", "-3", ""],
        "side": "base",
        "max_new_tokens": "7",
        "temperature": "0.5",
        "seed": "3",
    }
    page = client.get(done(client, send(client, "/steer", **fields))).text
    changes = ("4:scale=2.5", "7:add=-3", "12:ablate")
    assert [(one["side"], one["changes"]) for one in tools.asked] == [
        ("base", ()),
        ("tuned", ()),
        ("base", changes),
    ]
    assert {one["prompt"] for one in tools.asked} == {"Once 'upon'\na time"}
    assert all((one["max_new_tokens"], one["temperature"], one["seed"]) == (7, 0.5, 3) for one in tools.asked)
    assert "base writes &lt;b&gt;on&lt;/b&gt; 4:scale=2.5+7:add=-3+12:ablate" in page
    command = words(re.search(r'id="command">(.*?)</code>', page, re.S)[1])
    assert "--latent 4:scale=2.5 7:add=-3 12:ablate" in command and "--temperature 0.5" in command
    assert 'value="2.5"' in page and "Once &#39;upon&#39;\na time</textarea>" in page


def test_one_job_at_a_time_and_the_others_wait_or_are_told(root: Path) -> None:
    tools = world.StubTools()
    tools.go.clear()
    client = world.client_of(world.app_of(root, tools))
    jobs = [send(client, "/steer", prompt=f"number {n}") for n in range(MOST_WAITING)]
    answer = client.post("/steer", data={"prompt": "one more"}, headers=OWN)
    assert answer.status_code == 503 and "busy" in answer.text
    assert "Waiting: " in client.get(jobs[2], headers={"X-Fragment": "1"}).text
    for job in jobs[1:]:
        assert client.post(f"{job}/cancel", headers=OWN, data={}).status_code == 303
    tools.go.set()
    states = [words(client.get(done(client, job)).text) for job in jobs]
    assert "Done in" in states[0] and all("Cancelled" in one for one in states[1:])
    assert {one["prompt"] for one in tools.asked} == {"number 0"}


def test_writing_stops_at_the_next_token(root: Path) -> None:
    tools = world.StubTools()
    client = world.client_of(world.app_of(root, tools))
    tools.go.clear()
    job = send(client, "/steer", prompt="long")
    while not tools.asked:
        time.sleep(0.01)
    client.post(f"{job}/cancel", headers=OWN, data={})
    tools.go.set()
    assert "Cancelled" in client.get(done(client, job)).text and tools.written == 0
    assert "Done" in client.get(done(client, send(client, "/text", text="and on"))).text


def test_a_job_that_fails_says_why_and_nothing_else(root: Path) -> None:
    tools = world.StubTools()
    client = world.client_of(world.app_of(root, tools))
    tools.error = ConfigError("There is no such latent", found="<b>7</b>")
    assert (
        "There is no such latent. Found: &lt;b&gt;7&lt;/b&gt;"
        in client.get(done(client, send(client, "/text", text="a"))).text
    )
    tools.error = RuntimeError("secret /home/somebody")
    page = client.get(done(client, send(client, "/steer", prompt="a"))).text
    assert "RuntimeError" in page and "secret" not in page
    tools.error = MemoryError()
    assert "not enough memory" in client.get(done(client, send(client, "/text", text="a"))).text
    assert client.get("/job/1-nothing").status_code == 404


def test_a_page_that_fails_tells_no_internals(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from palimpsest.web.runs import Shelf

    client = world.client_of(world.app_of(root))
    monkeypatch.setattr(Shelf, "entries", lambda self: 1 / 0)
    answer = client.get("/")
    assert answer.status_code == 500 and "division" not in answer.text and "log" in answer.text
    monkeypatch.setattr(Shelf, "entries", lambda self: (_ for _ in ()).throw(OSError(5, "secret place")))
    answer = client.get("/")
    assert answer.status_code == 410 and "secret" not in answer.text


# training


def test_a_run_that_grows_is_seen_growing(tmp_path: Path) -> None:
    run = world.make_training(tmp_path / "run", 0, finished=False)
    assert run is not None
    client = world.client_of(world.app_of(tmp_path))
    address = f"/live/{ids(client)['run']}"

    def look() -> str:
        return client.get(address, headers={"X-Fragment": "1"}).text

    assert "Nothing has been reported yet" in look() and "data-over" not in look()
    world.report(run, range(1, 21))
    with run.file("training.jsonl").open("a") as lines:
        lines.write('{"name": "topk", "tokens": 9999, "lo')
    page = look()
    assert "2k of 10k" in words(page) and 'value="0.2"' in page and page.count("<svg") == 4
    assert "Running; last report" in page
    run.file("training.jsonl").write_bytes(
        run.file("training.jsonl").read_bytes().rsplit(b"\n", 1)[0] + b"\n"
    )
    world.report(run, range(21, 41))
    assert "4k of 10k" in words(look())
    run.close()
    assert "Interrupted" in look()
    with RunFolder(
        tmp_path / "run", stage="dictionaries", config={"recipe": {"tokens": 10_000}}, inputs={}, resume=True
    ) as run:
        run.finish()
    assert "Finished" in look() and "data-over" in look()


def test_movers_of_an_adapter_lead_to_their_latents(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    make_examples(tmp_path / "examples", n_latents=40)
    inputs = {"dictionary/0": {"path": "dictionary", "sha256": "1" * 64}}
    run = RunFolder(tmp_path / "tune", stage="tune", config={"schedule": {"steps": 30}}, inputs=inputs)
    run.write_bytes(
        "log.jsonl",
        b'{"loss": 2.0, "step": 10}\n{"loss": null, "step": 15}\nnot json\n{"loss": 1.0, "step": 20}\n',
    )
    folder = run.part("movers")
    folder.mkdir(parents=True)
    for step in (10, 20):
        rows = {
            "step": pa.array([step] * 3, pa.int32()),
            "site": ["resid_post.1"] * 3,
            "latent": pa.array([3, 5, 7], pa.int32()),
            "value": pa.array([0.1 * step, -0.3 * step, None], pa.float32()),
            "gradient": pa.array([None, 0.5, 0.1], pa.float32()),
            "firings": pa.array([1, None, 3], pa.int64()),
        }
        pq.write_table(pa.table(rows), folder / f"{step:09d}.parquet")
    (folder / "000000099.parquet").write_bytes(b"half")
    client = world.client_of(world.app_of(tmp_path))
    found = ids(client)
    page = client.get(f"/live/{found['tune']}").text
    assert "20 of 30" in words(page) and "Loss over steps: Loss from 2 to 1" in page
    table = re.search(r'id="movers">(.*?)</section>', page, re.S)[1]
    assert re.findall(r"/latent/(\d)", table)[-2:] == ["5", "3"] or re.findall(r"/latent/(\d)", table)[
        :3
    ] == ["7", "5", "3"]
    assert "-6" in table and "At step 20" in table
    assert client.get(f"/live/{found['examples']}").status_code == 404
    run.close()


def test_plots_take_what_there_is() -> None:
    assert plot("none", [Line("a", [(0.0, float("nan"))])], "steps") is None
    one = plot("one", [Line("a", [(5.0, 5.0)])], "steps")
    assert one is not None and len(one.lines) == 1 and len(one.y) >= 2
    long = plot("long", [Line("", [(float(x), x % 7) for x in range(10_000)])], "steps", end=20_000)
    assert long is not None and long.lines[0][2].count("L") < 400 and long.lines[0][3][0] < 400
    huge = plot("huge", [Line("", [(0.0, -1e30), (1.0, 1e30)])], "steps")
    assert huge is not None and all(0 <= tick.at <= huge.height for tick in huge.y)


# the command


def test_options_that_make_no_sense(tmp_path: Path) -> None:
    for options in (
        {"root": tmp_path / "missing"},
        {"root": tmp_path, "port": 70_000},
        {"root": tmp_path, "tuned": "x"},
        {"root": tmp_path, "model": True, "dictionary": "d"},
        {"root": tmp_path, "model": True, "models": ModelOptions(one_at_a_time=True)},
    ):
        with pytest.raises(ConfigError):
            ServeConfig(**options)


def test_the_app_starts_without_torch_answers_and_ends(root: Path) -> None:
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    environment = os.environ | {"PYTHONPATH": str(REPOSITORY / "src")}
    light = "import sys, palimpsest.web; sys.exit(bool({'torch', 'fastapi', 'uvicorn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", light], env=environment, timeout=60).returncode == 0
    command = [sys.executable, "-m", "palimpsest", "serve", str(root), "--port", "0", "--json"]
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None and server.stderr is not None
        address = json.loads(server.stdout.readline())["address"]
        base, _, token = address.partition("/?token=")
        assert base.startswith("http://127.0.0.1:") and len(token) >= 32
        with pytest.raises(HTTPError):
            urlopen(base, timeout=10)
        opened = urlopen(Request(address, headers={"Sec-Fetch-Site": "cross-site"}), timeout=10)
        cookie = opened.headers["set-cookie"].split(";")[0]
        page = urlopen(Request(base, headers={"Cookie": cookie}), timeout=10)
        assert "examples" in page.read().decode() and "server" not in page.headers
        taken = subprocess.run(
            [*command[:-2], base.rpartition(":")[2]],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert taken.returncode == 2 and "cannot be used" in taken.stderr
        server.terminate()
        assert "Traceback" not in server.stderr.read()
