"""The README's experiment: experiments/paper.py chooses by its rule, does every run once and repeats what it did; experiments/figures.py counts right."""
import csv
import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments import figures, paper
import evaluate

KS = [2**power for power in range(9)]
DS = "--method ds-grpo --smooth-level"


def fake(name, flags, lr, rounds, seed, distribution, split, problems, n):
    """A run whose Pass@k depends on its setting alone: GRPO best at 1 with lr 2e-4, one sequence-level setting best of all at large k."""
    first = {"1e-4": 0.28, "2e-4": 0.30, "4e-4": 0.29}[lr]
    large = 0.5 if not flags or flags == "--method grpo" else 0.6
    if flags and "sequence --gamma-p 1.0" in flags:
        first, large = first - 0.009, 0.7
    if flags and "--entropy-coef 0.2" in flags:
        first, large = first - 0.011, 0.9  # gives up too much Pass@1 for the rule
    correct = np.random.default_rng(seed).binomial(n, first, problems).tolist()
    passes = {str(k): first if k == 1 else large + 1e-6 * seed for k in KS if k <= n}
    line = {"step": 4, **{key: 0.5 for key in ("pass@1", "entropy", "entropy_correct", "entropy_wrong", "completion_len")}}
    return {"pass_at_k": passes, "curve": [line] if flags else [], "counts": [[n, c, min(c, 3), 4] for c in correct]}


@pytest.fixture
def suite(tmp_path, monkeypatch):
    """Run experiments/paper.py on fake runs, tables in tmp_path; returns the runs that were done."""
    monkeypatch.setattr(paper, "HERE", str(tmp_path))
    monkeypatch.setattr(paper, "overhead", lambda *_: None)

    def start(*flags, limit=10**6, run=fake):
        done = []

        def sequential(one_run, todo, keep, jobs):
            for label, arguments in todo:
                if len(done) == limit:
                    raise KeyboardInterrupt
                start.jobs = jobs
                keep(label, run(*arguments))
                done.append((label, arguments))
        monkeypatch.setattr(paper, "run", sequential)
        monkeypatch.setattr(sys, "argv", ["paper.py", *flags])
        paper.main()
        return done
    return start


def rows(folder, name):
    with open(folder / name, newline="") as file:
        return list(csv.DictReader(file))


def test_the_suite_chooses_by_its_rule_and_reports_every_arm(suite, tmp_path):
    done = suite()
    settings = {label: arguments for label, arguments in done if len(label) == 3 and label[1] in paper.DISTRIBUTIONS}
    assert {arguments[2] for arguments in settings.values()} == {"2e-4"}  # the best for GRPO's Pass@1
    assert settings["ds-sequence", "main", 5][1] == f"{DS} sequence --gamma-p 1.0 --gamma-n 0.1"  # the chosen level has the core arm's five seeds
    assert ("ds-token", "main", 4) not in settings and ("ds-token", "low-multiplicity", 1) not in settings
    assert settings["ds-positive", "main", 1][1] == f"{DS} sequence --gamma-p 1.0 --gamma-n 0"
    assert settings["ds-negative", "main", 1][1] == f"{DS} sequence --gamma-p 0 --gamma-n 0.1"
    assert settings["entropy-bonus", "main", 1][1] != "--method grpo --entropy-coef 0.2"  # best at large k, but not within 0.01 of GRPO's Pass@1
    table = rows(tmp_path, "endpoints.csv")
    assert list(table[0]) == ["arm", "distribution", "seed", "k", "pass_at_k"]
    seeds = {}
    for row in table:
        seeds.setdefault((row["arm"], row["distribution"]), set()).add(int(row["seed"]))
    core, every = {"base", "grpo", "ds-sequence", "ds-entropy", "entropy-bonus", "entropy-penalty"}, set(paper.CANDIDATES) | {"base", "ds-positive", "ds-negative"}
    assert seeds == {**{(arm, "main"): {1, 2, 3, 4, 5} if arm in core else {1, 2, 3} for arm in every},
                     **{(arm, "low-multiplicity"): {1, 2, 3} for arm in core}}
    assert len(rows(tmp_path, "gamma.csv")) == 9 * len(KS)
    chosen = {row["setting"] for row in rows(tmp_path, "tuning.csv") if row["chosen"] == "yes"}
    assert chosen == {arguments[1] for (arm, _, _), arguments in settings.items() if arm not in ("base", "cispo", "ds-positive", "ds-negative")}
    # tuning sees other problems and another seed than what is reported; nobody has more than four runs
    assert {(arguments[4], arguments[6]) for label, arguments in done if label not in settings and label[0] != "gamma"} == {(100, "tune")}
    assert {arguments[6] for arguments in settings.values()} == {"test"} and not any(arguments[4] == 100 for arguments in settings.values())
    assert all(len(candidates) <= 4 for candidates in paper.CANDIDATES.values())
    names = [arguments[0] for _, arguments in done]
    assert len(set(names)) == len(names)  # no two runs share a folder


