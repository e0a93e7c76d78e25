"""A comparison of diffs as a Markdown page."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from palimpsest.diff.compare import Compared, Comparison, Halves

NAMES = {"all": "all", "first": "first tokens of each answer"}

METHODS = {
    "crosscoder (relu)": "**L1 crosscoder.** Do not trust its tuned-only count. The penalty shrinks the base's decoder "
    "of a concept that is weak in the base to nothing (Complete Shrinkage), and it costs nothing to split one shared "
    "concept into a tuned-only and a base-only latent (Latent Decoupling). Read only what survives Latent Scaling.",
    "crosscoder": "**Crosscoder without an L1 penalty (BatchTopK and its kin).** Trust it for *new or shared?*: "
    "splitting a concept costs it a second active latent. It spends latents on what both models share, so it recovers "
    "less of the KL than a diff-SAE (about 60 % against 88 % on Gemma-2-2B in the published comparison).",
    "diff-sae": "**diff-SAE.** Trust it for *what changes the predictions?*: it spends every latent on the difference. "
    "It cannot say whether a latent is new or an old one used otherwise, and its FVE is that of the difference, which "
    "is harder to explain than an activation.",
    "tuned-sae": "**SAE of the tuned model with scaling.** The cheap ranking of what the tuned model has and the base "
    "lacks. A change that is no latent of its dictionary does not exist for it.",
    "base-sae": "**SAE of the base with scaling.** Trust it for what the fine-tune turned up or down. What the base "
    "never had has no latent here, so a small share of the KL is no proof that nothing is new.",
}
"""What each method is good for; Minder et al., arXiv 2504.02922, and the diff-SAE posts that followed it."""

GUIDE = (
    "**Tuned-only latents**: read *surviving* beside *null*, what the same recipe finds in pairs whose tuned model "
    "holds nothing new. The raw count depends on the recipe more than on the models. Without a null it stands alone. "
    "*Rule would pass* is a positive control: the share of latents that Latent Scaling would call tuned-specific if "
    "the base lacked them. Where it is small, few survivors are no evidence that nothing is new.",
    "**Share of the KL gap**: 100 % would mean that the latents carry all of what makes the tuned model predict "
    "otherwise from this site on. A ranking is worth something where *best* is above *worst* and above *random* sets "
    "of the same weight; where it is not, that ranking finds no causes here.",
    "**Stability**: cosine with the closest latent of the same recipe under another seed. Tuned-only latents that are "
    "not found again are the seed's, not the fine-tune's.",
    "One method is one view: a latent that two methods find, that survives scaling, and whose half recovers KL is the "
    "one to read first.",
)


def page(found: Comparison) -> str:
    """Tables, notes and a reading guide."""
    lines = [
        f"# Diffs of {_cell(found.pair['tuned'])} against {_cell(found.pair['base'])} at {found.site}",
        "",
        *_methods(found.rows),
        *_causes(found),
        *_halves(found.rows),
    ]
    if found.notes:
        lines += ["## Not like for like", "", *(f"- {note}" for note in found.notes), ""]
    lines += ["## How to read this", ""]
    kinds = dict.fromkeys(_kind(row) for row in found.rows)
    lines += [*(f"- {METHODS[kind]}" for kind in METHODS if kind in kinds), *(f"- {line}" for line in GUIDE)]
    return "\n".join(lines) + "\n"


def _kind(row: Compared) -> str:
    named = label(row)
    return named if named in METHODS else row.method


def label(row: Compared) -> str:
    """The method with its activation."""
    return f"{row.method} ({row.activation})"


def _methods(rows: Sequence[Compared]) -> list[str]:
    header = [
        "diff",
        "method",
        "latents",
        "k",
        "L0",
        "trained on",
        "FVE base / tuned / difference",
        "tuned-only raw / surviving / null",
        "rule would pass",
        "stability alive / tuned-only",
        "seconds training / diff",
    ]
    cells = [
        [
            row.name,
            label(row),
            f"{row.latents:,}",
            _number(row.k, "g"),
            f"{row.l0:.1f}",
            _number(row.trained_tokens, ","),
            " / ".join(_number(row.fve.get(key), ".3f") for key in ("base", "tuned", "difference")),
            f"{_number(row.raw, ',')} / {row.surviving:,} / {_number(row.null, '.1f')}",
            _number(row.sensitivity, ".0%"),
            " / ".join(_number(row.stability.get(key), ".2f") for key in ("alive", "tuned_only")),
            f"{_number(row.train_seconds, '.0f')} / {row.diff_seconds:.0f}",
        ]
        for row in rows
    ]
    return ["## What each method finds", "", *_table(header, cells)]


def _causes(found: Comparison) -> list[str]:
    """What all latents recover, and what needs no latents."""
    places = [place for place in NAMES if any(place in row.recovered for row in found.rows)]
    if not places:
        return []
    gaps = ", ".join(f"{found.gap[place]:.4f} ({NAMES[place]})" for place in places if place in found.gap)
    cells = [[row.name, label(row), *(_share_of(row, place) for place in places)] for row in found.rows]
    for name in dict.fromkeys(row.set for row in found.baselines):
        by_place = {row.positions: row for row in found.baselines if row.set == name}
        shares = [
            _share(by_place[place].share, by_place[place].ci) if place in by_place else "–"
            for place in places
        ]
        cells.append([f"*{name}*", "no dictionary", *shares])
    header = ["diff", "all latents and the bias of", *(f"predictions: {NAMES[place]}" for place in places)]
    return [
        "## Share of the KL gap that is recovered",
        "",
        f"Gap in nats per prediction: {gaps}. *mean* adds the mean difference everywhere, *template* the true "
        "difference at template tokens only, *raw* at every token: the ceiling.",
        "",
        *_table(header, cells),
    ]


def _share_of(row: Compared, place: str) -> str:
    found = row.recovered.get(place)
    return "–" if found is None else _share(found.share, found.ci)


def _halves(rows: Sequence[Compared]) -> list[str]:
    cells = [[row.name, *_half(half)] for row in rows for half in row.halves]
    if not cells:
        return []
    header = [
        "diff",
        "ranking",
        "predictions",
        "latents",
        "best half",
        "worst half",
        "random sets (range)",
        "random directions",
    ]
    return ["## Do the rankings find causes?", "", *_table(header, cells)]


def _half(half: Halves) -> list[str]:
    return [
        half.ranking,
        half.positions,
        _number(half.size, ","),
        _share(half.best, half.best_ci),
        _share(half.worst, half.worst_ci),
        _share(half.random, half.random_range),
        _share(half.directions, None),
    ]


def _share(share: float | None, bounds: Sequence[float] | None) -> str:
    if share is None:
        return "–"
    return f"{share:.1%}" + ("" if bounds is None else f" [{bounds[0]:.1%}, {bounds[1]:.1%}]")


def _number(value: int | float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    head = list(header)
    lines = ["| " + " | ".join(map(_cell, row)) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _cell(text: str) -> str:
    """Names come from folders: nothing in them may end a cell or a line."""
    return " ".join(text.split()).replace("|", "\\|")
