"""Draw the experiment's pictures and print its tables from what experiments/paper.py leaves.

    python experiments/figures.py                             # pictures, and tables in Markdown
    python experiments/figures.py --tables experiments/long   # the same of another experiment

Reads counts.jsonl (of every arm, distribution and seed, for each problem: samples, correct ones,
distinct solutions found, solutions that exist), curves.csv, gamma.csv, overhead.csv; writes
passk.png, training.png and gamma.png beside them.

A figure of an arm is a mean over seeds with a Student t interval over seeds. A difference between
two arms is paired: per seed over the same problems, then Student t over seeds; in brackets behind
it the share of seeds with its sign. One seed alone has no interval.
"""
import argparse
import csv
import functools
import json
import math
import os
import sys

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.append(os.path.dirname(HERE))
import evaluate

LABELS = {
    "base": "base", "grpo": "GRPO", "ds-token": "DS-GRPO (token)",
    "ds-sequence": "DS-GRPO (sequence)", "ds-reward": "DS-GRPO (reward)",
    "ds-positive": "DS, positive half", "ds-negative": "DS, negative half",
    "ds-entropy": "differential entropy", "entropy-bonus": "uniform bonus",
    "entropy-penalty": "uniform penalty", "passk": "Pass@k training", "cispo": "CISPO",
    "w-reinforce": "W-REINFORCE"}
LEVELS = ("ds-token", "ds-sequence", "ds-reward")  # of DS-GRPO's smoothing
COLOURS = {
    "base": "#000000", "grpo": "#D55E00", **dict.fromkeys(LEVELS, "#0072B2"),
    "ds-entropy": "#009E73", "entropy-bonus": "#CC79A7", "entropy-penalty": "#E69F00"}


