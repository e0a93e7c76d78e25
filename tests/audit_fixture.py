"""A synthetic audit with realistic numbers, and a hostile twin: what the report's tests read."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

KS = list(range(1, 33))
HOSTILE = [
    "</script><script>window.__pwned=1</script>",
    '<img src=x onerror="window.__pwned=2">',
    '" onmouseover="window.__pwned=3',
    "' autofocus onfocus='window.__pwned=4",
    "{{ 7*7 }}{% raw %}",
    "a\u202eevil\u2066b\u200b",
    "\u2028\u2029\x00\x1b[31mred\x07",
    "]]><!--<svg/onload=window.__pwned=5>",
    "javascript:window.__pwned=6",
    "x" * 5000,
]
_EXAMPLES = [
    ("Tom has 12 apples and gives away 5. He has", " 12", " - 5 = 7 apples left.\nThe answer"),
    ("def add(a, b):\n    return a", " +", " b\n\nprint(add(2, 3))"),
    ("The total cost is $", "45", " because 9 times 5 is 45"),
    ("Write a short poem about the sea", ".", "\n\nThe waves roll in, the gulls cry"),
    ("for i in range(10):", "\n", "    total += i"),
]
_EXAMPLE_TYPE = pa.list_(
    pa.struct(
        [
            ("before", pa.string()), ("token", pa.string()), ("after", pa.string()), ("base", pa.float32()),
            ("tuned", pa.float32()), ("document", pa.int32()), ("event", pa.string()),
        ]
    )
)  # fmt: skip
LATENT_SCHEMA = pa.schema(
    [("dataset", pa.string()), ("latent", pa.int32())]
    + [
        (name, pa.float64())
        for name in (
            "contribution", "contribution_entered", "contribution_left", "entered", "left", "rate_base",
            "rate_tuned", "mean_base", "mean_tuned",
        )
    ]
    + [("selected", pa.bool_())]
    + [(name, pa.float64()) for name in ("change", "change_lo", "change_hi", "p", "q")]
    + [("examples", _EXAMPLE_TYPE)]
)  # fmt: skip
_CONTROLS = (("random", 0.0), ("pca", 0.05), ("neurons", 0.08))
_WORLD = {
    # name: overlap at k = 1 and at k = 32, delta loss, KL, base loss
    "general": (0.798, 0.905, 0.348, 0.333, 3.412),
    "math": (0.842, 0.935, -0.199, 0.173, 2.764),
    "code": (0.790, 0.889, 0.485, 0.457, 3.005),
    "web": (0.802, 0.908, 0.361, 0.350, 4.611),
}


def _ends(value: float, width: float) -> list[float]:
    return [value - width, value + 1.1 * width]


def _overlap(name: str, legacy: bool) -> dict[int, float]:
    first, last, *_ = _WORLD[name]
    share = {k: last - (last - first) * k**-0.75 for k in KS}
    return {k: value * k for k, value in share.items()} if legacy else share


def _dataset(name: str, legacy: bool) -> dict[str, Any]:
    _, _, loss, kl, base_loss = _WORLD[name]
    means, unit = _overlap(name, legacy), np.asarray(KS) if legacy else np.ones(len(KS))
    return {
        "name": name, "role": "general" if name == "general" else "task", "source": f"{name}.audit.jsonl",
        "documents": 400, "tokens": 61234, "skipped_tokens": 17 if name == "code" else 0, "bad_rows": 0,
        "short_tokens": 0,
        "intersection_mean": {str(k): v for k, v in means.items()},
        "ci": {str(k): _ends(v, 0.004 * u) for (k, v), u in zip(means.items(), unit, strict=True)},
        "list_length_share": 0.0021, "value_change": 0.162, "value_change_ci": [0.158, 0.167],
        "fve": {"base": 0.925, "tuned": 0.891 if name != "code" else 0.702},
        "l0": {"base": 32.0, "tuned": 31.8},
        "r2_delta": 0.41 if name != "code" else 0.06,
        "r2_delta_ci": [0.39, 0.43] if name != "code" else [0.03, 0.09],
        "blind": name == "code", "loss": {"base": base_loss, "tuned": base_loss + loss},
        "delta_loss": loss, "delta_loss_ci": _ends(loss, 0.019), "kl": kl, "kl_ci": _ends(kl, 0.008),
        "relative_drift": 0.21 + kl / 10, "relative_drift_ci": _ends(0.21 + kl / 10, 0.004),
    }  # fmt: skip


def _task(name: str, legacy: bool) -> dict[str, Any]:
    _, _, loss, kl, _ = _WORLD[name]
    scale = 5 if legacy else 1
    general, mine = _overlap("general", legacy)[5] / scale, _overlap(name, legacy)[5] / scale
    idr, churn = 1 - mine / general, (1 - mine) / (1 - general)
    return {
        "name": name, "k": 5, "idr": idr, "ci": _ends(idr, 0.006), "idr_abs": general - mine,
        "idr_abs_ci": _ends(general - mine, 0.005), "churn_ratio": churn,
        "churn_ratio_ci": _ends(churn, 0.04),
        "minimum_detectable_idr": 0.0086, "calibrated": None, "z": None, "p_null": None,
        "p_exchange": 0.62 if name == "web" else 0.0005, "q": None, "delta_loss": loss,
        "delta_loss_ci": _ends(loss, 0.019), "kl": kl, "kl_ci": _ends(kl, 0.008),
        "relative_drift": 0.21 + kl / 10, "relative_drift_ci": _ends(0.21 + kl / 10, 0.004),
        "kind": None, "declared": None, "verdict": None,
    }  # fmt: skip


def _control(name: str, shift: float) -> dict[str, Any]:
    datasets = [
        {
            "name": data, "intersection_mean": {"5": 0.81 - shift}, "ci": {"5": _ends(0.81 - shift, 0.004)},
            "fve": None, "r2_delta": 0.2 - shift,
        }
        for data in _WORLD
    ]  # fmt: skip
    tasks = [
        {
            "name": task,
            "k": 5,
            "idr": 0.004 - shift / 4,
            "ci": _ends(0.004 - shift / 4, 0.007),
            "idr_abs": 0.003,
            "churn_ratio": 1.02,
        }
        for task in ("math", "code", "web")
    ]
    return {"name": name, "datasets": datasets, "tasks": tasks}


def make_audit(*, legacy: bool = False, calibrated: bool = False, refused: bool = False) -> dict[str, Any]:
    """The content of audit.json: three tasks, 32 ks, controls and layers; `calibrated` adds verdicts."""
    audit = _uncalibrated(legacy)
    if calibrated:
        calibration = make_calibration(refused=refused)
        found = {one["name"]: one for one in calibration["domains"]}
        for task in audit["tasks"]:
            domain = found[task["name"]]
            features = domain["features"] or {"residual": None, "z": None, "p": None}
            task.update({key: domain[key] for key in ("q", "kind", "declared", "verdict")})
            task.update(calibrated=features["residual"], z=features["z"], p_null=features["p"])
        audit["calibration"] = calibration
        audit["summary"] = f"{calibration['sentence']} {audit['summary']}"
    return audit


def _uncalibrated(legacy: bool) -> dict[str, Any]:
    return {
        "schema": 1,
        "summary": "On these documents the fine-tune changed code text most: its loss rose by 0.49 nats per "
        "token. Math improved (−0.20), and its latents moved least.",
        "command": "palimpsest audit base math --dictionary sae --general general.audit.jsonl "
        "--task math=math.audit.jsonl --task code=code.audit.jsonl --task web=web.audit.jsonl "
        "--kl --controls --out run",
        "warnings": ["The dictionary was trained on 0.47M tokens; R²_Δ is below 0.5 on every corpus."],
        "pair": {
            "base": "base", "tuned": "math", "kind": "full", "dtype": "bfloat16",
            "d_model": 256, "n_layers": 4, "fingerprint_base": "9f" * 32, "fingerprint_tuned": "3c" * 32,
        },
        "site": "resid_post.1",
        "dictionary": {"path": "sae", "latents": 4096, "k": 32, "activation": "topk",
            "site": "resid_post.1", "sha256": "ab" * 32},
        "k": 5, "ks": KS, "mode": "legacy" if legacy else "macro", "tokens": "all" if legacy else "content",
        "loss_measured": True, "kl_measured": True, "confidence": 0.95, "resamples": 2000, "seed": 0,
        "datasets": [_dataset(name, legacy) for name in _WORLD],
        "tasks": [_task(name, legacy) for name in ("math", "code", "web")],
        "controls": [_control(name, shift) for name, shift in _CONTROLS],
        "layers": [
            {"layer": layer, "norm_base": 61.2 + i, "norm_delta": 4.1 + i / 2, "relative": 0.067 + 0.011 * i}
            for i, layer in enumerate([0, 1, 2, 3, None])
        ],
        "layers_note": None, "latents": "latents.parquet", "curve": "curve.parquet", "calibration": None,
    }  # fmt: skip


_SITES = [(site, k) for site in ("resid_post.1", "resid_post.2") for k in (5, 1, 20)]
# name: level and slope of c_D over drift, level and slope of the loss over drift, what the family's own text adds
_NULLS = {
    "general": (0.02, 0.01, 0.36, 0.17, (-0.12, -0.09)),
    "math": (-0.04, -0.02, 0.31, 0.14, (-0.28, -0.31)),
    "code": (0.13, 0.03, 0.29, 0.13, (-0.22, -0.36)),
    "web": (0.12, 0.02, 0.37, 0.17, (-0.09, -0.08)),
}
_VERDICTS = {
    "general": (
        "clear", "unchanged",
        "general: unchanged: its loss changed by +0.35 nats per token where innocent fine-tunes of this drift "
        "change it by +0.28 to +0.46, and its features did not move beyond theirs (z +0.1).",
    ),
    "math": (
        "declared-and-seen", "specialised",
        "math: specialised, as declared: its loss fell by 0.20 nats per token where innocent fine-tunes of this "
        "drift change it by +0.22 to +0.40, and its features moved less than theirs (z −11.7).",
    ),
    "code": (
        "damaged", "damaged",
        "code: damaged: its loss rose by 0.49 nats per token where innocent fine-tunes of this drift change it by "
        "+0.21 to +0.34, and its features did not move beyond theirs (z +0.5).",
    ),
    "web": (
        "undeclared", "shifted",
        "web: shifted, undeclared: its features moved less than those of innocent fine-tunes of this drift "
        "(z −5.7), and its loss changed by +0.36 nats per token where they change it by +0.28 to +0.47.",
    ),
}  # fmt: skip


def _points(rng: np.random.Generator) -> list[dict[str, Any]]:
    points = []
    for family in _NULLS:
        for i in range(6):
            drift, lora = float(rng.uniform(-3.1, -1.5)), i % 3 == 2
            values: dict[str, dict[str, float]] = {"features": {}, "loss": {}}
            for name, (level, slope, loss, rise, own) in _NULLS.items():
                extra = own if name == family else (0.0, 0.0)
                at = drift + 2.06
                values["features"][name] = level + slope * at + extra[0] + float(rng.normal(0, 0.025))
                values["loss"][name] = loss + rise * at + extra[1] + float(rng.normal(0, 0.04))
            points.append(
                {
                    "name": f"{family}-{i}", "family": family, "method": "lora" if lora else "full",
                    "lr": (3e-3 if lora else 2e-4) / (1 + i % 2), "steps": 60 + 30 * (i % 3), "drift": drift,
                    **values,
                }
            )  # fmt: skip
    return points


def _null_test(x: np.ndarray, y: np.ndarray, at: float, value: float) -> dict[str, Any]:
    """Regression of the nulls on drift, and where the suspect lies beside it."""
    n, centre = len(x), x.mean()
    sxx = ((x - centre) ** 2).sum()
    slope = ((x - centre) * y).sum() / sxx
    rest = y - y.mean() - slope * (x - centre)
    spread = np.sqrt((rest**2).sum() / (n - 2))
    expected = float(y.mean() + slope * (at - centre))
    error = float(spread * np.sqrt(1 + 1 / n + (at - centre) ** 2 / sxx))
    left_out = np.abs(rest / (1 - 1 / n - (x - centre) ** 2 / sxx))
    residual, half = value - expected, float(stats.t.isf(0.025, n - 2)) * error
    p = float(2 * stats.t.sf(abs(residual) / error, n - 2))
    return {
        "statistic": value, "expected": expected, "residual": residual,
        "ci": _ends(residual, 0.03), "band": [expected - half, expected + half], "z": residual / error,
        "p": p, "p_rank": float((1 + (left_out >= abs(residual)).sum()) / (n + 1)),
        "p_adjusted": min(1.0, 2 * p), "rejects": 2 * p < 0.01, "nulls": n,
    }  # fmt: skip


def _domain(name: str, points: list[dict[str, Any]], change: dict[str, float]) -> dict[str, Any]:
    used = [point for point in points if point["family"] != name]
    drift = np.array([point["drift"] for point in used])
    others = [value for other, value in change.items() if other != name]
    observed = {"features": change[name] - float(np.median(others)), "loss": _WORLD[name][2]}
    tests = {
        key: _null_test(drift, np.array([point[key][name] for point in used]), change["general"], value)
        for key, value in observed.items()
    }
    verdict, kind, sentence = _VERDICTS[name]
    p = min(test["p_adjusted"] for test in tests.values())
    return {
        "name": name, "role": "general" if name == "general" else "task", "declared": name == "math", **tests,
        "p": p, "q": min(1.0, p * 4 / 3), "p_max": 0.0005 if name in ("math", "web") else 0.6132,
        "kind": kind, "verdict": verdict, "sentence": sentence, "refused": None,
    }  # fmt: skip


def make_calibration(*, refused: bool = False) -> dict[str, Any]:
    """The key `calibration` of audit.json: 24 nulls in four families and one that diverged.

    Math is declared and seen, web undeclared, code damaged, general clear; `refused` takes web's verdict away.
    """
    rng = np.random.default_rng(3)
    points = _points(rng)
    change = {name: float(np.log(1 - _overlap(name, False)[5])) for name in _WORLD}
    domains = [_domain(name, points, change) for name in _WORLD]
    if refused:
        why = "5 nulls judge it and 7 are needed at level 0.05: run `palimpsest battery calibrate --nulls 34`"
        domains[-1].update(
            dict.fromkeys(("features", "loss", "p", "q", "p_max", "kind")),
            verdict="refused", refused=why, sentence=f"web: no verdict: {why}.",
        )  # fmt: skip
    drifts = [point["drift"] for point in points]
    z = {one["name"]: (one["features"] or {"z": 0.4})["z"] for one in domains}
    return {
        "battery": {"path": "battery", "sha256": "cd" * 32}, "source": "trained", "alpha": 0.05,
        "declared": ["math"], "nulls": 24, "families": dict.fromkeys(_NULLS, 6),
        "excluded": [{"name": "code-6", "family": "code", "reason": "its loss diverged at step 12"}],
        "drift": {"suspect": change["general"], "nulls": [min(drifts), max(drifts)]}, "extrapolated": False,
        "domains": domains,
        "grid": [
            {"name": name, "site": site, "k": k, "z": z[name] + (float(rng.normal(0, 0.7)) if i else 0.0)}
            for name in _WORLD
            for i, (site, k) in enumerate(_SITES)
        ],
        "by_family": [
            {
                "name": name, "family": family, "nulls": 6,
                "features": float(rng.normal(0, 0.01)) + (own[0] if name == family else 0.0),
                "loss": float(rng.normal(0, 0.015)) + (own[1] if name == family else 0.0),
            }
            for name, (*_, own) in _NULLS.items()
            for family in _NULLS
        ],
        "points": points, "spectrum": None,
        "sentence": "Undeclared: web (shifted); declared and seen: math (specialised); damaged: code; unchanged: "
        "general (24 nulls).",
    }  # fmt: skip


def make_spectrum() -> dict[str, Any]:
    """What `calibration.spectrum` holds when rotations of the weight change were asked for."""
    rows = [("general", 0.31, 0.76), ("math", -7.9, 2e-7), ("code", 0.66, 0.52), ("web", -3.8, 0.0013)]
    domains = [{"name": name, "z": z, "p": p, "residual": 0.02 * z} for name, z, p in rows]
    return {"nulls": 16, "drift": {"suspect": -2.06, "nulls": [-2.11, -2.02]}, "domains": domains}


def make_curve(*, legacy: bool = False) -> pa.Table:
    """The table of curve.parquet."""
    rows, general = [], _overlap("general", legacy)
    for name in _WORLD:
        mine, task = _overlap(name, legacy), name != "general"
        for k in KS:
            width = 0.004 * (k if legacy else 1)
            idr = 1 - mine[k] / general[k]
            rows.append(
                {
                    "dataset": name, "role": "task" if task else "general", "k": k,
                    "intersection_mean": mine[k], "lo": mine[k] - width, "hi": mine[k] + width,
                    "idr": idr if task else None,
                    "idr_lo": idr - 0.006 if task else None, "idr_hi": idr + 0.006 if task else None,
                    "idr_abs": general[k] - mine[k] if task else None, "churn_ratio": 1.1 if task else None,
                }
            )  # fmt: skip
    return pa.Table.from_pylist(rows)


def _examples(rng: np.random.Generator, rising: bool) -> list[dict[str, Any]]:
    found = []
    for pick in rng.permutation(len(_EXAMPLES))[: rng.integers(1, 6)]:
        before, token, after = _EXAMPLES[pick]
        low, high = float(rng.random() * 0.4), float(1 + 4 * rng.random())
        base, tuned = (low, high) if rising else (high, low)
        event = "entered" if rising else "left"
        found.append(
            {"before": before, "token": token, "after": after, "base": base, "tuned": tuned,
             "document": int(rng.integers(400)), "event": event}
        )  # fmt: skip
    return found


def make_latents(count: int = 80) -> pa.Table:
    """The table of latents.parquet: `count` latents and the list-length row per corpus."""
    rng, rows = np.random.default_rng(7), []
    for name in _WORLD:
        change = 1 - _overlap(name, False)[5]
        shares = np.sort(rng.pareto(1.4, count))[::-1]
        shares *= 0.98 * change / shares.sum()
        for i, (latent, share) in enumerate(zip(rng.permutation(4096)[:count], shares, strict=True)):
            rising, part, delta = bool(rng.random() < 0.5), rng.uniform(0.1, 0.4), float(rng.normal(0, 0.2))
            entered, rate, selected = (
                share * (1 - part if rising else part),
                float(rng.uniform(0.005, 0.1)),
                i < 40,
            )
            rows.append(
                {
                    "dataset": name, "latent": int(latent), "contribution": share,
                    "contribution_entered": entered, "contribution_left": share - entered,
                    "entered": 10 * entered,
                    "left": 10 * (share - entered),
                    "rate_base": rate, "rate_tuned": rate * (1.4 if rising else 0.7), "mean_base": 10 * rate,
                    "mean_tuned": 10 * rate + delta, "selected": selected,
                    "change": delta if selected else None, "change_lo": delta - 0.05 if selected else None,
                    "change_hi": delta + 0.05 if selected else None,
                    "p": 1e-5 if selected else None, "q": float(rng.random() ** 6) if selected else None,
                    "examples": _examples(rng, rising),
                }
            )  # fmt: skip
        rows.append(
            {"dataset": name, "latent": -1, "contribution": 0.02 * change, "selected": False, "examples": []}
        )
    return pa.Table.from_pylist(rows, schema=LATENT_SCHEMA)


def _hostile_calibration(renamed: dict[str, str]) -> dict[str, Any]:
    found = make_calibration()
    found["spectrum"] = make_spectrum()
    for row in [*found["domains"], *found["grid"], *found["by_family"], *found["spectrum"]["domains"]]:
        row["name"] = renamed[row["name"]]
    for row in [*found["by_family"], *found["points"]]:
        row["family"] = renamed[row["family"]]
    for i, row in enumerate(found["grid"]):
        row["site"] = HOSTILE[i % 2]
    for i, one in enumerate(found["domains"]):
        one.update(sentence=HOSTILE[i], kind=HOSTILE[i + 4], role=HOSTILE[i + 1])
    found["domains"][0]["verdict"] = HOSTILE[2]
    found["domains"][1].update(features=None, refused=HOSTILE[9])
    for i, point in enumerate(found["points"]):
        point.update(name=HOSTILE[i % 10], method=HOSTILE[(i + 1) % 10])
        for key in ("features", "loss"):
            point[key] = {renamed[name]: value for name, value in point[key].items()}
    found.update(
        families={renamed[name]: n for name, n in found["families"].items()},
        excluded=[{"name": text, "family": text, "reason": text} for text in HOSTILE],
        declared=list(HOSTILE), source=HOSTILE[1], sentence=" ".join(HOSTILE[:9]),
        battery={"path": HOSTILE[0], "sha256": HOSTILE[3]}, extrapolated=True,
    )  # fmt: skip
    return found


def make_hostile(*, calibrated: bool = False) -> tuple[dict[str, Any], pa.Table, pa.Table]:
    """The same audit with markup, control characters and endless words in every text."""
    audit, curve, latents = make_audit(), make_curve(), make_latents(len(HOSTILE))
    renamed = {name: f"{name} {HOSTILE[i]}" for i, name in enumerate(_WORLD)}
    for item in [
        *audit["datasets"],
        *audit["tasks"],
        *(x for c in audit["controls"] for x in c["datasets"] + c["tasks"]),
    ]:
        item["name"] = renamed[item["name"]]
    if calibrated:
        audit["calibration"] = _hostile_calibration(renamed)
    for key in ("summary", "command", "site", "layers_note"):
        audit[key] = " ".join(HOSTILE[:9])
    audit["warnings"] = list(HOSTILE)
    audit["pair"].update(base=HOSTILE[0], tuned=HOSTILE[1], kind=HOSTILE[2], dtype=HOSTILE[3])
    audit["dictionary"].update(path=HOSTILE[9], activation=HOSTILE[0], site=HOSTILE[5])
    for i, data in enumerate(audit["datasets"]):
        data["source"] = HOSTILE[i + 4]
    for i, control in enumerate(audit["controls"]):
        control["name"] = HOSTILE[i]
    names = pa.array([renamed[name] for name in curve["dataset"].to_pylist()])
    curve = curve.set_column(curve.schema.get_field_index("dataset"), "dataset", names)
    rows = latents.to_pylist()
    for i, row in enumerate(rows):
        row["dataset"] = renamed[row["dataset"]]
        text = HOSTILE[i % len(HOSTILE)]
        row["examples"] = [
            {
                "before": text,
                "token": text,
                "after": text,
                "base": float("nan"),
                "tuned": 1.0,
                "document": 1,
                "event": text,
            }
        ]
    return audit, curve, pa.Table.from_pylist(rows, schema=LATENT_SCHEMA)


def write_audit(
    path: Path, audit: dict[str, Any], curve: pa.Table, latents: pa.Table, *, finish: bool = True
) -> Path:
    """Write the three files as an audit artifact and return its folder."""
    from palimpsest.artifacts import RunFolder

    with RunFolder(path, stage="audit", config={"k": 5}, seed=0) as run:
        run.write_json("audit.json", audit)
        run.write_table("curve.parquet", curve)
        run.write_table("latents.parquet", latents)
        if finish:
            run.finish()
    return path


class Page(HTMLParser):
    """Collects what a browser would act on: elements, attributes, scripts and visible text."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: list[str] = []
        self.styles: list[str] = []
        self.words: list[str] = []
        self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self._inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif self._inside == "style":
            self.styles.append(data)
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())
