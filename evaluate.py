"""Stage 4: Pass@k of scored rollouts with intervals, differences between runs, and the figures.

    python evaluate.py base.jsonl grpo.jsonl ds-grpo.jsonl --names base grpo ds-grpo --out eval.json --plot passk.png
    python evaluate.py --training runs/NAME --plot training.png

Reads scored.jsonl (score.py), one sample a line: `id`, `sample`, `task`, `correct`, `finish_reason`, `completion_ids`,
for Countdown `solution` and `n_solutions`, for maths `pred`; an optional `source` names the benchmark. All problems of
a file have equally many samples (n), all files hold the same problems, the first file is the reference.

Writes eval.json: {"reference", "k", "seed", "resamples", "runs": [one object a file]}. A run has `name`, `file`, `n`,
`problems`, `sampling` (from the file's meta, or null) and, not rounded, null where it does not apply:
  pass_at_k          {"1": {"value", "low", "high", "diff", "diff_low", "diff_high"}, ...}: the unbiased estimate from
                     `correct` (never from rewards) with its 95 % interval, a percentile bootstrap over problems;
                     diff is this run minus the reference, on the same resampled problems
  maj_at_k           the same for the majority vote over `pred`: the samples, in file order, form floor(n / k) blocks
                     of k, each block votes once, the mean over blocks counts; two answers are one if their text is
                     equal, null does not vote, answers with equally many votes share
  distinct           different correct solutions among the n samples of a problem (mean over problems)
  solution_coverage  found / existing solutions of a problem (mean over problems)
  truncated_frac     share of samples cut at the length limit
  completion_len     tokens a sample
  samples_to_match   smallest k at which this run's Pass@k reaches the reference's Pass@n; null: at no k up to n
  sources            the same for each `source`; the run's own figures are then means over sources, each counting
                     equally, with the problems resampled inside each
A figure is a view of other files and is drawn anew at each call. Runs sampled with different settings are compared,
with a warning on stderr.
"""
import argparse
import array
import collections
import contextlib
import dataclasses
import json
import math
import os
import re
import sys
import time

import numpy as np
from tqdm import tqdm


from data.files import Parser, claim, describe, fail, publish, read_rows, run


def parse_args(argv=None):
    def positive(text):
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} is below 1")
        return int(text)

    parser = Parser(__file__, description=__doc__.split("\n")[0])
    # What to compare
    parser.add_argument("files", nargs="*", metavar="SCORED.jsonl", help="scored rollouts; the first is the reference")
    parser.add_argument("--names", nargs="+", help="one name a file (default: the file names)")
    parser.add_argument("--k", nargs="+", type=positive, help="samples, at most n (default: powers of two up to n)")
    # The intervals
    parser.add_argument("--resamples", type=positive, default=10_000, help="bootstrap resamples (default: 10000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resamples (default: 0)")
    # What to write, besides the table on the terminal
    parser.add_argument("--out", metavar="EVAL.json", help="all figures (default: none)")
    parser.add_argument("--plot", metavar="FILE.png", help="the curves, as .png, .svg or .pdf (default: none)")
    parser.add_argument("--training", metavar="RUN", help="plot a run's training curves instead: RUN is its folder, "
                        "a model folder or a metrics.jsonl (default: none)")
    args = parser.parse_args(argv)

    if bool(args.training) == bool(args.files) or args.training and (args.out or not args.plot):
        parser.error("give one or more SCORED.jsonl, or --training RUN --plot FILE.png")
    if args.plot and not args.plot.endswith((".png", ".svg", ".pdf")):
        parser.error(f"--plot {args.plot}: the name must end in .png, .svg or .pdf")
    if args.seed < 0:
        parser.error(f"--seed {args.seed} is below 0")
    args.names = args.names or [os.path.basename(file).removesuffix(".jsonl") for file in args.files]
    if len(args.names) != len(args.files) or len(set(args.names)) < len(args.names):
        parser.error(f"--names must give {len(args.files)} different names, not {' '.join(args.names)}")
    args.k = sorted(set(args.k)) if args.k else None
    return parser.checked(args)


# ---- Reading: only counts are kept, so memory grows with the problems and not with the rows --------------------------
@dataclasses.dataclass(slots=True)
class Problem:
    source: str
    identity: int               # hash of the fields that state the problem
    n_solutions: int | None     # existing solutions (Countdown)
    seen: int = 0               # bit s is set once sample s was read
    correct: int = 0            # c of n
    truncated: int = 0
    tokens: int = 0
    solutions: set | None = None        # hashes of the different correct solutions
    votes: array.array | None = None    # maths, 8 bytes a sample: hash of `pred`, lowest bit `correct`; 0: no answer


