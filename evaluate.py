r"""Stage 4: Pass@k of scored rollouts with intervals, differences between runs, two figures.

    python evaluate.py base.jsonl grpo.jsonl ds-grpo.jsonl --names base grpo ds-grpo \
        --out eval.json --plot passk.png
    python evaluate.py --training runs/NAME --plot training.png

Reads scored.jsonl (score.py), one sample a line; `ScoredSample` names the fields. All problems of
a file have equally many samples (n), all files hold the same problems, the first file is the
reference. Only counts are kept: memory grows with the problems, not with the rows.

Writes eval.json: {"reference", "k", "seed", "resamples", "runs": [one object a file]}. A run has
`name`, `file`, `n`, `problems`, `sampling` (from the file's meta, or null) and, not rounded, null
where it does not apply:
- pass_at_k: {"1": {"value", "low", "high", "diff", "diff_low", "diff_high"}, ...}: the mean over
  problems of 1 - C(n - c, k) / C(n, k), c of n samples `correct`, with its 95 % interval
  (`interval`); diff is this run minus the reference, paired: on the same resampled problems;
- maj_at_k: the same for the majority vote over `pred`. The samples, in file order, form
  floor(n / k) blocks of k, each block votes once, the mean over blocks counts. Two answers are one
  if their text is equal, null does not vote, answers with equally many votes share;
- distinct: different correct solutions among the n samples of a problem; solution_coverage: their
  share of the existing ones (means over problems);
- truncated_frac: share of samples cut at the length limit; completion_len: tokens a sample;
- samples_to_match: smallest k at which Pass@k reaches the reference's Pass@n, or null;
- sources: the same for each `source`. The run's own figures are then means over sources, each
  counting equally, with the problems resampled inside each.
Prints a table; its last line is Pass@k at the smallest and the largest k. Warns if the runs were
not sampled alike.
"""
import array
import collections
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import sys
import time
from typing import Any, Literal

from data.files import (Parser, Sample, claim, describe, echo, fail, publish, read_rows,
                        write_synced)
from data.files import run as run_stage  # a run is a scored file here


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add = parser.add_argument_group("what to compare").add_argument
    add("files", nargs="*", metavar="SCORED.jsonl",
        help="scored rollouts; the first is the reference")
    add("--names", nargs="+", action="extend",
        help="one name a file, or the rounds' numbers (default: the file names)")
    add("--k", nargs="+", action="extend", type=int,
        help="samples, at most n (default: powers of two up to n)")
    add = parser.add_argument_group("intervals").add_argument
    add("--resamples", type=int, help="bootstrap resamples (default: 10000)")
    add("--seed", type=int, help="seed of the resamples (default: 0)")
    add = parser.add_argument_group("outputs, besides the table").add_argument
    add("--out", metavar="EVAL.json", help="all figures (default: none)")
    add("--plot", metavar="FILE.png", help="the curves, as .png, .svg or .pdf (default: none)")
    add("--training", metavar="RUN", help="plot a run's training curves instead: RUN is its "
        "folder, a model folder or a metrics.jsonl (default: none)")
    args = parser.parse_args(argv)

    parser.at_least(args, resamples=1, seed=0)
    of_files = args.out, args.k, args.names, args.resamples, args.seed
    if not args.training and not args.files:
        parser.error("give one or more SCORED.jsonl, or --training RUN --plot FILE.png")
    if args.training and (args.files or not args.plot or any(one is not None for one in of_files)):
        parser.error("--training RUN goes with --plot FILE.png and nothing else")
    args.resamples, args.seed = args.resamples or 10_000, args.seed or 0
    if args.plot and not args.plot.endswith((".png", ".svg", ".pdf")):
        parser.error(f"--plot {args.plot}: the name must end in .png, .svg or .pdf")
    args.k = sorted(set(args.k)) if args.k else None
    if args.k and args.k[0] < 1:
        parser.error("--k must be at least 1")
    args.names = args.names or [
        os.path.basename(file).removesuffix(".jsonl").removesuffix(".scored")
        for file in args.files]
    if len(args.names) != len(args.files) or len(set(args.names)) < len(args.names):
        parser.error(f"--names must give {len(args.files)} different names, not "
                     + " ".join(args.names))
    return parser.checked(args)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import msgspec
