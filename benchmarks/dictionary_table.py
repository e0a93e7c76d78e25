"""Table of dictionaries in docs/results.md from what recipes/zoo-dictionaries.sh wrote.

python benchmarks/dictionary_table.py [runs/zoo/dictionaries] > table.md
"""

import json
import sys
from pathlib import Path

from palimpsest.dictionaries import load_dictionary
from palimpsest.evaluate import Evaluation

VIEWS = {"base": "SAE of base", "tuned": "SAE of tuned", "diff": "diff-SAE", "pair": "crosscoder"}


def found(root):
    """Every finished dictionary below a folder, with its evaluation."""
    for path in sorted(root.glob("**/dictionary.json")):
        folder = path.parent
        alone = folder / "evaluation.json"
        place = alone if alone.exists() else folder.parent / f"{folder.name}-evaluation.json"
        if place.exists():
            yield folder, load_dictionary(folder), Evaluation.from_dict(json.loads(place.read_text()))


def interval(value, ci):
    return f"{value:.3f} [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else f"{value:.3f}"


def rows(root):
    for folder, dictionary, evaluation in found(root):
        recipe = dictionary.metadata["recipe"]
        rule = dictionary.activation + (" Matryoshka" if recipe["prefixes"] else "")
        bound = recipe["partition"]
        if any(bound.values()):
            rule += f", {bound['tuned_only']} tuned-only, {bound['shared']} shared"
        for side in evaluation.models:
            splice = side.splice
            yield [
                f"`{folder.relative_to(root)}`",
                VIEWS[dictionary.view],
                rule,
                side.side,
                interval(side.fve, side.fve_ci),
                f"{side.l0:.1f}",
                f"{side.dead_share:.1%}",
                " / ".join(f"{splice.ce[name]:.3f}" for name in ("original", "spliced", "zero", "mean")),
                interval(splice.ce_recovered["zero"], splice.ce_recovered_ci["zero"]),
                interval(splice.kl_recovered["zero"], splice.kl_recovered_ci["zero"]),
            ]


def main(root):
    header = ["folder", "view", "rule", "model", "FVE", "L0", "dead", "CE as is / spliced / zero / mean"]
    header += ["CE recovered", "KL recovered"]
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    for row in rows(root):
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo/dictionaries"))
