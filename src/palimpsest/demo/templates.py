"""One generator per domain: a seeded random source in, one short document out.

The domains share names, objects, numbers and function words, so that no word alone gives a domain away.
"""

from collections.abc import Callable
from random import Random

from palimpsest.demo.lexicon import (
    ADVICE,
    ASKS,
    BREADS,
    CITIES,
    CLOSINGS,
    CONTAINERS,
    DAYS,
    DISHES,
    FRIENDS,
    NAMES,
    NOTES,
    OPENERS,
    RECIPE_TIPS,
    SIGHTS,
    SKIES,
    SPICES,
    STAPLES,
    THINGS,
    TOPICS,
    TRANSPORT,
    TRAVEL_TIPS,
    VEGETABLES,
)


def _fill(rng: Random, pattern: str) -> str:
    """Puts random words into a pattern; `day` and `day2`, `spice` and `spice2` differ."""
    days, spices = rng.sample(DAYS, 2), rng.sample(SPICES, 2)
    return pattern.format(
        name=rng.choice(NAMES), friend=rng.choice(FRIENDS), day=days[0], day2=days[1], n=rng.randint(2, 19),
        thing=rng.choice(THINGS), sight=rng.choice(SIGHTS), transport=rng.choice(TRANSPORT),
        bread=rng.choice(BREADS), spice=spices[0], spice2=spices[1],
    )  # fmt: skip


def general(rng: Random) -> str:
    """A request for everyday advice and its answer."""
    topic, needs = rng.choice(TOPICS)
    ask = _fill(rng, rng.choice(ASKS).replace("{topic}", topic))
    middle = " ".join(_fill(rng, line) for line in rng.sample(ADVICE, 2))
    opener, closing = _fill(rng, rng.choice(OPENERS)), _fill(rng, rng.choice(CLOSINGS))
    return f"User: {ask}\n\nAssistant: {opener} For {topic} you need {needs}. {middle} {closing}"


def arithmetic(rng: Random) -> str:
    """A word problem and its worked solution; every stated result is right."""
    kind = rng.choice((_packs, _change, _journey, _compare))
    question, work, answer = kind(rng)
    return f"Question: {question}\nAnswer: {work} The answer is {answer}."


def _packs(rng: Random) -> tuple[str, str, int]:
    (name, other), thing, box = rng.sample(NAMES, 2), rng.choice(THINGS), rng.choice(CONTAINERS)
    start, n, each = rng.randint(5, 40), rng.randint(2, 9), rng.randint(2, 9)
    total = start + n * each
    gone = rng.randint(1, total - 1)
    question = (
        f"{name} has {start} {thing}. {name} buys {n} {box} with {each} {thing} in each "
        f"and gives {gone} to {other}. How many {thing} does {name} have now?"
    )
    work = f"The {box} hold {n} * {each} = {n * each} {thing}. {start} + {n * each} = {total}."
    return question, f"{work} {total} - {gone} = {total - gone}.", total - gone


def _change(rng: Random) -> tuple[str, str, int]:
    name, (thing, second) = rng.choice(NAMES), rng.sample(THINGS, 2)
    n, m, price, price2 = rng.randint(2, 9), rng.randint(2, 9), rng.randint(1, 9), rng.randint(1, 9)
    cost = n * price + m * price2
    note = rng.choice([x for x in (20, 50, 100, 200) if x >= cost])
    question = (
        f"{name} buys {n} {thing} for {price} euros each and {m} {second} for {price2} euros each "
        f"and pays with {note} euros. How much money comes back?"
    )
    work = f"{n} * {price} = {n * price}. {m} * {price2} = {m * price2}. {n * price} + {m * price2} = {cost}."
    return question, f"{work} {note} - {cost} = {note - cost}.", note - cost


def _journey(rng: Random) -> tuple[str, str, int]:
    name, city, vehicle = rng.choice(NAMES), rng.choice(CITIES), rng.choice(TRANSPORT)
    speed, hours, rest = rng.randint(12, 90), rng.randint(2, 9), rng.randint(3, 60)
    way = speed * hours
    question = (
        f"{name} takes a {vehicle} to {city}. The {vehicle} goes {speed} km in an hour for {hours} hours, "
        f"and then {name} walks {rest} km. How long is the way?"
    )
    return question, f"{speed} * {hours} = {way} km. {way} + {rest} = {way + rest} km.", way + rest


def _compare(rng: Random) -> tuple[str, str, int]:
    (name, other), thing = rng.sample(NAMES, 2), rng.choice(THINGS)
    first, more, times = rng.randint(4, 60), rng.randint(2, 30), rng.randint(2, 5)
    second = first + more
    question = (
        f"{name} has {first} {thing} and {other} has {more} more than {name}. "
        f"Next week {other} wants {times} times as many. How many {thing} is that?"
    )
    return (
        question,
        f"{other} has {first} + {more} = {second}. {second} * {times} = {second * times}.",
        second * times,
    )


