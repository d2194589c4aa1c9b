"""Stage 4: Pass@k of scored rollouts with intervals, differences between runs, and the figures.

    python evaluate.py base.jsonl grpo.jsonl ds-grpo.jsonl --names base grpo ds-grpo \\
        --out eval.json --plot passk.png
    python evaluate.py --training runs/NAME --plot training.png

Reads scored.jsonl (score.py), one sample a line; `Row` in data/counts.py names its fields. All
problems of a file have equally many samples (n), all files hold the same problems, the first file
is the reference. Only counts are kept: memory grows with the problems and not with the rows.

Writes eval.json: {"reference", "k", "seed", "resamples", "runs": [one object a file]}. A run has
`name`, `file`, `n`, `problems`, `sampling` (from the file's meta, or null) and, not rounded, null
where it does not apply:
- pass_at_k: {"1": {"value", "low", "high", "diff", "diff_low", "diff_high"}, ...}: the unbiased
  estimate from `correct` (never from rewards) with its 95 % interval, a percentile bootstrap over
  problems, or Clopper-Pearson's where all problems have one value; diff is this run minus the
  reference, on the same resampled problems;
- maj_at_k: the same for the majority vote over `pred`. The samples, in file order, form
  floor(n / k) blocks of k, each block votes once, the mean over blocks counts. Two answers are one
  if their text is equal, null does not vote, answers with equally many votes share;
- distinct: different correct solutions among the n samples of a problem (mean over problems);
- solution_coverage: found / existing solutions of a problem (mean over problems);
- truncated_frac: share of samples cut at the length limit; completion_len: tokens a sample;
- samples_to_match: smallest k at which this run's Pass@k reaches the reference's Pass@n; null: at
  no k up to n;
- sources: the same for each `source`. The run's own figures are then means over sources, each
  counting equally, with the problems resampled inside each.
Pictures are drawn anew at each call (data/report.py). Runs sampled with different
settings are compared, with a warning on stderr.
"""
import argparse
import collections
import dataclasses
import json
import math
import os
import time

import numpy as np

from data.counts import read_run
from data.files import Parser, claim, describe, fail, publish
from data.files import run as run_stage  # a run is a scored file here
from data.report import FIGURES, plot_passk, plot_training, print_table


def parse_args(argv=None):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is below 1")
        return int(text)

    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument
    # What to compare
    add("files", nargs="*", metavar="SCORED.jsonl",
        help="scored rollouts; the first is the reference")
    add("--names", nargs="+", action="extend", help="one name a file (default: the file names)")
    add("--k", nargs="+", action="extend", type=positive,
        help="samples, at most n (default: powers of two up to n)")
    # The intervals
    add("--resamples", type=positive, help="bootstrap resamples (default: 10000)")
    add("--seed", type=int, help="seed of the resamples (default: 0)")
    # What to write, besides the table on the terminal
    add("--out", metavar="EVAL.json", help="all figures (default: none)")
    add("--plot", metavar="FILE.png", help="the curves, as .png, .svg or .pdf (default: none)")
    add("--training", metavar="RUN", help="plot a run's training curves instead: RUN is its "
        "folder, a model folder or a metrics.jsonl (default: none)")
    args = parser.parse_args(argv)

    of_files = args.out, args.k, args.names, args.resamples, args.seed
    if not args.training and not args.files:
        parser.error("give one or more SCORED.jsonl, or --training RUN --plot FILE.png")
    if args.training and (args.files or not args.plot or any(one is not None for one in of_files)):
        parser.error("--training RUN goes with --plot FILE.png and nothing else")
    args.resamples, args.seed = args.resamples or 10_000, args.seed or 0
    if args.plot and not args.plot.endswith((".png", ".svg", ".pdf")):
        parser.error(f"--plot {args.plot}: the name must end in .png, .svg or .pdf")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is below 0")
    if not args.names:
        args.names = [os.path.basename(file).removesuffix(".jsonl") for file in args.files]
    if len(args.names) != len(args.files) or len(set(args.names)) < len(args.names):
        names = " ".join(args.names)
        parser.error(f"--names must give {len(args.files)} different names, not {names}")
    args.k = sorted(set(args.k)) if args.k else None
    return parser.checked(args)