import numpy as np
from tqdm import tqdm


# ---- Counting rows -------------------------------------------------------------------------------
# Tasks whose `solution` is the one that the model found; in others it may be the data's own.
WITH_SOLUTIONS = ("countdown",)


class ScoredSample(msgspec.Struct):
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
class ProblemCounts:
    """What is kept of a problem's samples."""
    fields: tuple  # those that define the problem, prompt and messages first
    source: str
    n_solutions: int | None
    samples: int = 0  # bit s is set once sample s was read
    correct: int = 0  # c of n
    truncated: int = 0
    tokens: int = 0
    solutions: set | None = None  # hashes of the different correct solutions
    # Maths, 8 bytes a sample: the hash of `pred`, its lowest bit `correct`; 0: no answer.
    votes: array.array | None = None


def read_problems(path):
    """({id: ProblemCounts}, n) of one scored file."""
    problems = {}
    for where, _, row in tqdm(read_rows(path, ScoredSample), desc=path, unit=" rows", disable=None):
        fields = (row.prompt, row.messages, row.source, row.task, row.numbers, row.target,
                  row.answer, row.n_solutions)
        problem = problems.get(row.id)
        if problem is None:
            problem = problems[row.id] = ProblemCounts(
                fields, row.source, row.n_solutions,
                solutions=set() if row.task in WITH_SOLUTIONS else None,
                votes=array.array("q") if row.task == "math" else None)
        elif problem.fields != fields:
            fail(f"{where}: '{row.id}' is another problem than in the rows above")
        if problem.samples >> row.sample & 1:
            fail(f"{where}: sample {row.sample} of problem '{row.id}' occurs twice")
        problem.samples |= 1 << row.sample
        problem.correct += row.correct
        problem.truncated += row.finish_reason == "length"
        problem.tokens += len(row.completion_ids)
        if row.task == "math":  # for the majority vote
            if row.pred is msgspec.UNSET:
                fail(f"{where}: missing field 'pred'")
            vote = 0 if row.pred is None else hash(repr(row.pred)) >> 1 << 1 | row.correct
            problem.votes.append(vote)
        elif row.task in WITH_SOLUTIONS and row.correct:
            if row.solution is msgspec.UNSET:
                fail(f"{where}: missing field 'solution'")
            if not isinstance(row.solution, str):
                fail(f"{where}: field 'solution': Expected str, got {row.solution!r:.40}")
            problem.solutions.add(hash(row.solution))

    first = next(iter(problems))
    n = problems[first].samples.bit_count()
    for key, problem in problems.items():
        if problem.samples.bit_count() != n:
            fail(f"{path}: problem '{key}' has {problem.samples.bit_count()} samples "
                 f"but '{first}' has {n}")
        solutions, existing = len(problem.solutions or ()), problem.n_solutions
        if existing is not None and solutions > existing:
            fail(f"{path}: problem '{key}' has {solutions} different correct solutions, more than "
                 f"its n_solutions, {existing}; mend or delete that field")
    return problems, n


def read_run(path, name, reference=None):
    """One file; it must hold the problems of the reference, which is another such run."""
    problems, n = read_problems(path)
    run = {"name": name, "file": path, "n": n, "problems": problems, "sampling": None}
    # Rows of other programs have no meta: one that cannot be read counts as none.
    with contextlib.suppress(Exception), open(path + ".meta.json", encoding="utf-8") as file:
        run["sampling"] = dict(json.load(file)["sampling"].items())
    for one, other in ((run, reference), (reference, run)) if reference else ():
        for key, problem in one["problems"].items():
            if key not in other["problems"]:
                fail(f"{other['file']}: problem '{key}' is missing, which {one['file']} has")
            # The prompt may be another one: runs may pose a problem in different words.
            if problem.fields[2:] != other["problems"][key].fields[2:]:
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
    """Share of the floor(n / k) blocks of k samples whose most frequent answer is correct; equally
    frequent ones share a block. votes: (n,), as in `ProblemCounts`."""
    score, blocks = 0.0, len(votes) // k
    for block in range(blocks):
        valid = [vote for vote in votes[block * k:(block + 1) * k] if vote]
        size = collections.Counter(vote >> 1 for vote in valid)
        winners = [answer for answer in size if size[answer] == max(size.values())]
        if winners:
            right = sum(vote & 1 for vote in valid if vote >> 1 in winners)
            score += right / (size[winners[0]] * len(winners))
    return score / blocks


