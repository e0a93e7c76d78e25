"""What a report is made of: sections with charts, tables and prose, whichever stage they come from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from palimpsest.artifacts import Artifact

Order = Literal["verdict", "evidence", "latents", "tables", "method"]
"""Where on the page a section stands: what was found, what it rests on, single latents, everything in full, how."""

Kind = Literal["text", "number", "share", "count", "token", "latent", "words"]
"""How a column is shown: `share` as a percentage, `count` with thousands, `words` as a list of tokens, `latent` as a
link to its card where there is one."""


def in_full(model: Any) -> str:
    """A model's name such that two spellings of one path are equal; empty for none."""
    try:
        return str(Path(str(model)).resolve()) if model else ""
    except (OSError, ValueError, RuntimeError):  # a name that no path can have
        return str(model)


@dataclass(frozen=True)
class Run:
    """One finished artifact that a report is made from.

    Attributes:
        artifact: The folder.
        name: A short name that tells it from the other runs on the page.
        data: The content of its main JSON file.
    """

    artifact: Artifact
    name: str
    data: Mapping[str, Any] = field(repr=False)

    @property
    def stage(self) -> str:
        """Which stage wrote it."""
        return self.artifact.stage

    @property
    def path(self) -> Path:
        """Its folder."""
        return self.artifact.path

    @cached_property
    def pair(self) -> tuple[str, str]:
        """Base and tuned, paths in full; the second is empty for a run of one model, both where none is named."""
        about = self.data.get("pair")
        pair = about if isinstance(about, Mapping) else {}
        base, tuned = pair.get("base") or self.data.get("model"), pair.get("tuned")
        return (in_full(base), in_full(tuned))

    def same_latents(self, other: Run) -> bool:
        """Whether two runs read one dictionary. A path counts only where a hash is missing: it may be trained anew."""
        if self._hashes and other._hashes:
            return bool(self._hashes & other._hashes)
        return bool(self.dictionaries & other.dictionaries)

    def same_pair(self, other: Run) -> bool:
        """Whether two runs may speak of the same models: a run that names no tuned model contradicts no other."""
        return not (self.pair[1] and other.pair[1]) or self.pair == other.pair

    @cached_property
    def _sites(self) -> list[Any]:
        sites = self.data.get("sites")
        return sites if isinstance(sites, list) else []

    @cached_property
    def _hashes(self) -> frozenset[str]:
        """Hashes of whole dictionaries: adapters list others, of their tensors alone."""
        inputs = [one for name, one in self.artifact.inputs.items() if name.split("/")[0] == "dictionary"]
        listed = [self.data.get("dictionary"), *inputs] if len(self._sites) < 2 else []
        return frozenset(
            str(one["sha256"]) for one in listed if isinstance(one, Mapping) and one.get("sha256")
        )

    @cached_property
    def dictionaries(self) -> frozenset[str]:
        """Hashes and paths in full of the dictionary that it read.

        Empty where it read several: their latents bear the same numbers, and none can be told by its number alone.
        """
        if len(self._sites) > 1:
            return frozenset()
        listed = [self.data.get("dictionary"), self.artifact.inputs.get("dictionary"), *self._sites]
        found = set(self._hashes)
        for one in listed:
            if isinstance(one, Mapping):
                path = in_full(one.get("path") or one.get("dictionary"))
                found |= {str(name) for name in (one.get("sha256"), path) if name}
        return frozenset(found)


@dataclass(frozen=True)
class Column:
    """One column of a table.

    Attributes:
        key: Of the rows' mappings.
        label: What stands above it.
        kind: How values are shown and sorted.
        meaning: A few words below the label.
        digits: Digits after the point of numbers and shares.
        interval: Keys of the lower and upper end, drawn as a whisker beside the number.
        side: `base` or `tuned` where the column speaks of one model: it gets that model's colour.
    """

    key: str
    label: str
    kind: Kind = "text"
    meaning: str = ""
    digits: int = 3
    interval: tuple[str, str] | None = None
    side: Literal["base", "tuned"] | None = None


@dataclass(frozen=True)
class Table:
    """Rows that can be sorted, searched and downloaded as CSV; the whole table is on the page unless `total` says more.

    Attributes:
        name: Unique on the page; the file name of the download.
        title: What it shows.
        columns: In order.
        rows: Plain values by key; None where nothing was measured.
        caption: One sentence below the title.
        sort: Key to begin with, and whether the largest come first.
        shown: Rows before the rest is folded behind a pager.
        total: How many rows there are in all, where only the first are on the page.
    """

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)
    caption: str = ""
    sort: tuple[str, bool] | None = None
    shown: int = 15
    total: int | None = None


@dataclass(frozen=True)
class Chart:
    """A plot.

    Attributes:
        name: Unique on the page; the file name of its PNG and SVG.
        title: What it shows.
        caption: How to read it.
        chart: The altair chart, without width and height, in the colours of `report.theme` by style name.
        height: Pixels.
        wide: Takes a whole row.
        spoken: What a screen reader says.
    """

    name: str
    title: str
    caption: str
    chart: Any = field(repr=False)
    height: int = 260
    wide: bool = False
    spoken: str = ""


@dataclass(frozen=True)
class Prose:
    """Paragraphs of our own, or of a run's notes; plain text, escaped.

    Attributes:
        paragraphs: One string each.
        kind: `note` is set apart, `folded` opens on demand, `callout` warns, `empty` says what to run next (a command
            may follow in `command`).
    """

    paragraphs: Sequence[str]
    kind: Literal["plain", "note", "folded", "callout", "empty"] = "plain"
    command: str = ""


@dataclass(frozen=True)
class Figures:
    """A few headline numbers side by side.

    Attributes:
        items: Label, value as it is shown, and a few words.
    """

    items: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Template:
    """A block with a template of its own, such as the verdicts of an audit.

    Attributes:
        name: File in `templates/`.
        context: What it is given, beside the page's macros.
    """

    name: str
    context: Mapping[str, Any] = field(repr=False)


Block = Chart | Table | Prose | Figures | Template


@dataclass(frozen=True)
class Method:
    """How a measure works and when it misleads, in plain words.

    Attributes:
        title: Of the measure.
        paragraphs: What is computed.
        misleads: What it cannot say, one sentence each.
        nulls: What nothing specific gives, and where that is on the page.
    """

    title: str
    paragraphs: Sequence[str]
    misleads: Sequence[str] = ()
    nulls: str = ""


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        id: Unique on the page, letters, digits and dashes.
        title: Its heading, also in the navigation.
        order: Which part of the page it belongs to.
        run: Name of the run that it comes from; empty for a section over several.
        lead: What it says, in a sentence or two, before any block.
        verdict: The one sentence that belongs to the top of the page; empty for none.
        blocks: In order.
        methods: Methods that it used; equal titles are printed once.
    """

    id: str
    title: str
    order: Order
    run: str = ""
    lead: str = ""
    verdict: str = ""
    blocks: Sequence[Block] = ()
    methods: Sequence[Method] = ()
