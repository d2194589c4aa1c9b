"""score.py: Countdown's exact verifier, maths in processes that can be killed, rows in and out."""
import collections
import contextlib
import fcntl
import functools
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

import crash
import fuzz
import score
from conftest import meta_of, read, refusal, stage, write
from data import countdown, gym, maths, sandbox
from data.files import Verdict
from data.sandbox import Judge, Pending

ROOT = pathlib.Path(score.__file__).parent
# Python's own parser, in the oracle, warns of "(1)(2)".
pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")


def judge(completion, numbers, target, finish_reason="stop"):
    """The new fields of a Countdown row."""
    row = countdown.Row("a", 0, completion, finish_reason, tuple(numbers), target)
    return score.fields_of(score.mark_truncated(row, countdown.verify(completion, row)))


def row(**fields):
    return {"id": "a", "task": "countdown", "prompt": "1 2=3:", "numbers": [1, 2], "target": 3,
            "n_solutions": 1, "sample": 0, "completion": "1+2", "prompt_ids": [1, 2],
            "completion_ids": [3], "logprobs": [-0.5], "finish_reason": "stop", **fields}


def maths_row(answer, completion, **fields):
    return {"id": "m", "task": "math", "answer": answer, "sample": 0, "completion": completion,
            "finish_reason": "stop", **fields}


def run(source, out, *flags):
    """The scored rows of a run in this process."""
    stage(score, source, "--out", out, *flags)
    return read(out)


def refused(capsys, *flags):
    line = refusal(capsys, stage, score, *flags)
    assert line.startswith("score.py: error: ")
    return line


# ---- Countdown ---------------------------------------------------------------------------------
@pytest.mark.parametrize("answer, numbers, target, reason", [
    ("2**5", [2, 5], 32, "parse"), ("7//2", [7, 2], 3, "parse"), ("3.*7", [3, 7], 21, "parse"),
    ("--5+1", [5, 1], 6, "parse"), ("-(3-8)", [3, 8], 5, "parse"), ("99**98**4", [9], 1, "parse"),
    ("12", [1, 2], 12, "numbers"), ("3+4", [3, 4, 5], 7, "numbers"), ("3+3", [3] * 3, 6, "numbers"),
    ("1/(2-2)", [1, 2, 2], 1, "value"), ("5/(3/0)", [0, 3, 5], 0, "value"),
    ("1/3", [1, 3], 0, "value"), ("<answer>1+2", [1], 3, "no_answer"),
    ("I think, therefore", [3, 4], 7, "parse"), ("I think " * 50, [3, 4], 7, "no_answer"),
    ("<answer>" + "1+" * 200 + "1</answer>", [1, 2], 3, "parse"),
    ("<answer>8/\n(3-8/3)\n</answer>", [3, 3, 8, 8], 24, "ok"),
    ("1-2", [1, 2], -1, "ok"), ("0*7", [7, 0], 0, "ok"), ("3-3+3", [3, 3, 3], 3, "ok"),
    ("1/3+1/3+1/3", [1, 1, 1, 3, 3, 3], 1, "ok"), ("*".join(["99"] * 9), [99] * 9, 99**9, "ok")])
def test_the_table(answer, numbers, target, reason):
    assert judge(answer, numbers, target)["reason"] == reason


def test_nothing_else_is_an_answer():
    wrong = [
        "", "()", "1+", "+1+2", "1 2", "1+2)", "(1+2", "1)+(2", "(1)(2)", "1(+2)", "1+(2",
        "1+2=3", "1+2.", "01+2", "1+02", "1_0+2", "1e0+2", "1+2 # x", "1+2\0", "1\u22122",
        "1\uff0b2", "\u0661+\u0662", "1\u0660", "\uff11+2", "1+\u00b2", "1\u00d72", "1+2\u00a0",
        "\u20031+2", "1+2\x0b", "1+2\x1c", "one+two", "1+2,", "1;2", "1%2", "1^2", "1&2", "~1+2",
        "!1", "1<2", "abs(1)+2", "__import__('os')", "lambda:3", "1if 1else 2",
        "1+2" + " " * 198 + "1", "(" * 100 + "1+2" + ")" * 100, "(" * 10_000, "9" * 5_000_000,
        "<answer>", "<answer>1+2", "1+2</answer>", "</answer>1+2<answer>",
        "<answer></answer>", "<answer> </answer>", "<ANSWER>1+2</ANSWER>", "<answer>1+2</answer",
        "<answer>1+2</answer><answer>2+2</answer>", "<answer>1+2<b></answer>"]
    assert [answer for answer in wrong if judge(answer, [1, 2], 3)["correct"]] == []


