"""experiments/vllm_generate.py against a stand-in for vLLM's API: the rows must be generate.py's.

The stand-in knows what the script may ask of vLLM, and no more: LLM, SamplingParams, and what
`generate` gives back. It samples from the model that it was given, so that train.py can compare the
log-probs in the rows with its own.
"""
import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest
import torch
import transformers

import generate
import score
import train
from experiments import vllm_generate

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@dataclasses.dataclass
class SamplingParams:
    n: int
    temperature: float
    top_p: float
    top_k: int
    logprobs: int
    max_tokens: int
    stop: list | None
    seed: int


class LLM:
    asked = []  # what was asked of the engines of this test: the prompts of each call

    def __init__(self, model, dtype, seed, max_model_len, tensor_parallel_size, logprobs_mode):
        kind = transformers.AutoModelForCausalLM
        self.model = kind.from_pretrained(model, dtype=getattr(torch, dtype))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.longest, self.raw = max_model_len, logprobs_mode == "raw_logprobs"

    def generate(self, prompts, sampling_params):
        self.asked.append(len(prompts))
        return [types.SimpleNamespace(prompt_token_ids=prompt["prompt_token_ids"], outputs=[
            self.one(prompt["prompt_token_ids"], params, params.seed + sample)
            for sample in range(params.n)])
            for prompt, params in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def one(self, prompt, params, seed):
        generator, ids, logprobs = torch.Generator().manual_seed(seed), [], []
        reason = "length"
        assert params.top_p == 1 and params.top_k == 0 and params.logprobs == 0
        while len(ids) < params.max_tokens and reason == "length":
            assert len(prompt) + len(ids) < self.longest
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            hot = torch.log_softmax(logits / params.temperature, -1)
            token = int(torch.multinomial(hot.exp(), 1, generator=generator))
            kept = torch.log_softmax(logits, -1) if self.raw else hot
            ids.append(token)
            logprobs.append({token: types.SimpleNamespace(logprob=float(kept[token]))})
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            if token == self.tokenizer.eos_token_id or any(s in text for s in params.stop or ()):
                reason = "stop"
        return types.SimpleNamespace(text="unused", token_ids=tuple(ids), logprobs=logprobs,
                                     finish_reason=reason)


@pytest.fixture
def sample(tiny_model, prompts, tmp_path, monkeypatch):
    """Run the script on 12 prompts; the path of its rows."""
    stand_in = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams, stand_in.__version__ = LLM, SamplingParams, "0.0"
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(LLM, "asked", [])

    def run(*flags, out="rollouts.jsonl"):
        path = str(tmp_path / out)
        args = vllm_generate.parse_args([
            "--model", tiny_model, "--prompts", prompts, "--out", path, "--n", "3",
            "--temperature", "0.7", "--max-new-tokens", "10", "--dtype", "float32", *flags])
        vllm_generate.main(args)
        return path
    return run


def rows_of(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def stage(module, *flags):
    module.main(module.parse_args(list(flags)))


def test_the_rows_and_the_meta_are_those_of_generate(sample, tiny_model, prompts, tmp_path):
    path, other = sample("--limit", "5", "--stop", "7"), str(tmp_path / "generate.jsonl")
    stage(generate, "--model", tiny_model, "--prompts", prompts, "--out", other, "--n", "3",
          "--temperature", "0.7", "--max-new-tokens", "10", "--limit", "5", "--stop", "7")
    ours, theirs = rows_of(path), rows_of(other)
    assert len(ours) == 15 and [list(row) for row in ours] == [list(row) for row in theirs]
    same = ("id", "sample", "prompt_ids", "numbers", "target")
    assert [[row[key] for key in same] for row in ours] == [[row[key] for key in same]
                                                           for row in theirs]
    assert {row["finish_reason"] for row in ours} == {"stop", "length"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    for row in ours:
        assert len(row["logprobs"]) == len(row["completion_ids"])
        assert row["completion"] == tokenizer.decode(row["completion_ids"],
                                                     skip_special_tokens=True)
    metas = []
    for one in (path, other):
        with open(one + ".meta.json", encoding="utf-8") as file:
            metas.append(json.load(file))
    assert metas[0]["sampling"] == metas[1]["sampling"] and metas[0]["engine"] == "vllm 0.0"
    assert list(metas[0]["inputs"].values()) == list(metas[1]["inputs"].values())
    assert set(metas[1]) - set(metas[0]) == {"attention", "end_ids", "chunks", "overlong"}


def test_train_finds_the_log_probs_of_its_own_policy_in_them(sample, tiny_model, tmp_path):
    scored, out = str(tmp_path / "scored.jsonl"), str(tmp_path / "round")
    stage(score, sample(), "--out", scored)
    stage(train, "--model", tiny_model, "--rollouts", scored, "--out", out, "--lr", "1e-4")
    row, = rows_of(f"{out}/metrics.jsonl")
    assert row["logprob_gap_max"] < 1e-4 < row["nll"]  # at T = 0.7; of T = 1 they would be far off


def test_a_restart_does_the_missing_chunks_alone(sample, tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_generate, "CHUNK", 5)
    whole = rows_of(sample(out="whole.jsonl"))
    assert LLM.asked == [5, 5, 2]
    plain = LLM.generate

    def dies(self, prompts, params):
        if len(self.asked) == 4:
            raise KeyboardInterrupt
        return plain(self, prompts, params)

    monkeypatch.setattr(LLM, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        sample(out="again.jsonl")
    monkeypatch.setattr(LLM, "generate", plain)
    assert not (tmp_path / "again.jsonl").exists()
    from data.files import claim
    os.close(claim.lock)  # as the end of the process does
    assert rows_of(sample(out="again.jsonl")) == whole and LLM.asked == [5, 5, 2, 5, 5, 2]
    assert not (tmp_path / "again.jsonl.partial").exists()


def test_an_aborted_request_is_no_row(sample, monkeypatch, capsys):
    plain = LLM.one
    monkeypatch.setattr(LLM, "one", lambda *a: types.SimpleNamespace(
        **{**vars(plain(*a)), "finish_reason": "abort"}))
    with pytest.raises(SystemExit) as end:
        sample()
    assert end.value.code == 2
    assert "ended sample 0 of a prompt with 'abort'" in capsys.readouterr().err


@pytest.mark.parametrize("flags, told", [
    (["--temperature", "0"], "--temperature must be above 0; for greedy samples take generate.py"),
    (["--n", "0"], "--n, --max-new-tokens, --tensor-parallel-size, --limit must be at least 1"),
])
def test_wrong_flags(sample, capsys, flags, told):
    with pytest.raises(SystemExit) as end:
        sample(*flags)
    assert end.value.code == 2 and told in capsys.readouterr().err


def test_without_vllm_it_says_so(tiny_model, prompts, tmp_path):
    script = os.path.join(ROOT, "experiments", "vllm_generate.py")
    done = subprocess.run([sys.executable, script, "--model", tiny_model, "--prompts", prompts,
                           "--out", str(tmp_path / "x.jsonl")], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == (
        "vllm_generate.py: error: vLLM is not installed here: pip install vllm, "
        "or take generate.py\n")
