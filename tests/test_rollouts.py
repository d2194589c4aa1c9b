"""data/rollouts.py: scored rows as groups, what of them is refused, and answers to rehearse."""
import math
import random

import pytest

from data.rollouts import draw_answers, load_answers, load_rollouts
from test_train import (  # noqa: F401  fixtures among them
    LENGTHS, T, VERDICTS, VOCAB, make_rows, mean_of, model, refused, rollouts, row_of, run,
    write)


def test_rows_of_an_id_are_a_group_wherever_they_stand(model, rollouts, tmp_path):
    """Rows in any order; also rows to rehearse: a prompt counts once for its own rows alone."""
    mixed = make_rows(model)
    random.Random(1).shuffle(mixed)
    groups, n = load_rollouts(write(tmp_path / "mixed.jsonl", mixed))
    assert [[row.group for row in group] for group in groups] == [[i] * n for i in range(7)]

    def content(groups):
        return sorted([(row.id, row.sample, row.prompt, row.completion.tolist()) for row in group]
                      for group in groups)

    assert content(groups) == content(load_rollouts(rollouts)[0])
    right = [row for row in mixed if row["correct"] and row["completion_ids"]]
    answers = load_answers(write(tmp_path / "right.jsonl", right), T)
    assert [{row.group for row in group} for group in answers] == [{i} for i in range(5)]


def test_rollouts_of_another_distribution_are_refused(model, tmp_path, capsys):
    rows = make_rows(model, VERDICTS[:1], LENGTHS[:1], cut=())
    for number, (sampling, flags, message) in enumerate([
            (None, [], "give --temperature"), ({"temperature": 0}, [], "greedy"),
            ({"temperature": T, "top_p": 0.9}, [], "top_p 0.9"),
            ({"temperature": T, "top_k": 20}, [], "top_k 20"),
            ({"temperature": T, "repetition_penalty": 1.05}, [], "repetition_penalty 1.05"),
            ({"temperature": T}, ["--temperature", 0.8], "sampled at temperature 0.7"),
            *[(sampling, [], "not a valid meta")
              for sampling in ({"temperature": "warm"}, {"temperature": True}, {"temperature": -1},
                               {"temperature": math.nan}, {"top_p": 1.0}, [1])]]):
        path = write(tmp_path / f"rows{number}.jsonl", rows, sampling)
        assert message in refused(capsys, model, path, tmp_path / "out", *flags)


ROWS = [  # the third of eight rows changed; what the line says beside file and number
    *[({field: None}, f"missing field '{field}'") for field in
      ("id", "sample", "prompt_ids", "completion_ids", "logprobs", "finish_reason")],
    *[({field: None}, "run score.py first") for field in ("correct", "reward")],
    *[({field: value}, f"'{field}'") for field, value in [
        ("sample", 1.0), ("correct", 1), ("reward", 10 ** 400), ("completion_ids", [2 ** 31]),
        ("completion_ids", [3.0]), ("logprobs", [10 ** 400]), ("finish_reason", "eos")]],
    ({"logprobs": [-1.0]}, "logprobs for"), ({"sample": 1}, "duplicate sample 1"),
    ({"prompt_ids": [3] * 6}, "prompt_ids differ"), ({"id": "another"}, "samples"),
    ({"completion_ids": [VOCAB], "logprobs": [-1.0]}, "beyond the vocabulary of 13"),
    ({"completion_ids": [3] * 70, "logprobs": [-1.0] * 70}, "exceed the 64 positions"),
]


def test_wrong_rows_are_named(model, tmp_path, capsys):
    """Other types of every field: test_wrong_types_in_every_field."""
    for number, (change, message) in enumerate(ROWS):
        rows = make_rows(model, VERDICTS[:2], LENGTHS[:2], cut=())
        rows[2] = {key: value for key, value in {**rows[2], **change}.items() if value is not None}
        path = write(tmp_path / f"rows{number}.jsonl", rows)
        line = refused(capsys, model, path, tmp_path / f"out{number}")
        assert message in line and path in line, (change, line)
        assert f"{path}:3: " in line or message == "samples"


def test_rehearsal_draws_each_right_rollout_or_each_distinct_answer(model, tmp_path):
    """samples: an answer that was sampled three times counts three times; distinct: once."""
    rows = make_rows(model, [[(1, 1.0)] * 4], [[3, 2, 2, 2]], cut=())
    for row in rows[2:]:
        row["completion_ids"] = rows[1]["completion_ids"]
    path = write(tmp_path / "base.jsonl", rows)
    for weight, count in ("samples", 4), ("distinct", 2):
        (answers,) = load_answers(path, T, weight)
        assert len(answers) == count
        short = [len(row.completion) == 3 for row in draw_answers([answers], 4000, (0, 0))]
        assert mean_of(short) == pytest.approx(1 / count, abs=0.03)


def test_problems_are_drawn_equally_often_and_anew_at_every_step():
    problems = [[row_of([2], [3 + i], group=g) for i in range(g + 1)] for g in range(5)]
    drawn = draw_answers(problems, 1003, (0, 1))
    counts = [sum(row.group == g for row in drawn) for g in range(5)]
    assert len(drawn) == 1003 and max(counts) - min(counts) <= 1
    of_last = [sum(row is one for row in drawn) for one in problems[4]]
    assert sum(of_last) == counts[4] and min(of_last) > 20
    again = [[row.group for row in draw_answers(problems, 12, seed)]
             for seed in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert again[0] == again[1] and again[2] != again[0] != again[3]
    assert draw_answers([], 5, (0, 0)) == []


def test_what_cannot_be_rehearsed_is_refused(model, rollouts, tmp_path, capsys):
    differs = make_rows(model, VERDICTS[2:3], LENGTHS[2:3], cut=())
    differs[1]["prompt_ids"] = [5] * 6
    flags, rows = ["--rehearse-coef", 0.1, "--rehearse"], make_rows(model)
    wrong = make_rows(model, VERDICTS[1:2], LENGTHS[1:2], cut=())
    cut = write(tmp_path / "cut.jsonl", rows, {"temperature": T, "top_p": 0.9})
    for path, message in [
            (write(tmp_path / "hot.jsonl", rows, {"temperature": 1.0}),
             "sampled at temperature 1.0, the rollouts at 0.7"),
            (cut, "cut.jsonl: sampled with top_p 0.9"),
            (write(tmp_path / "torn.jsonl", rows, "x"),
             "torn.jsonl.meta.json: not a valid meta (temperature None)"),
            (write(tmp_path / "wrong.jsonl", wrong), "no correct rollout to rehearse"),
            (write(tmp_path / "differ.jsonl", differs), "differ.jsonl:2: prompt_ids differ")]:
        assert message in refused(capsys, model, rollouts, tmp_path / "out", *flags, path)
    allowed = run(model, rollouts, tmp_path / "allowed", *flags, cut, "--allow-off-policy")
    assert allowed.metrics[0]["rehearse_nll"] > 0
