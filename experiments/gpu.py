"""What this repository does on a GPU, measured part by part, into tables as the READMEs have them.

    python experiments/gpu.py --out gpu.json                    # all parts in turn, 10 minutes each
    python experiments/gpu.py --out gpu.json --part kernel      # one part; the others' figures stay
    python experiments/gpu.py --out gpu.json --dry              # toy sizes on a CPU: two minutes
    python experiments/gpu.py --cost 7b --gpus 8 [--out gpu.json]     # see experiments/cost.md

    kernel    the kernel's table (bench_kernel.py) and its gates
    tests     the kernel's tests, and the stages beside those of the CPU (tests/test_cuda.py)
    generate  generate.py: 256 rows at once of 128 + 256 tokens, bf16
    update    train.py: its share of the matrix peak, its peak memory beside what it announces
    pipeline  two rounds by their commands, process starts included; and this machine's rates of
              hashing, saving and loading
    peers     bench.py's arms: model.generate, generate_batch, a plain update, TRL's GRPOTrainer

Models have random weights at the shapes of Qwen2.5-0.5B and 1.5B (--sizes). Every figure is
written as soon as it is there: to --out as JSON, and to the same name with .md as tables. What
fails, is missing or found no time says so in its row. --cost puts the rates measured here in place
of assumed ones.

    of bandwidth  bytes that the work must read (weights at each step, keys and values) / time /
                  bytes a second of a copy in the same process
    of products   FLOP that the work needs (each prompt once, no padding; training: three times a
                  forward pass) / time / FLOP a second of large matrix products in the same process
"""
import argparse
import dataclasses
import gc
import importlib.util
import json
import logging
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PARTS = ("kernel", "tests", "generate", "update", "pipeline", "peers")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    # what is measured
    add("--part", choices=["all", *PARTS], default="all", help="default %(default)s")
    add("--dry", action="store_true", help="toy sizes on the CPU: does every part work?")
    add("--sizes", nargs="+", choices=["0.5b", "1.5b"], default=["0.5b", "1.5b"],
        help="shapes (default: both; pipeline takes the last one, peers the first)")
    add("--minutes", type=float, default=9.5, help="time limit of a part (default %(default)s)")
    # what is computed instead
    add("--cost", choices=["0.5b", "1.5b", "7b"],
        help="print what a round costs at this size, at the rates that --out holds")
    add("--gpus", type=int, default=1, help="of --cost (default %(default)s)")
    # where it goes
    add("--out", help="JSON file of all figures; the tables are written beside it as Markdown")
    args = parser.parse_args(argv)
    if not (args.out or args.cost):
        parser.error("--out is required")
    if args.out and not args.out.endswith(".json"):
        parser.error("--out must end with .json")
    if args.out and not os.path.isdir(os.path.dirname(os.path.abspath(args.out))):
        parser.error(f"--out {args.out}: no such folder")
    return args


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports

sys.path.insert(0, ROOT)
import torch
import transformers

import generate
from experiments import bench, bench_kernel, cost, roofline
from experiments.roofline import SIZES, generate_flags

BATCH = 16  # problems a chunk and an update; times 16 samples: 256 rows
CHUNKS = 3  # the first one warms up


# ---- The report ----------------------------------------------------------------------------------
class Report:
    """The figures of all parts; every change is written at once."""

    def __init__(self, out):
        self.out, self.found = out, {"parts": {}, "rates": {}}
        if out and os.path.exists(out):
            with open(out, encoding="utf-8") as file:
                self.found = json.load(file)

    def begin(self, part, machine):
        """Forget what an earlier run of this part wrote."""
        self.part = self.found["parts"][part] = {"machine": machine, "tables": {}}

    def add(self, table, row):
        """row: {column: text, number or None}."""
        self.part["tables"].setdefault(table, []).append(row)
        print(f"{table} | " + ", ".join(f"{key} {shown(key, one)}".strip()
                                        for key, one in row.items()), flush=True)
        self.write()

    def rate(self, name, value):
        """A rate that --cost takes, in the unit that cost.py has for it."""
        where = f"measured on {self.part['machine']}"
        self.found["rates"][name] = [value, cost.RATES[name][1], where]
        self.write()

    def write(self):
        roofline.write(self.out, json.dumps(self.found, indent=1) + "\n")
        roofline.write(self.out.removesuffix(".json") + ".md", markdown(self.found))


