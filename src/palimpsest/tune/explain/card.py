"""What an adapter did, and two adapters side by side, in a notebook."""

from palimpsest.display.notebook import Card, Measured, Table
from palimpsest.tune.explain.result import AdapterComparison, CurvePoint, Explanation, Moved

KINDS = {
    "keep": "kept, by effect",
    "magnitude": "kept, by |value|",
    "random": "kept, random",
    "ablate": "left without them",
}


def explanation_card(found: Explanation) -> Card:
    """The strongest latents, how few hold the effect, and what is left without them."""
    held, objective = found.concentration, found.objective
    return Card(
        "Explanation",
        f"of {found.adapter} ({found.component})",
        found.summary,
        {
            "base": found.model,
            "sites": [one.site for one in found.sites],
            "latents": held.latents,
            "moved": held.moved,
            "firing": held.firing,
            "hold 50 % of the effect": held.half,
            "hold 90 %": held.most,
            "pruned to": None if found.pruned is None else found.pruned.n,
        },
        [
            Table(
                ("objective", "base", "with the adapter", "difference", "unit"),
                [
                    (
                        objective.name,
                        objective.base,
                        objective.full,
                        Measured(objective.difference, objective.ci, digits=4, signed=True),
                        objective.unit,
                    )
                ],
            ),
            _curves(found.curves),
            _latents(found),
        ],
        notes=found.notes,
    )


def _curves(points: list[CurvePoint]) -> Table:
    by_place = {(one.kind, one.n): one for one in points}
    rows = []
    for n in sorted({one.n for one in points}):
        shares = []
        for kind in KINDS:
            point = by_place.get((kind, n))
            shares.append(
                None if point is None else Measured(point.share, point.ci, "percent", 1, signed=True)
            )
        rows.append((n, *shares))
    return Table(
        ("latents", *KINDS.values()),
        rows,
        "Share of the effect on held-out documents",
        folded=True,
        scale="table",
    )


def _latents(found: Explanation) -> Table:
    texts = [one.name for one in found.corpora][:3]
    rows = [
        (
            one.site,
            Measured(one.latent, digits=0),
            Measured(one.value, signed=True),
            one.norm,
            Measured(one.share, None, "percent", 1),
            *(Measured(one.rate.get(name), None, "percent", 2) for name in texts),
            one.label,
        )
        for by in found.rankings
        if by.by == "effect"
        for one in by.latents
    ]
    rates = [f"fires on {name}" for name in texts]
    columns = ("site", "latent", "value", "‖d‖", "share of the effect", *rates, "label")
    return Table(columns, rows[:12], "The latents with the largest effect")


def comparison_card(found: AdapterComparison) -> Card:
    """Which latents moved in one adapter and not in the other."""
    agreed = found.agreement
    titles = {
        "only_a": "Moved in A only",
        "only_b": "Moved in B only",
        "both": "Moved in both",
        "opposite": "Moved in opposite directions",
    }
    agreement = [
        ("cosine of the values", Measured(agreed.cosine), _range(agreed.null_cosine)),
        ("rank correlation", Measured(agreed.spearman), _range(agreed.null_spearman)),
        (
            f"shared among the {agreed.top_n} strongest",
            Measured(agreed.overlap, None, "percent", 1),
            _range(agreed.null_overlap),
        ),
    ]
    return Card(
        "Two adapters",
        f"A = {found.adapters[0]}, B = {found.adapters[1]}",
        found.summary,
        {
            "components": list(found.components),
            **{titles[key]: n for key, n in found.counts.items() if key in titles},
        },
        [
            Table(("agreement", "found", "95 % of shuffles"), agreement),
            *(_moved(titles.get(name, name), rows) for name, rows in found.moved.items()),
        ],
        notes=found.notes,
    )


def _range(ends: tuple[float, float] | None) -> str:
    return "–" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}".replace("-", "−")


def _moved(title: str, moved: list[Moved]) -> Table:
    rows = [
        (
            one.site,
            Measured(one.latent, digits=0),
            *(Measured(value, signed=True) for value in one.values),
            *(Measured(share, None, "percent", 1) for share in one.shares),
            one.label,
        )
        for one in moved
    ]
    columns = ("site", "latent", "value A", "value B", "effect A", "effect B", "label")
    return Table(columns, rows, title, folded=True)
