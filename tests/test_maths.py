"""data/maths.py: every field spelling of the Hub's maths sets becomes the contract's rows; and
numbers are equal exactly where exact arithmetic says so."""
import math
import pathlib
import sys
from fractions import Fraction

import pytest
from hypothesis import Phase, assume, example, given, settings, strategies

from conftest import meta_of, read, refusal, stage, write
from data import latex, maths
from test_score import NO_GOLDS

SAMPLES = pathlib.Path(__file__).parent / "maths_samples"


def convert(source, out, *flags):
    stage(maths, "--input", source, "--out", out, *flags)
    return read(out)


def refused(capsys, source, *flags):
    """The one line of a conversion that ends with exit code 2 and without an output."""
    out = source.parent / "refused.jsonl"
    line = refusal(capsys, stage, maths, "--input", source, "--out", out, *flags)
    assert line.startswith("maths.py: error: ") and not out.exists()
    return line


@pytest.fixture(scope="module")
def judge():
    """The verdict in this process, with math-verify's own functions put back afterwards."""
    pytest.importorskip("math_verify")
    import sympy.parsing.sympy_parser
    from math_verify import grader
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((sympy.parsing.sympy_parser, "parse_expr"),
                            (grader, "sympy_numeric_eq"), (grader, "sympy_symbolic_eq")):
            patch.setattr(owner, name, getattr(owner, name))
        maths.prepare()
        yield lambda gold, pred, error=None: maths.judge(pred, [(gold, "", error)]) == "ok"


