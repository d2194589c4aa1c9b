"""Peak memory of a rank with `train.py --shard`: 110M parameters on 1, 2 and 4 gloo ranks.

    python experiments/bench_shards.py --out experiments/shards.json

The same round of rollouts is trained on by every number of ranks, from a folder with a single
weight file and from one with several. A rank's figure is its peak resident memory (VmHWM) less
that after the imports; beside it stands the floor, 16 bytes x weights / ranks for weights,
gradients and both moments. What a rank needs besides are one gathered layer and its activations.
One row a run, written as it comes.
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
MEASURED = """
import os, re, sys
sys.path.insert(0, sys.argv.pop(1))
folder = sys.argv.pop(1)
import train
from transformers.models.qwen2 import modeling_qwen2

def peak():
    with open("/proc/self/status") as file:
        return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", file.read())[1])

imports = peak()
train.main(train.parse_args(sys.argv[1:]))
with open(f"{folder}/{os.environ.get('RANK', 0)}", "w") as file:
    file.write(str(peak() - imports))
"""


def make_model(folder, layers, largest_file):
    """A random Qwen2 of 110M parameters (12 layers), in files of at most `largest_file`."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from data import make_tiny

    config = Qwen2Config(vocab_size=32_000, hidden_size=768, num_hidden_layers=layers,
                         num_attention_heads=12, num_key_value_heads=12, intermediate_size=2048,
                         max_position_embeddings=1024, tie_word_embeddings=True, eos_token_id=0,
                         pad_token_id=1, bos_token_id=None)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=largest_file)
    make_tiny.make_tokenizer().save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def make_rollouts(path, groups=4, n=4, tokens=60):
    import numpy as np

    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for group, sample in np.ndindex(groups, n):
            ids = rng.integers(3, 20, tokens).tolist()
            file.write(json.dumps({
                "id": f"{group}", "sample": sample, "task": "countdown",
                "prompt_ids": [3 + group] * 32, "completion_ids": ids,
                "logprobs": [-1.0] * tokens, "finish_reason": "stop",
                "correct": sample % 2 == 0, "reward": float(sample % 2 == 0)}) + "\n")


def one_run(model, rollouts, ranks):
    """Peak bytes of each rank beyond its imports, for two updates from `model`."""
    with tempfile.TemporaryDirectory() as folder:
        script = f"{folder}/measured.py"
        with open(script, "w", encoding="utf-8") as file:
            file.write(MEASURED)
        os.mkdir(f"{folder}/peaks")
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                  "--nproc-per-node", str(ranks), "--"]
        command = [script, ROOT, f"{folder}/peaks", "--model", model, "--rollouts", rollouts,
                   "--out", f"{folder}/out", "--temperature", "1", "--updates", "2",
                   "--micro-batch-tokens", "512", "--device", "cpu", "--shard"]
        # glibc keeps freed blocks; with a fixed threshold what a tensor took is given back.
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
        done = subprocess.run([*launch, *command], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        peaks = []
        for rank in range(ranks):
            with open(f"{folder}/peaks/{rank}") as file:
                peaks.append(int(file.read()))
        return peaks


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="default 1 2 4")
    parser.add_argument("--layers", type=int, default=12, help="of the model (default %(default)s)")
    parser.add_argument("--out", required=True, help="JSON file to write")
    args = parser.parse_args()
    sys.path.insert(0, ROOT)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_rollouts(f"{folder}/scored.jsonl")
        for files, largest in (("one file", "100GB"), ("several files", "100MB")):
            weights = make_model(f"{folder}/{files}", args.layers, largest)
            for ranks in args.ranks:
                peaks = one_run(f"{folder}/{files}", f"{folder}/scored.jsonl", ranks)
                floor = 16 * weights // ranks
                rows.append({"files": files, "ranks": ranks, "weights": weights,
                             "peak_bytes": peaks, "floor_bytes": floor})
                print(f"{files}, {ranks} ranks: largest peak {max(peaks) / 2**20:.0f} MiB, "
                      f"floor {floor / 2**20:.0f} MiB", flush=True)
                with open(args.out, "w", encoding="utf-8") as file:
                    json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
