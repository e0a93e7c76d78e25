"""The verdict table of docs/results.md from the audits that recipes/zoo-battery.sh wrote.

python benchmarks/verdict_table.py [runs/zoo] > verdicts.md
"""

import sys
from pathlib import Path

from palimpsest.artifacts import open_artifact
from palimpsest.findings import AuditFinding

TRUTH = {
    "math": "math",
    "code": "code",
    "math-lora": "math",
    "math-mixed": "math, general, web",
    "code-gentle": "code",
    "general": "general (control)",
    "math-step25": "math",
    "math-step75": "math",
}


def test_cells(test):
    if test is None:
        return "–", "–"
    lo, hi = test.ci
    p = f"{test.p:.1g}"
    return f"{test.residual:+.3f} [{lo:+.3f}, {hi:+.3f}]", f"{test.z:+.1f} ({p}; {test.p_rank:.2g})"


def main(root):
    header = (
        "fine-tune",
        "corpus",
        "calibrated c_D",
        "z (p; rank p)",
        "Δloss beyond the nulls",
        "z (p; rank p)",
        "q",
        "p_max",
        "verdict",
    )
    print("| " + " | ".join(header) + " |\n|" + "---|" * len(header))
    extremes = []
    for name, trained in TRUTH.items():
        audit = open_artifact(root / f"verdict-{name}", stage="audit").read_json("audit.json")
        calibration = AuditFinding.from_dict(audit).calibration
        assert calibration is not None
        note = ", extrapolates" if calibration.extrapolated else ""
        for i, domain in enumerate(calibration.domains):
            cells = (*test_cells(domain.features), *test_cells(domain.loss))
            kind = f"{domain.verdict} ({domain.kind})" if domain.kind else domain.verdict
            q = "–" if domain.q is None else f"{domain.q:.1g}"
            p_max = "–" if domain.p_max is None else f"{domain.p_max:.2g}"
            first = f"`{name}` (trained on {trained}{note})" if i == 0 else ""
            print("| " + " | ".join((first, domain.name, *cells, q, p_max, kind)) + " |")
        judged = [domain for domain in calibration.domains if domain.features is not None]
        largest = max(judged, key=lambda domain: abs(domain.features.z))
        extremes.append((name, trained, largest, calibration.sentence))
    print(
        "\n| fine-tune | trained on | most extreme calibrated c_D | interval excludes the null | in one sentence |"
    )
    print("|---|---|---|---|---|")
    for name, trained, largest, sentence in extremes:
        lo, hi = largest.features.ci
        excludes = "yes" if lo > 0 or hi < 0 else "no"
        print(
            f"| `{name}` | {trained} | {largest.name}, z {largest.features.z:+.1f} | {excludes} | {sentence} |"
        )


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/zoo"))
