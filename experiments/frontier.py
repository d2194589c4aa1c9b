"""The frontier: Pass@1 against Pass@256 along the way of every run, in three regimes.

    python experiments/frontier.py             # everything; stop and restart it as you like
    python experiments/frontier.py --list      # what is left
    python experiments/frontier.py --regimes weak-base --arms grpo ds-token --seeds 1 2 3
    python experiments/frontier.py --regimes weak-base --arms grpo --seeds 1 --check --until 5
    python experiments/frontier.py --device cuda --jobs 14     # many runs share one GPU
    python experiments/figures.py             # the figure, and a summary in Markdown

Regimes: `weak-base` trains data/weak-countdown/ and `strong-base` data/tiny-countdown/ on fresh
problems every round; `fixed` trains the strong base on the same 192 problems every round (others
for each seed). A round is 192 problems x 16 samples and 4 updates. At four of a run's twenty rounds
(ROUNDS has the exceptions; in the fixed regime and at the second rate only after ten and twenty)
the policy is sampled on 300 held-out problems, 256 times each; in the fixed regime on its own
training problems, too (split "train"). So that a learning rate is not mistaken for a method, GRPO,
DS-GRPO and each of them with rehearsal are run at a second one. The neighbours run ten rounds from
the weak base with two seeds; the FINALISTS, the best two of them by the rule below, run twenty from
both bases, evaluated after ten and twenty.

Rehearsal arms first sample the base on 1,500 training problems: 32 times each, then those with at
most one right answer as many times in all (fixed: 250 times on their 192). That is 96,000 rollouts,
worth 31 rounds, in a file that the arms of a seed share; arms named -even spend them evenly. What
is learned is drawn evenly from a problem's distinct right answers, in arms named -samples from its
right rollouts. `rehearsal` is rehearsal alone, with advantage 0. `grpo-longer` is GRPO after 51
rounds, that is with as many rollouts as a rehearsal arm has after 20; `grpo-rehearsal-longer` has
51 rounds, too, with a smaller weight of rehearsal from the eleventh on.

What is tuned is tuned on the tune split by this rule, fixed before any reported run: for each
base, by runs of ten rounds with seeds 101 and 102, on 200 problems with 128 samples each; what is
compared is the mean over the two seeds. First the learning rate: of three, the best for GRPO's
Pass@1 serves all arms, and the second best is the second rate of --rates. Then, at the best rate,
each arm's candidates: those whose Pass@1 is at least GRPO's less 0.01 stand for election, and the
best mean of Pass@k over k = 1, 2, 4, .., 128 wins; where none does, the best Pass@1. The weight
of rehearsal is 1 by hand. What is made of several arms has the settings chosen for its parts,
`fixed` those of the strong base, a neighbour those of the weak one, the second rate those of the
best. All that is reported comes from the test split and from other seeds; the finalists alone were
chosen by it: by test seeds 1 and 2 after ten rounds.

Added when results were known, each all at once: seeds 6 to 10 of the base and GRPO + rehearsal on
the strong base; 4 and 5 of the arms in the fixed regime and at the second rate that have them;
grpo-rehearsal-longer, whose later weight, 0.3, was chosen by hand on the strong base's tune split;
the -samples arms; maxrl, rs and ucpo; and the finalists.

Writes, after every run, in --tables:
  results.csv          regime, arm, lr, seed, round, split, k, pass_at_k; the base has lr 0, round 0
  checkpoints.csv      regime, arm, lr, seed, round, split, setting (of flags_of), coverage,
                       distinct, completion_len, entropy (of the round's rollouts), train_s (seconds
                       of train.py's updates so far), device, commit (whose code made the run:
                       later ones may draw other random numbers)
  frontier_tuning.csv  regime, arm, lr, setting, seed, k, pass_at_k: everything that was tried
Runs stand in runs/frontier/ until their figures are in the tables; what is rehearsed stays there,
65 MB a regime and seed, and --check samples it anew only where it is gone.
"""
import argparse
import collections
import fcntl
import functools
import itertools
import os
import re
import shutil
import statistics
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.dirname(HERE))
from experiments.suite import (
    discard, follow, inside, measure, read_csv, run, sampled, stage, verified, write_csv)

