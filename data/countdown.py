"""Countdown problems: reach the target with + - * / and parentheses, each number used exactly once.

A seeded stream of solvable problems, each with the exact number of its distinct solutions:

    python data/countdown.py --out prompts.jsonl --n 1000 --seed 0                       # the embedded model's problems
    python data/countdown.py --out test.jsonl --n 300 --seed 1 --exclude prompts.jsonl   # none that prompts.jsonl holds
    python data/countdown.py --out hard.jsonl --numbers 6 --max-number 100 --max-target 999 --template instruct

Writes one problem a line (and OUT.meta.json): id, task "countdown", prompt (or messages, with --template instruct),
numbers (list of int), target (int), n_solutions (int). Two expressions are one solution when they differ by
commutativity and associativity alone: sums are flattened to signed terms, products to factors with exponents, and both
sorted, so a-(b-c) is a-b+c. score.py gives every right answer the same canonical text.

Numbers are drawn independently and uniformly from 1..max-number; the target is the value of a random expression over
them, drawn again until it is a whole number in 1..max-target. No prompt stands twice. A problem is a multiset of numbers
with a target: a hash of it puts it for good into one of three splits, train (80 %, all that the embedded model was
pre-trained on), tune and test (10 % each). It was pre-trained on targets up to 300: about one default problem in twelve lies beyond.
"""
import functools
import hashlib
import itertools
import json
import math
import os
import random
import sys
from fractions import Fraction

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.files import Parser, claim, describe, fail, publish, read_rows, run


TEMPLATES = {
    "plain": "{numbers}={target}:",
    "base": "Problem: combine the numbers {numbers} into an arithmetic expression that equals {target}. Use each number exactly once; "
            "+, -, *, / and parentheses are allowed. Think first inside <think> </think>, then give the expression alone "
            "inside <answer> </answer>, for example <answer>(1 + 2) / 3</answer>.\nSolution: <think>",
    "instruct": "Combine the numbers {numbers} into an arithmetic expression that equals {target}. Use each number exactly once; "
                "+, -, *, / and parentheses are allowed. Think step by step inside <think> </think>, then give the "
                "expression alone inside <answer> </answer>, for example <answer>(1 + 2) / 3</answer>.",
}


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--n", type=int, default=1000, help="problems to write (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default %(default)s)")
    # which problems
    parser.add_argument("--numbers", type=int, default=4, choices=range(2, 7), help="numbers a problem (default %(default)s)")
    parser.add_argument("--max-number", type=int, default=15, help="numbers are 1..this (default %(default)s)")
    parser.add_argument("--max-target", type=int, default=1000, help="targets are 1..this (default %(default)s)")
    parser.add_argument("--max-solutions", type=int, help="only problems with at most this many distinct solutions (default: any)")
    parser.add_argument("--split", default="all", choices=["all", *SPLITS], help="only problems of this split (default %(default)s)")
    parser.add_argument("--exclude", action="append", default=[], metavar="FILE.jsonl",
                        help="no problem of this file, in whatever order of its numbers; may be repeated")
    # how they are put
    parser.add_argument("--template", default="plain", choices=TEMPLATES, help="plain: for the embedded model; base: think and answer "
                        "tags for a pre-trained model; instruct: the same as chat messages (default %(default)s)")
    args = parser.parse_args(argv)
    for flag in ("n", "max_number", "max_target", "max_solutions"):
        if getattr(args, flag) is not None and getattr(args, flag) < 1:
            parser.error(f"--{flag.replace('_', '-')} must be at least 1")
    return parser.checked(args)


# ---- The exact solver -------------------------------------------------------------------------------------------------
# A form is a sum of signed terms (atoms or products; kind "+") or a product of factors with exponents +-1 (atoms or sums;
# kind "*"), kept as two sorted tuples of texts: (positive terms, negative ones) or (numerators, denominators). Each form
# of a multiset is met by splitting off the block that holds its first number, so commutativity never doubles one.
OTHER = {"+": "*", "*": "+"}


def splits(numbers):
    """All (block with the first number, rest), both non-empty, of a sorted tuple of numbers."""
    first, others = numbers[0], numbers[1:]
    for size in range(len(others)):
        for chosen in itertools.combinations(range(len(others)), size):
            yield (first, *(others[i] for i in chosen)), tuple(x for i, x in enumerate(others) if i not in chosen)


def join(form, text, side):
    """The form with one more block on its positive (0) or negative (1) side."""
    parts = list(form)
    parts[side] = tuple(sorted((*parts[side], text), key=lambda part: (len(part), part)))
    return tuple(parts)


def render(form, kind):
    """The canonical text; None for a form without a positive term or numerator: unary signs are no part of the game."""
    plus, minus = form
    return kind.join(plus) + "".join({"+": "-", "*": "/"}[kind] + text for text in minus) if plus else None


@functools.lru_cache(maxsize=2**14)
def compound(numbers, kind):
    """{value: {form}} over all forms of `kind` with at least two blocks that use all `numbers`."""
    found = {}
    for block, rest in splits(numbers):
        for (a, texts), (b, forms) in itertools.product(blocks(block, OTHER[kind]).items(), signed(rest, kind).items()):
            values = (b + a, b - a) if kind == "+" else (b * a, b / a) if a else (b * a,)
            for side, value in enumerate(values):
                found.setdefault(value, set()).update(join(form, text, side) for text in texts for form in forms)
    return found


