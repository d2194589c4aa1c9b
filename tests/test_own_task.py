"""The README's "your own task in fifteen minutes", done as it says: a problem file, a verdict in a copy of score.py, nothing else."""
import json
import subprocess
import sys

VERDICT = '''
def verify_reverse(completion, row):
    answer = completion.strip()
    return verdict(answer, "ok" if answer == row["answer"] else "value")


OWN["reverse"] = ("answer",)
VERIFIERS["reverse"] = verify_reverse


def main(args):'''


def test_own_task_in_three_steps(tmp_path):
    with open("README.md", encoding="utf-8") as file:
        assert VERDICT.strip().removesuffix("def main(args):").strip() in file.read().replace("\n   ", "\n"), "the README shows another verdict"
    with open("score.py", encoding="utf-8") as file:
        (tmp_path / "score.py").write_text(file.read().replace("\ndef main(args):", VERDICT))
    rows = [{"id": "r1", "task": "reverse", "prompt": "reverse abc=", "answer": "cba", "sample": sample, "completion": text, "prompt_ids": [1],
             "completion_ids": [2], "logprobs": [-1.0], "finish_reason": "stop"} for sample, text in enumerate(["cba", "abc"])]
    rows += [{**rows[0], "id": "c1", "task": "countdown", "numbers": [1, 2], "target": 3, "completion": "1+2"}]
    (tmp_path / "rollouts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    subprocess.run([sys.executable, "score.py", "rollouts.jsonl", "--out", "scored.jsonl", "--show", "2"], cwd=tmp_path, check=True)
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in scored] == [True, False, True]
    assert [row["reason"] for row in scored] == ["ok", "value", "ok"]
