"""The README's experiment: every arm, several seeds, two distributions, from the embedded model on two CPU cores.

    python experiments/paper.py                                # tuning, then all reported runs; stop and restart it as you like
    python experiments/paper.py --arms grpo --seeds 7          # one arm with a new seed: one more row
    python experiments/paper.py --arms grpo --seeds 3 --check  # the same again, compared with the table instead of added to it
    python experiments/paper.py --list                         # what is done and what is left
    python experiments/paper.py --rounds 40 --tables experiments/long --arms grpo ds-token --seeds 1 2 3 --distributions main    # a longer one

Every arm has the same rollouts and updates: --rounds rounds of 192 problems x 16 samples, 4 updates each. What is tuned is tuned
on the tune split with seed 100 (experiments/tuning.csv: everything that was tried) by one rule, fixed beforehand: the learning rate is
the best for GRPO's Pass@1 and serves all; of an arm's own candidates (at most four), those whose Pass@1 is at least GRPO's less
0.01 stand for election, and the best mean of Pass@k over k = 1, 2, 4, .., 128 wins; where none does, the best Pass@1. All that is
reported comes from the test split and other seeds. A run is one core; --jobs of them go side by side, each a process that
imports the stages once and calls the main functions that run.sh calls as commands, with the same flags.

Writes, after every run, in experiments/ (all but tuning.csv in --tables): tuning.csv (arm, setting, lr, k, pass_at_k, chosen); results.csv (arm, distribution, seed, k, pass_at_k);
counts.jsonl (arm, distribution, seed, and for every held-out problem: n, correct, distinct solutions found, solutions that exist),
from which experiments/figures.py takes all intervals; curves.csv (training curves); gamma.csv (gamma_p, gamma_n, k, pass_at_k);
overhead.csv (pair, arm, cpu_s, peak_rss_mib: one round's train.py as a process, GRPO and the tuned DS-GRPO in turn).
Runs stand in runs/paper/.
"""
import argparse
import concurrent.futures
import contextlib
import csv
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)

DISTRIBUTIONS = {"main": "", "low-multiplicity": "--max-solutions 2"}
SAMPLING = "--max-new-tokens 24 --attention model"  # the table is older than --attention shared, whose rounding differs
GAMMAS = [(0.3, 0.03), (1.0, 0.1), (0.3, 0.0)]
# Each arm's candidates, at most four; one learning rate, tuned for GRPO, serves all.
CANDIDATES = {
    "grpo": ["--method grpo"],
    "ds-token": [f"--method ds-grpo --smooth-level token --gamma-p {p} --gamma-n {n}" for p, n in [*GAMMAS, (0.1, 0.01)]],
    "ds-sequence": [f"--method ds-grpo --smooth-level sequence --gamma-p {p} --gamma-n {n}" for p, n in GAMMAS],
    "ds-reward": [f"--method ds-grpo --smooth-level reward --gamma-p {p} --gamma-n {n}" for p, n in GAMMAS],
    "entropy-bonus": [f"--method grpo --entropy-coef {c}" for c in (0.02, 0.05, 0.1, 0.2)],
    "entropy-penalty": [f"--method grpo --entropy-coef {c}" for c in (-0.01, -0.03, -0.1)],
    "ds-entropy": [f"--method grpo --entropy-coef-correct {c} --entropy-coef-wrong {d}" for c, d in ((0.3, -0.03), (0.3, 0.03), (0.2, 0.0), (0.6, 0.0))],
    "passk": [f"--method experiments/arms.py:passk --arm k={k}" for k in (2, 4, 8)],
    "cispo": ["--method experiments/arms.py:cispo"],
    "w-reinforce": [f"--method experiments/arms.py:w_reinforce --arm positive_weight={w}" for w in (0.1, 0.3, 1.0)],
}
ROUNDS = 20
LEARNING_RATES = ("1e-4", "2e-4", "4e-4")
FURTHER = ("ds-token", "ds-sequence", "ds-reward", "ds-positive", "ds-negative", "passk", "cispo", "w-reinforce")  # less the level that is core
TUNING_SEED = 100
GRID = [(p, n) for p in (0.1, 0.3, 1.0) for n in (0.0, 0.03, 0.3)]  # the ablation over gamma_p x gamma_n, token level, seed 1


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=["base", *CANDIDATES, "ds-positive", "ds-negative"], help="only these arms (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds (default: 1..5 for the core arms, 1..3 for the others)")
    parser.add_argument("--distributions", nargs="+", choices=DISTRIBUTIONS, default=list(DISTRIBUTIONS), help="default: both")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="rounds of 4 updates in the reported runs (default %(default)s)")
    parser.add_argument("--lr", help="learning rate of the reported runs (default: the tuned one)")
    parser.add_argument("--tables", type=os.path.abspath, default=HERE, help="folder of the result tables (default: experiments)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one core each (default %(default)s)")
    parser.add_argument("--tune-only", action="store_true", help="stop after the tuning")
    parser.add_argument("--check", action="store_true", help="run --arms and --seeds again and compare with experiments/results.csv; exit 1 if any differs")
    parser.add_argument("--list", action="store_true", help="only say what is done and what is left")
    args = parser.parse_args()
    if args.check and not (args.arms and args.seeds):
        parser.error("--check needs --arms and --seeds")
    if args.tables == HERE and (args.rounds != ROUNDS or args.lr):
        parser.error("runs of other --rounds or --lr need --tables of their own")
    return args