# ---- Estimators ----------------------------------------------------------------------------------
def pass_at_k(n, k):
    """Pass@k of a problem with c of n samples correct, for every c: (n + 1,), indexed by c.

    The unbiased 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374), as the product
    1 - prod_{i = n-c+1 .. n} (1 - k / i), which neither overflows nor cancels.
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not in 1..{n}")
    return 1 - np.concatenate([[1.0], np.cumprod(1 - k / np.arange(n, 0, -1))])


def majority_at_k(votes, k):
    """Share of the floor(n / k) blocks of k samples whose most frequent answer is correct.

    votes: (n,), as in `Tally`. Answers with equally many votes share the block.
    """
    score, blocks = 0.0, len(votes) // k
    for block in range(blocks):
        size, right = collections.Counter(), collections.Counter()
        for vote in filter(None, votes[block * k:(block + 1) * k]):
            size[vote >> 1] += 1
            right[vote >> 1] += vote & 1
        if size:
            top = max(size.values())
            winners = [answer for answer in size if size[answer] == top]
            score += sum(right[answer] for answer in winners) / (top * len(winners))
    return score / blocks


def bootstrap(columns, resamples, rng):
    """Means over resampled problems: (problems, m) -> (resamples, m), in chunks that bound memory.

    All m columns see the same resampled problems, so that their differences are paired.
    """
    problems, means = len(columns), []
    chunk = max(1, 2**20 // problems)
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(problems, size=(rows, problems), dtype=np.int32)
        times_drawn = np.array([np.bincount(row, minlength=problems) for row in drawn])
        means.append(times_drawn @ columns / problems)
    return np.concatenate(means)


def unlike(column, low, high):
    """How far (below, above) its value an interval must reach where all problems have one value.

    There the bootstrap draws nothing else and would claim certainty. But other problems may exist:
    none among P seen means, with 97.5 % confidence, that their share is at most
    1 - 0.025^(1/P) (Clopper-Pearson), and each of them counts between low and high.
    column: (problems, runs) -> two (runs,), zero where problems differ.
    """
    share = (np.ptp(column, axis=0) == 0) * (1 - 0.025 ** (1 / len(column)))
    return share * (column[0] - low), share * (high - column[0])


# ---- From problems to eval.json ------------------------------------------------------------------
CELL = ("value", "low", "high", "diff", "diff_low", "diff_high")


@dataclasses.dataclass
class Part:
    """The figures of all runs on the problems of one source; a dict has an array a figure."""
    problems: int
    curves: list  # Pass@1..n of each run, (n,)
    values: dict  # {figure: (runs,)}
    draws: dict  # {figure: (resamples, runs)}, the bootstrap's
    margins: dict  # {figure: (4, runs)}, `unlike` of the value and of the difference


def measure(problems, n, ks):
    """{figure: (problems,)} of one run: Pass@k and maj@k for each k, then FIGURES.

    NaN stands where a figure does not apply to a problem.
    """
    correct = np.array([problem.correct for problem in problems])
    columns = {("pass_at_k", k): pass_at_k(n, k)[correct] for k in ks}
    for k in ks:
        columns["maj_at_k", k] = [math.nan if problem.votes is None else
                                  majority_at_k(problem.votes, k) for problem in problems]
    found = [math.nan if problem.solutions is None else len(problem.solutions)
             for problem in problems]
    existing = [problem.n_solutions or math.nan for problem in problems]
    columns["distinct"] = found
    columns["solution_coverage"] = np.divide(found, existing)
    columns["truncated_frac"] = [problem.truncated / n for problem in problems]
    columns["completion_len"] = [problem.tokens / n for problem in problems]
    return columns


def pass_curve(problems, n):
    """Pass@1..n, (n,)."""
    correct = np.array([problem.correct for problem in problems])
    share = np.bincount(correct, minlength=n + 1) / len(problems)  # (n + 1,), of the problems
    return np.array([share @ pass_at_k(n, k) for k in range(1, n + 1)])


def compare(runs, keys, ks, resamples, rng):
    """The `Part` of the problems `keys`, which all runs hold."""
    curves, tables = [], []
    for run in runs:
        problems = [run["problems"][key] for key in keys]
        columns = measure(problems, run["n"], ks)
        curves.append(pass_curve(problems, run["n"]))
        tables.append(np.stack(list(columns.values()), axis=1))
    table = np.stack(tables, axis=1)  # (problems, runs, figures)
    draws = bootstrap(table.reshape(len(keys), -1), resamples, rng)
    draws = draws.reshape(resamples, *table.shape[1:])
    values = table.mean(axis=0)
    part = Part(len(keys), curves, {}, {}, {})
    for i, name in enumerate(columns):
        column = table[:, :, i]
        part.values[name] = values[:, i]
        part.draws[name] = draws[:, :, i]
        diff = np.array(unlike(column - column[:, :1], -1, 1))
        diff[:, 0] = 0  # of the reference to itself, which is no estimate
        part.margins[name] = np.array([*unlike(column, 0, 1), *diff])
    return part


def summarise(parts, ks):
    """One object a run, of one source or as the mean over several."""
    def mean(arrays):
        return sum(arrays) / len(parts)

    cells = {}  # {figure: (runs, 6)}
    for name in parts[0].values:
        value = mean([part.values[name] for part in parts])
        draws = mean([part.draws[name] for part in parts])
        low, high = np.quantile(draws, [0.025, 0.975], axis=0)
        diff_low, diff_high = np.quantile(draws - draws[:, :1], [0.025, 0.975], axis=0)
        below, above, diff_below, diff_above = mean([part.margins[name] for part in parts])
        columns = (value, low - below, high + above,
                   value - value[0], diff_low - diff_below, diff_high + diff_above)
        cells[name] = np.stack(columns, axis=-1).tolist()

    curves = [mean(curve) for curve in zip(*(part.curves for part in parts))]
    goal = curves[0][-1] - 1e-12  # the reference's Pass@n
    for index, curve in enumerate(curves):
        entry = {"problems": sum(part.problems for part in parts)}
        for name in ("pass_at_k", "maj_at_k"):
            applies = not math.isnan(cells[name, ks[0]][index][0])
            entry[name] = {str(k): dict(zip(CELL, cells[name, k][index]))
                           for k in ks} if applies else None
        for name in FIGURES:
            value = cells[name][index][0]
            entry[name] = None if math.isnan(value) else value
        reached = np.flatnonzero(curve >= goal)
        entry["samples_to_match"] = int(reached[0]) + 1 if len(reached) else None
        yield entry


def evaluate(runs, ks, seed, resamples):
    """The content of eval.json."""
    reference, parts = runs[0]["problems"], {}
    for source in sorted({problem.source for problem in reference.values()}):
        keys = sorted(key for key in reference if reference[key].source == source)
        # A source's intervals do not depend on its neighbours.
        rng = np.random.default_rng([seed, *source.encode()])
        parts[source] = compare(runs, keys, ks, resamples, rng)
    report = [{**{name: run[name] for name in ("name", "file", "n", "sampling")}, **entry}
              for run, entry in zip(runs, summarise(list(parts.values()), ks))]
    for source in parts if list(parts) != [""] else ():
        for run, entry in zip(report, summarise([parts[source]], ks)):
            run.setdefault("sources", {})[source] = entry
    return {"reference": runs[0]["name"], "k": ks, "seed": seed, "resamples": resamples,
            "runs": report}


def main(args):
    start = time.monotonic()
    if args.training:
        return plot_training(args.training, args.plot)
    meta = describe(args, args.files, seed=args.seed, device="cpu", world_size=1)
    partial = claim(args.out, meta, ignore=("files", "out", "plot")) if args.out else None
    if args.out and not partial:  # complete already
        with open(args.out, encoding="utf-8") as file:
            report = json.load(file)
    else:
        runs = []
        for path, name in zip(args.files, args.names):
            runs.append(read_run(path, name, *runs[:1]))
        n = min(run["n"] for run in runs)
        ks = args.k or [2**power for power in range(n.bit_length())]
        for run in runs:
            if ks[-1] > run["n"]:
                fail(f"{run['file']}: k = {ks[-1]} needs {ks[-1]} samples a problem, "
                     f"but n is {run['n']}")
        report = evaluate(runs, ks, args.seed, args.resamples)
    if partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(report, indent=1) + "\n")
        publish(args.out, {**meta, "wall_s": time.monotonic() - start})
    if args.plot:
        plot_passk(report, args.plot)
    print_table(report)


if __name__ == "__main__":
    run_stage(main, parse_args())
