"""Cards of single latents inside the page: the most telling ones, with as many examples as the page's size allows."""

from __future__ import annotations

import shlex
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice, zip_longest
from typing import Any

import numpy as np
from markupsafe import Markup

from palimpsest.latents import LatentIndex
from palimpsest.latents.schema import LABELS_STAGE, STAGE
from palimpsest.log import progress
from palimpsest.report.data_table import Cards, ordered, plain_value
from palimpsest.report.display import count, visible
from palimpsest.report.draw import slug, tables_of
from palimpsest.report.environment import report_environment
from palimpsest.report.latent_view import latent_view
from palimpsest.report.parts import Prose, Run, Section, Table, Template

MOST = 2000
"""Latents with a card on the page."""
STEPS: tuple[tuple[tuple[int, int] | None, bool, bool], ...] = (
    (None, True, True),
    ((8, 2), True, True),
    ((6, 1), True, True),
    ((5, 1), False, True),
    ((3, 1), False, True),
    ((3, 0), False, True),
    ((2, 0), False, True),
    ((1, 0), False, True),
    ((1, 0), False, False),
)
"""Strongest examples and examples of each bin of a card, whether its tokens carry numbers, and whether it says what
other runs found; from rich to poor."""
SAMPLE = 24
RICH, RICH_SHARE, RICH_FLOOR = 200, 0.3, 4
"""Cards that may take a larger part of the room than the others, which part, and how poor they may become at most."""
EVIDENCE_ROWS, EVIDENCE_COLUMNS = 6, 10

Evidence = Mapping[int, Sequence[tuple[str, Mapping[str, Any]]]]


@dataclass(frozen=True)
class Deck:
    """The cards of one examples run.

    Attributes:
        run: The examples run.
        index: Its latents.
        prefix: How addresses of its cards begin.
        chosen: Latents with a card.
        runs: Names of the runs that speak of the same latents.
        own: Those of them that speak of the same models, or name none.
        others: Those of `own` that found something beside examples and labels.
    """

    run: Run
    index: LatentIndex = field(repr=False)
    prefix: str
    chosen: tuple[int, ...] = field(repr=False)
    runs: frozenset[str]
    own: frozenset[str]
    others: frozenset[str]

    @property
    def pair(self) -> str:
        """The models in which its latents were read, where other runs of the page speak of others; else empty."""
        if self.own == self.runs:
            return ""
        pair = self.run.data.get("pair") or {}
        return visible(f"{pair.get('base')} → {pair.get('tuned')}", 200)

    @property
    def cards(self) -> Cards:
        """What tables need to link to these cards."""
        return Cards(self.prefix, frozenset(self.chosen))


def decks(runs: Sequence[Run], sections: Sequence[Section]) -> list[Deck]:
    """The cards that a page can have: one deck for each examples run.

    First come latents that the first rows of a table name, and those whose mean activation differs most.
    """
    found = []
    sources = [run for run in runs if run.stage == STAGE]
    most = MOST // max(len(sources), 1)
    for place, run in enumerate(sources):
        same = [one for one in runs if one is run or one.same_latents(run)]
        labels = [one.path for one in same if one.stage == LABELS_STAGE]
        index = LatentIndex.open(run.path, labels=labels)
        kin = frozenset(one.name for one in same)
        found_more = [one for one in same if one.stage not in (STAGE, LABELS_STAGE)]
        others = frozenset(one.name for one in found_more if one.same_pair(run))
        own = frozenset(one.name for one in same if one.same_pair(run))
        prefix = "latent-" if place == 0 else f"latent-{slug(run.name)}-"
        found.append(Deck(run, index, prefix, _chosen(index, kin, sections, most), kin, own, others))
    return found


def cards_by_run(decks: Iterable[Deck]) -> dict[str, Cards]:
    """Which cards the tables of each run link to: its own, those of its models, those of its dictionary."""
    listed = list(decks)
    found = {deck.run.name: deck.cards for deck in listed}
    for names in ("own", "runs"):
        for deck in listed:
            for name in sorted(getattr(deck, names)):
                found.setdefault(name, deck.cards)
    return found


