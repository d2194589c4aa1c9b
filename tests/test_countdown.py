"""data/countdown.py: the solver, the draw, the splits, the templates; and data/make_tiny.py."""
import json
import random

import pytest

from conftest import meta_of, read, refusal, stage
from data import countdown


def problems_of(tmp_path, flags, name="p.jsonl"):
    stage(countdown, "--out", tmp_path / name, *flags.split())
    return read(tmp_path / name)


def key(row):
    return tuple(sorted(row["numbers"])), row["target"]


def test_number_of_forms():
    """Up to commutativity and associativity alone, 2 and 3 distinct numbers give 6 and 68."""
    for numbers, expected in (((2, 3), 6), ((2, 3, 7), 68)):
        forms = [countdown.blocks(numbers, kind).values() for kind in "+*"]
        assert sum(len(texts) for values in forms for texts in values) == expected


def test_six_numbers():
    found = countdown.solutions([1, 1, 1, 5, 5, 25], 24)
    values = {countdown.parse(text, int, countdown.OPERATE) for text in found}
    assert values == {24} and {countdown.canonical(text) for text in found} == found


def test_problems_are_solvable_unique_and_seeded(tmp_path):
    rows = problems_of(tmp_path, "--n 40 --seed 3")
    assert rows == problems_of(tmp_path, "--n 40 --seed 3", "again.jsonl")
    assert rows[0] != problems_of(tmp_path, "--n 1 --seed 4", "other.jsonl")[0]
    assert len({row["id"] for row in rows}) == 40
    for row in rows:
        numbers, target = row["numbers"], row["target"]
        assert row["task"] == "countdown" and len(numbers) == 4 and 1 <= target <= 1000
        assert row["n_solutions"] == len(countdown.solutions(numbers, target)) > 0
        assert row["prompt"] == " ".join(map(str, numbers)) + f"={target}:"
    meta = meta_of(tmp_path / "p.jsonl")
    assert meta["flags"]["seed"] == 3 and meta["stage"] == "countdown.py"


def test_exclude_and_splits_are_disjoint(tmp_path):
    few = "--numbers 2 --max-number 9 --max-target 40 --n 30"
    excluded = {key(row) for row in problems_of(tmp_path, few)}
    others = problems_of(tmp_path, f"{few} --seed 9 --exclude {tmp_path / 'p.jsonl'}", "others")
    assert not excluded & {key(row) for row in others}
    for split, tenths in (("train", range(8)), ("tune", [8]), ("test", [9])):
        rows = problems_of(tmp_path, f"--n 9 --split {split}", split)
        assert {countdown.split_of(*key(row)) for row in rows} <= set(tenths)


def test_max_solutions_and_templates(tmp_path):
    rows = problems_of(tmp_path, "--n 9 --max-solutions 2 --template instruct --max-number 50 "
                                 "--max-target 200")
    assert all(row["n_solutions"] <= 2 and "prompt" not in row for row in rows)
    text = rows[0]["messages"][0]["content"]
    assert str(rows[0]["target"]) in text and "<answer>" in text and "<think>" in text
    base = problems_of(tmp_path, "--n 2 --template base", "base.jsonl")
    assert base[0]["prompt"].endswith("<think>")


@pytest.mark.parametrize("flags, message", [
    ("--n 0", "--n must be"), ("--numbers 7", "--numbers"), ("--max-number x", "--max-number"),
    ("--exclude missing.jsonl", "missing.jsonl"), ("--exclude bad.jsonl", "bad.jsonl:1"),
    ("--n 9 --numbers 2 --max-number 1 --max-target 3", "problems found")])
def test_bad_flags_in_one_line(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "numbers": [1, "2"], "target": 3}\n')
    argv = ["--out", "p.jsonl", *flags.split()]
    assert message in refusal(
        capsys, lambda: countdown.run(countdown.main, countdown.parse_args(argv)))
    assert not (tmp_path / "p.jsonl").exists()


def test_four_test_problems_come_twice_as_the_docstring_says():
    args = countdown.parse_args(["--out", "x", "--n", "300", "--split", "test", "--seed", "1"])
    problems = list(countdown.problems(args))
    assert len({key(row) for row in problems}) == 296
    assert len({row["id"] for row in problems}) == 300


def test_make_tiny(tmp_path, monkeypatch):
    """A model folder at every --save-every steps, which says how it was made; --init goes on from
    its weights. Answers in a random order stay the same solution."""
    from data import make_tiny

    rng = random.Random(0)
    texts = countdown.solutions([2, 7, 10, 3], 24)
    answers = {make_tiny.shuffled(text, rng) for text in sorted(texts) for _ in range(5)}
    assert {countdown.canonical(answer) for answer in answers} == texts
    assert len(answers) > 2 * len(texts)
    problems = [([1, 2], 3, ["1+2"]), ([2, 7, 10, 3], 24, sorted(texts))]
    monkeypatch.setattr(make_tiny, "solved", lambda *args: problems)
    batch_of = make_tiny.batch_of
    monkeypatch.setattr(make_tiny, "batch_of", lambda pool, *rest: batch_of(pool, 4, *rest[1:]))

    def made(name, *flags):
        stage(make_tiny, "--out", tmp_path / name, "--threads", 1, "--max-target", 40, *flags)
        return read(tmp_path / name / "curve.jsonl")

    first = made("one", "--steps", 3, "--save-every", 2)
    assert [line["step"] for line in first] == [2, 3]
    made_from = json.loads((tmp_path / "one-2" / "made_from.json").read_text())
    assert made_from["steps_done"] == 2 and made_from["flags"]["max_target"] == 40
    (last,) = made("two", "--steps", 1, "--lr", 0, "--init", tmp_path / "one")
    assert last["tune_loss"] == first[-1]["tune_loss"]  # at a rate of 0 the weights stay
