"""The app without a browser: who gets in, what is refused, what a folder in any state looks like."""

from __future__ import annotations

import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import app_world as world
from app_world import OWN, done, ids, send, words
from latents_fixture import make_examples, make_labels
from palimpsest.artifacts import RunFolder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    return world.client_of(world.app_of(root))


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
