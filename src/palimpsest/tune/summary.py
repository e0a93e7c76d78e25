"""Before and after as tune.json says them: means, differences and their intervals over rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from palimpsest.tune.measure import Measured, Part, estimate, interval


def summarise(before: Measured, after: Measured, *, seed: int = 0) -> dict[str, Any]:
    """The measured part of `tune.json`.

    Differences are after minus before; their intervals (95 %) come from resampling rows, which keeps each row's before
    and after together. What no row says anything about is None.

    Args:
        before: Of the base, `Yardstick.before(model)`.
        after: Of the tuned model.
        seed: Of the resampling.

    Returns:
        `objective_value` (lower is better), `heldout_loss`, `margin` and `general`; of unlearn also `forget` (higher is
        better) and `retain`.
    """
    found: dict[str, Any] = {
        "objective_value": _change(before.objective, after.objective, seed)
        | {"unit": after.unit, "rows": len(after.objective[0].values)},
        "heldout_loss": None
        if before.loss is None or after.loss is None
        else _loss(before.loss, after.loss, seed),
        "margin": None if after.margin is None else _margin(after.margin, seed),
        "general": _general(after, seed),
    }
    better = {"forget": "higher", "retain": "lower"}
    for name, part in after.further.items():
        found[name] = _loss(before.further[name], part, seed) | {"better": better[name]}
    return found


def _change(before: tuple[Part, ...], after: tuple[Part, ...], seed: int) -> dict[str, Any]:
    start, end = estimate(before), estimate(after)
    # Rows weigh the same before and after, so a difference of means is the mean of the rows' differences.
    gained = tuple(
        new._replace(values=new.values - old.values) for old, new in zip(before, after, strict=True)
    )
    return {"before": start, "after": end, "difference": end - start, "ci": interval(gained, seed=seed)}


def _loss(before: Part, after: Part, seed: int) -> dict[str, Any]:
    return _change((before,), (after,), seed) | {"tokens": int(after.weights.sum())}


def _margin(margin: Part, seed: int) -> dict[str, Any]:
    return {
        "after": estimate((margin,)),
        "ci": interval((margin,), seed=seed),
        "accuracy": float(np.mean(margin.values > 0)),
    }


def _general(after: Measured, seed: int) -> dict[str, Any] | None:
    side = after.general
    if side is None:
        return None
    kl = Part(side.kl, side.base.tokens, "general")
    return {
        "kl": estimate((kl,)),
        "ci": interval((kl,), seed=seed),
        "loss_before": estimate((Part(side.base.nats, side.base.tokens),)),
        "loss_after": estimate((Part(side.tuned.nats, side.tuned.tokens),)),
        "tokens": int(side.base.tokens.sum()),
    }
