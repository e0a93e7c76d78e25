"""The calibration study: level on held-out nulls, power, and what the dictionary adds over loss, KL and ‖Δh‖.

    python benchmarks/calibration_study.py BATTERY --heldout DIR [--make 48] [--suspects NAME=MODEL:math …]
    python benchmarks/calibration_study.py BATTERY --split 30

Held-out nulls are trained like the battery's own with other seeds, learning rates and lengths; finished ones are kept
in DIR and not made again. `--split N` makes none: the battery's first N nulls calibrate and the rest are held out.
Prints Markdown; `--out` also writes every figure as JSON. `--skip power added` leaves parts out.
"""

import argparse
import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

os.environ.setdefault("OMP_NUM_THREADS", "1")

from calibration_added import Pairs, added, alone, print_added  # noqa: E402
from calibration_power import SEEN, Subject, power, print_power, table  # noqa: E402

from palimpsest.artifacts import input_entry, open_artifact  # noqa: E402
from palimpsest.audit.battery.folder import Battery  # noqa: E402
from palimpsest.audit.calibration import Level, Panel, calibrate  # noqa: E402
from palimpsest.audit.nulls.calibrate import make_nulls, recipes_of, text_hash  # noqa: E402
from palimpsest.audit.nulls.config import CalibrateConfig  # noqa: E402
from palimpsest.audit.nulls.store import CALIBRATION, Nulls, figures_of, panel_of  # noqa: E402
from palimpsest.audit.nulls.work import Workshop, cache_file, load_null, save_null  # noqa: E402
from palimpsest.errors import ConfigError  # noqa: E402
from palimpsest.models import load_pair  # noqa: E402
from palimpsest.options import ModelOptions, config_dict  # noqa: E402
from palimpsest.stats import binomial_interval  # noqa: E402

OUTSIDE = 0.25
"""How far beyond the battery's shortest and longest settings held-out ones go, as a share of a step, geometrically."""


def between(values: Sequence[float]) -> list[float]:
    """Geometric midpoints of some settings, and one a little outside on either side."""
    known = sorted(set(values))
    if len(known) == 1:
        return [known[0] / 2**OUTSIDE, known[0] * 2**OUTSIDE]
    low, high = known[0] / known[1], known[-1] / known[-2]
    middle = [(a * b) ** 0.5 for a, b in zip(known, known[1:], strict=False)]
    return [known[0] * low**OUTSIDE, *middle, known[-1] * high**OUTSIDE]


def held_out_config(args: argparse.Namespace) -> CalibrateConfig:
    """The battery's own options of calibration, with other seeds and settings."""
    kept = open_artifact(args.battery / CALIBRATION, stage=CALIBRATION, verify=False).manifest["config"]
    known = {f.name for f in fields(CalibrateConfig)} - {"battery", "models"}
    options: dict[str, Any] = {
        key: tuple(v) if isinstance(v, list) else v for key, v in kept.items() if key in known
    }
    steps = tuple(args.steps or sorted({max(1, round(one)) for one in between(options["steps"])}))
    options |= {
        "nulls": args.make,
        "seed": args.seed,
        "full_lr": tuple(args.full_lr or between(options["full_lr"])),
        "lora_lr": tuple(args.lora_lr or between(options["lora_lr"])),
        "steps": steps,
        "workers": args.workers,
    }
    if args.null_corpus:
        options["null_corpus"] = tuple(args.null_corpus)
    models = ModelOptions(**kept["models"])
    return CalibrateConfig(str(args.battery), models=models, **options)


def held_out(config: CalibrateConfig, shop: Workshop, folder: Path) -> list[Subject]:
    """Train what is not in the folder yet."""
    families = shop.families()
    texts = {family: text_hash(shop, family) for family in families}
    recipes = recipes_of(config, families)
    paths = [folder / cache_file(config.path, config, one, texts[one.family]).name for one in recipes]
    make_nulls(config, shop, [job for job in zip(recipes, paths, strict=True) if not job[1].exists()])
    found = []
    for path in paths:
        record, figures = load_null(path)
        if record["diverged"] is not None:
            print(f"{record['name']} diverged and is left out: {record['diverged']}\n")
            continue
        trained = tuple(name for name in shop.battery.names if name == record["family"])
        found.append(Subject(record["name"], "held-out", trained, record, figures))
    return found


