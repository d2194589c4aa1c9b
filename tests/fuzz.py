"""A long fuzz campaign against data/countdown.py's verifier.

    python tests/fuzz.py --strings 1000000 --seed 0

Strings are grown from right and wrong answers by mutation and splicing; a string that shows the
verifier a new pair of neighbouring tokens under some verdict is kept and grown further. Every
verdict is compared with an independent oracle: it reads the string with Python's own parser and
looks its tree up among all the trees that solve the problem. Where the string is right, the
canonical text must be one of those that the solver finds.

Prints a table of figures; exit status 1 if there was a false accept, a false reject, a wrong
canonical text or an exception. Measures time against length on hostile strings of up to 10^5
characters.
"""
import argparse
import ast
import functools
import itertools
import os
import random
import re
import sys
import time
import timeit
import warnings
from fractions import Fraction

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from data import countdown  # noqa: E402

warnings.simplefilter("ignore", SyntaxWarning)  # the oracle's parser warns of "(1)(2)"
OPERATORS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/"}


# ---- The oracle: every solution, by enumeration ------------------------------------------------
@functools.lru_cache(maxsize=None)
def trees(numbers):
    """All (tree, value) over a sorted tuple of numbers, each used once; a tree is an int or
    (operator, left, right)."""
    if len(numbers) == 1:
        return ((numbers[0], Fraction(numbers[0])),)
    found = {}
    for size in range(1, len(numbers)):
        for chosen in itertools.combinations(range(len(numbers)), size):
            left = tuple(numbers[i] for i in chosen)
            right = tuple(numbers[i] for i in range(len(numbers)) if i not in chosen)
            for (a, x), (b, y) in itertools.product(trees(left), trees(right)):
                found[("+", a, b)], found[("-", a, b)], found[("*", a, b)] = x + y, x - y, x * y
                if y:
                    found[("/", a, b)] = x / y
    return tuple(found.items())


def shape(node):
    """The tree of Python's own syntax tree; None inside for anything but + - * / and integers."""
    if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        return OPERATORS[type(node.op)], shape(node.left), shape(node.right)
    return node.value if isinstance(node, ast.Constant) and type(node.value) is int else None


def oracle(completion, solved):
    """Whether a completion answers the problem whose solving trees are `solved`."""
    if "<answer>" in completion:
        pairs = re.findall(r"<answer>((?:(?!</?answer>).)*)</answer>", completion, re.DOTALL)
        completion = pairs[-1] if pairs else ""
    answer = completion.strip(" \t\r\n")
    if not re.fullmatch(r"[-0-9+*/() \t\r\n]{1,200}", answer) or re.search(r"\b0[0-9]", answer):
        return False
    try:
        return shape(ast.parse(re.sub(r"[\t\r\n]", " ", answer), mode="eval").body) in solved
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False


# ---- Strings -----------------------------------------------------------------------------------
PIECES = [*"0123456789+-*/() \n\t\r", *"+-*/()" * 2, "**", "//", ".", ",", "_", "e", "=", " = 24",
          "0x", "<answer>", "</answer>", "<think>", "\0", "\u2212", "\u00d7", "\u00f7", "\uff0b",
          "\uff11", "\u0663", "\u00b2", "\u00a0", "\u2028", "\u200b", "\x1c", "\ufeff", "9" * 30,
          "(" * 40, "1+", "-(", "--", "\\frac", "__import__('os')"]


def spell(tree, rng):
    """A tree as text, in random brackets and blanks, and in those that it needs."""
    def blank():
        return rng.choice(["", "", "", " ", "  ", "\n", "\t", "\r\n"])

    def child(side):
        one, text = tree[side], spell(tree[side], rng)
        if isinstance(one, int):
            return text
        weak = one[0] in "+-" and tree[0] in "*/"
        same = (one[0] in "+-") == (tree[0] in "+-")
        return f"({text})" if weak or side == 2 and same or rng.random() < 0.2 else text

    text = str(tree) if isinstance(tree, int) else (
        f"{child(1)}{blank()}{tree[0]}{blank()}{child(2)}")
    while rng.random() < 0.1:
        text = f"({blank()}{text}{blank()})"
    return text


def mutate(text, corpus, rng):
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8])):
        at, to = sorted(rng.randrange(len(text) + 1) for _ in "ab")
        before, between, after = text[:at], text[at:to], text[to:]
        way = rng.randrange(8)
        if way in (0, 1, 3):  # a piece more, or in place of a character
            text = before + rng.choice(PIECES) + text[at + (way == 3):]
        elif way == 2:
            text = before + text[min(to, at + 3):]
        elif way == 4:
            text = before + between * rng.choice([2, 2, 3]) + after
        elif way == 5:
            other = rng.choice(corpus)
            text = before + other[rng.randrange(len(other) + 1):]
        elif way == 6:
            wrap = rng.choice(["{}<answer>{}</answer>{}", "<answer>{}{}{}</answer>", "{}({}){}"])
            text = wrap.format(before, between, after)
        else:
            swap = list(text)
            rng.shuffle(swap)
            text = "".join(swap) if len(text) < 30 else text[::-1]
    return text[:2000]