# ---- Intervals -----------------------------------------------------------------------------------
def bootstrap(columns, resamples, rng):
    """Means over reweighted problems, (problems, m) -> draws (resamples, m), unseen (resamples,).

    Rubin's Bayesian bootstrap (1981) with one problem more: problems + 1 weights, uniform on the
    simplex, `unseen` the last one. The columns share them, so that differences are paired.
    """
    draws, unseen = [], []
    chunk = max(1, 2**20 // (len(columns) + 1))  # bounds memory
    for first in range(0, resamples, chunk):
        weights = rng.standard_exponential((min(chunk, resamples - first), len(columns) + 1))
        weights /= weights.sum(axis=1, keepdims=True)
        draws.append(weights[:, :-1] @ columns)
        unseen.append(weights[:, -1])
    return np.concatenate(draws), np.concatenate(unseen)


def interval(draws, unseen, lowest, highest):
    """95 % interval (low, high) of means of values that lie between `lowest` and `highest`.

    Gaffke's bounds (2005; Learned-Miller and Thomas, arXiv 1905.06208): for `low` the unseen
    problem has the lowest value, for `high` the highest. For values 0 and 1 this is Clopper and
    Pearson's interval, which covers at least 95 %; others: tests/interval_coverage.py. (The
    percentile bootstrap claims certainty where all values are equal.)
    draws (resamples, ...), unseen (resamples,): as from `bootstrap`, or means of several.
    """
    unseen = unseen.reshape(-1, *[1] * (draws.ndim - 1))
    return (np.quantile(draws + lowest * unseen, 0.025, axis=0).clip(lowest, highest),
            np.quantile(draws + highest * unseen, 0.975, axis=0).clip(lowest, highest))


# ---- From problems to eval.json ------------------------------------------------------------------
CELL = ("value", "low", "high", "diff", "diff_low", "diff_high")
FIGURES = ("distinct", "solution_coverage", "truncated_frac", "completion_len")  # no interval


def measure(problems, n, ks):
    """Of one run: Pass@k of each k, maj@k of each k, FIGURES: (problems, 2 len(ks) + 4), NaN where
    one does not apply; and Pass@1..n, (n,)."""
    correct = np.array([problem.correct for problem in problems])
    columns = [pass_at_k(n, k)[correct] for k in ks]
    columns += [[math.nan if problem.votes is None else majority_at_k(problem.votes, k)
                 for problem in problems] for k in ks]
    solutions = [math.nan if problem.solutions is None else len(problem.solutions)
                 for problem in problems]
    columns += [solutions,
                np.divide(solutions, [problem.n_solutions or math.nan for problem in problems]),
                [problem.truncated / n for problem in problems],
                [problem.tokens / n for problem in problems]]
    share = np.bincount(correct, minlength=n + 1) / len(problems)  # (n + 1,), of the problems
    return np.stack(columns, axis=1), np.array([share @ pass_at_k(n, k) for k in range(1, n + 1)])


def summarise(parts, ks):
    """One object a run, of one source (see `evaluate`) or as the mean over several."""
    sizes, curves, means, draws, unseen = zip(*parts)
    value, draws, unseen = (sum(arrays) / len(parts) for arrays in (means, draws, unseen))
    difference = interval(draws - draws[:, :1], unseen, -1, 1)
    for bound in difference:
        bound[0] = 0  # of the reference to itself, which is no estimate
    cells = np.stack([value, *interval(draws, unseen, 0, 1), value - value[0], *difference],
                     axis=-1).tolist()  # runs x figures x CELL
    curves = [sum(each) / len(parts) for each in zip(*curves)]
    for row, curve in zip(cells, curves):
        entry = {"problems": sum(sizes), "pass_at_k": row, "maj_at_k": row[len(ks):]}
        for name in ("pass_at_k", "maj_at_k"):
            by_k = {str(k): dict(zip(CELL, cell)) for k, cell in zip(ks, entry[name])}
            entry[name] = None if math.isnan(entry[name][0][0]) else by_k
        for name, (figure, *_) in zip(FIGURES, row[2 * len(ks):]):
            entry[name] = None if math.isnan(figure) else figure
        reached = np.flatnonzero(curve >= curves[0][-1] - 1e-12)  # the reference's Pass@n
        entry["samples_to_match"] = int(reached[0]) + 1 if len(reached) else None
        yield entry


def evaluate(runs, ks, seed, resamples):
    """The content of eval.json."""
    reference, parts = runs[0]["problems"], {}
    for source in sorted({problem.source for problem in reference.values()}):
        keys = sorted(key for key in reference if reference[key].source == source)
        # A source's intervals do not depend on its neighbours.
        rng = np.random.default_rng([seed, *source.encode()])
        tables, curves = zip(*(measure([run["problems"][key] for key in keys], run["n"], ks)
                               for run in runs))
        table = np.stack(tables, axis=1)  # (problems, runs, figures)
        draws, unseen = bootstrap(table.reshape(len(keys), -1), resamples, rng)
        parts[source] = (len(keys), curves, table.mean(axis=0),
                         draws.reshape(-1, *table.shape[1:]), unseen)
    report = [{**{name: run[name] for name in ("name", "file", "n", "sampling")}, **entry}
              for run, entry in zip(runs, summarise(list(parts.values()), ks))]
    for source in parts if list(parts) != [""] else ():
        for run, entry in zip(report, summarise([parts[source]], ks)):
            run.setdefault("sources", {})[source] = entry
    return {"reference": runs[0]["name"], "k": ks, "seed": seed, "resamples": resamples,
            "runs": report}


# ---- The table -----------------------------------------------------------------------------------
def cell_text(value, diff):
    """A cell of the table: '0.375 [0.210, 0.540]', or a plain number where there is no interval."""
    if isinstance(value, dict):
        sign, fields = ("+", CELL[3:]) if diff else ("", CELL[:3])
        return "{} [{}, {}]".format(*(f"{value[field]:{sign}.3f}" for field in fields))
    if diff or value is None:
        return "" if diff else "-"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def print_table(report):
    """A line a figure, a column a run, one a difference; last the smallest and the largest k."""
    runs, ks = report["runs"], [str(k) for k in report["k"]]
    settings = [", ".join(f"{name} {value}" for name, value in
                          {"n": run["n"], **(run["sampling"] or {})}.items()) for run in runs]
    if len(set(settings)) > 1:
        each = "; ".join(f"{run['name']}: {one}" for run, one in zip(runs, settings))
        print(f"evaluate.py: warning: the runs were not sampled alike ({each})", file=sys.stderr)

    columns = [(runs[0], False)] + [(run, diff) for run in runs[1:] for diff in (False, True)]
    grid = [["", *(run["name"] + f" - {report['reference']}" * diff for run, diff in columns)]]
    for source in [*runs[0].get("sources", ()), None]:
        if "sources" in runs[0]:
            title = "mean over sources" if source is None else source
            grid += [[], [title] + [""] * len(columns)]
        entries = [(run if source is None else run["sources"][source], diff)
                   for run, diff in columns]
        for name in ("pass_at_k", "maj_at_k", *FIGURES, "samples_to_match"):
            if entries[0][0][name] is None:
                continue
            for k in ks if name.endswith("_at_k") else [None]:
                label = f"{name.removesuffix('_at_k')}@{k}" if k else name
                grid.append([label, *(cell_text(entry[name][k] if k else entry[name], diff)
                                      for entry, diff in entries)])
    widths = [max(map(len, column)) for column in zip(*filter(None, grid))]
    every = " | ".join(dict.fromkeys(settings))
    echo(f"{runs[0]['problems']} problems, {every}; [95 % interval over problems]\n")
    for line in grid:
        echo("   ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())

    ends = list(dict.fromkeys([ks[0], ks[-1]]))
    values = [f"{run['name']} " + " and ".join(f"{run['pass_at_k'][k]['value']:.3f}" for k in ends)
              for run in runs]
    echo("\n" + " and ".join(f"Pass@{k}" for k in ends) + ": " + "; ".join(values))


# ---- The figures ---------------------------------------------------------------------------------
# Okabe and Ito's colours, which the colour-blind can tell apart
COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
LITERAL = {"parse_math": False, "usetex": False}  # of texts with a name: `$` and `\` are letters


def new_figure(rows, columns, width, height):
    """(figure, list of axes); matplotlib is loaded only when something is drawn."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update({
        "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
        "axes.grid": True, "axes.axisbelow": True, "grid.color": "#e6e6e6"})
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel()


def save(figure, path):
    image = io.BytesIO()
    figure.savefig(image, format=path[-3:], dpi=200)
    write_synced(path, image.getvalue())


def shorten(name, longest=24):
    """A run's name as a figure shows it: printable, at most `longest` characters."""
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= longest else f"{name[:longest // 2 - 1]}…{name[-longest // 2:]}"


def label_ends(axis, labels):
    """Write [(y, name, colour)] beside the right ends of lines, moved apart if they overlap."""
    low, high = axis.get_ylim()
    labels = sorted(labels, key=lambda label: label[0])
    ends = [(y - low) / (high - low) for y, *_ in labels]  # in units of the axis
    line = min(13 / (axis.bbox.height * 72 / axis.figure.dpi), 1 / max(1, len(labels)))
    up = list(itertools.accumulate(ends, lambda last, y: max(y, last + line)))
    down = list(itertools.accumulate(ends[::-1], lambda last, y: min(y, last - line)))[::-1]
    for one, other, (_, name, colour) in zip(up, down, labels):
        axis.text(1.02, (one + other) / 2, name, color=colour, fontsize=9,
                  verticalalignment="center", transform=axis.transAxes, **LITERAL)


def plot_passk(report, path):
    """Pass@k of all runs; each minus the reference; of three or more, largest k against smallest.

    Runs named by numbers are rounds: they are joined, from early to late, without differences.
    """
    runs, ks = report["runs"], report["k"]
    names = [shorten(run["name"]) for run in runs]
    rounds = len(runs) > 2 and all(name.isdecimal() for name in names[1:])
    panels = {"Pass@k": CELL[:3]}
    colours = [COLOURS[index % len(COLOURS)] for index in range(len(runs))]
    if rounds:
        from matplotlib import colormaps
        colours[1:] = colormaps["plasma"](np.linspace(0.8, 0.1, len(runs) - 1))
        names[1:] = [f"round {int(name)}" for name in names[1:]]
    elif len(runs) > 1:
        panels[f"Pass@k minus {names[0]}, paired"] = CELL[3:]
    columns = len(panels) + (len(runs) > 2 and len(ks) > 1)
    figure, axes = new_figure(1, columns, 4.9 * columns, 3.6)
    for axis, (title, fields) in zip(axes, panels.items()):
        ends = []
        for index, (run, name, colour) in enumerate(zip(runs, names, colours)):
            line, low, high = ([run["pass_at_k"][str(k)][field] for k in ks] for field in fields)
            axis.plot(ks, line, "o-" if index else "o--", color=colour, markersize=4.5)
            if not rounds or index in (0, len(runs) - 1):
                axis.fill_between(ks, low, high, color=colour, alpha=0.15, linewidth=0)
            ends.append((line[-1], name, colour))
        axis.set_title(title, **LITERAL)
        axis.set_xscale("log", base=2)
        ticks = ks if len(ks) <= 12 else [k for k in ks if k & (k - 1) == 0]
        axis.set_xticks(ticks, ticks)
        axis.set_xlabel("k, samples a problem")
        axis.minorticks_off()
        label_ends(axis, ends)
    if columns > len(panels):
        axis, x, y = axes[-1], f"Pass@{ks[0]}", f"Pass@{ks[-1]}"
        points = [[run["pass_at_k"][str(k)]["value"] for k in (ks[0], ks[-1])] for run in runs]
        for index, (point, name, colour) in enumerate(zip(points, names, colours)):
            start = points[max(0, index - 1) if rounds else 0]
            axis.plot(*zip(start, point), color=colour, linewidth=1)
            axis.plot(*point, "o" if index else "*", color=colour, markersize=6 if index else 13)
            axis.annotate(name, point, (7, 5 if index else -12), textcoords="offset points",
                          color=colour, fontsize=9, **LITERAL)
        axis.set(title=f"{y} against {x}", xlabel=x, ylabel=y)
        axis.margins(0.15)
    sizes = ", ".join(str(n) for n in dict.fromkeys(run["n"] for run in runs))
    figure.supxlabel(f"{runs[0]['problems']} problems, n = {sizes}; bands: 95 % over problems",
                     fontsize="medium")
    save(figure, path)


class Update(msgspec.Struct, rename={"pass_at_1": "pass@1", "pass_at_n": "pass@n"}):
    """A line of metrics.jsonl, as far as it is drawn; null where an update had no such samples."""
    step: int
    pass_at_1: float | None
    entropy: float | None
    entropy_correct: float | None
    entropy_wrong: float | None
    completion_len: float | None
    grad_norm: float | None
    pass_at_n: float | None = None  # older runs lack it


def read_metrics(path):
    """{field of Update: (updates,)}, NaN for null, of a metrics.jsonl, of a model folder, or of the
    newest round in a run's folder."""
    if os.path.isdir(path):
        rounds = sorted(filter(str.isdecimal, os.listdir(path)), key=int)
        files = [f"{path}/metrics.jsonl", *(f"{path}/{one}/policy/metrics.jsonl" for one in rounds)]
        files = [file for file in files if os.path.exists(file)]
        if not files:
            fail(f"{path}: no metrics.jsonl here, nor in 001/policy, 002/policy, ...")
        path = files[-1]
    updates = [msgspec.structs.astuple(row) for _, _, row in read_rows(path, Update)]
    return dict(zip(Update.__struct_fields__, np.array(updates, dtype=float).T))


def plot_training(run, path):
    """What metrics.jsonl holds: each update pale, a running mean strong."""
    metrics = read_metrics(run)
    panels = {
        "Share of the problems solved": {"pass_at_1": "Pass@1", "pass_at_n": "Pass@n"},
        "Completion length (tokens)": {"completion_len": ""},
        "Token entropy (nats)": {
            "entropy": "all", "entropy_correct": "correct", "entropy_wrong": "wrong"},
        "Gradient norm": {"grad_norm": ""}}
    figure, axes = new_figure(2, 2, 9.4, 5.4)
    for axis, (title, curves) in zip(axes, panels.items()):
        ends = []
        for colour, (key, label) in zip(COLOURS, curves.items()):
            finite = np.isfinite(metrics[key])
            if not finite.any():
                continue
            steps, values = metrics["step"][finite], metrics[key][finite]
            window = np.ones(max(1, len(values) // 20))
            totals, counts = (np.convolve(one, window, "same") for one in (values, values**0))
            axis.plot(steps, values, ".-", color=colour, alpha=0.25, linewidth=0.8, markersize=2)
            axis.plot(steps, totals / counts, color=colour)
            ends.append((totals[-1] / counts[-1], label, colour))
        axis.set_title(title)
        axis.set_ylim(bottom=0)
        label_ends(axis, ends)
    figure.supxlabel("update", fontsize="medium")
    save(figure, path)


# ---- The stage -----------------------------------------------------------------------------------
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
        smallest = min(runs, key=lambda run: run["n"])
        ks = args.k or [2**power for power in range(smallest["n"].bit_length())]
        if ks[-1] > smallest["n"]:
            fail(f"{smallest['file']}: k = {ks[-1]} needs {ks[-1]} samples a problem, but n is "
                 f"{smallest['n']}")
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
