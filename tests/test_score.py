"""score.py: Countdown's exact verifier, maths in processes that can be killed, rows in and out."""
import collections
import contextlib
import fcntl
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction

import pytest
from hypothesis import example, given, settings, strategies

import fuzz
import score
from data import countdown, gym, maths, sandbox
from data.files import Verdict
from data.sandbox import Pending

ROOT = pathlib.Path(score.__file__).parent
# Python's own parser, in the oracle, warns of "(1)(2)".
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


def value_of(expression):
    return countdown.parse(expression, int, countdown.OPERATE)


def judge(completion, numbers, target, finish_reason="stop"):
    """The new fields of a Countdown row."""
    row = countdown.Row("a", 0, completion, finish_reason, tuple(numbers), target)
    return score.fields_of(score.mark_truncated(row, countdown.verify(completion, row)))


def row(**fields):
    return {"id": "a", "task": "countdown", "prompt": "1 2=3:", "numbers": [1, 2], "target": 3, "n_solutions": 1,
            "sample": 0,
            "completion": "1+2", "prompt_ids": [1, 2], "completion_ids": [3], "logprobs": [-0.5],
            "finish_reason": "stop", **fields}


def maths_row(answer, completion, **fields):
    return {"id": "m", "task": "math", "answer": answer, "sample": 0, "completion": completion,
            "finish_reason": "stop", **fields}


def write(path, rows):
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return str(path)


def run(source, out, *flags):
    """The scored rows of a run in this process."""
    score.main(score.parse_args([str(source), "--out", str(out), *flags]))
    return [json.loads(line) for line in open(out, encoding="utf-8")]


def refused(capsys, source, out, *flags):
    """The one line on stderr of a run that must end with exit code 2 and without an output."""
    with pytest.raises(SystemExit) as end:
        score.main(score.parse_args([str(source), "--out", str(out), *flags]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("score.py: error: ")
    assert not os.path.exists(out)
    return err


# ---- Countdown: the rules --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("answer, numbers, target, reason", [
    ("2**5", [2, 5], 32, "parse"), ("7//2", [7, 2], 3, "parse"), ("3.7*10", [3, 7, 10], 37, "parse"),
    ("3.*2", [3, 2], 6, "parse"), ("12", [1, 2], 12, "numbers"), ("-(3-8)", [3, 8], 5, "parse"),
    ("--5+1", [5, 1], 6, "parse"),
    ("3+4", [3, 4, 5], 7, "numbers"), ("99**98**4", [99, 98, 4], 1, "parse"),
    ("<answer>8/\n(3-8/3)\n</answer>", [3, 3, 8, 8], 24, "ok"),
    ("<answer>1</answer> no: <answer>1+2</answer>", [1, 2], 3, "ok"),
    ("8/(3-8/3)", [3, 3, 8, 8], 24, "ok")])
def test_the_table(answer, numbers, target, reason):
    assert judge(answer, numbers, target)["reason"] == reason


@pytest.mark.parametrize("answer", [
    "", "()", "1+", "+1+2", "1 2", "1+2)", "(1+2", "1)+(2", "(1)(2)", "1(+2)", "1+(2", "1+2=3", "1+2.", "01+2", "1+02",
    "1_0+2", "1e0+2",
    "1+2 # x", "1+2\0", "1\u22122", "1\uff0b2", "\u0661+\u0662", "\uff11+2", "1+\u00b2", "1\u00d72", "1+2\u00a0",
    "\u20031+2", "1+2\x0b", "1+2\x1c",
    "one+two", "1+2,", "1;2", "1%2", "1^2", "1&2", "~1+2", "!1", "1<2", "abs(1)+2", "__import__('os')", "lambda:3",
    "1if 1else 2",
    "1+2" + " " * 198 + "1", "(" * 100 + "1+2" + ")" * 100, "(" * 10_000, "9" * 100_000, "9" * 5_000_000,
    "<answer>", "<answer>1+2", "1+2</answer>", "</answer>1+2<answer>", "<answer></answer>", "<answer> </answer>",
    "<ANSWER>1+2</ANSWER>", "<answer>1+2</answer", "<answer>1+2</answer><answer>2+2</answer>",
    "<answer>1+2<b></answer>"])
def test_nothing_else_is_an_answer(answer):
    assert not judge(answer, [1, 2], 3)["correct"]


@pytest.mark.parametrize("answer", [
    "1+2", " 1 + 2\n", "\t1\r\n+2", "(((1)+(2)))", "2+1", "<answer>1+2</answer>",
    "<answer>9</answer> <answer> (2)+1 </answer>!",
    "<answer>1+2</answer> and then <answer>", "<answer><answer>1+2</answer></answer>",
    "<answer>x<answer>1+2</answer>y</answer>",
    "<answer>1+2</answer></answer>", "(" * 98 + "1+2" + ")" * 98, "1+2" + " " * 100_000,
    "<think>" * 20_000 + "<answer>2+1</answer>"])
def test_the_same_answer_in_other_dress(answer):
    new = judge(answer, [1, 2], 3)
    del new["pred"]
    assert new == {"correct": True, "reason": "ok", "reward": 1.0, "solution": "1+2"}


def test_the_last_complete_answer_of_the_completion_alone(tmp_path):
    assert countdown.last_answer("<answer>1</answer><answer>2</answer><answer>3") == "2"
    assert countdown.last_answer("<answer>1<answer>2</answer>3</answer>") == "2"
    assert countdown.last_answer("<answer>1</answer>2</answer>") == "1"
    assert {countdown.last_answer(text) for text in ("", "</answer>", "<answer>", "</answer><answer>")} == {None}
    source = write(tmp_path / "r.jsonl", [row(prompt="e.g. <answer>1+2</answer>", completion="<answer>")])
    assert run(source, tmp_path / "s.jsonl")[0]["reason"] == "no_answer"


