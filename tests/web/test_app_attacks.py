"""Folders that someone prepared, and models that give up: one bad run or job takes nothing else with it."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import re
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import pyarrow as pa

import app_world as world
import audit_fixture
from app_world import done, ids, send
from latents_fixture import make_examples
from palimpsest.artifacts import RunFolder, input_entry
from palimpsest.web.bench import Bench, Place
from palimpsest.web.refusals import BusyError

ODD = {
    "files-list": {"files": []},
    "files-null": {"files": None},
    "file-huge": {"files": {"a": {"bytes": 10**400}, "b": {"bytes": -5}, "c": {"bytes": True}}},
    "inputs-list": {"inputs": ["dictionary"]},
    "input-odd": {"inputs": {"dictionary": {"sha256": ["x"], "path": {"a": "\x00"}}}},
    "input-nul": {"inputs": {"dictionary": {"path": "\x00/../../etc/passwd"}}},
    "stage-list": {"stage": ["audit"]},
    "stage-number": {"stage": 7},
    "status-map": {"status": {"a": 1}},
    "summary-map": {"summary": {"a": [1]}},
    "timings-list": {"timings": [1, 2]},
    "timings-nan": {"timings": {"a": float("nan"), "b": 10**400}},
    "config-list": {"config": [1]},
    "created-number": {"created": 12},
    "models-list": {"models": ["a"]},
    "device-map": {"device": {"name": "<b>"}},
    "huge-number": {"seed": 10**400},
}


@pytest.mark.parametrize("stage", ["audit", "diff", "tune", "examples", "labels"])
def test_one_odd_manifest_spoils_no_other_page(tmp_path: Path, stage: str) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=20)
    for name, changed in ODD.items():
        path = tmp_path / name
        with RunFolder(path, stage=stage, config={}, inputs={"examples": input_entry(examples)}) as run:
            run.write_json(f"{stage}.json", {"schema": 1, "summary": "x"})
            run.finish(summary="odd")
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | changed))
    client = world.client_of(world.app_of(tmp_path, world.StubTools()))
    found = ids(client)
    assert {"examples", "file-huge", "input-nul", "timings-nan"} <= set(found) <= {"examples", *ODD}
    pages = ["/", "/?q=odd", "/live", "/compare", "/text", "/steer", f"/run/{found['examples']}/latents"]
    for path in [*pages, f"/run/{found['examples']}"]:
        assert client.get(path).status_code == 200, path
    for name, id in found.items():
        for path in (f"/run/{id}", f"/live/{id}", f"/compare?a={id}&b={found['examples']}"):
            assert client.get(path).status_code in (200, 404, 410), (name, path)


COLUMNS: dict[str, Any] = {
    "text": ["x"] * 20,
    "lists": [[1.0]] * 20,
    "maps": [{"a": 1}] * 20,
    "nan": [float("nan"), float("inf"), -float("inf")] + [None] * 17,
    "bytes": [b"\xff"] * 20,
}


@pytest.mark.parametrize("kind", [*COLUMNS, "latents-lists", "latents-null", "latents-huge"])
def test_odd_evidence_is_left_out(tmp_path: Path, kind: str) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=20)
    values = COLUMNS.get(kind, [1.0] * 20)
    latents: Any = list(range(20))
    latents = {"latents-lists": [[1, 2]] * 20, "latents-null": [None] * 20}.get(kind, latents)
    latents = [2**62] * 20 if kind == "latents-huge" else latents
    table = pa.table({"latent": latents, "class": values, "delta_norm": values})
    with RunFolder(
        tmp_path / "diff", stage="diff", config={}, inputs={"examples": input_entry(examples)}
    ) as run:
        run.write_json("diff.json", {"schema": 1, "summary": "x", "dictionary": {"path": "dictionary"}})
        run.write_table("latents.parquet", table)
        run.finish(summary="x")
    client = world.client_of(world.app_of(tmp_path))
    id = ids(client)["examples"]
    for path in (f"/run/{id}/latents", f"/run/{id}/latents?q=river", f"/run/{id}/latent/3", f"/run/{id}"):
        assert client.get(path).status_code == 200, path


@pytest.mark.parametrize("name", ["audit.json", "latents.parquet", "beside"])
def test_a_pipe_in_a_run_is_not_waited_for(tmp_path: Path, name: str) -> None:
    path = world.make_audit(tmp_path / "audit")
    (path / name).unlink(missing_ok=True)
    os.mkfifo(path / name)
    client = world.client_of(world.app_of(tmp_path))
    answers: list[int] = []
    page = f"/run/{ids(client)['audit']}"
    asking = threading.Thread(target=lambda: answers.append(client.get(page).status_code), daemon=True)
    asking.start()
    asking.join(5)
    assert answers == [410]


def test_a_column_is_only_compared_with_its_kind(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=60)
    world.make_diff(tmp_path / "diff", examples, range(60))
    client = world.client_of(world.app_of(tmp_path))
    path = f"/run/{ids(client)['examples']}/latents"
    for asked in ("is.rate=x", "is.latent=3", "lo.diff: class=3", "hi.diff: class=3", "sort=diff: class"):
        assert client.get(f"{path}?{asked}").status_code in (200, 400), asked
    for q in ("9" * 200, "²", "٣", "1e999", "-1", "%00", "%ff%fe", "(", "\\", "%", "_", "."):
        assert client.get(path, params={"q": q}).status_code == 200, q


# the models


class GivesUpError(BaseException):
    """What a library written in Rust raises when it panics is no Exception."""


def test_a_job_that_takes_its_thread_along_is_followed_by_others(tmp_path: Path) -> None:
    make_examples(tmp_path / "examples", n_latents=20)
    tools = world.StubTools()
    tools.error = GivesUpError("at /home/someone")  # pyright: ignore[reportAttributeAccessIssue]
    client = world.client_of(world.app_of(tmp_path, tools))
    first = done(client, send(client, "/text", text="a"))
    assert "GivesUpError" in client.get(first).text and "/home/someone" not in client.get(first).text
    tools.error = None
    assert "Done in" in client.get(done(client, send(client, "/text", text="a b"))).text


def test_what_waits_is_cancelled_at_once() -> None:
    go = threading.Event()
    tools = world.StubTools()
    bench = Bench(lambda place: go.wait(10) and tools or tools)
    place = Place("a", "a")
    jobs = [bench.submit("text", place, {}, lambda job, tools: 1) for _ in range(6)]
    with pytest.raises(BusyError):
        bench.submit("text", place, {}, lambda job, tools: 1)
    for job in jobs[1:]:
        bench.cancel(job)
        assert job.state == "cancelled"
    late = bench.submit("text", place, {}, lambda job, tools: 2)
    assert bench.before(late) == 1
    go.set()
    for _ in range(200):
        if late.over:
            break
        time.sleep(0.02)
    assert (jobs[0].result, late.result, jobs[1].result, jobs[1].state) == (1, 2, None, "cancelled")
    bench.close()


def test_the_models_before_are_let_go_before_others_are_loaded() -> None:
    made: list[weakref.ref[Any]] = []
    alive: list[int] = []

    def opened(place: Place) -> Any:
        gc.collect()
        alive.append(sum(one() is not None for one in made))
        tools = world.StubTools()
        made.append(weakref.ref(tools))
        return tools

    bench = Bench(opened)
    for name in "abc":
        job = bench.submit("text", Place(name, name), {}, lambda job, tools: tools.read("a", 1, ()))
        for _ in range(200):
            if job.over:
                break
            time.sleep(0.02)
        assert job.state == "done"
    assert alive == [0, 0, 0]
    bench.close()


def test_many_ask_for_everything_at_once(tmp_path: Path) -> None:
    world.make_world(tmp_path)
    tools = world.StubTools()
    client = world.client_of(world.app_of(tmp_path, tools))
    id = ids(client)["examples"]
    seen: list[tuple[str, int]] = []

    def ask(kind: int) -> None:
        for turn in range(12):
            if kind % 4 == 0:
                path = f"/run/{id}/latents?q={'river' if turn % 2 else turn}"
                seen.append((path, client.get(path).status_code))
            elif kind % 4 == 1:
                path = f"/run/{id}/latent/{turn}"
                seen.append((path, client.get(path).status_code))
            else:
                fields = (
                    {"text": "one two"} if kind % 4 == 2 else {"prompt": "a", "latent": "1", "value": "2"}
                )
                answer = client.post(("/text", "/steer")[kind % 4 - 2], data=fields, headers=world.OWN)
                seen.append(("send", answer.status_code))
                if answer.status_code == 303 and turn % 2:
                    job = answer.headers["location"]
                    seen.append(("job", client.post(f"{job}/cancel", headers=world.OWN).status_code))
                    seen.append(("job", client.get(job).status_code))

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in range(8)]
    for one in threads:
        one.start()
    for one in threads:
        one.join(60)
    assert {status for _, status in seen} <= {200, 303, 404, 503}
    assert {status for path, status in seen if path.endswith("river")} == {200}
    for _ in range(200):
        if client.post("/text", data={"text": "after"}, headers=world.OWN).status_code == 303:
            break
        time.sleep(0.02)
    assert "Done in" in client.get(done(client, send(client, "/text", text="after that"))).text


# the door


@pytest.mark.parametrize("other", ['prefs={"a": [1, "b"]}', 'x="', "a[b]=\xff", "=", ";;"])
def test_odd_cookies_of_other_apps_lock_nobody_out(tmp_path: Path, other: str) -> None:
    app = world.app_of(tmp_path)
    name, value = next(iter(world.client_of(app).cookies.items()))
    client = world.client_of(app, entered=False)
    for text in (f"{other}; {name}={value}", f"{name}={value}; {other}"):
        assert client.get("/", headers={"cookie": text.encode("latin-1")}).status_code == 200
    for text in (f"{other}; {name}={value}x", f"x{name}={value}", f"{name}=", f"{name}=\xff"):
        assert client.get("/", headers={"cookie": text.encode("latin-1")}).status_code == 403


def test_a_sender_who_leaves_is_no_failure(tmp_path: Path) -> None:
    """Driven without a client, because none lets go in the middle of a form."""
    app = world.app_of(tmp_path, world.StubTools())
    name, value = next(iter(world.client_of(app).cookies.items()))
    headers = {"host": world.HOST, "cookie": f"{name}={value}", "sec-fetch-site": "same-origin"}
    scope = {"type": "http", "method": "POST", "path": "/text", "raw_path": b"/text", "query_string": b""}
    scope |= {"headers": [(k.encode(), v.encode()) for k, v in headers.items()], "http_version": "1.1"}
    scope |= {
        "scheme": "http",
        "server": ("127.0.0.1", world.PORT),
        "client": ("127.0.0.1", 1),
        "root_path": "",
    }
    messages = [{"type": "http.request", "body": b"text=a", "more_body": True}, {"type": "http.disconnect"}]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def answer(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, answer))
    assert [one["status"] for one in sent if one["type"] == "http.response.start"] in ([], [400])


# from a run to its latents


def test_an_audit_without_examples_says_what_to_run(tmp_path: Path) -> None:
    world.make_audit(tmp_path / "audit")
    client = world.client_of(world.app_of(tmp_path))
    page = client.get(f"/run/{ids(client)['audit']}").text
    assert "palimpsest examples" in page and "audit-examples" in page and "lead to their examples" in page


def test_latents_of_another_fine_tune_are_not_offered(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=20)
    tuned = json.loads((examples / "examples.json").read_text())["pair"]["tuned"]
    world.make_diff(tmp_path / "same", examples, range(20), tuned=tuned)
    world.make_diff(tmp_path / "other", examples, range(20), tuned="another/")
    client = world.client_of(world.app_of(tmp_path))
    found = ids(client)
    assert f"/run/{found['examples']}/latents" in client.get(f"/run/{found['same']}").text
    page = client.get(f"/run/{found['other']}").text
    assert found["examples"] not in page


def test_a_damaged_examples_run_does_not_stand_before_a_good_one(tmp_path: Path) -> None:
    bad = make_examples(tmp_path / "a", n_latents=20)
    (bad / "latents.parquet").write_bytes(b"PAR1")
    make_examples(tmp_path / "b", n_latents=20)
    client = world.client_of(world.app_of(tmp_path, world.StubTools()))
    for path in ("/steer", "/text"):
        page = client.get(path)
        assert page.status_code == 200 and f'value="{ids(client)["b"]}" selected' in page.text


def test_the_end_waits_for_the_token_that_is_being_written() -> None:
    tools, left = world.StubTools(), threading.Event()

    def work(job: Any, tools: Any) -> None:
        try:
            while True:
                job.check()
                time.sleep(0.05)
        finally:
            time.sleep(0.2)
            left.set()

    bench = Bench(lambda place: tools)
    job = bench.submit("text", Place("a", "a"), {}, work)
    while job.state != "running":
        time.sleep(0.01)
    bench.close()
    assert left.is_set()
    with pytest.raises(BusyError):
        bench.submit("text", Place("a", "a"), {}, work)


def test_latents_of_an_audit_lead_to_their_pages(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=120)
    about = json.loads((examples / "examples.json").read_text())
    with RunFolder(
        tmp_path / "audit", stage="audit", config={}, inputs={"examples": input_entry(examples)}
    ) as run:
        audit = audit_fixture.make_audit() | {"dictionary": about["dictionary"]}
        run.write_json("audit.json", audit | {"pair": audit["pair"] | {"tuned": about["pair"]["tuned"]}})
        run.write_table("curve.parquet", audit_fixture.make_curve())
        run.write_table("latents.parquet", audit_fixture.make_latents())
        run.finish(summary="x")
    client = world.client_of(world.app_of(tmp_path))
    found = ids(client)
    page = client.get(f"/run/{found['audit']}").text
    links = re.findall(r'href="([^"]*/latent/\d+)"', page)
    assert links and all(one.startswith(f"/run/{found['examples']}/latent/") for one in links)
    assert client.get(links[0]).status_code == 200
