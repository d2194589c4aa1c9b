"""Record the sha256 of what fixed commands make, so that a move of code can be shown to change no byte.

    python tests/record.py --repo BEFORE --out before.json
    python tests/record.py --repo AFTER --out after.json --against before.json     # exit 1 if any digest differs

Digests belong to one machine, thread count and set of library versions: compare two commits side by side, store nothing.
Rollouts, scored rows, weights, moments and eval.json are taken as they are, metrics without what is measured of time and memory.
"""
import argparse
import concurrent.futures
import hashlib
import json
import os
import subprocess
import sys
import tempfile

TRAIN = {  # name: flags; those that are another model's next round name it
    "grpo": "--method grpo",
    "grpo-none": "--method grpo --adv-norm none",
    "ds-token": "--gamma-p 0.3 --gamma-n 0.03 --updates 3",
    "ds-sequence": "--smooth-level sequence --updates 2",
    "ds-reward": "--smooth-level reward --updates 2",
    "ds-positive": "--gamma-p 0.1 --gamma-n 0",
    "entropy": "--method grpo --entropy-coef 0.01",
    "ds-entropy": "--method grpo --entropy-coef-correct 0.1 --entropy-coef-wrong -0.05",
    "kl": "--method grpo --kl-coef 0.1 --ref-model {model} --updates 2",
    "mask": "--truncated mask --smooth-level reward",
    "repeated": "--no-share-prompts --updates 2",
    "checkpointed": "--checkpoint-activations --updates 2",
    "small-batches": "--micro-batch-tokens 200 --weight-decay 0.1 --warmup-steps 5",
}
RIVALS = {  # the spellings before and after the arms became plug-ins
    "passk": ("--method passk --pass-k 4 --updates 2", "--method {repo}/experiments/arms.py:passk --arm k=4 --updates 2"),
    "cispo": ("--method cispo --updates 2", "--method {repo}/experiments/arms.py:cispo --updates 2"),
    "w-reinforce": ("--method w-reinforce --updates 2", "--method {repo}/experiments/arms.py:w_reinforce --updates 2"),
}
RANKS = {"ds-ranks": "--updates 2", "ds-shard": "--updates 2 --shard"}
GENERATE = {"base": "--n 8", "top": "--n 4 --top-p 0.9 --top-k 20 --temperature 0.7", "greedy": "--n 1 --temperature 0",
            "stop": "--n 4 --stop 7 2)", "model": "--n 4 --attention model", "chunks": "--n 4 --max-batch-tokens 900"}


def digest(path):
    with open(path, "rb") as file:
        data = file.read()
    if path.endswith("metrics.jsonl"):
        rows = [json.loads(line) for line in data.splitlines()]
        data = json.dumps([{key: row[key] for key in row if key not in ("tokens_per_s", "peak_mem_bytes")} for row in rows]).encode()
    return hashlib.sha256(data).hexdigest()


def record(repo):
    found, model = {}, f"{repo}/data/tiny-countdown"
    plugins = os.path.exists(f"{repo}/experiments/arms.py")
    with tempfile.TemporaryDirectory() as folder:
        def stage(command, ranks=1):
            launcher = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run", "--standalone",
                                                            "--nproc-per-node", str(ranks), "--"]
            script, *flags = command.split()
            done = subprocess.run([*launcher, f"{repo}/{script}", *flags], cwd=folder, capture_output=True, text=True,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})
            if done.returncode:
                sys.exit(f"{command}: exit {done.returncode}\n{done.stderr}")

        def keep(*names):
            for name in names:
                found[name] = digest(f"{folder}/{name}")

        def train(name, flags, ranks=1, source="base", start=model):
            stage(f"train.py --model {start} --rollouts scored-{source}.jsonl --out {name} --lr 3e-4 {flags.format(repo=repo, model=model)}",
                  ranks)
            keep(*(f"{name}/{file}" for file in ("model.safetensors", "optimizer.safetensors", "metrics.jsonl")))

        stage("data/countdown.py --out prompts.jsonl --n 24 --seed 3")
        keep("prompts.jsonl")
        with open(f"{repo}/tests/maths_pairs.jsonl", encoding="utf-8") as file, open(f"{folder}/maths.jsonl", "w", encoding="utf-8") as out:
            for number, row in enumerate(map(json.loads, file)):
                answer = row["gold"]
                text = row["answer"]
                for sample, completion in enumerate((f"so \\boxed{{{text}}}", f"\\boxed{{{answer}}}")):
                    out.write(json.dumps({"id": str(number), "task": "math", "answer": answer, "sample": sample, "completion": completion,
                                          "completion_ids": [1], "finish_reason": "stop", "source": "ab"[number % 2]}) + "\n")
        for name, flags in GENERATE.items():
            stage(f"generate.py --model {model} --prompts prompts.jsonl --out rollouts-{name}.jsonl --max-new-tokens 20 --seed 5 {flags}")
            stage(f"score.py rollouts-{name}.jsonl --out scored-{name}.jsonl")
            keep(f"rollouts-{name}.jsonl", f"scored-{name}.jsonl")
        stage(f"generate.py --model {model} --prompts prompts.jsonl --out rollouts-ranks.jsonl --max-new-tokens 20 --seed 5 --n 4 "
              f"--max-batch-tokens 900", ranks=2)
        keep("rollouts-ranks.jsonl")
        stage("score.py maths.jsonl --out scored-maths.jsonl")
        keep("scored-maths.jsonl")
        rivals = {name: spelling[plugins] for name, spelling in RIVALS.items()}
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda item: train(*item), {**TRAIN, **rivals}.items()))
        for name, flags in RANKS.items():
            train(name, flags, ranks=2)
        train("next", "--updates 2", start="ds-token")
        for name, files in {"two": "scored-base.jsonl scored-model.jsonl --names a b --k 1 2 4", "one": "scored-top.jsonl",
                            "maths": "scored-maths.jsonl"}.items():
            stage(f"evaluate.py {files} --out eval-{name}.json")
            keep(f"eval-{name}.json")
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repo", default=".", help="the checkout to run (default: this folder)")
    parser.add_argument("--out", required=True, help="JSON file to write: {output: sha256}")
    parser.add_argument("--against", help="an earlier --out to compare with")
    args = parser.parse_args()
    found = record(os.path.abspath(args.repo))
    with open(args.out, "w", encoding="utf-8") as file:
        json.dump(found, file, indent=1)
    if args.against:
        with open(args.against, encoding="utf-8") as file:
            before = json.load(file)
        differ = sorted(name for name in before if found.get(name) != before[name])
        print(f"{len(before) - len(differ)} of {len(before)} equal" + "".join(f"\n  differs: {name}" for name in differ))
        sys.exit(bool(differ))


if __name__ == "__main__":
    main()
