"""A comparison of two adapters as a Markdown page."""

from __future__ import annotations

import re

from palimpsest.tune.explain.result import AdapterComparison, Agreement, Moved

SHOWN = 20
"""Latents of each class on the page."""


def page(found: AdapterComparison) -> str:
    """Tables, notes and a reading guide."""
    a, b = found.adapters
    lines = [
        "# Two adapters, latent by latent",
        "",
        f"A is {cell(a)} ({found.components[0]}), B is {cell(b)} ({found.components[1]}); effects on "
        + ", ".join(cell(one.name) for one in found.corpora if one.role == "corpus")
        + ".",
        "",
        f"A latent *moved* if it is among the fewest that hold {found.strong:.0%} of an adapter's effect, and did not "
        f"if it is outside the fewest that hold {found.weak:.0%}.",
        "",
    ]
    titles = {
        "only_a": "Moved in A, not in B",
        "only_b": "Moved in B, not in A",
        "both": "Moved in both, in the same direction",
        "opposite": "Moved in both, in opposite directions",
    }
    for name, title in titles.items():
        lines += [f"## {title}: {found.counts[name]:,}", "", *_table(found.moved[name])]
    lines += ["## Agreement", "", *_agreement(found.agreement)]
    lines += [f"- {cell(note)}" for note in found.notes]
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """Labels and paths are written by others: nothing in them may end a cell or a line, or act as Markdown or HTML."""
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return re.sub(r"([\\`*_{}\[\]()#+!|<>~&$:@])", r"\\\1", line)


def _table(rows: list[Moved]) -> list[str]:
    if not rows:
        return []
    head = ["site", "latent", "value A", "value B", "share of effect A", "share of effect B", "label"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows[:SHOWN]:
        cells = [
            cell(row.site),
            str(row.latent),
            *(f"{value:+.4g}" for value in row.values),
            *(f"{share:.1%}" for share in row.shares),
            cell(row.label or "–"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def _agreement(found: Agreement) -> list[str]:
    rows = [
        ("cosine of values", found.cosine, found.null_cosine),
        ("rank correlation of values", found.spearman, found.null_spearman),
        (f"shared among the {found.top_n:,} strongest", found.overlap, found.null_overlap),
    ]
    lines = [
        f"| on {found.latents:,} latents that fire in both | found | 95 % of shuffles |",
        "|---|---|---|",
    ]
    for name, value, null in rows:
        chance = "–" if null is None else f"{null[0]:.2f} to {null[1]:.2f}"
        lines.append(f"| {name} | {'–' if value is None else f'{value:.2f}'} | {chance} |")
    return [*lines, ""]
