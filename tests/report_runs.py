"""Small finished runs of every stage that the report shows, made by hand, and ways to damage what they say."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from latents_fixture import HOSTILE, make_examples, make_labels
from palimpsest.artifacts import RunFolder, open_artifact
from palimpsest.report.parts import Run

Data = dict[str, Any]
EVIL = HOSTILE[0] + HOSTILE[1] + HOSTILE[2] + HOSTILE[4]
"""Markup, an image, bidi controls and a terminal's escape code in one name."""


def make_run(path: Path, stage: str, data: Data, main: str, tables: dict[str, Any] | None = None) -> Run:
    """A finished folder of a stage with its JSON, and other files: tables, or bytes."""
    with RunFolder(path, stage=stage, config={"seed": 0, "nested": {"rate": 0.5}}, inputs={}) as run:
        run.write_json(main, data)
        for name, content in (tables or {}).items():
            if isinstance(content, bytes):
                run.write_bytes(name, content)
            else:
                run.write_table(name, content)
        run.finish(summary=str(data.get("summary") or ""))
    return Run(open_artifact(path), path.name, json.loads((path / main).read_text()))


def patch_row(name: str, share: float, size: int | None = None, place: str = "all", **more: Any) -> Data:
    """A row of `patching`."""
    ci = [share - 0.05, share + 0.05]
    row = {"set": name, "size": size, "positions": place, "kl": 0.1 * (1 - share), "share": share, "ci": ci}
    return {**row, "seed": None, "loss": {}, "by_corpus": {}, **more}


def diff_data() -> Data:
    """`diff.json` of a crosscoder."""
    added = [
        patch_row("none", 0.0),
        patch_row("all+bias", 0.6, 90),
        patch_row("raw", 0.99),
        patch_row("mean", 0.03),
    ]
    added += [
        patch_row("top:attribution", share, n) for n, share in ((1, 0.05), (4, 0.1), (16, 0.3), (90, 0.55))
    ]
    added += [patch_row("top:nu", share, n) for n, share in ((1, 0.0), (4, 0.01))]
    added += [patch_row("best:attribution", 0.3, 4), patch_row("worst:attribution", 0.1, 4)]
    added += [
        patch_row("random:attribution", share, n, seed=n) for n, share in ((10, 0.05), (11, 0.07), (40, 0.2))
    ]
    added += [patch_row("directions:attribution", -0.01, 4, seed=1)]
    removed = [patch_row("best:attribution", 0.4, 4), patch_row("random:attribution", 0.1, 10, seed=1)]
    context = {"corpus": "math", "document": 3, "before": "2 +", "token": " 2", "after": " = 4", "kl": 1.5}
    return {
        "summary": "Of 100 latents 2 look tuned-only, 1 of them survives; null pairs leave 0.5.",
        "method": "crosscoder",
        "pair": {"base": "base/", "tuned": "tuned/"},
        "site": "resid_post.1",
        "dictionary": {"path": "dictionary", "n_latents": 100},
        "corpora": {"general": {"documents": 9, "tokens": 900}, "math": {"documents": 8, "tokens": 800}},
        "tokens": 1700,
        "fve": {"base": 0.9, "tuned": 0.91, "difference": 0.5},
        "classes": {"tuned-only": 2, "shared": 90, "dead": 8},
        "tuned_only": {
            "raw": 2,
            "surviving": 1,
            "undetermined": 0,
            "null": 0.5,
            "sensitivity": {"tuned-specific": 0.4, "undetermined": 0.1},
        },
        "thresholds": {
            "tuned_only": 0.9,
            "base_only": 0.1,
            "nu_error": 0.2,
            "nu_reconstruction": 0.5,
            "nu_activation": 0.3,
        },
        "artefacts": {"shrinkage": 1, "decoupling": 0, "split_pairs": 0},
        "stability": [
            {"alive": {"mean": 0.5, "above_0.7": 0.2}, "tuned_only": {"mean": None, "above_0.7": None}}
        ],
        "nulls": [{"tuned": "null/", "raw": 3, "surviving": 0, "undetermined": 1, "tokens": 1700}],
        "gap": {"all": 0.1, "first": 0.2},
        "patching": added,
        "removal": removed,
        "patched": {"documents": 5, "predictions": {"all": 400, "first": 40}},
        "attribution": [
            {
                "latents": 0.7,
                "bias": 0.1,
                "error": 0.2,
                "incomplete": 0.0,
                "verified": [{"size": 1, "predicted": 0.05, "added": 0.04, "removed": 0.06}]
                + [{"size": 3, "predicted": 0.1, "added": 0.09, "removed": 0.12}],
            }
        ],
        "behaviours": [{"latents": [3, 5], "share": 0.4, "tokens": 7, "contexts": [context]}],
        "ranked": [{"latent": 3, "label": "sums"}],
        "notes": ["A note."],
        "latents": "latents.parquet",
    }


