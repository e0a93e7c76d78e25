"""Planted latents that fire exactly on known tokens, and a server that answers as an OpenAI-style one does."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from palimpsest.artifacts import RunFolder
from palimpsest.latents import schema

VOCAB, DOCUMENTS, LENGTH, BEFORE, AFTER = 64, 300, 60, 12, 6
TOPS, BINS, PER_BIN = 8, 4, 3
SOURCE = "gemma-2-2b/20-gemmascope-res-16k"


def texts() -> list[str]:
    """Texts of the token ids."""
    return [f" tok{i}" for i in range(VOCAB)]


def planted(
    path: Path,
    fires_on: Sequence[Sequence[int]],
    *,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
    neighbours: int = 8,
) -> Path:
    """A finished examples folder in which latent j fires exactly on the tokens `fires_on[j]`, stronger at random."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, VOCAB, (DOCUMENTS, LENGTH))
    strength = rng.gamma(4, 1, ids.shape).astype(np.float32)
    fires = np.stack([np.isin(ids, list(tokens)) for tokens in fires_on])
    rows = [row for j in range(len(fires_on)) for row in _examples(j, ids, fires[j] * strength, rng)]
    with RunFolder(path, stage=schema.STAGE, config={"seed": seed}, inputs={}, seed=seed) as run:
        run.write_json(schema.ABOUT, _about(len(fires_on), metadata))
        run.write_table(schema.LATENTS, _latents(fires_on, fires, strength, neighbours))
        run.write_table(schema.EXAMPLES, pa.Table.from_pylist(rows, schema.example_schema()))
        vocab = {"id": np.arange(VOCAB, dtype=np.int32), "text": texts()}
        run.write_table(schema.VOCAB, pa.table(vocab, schema.vocab_schema()))
        run.finish(summary="planted")
    return path


def _examples(latent: int, ids: np.ndarray, value: np.ndarray, rng: Any) -> list[dict[str, Any]]:
    """The strongest place of each document, then places drawn from quantiles of the others."""
    best = value.argmax(1)
    order = [int(d) for d in np.argsort(-value.max(1)) if value[d].max() > 0]
    places = [(0, rank, d, int(best[d])) for rank, d in enumerate(order[:TOPS])]
    rest = order[TOPS:]
    for number, part in enumerate(np.array_split(np.array(rest[::-1], int), BINS)):
        drawn = rng.choice(part, min(PER_BIN, len(part)), replace=False).tolist()
        places += [(number + 1, rank, d, int(best[d])) for rank, d in enumerate(drawn)]
    rows = []
    for kind, rank, document, place in places:
        first, last = max(0, place - BEFORE), min(LENGTH, place + AFTER + 1)
        window = value[document, first:last]
        at = np.flatnonzero(window)
        peak = float(value[document, place])
        rows.append(
            {"latent": latent, "kind": kind, "rank": rank, "corpus": 0, "document": document, "start": first}
            | {"peak": place - first, "value": peak, "base_value": peak, "tuned_value": 0.5 * peak}
            | {"ids": ids[document, first:last].tolist(), "at": at.tolist()}
            | {"value_at": window[at].tolist(), "base_at": window[at].tolist()}
            | {"tuned_at": (0.5 * window[at]).tolist()}
        )
    return rows


def _latents(
    fires_on: Sequence[Sequence[int]], fires: np.ndarray, strength: np.ndarray, neighbours: int
) -> pa.Table:
    flat = fires.reshape(len(fires), -1).astype(float)
    counts, tokens, names = flat.sum(1), flat.shape[1], texts()
    together = flat @ flat.T / np.sqrt(np.outer(counts, counts))
    rows = []
    for j, own in enumerate(fires_on):
        near = sorted((k for k in range(len(fires)) if k != j), key=lambda k: (-together[j, k], k))[
            :neighbours
        ]
        rate = counts[j] / tokens
        rows.append(
            {field.name: None for field in schema.latent_schema(["text"])}
            | {
                "latent": j,
                "fires": int(counts[j]),
                "rate": rate,
                "rate_base": rate,
                "rate_tuned": rate * (1 + j),
            }
            | {"mean_value": 4.0, "max_value": float((strength * fires[j]).max()), "histogram_start": 0}
            | {"neighbours": near, "neighbour_scores": [float(together[j, k]) for k in near]}
            | {"promoted_base": [names[0]], "promoted_tuned": [names[1]]}
            | {"tokens": [names[t] for t in own], "tokens_z": [30.0 - i for i in range(len(own))]}
        )
    return pa.Table.from_pylist(rows, schema=schema.latent_schema(["text"]))


def _about(latents: int, metadata: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "schema": 1,
        "summary": "planted",
        "pair": {"base": "base/", "tuned": "tuned/"},
        "site": "resid_post.1",
        "dictionary": {"path": "dictionary", "sha256": "0" * 64, "metadata": metadata or {}},
        "corpora": {"text": {"documents": DOCUMENTS, "tokens": DOCUMENTS * LENGTH}},
        "latents": latents,
        "alive": latents,
    }


Answer = tuple[int, dict[str, str], bytes]


def said(text: str) -> Answer:
    """A good answer of the server."""
    body = {"choices": [{"message": {"role": "assistant", "content": text}}]}
    return 200, {}, json.dumps(body).encode()


def data_of(request: dict[str, Any]) -> dict[str, Any]:
    """The JSON in a question."""
    return json.loads(request["messages"][-1]["content"].split("\n\n", 1)[1])


def honest(request: dict[str, Any]) -> Answer:
    """A model that names the marked tokens, and judges by what a description quotes."""
    data = data_of(request)
    if "examples" in data:
        tokens = {one["text"].split("⟦")[1].split("⟧")[0] for one in data["examples"]}
        label = "the token " + ", ".join(f'"{token}"' for token in sorted(tokens))
        return said(json.dumps({"label": label}))
    inside = [one["text"].split("⟦")[1].split("⟧")[0] for one in data["texts"]]
    return said(json.dumps({"fits": [int(f'"{token}"' in data["description"]) for token in inside]}))


class Stub:
    """What a server saw: every request with its headers."""

    def __init__(self, answer: Callable[[dict[str, Any]], Answer]) -> None:
        self.answer, self.requests, self.headers, self.address = answer, [], [], ""


@contextmanager
def serving(answer: Callable[[dict[str, Any]], Answer]) -> Iterator[Stub]:
    """A server on this machine whose answers a function gives."""
    stub, lock = Stub(answer), threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:  # noqa: N802 - the name that the class wants
            body = self.rfile.read(int(self.headers["Content-Length"]))
            with lock:
                stub.requests.append((self.path, json.loads(body)))
                stub.headers.append(dict(self.headers))
                status, headers, data = stub.answer(json.loads(body))
            try:
                self.send_response(status)
                for name, value in ({"Content-Length": str(len(data))} | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                return

        do_GET = do_POST  # noqa: N815 - a redirect that was followed would come as GET

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    stub.address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        yield stub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