def field(where, row, name, *kinds):
    """row[name], an error if it is missing or of another type (True is no int)."""
    if name not in row:
        fail(f"{where}: missing field '{name}'")
    if type(row[name]) not in kinds:
        fail(f"{where}: field '{name}' must be {' or '.join(kind.__name__ for kind in kinds)}, not {row[name]!r:.40}")
    return row[name]


def read_problems(path):
    """({id: Problem}, n) of one scored file."""
    problems = {}
    for where, _, row in tqdm(read_rows(path), desc=path, unit=" rows", disable=None):
        key, sample = field(where, row, "id", str), field(where, row, "sample", int)
        task, correct = field(where, row, "task", str), field(where, row, "correct", bool)
        if (problem := problems.get(key)) is None:
            stated = [row.get(name) for name in ("source", "task", "numbers", "target", "answer", "n_solutions")]
            problem = problems[key] = Problem(
                field(where, row, "source", str) if "source" in row else "", hash(json.dumps(stated)),
                field(where, row, "n_solutions", int, type(None)) if "n_solutions" in row else None)
        if not 0 <= sample < 2**16:
            fail(f"{where}: sample {sample} is not in 0..65535")
        if problem.seen >> sample & 1:
            fail(f"{where}: sample {sample} of problem '{key}' stands twice")
        problem.seen |= 1 << sample
        problem.correct += correct
        problem.truncated += field(where, row, "finish_reason", str) == "length"
        problem.tokens += len(field(where, row, "completion_ids", list))
        if task == "countdown" or task != "math" and "solution" in row:  # maths data may carry a worked-out `solution`
            problem.solutions = problem.solutions or set()
            if correct:
                problem.solutions.add(hash(field(where, row, "solution", str)))
        if task == "math":
            problem.votes = problem.votes or array.array("q")
            pred = field(where, row, "pred", str, list, type(None))
            problem.votes.append(0 if pred is None else hash(repr(pred)) >> 1 << 1 | correct)

    first = next(iter(problems))
    n = problems[first].seen.bit_count()
    for key, problem in problems.items():
        if problem.seen.bit_count() != n:
            fail(f"{path}: problem '{key}' has {problem.seen.bit_count()} samples but '{first}' has {n}")
    return problems, n


def read_run(path, name, reference=None):
    """One file as {"name", "file", "n", "sampling", "problems"}; an error unless it holds the reference's problems."""
    problems, n = read_problems(path)
    sampling = None
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError), open(path + ".meta.json", encoding="utf-8") as file:
        sampling = json.load(file).get("sampling")
    if not isinstance(sampling, dict):
        sampling = None
    run = {"name": name, "file": path, "n": n, "sampling": sampling, "problems": problems}
    for one, other in ((run, reference), (reference, run)) if reference else ():
        for key, problem in one["problems"].items():
            if key not in other["problems"]:
                fail(f"{other['file']}: problem '{key}' is missing, which {one['file']} has")
            if problem.identity != other["problems"][key].identity:
                fail(f"{path}: '{key}' is another problem than in {reference['file']}")
    return run


# ---- Estimators ------------------------------------------------------------------------------------------------------
def pass_at_k(n, k):
    """Pass@k of a problem with c of n samples correct, for every c: array (n + 1,), indexed by c.

    The unbiased 1 - C(n-c, k) / C(n, k) of Chen et al. 2021 (arXiv 2107.03374), as 1 - prod_{i=n-c+1..n} (1 - k / i).
    """
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} is not in 1..{n}")
    return 1 - np.concatenate([[1.0], np.cumprod(1 - k / np.arange(n, 0, -1))])


