"""data/gym.py: the library's tasks as rows, judged by its own scorers in workers."""
import json
import random
import re

import pytest

import score
from data import countdown, gym

reasoning_gym = pytest.importorskip("reasoning_gym")
FIVE = ["chain_sum", "spell_backward", "number_sorting", "countdown", "basic_arithmetic"]


def problems(tmp_path, task, *flags, n=4):
    out = tmp_path / f"{task}.jsonl"
    gym.main(gym.parse_args(["--out", str(out), "--task", task, "--n", str(n), *flags]))
    return [json.loads(line) for line in open(out)]


def scored(tmp_path, rows):
    source, out = tmp_path / "rollouts.jsonl", tmp_path / "scored.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = [str(source), "--out", str(out), "--workers", "1", "--timeout", "60"]
    score.main(score.parse_args(flags))
    return [json.loads(line) for line in open(out)]


def sampled(problem, sample, completion):
    return {**problem, "sample": sample, "completion": completion, "finish_reason": "stop"}


def refused(capsys, call, *arguments):
    with pytest.raises(SystemExit) as end:
        call(*arguments)
    err = capsys.readouterr().err
    assert end.value.code == 2 and err.count("\n") == 1 and err.startswith("gym.py: error: ")
    return err


def test_five_tasks(tmp_path):
    """The library's answer is right, whatever stands around its tags; others are wrong."""
    rows = []
    for task in FIVE:
        for problem in problems(tmp_path, task):
            answer = problem["entry"]["answer"]
            assert problem["messages"][0]["content"].startswith(problem["entry"]["question"])
            for sample, text in enumerate([f"so <answer>{answer}</answer>.", answer,
                                           f"<answer>{answer}0 or so</answer>",
                                           "<answer></answer>"]):
                rows.append(sampled(problem, sample, text))
    new = scored(tmp_path, rows)
    wrong = [(row["id"], row["sample"], row["reason"]) for row in new
             if row["correct"] != (row["sample"] < 2)]
    assert wrong == []
    assert {row["reason"] for row in new if row["sample"] == 3} == {"no_answer"}
    assert {row["source"] for row in new} == set(FIVE)


def test_countdown_there_and_here_agree(tmp_path):
    rng, rows, expected = random.Random(0), [], []
    for problem in problems(tmp_path, "countdown", "--config", "max_numbers=4", n=30):
        entry = problem["entry"]
        numbers, target = entry["metadata"]["numbers"], entry["metadata"]["target"]
        texts = [entry["answer"]]
        for _ in range(5):
            shuffled = rng.sample(numbers, len(numbers))
            texts.append("".join(f"{number}{rng.choice('+-*/')}" for number in shuffled)[:-1])
        texts += [re.sub(r"\d+", "1", texts[0], count=1), texts[0] + "=" + str(target),
                  texts[0] + "**1"]
        for sample, text in enumerate(texts):
            rows.append(sampled(problem, sample, text))
            here = countdown.Row("a", 0, text, "stop", tuple(numbers), target)
            expected.append(countdown.verify(text, here).reason == "ok")
    assert [row["correct"] for row in scored(tmp_path, rows)] == expected
    assert 0 < sum(expected) < len(expected)


def test_the_draw_is_seeded_and_configured(tmp_path):
    flags = ["spell_backward", "--seed", "3", "--config", "min_word_len=8", "--template", "base"]
    rows = problems(tmp_path, *flags)
    assert all(len(row["entry"]["answer"]) >= 8 for row in rows)
    assert all(row["prompt"].endswith("</answer>.\n") for row in rows)
    (tmp_path / "again").mkdir()
    assert rows == problems(tmp_path / "again", *flags)


@pytest.mark.parametrize("flags, message", [
    (["--task", "no_such"], "not registered"),
    (["--task", "bitwise_arithmetic"], "evaluates answers as Python"),
    (["--task", "chain_sum", "--config", "min_term"], "KEY=VALUE"),
    (["--task", "chain_sum", "--config", "no_such=3"], "no_such"),
    (["--task", "chain_sum", "--n", "0"], "--n must be"),
    (["--task", "chain_sum", "--config", "min_terms=-3"], "min_terms"),
    (["--task", "rearc"], "does not take its own answer")])
def test_what_cannot_be_used_is_one_line(tmp_path, capsys, flags, message):
    out = tmp_path / "p.jsonl"
    flags = ["--out", str(out), "--n", "2", *flags]
    assert message in refused(capsys, lambda: gym.main(gym.parse_args(flags)))
    assert not out.exists()


def test_an_answer_is_never_evaluated(tmp_path):
    """The library's own countdown scorer would run this; the worker gives it a parser instead."""
    [problem] = problems(tmp_path, "countdown", n=1)
    touched = tmp_path / "touched"
    attacks = [f"__import__('os').system('touch {touched}')", f"open('{touched}', 'w')"]
    new = scored(tmp_path, [sampled(problem, sample, f"<answer>{text}</answer>")
                            for sample, text in enumerate(attacks)])
    assert [row["correct"] for row in new] == [False, False] and not touched.exists()