def shown(column, value):
    """A figure as the tables have it; what is a share of something is told in per cent."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    if column.startswith("of "):
        return f"{value:.1%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(found):
    """All tables of a report as Markdown, the machine before each part's."""
    lines = []
    for part, content in found["parts"].items():
        lines.append(f"## {part}\n\n{content['machine']}\n")
        for title, rows in content["tables"].items():
            columns = list(dict.fromkeys(column for row in rows for column in row))
            lines += [f"**{title}**\n", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
            for row in rows:
                cells = [shown(column, row.get(column)) for column in columns]
                lines.append(f"| {' | '.join(cells)} |")
            lines.append("")
    return "\n".join(lines)


class Part:
    """A part that is being measured: its sizes, its time limit, the machine's two roofs."""

    def __init__(self, args, report, folder):
        self.dry, self.report, self.folder = args.dry, report, folder
        self.deadline = time.monotonic() + 60 * args.minutes
        self.bench = roofline.Bench(folder, "cpu" if args.dry else "auto", rounds=2)
        self.device = self.bench.device.split(":")[0]
        self.names = ["toy"] if args.dry else args.sizes
        for name in self.names if not args.dry else ():
            SIZES[name] = dataclasses.replace(SIZES[name], prompts=CHUNKS * BATCH, n=16,
                                              new_tokens=256)
        where = torch.cuda.get_device_name() if self.device == "cuda" else roofline.processor()
        report.begin(args.part, f"{where}, torch {torch.__version__}" + ", dry run" * args.dry)
        self.copy, self.product = roofs(self.device, self.bench.dtype)
        torch.cuda.empty_cache()  # train.py and pytest are processes beside this one
        report.rate("copy", self.copy)
        report.rate("product", self.product)
        report.add("roofs", {"copy, TB/s": self.copy / 1e12,
                             "product, TFLOP/s": self.product / 1e12})

    def add(self, table, label, rows):
        """Add rows to a table as the generator `rows` makes them; what fails says why. The rows."""
        added, left = [], self.deadline - time.monotonic()
        try:
            if left <= 0:
                raise TimeoutError("no time left")
            signal.setitimer(signal.ITIMER_REAL, left)
            for row in rows:
                added.append({"": label, **row})
                self.report.add(table, added[-1])
        except (Exception, SystemExit) as error:  # whatever it was, the next row has its turn
            reason = " ".join(f"{type(error).__name__}: {error}".split())[-300:]
            self.report.add(table, {"": f"{label}: {reason}"})
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            gc.collect()
            torch.cuda.empty_cache()
        return added

    def make_folder(self, name):
        """A model folder and a prompt file of this size, made on the GPU: in a minute less."""
        with torch.device(self.device):
            made = roofline.make_folder(self.bench, name)
        torch.cuda.empty_cache()
        return made

    def command(self, *command):
        """A Python process: what it said, its wall seconds. RuntimeError if it fails."""
        began = time.monotonic()
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-3000:], sep="\n", file=sys.stderr)
            raise RuntimeError(done.stderr[-300:] + done.stdout[-300:])
        return done.stdout + done.stderr, time.monotonic() - began


def roofs(device, dtype):
    """Bytes a second that a copy reads and writes, FLOP a second of products: the best of six."""
    wide, side = ((2**15, 2**16), 8192) if device == "cuda" else ((2**9, 2**13), 256)
    logits = torch.randn(wide, device=device).to(dtype)
    square = torch.randn(side, side, device=device).to(dtype)
    # floor: ms of three passes over the logits, and of three products
    copied, multiplied = (min(bench_kernel.floor(form, inputs, device) for _ in range(6))
                          for form, inputs in (("logits", [logits]), ("linear", [square, square])))
    return 3e3 * logits.nbytes / copied, 6e3 * side**3 / multiplied


