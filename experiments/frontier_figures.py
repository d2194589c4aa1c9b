"""Draw the frontier, and write its tables in Markdown, from what experiments/frontier.py leaves.

    python experiments/frontier_figures.py      # frontier.png and frontier.md beside the tables
    python experiments/frontier_figures.py --tables FOLDER

A run is a path: the base, then its checkpoints, each with its Pass@1 and another measure
(Pass@256, @64, @16, or the coverage of solutions). Of a path only checkpoints count that have a
higher Pass@1 than all before them: where one falls back, stopping earlier was better. Two paths
of one seed, without checkpoints that one of them passed and has not, are compared

    at equal Pass@1   at the largest Pass@1 that both reach, linear between checkpoints,
    by their gap      the area between them from the base to there, divided by the Pass@1 covered:
                      the mean difference of the measure at equal Pass@1,
    at equal rounds   at the last checkpoint that both have, whatever their Pass@1; beside
                      grpo-longer, which has the rollouts of a rehearsal arm of 20 rounds, at the
                      last one of each. What is followed from the base, and what smoothing, a
                      bonus and GRPO add to an arm, at every checkpoint.

The summary in front has the pairs that are most asked for, a column a regime.

Every figure is a mean over seeds with a 95 % Student t interval over seeds; differences are
paired by seed, and in brackets behind them stands the share of seeds with that sign.
"""
import argparse
import contextlib
import itertools
import os
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
import numpy as np

from experiments import figures
from experiments.figures import interval, plt
from experiments.frontier import NEIGHBOURS
from experiments.suite import read_csv

LABELS = {
    **figures.LABELS, "ds-token": "DS-GRPO", "grpo-longer": "GRPO, 51 rounds",
    "rehearsal": "rehearsal alone", "grpo-rehearsal": "GRPO + rehearsal",
    "ds-rehearsal": "DS-GRPO + rehearsal",
    "ds-entropy-rehearsal": "differential entropy + rehearsal",
    "grpo-rehearsal-longer": "GRPO + rehearsal, less later"}
COLOURS = {  # of the arms in the figure
    **figures.COLOURS, "rehearsal": "#999999", "grpo-rehearsal": "#8C564B",
    "ds-rehearsal": "#56B4E9", "ds-entropy-rehearsal": "#7FC97F",
    "grpo-longer": figures.COLOURS["grpo"], "grpo-rehearsal-longer": "#8C564B"}
# The first round that is drawn of these; up to it their path is that of a shorter arm.
SHARED = {"grpo-longer": 20, "grpo-rehearsal-longer": 10}

MEASURES = ("256", "64", "16", "coverage")  # Pass@k, and the share of existing solutions found
REFERENCES = ("grpo", "grpo-longer", "ds-token", "entropy-bonus", "rehearsal", "grpo-rehearsal")
# Arms whose differences are followed from checkpoint to checkpoint; None: all.
FOLLOWED = {"base": None, "grpo": ("ds-token", "entropy-bonus"), "rehearsal": ("grpo-rehearsal",),
            "grpo-rehearsal": ("ds-rehearsal", "ds-entropy-rehearsal")}
# The summary's pairs, a first arm minus a second: what is compared along the path, and what is
# followed by the round; both at the best learning rate.
ALONG = (("ds-token", "grpo"), ("ds-token", "entropy-bonus"), ("ds-token", "ds-positive"),
         ("ds-token", "ds-negative"), ("entropy-bonus", "grpo"), ("entropy-penalty", "grpo"),
         ("ds-entropy", "grpo"), ("grpo-rehearsal", "grpo"), ("grpo-rehearsal-longer", "grpo"),
         ("grpo-rehearsal-longer", "grpo-longer"))
BY_ROUND = (("grpo", "base"), ("ds-token", "grpo"), ("ds-token", "entropy-bonus"),
            ("rehearsal", "base"), ("grpo-rehearsal", "base"), ("grpo-rehearsal", "rehearsal"),
            ("ds-rehearsal", "grpo-rehearsal"), ("ds-entropy-rehearsal", "grpo-rehearsal"))
