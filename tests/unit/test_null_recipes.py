"""Recipes of nulls: a longer list extends a shorter one, and no family is trained otherwise than another."""

from __future__ import annotations

import json
from collections import Counter
from itertools import product

import pytest

from helpers import python_source
from palimpsest.audit.nulls import make_recipes
from palimpsest.errors import ConfigError

OPTIONS = {"full_lr": (0.005, 0.02, 0.08), "lora_lr": (1e-3, 4e-3, 1e-2), "steps": (20, 60)}
FAMILIES = ("general", "web", "math", "code")


def recipes(nulls=48, families=FAMILIES, seed=0, **changes):
    return make_recipes(nulls, families, **(OPTIONS | changes), seed=seed)


def spread(values, levels):
    counts = Counter(values)
    assert set(counts) <= set(levels)
    found = [counts[level] for level in levels]
    return max(found) - min(found)


def test_more_nulls_extend_fewer():
    long = recipes(48)
    for count in (0, 1, 7, 24):
        assert recipes(count) == long[:count]
    assert recipes(24, seed=1) != long[:24]


@pytest.mark.parametrize("seed", range(5))
def test_every_prefix_is_balanced_over_families_and_methods(seed):
    made = recipes(48, seed=seed)
    for count in range(1, 49):
        prefix = made[:count]
        assert spread([r.family for r in prefix], FAMILIES) <= 1
        assert spread([r.method for r in prefix], ("lora", "full")) <= 1
        for family in FAMILIES:
            assert spread([r.method for r in prefix if r.family == family], ("lora", "full")) <= 1


@pytest.mark.parametrize(
    ("seed", "families"), list(product(range(5), (FAMILIES, FAMILIES[:3], "abcdefghij")))
)
def test_rates_and_lengths_are_not_confounded_with_family_or_method(seed, families):
    made = recipes(24 * len(families), list(families), seed=seed)
    for method, rates in (("lora", OPTIONS["lora_lr"]), ("full", OPTIONS["full_lr"])):
        for family in families:
            own = [r for r in made if (r.family, r.method) == (family, method)]
            assert len(own) == 12
            assert spread([r.lr for r in own], rates) == 0
            assert spread([r.steps for r in own], OPTIONS["steps"]) <= 2
        cells = [(r.lr, r.steps) for r in made if r.method == method]
        assert spread(cells, list(product(rates, OPTIONS["steps"]))) <= max(2, len(families) // 2)


def test_the_default_number_meets_every_rate_once_in_each_family():
    made = recipes(24)
    for family, (method, rates) in product(FAMILIES, (("lora", "lora_lr"), ("full", "full_lr"))):
        own = [r for r in made if (r.family, r.method) == (family, method)]
        assert sorted(r.lr for r in own) == sorted(OPTIONS[rates])
        assert len({r.steps for r in own}) == 2


def test_seed_shuffles_what_is_tried_first():
    assert len({(r.method, r.lr, r.steps) for r in (recipes(1, seed=s)[0] for s in range(20))}) > 3


def test_names_keys_and_seeds_tell_recipes_apart():
    made = recipes(24)
    assert made[7].name == f"null-007 code {made[7].method}"
    assert len({r.seed for r in made}) == 24
    keys = {json.dumps(r.key, sort_keys=True) for r in made}
    assert len(keys) == 24
    assert json.loads(json.dumps(made[3].key)) == made[3].key


def test_one_method_needs_no_rates_of_the_other():
    made = recipes(4, methods=("lora",), full_lr=())
    assert {r.method for r in made} == {"lora"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"nulls": -1},
        {"families": ()},
        {"families": ("math", "math")},
        {"lora_lr": ()},
        {"full_lr": (0.0,)},
        {"full_lr": (float("nan"),)},
        {"steps": (20, -1)},
        {"methods": ()},
    ],
)
def test_what_cannot_be_made_is_refused(wrong):
    with pytest.raises(ConfigError):
        recipes(**wrong)


def test_recipes_cost_no_torch():
    done = python_source(
        "import sys\nfrom palimpsest.audit.nulls import make_recipes\nassert 'torch' not in sys.modules"
    )
    assert done.returncode == 0, done.stderr