def test_it_can_stop_after_the_tuning(suite, tmp_path):
    suite("--tune-only", "--jobs", "3")
    assert suite.jobs == 3 and (tmp_path / "tuning.csv").exists() and not (tmp_path / "endpoints.csv").exists()
    chosen = {row["arm"] for row in rows(tmp_path, "tuning.csv") if row["chosen"] == "yes"}
    assert chosen == {"grpo", *(f"ds-{level}" for level in ("token", "sequence", "reward", "entropy")), "entropy-bonus", "entropy-penalty"}
    before = len(rows(tmp_path, "tuning.csv"))
    done = suite("--arms", "base", "grpo", "ds-sequence")
    assert suite.jobs == 2 and len(done) > 0 and len(rows(tmp_path, "tuning.csv")) == before


def test_the_suite_carries_on_where_it_was_stopped(suite, tmp_path):
    whole = [label for label, _ in suite()]
    tables = {name: (tmp_path / name).read_text() for name in ("tuning.csv", "endpoints.csv", "counts.jsonl", "curves.csv", "gamma.csv")}
    assert suite() == []
    for name in tables:
        (tmp_path / name).unlink()
    labels = []
    for limit in (2, 17, 40, 10**6):
        try:
            labels += [label for label, _ in suite(limit=limit)]
        except KeyboardInterrupt:
            labels += whole[len(labels):len(labels) + limit]
    assert labels == whole and tables == {name: (tmp_path / name).read_text() for name in tables}


def test_the_suite_lists_adds_a_seed_and_checks(suite, tmp_path, capsys):
    with pytest.raises(SystemExit, match="depends on these"):
        suite("--list")
    assert "learning rate: 3 runs left" in capsys.readouterr().out
    suite()
    done = suite("--arms", "grpo", "--seeds", "7", "--distributions", "main")
    assert [label for label, _ in done] == [("grpo", "main", 7)]
    suite("--list")
    assert "core arms: 0 runs left" in capsys.readouterr().out
    before = (tmp_path / "endpoints.csv").read_text()
    check = ("--arms", "grpo", "--seeds", "3", "--distributions", "main", "--check")
    with pytest.raises(SystemExit) as end:
        suite(*check)
    assert end.value.code == 0 and "grpo main 3: equal" in capsys.readouterr().out
    with pytest.raises(SystemExit) as end:
        suite(*check, run=lambda *arguments: {**fake(*arguments), "pass_at_k": {"1": 0.25}})
    assert end.value.code == 1 and "differs by up to 0.05" in capsys.readouterr().out
    assert (tmp_path / "endpoints.csv").read_text() == before


def test_another_experiment_has_tables_of_its_own(suite, tmp_path, monkeypatch, capsys):
    """With the settings that the tuning found; the main table cannot get rows of other rounds or of another learning rate."""
    suite("--arms", "grpo", "ds-sequence", "--seeds", "1")
    before = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for flags in (("--rounds", "60"), ("--lr", "1e-4"), ("--rounds", "60", "--tables", f"{tmp_path}/")):
        with pytest.raises(SystemExit):
            suite(*flags)
        assert "need --tables of their own" in capsys.readouterr().err
    done = suite("--rounds", "60", "--lr", "1e-4", "--tables", str(tmp_path / "long"), "--arms", "grpo", "ds-sequence", "--seeds", "1", "--distributions", "main")
    assert [arguments[:5] for _, arguments in done] == [("paper/long-grpo-main-1", "--method grpo", "1e-4", 60, 1), (
        "paper/long-ds-sequence-main-1", f"{DS} sequence --gamma-p 1.0 --gamma-n 0.1", "1e-4", 60, 1)]
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == before
    assert {row["arm"] for row in rows(tmp_path / "long", "endpoints.csv")} == {"grpo", "ds-sequence"}
    monkeypatch.setattr(sys, "argv", ["figures.py", "--tables", str(tmp_path / "long")])
    figures.main()
    assert "| DS-GRPO (sequence) | 1 |" in capsys.readouterr().out and (tmp_path / "long" / "passk.png").exists()


def test_figures_agree_with_evaluate_and_with_intervals_by_hand():
    rng = np.random.default_rng(0)
    counts = np.stack([np.full(40, 64), rng.integers(0, 65, 40), rng.integers(0, 4, 40), np.full(40, 5)], 1)
    for k in (1, 3, 64):
        assert np.allclose(figures.pass_at_k(counts, k), evaluate.pass_at_k(64, k)[counts[:, 1]], atol=1e-12)
    # Student t by hand: 3 values 1, 2, 6: mean 3, sd sqrt(7), t(2) = 4.302653
    assert figures.interval([1, 2, 6]) == (3.0, pytest.approx(4.302653 * 7**0.5 / 3**0.5))
    one, other = ({seed: np.array([[2, c, 0, 1]] * 4) for seed, c in enumerate(values)} for values in ((1, 2, 2), (1, 1, 1)))
    measure = lambda counts: counts[:, 1] / counts[:, 0]
    assert figures.difference(one, other, measure).startswith("+0.333 [-0.384, +1.050] (2/3)")
    # One seed says nothing of the spread over seeds: no interval.
    assert figures.difference({0: one[1]}, {0: other[1]}, measure) == "+0.500 (one seed)"


