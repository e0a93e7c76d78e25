"""What to train: recipes of null fine-tunes, spread evenly over families, methods, rates and lengths."""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np

from palimpsest.errors import ConfigError

Method = Literal["full", "lora"]
METHODS: tuple[Method, ...] = ("lora", "full")


@dataclass(frozen=True)
class NullRecipe:
    """How one null is made.

    Attributes:
        index: Its place among the nulls of a base, from 0.
        family: Name of the text that it is trained on; it never calibrates the corpus of that name.
        method: Every weight (`full`), or a low-rank adapter that is merged afterwards (`lora`).
        lr: Highest learning rate: of `lora` as it is, of `full` relative to the size of the model's weights.
        steps: Optimiser steps.
        seed: Decides the order of the text and the adapter's start.
    """

    index: int
    family: str
    method: Method
    lr: float
    steps: int
    seed: int

    @property
    def name(self) -> str:
        """A label such as `null-007 math lora`."""
        return f"null-{self.index:03d} {self.family} {self.method}"

    @property
    def key(self) -> dict[str, Any]:
        """Everything that the null's weights depend on, besides base and text; JSON types only."""
        return asdict(self)


def make_recipes(
    nulls: int,
    families: Sequence[str],
    *,
    full_lr: Sequence[float],
    lora_lr: Sequence[float],
    steps: Sequence[int],
    methods: Sequence[Method] = METHODS,
    seed: int,
) -> list[NullRecipe]:
    """Recipes for the nulls of one base; a longer list begins with the shorter one.

    Families take turns. Each recipe gets the combination that its family and the whole list have had least of
    so far, ties by `seed`, so that no family is trained harder or otherwise than another: minimization after
    Pocock and Simon (1975), without its random element.

    Args:
        nulls: How many.
        families: Names of the texts to train on.
        full_lr: Learning rates of `full` nulls, relative to the model's weights.
        lora_lr: Learning rates of `lora` nulls.
        steps: Lengths in optimiser steps.
        methods: Kinds of fine-tune.
        seed: Decides ties and every recipe's own seed.

    Raises:
        ConfigError: When there is nothing to choose from, or a rate or length is not positive.
    """
    rates: dict[Method, Sequence[float]] = {"full": full_lr, "lora": lora_lr}
    _check(nulls, families, {method: rates.get(method, ()) for method in methods}, steps)
    options: list[tuple[Method, float, int]] = [
        (method, lr, length) for method in methods for lr, length in product(rates[method], steps)
    ]
    taken: Counter[Hashable] = Counter()
    recipes = []
    for index in range(nulls):
        family = families[index % len(families)]
        draws = np.random.default_rng([seed, index])
        own = int(draws.integers(2**31))
        ties = draws.permutation(len(options)).tolist()
        best = min(
            range(len(options)),
            key=lambda option: (
                *(taken[margin] for margin in _margins(family, *options[option])),
                ties[option],
            ),
        )
        taken.update(_margins(family, *options[best]))
        method, lr, length = options[best]
        recipes.append(NullRecipe(index, family, method, float(lr), length, own))
    return recipes


def _margins(family: str, method: Method, lr: float, steps: int) -> list[Hashable]:
    """What is to occur equally often, most important first."""
    return [
        ("method in family", family, method),
        ("method", method),
        ("rate in family", family, method, lr),
        ("rate", method, lr),
        ("length in family", family, method, steps),
        ("cell", method, lr, steps),
        ("length", steps),
    ]


def _check(
    nulls: int, families: Sequence[str], rates: dict[Method, Sequence[float]], steps: Sequence[int]
) -> None:
    if nulls < 0:
        raise ConfigError("The number of nulls must not be negative", found=nulls)
    if not families or len(set(families)) != len(families):
        raise ConfigError(
            "Nulls need texts to be trained on", expected="distinct names, at least one", found=list(families)
        )
    if not rates or not set(rates) <= set(METHODS):
        raise ConfigError(
            "Unknown kind of null", expected=" or ".join(METHODS), found=", ".join(rates) or "none"
        )
    for what, values in {
        **{f"{name} learning rates": lrs for name, lrs in rates.items()},
        "steps": steps,
    }.items():
        if not values or not all(0 < value < math.inf for value in values):
            raise ConfigError(
                f"The {what} of nulls cannot be used",
                expected="positive numbers, at least one",
                found=list(values),
            )
