"""A folder of runs for the tests of the app, a stub in place of models, and a client that is let in."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import audit_fixture
from latents_fixture import HOSTILE, make_examples, make_labels
from palimpsest.artifacts import RunFolder, input_entry
from palimpsest.web import ServeConfig, create_app
from palimpsest.web.bench import Bench, Place

OWN = {"Sec-Fetch-Site": "same-origin"}
TOKEN, PORT = "the-token", 8765
HOST = f"127.0.0.1:{PORT}"


def make_audit(path: Path, seed: int = 0, hostile: bool = False) -> Path:
    """A finished audit with synthetic results."""
    made = audit_fixture.make_hostile() if hostile else None
    audit, curve, latents = made or (
        audit_fixture.make_audit(),
        audit_fixture.make_curve(),
        audit_fixture.make_latents(),
    )
    summary = HOSTILE[0] if hostile else str(audit["summary"])
    with RunFolder(path, stage="audit", config={"seed": seed, "k": [5, 10]}, inputs={}, seed=seed) as run:
        run.write_json("audit.json", audit)
        run.write_table("curve.parquet", curve)
        run.write_table("latents.parquet", latents)
        run.finish(summary=summary)
    return path


def make_diff(path: Path, examples: Path, latents: Sequence[int], tuned: str | None = None) -> Path:
    """A diff of the dictionary that some examples are of, as far as the app reads one."""
    import pyarrow as pa

    table = pa.table(
        {
            "latent": pa.array(latents, pa.int32()),
            "class": ["tuned-only" if one % 3 == 0 else "shared" for one in latents],
            "verdict": [None] * len(latents),
            "delta_norm": [one / 100 for one in latents],
            "causal_share": [0.5 / (1 + one) for one in latents],
        }
    )
    about = {"schema": 1, "summary": "A diff.", "dictionary": {"path": "dictionary"}}
    about |= {"pair": {"base": "base/", "tuned": tuned}}
    with RunFolder(path, stage="diff", config={}, inputs={"examples": input_entry(examples)}) as run:
        run.write_json("diff.json", about)
        run.write_table("latents.parquet", table)
        run.finish(summary="A diff.")
    return path


def make_training(path: Path, steps: int, *, finished: bool = True) -> RunFolder | None:
    """A dictionary's training so far; the open run where it is not finished."""
    run = RunFolder(path, stage="dictionaries", config={"recipe": {"tokens": 10_000}}, inputs={})
    report(run, range(1, steps + 1))
    if not finished:
        return run
    run.finish()
    return None


def report(run: RunFolder, steps: range) -> None:
    """Further lines of the log."""
    with run.file("training.jsonl").open("a") as lines:
        for step in steps:
            for name in ("topk", "relu"):
                lines.write(
                    f'{{"name": "{name}", "step": {step}, "tokens": {100 * step}, "loss": {1 / step}, '
                    f'"fve": {1 - 0.5 / step}, "l0": 32.0, "dead_share": 0.01}}\n'
                )


class StubTools:
    """Models that answer at once, or wait until they are let go on."""

    sides: Sequence[str] = ("base", "tuned")

    def __init__(self) -> None:
        self.go, self.written = threading.Event(), 0
        self.go.set()
        self.error: Exception | None = None
        self.asked: list[Mapping[str, Any]] = []

    def read(self, text: str, top: int, latents: Sequence[int]) -> Mapping[str, Any]:
        self.go.wait(10)
        if self.error:
            raise self.error
        tokens = [f" {word}" for word in text.split(" ")]
        base = [[(4, 2.0 + at), (6, 1.0)] for at in range(len(tokens))]
        tuned = [[(4, 3.0 + at)] for at in range(len(tokens))]
        found: dict[str, Any] = {"tokens": tokens, "value": tuned, "base": base, "tuned": tuned, "cut": False}
        found |= {
            "loss_base": [None] + [2.0] * (len(tokens) - 1),
            "loss_tuned": [None] + [1.0] * (len(tokens) - 1),
        }
        if latents:
            one = [[(latents[0], 1.5)] for _ in tokens]
            found["followed"] = {"value": one, "base": one, "tuned": one}
        return found

    def write(
        self,
        prompt: str,
        side: str,
        changes: Sequence[str],
        on_token: Callable[[str], object],
        **decoding: Any,
    ) -> str:
        self.asked.append({"prompt": prompt, "side": side, "changes": tuple(changes), **decoding})
        text = ""
        for piece in (f" {side}", " writes", " <b>on</b>", f" {'+'.join(changes)}"):
            self.go.wait(10)
            if self.error:
                raise self.error
            on_token(piece)
            text += piece
            self.written += 1
        return text


def make_world(root: Path) -> Path:
    """A folder with one run of most kinds."""
    examples = make_examples(root / "examples", n_latents=120)
    make_labels(root / "labels", [0, 1, 2, 3, 4])
    make_diff(root / "diffs" / "one", examples, range(0, 120, 2))
    make_audit(root / "audits" / "first")
    make_audit(root / "audits" / "second", seed=1)
    make_training(root / "training", 40)
    return root


def app_of(root: Path, tools: StubTools | None = None, **options: Any) -> Any:
    """The app of a folder; with a stub it may load models."""
    bench = None if tools is None else Bench(lambda place: _opened(place, tools))
    return create_app(ServeConfig(root=root, **options), token=TOKEN, port=PORT, bench=bench)


def _opened(place: Place, tools: StubTools) -> StubTools:
    assert place.id
    return tools


def client_of(app: Any, entered: bool = True) -> Any:
    """A client of the app, with the cookie unless it shall be a stranger."""
    from starlette.testclient import TestClient

    client = TestClient(app, base_url=f"http://{HOST}", follow_redirects=False)
    if entered:
        assert client.get(f"/?token={TOKEN}").status_code == 303
    return client


def ids(client: Any) -> dict[str, str]:
    """Ids of the runs by their names."""
    found = re.findall(r'href="/run/([0-9a-f]{12})"><bdi>([^<]*)</bdi>', client.get("/").text)
    return {name: id for id, name in found}


def latents_on(page: str) -> list[int]:
    return [int(one) for one in re.findall(r'/latent/(\d+)\?[^"]*at=', page)]


def words(page: str) -> str:
    """The text of a page."""
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page))


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
