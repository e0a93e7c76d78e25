"""Runs as one HTML page that needs nothing but itself: verdicts, evidence, latents, tables, and how to repeat it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
from markupsafe import Markup

from palimpsest.report import heading
from palimpsest.report.audit_sections import audit_sections
from palimpsest.report.data_table import Cards
from palimpsest.report.draw import Page, draw_methods, draw_section, draw_top, methods_of, unique
from palimpsest.report.environment import (
    SCRIPTS,
    asset,
    inert_json,
    inline_script,
    offline_policy,
    report_environment,
    style_sheet,
)
from palimpsest.report.heading import Source
from palimpsest.report.parts import Section
from palimpsest.report.pictures import page_config, vega_script
from palimpsest.report.reproduce import Recipe, audit_recipe

__all__ = ["Source", "inert_json", "render", "render_page"]

LIMIT = 9_800_000
"""Bytes of a page at most, where latents have cards; 10 MB can still be sent around."""
ROWS = (None, 500, 100, 20, 8)
"""Rows of each table, from all to few, of which the first that leave room enough are on the page."""
CARDS_SHARE = 0.3
"""Room that tables leave to cards."""
MANY = 12
"""Sections from which on a page of one run has its links at the side, too."""

DrawCards = Callable[[int], Markup]
"""Draws the cards of latents in no more than so many bytes."""


@dataclass(frozen=True)
class _View:
    """What the page's template prints."""

    title: str
    kind: str
    pair: tuple[str, str] | None
    site: str
    headline: str
    rest: str
    of: tuple[str, str, str] | None
    many: bool
    top: Markup
    claims: Markup
    found: list[dict[str, str]]
    parts: list[dict[str, Any]]
    recipes: list[Recipe]
    body: Markup = field(repr=False)


def render(
    audit: dict[str, Any], curve: pa.Table, latents: pa.Table, *, manifest: dict[str, Any] | None = None
) -> str:
    """The page of one audit, from its content.

    Args:
        audit: The content of `audit.json`.
        curve: The table of `curve.parquet`.
        latents: The table of `latents.parquet`.
        manifest: The run's manifest, for the reproducibility notes; not needed.

    Returns:
        HTML of less than 5 MB with every script and style inside, whose own policy forbids any network use.
    """
    pair, site = heading.pair_names(audit), str(audit.get("site") or "")
    source = Source("audit", "audit", pair, site, audit_recipe(audit, manifest or {}))
    return render_page([source], unique(audit_sections(audit, curve, latents, "audit")))


def render_page(
    sources: Sequence[Source],
    sections: Sequence[Section],
    cards: dict[str, Cards] | None = None,
    draw_cards: DrawCards | None = None,
    limit: int = LIMIT,
) -> str:
    """The whole page.

    Args:
        sources: The runs.
        sections: Their sections with unique names, in the order of the page.
        cards: Which latents have a card, by run.
        draw_cards: Draws those cards.
        limit: Bytes of the page at most; long tables are cut to it, and cards get what the rest leaves.

    Returns:
        HTML with every script and style inside, whose own policy forbids any network use.
    """
    html = ""
    for most in ROWS:
        page = Page(cards or {}, most=most)
        view = _view(sources, sections, page)
        bare = _assembled(view, page, None if draw_cards is None else lambda _: Markup(""), limit)
        left = limit - len(bare.encode())
        # Rows give way before cards do: they are in report.json, and what they name could not be opened.
        if left >= (limit * CARDS_SHARE if draw_cards else 0) or most == ROWS[-1]:
            html = bare if draw_cards is None else _assembled(view, page, draw_cards, limit)
            break
    return html


def _view(sources: Sequence[Source], sections: Sequence[Section], page: Page) -> _View:
    """Everything that the template prints; charts and tables are left in the page."""
    several = len(sources) > 1
    many = several or len(sections) > MANY
    lead = heading.leader(sections, sources)
    others = [heading.beside(one, sources) for one in sections if one is not lead]
    rest = heading.gathered([one for one in others if one.blocks or one.lead])
    methods = methods_of(sections)
    headline, rest_of_it = heading.headline(sections, lead, sources)
    return _View(
        title=heading.title(sources),
        kind=f"Palimpsest {'report' if several else sources[0].stage}",
        pair=heading.common_pair(sources),
        site=sources[0].site if len({one.site for one in sources if one.site}) == 1 else "",
        headline=headline,
        rest=rest_of_it,
        of=heading.subject(lead, sources),
        many=many,
        top=Markup("") if lead is None else draw_top(_without(lead, heading.CLAIMS), page),
        claims=_claims(sections, sources, page),
        found=heading.found_by_run(sections, lead, rest, sources) if several else [],
        parts=heading.links(rest, lead, methods=bool(methods), many=many, named=several),
        recipes=[one.recipe for one in sources],
        body=_body(rest, methods, page, several),
    )


def _body(rest: Sequence[Section], methods: Sequence[Any], page: Page, several: bool) -> Markup:
    body = Markup("").join(draw_section(one, page, named=several) for one in rest)
    if not methods:
        return body
    told = any(one.order == "method" for one in rest)
    title = "How it was measured" if told else "The method in plain words"
    drawn = Markup('<section id="methods">\n<h2>{}</h2>\n{}</section>').format(title, draw_methods(methods))
    return body + drawn


def _claims(sections: Sequence[Section], sources: Sequence[Source], page: Page) -> Markup:
    found = heading.claims(sections, sources)
    return Markup("") if found is None else draw_top(found, page)


def _without(section: Section, name: str) -> Section:
    return replace(
        section, blocks=[one for one in section.blocks if one is not heading.block_of(section, name)]
    )


def _assembled(view: _View, page: Page, draw_cards: DrawCards | None, limit: int) -> str:
    library = inline_script(vega_script()) if page.specs else None
    names = [
        name
        for name, wanted in {
            "shell.js": True,
            "tabs.js": True,
            "tables.js": True,
            "latents.js": draw_cards is not None,
            "charts.js": bool(page.specs),
        }.items()
        if wanted
    ]
    scripts = [inline_script(asset(name)) for name in SCRIPTS if name in names]
    context = {
        "page": view,
        "style": style_sheet(_styles(view, draw_cards is not None)),
        "policy": offline_policy([*scripts, *([library] if library else [])]),
        "chart_data": {"specs": page.specs, "config": page_config()},
        "tables": list(page.tables.items()),
        "library": library["source"] if library else None,
        "scripts": scripts,
    }
    template = report_environment().get_template("report.html.j2")
    if draw_cards is None:
        return template.render(context, cards=Markup(""))
    bare = template.render(context, cards=Markup(""))
    return template.render(context, cards=draw_cards(limit - len(bare.encode())))


def _styles(view: _View, cards: bool) -> list[str]:
    judged = 'class="verdicts"' in view.top or 'class="verdicts"' in view.body
    own = any(f'class="{name}"' in view.body for name in ("behaviours", "side-by-side"))
    names = ["page.css", "tables.css", "data.css", *(["sections.css"] if own else [])]
    return [*names, *(["verdicts.css"] if judged else []), *(["latent.css"] if cards else [])]
