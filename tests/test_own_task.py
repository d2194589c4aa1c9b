"""data/README.md's "your own task in five minutes": one file, one line in score.py, no more."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SAMPLED = {"sample": 0, "prompt_ids": [1], "completion_ids": [2], "logprobs": [-1.0],
           "finish_reason": "stop"}
COUNTDOWN = {**SAMPLED, "id": "c1", "task": "countdown", "numbers": [1, 2], "target": 3,
             "completion": "1+2"}
RIGHT = {**SAMPLED, "id": "a", "task": "reverse", "answer": "b", "completion": "b"}


@pytest.fixture
def checkout(tmp_path):
    """A copy of what score.py needs, in which the steps of the README were done."""
    shutil.copytree(ROOT / "data", tmp_path / "data", ignore=shutil.ignore_patterns("*-countdown"))
    text = (ROOT / "data/README.md").read_text()
    section = text[text.index("## Your own task"):]
    file, line = (textwrap.dedent(code)
                  for code in re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2])
    (tmp_path / "data/reverse.py").write_text(file)
    text = (ROOT / "score.py").read_text()
    place = text.index("}\n", text.index("TASKS = {"))
    (tmp_path / "score.py").write_text(text[:place] + line + text[place:])
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
    rows = [{**SAMPLED, **problems[0], "sample": sample, "completion": text}
            for sample, text in enumerate(["cba", "abc", " cba\n"])]
    rows += [{**rows[1], "sample": 3, "finish_reason": "length"}, COUNTDOWN]
    code, out, err = score(checkout, *rows)
    assert code == 0, err
    assert "abc sample 0: 'answer': 'cba'" in out
    scored = [json.loads(line) for line in (checkout / "scored.jsonl").read_text().splitlines()]
    assert [row["reason"] for row in scored] == ["ok", "value", "ok", "truncated", "ok"]


@pytest.mark.parametrize("change, message", [
    ({"answer": 3}, "field 'answer': Expected str, got int"),
    ({"task": "revers"}, "field 'task' must be one of countdown, math, gym, reverse")])
def test_wrong_rows_are_refused_in_one_line(checkout, change, message):
    code, _, err = score(checkout, {**RIGHT, **change})
    assert code == 2 and err == f"score.py: error: rollouts.jsonl:1: {message}\n"


@pytest.mark.parametrize("name", ["Row", "verify"])
def test_a_task_without_rows_or_verdict_is_no_task(checkout, name):
    """Found when score.py starts, not in the middle of a file."""
    path = checkout / "data/reverse.py"
    path.write_text(re.sub(rf"\b{name}\(", "other(", path.read_text()))
    code, _, err = score(checkout, COUNTDOWN)
    assert code != 0 and "data.reverse" in err and f"'{name}'" in err
