"""Judge rollouts: Countdown by an exact parser of our own, maths by math-verify in processes that can be killed.

    python score.py rollouts.jsonl --out scored.jsonl [--workers 4] [--timeout 10] [--show 5]

Reads one sample a line: `id`, `sample`, `task`, `completion`, `finish_reason`, and
    countdown   `numbers` (list of int), `target` (int)
    math        `answer` (string or number; a list where several parts are asked for), where known `unit` (text) and
                `error` (allowed absolute error); either may be a list, one a part
Every other field passes untouched; a row that was scored before is scored afresh. Writes the rows in order, each with
    pred        the extracted answer, or null
    correct     true or false: what Pass@k counts and what the sign of the smoothing term comes from
    reason      ok | no_answer | parse | numbers | value | truncated | timeout
    reward      1.0 or 0.0
    solution    Countdown alone: the canonical text of a correct answer, or null; two answers that differ by
                commutativity and associativity alone share it

What the answer is. Countdown: the last complete innermost <answer>..</answer>; without any <answer>, the whole
completion, if it has at most 200 characters. Maths: the last \\boxed{..} with matched braces (where n parts are asked
for and it holds fewer, the last n boxes). A completion that was cut at the length limit is judged if its answer is
complete inside its tags or box; whatever else was cut is `truncated`, and so is every cut completion that is wrong.

What is right. Countdown: whole ASCII numbers without leading zeros, + - * / ( ) and blanks, no unary signs, nothing
else (no "= 24"); exactly the given numbers, each once; exactly the target. Maths: equal to the gold by math-verify; all
parts of several, in any order; a unit may be left out, another unit is wrong; with `error`, |answer - gold| <= error.
`timeout` is a maths answer that was still being judged after --timeout seconds, or used up a worker's memory.
"""
import collections
import contextlib
import decimal
import functools
import json
import math
import operator
import os
import re
import resource
import select
import signal
import subprocess
import sys
import time
from fractions import Fraction

from tqdm import tqdm

from data.files import Parser, claim, describe, fail, publish, read_rows, run, sampling_of


REASONS = ("ok", "no_answer", "parse", "numbers", "value", "truncated", "timeout")


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    parser.add_argument("rollouts", help="the JSONL file to judge (generate.py's, or a scored one)")
    parser.add_argument("--out", required=True, help="the JSONL file to write")
    # maths answers
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)),
                        help="processes that judge maths answers (default: the CPU cores, %(default)s here)")
    parser.add_argument("--timeout", type=float, default=10, help="seconds for one maths answer (default %(default)s)")
    # what is shown
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N rows (default %(default)s)")
    args = parser.parse_args(argv)
    if args.workers < 1 or not 0 < args.timeout < 1e6 or args.show < 0:
        parser.error("--workers and --timeout must be above 0, --show not below")
    return parser.checked(args)


# ---- Countdown -------------------------------------------------------------------------------------------------------
LONGEST = 200  # characters of an answer; a right one for six numbers needs some 30
TOKENS = re.compile(r"[0-9]+|[-+*/()]").findall
ALLOWED = re.compile(r"[-+*/() \t\r\n0-9]*").fullmatch
PRECEDENCE = {"(": 0, "+": 1, "-": 1, "*": 2, "/": 2}
OPERATE = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": Fraction}  # exact: ints and Fractions alone
INVERSE = {"+": "-", "*": "/"}


def combine(left, sign, right):
    """One form of two. A form is (value, kind, up, down), its terms flat and as texts: kind "+" is the sum of `up` less
    that of `down`, kind "*" the product of `up` over that of `down`."""
    kind = "+" if sign in "+-" else "*"
    up, down = flat(left, kind)
    more, less = flat(right, kind) if sign == kind else flat(right, kind)[::-1]  # a-(b-c) = a-b+c
    return OPERATE[sign](left[0], right[0]), kind, up + more, down + less


def flat(form, kind):
    """(up, down) of a form as part of a larger one of this kind."""
    if form[1] == kind:
        return form[2:]
    return ((f"({spell(form)})" if form[1] == "+" else spell(form),), ())


def spell(form):
    """A form's canonical text, by which solutions are counted: 2+10-3, 3*(2+5)/7."""
    _, kind, up, down = form
    up, down = (sorted(texts, key=lambda text: (len(text), text)) for texts in (up, down))
    return kind.join(up) + "".join(INVERSE[kind] + text for text in down)