def test_the_same_answer_in_other_dress():
    for answer in [
            "1+2", " 1 + 2\n", "\t1\r\n+2", "(((1)+(2)))", "2+1", "<answer>1+2</answer>",
            "<answer>9</answer> <answer> (2)+1 </answer>!", "<answer>1+2</answer> then <answer>",
            "<answer><answer>1+2</answer></answer>", "<answer>x<answer>1+2</answer>y</answer>",
            "<answer>1+2</answer></answer>", "(" * 98 + "1+2" + ")" * 98, "1+2" + " " * 100_000,
            "<think>" * 20_000 + "<answer>2+1</answer>"]:
        new = judge(answer, [1, 2], 3)
        del new["pred"]
        assert new == {"correct": True, "reason": "ok", "reward": 1.0, "solution": "1+2"}, answer


@pytest.mark.parametrize("completion, reason, pred, solution", [
    ("1+2", "truncated", "1+2", None), ("<answer>1+2", "truncated", None, None),
    ("<answer>1-2</answer>", "truncated", "1-2", None), ("", "truncated", None, None),
    ("so " * 1000, "truncated", None, None), ("<answer>1+2</answer> bla", "ok", "1+2", "1+2"),
    ("<answer>1+2</answer><answer>1+2+", "ok", "1+2", "1+2")])
def test_a_cut_completion_counts_only_with_a_complete_right_answer(
        completion, reason, pred, solution):
    right = reason == "ok"
    assert judge(completion, [1, 2], 3, "length") == {
        "pred": pred, "correct": right, "reason": reason, "reward": right, "solution": solution}


@pytest.mark.parametrize("texts, canonical", [
    (["10-3+2", "2+10-3", "2-(3-10)", "(2+(10))-3", "10-(3-2)"], "2+10-3"),
    (["(2+5)*3/7", "3/7*(5+2)", "3/(7/(2+5))"], "3*(2+5)/7"), (["8/(3-8/3)"], "8/(3-8/3)"),
    (["1*2*3", "3*(2*1)"], "1*2*3"), (["1/2/3", "1/(2*3)"], "1/2/3"),
    (["1-2-3", "1-(2+3)"], "1-2-3"), (["(1-2)*(3-4)"], "(1-2)*(3-4)"),
    (["(2-1)*(4-3)"], "(2-1)*(4-3)"), (["3-3+3"], "3+3-3"), (["7"], "7"), (["3*3/3"], "3*3/3"),
    (["10*(9+2)-1/11", "(2+9)*10-1/11"], "10*(2+9)-1/11")])
def test_the_canonical_text(texts, canonical):
    assert {countdown.canonical(text) for text in texts} == {canonical}


@pytest.mark.parametrize("numbers, target", fuzz.PROBLEMS + [
    ((7,), 7), ((7,), 6), ((4, 9), 5), ((6, 6, 6), 0)])
def test_the_solver_and_the_verifier_agree(numbers, target):
    """The enumeration of all trees has just the canonical texts that the solver finds."""
    trees = [fuzz.spell(tree, random.Random(0))
             for tree, value in fuzz.trees(tuple(sorted(numbers))) if value == target]
    texts = countdown.solutions(list(numbers), target)
    for spelled in (trees, texts):
        assert {judge(text, numbers, target)["solution"] for text in spelled} == texts
    assert all(countdown.canonical(text) == text for text in texts)


