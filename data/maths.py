"""Maths: from the Hub's benchmarks to prompt rows, and the verdict on an answer.

    python -m data.maths --input MATH-500/test.jsonl --out math500.jsonl
    python -m data.maths --input aime24.parquet --out aime24.jsonl --source aime24 --template chat

Reads JSONL, or Parquet if `pyarrow` is installed. Of each row it takes the first of these fields
that is there and not null:

    problem   problem | Problem | question | Question | prompt (text, or a chat list: its last user
              turn); `context` goes before it
    gold      final_answer | answer | Answer | reward_model.ground_truth | the last \\boxed{..} of
              solution | Solution
    id        unique_id | id | ID | problem_idx | extra_info.index; a number n becomes SOURCE-n;
              without any, SOURCE- and a digest of the problem

That is MATH, MATH-500, AIME24/25, AMC23, OlympiadBench, DAPO-17k (the wrapping around its problems
is taken off) and GSM8K (whose gold stands after "####"). Writes one problem a line (and
OUT.meta.json): id, task "math", prompt or messages, answer (text; a list where several parts are
asked for), unit and error where the row has them, source. Two rows with one id, and a row without
a gold, end it with the row's number.

The verdict (score.py calls `verify`, which hands it to a worker). The answer is the last
\\boxed{..} with matched braces; where n parts are asked for and it holds fewer, the last n boxes.
Gold and answer are brought into one spelling (`normal`), taken apart into the sides of an equation,
value and unit, and the values are compared by math-verify. All parts must be met, in any order; a
unit may be left out, another unit is wrong; with `error`, |answer - gold| <= error. Of an equation
each side must be the gold or name what was asked for: x = 5, not 2x + 1 = 5. data/README.md has
the rules and their limits.
"""
import contextlib
import decimal
import functools
import hashlib
import json
import math
import os
import re

from data.files import (Parser, Rollout, Verdict, claim, describe, fail, publish, read_rows, run,
                        say)
from data.latex import (ALIKE, MULTIPLIED, PERCENT, boxes, is_name, join_thousands, multiplied,
                        normal, parts_of, sides_of, signs_of, split_parts, split_unit, unit_name,
                        words)
from data.sandbox import Judge, Pending

INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    flag = parser.add_argument
    flag("--input", required=True, help="the JSONL or Parquet file to convert")
    flag("--out", required=True, help="the JSONL file to write")
    flag("--source",
         help="the benchmark's name, for evaluate.py and ids (default: the input file's)")
    # which problems
    flag("--keep-first", action="store_true",
         help="of the rows with one id keep the first, for files that repeat rows as DAPO-17k does")
    flag("--max-chars", type=int,
         help="leave out problems whose text has more characters (default: none)")
    # how the problems are put; the instruction is INSTRUCTION, as the verdict wants a box
    flag("--template", default="qwen-math", choices=["qwen-math", "chat", "plain"],
         help="qwen-math: chat messages, the instruction as the system prompt, for Qwen2.5-Math; "
         "chat: the instruction after the problem; plain: the same as text (default %(default)s)")
    flag("--system", help="a system prompt before the messages of --template chat (default: none)")
    args = parser.parse_args(argv)
    args.source = args.source or os.path.splitext(os.path.basename(args.input))[0]
    if args.system is not None and args.template != "chat":
        parser.error("--system goes with --template chat alone")
    parser.at_least(args, max_chars=1)
    return parser.checked(args)


# ---- Rows --------------------------------------------------------------------------------------
Gold = str | int | float
LONGEST = 2000  # characters of an answer
JUDGE = Judge("data.maths", "judge", package="math-verify")


class Row(Rollout, tag_field="task", tag="math"):
    """A rollout of this task, as score.py reads it. Lists hold one entry a part of the answer."""
    answer: Gold | list[Gold]
    unit: str | None | list[str | None] = None
    error: Gold | None | list[Gold | None] = None  # allowed absolute error

    def __post_init__(self):
        gold_of(self)


def text_of(value):
    """A number or text as text. 1e-05 is no LaTeX."""
    return format(decimal.Decimal(repr(value)), "f") if type(value) is float else str(value).strip()


def size_of(value):
    """The number that an allowed error is; NaN if it is none."""
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        return float(value)
    return math.nan