def canonical(expression):
    """(exact value, sorted numbers, canonical text) of an expression. ValueError if it is none, ZeroDivisionError."""
    if len(expression) > LONGEST or not ALLOWED(expression):
        raise ValueError("no expression")
    numbers, forms, signs, operand_next = [], [], ["("], True  # shunting-yard, between one more pair of brackets
    for token in [*TOKENS(expression), ")"]:
        if operand_next:
            if token == "(":
                signs.append(token)
            elif token.isdigit() and (token[0] != "0" or token == "0"):
                numbers.append(int(token))
                forms.append((numbers[-1], "", (token,), ()))
                operand_next = False
            else:
                raise ValueError("an operand is missing")
        elif token in ")+-*/" and signs:
            while PRECEDENCE[signs[-1]] >= PRECEDENCE.get(token, 1):
                right, left = forms.pop(), forms.pop()
                forms.append(combine(left, signs.pop(), right))
            if token == ")":
                signs.pop()
            else:
                signs.append(token)
                operand_next = True
        else:
            raise ValueError("an operator is missing")
    if signs:
        raise ValueError("brackets do not match")
    return forms[0][0], sorted(numbers), spell(forms[0])


@functools.lru_cache(maxsize=2**16)  # the samples of a group repeat each other; a key holds 200 characters at most
def judge_countdown(answer, numbers, target):
    """(reason, solution) of an answer's text."""
    try:
        value, used, text = canonical(answer)
    except ValueError:
        return "parse", None
    except ZeroDivisionError:
        return "value", None
    if used != sorted(numbers):
        return "numbers", None
    return ("ok", text) if value == target else ("value", None)


def last_answer(completion):
    """The text inside the last complete innermost <answer>..</answer>; None if there is none."""
    start = completion.rfind("<answer>", 0, max(completion.rfind("</answer>"), 0))
    return None if start < 0 else completion[start + len("<answer>"):completion.find("</answer>", start)]


def verify_countdown(completion, row):
    """The new fields of a row. Time is linear in the completion's length."""
    tagged, cut = "<answer>" in completion, row.get("finish_reason") == "length"
    answer = ((last_answer(completion) or "") if tagged else completion).strip(" \t\r\n")
    if not answer or not tagged and len(answer) > LONGEST:
        answer, reason, solution = None, "no_answer", None
    elif len(answer) > LONGEST:
        reason, solution = "parse", None
    else:
        reason, solution = judge_countdown(answer, tuple(row["numbers"]), row["target"])
    if cut and (not tagged or reason != "ok"):
        reason, solution = "truncated", None
    return {**verdict(answer, reason), "solution": solution}


def verdict(pred, reason):
    return {"pred": pred, "correct": reason == "ok", "reason": reason, "reward": float(reason == "ok")}


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
    return verify(a, b, timeout_seconds=None)


def judge_maths(pred, golds, units, errors):
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


MEMORY = 2**31  # bytes of address space of a worker
FORBIDDEN = ("socket.", "subprocess.", "os.", "shutil.", "ctypes.", "pty.", "tempfile.", "urllib.", "ftplib.")


def guard(event, arguments):
    """An audit hook: should an answer find its way to a file, process, network or eval, it ends here. SymPy may import
    its own modules and compile its monomial_mul and the like, which it writes from the number of variables alone."""
    if event == "open":
        refused = not str(arguments[0]).endswith((".py", ".pyc")) or arguments[1] not in ("r", "rb")
    elif event == "compile":
        source = arguments[0].encode() if isinstance(arguments[0], str) else arguments[0] or b""
        refused = str(arguments[1]).startswith("<") and not source.startswith(b"def monomial_")
    else:
        refused = event.startswith(FORBIDDEN) and event not in ("os.listdir", "os.scandir")
    if refused:
        raise PermissionError(f"{event} is refused while an answer is judged")


def work(seconds):
    """A worker: reads a job a line (JSON) from stdin, answers one word a line. It holds none of the parent's files,
    ends with its stdin, and dies by the kernel's alarm should the parent be gone when an answer takes too long."""
    global NormalizationConfig, latex2sympy, normalize_latex, should_treat_as_complex, sympy, verify
    import sympy.parsing.sympy_parser
    import sympy.physics.units  # simplify() imports it, and it reads its own names by parse_expr
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from math_verify import verify
    from math_verify.grader import should_treat_as_complex

    out = os.dup(1)
    os.dup2(2, 1)  # nothing else may speak on the line to the parent
    judge_maths(r"(x+1)^2 = \sqrt{2}", [r"x^2 + 2x = \sin(0.5)"], [""], [None])  # imports what is imported on the way
    sympy.parsing.sympy_parser.parse_expr = read_number
    for name, most in (("AS", MEMORY), ("FSIZE", 0), ("NPROC", 0), ("CORE", 0)):
        limit = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard),) * 2)
    status = os.open("/proc/self/status", os.O_RDONLY) if os.path.exists("/proc/self/status") else None

    def peak():  # bytes; on Linux ru_maxrss begins at the parent's peak, VmHWM does not
        if status is None:
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return 1024 * int(re.search(rb"VmHWM:\s+(\d+)", os.pread(status, 8192, 0))[1])

    sys.addaudithook(guard)
    os.write(out, b"ready\n")
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_REAL, seconds + 1)
        try:
            word = judge_maths(*json.loads(line))
        except MemoryError:
            return
        except Exception:
            word = "parse"
        if peak() > MEMORY // 2:
            return  # SymPy may have swallowed a MemoryError
        os.write(out, word.encode() + b"\n")
        signal.setitimer(signal.ITIMER_REAL, 0)


