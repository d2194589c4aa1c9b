"""data/select.py: a round's share of the problems, and those solved a given number of times."""
import itertools
import json

import pytest

from conftest import meta_of, read, refusal, stage, write
from data import select

LINES = ['{"id" : "a",  "prompt": "1 2=3:", "note": 1e1}\n', '{"id": "b", "prompt": "4=4:"}\n',
         '{"id": "c", "prompt": "5=5:"}\n']
PROMPTS, BOTH = "--prompts prompts", "--prompts prompts --scored scored"


def lines(ids):
    return "".join(line for line in LINES if json.loads(line)["id"] in ids)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run the script beside problems with 0, 1 and 3 of 4 rollouts right; the output's text."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts").write_text(lines("abc"))
    write("scored", [{"id": id, "sample": i, "correct": i < right} for i in range(4)
                     for id, right in (("c", 3), ("a", 0), ("b", 1))])
    numbers = itertools.count()

    def run(flags):
        args = select.parse_args(["--out", f"out-{next(numbers)}", *flags.split()])
        select.main(args)
        return (tmp_path / args.out).read_text()
    return run


@pytest.mark.parametrize("flags, kept", [
    ("--at-most 0", "a"), ("--at-most 1", "ab"), ("--at-most 3", "abc"),
    ("--at-least 0 --at-most 1", "ab"), ("--at-least 1", "bc"), ("--at-least 1 --at-most 2", "b"),
    ("--at-least 1 --at-most 3", "bc"), ("--at-least 2 --at-most 2", ""), ("--at-least 4", "")])
def test_problems_with_so_many_right_rollouts_pass_as_they_are(run, capsys, flags, kept):
    """Those without rollouts are left out."""
    assert run(f"{BOTH} {flags}") == lines(kept)
    with open("prompts", "a") as file:
        file.write('{"id": "d", "prompt": "6=6:"}\n')
    assert run(f"{BOTH} {flags}") == lines(kept)
    assert capsys.readouterr().out == (
        f"out-0: {len(kept)} of 3 problems\n"
        f"out-1: {len(kept)} of 4 problems (1 without rollouts left out)\n")


def test_rounds_go_on_over_what_the_filter_leaves(run):
    ids = [json.loads(run(f"{BOTH} --at-least 1 --n 1 --round {number}"))["id"]
           for number in (1, 2, 3, 4)]
    assert sorted(ids[:2]) == sorted(ids[2:]) == ["b", "c"]
    assert sorted(run(f"{PROMPTS} --n 9")) == sorted(lines("abc"))
    assert run(PROMPTS) == lines("abc")  # in the file's order


def test_without_prompts_the_rollouts_are_written_with_their_sampling(run, tmp_path):
    sampling = {"temperature": 0.7}
    (tmp_path / "scored.meta.json").write_text(json.dumps({"sampling": sampling}))
    run("--scored scored --at-least 1 --at-most 2")
    assert read("out-0") == [row for row in read("scored") if row["id"] == "b"]
    assert meta_of("out-0")["sampling"] == sampling


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


@pytest.mark.parametrize("flags, told", [
    (f"{BOTH} --at-most -1", "--at-most must be at least 0"),
    (f"{PROMPTS} --n 0", "--n must be at least 1"),
    (f"{BOTH} --at-least 2 --at-most 1", "--at-least is above --at-most"),
    (BOTH, "--scored goes with --at-least, --at-most or both"),
    (f"{PROMPTS} --at-most 1", "--scored goes with --at-least, --at-most or both"),
    (f"{PROMPTS} --seed 3", "--seed and --round belong to --n"),
    (f"{PROMPTS} --round 3", "--seed and --round belong to --n"),
    (f"{BOTH} --out made --at-most 0", "made with other at_most; delete it"),
    (f"{PROMPTS} --out made", "made with other"),
    (f"{PROMPTS} --scored unscored --at-most 1",
     ":1: missing field 'correct'; run score.py first"),
    (f"{PROMPTS} --scored others --at-most 1", "none of its problems has a rollout in"),
    ("--prompts twice --n 1", "twice:4: duplicate id 'b', first in twice:2")])
def test_what_is_refused(run, capsys, flags, told):
    stage(select, *BOTH.split(), "--at-most", 1, "--out", "made")
    write("unscored", [{"id": "a"}])
    write("others", [{"id": "z", "correct": True}])
    write("twice", [{"id": id, "prompt": "1"} for id in "abcb"])
    line = refusal(capsys, run, flags)
    assert line.startswith("select.py: error: ") and told in line