def test_a_slice_of_the_fuzz_campaign(monkeypatch):
    figures = fuzz.campaign(8_000, seed=1)
    assert figures["failures"] == [] and figures["exceptions"] == 0
    assert figures["right"] > 1000 and figures["states reached"] > 300
    monkeypatch.setattr(countdown, "judge", functools.lru_cache(lambda *args: ("ok", args[0])))
    planted = fuzz.campaign(500, seed=0)
    assert planted["false accepts"] > 0 and planted["wrong canonical texts"] > 0


# ---- Maths: what is read -------------------------------------------------------------------------
@pytest.mark.parametrize("text, found", [
    (r"\boxed{1} then \boxed{2}", ["1", "2"]), (r"\boxed{\frac{1}{2}}", [r"\frac{1}{2}"]),
    (r"\boxed{\boxed{5}}", [r"\boxed{5}", "5"]), (r"\boxed{\{1,2\}}", [r"\{1,2\}"]),
    (r"\boxed{\left\{x\right.}", [r"\left\{x\right."]), (r"\boxed {3}", ["3"]), ("", []),
    (r"\boxed{1", []), (r"\boxed5", []), ("}}} {{ \\boxed{4} {", ["4"]), (r"\\boxed{6}", []),
    (r"\boxed{}", []), (r"\boxed{ \, }", []), (r"\boxed{...}", []), (r"\boxed{\ldots}", []),
    (r"\boxed{12}, as in \boxed{your answer}", ["12"]), (r"\boxed{\text{answer}}", []),
    (r"\boxed{answers}", ["answers"]), (r"\boxed{the answer is 5}", ["the answer is 5"]),
    (r"\boxed{12}. I put it in \boxed as asked.", ["12"]), (r"\boxed a second time", []),
    (r"\boxed -- so", []), (r"\boxed x.", ["x"]), (r"\boxed -5", ["-5"]), (r"\boxed{?}", []),
    (r"\boxed{\emptyset} \boxed{-}", [r"\emptyset", "-"]), (r"\boxed (as asked)", []),
    (r"$\boxed 7$.", ["7"]), (r"so \boxed 7, or \fbox{8}", ["7", "8"]), (r"\(\boxed 7\)", ["7"]),
    (r"$\boxed \frac{1}{2}$", [r"\frac{1}{2}"]), (r"{\boxed 7} \boxed{8}", ["7", "8"]),
    (r"\boxed \boxed{9}", ["9"]), (r"\boxed{" * 20_000, [])])
def test_boxes_by_matched_braces(text, found):
    assert [text[start:end] for start, end in maths.boxes(text)] == found


@pytest.mark.parametrize("completion, parts, answer", [
    (r"\boxed{1} so \boxed{2}", 1, "2"), (r"\boxed{1} and \boxed{2}", 2, "1, 2"),
    (r"\boxed{9}, \boxed{1, 2}", 2, "1, 2"), (r"\boxed{1}, \boxed{2} \boxed{}", 2, "1, 2"),
    (r"\boxed{12}. I put it in \boxed as asked.", 1, "12"), (r"\boxed{12} \boxed{}", 1, "12"),
    (r"\boxed{1}", 2, "1"), ("42", 1, None), (r"\boxed{}", 1, None), (r"\boxed{5", 1, None),
    (r"\boxed{(1,2)}, \boxed{(3,4)}", 2, "(1,2), (3,4)"),
    (r"\boxed{" * 20_000 + "5" + "}" * 20_000, 1, "5")])
def test_which_answer_is_read(completion, parts, answer):
    assert maths.extract(completion, parts) == answer


@pytest.mark.parametrize("text, parts", [
    ("1, 2; 3", ["1", "2", "3"]), (r"1 \text{ and } 2 or 3", ["1", "2", "3"]), ("", []),
    ("(1,2),[3,4)", ["(1,2)", "[3,4)"]), (r"\{1,2\}", ["1", "2"]),
    (r"\frac{1,2}{3}", [r"\frac{1,2}{3}"]), (r"\text{for all}", [r"\text{for all}"])])
def test_parts(text, parts):
    assert maths.split_parts(text) == parts


