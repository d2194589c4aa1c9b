"""What evaluate.py shows to people: the table, Pass@k against k, and a run's training curves.

The table and the first picture are views of eval.json, whose form stands in evaluate.py.
matplotlib is imported only when something is drawn, so that --help and a table need none.
"""
import math
import os
import re
import sys

import msgspec
import numpy as np

from data.files import fail, read_rows, say

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
