"""The stages as processes of their own, on one thread: CPU and wall seconds, peak memory.

    python experiments/bench_scale.py --rollouts 1000 10000 100000 --plot experiments/scale.png

    scale    each stage at growing numbers of rows
    fixed    what a round costs before it does anything: process start, imports, loading, saving

Writes --out as JSON; what bench.py has put there stays.
"""
import argparse
import os
import statistics
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
KINDS = ("prompts", "rollouts", "scored")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6],
                        help="scale: rows of score.py and evaluate.py (default %(default)s)")
    parser.add_argument("--rollouts", nargs="+", type=int, default=[10**3, 10**4],
                        help="scale: rows of generate.py and train.py (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3,
                        help="fixed: runs, of which the median counts (default %(default)s)")
    parser.add_argument("--embedded", default=os.path.join(ROOT, "data", "tiny-countdown"),
                        help="the embedded model's folder (default %(default)s)")
    parser.add_argument("--out", help="JSON file of all figures (default: they are only printed)")
    parser.add_argument("--plot", help="PNG file of `scale` (default: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports

sys.path.insert(0, ROOT)
from evaluate import COLOURS, new_figure
from experiments.bench_files import usage, write_rollouts
from experiments.roofline import SIZES, generate_flags, save, write_prompts

def show(label, one):
    print(f"{label:28} {one['cpu_s']:8.2f} s CPU {one['wall_s']:8.2f} s wall "
          f"{one['peak_bytes'] / 2**20:8,.0f} MiB", flush=True)


def measure_scale(args):
    """{stage: [its figures at each number of rows]}"""
    found = {name: [] for name in ("generate.py", "score.py", "train.py", "evaluate.py")}

    def measure(rows, name, *flags):
        found[name].append({"rows": rows, **usage(f"{ROOT}/{name}", *flags)})
        show(f"{name:12} {rows:>9,} rows", found[name][-1])

    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            _, rollouts, scored = (f"{folder}/{kind}.jsonl" for kind in KINDS)
            write_rollouts(rollouts, rows, repeat=False)
            measure(rows, "score.py", rollouts, "--out", scored)
            measure(rows, "evaluate.py", scored, "--out", f"{folder}/eval.json")
    for rows in args.rollouts:
        with tempfile.TemporaryDirectory() as folder:
            prompts, rollouts, scored = (f"{folder}/{kind}.jsonl" for kind in KINDS)
            write_prompts(prompts, -(-rows // SIZES["tiny"].n))
            flags = generate_flags(SIZES["tiny"], args.embedded, prompts, rollouts)
            measure(rows, "generate.py", *flags)
            usage(f"{ROOT}/score.py", rollouts, "--out", scored)
            measure(rows, "train.py", "--model", args.embedded, "--rollouts", scored,
                    "--out", f"{folder}/round")
    return found


def measure_fixed(args):
    """{command: the medians of its figures}"""
    found, model = {}, ["--model", args.embedded]
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            prompts, rollouts, scored = (f"{folder}/{kind}.jsonl" for kind in KINDS)
            write_prompts(prompts, 1)
            commands = {
                "python -c pass": ["-c", "pass"],
                "import torch": ["-c", "import torch"],
                "import torch, transformers": ["-c", "import torch, transformers"],
                "train.py --help": [f"{ROOT}/train.py", "--help"],
                "score.py --help": [f"{ROOT}/score.py", "--help"],
                "generate.py": [f"{ROOT}/generate.py", *model, "--prompts", prompts,
                                "--out", rollouts, "--n", "2", "--max-new-tokens", "2"],
                "score.py": [f"{ROOT}/score.py", rollouts, "--out", scored],
                "train.py": [f"{ROOT}/train.py", *model, "--rollouts", scored,
                             "--out", f"{folder}/round"],
                "evaluate.py": [f"{ROOT}/evaluate.py", scored, "--out", f"{folder}/eval.json"]}
            for label, command in commands.items():
                found.setdefault(label, []).append(usage(*command))
    for label, results in found.items():
        found[label] = {key: statistics.median(one[key] for one in results) for key in results[0]}
        show(label, found[label])
    return found


def plot(stages, path):
    """Left CPU time, right peak memory, against rows."""
    figure, axes = new_figure(1, 2, 9.4, 3.6)
    for (name, results), colour, marker in zip(stages.items(), COLOURS[1:], "os^D"):
        for axis, key, unit in zip(axes, ("cpu_s", "peak_bytes"), (1, 2**20)):
            axis.plot([one["rows"] for one in results], [one[key] / unit for one in results],
                      color=colour, marker=marker, markersize=4.5, label=name)
    axes[0].set(title="CPU time of the process (s), start included", xscale="log", yscale="log")
    axes[1].set(title="Peak memory of the process (MiB)", xscale="log", ylim=(0, None))
    axes[0].legend()
    figure.supxlabel("rows", fontsize="medium")
    figure.savefig(path, dpi=200)


def main(args):
    scale = {"stages": measure_scale(args), "threads": 1}
    save(args.out, {"scale": scale, "fixed": {"threads": 1, "commands": measure_fixed(args)}})
    if args.plot:
        plot(scale["stages"], args.plot)


if __name__ == "__main__":
    main(ARGS)
