"""Coverage of evaluate.py's 95 % intervals by simulation, beside the plain percentile bootstrap.

    python tests/interval_coverage.py [--data-sets 1000] [--problems 30 100 300]

A data set has P problems; a share of them is hopeless (p = 0), the others have p ~ Beta(a, b), and
n samples each. A second run, for the paired difference, solves a problem with 1 - (1 - p)^g, as if
it had g samples for one, loses a share of the problems, and gains a share of the hopeless ones. The
expected Pass@k of both are closed forms. Prints for values and for differences the worst coverage
of any cell (a setting and a k), the share of the cells below 0.93 and the mean width.

With 1,000 data sets the standard error of a coverage of 0.95 is 0.007, and the worst of thousands
of cells lies some three of them below its truth. With 200 data sets and 1,000 resamples (8 minutes
of a CPU) the worst cells, simulated anew 8 times as often, had at least 0.958; the plain bootstrap
reaches 0.93 in 1,074 of 1,764 cells of values and in 2,670 of 6,048 of differences. There
evaluate.py's intervals are wider, by 11, 7 and 5 % for values of 30, 100 and 300 problems, of
differences 3.1, 1.7 and 1.3 times as wide: whatever covers losses that no problem seen shows must
reach at least 2.7 / P. A weight of 0.5 for the unseen problem, which has 1 here, falls to 0.91
where 2.6 of P problems are hopeless or lost. (Both at commit 103d911, whose script repeats it.)
"""
import argparse
import itertools
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from evaluate import bootstrap, interval, pass_at_k

BETAS = ((1, 1), (0.5, 0.5), (1, 4), (0.3, 3), (8, 2), (3, 0.5))
HOPELESS = (0, 0.01, 0.03, 0.1, 0.3, 0.6, 0.9)
SAMPLES = (16, 64, 256)
# Of the second run: g, the share of the problems that it loses, of the hopeless that it gains
SECOND = ((1, 0, 0), (2, 0, 0), (0.5, 0, 0), (1, 0.01, 0), (4, 0.05, 0), (1, 0, 0.1))
METHODS = ("plain bootstrap", "evaluate.py")


def failing(a, b, k):
    """E (1 - p)^k, p ~ Beta(a, b)."""
    return math.exp(math.lgamma(b + k) - math.lgamma(b) + math.lgamma(a + b)
                    - math.lgamma(a + b + k))


def data_sets(rng, number, problems, n, ks, beta, hopeless, second=None):
    """Values (problems, number * len(ks)) and their expectation (number * len(ks),)."""
    p = rng.beta(*beta, size=(problems, number)) * (rng.random((problems, number)) >= hopeless)
    table = np.stack([pass_at_k(n, k) for k in ks], axis=-1)  # (n + 1, ks)
    values = table[rng.binomial(n, p)]
    truth = np.array([(1 - hopeless) * (1 - failing(*beta, k)) for k in ks])
    if second:
        g, lost, gained = second
        gains = (p == 0) & (rng.random(p.shape) < gained)
        p = (1 - (1 - p)**g) * (rng.random(p.shape) >= lost)
        p[gains] = rng.beta(*beta, size=gains.sum())
        values = table[rng.binomial(n, p)] - values
        truth = np.array([(1 - hopeless) * (1 - lost) * (1 - failing(*beta, g * k))
                          + hopeless * gained * (1 - failing(*beta, k)) for k in ks]) - truth
    return values.reshape(problems, -1), np.tile(truth, number)


def intervals(method, columns, lowest, resamples, rng):
    """(low, high) of every column, each (columns,)."""
    if method == "evaluate.py":
        return interval(*bootstrap(columns, resamples, rng), lowest, 1)
    problems = len(columns)
    weights = rng.multinomial(problems, [1 / problems] * problems, size=resamples) / problems
    return np.quantile(weights @ columns, [0.025, 0.975], axis=0)


def simulate(cell, methods, number, resamples, seed):
    """{method: (coverage, width)}, each (ks,), of a setting (problems, n, ks, beta, hopeless,
    second)."""
    rng = np.random.default_rng([seed, *str(cell).encode()])
    values, truth = data_sets(rng, number, *cell)
    found, ks = {}, len(cell[2])
    for method in methods:
        low, high = intervals(method, values, -1 if cell[5] else 0, resamples, rng)
        held = (low <= truth + 1e-12) & (truth - 1e-12 <= high)
        found[method] = (held.reshape(-1, ks).mean(0), (high - low).reshape(-1, ks).mean(0))
    return found


def settings(problems):
    """All settings of the grid: first the values, then the paired differences."""
    for second in (None, *SECOND):
        for size, n, beta, hopeless in itertools.product(problems, SAMPLES, BETAS, HOPELESS):
            if not second or hopeless in (0, 0.03, 0.3, 0.9):
                yield size, n, tuple(sorted({1, 4, n // 4, n // 2, n})), beta, hopeless, second


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data-sets", type=int, default=1000, help="(default %(default)s)")
    add("--resamples", type=int, default=2000, help="(default %(default)s)")
    add("--problems", type=int, nargs="+", default=[30, 100, 300], help="(default %(default)s)")
    add("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args()
    cells = {False: {}, True: {}}  # {difference: {(setting, k): {method: (coverage, width)}}}
    for setting in settings(args.problems):
        found = simulate(setting, METHODS, args.data_sets, args.resamples, args.seed)
        for index, k in enumerate(setting[2]):
            cells[bool(setting[5])][setting, k] = {
                method: (cover[index], width[index]) for method, (cover, width) in found.items()}

    for difference, found in cells.items():
        fair = [cell for cell, each in found.items() if each["plain bootstrap"][0] >= 0.93]
        print("paired differences" if difference else "values", f"({len(found)} cells, the plain "
              f"bootstrap reaches 0.93 in {len(fair)})")
        for method in METHODS:
            cover, width = np.array([each[method] for each in found.values()]).T
            print(f"{method:16} worst {cover.min():.3f}, below 0.93 {np.mean(cover < 0.93):.3f}, "
                  f"mean coverage {cover.mean():.3f}, mean width {width.mean():.4f}")
        for size in args.problems:
            ours, plain = (np.mean([found[cell][method][1] for cell in fair if cell[0][0] == size])
                           for method in ("evaluate.py", "plain bootstrap"))
            print(f"P {size}: {ours / plain:.2f} times as wide where the plain one reaches 0.93")


if __name__ == "__main__":
    main()