STYLES = ("-", "--")  # of an arm's learning rates; arms of 51 rounds are dotted
TITLE = """# The frontier's tables

Written by `python experiments/frontier_figures.py` from results.csv and checkpoints.csv. "Gap": the
mean difference at equal Pass@1, from the base to the largest Pass@1 that both reach; its other
columns are at that largest one. Each pair of arms stands once; an arm at its second learning rate
is the reference of those at that rate alone. Beside 51 rounds of GRPO an arm is at its own last
round. "Less later": 51 rounds, with weight 1 of rehearsal up to the tenth, which are those of
GRPO + rehearsal, and 0.3 after it; with 96,000 samples of the base it has the rollouts of 82.
Intervals: 95 % Student t over seeds, differences paired by seed; in brackets behind them the share
of seeds with that sign. All seeds have the same 300 held-out problems; `fixed` trains the strong
base on 192 others in every round, and is measured on both."""


def load(folder):
    """{(regime, split, arm, lr): {seed: {round: {measure: value}}}}; the measures are texts."""
    table = {}
    for row in read_csv(f"{folder}/results.csv") + read_csv(f"{folder}/checkpoints.csv"):
        runs = table.setdefault((row["regime"], row["split"], row["arm"], row["lr"]), {})
        point = runs.setdefault(int(row["seed"]), {}).setdefault(int(row["round"]), {})
        if "k" in row:
            point[row["k"]] = float(row["pass_at_k"])
        else:
            point |= {name: float(row[name]) for name in ("coverage", "distinct", "train_s")}
    return table


def with_base(table):
    """The table, with every run's path beginning at the base of its seed, if that is there; the
    path of grpo-longer is that of GRPO and one checkpoint more."""
    paths = {}
    for (regime, split, arm, lr), runs in table.items():
        bases = table.get((regime, split, "base", "0"), {})
        shorter = table.get((regime, split, "grpo", lr), {}) if arm == "grpo-longer" else {}
        paths[regime, split, arm, lr] = {
            seed: {**bases[seed], **shorter.get(seed, {}), **points}
            for seed, points in runs.items() if seed in bases}
    return paths


# ---- Statistics --------------------------------------------------------------------------------
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
    """one minus other of each pair of runs that were measured after a round; of the base, if that
    is the other arm, there is one measurement."""
    at = 0 if other == "base" else number
    return [a[number][measure] - b[at][measure] for a, b in pairs if number in a and at in b]


def last(points, measure):
    return points[max(points)][measure]


def ends(arms, one, other):
    """The checkpoints of two runs that are compared; arms: both names."""
    if "grpo-longer" in arms:
        return one[max(one)], other[max(other)]
    common = max(one.keys() & other.keys())
    return one[common], other[common]


def text_of(values, signed=False):
    """'mean ± half' or, signed, 'mean [low, high] (seeds with its sign/seeds)'."""
    mean, half = interval(values)
    if not signed:
        return f"{mean:.3f}" + (f" ± {half:.3f}" if len(values) > 1 else "")
    bounds = f" [{mean - half:+.3f}, {mean + half:+.3f}]" if len(values) > 1 else ""
    same = sum(np.sign(value) == np.sign(mean) for value in values)
    return f"{mean:+.3f}{bounds} ({same}/{len(values)})"


# ---- Tables ------------------------------------------------------------------------------------
def row_of(*cells):
    print("| " + " | ".join(map(str, cells)) + " |")


def header(*cells):
    print()
    row_of(*cells)
    print("|" + "---|" * len(cells))


def name_of(arm, lr):
    even = ", even" * arm.endswith("-even")
    return LABELS.get(arm.removesuffix("-even"), arm) + even + (f", lr {lr}" if float(lr) else "")


def end_points(runs_of):
    """Every arm at its last checkpoint."""
    measures = ("1", "4", "16", "64", "256", "coverage", "distinct")
    header("arm", "seeds", "round", *(f"Pass@{k}" for k in measures[:5]), *measures[5:],
           "updates, s")
    for (arm, lr), runs in runs_of.items():
        cells = [text_of([last(points, measure) for points in runs.values()])
                 for measure in measures]
        seconds = np.mean([last(points, "train_s") for points in runs.values()])
        rounds = max(max(points) for points in runs.values())
        row_of(name_of(arm, lr), len(runs), rounds, *cells, f"{seconds:.0f}")


def best_rate(runs_of):
    """The learning rate that most arms have; the second best is that of a few."""
    return statistics.mode(lr for arm, lr in runs_of if arm != "base")


def paired(runs, others):
    """[(points, points of the other)] of the seeds that both have."""
    return [(runs[seed], others[seed]) for seed in sorted(runs.keys() & others.keys())]


