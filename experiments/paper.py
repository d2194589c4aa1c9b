"""The strong base's table: every arm, several seeds, two distributions, on two CPU cores.

    python experiments/paper.py                                 # everything; may be stopped
    python experiments/paper.py --arms grpo --seeds 7           # one arm with a new seed
    python experiments/paper.py --arms grpo --seeds 3 --check   # again, compared instead of added
    python experiments/paper.py --list                          # what is done and what is left
    python experiments/paper.py --rounds 40 --tables experiments/long --arms grpo ds-token \\
        --seeds 1 2 3 --distributions main                      # a longer one

Every arm starts from data/tiny-countdown and has the same rollouts and updates: --rounds rounds of
192 problems x 16 samples, 4 updates each. What is tuned is tuned on the tune split with seed 100
(experiments/tuning.csv: everything that was tried) by one rule, fixed beforehand. The learning rate
is the best for GRPO's Pass@1 and serves all. Of an arm's own candidates, at most four, those whose
Pass@1 is at least GRPO's less 0.01 stand for election, and the best mean of Pass@k over k = 1, 2,
4, .., 128 wins; where none does, the best Pass@1. All that is reported comes from the test split
and other seeds. A run is one core; --jobs of them go side by side (experiments/suite.py).

Writes, after every run, in experiments/ (all but tuning.csv in --tables):
    tuning.csv     arm, setting, lr, k, pass_at_k, chosen
    endpoints.csv  arm, distribution, seed, k, pass_at_k
    counts.jsonl   arm, distribution, seed, and for every held-out problem: n, correct, distinct
                   solutions found, solutions that exist; experiments/figures.py takes all
                   intervals from it
    curves.csv     training curves
    gamma.csv      gamma_p, gamma_n, k, pass_at_k
    overhead.csv   pair, arm, cpu_s, peak_rss_mib: one round's train.py as a process, GRPO and the
                   tuned DS-GRPO in turn
Runs stand in runs/paper/.
"""
import argparse
import functools
import json
import os
import re
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from experiments import suite
from experiments.suite import run

DISTRIBUTIONS = {"main": "", "low-multiplicity": "--max-solutions 2"}
# The table is older than --attention shared, whose rounding differs.
SAMPLING = "--max-new-tokens 24 --attention model --device cpu"
GAMMAS = [(0.3, 0.03), (1.0, 0.1), (0.3, 0.0)]
ARMS = "experiments/arms.py"


def smoothed(level, gammas):
    return [f"--method ds-grpo --smooth-level {level} --gamma-p {p} --gamma-n {n}"
            for p, n in gammas]


# Each arm's candidates, at most four; one learning rate, tuned for GRPO, serves all.
CANDIDATES = {
    "grpo": ["--method grpo"],
    "ds-token": smoothed("token", [*GAMMAS, (0.1, 0.01)]),
    "ds-sequence": smoothed("sequence", GAMMAS),
    "ds-reward": smoothed("reward", GAMMAS),
    "entropy-bonus": [f"--method grpo --entropy-coef {c}" for c in (0.02, 0.05, 0.1, 0.2)],
    "entropy-penalty": [f"--method grpo --entropy-coef {c}" for c in (-0.01, -0.03, -0.1)],
    "ds-entropy": [f"--method grpo --entropy-coef-correct {c} --entropy-coef-wrong {d}"
                   for c, d in ((0.3, -0.03), (0.3, 0.03), (0.2, 0.0), (0.6, 0.0))],
    "passk": [f"--method {ARMS}:passk --arm k={k}" for k in (2, 4, 8)],
    "cispo": [f"--method {ARMS}:cispo"],
    "w-reinforce": [f"--method {ARMS}:w_reinforce --arm positive_weight={w}"
                    for w in (0.1, 0.3, 1.0)],
}
ROUNDS = 20
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
LEVELS = ("ds-token", "ds-sequence", "ds-reward")
TUNED = (*LEVELS, "entropy-bonus", "entropy-penalty", "ds-entropy")  # of the core arms
FURTHER = (*LEVELS, "ds-positive", "ds-negative", "passk", "cispo", "w-reinforce")
TUNING_SEED = 100
# The ablation over gamma_p x gamma_n: token level, seed 1.
GRID = [(p, n) for p in (0.1, 0.3, 1.0) for n in (0.0, 0.03, 0.3)]
CURVES = ("step", "pass@1", "entropy", "entropy_correct", "entropy_wrong", "completion_len")


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # Which runs
    parser.add_argument("--arms", nargs="+",
                        choices=["base", *CANDIDATES, "ds-positive", "ds-negative"],
                        help="only these arms (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int,
                        help="these seeds (default: 1..5 for the core arms, 1..3 for the others)")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS,
                        default=list(DISTRIBUTIONS), help="default: both")
    parser.add_argument("--rounds", type=int, default=ROUNDS,
                        help="rounds of 4 updates in the reported runs (default %(default)s)")
    parser.add_argument("--lr", help="learning rate of the reported runs (default: the tuned one)")
    parser.add_argument("--tune-only", action="store_true", help="stop after the tuning")
    # What to do with them
    parser.add_argument("--check", action="store_true",
                        help="run --arms and --seeds again and compare with endpoints.csv; exit 1 "
                        "if any differs")
    parser.add_argument("--list", action="store_true", help="only say what is done and left")
    # Where and how
    parser.add_argument("--tables", type=os.path.abspath, default=HERE,
                        help="folder of the result tables (default: experiments)")
    parser.add_argument("--jobs", type=int, default=2,
                        help="runs side by side, one core each (default %(default)s)")
    args = parser.parse_args()
    if args.check and not (args.arms and args.seeds):
        parser.error("--check needs --arms and --seeds")
    if args.tables == HERE and (args.rounds != ROUNDS or args.lr):
        parser.error("runs of other --rounds or --lr need --tables of their own")
    return args


