"""Folders that someone prepared, and models that give up: one bad run or job takes nothing else with it."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import pyarrow as pa

import app_world as world
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
        answer = client.post("/text", data={"text": "after"}, headers=world.OWN)
        if answer.status_code == 303:
            break
        time.sleep(0.02)
    assert "Done in" in client.get(done(client, answer.headers["location"])).text
