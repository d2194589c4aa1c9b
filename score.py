"""Stage 2: judge rollouts, each by the verifier of its task.

    python score.py rollouts.jsonl --out scored.jsonl [--workers 4] [--timeout 10] [--show 5]
    python score.py scored.jsonl --show 5 [--reason value]      # look at scored rows, write nothing
    python score.py prompts.jsonl --check-problems              # are these problems of a task?

Reads one sample a line: `id`, `sample`, `completion`, `finish_reason`, `task` and the task's own
fields. Writes the rows in order, other fields untouched, each with

    pred        the extracted answer, or null
    correct     what Pass@k counts and what the sign of the smoothing term comes from
    reason      ok | no_answer | parse | numbers | value | truncated | timeout
    reward      1.0 or 0.0, unless the task says otherwise
    solution    where the task counts distinct solutions: the canonical text of a right answer, or
                null; two answers that are one solution share it

A task is a file with `Row`, a Rollout with the fields that its verdict needs, and a function
`verify(completion, row)`, which returns a Verdict, or a Pending one for a process that can be
killed (data/sandbox.py); and a line in TASKS below. data/README.md shows one being made. A
completion that was cut at the length limit is right if its answer is complete and right; otherwise
it is `truncated`. `timeout` is an answer that was still being judged after --timeout seconds, or
used up a worker's memory.
"""
import collections
import contextlib
import functools
import itertools
import math
import os
import re
import statistics
import time
import typing
from importlib import import_module

import msgspec
from tqdm import tqdm

from data.files import (REASONS, Parser, Problem, Rollout, Verdict, claim, describe, echo, fail,
                        publish, read_once, read_rows, run, sampling_of)
from data.sandbox import Pending, Workers


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("rollouts", metavar="FILE.jsonl",
                        help="rollouts (generate.py's, or scored ones), or problems to check")
    add = parser.add_argument_group("what is made").add_argument
    add("--out", metavar="SCORED.jsonl", help="the JSONL file to write")
    add("--check-problems", nargs="?", type=int, const=1, metavar="N",
        help="check a file of problems instead: at least N (default 1), each of a task that has "
             "all of its fields; prints nothing if they are right")
    add = parser.add_argument_group("answers that are judged in processes").add_argument
    add("--workers", type=int, default=len(os.sched_getaffinity(0)),
        help="processes that judge (default: the CPU cores, %(default)s here)")
    add("--timeout", type=float, default=10, help="seconds for one answer (default %(default)s)")
    add = parser.add_argument_group("what is shown").add_argument
    add("--show", type=int, default=0, metavar="N",
        help="print N rows, some of each reason; without --out those of a scored file")
    add("--reason", choices=REASONS, help="with --show: only rows with this reason")
    args = parser.parse_args(argv)
    parser.at_least(args, workers=1, show=0)
    if not 0 < args.timeout < 1e6:
        parser.error("--timeout must be above 0 and below a million")
    if bool(args.out or args.show) == bool(args.check_problems):
        parser.error("give --out SCORED.jsonl, --show N or both; or --check-problems alone")
    if args.reason and not args.show:
        parser.error("--reason belongs to --show")
    return parser.checked(args)


# ---- Verdicts ----------------------------------------------------------------------------------
TASKS = {  # what stands in a row's `task`: the file that judges it
    "countdown": import_module("data.countdown"),
    "math": import_module("data.maths"),
    "gym": import_module("data.gym"),
}
ROW = typing.Union[tuple(task.Row for task in TASKS.values())]
VERIFY = {task.Row: task.verify for task in TASKS.values()}
BLOCK = 256  # rows that are held while workers judge them


def mark_truncated(row, verdict):
    """The Verdict; `truncated` where the completion was cut and its answer is not right."""
    if row.finish_reason == "length" and verdict.reason not in ("ok", "timeout"):
        return Verdict(verdict.pred, "truncated", verdict.solution)
    return verdict


def judge_rows(rows, workers):
    """Yield (line, Verdict) of each (line, row), in order. workers(judge): the processes for a
    Pending verdict."""
    while block := list(itertools.islice(rows, BLOCK)):
        verdicts = [VERIFY[type(row)](row.completion, row) for _, row in block]
        words = [workers(verdict.judge).submit(verdict) if isinstance(verdict, Pending) else None
                 for verdict in verdicts]  # a word is a list, empty until it has come
        for (line, row), verdict, word in zip(block, verdicts, words):
            while word == []:
                workers(verdict.judge).wait()
            verdict = Verdict(verdict.pred, word[0]) if word else verdict
            yield line, mark_truncated(row, verdict)


# ---- Rows --------------------------------------------------------------------------------------
def unique(rows):
    """The rows; ends the stage where one (id, sample) occurs twice."""
    seen = collections.defaultdict(int)  # id -> the samples met so far, a bit each
    for where, line, row in rows:
        if seen[row.id] >> row.sample & 1:
            fail(f"{where}: id {row.id[:80]!r}, sample {row.sample} occurs twice")
        seen[row.id] |= 1 << row.sample
        yield line, row