def pairs_of(runs_of, reference):
    """{(arm, lr): [its points and the reference's, a pair a seed that both have]}.

    Beside a reference at the best learning rate stand all arms, beside one at the second best those
    at that rate."""
    best, pairs = best_rate(runs_of), {}
    for key, runs in runs_of.items():
        both = paired(runs, runs_of[reference])
        at_its_rate = reference[1] in (best, key[1]) or reference[0] == "base"
        if both and at_its_rate and key not in (reference, ("base", "0")):
            pairs[key] = both
    return pairs


def differences(runs_of, reference, told=()):
    """Every arm but those told minus a reference, (arm, lr): at equal rounds, then at equal
    Pass@1."""
    pairs = {key: both for key, both in pairs_of(runs_of, reference).items() if key not in told}
    if not pairs:
        return
    minus, measures = f"minus {name_of(*reference)}", ("1", "4", "16", "64", "256", "coverage")
    rounds = "last" if reference[0] == "grpo-longer" else "equal"
    header(f"{minus}, {rounds} rounds", *(f"Pass@{k}" for k in measures[:5]), "coverage")
    for key, both in pairs.items():
        points = [ends((key[0], reference[0]), a, b) for a, b in both]
        cells = [[a[measure] - b[measure] for a, b in points] for measure in measures]
        row_of(name_of(*key), *(text_of(cell, signed=True) for cell in cells))
    header(f"{minus}, equal Pass@1", "at Pass@1", *(f"Pass@{k}" for k in MEASURES[:3]),
           "coverage", "gap in Pass@256", "gap in Pass@64")
    for key, both in pairs.items():
        if {key[0], reference[0]} == {"grpo", "grpo-longer"}:
            continue  # one path
        paths = {measure: paths_of(both, measure) for measure in MEASURES}
        cells = [[at_equal(*pair) for pair in paths[measure]] for measure in MEASURES]
        cells += [[gap(*pair) for pair in paths[measure]] for measure in ("256", "64")]
        row_of(name_of(*key), text_of([shared(*pair) for pair in paths["256"]]),
               *(text_of(cell, signed=True) for cell in cells))


def along(runs_of, reference, arms):
    """These arms, at its learning rate, or all (None) minus a reference, (arm, lr), at every
    checkpoint that both have; of the base there is one."""
    ks = ("1", "4", "16", "32", "64", "128", "256", "coverage")
    pairs = {key: both for key, both in pairs_of(runs_of, reference).items()
             if arms is None or key[0] in arms and key[1] == reference[1]}
    if pairs:
        header(f"minus {name_of(*reference)}", "round", *(f"Pass@{k}" for k in ks[:-1]), ks[-1])
    for key, both in pairs.items():
        rounds = set.intersection(*(set(points) for points, _ in both)) - {0}
        if reference[0] != "base":
            rounds = rounds.intersection(*(set(points) for _, points in both))
        for number in sorted(rounds):
            cells = [at_round(both, number, reference[0], k) for k in ks]
            row_of(name_of(*key), number, *(text_of(cell, signed=True) for cell in cells))


def title_of(regime, split):
    if regime == "fixed":
        return f"fixed problems, on {'them' if split == 'train' else 'held-out ones'}"
    return regime.replace("-", " ")


def summary(panels):
    """The pairs ALONG and BY_ROUND, a column a panel; empty where they have not been run."""
    def runs(runs_of, arm):
        return runs_of.get((arm, "0" if arm == "base" else best_rate(runs_of)), {})

    def row(one, other, *more, figures):
        cells = [figures(paired(runs(runs_of, one), runs(runs_of, other)))
                 for runs_of in panels.values()]
        if any(cells):
            minus = " minus ".join(LABELS.get(arm, arm) for arm in (one, other))
            row_of(minus, *more, *(text_of(cell, signed=True) if cell else "" for cell in cells))

    titles = list(itertools.starmap(title_of, panels))
    print("\n## Summary")
    header("Pass@256, gap", *titles)
    for pair in ALONG:
        row(*pair, figures=lambda pairs: list(itertools.starmap(gap, paths_of(pairs, "256"))))
    for number in (5, 10, 20):
        header(f"after {number} rounds", "k", *titles)
        for (one, other), k in itertools.product(BY_ROUND, ("1", "64", "256")):
            row(one, other, k, figures=lambda pairs: at_round(pairs, number, other, k))