def test_a_reward_is_no_correctness(tmp_path):
    """Tags and form earn nothing; both fields are always there, of their own types."""
    source = write(tmp_path / "r.jsonl", [row(), row(sample=1, completion="<answer>2-1</answer>"),
                                          row(sample=2, completion="?")])
    new = [(one["correct"], one["reward"]) for one in run(source, tmp_path / "s.jsonl")]
    assert new == [(True, 1.0), (False, 0.0), (False, 0.0)]


@pytest.mark.parametrize("completion, reason, pred, solution", [
    ("1+2", "truncated", "1+2", None), ("<answer>1+2</answer> bla", "ok", "1+2", "1+2"),
    ("<answer>1+2", "truncated", None, None),
    ("<answer>1-2</answer>", "truncated", "1-2", None), ("", "truncated", None, None),
    ("so " * 1000, "truncated", None, None),
    ("<answer>1+2</answer><answer>1+2+", "ok", "1+2", "1+2")])
def test_a_cut_completion_counts_only_with_a_complete_right_answer(completion, reason, pred, solution):
    new = judge(completion, [1, 2], 3, "length")
    assert (new["reason"], new["pred"], new["solution"], new["correct"]) == (reason, pred, solution, reason == "ok")


def test_reasons_and_what_was_read():
    assert judge("  3 * 4 ", [3, 4], 7) == {"pred": "3 * 4", "correct": False, "reason": "value", "reward": 0.0,
                                            "solution": None}
    assert judge("I think, therefore", [3, 4], 7)["reason"] == "parse"
    assert judge("I think " * 50, [3, 4], 7) == {"pred": None, "correct": False, "reason": "no_answer", "reward": 0.0,
                                                 "solution": None}
    assert judge("<answer>" + "1+" * 200 + "1</answer>", [1, 2], 3)["reason"] == "parse"
    assert judge("1/(2-2)", [1, 2, 2], 1)["reason"] == "value" and judge("1/0", [0, 1], 0)["reason"] == "value"
    assert judge("3-3+3", [3, 3, 3], 3)["correct"] and not judge("3+3", [3, 3, 3], 6)["correct"]
    assert judge("1-2", [1, 2], -1)["correct"] and judge("0*7", [7, 0], 0)["correct"]
    assert judge("1/3+1/3+1/3", [1, 1, 1, 3, 3, 3], 1)["correct"] and not judge("1/3", [1, 3], 0)["correct"]


# ---- Countdown: the canonical text -----------------------------------------------------------------------------------
@pytest.mark.parametrize("texts, canonical", [
    (["10-3+2", "2+10-3", "2-(3-10)", "(2+(10))-3", "10-(3-2)"], "2+10-3"),
    (["(2+5)*3/7", "3/7*(5+2)", "3/(7/(2+5))"], "3*(2+5)/7"),
    (["8/(3-8/3)"], "8/(3-8/3)"), (["1*2*3", "3*(2*1)"], "1*2*3"), (["1/2/3", "1/(2*3)"], "1/2/3"),
    (["1-2-3", "1-(2+3)"], "1-2-3"),
    (["(1-2)*(3-4)"], "(1-2)*(3-4)"), (["(2-1)*(4-3)"], "(2-1)*(4-3)"), (["3-3+3"], "3+3-3"), (["7"], "7"),
    (["3*3/3"], "3*3/3"),
    (["10*(9+2)-1/11", "(2+9)*10-1/11"], "10*(2+9)-1/11")])
def test_the_canonical_text(texts, canonical):
    assert {countdown.canonical(text) for text in texts} == {canonical}


def test_values_are_exact():
    assert value_of("1/3+1/3") == Fraction(2, 3)
    assert value_of("*".join(["99"] * 66)) == 99 ** 66
    with pytest.raises(ZeroDivisionError):
        value_of("5/(3/0)")


def solving(numbers, target):
    """All trees that solve a problem."""
    return sorted((tree for tree, value in fuzz.trees(tuple(sorted(numbers))) if value == target), key=repr)


@pytest.mark.parametrize("numbers, target", fuzz.PROBLEMS + [((1, 2, 3, 5, 7), 31)])
def test_the_solver_and_the_verifier_agree(numbers, target):
    """Every text of the solver is right and canonical; the enumeration of all trees has no other canonical text."""
    texts = countdown.solutions(list(numbers), target)
    for text in texts:
        assert value_of(text) == target and countdown.canonical(text) == text
        assert judge(text, list(numbers), target)["solution"] == text
    if len(numbers) < 5:
        spelled = (fuzz.spell(tree, random.Random(0)) for tree in solving(numbers, target))
        assert {judge(text, list(numbers), target)["solution"] for text in spelled} == texts


# ---- Countdown: properties -------------------------------------------------------------------------------------------
SOLVED = [(numbers, target, solving(numbers, target)) for numbers, target in fuzz.PROBLEMS]


@settings(deadline=None, max_examples=300)
@given(strategies.sampled_from([one for one in SOLVED if one[2]]), strategies.integers(0, 2**32))
def test_a_solution_in_any_blanks_and_brackets_is_accepted(problem, seed):
    numbers, target, trees = problem
    rng = random.Random(seed)
    tree = rng.choice(trees)
    plain, text = fuzz.spell(tree, random.Random(1)), fuzz.spell(tree, rng)
    if len(text) <= 200:
        dress = rng.choice(["{}", " {}\n", "bla <answer>{}</answer>", "<answer>0</answer><answer> {} </answer>."])
        new = judge(dress.format(text), list(numbers), target)
        assert new["correct"] and new["solution"] == judge(plain, list(numbers), target)["solution"]