MODELS = {"weak-base": "data/weak-countdown", "strong-base": "data/tiny-countdown",
          "fixed": "data/tiny-countdown"}
RATES = ("5e-5", "1e-4", "2e-4")
CHECKPOINTS = (5, 10, 15, 20)  # rounds after which a run is evaluated; the last one ends it
TUNING_ROUNDS, TUNING_SEEDS = 10, (101, 102)
SAMPLING = "--max-new-tokens 24"
# What is rehearsed: problems, and the base's samples of each; the hard ones share as many again.
REHEARSED = {"weak-base": (1500, 32), "strong-base": (1500, 32), "fixed": (192, 250)}
# Flags of generate.py and of train.py: fp32 everywhere, and on a GPU few and large passes.
DEVICES = {"cpu": ("--device cpu", "--device cpu"),
           "cuda": ("--device cuda --dtype float32 --max-batch-tokens 1000000",
                    "--device cuda --dtype float32 --micro-batch-tokens 65536")}

# Each arm's candidates, flags of train.py; where there is one, there is nothing to tune.
DS = "--method ds-grpo --smooth-level token"
# FILE: the base's rows, sampled when the run begins.
REHEARSE = "--rehearse FILE --rehearse-weight distinct --rehearse-coef"
CANDIDATES = {
    "base": [""],
    "grpo": ["--method grpo"],
    "ds-token": [f"{DS} --gamma-p {p} --gamma-n {n}"
                 for p, n in ((0.3, 0.03), (1.0, 0.03), (3.0, 0.1))],
    "entropy-bonus": [f"--method grpo --entropy-coef {c}" for c in (0.003, 0.01, 0.03)],
    "entropy-penalty": [f"--method grpo --entropy-coef {c}" for c in (-0.01, -0.03)],
    "ds-entropy": [f"--method grpo --entropy-coef-correct {c} --entropy-coef-wrong {d}"
                   for c, d in ((0.2, 0.0), (0.6, 0.0), (0.3, -0.03))],
    "grpo-rehearsal": [f"--method grpo {REHEARSE} 1.0"],
    "passk": ["--method experiments/arms.py:passk --arm k=4"],
    "cispo": ["--method experiments/arms.py:cispo"],
    "w-reinforce": ["--method experiments/arms.py:w_reinforce --arm positive_weight=0.1"],
    "focal": ["--method experiments/arms.py:focal"],
    "unlikeliness": ["--method experiments/arms.py:unlikeliness"],
    "boundary": ["--method experiments/arms.py:boundary"],
    "unsolved": ["--method experiments/arms.py:unsolved"],
    "oreal": ["--method experiments/arms.py:oreal"],
    "drpo": ["--method experiments/arms.py:drpo"],
    "maxrl": ["--method experiments/arms.py:maxrl"],
    "rs": [f"--method experiments/arms.py:rs --arm beta={beta}" for beta in (2, 4, 8)],
    "ucpo": [f"--method experiments/arms.py:ucpo --arm tau={tau}" for tau in (0.1, 0.2, 0.4)],
}
# The arms that are made of what was chosen for others, and what is added; of a flag given twice
# train.py takes the last.
ALONE, BY_SAMPLES = "--method experiments/arms.py:nothing", "--rehearse-weight samples"
PARTS = {"ds-positive": ["ds-token", "--gamma-n 0"], "ds-negative": ["ds-token", "--gamma-p 0"],
         "grpo-longer": ["grpo"], "rehearsal": ["grpo-rehearsal", ALONE],
         "ds-rehearsal": ["grpo-rehearsal", "ds-token"],
         "ds-entropy-rehearsal": ["grpo-rehearsal", "ds-entropy"],
         "grpo-rehearsal-longer": ["grpo-rehearsal", "from round 11 on --rehearse-coef 0.3"],
         "rehearsal-samples": ["grpo-rehearsal", ALONE, BY_SAMPLES],
         "grpo-rehearsal-samples": ["grpo-rehearsal", BY_SAMPLES]}
SAMPLES = ("rehearsal-samples", "grpo-rehearsal-samples")
EVEN = tuple(f"{arm}-even" for arm in ("rehearsal", "grpo-rehearsal", "ds-rehearsal"))
ARMS = (*CANDIDATES, *PARTS, *EVEN)
NEIGHBOURS = ("passk", "cispo", "w-reinforce", "focal", "unlikeliness", "boundary", "unsolved",
              "oreal", "drpo", "maxrl", "rs", "ucpo")
