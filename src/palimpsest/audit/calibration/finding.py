"""The calibration of one suspect, from a panel to its finding."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool
from numpy.typing import NDArray

from palimpsest.audit.calibration.grid import maximum
from palimpsest.audit.calibration.intervals import Resamples
from palimpsest.audit.calibration.panel import GENERAL, Level, Panel
from palimpsest.audit.calibration.sentences import audit_sentence, corpus_sentence
from palimpsest.audit.calibration.statistic import (
    Judged,
    Measured,
    document_means,
    drift_of_loss,
    fit,
    judge,
    measure,
    nulls_needed,
)
from palimpsest.audit.calibration.verdicts import Evidence, adjusted, kind_of, verdict_of
from palimpsest.errors import ConfigError
from palimpsest.findings import CalibrationFinding, DomainFinding, NullTest, Range

STILL = 0.5
"""Share of the smallest null's change on general text and on a corpus below which the corpus counts as untouched."""

LINE = 3
"""Nulls below which a line through them says nothing."""


class _Corpora(NamedTuple):
    """What the steps found, by corpus."""

    tests: dict[str, Evidence]
    refused: dict[str, str]
    delta_loss_ci: dict[str, Range | None]


class _Suspect(NamedTuple):
    """What every step needs."""

    panel: Panel
    measured: Measured
    level: Level
    matched: bool

    def judges(self, name: str) -> Bool[NDArray, " nulls"]:
        """Nulls that may judge a corpus and have every figure for it that the suspect has."""
        allowed = np.ones(self.panel.nulls, bool) if self.matched else self.panel.calibrating(name)
        figures = [self.measured.drift[0], *self._figures(name)]
        return allowed & np.all([np.isfinite(one[1:]) for one in figures], axis=0)

    def _figures(self, name: str) -> list[NDArray]:
        found = [self.measured.contrast[name][0]] if name in self.measured.contrast else []
        return found + ([self.measured.loss[name]] if self.measured.loss and self.has_loss(name) else [])

    def has_loss(self, name: str) -> bool:
        """Whether the suspect has a Δloss on a corpus."""
        return self.measured.loss is not None and bool(np.isfinite(self.measured.loss[name][0]))


def calibrate(
    panel: Panel,
    *,
    delta_loss_ci: Mapping[str, Range] | None,
    declared: Sequence[str],
    settings: Level,
    battery: dict[str, Any],
    source: str = "trained",
    excluded: Sequence[dict[str, Any]] = (),
    null_records: Sequence[Mapping[str, Any]] = (),
) -> CalibrationFinding:
    """Judge every corpus of a suspect against its nulls.

    Args:
        panel: The suspect and its nulls on the same documents.
        delta_loss_ci: By corpus, the interval of the suspect's Δloss over documents in nats per token; where one is
            missing it is made here.
        declared: Corpora that the fine-tune says it was trained on.
        settings: Level, confidence, resamples and seed.
        battery: Path and sha256 of the battery.
        source: `trained`, or `spectrum`: nulls at the suspect's own drift, which judge every corpus and no loss.
        excluded: Nulls that diverged: name, family, reason.
        null_records: `name`, `family`, `method`, `lr`, `steps` of each null, in the panel's order.

    Raises:
        ConfigError: `declared` names a corpus that is not there, `source` is another word, or there are not as many
            records as nulls.
    """
    _check(panel, declared, source, null_records)
    matched = source == "spectrum"
    if matched:
        panel = replace(panel, loss=None)
    suspect = _Suspect(panel, measure(panel), settings, matched)
    corpora = _judge_all(suspect, delta_loss_ci or {})
    grid, maxima = _grid(suspect, corpora)
    domains = _domains(panel, corpora, maxima, set(declared), source)
    drift = suspect.measured.drift[0]
    nulls = drift[1:][np.isfinite(drift[1:])]
    further = None
    if not matched and len(nulls) and not nulls.min() <= drift[0] <= nulls.max() and math.isfinite(drift[0]):
        further = bool(drift[0] > nulls.max())
    return CalibrationFinding(
        battery=battery,
        source=source,
        alpha=settings.alpha,
        declared=list(declared),
        nulls=panel.nulls,
        families=dict(Counter(panel.families)),
        excluded=list(excluded),
        drift={
            "suspect": _number(drift[0]),
            "nulls": [float(nulls.min()), float(nulls.max())] if len(nulls) else None,
        },
        extrapolated=further is not None,
        domains=domains,
        grid=grid,
        by_family=[] if matched else _by_family(suspect),
        points=_points(suspect, null_records),
        sentence=audit_sentence(domains, panel.nulls, further),
    )


