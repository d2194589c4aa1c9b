"""What measures speed and memory, at toy size: its arms run, its counts of work are right, its reports hold what the READMEs quote.
No test looks at a time."""
import csv
import json
import os
import subprocess
import sys

import pytest
import torch

from experiments import bench, bench_files, roofline


@pytest.fixture(autouse=True)
def keep_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measure(tmp_path, model, *flags):
    out = str(tmp_path / "bench.json")
    args = bench.parse_args(["--sizes", "toy", "--rounds", "2", "--embedded", model, "--out", out, *flags])
    return bench.main(args), out


def test_generate_and_update_at_toy_size(tmp_path, tiny_model, monkeypatch, capsys):
    def unable(*args, **flags):
        raise RuntimeError("made for GPUs")

    monkeypatch.setattr(bench.transformers.Qwen2ForCausalLM, "generate_batch", unable)
    report, out = measure(tmp_path, tiny_model, "--only", "generate", "update")
    entry = report["entries"]["generate/toy"]
    ours, theirs, continuous, copies = entry["arms"].values()
    size = bench.SIZES["toy"]
    for arm in (ours, theirs, copies):  # nothing ends early
        assert [one["tokens"] for one in arm["rounds"]] == 2 * [size.prompts * size.n * size.new_tokens]
    assert continuous == {"missing": "RuntimeError: made for GPUs"}
    assert entry["same_tokens_p"] > 0.001
    assert 0 < ours["roofline"] < 1 and ours["ours_is_faster"] == pytest.approx([1, 1, 1])
    ratios = [a["cpu_s"] / b["cpu_s"] for a, b in zip(theirs["rounds"], ours["rounds"])]  # equally many tokens
    assert theirs["ours_is_faster"] == pytest.approx([sum(ratios) / 2, min(ratios), max(ratios)], rel=0.2)
    assert theirs["ours_is_faster"][1] <= theirs["ours_is_faster"][0] <= theirs["ours_is_faster"][2]
    with open(out) as file:
        assert json.load(file) == report
    assert "made for GPUs" in capsys.readouterr().out


def test_two_threads_are_also_two_processes(tmp_path, tiny_model):
    report, _ = measure(tmp_path, tiny_model, "--only", "generate", "--threads", "2")
    assert torch.get_num_threads() == 2
    arms, size = report["entries"]["generate/toy"]["arms"], bench.SIZES["toy"]
    rows = size.prompts * size.n
    assert [one["tokens"] for one in arms["generate.py, 2 processes"]["rounds"]] == 2 * [rows * size.new_tokens]


def test_the_sizes_that_help_names_are_those_there_are():
    assert sorted(bench.NAMES) == sorted(roofline.SIZES)