def gold_of(row):
    """[(gold, unit, error)] of a row, one for each part that is asked for; ValueError."""
    answer = row.answer if isinstance(row.answer, list) else [row.answer]
    golds = [text_of(part) for part in answer]
    if not golds or not all(golds):
        raise ValueError("field 'answer' must be a text, a number or a list of these, not empty")
    if not isinstance(row.answer, list):
        parts = split_parts(join_thousands(golds[0]))
        golds = parts if len(parts) > 1 else [join_thousands(golds[0])]
    units, errors = (values if isinstance(values, list) else [values] * len(golds)
                     for values in (row.unit, row.error))
    for field, values in (("unit", units), ("error", errors)):
        if len(values) != len(golds):
            raise ValueError(f"field '{field}' must be one value, or a list of them, "
                             "one a part of the answer")
    errors = [error if error is None else size_of(error) for error in errors]
    if not all(error is None or 0 <= error < math.inf for error in errors):
        raise ValueError("field 'error' must be a number of at least 0, or a list of them")
    return [(gold, unit_name(unit or ""), error)
            for part, unit, error in zip(golds, units, errors) for gold in signs_of(part)]


def extract(completion, parts, cut=False):
    """The answer's text: the last box, or the last ones where that holds fewer than the `parts`
    asked for; or None. Of a completion that was cut no box at its end without braces: `\\boxed 12`
    might have gone on."""
    spans = boxes(completion)
    if cut and spans and spans[-1][1] >= len(completion.rstrip(".,;:")):
        spans.pop()
    found = [completion[start:min(end, start + LONGEST + 1)].strip()
             for start, end in spans[-parts:]]
    if len(found) == parts > 1 and len(parts_of(found[-1])) < parts:
        return ", ".join(found)
    return found[-1] if found and found[-1] else None


def verify(completion, row):
    """The Verdict on a completion, or one that is Pending."""
    golds = gold_of(row)
    pred = extract(completion, len(golds), row.finish_reason == "length")
    if pred is None or len(pred) > LONGEST:
        return Verdict(pred, "no_answer" if pred is None else "parse")
    return Pending(pred, JUDGE, [pred, golds])


def symbols(text):
    value = expression(text)[1]
    return getattr(value, "free_symbols", set())


def claims(sides, equal):
    """Whether a chain of equations claims the gold. Each side is equal to it or the name of what
    was asked for; between, it may be a formula in other letters (A = bh = 12)."""
    named, met = is_name(sides[0]), False
    for i, side in enumerate(sides):
        if equal(side):
            met = True
        elif is_name(side):
            continue
        elif not (named and 0 < i < len(sides) - 1 and (own := symbols(side))
                  and not own & symbols(sides[0])):
            return False
    return met


MISREAD = re.compile(r"(?<![\w.^\\}])\d+(?:\.\d+)? ?(?:\[|\\?\{)|^\{\d+\} ?\{|\] ?\["
                     r"|\.\s*\.|dots|\d'|\d_0").search


# ---- Whether it is right (in a worker) -----------------------------------------------------------
def read_number(text, **_):
    """Stands in for SymPy's parse_expr, which is eval, and to which math-verify's grammar hands
    every number."""
    return sympy.Integer(text) if text.isdigit() else sympy.Float(text)


def prepare():
    """Import math-verify, in a worker, and close the way to eval that its grammar has."""
    global CASE_TELLS, NormalizationConfig, latex2sympy, normalize_latex, should_treat_as_complex
    global sympy, verify_expressions
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # simplify() imports it, and it reads its own names by parse_expr
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from math_verify import verify as verify_expressions
    from math_verify.grader import should_treat_as_complex

    CASE_TELLS = ConversionConfig(lowercase_symbols=False)  # r/R is not 1
    judge(r"(x+1)^2 = \sqrt{2}", [(r"x^2 + 2x = \sin(0.5)", "", None)])  # imports on the way
    sympy.parsing.sympy_parser.parse_expr = read_number
    return b"def monomial_"


@functools.lru_cache(maxsize=1024)
def expression(text):
    """(normalised text, SymPy expression or None), by math-verify's grammar for LaTeX. Its reader
    of plain text is left alone: it is eval."""
    latex = normalize_latex(text, NormalizationConfig(units=False, malformed_operators=True,
                                                      nits=True, boxed="none"))
    # math-verify reads "3 4" and 3{4} as 3 + 4, a mixed fraction, and leaves dots and quotes out
    if re.search(r"\d\s+\d", latex) or MISREAD(text):
        return text, None
    try:
        return latex, latex2sympy(latex, is_real=not should_treat_as_complex(latex),
                                  normalization_config=None, conversion_config=CASE_TELLS)
    except MemoryError:
        raise
    except Exception:
        return latex, None


def same_value(gold, pred, error=None):
    """Whether two values without units and equations are equal, or no further apart than error."""
    (gold, a), (pred, b) = expression(gold), expression(pred)
    if gold == pred != "":
        return True
    if a is None or b is None:
        return False
    if error is not None:
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # no numbers
            return abs(complex((a - b).evalf())) <= error * (1 + 1e-9)
    return verify_expressions(a, b, timeout_seconds=None) and not small_and_apart(a, b)


