"""Draw the study's figure and write its tables, from the results.csv and checkpoints.csv that
experiments/frontier.py and experiments/smollm2.py leave.

    python experiments/figures.py             # frontier.png, and the summary as frontier.md
    python experiments/figures.py --tables    # print every table, the summary first

A run is a path: the base, then its checkpoints, each with its Pass@1 and another measure (Pass@k at
a larger k, or the coverage of solutions). Only checkpoints with a higher Pass@1 than all before
them count: where Pass@1 falls back, stopping earlier was better. A checkpoint that only one of two
compared runs has, and the other has passed, is left out. Two paths of one seed are compared

    at equal Pass@1   at the largest Pass@1 that both reach, linear between checkpoints,
    by their gap      the area between them from the base to there, divided by the Pass@1 covered:
                      the mean difference of the measure at equal Pass@1,
    at equal rounds   at every checkpoint that both have, whatever their Pass@1.

Figures are means over seeds with 95 % Student t intervals over seeds. Differences are paired by
seed; in brackets behind them stands the share of seeds with that sign.
"""
import argparse
import contextlib
import itertools
import os
import statistics
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from experiments.frontier import NEIGHBOURS
from experiments.suite import read_csv

LABELS = {
    "base": "base", "grpo": "GRPO", "grpo/2": "GRPO, half the rate", "ds-token": "DS-GRPO",
    "ds-positive": "DS, positive half", "ds-negative": "DS, negative half",
    "ds-entropy": "differential entropy", "entropy-bonus": "uniform bonus",
    "entropy-penalty": "uniform penalty", "grpo-longer": "GRPO, 51 rounds",
    "rehearsal": "rehearsal alone", "rehearsal-samples": "rehearsal alone, by samples",
    "grpo-rehearsal": "GRPO + rehearsal", "grpo-rehearsal-samples": "GRPO + rehearsal, by samples",
    "ds-rehearsal": "DS-GRPO + rehearsal", "grpo-rehearsal-longer": "GRPO + rehearsal, less later",
    "ds-entropy-rehearsal": "differential entropy + rehearsal",
    "rehearsal-even": "rehearsal alone, even", "grpo-rehearsal-even": "GRPO + rehearsal, even",
    "ds-rehearsal-even": "DS-GRPO + rehearsal, even"}
# The figure's lines: an arm, its colour and by how many points its name stands above its end.
LINES = {"grpo": ("#D55E00", 0), "grpo/2": ("#E69F00", 20), "ds-token": ("#0072B2", 0),
         "rehearsal": ("#7F7F7F", 14), "grpo-rehearsal": ("#009E73", 0)}
TITLES = {"weak-base": "weak base", "strong-base": "strong base", "pre-trained": "SmolLM2-135M"}
REFERENCES = ("base", "grpo", "grpo-longer", "ds-token", "entropy-bonus", "rehearsal",
              "grpo-rehearsal")
# The summary's pairs, a first arm minus a second (/2: at the second learning rate): by the gap in
# Pass@k at the largest k, by the round at three k, and rehearsal's two weightings.
ALONG = (
    ("grpo/2", "grpo"), ("ds-token", "grpo"), ("ds-token", "entropy-bonus"),
    ("ds-token", "ds-positive"), ("ds-token", "ds-negative"), ("entropy-bonus", "grpo"),
    ("entropy-penalty", "grpo"), ("ds-entropy", "grpo"), ("grpo-rehearsal", "grpo"),
    ("grpo-rehearsal-longer", "grpo"), ("grpo-rehearsal-longer", "grpo-longer"),
    *((arm, "grpo") for arm in NEIGHBOURS))
BY_ROUND = (("grpo", "base"), ("ds-token", "grpo"), ("ds-token", "entropy-bonus"),
            ("rehearsal", "base"), ("grpo-rehearsal", "base"), ("grpo-rehearsal", "rehearsal"),
            ("ds-rehearsal", "grpo-rehearsal"), ("ds-entropy-rehearsal", "grpo-rehearsal"))