@pytest.mark.parametrize("freedom, quantile", [(1, 12.70620), (2, 4.302653), (3, 3.182446), (4, 2.776445), (5, 2.570582), (9, 2.262157),
                                               (10, 2.228139), (19, 2.093024), (30, 2.042272), (100, 1.983972), (1000, 1.962339)])
def test_quantiles_of_student_t_as_printed_in_tables(freedom, quantile):
    assert figures.quantile_t(freedom) == pytest.approx(quantile, abs=6e-6)


def test_student_t_is_the_integral_of_its_density():
    for freedom in range(1, 40):
        scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
        for t in (0.3, 1.7, 4.0):
            x = np.linspace(0, t, 4001)
            density = scale * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)
            area = 2 * (density.sum() - (density[0] + density[-1]) / 2) * (x[1] - x[0])
            assert figures.student_t(t, freedom) == pytest.approx(area, abs=1e-6)


def test_more_seeds_than_a_table_of_t_has_rows():
    mean, half = figures.interval(range(12))
    assert mean == 5.5 and half == pytest.approx(2.200985 * 13**0.5 / 12**0.5)  # sd sqrt(13), t(11)


def test_a_seed_is_predicted_by_the_others(capsys):
    """By hand: of 2, 4 and 6 of 10 correct, the interval of any two holds the third; t(1) = 12.706. 9, 9, 9, 9 and 1: all but the 1, as t(3) = 3.182."""
    runs = lambda *correct: {seed: np.array([[10, c, 0, 1]]) for seed, c in enumerate(correct)}
    figures.predicted({("grpo", "main"): runs(2, 4, 6), ("base", "main"): runs(1, 2)}, [1])
    assert "3 of 3 Pass@k" in capsys.readouterr().out
    figures.predicted({("grpo", "main"): runs(9, 9, 9, 9, 1)}, [1])
    assert "4 of 5 Pass@k" in capsys.readouterr().out


def test_figures_draw_what_the_suite_leaves(suite, tmp_path, monkeypatch, capsys):
    suite()
    with open(tmp_path / "overhead.csv", "w") as file:
        file.write("pair,arm,cpu_s,peak_rss_mib\n0,grpo,10,100\n0,ds-token,11,100\n1,ds-token,12,103\n1,grpo,10,100\n")
    monkeypatch.setattr(figures, "HERE", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["figures.py"])
    figures.main()
    out = capsys.readouterr().out
    assert "### main" in out and "### low-multiplicity" in out and "minus GRPO" in out
    assert "CPU time of train.py: 1.150 [1.100, 1.200], 2 pairs; GRPO 10.0" in out and "peak memory of train.py: 1.015" in out
    for name in ("passk.png", "training.png", "gamma.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_run_of_the_suite_is_a_run_of_run_sh(tmp_path, monkeypatch):
    """The stages called as functions of one process leave the bytes that they leave as commands."""
    name = f"test-paper-{os.getpid()}"
    flags = "--method ds-grpo --gamma-p 0.3 --gamma-n 0.03"
    try:
        code = f"from experiments import paper; import json; print(json.dumps(paper.one_run('{name}', '{flags}', '2e-4', 2, 1, 'main', 'test', 10, 8)))"
        here = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = json.loads(subprocess.run([sys.executable, "-c", code], cwd=paper.ROOT, env=here, check=True, capture_output=True, text=True).stdout)
        subprocess.run(["bash", "run.sh", "--name", name + "-sh", "--model", "data/tiny-countdown", "--rounds", "2", "--seed", "1", "--lr", "2e-4", "--eval-problems", "0", "--attention", "model",
                        "--train", flags.partition("ds-grpo ")[2]], cwd=paper.ROOT, env=here, check=True, capture_output=True)
        for file in ("model.safetensors", "optimizer.safetensors"):
            one, two = (open(os.path.join(paper.ROOT, "runs", folder, "round-002", file), "rb").read() for folder in (name, name + "-sh"))
            assert one == two
        assert len(result["counts"]) == 10 and len(result["curve"]) == 8 and list(result["pass_at_k"]) == ["1", "2", "4", "8"]
    finally:
        subprocess.run(["rm", "-rf", *(os.path.join(paper.ROOT, "runs", folder) for folder in (name, name + "-sh"))])