# ---- Benchmarks ----------------------------------------------------------------------------------
EXPECTED = {  # file: [(id, answer, extra fields)]; None for an id made of a digest
    "math": [(None, "7", {}), (None, r"\frac{1}{8}", {}), (None, "9", {})],
    "math500": [("test/geometry/1.json", "(3,5)", {}), ("test/algebra/2.json", r"5\sqrt{2}", {})],
    "aime24_h4": [("aime24_h4-60", "037", {})], "aime24_upper": [("2024-I-99", "24", {})],
    "aime24_boxed": [("aime24_boxed-0", "204", {})], "aime25_idx": [("aime25_idx-1", "36", {})],
    "aime25_question": [(None, "343", {})], "gsm8k": [(None, "1,234", {})],
    "amc23": [("amc23-0", "27.0", {}), ("amc23-1", "4.5", {})],
    "olympiadbench": [("olympiadbench-1700", ["(1,2)", "(2,1)"], {}),
                      ("olympiadbench-1701", "1.41", {"unit": r"\mathrm{~cm}", "error": "1e-2"}),
                      ("olympiadbench-1702", ["0.5", "2.5"], {"error": ["1e-1", "1e-2"]})],
    "dapo": [("9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "34", {}), ("dapo-7", "-11", {})]}


@pytest.mark.parametrize("name", sorted(path.stem for path in SAMPLES.glob("*.jsonl")))
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_spelling(tmp_path, judge, name, form):
    """Each gold, boxed, is a right answer to its own row."""
    source = SAMPLES / f"{name}.jsonl"
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        from pyarrow import parquet
        rows = read(source)
        if name in ("amc23", "dapo"):
            rows = rows[:1]  # a column has one type there
        source = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    new = convert(source, tmp_path / "out.jsonl", "--template", "plain")
    for row, (name_of_row, answer, extras) in zip(new, EXPECTED[name][:len(new)], strict=True):
        id_of_row, prompt = row.pop("id"), row.pop("prompt")
        assert id_of_row == name_of_row or name_of_row is None and id_of_row.startswith(f"{name}-")
        assert prompt.endswith("\nPlease reason step by step, and put your final answer within "
                               "\\boxed{}.\n")
        assert "Answer:" not in prompt and len(prompt) > 85
        assert row == {"task": "math", "answer": answer, "source": name, **extras}
        boxed = answer if isinstance(answer, str) else ", ".join(reversed(answer))
        row = maths.Row("m", 0, "", "stop", answer, **extras)
        assert maths.judge(*maths.verify(f"It is \\boxed{{{boxed}}}.", row).arguments) == "ok"


def test_templates(tmp_path):
    source = write(tmp_path / "in.jsonl", [{"id": "a", "problem": "What is 1+1?", "answer": "2"}])
    instruction = maths.INSTRUCTION
    user = {"role": "user", "content": f"What is 1+1?\n\n{instruction}"}
    for number, (flags, put) in enumerate([
        ([], {"messages": [{"role": "system", "content": instruction},
                           {"role": "user", "content": "What is 1+1?"}]}),
        (["--template", "chat"], {"messages": [user]}),
        (["--template", "chat", "--system", "Be brief."],
         {"messages": [{"role": "system", "content": "Be brief."}, user]}),
        (["--template", "plain", "--source", "mine"],
         {"prompt": f"What is 1+1?\n{instruction}\n"})]):
        row = {"id": "a", "task": "math", **put, "answer": "2",
               "source": "mine" if "mine" in flags else "in"}
        assert convert(source, tmp_path / f"{number}.jsonl", *flags) == [row]


def test_ids_are_stable_texts(tmp_path, capsys):
    """They depend on the row alone, not on its place; another run leaves the file alone."""
    rows = [{"problem": "p", "answer": 1}, {"problem": "q", "answer": 2},
            {"id": "../../x", "problem": "r", "answer": 3},
            {"id": "5", "problem": "s", "answer": 4}, {"id": "", "problem": "t", "answer": 5}]
    one = convert(write(tmp_path / "in.jsonl", rows), tmp_path / "one.jsonl")
    assert one == convert(tmp_path / "in.jsonl", tmp_path / "one.jsonl")
    assert "complete, left alone" in capsys.readouterr().err
    two = convert(write(tmp_path / "in.jsonl", rows[::-1]), tmp_path / "two.jsonl")
    assert one == two[::-1] and [row["id"] for row in one][2:4] == ["../../x", "in-5"]


def test_long_problems_are_left_out_and_counted(tmp_path, capsys):
    rows = [{"id": i, "problem": "p" * i, "answer": i} for i in (1, 5, 6, 100)]
    source = write(tmp_path / "in.jsonl", rows)
    new = convert(source, tmp_path / "out.jsonl", "--max-chars", "5")
    assert [row["answer"] for row in new] == ["1", "5"]
    assert "2 problems; 2 longer ones left out" in capsys.readouterr().out
    source = write(tmp_path / "long.jsonl", rows[3:])
    assert "no problem is left" in refused(capsys, source, "--max-chars", "5")


def test_duplicates_are_errors_unless_the_first_is_kept(tmp_path, capsys):
    rows = [{"id": id, "problem": "p", "answer": answer} for id, answer in ((1, 1), (2, 2), (1, 3))]
    source = write(tmp_path / "in.jsonl", rows)
    err = refused(capsys, source)
    assert "in.jsonl:3: id 'in-1' is repeated" in err and "in.jsonl:1" in err
    new = convert(source, tmp_path / "kept.jsonl", "--keep-first")
    assert [row["answer"] for row in new] == ["1", "2"]


BAD = [({"problem": "p", **row}, message) for row, message in [
    *(({"answer": answer}, "no gold") for answer in NO_GOLDS["answer"]),
    *(({"answer": "1", field: value}, f"field '{field}'")
      for field, value in (("unit", 3), ("error", "wide"), ("error", -1), ("error", {}))),
    ({}, "no gold"), ({"answer": " $ $ "}, "no gold"), ({"answer": "####"}, "no gold"),
    ({"answer": None, "solution": "none boxed"}, "no gold"), ({"final_answer": []}, "no gold"),
    ({"answer": "", "solution": "\\boxed{}"}, "no gold"), ({"solution": "\\boxed{"}, "no gold"),
    ({"final_answer": ["1", ""]}, "no gold"), ({"answer": "proof"}, "no gold: 'proof' is no"),
    ({"final_answer": ["1,"], "is_multiple_answer": True}, "no gold"),
    ({"answer": ["1", "N/A"]}, "no gold: 'N/A' is no answer"),
    ({"answer": None, "solution": "\\boxed{\\text{None}}"}, "no gold: "),
]] + [({"answer": "1", **row}, message) for row, message in [
    ({}, "no problem text"), ({"problem": " "}, "no problem text"),
    ({"problem": 3}, "no problem text"), ({"prompt": ["x"]}, "no problem text"),
    ({"prompt": [{"role": "system", "content": "s"}]}, "no problem text"),
    ({"prompt": [{"role": "user", "content": None}]}, "a turn's content must be"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "a turn's content must be")]]


def test_a_row_that_cannot_be_used_is_one_line_or_skipped_and_counted(tmp_path, capsys):
    good = [{"problem": "fine", "answer": "1"}, {"problem": "fine, too", "answer": "2"}]
    for number, (row, message) in enumerate(BAD):
        source = write(tmp_path / "in.jsonl", [good[0], row])
        assert f"in.jsonl:2: {message}" in refused(capsys, source), row
        (tmp_path / "refused.jsonl.partial").unlink()
    bad = [row for row, _ in BAD]
    source, out = write(tmp_path / "in.jsonl", [good[0], *bad, good[1]]), tmp_path / "out.jsonl"
    assert [row["answer"] for row in convert(source, out, "--skip-bad")] == ["1", "2"]
    summary = capsys.readouterr().out
    assert f"2 problems; {len(bad)} bad ones left out, the first is {source}:2: no gold" in summary
    meta = meta_of(out)
    assert meta["rows"] == 2 and meta["bad"] == len(bad) and ":2: no gold" in meta["first_bad"]
    source = write(tmp_path / "all_bad.jsonl", bad)
    assert "no problem is left" in refused(capsys, source, "--skip-bad")


@pytest.mark.parametrize("row, problem, answer", [
    *(({"problem": "p", **row}, "p", answer) for row, answer in [
        ({"answer": "", "solution": "so \\boxed{5}"}, "5"), ({"answer": '["34"]'}, "34"),
        ({"answer": float("nan"), "Answer": 5}, "5"), ({"answer": "[1, 2]"}, "[1, 2]"),
        ({"answer": None, "solution": "\\boxed{5}, as \\boxed{} asks"}, "5"),
        ({"answer": '["34", 35]'}, ["34", "35"]), ({"answer": "['1', '2']"}, ["1", "2"]),
        ({"answer": '["7 \\\\text{ cm}"]'}, "7 \\text{ cm}"),
        ({"answer": "['1' '2',]"}, ["1", "2"]),
        ({"answer": '["x", 1e-05, -2]'}, ["x", "0.00001", "-2"]),
        ({"answer": "[[1, 2], [3, 4]]"}, "[[1, 2], [3, 4]]"),
        ({"reward_model": {"ground_truth": '["34"]'}}, "34"),
        ({"answer": "5", "unit": None, "error": [None]}, "5")]),
    ({"problem": "", "question": "q", "final_answer": [], "answer": "5"}, "q", "5"),
    *(({**row, "answer": "5"}, problem, "5") for row, problem in [
        ({"prompt": [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]}, "p"),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "p", "image": None},
                                                  {"type": "text", "text": "q"}]}]}, "p\nq"),
        ({"problem": None, "conversations": None,
          "messages": [{"from": "human", "value": "p"}]}, "p")])])