@functools.lru_cache(maxsize=2**14)
def blocks(numbers, kind):
    """{value: {text}} over the one number or all compound forms of `kind`: what a form of the other kind is made of."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {str(numbers[0])}}
    found = {}
    for value, forms in compound(numbers, kind).items():
        if texts := {f"({text})" if kind == "+" else text for form in forms if (text := render(form, kind))}:
            found[value] = texts
    return found


@functools.lru_cache(maxsize=2**14)
def signed(numbers, kind):
    """{value: {form}} over all forms of `kind` with one block or more, on either side."""
    found = {value: set(forms) for value, forms in (compound(numbers, kind) if len(numbers) > 1 else {}).items()}
    for a, texts in blocks(numbers, OTHER[kind]).items():
        for side, value in enumerate((a, -a) if kind == "+" else (a, 1 / a) if a else (a,)):
            found.setdefault(value, set()).update(join(((), ()), text, side) for text in texts)
    return found


def solutions(numbers, target):
    """The canonical texts of all distinct expressions that use each of `numbers` (ints) once and equal `target` (a set)."""
    numbers, target = tuple(sorted(numbers)), Fraction(target)
    if len(numbers) == 1:
        return {str(numbers[0])} if numbers[0] == target else set()
    found = set()
    for (block, rest), kind in itertools.product(splits(numbers), "+*"):
        partners = signed(rest, kind)  # the last step looks its partner up instead of trying all: 6 numbers stay feasible
        for a, texts in blocks(block, OTHER[kind]).items():
            if kind == "+":
                sides = partners.get(target - a, ()), partners.get(target + a, ())
            elif a:
                sides = partners.get(target / a, ()), partners.get(target * a, ())
            else:
                sides = () if target else (set().union(*partners.values()),)
            for side, forms in enumerate(sides):
                found.update(render(join(form, text, side), kind) for text in texts for form in forms)
    if len(numbers) > 4:  # the tables of one problem take up to some hundred MB
        for table in (compound, blocks, signed):
            table.cache_clear()
    return found - {None}


# ---- Problems ---------------------------------------------------------------------------------------------------------
SPLITS = {"train": range(0, 8), "tune": range(8, 9), "test": range(9, 10)}


def split_of(numbers, target):
    """Which tenth of all problems this one belongs to, whatever the order of its numbers."""
    return int.from_bytes(hashlib.sha256(f"{sorted(numbers)}={target}".encode()).digest()[:8]) % 10


def random_value(numbers, rng):
    """The value of a random expression over `numbers`: two random parts are joined by a random operator until one is left."""
    parts = [Fraction(number) for number in numbers]
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in "ab")
        operator = rng.choice("+-*/")
        if operator == "/" and b == 0:
            return None
        parts.append(a + b if operator == "+" else a - b if operator == "-" else a * b if operator == "*" else a / b)
    return parts[0]


def problems(args, excluded=frozenset()):
    """Yield `args.n` different problems (dicts without their prompt); `excluded` holds (sorted numbers, target) pairs."""
    rng, seen, misses = random.Random(args.seed), set(), 0
    count = functools.lru_cache(maxsize=2**20)(lambda numbers, target: len(solutions(numbers, target)))
    while len(seen) < args.n:
        numbers = tuple(rng.randint(1, args.max_number) for _ in range(args.numbers))
        target = random_value(numbers, rng)
        wanted = target is not None and target.denominator == 1 and 1 <= target <= args.max_target
        if wanted:
            target = int(target)
            key = (tuple(sorted(numbers)), target)
            wanted = ((numbers, target) not in seen and key not in excluded
                      and (args.split == "all" or split_of(*key) in SPLITS[args.split]))
            n_solutions = count(*key) if wanted else 0
            wanted = wanted and n_solutions <= (args.max_solutions or math.inf)
        if not wanted:
            misses += 1
            if misses > 50_000:
                fail(f"only {len(seen)} of {args.n} problems found; widen --max-number, --max-target or --max-solutions")
            continue
        misses = 0
        seen.add((numbers, target))
        yield {"id": f"countdown-{'-'.join(map(str, numbers))}-{target}", "task": "countdown",
               "numbers": list(numbers), "target": target, "n_solutions": n_solutions}


def with_prompt(problem, template):
    numbers = (" " if template == "plain" else ", ").join(map(str, problem["numbers"]))
    text = TEMPLATES[template].format(numbers=numbers, target=problem["target"])
    head = {"id": problem["id"], "task": problem["task"]}
    return {**head, **({"messages": [{"role": "user", "content": text}]} if template == "instruct" else {"prompt": text}), **problem}


def main(args):
    excluded = set()
    for path in args.exclude:
        for where, _, row in read_rows(path):
            numbers, target = row.get("numbers"), row.get("target")
            if not isinstance(numbers, list) or not all(isinstance(number, int) for number in numbers) or not isinstance(target, int):
                fail(f"{where}: no Countdown problem: 'numbers' (list of int) and 'target' (int) are needed")
            excluded.add((tuple(sorted(numbers)), target))
    meta = describe(args, args.exclude)
    partial = claim(args.out, meta, ignore=("out", "exclude"))
    if partial is None:
        return
    with open(partial, "w", encoding="utf-8") as file:
        for problem in problems(args, excluded):
            file.write(json.dumps(with_prompt(problem, args.template), ensure_ascii=False) + "\n")
    publish(args.out, meta)


if __name__ == "__main__":
    run(main, parse_args())