WEIGHTINGS = (("rehearsal-samples", "rehearsal"), ("grpo-rehearsal-samples", "grpo-rehearsal"))
TITLE = """# The study's summary

Written by `python experiments/figures.py`; `python experiments/figures.py --tables` prints this and
all other tables. "Gap": the mean difference at equal Pass@1, from the base to the largest Pass@1
that both reach. "Less later": 51 rounds, the first ten those of GRPO + rehearsal, then a weight of
0.3. Intervals: 95 % Student t over seeds, differences paired by seed; in brackets behind them the
share of seeds with that sign. All seeds have the same 300 held-out problems; `fixed` trains the
strong base on 192 others in every round, and is measured on both."""


# ---- Statistics --------------------------------------------------------------------------------
# P(|T| <= t) = 0.95 at 1, 2, 3, ... degrees of freedom; beyond them the last, a little wide.
STUDENT_T = (12.70620, 4.302653, 3.182446, 2.776445, 2.570582, 2.446912, 2.364624, 2.306004,
             2.262157, 2.228139, 2.200985, 2.178813)


def interval(values):
    """(mean, half width of the 95 % interval over seeds); the half width is nan for one seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    half = STUDENT_T[min(len(values), 13) - 2] * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), half


def text_of(values, signed=False):
    """'mean ± half' or, signed, 'mean [low, high] (seeds with its sign/seeds)'."""
    mean, half = interval(values)
    if not signed:
        return f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")
    bounds = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if len(values) > 1 else ""
    same = sum(np.sign(value) == np.sign(mean) for value in values)
    return f"{mean:+.3f}{bounds} ({same}/{len(values)})"


# ---- Runs --------------------------------------------------------------------------------------
def load(folder):
    """{(regime, split, arm, lr): {seed: {round: {measure: value}}}}; the measures are texts."""
    table = {}
    for row in read_csv(f"{folder}/results.csv") + read_csv(f"{folder}/checkpoints.csv"):
        runs = table.setdefault((row["regime"], row["split"], row["arm"], row["lr"]), {})
        point = runs.setdefault(int(row["seed"]), {}).setdefault(int(row["round"]), {})
        if "k" in row:
            point[row["k"]] = float(row["pass_at_k"])
        else:  # the base has no entropy: nothing was trained
            point |= {name: float(row[name] or "nan")
                      for name in ("coverage", "distinct", "entropy", "train_s")}
    return table


def panels_of(table):
    """{(regime, split): {(arm, lr): {seed: points}}}, arms as in LABELS. Every run's path begins at
    the base of its seed, without which it is left out; that of grpo-longer is GRPO's and one
    checkpoint more."""
    order, panels = [*LABELS, *NEIGHBOURS], {}
    for key in sorted(table, key=lambda key: (order.index(key[2]), -float(key[3]))):
        regime, split, arm, lr = key
        bases = table.get((regime, split, "base", "0"), {})
        shorter = table.get((regime, split, "grpo", lr), {}) if arm == "grpo-longer" else {}
        runs = {seed: {**bases[seed], **shorter.get(seed, {}), **points}
                for seed, points in table[key].items() if seed in bases}
        if runs:
            panels.setdefault((regime, split), {})[arm, lr] = runs
    return dict(sorted(panels.items(), reverse=True))  # weak, strong, pre-trained, fixed


def large(runs_of):
    """The largest k of a panel's runs, a text."""
    points = next(iter(next(iter(runs_of.values())).values()))
    return max((name for name in next(iter(points.values())) if name.isdigit()), key=int)


def best_rate(runs_of):
    """The learning rate that most arms have; the second best is that of a few."""
    return statistics.mode(lr for arm, lr in runs_of if arm != "base")


def runs_at(runs_of, arm):
    """{seed: points} of an arm at the best learning rate, of ARM/2 at the second best."""
    name, _, second = arm.partition("/")
    rates = {lr for one, lr in runs_of if one == name}
    rates = rates - {best_rate(runs_of)} if second else rates & {"0", best_rate(runs_of)}
    return runs_of[name, min(rates)] if rates else {}


def path_of(points, measure):
    """(Pass@1, measure) of the checkpoints with a higher Pass@1 than all before: two arrays."""
    kept = []
    for _, point in sorted(points.items()):
        if not kept or point["1"] > kept[-1][0]:
            kept.append((point["1"], point[measure]))
    return np.array(kept).T


def alike(one, other):
    """The checkpoints of a run without those that the other passed by: between two, a path is a
    straight line, so that one with fewer would be better or worse for that alone."""
    return {number: point for number, point in one.items()
            if number in other or number > max(other)}


