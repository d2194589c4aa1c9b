"""Draw the README's pictures and print its tables from the small files that experiments/paper.py leaves.

    python experiments/figures.py                        # passk.png, training.png, gamma.png; tables in Markdown on the terminal
    python experiments/figures.py --tables experiments/long   # the same of another experiment, beside its tables

Reads counts.jsonl (every problem's n, correct, distinct, existing, per arm, distribution and seed), curves.csv, gamma.csv, overhead.csv.
A figure of an arm is a mean over seeds with a Student t interval over seeds. A difference between two arms is paired: per seed
over the same problems, then Student t over seeds; in brackets behind it the share of seeds with its sign, and where there
is one seed alone a bootstrap over problems takes t's place.
"""
import argparse
import csv
import functools
import json
import os

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = os.path.dirname(os.path.abspath(__file__))
LABELS = {"base": "base", "grpo": "GRPO", "ds-token": "DS-GRPO (token)", "ds-sequence": "DS-GRPO (sequence)", "ds-reward": "DS-GRPO (reward)",
          "ds-positive": "DS, positive half", "ds-negative": "DS, negative half", "ds-entropy": "differential entropy",
          "entropy-bonus": "uniform bonus", "entropy-penalty": "uniform penalty", "passk": "Pass@k training", "cispo": "CISPO",
          "w-reinforce": "W-REINFORCE"}
COLOURS = {"base": "#000000", "grpo": "#D55E00", **dict.fromkeys(("ds-token", "ds-sequence", "ds-reward"), "#0072B2"), "ds-entropy": "#009E73",
           "entropy-bonus": "#CC79A7", "entropy-penalty": "#E69F00"}
# 97.5 % quantiles of Student's t for 1, 2, .. degrees of freedom (two-sided 95 % intervals of 2, 3, .. seeds)
T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


@functools.cache
def pass_table(n, k):
    """1 - C(n - c, k) / C(n, k) for c = 0..n, as a product: the unbiased estimate of Pass@k from c correct of n; (n + 1,)."""
    return 1 - np.concatenate([[1.0], np.cumprod(1 - k / np.arange(n, 0, -1))])


def pass_at_k(counts, k):
    """Pass@k of each problem. counts: (problems, 4) with n, the same for all, and correct in front -> (problems,)."""
    return pass_table(int(counts[0, 0]), k)[counts[:, 1]]


def interval(values):
    """(mean, half width of the 95 % interval over seeds); the half width is nan for one seed."""
    values = np.asarray(values, float)
    half = T975[len(values) - 2] * values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return values.mean(), half


def place(name):
    return os.path.join(place.tables, name)


def load():
    """{(arm, distribution): {seed: (problems, 4) array of n, correct, distinct, existing}}; a later line of a run stands for it."""
    table = {}
    with open(place("counts.jsonl")) as file:
        for row in map(json.loads, file):
            table.setdefault((row["arm"], row["distribution"]), {})[row["seed"]] = np.array(row["problems"])
    return table


def tuned_level(table):
    """The DS-GRPO arm of the level that the tuning chose: the one with the most runs."""
    return max(("ds-token", "ds-sequence", "ds-reward"), key=lambda arm: sum(len(runs) for (name, _), runs in table.items() if name == arm))


def core_arms(table):
    return [arm for arm in COLOURS if not arm.startswith("ds-") or arm in ("ds-entropy", tuned_level(table))]


def curve(counts, ks):
    """Pass@k at every k of one run."""
    return np.array([pass_at_k(counts, k).mean() for k in ks])


def difference(one, other, measure):
    """'mean [low, high] (seeds with that sign/seeds)' of measure(counts) per problem, one arm minus the other, paired."""
    seeds = sorted(one.keys() & other.keys())
    if not seeds:
        return "-"
    per_problem = [measure(one[seed]) - measure(other[seed]) for seed in seeds]
    means = [values.mean() for values in per_problem]
    mean, half = interval(means)
    if len(seeds) == 1:
        draws = per_problem[0][np.random.default_rng(0).integers(len(per_problem[0]), size=(10_000, len(per_problem[0])))].mean(1)
        low, high = np.quantile(draws, [0.025, 0.975])
    else:
        low, high = mean - half, mean + half
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}] ({sum(np.sign(m) == np.sign(mean) for m in means)}/{len(seeds)})"


