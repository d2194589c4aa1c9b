"""Countdown: reach the target with + - * / and parentheses, each number used exactly once.

A seeded stream of solvable problems, each with the exact number of its distinct solutions:

    python -m data.countdown --out prompts.jsonl --n 1000 --seed 0   # as the embedded model knows
    python -m data.countdown --out test.jsonl --n 300 --seed 1 --exclude prompts.jsonl
    python -m data.countdown --out hard.jsonl --numbers 6 --max-number 100 --template instruct

Writes one problem a line (and OUT.meta.json): id, task "countdown", prompt (or messages, with
--template instruct), numbers (list of int), target (int), n_solutions (int).

Numbers are drawn independently and uniformly from 1..max-number; the target is the value of a
random expression over them, drawn again until it is a whole number in 1..max-target. No prompt
occurs twice, but the same numbers may come in another order: 4 of the first 300 test problems
(--split test --seed 1) repeat an earlier one so. A problem is a multiset of numbers with a target:
its hash assigns it to one of three splits, train (80 %, all that the embedded model was pre-trained
on), tune and test (10 % each). It was pre-trained on targets up to 300: about one default problem
in twelve lies beyond.

The verdict (score.py calls `verify`): data/README.md has its rules. Nothing is evaluated by Python:
a small parser reads the answer, and values are exact. Two expressions are one solution when they
differ by commutativity and associativity alone: sums are flattened to signed terms, products to
factors with exponents, and both are sorted, so a-(b-c) is a-b+c. The text of that form stands in
`solution` and is counted in `n_solutions`.
"""
import functools
import hashlib
import itertools
import json
import math
import operator
import random
import re
from fractions import Fraction
from typing import Annotated

import msgspec

from data.files import Parser, Rollout, Verdict, claim, describe, fail, publish, read_rows, run

ASK = ("ombine the numbers {numbers} into an arithmetic expression that equals {target}. Use each "
       "number exactly once; +, -, *, / and parentheses are allowed. Think ")
TEMPLATES = {
    "plain": "{numbers}={target}:",
    "base": "Problem: c" + ASK + "first inside <think> </think>, then give the expression alone "
            "inside <answer> </answer>, for example <answer>(1 + 2) / 3</answer>.\n"
            "Solution: <think>",
    "instruct": "C" + ASK + "step by step inside <think> </think>, then give the expression alone "
                "inside <answer> </answer>, for example <answer>(1 + 2) / 3</answer>.",
}
SPLITS = {"train": range(0, 8), "tune": range(8, 9), "test": range(9, 10)}  # tenths


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    flag = parser.add_argument
    flag("--out", required=True, help="the JSONL file to write")
    flag("--n", type=int, default=1000, help="problems to write (default %(default)s)")
    flag("--seed", type=int, default=0, help="seed of the draw (default %(default)s)")
    # which problems
    flag("--numbers", type=int, default=4, choices=range(2, 7),
         help="numbers a problem (default %(default)s)")
    flag("--max-number", type=int, default=15, help="numbers are 1..this (default %(default)s)")
    flag("--max-target", type=int, default=1000, help="targets are 1..this (default %(default)s)")
    flag("--max-solutions", type=int,
         help="only problems with at most this many distinct solutions (default: any)")
    flag("--split", default="all", choices=["all", *SPLITS],
         help="only problems of this split (default %(default)s)")
    flag("--exclude", action="append", default=[], metavar="FILE.jsonl",
         help="no problem of this file, in whatever order of its numbers; may be repeated")
    # how they are put
    flag("--template", default="plain", choices=TEMPLATES,
         help="plain: for the embedded model; base: think and answer tags for a pre-trained "
         "model; instruct: the same as chat messages (default %(default)s)")
    args = parser.parse_args(argv)
    parser.at_least(args, n=1, max_number=1, max_target=1, max_solutions=1)
    return parser.checked(args)


# ---- Rows --------------------------------------------------------------------------------------
Numbers = Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]


