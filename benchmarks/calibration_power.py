"""Power of the calibrated verdict by number of nulls and of documents; `calibration_study.py` prints it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from palimpsest.audit.calibration import Level, Panel, calibrate
from palimpsest.findings import CalibrationFinding
from palimpsest.stats import mean_t, percentile_interval

SEEN = ("specialised", "shifted")
NULLS, DOCUMENTS = (7, 10, 14, 18, 24, 36, 48, 72), (10, 20, 40, 80)


@dataclass(frozen=True)
class Subject:
    """One fine-tune with known truth: the corpora that it was trained on, and its figures on the battery."""

    name: str
    group: str
    trained: tuple[str, ...]
    record: Mapping[str, Any]
    figures: Mapping[str, np.ndarray]


def verdicts(panel: Panel, level: Level) -> CalibrationFinding:
    """The audit's verdicts with nothing declared; intervals of Δloss by t over documents, for speed."""
    intervals = {}
    for name, values in (panel.loss or {}).items():
        known = values[0][np.isfinite(values[0])].astype(float)
        _, lo, hi, _ = mean_t(known.sum(), (known**2).sum(), len(known), level.confidence)
        intervals[name] = (float(lo), float(hi))
    return calibrate(panel, delta_loss_ci=intervals, declared=[], settings=level, battery={})


def thin(panel: Panel, nulls: np.ndarray, documents: Mapping[str, np.ndarray] | None = None) -> Panel:
    """The primary grid point of some nulls (indices) and some documents (indices by corpus)."""
    models = np.concatenate([[0], nulls + 1])

    def cut(name: str, values: np.ndarray) -> np.ndarray:
        chosen = values[models]
        return chosen if documents is None else chosen[:, documents[name]]

    return replace(
        panel,
        overlap={name: cut(name, values[:, :, :1]) for name, values in panel.overlap.items()},
        loss=panel.loss and {name: cut(name, values) for name, values in panel.loss.items()},
        grid=panel.grid[:1],
        families=tuple(panel.families[i] for i in nulls),
    )


def power(
    subjects: Sequence[Subject], panels: Mapping[str, Panel], alpha: float, draws: int, seed: int
) -> dict[str, list[dict[str, Any]]]:
    """Found share of trained-on corpora, and alarms on the others, by number of nulls and of documents."""
    first = panels[subjects[0].name]
    rng = np.random.default_rng([seed, 1])
    everyone, sizes = np.arange(first.nulls), {name: v.shape[1] for name, v in first.overlap.items()}
    fewest = min(int(first.calibrating(name).sum()) for name in first.names)
    tables: dict[str, list[dict[str, Any]]] = {"nulls": [], "documents": []}
    for need in (*(n for n in NULLS if n < fewest), None):
        chosen = [everyone if need is None else _even(first, need, rng) for _ in range(draws if need else 1)]
        found = [_found(subjects, panels, nulls, None, alpha) for nulls in chosen]
        row = {"judging": need or fewest, "nulls": len(chosen[0]), "documents": max(sizes.values())}
        tables["nulls"] += _summaries(subjects, found, row)
    for count in (*(n for n in DOCUMENTS if n < max(sizes.values())), None):
        drawn = [
            {name: rng.permutation(size)[:count] for name, size in sizes.items()} if count else None
            for _ in range(draws if count else 1)
        ]
        found = [_found(subjects, panels, everyone, documents, alpha) for documents in drawn]
        row = {"judging": fewest, "nulls": len(everyone), "documents": count or max(sizes.values())}
        tables["documents"] += _summaries(subjects, found, row)
    return tables


def _even(panel: Panel, need: int, rng: np.random.Generator) -> np.ndarray:
    """A random subset in which families take turns and at least `need` nulls judge every corpus."""
    by_family = {family: [] for family in sorted(set(panel.families))}
    for i in rng.permutation(panel.nulls):
        by_family[panel.families[i]].append(i)
    queues, chosen = [by_family[f] for f in rng.permutation(list(by_family))], []
    while len(chosen) < panel.nulls:
        for queue in queues:
            if queue:
                chosen.append(queue.pop())
            counts = [sum(panel.families[i] != name for i in chosen) for name in panel.names]
            if min(counts) >= need:
                return np.array(chosen)
    return np.array(chosen)


def _found(
    subjects: Sequence[Subject],
    panels: Mapping[str, Panel],
    nulls: np.ndarray,
    documents: Mapping[str, np.ndarray] | None,
    alpha: float,
) -> list[list[tuple[bool, str | None]]]:
    """For every subject and corpus: trained on it, and the kind."""
    level, rows = Level(alpha, resamples=8), []
    for subject in subjects:
        finding = verdicts(thin(panels[subject.name], nulls, documents), level)
        rows.append([(one.name in subject.trained, one.kind) for one in finding.domains])
    return rows


def _summaries(
    subjects: Sequence[Subject], found: Sequence[Sequence[Any]], row: Mapping[str, Any]
) -> list[dict[str, Any]]:
    rows = []
    for group in dict.fromkeys(subject.group for subject in subjects):
        members = [i for i, subject in enumerate(subjects) if subject.group == group]
        cells = [[pair for draw in found for pair in draw[i]] for i in members]
        rates = {
            key: _rate(cells, trained, kinds)
            for key, trained, kinds in (
                ("found", True, SEEN),
                ("specialised", True, ("specialised",)),
                ("alarms", False, SEEN),
                ("refused", None, (None,)),
            )
        }
        rows.append({"group": group, "models": len(members), "draws": len(found), **row, **rates})
    return rows


def _rate(cells: Sequence[Any], trained: bool | None, kinds: tuple[str | None, ...]) -> list[float] | None:
    """Share with a bootstrap interval over models, whose corpora and draws belong together."""
    counts = np.array(
        [
            (
                sum(kind in kinds for own, kind in cell if trained in (None, own)),
                sum(trained in (None, own) for own, _ in cell),
            )
            for cell in cells
        ],
        float,
    )
    if not counts[:, 1].sum():
        return None
    weights = np.random.default_rng(0).multinomial(len(cells), np.full(len(cells), 1 / len(cells)), 2000)
    drawn = weights @ counts
    drawn = drawn[drawn[:, 1] > 0]
    lo, hi = percentile_interval(drawn[:, 0] / drawn[:, 1])
    return [float(counts[:, 0].sum() / counts[:, 1].sum()), float(lo), float(hi)]


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    # A bar inside a cell would end it.
    header, *rows = [[str(cell).replace("|", "\\|") for cell in row] for row in (header, *rows)]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_power(tables: dict[str, list[dict[str, Any]]]) -> None:
    def cell(value: list[float] | None) -> str:
        return "" if value is None else f"{value[0]:.1%} [{value[1]:.1%}, {value[2]:.1%}]"

    words = ("found", "specialised", "alarms", "refused")
    for key, rows in tables.items():
        print(f"## Power against the number of {key}\n")
        print("Shares of corpora trained on (found, specialised), not trained on (alarms), all (refused);")
        print("intervals by bootstrap over models.\n")
        table(
            ("models", "nulls", "judging each corpus, at least", "documents", "draws", *words),
            [
                (f"{row['group']} ({row['models']})", row["nulls"], row["judging"], row["documents"])
                + (row["draws"], *(cell(row[word]) for word in words))
                for row in rows
            ],
        )
