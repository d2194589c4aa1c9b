"""What bench.py and gpu.py share: models and their work, the meter, the roofline, the report.

    clock     Work is timed in wall seconds and in CPU seconds of this process. On a CPU with one
              thread speeds are per CPU second, which neighbours on the machine disturb little;
              with more threads or on a GPU per wall second.
    extra     The peak of memory beyond what is held before the work: the weights, and in an update
              the optimizer's moments and the gradients. PyTorch's on a GPU, the process's on a CPU.
    roofline  A machine computes so many products a second and reads so many bytes a second, and no
              more: a large matrix product and a matrix-vector product tell these two rates anew in
              every round. What must be done (each prompt once, no padding) cannot take less than
              its products at the one rate, or reading its weights and cache at the other, whichever
              is longer. This least time as a share of the time that it took is the roofline: at
              100 % nothing is left to gain on this machine.
"""
import contextlib
import ctypes
import dataclasses
import json
import os
import random
import statistics
import sys
import time

import torch
import transformers

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)
from data import countdown, make_tiny


# ---- Models, prompts, rollouts -------------------------------------------------------------------
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
    "toy": Size(2, 4, 8, 4, (2, 4, 8), qwen2(64, 32, 2, 2, 1, 64)),  # for tests
    "tiny": Size(48, 16, None, 24, (64, 256, 768)),
    "tiny-64": Size(150, 64, None, 18, (256, 512, 1024)),  # an evaluation
    "25m": Size(4, 16, 64, 32, (16, 32, 64), qwen2(4096, 512, 8, 8, 2, 1408)),
    "0.5b": Size(1, 16, 128, 64, (4, 8, 16), qwen2(151936, 896, 24, 14, 2, 4864), update_n=12),
    "1.5b": Size(16, 16, 128, 64, (64, 128, 256), qwen2(151936, 1536, 28, 12, 2, 8960)),
    # A round of the recipe for Qwen2.5-Math-1.5B.
    "1.5b-2048": Size(32, 8, 128, 2048, (64, 128, 256), qwen2(151936, 1536, 28, 12, 2, 8960)),
}


def make_folder(bench, name):
    """A model folder and a prompt file of this size."""
    size, folder = SIZES[name], bench.embedded
    if size.config:
        folder = os.path.join(bench.folder, name)
        if not os.path.exists(folder):
            torch.manual_seed(0)
            # Larger than 0.02, so that a model of random weights prefers some tokens over others.
            config = transformers.Qwen2Config(**size.config, initializer_range=0.05)
            transformers.Qwen2ForCausalLM(config).save_pretrained(folder)
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


def write_scored(path, prompts, n, vocab, lengths):
    """Scored rollouts, n a prompt (token ids), every second one right, of lengths[0] to lengths[1]
    random tokens; returns the rows."""
    rng, rows = random.Random(0), []
    for problem, prompt in enumerate(prompts):
        for k in range(n):
            completion = [rng.randrange(vocab) for _ in range(rng.randint(*lengths))]
            rows.append({
                "id": f"{problem}", "sample": k, "prompt_ids": prompt,
                "completion_ids": completion, "logprobs": [-1.0] * len(completion),
                "finish_reason": "stop", "correct": k % 2 == 0, "reward": float(k % 2 == 0)})
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return rows


def generate_flags(size, folder, prompts, out, **more):
    """The command line of generate.py for a size; more: other flags, with _ for -."""
    flags = {"model": folder, "prompts": prompts, "out": out, "n": size.n,
             "max_new_tokens": size.new_tokens, **more}
    words = [f"--{key.replace('_', '-')}={value}" for key, value in flags.items()]
    return words + ["--ignore-eos"] * bool(size.config)


# ---- Measuring -----------------------------------------------------------------------------------
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
            # What was freed must not stand in for what is needed next.
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM
            now = proc_status("VmRSS")
        self.base = now if self.base is None else self.base
        self.began = time.perf_counter(), time.process_time()
        return self

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
            meter = Meter(bench.device).start()
            for _ in range(repeats):
                function()
            meter.stop()
            took.append(meter.result(0)[bench.clock] / repeats)
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