def _check(panel: Panel, declared: Sequence[str], source: str, null_records: Sequence[Mapping]) -> None:
    unknown = [name for name in declared if name not in panel.overlap]
    if unknown:
        raise ConfigError(
            "a declared corpus is not in the battery",
            expected=f"names among {', '.join(panel.names)}",
            found=", ".join(unknown),
            fix="Declare corpora by the names that the battery gives them",
        )
    if source not in ("trained", "spectrum"):
        raise ConfigError("unknown kind of nulls", expected="trained or spectrum", found=source)
    if null_records and len(null_records) != panel.nulls:
        raise ConfigError(
            "records and nulls do not match", expected=f"{panel.nulls} records", found=len(null_records)
        )


def _judge_all(suspect: _Suspect, delta_loss_ci: Mapping[str, Range]) -> _Corpora:
    refused = {name: _refusal(suspect, name) for name in suspect.panel.names}
    found = _Corpora({}, {name: reason for name, reason in refused.items() if reason is not None}, {})
    if len(found.refused) == len(refused):
        return found
    resamples = Resamples(suspect.panel, suspect.measured.usable, suspect.level)
    for name in suspect.panel.names:
        if name in found.refused:
            continue
        used = suspect.judges(name)
        features, loss = _judged(suspect, name, used)
        if not features.error[0] or (loss is not None and not loss.error[0]):
            alike = "overlap" if not features.error[0] else "loss"
            found.refused[name] = (
                f"the {used.sum()} nulls that judge it do not differ in {alike}, so nothing can be compared with them"
            )
            continue
        spread = resamples.spread(name, used, matched=suspect.matched)
        tests = [
            _test(judged, interval, suspect.level.alpha, int(used.sum()))
            for judged, interval in ((features, spread.features), (loss, spread.loss))
            if judged is not None and interval is not None
        ]
        if _still(suspect, name, used):
            tests[0] = replace(tests[0], p=1.0, p_rank=1.0, p_adjusted=1.0)
        found.tests[name] = Evidence(tests[0], tests[1] if len(tests) > 1 else None)
        found.delta_loss_ci[name] = delta_loss_ci.get(name, spread.delta_loss)
    return found._replace(tests=adjusted(found.tests, suspect.level.alpha))


def _still(suspect: _Suspect, name: str, used: NDArray) -> bool:
    """Whether the suspect moved less than `STILL` of the least null's change, here and on general text.

    Such a corpus is not changed beyond the nulls, whatever a line in logarithms says so far below them.
    """
    models = np.concatenate([[True], used])
    overlap = [document_means(suspect.panel.overlap[corpus])[models, 0] for corpus in (GENERAL, name)]
    change = [1 - one for one in overlap]
    return not suspect.matched and all(bool(one[0] < STILL * one[1:].min()) for one in change)


def _judged(suspect: _Suspect, name: str, used: NDArray) -> tuple[Judged, Judged | None]:
    models, measured = np.concatenate([[True], used]), suspect.measured
    drift = measured.drift[:1, models]
    features = judge(drift, measured.contrast[name][:1, models], matched=suspect.matched)
    if measured.loss is None or not suspect.has_loss(name):
        return features, None
    change = drift_of_loss(drift)
    return features, judge(change, measured.loss[name][None, models], scale=change)


def _refusal(suspect: _Suspect, name: str) -> str | None:
    """Why a corpus cannot be judged; None where it can."""
    usable = suspect.measured.usable
    for corpus in (GENERAL, name):
        if corpus not in usable:
            return f"no document of {corpus} has a token on which a latent is active"
    if len(usable) < 2:
        return "there is no other corpus to compare it with"
    have, alpha = int(suspect.judges(name).sum()), suspect.level.alpha
    need = nulls_needed(alpha, matched=suspect.matched)
    if have >= need:
        return None
    total = math.ceil(need * suspect.panel.nulls / have) if have else 2 * need
    fix = f"run `palimpsest battery calibrate --nulls {total}`"
    if suspect.matched:
        fix = f"ask for {total} spectrum nulls"
    nulls = f"{have} null{'s judge' if have != 1 else ' judges'} it"
    return f"{nulls} and {need} are needed at level {alpha:g}: {fix}"


