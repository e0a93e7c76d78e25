"""Diffs of one pair side by side: which method found what, which of it is causal, and at what cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from palimpsest.artifacts import Artifact, RunFolder, check_claim, input_entry, open_artifact
from palimpsest.diff.compare_config import CompareConfig
from palimpsest.diff.result import Diff, PatchRow
from palimpsest.display.notebook import Card, Rich
from palimpsest.errors import ArtifactError, ConfigError
from palimpsest.findings import Range
from palimpsest.options import config_dict

STAGE = "diff-compare"
RESULT, PAGE, CHART = "compare.json", "compare.md", "kl_share"
SCHEMA = 1

BASELINES = ("mean", "template", "raw")
"""Sets that need no dictionary: they say how much there is to explain, and how little explains it."""

WHOLE = "all+bias"


@dataclass(frozen=True)
class Halves:
    """The better and the worse half by one ranking, beside random sets of as much mass; shares of the KL gap."""

    ranking: str
    positions: str
    size: int | None
    """Latents in the better half."""
    best: float | None
    best_ci: Range | None
    worst: float | None
    worst_ci: Range | None
    random: float | None
    """Mean over seeds."""
    random_range: Range | None
    """Smallest and largest over seeds."""
    directions: float | None
    """Mean over seeds, for the better half writing random directions of the same lengths."""


@dataclass(frozen=True)
class Compared:
    """One diff."""

    name: str
    path: str
    method: str
    activation: str
    latents: int
    k: int | float | None
    l0: float
    trained_tokens: int | None
    """Tokens that the dictionary was trained on; None where it does not say."""
    tokens: int
    """Tokens that statistics and scaling were taken over."""
    fve: dict[str, float | None]
    raw: int | None
    """Latents that look tuned-only; None for one decoder, where Latent Scaling is all there is."""
    surviving: int
    """Of them those that Latent Scaling finds tuned-specific."""
    undetermined: int
    null: float | None
    """Surviving in null pairs, on average; None without null diffs."""
    null_raw: float | None
    sensitivity: float | None
    """Share of the alive latents that the rule would pass if the base lacked them; None for a diff-SAE."""
    stability: dict[str, float | None]
    """Mean cosine with the closest latent of a twin, of `alive` and of `tuned_only` latents; empty without twins."""
    recovered: dict[str, PatchRow]
    """What all latents with the bias recover of the KL gap, by positions; empty without patching."""
    halves: list[Halves]
    train_seconds: int | float | None
    diff_seconds: int | float


@dataclass(frozen=True)
class Comparison(Rich):
    """The content of `compare.json`."""

    pair: dict[str, str]
    site: str
    rows: list[Compared]
    gap: dict[str, float] = field(default_factory=dict)
    """KL(tuned ‖ base's activations in the tuned model), nats per prediction, by positions; of the first diff that has
    it, as the baselines."""
    baselines: list[PatchRow] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    schema: int = SCHEMA

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    def _card(self) -> Card:
        from palimpsest.diff.card import comparison_card

        return comparison_card(self)

    @property
    def markdown(self) -> str:
        """Tables, notes and a reading guide."""
        from palimpsest.diff.compare_text import page

        return page(self)


class _Run(NamedTuple):
    """A diff with the folder that it was read from."""

    name: str
    artifact: Artifact
    diff: Diff


def compare_runs(config: CompareConfig) -> Comparison:
    """Put finished diffs side by side and write `compare.json`, `compare.md` and a chart of the KL that each recovers.

    Raises:
        ArtifactError: A folder is no finished diff.
        ConfigError: The diffs are of different pairs or sites.
    """
    check_claim(config.run.out, resume=config.run.resume, overwrite=config.run.overwrite)
    runs = _read(config.runs)
    _check(runs)
    comparison = compare(runs)
    with RunFolder(
        config.run.out,
        stage=STAGE,
        config=config_dict(config),
        inputs={f"diff/{run.name}": input_entry(run.artifact.path) for run in runs},
        seed=config.run.seed,
        models=comparison.pair,
        resume=config.run.resume,
        overwrite=config.run.overwrite,
    ) as run:
        if run.already_complete:
            return comparison
        run.write_json(RESULT, comparison.to_dict())
        run.write_bytes(PAGE, comparison.markdown.encode())
        _write_chart(run, comparison)
        run.finish()
    return comparison


def _write_chart(run: RunFolder, comparison: Comparison) -> None:
    from palimpsest.diff.compare_chart import draw

    for ending, data in draw(comparison).items():
        run.write_bytes(f"{CHART}.{ending}", data)


def compare(runs: Sequence[_Run]) -> Comparison:
    """The comparison of diffs that were read and checked."""
    first = runs[0].diff
    patched = next((run.diff for run in runs if run.diff.patching), None)
    return Comparison(
        pair=first.pair,
        site=first.site,
        rows=[_row(run) for run in runs],
        gap=patched.gap if patched else {},
        baselines=[row for row in patched.patching if row.set in BASELINES] if patched else [],
        notes=_notes(runs),
    )


def _read(paths: Sequence[str]) -> list[_Run]:
    names = [Path(path).resolve().name for path in paths]
    found = []
    for path, name in zip(paths, names, strict=True):
        artifact = open_artifact(path, stage="diff")
        diff = Diff.from_dict(artifact.read_json("diff.json"))
        found.append(_Run(name if names.count(name) == 1 else str(path), artifact, diff))
    return found


def _check(runs: Sequence[_Run]) -> None:
    """Refuse what cannot stand in one table.

    Raises:
        ConfigError: Other models or another site than the first diff's.
    """
    for run in runs[1:]:
        for side in ("base", "tuned"):
            _same(runs[0], run, f"{side} model", lambda one, side=side: _model(one, side))
        _same(runs[0], run, "site", lambda one: (one.diff.site, one.diff.site))


def _same(first: _Run, other: _Run, what: str, of: Callable[[_Run], tuple[str, str]]) -> None:
    """Each as (what decides, what is shown)."""
    (mine, shown), (theirs, found) = of(first), of(other)
    if mine != theirs:
        raise ConfigError(
            f"The diffs {first.name} and {other.name} are not of the same {what}",
            expected=shown,
            found=found,
            fix="Compare diffs of one pair at one site",
        )


def _model(run: _Run, side: str) -> tuple[str, str]:
    """Weights tell models apart; a path is written in many ways."""
    path = run.diff.pair[side]
    weights = (run.artifact.inputs.get(side) or {}).get("sha256")
    return (path, path) if weights is None else (weights, f"{path} (weights {weights[:8]})")


def _row(run: _Run) -> Compared:
    diff = run.diff
    described, only = diff.dictionary, diff.tuned_only
    return Compared(
        name=run.name,
        path=str(run.artifact.path),
        method=diff.method,
        activation=described["activation"],
        latents=described["n_latents"],
        k=described.get("k"),
        l0=diff.l0,
        trained_tokens=(described.get("metadata") or {}).get("tokens"),
        tokens=diff.tokens,
        fve=diff.fve,
        raw=only["raw"] if diff.method == "crosscoder" else None,
        surviving=only["surviving"],
        undetermined=only["undetermined"],
        null=only.get("null"),
        null_raw=only.get("null_raw"),
        sensitivity=(only.get("sensitivity") or {}).get("tuned-specific"),
        stability=_stability(diff),
        recovered={row.positions: row for row in diff.patching if row.set == WHOLE},
        halves=_halves(diff.patching),
        train_seconds=_training_seconds(described.get("path")),
        diff_seconds=sum(diff.seconds.values()),
    )


def _stability(diff: Diff) -> dict[str, float | None]:
    if not diff.stability:
        return {}
    return {which: _mean(row[which]["mean"] for row in diff.stability) for which in ("alive", "tuned_only")}


def _halves(rows: Sequence[PatchRow]) -> list[Halves]:
    found = []
    for best in rows:
        kind, _, ranking = best.set.partition(":")
        if kind != "best":
            continue

        def of(kind: str, best: PatchRow = best, ranking: str = ranking) -> list[PatchRow]:
            return [row for row in rows if row.set == f"{kind}:{ranking}" and row.positions == best.positions]

        worst = next(iter(of("worst")), None)
        seeds = [row.share for row in of("random") if row.share is not None]
        found.append(
            Halves(
                ranking=ranking,
                positions=best.positions,
                size=best.size,
                best=best.share,
                best_ci=best.ci,
                worst=worst.share if worst else None,
                worst_ci=worst.ci if worst else None,
                random=_mean(seeds),
                random_range=(min(seeds), max(seeds)) if seeds else None,
                directions=_mean(row.share for row in of("directions")),
            )
        )
    return found


def _mean(values: Any) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _training_seconds(path: str | None) -> float | None:
    """What training took, where the folder still says so; of several on one stream, an equal part of their time."""
    if path is None or not Path(path).is_dir():
        return None
    own, together = _timing(Path(path)), _timing(Path(path).parent)
    if own is not None or together is None:
        return own
    variants = sum((folder / "dictionary.json").exists() for folder in Path(path).parent.iterdir())
    return together / max(variants, 1)


def _timing(folder: Path) -> float | None:
    try:
        return open_artifact(folder, verify=False).manifest.get("timings", {}).get("train")
    except ArtifactError:
        return None


def _notes(runs: Sequence[_Run]) -> list[str]:
    """Where the budgets differ: what is compared is then more than the method."""
    checks: dict[str, Callable[[_Run], Any]] = {
        "measured tokens": lambda run: _count(run.diff.tokens),
        "corpora": _text,
        "training tokens": lambda run: _count((run.diff.dictionary.get("metadata") or {}).get("tokens")),
        "numbers of latents": lambda run: _count(run.diff.dictionary["n_latents"]),
        "thresholds": lambda run: sorted(run.diff.thresholds.items()),
        "confidence levels": lambda run: run.diff.confidence,
        "predictions of the causal test": lambda run: sorted(
            (run.diff.patched.get("predictions") or {}).items()
        ),
    }
    notes = []
    for what, of in checks.items():
        values = [str(of(run)) for run in runs]
        if len(set(values)) > 1:
            shown = "; ".join(f"{run.name}: {value}" for run, value in zip(runs, values, strict=True))
            notes.append(f"The diffs have different {what}" + ("." if len(shown) > 300 else f" ({shown})."))
    return notes


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _text(run: _Run) -> str:
    """Names and content of the corpora."""
    inputs = run.artifact.inputs
    rows = [
        (name, (inputs.get(f"corpus/{name}") or {}).get("sha256"), counts)
        for name, counts in sorted(run.diff.corpora.items())
    ]
    return ", ".join(
        f"{name} {(sha or '')[:8]} ({counts['documents']:,} documents)" for name, sha, counts in rows
    )
