"""data/countdown.py: the exact solver against brute force, the draw, the splits, the templates; and
what make_tiny.py learns from."""
import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import countdown
from data.files import Verdict


def value_of(expression):
    return countdown.parse(expression, int, countdown.OPERATE)


def brute_force(numbers, target):
    """All distinct solutions by another route: every binary tree over every order, put into
    canonical form by the verifier's parser."""
    def expressions(parts):
        if len(parts) == 1:
            yield parts[0]
        for i, j in itertools.permutations(range(len(parts)), 2):
            rest = [part for k, part in enumerate(parts) if k not in (i, j)]
            for operator in "+-*/":
                yield from expressions([*rest, f"({parts[i]}{operator}{parts[j]})"])

    found = set()
    for expression in set(expressions([str(number) for number in numbers])):
        try:
            value = value_of(expression)
        except ZeroDivisionError:
            continue
        if value == target:
            found.add(countdown.canonical(expression))
    return found


@pytest.mark.parametrize("numbers, target", [
    ([1, 5, 5, 5], 24), ([2, 2, 2], 1), ([6, 6, 6], 0), ([4, 9], 5), ([7], 7), ([7], 6)])
def test_solver_finds_all_solutions_and_no_other(numbers, target):
    assert countdown.solutions(numbers, target) == brute_force(numbers, target)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), min_size=2, max_size=3), st.integers(1, 60))
def test_solver_against_brute_force_on_random_problems(numbers, target):
    assert countdown.solutions(numbers, target) == brute_force(numbers, target)


def test_number_of_forms():
    """All expressions over distinct numbers, up to commutativity and associativity alone: two
    operands give 6, three give 68."""
    for numbers, expected in (((2, 3), 6), ((2, 3, 7), 68)):
        forms = [countdown.blocks(numbers, kind).values() for kind in "+*"]
        assert sum(len(texts) for form in forms for texts in form) == expected


def test_six_numbers():
    found = countdown.solutions([3, 14, 25, 50, 75, 100], 952)
    assert found and {value_of(text) for text in found} == {952}
    assert {countdown.canonical(text) for text in found} == found


def problems_of(tmp_path, *flags, name="p.jsonl"):
    countdown.main(countdown.parse_args(["--out", str(tmp_path / name), *flags]))
    return [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]


def test_problems_are_solvable_unique_and_seeded(tmp_path):
    rows = problems_of(tmp_path, "--n", "200", "--seed", "3")
    assert rows == problems_of(tmp_path, "--n", "200", "--seed", "3", name="again.jsonl")
    assert rows != problems_of(tmp_path, "--n", "200", "--seed", "4", name="other.jsonl")
    assert len({row["id"] for row in rows}) == 200
    for row in rows[:40]:
        assert row["task"] == "countdown" and len(row["numbers"]) == 4
        assert 1 <= row["target"] <= 1000
        found = countdown.solutions(row["numbers"], row["target"])
        assert row["n_solutions"] == len(found) > 0
        assert row["prompt"] == " ".join(map(str, row["numbers"])) + f"={row['target']}:"
        for text in found:  # the verdict spells every solution the same way
            rollout = countdown.Row("a", 0, text, "stop", tuple(row["numbers"]), row["target"])
            assert countdown.verify(text, rollout) == Verdict(text, "ok", text)
    meta = json.loads((tmp_path / "p.jsonl.meta.json").read_text())
    assert meta["flags"]["seed"] == 3 and meta["stage"] == "countdown.py"


def key(row):
    return tuple(sorted(row["numbers"])), row["target"]


def test_exclude_and_splits_are_disjoint(tmp_path):
    few = ("--numbers", "3", "--max-number", "20", "--max-target", "40")
    train = problems_of(tmp_path, "--n", "400", *few)
    test = problems_of(tmp_path, "--n", "150", *few, "--seed", "9", "--exclude",
                       str(tmp_path / "p.jsonl"), name="held-out.jsonl")
    assert not {key(row) for row in train} & {key(row) for row in test}
    parts = []
    for split in ("train", "tune", "test"):
        rows = problems_of(tmp_path, "--n", "150", "--split", split, name=f"{split}.jsonl")
        parts.append({key(row) for row in rows})
    assert not parts[0] & parts[1] and not parts[0] & parts[2] and not parts[1] & parts[2]