NO_GOLDS = {
    "answer": ["", " ", None, True, [], ["1", ""], ["1", None], {"a": 1}, [["1"]], "proof", "?",
               "Not Found.", "N/A", r"\text{proof}", ["1", "n/a"], '["proof"]', "[]", '[["1"]]',
               '["34", null]', "[None]", '["1", [["2"]]]', "…", "—", "No answer provided."],
    "unit": [3, ["cm", "m"]], "error": ["wide", -1, True, [0.1, 0.2], "inf", "nan", {}]}


@pytest.mark.parametrize("field, value", [(name, one) for name in NO_GOLDS
                                          for one in NO_GOLDS[name]])
def test_a_gold_that_cannot_be_used_is_an_error(tmp_path, capsys, field, value):
    source = write(tmp_path / "r.jsonl", [{**maths_row("5", "no box"), field: value}])
    assert f"r.jsonl:1: field '{field}" in refused(capsys, source, "--out", tmp_path / "s.jsonl")


@pytest.mark.parametrize("answer, golds", [
    (33, ["33"]), (27.0, ["27.0"]), (1e-05, ["0.00001"]), ("1, 2", ["1", "2"]),
    ("10,080", ["10080"]), ("(1,2)", ["(1,2)"]), (",", [","]), ("6, 120", ["6", "120"]),
    (r"0, \pm 3", ["0", "+3", "-3"]), ('["34"]', ["34"]), ("['34']", ["34"]), ("[34]", ["34"]),
    (r'["7 \\text{ cm}"]', [r"7 \text{ cm}"]), (r'["7 \text{ cm}"]', [r"7 \text{ cm}"]),
    ('["1", "2"]', ["1", "2"]), ("[1, 2]", ["[1, 2]"]), ("[1, x]", ["[1, x]"]),
    (["1, 2"], ["1", "2"]), ("３，4", ["3", "4"])])
def test_golds_of_every_type(answer, golds):
    assert [gold for gold, *_ in maths.gold_of(maths.Row("m", 0, "", "stop", answer))] == golds
    row = maths.Row("m", 0, "", "stop", ["a", 2], r"\text{ meters}", ["1e-1", None])
    assert maths.gold_of(row) == [("a", "m", 0.1), ("2", "m", None)]


def test_a_cut_answer_without_tags_is_none():
    """Of reasoning-gym, where the whole completion is the answer if nothing is tagged."""
    def verdict(completion, finish_reason):
        return gym.verify(completion, gym.Row("a", 0, completion, finish_reason, "chain_sum", {}))

    for whole in (verdict("12", "stop"), verdict("<answer>12</answer> so", "length")):
        assert isinstance(whole, Pending) and whole.pred == "12"
    assert verdict("12", "length") == Verdict("12", "no_answer")


# ---- Maths: verdicts of workers ------------------------------------------------------------------
CUT = [(r"\boxed{5} and", "ok", "5"), (r"\boxed 5 and", "ok", "5"), (r"\boxed{5}.", "ok", "5"),
       (r"\boxed{6} and", "truncated", "6"), (r"\boxed{5", "truncated", None),
       ("so", "truncated", None), (r"\boxed 5", "truncated", None),  # it might have become 52
       (r"\boxed{5}, so \boxed 5.", "ok", "5"), (r"\boxed{6}, so \boxed 5", "truncated", "6")]


def test_labelled_pairs_golds_and_cut_completions(tmp_path):
    """Golds in the styles of MATH: units, lists, intervals, matrices, words, equations, bases,
    money, mixed numbers. Each is a right answer to itself."""
    pairs = read(ROOT / "tests/maths_pairs.jsonl")
    pairs += [{"gold": gold, "answer": gold, "right": True}
              for gold in read(ROOT / "tests/maths_golds.jsonl")]
    rows = []
    for pair in pairs:
        extras = {field: pair[field] for field in ("unit", "error") if field in pair}
        rows.append(maths_row(pair["gold"], f"So it is $\\boxed{{{pair['answer']}}}$.", **extras))
    rows += [maths_row("5", completion, finish_reason="length") for completion, *_ in CUT]
    rows = [{**row, "id": str(i)} for i, row in enumerate(rows)]
    new = run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl", "--timeout", "60",
              "--workers", "1")
    wrong = [(pair, one["reason"]) for pair, one in zip(pairs, new)
             if one["correct"] != pair["right"]]
    assert wrong == [] and sum(not pair["right"] for pair in pairs) >= 300
    assert [(one["completion"], one["reason"], one["pred"]) for one in new[len(pairs):]] == CUT
    reasons = {one["reason"] for one in new}
    assert reasons == {"ok", "value", "parse", "no_answer", "truncated"}
    assert all("solution" not in one and one["reward"] == float(one["correct"]) for one in new)