# ---- Tables --------------------------------------------------------------------------------------
def place(name):
    """Where a table stands. What the tuning found serves all experiments."""
    return os.path.join(HERE if name == "tuning.csv" else place.tables, name)


def read_csv(name):
    return suite.read_csv(place(name))


def append_csv(name, rows):
    suite.write_csv(place(name), read_csv(name) + rows)


def keep_tuning(label, result):
    arm, setting, lr = label
    append_csv("tuning.csv", [
        {"arm": arm, "setting": setting, "lr": lr, "k": k, "pass_at_k": value, "chosen": ""}
        for k, value in result["pass_at_k"].items()])


def keep_result(label, result):
    arm, distribution, seed = label
    name = {"arm": arm, "distribution": distribution, "seed": seed}
    with open(place("counts.jsonl"), "a") as file:
        file.write(json.dumps({**name, "problems": result["counts"]}) + "\n")
    if result["curve"]:
        append_csv("curves.csv", [{**name, **{key: line[key] for key in CURVES}}
                                  for line in result["curve"]])
    append_csv("endpoints.csv", [{**name, "k": k, "pass_at_k": value}
                                 for k, value in result["pass_at_k"].items()])


def keep_gamma(label, result):
    append_csv("gamma.csv", [
        {"gamma_p": label[1], "gamma_n": label[2], "k": k, "pass_at_k": value}
        for k, value in result["pass_at_k"].items()])


def compare(differ, label, result):
    """Compare a repeated run with endpoints.csv: 'equal' to the last digit, or by how much not.

    differ: a list that takes the labels of runs that are not equal.
    """
    stored = {row["k"]: float(row["pass_at_k"]) for row in read_csv("endpoints.csv")
              if (row["arm"], row["distribution"], int(row["seed"])) == label}
    if not stored:
        raise SystemExit(f"{label}: not in endpoints.csv; run it without --check first")
    worst = max(abs(stored[str(k)] - value) for k, value in result["pass_at_k"].items())
    if worst:
        differ.append(label)
    verdict = f"Pass@k differs by up to {worst:.4f}" if worst else "equal"
    print(f"{' '.join(map(str, label))}: {verdict}")


# ---- A run ---------------------------------------------------------------------------------------
def one_run(name, flags, lr, rounds, seed, distribution, split, problems, n):
    """Train (unless flags is None: the base model) and sample the held-out problems.

    Returns Pass@k, the training curve and the counts of every problem. A run that was stopped
    carries on from its last finished round.
    """
    folder, base = f"runs/{name}", "data/tiny-countdown"
    only = DISTRIBUTIONS[distribution]
    with suite.inside(folder):
        for number in range(suite.last_round(folder) + 1, (rounds if flags else 0) + 1):
            before, after = (suite.model_of(folder, r, base) for r in (number - 1, number))
            draw = f"--n 192 --seed {seed * 100000 + number} --split train {only}"
            sample = f"--n 16 {SAMPLING} --seed {seed * 100000 + number}"
            scored = suite.sampled(f"{folder}/{number:03d}", before, draw, sample)
            suite.stage("train", f"--model {before} --rollouts {scored} --out {after} --updates 4 "
                                 f"--lr {lr} --seed {seed} --device cpu {flags}")
            suite.discard(scored, *([before] if number > 1 else []))
        model = suite.model_of(folder, rounds if flags else 0, base)
        stem = f"{folder}/heldout"
        report = suite.evaluated(stem, model, f"--n {problems} --seed 1 --split {split} {only}",
                                 f"--n {n} {SAMPLING} --seed {10_000 + seed}")
        curve = []
        if flags:
            with open(f"{model}/metrics.jsonl") as file:
                curve = [json.loads(line) for line in file]
        return {"pass_at_k": {k: cell["value"] for k, cell in report["pass_at_k"].items()},
                "curve": curve, "counts": counts_of(f"{stem}.scored.jsonl")}


