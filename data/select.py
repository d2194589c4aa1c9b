"""Choose problems from a file: a round's share of them, or those solved a given number of times.

    python -m data.select --prompts math.jsonl --out problems.jsonl --n 32 --seed 0 --round 3
    python -m data.select --prompts all.jsonl --out hard.jsonl --scored scored.jsonl --at-most 1
    python -m data.select --scored scored.jsonl --out mixed.scored.jsonl --at-least 1 --at-most 7

--scored keeps the problems with at least --at-least and at most --at-most right rollouts in that
file; problems that have no rollout in it are left out. Whoever samples the same problems again
takes another --seed: a rollout's random numbers depend on (seed, id, sample). Without --prompts the
rollouts themselves are written: the last command drops the groups of 8 that were never or always
solved, from which GRPO learns nothing (DAPO's dynamic sampling, arXiv 2503.14476).

--n takes a round's share of what is left, shuffled anew for each pass over it: round 1 gets the
first n problems, round 2 the next n, and so on. Each problem is used equally often, and a round
that begins a new pass has no problem twice. If fewer than n are left, a round gets all of them.
Without --n all are written, in the file's order. Rows are copied as they are; the output may be
empty.
"""
import collections
import random

import msgspec

from data.files import (Parser, Problem, claim, describe, echo, fail, publish, read_once,
                        read_rows, run, sampling_of)


class Correct(msgspec.Struct):
    """What is read of a line of scored.jsonl."""
    id: str
    correct: bool


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--prompts",
                        help="JSONL file of problems (default: the rollouts of --scored)")
    parser.add_argument("--out", required=True, help="JSONL file to write")
    add = parser.add_argument_group("a round's share").add_argument
    add("--n", type=int, help="problems a round (default: all)")
    add("--seed", type=int, default=0, help="seed of the shuffles (default %(default)s)")
    add("--round", type=int, default=1, help="which round, from 1 (default %(default)s)")
    add = parser.add_argument_group("by how often they were solved").add_argument
    add("--scored", metavar="SCORED.jsonl", help="scored rollouts of these problems")
    add("--at-least", type=int, help="right rollouts of a problem, at least (default 0)")
    add("--at-most", type=int, help="right rollouts of a problem, at most (default: any)")
    args = parser.parse_args(argv)
    parser.at_least(args, n=1, seed=0, round=1, at_least=0, at_most=0)
    bounds = [bound for bound in (args.at_least, args.at_most) if bound is not None]
    if bool(args.scored) != bool(bounds):
        parser.error("--scored goes with --at-least, --at-most or both")
    if not args.prompts and not args.scored:
        parser.error("give --prompts, --scored or both")
    if bounds != sorted(bounds):
        parser.error("--at-least is above --at-most: no problem is left")
    if args.n is None and (args.seed, args.round) != (0, 1):
        parser.error("--seed and --round belong to --n")
    return parser.checked(args)


def indices_of_round(total, n, number, seed):
    """Indices (n,) of the problems of round `number` (1, 2, ...) out of `total`, all different."""
    shuffle, left = random.Random(seed).shuffle, []
    n = min(n, total)
    for _ in range(number):
        chosen, left = left[:n], left[n:]
        if len(chosen) < n:  # a new pass; what this round already has comes last in it
            order = list(range(total))
            shuffle(order)
            order.sort(key=set(chosen).__contains__)
            missing = n - len(chosen)
            chosen, left = chosen + order[:missing], order[missing:]
    return chosen


def main(args):
    inputs = [path for path in (args.prompts, args.scored) if path]
    sampling = {} if args.prompts else {"sampling": sampling_of(args.scored)}
    meta = describe(args, inputs, seed=args.seed, **sampling)
    partial = claim(args.out, meta, ignore=("prompts", "scored", "out"))
    if partial is None:
        return

    # 1. All problems, with their line or their rollouts.
    lines, right = collections.defaultdict(list), collections.Counter()
    for _, line, problem in read_once(args.prompts, Problem) if args.prompts else ():
        lines[problem.id].append(line)
    for _, line, row in read_rows(args.scored, Correct) if args.scored else ():
        right[row.id] += row.correct
        if not args.prompts:
            lines[row.id].append(line)
    total, ids, note = len(lines), list(lines), ""

    # 2. Those solved the right number of times.
    if args.scored:
        sampled = [id for id in ids if id in right]
        if not sampled:
            fail(f"{args.prompts}: none of its problems has a rollout in {args.scored}")
        if len(sampled) < total:
            note = f" ({total - len(sampled)} without rollouts left out)"
        low, high = args.at_least or 0, right.total() if args.at_most is None else args.at_most
        ids = [id for id in sampled if low <= right[id] <= high]

    # 3. This round's share of them.
    if args.n is not None:
        ids = [ids[index] for index in indices_of_round(len(ids), args.n, args.round, args.seed)]
    with open(partial, "wb") as file:
        file.writelines(line + b"\n" for id in ids for line in lines[id])
    publish(args.out, meta)
    echo(f"{args.out}: {len(ids)} of {total} problems{note}")


if __name__ == "__main__":
    run(main, parse_args())
