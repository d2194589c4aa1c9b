"""Stage 4: Pass@k of scored rollouts with intervals, differences between runs, and the figures.

    python evaluate.py base.jsonl grpo.jsonl ds-grpo.jsonl --names base grpo ds-grpo \\
        --out eval.json --plot passk.png
    python evaluate.py --training runs/NAME --plot training.png

Reads scored.jsonl (score.py), one sample a line; `Row` names its fields. All
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
Pictures are drawn anew at each call. Runs sampled with different
settings are compared, with a warning on stderr.
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
from typing import Any, Literal

from data.files import Parser, Sample, claim, describe, fail, publish, read_rows, say
from data.files import run as run_stage  # a run is a scored file here


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


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import msgspec
import numpy as np
from tqdm import tqdm


# ---- Counting rows -------------------------------------------------------------------------------
# The tasks whose verdicts say which solution was found. In the rows of another one `solution` may
# be the data's own, worked out.
WITH_SOLUTIONS = ("countdown",)


class Row(msgspec.Struct):
    """A line of scored.jsonl, as far as evaluate.py reads it."""
    id: str
    sample: Sample
    task: str
    correct: bool
    finish_reason: Literal["stop", "length"]
    completion_ids: list[int]  # their number alone counts
    solution: Any = msgspec.UNSET  # WITH_SOLUTIONS: canonical form of a correct answer
    pred: Any = msgspec.UNSET  # maths: the extracted answer, or null
    # What the problem is
    source: str = ""  # the benchmark
    numbers: Any = None
    target: Any = None
    answer: Any = None
    n_solutions: int | None = None  # existing solutions
    prompt: str | None = None
    messages: Any = None


@dataclasses.dataclass(slots=True)
class Tally:
    """What is kept of a problem's samples."""
    stated: tuple  # the fields that say what the problem is, the prompt's two in front
    source: str
    n_solutions: int | None
    seen: int = 0  # bit s is set once sample s was read
    correct: int = 0  # c of n
    truncated: int = 0
    tokens: int = 0
    solutions: set | None = None  # hashes of the different correct solutions
    # Maths, 8 bytes a sample: the hash of `pred`, its lowest bit `correct`; 0: no answer.
    votes: array.array | None = None


def read_problems(path):
    """({id: Tally}, n) of one scored file."""
    problems = {}
    for where, _, row in tqdm(read_rows(path, Row), desc=path, unit=" rows", disable=None):
        stated = (row.prompt, row.messages, row.source, row.task, row.numbers, row.target,
                  row.answer, row.n_solutions)
        problem = problems.get(row.id)
        if problem is None:
            problem = problems[row.id] = Tally(stated, row.source, row.n_solutions)
        elif problem.stated != stated:
            fail(f"{where}: '{row.id}' is another problem than in the rows above")
        if problem.seen >> row.sample & 1:
            fail(f"{where}: sample {row.sample} of problem '{row.id}' stands twice")
        problem.seen |= 1 << row.sample
        problem.correct += row.correct
        problem.truncated += row.finish_reason == "length"
        problem.tokens += len(row.completion_ids)
        if row.task == "math":
            add_vote(problem, row, where)
        elif row.task in WITH_SOLUTIONS:
            add_solution(problem, row, where)

    first = next(iter(problems))
    n = problems[first].seen.bit_count()
    for key, problem in problems.items():
        if problem.seen.bit_count() != n:
            samples = problem.seen.bit_count()
            fail(f"{path}: problem '{key}' has {samples} samples but '{first}' has {n}")
        found, existing = len(problem.solutions or ()), problem.n_solutions
        if existing is not None and found > existing:
            fail(f"{path}: problem '{key}' has {found} different correct solutions, more than its "
                 f"n_solutions, {existing}; mend or delete that field")
    return problems, n


def add_solution(problem, row, where):
    """Remember a correct answer's canonical form."""
    if problem.solutions is None:
        problem.solutions = set()
    if row.correct:
        if row.solution is msgspec.UNSET:
            fail(f"{where}: missing field 'solution'")
        if not isinstance(row.solution, str):
            fail(f"{where}: field 'solution': Expected str, got {row.solution!r:.40}")
        problem.solutions.add(hash(row.solution))


