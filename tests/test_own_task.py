"""data/README.md's "your own task in five minutes", done as it says: one file, one line in
score.py, nothing else."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SAMPLED = {"prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0], "finish_reason": "stop"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what score.py needs, in which the steps of the README were done."""
    (tmp_path / "data").mkdir()
    modules = [f"data/{path.name}" for path in (ROOT / "data").glob("*.py")]
    for path in ("score.py", "evaluate.py", *modules):
        shutil.copy(ROOT / path, tmp_path / path)
    text = (ROOT / "data/README.md").read_text()
    section = text[text.index("## Your own task"):]
    file, line = (textwrap.dedent(code)
                  for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2])
    (tmp_path / "data/reverse.py").write_text(file)
    score = (tmp_path / "score.py").read_text()
    place = score.index("}\n", score.index("TASKS = {"))
    (tmp_path / "score.py").write_text(score[:place] + line + score[place:])
    return tmp_path


def run(checkout, *command):
    done = subprocess.run([sys.executable, *command], cwd=checkout, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def score(checkout, *rows):
    """(exit code, stdout, stderr) of score.py on these rollouts."""
    (checkout / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run(checkout, "score.py", "rollouts.jsonl", "--out", "scored.jsonl", "--show", "2")


def test_own_task_in_three_steps(checkout):
    code, out, _ = run(checkout, "-m", "data.reverse", "abc", "hello")
    problems = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["answer"] for row in problems] == ["cba", "olleh"]
    rows = [{**problems[0], "sample": sample, "completion": text, **SAMPLED}
            for sample, text in enumerate(["cba", "abc", " cba\n"])]
    rows += [{**rows[1], "sample": 3, "finish_reason": "length"}]
    rows += [{**rows[0], "id": "c1", "task": "countdown", "numbers": [1, 2], "target": 3,
              "completion": "1+2"}]
    code, out, err = score(checkout, *rows)
    assert code == 0, err
    assert "abc sample 0: 'answer': 'cba'" in out
    scored = [json.loads(line) for line in (checkout / "scored.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in scored] == [True, False, True, False, True]
    assert [row["reason"] for row in scored] == ["ok", "value", "ok", "truncated", "ok"]


def test_wrong_rows_are_refused_in_one_line(checkout):
    right = {"id": "a", "task": "reverse", "answer": "b", "sample": 0, "completion": "b", **SAMPLED}
    for row, message in [
            ({**right, "answer": 3}, "field 'answer': Expected str, got int"),
            ({**right, "answer": None}, "field 'answer': Expected str, got null"),
            ({**right, "task": "revers"},
             "field 'task' must be one of countdown, math, gym, reverse"),
            ({key: right[key] for key in right if key != "answer"}, "missing field 'answer'")]:
        code, _, err = score(checkout, row)
        assert code == 2 and err == f"score.py: error: rollouts.jsonl:1: {message}\n"


@pytest.mark.parametrize("lost", ["class Row(Rollout", "def verify("])
def test_a_task_without_rows_or_verdict_is_no_task(checkout, lost):
    """Found when score.py starts, not in the middle of a file."""
    path = checkout / "data/reverse.py"
    other = lost.replace("Row", "Other").replace("verify", "other")
    path.write_text(path.read_text().replace(lost, other))
    code, _, err = score(checkout, {"id": "c", "task": "countdown", "numbers": [1, 2], "target": 3,
                                    "sample": 0, "completion": "1+2", **SAMPLED})
    assert code != 0 and "data.reverse" in err and ("'Row'" in err or "'verify'" in err)
