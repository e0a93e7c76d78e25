"""`palimpsest demo`: the whole tool on a pair that is made on the spot."""

import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from palimpsest.cli import VERBS
from palimpsest.cli.command import Display, emit, say, verb_app

app = verb_app("demo", VERBS["demo"].capitalize() + ".")

SITE = "resid_post.50%"
GENERAL = "general"
NULLS = 15
NULL_STEPS = (8, 16)
NULL_FULL_LR = (0.005, 0.01, 0.02, 0.04)
NULL_LORA_LR = (0.002, 0.004, 0.008, 0.016)
"""Fewer steps than `battery calibrate` takes by default, at higher rates: as much drift in less time."""


@app.default
def demo(
    *,
    out: Path = Path("palimpsest-demo"),
    seed: int = 0,
    scale: float = 1.0,
    display: Annotated[Display, Parameter(name="*")] = Display(),  # noqa: B008
) -> None:
    """Train a tiny language model, fine-tune it openly and secretly, and see what the audit finds.

    Args:
        out: Folder of the models, corpora, dictionary and audits; finished parts in it are used again.
        seed: Seed of every document and weight.
        scale: Multiplies documents and training steps.
        display: What is printed.
    """
    from palimpsest.demo.pair import make_pair
    from palimpsest.report import build_report
    from palimpsest.report.build import write_report

    started = time.perf_counter()
    pair = make_pair(out / "pair", seed=seed, scale=scale)
    dictionary = _dictionary(pair, out / "dictionary", seed, scale)
    battery = _battery(pair, dictionary, out / "battery", seed, scale)
    declared = {"tuned": pair.planted.declared, "control": GENERAL}
    audits = {
        name: _audit(pair, model, battery, out / f"audit-{name}", seed, declared[name])
        for name, model in (("tuned", pair.tuned), ("control", pair.control))
    }
    reports = {name: build_report(artifact.path) for name, artifact in audits.items()}
    findings = {name: artifact.read_json("audit.json") for name, artifact in audits.items()}
    latents = _latents(pair, dictionary, out, seed)
    whole = write_report([audits["tuned"].path, *latents], out / "report", overwrite=True)
    proof = _proof(pair)
    result = {
        "seconds": time.perf_counter() - started,
        "planted": asdict(pair.planted),
        "behaviour_rate": proof,
        "verdicts": {
            name: {row["name"]: row["verdict"] for row in finding["calibration"]["domains"]}
            for name, finding in findings.items()
        },
        "summaries": {name: finding["summary"] for name, finding in findings.items()},
        "reports": {name: str(path) for name, path in reports.items()},
        "report": str(whole.page),
    }
    emit(display, result, lambda: _show(result, findings))


def _dictionary(pair: Any, folder: Path, seed: int, scale: float) -> Path:
    from palimpsest.dictionaries.config import TrainConfig
    from palimpsest.train import TrainingOptions, TrainSaeConfig, train_sae

    recipe = TrainConfig(n_latents=1024, k=16, tokens=max(20_000, round(300_000 * scale)), batch_size=1024)
    train_sae(
        TrainSaeConfig(
            model=str(pair.base),
            corpus=(str(pair.train_text),),
            site=SITE,
            training=TrainingOptions(block_length=128),
            recipe=recipe,
            run=_run(folder, "dictionary", seed, retrain=bool(pair.trained)),
        )
    )
    return folder


def _battery(pair: Any, dictionary: Path, folder: Path, seed: int, scale: float) -> Path:
    """The battery with few and tiny nulls: enough for a verdict, not for a fine one."""
    from palimpsest.audit.battery import BatteryConfig, make_battery
    from palimpsest.audit.nulls.calibrate import calibrate_battery
    from palimpsest.audit.nulls.config import CalibrateConfig

    make_battery(
        BatteryConfig(
            base=str(pair.base),
            dictionary=(str(dictionary),),
            general=str(pair.corpora[GENERAL]),
            task=tuple(f"{name}={path}" for name, path in pair.corpora.items() if name != GENERAL),
            set_aside=0,
            keep_activations=True,
            run=_run(folder, "battery", seed, retrain=bool(pair.trained)),
        )
    )
    steps = tuple(max(2, round(n * scale)) for n in NULL_STEPS)
    calibrate_battery(
        CalibrateConfig(
            str(folder),
            nulls=NULLS,
            null_corpus=tuple(f"{name}={path}" for name, path in pair.null_text.items()),
            steps=tuple(sorted(set(steps))),
            full_lr=NULL_FULL_LR,
            lora_lr=NULL_LORA_LR,
            block_length=128,
            k_max=16,
            seed=seed,
        )
    )
    return folder