def _test(judged: Judged, interval: Range, alpha: float, nulls: int) -> NullTest:
    p, expected = float(judged.p[0]), float(judged.expected[0])
    reach = judged.quantile(alpha) * float(judged.error[0])
    residual = float(judged.residual[0])
    return NullTest(
        statistic=expected + residual,
        expected=expected,
        residual=residual,
        ci=interval,
        band=(expected - reach, expected + reach),
        z=float(judged.z[0]),
        p=p,
        p_rank=float(judged.p_rank[0]),
        p_adjusted=p,
        rejects=False,
        nulls=nulls,
    )


def _grid(suspect: _Suspect, corpora: _Corpora) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Rows of z over the grid, and p of the maximum by corpus."""
    rows, maxima = [], {}
    for name in corpora.tests:
        models = np.concatenate([[True], suspect.judges(name)])
        found = maximum(
            suspect.measured.drift[:, models],
            suspect.measured.contrast[name][:, models],
            suspect.level,
            suspect.panel.names.index(name),
            matched=suspect.matched,
        )
        maxima[name] = 1.0 if corpora.tests[name].features.p == 1 else found.p
        for (site, k), z in zip(suspect.panel.grid, found.z, strict=True):
            rows.append({"name": name, "site": site, "k": k, "z": _number(z)})
    return rows, maxima


def _domains(
    panel: Panel, corpora: _Corpora, maxima: Mapping[str, float], declared: set[str], source: str
) -> list[DomainFinding]:
    domains = []
    for name in panel.names:
        domain = DomainFinding(
            name,
            "general" if name == GENERAL else "task",
            name in declared,
            refused=corpora.refused.get(name),
        )
        interval = None
        if name in corpora.tests:
            test, interval = corpora.tests[name], corpora.delta_loss_ci[name]
            kind = kind_of(test.features.rejects, test.loss, interval)
            domain = replace(
                domain,
                features=test.features,
                loss=test.loss,
                p=test.p,
                q=test.q,
                p_max=_number(maxima[name]),
                kind=kind,
                verdict=verdict_of(kind, domain.declared),
            )
        domains.append(replace(domain, sentence=corpus_sentence(domain, interval, source)))
    return domains


def _by_family(suspect: _Suspect) -> list[dict[str, Any]]:
    """Mean residuals of each family of nulls, from the line through the nulls of the other families.

    A family's own text included: what a null trained on a corpus looks like there.
    """
    rows, measured = [], suspect.measured
    families = np.array(suspect.panel.families)
    for name in measured.contrast:
        drift, even = measured.drift[0], np.ones(1 + suspect.panel.nulls)
        figures = {"features": (drift, measured.contrast[name][0], even)}
        if measured.loss is not None:
            change = drift_of_loss(drift)
            figures["loss"] = (change, measured.loss[name] / change, change)
        for family, count in Counter(suspect.panel.families).items():
            others = suspect.judges(name) & (families != family)
            row: dict[str, Any] = {
                "name": name,
                "family": family,
                "nulls": count,
                "features": None,
                "loss": None,
            }
            for key, (x, y, scale) in figures.items():
                fitted = others & np.isfinite(x[1:]) & np.isfinite(y[1:])
                if fitted.sum() >= LINE:
                    line = fit(x[None, 1:][:, fitted], y[None, 1:][:, fitted])
                    own = ((y - line.at(x[None])[0]) * scale)[1:][families == family]
                    row[key] = float(own[np.isfinite(own)].mean()) if np.isfinite(own).any() else None
            rows.append(row)
    return rows


def _points(suspect: _Suspect, null_records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Every null: where it comes from, its drift, and its figures by corpus."""
    measured, points = suspect.measured, []
    for i, family in enumerate(suspect.panel.families):
        record = null_records[i] if null_records else {"name": f"null-{i}", "family": family}
        loss = measured.loss
        points.append(
            {key: record.get(key) for key in ("name", "family", "method", "lr", "steps")}
            | {
                "drift": _number(measured.drift[0, i + 1]),
                "features": {name: _number(c[0, i + 1]) for name, c in measured.contrast.items()},
                "loss": None if loss is None else {name: _number(one[i + 1]) for name, one in loss.items()},
            }
        )
    return points


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