FINALISTS = ("focal", "drpo")
# What the READMEs compare.
CONTRASTS = ("base", "grpo", "ds-token", "entropy-bonus", "rehearsal", "grpo-rehearsal",
             "ds-rehearsal")
# Seeds by regime and rate (1 the best); three of what is not named.
FIVE = dict.fromkeys((*CONTRASTS, *SAMPLES, *FINALISTS), 5)
SEEDS = {
    ("weak-base", 1): {**dict.fromkeys(NEIGHBOURS, 2), **FIVE},
    ("weak-base", 2): {"grpo": 5, "ds-token": 5},
    ("strong-base", 1): {**FIVE, "base": 10, "grpo-rehearsal": 10, "grpo-rehearsal-longer": 5},
    ("strong-base", 2): {"grpo": 5},
    ("fixed", 1): {"base": 5, "grpo": 5, "grpo-rehearsal": 5},
}
# Regimes of the arms that are not run in all of them, and rounds of those without the usual ones.
BOTH = ("weak-base", "strong-base")
REGIMES = {**dict.fromkeys(NEIGHBOURS, ("weak-base",)), **dict.fromkeys(EVEN, ("strong-base",)),
           **dict.fromkeys((*FINALISTS, *SAMPLES, "grpo-rehearsal-longer"), BOTH)}
ROUNDS = {"base": (0,), "grpo-longer": (51,), "grpo-rehearsal-longer": (*CHECKPOINTS, 35, 51),
          **dict.fromkeys((*NEIGHBOURS, *SAMPLES, *EVEN, "rehearsal"), CHECKPOINTS[:2]),
          **dict.fromkeys(FINALISTS, CHECKPOINTS[1::2])}
# The others run at the best rate alone.
TWO_RATES = ("grpo", "ds-token", "grpo-rehearsal", "ds-rehearsal")