def shared(one, other):
    """The largest Pass@1 that both paths reach."""
    return min(one[0][-1], other[0][-1])


def at_equal(one, other):
    """one minus other at the largest Pass@1 that both reach; both begin at the same base."""
    at = shared(one, other)
    return np.interp(at, *one) - np.interp(at, *other)


def gap(one, other):
    """The area between two paths from their base to the largest Pass@1 that both reach, divided by
    its width; 0 where one of them never leaves the base."""
    low, high = one[0][0], shared(one, other)
    if high <= low:
        return 0.0
    knots = np.unique(np.clip(np.concatenate([one[0], other[0]]), low, high))
    difference = np.interp(knots, *one) - np.interp(knots, *other)
    return np.trapezoid(difference, knots) / (high - low)


def paths_of(pairs, measure):
    """Both paths of each pair of runs."""
    alikes = [(alike(one, other), alike(other, one)) for one, other in pairs]
    return [(path_of(one, measure), path_of(other, measure)) for one, other in alikes]


def at_round(pairs, number, other, measure):
    """one minus other of each pair of runs that were measured after a round; the base has one
    measurement."""
    at = 0 if other == "base" else number
    return [a[number][measure] - b[at][measure] for a, b in pairs if number in a and at in b]


def paired(runs, others):
    """[(points, points of the other)] of the seeds that both have."""
    return [(runs[seed], others[seed]) for seed in sorted(runs.keys() & others.keys())]