def suspects(args: argparse.Namespace, shop: Workshop) -> list[Subject]:
    """Measure the named fine-tunes, or read what an earlier run measured."""
    found = []
    for text in args.suspects:
        name, _, rest = text.partition("=")
        model, _, taught = rest.rpartition(":")
        trained = tuple(one for one in taught.split("+") if one)
        unknown = set(trained) - set(shop.battery.names)
        if not name or not model or unknown:
            raise ConfigError(
                f"Not a suspect: {text}",
                expected=f"NAME=MODEL:TRAINED[+TRAINED…] with corpora among {', '.join(shop.battery.names)}",
                found=", ".join(unknown) or text,
            )
        config = shop.config
        shared = [input_entry(model)["sha256"], input_entry(config.path)["sha256"], config.k_max, config.kl]
        key = hashlib.sha256(json.dumps([*shared, config_dict(config.models)]).encode()).hexdigest()
        path = args.heldout / f"suspect-{key[:24]}.safetensors"
        if not path.exists():
            print(f"Measuring {model} …", flush=True)
            pair = load_pair(shop.battery.base["path"], model, config.models)
            save_null(path, {"model": model}, figures_of(shop.measure(pair.tuned)))
        record = {"name": name, "family": taught or "none", "method": "suspect", "model": model}
        found.append(Subject(name, "suspect", trained, record, load_null(path)[1]))
    return found


def judged(subject: Subject, panel: Panel, level: Level) -> list[dict[str, Any]]:
    """What the audit says of every corpus of one fine-tune, with nothing declared."""
    finding = calibrate(panel, delta_loss_ci=None, declared=[], settings=level, battery={})
    rows = []
    for one in finding.domains:
        row = {"subject": subject.name, "group": subject.group, "corpus": one.name}
        row |= {key: subject.record.get(key) for key in ("family", "method", "lr", "steps")}
        row |= {"trained": one.name in subject.trained, "kind": one.kind, "verdict": one.verdict, "q": one.q}
        row |= {"p_max": one.p_max, "extrapolated": finding.extrapolated, "refused": one.refused}
        for key, test in (("features", one.features), ("loss", one.loss)):
            names = ("z", "p", "p_rank", "residual", "ci", "nulls")
            row[key] = None if test is None else {name: getattr(test, name) for name in names}
        rows.append(row)
    return rows


def share(hits: int, of: int) -> str:
    """A count with its exact binomial interval."""
    if not of:
        return ""
    lo, hi = binomial_interval(hits, of)
    return f"{hits}/{of} = {hits / of:.1%} [{lo:.1%}, {hi:.1%}]"


def counts(rows: Sequence[dict[str, Any]], alpha: float) -> dict[str, tuple[int, int]]:
    """Hits and tests of every kind of alarm."""
    tested = [row for row in rows if row["kind"] is not None]
    found = {
        "alarms": (sum(row["kind"] in SEEN for row in tested), len(tested)),
        "damaged": (sum(row["kind"] == "damaged" for row in tested), len(tested)),
    }
    for test in ("features", "loss"):
        have = [row[test] for row in tested if row[test] is not None]
        for key in ("p", "p_rank"):
            found[f"{test} {key}"] = (sum(one[key] <= alpha for one in have), len(have))
    maxima = [row["p_max"] for row in tested if row["p_max"] is not None]
    return found | {"p_max": (sum(p <= alpha for p in maxima), len(maxima))}


