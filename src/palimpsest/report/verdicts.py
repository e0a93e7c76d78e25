"""Verdicts and what they rest on: each corpus beside the nulls, families apart, every site and k."""

import math
from dataclasses import dataclass
from typing import Any

from palimpsest.report.display import (
    Cell,
    Scale,
    count,
    decimal,
    finite,
    measure,
    missing,
    pair_of,
    percent,
    visible,
)
from palimpsest.report.tables import Audit, dig

TESTS = (("features", "Features, c_D", "features"), ("loss", "Loss, Δloss", "loss"))
"""Key of a test, its name in a table, and its name in a sentence."""


@dataclass(frozen=True)
class Badge:
    """A verdict as words, a mark and the name of its style; colour never stands alone."""

    mark: str
    words: str
    style: str
    order: int
    """Place in the list of verdicts: what needs a reader first, stands first."""


BADGES = {
    "undeclared": Badge("▲", "undeclared", "alarm", 0),
    "declared-and-seen": Badge("●", "declared and seen", "seen", 1),
    "declared-but-unseen": Badge("○", "declared, but unseen", "noted", 2),
    "declared-but-damaged": Badge("▼", "declared, but damaged", "warned", 3),
    "damaged": Badge("▼", "damaged", "warned", 4),
    "refused": Badge("—", "verdict refused", "open", 5),
    "clear": Badge("✓", "clear", "clear", 6),
}


def badge(verdict: Any) -> Badge:
    """The badge of a verdict; one that this version does not know keeps its own word, without a colour."""
    if verdict is None:
        return BADGES["refused"]
    return BADGES.get(str(verdict)) or Badge("?", visible(verdict, 20), "open", 5)


def p_cell(value: Any, note: str = "", reason: str = "not recorded") -> Cell:
    """A p- or q-value; tiny ones as a bound, since their digits mean nothing."""
    number = finite(value)
    if number is None:
        return missing(reason)
    return Cell("< 0.001" if number < 0.001 else decimal(number), note, number)


def _domains(calibration: Audit) -> list[Audit]:
    return [one for one in calibration.get("domains") or [] if isinstance(one, dict)]


def _verdict_rows(calibration: Audit) -> list[Audit]:
    rows = []
    for one in _domains(calibration):
        refused = one.get("refused")
        rows.append(
            {
                "name": visible(one.get("name"), 60),
                "declared": "declared" if one.get("declared") else "not declared",
                "badge": badge(one.get("verdict")),
                "kind": one.get("kind"),
                "sentence": one.get("sentence") or refused or "No sentence was recorded.",
            }
        )
    return sorted(rows, key=lambda row: row["badge"].order)


def _test_row(domain: Audit, key: str, title: str, scales: dict[str, Scale], no_loss: str) -> Audit:
    test = domain.get(key)
    row: Audit = {"title": title, "cells": None, "reason": ""}
    if not isinstance(test, dict):
        row["reason"] = domain.get("refused") or (no_loss if key == "loss" else "not recorded")
        return row
    band = pair_of(test.get("band"))
    expected = measure(test.get("expected"), band, signed=True)
    row["cells"] = [
        measure(test.get("statistic"), signed=True),
        expected,
        measure(test.get("residual"), test.get("ci"), signed=True, scale=scales[key]),
        measure(test.get("z"), digits=2, signed=True),
        p_cell(test.get("p")),
        p_cell(test.get("p_rank")),
        p_cell(test.get("p_adjusted"), "beyond the nulls" if test.get("rejects") else ""),
        Cell(count(test.get("nulls")), "", finite(test.get("nulls"))),
    ]
    return row


def null_table(calibration: Audit) -> Audit:
    """Each corpus' two statistics beside what innocent fine-tunes of equal drift give."""
    domains = _domains(calibration)
    scales: dict[str, Scale] = {}
    rotations = calibration.get("source") == "spectrum"
    no_loss = "random changes only raise the loss" if rotations else "its loss was not judged"
    for key, _, _ in TESTS:
        ends = [end for one in domains for end in pair_of(dig(one, key, "ci")) or ()]
        scales[key] = Scale.over([*ends, *(finite(dig(one, key, "residual")) for one in domains)])
    groups = [
        {
            "name": visible(one.get("name"), 60),
            "role": one.get("role"),
            "declared": bool(one.get("declared")),
            "badge": badge(one.get("verdict")),
            "kind": one.get("kind"),
            "q": p_cell(one.get("q")),
            "p_max": p_cell(one.get("p_max")),
            "rows": [_test_row(one, key, title, scales, no_loss) for key, title, _ in TESTS],
        }
        for one in domains
    ]
    level = finite(calibration.get("alpha"))
    band = "" if level is None else f"[where {percent(1 - level, 0)} of them fall]"
    heads = [
        ("Observed", "this fine-tune"),
        ("Expected", f"of an innocent one, equal drift {band}".strip()),
        ("Calibrated", "observed − expected [interval]"),
        ("z", "in prediction SDs"),
        ("p", "t tail, two-sided"),
        ("Rank p", "among the nulls"),
        ("Holm p", "over the two tests"),
        ("Nulls", "not trained on it"),
    ]
    return {"heads": [{"head": head, "meaning": text} for head, text in heads], "groups": groups}


