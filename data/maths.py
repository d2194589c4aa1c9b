"""Maths: from the Hub's benchmarks to prompt rows, and the verdict on an answer.

    python -m data.maths --input MATH-500/test.jsonl --out math500.jsonl
    python -m data.maths --input aime24.parquet --out aime24.jsonl --source aime24 --template chat

Reads JSONL, or Parquet if `pyarrow` is installed. Takes from each row the first of these fields
that is neither null nor empty:

    problem   problem | Problem | question | Question | prompt | messages (text, or the last user
              turn of a chat; a content may be a list of text parts); `context` goes before it
    gold      final_answer | answer | Answer | reward_model.ground_truth | the last \\boxed{..} of
              solution | Solution; a list in a text, ["34"], is a list
    id        unique_id | id | ID | problem_idx | extra_info.index; a number n becomes SOURCE-n;
              without any, SOURCE- and a digest of the problem

That is MATH, MATH-500, AIME24/25, AMC23, OlympiadBench, DAPO-17k (the wrapping around its problems
is taken off) and GSM8K (whose gold stands after "####"). Writes one problem a line (and
OUT.meta.json): id, task "math", prompt or messages, answer (text; a list where several parts are
asked for), unit and error where the row has them, source. A repeated id and a row without a problem
or an answer ("proof", "N/A") are errors with the row's number (see --keep-first, --skip-bad).

The verdict (score.py calls `verify`, which hands it to a worker): gold and answer are brought into
one spelling (`normal`) and split into the sides of an equation, value and unit; data/values.py
compares the values. data/README.md has the rules and their limits.
"""
import contextlib
import decimal
import hashlib
import itertools
import json
import math
import os
import re

import msgspec

from data.files import (Parser, Rollout, Verdict, claim, describe, echo, explain, fail, publish,
                        read_rows, run)
from data.latex import (ALIKE, MULTIPLIED, NO_ANSWER, PERCENT, SIZES, boxes, choice_of, commas,
                        is_name, join_thousands, multiplied, normal, parts_of, sides_of, signs_of,
                        split_parts, split_unit, unit_name, unpacked, words)
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
    flag("--skip-bad", action="store_true",
         help="leave out rows without a problem or an answer, count them and name the first "
         "(default: stop at the first)")
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
    answer = row.answer if isinstance(row.answer, list) else unpacked(text_of(row.answer))
    golds = [text_of(part) for part in answer]
    if not golds or not all(golds):
        raise ValueError("field 'answer' must be a text, a number or a list of these, not empty")
    if none := [gold for gold in golds if NO_ANSWER.fullmatch(gold)]:
        raise ValueError(f"field 'answer' holds {none[0]!r}, which is no answer; leave the row out")
    if len(golds) == 1:
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


def extract(completion, parts, truncated=False):
    """The answer's text: the last box, or the last ones where that holds fewer than the `parts`
    asked for; or None. A box without braces at the end of a truncated completion does not count:
    `\\boxed 12` might have gone on."""
    spans = boxes(completion)
    if truncated and spans and spans[-1][1] >= len(completion.rstrip(".,;:")):
        spans.pop()
    texts = [completion[start:min(end, start + LONGEST + 1)].strip()
             for start, end in spans[-parts:]]
    if len(texts) == parts > 1 and len(parts_of(texts[-1])) < parts:
        return ", ".join(texts)
    return texts[-1] if texts and texts[-1] else None


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


# ---- Whether it is right (in a worker) -----------------------------------------------------------
def prepare():
    """Import math-verify, in a worker, and warm it up."""
    global distance, expression, same_value
    from data.values import distance, expression, patch_math_verify, same_value

    patch_math_verify()
    judge(r"(x+1)^2 = \sqrt{2}", [(r"x^2 + 2x = \sin(0.5)", "", None)])  # imports on the way
    return b"def monomial_"


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
    size = distance(expression(gold)[1], 0)
    return size is not None and size >= 1 and same_value(gold, pred, error)


def same_ratio(gold, pred):
    """Whether two ratios, as lists of their parts, are equal: 2:4:6 is 1:2:3."""
    def product(one, other):
        return rf"({one}) \cdot ({other})"

    return (len(gold) == len(pred) and not all(same_value("0", part) for part in pred)
            and all(same_value(product(g, q), product(h, p))
                    for (g, p), (h, q) in itertools.combinations(zip(gold, pred), 2)))