PIECE = strategies.one_of(strategies.sampled_from(fuzz.PIECES), strategies.text(max_size=3))
PIECES = strategies.lists(PIECE, max_size=30).map("".join)


@settings(deadline=None, max_examples=500)
@given(strategies.one_of(PIECES, strategies.text(alphabet="0123456789+-*/() ", max_size=20), strategies.text()),
       strategies.sampled_from(SOLVED))
@example("1\u0660", SOLVED[0])
def test_random_text_is_judged_as_the_oracle_says(text, problem):
    numbers, target, trees = problem
    assert judge(text, list(numbers), target)["correct"] == fuzz.oracle(text, set(trees))


def test_a_slice_of_the_fuzz_campaign():
    figures = fuzz.campaign(20_000, seed=1)
    assert figures["failures"] == [] and figures["exceptions"] == 0
    assert figures["right"] > 2000 and figures["states reached"] > 400


def test_the_fuzz_campaign_finds_planted_bugs(monkeypatch):
    """The usual verifier, eval behind a character filter, is caught; so is a canonical text that forgets to sort."""
    def by_eval(answer, numbers, target):
        if set(answer) - set("0123456789+-*/() .\n") or "**" in answer:
            return "parse", None
        try:
            right = eval(answer) == target and sorted(map(int, fuzz.re.findall(r"\d+", answer))) == sorted(numbers)
        except Exception:
            return "parse", None
        return ("ok", answer) if right else ("value", None)

    by_eval.cache_clear = lambda: None
    monkeypatch.setattr(countdown, "judge", by_eval)
    figures = fuzz.campaign(5_000, seed=0)
    assert figures["false accepts"] > 0 and figures["wrong canonical texts"] > 0


# ---- Maths -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, found", [
    (r"\boxed{1} then \boxed{2}", ["1", "2"]), (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]), (r"\boxed {3}", ["3"]),
    (r"\boxed{\boxed{5}}", [r"\boxed{5}", "5"]), (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
    (r"\boxed{\left\{x\right.}", [r"\left\{x\right."]),
    (r"\boxed{1", []), (r"\boxed5", []), ("}}} {{ \\boxed{4} {", ["4"]), (r"\\boxed{6}", []), ("", []),
    (r"\boxed{}", []), (r"\boxed{ \, }", []), (r"\boxed{...}", []), (r"\boxed{\ldots}", []),
    (r"\boxed{12}, as in \boxed{your answer}", ["12"]), (r"\boxed{\text{answer}}", []),
    (r"\boxed{answers}", ["answers"]), (r"\boxed{the answer is 5}", ["the answer is 5"]),
    (r"\boxed{12}. I put it in \boxed as asked.", ["12"]), (r"\boxed a second time", []),
    (r"\boxed -- so", []), (r"\boxed x.", ["x"]), (r"\boxed -5", ["-5"]), (r"\boxed{?}", []),
    (r"\boxed{\emptyset} \boxed{-}", [r"\emptyset", "-"]), (r"\boxed (as asked)", []),
    (r"$\boxed 7$.", ["7"]), (r"so \boxed 7, or \fbox{8}", ["7", "8"]), (r"\(\boxed 7\)", ["7"]),
    (r"$\boxed \frac{1}{2}$", [r"\frac{1}{2}"]), (r"{\boxed 7} \boxed{8}", ["7", "8"]), (r"\boxed \boxed{9}", ["9"])])
def test_boxes_by_matched_braces(text, found):
    assert [text[start:end] for start, end in maths.boxes(text)] == found


@pytest.mark.parametrize("completion, parts, answer", [
    (r"\boxed{1} so \boxed{2}", 1, "2"), (r"\boxed{1} and \boxed{2}", 2, "1, 2"),
    (r"\boxed{9}, \boxed{1, 2}", 2, "1, 2"),
    (r"\boxed{12}. I put it in \boxed as asked.", 1, "12"), (r"\boxed{12} \boxed{}", 1, "12"),
    (r"\boxed{1}, \boxed{2} \boxed{}", 2, "1, 2"),
    (r"\boxed{1}", 2, "1"), ("42", 1, None), (r"\boxed{}", 1, None), (r"\boxed{5", 1, None),
    (r"\boxed{(1,2)}, \boxed{(3,4)}", 2, "(1,2), (3,4)")])
def test_which_answer_is_read(completion, parts, answer):
    assert maths.extract(completion, parts) == answer


@pytest.mark.parametrize("text, parts", [
    ("1, 2; 3", ["1", "2", "3"]), (r"1 \text{ and } 2 or 3", ["1", "2", "3"]), ("(1,2),[3,4)", ["(1,2)", "[3,4)"]),
    (r"\{1,2\}", ["1", "2"]), (r"\frac{1,2}{3}", [r"\frac{1,2}{3}"]), (r"\text{for all}", [r"\text{for all}"]),
    ("", [])])
def test_parts(text, parts):
    assert maths.split_parts(text) == parts


def test_boxes_take_linear_room():
    text = r"\boxed{" * 20_000 + "5" + "}" * 20_000
    assert maths.extract(text, 1) == "5" and maths.extract(r"\boxed{" * 20_000, 1) is None


PAIRS = [json.loads(line) for line in open(ROOT / "tests/maths_pairs.jsonl", encoding="utf-8")]