STAND_IN = """import os, time
ACTS = {"hang": lambda: time.sleep(1000), "memory": lambda: len(b"x" * 2**31),
        "swallowed": lambda: len(b"x" * (2**30 + 2**26)) and "ok", "die": lambda: os._exit(1),
        "raise": lambda: 1 / 0, "lie": lambda: "right"}
def prepare():
    return ()
def judge(pred, golds):
    if pred.startswith("0."):
        time.sleep(float(pred))
    return ACTS[pred]() if pred in ACTS else "ok" if pred == golds[0][0] else "value"
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A judge of maths that misbehaves on demand and needs no import: rows that try it."""
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules/stand_in.py").write_text(STAND_IN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "modules"))
    monkeypatch.setattr(maths, "JUDGE", Judge("stand_in", "judge", "stand-in"))
    expected = {"0.2": "ok", "0": "ok", "hang": "timeout", "9": "ok", "memory": "timeout",
                "swallowed": "timeout", "0.1": "ok", "die": "timeout", "raise": "parse",
                "lie": "timeout", "8": "ok", "0.01": "ok"}
    rows = [maths_row(text, f"\\boxed{{{text}}}", id=text) for text in expected]
    rows += [row(id="c"), maths_row("7", "no box", id="none"), maths_row("7", r"\boxed{6}", id="6")]
    return rows, {**expected, "c": "ok", "none": "no_answer", "6": "value"}