Label = collections.namedtuple("Label", "regime arm lr seed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--regimes", nargs="+", choices=MODELS, default=list(MODELS),
        help="only these regimes (default: all)")
    add("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="only these (default: all)")
    add("--seeds", nargs="+", type=int, help="these seeds (default: as many as the table SEEDS in "
        "this file says, 1..3 for what it does not name)")
    add("--rates", nargs="+", type=int, choices=(1, 2), default=[1, 2],
        help="the best learning rate, the second best or both (default: both)")
    add("--jobs", type=int, default=2, help="runs side by side, one core each (default 2)")
    add("--device", choices=DEVICES, default="cpu",
        help="where models are sampled and trained (default %(default)s)")
    add("--tables", type=os.path.abspath, default=HERE,
        help="folder of the tables (default: experiments)")
    add("--list", action="store_true", help="only print what is left")
    add("--check", action="store_true", help="run what was chosen again and compare it with "
        "results.csv instead of adding to it; exit 1 if any differs")
    add("--until", type=int,
        help="with --check: the last round that is repeated (default: all are)")
    args = parser.parse_args(argv)
    if args.until and not args.check:
        parser.error("--until belongs to --check: a table holds whole runs")
    chosen_runs = itertools.product(args.regimes, args.arms, args.rates)
    if not any(itertools.starmap(is_reported, chosen_runs)):
        parser.error("none of these --arms is run in these --regimes at these --rates")
    return args


# ---- One run -----------------------------------------------------------------------------------
def draw_of(label, number):
    """Flags of data/countdown.py for the problems of a round; 0: those of the rehearsal."""
    if label.regime == "fixed":
        number = 0  # the same ones in every round
    problems = 192 if number else REHEARSED[label.regime][0]
    return f"--n {problems} --split train --seed {label.seed * 100_000 + number}"


def rehearsal_of(label, device):
    """The base's own scored rollouts on training problems: a file, which a seed's arms share."""
    even = label.arm.endswith("-even")
    stem = f"runs/frontier/rehearsal{'-even' * even}-{label.regime}-{label.seed}"
    with open(f"{stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the first one samples, those beside it wait
        if not os.path.exists(f"{stem}.scored.jsonl"):
            base, sampling = MODELS[label.regime], f"{SAMPLING} {DEVICES[device][0]}"
            (problems, n), seed = REHEARSED[label.regime], label.seed * 100_000
            if even:
                sampled(stem, base, draw_of(label, 0), f"--n {2 * n} {sampling} --seed {seed}")
            else:
                sample_twice(stem, base, draw_of(label, 0), problems, n, sampling, seed)
    return f"{stem}.scored.jsonl"


def sample_twice(stem, base, draw, problems, n, sampling, seed):
    """n samples of each problem, then as many in all of those with at most one right answer:
    STEM.scored.jsonl."""
    once, hard = f"{stem}-once", f"{stem}-hard"
    stage("data.countdown", f"--out {once}.prompts.jsonl {draw}")
    parts = [verified(once, base, f"--n {n} {sampling} --seed {seed}")]
    stage("data.select", f"--prompts {once}.prompts.jsonl --out {hard}.prompts.jsonl "
                         f"--scored {parts[0]} --at-most 1")
    with open(f"{hard}.prompts.jsonl") as file:
        few = sum(1 for _ in file)
    if few:
        again = f"--n {n * problems // few} {sampling} --seed {seed + 99_999}"
        parts.append(verified(hard, base, again))
    with open(f"{stem}.partial", "wb") as file:
        for part in parts:
            with open(part, "rb") as source:
                shutil.copyfileobj(source, file)
    os.replace(f"{stem}.partial", f"{stem}.scored.jsonl")
    discard(*parts, f"{once}.prompts.jsonl", f"{hard}.prompts.jsonl")


def flags_of(setting, number):
    """train.py's flags in a round: of a setting 'FLAGS from round N on MORE' FLAGS before round N,
    then FLAGS MORE."""
    flags, first, more = re.fullmatch(r"(.*?)(?: from round (\d+) on (.*))?", setting).groups()
    return f"{flags} {more}" if first and number >= int(first) else flags


def train_round(folder, label, setting, device, number, before, after):
    """Problems, rollouts, verdicts and one train.py: the model of a round from the one before."""
    seed, (sampling, training) = label.seed, DEVICES[device]
    scored = sampled(f"{folder}/train-{number:03d}", before, draw_of(label, number),
                     f"--n 16 {SAMPLING} --seed {seed * 100_000 + number} {sampling}")
    stage("train", f"--model {before} --rollouts {scored} --out {after} --updates 4 "
                   f"--lr {label.lr} --seed {seed} {training} {flags_of(setting, number)}")
    discard(scored)


def one_run(name, label, setting, checkpoints, split, problems, n, device):
    """Train, and measure at the checkpoints (rounds; 0 is the base): a list of figures.

    setting: flags of train.py. A run that was stopped goes on from its last round."""
    import torch  # slow: not for those who ask for --help
    folder = f"runs/{name}"
    sample = f"--n {n} {SAMPLING} --seed {10_000 + label.seed} {DEVICES[device][0]}"
    splits, flags = {split: f"--n {problems} --split {split} --seed 1"}, setting
    if label.regime == "fixed":
        splits["train"] = draw_of(label, 1)
    machine = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    with inside(folder):
        if "FILE" in setting:
            flags = setting.replace("FILE", rehearsal_of(label, device))
        train = functools.partial(train_round, folder, label, flags, device)

        def measure_splits(number, model):
            return [measure(f"{folder}/eval-{number:03d}-{which}", model, number, which, draw,
                            sample, device=machine, setting=setting)
                    for which, draw in splits.items()]

        return follow(folder, MODELS[label.regime], checkpoints, train, measure_splits)


# ---- Tuning ------------------------------------------------------------------------------------
def tuned_base(regime, arm="grpo"):
    """The regime in which an arm's candidates were tried."""
    if arm in NEIGHBOURS:
        return "weak-base"
    return "strong-base" if regime == "fixed" else regime


def tuning_table(folder, regime, arm):
    """{(lr, setting): {k: Pass@k, the mean over the tuning seeds}} of an arm's candidates."""
    values = {}
    for row in read_csv(f"{folder}/frontier_tuning.csv"):
        if (row["regime"], row["arm"]) == (tuned_base(regime, arm), arm):
            passes = values.setdefault((row["lr"], row["setting"]), {})
            passes.setdefault(row["k"], []).append(float(row["pass_at_k"]))
    return {key: {k: statistics.fmean(each) for k, each in passes.items()}
            for key, passes in values.items()}


def rates_of(folder, regime):
    """The learning rates, the best for GRPO's Pass@1 first."""
    table = tuning_table(folder, regime, "grpo")
    return sorted(RATES, key=lambda lr: -table[lr, CANDIDATES["grpo"][0]]["1"])


def elect(table, grpo):
    """A setting of {setting: {k: Pass@k}} by the rule above; grpo: GRPO's Pass@1."""
    def merit(setting):
        enough = table[setting]["1"] >= grpo - 0.01
        return enough, statistics.fmean(table[setting].values()) if enough else table[setting]["1"]

    return max(table, key=merit)


def chosen(folder, regime, arm):
    """The setting of an arm with candidates."""
    if len(CANDIDATES[arm]) == 1:
        return CANDIDATES[arm][0]
    base = tuned_base(regime, arm)
    best = rates_of(folder, base)[0]
    grpo, table = (tuning_table(folder, base, one) for one in ("grpo", arm))
    return elect({setting: table[best, setting] for setting in CANDIDATES[arm]},
                 grpo[best, CANDIDATES["grpo"][0]]["1"])


def parts_of(arm):
    """The arms with candidates that an arm is made of, and what is added."""
    plain = arm.removesuffix("-even")
    return PARTS.get(plain, [plain])


def setting_of(folder, regime, arm):
    """The flags with which an arm is reported."""
    return " ".join(chosen(folder, regime, part) if part in CANDIDATES else part
                    for part in parts_of(arm))


def tuning_jobs(args, pairs):
    """What is missing of the candidates of pairs (base, arm), GRPO's at all learning rates, others'
    at the best."""
    table = read_csv(f"{args.tables}/frontier_tuning.csv")
    done, jobs = {(label_of(row), row["setting"]) for row in table}, []
    for (base, arm), seed in itertools.product(pairs, TUNING_SEEDS):
        rates = RATES if arm == "grpo" else rates_of(args.tables, base)[:1]
        for (i, setting), lr in itertools.product(enumerate(CANDIDATES[arm]), rates):
            key = (Label(base, arm, lr, seed), setting)
            name = f"frontier/tune-{'-'.join(map(str, key[0]))}-{i}"
            if key not in done:
                jobs.append((key, (name, *key, (TUNING_ROUNDS,), "tune", 200, 128, args.device)))
    return jobs


# ---- The reported runs -------------------------------------------------------------------------
def is_reported(regime, arm, rate):
    """Whether an arm is run in a regime at the best learning rate (1), at the second best (2)."""
    if rate == 2:
        return arm in TWO_RATES and regime != "fixed"
    return regime in REGIMES.get(arm, MODELS)


def labels_of(args):
    """The chosen runs: three seeds of everything before the others, seed by seed."""
    labels = []
    for regime, arm, rate in itertools.product(args.regimes, args.arms, args.rates):
        if is_reported(regime, arm, rate):
            lr = "0" if arm == "base" else rates_of(args.tables, regime)[rate - 1]
            seeds = SEEDS.get((regime, rate), {}).get(arm, 3)
            for seed in args.seeds or range(1, seeds + 1):
                labels.append((seed > 3, rate, seed, Label(regime, arm, lr, seed)))
    return [label for *_, label in sorted(labels, key=lambda entry: entry[:3])]


def rounds_of(folder, label):
    """The rounds after which a run is evaluated; the last one ends it."""
    rounds = ROUNDS.get(label.arm, CHECKPOINTS)
    if len(rounds) == 1:
        return rounds
    few = label.regime == "fixed" or label.lr != rates_of(folder, label.regime)[0]
    return rounds[1::2] if few else rounds


def label_of(row):
    """The run that a row of a table belongs to."""
    return Label(row["regime"], row["arm"], row["lr"], int(row["seed"]))


def reported_jobs(args):
    done = {(label_of(row), int(row["round"])) for row in read_csv(f"{args.tables}/results.csv")}
    jobs = []
    for label in labels_of(args):
        rounds = rounds_of(args.tables, label)
        wanted = [number for number in rounds if number <= (args.until or number)]
        if wanted and (args.check or (label, rounds[-1]) not in done):
            name = f"frontier/{'check-' * args.check}{'-'.join(map(str, label))}"
            setting = setting_of(args.tables, label.regime, label.arm)
            jobs.append((label, (name, label, setting, wanted, "test", 300, 256, args.device)))
    if args.until and not jobs:
        sys.exit(f"none of these runs was measured up to round {args.until} (--until)")
    return jobs


def keep_tuning(folder, key, figures):
    label, setting = key
    path = f"{folder}/frontier_tuning.csv"
    head = {"regime": label.regime, "arm": label.arm, "lr": label.lr, "setting": setting,
            "seed": label.seed}
    write_csv(path, read_csv(path) + [
        {**head, "k": k, "pass_at_k": value} for k, value in figures[-1]["pass_at_k"].items()])


def keep_result(folder, label, figures):
    """The checkpoints first: a run is done when results.csv holds it. A longer run takes the place
    of a shorter one."""
    columns = ("setting", "coverage", "distinct", "completion_len", "entropy", "train_s", "device")
    results, points = [], []
    for figure in figures:
        head = {**label._asdict(), "round": figure["round"], "split": figure["split"]}
        points.append({**head, **{name: figure[name] for name in columns},
                       "commit": figure.get("commit", "")})  # older runs lack it
        results += [{**head, "k": k, "pass_at_k": value}
                    for k, value in figure["pass_at_k"].items()]
    for name, rows in (("checkpoints", points), ("results", results)):
        path = f"{folder}/{name}.csv"
        others = [row for row in read_csv(path) if label_of(row) != label]
        write_csv(path, others + rows)


def one_by_one(keep, folder, key, figures):
    """keep(folder, key, figures), while no other frontier.py writes the folder's tables."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        keep(folder, key, figures)
    finally:
        os.close(handle)


def compare(differences, folder, label, figures):
    """Print by how much a repeated run differs from results.csv, and add that to `differences`."""
    results, points = ([row for row in read_csv(f"{folder}/{name}.csv") if label_of(row) == label]
                       for name in ("results", "checkpoints"))
    stored = {(int(row["round"]), row["split"], row["k"]): float(row["pass_at_k"])
              for row in results}
    made_by, name = {row["commit"] for row in points}, " ".join(map(str, label))
    if not stored:
        sys.exit(f"{name}: not in results.csv; run it without --check first")
    worst = max(abs(stored[figure["round"], figure["split"], k] - value)
                for figure in figures for k, value in figure["pass_at_k"].items())
    print(f"{name}: " + (f"Pass@k differs by up to {worst:.4f} (this is commit "
                         f"{figures[0].get('commit')}, the table's is {', '.join(made_by)})"
                         if worst else "equal"))
    differences.append(worst)


def phase(args, name, one_run, jobs, keep):
    """Do these jobs, or list them."""
    if not args.list:
        return run(one_run, jobs, functools.partial(one_by_one, keep, args.tables), args.jobs)
    print(f"{name}: {len(jobs)} runs left")
    for _, (_, label, setting, *_) in jobs:
        print(" ", *label, setting)
    if jobs and keep is keep_tuning:
        sys.exit("what follows depends on these")


def main(args):
    os.makedirs(args.tables, exist_ok=True)
    reported = [(regime, arm) for regime, arm in itertools.product(args.regimes, args.arms)
                if arm != "base" and is_reported(regime, arm, 1)]
    tuned = dict.fromkeys((tuned_base(regime, part), part) for regime, arm in reported
                          for part in parts_of(arm) if len(CANDIDATES.get(part, "")) > 1)
    bases = [tuned_base(regime) for regime, _ in reported] + [base for base, _ in tuned]
    rates = dict.fromkeys((base, "grpo") for base in bases)
    phase(args, "learning rate", one_run, tuning_jobs(args, rates), keep_tuning)
    phase(args, "tuning", one_run, tuning_jobs(args, tuned), keep_tuning)
    differences = []
    keep = functools.partial(compare, differences) if args.check else keep_result
    phase(args, "reported", one_run, reported_jobs(args), keep)
    sys.exit(any(differences))


if __name__ == "__main__":
    main(parse_args())