def counts_of(scored):
    """[[n, correct, distinct solutions found, solutions that exist] of every problem]."""
    counts = {}
    with open(scored) as file:
        for row in map(json.loads, file):
            count = counts.setdefault(row["id"], [0, 0, set(), row["n_solutions"]])
            count[0] += 1
            count[1] += row["correct"]
            count[2] |= {row["solution"]} - {None}
    return [[n, correct, len(found), existing] for n, correct, found, existing in counts.values()]


def overhead(pairs, flags, lr):
    """CPU time and peak memory of train.py on the base model's own rollouts.

    flags: [(arm, flags of train.py)], run in turn, `pairs` times, one core each.
    """
    folder = os.path.join(ROOT, "runs", "paper", "overhead")
    shutil.rmtree(folder, ignore_errors=True)  # or a half-done attempt would be found complete
    os.makedirs(folder)
    model, device = "--model data/tiny-countdown", "--device cpu"

    def stage(command):
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT,
                                   stderr=subprocess.PIPE,
                                   env={**os.environ, "OMP_NUM_THREADS": "1"})
        err = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command}: {err.decode()}")
        return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_mib": usage.ru_maxrss / 1024}

    stage(f"data/countdown.py --out {folder}/prompts.jsonl --n 192 --seed 1 --split train")
    stage(f"generate.py {model} --prompts {folder}/prompts.jsonl --out {folder}/rollouts.jsonl "
          f"--n 16 --max-new-tokens 24 {device}")
    stage(f"score.py {folder}/rollouts.jsonl --out {folder}/scored.jsonl")
    rows = []
    for pair in range(pairs):
        for arm, setting in flags[::-1 if pair % 2 else 1]:  # the other one first every second time
            cost = stage(f"train.py {model} --rollouts {folder}/scored.jsonl "
                         f"--out {folder}/{arm}-{pair} --updates 4 --lr {lr} {device} {setting}")
            rows.append({"pair": pair, "arm": arm, **cost})
            suite.write_csv(place("overhead.csv"), rows)
    shutil.rmtree(folder)


# ---- What was chosen -----------------------------------------------------------------------------
def table_of(arm, lr=None):
    """{(setting, lr): {k: pass_at_k}} of an arm in tuning.csv, at one learning rate or all."""
    table = {}
    for row in read_csv("tuning.csv"):
        if row["arm"] == arm and lr in (None, row["lr"]):
            passes = table.setdefault((row["setting"], row["lr"]), {})
            passes[row["k"]] = float(row["pass_at_k"])
    return table


def chosen_rate():
    return max((passes["1"], lr) for (_, lr), passes in table_of("grpo").items())[1]


def chosen(arm, lr):
    """The setting of an arm by the rule; of "ds", by the same rule, among all smoothing levels."""
    least = table_of("grpo", lr)[CANDIDATES["grpo"][0], lr]["1"] - 0.01
    rated = []
    for one in LEVELS if arm == "ds" else [arm]:
        for (setting, _), passes in table_of(one, lr).items():
            stands = passes["1"] >= least
            value = sum(passes.values()) / len(passes) if stands else passes["1"]
            rated.append((stands, value, setting))
    return max(rated)[2]


def setting_of(arm, lr, level):
    """The flags with which an arm is reported; None for the base.

    The halves of DS-GRPO are those of its tuned form, of the chosen smoothing level.
    """
    if arm == "base":
        return None
    if arm == "ds-positive":
        return re.sub(r"(--gamma-n) \S+", r"\1 0", chosen(level, lr))
    if arm == "ds-negative":
        return re.sub(r"(--gamma-p) \S+", r"\1 0", chosen(level, lr))
    return chosen(arm, lr) if len(CANDIDATES[arm]) > 1 else CANDIDATES[arm][0]