def with_notes(sections: Sequence[Section], decks: Sequence[Deck]) -> list[Section]:
    """Sections in which those that list latents say which can be opened, and where all of them are."""
    held = {deck.run.name: deck for deck in decks}
    return [
        replace(one, blocks=[*one.blocks, _note(held[one.run])])
        if one.order == "latents" and one.run in held
        else one
        for one in sections
    ]


def _note(deck: Deck) -> Prose:
    text = (
        f"A number that is a link opens its latent. Of {count(len(deck.index))} latents {count(len(deck.chosen))} at "
        "most are on this page, those that its tables name first; all of them with every example are in "
        "latents.parquet and examples.parquet, and in the app."
    )
    return Prose([text], "note", f"palimpsest serve {shlex.quote(str(deck.run.path))}")


def draw_cards(decks: Sequence[Deck], sections: Sequence[Section], room: int) -> tuple[Markup, int]:
    """All cards as inert templates.

    Args:
        decks: The cards.
        sections: Whose tables tell what other runs found about a latent.
        room: Bytes that they may take together.

    Returns:
        Their HTML, and how many there are.
    """
    drawn: list[str] = []
    for place, deck in enumerate(decks):
        share = room // (len(decks) - place)
        for card in _fitting(deck, evidence_of(deck, sections), share):
            drawn.append(card)
            room -= len(card.encode())
    return Markup("\n".join(drawn)), len(drawn)


def _fitting(deck: Deck, evidence: Evidence, room: int) -> list[str]:
    """As many cards of a deck as fit: the first ones are richer, since they are what the page speaks of."""
    tiers, floors = (deck.chosen[:RICH], deck.chosen[RICH:]), (RICH_FLOOR, len(STEPS) - 1)
    others, taken = _step(deck, tiers[1], evidence, room * (1 - RICH_SHARE))
    steps = [min(_step(deck, tiers[0], evidence, room - taken)[0], RICH_FLOOR), others]
    made: dict[int, str] = {}
    with progress("Cards of latents", len(deck.chosen), "cards") as advance:
        for tier, step in zip(tiers, steps, strict=True):
            made |= _drawn(deck, tier, evidence, step, advance)
    # What a sample promised may not hold: cards become poorer before any is left out.
    for tier in (1, 0):
        while _size(made.values()) > room and steps[tier] < floors[tier]:
            steps[tier] += 1
            made |= _drawn(deck, tiers[tier], evidence, steps[tier])
    kept = [made[latent] for latent in deck.chosen]
    while kept and _size(kept) > room:
        kept = kept[: min(len(kept) - 1, int(len(kept) * room / _size(kept)))]
    return kept


def _drawn(
    deck: Deck,
    latents: Sequence[int],
    evidence: Evidence,
    step: int,
    advance: Callable[[], None] = lambda: None,
) -> dict[int, str]:
    """Cards in the order of the file, in which neighbours are read together."""
    found = {}
    for latent in sorted(latents):
        limits, detail, told = STEPS[step]
        found[latent] = _card(deck, latent, evidence.get(latent, ()) if told else (), limits, detail)
        advance()
    return found


def _size(cards: Iterable[str]) -> int:
    return sum(len(one.encode()) + 1 for one in cards)


def evidence_of(deck: Deck, sections: Sequence[Section]) -> dict[int, list[tuple[str, dict[str, Any]]]]:
    """What the tables of other runs say about each latent of a deck."""
    found: dict[int, list[tuple[str, dict[str, Any]]]] = defaultdict(list)
    chosen = frozenset(deck.chosen)
    for section, table in tables_of(sections):
        key = next((column for column in table.columns if column.kind == "latent"), None)
        if key is None or section.run not in deck.others:
            continue
        columns = [one for one in table.columns if one.kind != "latent"][:EVIDENCE_COLUMNS]
        for row in table.rows:
            latent = row.get(key.key)
            if not isinstance(latent, int) or latent not in chosen or len(found[latent]) >= EVIDENCE_ROWS:
                continue
            facts = {column.label: _fact(row, column) for column in columns}
            found[latent].append((section.run, facts))
    for run, latent, facts in _audit_rows(deck, sections):
        if latent in chosen and len(found[latent]) < EVIDENCE_ROWS:
            found[latent].append((run, facts))
    return dict(found)


