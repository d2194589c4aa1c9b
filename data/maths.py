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
import hashlib
import json
import math
import os
import re
import sys

if __name__ == "__main__":  # the repository's root, not this folder
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from data.files import Parser, claim, describe, fail, publish, read_rows, run


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


def gold_of(row):
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
    problem, gold = problem_of(row), gold_of(row)
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
