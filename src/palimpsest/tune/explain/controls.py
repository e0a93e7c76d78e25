"""What an adapter is read against: another seed, other data, shuffled data, and sets of latents by chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from palimpsest.tune.explain.effects import read_latents
from palimpsest.tune.explain.latents import Latents, Reading, effect_of, fires_on
from palimpsest.tune.explain.probe import Probe
from palimpsest.tune.explain.result import Agreement, Controls, Shuffled, Specificity
from palimpsest.tune.explain.statistics import Activity, Settings, agreement, holders, per_value, specificity
from palimpsest.tune.explain.subject import Subject, add_adapter
from palimpsest.tune.explain.texts import GROUPS, Text
from palimpsest.tune.explain_config import ControlOptions

MOST_TOP = 50
"""Latents of a set of the strongest, at most."""


@dataclass(frozen=True, eq=False)
class Read:
    """One adapter with what it does on the corpora.

    Attributes:
        subject: The adapter.
        readings: By name of the text.
        corpora: Names of those that count for effects.
    """

    subject: Subject
    readings: dict[str, Reading]
    corpora: tuple[str, ...]

    @property
    def latents(self) -> Latents:
        """Of the adapter."""
        return self.subject.latents

    @property
    def own(self) -> list[Reading]:
        """Of the corpora, without general text."""
        return [self.readings[name] for name in self.corpora]

    def effect(self, half: int | None = None) -> Float[NDArray, " latents"]:
        """Of each latent on the corpora."""
        return effect_of(self.latents, self.own, half)

    def firing(self, half: int | None = None) -> Bool[NDArray, " latents"]:
        """Which latents fire on the corpora."""
        return fires_on(self.own, half)

    def activity(self, half: int | None = None) -> Float[NDArray, " latents"]:
        """Mean activation times decoder norm on the corpora."""
        return _activity(self.latents, self.own, half).mean

    def unit(self, half: int | None = None) -> Float[NDArray, " latents"]:
        """What a value of 1 would do in each latent."""
        return per_value(self.effect(half), self.latents.values, self.activity(half))


def read_adapter(subject: Subject, texts: Sequence[Text], tokens_per_batch: int) -> Read:
    """Pass over all texts with an adapter active."""
    subject.model.set_adapter(subject.latents.adapter)
    readings = {
        text.name: read_latents(subject.model, subject.latents, text, tokens_per_batch) for text in texts
    }
    return Read(subject, readings, tuple(text.name for text in texts if text.role == "corpus"))


def how_specific(read: Read, general: str, settings: Settings) -> Specificity | None:
    """Activation on the corpora over general text: sets chosen on one half of the corpora, measured on the other."""
    effect = read.effect(0)
    return specificity(
        effect,
        read.latents.values,
        read.unit(0),
        read.firing(0) & read.latents.editable,
        (_activity(read.latents, read.own, 1), _activity(read.latents, [read.readings[general]], None)),
        min(MOST_TOP, holders(effect, 0.9)),
        settings,
    )


def run_controls(
    options: ControlOptions, read: Read, texts: Sequence[Text], probe: Probe, tokens: int, settings: Settings
) -> Controls:
    """Load each adapter that was given, beside the explained one.

    Raises:
        DictionaryError: One goes through other dictionaries.
    """
    corpora = [text for text in texts if text.role == "corpus"]

    def other(path: str | None, name: str) -> Read | None:
        if path is None:
            return None
        return read_adapter(add_adapter(read.subject, path, name), corpora, tokens)

    twin, different, shuffled = (
        other(path, name)
        for path, name in ((options.twin, "twin"), (options.other, "other"), (options.shuffled, "shuffled"))
    )
    found = Controls(
        twin=None if twin is None else agree(read, twin, settings),
        other=None if different is None else agree(read, different, settings),
        shuffled=None if shuffled is None else _shuffled(shuffled, probe),
    )
    read.subject.model.set_adapter(read.latents.adapter)
    return found


def agree(a: Read, b: Read, settings: Settings) -> Agreement:
    """Two adapters on the latents that fire in both and that both may change."""
    firing = a.firing() & b.firing() & a.latents.editable & b.latents.editable
    top = min(MOST_TOP, max(1, holders(a.effect(), 0.9)))
    return agreement(
        (a.latents.values, b.latents.values),
        (a.effect(), b.effect()),
        firing,
        top,
        settings,
        adapter=b.subject.path,
        unit=b.unit(),
    )


def _shuffled(read: Read, probe: Probe) -> Shuffled:
    losses = probe.of(read.latents.adapter)
    difference, ci = probe.effect.interval(losses)
    share = probe.effect.share(losses)
    return Shuffled(
        adapter=read.subject.path,
        effect=float(read.effect().sum()),
        difference=difference,
        ci=ci,
        share=None if share is None else share[0],
    )


def _activity(latents: Latents, readings: Sequence[Reading], half: int | None) -> Activity:
    """Groups of all texts one under the other."""
    chosen = slice(None) if half is None else slice(half * GROUPS, (half + 1) * GROUPS)
    sums = np.concatenate([one.groups[chosen] for one in readings]).astype(float) * latents.norms
    tokens = np.concatenate([one.tokens[chosen] for one in readings]).astype(float)
    return Activity(sums, tokens)