def diff_latents(n: int = 100, seed: int = 0) -> pa.Table:
    """`latents.parquet` of a crosscoder; latent 1 is new, latent 2 looks it, the last ones never fire."""
    rng = np.random.default_rng(seed)
    norm, error = rng.normal(0.5, 0.08, n).clip(0, 1), rng.normal(1, 0.2, n)
    share = rng.normal(0, 0.01, n)
    norm[1:3], error[1], error[2], share[3] = 0.95, 0.05, 1.1, 0.4
    alive = np.arange(n) < n - n // 12
    error = np.where(alive, error, np.nan)
    kind = np.where(norm > 0.9, "tuned-only", "shared")
    return pa.table(
        {
            "latent": np.arange(n, dtype=np.int32),
            "class": pa.array(np.where(alive, kind, "dead").tolist()).dictionary_encode(),
            "verdict": ["tuned-specific" if i == 1 else "rejected" for i in range(n)],
            "delta_norm": norm,
            "decoder_cosine": rng.uniform(0.5, 1, n),
            "nu_error": pa.array(error, from_pandas=True),
            "nu_error_lo": pa.array(error - 0.1, from_pandas=True),
            "nu_error_hi": pa.array(error + 0.1, from_pandas=True),
            "nu_reconstruction": pa.array(error + 0.05, from_pandas=True),
            "nu_centred": pa.array(rng.normal(1, 0.3, n)),
            "rate": rng.beta(1, 50, n),
            "rate_base": rng.beta(1, 50, n),
            "rate_tuned": rng.beta(1, 50, n),
            "rate[math]": rng.beta(1, 50, n),
            "activation_change": rng.gamma(1, 0.01, n),
            "causal_share": np.where(alive, share, 0.0),
            "stability": pa.nulls(n, pa.float64()),
        }
    )


def compare_data() -> Data:
    """`compare.json` of two diffs."""

    def row(name: str, method: str, share: float) -> Data:
        half = {
            "ranking": "attribution",
            "positions": "all",
            "size": 4,
            "best": share / 2,
            "best_ci": [0.1, 0.4],
        }
        half |= {
            "worst": 0.05,
            "worst_ci": None,
            "random": 0.1,
            "random_range": [0.05, 0.15],
            "directions": 0.0,
        }
        return {
            "name": name,
            "method": method,
            "activation": "batch_topk",
            "latents": 100,
            "l0": 30.5,
            "fve": {"base": 0.9, "tuned": 0.9, "difference": 0.6},
            "raw": 2,
            "surviving": 1,
            "null": 0.5,
            "sensitivity": 0.3,
            "stability": {"alive": 0.5},
            "recovered": {"all": patch_row("all+bias", share)},
            "halves": [half],
            "trained_tokens": 1000,
            "train_seconds": 5,
            "diff_seconds": 7,
        }

    return {
        "pair": {"base": "base/", "tuned": "tuned/"},
        "site": "resid_post.1",
        "rows": [row("cross", "crosscoder", 0.6), row("step", "diff-sae", 0.87)],
        "gap": {"all": 0.1},
        "baselines": [patch_row("raw", 0.99), patch_row("mean", 0.03)],
        "notes": [],
    }


def tune_data() -> Data:
    """`tune.json`."""
    return {
        "component": "scale",
        "objective": "sft",
        "sites": [{"site": "resid_post.1", "dictionary": "dictionary", "sha256": "0" * 64, "latents": 100}],
        "objective_value": {
            "before": 3.2,
            "after": 3.1,
            "difference": -0.1,
            "ci": [-0.2, -0.05],
            "unit": "nats",
        },
        "heldout_loss": {"before": 3.3, "after": 3.15, "difference": -0.15, "ci": [-0.2, -0.1]},
        "margin": {"after": 1.0, "ci": [0.5, 1.5], "accuracy": 0.7},
        "general": {"kl": 0.02, "ci": [0.01, 0.03]},
        "parameters": 100,
        "latents_moved": 90,
        "steps": 40,
        "rows": {"train": 500, "heldout": 50},
    }


def tune_files() -> dict[str, Any]:
    """Its log and its movers: latent i moves by (i - 5) / 10 per step."""
    steps, latents = (10, 20, 40), range(12)
    rows = [
        {
            "step": s,
            "site": "resid_post.1",
            "latent": i,
            "value": (i - 5) / 10 * s,
            "gradient": 0.01,
            "firings": i,
        }
        for s in steps
        for i in latents
    ]
    log = "".join(json.dumps({"step": s, "loss": 3.0 - s / 100}) + "\n" for s in steps)
    return {"latents.parquet": pa.Table.from_pylist(rows), "log.jsonl": (log + "no json\n[1]\n").encode()}