GOLDS = [json.loads(line) for line in open(ROOT / "tests/maths_golds.jsonl", encoding="utf-8")]
CUT = [(r"\boxed{5} and", "ok", "5"), (r"\boxed 5 and", "ok", "5"), (r"\boxed{5}.", "ok", "5"),
       (r"\boxed{6} and", "truncated", "6"), (r"\boxed{5", "truncated", None),
       ("so", "truncated", None), (r"\boxed 5", "truncated", None),  # it might have become 52
       (r"\boxed{5}, so \boxed 5.", "ok", "5"), (r"\boxed{6}, so \boxed 5", "truncated", "6")]


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    """All pairs, all golds as answers to themselves, and what was cut, through two workers."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for pair in PAIRS:
        extras = {field: pair[field] for field in ("unit", "error") if field in pair}
        rows.append(maths_row(pair["gold"], f"So it is $\\boxed{{{pair['answer']}}}$.", **extras))
    rows += [maths_row(gold, f"It is $\\boxed{{{gold}}}$.") for gold in GOLDS]
    rows += [maths_row("5", completion, finish_reason="length") for completion, *_ in CUT]
    rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]
    return run(write(folder / "r.jsonl", rows), folder / "s.jsonl", "--timeout", "60",
               "--workers", "2")


@pytest.fixture(scope="module")
def judged_pairs(judged):
    return judged[:len(PAIRS)]


def test_gold_and_answer_pairs(judged_pairs):
    wrong = [(pair, new["reason"]) for pair, new in zip(PAIRS, judged_pairs, strict=True)
             if new["correct"] != pair["right"]]
    right = sum(pair["right"] for pair in PAIRS)
    assert wrong == [] and right >= 300 and len(PAIRS) - right >= 300


def test_every_gold_is_a_right_answer_to_itself(judged):
    """Golds in the styles of MATH: units, lists, intervals, matrices, words, equations, bases,
    money, mixed numbers."""
    new = judged[len(PAIRS):][:len(GOLDS)]
    assert [one["answer"] for one in new if not one["correct"]] == [] and len(GOLDS) >= 150


def test_cut_maths_completions(judged):
    new = judged[-len(CUT):]
    assert [(one["completion"], one["reason"], one["pred"]) for one in new] == CUT


def test_maths_reasons(judged_pairs):
    assert {new["reason"] for new in judged_pairs} == {"ok", "value", "parse", "no_answer"}
    assert all("solution" not in new and new["reward"] == float(new["correct"]) for new in judged_pairs)


BOMBS = [r"9^{9^{9^{9^9}}}", r"2^{63^5}", "100000000!", r"\sum_{i=1}^{10^9} i!", r"\binom{10^9}{5\cdot 10^8}",
         r"\operatorname{ones}(20000,20000)",
         r"(x+y+z+w+1)^{500}", r"\gcd(10^{10000000},3^{10000000})", r"\Gamma(10^{8})", r"10^{-999999999}"]


def bombs(some):
    rows = [maths_row("x^2", f"\\boxed{{{bomb}}}", id=f"bomb-{i}") for i, bomb in enumerate(some)]
    rows[1:1] = [row(id="c"), maths_row(r"\frac{1}{2}", r"\boxed{0.5}", id="between")]
    return [*rows, maths_row("x^2", r"\boxed{x \cdot x}", id="last"), row(id="d", completion="2-1"),
            maths_row("7", "no box", id="none")]


@pytest.mark.parametrize("some", [BOMBS[:3], pytest.param(BOMBS, marks=pytest.mark.slow)])
def test_bombs_end_and_leave_the_others_alone(tmp_path, capsys, some):
    source = write(tmp_path / "r.jsonl", bombs(some))
    new = run(source, tmp_path / "s.jsonl", "--timeout", "5", "--workers", "2")
    assert [one["id"] for one in new] == [one["id"] for one in bombs(some)]
    reasons = {one["id"]: one["reason"] for one in new}
    assert {reasons.pop(f"bomb-{i}") for i in range(len(some))} == {"timeout"}
    assert reasons == {"c": "ok", "between": "ok", "last": "ok", "d": "value", "none": "no_answer"}
    assert f"timeout   {len(some):10}" in capsys.readouterr().out


def test_a_large_parent_does_not_count_as_a_workers_memory(tmp_path):
    """Linux hands a process's peak memory on to its children: here it is above what a worker may use."""
    source = write(tmp_path / "r.jsonl", [maths_row(r"\frac{1}{2}", r"\boxed{0.5}", id="a"), maths_row("7", r"\boxed{8}", id="b")])
    code = (f"import score; ballast = b'x' * {sandbox.MEMORY // 2 + 2**26}; "
            f"score.main(score.parse_args([{source!r}, '--out', {str(tmp_path / 's.jsonl')!r}, '--timeout', '60', '--workers', '1']))")
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True)
    assert [json.loads(line)["reason"] for line in open(tmp_path / "s.jsonl")] == ["ok", "value"]


@pytest.mark.slow
def test_strange_answers_are_wrong_and_harmless(tmp_path):
    strange = ["(" * 500 + "1" + ")" * 500, "{" * 900 + "1" + "}" * 900, r"\frac{" * 300 + "1" + "}{2}" * 300,
               "9" * 1990, "9" * 3000,
               "x^{" * 200 + "x" + "}" * 200, "1+" * 900 + "1", r"\left|" * 100 + "1" + r"\right|" * 100, "\0",
               "\u0661+\u0662", "\uff11",
               r"\operatorname{zeros}(100000,100000)", r"\int_0^1 e^{e^{e^x}} dx", r"\log_1 5", r"\sqrt[0]{3}",
               "1e999999999",
               "__import__('os').system('true')", r"\operatorname{__import__}(os)", r"\mathrm{exec}(1)",
               r"\det(\operatorname{ones}(400,400))"]
    rows = [maths_row("17", f"\\boxed{{{one}}}", id=str(i)) for i, one in enumerate(strange)]
    new = run(write(tmp_path / "r.jsonl", [*rows, maths_row("17", r"\boxed{17}", id="last")]), tmp_path / "s.jsonl",
              "--timeout", "3")
    assert [one["correct"] for one in new] == [False] * len(strange) + [True]