def place(name):
    """Where a table stands. What the tuning found serves all experiments."""
    return os.path.join(HERE if name == "tuning.csv" else place.tables, name)


def read_csv(name):
    path = place(name)
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(name, rows):
    """Whole and at once: a killed suite leaves the old table or the new one."""
    path = place(name)
    with open(path + ".partial", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".partial", path)


def one_run(name, flags, lr, rounds, seed, distribution, split, problems, n):
    """Train (unless flags is None: the base model) and sample the held-out problems: the counts of every problem.
    A run that was stopped carries on from its last finished round."""
    os.chdir(ROOT)
    sys.path[:0] = [ROOT, os.path.join(ROOT, "data")]
    import countdown
    import evaluate
    import generate
    import score
    import torch
    import train
    torch.set_num_threads(1)
    folder, problem_flags, model = f"runs/{name}", DISTRIBUTIONS[distribution], "data/tiny-countdown"
    os.makedirs(folder, exist_ok=True)

    def stage(module, command):
        print(f"+ {module.__name__}.py {command}", file=sys.stderr)
        module.main(module.parse_args(command.split()))

    with open(f"{folder}/log.txt", "a") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        done = [int(entry[6:]) for entry in os.listdir(folder) if entry.startswith("round-") and entry[6:].isdigit()]
        for r in range(max(done, default=0) + 1, rounds + 1 if flags else 0):
            before, after = f"{folder}/round-{r - 1:03d}" if r > 1 else model, f"{folder}/round-{r:03d}"
            prompts, rollouts, scored = (f"{folder}/{kind}-{r:03d}.jsonl" for kind in ("prompts", "rollouts", "scored"))
            stage(countdown, f"--out {prompts} --n 192 --seed {seed * 100000 + r} --split train {problem_flags}")
            stage(generate, f"--model {before} --prompts {prompts} --out {rollouts} --n 16 {SAMPLING} --seed {seed * 100000 + r} --device cpu")
            stage(score, f"{rollouts} --out {scored}")
            stage(train, f"--model {before} --rollouts {scored} --out {after} --updates 4 --lr {lr} --seed {seed} --device cpu {flags}")
            for path in (prompts, rollouts, scored, *([before] if r > 1 else [])):
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
                os.remove(path + ".meta.json")
        model = f"{folder}/round-{rounds:03d}" if flags else model
        heldout, rollouts, scored, report = (f"{folder}/heldout.{kind}" for kind in ("jsonl", "rollouts.jsonl", "scored.jsonl", "eval.json"))
        stage(countdown, f"--out {heldout} --n {problems} --seed 1 --split {split} {problem_flags}")
        stage(generate, f"--model {model} --prompts {heldout} --out {rollouts} --n {n} {SAMPLING} --seed {10_000 + seed} --device cpu")
        stage(score, f"{rollouts} --out {scored}")
        stage(evaluate, f"{scored} --out {report}")
    counts, curve = {}, []
    with open(scored) as file:
        for row in map(json.loads, file):
            count = counts.setdefault(row["id"], [0, 0, set(), row["n_solutions"]])
            count[0] += 1
            count[1] += row["correct"]
            count[2] |= {row["solution"]} - {None}
    if flags:
        with open(f"{model}/metrics.jsonl") as file:
            curve = [json.loads(line) for line in file]
    with open(report) as file:
        passes = json.load(file)["runs"][0]["pass_at_k"]
    return {"pass_at_k": {k: cell["value"] for k, cell in passes.items()}, "curve": curve,
            "counts": [[n, c, len(found), existing] for n, c, found, existing in counts.values()]}


def attempt(label, arguments):
    try:
        return one_run(*arguments)
    except SystemExit as error:  # a stage's refusal, told in the run's log
        raise RuntimeError(f"{label}: a stage ended with {error}; see runs/{arguments[0]}/log.txt") from error