# ---- Maths: the workers' keeper --------------------------------------------------------------------------------------
class Workers:
    """`count` processes, each with one answer at a time. One that overruns is killed and replaced: the verdict is
    `timeout`, other answers are untouched. A verdict comes back as one word: nothing else of a worker's is read."""

    def __init__(self, count, timeout):
        self.count, self.timeout = count, timeout
        self.free, self.busy = [], {}  # busy: process -> (deadline, list for its word or None while it starts)

    def start(self):
        # its own session: Ctrl-C and Ctrl-Z reach the parent alone; no open file goes along, the lock least of all
        process = subprocess.Popen(
            [sys.executable, os.path.abspath(__file__), "--work", str(self.timeout)], bufsize=0, start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.busy[process] = (time.monotonic() + 120, None)

    def submit(self, job):
        """A list that will hold the verdict's word."""
        while not self.free:
            for _ in range(self.count - len(self.busy)):
                self.start()
            self.wait()
        process, word = self.free.pop(), []
        self.busy[process] = (time.monotonic() + self.timeout, word)
        with contextlib.suppress(BrokenPipeError):  # it has died: wait() will see it
            process.stdin.write(json.dumps(job).encode() + b"\n")
        return word

    def wait(self):
        """Until at least one worker has spoken, died or overrun."""
        first = min(deadline for deadline, _ in self.busy.values())
        ready = select.select([process.stdout for process in self.busy], [], [], max(0, first - time.monotonic()))[0]
        for process, (deadline, word) in list(self.busy.items()):
            if process.stdout not in ready and time.monotonic() < deadline:
                continue
            said = os.read(process.stdout.fileno(), 64).decode() if process.stdout in ready else ""
            del self.busy[process]
            if said in ("ok\n", "parse\n", "value\n", "ready\n"):
                self.free.append(process)
            else:
                self.end(process)
                if word is None:
                    fail("no worker for maths answers starts; is math-verify installed? (see requirements.txt)")
            if word is not None:
                word.append(said.strip() or "timeout")

    def end(self, process):
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()

    def close(self):
        for process in [*self.free, *self.busy]:
            self.end(process)


# ---- Rows ------------------------------------------------------------------------------------------------------------
def text_of(value):
    """A gold as text; empty for what is none. 1e-05 is no LaTeX, true no number."""
    if type(value) is float:
        return format(decimal.Decimal(repr(value)), "f")
    return str(value) if type(value) is int else value.strip() if isinstance(value, str) else ""


def number_of(value):
    with contextlib.suppress(ValueError, OverflowError):
        return float(value) if type(value) in (int, float, str) else math.nan
    return math.nan


COMMON = ("id", "sample", "completion", "finish_reason", "task")
# A task: the fields of its rows, and (completion, row) -> the new fields. Maths answers go to the workers instead.
OWN = {"countdown": ("numbers", "target"), "math": ("answer",)}
VERIFIERS = {"countdown": verify_countdown}
FIELDS = {  # field: (whether a value fits, what it must be)
    "id": (lambda value: isinstance(value, str), "a text"),
    "sample": (lambda value: type(value) is int and 0 <= value < 2**20, "a whole number from 0 to 2^20 - 1"),
    "completion": (lambda value: isinstance(value, str), "a text"),
    "finish_reason": (lambda value: value in ("stop", "length"), "'stop' or 'length'"),
    "task": (lambda value: isinstance(value, str) and value in OWN, f"one of {', '.join(OWN)}"),
    "numbers": (lambda value: isinstance(value, list) and value and all(type(one) is int for one in value),
                "a list of whole numbers"),
    "target": (lambda value: type(value) is int, "a whole number"),
    "answer": (lambda value: value and all(map(text_of, value)) if isinstance(value, list) else text_of(value),
               "a text, a number or a list of these, and not empty"),
}


def check(where, row, seen):
    """End the stage on a row that cannot be judged. `seen`: id -> the samples met so far, a bit each."""
    for fields in (COMMON, OWN.get(str(row.get("task")), ())):
        for field in fields:
            if field not in row:
                fail(f"{where}: missing field '{field}'")
            if field in FIELDS and not FIELDS[field][0](row[field]):
                fail(f"{where}: field '{field}' must be {FIELDS[field][1]}")
    name, sample = row["id"], row["sample"]
    if seen.get(name, 0) >> sample & 1:
        fail(f"{where}: id {name[:80]!r}, sample {sample} stands twice")
    seen[name] = seen.get(name, 0) | 1 << sample


def gold_of(where, row):
    """(golds, units, errors) of a maths row, lists of equal length: one entry for each part that is asked for."""
    def each(field, fits, what):
        values = row.get(field)
        values = values if isinstance(values, list) else [values] * len(golds)
        if len(values) != len(golds) or not all(value is None or fits(value) for value in values):
            fail(f"{where}: field '{field}' must be {what}, or a list of them, one a part of the answer")
        return values

    answer = row["answer"]
    if isinstance(answer, list):
        golds = [text_of(part) for part in answer]
    else:
        golds = split_parts(join_thousands(text_of(answer))) or [text_of(answer)]
    units = each("unit", lambda value: isinstance(value, str), "a text")
    errors = each("error", lambda value: 0 <= number_of(value) < math.inf, "a number of at least 0")
    errors = [error if error is None else number_of(error) for error in errors]
    return golds, [unit_name(unit or "") for unit in units], errors


def judged(rows, workers):
    """Yield (line, row, new fields) in the rows' order. Countdown is judged at once; while maths answers are out, a
    bounded number of rows waits behind them."""
    seen, waiting = {}, collections.deque()

    def finished(most):
        while waiting and (len(waiting) > most or waiting[0][3] != []):
            line, row, fields, word = waiting[0]
            if word == []:
                workers.wait()
                continue
            waiting.popleft()
            if word:
                cut = row["finish_reason"] == "length" and word[0] not in ("ok", "timeout")
                fields = verdict(fields["pred"], "truncated" if cut else word[0])
            yield line, row, fields

    for where, line, row in rows:
        check(where, row, seen)
        word = None
        if row["task"] in VERIFIERS:
            fields = VERIFIERS[row["task"]](row["completion"], row)
        else:
            gold = gold_of(where, row)
            pred = extract_maths(row["completion"], len(gold[0]))
            reason = "no_answer" if pred is None else "parse"
            fields = verdict(pred, "truncated" if row["finish_reason"] == "length" else reason)
            if pred is not None and len(pred) <= LONGEST_MATHS:
                word = workers.submit((pred, *gold))
        waiting.append((line, row, fields, word))
        yield from finished(256)
    yield from finished(0)


ENCODE = json.JSONEncoder(ensure_ascii=False).encode


def enriched(line, row, fields):
    """The row's bytes with the new fields at its end; only a row that was scored before is written anew."""
    if row.keys() & fields.keys():
        return ENCODE({**{key: value for key, value in row.items() if key not in fields}, **fields}).encode()
    return line[:-1] + b", " + ENCODE(fields).encode()[1:]


def show(row, fields):
    """One row readably; repr, because a completion may hold control characters for the terminal."""
    asked = ", ".join(f"{field} {row[field]!r}" for field in OWN[row["task"]])
    print(f"{row['id'][:80]!r} sample {row['sample']}: {asked}\n  completion (its end) {row['completion'][-300:]!r}\n"
          f"  answer {str(fields['pred'])[:200]!r}: {fields['reason']}, reward {fields['reward']:g}")


def main(args):
    start = time.monotonic()
    meta = describe(args, [args.rollouts], sampling=sampling_of(args.rollouts), device="cpu", world_size=1)
    partial = claim(args.out, meta, ignore=("rollouts", "out", "workers", "show"))
    if partial is None:
        return
    reasons, workers = collections.Counter(), Workers(args.workers, args.timeout)
    try:
        with open(partial, "wb") as file:
            for line, row, fields in tqdm(judged(read_rows(args.rollouts), workers), unit=" rows", disable=None):
                file.write(enriched(line, row, fields) + b"\n")
                if reasons.total() < args.show:
                    show(row, fields)
                reasons[fields["reason"]] += 1
    finally:
        workers.close()
    total = reasons.total()
    counts = {reason: reasons[reason] for reason in REASONS}
    publish(args.out, {**meta, "rows": total, "reasons": counts, "wall_s": time.monotonic() - start})
    print(f"{args.out}: {total} rows, {reasons['ok'] / total:.1%} correct")
    for reason in REASONS:
        print(f"  {reason:10}{reasons[reason]:10}{reasons[reason] / total:8.1%}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(float(sys.argv[2]))
    else:
        run(main, parse_args())
