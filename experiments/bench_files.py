"""Rows a second of score.py and evaluate.py, this checkout against another one, in turns.

    git worktree add /tmp/before COMMIT
    python experiments/bench_files.py --against /tmp/before --rows 100000 1000000 --rounds 3

Countdown rollouts of some 450 bytes, 50 a problem, whose answers are random expressions over the
problem's numbers: hardly one stands twice, so that score.py gains nothing from having judged it
before. With --repeat the samples of a group repeat each other as a trained model's do. Prints, for
each stage, number of rows and checkout, rows a second of CPU time (median of the rounds, and the
least and the most), peak memory, and the ratio of the two medians with the least and the most of
the ratios of pairs. Outputs of score.py must be equal; it says so.
"""
import argparse
import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", required=True, help="the other checkout")
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000],
                        help="rows a file (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each (default %(default)s)")
    parser.add_argument("--repeat", action="store_true", help="answers repeat within a group")
    return parser.parse_args()


def write_rollouts(path, rows, repeat, n=50):
    rng = random.Random(0)
    with open(path, "w") as file:
        for first in range(0, rows, n):
            numbers = [rng.randint(1, 12) for _ in range(4)]
            head = json.dumps({"id": f"problem-{first // n}", "task": "countdown",
                               "prompt": "3 4 5 6=24:", "numbers": numbers, "target": 24,
                               "n_solutions": n})[:-1]
            ids = ", ".join(str(rng.randint(3, 20)) for _ in range(12))
            logprobs = ", ".join(repr(-rng.random()) for _ in range(12))
            for sample in range(min(n, rows - first)):
                if not repeat or sample % 10 == 0:
                    (a, b, c, d), (p, q, r) = rng.sample(numbers, 4), rng.choices("+-*/", k=3)
                    text = rng.choice([f"({a}{p}{b}){q}{c}{r}{d}", f"{a}{p}({b}{q}{c}){r}{d}"])
                file.write(f'{head}, "sample": {sample}, "completion": "{text}", '
                           f'"prompt_ids": [{ids}], "completion_ids": [{ids}], '
                           f'"logprobs": [{logprobs}], "finish_reason": "stop"}}\n')


# A process starts with the peak memory of the one that starts it: hence a small one in between,
# which reports as JSON.
STARTER = """import json, resource, subprocess, sys, time
began = time.perf_counter()
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"wall_s": time.perf_counter() - began, "cpu_s": used.ru_utime + used.ru_stime,
                  "peak_bytes": used.ru_maxrss * 1024}))
sys.exit(done.stderr[-500:] if done.returncode else 0)"""


def usage(*command):
    """Wall and CPU seconds and the peak memory of a Python process on one thread."""
    said = subprocess.run([sys.executable, "-c", STARTER, sys.executable, *command],
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE)
    if said.returncode:  # the process itself has told why
        sys.exit(f"failed: {' '.join(command)}")
    return json.loads(said.stdout)


def digest(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def measure(checkouts, rows, rounds, repeat, folder):
    """{(stage, checkout): [(rows a second, peak bytes) of each round]}"""
    rollouts, found = f"{folder}/rollouts.jsonl", {}
    write_rollouts(rollouts, rows, repeat)
    for turn in range(rounds):
        digests = set()
        for name, path in list(checkouts.items())[::-1 if turn % 2 else 1]:
            scored, out = f"{folder}/{name}-{turn}.jsonl", f"{folder}/{name}-{turn}.json"
            for stage, command in {"score.py": [rollouts, "--out", scored],
                                   "evaluate.py": [scored, "--out", out]}.items():
                used = usage(f"{path}/{stage}", *command)
                speed = rows / used["cpu_s"]
                found.setdefault((stage, name), []).append((speed, used["peak_bytes"]))
            digests.add(digest(scored))
            os.remove(scored)
        if len(digests) > 1:
            print("the outputs of score.py differ")
    return found


def main():
    args = parse_args()
    checkouts = {"before": os.path.abspath(args.against), "now": ROOT}
    print(f"{'stage':12}{'rows':>9}  {'checkout':9}{'rows/s':>8}{'least':>9}{'most':>9}{'MB':>6}")
    for rows in args.rows:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(checkouts, rows, args.rounds, args.repeat, folder)
        for stage in ("score.py", "evaluate.py"):
            for name in checkouts:
                rates, peaks = zip(*found[stage, name])
                print(f"{stage:12}{rows:9}  {name:9}{statistics.median(rates):8.0f}"
                      f"{min(rates):9.0f}{max(rates):9.0f}{max(peaks) / 1e6:6.0f}")
            pairs = zip(found[stage, "now"], found[stage, "before"])
            ratios = [now / before for (now, _), (before, _) in pairs]
            print(f"{stage:12}{rows:9}  ratio {statistics.median(ratios):11.2f}"
                  f"{min(ratios):9.2f}{max(ratios):9.2f}", flush=True)


if __name__ == "__main__":
    main()
