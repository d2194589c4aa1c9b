"""data/gym.py: the library's tasks as rows, judged by its own scorers in workers."""
import random
import re

import pytest

import score
from conftest import read, refusal, stage, write
from data import countdown, gym

pytest.importorskip("reasoning_gym")
FIVE = ["chain_sum", "spell_backward", "number_sorting", "countdown", "basic_arithmetic"]


def problems(tmp_path, task, *flags, name="problems"):
    out = tmp_path / f"{name}-{task}.jsonl"
    stage(gym, "--out", out, "--n", 4, "--task", task, *flags)
    return read(out)


def sampled(problem, texts):
    return [{**problem, "sample": sample, "completion": text, "finish_reason": "stop"}
            for sample, text in enumerate(texts)]


def test_verdicts(tmp_path):
    """The library's answer is right, whatever stands around its tags. Countdown there and here
    agree; an answer is never evaluated, as the library's own scorer would."""
    rng, rows, expected = random.Random(0), [], []
    for problem in (one for task in FIVE for one in problems(tmp_path, task)):
        answer = problem["entry"]["answer"]
        assert problem["messages"][0]["content"].startswith(problem["entry"]["question"])
        rows += sampled(problem, [f"so <answer>{answer}</answer>.", answer,
                                  f"<answer>{answer}0 or so</answer>", "<answer></answer>"])
        expected += [True, True, False, False]
    touched = tmp_path / "touched"
    flags = ["--config", "max_numbers=4", "--seed", 1, "--n", 20]
    for problem in problems(tmp_path, "countdown", *flags, name="four"):
        entry = problem["entry"]
        numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        texts = ["".join(f"{number}{rng.choice('+-*/')}"
                         for number in rng.sample(numbers, len(numbers)))[:-1] for _ in range(5)]
        texts += [re.sub(r"\d+", "1", entry["answer"], count=1), f"{entry['answer']}={target}",
                  f"{entry['answer']}**1", f"__import__('os').system('touch {touched}')",
                  f"open('{touched}', 'w')"]
        rows += sampled(problem, texts)
        for text in texts:
            here = countdown.Row("a", 0, text, "stop", tuple(numbers), target)
            expected.append(countdown.verify(text, here).reason == "ok")
    source, out = write(tmp_path / "rollouts.jsonl", rows), tmp_path / "scored.jsonl"
    stage(score, source, "--out", out, "--workers", 1, "--timeout", 60)
    new = read(out)
    wrong = [(row["id"], row["completion"], row["reason"])
             for row, right in zip(new, expected, strict=True) if row["correct"] != right]
    assert wrong == [] and not touched.exists()
    assert {row["reason"] for row in new if row["completion"] == "<answer></answer>"} == {
        "no_answer"}
    assert {row["source"] for row in new} == set(FIVE)


def test_the_draw_is_seeded_and_configured(tmp_path):
    flags = ["spell_backward", "--seed", "3", "--config", "min_word_len=8", "--template", "base"]
    rows = problems(tmp_path, *flags)
    assert all(len(row["entry"]["answer"]) >= 8 for row in rows)
    assert all(row["prompt"].endswith("</answer>.\n") for row in rows)
    assert rows == problems(tmp_path, *flags, name="again")


@pytest.mark.parametrize("flags, message", [
    ("no_such", "not registered"), ("bitwise_arithmetic", "evaluates answers as Python"),
    ("chain_sum --config min_term", "KEY=VALUE"), ("chain_sum --config no_such=3", "no_such"),
    ("chain_sum --n 0", "--n must be"), ("chain_sum --config min_terms=-3", "min_terms"),
    ("rearc", "does not take its own answer")])
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, flags, message):
    line = refusal(capsys, problems, tmp_path, *flags.split())
    assert line.startswith("gym.py: error: ") and message in line
    assert not list(tmp_path.glob("*.jsonl"))
