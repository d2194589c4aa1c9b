"""Each stage beside what one would use in its place, in turns.

    python experiments/bench.py --out experiments/bench_cpu.json
    python experiments/bench.py --only generate update --sizes 0.5b     # on a GPU, in bf16

    generate   generate.py; `model.generate` on padded batches, at three batch sizes
    score      score.py on maths answers; a loop over Math-Verify
    update     train.py; a GRPO update in plain PyTorch: padded rows, logits of all tokens, eager
               log_softmax and entropy
    evaluate   evaluate.py; json.loads, the estimator of Pass@k and a bootstrap in NumPy

Sizes of generate and update: `tiny` is the embedded model; the others are random Qwen2 models that
never stop early, 0.5b at the shape of Qwen2.5-0.5B. The other parts take --rows rows.

Arms run in turns, ours first; ratios are taken within a round, so that a slow moment of the machine
hits all arms: median [least, most]. Loading and saving of models and digests of files take no time.
Without a GPU: one thread, CPU time, memory of the process (Linux); with one: wall time, PyTorch's
memory. Peak MiB is what an arm holds at most, its model included, beyond what was held before.
"""
import argparse
import collections
import contextlib
import functools
import io
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
from unittest import mock

PARTS = ("generate", "score", "update", "evaluate")


# prompts; samples a prompt; times that a prompt, some 13 tokens, is repeated; new tokens; batch
# sizes of model.generate; shape of a random Qwen2: vocabulary, hidden size, layers, heads, key and
# value heads, intermediate size; none: the embedded model
Size = collections.namedtuple("Size", "prompts n repeat new_tokens batches shape", defaults=[()])
SIZES = {
    "toy": Size(2, 4, 1, 4, (2, 4, 8), (64, 32, 2, 2, 1, 64)),  # for tests
    "tiny": Size(48, 16, 1, 24, (64, 256, 768)),
    "25m": Size(4, 16, 5, 32, (16, 32, 64), (4096, 512, 8, 8, 2, 1408)),
    "0.5b": Size(4, 16, 10, 64, (16, 32, 64), (151936, 896, 24, 14, 2, 4864)),
}
SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "intermediate_size")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--only", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    add("--sizes", nargs="+", default=["tiny", "25m"], choices=SIZES,
        help="models of generate and update (default: %(default)s)")
    add("--rows", nargs="+", type=int, default=[1000, 4000],
        help="rows of the other parts (default: %(default)s)")
    add("--rounds", type=int, default=3, help="rounds after the warm-up (default: %(default)s)")
    add("--out", help="JSON file to write (default: the table alone)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import evaluate
import generate
import score
import train
from data import countdown, files, make_tiny, models
from experiments.suite import ROOT, Meter, read_rows, write_rows


# ---- Measuring -----------------------------------------------------------------------------------
LEFT_OUT = [models.load_model, models.load_tokenizer, models.save_round, files.describe]


def call(meter, stage, *flags):
    """Run a stage in this process. LEFT_OUT takes no time, wherever it is imported."""
    with contextlib.ExitStack() as stack:
        for module, function in itertools.product([*sys.modules.values()], LEFT_OUT):
            if getattr(module, "__dict__", {}).get(function.__name__) is function:
                stack.enter_context(mock.patch.object(module, function.__name__,
                                                      meter.untimed(function)))
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stage.main(stage.parse_args([str(flag) for flag in flags]))


class Bench:
    """The settings of a call, the folder of its files, and what it measured."""

    def __init__(self, folder, args):
        self.folder, self.rounds, self.count, self.entries = folder, args.rounds, 0, {}
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def fresh(self, name):
        """A path that nothing has yet."""
        self.count += 1
        return os.path.join(self.folder, f"{self.count}-{name}")

    def measure(self, name, unit, arms, made=None):
        """Run the arms in turns. arms: {name: function(meter, seed)}, ours first; each makes
        `made` units, or as many as it returns. An arm that cannot run gets its error for a
        figure."""
        entry = {arm: [] for arm in arms}  # lists of (seconds a unit, peak MiB)
        for seed in range(self.rounds + 1):
            for arm in [arm for arm in arms if isinstance(entry[arm], list)]:
                try:
                    with Meter(self.device) as meter:
                        units = arms[arm](meter, seed) or made
                    entry[arm].append((meter.seconds / units, meter.peak / 2**20))
                except (ImportError, torch.OutOfMemoryError) as error:
                    entry[arm] = f"{type(error).__name__}: {error}"[:120]
        ours = next(iter(entry.values()))
        for arm, figures in entry.items():
            if isinstance(figures, list):  # the first round warms up
                times, peaks = zip(*figures[1:])
                ratios = [time / own for time, (own, _) in zip(times, ours[1:])]
                spread = statistics.median(ratios), min(ratios), max(ratios)
                entry[arm] = {"a_second": float(f"{1 / statistics.median(times):.4g}"),
                              "peak_mib": round(max(peaks)),
                              "ours_is_faster": [round(one, 3) for one in spread]}
        self.entries[name] = {"unit": unit, "rounds": self.rounds, "device": self.device,
                              "arms": entry}

    def load(self, meter, folder, dtype):
        """A peer's model, its loading left out."""
        load = transformers.AutoModelForCausalLM.from_pretrained
        return meter.untimed(lambda: load(folder, dtype=dtype).to(self.device).eval())()


# ---- Models and rows -----------------------------------------------------------------------------
def make_folder(bench, size):
    """A model folder, its tokenizer and a prompt file of this size."""
    folder = f"{ROOT}/data/tiny-countdown"
    if size.shape:
        folder = bench.fresh("model")
        torch.manual_seed(0)
        config = transformers.Qwen2Config(
            **dict(zip(SHAPE, size.shape)), tie_word_embeddings=True, bos_token_id=None,
            eos_token_id=None, pad_token_id=1,
            initializer_range=0.05)  # not 0.02: random weights shall prefer some tokens
        with torch.device(bench.device):
            transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
        make_tiny.make_tokenizer().save_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="left")
    made, prompts = bench.fresh("problems.jsonl"), bench.fresh("prompts.jsonl")
    countdown.main(countdown.parse_args(["--out", made, "--n", str(size.prompts)]))
    write_rows(prompts, ({**row, "prompt": row["prompt"] * size.repeat}
                         for row in read_rows(made)))
    return folder, tokenizer, prompts


