"""An examples folder in a notebook."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palimpsest.display.notebook import Card, Measured, Table
from palimpsest.display.text import visible_token

if TYPE_CHECKING:
    from palimpsest.latents.index import LatentIndex

SHOWN = 12


def index_card(index: LatentIndex) -> Card:
    """What was read, and the latents that fire most."""
    from palimpsest.latents.index import Query

    about: dict[str, Any] = index.about
    pair = about.get("pair") or {}
    models = " against ".join(str(pair[side]) for side in ("tuned", "base") if pair.get(side))
    page = index.search(Query(sort="rate", descending=True, limit=SHOWN))
    rows = [
        (
            Measured(row["latent"], digits=0),
            *(Measured(row[name], None, "percent", 2) for name in ("rate", "rate_base", "rate_tuned")),
            row["label"],
            _tokens(row["tokens"]),
            _tokens(row["promoted"]),
        )
        for row in page.rows
    ]
    columns = ("latent", "fires", "in the base", "in the tuned", "label", "fires on", "promotes")
    return Card(
        "Latents with examples",
        str(index.path),
        str(about.get("summary") or ""),
        {
            "models": models,
            "site": about.get("site"),
            "view": about.get("view"),
            "alive": f"{len(index):,} of {about.get('latents') or len(index):,}",
            "tokens": about.get("tokens"),
            "corpora": list(about.get("corpora") or ()),
        },
        [Table(columns, rows, "Those that fire most")],
        notes=about.get("notes") or (),
    )


def _tokens(tokens: list[str] | None) -> str:
    return " · ".join(visible_token(one, 24) for one in (tokens or [])[:6])
