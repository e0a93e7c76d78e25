"""What stands above and beside the sections of a page: its headline, what each run found, and the links."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

from palimpsest.report.display import count, visible
from palimpsest.report.parts import Run, Section, Template, in_full
from palimpsest.report.reproduce import Recipe, recipe

PARTS = {
    "verdict": "Verdict",
    "evidence": "Evidence",
    "latents": "Latents",
    "tables": "Tables",
    "method": "Method",
}
SHORT = {
    "tasks": "Tasks",
    "curves": "Every k",
    "latents": "Latents",
    "corpora": "Corpora",
    "controls": "Controls",
    "weights": "Weights",
    "method": "Method",
}
"""Names in the line of links of an audit's own page."""
LONGEST_HEADLINE, LONGEST_OPENING = 220, 300
VERDICTS, CALLOUTS, CLAIMS = "verdicts.html.j2", "callouts.html.j2", "claims.html.j2"
_BETWEEN = re.compile(r"(?<=[.!?]) (?=[A-Z])")


@dataclass(frozen=True)
class Source:
    """What a page needs of each run beside its sections.

    Attributes:
        name: Of the run.
        stage: Of the run.
        pair: Base and tuned; the second is empty for a run of one model.
        site: Where it read.
        recipe: How it is repeated.
        summary: What it says of itself.
    """

    name: str
    stage: str
    pair: tuple[str, str]
    site: str
    recipe: Recipe
    summary: str = ""

    @classmethod
    def of(cls, run: Run) -> Source:
        """What a run says of itself."""
        summary = run.data.get("summary") or run.artifact.manifest.get("summary") or ""
        return cls(
            run.name,
            run.stage,
            pair_names(run.data),
            str(run.data.get("site") or ""),
            recipe(run),
            str(summary),
        )


def pair_names(data: Mapping[str, Any]) -> tuple[str, str]:
    """Base and tuned of a run's content."""
    pair = data.get("pair") or {}
    base = pair.get("base") or data.get("model") or ""
    return str(base), str(pair.get("tuned") or "")


def common_pair(sources: Sequence[Source]) -> tuple[str, str] | None:
    """The pair that all runs speak of, or None; a run of one model alone contradicts no pair."""
    named = [one for one in sources if one.pair[1]] or [one for one in sources if one.pair[0]]
    # Of several spellings of one path the first stands on the page.
    pairs = {(in_full(one.pair[0]), in_full(one.pair[1])): one.pair for one in reversed(named)}
    if len(pairs) == 1:
        return next(iter(pairs.values()))
    bases = {base for base, _ in pairs}
    return (named[0].pair[0], f"{len(pairs)} fine-tunes") if len(bases) == 1 else None


def several_pairs(sources: Sequence[Source]) -> bool:
    """Whether runs speak of different fine-tunes, so that each finding needs the name of its own."""
    return len({(in_full(one.pair[0]), in_full(one.pair[1])) for one in sources if one.pair[1]}) > 1


def title(sources: Sequence[Source]) -> str:
    """Of the browser's window."""
    pair = common_pair(sources)
    kind = sources[0].stage.capitalize() if len(sources) == 1 else "Report"
    if pair is None:
        return f"{kind} of {len(sources)} runs" if len(sources) > 1 else f"{kind}: {sources[0].name}"
    return f"{kind}: {pair[0]} → {pair[1]}" if pair[1] else f"{kind}: {pair[0]}"


def leader(sections: Sequence[Section], sources: Sequence[Source]) -> Section | None:
    """The audit whose verdicts stand right below the headline; None where several audits have verdicts, or none."""
    audits = [one for one in sections if one.order == "verdict" and is_audit(one, sources)]
    judged = [one for one in audits if block_of(one, VERDICTS)]
    if len(judged) > 1:
        return None
    return (judged or audits or [None])[0]


def is_audit(section: Section, sources: Sequence[Source]) -> bool:
    """Whether a section comes from an audit."""
    return any(one.stage == "audit" and one.name == section.run for one in sources)


def block_of(section: Section, name: str) -> Template | None:
    """The block of a section with that template."""
    found = (one for one in section.blocks if isinstance(one, Template) and one.name == name)
    return next(found, None)


def beside(section: Section, sources: Sequence[Source]) -> Section:
    """An audit that does not lead the page shows its verdicts and warnings; what an audit says at all is said once."""
    if section.order != "verdict" or not is_audit(section, sources):
        return section
    callouts = block_of(section, CALLOUTS)
    shown = [block_of(section, VERDICTS), callouts if callouts and callouts.context["callouts"] else None]
    return replace(section, blocks=[one for one in shown if one is not None])


def claims(sections: Sequence[Section], sources: Sequence[Source]) -> Section | None:
    """What an audit says and does not say, of the first audit."""
    for one in sections:
        block = block_of(one, CLAIMS) if is_audit(one, sources) else None
        if block is not None:
            return replace(one, blocks=[block])
    return None


def gathered(sections: Sequence[Section]) -> list[Section]:
    """Sections that say the same of several runs, as the method of two audits does, stand once."""
    kept: list[Section] = []
    for one in sections:
        if one.order == "method" and any(_same_method(one, other) for other in kept):
            continue
        kept.append(one)
    return kept


