"""A diff, and diffs side by side, in a notebook."""

from palimpsest.diff.compare import Comparison
from palimpsest.diff.result import Diff, PatchRow
from palimpsest.display.notebook import Card, Measured, Table

SHARES, RATIOS = (-0.5, 1.0), (-0.5, 1.5)
"""What scales of shares of a KL and of ν reach over: a few far ones would press the others together."""


def diff_card(found: Diff) -> Card:
    """What a diff found: classes, what causes the change, the latents to look at first."""
    described, only = found.dictionary, found.tuned_only
    fve = {name: None if value is None else round(value, 3) for name, value in found.fve.items()}
    return Card(
        "Diff",
        f"{found.pair.get('tuned')} against {found.pair.get('base')} at {found.site}",
        found.summary,
        {
            "method": found.method,
            "latents": described.get("n_latents"),
            "L0": found.l0,
            "tokens": found.tokens,
            "FVE": fve,
            "classes": found.classes,
            "tuned-only": {name: only.get(name) for name in ("raw", "surviving", "undetermined", "null")},
            "KL between base and tuned activations, nats per prediction": found.gap,
        },
        [_put_in(found), _halves(found), _latents(found)],
        {"Behaviours": [_behaviour(one.latents, one.contexts) for one in found.behaviours]},
        found.notes,
    )


def _put_in(found: Diff) -> Table:
    """What is no choice among latents: nothing, everything, and the references beside them."""
    rows = [_patched(row) for row in _first(found) if ":" not in row.set]
    title = "Put into the base: share of the KL that is recovered"
    return Table(("what", "latents", "share", "KL left"), rows, title, within=SHARES)


def _halves(found: Diff) -> Table:
    """The better and the worse half by each ranking, beside random sets of as much mass."""
    by_set: dict[str, list[PatchRow]] = {}
    for row in _first(found):
        by_set.setdefault(row.set, []).append(row)
    rows = []
    for name, (best, *_) in by_set.items():
        kind, _, ranking = name.partition(":")
        if kind == "best":
            halves = (next(iter(by_set.get(f"{half}:{ranking}", [])), None) for half in ("best", "worst"))
            drawn = [row.share for row in by_set.get(f"random:{ranking}", []) if row.share is not None]
            mean = sum(drawn) / len(drawn) if drawn else None
            rows.append(
                (ranking, best.size, *map(_share, halves), Measured(mean, None, "percent", 1, signed=True))
            )
    columns = ("ranking", "latents", "better half", "worse half", "random, mean")
    return Table(columns, rows, "The strongest latents by each ranking", within=SHARES, scale="table")


def _first(found: Diff) -> list[PatchRow]:
    """Rows of the first kind of positions: every prediction, where that was measured."""
    return [row for row in found.patching if row.positions == found.patching[0].positions]


def _share(row: PatchRow | None) -> Measured | None:
    return None if row is None else Measured(row.share, row.ci, "percent", 1, signed=True)


def _patched(row: PatchRow) -> tuple[object, ...]:
    return row.set, row.size, _share(row), row.kl


def _latents(found: Diff) -> Table:
    ratio = "nu_error" if found.method == "crosscoder" else "nu_centred"
    rows = [
        (
            Measured(row.get("latent"), digits=0),
            row.get("class"),
            row.get("verdict"),
            row.get("delta_norm"),
            Measured(row.get(ratio), row.get(f"{ratio}_ci"), digits=2),
            Measured(row.get("causal_share"), None, "percent", 2, signed=True),
            row.get("rate_base"),
            row.get("rate_tuned"),
            _example(row.get("examples") or []),
        )
        for row in found.ranked
    ]
    columns = (
        "latent",
        "class",
        "verdict",
        "Δnorm",
        ratio,
        "causal share",
        "rate, base",
        "rate, tuned",
        "fires on",
    )
    return Table(columns, rows, f"The {len(rows)} latents to look at first", folded=True, within=RATIOS)


def _example(examples: list[dict[str, str]]) -> str:
    if not examples:
        return ""
    one = examples[0]
    return f"{str(one.get('before', ''))[-30:]}⟦{one.get('token', '')}⟧{str(one.get('after', ''))[:20]}"


def _behaviour(latents: list[int], contexts: list[dict[str, str]]) -> str:
    texts = "; ".join(f"{str(one.get('before', ''))[-40:]}⟦{one.get('token', '')}⟧" for one in contexts[:3])
    return f"latents {', '.join(map(str, latents[:8]))}: {texts}"


def comparison_card(found: Comparison) -> Card:
    """Diffs of one pair side by side."""
    places = list(dict.fromkeys(place for row in found.rows for place in row.recovered))
    rows = []
    for row in found.rows:
        shares = (_share(row.recovered.get(place)) for place in places)
        rows.append(
            (
                row.name,
                f"{row.method} ({row.activation})",
                row.latents,
                Measured(row.fve.get("difference")),
                row.raw,
                row.surviving,
                row.null,
                *shares,
                Measured(row.diff_seconds, digits=0),
            )
        )
    recovered = [f"KL recovered, {place}" for place in places]
    columns = (
        "diff",
        "method",
        "latents",
        "FVE of Δ",
        "tuned-only",
        "surviving",
        "in nulls",
        *recovered,
        "s",
    )
    baselines = [(row.positions, *_patched(row)) for row in found.baselines]
    return Card(
        "Diffs side by side",
        f"{found.pair.get('tuned')} against {found.pair.get('base')} at {found.site}",
        facts={"KL to explain, nats per prediction": found.gap},
        tables=[
            Table(columns, rows, within=SHARES, scale="table"),
            Table(("predictions", "without a dictionary", "latents", "share", "KL left"), baselines),
        ],
        notes=found.notes,
    )