# ---- kernel --------------------------------------------------------------------------------------
GATES = (  # what, gate, target: as the README has them for 8192 x 151936 logits in bf16
    ("forward / backward / both, ms", "1.00 / 1.90 / 2.95", "0.90 / 1.78 / 2.70"),
    ("both passes against eager / torch.compile", "12x / 1.5x", "15x / 2x"),
    ("extra peak memory, forward / backward in place, MiB", "< 1 / < 1", ""),
    ("largest error of logp, H, lse against fp64", "1e-5", "2e-6"),
    ("lm_head fused in, 4096 x 4096 x 131072, both passes, ms", "41", "34"))


def kernel_table(part, form, shape, found):
    """The lines of bench_kernel.py's table; found[form] = {provider: its figures}."""
    rounds = 2 if part.dry else 5
    rows = list(bench_kernel.measure(form, shape, part.bench.dtype, part.device, rounds,
                                     not part.dry))
    found[form] = {row["provider"]: row for row in rows}
    head, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")]
                       for line in bench_kernel.table(rows))
    for cells in lines:
        yield {"": cells[0], **dict(zip(head[1:], cells[1:]))}


def gates(found):
    """The README's table of gates and targets, with what was measured."""
    logits, linear = found["logits"], found["linear"]
    ours, there = logits["fused_entropy"], logits["fused_entropy, in place"]
    rivals = [logits[name]["both_ms"] for name in ("torch eager", "torch.compile")]
    measured = (
        " / ".join(f"{ours[key]:.2f}" for key in ("forward_ms", "backward_ms", "both_ms")),
        " / ".join(f"{one / ours['both_ms']:.1f}x" if one else "left out" for one in rivals),
        f"{there['extra_mib_forward']:.1f} / {there['extra_mib_both']:.1f}",
        f"{ours['error']:.0e}",
        f"{linear['fused_linear_entropy']['both_ms']:.1f}")
    for (what, gate, target), value in zip(GATES, measured):
        yield {"": what, "gate": gate, "target": target, "measured": value}


def measure_kernel(part):
    shapes = {"logits": (8192, 151936), "linear": (4096, 4096, 131072)}
    if part.dry:
        shapes = {"logits": (64, 999), "linear": (64, 32, 999)}
    found = {}
    for form, shape in shapes.items():
        title = f"{form} {'x'.join(map(str, shape))}, {part.bench.dtype}".replace("torch.", "")
        part.add(title, form, kernel_table(part, form, shape, found))
    part.add("gates", "gates", gates(found))


# ---- tests ---------------------------------------------------------------------------------------
def gpu_tests(part, name):
    """The tests of one file but those of Triton's interpreter, which every CPU runs."""
    chosen = ["-k", "no_rows or ignored or two_rounds" if part.dry else "not interpreter"]
    chosen += ["-n", "4"] if importlib.util.find_spec("xdist") else []  # pytest-xdist: in a third
    said, seconds = part.command("-m", "pytest", "-p", "no:cacheprovider", *chosen,
                                 f"tests/{name}")
    counts = {word: int(count) for count, word in re.findall(r"(\d+) (passed|skipped)", said)}
    yield {"passed": counts.get("passed", 0), "skipped": counts.get("skipped", 0), "s": seconds}


def measure_tests(part):
    for name in "test_kernel.py", "test_linear_kernel.py", "test_cuda.py":
        part.add("tests", name, gpu_tests(part, name))


# ---- generate ------------------------------------------------------------------------------------
def sampled(part, name, problems, *flags):
    """generate.py on CHUNKS chunks of `problems` problems each; the first one is the warm-up."""
    size, (folder, prompts) = SIZES[name], part.make_folder(name)
    chunks, run_chunk, config = [], generate.run_chunk, transformers.Qwen2Config(**size.config)

    def timed(chunk, *rest):
        meter = roofline.Meter(part.bench.device).start()
        lines = run_chunk(chunk, *rest)
        meter.stop()
        rows = roofline.groups_of([json.loads(line) for line in lines], size.n)
        tokens = sum(length for _, lengths in rows for length in lengths)
        work = roofline.needed(config, rows, part.bench.dtype.itemsize, training=False)
        chunks.append((meter.wall, tokens, *work, meter.extra))
        return lines

    budget = problems * size.n * (size.prompt_tokens + size.new_tokens)
    argv = generate_flags(size, folder, prompts, part.bench.fresh("rollouts"), device=part.device,
                          limit=CHUNKS * problems, max_batch_tokens=budget)
    with mock.patch.object(generate, "run_chunk", timed):
        generate.main(generate.parse_args([*argv, *flags]))
    first, *later = chunks
    seconds, tokens, flop, read, extra = (statistics.median(one) for one in zip(*later))
    yield {"tokens/s": tokens / seconds, "of bandwidth": read / seconds / part.copy,
           "of products": flop / seconds / part.product, "extra MiB": extra / 2**20,
           "ms a step": 1e3 * seconds / size.new_tokens, "s of the first chunk": first[0]}


