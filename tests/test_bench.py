"""The benches at toy size: their arms run and do equal work, their reports hold what they should.
No test looks at a time."""
import json
import os
import subprocess

import numpy as np
import pytest
import torch
import transformers

from experiments import bench, bench_kernel


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_every_part_at_toy_size(tmp_path, capsys, monkeypatch):
    def absent(meter, seed):
        raise ImportError("No module named 'peer'")

    monkeypatch.setattr(bench, "bench_score", lambda own, rows: own.measure(
        f"score/{rows}", "rows", {"score.py": lambda meter, seed: sum(range(10**5)),
                                  "peer": absent}))
    out = tmp_path / "bench.json"
    bench.main(bench.parse_args([
        "--only", "generate", "score", "update", "evaluate", "--sizes", "toy", "--rows", "65",
        "--rounds", "1", "--out", str(out)]))
    entries = json.loads(out.read_text())["entries"]
    assert list(entries) == ["generate/toy", "score/65", "update/toy", "evaluate/65"]
    assert entries.pop("score/65")["arms"]["peer"] == "ImportError: No module named 'peer'"
    for entry in entries.values():
        ours, *others = entry["arms"].values()
        assert ours["ours_is_faster"] == [1, 1, 1] and ours["a_second"] > 0
        for one in others:
            middle, least, most = one["ours_is_faster"]
            assert 0 < least <= middle <= most and one["peak_mib"] >= 0
    assert capsys.readouterr().out.count("\n") == 2 + 4 + 2 * 3  # generate has four arms


def test_plain_update_is_the_update_of_train(tmp_path, tiny_model):
    """The arms of `update` do the same work: without smoothing they move the weights alike."""
    rows = [bench.sample_row(k // 2, k % 2, [5, 6, 7][:1 + k // 2], [8, 9, 4, 10][k % 2:],
                             k % 2 == 0) for k in range(4)]
    rollouts, moved = str(tmp_path / "scored.jsonl"), []
    bench.write_rows(rollouts, rows)
    bench.train.main(bench.train.parse_args([
        "--model", tiny_model, "--rollouts", rollouts, "--out", str(tmp_path / "round"),
        "--method", "grpo", "--temperature", "1", "--lr", "1e-3"]))
    for folder in (str(tmp_path / "round"), tiny_model):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if folder == tiny_model:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
            bench.plain_update(model, optimizer, rows, 16384)
        moved.append(torch.cat([weight.detach().flatten() for weight in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*(one.double() for one in moved), dim=0) > 1 - 1e-9
    # AdamW's first step is lr * sign of the gradient: 2e-3 wherever the signs differ
    assert (moved[0] - moved[1]).abs().mean() < 1e-5


def test_plain_pass_at_k_is_that_of_evaluate(tmp_path):
    path, out = str(tmp_path / "scored.jsonl"), tmp_path / "eval.json"
    rng = np.random.default_rng(0)
    bench.write_rows(path, [bench.sample_row(k // 8, k % 8, [3], [4], bool(rng.random() < 0.3),
                                             task="math", prompt="?", answer="7", completion="7",
                                             pred="7", reason="ok") for k in range(96)])
    bench.evaluate.main(bench.evaluate.parse_args([path, "--out", str(out)]))
    theirs = json.loads(out.read_text())["runs"][0]["pass_at_k"]
    ours = bench.plain_pass_at_k(path)
    assert {str(k): value for k, (value, *_) in ours.items()} == pytest.approx(
        {k: one["value"] for k, one in theirs.items()}, abs=1e-12)
    assert all(low <= value <= high for value, low, high in ours.values())


def test_what_takes_no_time_is_left_out_wherever_it_is_imported(tmp_path, monkeypatch):
    """Otherwise loading would count on one side only."""
    now = iter([0, 10, 14, 20])  # begin; an untimed call of 4; end
    with monkeypatch.context() as patch:
        patch.setattr(bench.Meter, "now", lambda self: next(now))
        with bench.Meter("cpu") as meter:
            torch.ones(2**23).sum()
            assert meter.untimed(sum)([1, 2]) == 3
    assert meter.seconds == 16 and 2**25 * 0.9 < meter.peak < 2**27
    left = []
    monkeypatch.setattr(bench.Meter, "untimed", lambda self, function: (
        lambda *args, **flags: left.append(function.__name__) or function(*args, **flags)))
    own = bench.Bench(str(tmp_path), bench.parse_args(["--sizes", "toy"]))
    monkeypatch.setattr(own, "measure", lambda name, unit, arms, made=None: (
        next(iter(arms.values()))(bench.Meter("cpu"), 0)))
    bench.bench_update(own, "toy")
    assert {"describe", "load_model", "load_tokenizer", "save_round"} <= set(left)


def test_kernels_beside_eager_pytorch(tmp_path, capsys):
    out = tmp_path / "kernel.json"
    bench_kernel.main(bench_kernel.parse_args([
        "--logits", "8x32", "4x16", "--linear", "8x16x32", "--no-compile", "--rounds", "2",
        "--out", str(out)]))
    report = json.loads(out.read_text())
    forms = [name for name in report if name.startswith("l")]
    assert forms == ["logits 8x32", "logits 4x16", "linear 8x16x32"]
    for form in forms:
        ours = [one for name, one in report[form].items() if name.startswith("fused_")]
        assert ours and all(max(one["error"]) < 1e-5 for one in ours)
        assert report[form]["torch.compile"] == "left out"
        assert report[form]["torch eager"]["x_eager"] == [1, 1, 1]
    assert torch.cuda.is_available() or report["logits 4x16"]["TRL"] == "needs a GPU"
    assert capsys.readouterr().out.count("| fused_entropy, in place |") == 2


def test_gpu_sh_runs_parts_and_says_which_failed(tmp_path):
    """With a stand-in for Python that fails at the second part."""
    (tmp_path / "python").write_text(
        '#!/bin/bash\necho "$@"\n[[ "$*" != *bench_kernel.py* ]]\n')
    (tmp_path / "python").chmod(0o755)
    folder = tmp_path / "out"

    def run(*parts):
        command = ["bash", os.path.join(bench.ROOT, "experiments", "gpu.sh"), str(folder), *parts]
        done = subprocess.run(command, capture_output=True, text=True, env={
            **os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"})
        return done.returncode, done.stderr

    assert run() == (1, "gpu.sh: error: failed: kernel-bench\n")
    logs = {path.stem: path.read_text() for path in folder.iterdir()}
    assert sorted(logs) == ["bench", "kernel", "kernel-bench", "stages"]
    for file in (word for word in " ".join(logs.values()).split() if word.endswith(".py")):
        assert os.path.exists(os.path.join(bench.ROOT, file)), file
    assert run("stages") == (0, "")
    assert run("stage") == (2, "gpu.sh: error: no part named stage\n")


@pytest.mark.slow
def test_score_beside_math_verify(tmp_path):
    pytest.importorskip("math_verify")
    own = bench.Bench(str(tmp_path), bench.parse_args(["--rounds", "1"]))
    bench.bench_score(own, 10)
    ours, loop = own.entries["score/10"]["arms"].values()
    assert ours["a_second"] > 0 and loop["a_second"] > 0