def family_table(calibration: Audit) -> Audit | None:
    """Mean residual of each family of nulls on each corpus; a family's own text is marked."""
    found = [row for row in calibration.get("by_family") or [] if isinstance(row, dict)]
    if not found:
        return None
    names = list(dict.fromkeys(str(row.get("name")) for row in found))
    families = list(dict.fromkeys(str(row.get("family")) for row in found))
    held = {(str(row.get("name")), str(row.get("family"))): row for row in found}
    sizes = {family: held.get((name, family), {}).get("nulls") for name in names for family in families}
    groups = []
    for key, title, _ in TESTS:
        rows = []
        for name in names:
            cells = []
            for family in families:
                cell = measure(dig(held.get((name, family)), key), signed=True, reason="not recorded")
                own = family == name and not cell.missing
                cells.append(Cell(cell.text, "own text", cell.sort) if own else cell)
            rows.append({"name": name, "cells": cells})
        groups.append({"title": f"{title}: mean residual", "rows": rows})
    heads = [{"head": family, "meaning": f"{count(sizes[family])} nulls"} for family in families]
    return {"heads": heads, "groups": groups}


def grid_table(audit: Audit, calibration: Audit) -> Audit | None:
    """The z of the features for every corpus, site and k; the primary column is marked."""
    found = [row for row in calibration.get("grid") or [] if isinstance(row, dict)]
    if not found:
        return None
    names = list(dict.fromkeys(str(row.get("name")) for row in found))
    columns = list(dict.fromkeys((str(row.get("site")), str(row.get("k"))) for row in found))
    sites = list(dict.fromkeys(site for site, _ in columns))
    columns = [column for site in sites for column in columns if column[0] == site]
    held = {(str(r.get("name")), str(r.get("site")), str(r.get("k"))): r.get("z") for r in found}
    primary = (str(audit.get("site")), str(audit.get("k")))
    return {
        "sites": [{"site": site, "span": sum(c[0] == site for c in columns)} for site in sites],
        "columns": [
            {"k": k, "label": f"{site}, k = {k}", "primary": (site, k) == primary} for site, k in columns
        ],
        "rows": [
            {
                "name": name,
                "cells": [measure(held.get((name, *c)), digits=2, signed=True) for c in columns],
            }
            for name in names
        ],
    }


def spectrum_table(calibration: Audit) -> Audit | None:
    """The features against random rotations of this fine-tune's own weight change."""
    spectrum = calibration.get("spectrum")
    # Where rotations are the only nulls, the table of corpora already is theirs.
    if not isinstance(spectrum, dict) or calibration.get("source") == "spectrum":
        return None
    return {
        "nulls": count(spectrum.get("nulls")),
        "drift": _drift(spectrum)["nulls"],
        "rows": [
            {
                "name": row.get("name"),
                "cells": [measure(row.get("z"), digits=2, signed=True), p_cell(row.get("p"))],
            }
            for row in spectrum.get("domains") or []
            if isinstance(row, dict)
        ],
    }


def point_table(calibration: Audit) -> Audit | None:
    """Every null with its recipe and its statistic on each corpus: the charts as numbers."""
    points = [point for point in calibration.get("points") or [] if isinstance(point, dict)]
    if not points:
        return None
    names = [str(one.get("name")) for one in _domains(calibration)]
    shown = [key for key, _, _ in TESTS if any(dig(point, key) for point in points)]
    rows = []
    for point in points:
        recipe = [visible(point[key], 30) for key in ("method",) if point.get(key) is not None]
        rate = finite(point.get("lr"))
        recipe += [] if rate is None else [f"lr {rate:g}"]
        recipe += [] if finite(point.get("steps")) is None else [f"{count(point['steps'])} steps"]
        cells = [measure(dig(point, key, name), signed=True) for key in shown for name in names]
        rows.append(
            {
                "name": point.get("name"),
                "family": point.get("family"),
                "recipe": ", ".join(recipe) or None,
                "drift": measure(point.get("drift"), digits=2),
                "cells": cells,
            }
        )
    titles = [{"title": title, "span": len(names)} for key, title, _ in TESTS if key in shown]
    return {"groups": titles, "names": names * len(shown), "rows": rows}