def run(todo, keep, jobs):
    """Run todo, [(label, arguments of one_run)], side by side, a fresh process each; keep(label, result) stores each result."""
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    with concurrent.futures.ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(attempt, label, arguments): (label, arguments[0]) for label, arguments in todo}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            label, name = futures[future]
            keep(label, future.result())
            shutil.rmtree(os.path.join(ROOT, "runs", name))  # its figures are kept
            left = (time.monotonic() - began) / done * (len(todo) - done)
            print(f"{time.strftime('%H:%M')} {done}/{len(todo)} {' '.join(map(str, label))}: about {left / 3600:.1f} h left here", flush=True)


def table_of(arm, lr=None):
    """{(setting, lr): {k: pass_at_k}} of an arm in tuning.csv, at one learning rate or all."""
    table = {}
    for row in read_csv("tuning.csv"):
        if row["arm"] == arm and lr in (None, row["lr"]):
            table.setdefault((row["setting"], row["lr"]), {})[row["k"]] = float(row["pass_at_k"])
    return table


def chosen_rate():
    return max((passes["1"], lr) for (_, lr), passes in table_of("grpo").items())[1]


def chosen(arm, lr):
    """The setting of an arm by the rule above; of 'ds', by the same rule, among all three smoothing levels."""
    least = table_of("grpo", lr)[CANDIDATES["grpo"][0], lr]["1"] - 0.01
    arms = ["ds-token", "ds-sequence", "ds-reward"] if arm == "ds" else [arm]
    table = {setting: passes for one in arms for (setting, _), passes in table_of(one, lr).items()}
    return max(((passes["1"] >= least, sum(passes.values()) / len(passes) if passes["1"] >= least else passes["1"]), setting)
               for setting, passes in table.items())[1]


def tune(arms, lr):
    """What run() has to do for tuning.csv to hold every candidate of these arms at this learning rate."""
    done = {(row["arm"], row["setting"], row["lr"]) for row in read_csv("tuning.csv")}
    return [((arm, setting, lr), (f"paper/tune-{arm}-{i}-{lr}", setting, lr, ROUNDS, TUNING_SEED, "main", "tune", 200, 128))
            for arm in arms for i, setting in enumerate(CANDIDATES[arm]) if (arm, setting, lr) not in done]


def setting_of(arm, lr, level):
    """The flags with which an arm is reported; the halves of DS-GRPO are those of its tuned form, of the chosen smoothing level."""
    if arm == "base":
        return None
    if arm in ("ds-positive", "ds-negative"):
        return re.sub(r"(--gamma-n) \S+" if arm == "ds-positive" else r"(--gamma-p) \S+", r"\1 0", chosen(level, lr))
    return chosen(arm, lr) if len(CANDIDATES[arm]) > 1 else CANDIDATES[arm][0]


def keep_tuning(label, result):
    arm, setting, lr = label
    write_csv("tuning.csv", read_csv("tuning.csv") + [
        {"arm": arm, "setting": setting, "lr": lr, "k": k, "pass_at_k": value, "chosen": ""} for k, value in result["pass_at_k"].items()])


def mark_chosen(lr, level):
    """Say in tuning.csv which settings the rule chose."""
    settings = [setting_of(arm, lr, level) for arm in CANDIDATES if table_of(arm, lr)]
    rows = [{**row, "chosen": "yes" if row["lr"] == lr and row["setting"] in settings else ""} for row in read_csv("tuning.csv")]
    if rows != read_csv("tuning.csv"):
        write_csv("tuning.csv", rows)


def keep_result(label, result):
    arm, distribution, seed = label
    name = {"arm": arm, "distribution": distribution, "seed": seed}
    with open(place("counts.jsonl"), "a") as file:
        file.write(json.dumps({**name, "problems": result["counts"]}) + "\n")
    if result["curve"]:
        write_csv("curves.csv", read_csv("curves.csv") + [{**name, **{key: line[key] for key in (
            "step", "pass@1", "entropy", "entropy_correct", "entropy_wrong", "completion_len")}} for line in result["curve"]])
    write_csv("results.csv", read_csv("results.csv") + [{**name, "k": k, "pass_at_k": value} for k, value in result["pass_at_k"].items()])


def keep_gamma(label, result):
    write_csv("gamma.csv", read_csv("gamma.csv") + [
        {"gamma_p": label[1], "gamma_n": label[2], "k": k, "pass_at_k": value} for k, value in result["pass_at_k"].items()])