# ---- Tables ------------------------------------------------------------------------------------
def table(head, rows):
    """Print rows of cells under a head, in Markdown: no empty column, nothing without a row."""
    if rows:
        head, *rows = zip(*(column for column in zip(head, *rows) if any(column[1:])))
        print("\n| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        for cells in rows:
            print("| " + " | ".join(map(str, cells)) + " |")


def signed(cells):
    return [text_of(cell, signed=True) if cell else "" for cell in cells]


def name_of(arm, lr):
    return LABELS.get(arm, arm) + (f", lr {lr}" if float(lr) else "")


def title_of(regime, split):
    if regime == "fixed":
        return f"fixed problems, on {'them' if split == 'train' else 'held-out ones'}"
    return TITLES[regime]


def end_points(runs_of):
    """Every arm at its last checkpoint."""
    measures, rows = ("1", "4", "16", "64", large(runs_of), "coverage", "distinct"), []
    for (arm, lr), runs in runs_of.items():
        last = [points[max(points)] for points in runs.values()]
        rows.append([name_of(arm, lr), len(runs), max(map(max, runs.values())),
                     *(text_of([point[measure] for point in last]) for measure in measures),
                     f"{np.mean([point['train_s'] for point in last]):.0f}"])
    table(["arm", "seeds", "round", *(f"Pass@{k}" for k in measures[:5]), *measures[5:],
           "updates, s"], rows)


def differences(runs_of, reference):
    """The arms minus a reference, (arm, lr): at equal rounds, then at equal Pass@1.

    A reference at the best learning rate is compared with all arms, one at the second best with
    those at that rate."""
    top, rates = large(runs_of), {"0", best_rate(runs_of)}
    pairs = {key: paired(runs, runs_of[reference]) for key, runs in runs_of.items()
             if key not in (reference, ("base", "0")) and reference[1] in {*rates, key[1]}}
    measures, rows = ("1", "4", "16", "64", top, "coverage"), []
    for key, both in pairs.items():
        for number in sorted({number for points, _ in both for number in points if number}):
            cells = [at_round(both, number, reference[0], measure) for measure in measures]
            if any(cells):
                rows.append([name_of(*key), number, *signed(cells)])
    minus = f"minus {name_of(*reference)}"
    table([f"{minus}, equal rounds", "round", *(f"Pass@{k}" for k in measures[:5]), "coverage"],
          rows)
    measures, rows = (top, "64", "16", "coverage"), []
    for key, both in pairs.items():
        paths = {measure: paths_of(both, measure) for measure in measures}
        cells = [[at_equal(*pair) for pair in paths[measure]] for measure in measures]
        cells += [[gap(*pair) for pair in paths[measure]] for measure in (top, "64")]
        if both and reference[0] != "base":  # the base is where all paths begin
            rows.append([name_of(*key), text_of([shared(*pair) for pair in paths[top]]),
                         *signed(cells)])
    table([f"{minus}, equal Pass@1", "at Pass@1", *(f"Pass@{k}" for k in measures[:3]),
           "coverage", f"gap in Pass@{top}", "gap in Pass@64"], rows)


def summary(panels):
    """The pairs ALONG, BY_ROUND and WEIGHTINGS, a column a panel; empty where not measured."""
    tables = [(["gap in Pass@k at the largest k"], ALONG, [(None, "largest")])]
    for pairs, numbers, measures in (
            (BY_ROUND, (5, 10, 20, 8, 16), ("1", "64", "largest")),
            (WEIGHTINGS, (5, 10), ("1", "16", "64", "largest", "entropy", "distinct"))):
        tables += [([f"after {number} rounds", "k"], pairs, [(number, k) for k in measures])
                   for number in numbers]
    for head, pairs, points in tables:
        rows = []
        for (one, other), (number, k) in itertools.product(pairs, points):
            cells = []
            for runs_of in panels.values():
                both = paired(runs_at(runs_of, one), runs_at(runs_of, other))
                measure = large(runs_of) if k == "largest" else k
                cells.append(at_round(both, number, other, measure) if number else
                             [gap(*paths) for paths in paths_of(both, measure)])
            if any(cells):
                minus = " minus ".join(LABELS.get(arm, arm) for arm in (one, other))
                rows.append([minus, *[k] * bool(number), *signed(cells)])
        table([*head, *itertools.starmap(title_of, panels)], rows)


# ---- The figure --------------------------------------------------------------------------------
def mean_path(runs, star):
    """Pass@1 and Pass@k at the checkpoints that all seeds have, two arrays: the star, {k: the mean
    of all bases}, plus the seeds' mean distance from their own base, so that all paths begin there.
    """
    rounds = sorted(set.intersection(*(set(points) for points in runs.values())))
    return [base + np.mean([[run[number][k] - run[0][k] for number in rounds]
                            for run in runs.values()], axis=0) for k, base in star.items()]


def draw(panels, path):
    """Pass@1 against Pass@k at the largest k: a line an arm of LINES with its name at its end;
    checkpoints are dots, the base is a star."""
    panels = {key: panels[key] for key in panels if key[0] in TITLES}
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 4.1),
                                layout="constrained", squeeze=False)
    for axis, ((regime, split), runs_of) in zip(axes[0], panels.items()):
        ks = ("1", large(runs_of))
        star = {k: np.mean([run[0][k] for run in runs_of["base", "0"].values()]) for k in ks}
        for arm, (colour, above) in LINES.items():
            runs = runs_at(runs_of, arm)
            if runs:
                x, y = mean_path(runs, star)
                axis.plot(x, y, color=colour, marker="o", markersize=4, linewidth=1.8)
                axis.annotate(LABELS[arm], (x[-1], y[-1]), (8, above), color=colour, va="center",
                              textcoords="offset points")
        axis.plot(*star.values(), "*k", markersize=14, zorder=3)
        axis.annotate("base", tuple(star.values()), (0, 9), textcoords="offset points",
                      ha="center")
        axis.margins(0.12, 0.1)
        axis.set_xlim(right=axis.get_xlim()[1] + 0.3 * np.ptp(axis.get_xlim()))  # for the names
        axis.set(title=TITLES[regime], xlabel="Pass@1: right at the first try",
                 ylabel=f"Pass@{ks[1]}: solved within {ks[1]} tries")
        axis.grid(color="#e6e6e6")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--tables", action="store_true", help="print every table in Markdown, and write nothing")
    add("--folder", default=HERE, help="folder of all of these files (default: experiments)")
    args = parser.parse_args(argv)
    panels = panels_of(load(args.folder))
    if not panels:
        sys.exit(f"{args.folder}/results.csv: no run together with the base of its seed")
    if args.tables:
        summary(panels)
        for panel, runs_of in panels.items():
            print(f"\n## {title_of(*panel)}")
            end_points(runs_of)
            for reference in [key for key in runs_of if key[0] in REFERENCES]:
                differences(runs_of, reference)
        return
    with open(f"{args.folder}/frontier.md", "w") as file, contextlib.redirect_stdout(file):
        print(TITLE)
        summary(panels)
    draw(panels, f"{args.folder}/frontier.png")


if __name__ == "__main__":
    main()
