"""Coverage of the bootstrap interval of a mean over few documents, with and without the expansion.

python benchmarks/coverage.py
"""

import numpy as np

from palimpsest.stats import Resampler, percentile_interval, weighted_mean

REPETITIONS, RESAMPLES = 1500, 600


def main():
    rng = np.random.default_rng(1)
    cases = {
        "Beta(6, 2)": (lambda n: rng.beta(6, 2, n), 0.75),
        "exponential": (lambda n: rng.exponential(1, n), 1.0),
    }
    print("| documents are | n | plain percentile | expanded |\n|---|---|---|---|")
    for name, (draw, true) in cases.items():
        for n in (10, 15, 20, 40, 80):
            hits = [0, 0]
            for seed in range(REPETITIONS):
                values = draw(n)
                samples = Resampler(n, RESAMPLES, [seed, n]).apply(
                    lambda w, values=values: weighted_mean(w, values)
                )
                for i, documents in enumerate((None, n)):
                    lo, hi = percentile_interval(samples, 0.95, documents)
                    hits[i] += bool(lo <= true <= hi)
            print(f"| {name} | {n} | {hits[0] / REPETITIONS:.1%} | {hits[1] / REPETITIONS:.1%} |", flush=True)


if __name__ == "__main__":
    main()