def overhead(pairs, flags, lr):
    """CPU time and peak memory of train.py on the base model's own rollouts: (arm, flags) in turn, `pairs` times, one core each."""
    folder = os.path.join(ROOT, "runs", "paper", "overhead")
    shutil.rmtree(folder, ignore_errors=True)  # what a stopped attempt left would be found complete, in no time
    os.makedirs(folder)

    def stage(command):
        process = subprocess.Popen([sys.executable, *command.split()], cwd=ROOT, stderr=subprocess.PIPE, env={**os.environ, "OMP_NUM_THREADS": "1"})
        err = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{command}: {err.decode()}")
        return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_rss_mib": usage.ru_maxrss / 1024}

    stage(f"data/countdown.py --out {folder}/prompts.jsonl --n 192 --seed 1 --split train")
    stage(f"generate.py --model data/tiny-countdown --prompts {folder}/prompts.jsonl --out {folder}/rollouts.jsonl --n 16 --max-new-tokens 24 --device cpu")
    stage(f"score.py {folder}/rollouts.jsonl --out {folder}/scored.jsonl")
    rows = []
    for pair in range(pairs):
        for arm, setting in flags[::1 - pair % 2 * 2]:  # the other one first in every second pair
            rows.append({"pair": pair, "arm": arm, **stage(
                f"train.py --model data/tiny-countdown --rollouts {folder}/scored.jsonl --out {folder}/{arm}-{pair} --updates 4 --lr {lr} --device cpu {setting}")})
            write_csv("overhead.csv", rows)
    shutil.rmtree(folder)


def check(label, result):
    """Compare a repeated run with results.csv: 'equal' to the last digit, or by how much it differs."""
    stored = {row["k"]: float(row["pass_at_k"]) for row in read_csv("results.csv")
              if (row["arm"], row["distribution"], int(row["seed"])) == label}
    if not stored:
        raise SystemExit(f"{label}: not in experiments/results.csv; run it without --check first")
    worst = max(abs(stored[str(k)] - value) for k, value in result["pass_at_k"].items())
    check.differ = getattr(check, "differ", 0) + (worst > 0)
    print(f"{' '.join(map(str, label))}: " + ("equal" if not worst else f"Pass@k differs by up to {worst:.4f}"))


def main():
    args = parse_args()
    place.tables, folder = args.tables, f"paper/{'' if args.tables == HERE else os.path.basename(args.tables) + '-'}"
    os.makedirs(args.tables, exist_ok=True)

    def phase(name, todo, keep):
        if args.list:
            print(f"{name}: {len(todo)} runs left" + "".join(f"\n  {' '.join(map(str, label))}" for label, _ in todo))
            if todo and keep is keep_tuning:
                raise SystemExit("what follows depends on these")
        elif todo:
            print(f"{name}: {len(todo)} runs", flush=True)
            run(todo, keep, args.jobs)

    def reported(arms, level):
        stored = {(row["arm"], row["distribution"], int(row["seed"])) for row in read_csv("results.csv")}
        jobs = [(arm, distribution, seed) for arm in arms if not args.arms or arm in args.arms for distribution in args.distributions
                for seed in args.seeds or range(1, 6 if arm in core and distribution == "main" else 4)
                if arm in core or distribution == "main"]
        jobs.sort(key=lambda job: (job[2] > 3, job[1] != "main", job[2]))  # three seeds of everything, then the other two
        return [(job, (f"{folder}{'check-' * args.check}{'-'.join(map(str, job))}", setting_of(job[0], lr, level), rate, args.rounds, job[2], job[1],
                       "test", 300, 256)) for job in jobs if args.check or job not in stored]

    phase("learning rate", [job for rate in LEARNING_RATES for job in tune(["grpo"], rate)], keep_tuning)
    lr = chosen_rate()
    rate = args.lr or lr
    phase("tuning of the core arms", tune(["ds-token", "ds-sequence", "ds-reward", "entropy-bonus", "entropy-penalty", "ds-entropy"], lr),
          keep_tuning)
    level = "ds-" + chosen("ds", lr).split("--smooth-level ")[1].split()[0]
    core = ("base", "grpo", level, "ds-entropy", "entropy-bonus", "entropy-penalty")
    further = [arm for arm in FURTHER if arm not in core]
    if not args.list:
        mark_chosen(lr, level)
    if args.tune_only:
        return
    store = check if args.check else keep_result
    phase("core arms", reported(core, level), store)
    if not args.arms or set(args.arms) & set(further):
        phase("tuning of the further arms", tune(["passk", "w-reinforce"], lr), keep_tuning)
        if not args.list:
            mark_chosen(lr, level)
        phase("further arms", reported(further, level), store)
    if not args.arms:
        there = {(row["gamma_p"], row["gamma_n"]) for row in read_csv("gamma.csv")}
        phase("gamma grid", [(("gamma", p, n), (f"{folder}gamma-{p}-{n}", f"--method ds-grpo --gamma-p {p} --gamma-n {n}", rate, args.rounds, 1, "main",
                                                "test", 300, 256)) for p, n in GRID if (f"{p}", f"{n}") not in there], keep_gamma)
        if not args.list and len(read_csv("overhead.csv")) < 20:
            overhead(10, [("grpo", CANDIDATES["grpo"][0]), (level, setting_of(level, lr, level))], rate)
    if args.check:
        sys.exit(getattr(check, "differ", 0) > 0)


if __name__ == "__main__":
    main()
