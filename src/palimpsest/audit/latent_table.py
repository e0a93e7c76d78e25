"""Latents of one corpus as table rows: exact contributions, and changes tested on held-out documents."""

from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from palimpsest.audit.events import BEFORE
from palimpsest.audit.latent_sums import FIELDS
from palimpsest.audit.sums import CorpusSums
from palimpsest.stats import benjamini_hochberg, mean_t

LENGTH_ROW = -1
"""The row of the decomposition that belongs to lists of different length, not to a latent."""

EXAMPLE = pa.struct(
    [
        ("before", pa.string()),
        ("token", pa.string()),
        ("after", pa.string()),
        ("base", pa.float32()),
        ("tuned", pa.float32()),
        ("document", pa.int64()),
        ("event", pa.string()),
    ]
)
NUMBERS = (
    "contribution",
    "contribution_entered",
    "contribution_left",
    "entered",
    "left",
    "rate_base",
    "rate_tuned",
    "mean_base",
    "mean_tuned",
)
TESTED = ("contribution_held_out", "change", "change_lo", "change_hi", "p", "q")
SCHEMA = pa.schema(
    [("dataset", pa.string()), ("latent", pa.int64())]
    + [(name, pa.float64()) for name in NUMBERS]
    + [("selected", pa.bool_())]
    + [(name, pa.float64()) for name in TESTED]
    + [("examples", pa.list_(EXAMPLE))]
)


def latent_rows(
    dataset: str, sums: CorpusSums, length_share: float, tokenizer: Any, top: int, confidence: float
) -> pa.Table:
    """Every latent that was active or changed, strongest contribution first, and the list-length row.

    `contribution` summed over all rows is 1 - intersection mean at the primary k (pooled: 1 - the mean of o_k over
    tokens with a list, which is 1 - IM / k where all lists are full). The `top` latents with the
    largest contribution on one half of the documents are `selected`; their change in mean activation, its
    interval, p (t over documents) and q (Benjamini-Hochberg over the selected) come from the other half.
    """
    weight = sums.latents["weight"]
    fields: dict[str, NDArray] = dict(zip(FIELDS, sums.latents["sums"].transpose(1, 0, 2), strict=True))
    whole = {
        name: both.sum(0)
        / max(weight[:, 1 if name in ("left", "entered", "lost", "gained") else 0].sum(), 1e-300)
        for name, both in fields.items()
    }
    contribution = whole["lost"] + whole["gained"]
    selected = _selected(fields, weight, top)
    tested = _tested(fields, sums.latents["change"][1], weight, selected, confidence)
    shown = np.flatnonzero((contribution > 0) | (whole["rate_base"] > 0) | (whole["rate_tuned"] > 0))
    shown = shown[np.argsort(-contribution[shown], kind="stable")]
    numbers = [contribution, whole["gained"], whole["lost"]] + [whole[name] for name in NUMBERS[3:]]
    columns: dict[str, Any] = {
        "dataset": [dataset] * (len(shown) + 1),
        "latent": [LENGTH_ROW, *shown.tolist()],
    }
    for name, values in zip(NUMBERS, numbers, strict=True):
        columns[name] = [length_share if name == "contribution" else None, *values[shown].tolist()]
    columns["selected"] = [False, *selected[shown].tolist()]
    for name in TESTED:
        columns[name] = [None, *(None if np.isnan(v) else float(v) for v in tested[name][shown])]
    examples = _examples(sums.events, set(np.flatnonzero(selected).tolist()), tokenizer)
    columns["examples"] = [[], *(examples.get(latent, []) for latent in shown.tolist())]
    return pa.table(columns, schema=SCHEMA)


def _selected(fields: dict[str, NDArray], weight: NDArray, top: int) -> NDArray:
    """The latents with the largest contribution on the first half."""
    chosen = np.zeros(fields["lost"].shape[1], dtype=bool)
    if weight.min() < 2:
        return chosen
    score = fields["lost"][0] + fields["gained"][0]
    best = np.argsort(-score, kind="stable")[:top]
    chosen[best[score[best] > 0]] = True
    return chosen


def _tested(
    fields: dict[str, NDArray], change: NDArray, weight: NDArray, selected: NDArray, confidence: float
) -> dict[str, NDArray]:
    """Held-out estimates of the selected latents; NaN for the others."""
    empty = np.full(len(selected), np.nan)
    columns = {name: empty.copy() for name in TESTED}
    if not selected.any():
        return columns
    found = mean_t(change[0][selected], change[1][selected], int(weight[1, 0]), confidence)
    for name, values in zip(("change", "change_lo", "change_hi", "p"), found, strict=True):
        columns[name][selected] = values
    columns["q"][selected] = benjamini_hochberg(columns["p"][selected])
    held_out = fields["lost"][1] + fields["gained"][1]
    columns["contribution_held_out"][selected] = held_out[selected] / weight[1, 1]
    return columns


def _examples(
    events: dict[str, NDArray], wanted: set[int], tokenizer: Any
) -> dict[int, list[dict[str, Any]]]:
    """Decoded examples of the wanted latents, strongest first."""
    found: dict[int, list[dict[str, Any]]] = {}
    for i in range(len(events["latent"])):
        latent = int(events["latent"][i])
        if latent not in wanted:
            continue
        window = events["window"][i]
        before, token, after = window[:BEFORE], window[BEFORE : BEFORE + 1], window[BEFORE + 1 :]
        text = [tokenizer.decode(part[part >= 0].tolist()) for part in (before, token, after)]
        found.setdefault(latent, []).append(
            dict(zip(("before", "token", "after"), text, strict=True))
            | {
                "base": float(events["base"][i]),
                "tuned": float(events["tuned"][i]),
                "document": int(events["document"][i]),
                "event": "entered" if events["entered"][i] else "left",
            }
        )
    return found
