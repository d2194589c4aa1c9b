"""data/hard.py: the problems with few right rollouts, as they stand in the prompt file."""
import json
import os

import pytest

from data import hard


@pytest.fixture
def files(tmp_path):
    """Three problems with 0, 1 and 3 of 4 rollouts right, in an order of their own; the first one's row has odd spelling."""
    prompts, scored = tmp_path / "prompts.jsonl", tmp_path / "scored.jsonl"
    prompts.write_text('{"id" : "a",  "prompt": "1 2=3:", "note": 1e1}\n{"id": "b", "prompt": "4=4:"}\n{"id": "c", "prompt": "5=5:"}\n')
    rows = [{"id": id, "sample": i, "correct": i < right} for i in range(4) for id, right in (("c", 3), ("a", 0), ("b", 1))]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(scored), "--prompts", str(prompts), "--out", str(tmp_path / "hard.jsonl")]


def run(files, *flags):
    hard.main(hard.parse_args([*files, *flags]))
    return open(files[-1]).read()


@pytest.mark.parametrize("limit, kept", [(0, "a"), (1, "ab"), (2, "ab"), (3, "abc")])
def test_at_most_so_many_right(files, capsys, limit, kept):
    lines = open(files[2]).read().splitlines(keepends=True)
    assert run(files, "--at-most", limit.__str__()) == "".join(line for line in lines if json.loads(line)["id"] in kept)
    assert capsys.readouterr().out == f"{files[-1]}: {len(kept)} of 3 problems\n"


def test_problems_that_were_skipped_are_left_out(files, capsys):
    before = run(files)
    os.unlink(files[-1])
    with open(files[2], "a") as file:
        file.write('{"id": "d", "prompt": "6=6:"}\n')
    capsys.readouterr()
    assert run(files) == before
    assert capsys.readouterr().out == f"{files[-1]}: 2 of 3 problems, 1 without rollouts left out\n"


def test_no_problem_is_hard(files, tmp_path):
    (tmp_path / "scored.jsonl").write_text("".join(json.dumps({"id": id, "correct": True}) + "\n" for id in "abc" for _ in range(2)))
    assert run(files) == ""


def test_what_is_refused(files, tmp_path, capsys):
    def refused(*flags):
        with pytest.raises(SystemExit) as end:
            run(files, *flags)
        assert end.value.code == 2
        return capsys.readouterr().err

    assert "--at-most must be at least 0" in refused("--at-most", "-1")
    run(files)
    assert "made with other at_most; delete it" in refused("--at-most", "0")
    other = tmp_path / "others.jsonl"
    other.write_text('{"id": "d", "prompt": "6=6:"}\n')
    (tmp_path / "hard.jsonl").unlink()
    assert f"others.jsonl: none of its problems has a rollout in {files[0]}" in refused("--prompts", str(other))
    (tmp_path / "scored.jsonl").write_text('{"id": "a"}\n')
    assert "scored.jsonl:1: missing field 'correct'; run score.py first" in refused("--out", str(tmp_path / "other.jsonl"))