def print_level(rows: Sequence[dict[str, Any]], alpha: float) -> dict[str, dict[str, tuple[int, int]]]:
    """False alarms on corpora that a held-out null was not trained on."""
    innocent = [row for row in rows if not row["trained"] and row["group"] == "held-out"]
    groups: dict[str, list[dict[str, Any]]] = {"all": innocent}
    for key, word in (("family", "trained on"), ("method", "by"), ("corpus", "tested on")):
        for value in dict.fromkeys(str(row[key]) for row in innocent):
            groups[f"{word} {value}"] = [row for row in innocent if str(row[key]) == value]
    for value, word in ((False, "within the nulls' drift"), (True, "beyond the nulls' drift")):
        groups[word] = [row for row in innocent if row["extrapolated"] is value]
    found = {name: counts(members, alpha) for name, members in groups.items() if members}
    models = {row["subject"] for row in innocent}
    alarmed = {row["subject"] for row in innocent if row["kind"] in SEEN}
    lost = sum(row["kind"] is None for row in innocent)
    print(f"## Level: {len(models)} held-out nulls at α = {alpha:g}, corpora that they were not trained on\n")
    print("Intervals are binomial (Clopper-Pearson) as if tests of one model were independent.\n")
    print(
        f"- undeclared findings: {share(*found['all']['alarms'])}; damaged: {share(*found['all']['damaged'])}"
    )
    print(f"- models with at least one undeclared finding: {share(len(alarmed), len(models))}")
    print(f"- verdicts refused: {lost}\n")
    keys = ("alarms", "features p", "loss p", "features p_rank", "loss p_rank", "p_max", "damaged")
    table(
        (
            "corpora of nulls",
            "tests",
            *(key if key in ("alarms", "damaged") else f"{key} ≤ α" for key in keys),
        ),
        [(name, one["alarms"][1], *(short(*one[key]) for key in keys)) for name, one in found.items()],
    )
    print("In full, over all:\n")
    table(("alarm", "share"), [(key, share(*found["all"][key])) for key in keys])
    print("z of an innocent fine-tune should be t (mean 0, spread a little over 1):\n")
    cells = []
    for test in ("features", "loss"):
        z = np.array([row[test]["z"] for row in innocent if row[test] is not None])
        reach = " / ".join(f"{one:.2f}" for one in np.quantile(np.abs(z), (0.5, 0.95, 1))) if len(z) else ""
        cells.append((test, f"{z.mean():+.2f}", f"{z.std():.2f}", reach) if len(z) else (test, "", "", ""))
    table(("test", "mean", "spread", "50 % / 95 % / largest |z|"), cells)
    alarms = [row for row in innocent if row["kind"] in (*SEEN, "damaged")]
    print_rows("Every alarm and damage", alarms)
    return found


def short(hits: int, of: int) -> str:
    return f"{hits}/{of} ({hits / of:.1%})" if of else ""


def number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def print_rows(title: str, rows: Sequence[dict[str, Any]]) -> None:
    print(f"{title}:\n" if rows else f"{title}: none.\n")
    if not rows:
        return
    cells = []
    for row in rows:
        tests = [number(row[test] and row[test]["z"], "+.1f") for test in ("features", "loss")]
        settings = " × ".join(str(row[key]) for key in ("lr", "steps") if row[key] is not None)
        mark = "*" if row["trained"] else ""
        cells.append((row["subject"], settings, row["corpus"] + mark, row["kind"] or "refused", *tests))
        cells[-1] += (number(row["q"], ".3g"), "beyond" if row["extrapolated"] else "")
    table(("model", "lr × steps", "corpus", "kind", "z features", "z loss", "q", "drift"), cells)