def _same_method(one: Section, other: Section) -> bool:
    if other.order != "method" or one.title != other.title:
        return False
    keys = ("k", "legacy", "calibration")

    def told(section: Section) -> list[Any]:
        contexts = [getattr(block, "context", {}) for block in section.blocks]
        return [[bool(c.get(key)) if key == "calibration" else c.get(key) for key in keys] for c in contexts]

    return told(one) == told(other)


def headline(sections: Sequence[Section], lead: Section | None, sources: Sequence[Source]) -> tuple[str, str]:
    """The verdict of the leading audit, or the first sentence of what the first run found; what else that run says."""
    if lead is not None:
        return lead.verdict, ""
    judged = [one for one in sections if one.order == "verdict" and block_of(one, VERDICTS)]
    if len(judged) > 1:
        return _over_audits(judged), ""
    said = next((one.verdict for one in sections if one.verdict), "")
    if len(sources) == 1:
        said = said or sources[0].summary
    first, *others = re.split(_BETWEEN, said, maxsplit=1)
    if not first:
        return ("What these runs found" if len(sources) > 1 else "What this run found"), ""
    return visible(first, LONGEST_HEADLINE), " ".join(others) if len(sources) == 1 else ""


def _over_audits(judged: Sequence[Section]) -> str:
    """What several audits found undeclared, and where."""
    found = []
    for one in judged:
        block = block_of(one, VERDICTS)
        rows = block.context["calibration"]["verdicts"] if block else []
        names = [row["name"] for row in rows if row["badge"].style == "alarm"]
        found += [f"{', '.join(names)} in {visible(one.run, 60)}"] if names else []
    if not found:
        return f"Nothing undeclared in {count(len(judged))} audits"
    rest = len(judged) - len(found)
    return f"Undeclared: {'; '.join(found)}" + (f"; nothing in the other {count(rest)}" if rest else "")


def subject(lead: Section | None, sources: Sequence[Source]) -> tuple[str, str, str] | None:
    """Run and pair of the headline where other runs of the page speak of other pairs."""
    if lead is None or not several_pairs(sources):
        return None
    found = next((one for one in sources if one.name == lead.run and one.pair[1]), None)
    return (visible(found.name, 60), *found.pair) if found else None


def found_by_run(
    sections: Sequence[Section], lead: Section | None, drawn: Sequence[Section], sources: Sequence[Source]
) -> list[dict[str, str]]:
    """What each run but the leading one found, with the section that says more."""
    stages = {one.name: one.stage for one in sources}
    tuned = {one.name: visible(one.pair[1], 60) for one in sources} if several_pairs(sources) else {}
    there = {one.id for one in drawn}
    first = {one.run: one.id for one in reversed(drawn)}
    return [
        {
            "id": one.id if one.id in there else first.get(one.run, "top"),
            "run": visible(one.run or one.title, 60),
            "stage": stages.get(one.run, ""),
            "tuned": tuned.get(one.run, ""),
            **dict(zip(("sentence", "rest"), _opening(one.verdict), strict=True)),
        }
        for one in sections
        if one.verdict and one is not lead
    ]


def _opening(text: str) -> tuple[str, str]:
    """As many whole sentences as are read at a glance, and the others."""
    sentences = re.split(_BETWEEN, text)
    taken, length = 0, 0
    while taken < len(sentences) and (taken == 0 or length + len(sentences[taken]) <= LONGEST_OPENING):
        length += len(sentences[taken])
        taken += 1
    return " ".join(sentences[:taken]), " ".join(sentences[taken:])


def links(
    drawn: Sequence[Section], lead: Section | None, *, methods: bool, many: bool, named: bool
) -> list[dict[str, Any]]:
    """The links of the page by part and run.

    Args:
        drawn: Sections of the page.
        lead: The audit that stands above them.
        methods: Whether the page ends with the methods of its sections.
        many: Whether the links stand at the side.
        named: Whether links bear the names of their runs.
    """
    parts: dict[str, list[dict[str, str]]] = {key: [] for key in PARTS}
    if many:
        parts["verdict"].append({"id": "top", "text": "What was found", "run": ""})
    elif lead is not None and block_of(lead, VERDICTS):
        parts["verdict"].append({"id": lead.id, "text": "Verdicts", "run": ""})
    for one in drawn:
        # The facts of an audit's own page need no link: they are on its first screen.
        if many or one.id != "compared":
            run = visible(one.run, 40) if named else ""
            parts[one.order].append({"id": one.id, "text": one.title if many else _short(one), "run": run})
    if methods:
        parts["method"].append({"id": "methods", "text": "How it was measured", "run": ""})
    end = {"id": "again", "text": "Reproduce this" if many else "Reproduce", "run": ""}
    found = [{"title": PARTS[key], "runs": _by_run(listed)} for key, listed in parts.items() if listed]
    return [*found, {"title": "Again", "runs": _by_run([end])}]


def _by_run(listed: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Neighbouring links of one run under its name."""
    return [{"run": run, "links": list(group)} for run, group in groupby(listed, key=lambda one: one["run"])]


def _short(section: Section) -> str:
    if section.id == "calibration":
        return "Random changes" if "random" in section.title else "Innocent fine-tunes"
    return SHORT.get(section.id, section.title)