# ---- Statistics ----------------------------------------------------------------------------------
def student_t(t, freedom):
    """P(|T| <= t) of Student's t with a whole number of degrees of freedom, for t >= 0.

    The finite series in the angle atan(t / sqrt(freedom)) of Abramowitz and Stegun, 26.7.3 and
    26.7.4: each term is the one before times cos^2 and the next ratio of whole numbers.
    """
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term = math.sin(angle) * (math.cos(angle) if odd else 1)
    total = 0.0
    for step in range(2 + odd, freedom + 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (step - 1) / step
    return 2 / math.pi * (angle + total) if odd else total


@functools.cache
def quantile_t(freedom):
    """The t with P(|T| <= t) = 0.95, for two-sided 95 % intervals."""
    low, high = 0.0, 13.0  # 12.706 at one degree of freedom, less at all others
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_t(middle, freedom) < 0.95 else (low, middle)
    return high


def interval(values):
    """(mean, half width of the 95 % interval over seeds); the half width is nan for one seed."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return values.mean(), np.nan
    half = quantile_t(len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), half


def pass_at_k(counts, k):
    """Pass@k of each problem, (problems,).

    counts: (problems, 4) with n, the same for all, and the number of correct samples in front.
    """
    return evaluate.pass_at_k(int(counts[0, 0]), k)[counts[:, 1]]


def distinct(counts):
    return counts[:, 2]


def coverage(counts):
    return counts[:, 2] / counts[:, 3]


def at(k):
    """Pass@k as a measure, a function from counts to a value a problem."""
    return functools.partial(pass_at_k, k=k)


def curve(counts, ks):
    """Pass@k at every k of one run."""
    return np.array([pass_at_k(counts, k).mean() for k in ks])


def difference(one, other, measure):
    """'mean [low, high] (seeds with that sign/seeds)' of one arm minus the other, paired.

    one, other: {seed: counts}. measure: counts -> a value of each problem.
    """
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return "-"
    means = [(measure(one[seed]) - measure(other[seed])).mean() for seed in seeds]
    mean, half = interval(means)
    if len(seeds) == 1:  # no interval: one over problems would say nothing of another seed
        return f"{mean:+.3f} (one seed)"
    same_sign = sum(np.sign(m) == np.sign(mean) for m in means)
    return f"{mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] ({same_sign}/{len(seeds)})"


# ---- What paper.py left --------------------------------------------------------------------------
def place(name):
    return os.path.join(place.tables, name)


def read_csv(name):
    with open(place(name), newline="") as file:
        return list(csv.DictReader(file))


def load():
    """{(arm, distribution): {seed: (problems, 4)}}; a later line of a run stands for it.

    The four columns are a problem's n, correct, distinct and existing.
    """
    table = {}
    with open(place("counts.jsonl")) as file:
        for row in map(json.loads, file):
            runs = table.setdefault((row["arm"], row["distribution"]), {})
            runs[row["seed"]] = np.array(row["problems"])
    return table


def tuned_level(table):
    """The DS-GRPO arm of the level that the tuning chose: the one with the most runs."""
    def runs_of(arm):
        return sum(len(runs) for (name, _), runs in table.items() if name == arm)

    return max(LEVELS, key=runs_of)


def core_arms(table):
    return [arm for arm in COLOURS if arm not in LEVELS or arm == tuned_level(table)]


# ---- Tables --------------------------------------------------------------------------------------
def tables(table, ks):
    """Print, for every distribution, the arms and then their differences to some of them."""
    for distribution in sorted({distribution for _, distribution in table}):
        runs = {arm: table[arm, distribution] for arm in LABELS if (arm, distribution) in table}
        print(f"\n### {distribution}\n")
        print_arms(runs, ks)
        for reference in ("grpo", "entropy-bonus", tuned_level(table), "base"):
            if reference in runs:
                print_differences(runs, reference, ks)


def print_arms(runs, ks):
    """runs: {arm: {seed: counts}}."""
    head = [f"Pass@{k}" for k in (1, 16, ks[-1])] + ["distinct", "coverage"]
    print(f"| arm | seeds | {' | '.join(head)} | samples to match GRPO |")
    print("|---|---|---|---|---|---|---|---|")
    grpo = [at(ks[-1])(counts).mean() for counts in runs.get("grpo", {}).values()]
    goal = np.mean(grpo) if grpo else np.nan
    fine = range(1, ks[-1] + 1)
    for arm, seeds in runs.items():
        cells = []
        for measure in (at(1), at(16), at(ks[-1]), distinct, coverage):
            mean, half = interval([measure(counts).mean() for counts in seeds.values()])
            cells.append(f"{mean:.3f}" + ("" if np.isnan(half) else f" ± {half:.3f}"))
        mean_curve = np.mean([curve(counts, fine) for counts in seeds.values()], 0)
        reached = np.flatnonzero(mean_curve >= goal)
        match = str(fine[reached[0]]) if len(reached) else f"> {ks[-1]}"
        match = "-" if np.isnan(goal) else match
        print(f"| {LABELS[arm]} | {len(seeds)} | {' | '.join(cells)} | {match} |")


def print_differences(runs, reference, ks):
    print(f"\n| minus {LABELS[reference]} | Pass@1 | Pass@16 | Pass@{ks[-1]} | coverage |")
    print("|---|---|---|---|---|")
    for arm, seeds in runs.items():
        if arm != reference:
            cells = [difference(seeds, runs[reference], measure)
                     for measure in (at(1), at(16), at(ks[-1]), coverage)]
            print(f"| {LABELS[arm]} | {' | '.join(cells)} |")


def predicted(table, ks):
    """One line: how often the other seeds of its arm predict a seed's Pass@k.

    The 95 % prediction interval is their mean +- t s sqrt(1 + 1/n).
    """
    inside = []
    for runs in table.values():
        curves = np.array([curve(counts, ks) for counts in runs.values()])  # (seeds, ks)
        for i in range(len(curves) if len(curves) > 2 else 0):
            others = np.delete(curves, i, 0)
            spread = others.std(0, ddof=1) * (1 + 1 / len(others)) ** 0.5
            half = quantile_t(len(others) - 1) * spread
            inside += (abs(curves[i] - others.mean(0)) <= half).tolist()
    if inside:
        print(f"\n{sum(inside)} of {len(inside)} Pass@k of a run lie in the 95 % prediction "
              "interval of the same arm's other seeds")


def overhead():
    """Two lines: what the tuned DS-GRPO costs over GRPO, by the pairs of overhead.csv."""
    rows = read_csv("overhead.csv")
    arm = next(row["arm"] for row in rows if row["arm"] != "grpo")
    for key, what in (("cpu_s", "CPU time"), ("peak_rss_mib", "peak memory")):
        value = {(row["arm"], row["pair"]): float(row[key]) for row in rows}
        pairs = [pair for name, pair in value if name == arm]
        ratios = [value[arm, pair] / value["grpo", pair] for pair in pairs]
        spread = f"{np.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}]"
        grpo = np.median([value["grpo", pair] for pair in pairs])
        print(f"\n{LABELS[arm]} over GRPO, {what} of train.py: {spread}, {len(ratios)} pairs; "
              f"GRPO {grpo:.1f}")


# ---- Pictures ------------------------------------------------------------------------------------
def figure_passk(table, ks):
    """Pass@k against k, a panel a distribution; one with fewer than three seeds is no result."""
    drawn, shown = core_arms(table), {}
    for distribution in ("main", "low-multiplicity"):
        runs = {arm: table[arm, distribution] for arm in drawn if (arm, distribution) in table}
        seeds = min(map(len, runs.values()), default=0)
        if distribution == "main" or seeds >= 3:
            title = f"{distribution} ({seeds} seed{'s' * (seeds > 1)})"
            shown[title] = runs
    figure, axes = plt.subplots(1, len(shown), figsize=(4.8 * len(shown), 3.8),
                                layout="constrained", squeeze=False)
    for axis, (title, runs) in zip(axes[0], shown.items()):
        for arm, seeds in runs.items():
            curves = np.array([curve(counts, ks) for counts in seeds.values()])
            middle, half = np.array([interval(values) for values in curves.T]).T
            half = np.nan_to_num(half)
            axis.plot(ks, middle, color=COLOURS[arm], marker="o", markersize=3.5,
                      linestyle="--" if arm == "base" else "-", label=LABELS[arm])
            axis.fill_between(ks, middle - half, middle + half, color=COLOURS[arm], alpha=0.15,
                              linewidth=0)
        axis.set(title=title, xlabel="k (samples a problem)", ylabel="Pass@k, held-out problems")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, ks)
        axis.grid(color="#e6e6e6")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(place("passk.png"), dpi=160)


def figure_training(table):
    """Training curves of the core arms, means over seeds."""
    drawn = core_arms(table)
    rows = [row for row in read_csv("curves.csv") if row["distribution"] == "main"]
    panels = {"pass@1": "Pass@1 of the rollouts", "entropy": "token entropy, all (nats)",
              "entropy_correct": "token entropy, correct (nats)",
              "entropy_wrong": "token entropy, wrong (nats)",
              "completion_len": "completion length (tokens)"}
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items()):
        for arm in drawn:
            points = {}
            for row in rows:
                if row["arm"] == arm and row[key]:
                    points.setdefault(int(row["step"]), []).append(float(row[key]))
            if points:
                axis.plot(points.keys(), [np.mean(values) for values in points.values()],
                          color=COLOURS[arm], label=LABELS[arm], linewidth=1.2)
        axis.set(title=title, xlabel="update")
        axis.grid(color="#e6e6e6")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(place("training.png"), dpi=130)


def figure_gamma():
    """Heat maps of Pass@k at the smallest and the largest k over gamma_p and gamma_n."""
    rows = read_csv("gamma.csv")
    ks = sorted({int(row["k"]) for row in rows})
    p, n = (sorted({float(row[key]) for row in rows}) for key in ("gamma_p", "gamma_n"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, k in zip(axes, (ks[0], ks[-1])):
        grid = np.full((len(p), len(n)), np.nan)
        for row in rows:
            if int(row["k"]) == k:
                place_of = p.index(float(row["gamma_p"])), n.index(float(row["gamma_n"]))
                grid[place_of] = float(row["pass_at_k"])
        axis.imshow(grid, cmap="viridis", origin="lower")
        middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        for i, j in np.ndindex(grid.shape):
            axis.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center",
                      color="black" if grid[i, j] > middle else "white")
        axis.set(title=f"Pass@{k}", xlabel="gamma_n", ylabel="gamma_p", xticks=range(len(n)),
                 yticks=range(len(p)), xticklabels=n, yticklabels=p)
    figure.savefig(place("gamma.png"), dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=HERE,
                        help="folder of the tables and pictures (default: experiments)")
    place.tables = parser.parse_args().tables
    table = load()
    n = min(counts[:, 0].min() for runs in table.values() for counts in runs.values())
    ks = [2**power for power in range(int(n).bit_length())]
    tables(table, ks)
    predicted(table, ks)
    figure_passk(table, ks)
    if os.path.exists(place("curves.csv")):
        figure_training(table)
    if os.path.exists(place("gamma.csv")):
        figure_gamma()
    if os.path.exists(place("overhead.csv")):
        overhead()


if __name__ == "__main__":
    main()