def print_detection(rows: Sequence[dict[str, Any]], alpha: float) -> list[dict[str, Any]]:
    """What became of the corpora that the models were trained on."""
    print("## Detection of the corpora trained on, every null and document\n")
    trained, cells, found = [row for row in rows if row["trained"]], [], []
    keys: list[tuple[str, Callable[[dict[str, Any]], Any]]] = [
        ("", lambda row: row["group"]),
        ("by ", lambda row: row["method"]),
        ("on ", lambda row: row["corpus"]),
        ("steps ", lambda row: row["steps"]),
    ]
    for word, key in keys:
        for value in dict.fromkeys(map(key, trained)):
            members = [row for row in trained if key(row) == value]
            if value is None or (word and value == "suspect"):
                continue
            kinds = {
                kind: sum(row["kind"] == kind for row in members) for kind in (*SEEN, "damaged", "unchanged")
            }
            of = counts(members, alpha)
            found.append({"models": f"{word}{value}", "kinds": kinds, "counts": of})
            cells.append((f"{word}{value}", share(*of["alarms"]), *kinds.values()))
            cells[-1] += (short(*of["features p"]), short(*of["loss p"]))
    header = ("models", "found", *SEEN, "damaged", "unchanged", "features p ≤ α", "loss p ≤ α")
    table(header, cells)
    print_rows("Suspects (* trained on)", [row for row in rows if row["group"] == "suspect"])
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("battery", type=Path)
    parser.add_argument("--heldout", type=Path, help="folder of held-out nulls and measured suspects")
    parser.add_argument("--split", type=int, help="calibrate with the first N nulls, hold the rest out")
    parser.add_argument("--make", type=int, default=48)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--full-lr", type=float, nargs="+")
    parser.add_argument("--lora-lr", type=float, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--null-corpus", nargs="+", help="NAME=FILE …; the battery's own by default")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--suspects", nargs="+", default=[], help="NAME=MODEL:TRAINED[+TRAINED…] …")
    parser.add_argument("--alpha", type=float, default=0.05)
    parser.add_argument("--k", type=int, default=5)
    parser.add_argument("--resamples", type=int, default=2000)
    parser.add_argument("--draws", type=int, default=5, help="random subsets per row of the power tables")
    parser.add_argument("--skip", nargs="+", choices=("power", "added"), default=[])
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.heldout is None and (args.split is None or args.suspects):
        parser.error("pass --heldout DIR (or --split N without suspects)")
    return args


def subjects_of(
    args: argparse.Namespace, nulls: Nulls, names: Sequence[str]
) -> tuple[list[Any], list[Subject]]:
    """Records that calibrate, and everything that is judged by them."""
    used, found = nulls.used, []
    if args.split is not None:
        used, rest = used[: args.split], used[args.split :]
        for record in rest:
            trained = tuple(name for name in names if name == record["family"])
            found.append(Subject(record["name"], "held-out", trained, record, nulls.figures(record)))
        if not args.suspects:
            return used, found
    args.heldout.mkdir(parents=True, exist_ok=True)
    config = held_out_config(args)
    shop = Workshop(config)
    shop.check()
    if args.split is None and args.make:
        settings = {key: getattr(config, key) for key in ("seed", "full_lr", "lora_lr", "steps")}
        print("Held out: " + ", ".join(f"{key} {value}" for key, value in settings.items()) + "\n")
        found = held_out(config, shop, args.heldout)
    return used, found + suspects(args, shop)


def main() -> None:
    args = arguments()
    battery, nulls = Battery(args.battery), Nulls(args.battery)
    used, subjects = subjects_of(args, nulls, battery.names)
    pairs = [(record["family"], nulls.figures(record)) for record in used]
    sites = {reader.name: reader.site for reader in battery.readers if not reader.control}
    panels = {}
    for i, one in enumerate(subjects):
        # Two suspects of one name would share a panel.
        subjects[i] = one = replace(one, name=one.name if one.name not in panels else f"{one.name} ({i})")
        panels[one.name] = panel_of(
            battery.names, dict(one.figures), pairs, sites, args.k, loss=battery.has_loss
        )
    print(
        f"# Calibration study of {args.battery}: {len(used)} nulls calibrate, {len(subjects)} models judged\n"
    )
    level = Level(args.alpha, resamples=args.resamples)
    rows = [row for one in subjects for row in judged(one, panels[one.name], level)]
    found: dict[str, Any] = {"rows": rows, "level": print_level(rows, args.alpha)}
    found["detection"] = print_detection(rows, args.alpha)
    if "power" not in args.skip:
        found["power"] = power(subjects, panels, args.alpha, args.draws, args.seed)
        print_power(found["power"])
    if "added" not in args.skip:
        readers = [reader.name for reader in battery.readers]
        both = Pairs(subjects, pairs, battery.names, readers, args.k)
        found["alone"] = alone(both, args.resamples, args.seed)
        found["added"] = added(both, readers, args.resamples, args.seed)
        print_added(found["alone"], found["added"], readers)
    if args.out is not None:
        args.out.write_text(json.dumps(found, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
