"""What the experiments share: stages in one process, runs side by side, tables written whole, time
and memory of the benches.

A run is a process of its own on one core, with a folder runs/NAME of its own. It imports the
stages once and calls the main functions that run.sh calls as commands, with the same flags:
hundreds of small rounds would otherwise spend their time on importing torch. What the stages
print stands in runs/NAME/log.txt.
"""
import concurrent.futures
import contextlib
import csv
import ctypes
import importlib
import json
import multiprocessing
import os
import re
import resource
import shlex
import shutil
import statistics
import sys
import time

from data.files import software

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# ---- Tables ------------------------------------------------------------------------------------
def read_csv(path):
    """The rows of a table, each a dict of texts; none where there is no such file."""
    if not os.path.exists(path):
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write_csv(path, rows):
    """Whole and at once: a killed suite leaves the old table or the new one."""
    with open(path + ".partial", "w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path + ".partial", path)


def read_rows(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_rows(path, rows):
    with open(path + ".partial", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    os.replace(path + ".partial", path)


# ---- Inside a run ------------------------------------------------------------------------------
@contextlib.contextmanager
def inside(folder):
    """Work in the repository's root, on one thread; what is printed goes to folder/log.txt."""
    os.chdir(ROOT)
    sys.path.insert(0, ROOT)
    import torch
    torch.set_num_threads(1)
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/log.txt", "a") as log:
        with contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
            yield


def stage(name, command):
    """Call a stage ("generate", "data.countdown") with the flags of its command line."""
    print(f"+ {name} {command}", file=sys.stderr)
    module = importlib.import_module(name)
    module.main(module.parse_args(shlex.split(command)))


def discard(*paths):
    """Remove files or model folders together with their metas."""
    for path in paths:
        shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
        os.remove(path + ".meta.json")


def verified(stem, model, sample):
    """Sample the problems of STEM.prompts.jsonl and score them: STEM.scored.jsonl, its path.
    sample: flags of generate.py."""
    kinds = ("prompts", "rollouts", "scored")
    prompts, rollouts, scored = (f"{stem}.{kind}.jsonl" for kind in kinds)
    stage("generate", f"--model {model} --prompts {prompts} --out {rollouts} {sample}")
    stage("score", f"{rollouts} --out {scored}")
    discard(rollouts)
    return scored


def sampled(stem, model, draw, sample):
    """The same for problems that are drawn for it alone. draw: flags of data/countdown.py, or a
    function that writes problems and their meta to a path."""
    if not os.path.exists(f"{stem}.scored.jsonl"):
        if callable(draw):
            draw(f"{stem}.prompts.jsonl")
        else:
            stage("data.countdown", f"--out {stem}.prompts.jsonl {draw}")
        verified(stem, model, sample)
        discard(f"{stem}.prompts.jsonl")
    return f"{stem}.scored.jsonl"


def measure(stem, model, number, split, draw, sample, **more):
    """The same, and evaluate.py: the figures of a checkpoint on one split, with `more`; they stay
    in STEM.figures.json, so that a stopped run has them again."""
    path = f"{stem}.figures.json"
    if not os.path.exists(path):
        scored, output = sampled(stem, model, draw, sample), f"{stem}.eval.json"
        stage("evaluate", f"{scored} --out {output}")
        with open(output) as file:
            report = json.load(file)["runs"][0]
        figures = {"round": number, "split": split, **more, "entropy": "", "train_s": 0,
                   "commit": (software()["git"] or "")[:7],
                   "pass_at_k": {k: cell["value"] for k, cell in report["pass_at_k"].items()},
                   "coverage": report["solution_coverage"], "distinct": report["distinct"],
                   "completion_len": report["completion_len"]}
        if number:
            updates = read_rows(f"{model}/metrics.jsonl")
            figures["entropy"] = statistics.fmean(line["entropy"] for line in updates[-4:])
            figures["train_s"] = sum(line["tokens"] / line["tokens_per_s"] for line in updates)
        write_rows(path, [figures])
        discard(scored, output)
    return read_rows(path)[0]


def follow(folder, base, checkpoints, train_round, measure_round):
    """The figures of a run at its checkpoints (rounds; 0 is the base), a list. A run that was
    stopped goes on from its last round; models before the last one are removed.

    train_round(number, before, after): train the model folder `after` from `before`.
    measure_round(number, model): a list of figures."""
    rounds = range(1, checkpoints[-1] + 1)
    models, figures = [base, *(f"{folder}/round-{number:03d}" for number in rounds)], []
    done = max(number for number in (0, *rounds) if not number or os.path.exists(models[number]))
    for number, model in enumerate(models):
        if number > done:
            train_round(number, models[number - 1], model)
        if number in checkpoints:
            figures += measure_round(number, model)
        if number > max(done, 1):
            discard(models[number - 1])
    return figures


# ---- Time and memory ---------------------------------------------------------------------------
class Meter:
    """What a `with` block takes: .seconds, and .peak, the most bytes beyond those held before. On a
    GPU wall time and PyTorch's memory, else CPU time and memory of the process (Linux)."""

    def __init__(self, device):
        import torch
        self.cuda, self.left_out = torch.cuda if device == "cuda" else None, 0.0

    def now(self):
        if self.cuda:
            self.cuda.synchronize()
            return time.perf_counter()
        return time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])

    def memory(self, peak):
        """Bytes held now, or the most since __enter__."""
        if self.cuda:
            return self.cuda.max_memory_allocated() if peak else self.cuda.memory_allocated()
        with open("/proc/self/status", encoding="utf-8") as file:
            field = "VmHWM" if peak else "VmRSS"
            return 1024 * int(re.search(rf"{field}:\s+(\d+)", file.read())[1])

    def __enter__(self):
        if self.cuda:
            self.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # freed memory must not hide what is needed next
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # resets VmHWM
        self.held, self.began = self.memory(peak=False), self.now()
        return self

    def so_far(self):
        return self.memory(peak=True) - self.held

    def __exit__(self, *_):
        self.seconds, self.peak = self.now() - self.began - self.left_out, self.so_far()

    def untimed(self, function):
        """The same function, its time left out."""
        def call(*args, **flags):
            start = self.now()
            try:
                return function(*args, **flags)
            finally:
                self.left_out += self.now() - start
        return call


# ---- Runs side by side -------------------------------------------------------------------------
def attempt(one_run, label, arguments):
    """one_run(name, ...), with a stage's refusal, which stands in the run's log, as an error."""
    try:
        return one_run(*arguments)
    except SystemExit as error:
        log = f"runs/{arguments[0]}/log.txt"
        raise RuntimeError(f"{label}: a stage ended with {error}; see {log}") from error


def run(one_run, todo, keep, jobs):
    """one_run(*arguments) for every (label, arguments) of todo, `jobs` at a time, a fresh process
    each; arguments[0] names the run's folder. keep(label, result) stores results as they come."""
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = "1"
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, max_tasks_per_child=1) as pool:
        futures = {pool.submit(attempt, one_run, label, arguments): (label, arguments[0])
                   for label, arguments in todo}
        for done, future in enumerate(concurrent.futures.as_completed(futures), 1):
            label, name = futures[future]
            try:
                keep(label, future.result())
            except BaseException:  # what has not begun is not begun any more
                pool.shutdown(cancel_futures=True)
                raise
            shutil.rmtree(os.path.join(ROOT, "runs", name))  # its figures are kept
            left = (time.monotonic() - began) / done * (len(todo) - done)
            print(f"{time.strftime('%H:%M')} {done}/{len(todo)} {name}: "
                  f"about {left / 3600:.1f} h left here", flush=True)