def add_vote(problem, row, where):
    """Remember an answer for the majority vote."""
    if row.pred is msgspec.UNSET:
        fail(f"{where}: missing field 'pred'")
    if problem.votes is None:
        problem.votes = array.array("q")
    vote = 0 if row.pred is None else hash(repr(row.pred)) >> 1 << 1 | row.correct
    problem.votes.append(vote)


def read_run(path, name, reference=None):
    """One file as {"name", "file", "n", "sampling", "problems"}.

    Ends the stage unless it holds the same problems as the reference, which is another such run.
    """
    problems, n = read_problems(path)
    sampling = None  # rows of other programs have no meta: one that cannot be read is no news
    with contextlib.suppress(OSError, ValueError, AttributeError, RecursionError):
        with open(path + ".meta.json", encoding="utf-8") as file:
            sampling = json.load(file).get("sampling")
    run = {"name": name, "file": path, "n": n, "problems": problems,
           "sampling": sampling if isinstance(sampling, dict) else None}
    for one, other in ((run, reference), (reference, run)) if reference else ():
        for key, problem in one["problems"].items():
            if key not in other["problems"]:
                fail(f"{other['file']}: problem '{key}' is missing, which {one['file']} has")
            # The prompt may be another one: runs may pose a problem in different words.
            if problem.stated[2:] != other["problems"][key].stated[2:]:
                fail(f"{path}: '{key}' is another problem than in {reference['file']}")
    return run


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


# ---- The table -----------------------------------------------------------------------------------
VALUE = ("value", "low", "high")  # of a cell of eval.json
DIFFERENCE = ("diff", "diff_low", "diff_high")
FIGURES = ("distinct", "solution_coverage", "truncated_frac", "completion_len")  # no interval


def cell_text(entry, name, k, diff):
    """A cell of the table: '0.375 [0.210, 0.540]', or a plain number where there is no interval."""
    if k:
        cell = entry[name][k]
        fields, sign = (DIFFERENCE, "+") if diff else (VALUE, "")
        value, low, high = (f"{cell[field]:{sign}.3f}" for field in fields)
        return f"{value} [{low}, {high}]"
    if diff:
        return ""
    value = entry[name]
    if value is None:
        return "-"
    return f"{value:.3f}" if name in FIGURES else str(value)


