"""The tables of "Diffs" in docs/results.md, from the runs that recipes/zoo-diff.sh leaves.

    python benchmarks/diff_table.py [runs/zoo/diff] [--out FILE.json]

Nothing is measured here: every figure is read from a `diff.json`. The claims at the end are decided by the intervals
and counts in the tables: a claim about two shares holds where the lower end of one interval is above the upper end of
the other, fails where it is the other way round, and is open where they overlap.
"""

import argparse
import json
from pathlib import Path

from palimpsest.diff import read_diff

PAIRS = ("math", "code", "math-lora", "general", "planted", "random-math")
METHODS = {
    "crosscoder-l1": "L1 crosscoder",
    "crosscoder-batch_topk": "BatchTopK crosscoder",
    "diff-first": "diff-SAE",
    "tuned-first": "tuned SAE + scaling",
    "base-first": "base SAE + scaling",
}
RANKINGS = ("delta_norm", "nu", "nu|delta_norm", "activation_change", "attribution")


def load(root):
    found = {}
    for pair in PAIRS:
        for method in METHODS:
            path = root / pair / f"diff-{method}"
            if (path / "diff.json").exists():
                found[pair, method] = read_diff(path)
    return found


def number(value, digits=3):
    return "–" if value is None else f"{value:.{digits}f}"


def percent(row):
    if row is None or row.share is None:
        return "–"
    ends = "" if row.ci is None else f" [{100 * row.ci[0]:.1f}, {100 * row.ci[1]:.1f}]"
    return f"{100 * row.share:.1f}{ends}"


def rows_of(found, name, positions="all", removed=False):
    rows = found.removal if removed else found.patching
    return [row for row in rows if row.set == name and row.positions == positions]


def one(found, name, positions="all", removed=False):
    rows = rows_of(found, name, positions, removed)
    return rows[0] if rows else None


def mean(rows):
    known = [row.share for row in rows if row.share is not None]
    return (
        f"{100 * sum(known) / len(known):.1f} ({100 * min(known):.1f} to {100 * max(known):.1f})"
        if known
        else "–"
    )


def print_table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "\\|") for cell in row) + " |")
    print()


def counts(diffs):
    rows = []
    for (pair, method), found in diffs.items():
        only, classes = found.tuned_only, found.classes
        stability = found.stability[0]["alive"]["mean"] if found.stability else None
        rows.append(
            (
                pair,
                METHODS[method],
                " / ".join(number(found.fve[key]) for key in ("base", "tuned", "difference")),
                number(found.l0, 1),
                found.dead,
                f"{only['raw']} / {only['surviving']} / {only['undetermined']}",
                f"{number(only['null_raw'], 1)} / {number(only['null'], 1)}",
                classes["base-only"],
                f"{found.scaling['tuned-specific']}",
                number(stability, 2),
                number(sum(found.seconds.values()), 0),
            )
        )
    header = (
        "pair",
        "method",
        "FVE base / tuned / difference",
        "L0",
        "dead",
        "tuned-only raw / surviving / undetermined",
    )
    header += (
        "in null pairs, raw / surviving",
        "base-only",
        "pass the rule in any class",
        "stability",
        "diff, s",
    )
    print_table(header, rows)


def causes(diffs):
    rows = []
    for (pair, method), found in diffs.items():
        if not found.patching:
            continue
        rows.append(
            (
                pair,
                METHODS[method],
                number(found.gap["all"]),
                *(percent(one(found, "all+bias", place)) for place in ("all", "first")),
                *(percent(one(found, name)) for name in ("all", "bias", "mean", "template", "raw")),
                percent(one(found, "all+bias", removed=True)),
            )
        )
    header = (
        "pair",
        "method",
        "KL of none",
        "all+bias",
        "all+bias, first answer tokens",
        "all",
        "bias",
        "mean",
        "template",
    )
    print_table((*header, "raw", "all+bias taken out: KL / KL of none"), rows)


def halves(diffs):
    rows = []
    for (pair, method), found in diffs.items():
        for ranking in RANKINGS:
            best = one(found, f"best:{ranking}")
            if best is None:
                continue
            cells = [percent(best), percent(one(found, f"worst:{ranking}"))]
            cells += [mean(rows_of(found, f"{kind}:{ranking}")) for kind in ("random", "directions")]
            cells += [
                percent(one(found, f"best:{ranking}", removed=True)),
                mean(rows_of(found, f"random:{ranking}", removed=True)),
            ]
            rows.append((pair, METHODS[method], ranking, best.size, *cells))
    header = (
        "pair",
        "method",
        "ranking",
        "latents",
        "better half",
        "worse half",
        "random sets",
        "random directions",
    )
    print_table((*header, "better half taken out", "random taken out"), rows)


def verdict(first, second):
    """Whether one share is above another, by their intervals."""
    if first is None or second is None or None in (first.ci, second.ci):
        return "–"
    return "holds" if first.ci[0] > second.ci[1] else "fails" if first.ci[1] < second.ci[0] else "open"


def claims(diffs):
    tally = {}
    for (pair, method), found in diffs.items():
        if pair in ("math", "code", "math-lora"):
            other = diffs.get((pair, "crosscoder-batch_topk"))
            if method == "crosscoder-l1" and other:
                only, theirs = found.tuned_only, other.tuned_only
                tally[f"(a) {pair}"] = (
                    f"L1: {only['raw']} tuned-only, {only['rejected']} rejected; "
                    f"BatchTopK: {theirs['raw']}, {theirs['rejected']} rejected"
                )
            if method == "diff-first" and other:
                pairs = (one(found, "all+bias"), one(other, "all+bias"))
                tally[f"(b) {pair}"] = (
                    f"{verdict(*pairs)}: diff-SAE {percent(pairs[0])}, crosscoder {percent(pairs[1])}"
                )
        if pair in ("general", "random-math"):
            only = found.tuned_only
            tally[f"(c) {pair}, {METHODS[method]}"] = f"{only['raw']} tuned-only, {only['surviving']} survive"
        for ranking in RANKINGS:
            best = one(found, f"best:{ranking}")
            if best is None or pair not in ("math", "code", "math-lora"):
                continue
            worst = verdict(best, one(found, f"worst:{ranking}"))
            seeds = [row.share for row in rows_of(found, f"random:{ranking}")]
            above = (
                "holds"
                if best.ci and best.ci[0] > max(seeds)
                else "fails"
                if best.share < min(seeds)
                else "open"
            )
            tally[f"(d) {pair}, {METHODS[method]}, {ranking}"] = (
                f"better than worse half {worst}, than random {above}"
            )
    for name, text in tally.items():
        print(f"- {name}: {text}")
    return tally


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", nargs="?", type=Path, default=Path("runs/zoo/diff"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    diffs = load(options.root)
    if not diffs:
        raise SystemExit(f"no diffs below {options.root}: run recipes/zoo-diff.sh first")
    counts(diffs)
    causes(diffs)
    halves(diffs)
    tally = claims(diffs)
    if options.out:
        rows = [{"pair": pair, "method": method} | found.to_dict() for (pair, method), found in diffs.items()]
        options.out.write_text(json.dumps({"diffs": rows, "claims": tally}, indent=1) + "\n")


if __name__ == "__main__":
    main()
