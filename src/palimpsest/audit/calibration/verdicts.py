"""From tests to kinds and verdicts, with the multiplicity of two tests per corpus and several corpora.

Holm's correction within a corpus, Benjamini-Hochberg over corpora: a corpus with q <= alpha is a finding. Which of
its tests reject is then decided at alpha times the share of corpora that are findings (Benjamini & Bogomolov 2014),
because the findings were selected.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from palimpsest.findings import NullTest, Range
from palimpsest.stats import benjamini_hochberg, holm


class Evidence(NamedTuple):
    """The tests of one corpus.

    Attributes:
        features: Of c_D.
        loss: Of Δloss; None when not measured.
        p: Smaller Holm-adjusted p; NaN before `adjusted`.
        q: p after Benjamini-Hochberg over the corpora; NaN before `adjusted`.
    """

    features: NullTest
    loss: NullTest | None
    p: float = float("nan")
    q: float = float("nan")


def adjusted(tests: Mapping[str, Evidence], alpha: float) -> dict[str, Evidence]:
    """The tests of every corpus that gets a verdict, with adjusted p, q and whether each rejects."""
    if not tests:
        return {}
    within = {name: holm(np.array([one.p for one in _of(test)])) for name, test in tests.items()}
    p = np.array([float(values.min()) for values in within.values()])
    q = benjamini_hochberg(p)
    selected = q <= alpha
    threshold = alpha * selected.sum() / len(p)
    found = {}
    for i, (name, test) in enumerate(tests.items()):
        features, *loss = (
            replace(one, p_adjusted=float(value), rejects=bool(selected[i] and value <= threshold))
            for one, value in zip(_of(test), within[name], strict=True)
        )
        found[name] = Evidence(features, loss[0] if loss else None, float(p[i]), float(q[i]))
    return found


def kind_of(features_rejects: bool, loss: NullTest | None, delta_loss_ci: Range | None) -> str:
    """What a fine-tune did to a corpus.

    Args:
        features_rejects: Whether the test of the features rejects.
        loss: The test of Δloss; None when not measured.
        delta_loss_ci: Interval of Δloss over documents, nats per token.

    Returns:
        `specialised` where the loss fell, and fell below what nulls give; `damaged` where it rose, and rose above;
        else `shifted` where the features reject; else `unchanged`.
    """
    if loss is not None and loss.rejects and delta_loss_ci is not None:
        if loss.residual < 0 and delta_loss_ci[1] < 0:
            return "specialised"
        if loss.residual > 0 and delta_loss_ci[0] > 0:
            return "damaged"
    return "shifted" if features_rejects else "unchanged"


def verdict_of(kind: str | None, declared: bool) -> str:
    """How a kind compares with what the fine-tune declares; None (no verdict was possible) is `refused`."""
    table = {
        "specialised": ("undeclared", "declared-and-seen"),
        "shifted": ("undeclared", "declared-and-seen"),
        "damaged": ("damaged", "declared-but-damaged"),
        "unchanged": ("clear", "declared-but-unseen"),
    }
    return "refused" if kind is None else table[kind][declared]


def _of(test: Evidence) -> tuple[NullTest, ...]:
    return (test.features,) if test.loss is None else (test.features, test.loss)