def test_columns_as_data_sets_have_them(row, problem, answer):
    """Empty and null fields, lists in a text, turns whose content is a list of parts."""
    args = maths.parse_args(["--input", "in.jsonl", "--out", "o.jsonl", "--template", "plain"])
    new = maths.convert(row, args)
    assert new["prompt"].startswith(f"{problem}\nPlease") and new["answer"] == answer
    assert not new.keys() & {"unit", "error"}


def test_files_and_flags_that_cannot_be_used(tmp_path, capsys, monkeypatch):
    source = tmp_path / "in.jsonl"
    assert "--max-chars must be" in refused(capsys, source, "--max-chars", "0")
    assert "--system" in refused(capsys, source, "--system", "x")
    parquet = tmp_path / "in.parquet"
    parquet.write_bytes(b"PAR1 not at all")
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "pyarrow", None)
        assert "needs pyarrow" in refused(capsys, parquet)
    (tmp_path / "refused.jsonl.partial").unlink()
    pytest.importorskip("pyarrow")
    assert "in.parquet: not a valid Parquet file" in refused(capsys, parquet)


# ---- Numbers -------------------------------------------------------------------------------------
# Exact values: (sign, rational, factors of primes, factorials and powers with their exponents),
# where the value is sign * product of base**exponent; a root is an exponent of 1/2 or 1/3.
POWERS = strategies.lists(
    strategies.tuples(strategies.sampled_from([2, 3, 5, 7, 10, "12!", "30!"]),
                      strategies.sampled_from([
                          *map(Fraction, (1, 2, -1, -3, 23, -70, 99, -365, -2024)),
                          Fraction(1, 2), Fraction(-1, 2), Fraction(1, 3), Fraction(-7, 3)])),
    min_size=1, max_size=3, unique_by=lambda power: power[0])
SIGNED = strategies.tuples(strategies.sampled_from([1, -1]), strategies.integers(1, 10**6),
                           strategies.integers(1, 10**6), POWERS)