def same_quantity(gold, pred, unit, error):
    """Whether two values are equal; a unit may be left out, another one is wrong."""
    if gold == pred != "":
        return True
    if (gold_words := words(gold)) and (pred_words := words(pred)):
        return gold_words == pred_words
    ratios = [re.sub(r"^\((.*:.*)\)$", r"\1", text).split(":") for text in (gold, pred)]
    if max(map(len, ratios)) > 2:  # not a : b : c = a / b / c
        return same_ratio(*ratios)
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
    """Whether a part of the answer equals a part of the gold. Of choices with their values, (B) 2,
    what both state must be equal: the letters, the values, or both."""
    gold, pred = (normal(join_thousands(text)) for text in (gold, pred))
    if gold == pred != "":
        return True
    (gold_letter, gold), (pred_letter, pred) = choice_of(gold), choice_of(pred)
    if gold_letter and pred_letter and gold_letter != pred_letter:
        return False
    if gold_letter != pred_letter and (gold_letter or words(gold)) == (pred_letter or words(pred)):
        return True
    return same_side(pred, gold, unit, error)


def same_side(pred, gold, unit, error):
    """The same for values or equations."""
    gold_sides, sides = sides_of(gold), sides_of(pred)

    def equal(side):
        return same_quantity(gold_sides[-1], side, unit, error)

    if len(gold_sides) == 1:
        return equal(pred) if len(sides) == 1 else claims(sides, equal)
    if is_name(gold_sides[0]):  # the gold is x = 5
        names = {side.replace(" ", "") for side in sides if is_name(side)}
        if len(sides) == 1:
            return equal(pred)
        own_name = gold_sides[0].replace(" ", "") in names
        if own_name or not symbols(gold_sides[-1]):
            return (own_name or not names) and claims(sides, equal)
    return len(sides) > 1 and same_value(gold, pred)


def judge(pred, golds):
    """ok, parse or value. golds: [(gold, unit, error)]; all must be met, each by another part."""
    def matched(golds, parts):
        return not golds or any(
            is_set(parts[i]) == is_set(golds[0][0])
            and same(parts[i], *golds[0]) and matched(golds[1:], parts[:i] + parts[i + 1:])
            for i in range(len(parts)))

    def is_set(part, braces=2 if len(golds) == 1 else 1):
        """Whether a part of the answer, or its only element, is a set of one: {{1}, 2}, {{1}}"""
        return re.match(r"(\\\{ ?){%d}[^,;:|]*\\\}$" % braces, SIZES.sub("", part)) is not None

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
    """The first field that holds something; a dot goes into an object."""
    for name in names:
        value = row
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if isinstance(value, str) and not value.strip() or value == [] or value != value:
            continue  # empty; pandas writes NaN for null
        if value is not None:
            return value
    return None


def content_of(turn):
    """The text of a chat turn: its content is a text, or a list of text parts."""
    content = first(turn, "content", "value")
    parts = content if isinstance(content, list) else [content]
    texts = [part if isinstance(part, str) else first(part, "text") for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a turn's content must be a text, or a list of parts with a text each; "
                         "pictures are not supported")
    return "\n".join(texts)


def problem_of(row):
    """The problem's text, or None."""
    text = first(row, "problem", "Problem", "question", "Question", "prompt", "messages")
    if isinstance(text, list):  # a chat
        turns = [turn for turn in text if first(turn, "role", "from") in ("user", "human")]
        text = content_of(turns[-1]) if turns else None
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
    spans = boxes(text)
    return text[slice(*spans[-1])].strip() or None if spans else None


def stated_gold(row):
    """The gold that a benchmark's row states: a text, or a list of them where several parts are
    asked for; None if there is none."""
    gold = first(row, "final_answer", "answer", "Answer", "reward_model.ground_truth")
    if gold is None:
        solution = first(row, "solution", "Solution")
        gold = last_box(solution) if isinstance(solution, str) else None
    gold = unpacked(gold) if isinstance(gold, str) else gold
    gold = gold if isinstance(gold, list) else [gold]
    golds = []
    for one in gold:
        if type(one) not in (str, int, float) or one in (math.inf, -math.inf) or one != one:
            return None
        one = text_of(one).rsplit("####", 1)[-1]  # GSM8K: the worked solution, #### and the answer
        one = last_box(one) or one
        one = re.sub(r"(?<!\\)\$", "", one).strip()
        golds += commas(one) if row.get("is_multiple_answer") is True else [one]
    if not golds or not all(golds):
        return None
    return golds if len(golds) > 1 else golds[0]


