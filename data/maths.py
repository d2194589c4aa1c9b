"""Maths problems: from the Hub's field spellings to prompt rows.

    python data/maths.py --input MATH-500/test.jsonl --out math500.jsonl
    python data/maths.py --input aime24.parquet --out aime24.jsonl --source aime24 --template chat

Reads JSONL, or Parquet if `pyarrow` is installed. Of each row it takes the first of these fields that is
there and not null:
    problem   problem | Problem | question | Question | prompt (text, or a chat list: its last user turn); `context`
              goes before it
    gold      final_answer | answer | Answer | reward_model.ground_truth | the last \\boxed{..} of solution | Solution
    id        unique_id | id | ID | problem_idx | extra_info.index; a number n becomes SOURCE-n; without any, SOURCE-
              and a digest of the problem
That is MATH, MATH-500, AIME24/25, AMC23, OlympiadBench, DAPO-17k (the wrapping around its problems is taken off) and
GSM8K (whose gold stands after "####").

Writes one problem a line (and OUT.meta.json): id, task "math", prompt or messages, answer (text; a list where several
parts are asked for), unit and error where the row has them, source. Two rows with one id, and a row without a gold, end
it with the row's number.
"""
import contextlib
import decimal
import functools
import hashlib
import json
import math
import os
import re
import sys

import msgspec

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.workers import Job, Judge
from data.files import Parser, Rollout, Verdict, claim, describe, fail, publish, read_rows, run


INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("--input", required=True, help="the JSONL or Parquet file to convert")
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    parser.add_argument("--source", help="the benchmark's name, for evaluate.py and ids (default: the input file's)")
    parser.add_argument("--keep-first", action="store_true",
                        help="of the rows with one id keep the first, for files that repeat rows as DAPO-17k does")
    # how the problems are put; the instruction is INSTRUCTION, as score.py wants a box
    parser.add_argument("--template", default="qwen-math", choices=["qwen-math", "chat", "plain"],
                        help="qwen-math: chat messages, the instruction as the system prompt, for Qwen2.5-Math; "
                        "chat: the instruction after the problem; plain: the same as text (default %(default)s)")
    parser.add_argument("--system", help="a system prompt before the messages of --template chat (default: none)")
    args = parser.parse_args(argv)
    args.source = args.source or os.path.splitext(os.path.basename(args.input))[0]
    if args.system is not None and args.template != "chat":
        parser.error("--system goes with --template chat alone")
    return parser.checked(args)