def explain_data() -> Data:
    """`explain.json`."""
    sizes = ((1, 0.1), (4, 0.3), (16, 0.7), (64, 1.0))
    curves: list[Data] = []
    for kind, factor in (("keep", 1.0), ("magnitude", 0.8), ("random", 0.3)):
        for n, share in sizes:
            shown = share * factor
            curves.append({"kind": kind, "n": n, "share": shown, "ci": [shown - 0.1, shown + 0.1]})
    curves += [{"kind": "ablate", "n": n, "share": 1 - s, "ci": None} for n, s in sizes]
    agreement = {
        "adapter": "a",
        "cosine": 0.5,
        "spearman": 0.4,
        "top_n": 50,
        "overlap": 0.6,
        "null_cosine": [-0.1, 0.1],
    }
    agreement |= {"null_spearman": [-0.1, 0.1], "null_overlap": [0.2, 0.4]}
    return {
        "summary": "The adapter moves 60 latents.",
        "component": "scale",
        "corpora": [{"name": "math", "role": "corpus", "documents": 20, "tokens": 2000}],
        "rankings": [{"by": "effect", "latents": [{"site": "resid_post.1", "latent": 2, "label": "sums"}]}],
        "concentration": {
            "latents": 64,
            "moved": 60,
            "firing": 55,
            "effective": 50,
            "effect": 3.0,
            "half": 5,
            "most": 30,
        },
        "objective": {"unit": "nats per token", "difference": 0.02, "ci": [0.01, 0.03], "present": True},
        "curves": curves,
        "pruned": {"keep": 0.95, "n": 40, "share": 0.96, "ci": [0.9, 1.0], "magnitude_n": 50, "random_n": 60},
        "specificity": {
            "n": 50,
            "top": {"ratio": 1.5, "ci": [1.4, 1.6]},
            "random": {"ratio": 0.9, "ci": [0.5, 1.7]},
            "permuted": {"ratio": 1.4, "ci": [1.2, 1.6]},
            "p": 0.1,
        },
        "controls": {
            "twin": agreement,
            "other": agreement,
            "shuffled": {"difference": -1.0, "ci": [-1.1, -0.9]},
        },
        "notes": ["A note."],
    }


def explain_latents() -> pa.Table:
    """Effects 64, 63 … 1; the last ten have none."""
    effect = np.where(np.arange(64) < 54, np.arange(64, 0, -1.0), 0.0)
    columns = {"site": ["resid_post.1"] * 64, "latent": np.arange(64, dtype=np.int32), "value": -effect / 64}
    return pa.table(
        columns
        | {"norm": np.ones(64), "effect": effect, "share": effect / effect.sum(), "rate.math": effect / 99}
    )


def explain_compare_data() -> Data:
    """`compare.json` of two adapters."""
    moved = {
        "site": "resid_post.1",
        "latent": 7,
        "values": [0.1, -0.2],
        "effects": [1, 2],
        "shares": [0.1, 0.2],
    }
    return {
        "summary": "Two adapters.",
        "adapters": ["runs/a", "runs/b"],
        "counts": {"only_a": 3, "only_b": 1, "both": 2, "opposite": 1},
        "moved": {"only_a": [moved], "both": [moved], "opposite": []},
        "agreement": {
            "cosine": 0.3,
            "spearman": 0.2,
            "overlap": 0.4,
            "top_n": 50,
            "null_cosine": [-0.1, 0.1],
        },
        "notes": [],
    }


def steer_data() -> Data:
    """`steer.json`: the guard breaks at strength 4."""

    def strength(s: float) -> Data:
        ratio = 1 + s * s / 10
        row = {
            "strength": s,
            "loss": 3 + s,
            "perplexity_ratio": ratio,
            "perplexity_ratio_ci": [ratio - 0.1, ratio + 0.1],
        }
        row |= {
            "kl": s / 10,
            "kl_ci": None,
            "ok": s < 4,
            "texts": ["one two"],
            "watch": [{"text": " two", "change": s}],
        }
        control = {
            "latents": [9],
            "perplexity_ratio": 1 + s / 20,
            "kl": s / 50,
            "watch": [{"text": " two", "change": 0.1}],
        }
        return {**row, "controls": [control]}

    return {
        "summary": "5:add=3 in the tuned model.",
        "site": "resid_post.1",
        "side": "tuned",
        "changes": [
            {"latent": 5, "mode": "add", "value": -3.0},
            {"latent": 6, "mode": "ablate", "value": None},
        ],
        "prompts": [{"prompt": "one", "base": " a", "tuned": " b\nc", "steered": " two"}],
        "sweep": [strength(s) for s in (4.0, 0.0, 1.0, 2.0)],
        "guard": {"ratio": 1.5, "largest_ok": 2.0},
        "controls": [
            {"latent": 5, "rate": 0.1, "mean": 2.0, "norm": 1.0, "matched": [{"latent": 9, "rate": 0.1}]}
        ],
        "watch": [{"text": " two", "change": 1.0}],
        "notes": [],
    }


