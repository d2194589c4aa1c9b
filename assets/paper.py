"""The README's experiment: every arm, several seeds, two distributions, from the embedded model on two CPU cores.

    bash run.sh --suite paper                        # tuning, then all reported runs; stop and restart it as you like
    bash run.sh --suite paper --arms grpo --seeds 3  # one arm and seed; with a new seed, one more row
    bash run.sh --suite paper --list                 # what is done, what is left, and how long that will take

Every arm has the same rollouts and updates: --rounds rounds of 192 problems x 16 samples, 4 updates each. Coefficients are chosen
on the tune split with seed 100 (assets/tuning.csv: everything that was tried; the choice is the best mean of Pass@k over
k = 1, 2, 4, .., 128) and reported on the test split with other seeds. A run is one core; --jobs of them go side by side.

Writes, after every run, in assets/: tuning.csv (arm, setting, lr, k, pass_at_k); results.csv (arm, distribution, seed, k, pass_at_k);
counts.jsonl (arm, distribution, seed, and for every held-out problem: n, correct, distinct solutions found, solutions that exist),
from which assets/figures.py takes all intervals; curves.csv (training curves); gamma.csv (gamma_p, gamma_n, k, pass_at_k).
Runs stand in runs/paper/.
"""
import argparse
import concurrent.futures
import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