def test_step_without_trl_and_kept_entries(tmp_path, tiny_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    monkeypatch.setitem(sys.modules, "trl", None)
    (tmp_path / "bench.json").write_text('{"entries": {"fixed": {"commands": {}}}}')
    report, _ = measure(tmp_path, tiny_model, "--only", "step")
    ours, trl = report["entries"]["step/toy"]["arms"].values()
    assert ours["rounds"][0]["tokens"] == 32 and trl["missing"].startswith("not installed")
    assert "fixed" in report["entries"]


def test_plain_update_is_the_update_of_train(tmp_path, tiny_model):
    """The two arms of `update` do the same work: without smoothing they move the weights alike."""
    rows = [{"id": f"{k // 2}", "sample": k % 2, "prompt_ids": [5, 6, 7][:1 + k // 2],
             "completion_ids": [8, 9, 4, 10][k % 2:], "logprobs": [-1.0] * (4 - k % 2), "finish_reason": "stop",
             "correct": k % 2 == 0, "reward": float(k % 2 == 0)} for k in range(4)]
    rollouts, moved = str(tmp_path / "scored.jsonl"), []
    with open(rollouts, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    bench.train.main(bench.train.parse_args([
        "--model", tiny_model, "--rollouts", rollouts, "--out", str(tmp_path / "round"), "--method", "grpo",
        "--temperature", "1", "--lr", "1e-3"]))
    for folder in (str(tmp_path / "round"), tiny_model):
        model = bench.policies.load_model(folder, torch.float32, "cpu", bench.train.check_model(folder))
        if folder == tiny_model:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.01)
            bench.plain_update(model, optimizer, rows, 16384)
        moved.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.nn.functional.cosine_similarity(*(one.double() for one in moved), dim=0) > 1 - 1e-9
    # AdamW's first step is lr * sign of the gradient: 2e-3 wherever the signs differ
    assert (moved[0] - moved[1]).abs().mean() < 1e-5


def test_needed_work_counts_each_prompt_once():
    """Against a count in loops: every product of every token that must be computed."""
    config = bench.transformers.Qwen2Config(**roofline.SIZES["toy"].config)
    width, kv, middle, layers, vocab = 32, 16, 64, 2, 64
    flop = read = 0
    for prompt, lengths in (shape := [(5, [3, 1]), (2, [4, 4])]):
        ends = [(1, prompt)] + [(prompt + 1, prompt + length - 1) for length in lengths]
        for first, last in ends:
            for context in range(first, last + 1):
                projections = width * width * 2 + width * kv * 2 + 3 * width * middle
                flop += layers * (2 * projections + 2 * 2 * width * context)
                read += layers * 2 * kv * context
        flop += sum(lengths) * 2 * width * vocab
    read += 4 * (layers * (width * width * 2 + width * kv * 2 + 3 * width * middle) + vocab * width)
    assert roofline.needed(config, shape, 4, training=False) == (flop, 4 * read)
    assert roofline.needed(config, shape, 4, training=True) == (3 * flop, 0)


def test_same_tokens_tells_samplers_apart():
    generator = torch.Generator().manual_seed(0)

    def rows(probs):
        drawn = torch.multinomial(torch.tensor(probs), 90 * 8, True, generator=generator).view(90, 8).tolist()
        return [(i % 3, ids) for i, ids in enumerate(drawn)]

    assert bench.same_tokens(rows([.5, .3, .2]), rows([.5, .3, .2]), 3) > 0.01
    assert bench.same_tokens(rows([.5, .3, .2]), rows([.4, .3, .3]), 3) < 0.01


def test_meter_sees_the_peak_and_not_what_is_outside():
    meter = roofline.Meter("cpu").start()
    torch.ones(2**22).sum()
    meter.outside(lambda: torch.ones(2**25).sum())()
    meter.stop()
    assert 2**24 * 0.9 < meter.extra < 2**26


def test_random_rollouts_are_judged(tmp_path):
    path, out = str(tmp_path / "rollouts.jsonl"), str(tmp_path / "scored.jsonl")
    bench_files.write_rollouts(path, 100, repeat=False)
    bench.score.main(bench.score.parse_args([path, "--out", out]))
    with open(out) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 100 and {row["reason"] for row in rows} <= {"ok", "value"}


def script(name, *flags, code=0):
    """What a script of experiments/ prints, or says where it ends with `code`."""
    done = subprocess.run([sys.executable, os.path.join(bench.ROOT, "experiments", name), *map(str, flags)], capture_output=True,
                          text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"})
    assert done.returncode == code, done.stderr
    return done.stderr if code else done.stdout


@pytest.mark.parametrize("repeat", [(), ("--repeat",)])
def test_rows_a_second_beside_another_checkout(repeat):
    said = script("bench_files.py", "--against", bench.ROOT, "--rows", "100", "--rounds", "2", *repeat)
    lines = [line.split() for line in said.splitlines()[1:]]
    assert [line[:3] for line in lines] == [[stage, "100", what] for stage in ("score.py", "evaluate.py")
                                            for what in ("before", "now", "ratio")]
    for *_, middle, least, most in (line[:6] for line in lines):
        assert 0 < float(least) <= float(middle) <= float(most)
    assert "differ" not in said


def test_kernels_beside_eager_pytorch(tmp_path):
    table, picture = tmp_path / "kernel.csv", tmp_path / "kernel.png"
    said = script("bench_kernel.py", "--device", "cpu", "--logits", "8x32", "4x16", "--linear", "8x16x32", "--no-compile",
                  "--rounds", "2", "--threads", "1", "--dtype", "float32", "--csv", table, "--plot", picture)
    assert "1 thread," in said and "2 rounds" in said and picture.stat().st_size > 0
    with open(table, newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["shape"] for row in rows if row["provider"] == "torch eager"] == ["8x32", "4x16", "8x16x32"]
    ours = [row for row in rows if row["provider"].startswith("fused_")]
    assert len(ours) == 5 and all(float(row["error"]) < 1e-6 and float(row["gradient_error"]) < 1e-5 for row in ours)
    assert {row["forward_ms"] for row in rows if row["provider"] == "torch.compile"} == {"left out"}
    for flags in (["--sweep"], ["--device", "cuda"]):
        assert script("bench_kernel.py", *flags, code=1) == (
            "bench_kernel.py: error: no GPU here, which --device cuda and --sweep need\n")


@pytest.mark.slow
def test_shards(tmp_path):
    out = tmp_path / "shards.json"
    script("bench_shards.py", "--ranks", "1", "2", "--layers", "1", "--out", out)
    rows = json.loads(out.read_text())
    assert [(row["files"], row["ranks"], len(row["peak_bytes"])) for row in rows] == [
        (files, ranks, ranks) for files in ("one file", "several files") for ranks in (1, 2)]
    assert all(row["floor_bytes"] == 16 * row["weights"] // row["ranks"] for row in rows)



@pytest.mark.slow
def test_scale_and_fixed(tmp_path, tiny_model):
    out, picture = tmp_path / "bench.json", tmp_path / "scale.png"
    out.write_text('{"entries": {"update/toy": {}}}')
    script("bench_scale.py", "--rows", "20", "--rollouts", "16", "--rounds", "1", "--embedded", tiny_model, "--out", out, "--plot", picture)
    entries = json.loads(out.read_text())["entries"]
    rows = {name: [one["rows"] for one in results] for name, results in entries["scale"]["stages"].items()}
    assert rows == {"generate.py": [16], "score.py": [20], "train.py": [16], "evaluate.py": [20]}
    commands = entries["fixed"]["commands"]  # the peak is the process's own, not that of the script, which holds torch
    assert commands["python -c pass"]["peak_bytes"] < commands["import torch"]["peak_bytes"] / 5
    assert "update/toy" in entries and picture.stat().st_size > 0