def test_bombs_end_and_leave_the_others_alone(stand_in, tmp_path, capsys):
    """In the rows' order, and the same bytes whatever the number of workers. Linux hands a
    process's peak memory on to its children: here it is above what a worker may use."""
    len(b"x" * (sandbox.MEMORY // 2 + 2**26))
    rows, expected = stand_in
    source = write(tmp_path / "r.jsonl", rows)
    for workers in "13":
        new = run(source, tmp_path / f"{workers}.jsonl", "--timeout", "3", "--workers", workers)
    assert [(one["id"], one["reason"]) for one in new] == list(expected.items())
    assert (tmp_path / "1.jsonl").read_bytes() == (tmp_path / "3.jsonl").read_bytes()
    assert re.search(r"timeout +5 ", capsys.readouterr().out)


@pytest.mark.slow
def test_bombs_and_strange_answers_of_maths(tmp_path):
    bombs = [r"9^{9^{9^{9^9}}}", r"2^{63^5}", "100000000!", r"\sum_{i=1}^{10^9} i!",
             r"\binom{10^9}{5\cdot 10^8}", r"\operatorname{ones}(20000,20000)",
             r"(x+y+z+w+1)^{500}", r"\gcd(10^{10000000},3^{10000000})", r"\Gamma(10^{8})",
             r"10^{-999999999}"]
    strange = ["(" * 500 + "1" + ")" * 500, "{" * 900 + "1" + "}" * 900, "9" * 1990, "9" * 3000,
               r"\frac{" * 300 + "1" + "}{2}" * 300, "x^{" * 200 + "x" + "}" * 200, r"\log_1 5",
               "1+" * 900 + "1", r"\left|" * 100 + "1" + r"\right|" * 100, "\0", "1e999999999",
               "\u0661+\u0662", "\uff11", r"\operatorname{zeros}(100000,100000)",
               r"\int_0^1 e^{e^{e^x}} dx", r"\sqrt[0]{3}", r"\operatorname{__import__}(os)",
               "__import__('os').system('true')", r"\mathrm{exec}(1)",
               r"\det(\operatorname{ones}(400,400))"]
    rows = [maths_row("x^2", f"\\boxed{{{one}}}", sample=i)
            for i, one in enumerate(bombs + strange)]
    rows.append(maths_row("x^2", r"\boxed{x \cdot x}", id="last"))
    new = run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl", "--timeout", "5")
    assert {one["reason"] for one in new[:len(bombs)]} == {"timeout"}
    assert [one["correct"] for one in new] == [False] * (len(rows) - 1) + [True]


ATTACKER = """import ctypes, os, socket, subprocess
import sympy
from data.maths import prepare
ATTACKS = {
    "read": lambda: open("/etc/passwd").read(), "write": lambda: open("stolen", "w").write("x"),
    "low": lambda: os.open("/etc/passwd", 0), "remove": lambda: os.remove(__file__),
    "system": lambda: os.system("touch stolen"), "spawn": lambda: subprocess.run(["true"]),
    "fork": lambda: os.fork(), "exec": lambda: os.execv("/bin/true", ["true"]),
    "socket": lambda: socket.socket(), "name": lambda: socket.getaddrinfo("localhost", 80),
    "eval": lambda: eval("1+1"), "run": lambda: exec("x = 1"),
    "compile": lambda: compile("1+1", "<model>", "eval"), "ctypes": lambda: ctypes.CDLL(None),
    "sympify": lambda: sympy.sympify("__import__('os')"),
    "lambdify": lambda: sympy.lambdify([sympy.Symbol("x")], "x"),
    "names": lambda: sympy.Symbol("x") + sympy.sympify("y"), "none": lambda: None}
def judge(name, golds):
    try:
        ATTACKS[name]()
    except PermissionError:
        return "ok"
    return "value"
"""


def test_no_file_process_network_or_eval_can_be_reached_from_an_answer(tmp_path, monkeypatch):
    """Whatever code an answer might get a worker to run: the attacks stand in for the judge."""
    (tmp_path / "attacker.py").write_text(ATTACKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(maths, "JUDGE", Judge("attacker", "judge", "sympy"))
    rows = [maths_row("1", f"\\boxed{{{name}}}", id=name)
            for name in re.findall(r'"(\w+)": lambda', ATTACKER)]
    new = run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl", "--workers", "1")
    reasons = {one["id"]: one["reason"] for one in new}
    assert len(reasons) == 18 and reasons.pop("none") == "value"
    for name in ("sympify", "lambdify", "names"):  # these may fail before
        assert reasons.pop(name) in ("ok", "parse")
    assert set(reasons.values()) == {"ok"} and not (ROOT / "stolen").exists()


def test_math_verifys_numbers_do_not_go_through_eval():
    """math-verify hands number texts to SymPy's sympify, and that to eval."""
    pytest.importorskip("sympy")
    from data.values import read_number

    assert read_number("27") == 27 and read_number("27.5") == 27.5
    for text in ("__import__('os')", "1+1", "x", "9**9"):
        with pytest.raises(ValueError):
            read_number(text)


def test_a_worker_that_cannot_start_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "math_verify.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    source = write(tmp_path / "r.jsonl", [maths_row("5", r"\boxed{5}")])
    assert "is math-verify installed?" in refused(capsys, source, "--out", tmp_path / "s.jsonl",
                                                  "--workers", "1")


# ---- Rows in and out -----------------------------------------------------------------------------
def test_rows_pass_in_order_and_other_fields_untouched(tmp_path):
    """Bytes too: the new fields stand at the end of the old line; scored again, they are replaced.
    A worked-out `solution` of other tasks is the data's own; tags of a prompt are no answer."""
    names = [("b", 3, "1+2"), ("a", 0, "2-1"), ("b", 1, ""), ("../../x", 0, "1+2"), ("a/b", 0, "?")]
    rows = [row(id=name, sample=sample, note={"x": [1.50, "\u00e9\u2028"]}, completion=completion,
                prompt="e.g. <answer>1+2</answer>") for name, sample, completion in names]
    rows.append(maths_row("5", "no box", solution="add 2 and 3"))
    source = tmp_path / "r.jsonl"
    lines = [json.dumps(one, ensure_ascii=bool(i % 2), separators=(",", ": "))
             for i, one in enumerate(rows)]
    source.write_bytes(b"\xef\xbb\xbf" + "\r\n\r\n".join(lines).encode() + b" ")
    new = run(source, tmp_path / "s.jsonl")
    assert [{key: one[key] for key in old} for old, one in zip(rows, new, strict=True)] == rows
    assert [one["reward"] for one in new] == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert [one["solution"] for one in new[:2]] == ["1+2", None]
    written = (tmp_path / "s.jsonl").read_text(encoding="utf-8").split("\n")
    assert all(line.startswith(old[:-1]) for old, line in zip(lines, written))
    stale = [{**one, "correct": "x", "reason": None, "pred": 1, "reward": 7} for one in new]
    assert run(write(tmp_path / "stale.jsonl", stale), tmp_path / "t.jsonl") == new


def test_what_is_shown_cannot_speak_to_the_terminal(tmp_path, capsys):
    """And the histogram has every reason."""
    texts = ["\x1b]0;x\x07\u202e<answer>1+2</answer>", "", "?", "1+1", "2-1"]
    rows = [row(id="\x1b[2J", sample=i, completion=text) for i, text in enumerate(texts)]
    rows.append(row(id="\x1b[2J", sample=5, finish_reason="length"))
    run(write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl", "--show", "2")
    out = capsys.readouterr().out
    assert "6 rows, 16.7% correct" in out and out.count("sample ") == 2 and "'1+2'" in out
    assert out.replace("\n", "").isprintable()
    last = [line.split()[:2] for line in out.splitlines()[-len(score.REASONS):]]
    counts = {reason: int(count) for reason, count in last}
    assert counts == {**dict.fromkeys(score.REASONS, 1), "timeout": 0}
    assert meta_of(tmp_path / "s.jsonl")["reasons"] == counts


def test_show_spreads_over_the_reasons_and_writes_nothing_of_a_scored_file(tmp_path, capsys):
    rows = [row(sample=i, completion=text, logprobs=[-0.5, -1.5], prompt_ids=[1])
            for i, text in enumerate(["1+2", "2+1", "?", "so\n1-2", "2-1", "1*2", "2*1"])]
    source = write(tmp_path / "r.jsonl", rows)
    run(source, tmp_path / "s.jsonl")
    odd = [{"id": "x", "correct": True, "reason": "ok", "logprobs": logprobs, "task": task}
           for logprobs, task in ((None, None), (["a", None], ["math"]), (3, {}))]
    other = write(tmp_path / "odd.jsonl", odd)  # of another program
    capsys.readouterr()
    before = sorted(os.listdir(tmp_path))

    def shown(path, *flags):
        stage(score, path, "--show", *flags)
        return capsys.readouterr().out

    out = shown(tmp_path / "s.jsonl", "4")
    assert re.findall(r"sample (\d)", out) == ["0", "2", "4", "1"]  # ok, parse, value, and again
    assert out.startswith(
        "a sample 0: 'numbers': [1, 2], 'target': 3\n  prompt      1 2=3:\n  completion  1+2\n"
        "  answer '1+2': ok, reward 1.0, log-prob a token -1.000\n")
    out = shown(tmp_path / "s.jsonl", "2", "--reason", "value")
    assert re.findall(r"sample (\d)", out) == ["4", "5"]
    assert shown(tmp_path / "s.jsonl", "2", "--reason", "timeout") == ""
    assert shown(other, "9").count("x sample None: ") == 3
    assert sorted(os.listdir(tmp_path)) == before
    err = refused(capsys, source, "--show", 1)
    assert "r.jsonl:1: missing field 'correct'; run score.py first" in err


@pytest.mark.parametrize("change, message", [
    ({"task": None}, ":1: field 'task' must be one of"), ({"numbers": "12"}, ":1: field 'numbers'"),
    ({"target": ...}, ":1: missing field 'target'"), ({"task": ...}, ":1: missing field 'task'"),
    ({"prompt": ...}, ":1: needs either 'prompt' or 'messages'"), ({"id": 3}, ":1: field 'id'"),
    ({"task": "math"}, ":1: missing field 'answer'"), ({"id": "b"}, ":2: duplicate id 'b'"),
    ({"task": "math", "answer": ""}, ":1: field 'answer'"), ({}, ": 2 problems, fewer than 3")])
def test_problems_are_checked_before_anything_is_sampled(tmp_path, capsys, change, message):
    problem = {"id": "a", "task": "countdown", "prompt": "1 2=3:", "numbers": [1, 2], "target": 3}
    problem = {key: value for key, value in {**problem, **change}.items() if value is not ...}
    other = {"id": "b", "task": "gym", "messages": [{"role": "user", "content": "x"}], "gym": "x",
             "entry": {}}
    source = write(tmp_path / "p.jsonl", [problem, other])
    if not change:
        stage(score, source, "--check-problems", 2)
    least = [] if change else [3]
    assert f"{source}{message}" in refused(capsys, source, "--check-problems", *least)
    assert os.listdir(tmp_path) == ["p.jsonl"]


@pytest.mark.parametrize("flags", ["--workers 0", "--timeout 0", "--timeout nan", "--timeout -1",
                                   "--show -1", "--reason ok", "--check-problems"])
def test_wrong_flags(capsys, flags):
    assert "(see --help)" in refused(capsys, "r.jsonl", "--out", "s.jsonl", *flags.split())


def test_the_meta_passes_the_sampling_on_and_other_flags_are_refused(tmp_path, capsys):
    sampling = {"temperature": 0.7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}
    source, out = write(tmp_path / "r.jsonl", [row()]), tmp_path / "s.jsonl"
    run(source, tmp_path / "without.jsonl")
    assert meta_of(tmp_path / "without.jsonl")["sampling"] is None
    meta = write(tmp_path / "r.jsonl.meta.json", [{"sampling": sampling}])
    run(source, out)
    assert meta_of(out)["sampling"] == sampling
    before = os.stat(out)
    run(source, out, "--workers", "7", "--show", "1")
    assert "complete, left alone" in capsys.readouterr().err
    assert "made with other timeout" in refused(capsys, source, "--out", out, "--timeout", "3")
    write(tmp_path / "r.jsonl", [row(completion="2-1")])
    assert "made with other inputs" in refused(capsys, source, "--out", out)
    assert os.stat(out) == before
    meta.write_text("{")
    assert f"{meta}: not a valid meta" in refused(capsys, source, "--out", tmp_path / "t.jsonl")


# ---- Faults --------------------------------------------------------------------------------------
def until(condition):
    end = time.monotonic() + 60
    while not (value := condition()):
        assert time.monotonic() < end
        time.sleep(0.02)
    return value


@pytest.mark.parametrize("kill, code", [
    (signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_killed_while_workers_are_busy(stand_in, tmp_path, kill, code):
    """No worker keeps the lock or outlives its answer's time; the same command then ends as if
    nothing was."""
    rows = [row(sample=i) for i in range(50)] + [maths_row("5", r"\boxed{hang}", id="bomb"),
                                                 maths_row("5", r"\boxed{5}", id="good")]
    source, out = write(tmp_path / "r.jsonl", rows), tmp_path / "s.jsonl"
    program = ("import sys; sys.argv[0] = 'score.py'; import score; "
               "from data import maths, sandbox; "
               "maths.JUDGE = sandbox.Judge('stand_in', 'judge', ''); "
               "score.run(score.main, score.parse_args())")
    process = subprocess.Popen([sys.executable, "-c", program, source, "--out", str(out),
                                "--timeout", "2", "--workers", "2"], cwd=ROOT, text=True,
                               stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    children = pathlib.Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = until(lambda: len(found := children.read_text().split()) == 2 and found)
    os.kill(process.pid, kill)
    err = process.communicate()[1]
    assert process.returncode == code and err.count("\n") == (kill != signal.SIGKILL)
    assert not out.exists()

    def unlocked():
        with open(f"{out}.partial", "a") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True

    until(unlocked)  # a worker that was just forked shares the lock until it is executed
    new = run(source, out, "--timeout", "2", "--workers", "1")
    assert collections.Counter(one["reason"] for one in new) == {"ok": 51, "timeout": 1}
    until(lambda: all(crash.state(worker) in "ZX" for worker in workers))