def tables_of(runs_of):
    """A regime's tables: the core arms and their differences, then the neighbours."""
    core, others = ({key: runs for key, runs in runs_of.items()
                     if (key[0] in NEIGHBOURS) == neighbour} for neighbour in (False, True))
    end_points(core)
    told = []
    for arm in REFERENCES:
        rates = [key for key in core if key[0] == arm]
        for reference in sorted(rates, key=lambda key: key[1] != best_rate(core)):
            differences(core, reference, told)
            told.append(reference)
    for arm, followed in FOLLOWED.items():
        for reference in [key for key in core if key[0] == arm]:
            along(core, reference, followed)
    for reference in [key for key in core if key[0] == "grpo"] if others else ():
        longest = max(max(points) for runs in others.values() for points in runs.values())
        as_far = {seed: {number: point for number, point in points.items() if number <= longest}
                  for seed, points in core[reference].items()}
        beside = others | {reference: as_far}
        print(f"\n### Neighbours, and {name_of(*reference)}")
        end_points(beside)
        differences(beside, reference)


def panels_of(paths):
    """{(regime, split): {(arm, lr): {seed: points}}}, without empty ones; arms as in LABELS."""
    names, panels = list(LABELS), {}

    def place(item):
        _, _, arm, lr = item[0]
        plain = arm.removesuffix("-even")
        return names.index(plain) if plain in names else len(names), arm, -float(lr)

    for (regime, split, arm, lr), runs in sorted(paths.items(), key=place):
        if runs:
            panels.setdefault((regime, split), {})[arm, lr] = runs
    return dict(sorted(panels.items(), reverse=True))  # weak, strong, fixed


# ---- The figure --------------------------------------------------------------------------------
def draw(panels, path):
    """Pass@1 against Pass@256: an arm a path, from the base, which is a star; an arm's second
    learning rate dashed, 51 rounds dotted; in brackets the seeds, at least two. A checkpoint stands
    at the star plus the mean distance of the seeds from their own base, so that all paths begin at
    one point. The learning rate is named where a panel has several."""
    columns, lines = min(len(panels), 2), -(-len(panels) // 2)
    figure, axes = plt.subplots(lines, columns, figsize=(5.4 * columns, 5.2 * lines),
                                layout="constrained", squeeze=False)
    for axis in axes.flat[len(panels):]:
        axis.remove()
    for axis, ((regime, split), runs_of) in zip(axes.flat, panels.items()):
        drawn, rates = [], {lr for _, lr in runs_of} - {"0"}
        star = {k: np.mean([run[0][k] for run in runs_of["base", "0"].values()])
                for k in ("1", "256")}
        for (arm, lr), runs in runs_of.items():
            if arm not in COLOURS or len(runs) < 2:
                continue
            rounds = sorted(set.intersection(*(set(points) for points in runs.values())))
            rounds = [number for number in rounds if number >= SHARED.get(arm, 0)]
            x, y = (star[k] + np.mean([[run[r][k] - run[0][k] for r in rounds]
                                       for run in runs.values()], 0) for k in ("1", "256"))
            style = ":" if arm in SHARED else STYLES[drawn.count(arm)]
            look = {"marker": "o", "markersize": 4, "linestyle": style}
            if arm == "base":
                look = {"marker": "*", "markersize": 15, "zorder": 3, "linestyle": ""}
            axis.plot(x, y, color=COLOURS[arm], **look,
                      label=f"{name_of(arm, lr if len(rates) > 1 else '0')} ({len(runs)})")
            drawn.append(arm)
        axis.set(title=title_of(regime, split), xlabel="Pass@1", ylabel="Pass@256")
        axis.grid(color="#e6e6e6")
        axis.legend(frameon=False, fontsize=8, ncol=2, loc="upper center",
                    bbox_to_anchor=(0.5, -0.13))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", default=HERE,
                        help="folder of all of these files (default: experiments)")
    args = parser.parse_args(argv)
    panels = panels_of(with_base(load(args.tables)))
    if not panels:
        sys.exit(f"{args.tables}/results.csv: no run together with the base of its seed")
    with open(f"{args.tables}/frontier.md", "w") as file, contextlib.redirect_stdout(file):
        print(TITLE)
        summary(panels)
        for panel, runs_of in panels.items():
            print(f"\n## {title_of(*panel)}")
            tables_of(runs_of)
    draw(panels, f"{args.tables}/frontier.png")


if __name__ == "__main__":
    main()
