"""data/README.md's "your own task in five minutes": one file, one line in score.py, no more."""
import json
import pathlib
import re
import shutil
import subprocess
import sys
import textwrap

import pytest

from conftest import read, write

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
    write(checkout / "rollouts.jsonl", rows)
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
    reasons = [row["reason"] for row in read(checkout / "scored.jsonl")]
    assert reasons == ["ok", "value", "ok", "truncated", "ok"]


def test_what_is_wrong_is_found_before_anything_is_judged(checkout):
    for change, message in [
            ({"answer": 3}, "field 'answer': Expected str, got int"),
            ({"task": "revers"}, "field 'task' must be one of countdown, math, gym, reverse")]:
        code, _, err = score(checkout, {**RIGHT, **change})
        assert code == 2 and err == f"score.py: error: rollouts.jsonl:1: {message}\n"
    source = (checkout / "data/reverse.py").read_text()
    for name in "Row", "verify":  # a task without them is none
        (checkout / "data/reverse.py").write_text(re.sub(rf"\b{name}\(", "other(", source))
        code, _, err = score(checkout, COUNTDOWN)
        assert code != 0 and "data.reverse" in err and f"'{name}'" in err