def small_and_apart(a, b):
    """Whether two numbers below a thousandth differ in their first three digits, which to six
    places they may not: 1.6e-19 and -2e-31 are both zero there."""
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return False
    with contextlib.suppress(TypeError, ValueError, OverflowError):
        a, b = complex(a.evalf()), complex(b.evalf())
        most = max(abs(a), abs(b))
        return most < 1e-3 and abs(a - b) > 5e-3 * most
    return False


def same_percentage(gold, pred, error):
    """The same where one of the two is in percent. 0.4 is 40%; 40 is 40%, too, where the gold
    leaves the sign out, but 1/2 is not 1/2 %."""
    (gold, g), (pred, p) = (PERCENT.subn("", text) for text in (gold, pred))
    if g == p or g and same_value(gold, pred, error):
        return same_value(gold, pred, error)
    hundredth = r"\frac{%s}{100}"
    if g:
        return same_value(hundredth % gold, pred, error)
    if same_value(gold, hundredth % pred, error):
        return True
    with contextlib.suppress(TypeError, ValueError, AttributeError):
        return abs(complex(expression(gold)[1].evalf())) >= 1 and same_value(gold, pred, error)
    return False


def same_quantity(gold, pred, unit, error):
    """Whether two values are equal; a unit may be left out, another one is wrong."""
    if gold == pred != "":
        return True
    if (wanted := words(gold)) and (said := words(pred)):
        return wanted == said
    gold, pred = (MULTIPLIED.sub(multiplied, text) for text in (gold, pred))
    gold, own = split_unit(gold, unit)
    pred, other = split_unit(pred, unit or own)
    if other and not own:
        gold, own = split_unit(gold, other)
    expected = unit or own
    if expected and other and expected != other and {expected, other} not in ALIKE:
        return False
    return same_percentage(gold, pred, error)


def same(pred, gold, unit, error):
    """Whether a part of the answer equals a part of the gold."""
    gold, pred = (normal(join_thousands(text)) for text in (gold, pred))
    if gold == pred != "":
        return True
    wanted, sides = sides_of(gold), sides_of(pred)

    def equal(side):
        return same_quantity(wanted[-1], side, unit, error)

    if len(wanted) == 1:
        return equal(pred) if len(sides) == 1 else claims(sides, equal)
    if is_name(wanted[0]):  # the gold is x = 5
        names = {side.replace(" ", "") for side in sides if is_name(side)}
        if len(sides) == 1:
            return equal(pred)
        own_name = wanted[0].replace(" ", "") in names
        if own_name or not symbols(wanted[-1]):
            return (own_name or not names) and claims(sides, equal)
    return len(sides) > 1 and same_value(gold, pred)


def judge(pred, golds):
    """ok, parse or value. golds: [(gold, unit, error)]; all must be met, each by another part."""
    def matched(wanted, parts):
        return not wanted or any(
            same(parts[i], *wanted[0]) and matched(wanted[1:], parts[:i] + parts[i + 1:])
            for i in range(len(parts)))

    for text in (pred, join_thousands(pred)):  # 100,200 is two parts or one
        if len(golds) == 1 and len(split_parts(text)) > len(split_parts(golds[0][0])):
            parts = split_parts(text)  # 1, 1 is not 1
            continue
        parts = parts_of(text) if len(golds) > 1 else [text]
        if len(parts) == len(golds) and matched(golds, parts):
            return "ok"
    texts = [split_unit(normal(part))[0] for part in parts]
    return "value" if all(expression(text)[1] is not None for text in texts) else "parse"


# ---- Benchmarks ----------------------------------------------------------------------------------
def parquet_rows(path):
    """Yield (where, None, row) for each row of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fail(f"{path}: reading Parquet needs pyarrow (pip install pyarrow), "
             "or convert the file to JSONL")
    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield f"{path}:{number}", None, row
    except pyarrow.ArrowException as error:
        fail(f"{path}: not a valid Parquet file ({error})")
    if not number:
        fail(f"{path}: no rows in this file")


def first(row, *names):
    """The first field that is there and not null; a dot goes into an object."""
    for name in names:
        value = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is not None:
            return value
    return None


def problem_of(row):
    """The problem's text, or None."""
    text = first(row, "problem", "Problem", "question", "Question", "prompt")
    if isinstance(text, list):  # a chat
        turns = [turn.get("content") for turn in text
                 if isinstance(turn, dict) and turn.get("role") == "user"]
        text = turns[-1] if turns else None
    if not isinstance(text, str) or not text.strip():
        return None
    # DAPO's wrapping asks for a line "Answer: .."; the verdict wants a box.
    text = re.sub(r"^Solve the following math problem step by step\. The last line of your "
                  r"[^\n]*\n\n", "", text)
    text = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$", "",
                  text)
    context = first(row, "context")
    if isinstance(context, str) and context.strip():
        return f"{context.strip()}\n{text.strip()}"
    return text.strip()