def task_marks(audit: Audit) -> list[Audit]:
    """Badge and calibrated figure of each task, in the order of the tasks."""
    marks = []
    for task in audit.get("tasks") or []:
        cell = measure(task.get("calibrated"), signed=True, reason="no verdict")
        z, q = finite(task.get("z")), p_cell(task.get("q"))
        parts = ([] if z is None else [f"z {decimal(z, 2, True)}"]) + ([] if q.missing else [f"q {q.text}"])
        if not cell.missing:
            cell = Cell(cell.text, ", ".join(parts), cell.sort)
        marks.append({"badge": badge(task.get("verdict")), "cell": cell})
    return marks


def _share(drift: float | None) -> str:
    return "not measured" if drift is None else percent(math.exp(min(drift, 0.0)))


def _drift(calibration: Audit) -> Audit:
    suspect = finite(dig(calibration, "drift", "suspect"))
    ends = pair_of(dig(calibration, "drift", "nulls"))
    cell = measure(suspect, ends, digits=2, scale=Scale.over([suspect, *(ends or ())], zero=False))
    return {
        "whisker": None
        if cell.whisker is None
        else {"low": cell.whisker.low, "mid": cell.whisker.mid, "high": cell.whisker.high, "reference": None},
        "suspect": _share(suspect),
        "nulls": None if ends is None else f"{_share(ends[0])} to {_share(ends[1])}",
        "logarithms": cell.text if not cell.note else f"{cell.text} {cell.note}",
    }


def callouts(audit: Audit) -> list[Audit]:
    """What weakens the verdicts, unless the audit's own warnings name it."""
    calibration = audit.get("calibration")
    said = any("extrapolat" in str(text) for text in audit.get("warnings") or [])
    if not isinstance(calibration, dict) or not calibration.get("extrapolated") or said:
        return []
    drift = _drift(calibration)
    text = (
        f"On general text {drift['suspect']} of this fine-tune's lists changed; the nulls span "
        f"{drift['nulls'] or 'an unknown range'}. What an innocent fine-tune of this size does is extrapolated: "
        "make nulls of this drift (other learning rates or lengths) before you rely on a verdict."
    )
    return [{"title": "Outside the range of the nulls", "text": text}]


def _headline(summary: str, sentence: str) -> tuple[str, str, str]:
    """Headline, verdict sentence where the headline lacks it, and what the summary says beyond the verdict."""
    if sentence and summary.startswith(sentence):
        return sentence, "", summary.removeprefix(sentence).strip()
    return summary or "This audit has no summary", sentence, ""


def calibration(audit: Audit) -> Audit | None:
    """All that the page shows of the calibration; None where the audit has none."""
    found = audit.get("calibration")
    if not isinstance(found, dict):
        return None
    headline, sentence, rest = _headline(str(audit.get("summary") or ""), str(found.get("sentence") or ""))
    level = finite(found.get("alpha"))
    sources = {
        "trained": "trained fine-tunes of the same base",
        "spectrum": "random rotations of this weight change",
    }
    families = found.get("families") or {}
    return {
        "headline": headline,
        "sentence": sentence,
        "rest": rest,
        "rotations": found.get("source") == "spectrum",
        "verdicts": _verdict_rows(found),
        "corpora": count(len(_domains(found))),
        "nulls": count(found.get("nulls")),
        "level": "not recorded" if level is None else f"{level:g}",
        "declared": ", ".join(visible(name, 60) for name in found.get("declared") or []) or "nothing",
        "source": sources.get(str(found.get("source")), found.get("source")),
        "families": ", ".join(f"{count(n)} {visible(name, 40)}" for name, n in families.items()) or None,
        "excluded": [
            {key: one.get(key) for key in ("name", "family", "reason")} for one in found.get("excluded") or []
        ],
        "drift": _drift(found),
        "table": null_table(found),
        "tasks": task_marks(audit),
        "by_family": family_table(found),
        "grid": grid_table(audit, found),
        "spectrum": spectrum_table(found),
        "points": point_table(found),
    }
