"""data/maths.py: every field spelling of the Hub's maths sets becomes the contract's rows."""
import json
import os
import pathlib
import subprocess
import sys

import pytest

import score
from data import latex, maths

ROOT = pathlib.Path(score.__file__).parent
SAMPLES = ROOT / "tests/maths_samples"


def convert(source, out, *flags):
    maths.main(maths.parse_args(["--input", str(source), "--out", str(out), *flags]))
    return [json.loads(line) for line in open(out, encoding="utf-8")]


def refused(capsys, source, out, *flags):
    with pytest.raises(SystemExit) as end:
        maths.main(maths.parse_args(["--input", str(source), "--out", str(out), *flags]))
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("maths.py: error: ")
    assert not os.path.exists(out)
    return err


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


EXPECTED = {  # file: [(id, answer, extra fields)]; None for an id made of a digest
    "math": [(None, "7", {}), (None, r"\frac{1}{8}", {}), (None, "9", {})],
    "math500": [("test/geometry/1.json", "(3,5)", {}), ("test/algebra/2.json", r"5\sqrt{2}", {})],
    "aime24_h4": [("aime24_h4-60", "037", {})],
    "aime24_upper": [("2024-I-99", "24", {})],
    "aime24_boxed": [("aime24_boxed-0", "204", {})],
    "aime25_idx": [("aime25_idx-1", "36", {})],
    "aime25_question": [(None, "343", {})],
    "amc23": [("amc23-0", "27.0", {}), ("amc23-1", "4.5", {})],
    "olympiadbench": [("olympiadbench-1700", ["(1,2)", "(2,1)"], {}),
                      ("olympiadbench-1701", "1.41", {"unit": r"\mathrm{~cm}", "error": "1e-2"}),
                      ("olympiadbench-1702", ["0.5", "2.5"], {"error": ["1e-1", "1e-2"]})],
    "dapo": [("9a9b6eb4-a1cb-49d1-8c1e-62eaf2f74079", "34", {}), ("dapo-7", "-11", {})],
    "gsm8k": [(None, "1,234", {})],
}


def test_every_sample_is_expected():
    assert {path.stem for path in SAMPLES.glob("*.jsonl")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_every_spelling(tmp_path, name, form):
    source = SAMPLES / f"{name}.jsonl"
    if form == "parquet":
        pyarrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        rows = [json.loads(line) for line in open(source, encoding="utf-8")]
        if name in ("amc23", "dapo"):
            rows = rows[:1]  # a column has one type there
        source = tmp_path / f"{name}.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    new = convert(source, tmp_path / "out.jsonl", "--template", "plain")
    for row, (name_of_row, answer, extras) in zip(new, EXPECTED[name][:len(new)], strict=True):
        assert row.pop("id").startswith(f"{name}-") if name_of_row is None else row.pop("id") == name_of_row
        prompt = row.pop("prompt")
        assert prompt.endswith("\nPlease reason step by step, and put your final answer within \\boxed{}.\n")
        assert "Answer:" not in prompt and len(prompt) > 85
        assert row == {"task": "math", "answer": answer, "source": name, **extras}
    assert json.load(open(tmp_path / "out.jsonl.meta.json"))["flags"]["template"] == "plain"


def test_the_golds_are_what_score_takes(tmp_path):
    """Each gold, boxed, is a right answer to its own row."""
    rows, rollouts = [], []
    for name in sorted(EXPECTED):
        rows += convert(SAMPLES / f"{name}.jsonl", tmp_path / f"{name}.jsonl")
    for row in rows:
        answer = row["answer"] if isinstance(row["answer"], str) else ", ".join(reversed(row["answer"]))
        rollouts.append({**row, "sample": 0, "completion": f"It is \\boxed{{{answer}}}.", "finish_reason": "stop"})
    source, out = write(tmp_path / "r.jsonl", *rollouts), tmp_path / "s.jsonl"
    score.main(score.parse_args([str(source), "--out", str(out), "--timeout", "60"]))
    assert [row["id"] for row in map(json.loads, open(out)) if not row["correct"]] == []
    assert len(rows) == sum(map(len, EXPECTED.values()))


def test_templates(tmp_path):
    source = write(tmp_path / "in.jsonl", {"id": "a", "problem": "What is 1+1?", "answer": "2"})
    instruction = maths.INSTRUCTION
    user = {"role": "user", "content": f"What is 1+1?\n\n{instruction}"}
    for number, (flags, put) in enumerate([
        ([], {"messages": [{"role": "system", "content": instruction}, {"role": "user", "content": "What is 1+1?"}]}),
        (["--template", "chat"], {"messages": [user]}),
        (["--template", "chat", "--system", "Be brief."],
         {"messages": [{"role": "system", "content": "Be brief."}, user]}),
        (["--template", "plain", "--source", "mine"], {"prompt": f"What is 1+1?\n{instruction}\n"})]):
        row = {"id": "a", "task": "math", **put, "answer": "2", "source": "mine" if "mine" in flags else "in"}
        assert convert(source, tmp_path / f"{number}.jsonl", *flags) == [row]


def test_ids_are_stable_texts(tmp_path):
    """They depend on the row alone, not on its place; whatever they hold, no file is named by them."""
    rows = [{"problem": "p", "answer": 1}, {"problem": "q", "answer": 2},
            {"id": "../../x", "problem": "r", "answer": 3},
            {"id": "5", "problem": "s", "answer": 4}, {"id": "", "problem": "t", "answer": 5}]
    one = convert(write(tmp_path / "in.jsonl", *rows), tmp_path / "one.jsonl")
    two = convert(write(tmp_path / "in.jsonl", *rows[::-1]), tmp_path / "two.jsonl")
    assert one == two[::-1] and [row["id"] for row in one][2:4] == ["../../x", "in-5"]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "one.jsonl", "one.jsonl.meta.json", "two.jsonl",
                                            "two.jsonl.meta.json"]