def fields_of(verdict):
    """The new fields of a row."""
    correct = verdict.reason == "ok"
    reward = float(correct) if verdict.reward is None else verdict.reward
    fields = {"pred": verdict.pred, "correct": correct, "reason": verdict.reason, "reward": reward}
    if verdict.solution is not msgspec.UNSET:
        fields["solution"] = verdict.solution
    return fields


SCORED = re.compile(rb'"(?:pred|correct|reason|reward|solution)"').search  # a first, quick look


def with_fields(line, fields):
    """The row's bytes with the new fields at its end; only one scored before is written anew."""
    row = msgspec.json.decode(line, type=dict[str, msgspec.Raw]) if SCORED(line) else {}
    before = {name: value for name, value in row.items() if name not in fields}
    rewrite = len(before) < len(row)
    new = msgspec.json.encode({**before, **fields} if rewrite else fields)
    new = msgspec.json.format(new, indent=0)
    return new if rewrite else line[:-1] + b", " + new[1:]


# ---- What is shown -----------------------------------------------------------------------------
SHOWN = [("id", str), ("correct", bool), ("reason", str)]  # what a row must have to be shown


def show(kept, n):
    """Print n of the rows, {reason: lines}, the reasons in turn."""
    reasons = sorted(kept, key=lambda reason: reason != "ok")
    turns = itertools.zip_longest(*(kept[reason] for reason in reasons))
    for line in [line for turn in turns for line in turn if line][:n]:
        row, logp = msgspec.json.decode(line), math.nan
        task = TASKS.get(str(row.get("task")))
        own = set(task.Row.__struct_fields__) - set(Rollout.__struct_fields__) if task else ()
        with contextlib.suppress(KeyError, TypeError, ValueError):  # of another program
            logp = statistics.fmean(row["logprobs"])
        gold = {name: value for name, value in row.items() if name in own}
        echo(f"{readable(row['id'])} sample {row.get('sample')}: {readable(gold)[1:-1]}\n"
            f"  prompt      {readable(row.get('prompt') or row.get('messages'))}\n"
            f"  completion  {readable(row.get('completion', ''), 1000)}\n"
            f"  answer {readable(repr(row.get('pred')))}: {row['reason']}, "
            f"reward {row.get('reward')}, log-prob a token {logp:.3f}")


def readable(value, length=300):
    """The end of a value as text; its control characters do not reach the terminal."""
    text = str(value)[-length:]
    return "".join(c if c.isprintable() else "\n    " if c == "\n" else repr(c)[1:-1] for c in text)


def check_problems(path, least):
    """End the stage at the first row that is no problem of one of TASKS."""
    prompts = [(name, Problem.__annotations__[name], None) for name in ("prompt", "messages")]
    sampled = [("sample", int, 0), ("completion", str, ""), ("finish_reason", str, "stop")]
    kinds = [msgspec.defstruct("Row", [*prompts, *sampled], bases=(task.Row,), kw_only=True)
             for task in TASKS.values()]
    count = 0
    for where, _, row in read_once(path, typing.Union[tuple(kinds)]):
        if (row.prompt in (None, "")) == (row.messages is None):
            fail(f"{where}: needs either 'prompt' or 'messages'")
        count += 1
    if count < least:
        fail(f"{path}: {count} problems, fewer than {least}")


def main(args):
    if args.check_problems:
        return check_problems(args.rollouts, args.check_problems)
    kept = collections.defaultdict(list)

    def keep(reason, line):  # the first rows of each reason, to be shown
        if args.reason in (None, reason) and len(kept[reason]) < args.show:
            kept[reason].append(line)

    if not args.out:
        for _, line, row in read_rows(args.rollouts, msgspec.defstruct("Shown", SHOWN)):
            keep(row.reason, line)
        return show(kept, args.show)

    start, reasons = time.monotonic(), collections.Counter(dict.fromkeys(REASONS, 0))
    meta = describe(args, [args.rollouts], sampling=sampling_of(args.rollouts), device="cpu",
                    world_size=1)
    partial = claim(args.out, meta, ignore=("rollouts", "out", "workers", "show", "reason"))
    if partial is None:
        return
    rows = unique(read_rows(args.rollouts, ROW))
    with contextlib.ExitStack() as pools, open(partial, "wb") as file:
        workers = functools.cache(lambda judge: pools.enter_context(
            contextlib.closing(Workers(judge, args.workers, args.timeout))))
        for line, verdict in tqdm(judge_rows(rows, workers), unit=" rows", disable=None):
            line = with_fields(line, fields_of(verdict))
            file.write(line + b"\n")
            keep(verdict.reason, line)
            reasons[verdict.reason] += 1
    total, wall = reasons.total(), time.monotonic() - start
    publish(args.out, {**meta, "rows": total, "reasons": reasons, "wall_s": wall})
    show(kept, args.show)
    echo(f"{args.out}: {total} rows, {reasons['ok'] / total:.1%} correct")
    for reason, count in reasons.items():
        echo(f"  {reason:10}{count:10}{count / total:8.1%}")


if __name__ == "__main__":
    run(main, parse_args())