class Row(Rollout, tag_field="task", tag="countdown"):
    """A rollout of this task, as score.py reads it."""
    numbers: Numbers
    target: int


class Excluded(msgspec.Struct):
    """What --exclude reads of a problem."""
    numbers: Numbers
    target: int


# ---- The canonical form ------------------------------------------------------------------------
# A form is (kind, up, down): kind "+" is the sum of the texts `up` less that of `down`, kind "*"
# the product of `up` over that of `down`. A text is a number or a form of the other kind.
INVERSE = {"+": "-", "*": "/"}
OTHER = {"+": "*", "*": "+"}


def by_length(text):
    return len(text), text


def spell(kind, up, down):
    """The canonical text of a form: 2+10-3, 3*(2+5)/7. None where `up` is empty: unary signs are
    no part of the game."""
    if not up:
        return None
    inverse = INVERSE.get(kind, "")
    tail = "".join(inverse + text for text in sorted(down, key=by_length))
    return kind.join(sorted(up, key=by_length)) + tail


def as_part(kind, text):
    """The text of a form of this kind as a part of one of the other kind."""
    return f"({text})" if kind == "+" else text


# ---- The verdict -------------------------------------------------------------------------------
LONGEST = 200  # characters of an answer; a right one for six numbers needs some 30
TOKENS = re.compile(r"[0-9]+|[-+*/()]").findall
DIGITS = re.compile(r"[0-9]+").findall
ALLOWED = re.compile(r"[-+*/() \t\r\n0-9]*").fullmatch
LEADING_ZERO = re.compile(r"\b0[0-9]").search
PRECEDENCE = {"(": 0, ")": 1, "+": 1, "-": 1, "*": 2, "/": 2}
OPERATE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}


def parse(expression, operand, combine):
    """The value of an expression, made by operand(digits) and combine[sign](left, right).

    ValueError if it is none. Shunting-yard: an operator waits in `signs` until one arrives that
    binds no tighter. The whole stands between one more pair of brackets.
    """
    if len(expression) > LONGEST or not ALLOWED(expression) or LEADING_ZERO(expression):
        raise ValueError("no expression")
    operands, signs, operand_next = [], ["("], True
    for token in [*TOKENS(expression), ")"]:
        precedence = PRECEDENCE.get(token)  # None: a number
        if operand_next:
            if precedence is None:
                operands.append(operand(token))
                operand_next = False
            elif token == "(":
                signs.append(token)
            else:
                raise ValueError("an operand is missing")
        elif precedence and signs:
            while PRECEDENCE[signs[-1]] >= precedence:
                right = operands.pop()
                operands[-1] = combine[signs.pop()](operands[-1], right)
            if token == ")":
                signs.pop()
            else:
                signs.append(token)
                operand_next = True
        else:
            raise ValueError("an operator is missing")
    if signs:
        raise ValueError("brackets do not match")
    return operands[0]


def canonical(expression):
    """The canonical text of an expression; ValueError if it is none."""
    return spell(*parse(expression, lambda digits: ("", (digits,), ()), COMBINE))


def flat(form, kind):
    """(up, down) of a form as part of a larger one of this kind."""
    return form[1:] if form[0] == kind else ((as_part(form[0], spell(*form)),), ())


def joining(kind, inverse):
    """The function that joins two forms to one; by the inverse, a-(b-c) = a-b+c."""
    def joined(left, right):
        up, down = flat(left, kind)
        more, less = flat(right, kind)[::-1 if inverse else 1]
        return kind, up + more, down + less
    return joined


COMBINE = {"+": joining("+", False), "-": joining("+", True),
           "*": joining("*", False), "/": joining("*", True)}


@functools.lru_cache(maxsize=2**16)  # the samples of a group repeat each other
def judge(answer, numbers, target):
    """(reason, solution) of an answer's text; numbers: a tuple of ints."""
    try:
        value = parse(answer, int, OPERATE)
    except ValueError:
        return "parse", None
    except ZeroDivisionError:
        return "value", None
    if sorted(map(int, DIGITS(answer))) != sorted(numbers):
        return "numbers", None
    return ("ok", canonical(answer)) if value == target else ("value", None)