def test_max_solutions_and_templates(tmp_path):
    rows = problems_of(tmp_path, "--n", "50", "--max-solutions", "2", "--template", "instruct",
                       "--max-number", "50", "--max-target", "200")
    assert all(row["n_solutions"] <= 2 and "prompt" not in row for row in rows)
    text = rows[0]["messages"][0]["content"]
    assert str(rows[0]["target"]) in text and "<answer>" in text and "<think>" in text
    base = problems_of(tmp_path, "--n", "2", "--template", "base", name="base.jsonl")
    assert base[0]["prompt"].endswith("<think>")


@pytest.mark.parametrize("flags, message", [
    (["--n", "0"], "--n must be"), (["--numbers", "7"], "--numbers"),
    (["--max-number", "x"], "--max-number"), (["--exclude", "missing.jsonl"], "missing.jsonl"),
    (["--n", "500", "--numbers", "2", "--max-number", "2", "--max-target", "3"], "problems found")])
def test_bad_flags_in_one_line(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as stopped:
        args = countdown.parse_args(["--out", str(tmp_path / "p.jsonl"), *flags])
        countdown.run(countdown.main, args)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and message in error
    assert not (tmp_path / "p.jsonl").exists()


def test_exclude_refuses_rows_that_are_no_problems(tmp_path, capsys):
    (tmp_path / "bad.jsonl").write_text('{"id": "a", "numbers": [1, "2"], "target": 3}\n')
    with pytest.raises(SystemExit) as stopped:
        problems_of(tmp_path, "--n", "2", "--exclude", str(tmp_path / "bad.jsonl"))
    assert stopped.value.code == 2 and "bad.jsonl:1" in capsys.readouterr().err


def test_shuffled_answers_stay_the_same_solution():
    import make_tiny

    rng, seen = random.Random(0), set()
    for numbers, target in (([3, 3, 8, 8], 24), ([2, 7, 10, 3], 24), ([1, 2, 3, 4], 10),
                            ([5, 9, 2, 6], 8)):
        for text in sorted(countdown.solutions(numbers, target)):
            for _ in range(20):
                answer = make_tiny.shuffled(text, rng)
                assert countdown.judge(answer, tuple(numbers), target) == ("ok", text)
                seen.add(answer)
    assert len(seen) > 100


def test_make_tiny_leaves_snapshots_and_starts_from_them(tmp_path, monkeypatch):
    """Its flags at toy size: a model folder at every --save-every steps, which says how it was
    made; --init goes on from its weights."""
    import make_tiny

    solved = make_tiny.solved
    monkeypatch.setattr(make_tiny, "solved", lambda n, *more: solved(min(n, 12), *more))

    def made(name, *flags):
        make_tiny.main(make_tiny.parse_args([
            "--out", str(tmp_path / name), "--threads", "1", "--problems", "12", "--batch", "4",
            *flags]))
        with open(tmp_path / name / "curve.jsonl") as file:
            return [json.loads(line) for line in file]

    first = made("one", "--steps", "3", "--save-every", "2", "--max-target", "40")
    assert [line["step"] for line in first] == [2, 3]
    assert (tmp_path / "one-2" / "model.safetensors").exists()
    with open(tmp_path / "one-2" / "made_from.json") as file:
        made_from = json.load(file)
    assert made_from["steps_done"] == 2 and made_from["flags"]["max_target"] == 40
    (last,) = made("two", "--steps", "1", "--lr", "0", "--max-target", "40", "--init",
                   str(tmp_path / "one"))
    assert last["tune_loss"] == first[-1]["tune_loss"]  # at a rate of 0 the weights stay


def test_four_test_problems_come_twice_as_the_docstring_says():
    args = countdown.parse_args(["--out", "x", "--n", "300", "--split", "test", "--seed", "1"])
    problems = list(countdown.problems(args))
    assert len({key(row) for row in problems}) == 296
    assert len({row["id"] for row in problems}) == 300
    assert "4 of the first 300 test problems" in countdown.__doc__