def sample_row(problem, sample, prompt_ids, ids, correct, **more):
    return {"id": f"{problem}", "sample": sample, "prompt_ids": prompt_ids, "completion_ids": ids,
            "logprobs": [-1.0] * len(ids), "finish_reason": "stop",
            "correct": correct, "reward": float(correct), **more}


# ---- generate ------------------------------------------------------------------------------------
def bench_generate(bench, name):
    size = SIZES[name]
    folder, tokenizer, prompts = make_folder(bench, size)
    texts = [row["prompt"] for row in read_rows(prompts) for _ in range(size.n)]
    end = None if size.shape else tokenizer.eos_token_id
    dtype = torch.bfloat16 if bench.device == "cuda" else torch.float32
    settings = transformers.GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=size.new_tokens,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=end)

    def ours(meter, seed):
        out = bench.fresh("rollouts.jsonl")
        call(meter, generate, "--model", folder, "--prompts", prompts, "--out", out,
             "--n", size.n, "--max-new-tokens", size.new_tokens, "--seed", seed,
             "--device", bench.device, *["--ignore-eos"] * bool(size.shape))
        return meter.untimed(lambda: sum(len(row["completion_ids"]) for row in read_rows(out)))()

    def padded(batch_size, meter, seed):
        torch.manual_seed(seed)
        model, made = bench.load(meter, folder, dtype), 0
        for start in range(0, len(texts), batch_size):
            batch = tokenizer(texts[start:start + batch_size], padding=True,
                              return_tensors="pt").to(bench.device)
            ids = model.generate(input_ids=batch["input_ids"], generation_config=settings,
                                 attention_mask=batch["attention_mask"])
            new = ids[:, batch["input_ids"].shape[1]:].tolist()
            tokenizer.batch_decode(new, skip_special_tokens=True)
            made += sum(one.index(end) + 1 if end in one else len(one) for one in new)
        return made

    bench.measure(f"generate/{name}", "tokens", {"generate.py": ours, **{
        f"model.generate, batch {batch}": functools.partial(padded, batch)
        for batch in size.batches}})


# ---- score ---------------------------------------------------------------------------------------
def bench_score(bench, rows):
    """Answers of tests/maths_pairs.jsonl, each with its gold, over and over."""
    pairs = itertools.cycle([pair for pair in read_rows(f"{ROOT}/tests/maths_pairs.jsonl")
                             if isinstance(pair["gold"], str)])
    path = bench.fresh("rollouts.jsonl")
    write_rows(path, (sample_row(k, 0, [3], [4], False, task="math", prompt="?",
                                 answer=pair["gold"], completion=f"\\boxed{{{pair['answer']}}}")
                      for k, pair in enumerate(itertools.islice(pairs, rows))))

    def plain(meter, seed):
        from math_verify import parse, verify
        write_rows(bench.fresh("scored.jsonl"), [
            {**row, "correct": verify(parse(f"${row['answer']}$"), parse(row["completion"]))}
            for row in read_rows(path)])

    bench.measure(f"score/{rows}", "rows", {
        "score.py": lambda meter, seed: call(meter, score, path, "--out",
                                             bench.fresh("scored.jsonl"), "--workers", 1),
        "a loop over Math-Verify": plain}, rows)