def mark_chosen(lr, level):
    """Say in tuning.csv which settings the rule chose."""
    settings = [setting_of(arm, lr, level) for arm in CANDIDATES if table_of(arm, lr)]
    before = read_csv("tuning.csv")
    rows = [{**row, "chosen": "yes" if row["lr"] == lr and row["setting"] in settings else ""}
            for row in before]
    if rows != before:
        suite.write_csv(place("tuning.csv"), rows)


# ---- What is to be run ---------------------------------------------------------------------------
def tune(arms, lr):
    """The runs after which tuning.csv holds every candidate of these arms at a learning rate."""
    done = {(row["arm"], row["setting"], row["lr"]) for row in read_csv("tuning.csv")}
    return [((arm, setting, lr), (f"paper/tune-{arm}-{i}-{lr}", setting, lr, ROUNDS, TUNING_SEED,
                                  "main", "tune", 200, 128))
            for arm in arms for i, setting in enumerate(CANDIDATES[arm])
            if (arm, setting, lr) not in done]


def reported(args, arms, core, lr, level):
    """The reported runs of these arms that are left; with --check those that were asked for.

    Core arms have five seeds, and three of the other distribution; the others three.
    """
    stored = {(row["arm"], row["distribution"], int(row["seed"]))
              for row in read_csv("endpoints.csv")}
    labels = []
    for arm in arms if not args.arms else [arm for arm in arms if arm in args.arms]:
        for distribution in args.distributions:
            if arm not in core and distribution != "main":
                continue
            most = 5 if arm in core and distribution == "main" else 3
            seeds = args.seeds or range(1, most + 1)
            labels += [(arm, distribution, seed) for seed in seeds]
    # Three seeds of everything, then the other two.
    labels.sort(key=lambda label: (label[2] > 3, label[1] != "main", label[2]))
    return [(label, (f"{folder_of(args)}{'check-' * args.check}{'-'.join(map(str, label))}",
                     setting_of(label[0], lr, level), args.lr or lr, args.rounds, label[2],
                     label[1], "test", 300, 256))
            for label in labels if args.check or label not in stored]


def gamma_grid(args, lr):
    """The runs of the grid that are left."""
    done = {(row["gamma_p"], row["gamma_n"]) for row in read_csv("gamma.csv")}
    return [(("gamma", p, n), (f"{folder_of(args)}gamma-{p}-{n}",
                               f"--method ds-grpo --gamma-p {p} --gamma-n {n}", args.lr or lr,
                               args.rounds, 1, "main", "test", 300, 256))
            for p, n in GRID if (f"{p}", f"{n}") not in done]


def folder_of(args):
    """In which folder under runs/ the runs of an experiment stand, a prefix of their names."""
    return "paper/" + ("" if args.tables == HERE else f"{os.path.basename(args.tables)}-")


def phase(args, name, todo, keep):
    """Do these runs, or with --list name them."""
    if args.list:
        left = "".join(f"\n  {' '.join(map(str, label))}" for label, _ in todo)
        print(f"{name}: {len(todo)} runs left{left}")
        if todo and keep is keep_tuning:
            raise SystemExit("what follows depends on these")
    elif todo:
        print(f"{name}: {len(todo)} runs", flush=True)
        run(one_run, todo, keep, args.jobs)


def main():
    args = parse_args()
    place.tables = args.tables
    os.makedirs(args.tables, exist_ok=True)
    rates = [job for rate in LEARNING_RATES for job in tune(["grpo"], rate)]
    phase(args, "learning rate", rates, keep_tuning)
    lr = chosen_rate()
    phase(args, "tuning of the core arms", tune(TUNED, lr), keep_tuning)
    level = "ds-" + chosen("ds", lr).split("--smooth-level ")[1].split()[0]
    core = ("base", "grpo", level, "ds-entropy", "entropy-bonus", "entropy-penalty")
    further = [arm for arm in FURTHER if arm not in core]
    if not args.list:
        mark_chosen(lr, level)
    if args.tune_only:
        return
    differ = []
    keep = functools.partial(compare, differ) if args.check else keep_result
    phase(args, "core arms", reported(args, core, core, lr, level), keep)
    if not args.arms or set(args.arms) & set(further):
        phase(args, "tuning of the further arms", tune(["passk", "w-reinforce"], lr), keep_tuning)
        if not args.list:
            mark_chosen(lr, level)
        phase(args, "further arms", reported(args, further, core, lr, level), keep)
    if not args.arms:
        phase(args, "gamma grid", gamma_grid(args, lr), keep_gamma)
        if not args.list and len(read_csv("overhead.csv")) < 20:
            arms = [(arm, setting_of(arm, lr, level)) for arm in ("grpo", level)]
            overhead(10, arms, args.lr or lr)
    if args.check:
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
