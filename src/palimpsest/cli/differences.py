"""A diff as tables in the terminal."""

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

from palimpsest.cli.command import say
from palimpsest.diff.result import Attributed, Behaviour, Diff, PatchRow
from palimpsest.log import console

if TYPE_CHECKING:
    from rich.table import Table

    from palimpsest.diff.compare import Comparison

SHOWN = 10


def show(found: Diff, path: str) -> None:
    """Print what a diff found."""
    from rich.console import Console

    out = Console(width=_width(), markup=False, emoji=False, highlight=False)
    say(found.summary)
    say("")
    out.print(_counts(found))
    if found.patching:
        out.print(_baselines(found))
        out.print(_halves(found))
        _curves(found)
    if found.patched.get("base_kl"):
        own = ", ".join(f"{value:.3f} ({place})" for place, value in found.patched["base_kl"].items())
        say(f"KL of the base model itself: {own} nats per prediction")
    for one in found.attribution:
        _attributed(one)
    if found.ranked:
        out.print(_ranked(found))
        _examples(found)
    for number, group in enumerate(found.behaviours[:5], 1):
        _behaviour(number, group)
    if found.patched.get("samples"):
        say(
            f"{len(found.patched['samples'])} continuations of base, tuned and patched model are in diff.json."
        )
    for note in found.notes:
        say(f"! {note}")
    say(f"Written to {path}")


def show_comparison(found: "Comparison", path: str) -> None:
    """Print one line per diff; the whole is in its folder."""
    from rich.console import Console

    places = list(dict.fromkeys(place for row in found.rows for place in row.recovered))
    columns = (
        "diff",
        "method",
        "FVE of Δ",
        "raw / surviving / null",
        *(f"% of KL, {place}" for place in places),
        "s",
    )
    table = _table(f"{found.pair['tuned']} against {found.pair['base']} at {found.site}", columns)
    for row in found.rows:
        shares = [_share([row.recovered[place]] if place in row.recovered else []) for place in places]
        raw = "–" if row.raw is None else f"{row.raw:,}"
        counts = f"{raw} / {row.surviving:,} / {_number(row.null, 1)}"
        method = f"{row.method} ({row.activation})"
        table.add_row(
            row.name, method, _number(row.fve["difference"]), counts, *shares, f"{row.diff_seconds:.0f}"
        )
    Console(width=_width(), markup=False, emoji=False, highlight=False).print(table)
    for note in found.notes:
        say(f"! {note}")
    say(f"Written to {path}: compare.md has every table and a reading guide")


def _width() -> int | None:
    """The terminal's, or what COLUMNS says; enough for every table where neither does."""
    return None if console().is_terminal or "COLUMNS" in os.environ else 130


def _table(title: str, columns: Iterable[str]) -> "Table":
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for place, name in enumerate(columns):
        table.add_column(name, justify="right" if place else "left")
    return table


def _counts(found: Diff) -> "Table":
    described, only = found.dictionary, found.tuned_only
    k = "" if described["k"] is None else f", k {described['k']}"
    title = (
        f"{found.method}: {described['n_latents']:,} latents ({described['activation']}{k}) at {found.site}, "
        f"{found.tokens:,} tokens"
    )
    table = _table(title, ("", "value"))
    table.add_row("FVE base / tuned / difference", " / ".join(_number(found.fve[key]) for key in found.fve))
    table.add_row("latents active per token", _number(found.l0, 1))
    for name, count in found.classes.items():
        table.add_row(name, f"{count:,}")
    table.add_row("tuned-only that survive Latent Scaling", f"{only['surviving']:,}")
    table.add_row("… rejected / undetermined", f"{only['rejected']:,} / {only['undetermined']:,}")
    if only.get("sensitivity"):
        seen = only["sensitivity"]
        text = f"{seen['tuned-specific']:.0%} / {seen['rejected']:.0%} / {seen['undetermined']:.0%}"
        table.add_row("… if the base lacked them: pass / rejected / undetermined", text)
    null = f"{_number(only['null'], 1)} of {_number(only['null_raw'], 1)}"
    table.add_row("… in null pairs, mean", "–" if only["null"] is None else null)
    for row in found.stability:
        both = (row["alive"], row["tuned_only"])
        means = " / ".join(_number(one["mean"]) for one in both)
        table.add_row("found again with another seed (cosine), alive / tuned-only", means)
    if found.artefacts:
        about = found.artefacts
        table.add_row(
            "tuned-only that fail ν of error / reconstruction",
            f"{about['shrinkage']} / {about['decoupling']}",
        )
        table.add_row(
            "split pairs / of them active apart", f"{about['split_pairs']} / {about['split_pairs_apart']}"
        )
    return table


