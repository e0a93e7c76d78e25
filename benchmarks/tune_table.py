"""The tables of "Latent adapters" in docs/results.md, from the runs that recipes/zoo-tune.sh made.

python benchmarks/tune_table.py runs/zoo/tune
"""

import json
import sys
from pathlib import Path


def load(path):
    return json.loads(path.read_text()) if path.is_file() else None


def number(value, ci=None, digits=4, sign=False):
    if value is None:
        return "–"
    form = f"{{:{'+' if sign else ''}.{digits}f}}"
    text = form.format(value)
    if ci:
        text += f" [{form.format(ci[0])}, {form.format(ci[1])}]"
    return text.replace("-", "−")


def trained(folder, prefixes):
    print(
        "| adapter | objective before → after | difference | held-out loss | KL to base, general text "
        "| parameters | s |"
    )
    print("|---|---|---|---|---|---|---|")
    for prefix in prefixes:
        for path in sorted(folder.glob(f"{prefix}-*/tune.json")):
            about = load(path)
            value, loss, general = about["objective_value"], about["heldout_loss"], about["general"]
            print(
                f"| `{path.parent.name}` | {number(value['before'])} → {number(value['after'])} "
                f"| {number(value['difference'], value['ci'], sign=True)} "
                f"| {number(loss and loss['difference'], loss and loss['ci'], sign=True)} "
                f"| {number(general and general['kl'], general and general['ci'])} "
                f"| {about['parameters']:,} | {about['seconds']:.0f} |"
            )
    print()


def margins(folder):
    print("| adapter | training loss, last 10 steps | held-out loss | held-out margin, nats | right pairs |")
    print("|---|---|---|---|---|")
    for path in sorted(folder.glob("dpo-*/tune.json")):
        about = load(path)
        margin, value = about["margin"], about["objective_value"]
        log = [json.loads(line) for line in (path.parent / "log.jsonl").read_text().splitlines()]
        last = [line["loss"] for line in log if "loss" in line][-1]
        print(
            f"| `{path.parent.name}` | 0.6931 → {number(last)} | {number(value['before'])} → {number(value['after'])} "
            f"| {number(margin['after'], margin['ci'], 2, sign=True)} | {margin['accuracy']:.0%} of {value['rows']} |"
        )
    print()


def explained(folder):
    print(
        "| adapter | latents with 50 / 90 % of the effect | latents that keep 95 % | on held-out text "
        "| by value | at random "
        "| activation corpus / general: top, random, shuffled values |"
    )
    print("|---|---|---|---|---|---|---|")
    for path in sorted(folder.glob("explain-*/explain.json")):
        about = load(path)
        few, pruned, special = about["concentration"], about["pruned"], about["specificity"]
        row = [f"`{path.parent.name}`", f"{few['half']} / {few['most']} of {few['effective']}"]
        if pruned:
            random = f"{pruned['random_n']} {list(pruned['random_range'])}" if pruned["random_n"] else "–"
            row += [
                str(pruned["n"]),
                number(pruned["share"], pruned["ci"], 3),
                str(pruned["magnitude_n"] or "–"),
                random,
            ]
        else:
            row += ["–"] * 4
        row.append(
            ", ".join(
                number(special[name]["ratio"], special[name]["ci"], 2)
                for name in ("top", "random", "permuted")
            )
            if special
            else "–"
        )
        print("| " + " | ".join(row) + " |")
    print()


def agreements(folder):
    print("| beside | latents | cosine | if shuffled | Spearman | shared of the top n |")
    print("|---|---|---|---|---|---|")
    for path in sorted(folder.glob("explain-*/explain.json")):
        controls = load(path)["controls"]
        for name in ("twin", "other"):
            if one := controls[name]:
                what = "same data, another seed" if name == "twin" else "other data"
                low, high = (number(end, None, 2) for end in one["null_cosine"])
                print(
                    f"| `{Path(one['adapter']).name}` ({what}) | {one['latents']} | {number(one['cosine'], None, 3)} "
                    f"| {low} to {high} | {number(one['spearman'], None, 3)} "
                    f"| {one['overlap']:.0%} of {one['top_n']} |"
                )
        if one := controls["shuffled"]:
            print(
                f"\n`{Path(one['adapter']).name}`, trained on shuffled words: base minus tuned loss "
                f"{number(one['difference'], one['ci'], sign=True)}, {number(one['share'], None, 2)} of what the "
                "explained adapter does.\n"
            )
    print()


def main():
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo/tune")
    trained(folder, ("math", "code"))
    margins(folder)
    trained(folder, ("dpo",))
    explained(folder)
    agreements(folder)


if __name__ == "__main__":
    main()
