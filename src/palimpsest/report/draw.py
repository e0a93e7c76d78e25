"""Sections as they stand on the page: every block drawn, every name and address unique."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from markupsafe import Markup

from palimpsest.report.data_table import Cards, ordered, table_view
from palimpsest.report.display import visible
from palimpsest.report.environment import report_environment
from palimpsest.report.parts import Block, Chart, Figures, Method, Prose, Section, Table, Template
from palimpsest.report.pictures import page_spec

ORDERS = ("verdict", "evidence", "latents", "tables", "method")


@dataclass
class Page:
    """What the sections of one page have in common while they are drawn.

    Attributes:
        cards: Latents with a card, by run.
        specs: Specification of every chart by name.
        tables: Rows of every table by name.
        most: Rows of a table that have room, the first as it is sorted; None for all.
    """

    cards: Mapping[str, Cards] = field(default_factory=dict)
    specs: dict[str, Any] = field(default_factory=dict)
    tables: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    most: int | None = None


def unique(sections: Iterable[Section]) -> list[Section]:
    """Sections in the order of the page, whose addresses, charts and tables bear names of their own.

    A run that shares an address with an earlier one gets its name before all of its addresses.
    """
    given = sorted(sections, key=lambda one: ORDERS.index(one.order))
    owners: dict[str, str] = {}
    clashing: set[str] = set()
    for one in given:
        if owners.setdefault(one.id, one.run) != one.run:
            clashing.add(one.run)
    prefixes = {one.run: slug(one.run) + "-" if one.run in clashing and one.run else "" for one in given}
    taken: set[str] = set()
    # The charts inside templates cannot give way.
    inner = {prefixes[one.run] + slug(chart.name) for one in given for chart in _inner_charts(one)}
    names = {Chart: inner, Table: set[str]()}
    made = []
    for one in given:
        prefix = prefixes[one.run]
        address = _free(prefix + slug(one.id), taken)
        made.append(replace(one, id=address, blocks=[_named(b, prefix, names) for b in one.blocks]))
    return made


def slug(name: str) -> str:
    """A name as a part of addresses and file names: letters, digits and dashes."""
    return re.sub(r"[^A-Za-z0-9_]+", "-", name).strip("-")[:60] or "run"


def _free(name: str, taken: set[str]) -> str:
    found, number = name, 2
    while found in taken:
        found, number = f"{name}-{number}", number + 1
    taken.add(found)
    return found


def _named(block: Block, prefix: str, names: Mapping[type, set[str]]) -> Block:
    if isinstance(block, Chart | Table):
        wanted, taken = slug(block.name), names[type(block)]
        return replace(block, name=_free(prefix + wanted if wanted in taken else wanted, taken))
    if isinstance(block, Template):
        charts = block.context.get("charts")
        if not isinstance(charts, Mapping):
            return Template(block.name, {**block.context, "prefix": prefix})
        # The blocks of one audit share their charts; only the block that draws one gives it its name.
        renamed = {key: replace(one, name=prefix + slug(one.name)) for key, one in charts.items()}
        return Template(block.name, {**block.context, "prefix": prefix, "charts": renamed})
    return block


def charts_of(sections: Iterable[Section]) -> list[Chart]:
    """Every chart of some sections once, in order."""
    found: dict[str, Chart] = {}
    for section in sections:
        own = [block for block in section.blocks if isinstance(block, Chart)]
        found |= {one.name: one for one in (*own, *_inner_charts(section))}
    return list(found.values())


def _inner_charts(section: Section) -> list[Chart]:
    found = [block.context.get("charts") for block in section.blocks if isinstance(block, Template)]
    return [chart for one in found if isinstance(one, Mapping) for chart in one.values()]


def tables_of(sections: Iterable[Section]) -> list[tuple[Section, Table]]:
    """Every table with its section, in order."""
    return [(one, block) for one in sections for block in one.blocks if isinstance(block, Table)]


def methods_of(sections: Iterable[Section]) -> list[Method]:
    """The methods that some sections used, each once."""
    return list({method.title: method for section in sections for method in section.methods}.values())


def draw_section(section: Section, page: Page, *, named: bool) -> Markup:
    """A section with its heading; `named` says that the run's name stands beside it."""
    macros = _macros()
    shown = replace(section, run=section.run if named else "")
    view = {
        "id": shown.id,
        "title": shown.title,
        "run": visible(shown.run, 60),
        "lead": shown.lead,
        "blocks": list(draw_blocks(section, page)),
    }
    return macros.section(view)


def draw_top(section: Section, page: Page) -> Markup:
    """The blocks of a section without its heading: what stands below the page's headline."""
    macros = _macros()
    drawn = draw_blocks(section, page, lead=True)
    return Markup("").join(macros.block(kind, value) for kind, value in drawn)


def draw_methods(methods: Sequence[Method]) -> Markup:
    """Methods in plain words."""
    macros = _macros()
    return Markup("").join(macros.method(one) for one in methods)


def draw_blocks(section: Section, page: Page, *, lead: bool = False) -> Iterable[tuple[str, Any]]:
    """Kind and content of every block; neighbouring charts stand side by side.

    Templates are told whether they `lead` the page, where no section stands around them.
    """
    beside: list[Chart] = []
    for block in section.blocks:
        if isinstance(block, Chart):
            page.specs[block.name] = page_spec(block)
            if not block.wide:
                beside.append(block)
                continue
        if beside:
            yield _charts(beside)
            beside = []
        yield _drawn(block, section, page, lead)
    if beside:
        yield _charts(beside)


def _figure(value: str) -> tuple[str, str]:
    """An estimate and its interval."""
    estimate, bracket, rest = value.partition(" [")
    return (estimate, f"[{rest}") if bracket and rest.endswith("]") else (value, "")


def _charts(beside: list[Chart]) -> tuple[str, Any]:
    return ("wide", beside[0]) if len(beside) == 1 else ("charts", beside)


def _drawn(block: Block, section: Section, page: Page, lead: bool) -> tuple[str, Any]:
    cards = page.cards.get(section.run, Cards())
    if isinstance(block, Chart):
        return "wide", block
    if isinstance(block, Table):
        view = table_view(_cut(block, page.most), cards)
        if view.count:
            page.tables[view.name] = view.data
        return "table", view
    if isinstance(block, Prose):
        return "prose", block
    if isinstance(block, Figures):
        return "figures", [(label, *_figure(value), note) for label, value, note in block.items]
    charts = block.context.get("charts")
    if isinstance(charts, Mapping):
        page.specs |= {one.name: page_spec(one) for one in charts.values() if one.name not in page.specs}
    context = {"prefix": "", **block.context, "cards": cards, "lead": lead}
    if page.most is not None and block.name == "latents.html.j2":
        context["panels"] = [_cut_panel(one, page.most) for one in context["panels"]]
    return "html", Markup(report_environment().get_template(block.name).render(context, m=_module()))


def _cut(table: Table, most: int | None) -> Table:
    """A table of its first rows, which says how many there are in all."""
    if most is None or len(table.rows) <= most:
        return table
    total = max(table.total or 0, len(table.rows))
    return replace(table, rows=ordered(table)[:most], total=total)


def _cut_panel(panel: Any, most: int) -> Any:
    """An audit's latents on one corpus, the strongest; what all of them covered is not said of fewer."""
    return panel if len(panel.rows) <= most else replace(panel, rows=panel.rows[:most], covered=None)


def _module() -> Any:
    return report_environment().get_template("macros.html.j2").module


def _macros() -> Any:
    return report_environment().get_template("blocks.html.j2").module
