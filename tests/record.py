"""Print the sha256 of what fixed commands make, to show that a move of code changes no byte.

    python tests/record.py --repo BEFORE --out before.json
    python tests/record.py --repo AFTER --out after.json --against before.json

With --against it exits with 1 if any digest differs. Digests belong to one machine, thread count
and set of library versions: compare two commits side by side, store nothing. Rollouts, scored rows,
weights, moments and eval.json are taken as they are, metrics without what is measured of time and
memory and without the keys that only one of the two commits writes.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile

ARMS = "--method {repo}/experiments/arms.py"
TRAIN = {  # name: flags; {..} are spellings that changed, see SPELLINGS
    "grpo": "--method grpo", "grpo-none": "--method grpo --adv-norm none",
    "ds-token": "--gamma-p 0.3 --gamma-n 0.03 --updates 3",
    "ds-mean": "--smooth-level {mean} --updates 2", "ds-positive": "--gamma-p 0.1 --gamma-n 0",
    "ds-reward": "--smooth-level reward --updates 2",
    "entropy": "--method grpo --entropy-coef 0.01",
    "ds-entropy": "--method grpo --entropy-coef-correct 0.1 --entropy-coef-wrong -0.05",
    "kl": "--method grpo --kl-coef 0.1 --ref-model {model} --updates 2",
    "mask": "--truncated mask --smooth-level {mean}",
    "rehearse": "--method grpo --rehearse scored-chunks.jsonl --rehearse-coef 0.5 {distinct} "
                "--updates 2",
    "repeated": "--no-share-prompts --updates 2",
    "checkpointed": "--checkpoint-activations --updates 2",
    "small-batches": "--micro-batch-tokens 200 --weight-decay 0.1 --warmup-steps 5",
    "passk": ARMS + ":passk --arm k=4 --updates 2", "cispo": ARMS + ":cispo --updates 2",
    "w-reinforce": ARMS + ":w_reinforce --updates 2"}
SPELLINGS = {"mean": ("sequence", "mean"), "distinct": ("", "--rehearse-weight distinct")}
RANKS = {"ds-ranks": "--updates 2", "ds-shard": "--updates 2 --shard"}
GENERATE = {
    "base": "--n 8", "top": "--n 4 --top-p 0.9 --top-k 20 --temperature 0.7",
    "greedy": "--n 1 --temperature 0", "stop": "--n 4 --stop 7 2)",
    "model": "--n 4 --attention model", "chunks": "--n 4 --max-batch-tokens 900"}
EVALUATE = {"two": "scored-base.jsonl scored-model.jsonl --names a b --k 1 2 4",
            "one": "scored-top.jsonl", "maths": "scored-maths.jsonl"}
OF_ONE_COMMIT = ("tokens_per_s", "peak_mem_bytes", "pass@n")


def digest(path):
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith("metrics.jsonl"):
        rows = [{key: value for key, value in json.loads(line).items() if key not in OF_ONE_COMMIT}
                for line in data.splitlines()]
        data = json.dumps(rows).encode()
    return hashlib.sha256(data).hexdigest()


def maths_rows(repo):
    """Each labelled pair as two rollouts: its answer, and its gold."""
    with open(f"{repo}/tests/maths_pairs.jsonl", encoding="utf-8") as file:
        pairs = [json.loads(line) for line in file][:1540]  # as many as there were at first
    for number, pair in enumerate(pairs):
        for sample, text in enumerate((f"so \\boxed{{{pair['answer']}}}",
                                       f"\\boxed{{{pair['gold']}}}")):
            yield {"id": str(number), "task": "math", "answer": pair["gold"], "sample": sample,
                   "completion": text, "completion_ids": [1], "finish_reason": "stop",
                   "source": "ab"[number % 2]}


def record(repo):
    """{output: sha256} of the checkout `repo`."""
    found, model = {}, f"{repo}/data/tiny-countdown"
    with open(f"{repo}/train.py", encoding="utf-8") as file:
        new = '"share"' in file.read()
    spelled = {name: each[new] for name, each in SPELLINGS.items()}
    with tempfile.TemporaryDirectory() as folder:
        def stage(command, ranks=1):
            launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks} --".split()
            script, *flags = command.split()
            script = [f"{repo}/{script}"] if script.endswith(".py") else ["-m", script]
            done = subprocess.run(
                [sys.executable, *(launcher if ranks > 1 else ()), *script, *flags], cwd=folder,
                capture_output=True, text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": repo})
            if done.returncode:
                sys.exit(f"{command}: exit {done.returncode}\n{done.stderr}")

        def keep(*names):
            for name in names:
                found[name] = digest(f"{folder}/{name}")

        def train(name, flags, ranks=1, start=model):
            flags = flags.format(repo=repo, model=model, **spelled)
            stage(f"train.py --model {start} --rollouts scored-base.jsonl --out {name} --lr 3e-4 "
                  f"{flags}", ranks)
            keep(*(f"{name}/{file}" for file in (
                "model.safetensors", "optimizer.safetensors", "metrics.jsonl")))

        stage("data.countdown --out prompts.jsonl --n 24 --seed 3")
        keep("prompts.jsonl")
        with open(f"{folder}/maths.jsonl", "w", encoding="utf-8") as out:
            out.writelines(json.dumps(row) + "\n" for row in maths_rows(repo))
        sampling = f"--model {model} --prompts prompts.jsonl --max-new-tokens 20 --seed 5"
        for name, flags in GENERATE.items():
            stage(f"generate.py {sampling} --out rollouts-{name}.jsonl {flags}")
            stage(f"score.py rollouts-{name}.jsonl --out scored-{name}.jsonl")
            keep(f"rollouts-{name}.jsonl", f"scored-{name}.jsonl")
        stage(f"generate.py {sampling} --out rollouts-ranks.jsonl --n 4 --max-batch-tokens 900",
              ranks=2)
        keep("rollouts-ranks.jsonl")
        stage("score.py maths.jsonl --out scored-maths.jsonl")
        keep("scored-maths.jsonl")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: train(*item), TRAIN.items()))
        for name, flags in RANKS.items():
            train(name, flags, ranks=2)
        train("next", "--updates 2", start="ds-token")
        for name, files in EVALUATE.items():
            stage(f"evaluate.py {files} --out eval-{name}.json")
            keep(f"eval-{name}.json")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--repo", default=".", help="the checkout to run (default: this folder)")
    add("--out", required=True, help="JSON file to write: {output: sha256}")
    add("--against", help="an earlier --out to compare with")
    args = parser.parse_args()
    found = record(os.path.abspath(args.repo))
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            before = json.load(file)
        differ = sorted(name for name in before if found.get(name) != before[name])
        print(f"{len(before) - len(differ)} of {len(before)} equal"
              + "".join(f"\n  differs: {name}" for name in differ))
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