DISTRIBUTIONS = {"main": "", "low-multiplicity": "--max-solutions 2"}
GAMMAS = [(0.3, 0.03), (0.1, 0.01), (1.0, 0.1), (0.3, 0.0)]
# Each arm's candidates, at most four; one learning rate, tuned for GRPO, serves all.
CANDIDATES = {
    "grpo": [["--method", "grpo"]],
    **{f"ds-{level}": [["--method", "ds-grpo", "--smooth-level", level, "--gamma-p", f"{p}", "--gamma-n", f"{n}"] for p, n in GAMMAS]
       for level in ("token", "sequence", "reward")},
    "entropy-bonus": [["--method", "grpo", "--entropy-coef", c] for c in ("0.02", "0.05", "0.1", "0.2")],
    "entropy-penalty": [["--method", "grpo", "--entropy-coef", c] for c in ("-0.01", "-0.02", "-0.05", "-0.1")],
    "ds-entropy": [["--method", "grpo", "--entropy-coef-correct", c, "--entropy-coef-wrong", d]
                   for c, d in (("0.3", "-0.03"), ("0.3", "0.03"), ("0.2", "0.0"), ("0.5", "0.05"))],
    "passk": [["--method", "passk", "--pass-k", k] for k in ("2", "4", "8")],
    "cispo": [["--method", "cispo"]],
    "w-reinforce": [["--method", "w-reinforce", "--positive-weight", w] for w in ("0.1", "0.3", "1.0")],
}
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
CORE = ("grpo", "ds-token", "ds-entropy", "entropy-bonus", "entropy-penalty")
FURTHER = ("ds-sequence", "ds-reward", "ds-positive", "ds-negative", "passk", "cispo", "w-reinforce")
TUNING_SEED = 100
GRID = [(p, n) for p in (0.1, 0.3, 1.0) for n in (0.0, 0.03, 0.3)]  # the ablation over gamma_p x gamma_n, token level, seed 1


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", help="only these arms (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds (default: 1..5 for the core arms, 1..3 for the others)")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), help="default: both")
    parser.add_argument("--rounds", type=int, default=20, help="rounds of 4 updates (default %(default)s)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each (default %(default)s)")
    parser.add_argument("--tune-only", action="store_true", help="stop after the tuning")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    return parser.parse_args()


def read_csv(name):
    path = os.path.join(HERE, name)
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(name, rows):
    """Whole and at once: a killed suite leaves the old table or the new one."""
    path = os.path.join(HERE, name)
    with open(path + ".partial", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".partial", path)


def stage(*command, log):
    """Run one stage on one core; its output goes to the run's log; a failed stage ends the run."""
    with open(log, "a") as file:
        subprocess.run(command, cwd=ROOT, check=True, stdout=file, stderr=file, env={**os.environ, "OMP_NUM_THREADS": "1"})


def one_run(name, flags, lr, rounds, seed, distribution, split, problems, n):
    """Train (unless flags is None: the base model) and sample the held-out problems: the counts of every problem."""
    folder = os.path.join(ROOT, "runs", name)
    os.makedirs(folder, exist_ok=True)
    log, countdown, model = f"{folder}/log.txt", DISTRIBUTIONS[distribution], "data/tiny-countdown"
    if flags is not None:
        method, rest = flags[1], flags[2:]
        stage("bash", "run.sh", "--name", name, "--method", method, "--rounds", str(rounds), "--seed", str(seed), "--keep", "1", "--lr", lr,
              "--eval-problems", "0", "--countdown", countdown, "--", *rest, log=log)
        model = f"runs/{name}/round-{rounds:03d}"
    heldout = f"{folder}/heldout.jsonl"
    stage(sys.executable, "data/countdown.py", "--out", heldout, "--n", str(problems), "--seed", "1", "--split", split, *countdown.split(), log=log)
    stage(sys.executable, "generate.py", "--model", model, "--prompts", heldout, "--out", f"{folder}/heldout.rollouts.jsonl", "--n", str(n),
          "--max-new-tokens", "24", "--seed", str(10_000 + seed), log=log)
    stage(sys.executable, "score.py", f"{folder}/heldout.rollouts.jsonl", "--out", f"{folder}/heldout.scored.jsonl", log=log)
    stage(sys.executable, "evaluate.py", f"{folder}/heldout.scored.jsonl", "--out", f"{folder}/heldout.eval.json", log=log)
    counts = {}
    with open(f"{folder}/heldout.scored.jsonl") as file:
        for row in map(json.loads, file):
            count = counts.setdefault(row["id"], [0, 0, set(), row["n_solutions"]])
            count[0] += 1
            count[1] += row["correct"]
            count[2] |= {row["solution"]} - {None}
    for file in ("heldout.rollouts.jsonl", "heldout.scored.jsonl"):
        os.remove(f"{folder}/{file}")
    with open(f"{folder}/heldout.eval.json") as file:
        report = json.load(file)["runs"][0]
    curve = []
    if flags is not None:
        with open(f"{folder}/round-{rounds:03d}/metrics.jsonl") as file:
            curve = [json.loads(line) for line in file]
    return {"pass_at_k": {k: cell["value"] for k, cell in report["pass_at_k"].items()}, "curve": curve,
            "counts": [[n, c, len(found), existing] for n, c, found, existing in counts.values()]}


class Progress:
    """Runs jobs side by side, hands each result over under a lock, and says how long the rest will take."""

    def __init__(self, jobs):
        self.jobs, self.lock = jobs, threading.Lock()

    def __call__(self, todo, keep):
        """todo: [(label, function, arguments)]; keep(label, result) stores one result."""
        began, done = time.monotonic(), 0
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            futures = {pool.submit(function, *arguments): label for label, function, arguments in todo}
            for future in concurrent.futures.as_completed(futures):
                with self.lock:
                    keep(futures[future], future.result())
                done += 1
                left = (time.monotonic() - began) / done * (len(todo) - done)
                print(f"{time.strftime('%H:%M')} {done}/{len(todo)} {' '.join(map(str, futures[future]))}: about {left / 3600:.1f} h left", flush=True)


def mean_pass(row):
    return sum(row.values()) / len(row)


def chosen(tuning, arm, lr=None):
    """The setting of an arm with the best mean of Pass@k over the tuned k, or None while it is incomplete."""
    table = {}
    for row in tuning:
        if row["arm"] == arm and lr in (None, row["lr"]):
            table.setdefault((row["setting"], row["lr"]), {})[row["k"]] = float(row["pass_at_k"])
    return max(table, key=lambda key: mean_pass(table[key])) if table else None


def tune(args, run):
    """Fill tuning.csv: the learning rate on GRPO first, then every arm's own candidates at that rate."""
    def todo(pairs):
        done = {(row["arm"], row["setting"], row["lr"]) for row in read_csv("tuning.csv")}
        return [((arm, " ".join(flags), lr), one_run, (f"paper/tune-{arm}-{i}-{lr}", flags, lr, args.rounds, TUNING_SEED, "main", "tune", 200, 128))
                for arm, i, flags, lr in pairs if (arm, " ".join(flags), lr) not in done]

    def keep(label, result):
        write_csv("tuning.csv", read_csv("tuning.csv") + [
            {"arm": label[0], "setting": label[1], "lr": label[2], "k": k, "pass_at_k": value} for k, value in result["pass_at_k"].items()])

    rates = todo(("grpo", 0, CANDIDATES["grpo"][0], lr) for lr in LEARNING_RATES)
    if args.list and rates:
        return print(f"tuning: {len(rates)} learning rates left, then the arms")
    run(rates, keep)
    lr = chosen(read_csv("tuning.csv"), "grpo")[1]
    wanted = [arm for arm in CANDIDATES if not args.arms or arm in args.arms or (arm == "ds-token" and {"ds-positive", "ds-negative"} & set(args.arms))]
    left = todo((arm, i, flags, lr) for arm in wanted for i, flags in enumerate(CANDIDATES[arm]) if len(CANDIDATES[arm]) > 1)
    if args.list:
        print(f"tuning: {len(left)} runs left at learning rate {lr}")
    else:
        run(left, keep)
    return lr


def settings(lr):
    """The chosen flags of every arm that is tuned; the halves of DS-GRPO are those of its tuned form."""
    tuning, found = read_csv("tuning.csv"), {"base": None}
    for arm, candidates in CANDIDATES.items():
        best = candidates[0] if len(candidates) == 1 else (chosen(tuning, arm, lr) or [None])[0]
        if best:
            found[arm] = best if isinstance(best, list) else best.split()
    if "ds-token" in found:
        for arm, gone in (("ds-positive", "--gamma-n"), ("ds-negative", "--gamma-p")):
            found[arm] = [value if found["ds-token"][max(i - 1, 0)] != gone else "0" for i, value in enumerate(found["ds-token"])]
    return found


def main():
    args = parse_args()
    run = Progress(args.jobs)
    lr = tune(args, run)
    if args.tune_only or args.list and not lr:
        return
    flags, done = settings(lr), {(row["arm"], row["distribution"], int(row["seed"])) for row in read_csv("results.csv")}
    wanted = [(arm, distribution, seed) for distribution in args.distributions for arm in ("base", *CORE, *FURTHER)
              for seed in args.seeds or range(1, 6 if (arm in CORE or arm == "base") and distribution == "main" else 4)
              if (arm in CORE or arm == "base" or distribution == "main") and (not args.arms or arm in args.arms) and arm in flags]
    wanted.sort(key=lambda job: (job[2], job[1] != "main", job[0] in FURTHER))  # whole tables of one seed come first
    todo = [((arm, distribution, seed), one_run, (f"paper/{arm}-{distribution}-{seed}", flags[arm], lr, args.rounds, seed, distribution, "test", 300, 256))
            for arm, distribution, seed in wanted if (arm, distribution, seed) not in done]

    def keep(label, result):
        arm, distribution, seed = label
        write_csv("results.csv", read_csv("results.csv") + [
            {"arm": arm, "distribution": distribution, "seed": seed, "k": k, "pass_at_k": value} for k, value in result["pass_at_k"].items()])
        if result["curve"]:
            write_csv("curves.csv", read_csv("curves.csv") + [
                {"arm": arm, "distribution": distribution, "seed": seed, **{key: line[key] for key in (
                    "step", "pass@1", "entropy", "entropy_correct", "entropy_wrong", "completion_len")}} for line in result["curve"]])
        with open(os.path.join(HERE, "counts.jsonl"), "a") as file:
            file.write(json.dumps({"arm": arm, "distribution": distribution, "seed": seed, "problems": result["counts"]}) + "\n")
        shutil.rmtree(os.path.join(ROOT, "runs", "paper", f"{arm}-{distribution}-{seed}"))

    grid = [(p, n) for p, n in GRID if not args.arms and (f"{p}", f"{n}") not in {(row["gamma_p"], row["gamma_n"]) for row in read_csv("gamma.csv")}]
    if args.list:
        return print(f"{len(todo)} runs and {len(grid)} of the gamma grid left: " + ", ".join(" ".join(map(str, label)) for label, _, _ in todo))
    run(todo, keep)
    run([(("gamma", p, n), one_run, (f"paper/gamma-{p}-{n}", ["--method", "ds-grpo", "--gamma-p", f"{p}", "--gamma-n", f"{n}"], lr, args.rounds, 1,
                                     "main", "test", 300, 256)) for p, n in grid],
        lambda label, result: write_csv("gamma.csv", read_csv("gamma.csv") + [
            {"gamma_p": label[1], "gamma_n": label[2], "k": k, "pass_at_k": value} for k, value in result["pass_at_k"].items()]))


if __name__ == "__main__":
    main()