def evaluation_data() -> Data:
    """`evaluation.json` of two models."""

    def model(side: str, fve: float) -> Data:
        both = {"zero": 0.98, "mean": 0.97}
        return {
            "side": side,
            "fve": fve,
            "fve_ci": [fve - 0.01, fve + 0.01],
            "l0": 32.0,
            "dead_share": 0.05,
            "density": {"counts": [0] * 20 + [5, 9, 3], "never": 4},
            "splice": {
                "ce": {"original": 3.5, "spliced": 3.6, "zero": 8.0, "mean": 8.1},
                "kl": {"spliced": 0.05},
                "ce_recovered": both,
                "ce_recovered_ci": {"zero": [0.97, 0.99], "mean": None},
                "kl_recovered": both,
                "kl_recovered_ci": {"zero": [0.97, 0.99], "mean": None},
            },
        }

    models = [model("base", 0.94), model("tuned", 0.91)]
    return {
        "summary": "100 latents.",
        "site": "resid_post.1",
        "view": "base",
        "documents": 9,
        "tokens": 900,
        "models": models,
    }


def audit_data(shift: float = 0.0) -> Data:
    """What a trajectory reads of `audit.json`."""

    def task(name: str, idr: float) -> Data:
        change = {"delta_loss": -idr, "delta_loss_ci": [-idr - 0.1, -idr + 0.1]}
        return {"name": name, "idr": idr, "ci": [idr - 0.01, idr + 0.01], "relative_drift": 0.2, **change}

    def domain(name: str, z: float) -> Data:
        return {"name": name, "features": {"z": z}, "loss": {"z": -z}, "kind": "unchanged"}

    return {
        "pair": {"base": "base/", "tuned": "tuned/"},
        "tasks": [task("math", 0.1 + shift), task("code", -0.05 + shift)],
        "calibration": {"domains": [domain("general", 0.5), domain("math", 4 + shift), domain("code", -1.0)]},
    }


def all_runs(root: Path) -> dict[str, Run]:
    """One run of every stage, by stage."""
    named: dict[str, tuple[Data, str, dict[str, Any]]] = {
        "diff": (diff_data(), "diff.json", {"latents.parquet": diff_latents()}),
        "diff-compare": (compare_data(), "compare.json", {}),
        "tune": (tune_data(), "tune.json", tune_files()),
        "explain": (explain_data(), "explain.json", {"latents.parquet": explain_latents()}),
        "explain-compare": (explain_compare_data(), "compare.json", {}),
        "steer": (steer_data(), "steer.json", {}),
        "evaluation": (evaluation_data(), "evaluation.json", {}),
        "store": ({"summary": "A store.", "tokens": 5, "rate": 0.5, "rate_ci": [0.4, 0.6]}, "store.json", {}),
    }
    runs = {
        stage: make_run(root / stage, stage, data, main, files)
        for stage, (data, main, files) in named.items()
    }
    made = {"examples": make_examples(root / "examples"), "labels": make_labels(root / "labels", [1, 2, 3])}
    for stage, path in made.items():
        runs[stage] = Run(open_artifact(path), stage, json.loads((path / f"{stage}.json").read_text()))
    return runs


def damaged(data: Any, rng: random.Random, chance: float = 0.25) -> Any:
    """A copy in which entries are missing, null, no number, or of another kind, each with some chance."""
    if isinstance(data, dict):
        kept = {key: value for key, value in data.items() if rng.random() > chance / 2}
        return {key: _spoiled(value, rng, chance) for key, value in kept.items()}
    if isinstance(data, list):
        return [_spoiled(value, rng, chance) for value in data if rng.random() > chance / 4]
    return data


def _spoiled(value: Any, rng: random.Random, chance: float) -> Any:
    if rng.random() < chance / 4:
        return rng.choice([None, math.nan, math.inf, [], {}, "text", -1, [None], {"a": None}, True])
    return damaged(value, rng, chance)


def poisoned(data: Any) -> Any:
    """The same value with something hostile in every text and every name."""
    if isinstance(data, dict):
        return {key: poisoned(value) for key, value in data.items()}
    if isinstance(data, list):
        return [poisoned(value) for value in data]
    return f"{data} {EVIL}" if isinstance(data, str) else data