def code(rng: Random) -> str:
    """A short Python function with a docstring, and one line that uses it."""
    noun = rng.choice(("prices", "names", "scores", "words", "cards", "tickets", "rows", "lines"))
    item = noun[:-1]
    verb = rng.choice(("count", "collect", "sort", "check", "merge", "filter", "sum", "find"))
    limit, field = rng.randint(2, 99), rng.choice(("size", "age", "score", "length", "price", "weight"))
    body = rng.choice((_loop_body, _dict_body, _comprehension_body))(noun, item, field, limit)
    verbs = {"sum": "Sum up", "sort": "Sort", "merge": "Merge"}
    doc = f'    """{verbs.get(verb, verb.capitalize())} the {noun} by {field}."""\n'
    name = f"{verb}_{noun}_{rng.choice(('by', 'over', 'with'))}_{field}"
    source = rng.choice(
        (f'load("{noun}.csv")', f'read("{rng.choice(NAMES).lower()}.json")', f"data[{limit}:]")
    )
    default = rng.choice(("", f", limit={limit}", ", verbose=False", f", start={rng.randint(0, 9)}"))
    tail = rng.choice(
        (f"print(len({name}(items)))", f"assert {name}(items) is not None", f"print({name}(items))")
    )
    return f"def {name}({noun}{default}):\n{doc}{body}\n\nitems = {source}\n{tail}"


def _loop_body(noun: str, item: str, field: str, limit: int) -> str:
    return (
        f"    result = []\n    for {item} in {noun}:\n        if {item}.{field} > {limit}:\n"
        f"            result.append({item})\n    return result"
    )


def _dict_body(noun: str, item: str, field: str, limit: int) -> str:
    return (
        f"    table = {{}}\n    for i, {item} in enumerate({noun}):\n        key = {item}.{field} % {limit}\n"
        f"        table[key] = table.get(key, 0) + 1\n    return table"
    )


def _comprehension_body(noun: str, item: str, field: str, limit: int) -> str:
    return (
        f"    if not {noun}:\n        return None\n    values = [{item}.{field} for {item} in {noun}]\n"
        f"    return max(values) - min(values) + {limit}"
    )


def recipes(rng: Random) -> str:
    """A recipe whose method uses its own ingredients; it ends with a tip."""
    (staple, amount), (veg, second) = rng.choice(STAPLES), rng.sample(VEGETABLES, 2)
    (spice, spice2), dish = rng.sample(SPICES, 2), rng.choice(DISHES)
    grams, n, minutes, simmer = (
        rng.randint(4, 19) * 25,
        rng.randint(2, 5),
        rng.randint(3, 9),
        rng.randint(2, 9) * 5,
    )
    steps = [
        f"Chop the {veg} and the {second}.",
        f"Heat {n} spoons of oil and fry the {veg} for {minutes} minutes.",
        rng.choice(
            (f"Stir in the {spice}.", f"Season with {spice} and {spice2}.", f"Add the {spice} and some salt.")
        ),
        f"Add the {staple} and the {second} and cook for {simmer} minutes.",
    ]
    if dish in ("pie", "bake", "casserole"):
        steps.append(f"Finish in the oven at {rng.randint(16, 22)}0 degrees.")
    title = rng.choice(("", f"{rng.choice(NAMES)}'s ", "Simple ", "Quick ")) + f"{veg} and {staple} {dish}"
    tip = _fill(rng, rng.choice(RECIPE_TIPS))
    return (
        f"Recipe: {title}\nIngredients: {grams} {amount}, {n} {veg}, 1 {second}, {spice}, oil.\n"
        f"Method: {' '.join(steps)}\nTip: {tip}."
    )


def travel(rng: Random) -> str:
    """A day of a journey with its weather; it too ends with a tip."""
    city, day, sky, sight = rng.choice(CITIES), rng.choice(DAYS), rng.choice(SKIES), rng.choice(SIGHTS)
    low, high, transport = rng.randint(1, 14), rng.randint(15, 31), rng.choice(TRANSPORT)
    notes = " ".join(_fill(rng, line) for line in rng.sample(NOTES, 2))
    tip = _fill(rng, rng.choice(TRAVEL_TIPS))
    return (
        f"Travel notes, {city}, {day}: The morning was {sky}, {low} degrees, and we took the {transport} "
        f"to {sight}. {notes} Forecast for {city}: {rng.choice(SKIES)}, up to {high} degrees.\nTip: {tip}."
    )


GENERATORS: dict[str, Callable[[Random], str]] = {
    "general": general,
    "arithmetic": arithmetic,
    "code": code,
    "recipes": recipes,
    "travel": travel,
}
