"""data/rollouts.py: scored rows as groups, what of them is refused, and answers to rehearse."""
import contextlib
import json
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.rollouts import draw_answers, load_answers, load_rollouts
from test_train import (LENGTHS, T, VERDICTS, VOCAB, make_rows, mean_of, model, refused,  # noqa: F401
                        rollouts, row_of, run, write)


def test_rows_of_an_id_are_a_group_wherever_they_stand(model, rollouts, tmp_path):
    """Rows in any order; also rows to rehearse: a prompt counts once for its own rows alone."""
    mixed = make_rows(model)
    random.Random(1).shuffle(mixed)
    groups, n = load_rollouts(write(tmp_path / "mixed.jsonl", mixed))
    straight, _ = load_rollouts(rollouts)
    assert [[row.group for row in group] for group in groups] == [[i] * n for i in range(7)]
    for group in groups:
        (same,) = [one for one in straight if one[0].id == group[0].id]
        for row, other in zip(group, same, strict=True):
            assert (row.sample, row.prompt) == (other.sample, other.prompt)
            assert row.completion.tolist() == other.completion.tolist()
    right = [row for row in mixed if row["correct"] and row["completion_ids"]]
    answers = load_answers(write(tmp_path / "right.jsonl", right), T)
    assert len(answers) > 1
    assert [{row.group for row in group} for group in answers] == [{i} for i in range(len(answers))]


def test_rollouts_of_another_distribution_are_refused(model, tmp_path, capsys):
    rows = make_rows(model, VERDICTS[:1], LENGTHS[:1], cut=())
    for number, (sampling, flags, message) in enumerate([
            (None, [], "give --temperature"),
            ({"temperature": 0}, [], "greedy"),
            ({"temperature": T, "top_p": 0.9}, [], "top_p 0.9"),
            ({"temperature": T, "top_k": 20}, [], "top_k 20"),
            ({"temperature": T, "repetition_penalty": 1.05}, [], "repetition_penalty 1.05"),
            ({"temperature": T}, ["--temperature", 0.8], "sampled at temperature 0.7"),
            *[(sampling, [], "not a valid meta")
              for sampling in ({"temperature": "warm"}, {"temperature": True}, {"temperature": -1},
                               {"temperature": math.nan}, {"top_p": 1.0}, [1])]]):
        path = write(tmp_path / f"rows{number}.jsonl", rows, sampling)
        assert message in refused(capsys, model, path, tmp_path / "out", *flags)


FIELDS = ("id", "sample", "prompt_ids", "completion_ids", "logprobs", "finish_reason")


ROWS = [  # the third of eight rows changed; what the line says beside file and number
    *[({field: None}, f"missing field '{field}'") for field in FIELDS],
    *[({field: None}, "run score.py first") for field in ("correct", "reward")],
    *[({field: value}, f"'{field}'") for field, values in {
        "id": [7],
        "sample": ["2", True, 1.0],
        "correct": [1, "true"],
        "reward": ["1", True, 10 ** 400, 1e300],
        "prompt_ids": [[], "34"],
        "completion_ids": [[3, -1], [3.0], [2 ** 31], {"a": 1}],
        "logprobs": [["x"], [10 ** 400], [[-1.0]]],
        "finish_reason": ["eos", ["stop"]]}.items() for value in values],
    ({"logprobs": [-1.0]}, "logprobs for"),
    ({"sample": 1}, "duplicate sample 1"),
    ({"prompt_ids": [3] * 6}, "prompt_ids differ"),
    ({"completion_ids": [VOCAB], "logprobs": [-1.0]}, "beyond the vocabulary of 13"),
    ({"completion_ids": [3] * 70, "logprobs": [-1.0] * 70}, "exceed the 64 positions"),
    ({"id": "another"}, "samples"),
]


def test_wrong_rows_are_named(model, tmp_path, capsys):
    for number, (change, message) in enumerate(ROWS):
        rows = make_rows(model, VERDICTS[:2], LENGTHS[:2], cut=())
        rows[2] = {key: value for key, value in {**rows[2], **change}.items() if value is not None}
        path = write(tmp_path / f"rows{number}.jsonl", rows)
        line = refused(capsys, model, path, tmp_path / f"out{number}")
        assert message in line and path in line, (change, line)
        assert f"{path}:3: " in line or message == "samples"


LEAF = (st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.text(max_size=4)
        | st.floats(allow_nan=False, allow_infinity=False))


JSON = st.recursive(LEAF, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=2), max_leaves=4)


FUZZED_ROW = st.fixed_dictionaries({}, optional={
    "id": st.sampled_from("ab") | JSON, "sample": st.integers(0, 2) | JSON,
    "prompt_ids": st.just([2, 3]) | JSON, "completion_ids": st.just([4]) | JSON,
    "logprobs": st.just([-1.0]) | JSON, "finish_reason": st.sampled_from(["stop", "length"]) | JSON,
    "correct": st.booleans() | JSON, "reward": st.floats(0, 1) | JSON})


@settings(max_examples=60, deadline=None)
@given(st.lists(FUZZED_ROW, min_size=1, max_size=4), st.sampled_from(["wrong", "mask"]))
def test_fuzz_load_rollouts(tmp_path_factory, rows, truncated):
    """Whatever the rows hold, they are groups of n that fit together, or one line and exit 2."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.redirect_stderr(None):
        try:
            groups, n = load_rollouts(str(path), truncated)
        except SystemExit as error:
            assert error.code == 2
            return
    assert sum(map(len, groups)) == len(rows) and all(len(group) == n for group in groups)
    for row in sum(groups, []):
        assert len(row.completion) == len(row.logprobs) and np.isfinite(row.logprobs).all()
        assert not (row.truncated and truncated == "wrong" and not row.correct and row.reward)


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