def id_of(row, problem, source):
    name = first(row, "unique_id", "id", "ID", "problem_idx", "extra_info.index")
    if isinstance(name, str) and not name.isdigit():
        return name
    if type(name) not in (str, int):
        name = hashlib.sha256(problem.encode()).hexdigest()[:12]
    return f"{source}-{name}"


def prompt_of(problem, template, system):
    if template == "plain":
        return {"prompt": f"{problem}\n{INSTRUCTION}\n"}
    if template == "qwen-math":
        system, user = INSTRUCTION, problem
    else:
        user = f"{problem}\n\n{INSTRUCTION}"
    turns = [{"role": "system", "content": system}] if system else []
    return {"messages": [*turns, {"role": "user", "content": user}]}


def extras_of(row, gold):
    """The fields `unit` and `error` of a benchmark's row, where it has them."""
    extras = {}
    for field in ("unit", "error"):
        value = first(row, field)
        if isinstance(value, str):
            one_a_part = isinstance(gold, list) and len(commas(value)) == len(gold)
            value = commas(value) if one_a_part else value.strip()
        if any(one is not None for one in (value if isinstance(value, list) else [value])):
            extras[field] = value
    return extras


def convert(row, args):
    """The prompt row of a benchmark's row; None if its problem is too long; ValueError if it is
    no problem with an answer that score.py takes."""
    problem, gold = problem_of(row), stated_gold(row)
    if problem is None:
        raise ValueError("no problem text (problem, Problem, question, Question, prompt or "
                         "messages)")
    if gold is None:
        raise ValueError("no gold (final_answer, answer, Answer, reward_model.ground_truth, "
                         "or a box in solution)")
    golds = gold if isinstance(gold, list) else [gold]
    if none := [one for one in golds if NO_ANSWER.fullmatch(one)]:
        raise ValueError(f"no gold: {none[0]!r} is no answer")
    if args.max_chars and len(problem) > args.max_chars:
        return None
    new = {"id": id_of(row, problem, args.source), "task": "math",
           **prompt_of(problem, args.template, args.system), "answer": gold,
           **extras_of(row, gold), "source": args.source}
    sampled = {"sample": 0, "completion": "", "finish_reason": "stop"}
    try:
        msgspec.convert({**new, **sampled}, Row)
    except msgspec.ValidationError as error:
        raise ValueError(explain(error, Row)) from None
    return new


def main(args):
    meta = describe(args, [args.input])
    partial = claim(args.out, meta, ignore=("out", "input"))
    if partial is None:
        return
    reader = parquet_rows if args.input.endswith(".parquet") else read_rows
    places_of_ids, counts = {}, {}
    with open(partial, "w", encoding="utf-8") as file:
        for where, _, row in reader(args.input):
            try:
                new = convert(row, args)
            except ValueError as error:
                if not args.skip_bad:
                    fail(f"{where}: {error} (see --skip-bad)")
                counts.setdefault("first_bad", f"{where}: {error}")
                counts["bad"] = counts.get("bad", 0) + 1
                continue
            if new is None:
                counts["too_long"] = counts.get("too_long", 0) + 1
            elif new["id"] not in places_of_ids:
                places_of_ids[new["id"]] = where
                file.write(json.dumps(new, ensure_ascii=False) + "\n")
            elif not args.keep_first:
                fail(f"{where}: id {new['id']!r} is repeated, first in "
                     f"{places_of_ids[new['id']]} (see --keep-first)")
    left_out = f"; {counts['too_long']} longer ones left out" if "too_long" in counts else ""
    if "bad" in counts:
        left_out += f"; {counts['bad']} bad ones left out, the first is {counts['first_bad']}"
    if not places_of_ids:
        fail(f"{args.input}: no problem is left (--max-chars, --skip-bad){left_out}")
    publish(args.out, {**meta, "rows": len(places_of_ids), **counts})
    echo(f"{args.out}: {len(places_of_ids)} problems{left_out}")


if __name__ == "__main__":
    run(main, parse_args())
