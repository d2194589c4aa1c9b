"""experiments/gpu.py and cost.py: what a round costs is computed right, a report loses nothing, and
every part runs at toy size (slow). No test looks at a time."""
import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from experiments import cost

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.join(ROOT, "experiments", "gpu.py")
RATES = {name: value for name, (value, *_) in cost.RATES.items()}


# ---- What a round costs --------------------------------------------------------------------------
@pytest.mark.parametrize("name", cost.MODELS)
def test_weights_are_those_of_transformers(name):
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    model, head_dim = cost.MODELS[name], 64 if name == "0.5b" else 128
    config = Qwen2Config(
        vocab_size=model.vocab, hidden_size=model.hidden, num_hidden_layers=model.layers,
        num_attention_heads=model.hidden // head_dim, intermediate_size=model.intermediate,
        num_key_value_heads=model.kv_width // head_dim, tie_word_embeddings=model.tied)
    with torch.device("meta"):
        network = Qwen2ForCausalLM(config)
    assert model.weights() == sum(weight.numel() for weight in network.parameters())


def amounts(work, model=cost.MODELS["1.5b"], rates=RATES):
    return {(stage, what): amount for stage, what, _, amount, _, _ in
            cost.stages(model, work, rates)}


def test_amounts_by_hand():
    weights = 1_543_714_304
    found = amounts(cost.Round(updates=4))
    tokens = 4 * 32 * 8 * 2048
    assert found["train.py", "update"] == 6 * weights * tokens
    assert found["train.py", "pi_old"] == 2 * weights * tokens * 3 / 4
    assert found["train.py", "save weights and moments, fsync"] == 12 * weights
    assert found["generate.py", "write rows"] == 33 * tokens
    assert found["generate.py", "sample"] == 4 * 2048  # 1024 rollouts, 256 at once
    assert found["score.py", "verdicts, one core"] == 1024


def test_the_decode_step_is_the_slowest_of_three():
    def seconds(**changes):
        rows = cost.stages(cost.MODELS["1.5b"], cost.Round(new_tokens=2000),
                           {**RATES, "sampling_share": 1, **changes})
        return next(row[-1] for row in rows if row[1] == "sample")

    weights, cache = 1_543_714_304, 256 * (256 + 1000) * 2 * 28 * 256 * 2
    assert seconds(step=10.0) == pytest.approx(2000 * 10)
    assert seconds(step=0, product=1e30) == pytest.approx(2000 * (2 * weights + cache) / RATES["copy"])
    assert seconds(step=0, copy=1e30) == pytest.approx(2000 * 2 * weights * 256 / RATES["product"])


def test_larger_rounds_and_more_gpus_save_what_they_can():
    model, one = cost.MODELS["7b"], cost.Round(gpus=8)
    work, fixed = cost.totals(cost.stages(model, one, RATES))
    work_of_4, fixed_of_4 = cost.totals(cost.stages(model, dataclasses.replace(one, updates=4),
                                                    RATES))
    assert fixed_of_4 == pytest.approx(fixed, rel=0.01)  # but for the rows' bytes
    assert work_of_4 > work
    on_one = dataclasses.replace(one, gpus=1)
    updates = [row[-1] for work in (one, on_one) for row in cost.stages(model, work, RATES)
               if row[1] == "update"]
    assert updates[1] == pytest.approx(8 * updates[0])
    total = sum(row[-1] for row in cost.stages(model, one, RATES))
    assert total == pytest.approx(work + fixed)


def test_cost_md_holds_what_the_command_prints():
    """The tables of cost.md are those of cost.py."""
    with open(os.path.join(ROOT, "experiments", "cost.md"), encoding="utf-8") as file:
        text = file.read()
    for name, gpus in ("1.5b", 1), ("7b", 8):
        for line in cost.markdown(name, gpus):
            assert line.strip() in text


def test_measured_rates_replace_assumed_ones():
    lines = list(cost.markdown("7b", 8, {"product": [5e14, "FLOP/s", "measured on a test"]}))
    assert "| product | 5e+14 FLOP/s | measured on a test |" in lines
    assert not any("assumed: an H100's bf16 matrix products" in line for line in lines)
    assert lines[2:] != list(cost.markdown("7b", 8))[2:]


# ---- The report ----------------------------------------------------------------------------------
@pytest.fixture
def gpu():
    from experiments import gpu

    return gpu


def test_a_report_keeps_the_other_parts_and_is_written_at_every_row(tmp_path, gpu):
    out = str(tmp_path / "gpu.json")
    report = gpu.Report(out)
    report.begin("kernel", "a machine")
    report.add("times", {"": "one", "ms": 1.5})
    report.begin("update", "a machine")
    report.add("train.py", {"": "toy", "of products": 0.4321, "tokens/s": 12345.6})
    report.add("train.py", {"": "large: OutOfMemoryError: too large"})
    report.rate("update_share", 0.4321)
    again = gpu.Report(out)  # as another process finds it
    again.begin("kernel", "another machine")
    again.add("times", {"": "two", "ms": 2.0, "MiB": 7})
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["parts"]["kernel"] == {
        "machine": "another machine", "tables": {"times": [{"": "two", "ms": 2.0, "MiB": 7}]}}
    assert len(found["parts"]["update"]["tables"]["train.py"]) == 2
    assert found["rates"]["update_share"] == [0.4321, "", "measured on a machine"]
    text = (tmp_path / "gpu.md").read_text()
    assert "|  | of products | tokens/s |\n|---|---|---|\n| toy | 43.2% | 12,346 |\n" in text
    assert "| large: OutOfMemoryError: too large |  |  |\n" in text
    assert "| two | 2 | 7 |" in text and "one" not in text


def test_a_part_goes_on_after_a_failure_and_ends_in_time(tmp_path, gpu, monkeypatch):
    monkeypatch.setattr(gpu, "roofs", lambda *_: (1e9, 1e9))
    report = gpu.Report(str(tmp_path / "gpu.json"))
    args = argparse.Namespace(part="update", dry=True, minutes=1.0)
    part = gpu.Part(args, report, str(tmp_path))

    def broken():
        yield {"figure": 1.0}
        raise RuntimeError("broken\nhere")

    assert part.add("table", "first", broken()) == [{"": "first", "figure": 1.0}]
    part.add("table", "second", (gpu.generate.fail("unfit") for _ in [0]))
    part.deadline = 0
    assert part.add("table", "late", iter([{"figure": 2.0}])) == []
    rows = report.part["tables"]["table"]
    assert rows == [{"": "first", "figure": 1.0}, {"": "first: RuntimeError: broken here"},
                    {"": "second: SystemExit: 2"}, {"": "late: TimeoutError: no time left"}]


def test_gates_are_taken_from_the_kernels_figures(gpu):
    def row(both, **more):
        return {"forward_ms": 0.5, "backward_ms": both - 0.5, "both_ms": both, "error": 1e-7,
                "extra_mib_forward": 0.25, "extra_mib_both": 0.5, **more}

    found = {"logits": {"torch eager": row(30.0), "fused_entropy": row(2.5),
                        "torch.compile": {"forward_ms": "left out", "both_ms": ""},
                        "fused_entropy, in place": row(2.0, extra_mib_both=0.75)},
             "linear": {"fused_linear_entropy": row(33.0)}}
    measured = [row["measured"] for row in gpu.gates(found)]
    assert measured == ["0.50 / 2.00 / 2.50", "12.0x / left out", "0.2 / 0.8", "1e-07", "33.0"]


def test_bad_flags_and_no_gpu(tmp_path):
    def run(*flags):
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run([sys.executable, SCRIPT, *flags], capture_output=True, text=True,
                              env=environment)
        return done.returncode, done.stderr.splitlines()[-1]

    assert run() == (2, "gpu.py: error: --out is required")
    assert run("--out", "x.txt") == (2, "gpu.py: error: --out must end with .json")
    code, said = run("--out", str(tmp_path / "none" / "x.json"))
    assert code == 2 and said.endswith("no such folder")
    code, said = run("--out", str(tmp_path / "x.json"), "--part", "kernel")
    assert code == 1 and "no GPU here" in said


def test_the_cost_of_a_round_on_several_gpus(capsys):
    from experiments import gpu  # which imports torch

    gpu.main(gpu.parse_args(["--cost", "7b", "--gpus", "4"]))
    assert capsys.readouterr().out.splitlines() == "\n".join(cost.markdown("7b", 4, {})).splitlines()


def test_a_part_ends_after_its_minutes(tmp_path):
    out = tmp_path / "gpu.json"
    command = [sys.executable, SCRIPT, "--dry", "--part", "pipeline", "--minutes", "0.001", "--out", str(out)]
    subprocess.run(command, capture_output=True, timeout=300)
    tables = json.loads(out.read_text())["parts"]["pipeline"]["tables"]
    rows = [row[""] for name, rows in tables.items() if name != "roofs" for row in rows]
    assert len(rows) == 4 and all(row.endswith("TimeoutError: no time left") for row in rows)


# ---- All of it -----------------------------------------------------------------------------------
WITHOUT_FIGURES = re.compile(r"not there|not installed|needs a GPU|left out|made for GPUs")


@pytest.mark.slow
def test_every_part_at_toy_size(tmp_path):
    """Every row of every table holds a figure, or one of the few reasons not to have one."""
    out = str(tmp_path / "gpu.json")
    subprocess.run([sys.executable, SCRIPT, "--out", out, "--dry"], check=True)
    with open(out, encoding="utf-8") as file:
        found = json.load(file)
    assert list(found["parts"]) == ["kernel", "tests", "generate", "update", "pipeline", "peers"]
    rows = [(table, row) for part in found["parts"].values()
            for table, content in part["tables"].items() for row in content]
    for table, row in rows:
        text = " ".join(map(str, row.values()))
        figures = [one for key, one in row.items() if key and re.match(r"[\d.]", str(one))]
        assert figures or WITHOUT_FIGURES.search(text), (table, row)
    assert sum(not WITHOUT_FIGURES.search(str(row)) for _, row in rows) >= 30
    stages = [row for table, row in rows if table.startswith("a round of")]
    assert [row[""].split(",")[0] for row in stages] == ["generate.py", "score.py", "train.py"]
    measured = {"copy", "product", "step", "update_share", "save", "hash", "load", "start"}
    assert found["rates"].keys() == measured <= cost.RATES.keys()
    assert all(value > 0 for value, *_ in found["rates"].values())
    with open(out.replace(".json", ".md"), encoding="utf-8") as file:
        tables = [line for line in file if line.startswith("|")]
    titles = {(part, table) for part, content in found["parts"].items()
              for table in content["tables"]}
    assert len(tables) == len(rows) + 2 * len(titles)
    said = subprocess.run([sys.executable, SCRIPT, "--cost", "7b", "--out", out],
                          capture_output=True, text=True, check=True).stdout
    assert said.count("dry run") == len(measured)