def tables(table, ks):
    at = lambda k: lambda counts: pass_at_k(counts, k)
    coverage = lambda counts: counts[:, 2] / counts[:, 3]
    for distribution in sorted({distribution for _, distribution in table}):
        arms = [arm for arm in LABELS if (arm, distribution) in table]
        print(f"\n### {distribution}\n\n| arm | seeds | " + " | ".join(f"Pass@{k}" for k in (1, 16, ks[-1])) + " | distinct | coverage | samples to match GRPO |")
        print("|---|---|---|---|---|---|---|---|")
        grpo = table.get(("grpo", distribution))
        for arm in arms:
            runs = table[arm, distribution]
            cells = []
            for measure in (at(1), at(16), at(ks[-1]), lambda counts: counts[:, 2], coverage):
                mean, half = interval([measure(counts).mean() for counts in runs.values()])
                cells.append(f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else ""))
            match = "-"
            if grpo:
                goal = np.mean([curve(counts, [ks[-1]])[0] for counts in grpo.values()])
                fine = range(1, ks[-1] + 1)
                reached = np.flatnonzero(np.mean([curve(counts, fine) for counts in runs.values()], 0) >= goal)
                match = str(fine[reached[0]]) if len(reached) else f"> {ks[-1]}"
            print(f"| {LABELS[arm]} | {len(runs)} | " + " | ".join(cells) + f" | {match} |")
        for reference in ("grpo", "entropy-bonus", tuned_level(table), "base"):
            if (reference, distribution) not in table:
                continue
            print(f"\n| minus {LABELS[reference]} | Pass@1 | Pass@16 | Pass@{ks[-1]} | coverage |\n|---|---|---|---|---|")
            for arm in arms:
                if arm != reference:
                    print(f"| {LABELS[arm]} | " + " | ".join(difference(table[arm, distribution], table[reference, distribution], measure)
                                                            for measure in (at(1), at(16), at(ks[-1]), coverage)) + " |")


def predicted(table, ks):
    """One line: how often a seed's Pass@k lies in the 95 % prediction interval that the other seeds give, mean +- t s sqrt(1 + 1/n)."""
    inside = []
    for runs in table.values():
        curves = np.array([curve(counts, ks) for counts in runs.values()])  # (seeds, ks)
        for i in range(len(curves) if len(curves) > 2 else 0):
            others = np.delete(curves, i, 0)
            half = T975[len(others) - 2] * others.std(0, ddof=1) * (1 + 1 / len(others)) ** 0.5
            inside += (abs(curves[i] - others.mean(0)) <= half).tolist()
    if inside:
        print(f"\n{sum(inside)} of {len(inside)} Pass@k of a run lie in the 95 % prediction interval of the same arm's other seeds")


