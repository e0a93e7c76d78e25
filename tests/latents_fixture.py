"""Synthetic examples and labels folders, valid to the last column, of any size; hostile where asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from palimpsest.artifacts import RunFolder
from palimpsest.latents import schema

CORPORA = ("general", "math")
BINS, WINDOW = 5, 37
WORDS = ("the", " river", " mill", " seven", "2", "3", " =", " def", " return", "(", ")", ".", ",", " apples")
HOSTILE = (
    "</script><script>window.__pwned=1</script>",
    '<img src=x onerror="window.__pwned=1">',
    "\u202eevil\u202c",
    "\\xff",
    "\x1b[31mred",
    "`code` | **bold** [x](javascript:alert(1))",
    "{{ 7*7 }}",
    "\x00\u200b",
)


def vocabulary(hostile: bool = False, size: int = 400) -> list[str]:
    """Texts of the token ids."""
    words = [*(HOSTILE if hostile else ()), *WORDS]
    return [*words, *(f" word{i}" for i in range(size - len(words)))]


def make_examples(
    path: Path,
    n_latents: int = 200,
    per_latent: int = 10,
    seed: int = 0,
    hostile: bool = False,
    kind: str = "sae",
) -> Path:
    """A finished examples folder; every tenth latent is dead, latent 1 fires in the tuned model only."""
    rng = np.random.default_rng(seed)
    texts = vocabulary(hostile)
    alive = np.array([i for i in range(n_latents) if i % 10 != 9], np.int32)
    about = _about(kind, n_latents, len(alive), per_latent, hostile)
    with RunFolder(path, stage=schema.STAGE, config={"seed": seed}, inputs={}, seed=seed) as run:
        run.write_json(schema.ABOUT, about)
        run.write_table(schema.LATENTS, _latents(alive, texts, kind, rng, about["tokens"]))
        with (
            run.writing(schema.EXAMPLES) as target,
            pq.ParquetWriter(target, schema.example_schema(), compression="zstd") as writer,
        ):
            step = max(1, schema.ROW_GROUP // per_latent)
            for first in range(0, len(alive), step):
                table = _examples(alive[first : first + step], per_latent, len(texts), kind, rng)
                writer.write_table(table, row_group_size=schema.ROW_GROUP)
        run.write_table(
            schema.VOCAB,
            pa.table({"id": np.arange(len(texts), dtype=np.int32), "text": texts}, schema.vocab_schema()),
        )
        run.finish(summary=about["summary"])
    return path


def make_labels(path: Path, latents: list[int], hostile: bool = False, scored: bool = True) -> Path:
    """A finished labels folder for some latents."""
    bad = HOSTILE[0] if hostile else "numbers in sums"
    rows = {
        "latent": latents,
        "label": [f"{bad} {i}" for i in latents],
        "provider": ["tokens"] * len(latents),
        "score": [0.5 + 0.4 * (i % 2) if scored else None for i in latents],
        "score_lo": [0.4 + 0.4 * (i % 2) if scored else None for i in latents],
        "score_hi": [0.6 + 0.39 * (i % 2) if scored else None for i in latents],
        "n": [40] * len(latents),
        "score_random": [0.9 if scored else None] * len(latents),
        "score_similar": [0.6 if scored else None] * len(latents),
    }
    about = {
        "schema": 1,
        "summary": f"{len(latents)} latents labelled by tokens.",
        "provider": "tokens",
        "model": None,
        "examples": "examples",
        "dictionary": {"path": "dictionary", "sha256": "0" * 64},
        "scored": scored,
        "counts": {"labelled": len(latents), "missing": 0},
        "control": {"shuffled": 0.51 if scored else None},
        "notes": [],
    }
    with RunFolder(path, stage=schema.LABELS_STAGE, config={}, inputs={}) as run:
        run.write_json(schema.LABELS_ABOUT, about)
        run.write_table(schema.LABELS, pa.table(rows, schema.label_schema()))
        run.finish(summary=about["summary"])
    return path


def _about(kind: str, n_latents: int, alive: int, per_latent: int, hostile: bool) -> dict[str, Any]:
    name = HOSTILE[0] if hostile else "tuned/"
    return {
        "schema": 1,
        "summary": f"{alive} of {n_latents} latents fire on 20,000 tokens.",
        "pair": {"base": "base/", "tuned": name},
        "site": "resid_post.1",
        "dictionary": {
            "path": "dictionary",
            "sha256": "0" * 64,
            "n_latents": n_latents,
            "activation": "topk",
        },
        "view": {"sae": "base", "crosscoder": "pair", "diff": "diff"}[kind],
        "signals": {
            "value": "The larger of the two models' activations.",
            "base": "The code of the base's activations.",
            "tuned": "The code of the tuned model's activations.",
        },
        "corpora": {one: {"documents": 50, "tokens": 10_000} for one in CORPORA},
        "tokens": 20_000,
        "latents": n_latents,
        "alive": alive,
        "tops": per_latent // 2,
        "bins": BINS,
        "per_bin": max(1, (per_latent - per_latent // 2) // BINS),
        "before": 24,
        "after": 12,
        "lens": {"base": True, "tuned": True},
        "notes": [HOSTILE[1]] if hostile else [],
        "seed": 0,
        "seconds": {"read": 1.0},
    }


def _latents(alive: np.ndarray, texts: list[str], kind: str, rng: Any, tokens: int) -> pa.Table:
    n, words = len(alive), np.array(texts, object)
    fires = rng.integers(1, tokens // 10, n)
    columns: dict[str, Any] = {"latent": alive, "fires": fires, "rate": fires / tokens}
    columns |= {"mean_value": rng.gamma(2, 1, n), "max_value": rng.gamma(8, 1, n)}
    for side in ("base", "tuned"):
        none = kind == "diff"
        drawn = {"rate": rng.beta(1, 60, n), "mean": rng.gamma(2, 1, n), "max": rng.gamma(8, 1, n)}
        if side == "base":
            drawn = {key: np.where(alive == 1, 0.0, value) for key, value in drawn.items()}
        columns |= {f"{key}_{side}": [None] * n if none else value for key, value in drawn.items()}
    columns |= {f"rate[{name}]": rng.beta(1, 60, n) for name in CORPORA}
    columns |= {f"share[{role}]": [None] * n for role in schema.ROLES}
    columns |= {"norm_base": np.ones(n), "norm_tuned": np.ones(n), "decoder_cosine": rng.uniform(0.5, 1, n)}
    columns["histogram_start"] = np.full(n, -4, np.int16)
    for signal in schema.SIGNALS:
        none = kind == "diff" and signal != "value"
        columns[f"histogram_{signal}"] = (
            [None] * n if none else [rng.integers(0, 99, 12).tolist() for _ in alive]
        )
    columns["neighbours"] = [rng.choice(alive, min(8, n), replace=False).tolist() for _ in alive]
    columns["neighbour_scores"] = [np.sort(rng.uniform(0, 1, min(8, n)))[::-1].tolist() for _ in alive]

    def listed(count: int, sign: float = 1.0) -> tuple[list, list]:
        picks = rng.integers(0, len(words), (n, count))
        return words[picks].tolist(), (sign * np.sort(rng.gamma(2, 1, (n, count)), 1)[:, ::-1]).tolist()

    for side in ("base", "tuned"):
        for name, sign in (("promoted", 1.0), ("suppressed", -1.0)):
            columns[f"{name}_{side}"], columns[f"{name}_{side}_logits"] = listed(10, sign)
    columns["changed"], columns["changed_logits"] = listed(6)
    columns["tokens"], columns["tokens_z"] = listed(8)
    return pa.table(columns, schema.latent_schema(CORPORA))


def _examples(latents: np.ndarray, per: int, vocab: int, kind: str, rng: Any) -> pa.Table:
    n = len(latents) * per
    latent = np.repeat(latents, per)
    place = np.tile(np.arange(per), len(latents))
    tops = per // 2
    share = max(1, -(-(per - tops) // BINS))
    bins = np.where(place < tops, 0, 1 + (place - tops) // share)
    rank = np.where(place < tops, place, (place - tops) % share)
    value = np.round(np.sort(rng.gamma(4, 1, (len(latents), per)), 1)[:, ::-1].reshape(-1), 3).astype(
        np.float32
    )
    at = [[20, 24, 25]] * n
    silent = kind == "diff"
    base = np.where(latent == 1, 0, value * 0.8).astype(np.float32)

    def spread(of: np.ndarray) -> list[list[float]]:
        return np.stack([of * 0.3, of, of * 0.5], 1).tolist()

    columns = {
        "latent": latent,
        "kind": bins.astype(np.int8),
        "rank": rank.astype(np.int16),
        "corpus": rng.integers(0, len(CORPORA), n).astype(np.int16),
        "document": rng.integers(0, 50, n).astype(np.int32),
        "start": rng.integers(0, 100, n).astype(np.int32),
        "peak": np.full(n, 24, np.int16),
        "value": value,
        "base_value": [None] * n if silent else base,
        "tuned_value": [None] * n if silent else value,
        "ids": rng.integers(0, vocab, (n, WINDOW)).tolist(),
        "at": at,
        "value_at": spread(value),
        "base_at": [None] * n if silent else spread(base),
        "tuned_at": [None] * n if silent else spread(value),
    }
    return pa.table(columns, schema.example_schema())