# ---- update --------------------------------------------------------------------------------------
def plain_update(model, optimizer, rows, budget):
    """A GRPO update as one writes it first.

    rows: scored rollouts, one half of each group right, so that advantages are 1 and -1.
    Micro-batches of at most `budget` tokens, padding included, as in train.py.
    """
    device, tokens = model.device, sum(len(row["completion_ids"]) for row in rows)
    texts = [torch.tensor(row["prompt_ids"] + row["completion_ids"]) for row in rows]
    per = max(1, budget // max(map(len, texts)))
    for start in range(0, len(rows), per):
        part, own = rows[start:start + per], texts[start:start + per]
        ids = pad_sequence(own, batch_first=True).to(device)  # (rows, longest)
        mask = pad_sequence([torch.ones_like(text) for text in own], batch_first=True).to(device)
        kept = mask[:, 1:].clone()
        for keep, row in zip(kept, part):
            keep[:len(row["prompt_ids"]) - 1] = 0
        advantage = torch.tensor([2 * row["reward"] - 1 for row in part], device=device)[:, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1)  # (rows, longest - 1, vocab)
        with torch.no_grad():  # train.py reports it
            entropy = -(logp.exp() * logp).sum(-1)
        chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.25) * advantage)
        ((loss * kept).sum() / tokens).backward()
        del logits, logp, entropy, chosen
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def bench_update(bench, name):
    size, rng = SIZES[name], random.Random(0)
    folder, tokenizer, prompts = make_folder(bench, size)
    # The embedded model's answers have 7 to 19 tokens; a random model's fill all room.
    least, most = (size.new_tokens, size.new_tokens) if size.shape else (7, 19)
    rows = [sample_row(problem, k, tokenizer(row["prompt"])["input_ids"],
                       rng.choices(range(len(tokenizer)), k=rng.randint(least, most)), k % 2 == 0)
            for problem, row in enumerate(read_rows(prompts)) for k in range(size.n)]
    rollouts, tokens = bench.fresh("scored.jsonl"), sum(len(row["logprobs"]) for row in rows)
    write_rows(rollouts, rows)
    flags = ["--model", folder, "--rollouts", rollouts, "--temperature", "1", "--method", "grpo",
             "--device", bench.device]
    budget = train.parse_args([*flags, "--out", "-"]).micro_batch_tokens

    def plain(meter, seed):
        model = bench.load(meter, folder, torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, weight_decay=0.01, fused=True)
        plain_update(model, optimizer, rows, budget)

    bench.measure(f"update/{name}", "tokens", {
        "train.py": lambda meter, seed: call(meter, train, *flags, "--out", bench.fresh("round")),
        "plain PyTorch": plain}, tokens)


# ---- evaluate ------------------------------------------------------------------------------------
def plain_pass_at_k(path, resamples=10_000):
    """{k: (Pass@k, low, high)} for k = 1, 2, 4, ... n, as one writes it first."""
    groups, found, rng = {}, {}, np.random.default_rng(0)
    for row in read_rows(path):
        groups.setdefault(row["id"], []).append(row["correct"])
    n = len(next(iter(groups.values())))
    for k in itertools.takewhile(lambda k: k <= n, (2**i for i in itertools.count())):
        values = np.array([1 - np.prod(1 - k / np.arange(n - sum(own) + 1, n + 1))
                           if n - sum(own) >= k else 1.0 for own in groups.values()])
        means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(1)
        found[k] = values.mean(), *np.quantile(means, (0.025, 0.975))
    return found


def bench_evaluate(bench, rows, n=64):
    path, rng = bench.fresh("scored.jsonl"), random.Random(0)
    write_rows(path, (sample_row(k // n, k % n, [3] * 12, [4] * 12, rng.random() < 0.3, pred="7",
                                 task="math", prompt="?", answer="7", completion="7", reason="ok")
                      for k in range(-(-rows // n) * n)))

    bench.measure(f"evaluate/{rows}", "rows", {
        "evaluate.py": lambda meter, seed: call(meter, evaluate, path, "--out",
                                                bench.fresh("eval.json")),
        "plain NumPy": lambda meter, seed: plain_pass_at_k(path) and None}, rows)


# ---- Main ----------------------------------------------------------------------------------------
def table(entries):
    """Lines of Markdown."""
    yield "| | | a second | peak MiB | ours is faster by |\n|---|---|---|---|---|"
    for name, entry in entries.items():
        for arm, one in entry["arms"].items():
            if isinstance(one, str):
                yield f"| {name} | {arm} | {one} | | |"
                continue
            middle, least, most = one["ours_is_faster"]
            yield (f"| {name} | {arm} | {one['a_second']:,.0f} {entry['unit']} | "
                   f"{one['peak_mib']:,} | {middle:.2f} [{least:.2f}, {most:.2f}] |")


def main(args):
    torch.set_num_threads(1)
    report = {"cores": os.cpu_count(), "torch": torch.__version__,
              "transformers": transformers.__version__,
              "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(folder, args)
        for part in args.only:
            for size in args.sizes if part in ("generate", "update") else args.rows:
                globals()[f"bench_{part}"](bench, size)
                if args.out:  # it is long: what is measured is kept
                    with open(args.out, "w", encoding="utf-8") as file:
                        print(json.dumps({**report, "entries": bench.entries}, indent=1), file=file)
    print(*table(bench.entries), sep="\n")


if __name__ == "__main__":
    main(ARGS)
