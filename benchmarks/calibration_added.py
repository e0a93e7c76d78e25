"""What the dictionary adds to loss, KL, relative drift and bases that learned nothing: areas under ROC curves.

`calibration_study.py` prints them.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from calibration_power import Subject, table
from scipy import stats

from palimpsest.audit.calibration.statistic import contrasts, judge, log_change
from palimpsest.stats import percentile_interval

RIDGE, STEPS = 1.0, 50
TINY = 1e-12


def figure(models: Iterable[Mapping[str, np.ndarray]], key: str, corpora: int, k: int) -> np.ndarray:
    """Means over documents `[models, corpora]` of an overlap (at k), Δloss, KL or relative drift."""
    rows = []
    with np.errstate(invalid="ignore"):
        for model in models:
            values = [model[f"{key}/{i}"] for i in range(corpora)]
            columns = [v[:, k - 1] if v.ndim == 2 else v for v in values]
            rows.append([np.nanmean(c) if np.isfinite(c).any() else np.nan for c in columns])
    return np.array(rows, float)


class Pairs:
    """Every (model, corpus): whether it was trained on, and scores that are larger the more that looks so.

    Args:
        subjects: Models with known truth.
        nulls: Family and figures of the nulls that calibrate.
        names: Corpora, the general one first.
        readers: Names of the dictionary and of the control bases, the dictionary first.
        k: List length.
    """

    def __init__(
        self, subjects: Sequence[Subject], nulls: Sequence[Any], names: Sequence[str], readers: Any, k: int
    ) -> None:
        self.label = np.array([[name in one.trained for name in names] for one in subjects])
        self.names, self.families, self.split = list(names), [f for f, _ in nulls], len(subjects)
        models = [*(one.figures for one in subjects), *(figures for _, figures in nulls)]
        raw = {key: figure(models, key, len(names), k) for key in ("loss", "kl", "drift")}
        change = {
            reader: log_change(figure(models, f"overlap/{reader}", len(names), k)) for reader in readers
        }
        main = change[readers[0]]
        self.signed: dict[str, np.ndarray] = {}
        for reader, values in change.items():
            self.signed[reader] = self._contrasted(values)
        lost = np.exp(main[:, :1]) + 0 * raw["loss"]
        self.signed["Δloss"] = self._calibrated(raw["loss"], lost)
        self.scores: dict[str, np.ndarray] = {}
        for key, name in (("kl", "KL"), ("drift", "‖Δh‖")):
            # All zeros is what an audit without KL leaves, NaN one without kept activations.
            if np.isfinite(raw[key]).all() and raw[key].any():
                self.signed[name] = self._contrasted(np.log(np.maximum(raw[key], TINY)))
                self.scores[f"{name} raw"] = raw[key][: self.split]
        if "‖Δh‖" in self.signed:
            by_drift = raw["drift"][:, :1] + 0 * raw["loss"]
            self.scores["Δloss −z, regressed on ‖Δh‖"] = -self._calibrated(raw["loss"], by_drift)
        self.scores["Δloss raw (fall)"] = -raw["loss"][: self.split]
        kept = 1 - np.exp(main[: self.split])
        idr = 1 - kept / kept[:, :1]
        idr[:, 0] = np.nan
        self.scores |= {"IDR_rel raw": idr, "IDR_rel raw, |.|": np.abs(idr), "1 − IM raw": 1 - kept}
        for name, z in self.signed.items():
            sign = "−" if name == "Δloss" else "+"
            self.scores |= {f"{name} {sign}z": -z if name == "Δloss" else z, f"{name} |z|": np.abs(z)}

    def _contrasted(self, logs: np.ndarray) -> np.ndarray:
        """Z of a log figure's contrast, regressed on the same figure of the general corpus."""
        contrast = np.stack([contrasts(logs.T, i) for i in range(len(self.names))], 1)
        return self._calibrated(contrast, np.repeat(logs[:, :1], len(self.names), 1))

    def _calibrated(self, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        found = np.full((self.split, len(self.names)), np.nan)
        for i, name in enumerate(self.names):
            used = np.array([family != name for family in self.families])

            def rows(values: np.ndarray, i: int = i, used: np.ndarray = used) -> np.ndarray:
                nulls = values[self.split :, i][used]
                return np.column_stack([values[: self.split, i], np.tile(nulls, (self.split, 1))])

            found[:, i] = judge(rows(x), rows(y)).z
        return found

    def features(self, names: Sequence[str]) -> np.ndarray:
        """Predictors `[models, corpora, 2 figures]`: squashed z and |z| of each figure."""
        parts = [np.sign(self.signed[n]) * np.log1p(np.abs(self.signed[n])) for n in names]
        return np.stack([one for part in parts for one in (part, np.abs(part))], -1)


def auc(score: np.ndarray, label: np.ndarray) -> float:
    """Area under the ROC curve over the pairs that have a score; NaN where one class is missing."""
    known = np.isfinite(score)
    score, label = score[known], label[known]
    positives = int(label.sum())
    if not 0 < positives < len(label):
        return float("nan")
    ranks = stats.rankdata(score)[label].sum()
    return float((ranks - positives * (positives + 1) / 2) / (positives * (len(label) - positives)))


def bootstrap(statistic: Any, models: int, resamples: int, seed: int) -> list[float]:
    """Percentile interval over models of `statistic(indices)`."""
    rng = np.random.default_rng([seed, 2])
    drawn = np.array([statistic(rng.integers(models, size=models)) for _ in range(resamples)])
    return [float(one) for one in percentile_interval(drawn[np.isfinite(drawn)])]


def alone(pairs: Pairs, resamples: int, seed: int) -> list[dict[str, Any]]:
    """AUC of every score by itself, and the share of models whose trained corpus it ranks first."""
    rows, label = [], pairs.label
    taught = label.any(1) & ~label.all(1)
    for name, score in pairs.scores.items():
        known = taught & (label & np.isfinite(score)).any(1)
        top = [label[i, np.nanargmax(score[i])] for i in np.flatnonzero(known)]
        interval = bootstrap(
            lambda i, s=score: auc(s[i].ravel(), label[i].ravel()), len(label), resamples, seed
        )
        row = {"score": name, "auc": auc(score.ravel(), label.ravel()), "ci": interval}
        rows.append(row | {"named": float(np.mean(top)) if top else None, "models": len(top)})
    return sorted(rows, key=lambda row: -row["auc"])


def logistic(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights of a ridge-penalised logistic regression by Newton's method; the last is the free intercept."""
    x = np.column_stack([x, np.ones(len(x))])
    w, penalty = np.zeros(x.shape[1]), np.diag([*[RIDGE] * (x.shape[1] - 1), 1e-6])
    for _ in range(STEPS):
        p = 1 / (1 + np.exp(-np.clip(x @ w, -30, 30)))
        step = np.linalg.solve((x.T * (p * (1 - p))) @ x + penalty, x.T @ (y - p) - penalty @ w)
        w = w + step
        if np.abs(step).max() < 1e-8:
            break
    return w


def left_out(x: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Log odds of every pair `[models, corpora]` from a fit to the pairs of all other models."""
    found = np.zeros(label.shape)
    for i in range(len(label)):
        rest = np.arange(len(label)) != i
        train = x[rest].reshape(-1, x.shape[-1])
        centre, scale = train.mean(0), np.maximum(train.std(0), TINY)
        w = logistic((train - centre) / scale, label[rest].ravel().astype(float))
        found[i] = np.column_stack([(x[i] - centre) / scale, np.ones(x.shape[1])]) @ w
    return found


def added(pairs: Pairs, readers: Sequence[str], resamples: int, seed: int) -> list[dict[str, Any]]:
    """Cross-validated AUC of Δloss, KL and ‖Δh‖ together, and what the dictionary or a control adds to them."""
    label, rows = pairs.label, []
    full = tuple(name for name in ("Δloss", "KL", "‖Δh‖") if name in pairs.signed)
    others = tuple(name for name in full if name != "Δloss")
    for base in dict.fromkeys([full, ("Δloss",), others]):
        if not base:
            continue
        before = left_out(pairs.features(base), label)
        rows.append(_increment(" + ".join(base), "", before, before, label, (resamples, seed)))
        for extra in [*readers, *(n for n in full if n not in base)]:
            after = left_out(pairs.features([*base, extra]), label)
            rows.append(_increment(" + ".join(base), extra, before, after, label, (resamples, seed)))
        if base == full and len(readers) > 1:
            # The dictionary against a control, both beside the same figures.
            ours = left_out(pairs.features([*base, readers[0]]), label)
            for control in readers[1:]:
                theirs = left_out(pairs.features([*base, control]), label)
                text = " + ".join([*base, control])
                rows.append(_increment(text, f"{readers[0]} instead", theirs, ours, label, (resamples, seed)))
    return rows


def _increment(
    base: str, extra: str, before: np.ndarray, after: np.ndarray, label: np.ndarray, draws: tuple[int, int]
) -> dict[str, Any]:
    def difference(i: np.ndarray) -> float:
        flat = label[i].ravel()
        return auc(after[i].ravel(), flat) - auc(before[i].ravel(), flat)

    everyone = np.arange(len(label))
    interval = bootstrap(lambda i: auc(after[i].ravel(), label[i].ravel()), len(label), *draws)
    row = {"base": base, "extra": extra, "auc": auc(after.ravel(), label.ravel()), "ci": interval}
    if not extra:
        return row | {"difference": None, "difference_ci": None}
    return row | {
        "difference": difference(everyone),
        "difference_ci": bootstrap(difference, len(label), *draws),
    }


def print_added(singles: list[dict[str, Any]], sets: list[dict[str, Any]], readers: Sequence[str]) -> None:
    def ci(value: Sequence[float], form: str = ".3f") -> str:
        return f"[{value[0]:{form}}, {value[1]:{form}}]"

    print("## What tells a corpus trained on from another\n")
    print(
        "AUC over pairs of model and corpus, interval by bootstrap over models. KL, ‖Δh‖ and each basis are"
    )
    print("calibrated on their own figure of general text, Δloss on the dictionary's 1 − IM of it.\n")
    table(
        ("score alone", "AUC", "95 %", "ranks the trained corpus first"),
        [
            (row["score"], f"{row['auc']:.3f}", ci(row["ci"]))
            + (f"{row['named']:.0%} of {row['models']}" if row["models"] else "",)
            for row in singles
        ],
    )
    print("Together: ridge logistic regression on z and |z| of each, leaving one model out.\n")
    cells = []
    for row in sets:
        change = (
            ""
            if row["difference"] is None
            else f"{row['difference']:+.4f} {ci(row['difference_ci'], '+.4f')}"
        )
        cells.append((row["base"], row["extra"] or "alone", f"{row['auc']:.4f} {ci(row['ci'])}", change))
    table(("figures", "and", "AUC", "difference"), cells)
    ours = max((row for row in singles if row["score"].startswith(readers[0])), key=lambda row: row["auc"])
    better = [row["score"] for row in singles if row["auc"] > ours["auc"]]
    print("### What loses\n")
    best = f"the best score of the {readers[0]} ({ours['score']}, AUC {ours['auc']:.3f})"
    print(f"- Alone, {best} loses to: {', '.join(better) or 'nothing'}.")
    for row in sets:
        if row["difference"] is None:
            continue
        lo, hi = row["difference_ci"]
        word = "adds" if lo > 0 else "takes away" if hi < 0 else "adds nothing measurable:"
        print(
            f"- {row['extra']} beside {row['base']} {word} {row['difference']:+.4f} {ci((lo, hi), '+.4f')}."
        )
    print()