def _audit(pair: Any, model: Path, battery: Path, folder: Path, seed: int, declared: str) -> Any:
    from palimpsest.audit import AuditConfig, run_audit
    from palimpsest.audit.config import CalibrationOptions

    return run_audit(
        AuditConfig(
            str(pair.base),
            str(model),
            k_max=16,
            calibration=CalibrationOptions(battery=str(battery), declared=(declared,)),
            run=_run(folder, "audit", seed, retrain=True),
        )
    )


def _latents(pair: Any, dictionary: Path, out: Path, seed: int) -> list[Path]:
    """Where every latent fires in both models, and labels made of their own tokens."""
    from palimpsest.interpret import ExamplesConfig, LabelConfig, run_examples, run_label

    examples, labels = out / "examples", out / "labels"
    run_examples(
        ExamplesConfig(
            str(pair.base),
            str(pair.tuned),
            dictionary=str(dictionary),
            corpus=tuple(f"{name}={path}" for name, path in pair.corpora.items()),
            run=_run(examples, "examples", seed, retrain=True),
        )
    )
    run_label(LabelConfig(str(examples), provider="tokens", run=_run(labels, "labels", seed, retrain=True)))
    return [examples, labels]


def _run(folder: Path, stage: str, seed: int, *, retrain: bool) -> Any:
    """Reuse a finished folder unless what it stands on is new."""
    from palimpsest.artifacts import open_artifact
    from palimpsest.errors import ArtifactError
    from palimpsest.options import RunOptions

    try:
        finished = open_artifact(folder, stage=stage, allow_running=True).status == "complete"
    except ArtifactError:
        finished = False
    again = folder.exists() and (retrain or not finished)
    return RunOptions(out=folder, seed=seed, overwrite=again, resume=folder.exists() and not again)


def _proof(pair: Any) -> dict[str, float]:
    """How often each model's own words show the hidden behaviour: what no audit was told."""
    from palimpsest.demo.proof import behaviour_rate
    from palimpsest.demo.text import read_texts
    from palimpsest.models import load_model

    prompts = list(read_texts(pair.corpora[pair.planted.hidden]))[:24]
    rates = {}
    for name, path in (("base", pair.base), ("tuned", pair.tuned), ("control", pair.control)):
        loaded = load_model(path)
        rates[name] = behaviour_rate(loaded.model, loaded.tokenizer, prompts)
    return rates


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "nothing"


def _show(result: Mapping[str, Any], findings: Mapping[str, Any]) -> None:
    from palimpsest.cli.audit import show

    planted, rate = result["planted"], result["behaviour_rate"]
    for name, finding in findings.items():
        show(finding, result["reports"][name])
        say()
    say("Planted beside found")
    say(f"  declared: {planted['declared']} (in the fine-tune's own description)")
    say(f"  hidden:   {planted['hidden']}: {planted['behaviour']}")
    say(
        f"            in the models' own words: base {rate['base']:.0%}, tuned {rate['tuned']:.0%}, "
        f"control {rate['control']:.0%} of continuations name {planted['brand']}"
    )
    tuned = {row["name"]: row for row in findings["tuned"]["datasets"]}
    control = {row["name"]: row for row in findings["control"]["datasets"]}
    k = str(findings["tuned"]["k"])
    for name, row in tuned.items():
        role = {planted["declared"]: "declared", planted["hidden"]: "hidden"}.get(name, "")
        say(
            f"  {name:<12} {role:<9} Δloss {row['delta_loss']:+.3f} (control {control[name]['delta_loss']:+.3f})   "
            f"overlap {row['intersection_mean'][k]:.3f} (control {control[name]['intersection_mean'][k]:.3f})"
        )
    for name, verdicts in result["verdicts"].items():
        flagged = [corpus for corpus, verdict in verdicts.items() if verdict == "undeclared"]
        seen = [corpus for corpus, verdict in verdicts.items() if verdict == "declared-and-seen"]
        say(f"  verdict on {name}: declared and seen: {_listed(seen)}; undeclared: {_listed(flagged)}")
    folder = Path(result["report"]).parents[1]
    say(f"{result['seconds']:.0f} s. Open {result['report']}")
    say(f"In a browser, with search, your own text and steering: palimpsest serve {folder} --model")
