"""Stage 2: judge rollouts, each by the verifier of its task.

    python score.py rollouts.jsonl --out scored.jsonl [--workers 4] [--timeout 10] [--show 5]

Reads one sample a line: `id`, `sample`, `completion`, `finish_reason`, `task`, and the task's own
fields. Every other field passes untouched; a row that was scored before is scored afresh. Writes
the rows in order, each with

    pred        the extracted answer, or null
    correct     what Pass@k counts and what the sign of the smoothing term comes from
    reason      ok | no_answer | parse | numbers | value | truncated | timeout
    reward      1.0 or 0.0, unless the task says otherwise
    solution    where the task counts distinct solutions: the canonical text of a right answer, or
                null; two answers that are one solution share it

What an answer is and what is right is told in the file of the task: data/countdown.py,
data/maths.py, data/gym.py. A task is a file that holds

    Row                        its rows: a Rollout with the fields that its verdict needs
    verify(completion, row)    the Verdict, or a Pending one for a process that can be killed
                               (data/sandbox.py)

and one line in TASKS below; data/README.md shows one being made. A completion that was cut at the
length limit is right if its answer is complete and right; otherwise it is `truncated`. `timeout` is
an answer that was still being judged after --timeout seconds, or used up a worker's memory.
"""
import collections
import os
import re
import time
import typing
from importlib import import_module

import msgspec
from tqdm import tqdm

from data.files import (REASONS, Parser, Rollout, Verdict, claim, describe, fail, publish,
                        read_rows, run, sampling_of, say)
from data.sandbox import Pending, Workers

TASKS = {  # what stands in a row's `task`: the file that judges it
    "countdown": import_module("data.countdown"),
    "math": import_module("data.maths"),
    "gym": import_module("data.gym"),
}
ROW = typing.Union[tuple(task.Row for task in TASKS.values())]
VERIFY = {task.Row: task.verify for task in TASKS.values()}
WAITING = 256  # rows that may wait behind a verdict that is still being made


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    flag = parser.add_argument
    flag("rollouts", help="the JSONL file to judge (generate.py's, or a scored one)")
    flag("--out", required=True, help="the JSONL file to write")
    # answers that are judged in processes of their own
    flag("--workers", type=int, default=len(os.sched_getaffinity(0)),
         help="processes that judge (default: the CPU cores, %(default)s here)")
    flag("--timeout", type=float, default=10,
         help="seconds for one answer there (default %(default)s)")
    # what is shown
    flag("--show", type=int, default=0, metavar="N",
         help="print the first N rows (default %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 1 or not 0 < args.timeout < 1e6 or args.show < 0:
        parser.error("--workers and --timeout must be above 0, --show not below")
    return parser.checked(args)


# ---- Verdicts ----------------------------------------------------------------------------------
def unique(rows):
    """The rows; ends the stage where one (id, sample) stands twice."""
    seen = {}  # id -> the samples met so far, a bit each
    for where, line, row in rows:
        samples, bit = seen.get(row.id, 0), 1 << row.sample
        if samples & bit:
            fail(f"{where}: id {row.id[:80]!r}, sample {row.sample} stands twice")
        seen[row.id] = samples | bit
        yield line, row


def told(row, verdict):
    """The Verdict, where a cut completion is concerned: right if its answer is complete and right,
    otherwise `truncated`, whatever else is wrong with it."""
    if row.finish_reason == "length" and verdict.reason not in ("ok", "timeout"):
        return Verdict(verdict.pred, "truncated", verdict.solution)
    return verdict


def judged(rows, pools, workers, timeout):
    """Yield (line, row, Verdict) in the rows' order. Most are judged at once; while workers are at
    it, a bounded number of rows waits behind theirs. pools: {Judge: its Workers}, filled here."""
    waiting = collections.deque()  # (line, row, Verdict or Pending, list for its word or None)

    def finished(most):
        while waiting and (len(waiting) > most or waiting[0][3] != []):
            line, row, verdict, word = waiting[0]
            if word == []:
                pools[verdict.judge].wait()
                continue
            waiting.popleft()
            yield line, row, told(row, Verdict(verdict.pred, word[0]) if word else verdict)

    for line, row in rows:
        verdict = VERIFY[type(row)](row.completion, row)
        if isinstance(verdict, Pending):
            if verdict.judge not in pools:
                pools[verdict.judge] = Workers(verdict.judge, workers, timeout)
            word = pools[verdict.judge].submit(verdict)
        elif waiting:
            word = None
        else:
            yield line, row, told(row, verdict)
            continue
        waiting.append((line, row, verdict, word))
        yield from finished(WAITING)
    yield from finished(0)


# ---- Rows --------------------------------------------------------------------------------------
SCORED = re.compile(rb'"(?:pred|correct|reason|reward|solution)"').search  # a first, quick look


def fields_of(verdict):
    """The new fields of a row."""
    correct = verdict.reason == "ok"
    reward = float(correct) if verdict.reward is None else verdict.reward
    fields = {"pred": verdict.pred, "correct": correct, "reason": verdict.reason, "reward": reward}
    if verdict.solution is not msgspec.UNSET:
        fields["solution"] = verdict.solution
    return fields


def as_json(value):
    return msgspec.json.format(msgspec.json.encode(value), indent=0)


def enriched(line, fields):
    """The row's bytes with the new fields at its end; only one scored before is written anew."""
    if SCORED(line):
        row = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
        if row.keys() & fields.keys():
            return as_json({**{name: row[name] for name in row if name not in fields}, **fields})
    return line[:-1] + b", " + as_json(fields)[1:]


def show(row, fields):
    """One row readably; repr, because a completion may hold control characters for the terminal."""
    own = [name for name in row.__struct_fields__ if name not in Rollout.__struct_fields__]
    asked = ", ".join(f"{name} {value!r}" for name in own
                      if (value := getattr(row, name)) is not None)
    say(f"{row.id[:80]!r} sample {row.sample}: {asked}\n"
        f"  completion (its end) {row.completion[-300:]!r}\n"
        f"  answer {str(fields['pred'])[:200]!r}: {fields['reason']}, "
        f"reward {fields['reward']:g}")


def main(args):
    start = time.monotonic()
    meta = describe(args, [args.rollouts], sampling=sampling_of(args.rollouts), device="cpu",
                    world_size=1)
    partial = claim(args.out, meta, ignore=("rollouts", "out", "workers", "show"))
    if partial is None:
        return
    reasons, pools = collections.Counter(), {}
    rows = unique(read_rows(args.rollouts, ROW))
    try:
        with open(partial, "wb") as file:
            verdicts = judged(rows, pools, args.workers, args.timeout)
            for line, row, verdict in tqdm(verdicts, unit=" rows", disable=None):
                fields = fields_of(verdict)
                file.write(enriched(line, fields) + b"\n")
                if args.show and reasons.total() < args.show:
                    show(row, fields)
                reasons[verdict.reason] += 1
    finally:
        for pool in pools.values():
            pool.close()
    total = reasons.total()
    counts = {reason: reasons[reason] for reason in REASONS}
    publish(args.out, {**meta, "rows": total, "reasons": counts,
                       "wall_s": time.monotonic() - start})
    say(f"{args.out}: {total} rows, {reasons['ok'] / total:.1%} correct")
    for reason in REASONS:
        say(f"  {reason:10}{reasons[reason]:10}{reasons[reason] / total:8.1%}")


if __name__ == "__main__":
    run(main, parse_args())