def last_box(text):
    """What the last box of a worked solution holds; MATH has `\\boxed 9` at times. Or None."""
    found = boxes(text)
    return text[slice(*found[-1])].strip() or None if found else None


def commas(text):
    """A text split at its commas outside of all brackets; empty ones too."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found]


def stated_gold(row):
    """The gold that a benchmark's row states: a text, or a list of them where several parts are
    asked for; None if there is none."""
    gold = first(row, "final_answer", "answer", "Answer", "reward_model.ground_truth")
    if gold is None:
        solution = first(row, "solution", "Solution")
        gold = last_box(solution) if isinstance(solution, str) else None
    several = isinstance(gold, list)
    golds = []
    for one in gold if several else [gold]:
        if type(one) not in (str, int, float) or one in (math.inf, -math.inf) or one != one:
            return None
        one = text_of(one).rsplit("####", 1)[-1]  # GSM8K: the worked solution, #### and the answer
        one = last_box(one) or one
        one = re.sub(r"(?<!\\)\$", "", one).strip()
        golds += commas(one) if several and row.get("is_multiple_answer") is True else [one]
    if not golds or not all(golds):
        return None
    return golds if len(golds) > 1 else golds[0]


def id_of(row, problem, source):
    name = first(row, "unique_id", "id", "ID", "problem_idx", "extra_info.index")
    if isinstance(name, str) and name:
        return name if not name.isdigit() else f"{source}-{name}"
    if type(name) is int:
        return f"{source}-{name}"
    return f"{source}-{hashlib.sha256(problem.encode()).hexdigest()[:12]}"


def prompt_of(problem, template, system):
    if template == "plain":
        return {"prompt": f"{problem}\n{INSTRUCTION}\n"}
    if template == "qwen-math":
        system, user = INSTRUCTION, problem
    else:
        user = f"{problem}\n\n{INSTRUCTION}"
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": user}]}


def extras_of(where, row, gold):
    """The fields `unit` and `error` of a benchmark's row, where it has them."""
    extras = {}
    for field, fits, what in (("unit", lambda value: isinstance(value, str), "a text"),
                              ("error", lambda value: 0 <= size_of(value) < math.inf,
                               "a number of at least 0")):
        value = row.get(field)
        if isinstance(value, str):
            several = commas(value)
            one_a_part = isinstance(gold, list) and len(several) == len(gold)
            value = several if one_a_part else value.strip()
        if value is None or value == "":
            continue
        if not all(map(fits, value if isinstance(value, list) else [value])):
            fail(f"{where}: field '{field}' must be {what}, or a list of them, "
                 "one a part of the answer")
        extras[field] = value
    return extras


def convert(where, row, args):
    """The prompt row of a benchmark's row; None if its problem is too long."""
    problem, gold = problem_of(row), stated_gold(row)
    if problem is None:
        fail(f"{where}: no problem text (problem, Problem, question, Question or prompt)")
    if gold is None:
        fail(f"{where}: no gold (final_answer, answer, Answer, reward_model.ground_truth, "
             "or a box in solution)")
    if args.max_chars and len(problem) > args.max_chars:
        return None
    return {"id": id_of(row, problem, args.source), "task": "math",
            **prompt_of(problem, args.template, args.system), "answer": gold,
            **extras_of(where, row, gold), "source": args.source}


def main(args):
    meta = describe(args, [args.input])
    partial = claim(args.out, meta, ignore=("out", "input"))
    if partial is None:
        return
    seen, too_long = {}, 0
    reader = parquet_rows if args.input.endswith(".parquet") else read_rows
    with open(partial, "w", encoding="utf-8") as file:
        for where, _, row in reader(args.input):
            new = convert(where, row, args)
            if new is None:
                too_long += 1
                continue
            if new["id"] in seen:
                if args.keep_first:
                    continue
                fail(f"{where}: id {new['id']!r} stands twice, first in {seen[new['id']]} "
                     "(see --keep-first)")
            seen[new["id"]] = where
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
    if not seen:
        fail(f"{args.input}: no problem has at most {args.max_chars} characters (--max-chars)")
    publish(args.out, meta)
    left_out = f"; {too_long} longer ones left out" if too_long else ""
    say(f"{args.out}: {len(seen)} problems{left_out}")


if __name__ == "__main__":
    run(main, parse_args())
