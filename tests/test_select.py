"""data/select.py: a round's share of the problems, and those solved a given number of times."""
import json
import os
import pathlib

import pytest

from data import select


@pytest.fixture
def files(tmp_path):
    """Three problems with 0, 1 and 3 of 4 rollouts right, in an order of their own; the first row
    has odd spelling."""
    prompts, scored = tmp_path / "prompts.jsonl", tmp_path / "scored.jsonl"
    prompts.write_text('{"id" : "a",  "prompt": "1 2=3:", "note": 1e1}\n'
                       '{"id": "b", "prompt": "4=4:"}\n{"id": "c", "prompt": "5=5:"}\n')
    rows = [{"id": id, "sample": i, "correct": i < right} for i in range(4)
            for id, right in (("c", 3), ("a", 0), ("b", 1))]
    scored.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"prompts": str(prompts), "scored": str(scored), "out": str(tmp_path / "out.jsonl")}


def run(files, *flags, scored=True):
    """The output's text."""
    more = ["--scored", files["scored"]] if scored else []
    args = ["--prompts", files["prompts"], "--out", files["out"], *more, *flags]
    select.main(select.parse_args(args))
    with open(files["out"]) as file:
        return file.read()


def lines_of(files, ids):
    with open(files["prompts"]) as file:
        return "".join(line for line in file if json.loads(line)["id"] in ids)


@pytest.mark.parametrize("low, high, kept", [
    (None, 0, "a"), (None, 1, "ab"), (None, 3, "abc"), (0, 1, "ab"), (1, None, "bc"), (1, 2, "b"),
    (1, 3, "bc"), (2, 2, ""), (4, None, "")])
def test_problems_with_so_many_right_rollouts_pass_as_they_are(files, capsys, low, high, kept):
    flags = [*(["--at-least", str(low)] if low is not None else []),
             *(["--at-most", str(high)] if high is not None else [])]
    assert run(files, *flags) == lines_of(files, kept)
    assert capsys.readouterr().out == f"{files['out']}: {len(kept)} of 3 problems\n"


def test_problems_without_rollouts_are_left_out(files, capsys):
    before = run(files, "--at-most", "1")
    os.unlink(files["out"])
    with open(files["prompts"], "a") as file:
        file.write('{"id": "d", "prompt": "6=6:"}\n')
    capsys.readouterr()
    assert run(files, "--at-most", "1") == before
    assert capsys.readouterr().out == (
        f"{files['out']}: 2 of 4 problems (1 without rollouts left out)\n")


def test_rounds_go_on_over_what_the_filter_leaves(files):
    rounds = []
    for number in "1234":
        text = run(files, "--at-least", "1", "--n", "1", "--round", number)
        rounds.append(json.loads(text)["id"])
        os.unlink(files["out"])
    assert sorted(rounds[:2]) == sorted(rounds[2:]) == ["b", "c"]
    assert sorted(run(files, "--n", "9", scored=False)) == sorted(lines_of(files, "abc"))
    os.unlink(files["out"])
    assert run(files, scored=False) == lines_of(files, "abc")  # in the file's order


def test_without_prompts_the_rollouts_are_written_with_their_sampling(files, tmp_path):
    with open(files["scored"]) as file:
        rows = [line for line in file if json.loads(line)["id"] == "b"]
    sampling = {"temperature": 0.7}
    (tmp_path / "scored.jsonl.meta.json").write_text(json.dumps({"sampling": sampling}))
    args = ["--scored", files["scored"], "--out", files["out"], "--at-least", "1", "--at-most", "2"]
    select.main(select.parse_args(args))
    with open(files["out"]) as file:
        assert file.readlines() == rows
    with open(files["out"] + ".meta.json") as file:
        assert json.load(file)["sampling"] == sampling


def test_every_pass_is_shuffled_and_uses_each_problem_once():
    for total, n in ((5, 3), (7, 7), (4, 9), (10, 1), (6, 4)):
        n = min(n, total)
        rounds = [select.indices_of_round(total, n, number, 1) for number in range(1, 4 * total)]
        flat = sum(rounds, [])
        passes = [flat[start:start + total] for start in range(0, len(flat) - total + 1, total)]
        assert all(sorted(one) == list(range(total)) for one in passes)
        assert all(len(set(one)) == n for one in rounds)
        assert len(set(map(tuple, passes))) > len(passes) / 2
        assert rounds[2] == select.indices_of_round(total, n, 3, 1)
    assert len({tuple(select.indices_of_round(6, 6, 1, seed)) for seed in range(20)}) > 15


def test_what_is_refused(files, tmp_path, capsys):
    def refused(*flags, **options):
        with pytest.raises(SystemExit) as end:
            run(files, *flags, **options)
        err = capsys.readouterr().err
        pathlib.Path(files["out"] + ".partial").unlink(missing_ok=True)  # its lock is still held
        assert end.value.code == 2 and err.startswith("select.py: error: ") and err.count("\n") == 1
        return err

    assert "--at-most must be at least 0" in refused("--at-most", "-1")
    assert "--n must be at least 1" in refused("--n", "0", scored=False)
    assert "--at-least is above --at-most" in refused("--at-least", "2", "--at-most", "1")
    for options in ({"scored": False}, {}):
        flags = [] if options == {} else ["--at-most", "1"]
        assert "--scored goes with --at-least, --at-most or both" in refused(*flags, **options)
    for flag in "--seed", "--round":
        assert "--seed and --round belong to --n" in refused(flag, "3", scored=False)
    run(files, "--at-most", "1")
    assert "made with other at_most; delete it" in refused("--at-most", "0")
    assert "made with other" in refused(scored=False)
    os.unlink(files["out"])
    (tmp_path / "scored.jsonl").write_text('{"id": "a"}\n')
    assert (":1: missing field 'correct'; run score.py first" in refused("--at-most", "1"))
    (tmp_path / "scored.jsonl").write_text('{"id": "z", "correct": true}\n')
    assert "none of its problems has a rollout in" in refused("--at-most", "1")
    with open(files["prompts"], "a") as file:
        file.write('{"id": "b", "prompt": "1 1=2:"}\n')
    assert (f"{files['prompts']}:4: duplicate id 'b', first in {files['prompts']}:2"
            in refused("--n", "1", scored=False))