def groups_of(rows, n):
    """Rollout rows, n a prompt, as `needed` wants them."""
    return [(len(rows[i]["prompt_ids"]), [len(row["completion_ids"]) for row in rows[i:i + n]])
            for i in range(0, len(rows), n)]


class Bench:
    """The settings of a call, the folder of its files, and what it measured."""

    def __init__(self, folder, device, rounds, threads=1, embedded=None):
        self.folder, self.rounds, self.threads, self.embedded = folder, rounds, threads, embedded
        self.device = "cpu" if device == "cpu" or not torch.cuda.is_available() else "cuda:0"
        self.dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        self.clock = "cpu_s" if self.device == "cpu" and threads == 1 else "wall_s"
        self.count, self.entries = 0, {}

    def fresh(self, name):
        """A path that nothing has yet."""
        self.count += 1
        return os.path.join(self.folder, f"{self.count}-{name}")

    def speed(self, result):
        """Tokens a second, by the clock that counts."""
        return result["tokens"] / result[self.clock]

    def add(self, part, size, arms, work, machine, **more):
        """Keep the rounds of an entry.

        arms: {name: [result a round], or the reason why there is none}, ours first.
        work: [(FLOP, bytes) a round] of the first arm; for others it grows with their tokens.
        """
        ours, entry = next(iter(arms.values())), {}
        least = [max(flop / rate["flop_per_s"], read / rate["bytes_per_s"]) / result["tokens"]
                 for result, (flop, read), rate in zip(ours, work, machine)]  # seconds a token
        for name, results in arms.items():
            if isinstance(results, str):
                entry[name] = {"missing": results}
                continue
            speeds = [self.speed(result) for result in results]
            ratios = [self.speed(one) / speed for one, speed in zip(ours, speeds)]
            entry[name] = {
                "tokens_per_s": statistics.median(speeds),
                "roofline": statistics.median(a * b for a, b in zip(speeds, least)),
                "extra_bytes": max(result["extra_bytes"] for result in results), "rounds": results,
                "ours_is_faster": [statistics.median(ratios), min(ratios), max(ratios)]}
        self.entries[f"{part}/{size}"] = {
            "arms": entry, "machine": machine, "clock": self.clock, "threads": self.threads,
            "device": self.device, "dtype": str(self.dtype).removeprefix("torch."), **more}


# ---- Figures -------------------------------------------------------------------------------------
RATIO = "{:.2f} [{:.2f}, {:.2f}]"  # median, least, most


def write(path, text):
    """Whole and at once: who is killed leaves the old file or the new one."""
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(file.name, path)


def processor():
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        return next(line.split(":")[1].strip() for line in file if line.startswith("model name"))


def save(out, entries):
    """Put the entries into the JSON file `out`, if any, beside those that it holds already."""
    report = {"entries": {}}
    if out and os.path.exists(out):
        with open(out) as file:
            report = json.load(file)
    report["machine"] = {
        "processor": processor(), "cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "torch": torch.__version__, "transformers": transformers.__version__}
    report["entries"].update(entries)
    if out:
        write(out, json.dumps(report, indent=1) + "\n")
    return report


def print_arms(entries):
    """The arms of all entries as a table."""
    grid = [["", "", "tokens/s", "roofline", "extra MiB", "ours is faster by"]]
    for key, entry in sorted(entries.items()):
        for place, (arm, one) in enumerate(entry["arms"].items()):
            if "missing" in one:
                grid.append([key, arm, "-", "-", "-", one["missing"]])
                continue
            grid.append([key, arm, f"{one['tokens_per_s']:,.0f}", f"{one['roofline']:.1%}",
                         f"{one['extra_bytes'] / 2**20:,.0f}",
                         RATIO.format(*one["ours_is_faster"]) if place else ""])
    widths = [max(map(len, column)) for column in zip(*grid)]
    widths[-1] = 0  # it may hold a long error
    for line in grid:
        print(f"| {' | '.join(map(str.ljust, line, widths))} |")