def measure_generate(part):
    for name in part.names:
        many = max(1, SIZES[name].prompts // CHUNKS)
        label = f"{name}, {many} x {SIZES[name].n} rows"
        part.add("generate.py", label, sampled(part, name, many))
        # So few rows that a step waits for Python alone.
        label = f"{name}, 1 x {SIZES[name].n} rows"
        for row in part.add("generate.py", label, sampled(part, name, 1)):
            part.report.rate("step", row["ms a step"] / 1e3)


# ---- update --------------------------------------------------------------------------------------
def updated(part, name, *flags):
    """train.py: the figures of all updates but the first one."""
    size, (folder, _) = SIZES[name], part.make_folder(name)
    rollouts, out = part.bench.fresh("scored.jsonl"), part.bench.fresh("round")
    prompts = [[3 + problem % 40] * size.prompt_tokens for problem in range(size.prompts)]
    roofline.write_scored(rollouts, prompts, size.n, size.config["vocab_size"],
                          [size.new_tokens] * 2)
    said, seconds = part.command(
        "train.py", "--model", folder, "--rollouts", rollouts, "--out", out, "--temperature", "1",
        "--device", part.device, "--updates", str(min(CHUNKS, size.prompts)), *flags)
    with open(f"{out}/metrics.jsonl", encoding="utf-8") as file:
        metrics = [json.loads(line) for line in file][1:]
    shutil.rmtree(out)  # 12 bytes a weight
    speed = statistics.median(line["tokens_per_s"] for line in metrics)
    static, passing = re.search(r"memory: ([\d.]+) GiB .*, about ([\d.]+) GiB", said).groups()
    group = [(size.prompt_tokens, [size.new_tokens] * size.n)]
    flop, _ = roofline.needed(transformers.Qwen2Config(**size.config), group, 4, training=True)
    yield {"tokens/s": speed,
           "of products": speed * flop / (size.n * size.new_tokens) / part.product,
           "announced GiB": float(static) + float(passing),
           "peak GiB": max(line["peak_mem_bytes"] for line in metrics) / 2**30,
           "s of the command": seconds}


def measure_update(part):
    variants = (["--micro-batch-tokens", "8192"], ["--micro-batch-tokens", "16384"],
                ["--micro-batch-tokens", "16384", "--checkpoint-activations"])
    for name in part.names:
        for flags in variants[:1] if part.dry else variants:
            rows = part.add("train.py", " ".join([name, *flags]), updated(part, name, *flags))
            if rows and flags is variants[0]:
                part.report.rate("update_share", rows[0]["of products"])


# ---- pipeline ------------------------------------------------------------------------------------
def bytes_of(path):
    """Of a file, or of all files in a folder."""
    names = os.listdir(path) if os.path.isdir(path) else [""]
    return sum(os.path.getsize(os.path.join(path, name) if name else path) for name in names)


def disk_rates(part, folder):
    """MB a second of writing with fsync, of hashing, of loading a model with its checks."""
    path, megabytes = part.bench.fresh("bytes"), 1 if part.dry else 2048
    block, marks = os.urandom(2**20), [time.monotonic()]
    with open(path, "wb") as file:
        for _ in range(megabytes):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    marks.append(time.monotonic())
    generate.describe(argparse.Namespace(), [path])
    marks.append(time.monotonic())
    os.remove(path)
    generate.load_model(folder, torch.float32, "cpu", generate.check_model(folder))
    marks.append(time.monotonic())
    sizes = 2**20 * megabytes, 2**20 * megabytes, bytes_of(folder)
    rates = {name: size / (end - begin) for name, size, begin, end
             in zip(("save", "hash", "load"), sizes, marks, marks[1:])}
    for name, value in rates.items():
        part.report.rate(name, value)
    yield {f"{name}, MB/s": value / 1e6 for name, value in rates.items()}


def staged(part, path, command):
    """A stage as a command: wall seconds, those after its imports, the size of its output."""
    _, seconds = part.command(*command)
    with open(f"{path}.meta.json", encoding="utf-8") as file:
        inside = json.load(file)["wall_s"]
    yield {"s": seconds, "s after imports": inside, "GB written": bytes_of(path) / 1e9}


def measure_pipeline(part):
    name = part.names[-1]
    size, (model, prompts) = SIZES[name], part.make_folder(name)
    part.add("rates", "this machine", disk_rates(part, model))
    budget = -(-size.prompts // CHUNKS) * size.n * (size.prompt_tokens + size.new_tokens)
    for turn in (1,) if part.dry else (1, 2):  # the second one carries on with Adam's moments
        rollouts, scored, out = (part.bench.fresh(one) for one in ("rollouts", "scored", "round"))
        flags = generate_flags(size, model, prompts, rollouts, device=part.device,
                               max_batch_tokens=budget)
        commands = {
            rollouts: ["generate.py", *flags],
            scored: ["score.py", rollouts, "--out", scored],
            out: ["train.py", "--model", model, "--rollouts", scored, "--out", out, "--device",
                  part.device, "--updates", "2", "--micro-batch-tokens", "8192"]}
        for path, command in commands.items():
            rows = part.add(f"a round of {size.prompts} x {size.n} rollouts, {name}",
                            f"{command[0]}, round {turn}", staged(part, path, command))
            if rows and path == rollouts:
                part.report.rate("start", rows[0]["s"] - rows[0]["s after imports"])
        model = out


# ---- peers ---------------------------------------------------------------------------------------
def arms(part, what, name, function):
    """The arms of one of bench.py's functions."""
    function(part.bench, name)
    for arm, one in part.bench.entries[f"{what}/{name}"]["arms"].items():
        if "missing" in one:
            yield {"": f"{arm}: {one['missing']}"}
            continue
        yield {"": arm, "tokens/s": one["tokens_per_s"], "of the roofline": one["roofline"],
               "extra MiB": one["extra_bytes"] / 2**20,
               "ours is faster by": roofline.RATIO.format(*one["ours_is_faster"])}


def measure_peers(part):
    """Equal work for all; few rows, because the plain ways hold all logits at once."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    name = part.names[0]
    if not part.dry:
        SIZES[name] = dataclasses.replace(SIZES[name], prompts=4, new_tokens=64, batches=(32, 64))
    part.make_folder(name)
    for what, function in bench.MEASURES.items():
        part.add(f"{what}, {name}", what, arms(part, what, name, function))


# ---- Main ----------------------------------------------------------------------------------------
MEASURES = {"kernel": measure_kernel, "tests": measure_tests, "generate": measure_generate,
            "update": measure_update, "pipeline": measure_pipeline, "peers": measure_peers}


def in_turn(args):
    """Every part in a process of its own: a fault of the device ends one of them."""
    failed = []
    for part in PARTS:
        command = [sys.executable, os.path.abspath(__file__), "--out", args.out, "--part", part,
                   "--minutes", str(args.minutes), "--sizes", *args.sizes] + ["--dry"] * args.dry
        try:
            code = subprocess.run(command, timeout=60 * args.minutes + 30).returncode
        except subprocess.TimeoutExpired:
            code = "time is up"
        failed += [f"{part} ({code})"] * bool(code)
    if failed:
        sys.exit(f"gpu.py: error: parts that did not end well: {', '.join(failed)}")


def ring(*_):
    raise TimeoutError("time is up")


def main(args):
    report = Report(args.out)
    if args.cost:
        print(*cost.markdown(args.cost, args.gpus, report.found["rates"]), sep="\n")
    elif args.part == "all":
        in_turn(args)
    elif not (args.dry or torch.cuda.is_available()):
        sys.exit("gpu.py: error: no GPU here; --dry runs all parts at toy size on the CPU")
    else:
        signal.signal(signal.SIGALRM, ring)
        with tempfile.TemporaryDirectory() as folder:
            MEASURES[args.part](Part(args, report, folder))


if __name__ == "__main__":
    main(ARGS)
