"""An explanation, and a comparison, in a few sentences."""

from __future__ import annotations

from collections.abc import Sequence

from palimpsest.tune.explain.result import (
    AdapterComparison,
    Agreement,
    Concentration,
    Controls,
    Objective,
    Pruned,
    RankedLatent,
    Specificity,
)

NAMED = 3
"""Latents that the summary names."""


def summarise(
    concentration: Concentration,
    objective: Objective,
    pruned: Pruned | None,
    specificity: Specificity | None,
    controls: Controls,
    top: Sequence[RankedLatent],
) -> str:
    """What an adapter does, in how few latents, and whether they are its data's."""
    sentences = [_concentration(concentration, top), _objective(objective)]
    if objective.present:
        sentences.append(_pruned(pruned, objective))
    if specificity is not None:
        sentences.append(_specificity(specificity))
    return " ".join([*sentences, *_controls(controls)])


def _concentration(found: Concentration, top: Sequence[RankedLatent]) -> str:
    if not found.moved:
        return f"The adapter moves none of its {found.latents:,} latents."
    if not found.effective:
        return f"The adapter moves {_latents(found.moved)} of {found.latents:,}, none of which acts on this text."
    named = "; ".join(_name(one) for one in top[:NAMED])
    return (
        f"The adapter moves {_latents(found.moved)} of {found.latents:,}; {found.half:,} hold half and "
        f"{found.most:,} hold 90 % of its effect on this text. Strongest: {named}."
    )


def _name(one: RankedLatent) -> str:
    label = f" “{one.label}”" if one.label else ""
    return f"{one.site} {one.latent}{label} ({one.value:+.3g}, {one.share:.0%} of the effect)"


def _objective(found: Objective) -> str:
    where = (
        f"On the {found.reported_on:,} {'pairs' if found.name == 'pairs' else 'documents'} kept for reporting"
    )
    if not found.present:
        figures = f"{found.difference:+.4f} [{found.ci[0]:+.4f}, {found.ci[1]:+.4f}] {found.unit}"
        return (
            f"{where} its effect on the objective cannot be told from 0 ({figures}), so there are no shares of it and "
            "no pruned adapter."
        )
    verb = "lowers" if found.difference > 0 else "RAISES"
    return (
        f"{where} it {verb} the objective by {abs(found.difference):.4f} [{_range(found, 4)}] {found.unit}."
    )


def _range(found: Objective, digits: int) -> str:
    ends = sorted(abs(end) for end in found.ci)
    return f"{ends[0]:.{digits}f}, {ends[1]:.{digits}f}"


def _pruned(found: Pruned | None, objective: Objective) -> str:
    if found is None and objective.chosen_difference * objective.difference <= 0:
        return f"Nothing is pruned: on the {objective.chosen_on:,} that choose it does not do the same."
    if found is None:
        return "No number of its latents keeps the share of that which was asked for."
    text = (
        f"{_latents(found.n)}, chosen on {objective.chosen_on:,} others, {'keep' if found.n != 1 else 'keeps'} "
        f"{found.share:.1%} [{found.ci[0]:.1%}, {found.ci[1]:.1%}] of it"
    )
    beside = []
    if found.magnitude_n is not None:
        beside.append(f"the ranking by |value| needs {found.magnitude_n:,}")
    if found.random_n is not None and found.random_range is not None:
        low, high = found.random_range
        beside.append(f"random firing latents {found.random_n:,} ({low:,} to {high:,})")
    return text + (f"; {', '.join(beside)} for {found.keep:.0%}." if beside else ".")


def _specificity(found: Specificity) -> str:
    def ratio(value: float | None) -> str:
        return "infinitely" if value is None else f"{value:.2f} times"

    ends = "" if found.top.ci is None else f" [{found.top.ci[0]:.2f}, {found.top.ci[1]:.2f}]"
    return (
        f"Its {found.n:,} strongest are {ratio(found.top.ratio)}{ends} as active on the corpora as on general text; "
        f"random latents {ratio(found.random.ratio)}, the strongest after shuffling its values "
        f"{ratio(found.permuted.ratio)} (p {found.p:.3f})."
    )


def _controls(found: Controls) -> list[str]:
    sentences = []
    if (
        found.twin is not None
        and found.other is not None
        and None not in (found.twin.cosine, found.other.cosine)
    ):
        more = (found.twin.cosine or 0) > (found.other.cosine or 0)
        sentences.append(
            f"{_agreement('The twin', found.twin)}; {_agreement('the adapter of other data', found.other)}: "
            f"{'more' if more else 'NOT MORE'} alike for the same data."
        )
    else:
        for who, one in (("The twin", found.twin), ("The adapter of other data", found.other)):
            if one is not None:
                sentences.append(_agreement(who, one) + ".")
    if found.shuffled is not None and found.shuffled.difference is not None:
        one = found.shuffled
        ends = "" if one.ci is None else f" [{one.ci[0]:+.4f}, {one.ci[1]:+.4f}]"
        sentences.append(
            f"By the adapter of shuffled data the objective falls by {one.difference:+.4f}{ends} on the same documents."
        )
    return sentences


def _agreement(who: str, found: Agreement) -> str:
    if found.cosine is None or found.spearman is None:
        return f"{who} has no values to compare"
    chance = (
        ""
        if found.null_cosine is None
        else f", by chance {found.null_cosine[0]:.2f} to {found.null_cosine[1]:.2f}"
    )
    return (
        f"{who} agrees with cosine {found.cosine:.2f} and rank correlation {found.spearman:.2f} on {found.latents:,} "
        f"firing latents{chance}; {found.overlap:.0%} of the {found.top_n:,} strongest are shared"
    )


def summarise_comparison(found: AdapterComparison) -> str:
    """Which latents moved in one of two adapters and not in the other."""
    a, b = found.adapters
    counts = found.counts
    return (
        f"{_latents(counts['only_a'])} moved in {a} and not in {b}, {counts['only_b']:,} in {b} and not in {a}, "
        f"{counts['both']:,} in both and {counts['opposite']:,} in opposite directions. "
        f"{_agreement('The second', found.agreement)}."
    )


def _latents(count: int) -> str:
    return f"{count:,} latent{'' if count == 1 else 's'}"