def majority_at_k(votes, k):
    """Share of the floor(n / k) blocks of k samples whose most frequent answer is correct; equal votes share."""
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
    """Means over resampled problems: (problems, m) -> (resamples, m), in chunks that bound the memory."""
    problems, means = len(columns), []
    chunk = max(1, 2**20 // problems)
    for first in range(0, resamples, chunk):
        rows = min(chunk, resamples - first)
        drawn = rng.integers(problems, size=(rows, problems)) + problems * np.arange(rows)[:, None]
        weight = np.bincount(drawn.ravel(), minlength=rows * problems).reshape(rows, problems)  # times each was drawn
        means.append(weight @ columns / problems)
    return np.concatenate(means)


# ---- From problems to eval.json --------------------------------------------------------------------------------------
CELL = ("value", "low", "high", "diff", "diff_low", "diff_high")
FIGURES = ("distinct", "solution_coverage", "truncated_frac", "completion_len")


def measure(problems, n, ks):
    """One run, one source: Pass@1..n (n,), and Pass@k, maj@k and FIGURES of each problem (problems, 2 len(ks) + 4)."""
    c = np.array([problem.correct for problem in problems])
    share = np.bincount(c, minlength=n + 1) / len(problems)     # (n + 1,), share of the problems with c correct samples
    curve = np.array([share @ pass_at_k(n, k) for k in range(1, n + 1)])
    rest = [[math.nan if problem.votes is None else majority_at_k(problem.votes, k) for k in ks] +
            [math.nan if problem.solutions is None else len(problem.solutions),
             len(problem.solutions or ()) / problem.n_solutions if problem.n_solutions else math.nan,
             problem.truncated / n, problem.tokens / n] for problem in problems]
    return curve, np.hstack([np.stack([pass_at_k(n, k)[c] for k in ks], axis=1), rest])


def summarise(parts, ks):
    """One object per run, from one or more sources (problems, curves, values (runs, m), draws (resamples, runs, m))."""
    count, curves, values, draws = zip(*parts)
    curves = [np.mean(curve, axis=0) for curve in zip(*curves)]
    values, draws = np.mean(values, axis=0), np.mean(draws, axis=0)
    diff = draws - draws[:, :1]     # the same problems were drawn for every run (pitfall 29)
    cells = np.stack([values, *np.quantile(draws, [0.025, 0.975], axis=0),
                      values - values[:1], *np.quantile(diff, [0.025, 0.975], axis=0)], axis=-1).tolist()
    for curve, row in zip(curves, cells):   # (n,), (m, 6)
        cell = [None if math.isnan(value) else dict(zip(CELL, (value, *more))) for value, *more in row]
        reached = np.flatnonzero(curve >= curves[0][-1] - 1e-12)
        yield {"problems": sum(count),
               "pass_at_k": dict(zip(map(str, ks), cell)),
               "maj_at_k": dict(zip(map(str, ks), cell[len(ks):])) if cell[len(ks)] else None,
               **{name: one and one["value"] for name, one in zip(FIGURES, cell[2 * len(ks):])},
               "samples_to_match": int(reached[0]) + 1 if len(reached) else None}


def evaluate(runs, ks, seed, resamples):
    """The content of eval.json."""
    reference, parts = runs[0]["problems"], {}
    for source in sorted({problem.source for problem in reference.values()}):
        keys = sorted(key for key in reference if reference[key].source == source)
        curves, columns = zip(*(measure([run["problems"][key] for key in keys], run["n"], ks) for run in runs))
        columns = np.stack(columns, axis=1)     # (problems, runs, m)
        rng = np.random.default_rng([seed, *source.encode()])   # a source's intervals do not depend on its neighbours
        draws = bootstrap(columns.reshape(len(keys), -1), resamples, rng).reshape(resamples, *columns.shape[1:])
        parts[source] = (len(keys), curves, columns.mean(axis=0), draws)
    report = [{**{name: run[name] for name in ("name", "file", "n", "sampling")}, **entry}
              for run, entry in zip(runs, summarise(parts.values(), ks))]
    for source in parts if list(parts) != [""] else ():
        for run, entry in zip(report, summarise([parts[source]], ks)):
            run.setdefault("sources", {})[source] = entry
    return {"reference": runs[0]["name"], "k": ks, "seed": seed, "resamples": resamples, "runs": report}


# ---- For people: table and figures -----------------------------------------------------------------------------------
def print_table(report):
    """A line a figure; a column a run and its difference to the reference."""
    runs = report["runs"]
    settings = [", ".join(f"{name} {value}" for name, value in {"n": run["n"], **(run["sampling"] or {})}.items())
                for run in runs]
    if len(set(settings)) > 1:  # pitfall 30
        told = "; ".join(f"{run['name']}: {setting}" for run, setting in zip(runs, settings))
        print(f"evaluate.py: warning: the runs were not sampled alike ({told})", file=sys.stderr)

    def text(entry, diff, name, k):
        if k:
            value, low, high = (f"{entry[name][k][key]:{'+' * diff}.3f}" for key in CELL[3 * diff:3 * diff + 3])
            return f"{value} [{low}, {high}]"
        value = entry[name]
        return "" if diff else "-" if value is None else f"{value:.3f}" if name in FIGURES else str(value)

    columns = [(run, diff) for run in runs for diff in (False, True) if not diff or run is not runs[0]]
    grid = [[""] + [run["name"] + f" - {report['reference']}" * diff for run, diff in columns]]
    for scope in [*runs[0].get("sources", ()), None]:
        entries = [(run if scope is None else run["sources"][scope], diff) for run, diff in columns]
        if "sources" in runs[0]:
            grid += [[], ["mean over sources" if scope is None else scope] + [""] * len(columns)]
        for name in ("pass_at_k", "maj_at_k", *FIGURES, "samples_to_match"):
            for k in () if entries[0][0][name] is None else map(str, report["k"]) if name.endswith("_k") else ("",):
                label = name.removesuffix("_at_k") + f"@{k}" if k else name
                grid.append([label] + [text(entry, diff, name, k) for entry, diff in entries])
    widths = [max(map(len, column)) for column in zip(*filter(None, grid))]
    print(f"{runs[0]['problems']} problems, {settings[0]}; [95 % interval over problems]\n")
    for line in grid:
        print("   ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe-Ito, colour-blind safe


def new_figure(rows, columns, width, height):
    """(figure, list of axes); matplotlib is loaded only when something is drawn."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({"axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
                                "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6",
                                "legend.frameon": False})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save(figure, path):
    """Under its name stands the old figure or the new one, never half of it."""
    with open(path + ".partial", "wb") as file:
        figure.savefig(file, format=path[-3:], dpi=200)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def plot_passk(report, path):
    """Left Pass@k of all runs on the same axes, right each run minus the reference, with their 95 % bands."""
    runs, ks = report["runs"], report["k"]
    figure, axes = new_figure(1, min(2, len(runs)), 4.7 * min(2, len(runs)), 3.6)
    for index, run in enumerate(runs):
        for axis, names in zip(axes, (CELL[:3], CELL[3:])):
            line, low, high = ([run["pass_at_k"][str(k)][name] for k in ks] for name in names)
            colour = COLOURS[index % len(COLOURS)]
            axis.plot(ks, line, color=colour, label=run["name"], marker="os^vDPX*"[index % 8], markersize=4.5,
                      linestyle="-" if index else "--")
            axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("Pass@k", f"Pass@k minus {report['reference']}, paired")):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        ticks = ks if len(ks) <= 12 else [k for k in ks if k & (k - 1) == 0]
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    figure.supxlabel(f"k  ({runs[0]['problems']} problems, n = {runs[0]['n']}; bands: 95 % bootstrap over problems)",
                     fontsize="medium")
    axes[0].legend()
    save(figure, path)


def read_metrics(path):
    """{key: array (updates,)} of a metrics.jsonl, of the one in a model folder, or of a run folder's newest round."""
    if os.path.isdir(path):
        rounds = sorted((int(name[6:]), name) for name in os.listdir(path) if re.fullmatch(r"round-\d+", name))
        files = [os.path.join(path, name, "metrics.jsonl") for name in ["", *(name for _, name in rounds)]]
        if not any(map(os.path.exists, files)):
            fail(f"{path}: no metrics.jsonl here, nor in a folder round-000, round-001, ... in it")
        path = [file for file in files if os.path.exists(file)][-1]
    keys = ("step", "pass@1", "entropy", "entropy_correct", "entropy_wrong", "completion_len", "grad_norm")
    rows = [[field(where, row, key, int, float, type(None)) for key in keys] for where, _, row in read_rows(path)]
    return dict(zip(keys, np.array(rows, dtype=float).T))   # null (an update without such samples) becomes NaN


def plot_training(metrics, path):
    """Pass@1, entropies, length and gradient norm of every update (pale) and their running mean."""
    panels = {"Pass@1 of the rollouts": {"pass@1": ""}, "Completion length (tokens)": {"completion_len": ""},
              "Token entropy (nats)": {"entropy": "all", "entropy_correct": "correct", "entropy_wrong": "wrong"},
              "Gradient norm": {"grad_norm": ""}}
    figure, axes = new_figure(2, 2, 9.4, 5.4)
    steps, window = metrics["step"], np.ones(max(1, len(metrics["step"]) // 20))
    for axis, (title, curves) in zip(axes, panels.items()):
        for colour, (key, label) in zip(COLOURS, curves.items()):
            known = np.isfinite(metrics[key])
            total, count = (np.convolve(one, window, "same") for one in (np.where(known, metrics[key], 0), known))
            axis.plot(steps, metrics[key], color=colour, alpha=0.25, linewidth=0.8, marker=".", markersize=2)
            axis.plot(steps, total / np.where(count > 0.5, count, math.nan), color=colour, label=label)
        axis.set_title(title)
        if len(curves) > 1:
            axis.legend()
    figure.supxlabel("update", fontsize="medium")
    save(figure, path)


def main(args):
    start = time.monotonic()
    if args.training:
        return plot_training(read_metrics(args.training), args.plot)
    meta = describe(args, args.files, seed=args.seed, device="cpu", world_size=1)
    partial = claim(args.out, meta, ignore=("files", "out", "plot")) if args.out else None
    if args.out and not partial:    # complete already
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
                fail(f"{run['file']}: k = {ks[-1]} needs {ks[-1]} samples a problem, but n is {run['n']}")
        report = evaluate(runs, ks, args.seed, args.resamples)
    if partial:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(json.dumps(report, indent=1) + "\n")
        publish(args.out, {**meta, "wall_s": time.monotonic() - start})
    if args.plot:
        plot_passk(report, args.plot)
    print_table(report)


if __name__ == "__main__":
    run(main, parse_args())