def _fact(row: Mapping[str, Any], column: Any) -> Any:
    value = plain_value(row, column)
    return " ".join(value) if isinstance(value, list) else value


def _audit_rows(deck: Deck, sections: Sequence[Section]) -> Iterable[tuple[str, int, dict[str, Any]]]:
    """An audit's panels of latents, which have a template of their own."""
    for section in sections:
        if section.run not in deck.others:
            continue
        for block in section.blocks:
            if isinstance(block, Template) and block.name == "latents.html.j2":
                for panel in block.context["panels"]:
                    for row in panel.rows:
                        change = {} if row.change.missing else {"change": row.change.text}
                        values = {"corpus": panel.name, "contribution": row.contribution.text, **change}
                        yield section.run, row.latent, values


def _chosen(
    index: LatentIndex, kin: frozenset[str], sections: Sequence[Section], most: int
) -> tuple[int, ...]:
    """The latents that tables name, each table's first rows first, then the others by rank."""
    alive = {int(one) for one in index.latents}
    lists = [_named(table) for section, table in tables_of(sections) if section.run in kin]
    for section in sections:
        for block in section.blocks if section.run in kin else ():
            if isinstance(block, Template) and block.name == "latents.html.j2":
                lists += [[row.latent for row in panel.rows] for panel in block.context["panels"]]
    in_turn = (one for level in zip_longest(*lists, [int(one) for one in _ranked(index)]) for one in level)
    return tuple(islice(dict.fromkeys(one for one in in_turn if one in alive), most))


def _named(table: Table) -> list[Any]:
    key = next((column.key for column in table.columns if column.kind == "latent"), None)
    return [] if key is None else [row.get(key) for row in ordered(table)]


def _ranked(index: LatentIndex) -> list[int]:
    """Latents by the change of their mean activation between the models, or by that activation."""

    def column(name: str) -> np.ndarray:
        return np.nan_to_num(np.asarray(index.values(name), float))

    change = np.abs(column("rate_tuned") * column("mean_tuned") - column("rate_base") * column("mean_base"))
    if not change.any():
        change = column("rate") * column("mean_value")
    return [int(one) for one in index.latents[np.argsort(-change, kind="stable")]]


def _step(deck: Deck, latents: Sequence[int], evidence: Evidence, room: float) -> tuple[int, float]:
    """Place in `STEPS` of the richest cards of which all are likely to fit, judged by some, and their bytes."""
    total = len(latents)
    sample = [latents[i * total // SAMPLE] for i in range(min(SAMPLE, total))]
    size = 0.0
    for place in range(len(STEPS)):
        size = 1.03 * total * _size(_drawn(deck, sample, evidence, place).values()) / max(len(sample), 1)
        if size <= room:
            return place, size
    return len(STEPS) - 1, size


def _card(
    deck: Deck, latent: int, evidence: Sequence[Any], limits: tuple[int, int] | None, detail: bool
) -> Markup:
    view = latent_view(deck.index, latent, evidence, limits=limits, detail=detail, link=f"#{deck.prefix}{{}}")
    card = report_environment().get_template("latent.html.j2").module.card(view)  # type: ignore[attr-defined]
    pair = Markup(' data-pair="{}"').format(deck.pair) if deck.pair else ""
    head = Markup('<template id="{}{}" data-latent="{}"{}>').format(deck.prefix, latent, latent, pair)
    return head + card + Markup("</template>")
