"""The problems of one round: the next n of a prompt file, shuffled anew for each pass over it.

    python data/shuffle.py --input math.jsonl --out prompts-003.jsonl --n 32 --round 3 --seed 0

Round 1 takes the first n problems of the first pass, round 2 the next n, and so on: each problem is
seen equally often. A round that begins a new pass holds no problem twice. Rows pass as they are; a
file of fewer than n problems gives them all.
"""
import os
import random
import sys

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.files import Parser, Problem, claim, describe, fail, publish, read_rows, run, say


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--input", required=True, help="JSONL file of problems")
    parser.add_argument("--out", required=True, help="JSONL file to write")
    parser.add_argument("--n", type=int, default=192, help="problems a round (default %(default)s)")
    parser.add_argument("--round", type=int, default=1,
                        help="which round, from 1 (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0,
                        help="seed of the shuffles (default %(default)s)")
    args = parser.parse_args(argv)
    parser.at_least(args, n=1, round=1, seed=0)
    return parser.checked(args)


def problems_of_round(total, n, number, seed):
    """Indices (n,) of the problems of round `number` (1, 2, ...) out of `total`, all different."""
    shuffle, left = random.Random(seed).shuffle, []
    n = min(n, total)
    for _ in range(number):
        taken, left = left[:n], left[n:]
        if len(taken) < n:  # a new pass; what this round has taken already comes last in it
            order = list(range(total))
            shuffle(order)
            order.sort(key=set(taken).__contains__)
            missing = n - len(taken)
            taken, left = taken + order[:missing], order[missing:]
    return taken


def main(args):
    meta = describe(args, [args.input], seed=args.seed)
    partial = claim(args.out, meta, ignore=("input", "out"))
    if partial is None:
        return
    lines, seen = [], {}
    for where, line, row in read_rows(args.input, Problem):
        if row.id in seen:
            fail(f"{where}: duplicate id {row.id!r}, first in {seen[row.id]}")
        seen[row.id] = where
        lines.append(line)
    chosen = problems_of_round(len(lines), args.n, args.round, args.seed)
    with open(partial, "wb") as file:
        file.writelines(lines[index] + b"\n" for index in chosen)
    publish(args.out, meta)
    say(f"{args.out}: {len(chosen)} of {len(lines)} problems")


if __name__ == "__main__":
    run(main, parse_args())
