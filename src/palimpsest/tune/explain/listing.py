"""Latents by rank, with what is known of each: rows for a person, and all of them as a table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow
from numpy.typing import NDArray

from palimpsest.labelcache import Wanted, find_labels
from palimpsest.tune.explain.controls import Read
from palimpsest.tune.explain.result import RANKINGS, Concentration, RankedLatent, Ranking
from palimpsest.tune.explain.statistics import holders, strongest_first
from palimpsest.tune.explain_config import LabelOptions

TOP = 50
"""Latents of a ranking."""

MOST_LABELS = 100
"""Latents that a label is looked for."""

Labels = dict[tuple[str, int], str]


def concentration(read: Read) -> Concentration:
    """How few latents hold the effect."""
    effect, editable = read.effect(), read.latents.editable
    return Concentration(
        latents=int(editable.sum()),
        moved=int((read.latents.values != 0).sum()),
        firing=int((read.firing() & editable).sum()),
        effective=int((effect > 0).sum()),
        effect=float(effect.sum()),
        half=holders(effect, 0.5),
        most=holders(effect, 0.9),
    )


def orders(read: Read) -> dict[str, NDArray]:
    """The strongest latents by each ranking; those that the adapter leaves as they are have no rank."""
    size = np.abs(read.latents.values)
    strength = {
        "effect": read.effect(),
        "value": read.latents.values,
        "absolute": size,
        "weighted": size * read.latents.norms,
    }
    found = {}
    for by in RANKINGS:
        order = strongest_first(strength[by], size)
        there = (strength["effect"] > 0) if by == "effect" else size > 0
        found[by] = order[there[order]][:TOP]
    return found


def wanted_labels(read: Read, places: Iterable[NDArray]) -> list[Wanted]:
    """The latents of several lists, the first of each first, once each."""
    sources = {one.site: one.neuronpedia for one in read.subject.sites}
    lists = [list(one) for one in places]
    turn = [one[rank] for rank in range(max(map(len, lists), default=0)) for one in lists if rank < len(one)]
    found = [read.latents.locate(int(place)) for place in dict.fromkeys(turn)][:MOST_LABELS]
    return [Wanted(site, latent, sources[site]) for site, latent in found]


def labels_of(read: Read, places: Iterable[NDArray], options: LabelOptions) -> Labels:
    """Descriptions of latents, as far as there are any."""
    return find_labels(wanted_labels(read, places), options.labels, offline=options.offline)


def rankings(read: Read, labels: Labels) -> list[Ranking]:
    """The strongest latents by each of `RANKINGS`."""
    columns = _columns(read)
    return [
        Ranking(by, [_row(read, columns, int(place), labels) for place in chosen])
        for by, chosen in orders(read).items()
    ]


def _columns(read: Read) -> dict[str, Any]:
    effect = read.effect()
    total = effect.sum()
    rate = {name: one.fires.sum(0) / max(one.tokens.sum(), 1) for name, one in read.readings.items()}
    activation = {name: one.groups.sum(0) / max(one.tokens.sum(), 1) for name, one in read.readings.items()}
    return {
        "effect": effect,
        "share": effect / total if total > 0 else np.zeros_like(effect),
        "rate": rate,
        "activation": activation,
    }


def _row(read: Read, columns: dict[str, Any], place: int, labels: Labels) -> RankedLatent:
    site, latent = read.latents.locate(place)
    return RankedLatent(
        site=site,
        latent=latent,
        value=float(read.latents.values[place]),
        norm=float(read.latents.norms[place]),
        effect=float(columns["effect"][place]),
        share=float(columns["share"][place]),
        rate={name: float(one[place]) for name, one in columns["rate"].items()},
        activation={name: float(one[place]) for name, one in columns["activation"].items()},
        label=labels.get((site, latent)),
    )


def table(read: Read) -> pyarrow.Table:
    """Every latent that the adapter may change.

    Columns: `site`, `latent`, `value`, `norm`, `effect`, `share`, and `rate.NAME` and `activation.NAME` of each text.
    """
    columns = _columns(read)
    places = np.flatnonzero(read.latents.editable)
    located = [read.latents.locate(int(place)) for place in places]
    found: dict[str, Any] = {
        "site": [site for site, _ in located],
        "latent": np.array([latent for _, latent in located], np.int32),
        "value": read.latents.values[places].astype(np.float32),
        "norm": read.latents.norms[places].astype(np.float32),
        "effect": columns["effect"][places],
        "share": columns["share"][places],
    }
    for kind in ("rate", "activation"):
        found |= {f"{kind}.{name}": one[places].astype(np.float32) for name, one in columns[kind].items()}
    return pyarrow.table(found)
