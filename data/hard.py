"""The hard problems of a scored file: those with few right rollouts, to be sampled once more.

    python data/hard.py scored.jsonl --prompts prompts.jsonl --out hard.jsonl --at-most 1
    python generate.py --model MODEL --prompts hard.jsonl --out again.jsonl --n 64 --seed 1

The seed of the second sampling must be another one: a rollout's random numbers depend on seed, id
and sample. Rows of the prompt file pass as they are; problems without rollouts, which generate.py
skipped, are left out. Where no problem is hard the output is empty.
"""
import collections
import os
import sys

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

import msgspec

from data.files import Parser, Problem, claim, describe, fail, publish, read_rows, run, say


class Judged(msgspec.Struct):
    """A line of scored.jsonl, as far as it is read here."""
    id: str
    correct: bool


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("scored", metavar="SCORED.jsonl", help="rollouts of these problems")
    parser.add_argument("--prompts", required=True, help="JSONL file of the problems")
    parser.add_argument("--out", required=True, help="JSONL file to write")
    parser.add_argument("--at-most", type=int, default=1,
                        help="right rollouts of a hard problem (default %(default)s)")
    args = parser.parse_args(argv)
    parser.at_least(args, at_most=0)
    return parser.checked(args)


def main(args):
    meta = describe(args, [args.scored, args.prompts])
    partial = claim(args.out, meta, ignore=("scored", "prompts", "out"))
    if partial is None:
        return
    right = collections.Counter()
    for _, _, row in read_rows(args.scored, Judged):
        right[row.id] += row.correct
    problems, hard, without = 0, 0, 0
    with open(partial, "wb") as file:
        for _, line, problem in read_rows(args.prompts, Problem):
            if problem.id not in right:  # as generate.py's --overlong skip leaves it
                without += 1
                continue
            problems += 1
            if right[problem.id] <= args.at_most:
                hard += 1
                file.write(line + b"\n")
        if not problems:
            fail(f"{args.prompts}: none of its problems has a rollout in {args.scored}")
    publish(args.out, meta)
    left_out = f", {without} without rollouts left out" if without else ""
    say(f"{args.out}: {hard} of {problems} problems{left_out}")


if __name__ == "__main__":
    run(main, parse_args())