def last_answer(completion):
    """The text inside the last complete innermost <answer>..</answer>; None if there is none."""
    start = completion.rfind("<answer>", 0, max(completion.rfind("</answer>"), 0))
    if start < 0:
        return None
    return completion[start + len("<answer>"):completion.find("</answer>", start)]


def verify(completion, row):
    """The Verdict on a completion. Time is linear in its length."""
    tagged = "<answer>" in completion
    answer = ((last_answer(completion) or "") if tagged else completion).strip(" \t\r\n")
    if not answer or not tagged and len(answer) > LONGEST:
        return Verdict(None, "no_answer", None)
    if not tagged and row.finish_reason == "length":  # it might have gone on
        return Verdict(answer, "no_answer", None)
    if len(answer) > LONGEST:  # not worth a place in judge's cache
        return Verdict(answer, "parse", None)
    return Verdict(answer, *judge(answer, row.numbers, row.target))


# ---- The exact solver --------------------------------------------------------------------------
# Here a form is kept without its kind, as two sorted tuples of texts (up, down). Each form of a
# multiset is met by splitting off the block that holds its first number, so commutativity never
# doubles one.
def splits(numbers):
    """All (block with the first number, rest), both non-empty, of a sorted tuple of numbers."""
    first, others = numbers[0], numbers[1:]
    for size in range(len(others)):
        for chosen in itertools.combinations(range(len(others)), size):
            rest = tuple(number for i, number in enumerate(others) if i not in chosen)
            yield (first, *(others[i] for i in chosen)), rest


def join(form, text, side):
    """The form with one more block on its side `up` (0) or `down` (1)."""
    parts = list(form)
    parts[side] = tuple(sorted((*parts[side], text)))
    return tuple(parts)


@functools.lru_cache(maxsize=2**14)
def compound(numbers, kind):
    """{value: {form}} over all forms of `kind` with at least two blocks that use all `numbers`."""
    found = {}
    for block, rest in splits(numbers):
        pairs = itertools.product(blocks(block, OTHER[kind]).items(), signed(rest, kind).items())
        for (a, texts), (b, forms) in pairs:
            values = (b + a, b - a) if kind == "+" else (b * a, b / a) if a else (b * a,)
            for side, value in enumerate(values):
                new = (join(form, text, side) for text in texts for form in forms)
                found.setdefault(value, set()).update(new)
    return found


@functools.lru_cache(maxsize=2**14)
def blocks(numbers, kind):
    """{value: {text}} over the one number or all compound forms of `kind`: what a form of the
    other kind is made of."""
    if len(numbers) == 1:
        return {Fraction(numbers[0]): {str(numbers[0])}}
    found = {}
    for value, forms in compound(numbers, kind).items():
        if texts := {as_part(kind, text) for form in forms if (text := spell(kind, *form))}:
            found[value] = texts
    return found


@functools.lru_cache(maxsize=2**14)
def signed(numbers, kind):
    """{value: {form}} over all forms of `kind` with one block or more, on either side."""
    several = compound(numbers, kind) if len(numbers) > 1 else {}
    found = {value: set(forms) for value, forms in several.items()}
    for a, texts in blocks(numbers, OTHER[kind]).items():
        values = (a, -a) if kind == "+" else (a, 1 / a) if a else (a,)
        for side, value in enumerate(values):
            new = (join(((), ()), text, side) for text in texts)
            found.setdefault(value, set()).update(new)
    return found