def exactly(value):
    """(sign, the value to the sixth): equal exactly where the values are equal."""
    sign, up, down, powers = value
    sixth = Fraction(up, down)**6
    for base, power in powers:
        base = math.factorial(int(base[:-1])) if isinstance(base, str) else base
        sixth *= Fraction(base)**int(6 * power)
    return sign, sixth


def product_of_powers(value):
    """One spelling: -\\frac{3}{4} \\cdot 2^{-70} \\cdot 30!^{\\frac{1}{2}}"""
    sign, up, down, powers = value
    texts = [rf"\frac{{{up}}}{{{down}}}"]
    for base, power in powers:
        base = f"({base})" if isinstance(base, str) else base
        texts.append(f"{base}^{{{power}}}")
    return "-" * (sign < 0) + r" \cdot ".join(texts)


def one_fraction(value):
    """Another: everything above or below one line, powers as roots, factors in another order."""
    sign, up, down, powers = value
    lines = [str(up)], [str(down)]
    for base, power in powers[::-1]:
        root, base = power.denominator, f"({base})" if isinstance(base, str) else base
        text = f"{base}^{{{abs(power.numerator)}}}"
        text = {1: "", 2: r"\sqrt", 3: r"\sqrt[3]"}[root] + ("{%s}" % text if root > 1 else text)
        lines[power < 0].insert(0, text)
    above, below = (r" \cdot ".join(line) for line in lines)
    return "-" * (sign < 0) + rf"\frac{{{above}}}{{{below}}}"


def changed(value, what):
    """The value with its sign, a digit or an exponent changed."""
    sign, up, down, powers = value
    (base, power), *rest = powers
    return {"sign": (-sign, up, down, powers), "digit": (sign, up + 1, down, powers),
            "last": (sign, up, down + 10, powers),
            "exponent": (sign, up, down, [(base, power + 1), *rest]),
            "turned": (sign, up, down, [(base, -power), *rest])}[what]


@settings(deadline=None, max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(SIGNED, strategies.sampled_from(["sign", "digit", "last", "exponent", "turned"]))
@example((1, 1, 1, [(2, Fraction(-2024))]), "sign")
@example((1, 1, 1, [("365!", Fraction(-99))]), "exponent")
@example((1, 10**6 - 1, 10**6, [(10, Fraction(-365))]), "digit")
@example((1, 1, 1, [(2, Fraction(-1, 2))]), "turned")
def test_numbers_are_equal_exactly_where_exact_arithmetic_says_so(judge, value, what):
    other = changed(value, what)
    assume(exactly(other) != exactly(value))
    assert judge(product_of_powers(value), one_fraction(value))
    assert not judge(product_of_powers(value), one_fraction(other))
    assert not judge(f"(0, {product_of_powers(value)}, 1)", f"(0, {one_fraction(other)}, 1)")


@pytest.mark.parametrize("digits, exponent, error", [
    (3, 0, 1), (999, 300, 9), (1, -300, 9), (7, -12, 2), (7, 400, 1), (7, -400, 1)])
def test_an_error_is_relative_to_nothing(judge, digits, exponent, error):
    """|answer - gold| <= error, whatever their size."""
    gold, size = rf"{digits} \cdot 10^{{{exponent}}}", 10.0**max(-300, min(300, exponent))
    answer = rf"{digits + error} \cdot 10^{{{exponent}}}"
    if -300 <= exponent <= 300:
        assert judge(gold, answer, error * size)
    assert not judge(gold, answer, error * size * 0.99 if abs(exponent) <= 300 else 0.0)


def test_what_cannot_be_told_apart_by_float_or_chop(judge):
    assert not judge(r"\sqrt{10^{400}+1}", "10^{200}") and judge(r"\sqrt{10^{400}}", "10^{200}")
    assert not judge(r"10000!", "10000!+1") and judge(r"\sin^2(1)+\cos^2(1)", "1")


@pytest.mark.parametrize("asks, pattern", [step[:2] for step in latex.STEPS])
def test_every_normalisation_is_asked_for(monkeypatch, asks, pattern):
    """The LaTeX beside a step is spelled otherwise without it."""
    whole = latex.normal(asks)
    assert latex.normal(whole) == whole, "its form is final"
    others = [step for step in latex.COMPILED if step[0].pattern != pattern]
    monkeypatch.setattr(latex, "COMPILED", others)
    assert len(others) == len(latex.STEPS) - 1 and latex.normal(asks) != whole