KINDS = re.compile(
    r"(?P<open><answer>)|(?P<close></answer>)|(?P<digits>[0-9]+)|(?P<sign>[-+*/()])"
    r"|(?P<blank>[ \t\r\n]+)|.", re.DOTALL)


def states(text, reason):
    """What a string shows the verifier: neighbouring kinds of tokens, with the verdict."""
    matches = KINDS.finditer(text[:300])
    kinds = [match[0] if match.lastgroup == "sign" else match.lastgroup for match in matches]
    return {(reason, *pair) for pair in zip(["start", *kinds], [*kinds, "end"])}


# ---- The campaign ------------------------------------------------------------------------------
PROBLEMS = [  # some of them without a solution
    ((1, 2), 3), ((5, 5), 1), ((3, 7), 21), ((0, 4), 0), ((3, 3, 8), 1), ((1, 2, 3), 6),
    ((2, 5, 10), 20), ((25, 4, 100), 0), ((1, 1, 1), 1), ((0, 0, 7), 7), ((3, 3, 8, 8), 24),
    ((1, 2, 3, 4), 24), ((2, 2, 2, 2), 2), ((10, 5, 15, 9), 41), ((1, 5, 5, 5), 24),
    ((6, 4, 6, 2), 2), ((0, 1, 2, 3), 6), ((12, 1, 21, 11), 11), ((1, 7, 8, 11), -8),
    ((1, 2, 3, 4), 77)]


def campaign(strings, seed):
    """Figures of `strings` verdicts: a dict; `failures` holds up to 20 of the strings that were
    judged wrongly."""
    names = ("right", "false accepts", "false rejects", "wrong canonical texts", "exceptions")
    rng, seen, failures, problems = random.Random(seed), set(), [], []
    figures = {"strings": strings, **dict.fromkeys(names, 0)}
    countdown.judge.cache_clear()
    for numbers, target in PROBLEMS:
        every = trees(tuple(sorted(numbers)))
        solved = {tree for tree, value in every if value == target}
        problems.append((countdown.Row("a", 0, "", "stop", numbers, target), solved,
                         sorted(solved, key=repr) or [tree for tree, _ in every],
                         countdown.solutions(numbers, target),
                         [spell(rng.choice(every)[0], rng) for _ in range(4)]))
    for _ in range(strings):
        row, solved, ordered, texts, corpus = rng.choice(problems)
        text = rng.choice(corpus) if rng.random() < 0.5 else spell(rng.choice(ordered), rng)
        if rng.random() < 0.7:
            text = mutate(text, corpus, rng)
        right = oracle(text, solved)
        figures["right"] += right
        try:
            verdict = countdown.verify(text, row)
            correct, reason = verdict.reason == "ok", verdict.reason
        except Exception as error:  # the campaign goes on and counts
            correct, reason = None, repr(error)
        wrong = ("exceptions" if correct is None else "false accepts" if correct > right else
                 "false rejects" if correct < right else
                 "wrong canonical texts" if right and verdict.solution not in texts else None)
        if wrong:
            figures[wrong] += 1
            failures = [*failures, (wrong, row, text)][:20]
        if new := states(text, reason) - seen:
            seen |= new
            corpus.append(text)
    return {**figures, "states reached": len(seen), "failures": failures}


def print_timings():
    """The best of 20 times by length: a text repeats a piece, inside one pair of tags as well."""
    row = countdown.Row("a", 0, "", "stop", (1, 2), 3)
    pieces = ("9", "1+", "(", " ", "\u0663", "<answer>", "</answer>", "<answer",
              "<answer>1+2</answer>")
    print(f"\n{'microseconds at':38}{'10^3':>12}{'10^4':>12}{'10^5':>12}   characters")
    for piece, form in itertools.product(pieces, ("{}", "<answer>{}</answer>")):
        best = []
        for length in (1000, 10_000, 100_000):
            timer = timeit.Timer(functools.partial(
                countdown.verify, form.format(piece * (length // len(piece))), row),
                countdown.judge.cache_clear)
            best.append(1e6 * min(timer.repeat(20, 1)))
        print(f"{form.format(piece) + '..':38}" + "".join(f"{value:12.1f}" for value in best))


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--strings", type=int, default=100_000, help="(default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default %(default)s)")
    args = parser.parse_args()
    start = time.time()
    figures = campaign(args.strings, args.seed)
    failures = figures.pop("failures")
    for name, value in {**figures, "seconds": round(time.time() - start)}.items():
        print(f"{name:24}{value:>12,}")
    print_timings()
    for failure in failures:
        print(*map(repr, failure))
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
