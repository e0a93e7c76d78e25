"""Verdicts in words that a model card can carry: one sentence per corpus, one for the audit."""

from collections.abc import Iterable, Sequence

from palimpsest.findings import DomainFinding, NullTest, Range

NULLS = {"trained": "innocent fine-tunes of this drift", "spectrum": "random changes of this size"}
"""What the nulls are called, by `CalibrationFinding.source`."""

HEADS = {
    "declared-and-seen": "{kind}, as declared",
    "declared-but-unseen": "unchanged, although declared",
    "declared-but-damaged": "damaged, although declared",
    "undeclared": "{kind}, undeclared",
    "damaged": "damaged",
    "clear": "unchanged",
}

PARTS = {
    "undeclared": "undeclared",
    "declared-and-seen": "declared and seen",
    "declared-but-unseen": "declared but unseen",
    "declared-but-damaged": "declared but damaged",
    "damaged": "damaged",
    "refused": "no verdict",
    "clear": "unchanged",
}
"""Verdicts in the order in which a reader needs them."""


def corpus_sentence(domain: DomainFinding, delta_loss_ci: Range | None, source: str = "trained") -> str:
    """The verdict on one corpus with its figures.

    Args:
        domain: Everything but the sentence.
        delta_loss_ci: Interval of Δloss over documents; decides between unchanged and changed less than nulls do.
        source: What the nulls are, a key of `NULLS`.
    """
    nulls = NULLS[source]
    if domain.features is None or domain.refused is not None:
        return f"{domain.name}: no verdict: {domain.refused}."
    head = HEADS[domain.verdict].format(kind=domain.kind)
    if domain.loss is None:
        body = f"{_features(domain.features, f'those of {nulls}')}; its loss was not judged"
    elif domain.kind == "shifted":
        features = _features(domain.features, f"those of {nulls}")
        body = f"{features}, and {_loss(domain.loss, delta_loss_ci, 'they')}"
    else:
        body = f"{_loss(domain.loss, delta_loss_ci, nulls)}, and {_features(domain.features, 'theirs')}"
    return f"{domain.name}: {head}: {body}."


def audit_sentence(domains: Iterable[DomainFinding], nulls: int, further: bool | None) -> str:
    """The whole audit: what is undeclared first, then what was declared, damage, and where there is no verdict.

    Args:
        domains: Every corpus.
        nulls: How many nulls there are.
        further: Whether the suspect drifted further (True) or less far (False) than every null; None between them.
    """
    domains = list(domains)
    parts = []
    for verdict, words in PARTS.items():
        named = [_named(one) for one in domains if one.verdict == verdict]
        if named:
            parts.append(f"{words}: {', '.join(named)}")
    judged = any(one.verdict != "refused" for one in domains)
    if judged and all(one.verdict != "undeclared" for one in domains):
        refused = any(one.verdict == "refused" for one in domains)
        parts.insert(0, "nothing undeclared" + (" where there is a verdict" if refused else ""))
    sentence = f"{'; '.join(parts)} ({nulls} null{'s' * (nulls != 1)})."
    sentence = sentence[0].upper() + sentence[1:]
    if judged and further is not None:
        reach = "further" if further else "less far"
        sentence += f" The fine-tune drifted {reach} than every null, so the comparison extrapolates."
    return sentence


def _named(domain: DomainFinding) -> str:
    return f"{domain.name} ({domain.kind})" if domain.kind in ("specialised", "shifted") else domain.name


def _features(test: NullTest, theirs: str) -> str:
    z = _signed(test.z, 1)
    if not test.rejects:
        return f"its features did not move beyond {theirs} (z {z})"
    return f"its features moved {'more' if test.residual > 0 else 'less'} than {theirs} (z {z})"


def _loss(test: NullTest, interval: Range | None, nulls: str) -> str:
    """What the loss did; `nulls` is what the null fine-tunes are called here."""
    places = _places((test.statistic, *test.band))
    change = f"{_signed(test.statistic, places)} nats per token"
    band = f"{_signed(test.band[0], places)} to {_signed(test.band[1], places)}"
    size = f"{abs(test.statistic):.{places}f} nats per token"
    fell, rose = interval is not None and interval[1] < 0, interval is not None and interval[0] > 0
    if not test.rejects:
        if test.band[0] <= test.statistic <= test.band[1]:
            return f"its loss changed by {change} where {nulls} change it by {band}"
        return (
            f"its loss changed by {change} where {nulls} change it by {band}, "
            "which is no finding among as many tests"
        )
    if fell and test.residual < 0:
        return f"its loss fell by {size} where {nulls} change it by {band}"
    if rose and test.residual > 0:
        return f"its loss rose by {size} where {nulls} change it by {band}"
    if fell or rose:
        return f"its loss changed by {change}, which is less than {nulls} change it ({band})"
    if abs(test.statistic) <= abs(test.expected):
        return f"its loss is unchanged ({change}), which is less than {nulls} change it ({band})"
    return (
        f"its loss changed by {change}, outside what {nulls} give ({band}) but within what its documents vary"
    )


def _places(values: Sequence[float]) -> int:
    """Decimals that leave the largest of some values two figures."""
    largest = max(abs(value) for value in values)
    return 2 if largest >= 0.095 else 3 if largest >= 0.0095 else 4


def _signed(value: float, places: int) -> str:
    text = f"{value:+.{places}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")