ATTACKS = {
    "read": "open('/etc/passwd').read()", "write": "open('stolen', 'w').write('x')", "low": "os.open('/etc/passwd', 0)",
    "system": "os.system('touch stolen')", "spawn": "subprocess.run(['true'])", "fork": "os.fork()",
    "exec": "os.execv('/bin/true', ['true'])",
    "remove": "os.remove(score.__file__ + '.none')", "socket": "socket.socket()",
    "name": "socket.getaddrinfo('localhost', 80)",
    "eval": "eval('1+1')", "run": "exec('x = 1')", "compile": "compile('1+1', '<model>', 'eval')",
    "ctypes": "ctypes.CDLL(None)",
    "sympify": "sympy.sympify('__import__(\"os\")')", "lambdify": "sympy.lambdify([sympy.Symbol('x')], 'x')",
    "names": "sympy.Symbol('x') + sympy.sympify('y')",
}


def test_no_file_process_network_or_eval_can_be_reached_from_an_answer(tmp_path):
    """Whatever code an answer might get a worker to run: the attacks stand in for the judge, in a real worker."""
    entries = "".join(f"    {name!r}: lambda: {attack},\n" for name, attack in ATTACKS.items())
    code = f"""
import ctypes, json, os, socket, subprocess, sys
sys.path.insert(0, {str(ROOT)!r})
import score, sympy
from data import maths, sandbox
attacks = {{
{entries}}}
def judge(name, *rest):
    if name not in attacks:
        return "warm"
    try:
        attacks[name]()
    except (OSError, ValueError, sympy.SympifyError, TypeError, NameError) as error:
        return type(error).__name__
    return "reached"
maths.judge = judge
sandbox.work("data.maths", "judge", 30)
"""
    jobs = "".join(json.dumps([name]) + "\n" for name in ATTACKS)
    done = subprocess.run([sys.executable, "-c", code], input=jobs, text=True, capture_output=True, cwd=tmp_path)
    said = dict(zip(["start", *ATTACKS], done.stdout.split(), strict=True))
    assert said.pop("start") == "ready"
    by_the_guard = {name for name, word in said.items() if word == "PermissionError"}
    assert by_the_guard >= set(ATTACKS) - {"sympify", "names", "lambdify"}  # these may fail before they reach it
    assert "reached" not in said.values() and os.listdir(tmp_path) == []


def test_math_verifys_numbers_do_not_go_through_eval():
    """math-verify hands number texts to SymPy's sympify, and that to eval; our reader takes digits
    and points alone."""
    pytest.importorskip("sympy")
    from data.values import read_number

    assert read_number("27") == 27 and read_number("27.5") == 27.5
    for text in ("__import__('os')", "1+1", "x", "9**9"):
        with pytest.raises(ValueError):
            read_number(text)


@pytest.mark.parametrize("field, value", [
    ("answer", ""), ("answer", " "), ("answer", None), ("answer", True), ("answer", []), ("answer", ["1", ""]),
    ("answer", ["1", None]),
    ("answer", {"a": 1}), ("answer", [["1"]]),
    ("answer", "proof"), ("answer", "Not Found."), ("answer", "N/A"), ("answer", r"\text{proof}"),
    ("answer", ["1", "n/a"]), ("answer", '["proof"]'), ("answer", "?"),
    ("answer", "[]"),
    ("unit", 3), ("unit", ["cm", "m"]), ("error", "wide"), ("error", -1),
    ("error", True),
    ("error", [0.1, 0.2]), ("error", "inf"), ("error", "nan"), ("error", {})])
def test_a_gold_that_cannot_be_used_is_an_error(tmp_path, capsys, field, value):
    source = write(tmp_path / "r.jsonl", [{**maths_row("5", "no box"), field: value}])
    assert f"r.jsonl:1: field '{field}" in refused(capsys, source, tmp_path / "s.jsonl")


@pytest.mark.parametrize("answer, golds", [
    (33, ["33"]), (27.0, ["27.0"]), (1e-05, ["0.00001"]), ("1, 2", ["1", "2"]),
    ("10,080", ["10080"]), ("(1,2)", ["(1,2)"]), (",", [","]), ("6, 120", ["6", "120"]),
    (r"0, \pm 3", ["0", "+3", "-3"]), ('["34"]', ["34"]), ("['34']", ["34"]), ("[34]", ["34"]),
    (r'["7 \\text{ cm}"]', [r"7 \text{ cm}"]), (r'["7 \text{ cm}"]', [r"7 \text{ cm}"]),
    ('["1", "2"]', ["1", "2"]), ("[1, 2]", ["[1, 2]"]), ("[1, x]", ["[1, x]"]),
    (["1, 2"], ["1", "2"]), ("３，4", ["3", "4"])])
def test_golds_of_every_type(answer, golds):
    assert [gold for gold, *_ in maths.gold_of(maths.Row("m", 0, "", "stop", answer))] == golds