def print_table(report):
    """A line a figure; a column a run, and beside it its difference to the reference."""
    runs = report["runs"]
    settings = []
    for run in runs:
        items = {"n": run["n"], **(run["sampling"] or {})}.items()
        settings.append(", ".join(f"{name} {value}" for name, value in items))
    if len(set(settings)) > 1:
        told = "; ".join(f"{run['name']}: {one}" for run, one in zip(runs, settings))
        print(f"evaluate.py: warning: the runs were not sampled alike ({told})", file=sys.stderr)

    columns, head = [(runs[0], False)], ["", runs[0]["name"]]
    for run in runs[1:]:
        columns += [(run, False), (run, True)]
        head += [run["name"], f"{run['name']} - {report['reference']}"]
    grid = [head]
    for source in [*runs[0].get("sources", ()), None]:
        if "sources" in runs[0]:
            title = "mean over sources" if source is None else source
            grid += [[], [title] + [""] * len(columns)]
        entries = [(run if source is None else run["sources"][source], diff)
                   for run, diff in columns]
        for name in ("pass_at_k", "maj_at_k", *FIGURES, "samples_to_match"):
            if entries[0][0][name] is None:
                continue
            for k in map(str, report["k"]) if name.endswith("_k") else ("",):
                label = f"{name.removesuffix('_at_k')}@{k}" if k else name
                grid.append([label] + [cell_text(entry, name, k, diff) for entry, diff in entries])
    widths = [max(map(len, column)) for column in zip(*filter(None, grid))]
    every = " | ".join(dict.fromkeys(settings))
    say(f"{runs[0]['problems']} problems, {every}; [95 % interval over problems]\n")
    for line in grid:
        say("   ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


# ---- The figures ---------------------------------------------------------------------------------
COLOURS = ("#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00",
           "#56B4E9")  # Okabe and Ito's, which the colour-blind can tell apart


def new_figure(rows, columns, width, height):
    """(figure, list of axes); matplotlib is loaded only when something is drawn."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
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
    """Left Pass@k of all runs, right each run minus the reference, with their 95 % bands."""
    runs, ks = report["runs"], report["k"]
    panels = min(2, len(runs))
    figure, axes = new_figure(1, panels, 4.7 * panels, 3.6)
    for index, run in enumerate(runs):
        colour = COLOURS[index % len(COLOURS)]
        for axis, names in zip(axes, (VALUE, DIFFERENCE)):
            cells = [run["pass_at_k"][str(k)] for k in ks]
            line, low, high = ([cell[name] for cell in cells] for name in names)
            axis.plot(ks, line, color=colour, label=run["name"], marker="os^vDPX*"[index % 8],
                      markersize=4.5, linestyle="-" if index else "--")
            axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("Pass@k", f"Pass@k minus {report['reference']}, paired")):
        axis.set_title(title)
        axis.set_xscale("log", base=2)
        ticks = ks if len(ks) <= 12 else [k for k in ks if k & (k - 1) == 0]
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
    sizes = ", ".join(str(n) for n in dict.fromkeys(run["n"] for run in runs))
    figure.supxlabel(f"k  ({runs[0]['problems']} problems, n = {sizes}; "
                     "bands: 95 % over problems)", fontsize="medium")
    axes[0].legend()
    save(figure, path)


class Update(msgspec.Struct, rename={"pass_at_1": "pass@1"}):
    """A line of metrics.jsonl, as far as it is drawn; null where an update had no such samples."""
    step: int
    pass_at_1: float | None
    entropy: float | None
    entropy_correct: float | None
    entropy_wrong: float | None
    completion_len: float | None
    grad_norm: float | None


def read_metrics(path):
    """{field of Update: (updates,)}, NaN for null.

    path: a metrics.jsonl, a model folder, or a run's folder, whose newest round counts.
    """
    if os.path.isdir(path):
        rounds = [name for name in os.listdir(path) if re.fullmatch(r"round-\d+", name)]
        rounds.sort(key=lambda name: int(name.removeprefix("round-")))
        files = [os.path.join(path, name, "metrics.jsonl") for name in ["", *rounds]]
        files = [file for file in files if os.path.exists(file)]
        if not files:
            fail(f"{path}: no metrics.jsonl here, nor in a folder round-000, round-001, ... in it")
        path = files[-1]
    updates = [msgspec.structs.astuple(row) for _, _, row in read_rows(path, Update)]
    return dict(zip(Update.__struct_fields__, np.array(updates, dtype=float).T))


def plot_training(run, path):
    """Pass@1, entropies, length and gradient norm of every update (pale) and a running mean.

    run: as read_metrics takes it. path: the picture.
    """
    metrics = read_metrics(run)
    panels = {
        "Pass@1 of the rollouts": {"pass_at_1": ""},
        "Completion length (tokens)": {"completion_len": ""},
        "Token entropy (nats)": {"entropy": "all", "entropy_correct": "correct",
                                 "entropy_wrong": "wrong"},
        "Gradient norm": {"grad_norm": ""},
    }
    figure, axes = new_figure(2, 2, 9.4, 5.4)
    steps = metrics["step"]
    window = np.ones(max(1, len(steps) // 20))
    for axis, (title, curves) in zip(axes, panels.items()):
        for colour, (key, label) in zip(COLOURS, curves.items()):
            known = np.isfinite(metrics[key])
            total = np.convolve(np.where(known, metrics[key], 0), window, "same")
            count = np.convolve(known, window, "same")
            axis.plot(steps, metrics[key], color=colour, alpha=0.25, linewidth=0.8, marker=".",
                      markersize=2)
            running_mean = total / np.where(count > 0.5, count, math.nan)
            axis.plot(steps, running_mean, color=colour, label=label)
        axis.set_title(title)
        if len(curves) > 1:
            axis.legend()
    figure.supxlabel("update", fontsize="medium")
    save(figure, path)


# ---- The stage -------------------------------------------------------------------------------
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
    run_stage(main, ARGS)