def test_long_problems_are_left_out_counted_and_told(tmp_path, capsys):
    rows = [{"id": i, "problem": "p" * i, "answer": i} for i in (1, 5, 6, 100)]
    source = write(tmp_path / "in.jsonl", *rows)
    assert [row["answer"] for row in convert(source, tmp_path / "out.jsonl", "--max-chars", "5")] == ["1", "5"]
    assert "2 problems; 2 longer ones left out" in capsys.readouterr().out
    source = write(tmp_path / "long.jsonl", rows[3])
    assert "no problem has at most 5 characters" in refused(capsys, source, tmp_path / "none.jsonl", "--max-chars", "5")
    assert "--max-chars must be" in refused(capsys, source, tmp_path / "none.jsonl", "--max-chars", "0")


def test_duplicates_are_errors_unless_the_first_is_kept(tmp_path, capsys):
    rows = [{"id": 1, "problem": "p", "answer": 1}, {"id": 2, "problem": "q", "answer": 2},
            {"id": 1, "problem": "r", "answer": 3}]
    source = write(tmp_path / "in.jsonl", *rows)
    err = refused(capsys, source, tmp_path / "out.jsonl")
    assert "in.jsonl:3: id 'in-1' stands twice" in err and "in.jsonl:1" in err
    assert [row["answer"] for row in convert(source, tmp_path / "kept.jsonl", "--keep-first")] == ["1", "2"]


@pytest.mark.parametrize("row, told", [
    ({"problem": "p"}, "no gold"), ({"problem": "p", "answer": ""}, "no gold"),
    ({"problem": "p", "answer": " $ $ "}, "no gold"),
    ({"problem": "p", "answer": None, "solution": "none boxed"}, "no gold"),
    ({"problem": "p", "answer": True}, "no gold"),
    ({"problem": "p", "final_answer": []}, "no gold"), ({"problem": "p", "final_answer": ["1", ""]}, "no gold"),
    ({"problem": "p", "final_answer": ["1,"], "is_multiple_answer": True}, "no gold"),
    ({"problem": "p", "answer": {"a": 1}}, "no gold"),
    ({"problem": "p", "answer": "####"}, "no gold"), ({"problem": "p", "solution": "\\boxed{"}, "no gold"),
    ({"answer": "1"}, "no problem text"), ({"problem": " ", "answer": "1"}, "no problem text"),
    ({"problem": 3, "answer": "1"}, "no problem text"),
    ({"prompt": [{"role": "system", "content": "s"}], "answer": "1"}, "no problem text"),
    ({"prompt": ["x"], "answer": "1"}, "no problem text"),
    ({"problem": "p", "answer": "1", "error": "wide"}, "field 'error'"),
    ({"problem": "p", "answer": "1", "error": -1}, "field 'error'"),
    ({"problem": "p", "answer": "1", "error": {}}, "field 'error'"),
    ({"problem": "p", "answer": "1", "unit": 3}, "field 'unit'")])
def test_a_row_that_cannot_be_used_is_one_line(tmp_path, capsys, row, told):
    source = write(tmp_path / "in.jsonl", {"id": 0, "problem": "fine", "answer": "1"}, row)
    assert f"in.jsonl:2: {told}" in refused(capsys, source, tmp_path / "out.jsonl")


def test_files_that_cannot_be_read(tmp_path, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"[\n")
    assert "in.jsonl:1: not a valid JSON row" in refused(capsys, tmp_path / "in.jsonl", tmp_path / "out.jsonl")
    pytest.importorskip("pyarrow")
    (tmp_path / "in.parquet").write_bytes(b"PAR1 not at all")
    assert "in.parquet: not a valid Parquet file" in refused(capsys, tmp_path / "in.parquet", tmp_path / "other.jsonl")


def test_without_pyarrow_one_line_says_so(tmp_path):
    (tmp_path / "pyarrow.py").write_text("raise ImportError")
    (tmp_path / "in.parquet").write_bytes(b"PAR1")
    done = subprocess.run([sys.executable, "-m", "data.maths", "--input", str(tmp_path / "in.parquet"), "--out",
                           str(tmp_path / "out.jsonl")],
                          cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 2 and "needs pyarrow" in done.stderr and done.stderr.count("\n") == 1


def test_the_file_shadows_nothing():
    """Scripts in data/ have that folder first on their path: a file math.py there would hide the standard library's."""
    assert not {path.stem for path in (ROOT / "data").glob("*.py")} & set(sys.stdlib_module_names)


def test_system_goes_with_chat_alone(tmp_path, capsys):
    assert "--system" in refused(capsys, tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--system", "x")


def test_another_run_of_the_same_leaves_it_alone(tmp_path, capsys):
    source = write(tmp_path / "in.jsonl", {"id": 0, "problem": "p", "answer": "1"})
    convert(source, tmp_path / "out.jsonl")
    convert(source, tmp_path / "out.jsonl")
    assert "complete, left alone" in capsys.readouterr().err


@pytest.mark.parametrize("asks, pattern", [step[:2] for step in latex.STEPS])
def test_every_normalisation_is_asked_for(monkeypatch, asks, pattern):
    """The LaTeX beside a step is spelled otherwise without it."""
    whole = latex.normal(asks)
    assert latex.normal(whole) == whole, "its form is final"
    without = [step for step in latex.COMPILED if step[0].pattern != pattern]
    monkeypatch.setattr(latex, "COMPILED", without)
    assert len(without) == len(latex.STEPS) - 1 and latex.normal(asks) != whole