def overhead():
    """One line: what the tuned DS-GRPO costs over GRPO, by the pairs of overhead.csv."""
    with open(place("overhead.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    arm = next(row["arm"] for row in rows if row["arm"] != "grpo")
    for key, what in (("cpu_s", "CPU time"), ("peak_rss_mib", "peak memory")):
        value = {(row["arm"], row["pair"]): float(row[key]) for row in rows}
        ratios = [value[arm, pair] / value["grpo", pair] for name, pair in value if name == arm]
        print(f"\n{LABELS[arm]} over GRPO, {what} of train.py: {np.median(ratios):.3f} [{min(ratios):.3f}, {max(ratios):.3f}], {len(ratios)} pairs; "
              f"GRPO {np.median([v for (name, _), v in value.items() if name == 'grpo']):.1f}")


def figure_passk(table, ks):
    drawn = core_arms(table)
    seeds = {distribution: min([len(table[arm, distribution]) for arm in drawn if (arm, distribution) in table], default=0)
             for distribution in ("main", "low-multiplicity")}
    shown = [distribution for distribution in seeds if distribution == "main" or seeds[distribution] >= 3]  # fewer are no result
    figure, axes = plt.subplots(1, len(shown), figsize=(4.8 * len(shown), 3.8), layout="constrained", squeeze=False)
    for axis, distribution in zip(axes[0], shown):
        for arm in drawn:
            if (arm, distribution) not in table:
                continue
            curves = np.array([curve(counts, ks) for counts in table[arm, distribution].values()])
            middle, half = np.array([interval(values) for values in curves.T]).T
            axis.plot(ks, middle, color=COLOURS[arm], marker="o", markersize=3.5, linestyle="--" if arm == "base" else "-", label=LABELS[arm])
            axis.fill_between(ks, middle - np.nan_to_num(half), middle + np.nan_to_num(half), color=COLOURS[arm], alpha=0.15, linewidth=0)
        axis.set(xscale="log", title=f"{distribution} ({seeds[distribution]} seed{'s' * (seeds[distribution] > 1)})", xlabel="k (samples a problem)", ylabel="Pass@k, held-out problems")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ks, ks)
        axis.grid(color="#e6e6e6")
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(place("passk.png"), dpi=160)


def figure_training(table):
    drawn = core_arms(table)
    with open(place("curves.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["distribution"] == "main" and row["arm"] in drawn]
    panels = {"pass@1": "Pass@1 of the rollouts", "entropy": "token entropy, all (nats)", "entropy_correct": "token entropy, correct (nats)",
              "entropy_wrong": "token entropy, wrong (nats)", "completion_len": "completion length (tokens)"}
    figure, axes = plt.subplots(1, 5, figsize=(16, 3.2), layout="constrained")
    for axis, (key, title) in zip(axes, panels.items()):
        for arm in drawn:
            points = {}
            for row in rows:
                if row["arm"] == arm and row[key]:
                    points.setdefault(int(row["step"]), []).append(float(row[key]))
            if points:
                axis.plot(points.keys(), [np.mean(values) for values in points.values()], color=COLOURS[arm], label=LABELS[arm], linewidth=1.2)
        axis.set(title=title, xlabel="update")
        axis.grid(color="#e6e6e6")
    axes[0].legend(frameon=False, fontsize=7)
    figure.savefig(place("training.png"), dpi=130)


def figure_gamma():
    with open(place("gamma.csv"), newline="") as file:
        rows = list(csv.DictReader(file))
    ks = sorted({int(row["k"]) for row in rows})
    p, n = (sorted({float(row[key]) for row in rows}) for key in ("gamma_p", "gamma_n"))
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.4), layout="constrained")
    for axis, k in zip(axes, (ks[0], ks[-1])):
        grid = np.full((len(p), len(n)), np.nan)
        for row in rows:
            if int(row["k"]) == k:
                grid[p.index(float(row["gamma_p"])), n.index(float(row["gamma_n"]))] = float(row["pass_at_k"])
        axis.imshow(grid, cmap="viridis", origin="lower")
        middle = np.nanmean([np.nanmin(grid), np.nanmax(grid)])
        for i, j in np.ndindex(grid.shape):
            axis.text(j, i, f"{grid[i, j]:.3f}", ha="center", va="center", color="black" if grid[i, j] > middle else "white")
        axis.set(title=f"Pass@{k}", xlabel="gamma_n", ylabel="gamma_p", xticks=range(len(n)), yticks=range(len(p)), xticklabels=n, yticklabels=p)
    figure.savefig(place("gamma.png"), dpi=140)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=HERE, help="folder of the tables and pictures (default: experiments)")
    place.tables = parser.parse_args().tables
    table = load()
    n = min(counts[:, 0].min() for runs in table.values() for counts in runs.values())
    ks = [2**power for power in range(int(n).bit_length())]
    tables(table, ks)
    predicted(table, ks)
    figure_passk(table, ks)
    for name, draw in (("curves.csv", lambda: figure_training(table)), ("gamma.csv", figure_gamma), ("overhead.csv", overhead)):
        if os.path.exists(place(name)):
            draw()


if __name__ == "__main__":
    main()
