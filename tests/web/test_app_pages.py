"""The pages of the app without a browser: latents, own text, steering, training; and the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("fastapi", reason="the web extra is not installed")

import app_world as world
from app_world import OWN, done, ids, latents_on, send, words
from helpers import REPOSITORY
from latents_fixture import make_examples
from palimpsest.artifacts import RunFolder
from palimpsest.errors import ConfigError
from palimpsest.latents import LatentIndex, Query
from palimpsest.options import ModelOptions
from palimpsest.web import ServeConfig
from palimpsest.web.bench import MOST_WAITING
from palimpsest.web.plots import Line, plot


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return world.make_world(tmp_path_factory.mktemp("app"))


@pytest.fixture(scope="module")
def client(root: Path) -> Any:
    return world.client_of(world.app_of(root))


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


def test_runs_of_other_fine_tunes_are_left_out(tmp_path: Path) -> None:
    examples = make_examples(tmp_path / "examples", n_latents=30)
    world.make_diff(tmp_path / "same", examples, range(30), tuned="tuned/")
    world.make_diff(tmp_path / "another", examples, range(30), tuned="elsewhere/")
    client = world.client_of(world.app_of(tmp_path))
    page = client.get(f"/run/{ids(client)['examples']}/latent/4").text
    assert '<dt class="run">same' in page and '<dt class="run">another' not in page


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
    inputs = {"dictionary/0": {"path": "dictionary", "sha256": "0" * 64}}
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


def test_a_dictionary_trained_anew_at_its_path_is_another_one() -> None:
    from palimpsest.web.evidence import Dictionaries

    path = "/runs/dictionary"
    old, new = (Dictionaries(frozenset({one}), frozenset({one, path})) for one in ("a", "b"))
    unhashed = Dictionaries(frozenset(), frozenset({path}))
    assert not old.same(new) and old.same(unhashed) and new.same(unhashed) and old.same(old)
    assert not Dictionaries().same(Dictionaries())