def test_units_and_errors_of_golds():
    row = maths.Row("m", 0, "", "stop", ["a", 2], r"\text{ meters}", ["1e-1", None])
    assert maths.gold_of(row) == [("a", "m", 0.1), ("2", "m", None)]


def test_a_cut_answer_without_tags_is_none():
    """Of reasoning-gym, where the whole completion is the answer if nothing is tagged."""
    def verdict(completion, finish_reason):
        return gym.verify(completion, gym.Row(id="a", sample=0, completion=completion, finish_reason=finish_reason, gym="chain_sum", entry={}))

    assert verdict("12", "stop").pred == verdict("<answer>12</answer> so", "length").pred == "12"
    assert all(isinstance(verdict(*one), Pending) for one in (("12", "stop"), ("<answer>12</answer> so", "length")))
    assert verdict("12", "length") == Verdict("12", "no_answer")


def test_without_math_verify_one_line_says_so(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    source = write(tmp_path / "r.jsonl", [maths_row("5", r"\boxed{5}")])
    done = subprocess.run([sys.executable, "score.py", source, "--out", str(tmp_path / "s.jsonl")], cwd=ROOT,
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 2 and "is math-verify installed?" in done.stderr and done.stderr.count("\n") == 1


def test_countdown_imports_neither_torch_nor_math_verify(tmp_path):
    source = write(tmp_path / "r.jsonl", [row()])
    flags = [source, "--out", str(tmp_path / "s.jsonl")]
    code = f"import score, sys; score.main(score.parse_args({flags!r})); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = done.stdout.split()
    assert not {"torch", "transformers", "math_verify", "sympy", "numpy"} & set(loaded)


# ---- Rows in and out -------------------------------------------------------------------------------------------------
def test_rows_pass_in_order_and_other_fields_untouched(tmp_path):
    """Bytes too: the new fields stand at the end of the old line."""
    rows = [row(id=f"{name}", sample=sample, note={"x": [1.50, "\u00e9\u2028"]}, completion=completion)
            for name, sample, completion in [
                ("b", 3, "1+2"), ("a", 0, "2-1"), ("b", 1, ""), ("../../x", 0, "1+2"), ("a/b.json", 0, "?")]]
    source = tmp_path / "r.jsonl"
    lines = [json.dumps(one, ensure_ascii=bool(i % 2), separators=(",", ": ")) for i, one in enumerate(rows)]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b" ")
    new = run(source, tmp_path / "s.jsonl")
    assert [{key: one[key] for key in old} for old, one in zip(rows, new, strict=True)] == rows
    written = (tmp_path / "s.jsonl").read_text(encoding="utf-8").split("\n")
    assert all(line.startswith(old[:-1]) for old, line in zip(lines, written)) and len(written) == 6
    assert sorted(os.listdir(tmp_path)) == ["r.jsonl", "s.jsonl", "s.jsonl.meta.json"]


def test_a_scored_file_is_scored_afresh(tmp_path):
    source = write(tmp_path / "r.jsonl", [row(), row(sample=1, completion="2-1"),
                                          maths_row("5", "no box", solution="the worked one")])
    first = run(source, tmp_path / "s.jsonl")
    stale = write(tmp_path / "stale.jsonl", [{**one, "correct": "x", "reason": None, "pred": 1, "reward": 7}
                                             for one in first])
    again = run(stale, tmp_path / "t.jsonl")
    assert again == first and again[2]["solution"] == "the worked one"
    assert (tmp_path / "t.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()


def test_the_histogram_shows_every_reason(tmp_path, capsys):
    completions = ["1+2", "", "?", "1+1", "2-1"]
    rows = [row(sample=i, completion=completion) for i, completion in enumerate(completions)]
    rows.append(row(sample=5, finish_reason="length"))
    run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl", "--show", "2")
    out = capsys.readouterr().out
    assert "6 rows, 16.7% correct" in out and out.count("sample ") == 2 and "'1+2'" in out
    counts = {line.split()[0]: int(line.split()[1]) for line in out.splitlines()[-len(score.REASONS):]}
    assert counts == {**dict.fromkeys(score.REASONS, 1), "timeout": 0}
    assert json.load(open(tmp_path / "s.jsonl.meta.json"))["reasons"] == counts


def test_show_spreads_over_the_reasons_and_writes_nothing_of_a_scored_file(tmp_path, capsys):
    rows = [row(sample=i, completion=text, logprobs=[-0.5, -1.5], prompt_ids=[1])
            for i, text in enumerate(["1+2", "2+1", "?", "so\n1-2", "2-1", "1*2", "2*1"])]
    source = write(tmp_path / "r.jsonl", rows)
    run(source, tmp_path / "s.jsonl")
    capsys.readouterr()
    before = sorted(os.listdir(tmp_path))

    def shown(*flags):
        score.main(score.parse_args([str(tmp_path / "s.jsonl"), *flags]))
        return capsys.readouterr().out

    out = shown("--show", "4")
    assert re.findall(r"sample (\d)", out) == ["0", "2", "4", "1"]  # ok, parse, value, and again
    assert out.startswith(
        "a sample 0: 'numbers': [1, 2], 'target': 3\n  prompt      1 2=3:\n  completion  1+2\n"
        "  answer '1+2': ok, reward 1.0, log-prob a token -1.000\n")
    assert re.findall(r"sample (\d)", shown("--show", "2", "--reason", "value")) == ["4", "5"]
    odd = [{"id": "x", "correct": True, "reason": "ok", "logprobs": logprobs, "task": task}
           for logprobs, task in ((None, None), (["a", None], ["math"]), (3, {}))]
    write(tmp_path / "odd.jsonl", odd)  # of another program
    score.main(score.parse_args([str(tmp_path / "odd.jsonl"), "--show", "9"]))
    assert capsys.readouterr().out.count("x sample None: ") == 3
    os.unlink(tmp_path / "odd.jsonl")
    assert shown("--show", "2", "--reason", "timeout") == "" and sorted(os.listdir(tmp_path)) == before
    with pytest.raises(SystemExit) as end:
        score.main(score.parse_args([source, "--show", "1"]))
    assert end.value.code == 2
    assert "r.jsonl:1: missing field 'correct'; run score.py first" in capsys.readouterr().err


@pytest.mark.parametrize("change, message", [
    ({"task": None}, ":1: field 'task' must be one of"), ({"numbers": "12"}, ":1: field 'numbers'"),
    ({"target": ...}, ":1: missing field 'target'"), ({"task": ...}, ":1: missing field 'task'"),
    ({"prompt": ...}, ":1: needs either 'prompt' or 'messages'"), ({"id": 3}, ":1: field 'id'"),
    ({"task": "math"}, ":1: missing field 'answer'"), ({"id": "b"}, ":2: duplicate id 'b'"),
    ({"task": "math", "answer": ""}, ":1: field 'answer'"), ({}, None)])
def test_problems_are_checked_before_anything_is_sampled(tmp_path, capsys, change, message):
    problem = {"id": "a", "task": "countdown", "prompt": "1 2=3:", "numbers": [1, 2], "target": 3}
    problem = {key: value for key, value in {**problem, **change}.items() if value is not ...}
    other = {"id": "b", "task": "gym", "messages": [{"role": "user", "content": "x"}], "gym": "x",
             "entry": {}}
    source = write(tmp_path / "p.jsonl", [problem, other])

    def check(*least):
        score.main(score.parse_args([source, "--check-problems", *least]))

    if message is None:
        check()
        check("2")
        message, least = ": 2 problems, fewer than 3", ["3"]
    else:
        least = []
    with pytest.raises(SystemExit) as end:
        check(*least)
    out, err = capsys.readouterr()
    assert end.value.code == 2 and out == "" and err.startswith(f"score.py: error: {source}{message}")
    assert os.listdir(tmp_path) == ["p.jsonl"]


def test_nobody_need_read_what_is_shown(tmp_path):
    """score.py ... | head: quiet, and the output is complete."""
    source = write(tmp_path / "r.jsonl", [row(sample=i, completion="1+2" * 60) for i in range(2000)])
    command = f"{sys.executable} score.py {source} --out {tmp_path / 's.jsonl'} --show 2000 | head -n 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "Traceback" not in done.stderr and "ipe" not in done.stderr
    assert len(open(tmp_path / "s.jsonl").readlines()) == 2000


def test_a_rows_own_solution_passes_untouched(tmp_path):
    """Countdown's verdict says which solution was found; a worked-out solution of other tasks is the data's own."""
    source = write(tmp_path / "r.jsonl", [maths_row("5", "no box", solution="add 2 and 3"), row(solution="stale")])
    assert [one["solution"] for one in run(source, tmp_path / "s.jsonl")] == ["add 2 and 3", "1+2"]


def test_what_is_shown_cannot_speak_to_the_terminal(tmp_path, capsys):
    run(write(tmp_path / "r.jsonl", [row(id="\x1b[2J", completion="\x1b]0;x\x07\u202e1+2")]), tmp_path / "s.jsonl",
        "--show", "1")
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()


WRONG = [(field, value) for field, values in {
    "id": [None, 1, ["a"], {}], "sample": [None, "0", -1, 1.0, True, 2**20, 10**30],
    "completion": [None, 1, ["1+2"], True],
    "finish_reason": [None, "eos", 1, ["stop"]], "task": [None, "maths", 1, ["countdown"], {}],
    "numbers": [None, [], "12", [1, "2"], [1.0, 2], [True, 2], [[1], 2], {"0": 1}, 3],
    "target": [None, "3", 3.0, True, [3]]}.items() for value in values]


@pytest.mark.parametrize("field, value", WRONG)
def test_a_wrong_type_in_any_field_is_one_line(tmp_path, capsys, field, value):
    source = write(tmp_path / "r.jsonl", [row(sample=1), row(**{field: value})])
    err = refused(capsys, source, tmp_path / "s.jsonl")
    assert f"r.jsonl:2: field '{field}" in err and ("xpected" in err or "nvalid" in err or "must be" in err)


@pytest.mark.parametrize("field", ["id", "sample", "completion", "finish_reason", "task", "numbers", "target"])
def test_a_missing_field_is_one_line(tmp_path, capsys, field):
    source = write(tmp_path / "r.jsonl", [{key: value for key, value in row().items() if key != field}])
    told = refused(capsys, source, tmp_path / "s.jsonl")
    assert f"r.jsonl:1: missing field '{field}'" in told and ("run generate.py first" in told) == (field == "sample")


@pytest.mark.parametrize("content, told", [
    (b"", "no rows"), (b"\n \r\n", "no rows"), (b'{"id": "a", "samp', "r.jsonl:1: not a valid JSON row"),
    (b"[" * 100_000, "r.jsonl:1: not"), (b'{"task": "countdown", "target": Infinity}', "r.jsonl:1: not"),
    (b'{"task": "countdown", "target": 1e999}', "r.jsonl:1: field 'target'"), (b'{"x": NaN}', "r.jsonl:1: not"),
    (b'{"task": "countdown", "target": ' + b"1" * 5000 + b"}", "r.jsonl:1: "),
    (b'{"id": "\\ud800"}', "r.jsonl:1: not"), (b'{"id": "\xff"}', "r.jsonl:1: not"),
    (b'"text"', "Expected object, got str")])
def test_hostile_files_are_one_line(tmp_path, capsys, content, told):
    (tmp_path / "r.jsonl").write_bytes(content)
    assert told in refused(capsys, tmp_path / "r.jsonl", tmp_path / "s.jsonl")


def test_of_a_key_that_stands_twice_the_last_one_counts(tmp_path):
    line = json.dumps(row(completion="1+2")).replace('"completion"', '"completion": "2-1", "completion"')
    (tmp_path / "r.jsonl").write_text(line + "\n")
    assert run(tmp_path / "r.jsonl", tmp_path / "s.jsonl")[0]["correct"]


def test_a_line_of_100_mb_is_refused_unread(tmp_path, capsys):
    with open(tmp_path / "r.jsonl", "wb") as file:
        file.write(json.dumps(row()).encode() + b"\n")
        file.truncate(100 * 2**20)  # zeros up to there
    err = refused(capsys, tmp_path / "r.jsonl", tmp_path / "s.jsonl")
    assert "r.jsonl:2: a line above 16 MB is refused unread" in err


def test_duplicates_are_found_wherever_they_stand(tmp_path, capsys):
    rows = [row(id=name, sample=sample) for name in "ab" for sample in (0, 1, 700)]
    assert len(run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl")) == 6
    capsys.readouterr()
    source = write(tmp_path / "d.jsonl", [*rows, row(id="c"), row(id="a", sample=700)])
    assert "d.jsonl:8: id 'a', sample 700 stands twice" in refused(capsys, source, tmp_path / "t.jsonl")


@pytest.mark.parametrize("flags", [["--workers", "0"], ["--timeout", "0"], ["--timeout", "nan"], ["--timeout", "-1"],
                                   ["--show", "-1"], ["--reason", "ok"], ["--check-problems"]])
def test_wrong_flags(tmp_path, capsys, flags):
    assert "(see --help)" in refused(capsys, write(tmp_path / "r.jsonl", [row()]), tmp_path / "s.jsonl", *flags)


def test_the_meta_passes_the_sampling_on(tmp_path, capsys):
    sampling = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    source = write(tmp_path / "r.jsonl", [row()])
    run(source, tmp_path / "without.jsonl")
    assert json.load(open(tmp_path / "without.jsonl.meta.json"))["sampling"] is None
    (tmp_path / "r.jsonl.meta.json").write_text(json.dumps({"sampling": sampling}))
    run(source, tmp_path / "with.jsonl")
    assert json.load(open(tmp_path / "with.jsonl.meta.json"))["sampling"] == sampling
    (tmp_path / "r.jsonl.meta.json").write_text("{")
    capsys.readouterr()
    assert "r.jsonl.meta.json: not a valid meta" in refused(capsys, source, tmp_path / "broken.jsonl")


def test_a_complete_output_is_left_alone_and_another_is_refused(tmp_path, capsys):
    source, out = write(tmp_path / "r.jsonl", [row()]), tmp_path / "s.jsonl"
    run(source, out)
    before = os.stat(out)
    run(source, out, "--workers", "7", "--show", "1")
    assert os.stat(out) == before and "complete, left alone" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(source, out, "--timeout", "3")
    write(tmp_path / "r.jsonl", [row(completion="2-1")])
    with pytest.raises(SystemExit):
        run(source, out)
    assert "made with other inputs" in capsys.readouterr().err and os.stat(out) == before


# ---- Faults ----------------------------------------------------------------------------------------------------------
def workers_of(pid):
    """The live children of a process."""
    try:
        return [int(child) for child in open(f"/proc/{pid}/task/{pid}/children").read().split()]
    except FileNotFoundError:
        return []


def alive(pid):
    try:
        return open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def lockable(path):
    with open(path) as file, contextlib.suppress(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (value := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("kill, code", [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_while_workers_are_busy(tmp_path, kill, code):
    """No worker outlives its answer's time, none keeps the lock, and the same command then ends as if nothing was."""
    rows = [row(sample=i) for i in range(50)] + [maths_row("x^2", r"\boxed{100000000!}", id="bomb"),
                                                 maths_row("5", r"\boxed{5.0}", id="good")]
    source, out = write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl"
    command = [sys.executable, "score.py", source, "--out", str(out), "--timeout", "2", "--workers", "2"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    workers = until(lambda: len(workers_of(process.pid)) == 2 and workers_of(process.pid))
    os.kill(process.pid, kill)
    err = process.communicate()[1]
    assert process.returncode == code and err.count("\n") == (0 if kill == signal.SIGKILL else 1) and not out.exists()
    assert until(lambda: lockable(str(out) + ".partial"))  # though workers of a killed parent may still be busy
    assert until(lambda: not any(map(alive, workers)))
    if kill == signal.SIGKILL:
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        new = [json.loads(line)["reason"] for line in open(out)]
        assert collections.Counter(new) == {"ok": 51, "timeout": 1}


def test_the_same_bytes_whatever_the_number_of_workers(tmp_path):
    pairs = [pair for pair in PAIRS if "x" not in pair["answer"]][:24]
    rows = []
    for i, pair in enumerate(pairs):
        rows += [row(id=f"c{i}"), maths_row(pair["gold"], f"\\boxed{{{pair['answer']}}}", id=f"m{i}")]
    source = write(tmp_path / "r.jsonl", rows)
    for workers in "13":
        run(source, tmp_path / f"{workers}.jsonl", "--workers", workers, "--timeout", "60")
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
