"""The stages on a GPU beside the same stages on the CPU: the same rows and updates in fp32, most
rows in bf16. Skipped where there is no GPU."""
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from conftest import read

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
FP32 = ["--dtype", "float32"]
MODEL = os.path.join(ROOT, "data", "tiny-countdown")


def call(*command):
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                          text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def rollouts(tmp_path_factory):
    """rollouts(name, device, *flags): 32 problems x 8 samples from the embedded model, with the
    same draws."""
    folder = tmp_path_factory.mktemp("cuda")
    prompts = folder / "prompts.jsonl"
    call("-m", "data.countdown", "--out", prompts, "--n", 32, "--seed", 3)

    def sample(name, device, *flags):
        out = folder / f"{name}.jsonl"
        if not out.exists():
            call("generate.py", "--model", MODEL, "--prompts", prompts, "--out", out, "--n", 8,
                 "--max-new-tokens", 24, "--device", device, *flags)
        return out
    return sample


@pytest.fixture(scope="module")
def scored(rollouts):
    path = rollouts("cpu", "cpu")
    out = path.with_suffix(".scored.jsonl")
    call("score.py", path, "--out", out)
    return out


@pytest.mark.parametrize("name, flags, tolerance, least", [
    ("fp32", [*FP32], 1e-4, 0.98),
    ("fp32-shared", [*FP32, "--attention", "shared"], 1e-4, 0.98),
    ("bf16", [], 0.1, 0.7)])
def test_samples_are_those_of_the_cpu(rollouts, name, flags, tolerance, least):
    """Most rows have the same tokens; log-probs of those agree."""
    pairs = list(zip(*map(read, (rollouts("cpu", "cpu"), rollouts(name, "cuda", *flags))),
                     strict=True))
    same = [(a, b) for a, b in pairs if a["completion_ids"] == b["completion_ids"]]
    assert len(same) >= least * len(pairs)
    for a, b in same:
        assert a["logprobs"] == pytest.approx(b["logprobs"], abs=tolerance)


@pytest.mark.parametrize("method", [
    "--gamma-p 0.3 --gamma-n 0.03", "--checkpoint-activations --gamma-p 0.3",
    "--method grpo --entropy-coef-correct 0.2 --entropy-coef-wrong -0.01",
    f"--method grpo --kl-coef 0.05 --ref-model {MODEL}"])
def test_an_update_is_that_of_the_cpu(scored, tmp_path, method):
    lines, weights = [], []
    for device in "cpu", "cuda":
        out = tmp_path / device
        call("train.py", "--model", MODEL, "--rollouts", scored, "--out", out, "--device", device,
             *FP32, "--updates", 2, "--lr", 1e-4, *method.split())
        lines.append(read(out / "metrics.jsonl"))
        weights.append(load_file(out / "model.safetensors"))
    for ours, theirs in zip(*lines, strict=True):
        assert max(ours["logprob_gap_max"], theirs["logprob_gap_max"]) < 1e-2  # 2: lr moved them
        for key in "loss", "grad_norm", "entropy", "nll", "approx_kl", "clip_high_frac":
            assert theirs[key] == pytest.approx(ours[key], rel=1e-3, abs=1e-5), key
    assert lines[1][0]["logprob_gap_max"] < 1e-4
    # Adam's first step is the gradient's sign: where that is near zero a weight moves by 2 lr
    moved = torch.cat([(weights[0][key] - weights[1][key]).abs().flatten() for key in weights[0]])
    assert moved.mean() < 2e-6 and moved.max() < 5e-4


def test_two_rounds_in_bf16(rollouts, tmp_path):
    model, path = MODEL, rollouts("bf16", "cuda")
    for number in 1, 2:
        out, verdicts = tmp_path / f"round-{number}", tmp_path / f"scored-{number}.jsonl"
        call("score.py", path, "--out", verdicts)
        call("train.py", "--model", model, "--rollouts", verdicts, "--out", out, "--lr", 1e-4)
        metrics = read(out / "metrics.jsonl")[-1]
        assert metrics["logprob_gap"] < 0.02 and metrics["ratio_max"] == pytest.approx(1)
        model, path = out, tmp_path / f"rollouts-{number}.jsonl"
        call("generate.py", "--model", model, "--prompts", rollouts("fp32", "cuda", *FP32).parent
             / "prompts.jsonl", "--out", path, "--n", 8, "--max-new-tokens", 24)
    assert load_file(model / "model.safetensors")["model.norm.weight"].dtype == torch.float32
