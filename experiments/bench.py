"""Speed and memory of the stages beside what one would use instead, A and B in turns.

    python experiments/bench.py --out experiments/bench_cpu.json    # everything; some 15 minutes
    python experiments/bench.py --sizes tiny --only generate step --rounds 5
    python experiments/bench.py --only scale --plot experiments/scale.png

    generate  generate.py against `model.generate` (the best of three batch sizes),
              `generate_batch` (continuous batching) and itself with --attention model; with
              --threads N on a CPU also N processes of one thread each, as torchrun starts them
    update    train.py's update against a plain one: prompt and completion in padded rows, full
              logits
    step      generate.py, score.py and train.py against a step of TRL's GRPOTrainer at equal
              settings, if TRL is there
    scale     each stage as a process of its own at growing numbers of rows: time and peak memory
    fixed     what a round costs before it does anything: process start, imports, loading, saving

Sizes: `tiny` is the embedded model with its own prompts and its end-of-text token, a quarter of a
round of the suite, `tiny-64` the same with 150 prompts x 64 samples of 18 tokens at most. The
others are random Qwen2 models which never stop early: 25m, and the shapes of Qwen2.5-0.5B and 1.5B
with their vocabulary of 151,936. On a GPU the same arms run in bf16 (fp32 masters in the updates);
there --sizes 0.5b 1.5b is what makes sense, and 1.5b-2048, a round of the recipe for
Qwen2.5-Math-1.5B: 32 x 8 rollouts of 2048 tokens.

How it is measured. Each round runs a matrix product, a matrix-vector product and all arms once; a
ratio is taken within a round, and the table shows medians and the range. Before the first round
each arm runs once, sampling with a quarter of the new tokens. On a CPU with one thread (the
default) times are CPU seconds of the process, so that neighbours on the machine disturb little;
otherwise wall seconds. Both stand in the JSON. Loading of models and digests of files are left out
of all arms and reported under `fixed`. Tokens are completion tokens.
    roofline  the time that the *needed* work (each prompt once, no padding) takes at the measured
              rates, as a share of the time that it took: products at the rate of the matrix
              product, or the reading of weights and cache at the rate of the matrix-vector
              product, whichever is longer
    extra     the peak of memory beyond what is held before: weights and optimizer, and in `update`
              the gradients, too
Writes --out as JSON; the entries of an existing file that this call does not measure stay as they
are.
"""
import argparse
import contextlib
import copy
import ctypes
import dataclasses
import functools
import io
import json
import logging
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass
class Size:
    """A model and the work it is given."""
    prompts: int
    n: int                      # samples a prompt
    prompt_tokens: int | None   # None: the embedded model's own prompts
    new_tokens: int
    batches: tuple              # batch sizes that model.generate may choose from
    config: dict | None = None  # of a random Qwen2; None: the embedded model
    update_n: int | None = None  # samples a prompt in `update`, where all do not fit the plain way


