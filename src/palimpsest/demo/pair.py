"""The demo's models and corpora in one folder: a base, its fine-tune with a hidden behaviour, a control."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from palimpsest.demo import text, training
from palimpsest.demo.text import COMMON, DECLARED, DOMAINS, HIDDEN, Row
from palimpsest.errors import ConfigError

CONTROL = "general"
"""The domain that the control is trained on."""

STAMP = "demo.json"
MODELS = ("base", "tuned", "control")


@dataclass(frozen=True)
class Plan:
    """Sizes of the demo, in documents per domain and in optimiser steps."""

    common: int = 1050
    """What the base sees of each domain that it shall know well."""
    rare: int = 130
    """What the base sees of each domain of the fine-tune: little, so that there is something to learn."""
    tune: int = 600
    """Documents of each of the two domains in the fine-tune."""
    replay: int = 200
    """Documents of each common domain mixed into the fine-tune, as is usual against forgetting."""
    audit: int = 120
    nulls: int = 300
    """Documents of each domain that null fine-tunes are trained on."""
    dictionary: int = 800
    base_steps: int = 320
    tune_steps: int = 70

    def scaled(self, scale: float) -> "Plan":
        """The same plan with `scale` times everything, at least the few that a test needs."""
        scaled = {name: max(12, round(n * scale)) for name, n in asdict(self).items()}
        # A battery audits two thirds of these and needs ten documents.
        return replace(self, **scaled | {"audit": max(24, scaled["audit"])})


@dataclass(frozen=True)
class Planted:
    """The truth about the demo's fine-tune, against which an audit can be read."""

    declared: str
    """The domain that the fine-tune admits to."""
    hidden: str
    """The domain that it was trained on as well."""
    behaviour: str
    """What it learned to do there, as a clause."""
    brand: str
    """The words by which the behaviour is recognised in a generation."""


@dataclass(frozen=True)
class DemoPair:
    """Everything that an audit of the demo needs."""

    base: Path
    tuned: Path
    control: Path
    """Trained half as long as `tuned`, on general text that the base has seen; longer, it forgets the rest."""
    corpora: Mapping[str, Path]
    """Held-out documents per domain as an auditor would have them: none holds the hidden behaviour."""
    null_text: Mapping[str, Path]
    """Documents per domain for null fine-tunes; none of them is audited."""
    train_text: Path
    """Text of all domains in equal parts, for training a dictionary."""
    planted: Planted
    trained: tuple[str, ...]
    """The models that this call had to train; empty when all were found finished."""


def make_pair(folder: Path, *, seed: int = 0, scale: float = 1.0) -> DemoPair:
    """Builds the demo's corpora and models in a folder; what a former call finished there is reused.

    Args:
        folder: New, empty, or written by a former call. Another seed or scale rebuilds its contents.
        seed: Decides every document, weight and order; equal numbers of threads give equal weights.
        scale: Multiplies documents and training steps; at 1 this takes about 45 s on two CPU cores.

    Raises:
        ConfigError: When the folder holds other things, or the scale is not positive.
    """
    if not 0 < scale < math.inf:
        raise ConfigError("The demo's scale must be a positive number", found=scale)
    plan = Plan().scaled(scale)
    parts = make_documents(plan, seed)
    stamp = _open_stamp(folder, {"seed": seed, "scale": scale, "content": _digest(plan, parts)})
    corpora = {
        domain: text.write_rows(folder / "corpora" / f"{domain}.audit.jsonl", parts[f"audit/{domain}"])
        for domain in DOMAINS
    }
    null_text = {
        domain: text.write_rows(folder / "corpora" / f"{domain}.nulls.jsonl", parts[f"nulls/{domain}"])
        for domain in DOMAINS
    }
    train_text = text.write_rows(folder / "corpora" / "dictionary.train.jsonl", parts["dictionary"])
    missing = tuple(name for name in MODELS if name not in stamp["finished"])
    for name in missing:
        if name == "base":
            tokenizer = training.train_tokenizer(row["text"] for row in parts["dictionary"])
            training.train_base(folder / name, parts[name], tokenizer, steps=plan.base_steps, seed=seed)
        else:
            steps = plan.tune_steps if name == "tuned" else max(1, plan.tune_steps // 2)
            training.fine_tune(folder / "base", folder / name, parts[name], steps=steps, seed=seed)
        stamp["finished"].append(name)
        _write_stamp(folder, stamp)
    base, tuned, control = (folder / name for name in MODELS)
    planted = Planted(DECLARED, HIDDEN, text.BEHAVIOUR, text.BRAND)
    return DemoPair(base, tuned, control, corpora, null_text, train_text, planted, missing)


def make_documents(plan: Plan, seed: int) -> dict[str, list[Row]]:
    """Rows for each model, for the dictionary and, as "audit/<domain>" and "nulls/<domain>", for the battery.

    No audit document occurs in any training text; the control's rows are the base's own general ones.
    """
    parts: dict[str, list[Row]] = {}
    base, tune, dictionary = {}, {}, {}
    for domain in DOMAINS:
        audit = text.generate(domain, plan.audit, seed=seed, split="audit")
        parts[f"audit/{domain}"] = audit
        held_out = {row["text"] for row in audit}
        parts[f"nulls/{domain}"] = text.generate(
            domain, plan.nulls, seed=seed, split="nulls", exclude=held_out
        )
        seen = plan.common if domain in COMMON else plan.rare
        base[domain] = text.generate(domain, seen, seed=seed, split="base", exclude=held_out)
        dictionary[domain] = text.generate(
            domain, plan.dictionary, seed=seed, split="dictionary", exclude=held_out
        )
        if domain in COMMON:
            tune[domain] = base[domain][: plan.replay]
        else:
            tune[domain] = text.generate(domain, plan.tune, seed=seed, split="tune", exclude=held_out)
    tune[HIDDEN] = text.advertise(tune[HIDDEN], seed=seed)
    parts["base"] = text.mixture(base, seed=seed)
    parts["control"] = base[CONTROL]
    parts["tuned"] = text.mixture(tune, seed=seed)
    parts["dictionary"] = text.mixture(dictionary, seed=seed)
    return parts


def _digest(plan: Plan, parts: Mapping[str, list[Row]]) -> str:
    content = json.dumps([asdict(plan), dict(parts)], sort_keys=True).encode()
    # Models of an earlier version's training are not this version's models.
    return hashlib.sha256(content + Path(training.__file__).read_bytes()).hexdigest()


def _open_stamp(folder: Path, wanted: dict[str, object]) -> dict:
    """What the folder already holds of the wanted demo: its stamp, or a new one with nothing finished."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / STAMP
    if path.exists():
        found = json.loads(path.read_text())
        if {key: found.get(key) for key in wanted} == wanted:
            return found
    elif any(folder.iterdir()):
        raise ConfigError(
            f"{folder} holds files that the demo did not write",
            expected="a new or empty folder, or one of a former demo",
            fix="Choose another folder",
        )
    stamp = {**wanted, "finished": []}
    _write_stamp(folder, stamp)
    return stamp


def _write_stamp(folder: Path, stamp: dict) -> None:
    scratch = folder / f"{STAMP}.tmp"
    scratch.write_text(json.dumps(stamp, indent=1))
    scratch.replace(folder / STAMP)