def solutions(numbers, target):
    """The canonical texts (a set) of all distinct expressions that use each of `numbers` (ints)
    once and equal `target`."""
    numbers, target = tuple(sorted(numbers)), Fraction(target)
    if len(numbers) == 1:
        return {str(numbers[0])} if numbers[0] == target else set()
    found = set()
    for (block, rest), kind in itertools.product(splits(numbers), "+*"):
        # The last step looks its partner up instead of trying all: six numbers stay feasible.
        partners = signed(rest, kind)
        for a, texts in blocks(block, OTHER[kind]).items():
            if kind == "+":
                sides = partners.get(target - a, ()), partners.get(target + a, ())
            elif a:
                sides = partners.get(target / a, ()), partners.get(target * a, ())
            else:
                sides = () if target else (set().union(*partners.values()),)
            for side, forms in enumerate(sides):
                new = (join(form, text, side) for text in texts for form in forms)
                found.update(spell(kind, *form) for form in new)
    if len(numbers) > 4:  # the tables of one problem take up to some hundred MB
        for table in (compound, blocks, signed):
            table.cache_clear()
    return found - {None}


# ---- Problems ----------------------------------------------------------------------------------
def split_of(numbers, target):
    """Which tenth of all problems this one belongs to, whatever the order of its numbers."""
    digest = hashlib.sha256(f"{sorted(numbers)}={target}".encode()).digest()
    return int.from_bytes(digest[:8]) % 10


def random_value(numbers, rng):
    """The value of a random expression over `numbers`: two random parts are joined by a random
    operator until one is left; None after a division by zero."""
    parts = [Fraction(number) for number in numbers]
    while len(parts) > 1:
        a, b = (parts.pop(rng.randrange(len(parts))) for _ in "ab")
        sign = rng.choice("+-*/")
        if sign == "/" and b == 0:
            return None
        parts.append(OPERATE[sign](a, b))
    return parts[0]


def problems(args, excluded=frozenset()):
    """Yield `args.n` different problems (dicts without their prompt); `excluded` holds (sorted
    numbers, target) pairs."""
    rng, seen, misses = random.Random(args.seed), set(), 0

    @functools.lru_cache(maxsize=2**20)
    def count(numbers, target):
        return len(solutions(numbers, target))

    def fits(numbers, target):
        if target is None or target.denominator > 1 or not 1 <= target <= args.max_target:
            return False
        key = (tuple(sorted(numbers)), int(target))
        if (numbers, target) in seen or key in excluded:
            return False
        if args.split != "all" and split_of(*key) not in SPLITS[args.split]:
            return False
        return count(*key) <= (args.max_solutions or math.inf)

    while len(seen) < args.n:
        numbers = tuple(rng.randint(1, args.max_number) for _ in range(args.numbers))
        target = random_value(numbers, rng)
        if not fits(numbers, target):
            misses += 1
            if misses > 50_000:
                fail(f"only {len(seen)} of {args.n} problems found; "
                     "widen --max-number, --max-target or --max-solutions")
            continue
        misses, target = 0, int(target)
        seen.add((numbers, target))
        yield {"id": f"countdown-{'-'.join(map(str, numbers))}-{target}", "task": "countdown",
               "numbers": list(numbers), "target": target,
               "n_solutions": count(tuple(sorted(numbers)), target)}


def with_prompt(problem, template):
    numbers = (" " if template == "plain" else ", ").join(map(str, problem["numbers"]))
    text = TEMPLATES[template].format(numbers=numbers, target=problem["target"])
    chat = {"messages": [{"role": "user", "content": text}]}
    prompt = chat if template == "instruct" else {"prompt": text}
    return {"id": problem["id"], "task": problem["task"], **prompt, **problem}


def main(args):
    excluded = {(tuple(sorted(row.numbers)), row.target)
                for path in args.exclude for _, _, row in read_rows(path, Excluded)}
    meta = describe(args, args.exclude)
    partial = claim(args.out, meta, ignore=("out", "exclude"))
    if partial is None:
        return
    with open(partial, "w", encoding="utf-8") as file:
        for problem in problems(args, excluded):
            row = with_prompt(problem, args.template)
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    publish(args.out, meta)


if __name__ == "__main__":
    run(main, parse_args())