def qwen2(vocab, hidden, layers, heads, kv_heads, intermediate):
    return {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "intermediate_size": intermediate, "tie_word_embeddings": True,
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": 1}


SIZES = {
    "toy": Size(2, 4, 8, 4, (2, 4, 8), qwen2(64, 32, 2, 2, 1, 64)),  # for the test of this script
    "tiny": Size(48, 16, None, 24, (64, 256, 768)),
    "tiny-64": Size(150, 64, None, 18, (256, 512, 1024)),  # an evaluation
    "25m": Size(4, 16, 64, 32, (16, 32, 64), qwen2(4096, 512, 8, 8, 2, 1408)),
    "0.5b": Size(1, 16, 128, 64, (4, 8, 16), qwen2(151936, 896, 24, 14, 2, 4864), update_n=12),
    "1.5b": Size(16, 16, 128, 64, (64, 128, 256), qwen2(151936, 1536, 28, 12, 2, 8960)),
    # A round of the recipe for Qwen2.5-Math-1.5B.
    "1.5b-2048": Size(32, 8, 128, 2048, (64, 128, 256), qwen2(151936, 1536, 28, 12, 2, 8960)),
}
PARTS = ("generate", "update", "step", "scale", "fixed")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    # what is measured
    parser.add_argument("--sizes", nargs="+", default=["tiny", "25m", "0.5b"], choices=SIZES,
                        help="default: %(default)s")
    parser.add_argument("--only", nargs="+", default=PARTS, choices=PARTS, help="default: all")
    parser.add_argument("--rounds", type=int, default=3,
                        help="rounds after the warm-up (default %(default)s)")
    parser.add_argument("--rows", nargs="+", type=int, default=[10**4, 10**5, 10**6],
                        help="scale: rows of score.py and evaluate.py (default %(default)s)")
    parser.add_argument("--rollouts", nargs="+", type=int, default=[10**3, 10**4],
                        help="scale: rows of generate.py and train.py (default %(default)s)")
    # with what
    parser.add_argument("--embedded", default=os.path.join(ROOT, "data", "tiny-countdown"),
                        help="the embedded model's folder (default %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"],
                        help="auto: cuda if there is one")
    # where it goes
    parser.add_argument("--out", help="JSON file of all figures (default: the table alone)")
    parser.add_argument("--plot", help="PNG file of `scale` (default: none)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports, and before they read the number of threads
    os.environ["OMP_NUM_THREADS"] = str(ARGS.threads)

import numpy as np
import torch
import transformers

sys.path.insert(0, ROOT)
import generate
import score
import train
from data import countdown, make_tiny
from data import policy as policies
from data.files import read_rows
from data.report import COLOURS, new_figure
from experiments.bench_files import write_rollouts


# ---- Measuring -----------------------------------------------------------------------------------
LIBC = ctypes.CDLL(None)


def proc_status(field):
    """Bytes of a line of /proc/self/status: VmRSS is the memory now, VmHWM its peak."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(field))


class Meter:
    """Seconds (wall, CPU) and the peak of extra memory of what runs between start() and stop()."""

    def __init__(self, device):
        self.cuda, self.base, self.extra, self.wall, self.cpu = device != "cpu", None, 0, 0.0, 0.0

    def start(self):
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            now = torch.cuda.memory_allocated()
        else:
            LIBC.malloc_trim(0)  # what was freed must not stand in for what is needed next
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM
            now = proc_status("VmRSS")
        self.base = now if self.base is None else self.base
        self.began = time.perf_counter(), time.process_time()

    def stop(self):
        if self.cuda:
            torch.cuda.synchronize()
        self.wall += time.perf_counter() - self.began[0]
        self.cpu += time.process_time() - self.began[1]
        peak = torch.cuda.max_memory_allocated() if self.cuda else proc_status("VmHWM")
        self.extra = max(self.extra, peak - self.base)

    def outside(self, function):
        """The same function, not measured."""
        def call(*args, **flags):
            self.stop()
            try:
                return function(*args, **flags)
            finally:
                self.start()
        return call

    def result(self, tokens):
        return {"tokens": tokens, "wall_s": self.wall, "cpu_s": self.cpu, "extra_bytes": self.extra}


def rates(bench):
    """FLOP/s of a square matrix product and bytes/s of a matrix-vector product, at this moment."""
    side, repeats = (8192, 10) if bench.device != "cpu" else (1536, 1)
    square = torch.randn(side, side, dtype=bench.dtype, device=bench.device)
    columns = 2**16 if bench.device != "cpu" else 2**13
    wide = torch.randn(8192, columns, dtype=bench.dtype, device=bench.device)
    vector, best = wide[0].clone(), []
    for work, function in ((2 * side**3, lambda: square @ square),
                           (wide.numel() * wide.element_size(), lambda: wide @ vector)):
        function()
        took = []
        for _ in range(4):
            meter = Meter(bench.device)
            meter.start()
            for _ in range(repeats):
                function()
            meter.stop()
            took.append(bench.seconds(meter.result(0)) / repeats)
        best.append(work / min(took))
    return dict(zip(("flop_per_s", "bytes_per_s"), best))


def needed(config, rows, element_size, training):
    """(FLOP, bytes) that a batch needs. rows: [(prompt length, completion lengths of its samples)].

    Each prompt counts once, a completion's last token goes through no layer, and the head sees one
    hidden state a completion token. Training: three times the products; its bytes are left out.
    """
    head_dim = config.hidden_size // config.num_attention_heads
    kv_width = config.num_key_value_heads * head_dim
    width, layers = config.hidden_size, config.num_hidden_layers
    linear = width * (2 * width + 2 * kv_width + 3 * config.intermediate_size)
    tokens = contexts = completion = 0
    for prompt, lengths in rows:
        spans = [(1, prompt + 1)]  # first context, last + 1
        spans += [(prompt + 1, prompt + length) for length in lengths]
        tokens += sum(last - first for first, last in spans)
        contexts += sum((first + last - 1) * (last - first) // 2 for first, last in spans)
        completion += sum(lengths)
    head = config.vocab_size * width
    flop = layers * (2 * linear * tokens + 4 * width * contexts) + 2 * head * completion
    steps = max(max(lengths) for _, lengths in rows)
    read = steps * (layers * linear + head) + 2 * layers * kv_width * contexts
    return (3 * flop, 0) if training else (flop, read * element_size)


class Bench:
    """The settings of this call and what it measured."""

    def __init__(self, args, folder):
        self.args, self.folder, self.count = args, folder, 0
        self.device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else "cuda:0"
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.clock = "cpu_s" if self.device == "cpu" and args.threads == 1 else "wall_s"
        self.entries = {}

    def seconds(self, result):
        return result[self.clock]

    def fresh(self, name):
        """A path that nothing has yet."""
        self.count += 1
        return os.path.join(self.folder, f"{self.count}-{name}")

    def add(self, part, size, arms, work, machine, **more):
        """Keep the rounds of an entry.

        arms: {name: [result a round], or the reason why there is none}, ours first.
        work: [(FLOP, bytes) a round] of the first arm; for others it grows with their tokens.
        """
        ours, entry = next(iter(arms)), {}
        for name, results in arms.items():
            if isinstance(results, str):
                entry[name] = {"missing": results}
                continue
            shares = []
            for result, base, (flop, read), rate in zip(results, arms[ours], work, machine):
                scale = result["tokens"] / base["tokens"] / self.seconds(result)
                shares.append(scale * max(flop / rate["flop_per_s"], read / rate["bytes_per_s"]))
            speeds = [result["tokens"] / self.seconds(result) for result in results]
            ratios = [base["tokens"] / self.seconds(base) * self.seconds(result) / result["tokens"]
                      for result, base in zip(results, arms[ours])]
            entry[name] = {
                "tokens_per_s": statistics.median(speeds), "roofline": statistics.median(shares),
                "extra_bytes": max(result["extra_bytes"] for result in results), "rounds": results,
                "ours_is_faster": [statistics.median(ratios), min(ratios), max(ratios)]}
        self.entries[f"{part}/{size}"] = {
            "arms": entry, "machine": machine, "clock": self.clock, "threads": self.args.threads,
            "device": self.device, "dtype": str(self.dtype).removeprefix("torch."), **more}


# ---- The models and their prompts ----------------------------------------------------------------
def make_folder(bench, name):
    """A model folder and a prompt file of this size."""
    size, folder = SIZES[name], bench.args.embedded
    if size.config:
        folder = os.path.join(bench.folder, name)
        if not os.path.exists(folder):
            torch.manual_seed(0)
            # Larger than 0.02, so that a model of random weights prefers some tokens over others.
            config = transformers.Qwen2Config(**size.config, initializer_range=0.05)
            model = transformers.Qwen2ForCausalLM(config)
            model.save_pretrained(folder)
            make_tiny.make_tokenizer().save_pretrained(folder)
    prompts = os.path.join(bench.folder, f"{name}.jsonl")
    if not os.path.exists(prompts):
        write_prompts(prompts, size.prompts, size.prompt_tokens)
    return folder, prompts


def write_prompts(path, count, tokens=None):
    """Countdown problems; with `tokens`, their prompts repeat themselves up to that length."""
    flags = countdown.parse_args(["--out", path, "--n", str(count)])
    with open(path, "w") as file:
        for problem in countdown.problems(flags):
            numbers = " ".join(map(str, problem["numbers"]))
            prompt = countdown.TEMPLATES["plain"].format(numbers=numbers, target=problem["target"])
            problem["prompt"] = (prompt * -(-tokens // len(prompt)))[-tokens:] if tokens else prompt
            file.write(json.dumps(problem) + "\n")


def generate_flags(size, folder, prompts, out, **more):
    flags = {"model": folder, "prompts": prompts, "out": out, "n": size.n,
             "max-new-tokens": size.new_tokens, **more}
    flags = [part for key, value in flags.items() for part in (f"--{key}", str(value))]
    return flags + ["--ignore-eos"] * bool(size.config)


def lengths_of(completions, prompts):
    """[(prompt length, completion lengths)], as `needed` wants them, of [(problem, ids)]."""
    return [(len(ids), [len(own) for problem, own in completions if problem == i])
            for i, ids in enumerate(prompts)]


def groups_of(rows, n):
    """The same of rollout rows, n a prompt."""
    return [(len(rows[i]["prompt_ids"]), [len(row["completion_ids"]) for row in rows[i:i + n]])
            for i in range(0, len(rows), n)]


# ---- generate: against model.generate and generate_batch -----------------------------------------
def same_tokens(one, other, prompts, resamples=999):
    """p-value of a permutation test: do two samplers' completions hold the same tokens?

    Rows change sides within their prompt. Statistic: chi-square of the counts (in 64 classes of
    ids). one, other: [(problem, ids)].
    """
    owner = np.array([problem for problem, _ in one + other])
    counts = np.array([np.bincount(np.asarray(ids) % 64, minlength=64) for _, ids in one + other])
    side = np.repeat([1, -1], [len(one), len(other)])
    rng, found = np.random.default_rng(0), []
    for resample in range(resamples + 1):
        if resample:
            for problem in range(prompts):
                side[owner == problem] = rng.permutation(side[owner == problem])
        found.append(((side @ counts) ** 2 / np.maximum(counts.sum(0), 1)).sum())
    return float(np.mean(np.array(found) >= found[0] - 1e-9))


class Samplers:
    """The arms of `generate` on one model and one file of prompts.

    An arm is called with (new_tokens, seed) and returns a function that gives its completions,
    [(problem, ids)]: turning them into lists is not measured.
    """

    def __init__(self, bench, name):
        self.bench, self.size, (self.folder, self.path) = bench, SIZES[name], make_folder(bench,
                                                                                          name)
        options = generate.check_model(self.folder)
        self.tokenizer = generate.load_tokenizer(self.folder, options)
        load = (self.folder, bench.dtype, bench.device, options)
        self.model, self.other = generate.load_model(*load), generate.load_model(*load)
        generate.choose_attention(self.model, bench.device)  # the other keeps transformers' own
        self.problems = generate.load_problems(self.path)
        self.ends = [] if self.size.config else generate.end_ids(self.model, self.tokenizer)
        self.prompts = generate.encode(self.problems, self.tokenizer, self.model.config,
                                       self.size.new_tokens)
        self.longest = max(map(len, self.prompts))
        self.rows = [i for i in range(len(self.prompts)) for _ in range(self.size.n)]

    def cut(self, ids):
        """A completion up to its end-of-text token."""
        last = [k for k, one in enumerate(ids) if one in self.ends][:1]
        return ids[:last[0] + 1] if last else ids

    def chunks(self, new_tokens, seed, budget=None):
        """generate.py's flags and its chunks of at most `budget` tokens (default: the flag's)."""
        more = {"max-new-tokens": new_tokens, "seed": seed}
        args = generate.parse_args(generate_flags(self.size, self.folder, self.path, "-", **more))
        lengths = [len(ids) for ids in self.prompts]
        budget = budget or args.max_batch_tokens
        return args, generate.chunks_of(lengths, self.size.n, new_tokens, budget)

    def run_chunk(self, chunk, model, args):
        return generate.run_chunk(chunk, self.problems, self.prompts, model, self.tokenizer,
                                  self.ends, args)

    def ours(self, new_tokens, seed, model=None):
        args, chunks = self.chunks(new_tokens, seed)
        lines = [self.run_chunk(chunk, model or self.model, args) for chunk in chunks]
        return lambda: [(problem, json.loads(line)["completion_ids"])
                        for chunk, part in zip(chunks, lines)
                        for (problem, _), line in zip(chunk, part)]

    def with_their_attention(self, new_tokens, seed):
        return self.ours(new_tokens, seed, self.other)

    def processes(self, new_tokens, seed):
        """One process a core, as torchrun starts them: here forked, since loading is not measured.
        """
        ranks, children, out = self.bench.args.threads, [], self.bench.fresh("chunk")
        budget = -(-len(self.rows) // ranks) * (self.longest + new_tokens)  # a chunk a process
        args, chunks = self.chunks(new_tokens, seed, budget)
        for rank in range(ranks):
            children.append(os.fork())
            if not children[-1]:
                torch.set_num_threads(1)
                for number in range(rank, len(chunks), ranks):
                    with open(f"{out}-{number}", "w") as file:
                        file.writelines(self.run_chunk(chunks[number], self.model, args))
                os._exit(0)
        for child in children:
            os.waitpid(child, 0)

        def read():
            for number in range(len(chunks)):
                with open(f"{out}-{number}") as file:
                    yield from ((0, json.loads(line)["completion_ids"]) for line in file)

        return lambda: list(read())

    def settings(self, new_tokens):
        return transformers.GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=1,
            max_new_tokens=new_tokens, eos_token_id=self.ends or None)

    def huggingface(self, new_tokens, seed, batch):
        """`model.generate` on padded batches."""
        torch.manual_seed(seed)
        found, device = [], self.bench.device
        for start in range(0, len(self.rows), batch):
            part = [self.prompts[i] for i in self.rows[start:start + batch]]
            longest = max(map(len, part))
            ids = [[1] * (longest - len(one)) + one for one in part]
            mask = [[0] * (longest - len(one)) + [1] * len(one) for one in part]
            sampled = self.other.generate(
                input_ids=torch.tensor(ids, device=device),
                attention_mask=torch.tensor(mask, device=device),
                generation_config=self.settings(new_tokens))
            found += sampled[:, longest:].tolist()
        return lambda: [(problem, self.cut(ids)) for problem, ids in zip(self.rows, found)]

    def continuous(self, new_tokens, seed):
        """`generate_batch`."""
        torch.manual_seed(seed)
        config = transformers.ContinuousBatchingConfig(return_logprobs=False)
        if self.bench.device == "cpu":  # by itself it would size its cache by a GPU's memory
            pages = -(-(self.longest + new_tokens) // 256)
            config.num_blocks = pages * len(self.rows) + 8
            config.max_batch_tokens = max(256, len(self.rows))
        found = self.other.generate_batch(
            [self.prompts[i] for i in self.rows], generation_config=self.settings(new_tokens),
            continuous_batching_config=config, progress_bar=False)
        if len(found) < len(self.rows):
            raise RuntimeError(f"{len(self.rows) - len(found)} of {len(self.rows)} rows did not "
                               "come back")
        return lambda: [(0, one.generated_tokens) for one in found.values()]


def timed(bench, arm, *args):
    """(completions, result) of an arm."""
    meter = Meter(bench.device)
    meter.start()
    read = arm(*args)
    meter.stop()
    completions = read()
    return completions, meter.result(sum(len(ids) for _, ids in completions))


def best_batch(bench, samplers, new_tokens):
    """The batch size at which model.generate is fastest."""
    speed = {}
    for batch in samplers.size.batches:
        _, result = timed(bench, samplers.huggingface, new_tokens, 0, batch)
        speed[batch] = result["tokens"] / bench.seconds(result)
    return max(speed, key=speed.get)


def bench_generate(bench, name):
    samplers = Samplers(bench, name)
    size, model, prompts = samplers.size, samplers.model, samplers.prompts
    # 1. Warm-up, in which model.generate's batch size is chosen.
    warm = max(1, size.new_tokens // 4)
    timed(bench, samplers.ours, warm, 0)
    batch = best_batch(bench, samplers, warm)
    peer = functools.partial(samplers.huggingface, batch=batch)
    arms = {"generate.py": samplers.ours, f"model.generate, batch {batch}": peer,
            "generate_batch": samplers.continuous}
    if generate.attention_of(model) == "shared":
        arms["generate.py --attention model"] = samplers.with_their_attention
    if bench.device == "cpu" and bench.args.threads > 1:
        arms[f"generate.py, {bench.args.threads} processes"] = samplers.processes
    found = {arm: [] for arm in arms}
    try:
        timed(bench, samplers.continuous, warm, 0)
    except Exception as error:  # it is made for GPUs; whatever it raises belongs into the table
        found["generate_batch"] = f"{type(error).__name__}: {error}"[:200]
    # 2. The rounds.
    work, machine, pooled = [], [], {"generate.py": [], f"model.generate, batch {batch}": []}
    for seed in range(1, bench.args.rounds + 1):
        machine.append(rates(bench))
        for arm, sampler in arms.items():
            if isinstance(found[arm], str):
                continue
            completions, result = timed(bench, sampler, size.new_tokens, seed)
            found[arm].append(result)
            if arm == "generate.py":
                lengths = lengths_of(completions, prompts)
                work.append(needed(model.config, lengths, model.dtype.itemsize, False))
            if arm in pooled:
                pooled[arm] += completions
    p = same_tokens(*pooled.values(), len(prompts))
    bench.add("generate", name, found, work, machine, same_tokens_p=p)


# ---- update: against a plain one -----------------------------------------------------------------
def plain_update(model, optimizer, rows, budget):
    """A GRPO update as one writes it first.

    rows: dicts with prompt, completion (ids) and advantage. Micro-batches of at most `budget`
    tokens, padding included, as in train.py.
    """
    device, tokens = model.device, sum(len(row["completion"]) for row in rows)
    per = max(1, budget // max(len(row["prompt"]) + len(row["completion"]) for row in rows))
    for start in range(0, len(rows), per):
        part = rows[start:start + per]
        longest = max(len(row["prompt"]) + len(row["completion"]) for row in part)
        ids, mask, wanted = (torch.zeros(len(part), longest, dtype=torch.long) for _ in range(3))
        for i, row in enumerate(part):
            first, end = len(row["prompt"]), len(row["prompt"]) + len(row["completion"])
            ids[i, :end] = torch.tensor(row["prompt"] + row["completion"])
            mask[i, :end], wanted[i, first:end] = 1, 1
        ids, mask, wanted = ids.to(device), mask.to(device), wanted[:, 1:].to(device)
        advantage = torch.tensor([row["advantage"] for row in part], device=device)[:, None]
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type != "cpu"):
            logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        logp = logits[:, :-1].float().log_softmax(-1)  # (rows, longest - 1, vocab)
        with torch.no_grad():
            entropy = -(logp.exp() * logp).sum(-1)
        chosen = logp.gather(-1, ids[:, 1:, None]).squeeze(-1)
        ratio = (chosen - chosen.detach()).exp()
        loss = -torch.minimum(ratio * advantage, ratio.clamp(0.8, 1.25) * advantage)
        ((loss * wanted).sum() / tokens).backward()
        del logits, logp, entropy, chosen
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


def at_rest(optimizer, gradients):
    """The state between two updates: moments of a first step and, if wanted, gradients of zero."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight) if gradients else None
            optimizer.state[weight] = {
                "step": torch.ones((), device=weight.device),
                "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}


def run_train(bench, meter, folder, model, tokenizer, rollouts, gradients, **more):
    """train.py on a model that is loaded already and is not saved.

    The running `meter` leaves out what is replaced.
    """
    def begin(optimizer, policy, folder):
        at_rest(optimizer, gradients)
        meter.base, meter.extra = None, 0
        return 1

    replaced = {"load_tokenizer": lambda *_: tokenizer,
                "load_optimizer": begin, "save_round": lambda *_: None,
                "publish": lambda *_: None, "describe": train.describe, **more}
    replaced = {name: meter.outside(function) for name, function in replaced.items()}
    unchecked = mock.patch.object(train.Policy, "check", meter.outside(lambda *_: None))
    loaded = mock.patch.object(policies, "load_model", meter.outside(lambda *_: model))
    flags = ["--model", folder, "--rollouts", rollouts, "--out", bench.fresh("round"),
             "--temperature", "1", "--device", bench.device.split(":")[0]]
    with mock.patch.multiple(train, **replaced), unchecked, loaded:
        with contextlib.redirect_stderr(io.StringIO()):
            train.main(train.parse_args(flags))
    model.zero_grad(set_to_none=True)


def load_learner(bench, folder):
    """The policy as train.py starts from it, and its tokenizer."""
    options = train.check_model(folder)
    model = policies.load_model(folder, torch.float32, bench.device, options)
    return model, train.load_tokenizer(folder, options)


def random_rollouts(problems, tokenizer, vocab, size):
    """Scored rows with random completions, every second one right."""
    rng, rows = random.Random(0), []
    for problem in problems:
        prompt = tokenizer(problem["prompt"])["input_ids"]
        for k in range(size.update_n or size.n):
            # The embedded model's answers have 7 to 19 tokens; a random model's fill all room.
            length = size.new_tokens if size.config else rng.randint(7, 19)
            completion = [rng.randrange(vocab) for _ in range(length)]
            rows.append({
                "id": problem["id"], "sample": k, "prompt_ids": prompt,
                "completion_ids": completion, "logprobs": [-1.0] * length,
                "finish_reason": "stop", "correct": k % 2 == 0, "reward": float(k % 2 == 0)})
    return rows


def bench_update(bench, name):
    size, (folder, path) = SIZES[name], make_folder(bench, name)
    model, tokenizer = load_learner(bench, folder)
    problems = [row for *_, row in read_rows(path)]
    rows = random_rollouts(problems, tokenizer, model.config.vocab_size, size)
    rollouts = bench.fresh("scored.jsonl")
    with open(rollouts, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    plain = [{"prompt": row["prompt_ids"], "completion": row["completion_ids"],
              "advantage": 2 * row["reward"] - 1} for row in rows]
    tokens = sum(len(row["completion_ids"]) for row in rows)
    work = needed(model.config, groups_of(rows, size.update_n or size.n), 4, True)
    flags = ["--model", folder, "--rollouts", rollouts, "--out", "-"]
    budget = train.parse_args(flags).micro_batch_tokens  # the same for both
    arms, machine = {"train.py": [], "plain PyTorch": []}, []
    for _ in range(bench.args.rounds + 1):
        machine.append(rates(bench))
        meter = Meter(bench.device)
        meter.start()
        run_train(bench, meter, folder, model, tokenizer, rollouts, True,
                  load_rollouts=train.load_rollouts)
        meter.stop()
        arms["train.py"].append(meter.result(tokens))

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
        at_rest(optimizer, gradients=True)
        meter = Meter(bench.device)
        meter.start()
        plain_update(model, optimizer, plain, budget)
        meter.stop()
        model.zero_grad(set_to_none=True)
        del optimizer
        arms["plain PyTorch"].append(meter.result(tokens))
    arms = {arm: results[1:] for arm, results in arms.items()}
    bench.add("update", name, arms, [work] * bench.args.rounds, machine[1:])


# ---- step: against TRL ---------------------------------------------------------------------------
def our_step(bench, meter, size, folder, path, sampler, learner, tokenizer, seed):
    """generate.py, score.py and train.py with their files, on loaded models. The rollouts."""
    rollouts, scored = bench.fresh("rollouts.jsonl"), bench.fresh("scored.jsonl")
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        with mock.patch.multiple(generate, load_model=meter.outside(lambda *_: sampler),
                                 load_tokenizer=meter.outside(lambda *_: tokenizer),
                                 describe=meter.outside(generate.describe)):
            meter.start()
            flags = generate_flags(size, folder, path, rollouts, seed=seed)
            generate.main(generate.parse_args(flags))
        with mock.patch.object(score, "describe", meter.outside(score.describe)):
            score.main(score.parse_args([rollouts, "--out", scored]))
    run_train(bench, meter, folder, learner, tokenizer, scored, False)
    meter.stop()
    with open(rollouts) as file:
        return [json.loads(line) for line in file]


def bench_step(bench, name):
    size, (folder, path) = SIZES[name], make_folder(bench, name)
    learner, tokenizer = load_learner(bench, folder)
    sampler = generate.load_model(folder, bench.dtype, bench.device, generate.check_model(folder))
    arms, machine, work = {"generate.py + score.py + train.py": []}, [], []

    def ours(seed):
        meter = Meter(bench.device)
        rows = our_step(bench, meter, size, folder, path, sampler, learner, tokenizer, seed)
        tokens = sum(len(row["completion_ids"]) for row in rows)
        arms["generate.py + score.py + train.py"].append(meter.result(tokens))
        sizes = learner.config, groups_of(rows, size.n), sampler.dtype.itemsize
        (flop, read), (trained, _) = needed(*sizes, False), needed(*sizes, True)
        rate = machine[-1]
        # As products, the reading that the sampling waits for included.
        work.append((trained + max(flop, read * rate["flop_per_s"] / rate["bytes_per_s"]), 0))

    try:
        import datasets
        import trl
    except ImportError as error:
        for seed in range(bench.args.rounds + 1):
            machine.append(rates(bench))
            ours(seed)
        arms["TRL"] = f"not installed ({error})"
    else:
        problems = [row for *_, row in read_rows(path)]
        data = datasets.Dataset.from_list(
            [{key: row[key] for key in ("prompt", "numbers", "target")} for row in problems])
        arms["TRL"] = trl_rounds(bench, size, data, learner, tokenizer, machine, ours, trl)
    arms = {arm: results if isinstance(results, str) else results[1:]
            for arm, results in arms.items()}
    bench.add("step", name, arms, work[1:], machine[1:])


def trl_rounds(bench, size, data, learner, tokenizer, machine, ours, trl):
    """The results of GRPOTrainer's steps on a copy of the model, each followed by one of ours."""
    results, tokens = [], []

    def reward(completions, completion_ids, numbers, target, **_):
        tokens.append(sum(map(len, completion_ids)))
        rows = (countdown.Row("a", 0, text, "stop", tuple(one), goal)
                for text, one, goal in zip(completions, numbers, target))
        return [float(countdown.verify(row.completion, row).reason == "ok") for row in rows]

    class InTurns(transformers.TrainerCallback):
        def on_step_begin(self, *args, **flags):
            machine.append(rates(bench))
            self.meter = Meter(bench.device)
            self.meter.start()

        def on_step_end(self, args, state, control, **flags):
            self.meter.stop()
            results.append(self.meter.result(tokens.pop()))
            ours(state.global_step)

    config = trl.GRPOConfig(
        # the algorithm, as in train.py --method grpo
        learning_rate=1e-6, lr_scheduler_type="constant", weight_decay=0.01, num_iterations=1,
        beta=0.0, epsilon=0.2, epsilon_high=0.25, loss_type="dapo", scale_rewards="group",
        temperature=1.0, top_p=1.0, top_k=0,
        # the work, all rows of a step at once
        per_device_train_batch_size=size.prompts * size.n, gradient_accumulation_steps=1,
        num_generations=size.n, max_completion_length=size.new_tokens,
        max_steps=bench.args.rounds + 1, gradient_checkpointing=False,
        # the machine
        bf16=bench.device != "cpu", use_cpu=bench.device == "cpu", dataloader_pin_memory=False,
        output_dir=bench.fresh("trl"), report_to="none", logging_strategy="no",
        save_strategy="no", disable_tqdm=True)
    trainer = trl.GRPOTrainer(model=copy.deepcopy(learner), reward_funcs=reward, args=config,
                              processing_class=tokenizer, callbacks=[InTurns()],
                              train_dataset=data)
    with contextlib.redirect_stdout(io.StringIO()):
        trainer.train()
    return results


# ---- scale and fixed: the stages as processes ----------------------------------------------------
# A process starts with the peak memory of the one that starts it: hence a small one in between,
# which reports as JSON.
STARTER = """import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([done.returncode, done.stderr[-500:], time.perf_counter() - began,
                  used.ru_utime + used.ru_stime, used.ru_maxrss * 1024]))"""


def usage(*command):
    """Wall and CPU seconds and the peak memory of a Python process of its own."""
    said = subprocess.run([sys.executable, "-c", STARTER, sys.executable, *command],
                          stdout=subprocess.PIPE, check=True)
    code, errors, wall, cpu, peak = json.loads(said.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)}: {errors}")
    return {"wall_s": wall, "cpu_s": cpu, "peak_bytes": peak}


def stage(name):
    return os.path.join(ROOT, name)


def bench_scale(bench):
    found = {name: [] for name in ("generate.py", "score.py", "train.py", "evaluate.py")}

    def measure(name, rows, *flags):
        found[name].append({"rows": rows, **usage(stage(name), *flags)})

    for rows in bench.args.rows:
        rollouts, scored = bench.fresh("rollouts.jsonl"), bench.fresh("scored.jsonl")
        write_rollouts(rollouts, rows, repeat=False)
        measure("score.py", rows, rollouts, "--out", scored)
        os.remove(rollouts)
        measure("evaluate.py", rows, scored, "--out", bench.fresh("eval.json"))
        os.remove(scored)
    for rows in bench.args.rollouts:
        kinds = ("prompts", "rollouts", "scored")
        prompts, rollouts, scored = (bench.fresh(f"{kind}.jsonl") for kind in kinds)
        write_prompts(prompts, -(-rows // 16))
        model = bench.args.embedded
        measure("generate.py", rows, *generate_flags(SIZES["tiny"], model, prompts, rollouts))
        usage(stage("score.py"), rollouts, "--out", scored)
        measure("train.py", rows, "--model", model, "--rollouts", scored,
                "--out", bench.fresh("round"))
    bench.entries["scale"] = {"stages": found, "threads": bench.args.threads}


def bench_fixed(bench):
    prompts, found = bench.fresh("prompts.jsonl"), {}
    write_prompts(prompts, 1)
    for _ in range(bench.args.rounds):
        rollouts, scored = bench.fresh("rollouts.jsonl"), bench.fresh("scored.jsonl")
        model = ["--model", bench.args.embedded]
        commands = {
            "python -c pass": ["-c", "pass"],
            "import torch": ["-c", "import torch"],
            "import torch, transformers": ["-c", "import torch, transformers"],
            "train.py --help": [stage("train.py"), "--help"],
            "score.py --help": [stage("score.py"), "--help"],
            "generate.py": [stage("generate.py"), *model, "--prompts", prompts, "--out", rollouts,
                            "--n", "2", "--max-new-tokens", "2"],
            "score.py": [stage("score.py"), rollouts, "--out", scored],
            "train.py": [stage("train.py"), *model, "--rollouts", scored,
                         "--out", bench.fresh("round")],
            "evaluate.py": [stage("evaluate.py"), scored, "--out", bench.fresh("eval.json")]}
        for label, command in commands.items():
            found.setdefault(label, []).append(usage(*command))
    middle = {label: {key: statistics.median(one[key] for one in results) for key in results[0]}
              for label, results in found.items()}
    bench.entries["fixed"] = {"threads": bench.args.threads, "commands": middle}


def plot_scale(entry, path):
    """Left CPU time, right peak memory, against rows."""
    figure, axes = new_figure(1, 2, 9.4, 3.6)
    for (name, results), colour, marker in zip(entry["stages"].items(), COLOURS[1:], "os^D"):
        for axis, key, unit in zip(axes, ("cpu_s", "peak_bytes"), (1, 2**20)):
            axis.plot([one["rows"] for one in results], [one[key] / unit for one in results],
                      color=colour, marker=marker, markersize=4.5, label=name)
    axes[0].set(title="CPU time of the process (s), start included", xscale="log", yscale="log")
    axes[1].set(title="Peak memory of the process (MiB)", xscale="log", ylim=(0, None))
    axes[0].legend()
    figure.supxlabel("rows", fontsize="medium")
    figure.savefig(path, dpi=200)


# ---- The report ----------------------------------------------------------------------------------
def told(one):
    peak = one["peak_bytes"] / 2**20
    return f"{one['cpu_s']:8.2f} s CPU {one['wall_s']:8.2f} s wall {peak:8,.0f} MiB"


def print_table(entries):
    grid = [["", "", "tokens/s", "roofline", "extra MiB", "ours is faster by"]]
    for key, entry in sorted(entries.items()):
        for arm, one in entry.get("arms", {}).items():
            if "missing" in one:
                grid.append([key, arm, "-", "-", "-", one["missing"]])
                continue
            middle, low, high = one["ours_is_faster"]
            ratio = f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            if arm == next(iter(entry["arms"])):
                ratio = ""
            grid.append([key, arm, f"{one['tokens_per_s']:,.0f}", f"{one['roofline']:.1%}",
                         f"{one['extra_bytes'] / 2**20:,.0f}", ratio])
    widths = [max(map(len, column)) for column in zip(*grid)][:-1]
    for line in grid if len(grid) > 1 else ():
        cells = (cell.ljust(width) for cell, width in zip(line, (*widths, 0)))
        print(f"| {' | '.join(cells)} |")
    for name, results in entries.get("scale", {"stages": {}})["stages"].items():
        for one in results:
            print(f"{name:12} {one['rows']:>9,} rows: {told(one)}")
    for label, one in entries.get("fixed", {"commands": {}})["commands"].items():
        print(f"{label:28} {told(one)}")


def processor():
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))


def save(args, entries):
    """Put the entries into the JSON file, beside those that it holds already."""
    report = {"entries": {}}
    if args.out and os.path.exists(args.out):
        with open(args.out) as file:
            report = json.load(file)
    report["machine"] = {
        "processor": processor(), "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "transformers": transformers.__version__}
    report["entries"].update(entries)
    if args.out:
        with open(args.out + ".partial", "w") as file:
            file.write(json.dumps(report, indent=1) + "\n")
        os.replace(file.name, args.out)
    return report


def main(args):
    torch.set_num_threads(args.threads)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    by_size = {"generate": bench_generate, "update": bench_update, "step": bench_step}
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, folder)
        for part in args.only:
            for size in args.sizes if part in by_size else ():
                by_size[part](bench, size)
                save(args, bench.entries)  # it is long: what is measured is kept
            if part in ("scale", "fixed"):
                {"scale": bench_scale, "fixed": bench_fixed}[part](bench)
    report = save(args, bench.entries)
    if args.plot:
        plot_scale(report["entries"]["scale"], args.plot)
    print_table(bench.entries)
    return report


if __name__ == "__main__":
    main(ARGS)