def _baselines(found: Diff) -> "Table":
    """What is no choice among latents: nothing, everything, and the references beside them."""
    rows = [row for row in found.patching if ":" not in row.set]
    places = list(dict.fromkeys(row.positions for row in rows))
    table = _table("Put into the base: % of the KL recovered", ("part", "latents", *places))
    for name in dict.fromkeys(row.set for row in rows):
        by_place = {row.positions: row for row in rows if row.set == name}
        size = next(iter(by_place.values())).size
        table.add_row(name, "–" if size is None else f"{size:,}", *(_share([by_place[p]]) for p in places))
    return table


def _halves(found: Diff) -> "Table":
    """The better and worse half by each ranking, beside random sets and directions; and the better one taken out."""
    columns = ("ranking", "latents", "better", "worse", "random", "directions")
    title = "Halves of the strongest and their controls: % recovered; taken out: % of the KL of none"
    table = _table(title, (*columns, "taken out", "random taken out"))
    added, removed = (
        [row for row in rows if row.positions == "all"] for rows in (found.patching, found.removal)
    )
    for best in (row for row in added if row.set.startswith("best:")):
        name = best.set.partition(":")[2]
        cells = [
            _share([row for row in rows if row.set == f"{kind}:{name}"])
            for rows, kind in (
                (added, "best"),
                (added, "worst"),
                (added, "random"),
                (added, "directions"),
                (removed, "best"),
                (removed, "random"),
            )
        ]
        table.add_row(name, f"{best.size:,}", *cells)
    return table


def _curves(found: Diff) -> None:
    """How much the strongest n latents of each ranking recover."""
    place = found.patching[0].positions
    rows = [row for row in found.patching if row.set.startswith("top:") and row.positions == place]
    for name in dict.fromkeys(row.set for row in rows):
        points = [f"{row.size:,}: {_percent(row.share)}" for row in rows if row.set == name]
        say(f"Strongest n by {name.partition(':')[2]}: " + ", ".join(points))


def _share(rows: list[PatchRow]) -> str:
    """The share with its interval; of several seeds their mean and range."""
    known = [row.share for row in rows if row.share is not None]
    if not known:
        return "–"
    if len(rows) > 1:
        return f"{_100(sum(known) / len(known))} ({_100(min(known))}–{_100(max(known))})"
    bounds = rows[0].ci
    return _100(known[0]) + ("" if bounds is None else f" [{_100(bounds[0])}, {_100(bounds[1])}]")


def _100(share: float) -> str:
    return f"{100 * share:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _attributed(one: Attributed) -> None:
    say(
        f"Attribution of {one.objective} ({one.gap:.4f} over {one.units:,}): latents {one.latents:.1%}, "
        f"bias {one.bias:.1%}, not in the dictionary {one.error:.1%}, not integrated {one.incomplete:.1%}"
    )
    for row in one.verified:
        say(
            f"  strongest {row['size']}: predicted {row['predicted']:.1%}, put in {row['added']:.1%}, "
            f"taken out {row['removed']:.1%}"
        )


def _ranked(found: Diff) -> "Table":
    ratio = "nu_error" if found.method == "crosscoder" else "nu_centred"
    columns = ("latent", "class", "verdict", "Δnorm", ratio, "interval", "causal share", "rate")
    table = _table(f"The {SHOWN} latents to look at first", columns)
    for row in found.ranked[:SHOWN]:
        bounds = row[f"{ratio}_ci"]
        table.add_row(
            str(row["latent"]),
            row["class"],
            row["verdict"],
            _number(row["delta_norm"], 2),
            _number(row[ratio], 2),
            "–" if bounds is None else f"[{bounds[0]:.2f}, {bounds[1]:.2f}]",
            "–" if row["causal_share"] is None else f"{row['causal_share']:.2%}",
            _number(row["rate"], 4),
        )
    return table


def _examples(found: Diff) -> None:
    """On which token each of these latents is strongest, in its text."""
    for row in found.ranked[:SHOWN]:
        for example in row["examples"][:1]:
            text = f"{example['before'][-36:]}[{example['token']}]{example['after'][:20]}"
            say(f"  {row['latent']:>6}  {example['corpus']}: {_shown(text)}")


def _behaviour(number: int, group: Behaviour) -> None:
    latents = ", ".join(map(str, group.latents[:8]))
    say(f"Behaviour {number}: latents {latents} ({group.share:.1%} of the KL where the models differ most)")
    for context in group.contexts[:3]:
        say(f"    {_shown(context['before'][-50:])}[{_shown(context['token'])}]")


def _shown(text: str) -> str:
    """Text of a corpus on one line, its control codes visible."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