def parquet_rows(path):
    """Yield (where, None, row) for each row of a Parquet file."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        fail(f"{path}: reading Parquet needs pyarrow (pip install pyarrow), or convert the file to JSONL")
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


def boxed(text):
    """The content of the last \\boxed{..} with matched braces, or of `\\boxed 9`, as MATH has it at times; or None."""
    start = max(text.rfind("\\boxed"), text.rfind("\\fbox"))
    rest = text[start:].removeprefix("\\boxed").removeprefix("\\fbox").lstrip() if start >= 0 else ""
    if not rest.startswith("{"):
        return rest.split("$")[0].strip() or None
    depth = 0
    for match in re.finditer(r"\\.|[{}]", rest, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if depth == 0:
            return rest[1:match.start()].strip() or None
    return None


def parts(text):
    """An answer split at its commas outside of all brackets."""
    found, depth = [""], 0
    for character in text:
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    return [part.strip() for part in found]


def problem_of(row):
    """The problem's text, or None."""
    text = first(row, "problem", "Problem", "question", "Question", "prompt")
    if isinstance(text, list):  # a chat
        turns = [turn.get("content") for turn in text if isinstance(turn, dict) and turn.get("role") == "user"]
        text = turns[-1] if turns else None
    if not isinstance(text, str) or not text.strip():
        return None
    # DAPO's wrapping asks for a line "Answer: .."; score.py wants a box
    text = re.sub(r"^Solve the following math problem step by step\. The last line of your [^\n]*\n\n", "", text)
    text = re.sub(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$", "", text)
    context = first(row, "context")
    return f"{context.strip()}\n{text.strip()}" if isinstance(context, str) and context.strip() else text.strip()


def benchmark_gold(row):
    """The gold: a text, or a list of them where several parts are asked for; None if there is none."""
    gold = first(row, "final_answer", "answer", "Answer", "reward_model.ground_truth")
    if gold is None:
        solution = first(row, "solution", "Solution")
        gold = boxed(solution) if isinstance(solution, str) else None
    several = isinstance(gold, list)
    golds = []
    for one in gold if several else [gold]:
        if type(one) is float and math.isfinite(one):
            one = format(decimal.Decimal(repr(one)), "f")  # 1e-05 is no LaTeX
        elif type(one) is int:
            one = str(one)
        elif not isinstance(one, str):
            return None
        one = one.rsplit("####", 1)[-1]  # GSM8K: the worked solution, then #### and the answer
        one = boxed(one) or one
        one = re.sub(r"(?<!\\)\$", "", one).strip()
        golds += parts(one) if several and row.get("is_multiple_answer") is True else [one]
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
    return {"messages": [{"role": "system", "content": system}] * bool(system) + [{"role": "user", "content": user}]}


def is_text(value):
    return isinstance(value, str)


def is_size(value):
    with contextlib.suppress(TypeError, ValueError):
        return 0 <= float(value) < math.inf
    return False


def convert(where, row, args):
    """The prompt row of a benchmark's row."""
    problem, gold = problem_of(row), benchmark_gold(row)
    if problem is None:
        fail(f"{where}: no problem text (problem, Problem, question, Question or prompt)")
    if gold is None:
        fail(f"{where}: no gold (final_answer, answer, Answer, reward_model.ground_truth, or a box in solution)")
    extras = {}
    for field, fits, what in (("unit", is_text, "a text"), ("error", is_size, "a number of at least 0")):
        value = row.get(field)
        if isinstance(value, str):
            value = parts(value) if isinstance(gold, list) and len(parts(value)) == len(gold) else value.strip()
        if value is not None and value != "":
            if not all(map(fits, value if isinstance(value, list) else [value])):
                fail(f"{where}: field '{field}' must be {what}, or a list of them, one a part of the answer")
            extras[field] = value
    return {"id": id_of(row, problem, args.source), "task": "math", **prompt_of(problem, args.template, args.system),
            "answer": gold, **extras, "source": args.source}


# ---- Maths: what the answer is ---------------------------------------------------------------------------------------
LONGEST_MATHS = 2000


def boxes(text):
    """(start, end) of the content of every \\boxed{..} with matched braces, in order of their starts; linear time."""
    found, opened = [], []
    for match in re.finditer(r"\\boxed\s*\{|\\.|[{}]", text, re.DOTALL):  # \\. : an escaped brace is no brace
        if match[0] == "}":
            start, boxed = opened.pop() if opened else (0, False)
            if boxed:
                found.append((start, match.start()))
        elif match[0][-1] == "{" and match[0] != "\\{":
            opened.append((match.end(), len(match[0]) > 1))
    return sorted(found)


def split_parts(text):
    """The parts of an answer: split at commas, semicolons, "and" and "or" outside of all brackets."""
    text = re.sub(r"^\\\{(.*)\\\}$", r"\1", text.strip(), flags=re.DOTALL)
    parts, depth = [""], 0
    for token in re.findall(r"\\text\s*\{\s*(?:and|or)\s*\}|\b(?:and|or)\b|\\?.", text, re.DOTALL):
        depth += (token[-1] in "([{") - (len(token) < 3 and token[-1] in ")]}")
        if depth == 0 and (token in (",", ";") or len(token) > 2 or token == "or"):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def join_thousands(text):
    """10,000 or 10\\,000 as 10000; in brackets, as in (1,234), the comma separates."""
    return text if re.search(r"[(\[]", text) else re.sub(r"(?<=\d)(?:,|\{,\}|\s|~|\\[,;:! ])+(?=\d{3}(?!\d))", "", text)


def extract_maths(completion, parts):
    """The answer's text: the last box, or the last ones where that holds fewer than the `parts` asked for; or None."""
    found = [completion[start:min(end, start + LONGEST_MATHS + 1)].strip() for start, end in boxes(completion)[-parts:]]
    if len(found) == parts > 1 and len(split_parts(found[-1])) < parts:
        return ", ".join(found)
    return found[-1] if found and found[-1] else None


# ---- The verdict ----
Gold = str | int | float
JUDGE = Judge("data.maths", "judge", package="math-verify")


class Row(Rollout, tag_field="task", tag="math"):
    """A rollout of this task, as score.py reads it. Lists hold one entry a part of the answer."""
    answer: Gold | list[Gold]
    unit: str | None | list[str | None] = None
    error: Gold | None | list[Gold | None] = None  # allowed absolute error

    def __post_init__(self):
        gold_of(self)


def text_of(value):
    """A gold as text; empty for what is none. 1e-05 is no LaTeX, true no number."""
    if type(value) is float:
        return format(decimal.Decimal(repr(value)), "f")
    return str(value) if type(value) is int else value.strip() if isinstance(value, str) else ""


def number_of(value):
    with contextlib.suppress(ValueError, OverflowError):
        return float(value) if type(value) in (int, float, str) else math.nan
    return math.nan


def gold_of(row):
    """(golds, units, errors) of a row, lists of equal length: one entry for each part that is asked for. ValueError."""
    def each(values, field, fits, what):
        values = values if isinstance(values, list) else [values] * len(golds)
        if len(values) != len(golds) or not all(value is None or fits(value) for value in values):
            raise ValueError(f"field '{field}' must be {what}, or a list of them, one a part of the answer")
        return values

    answer = row.answer
    golds = [text_of(part) for part in answer] if isinstance(answer, list) else [text_of(answer)]
    if not golds or not all(golds):
        raise ValueError("field 'answer' must be a text, a number or a list of these, and not empty")
    if not isinstance(answer, list):
        golds = split_parts(join_thousands(golds[0])) or golds
    units = each(row.unit, "unit", lambda value: isinstance(value, str), "a text")
    errors = each(row.error, "error", lambda value: 0 <= number_of(value) < math.inf, "a number of at least 0")
    errors = [error if error is None else number_of(error) for error in errors]
    return golds, [unit_name(unit or "") for unit in units], errors


def verify(completion, row):
    """The Verdict on a completion, or the Job that makes it."""
    gold = gold_of(row)
    pred = extract_maths(completion, len(gold[0]))
    if pred is None or len(pred) > LONGEST_MATHS:
        return Verdict(pred, "no_answer" if pred is None else "parse")
    return Job(pred, JUDGE, [pred, *gold])


def prepare():
    global NormalizationConfig, latex2sympy, normalize_latex, should_treat_as_complex, sympy, verify_expressions
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # simplify() imports it, and it reads its own names by parse_expr
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import verify as verify_expressions
    from math_verify.grader import should_treat_as_complex

    judge(r"(x+1)^2 = \sqrt{2}", [r"x^2 + 2x = \sin(0.5)"], [""], [None])  # imports what is imported on the way
    sympy.parsing.sympy_parser.parse_expr = read_number
    return b"def monomial_"


# ---- Maths: whether it is right (this part runs in the workers) ------------------------------------------------------
# What follows a value is its unit: \text{..} or words that do not change the value, a degree sign, a base (52_8).
UNIT = re.compile(r"""(?<=[\d})\]])(?:[\s~]|\\[ ,;:!])*
    (\\(?:text|textrm|mathrm|mbox)\s*\{[A-Za-z .~/-]+\}(?:\^\{?[23]\}?)? | (?:\s[A-Za-z]{4,})+
    | \s*(?:[ckm]m|kg|k?mph|ft) | °|\^\{?\\circ\}? | _\{?\d+\}?)$""", re.VERBOSE)
NO_UNIT = re.compile(r"\b(and|or|not|half|dozen|hundred|thousand|[mbtr]+illion|squared|cubed|percent|pi)s?\b", re.I)
UNIT_NAMES = {"centimeter": "cm", "meter": "m", "metre": "m", "kilometer": "km", "millimeter": "mm", "inch": "in",
              "inche": "in", "foot": "ft", "feet": "ft", "second": "s", "minute": "min", "hour": "h", "gram": "g",
              "kilogram": "kg", "degree": "°", "circ": "°", "mile": "mi", "yard": "yd", "liter": "L", "litre": "L"}


def unit_name(text):
    """A unit without its LaTeX dress: '\\text{ centimeters}^2' -> 'cm2'."""
    text = re.sub(r"\\(?:text|textrm|mathrm|mbox)\b|[\s~{}$^\\.,;:!]", "", text)
    singular = lambda word: word.removesuffix("s").lower() if len(word) > 3 else word
    return re.sub(r"[A-Za-z]+", lambda match: UNIT_NAMES.get(singular(match[0]), singular(match[0])), text)


def split_unit(text, unit):
    """(the value's text, the unit's name or ''). `unit`: the name of the one that is expected, or ''."""
    for start in range(max(0, len(text) - 80), len(text)) if unit else ():
        if unit_name(text[start:]) == unit:
            return text[:start], unit
    match = UNIT.search(text)
    return (text[:match.start()], unit_name(match[1])) if match and not NO_UNIT.search(match[1]) else (text, "")


def read_number(text, **_):
    """Stands in for SymPy's parse_expr, which is eval, and to which math-verify's grammar hands every number."""
    return sympy.Integer(text) if text.isdigit() else sympy.Float(text)


@functools.lru_cache(maxsize=1024)
def expression(text):
    """(normalised text, SymPy expression or None), by math-verify's grammar for LaTeX. Its reader of plain text is left
    alone: it is eval."""
    normal = normalize_latex(text, NormalizationConfig(units=False, malformed_operators=True, nits=True, boxed="none"))
    if re.search(r"\d(?:\s|~|\\[,;: ])+\d", normal):  # math-verify reads "3 4" as 3 + 4, a mixed fraction
        return normal, None
    try:
        return normal, latex2sympy(normal, is_real=not should_treat_as_complex(normal), normalization_config=None)
    except MemoryError:
        raise
    except Exception:
        return normal, None


def clean(text):
    return join_thousands(text.strip().removesuffix(".").strip("$ \n"))


def same(gold, pred, unit, error):
    """Whether a part of the answer equals a part of the gold."""
    gold, own = split_unit(clean(gold), unit)
    pred, other = split_unit(clean(pred), unit or own)
    if other and (unit or own) not in ("", other):
        return False
    (gold, a), (pred, b) = expression(gold), expression(pred)
    if gold == pred != "":
        return True
    if a is None or b is None:
        return False
    if error is not None:
        with contextlib.suppress(TypeError, ValueError, AttributeError):  # no numbers
            return abs(complex((getattr(a, "rhs", a) - getattr(b, "rhs", b)).evalf())) <= error * (1 + 1e-9)
    return verify_expressions(a, b, timeout_seconds=None)


def judge(pred, golds, units, errors):
    """ok, parse or value. All parts must be met, each by another one; "\\pm a" is two."""
    def matched(wanted, parts):
        return not wanted or any(same(golds[wanted[0]], part, units[wanted[0]], errors[wanted[0]])
                                 and matched(wanted[1:], parts[:i] + parts[i + 1:]) for i, part in enumerate(parts))

    for text in (pred, join_thousands(pred)):  # 100,200 is two parts or one
        parts = [text]
        if len(golds) > 1:
            parts = [part.replace(r"\pm", sign) for part in split_parts(text)
                     for sign in ("+-" if r"\pm" in part else "+")]
        if len(parts) == len(golds) and matched(range(len(golds)), parts):
            return "ok"
    readable = all(expression(split_unit(clean(part), "")[0])[1] is not None for part in parts)
    return "value" if readable else "parse"


# ---- Conversion ----
def main(args):
    meta = describe(args, [args.input])
    partial = claim(args.out, meta, ignore=("out", "input"))
    if partial is None:
        return
    seen = {}
    with open(partial, "w", encoding="utf-8") as file:
        for where, _, row in (parquet_rows if args.input.endswith(".parquet") else read_rows)(args.input):
            new = convert(where, row, args)
            if new["id"] in seen and args.keep_first:
                continue
            if new["id"] in seen:
                fail(f"{where}: id {new['id']!r} stands twice, first in {seen[new['id']]} (see --keep-first)")
            seen[new["id"]] = where
            file.write(json.dumps(new, ensure_ascii=False) + "\n")
    publish(args.out, meta)
    print(f"{args.out}: {len(seen)} problems")


if __name__ == "__main__":
    run(main, parse_args())
