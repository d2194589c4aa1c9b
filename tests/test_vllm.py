"""experiments/vllm_generate.py against a stand-in for vLLM's API: the rows must be generate.py's.

The stand-in knows what the script may ask of vLLM, and no more: LLM, SamplingParams, and what
`generate` gives back. It samples from the model that it was given, so that train.py can compare the
log-probs in the rows with its own.
"""
import os
import sys
import types

import pytest
import torch
import transformers

import generate
import score
import train
from conftest import load, meta_of, read, refusal, set_rank, stage
from data.files import claim
from experiments import vllm_generate


def SamplingParams(*, n, temperature, top_p, top_k, logprobs, max_tokens, stop, stop_token_ids,
                   ignore_eos, skip_special_tokens, seed):
    return types.SimpleNamespace(**locals())


class LLM:
    calls = []  # of the engines of this test: the prompts of each call

    def __init__(self, model, dtype, seed, max_model_len, tensor_parallel_size, trust_remote_code,
                 revision, logprobs_mode):
        assert dtype == "float32"
        self.model = load(model)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(model)
        self.longest, self.raw = max_model_len, logprobs_mode == "raw_logprobs"

    def generate(self, prompts, sampling_params):
        self.calls.append(len(prompts))
        return [types.SimpleNamespace(outputs=[self.one(prompt["prompt_token_ids"], params)])
                for prompt, params in zip(prompts, sampling_params, strict=True)]

    @torch.no_grad()
    def one(self, prompt, params):
        generator, ids, logprobs = torch.Generator().manual_seed(params.seed), [], []
        reason = "length"
        assert (params.n, params.top_p, params.top_k, params.logprobs) == (1, 1, 0, 0)
        assert params.ignore_eos  # stop_token_ids names all ends
        while len(ids) < params.max_tokens and reason == "length":
            assert len(prompt) + len(ids) < self.longest
            logits = self.model(torch.tensor([prompt + ids])).logits[0, -1].float()
            hot = torch.log_softmax(logits / (params.temperature or 1), -1)
            token = int(torch.multinomial(hot.exp(), 1, generator=generator)
                        if params.temperature else hot.argmax())
            kept = torch.log_softmax(logits, -1) if self.raw else hot
            ids.append(token)
            logprobs.append({token: types.SimpleNamespace(logprob=float(kept[token]))})
            text = self.tokenizer.decode(ids, skip_special_tokens=params.skip_special_tokens)
            if token in params.stop_token_ids or any(s in text for s in params.stop or ()):
                reason = "stop"
        return types.SimpleNamespace(text="unused", token_ids=tuple(ids), logprobs=logprobs,
                                     finish_reason=reason)


@pytest.fixture
def sample(tiny_model, prompts, tmp_path, monkeypatch):
    """Run the script on 12 prompts; the path of its rows."""
    stand_in = types.ModuleType("vllm")
    stand_in.LLM, stand_in.SamplingParams, stand_in.__version__ = LLM, SamplingParams, "0.0"
    monkeypatch.setitem(sys.modules, "vllm", stand_in)
    monkeypatch.setattr(LLM, "calls", [])

    def run(*flags, out="rollouts.jsonl", script=vllm_generate):
        path = str(tmp_path / out)
        stage(script, "--model", tiny_model, "--prompts", prompts, "--out", path, "--n", "2",
              "--temperature", "0.7", "--max-new-tokens", "6", "--dtype", "float32", *flags)
        return path
    return run


def test_the_rows_and_the_meta_are_those_of_generate(sample, tiny_model):
    """Of all of generate.py's flags."""
    flags = ["--limit", "5", "--stop", "7", "<|pad|>", "--overlong", "skip", "--seed", "3",
             "--max-batch-tokens", "100", "--attention", "model", "--device", "auto",
             "--rank-timeout", "9", "--trust-remote-code"]
    path, other = sample(*flags), sample(*flags, out="generate.jsonl", script=generate)
    ours, theirs = read(path), read(other)
    assert len(ours) == 10 and [list(row) for row in ours] == [list(row) for row in theirs]
    for row, their in zip(ours, theirs):
        for key in ("id", "sample", "prompt_ids", "numbers", "target"):
            assert row[key] == their[key]
    assert {row["finish_reason"] for row in ours} == {"stop", "length"}
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    for row in ours:
        assert len(row["logprobs"]) == len(row["completion_ids"])
        assert row["completion"] == tokenizer.decode(row["completion_ids"],
                                                     skip_special_tokens=True)
    one, two = meta_of(path), meta_of(other)
    for key in ("sampling", "end_ids", "chunks", "overlong"):
        assert one[key] == two[key]
    assert set(one) - set(two) == {"engine"} and one["chunks"] == len(LLM.calls) > 1
    assert list(one["inputs"].values()) == list(two["inputs"].values())
    assert set(one["flags"]) - set(two["flags"]) == {"tensor_parallel_size"}


@pytest.mark.parametrize("flags", [["--ignore-eos"], ["--temperature", "0"]])
def test_the_limit_and_greedy_rows_are_those_of_generate(flags, sample):
    ours = read(sample("--limit", "4", *flags))
    if flags == ["--ignore-eos"]:
        assert all(len(row["completion_ids"]) == 6 and row["finish_reason"] == "length"
                   for row in ours)
    else:
        assert ours == read(sample("--limit", "4", *flags, out="generate.jsonl", script=generate))
        assert not any(x for row in ours for x in row["logprobs"])


def test_train_finds_the_log_probs_of_its_own_policy_in_them(sample, tiny_model, tmp_path):
    scored, out = str(tmp_path / "scored.jsonl"), str(tmp_path / "round")
    stage(score, sample(), "--out", scored)
    stage(train, "--model", tiny_model, "--rollouts", scored, "--out", out, "--lr", "1e-4")
    row, = read(f"{out}/metrics.jsonl")
    assert row["logprob_gap_max"] < 1e-4 < row["nll"]  # at T = 0.7; of T = 1 they would be far off


def test_a_restart_does_the_missing_chunks_alone(sample, tmp_path, monkeypatch):
    flags, plain = ["--max-batch-tokens", "120"], LLM.generate
    whole = read(sample(*flags, out="whole.jsonl"))
    chunks = list(LLM.calls)
    assert sum(chunks) == 24 and len(chunks) > 3

    def dies(self, prompts, params):
        if len(self.calls) == len(chunks) + 2:
            raise KeyboardInterrupt
        return plain(self, prompts, params)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LLM, "generate", dies)
        sample(*flags, out="again.jsonl")
    assert not (tmp_path / "again.jsonl").exists()
    os.close(claim.lock)  # as the end of the process does
    assert read(sample(*flags, out="again.jsonl")) == whole and LLM.calls == chunks * 2
    assert not (tmp_path / "again.jsonl.partial").exists()


def test_an_aborted_request_is_no_row(sample, monkeypatch, capfd):
    aborted = types.SimpleNamespace(finish_reason="abort")
    monkeypatch.setattr(LLM, "one", lambda *args: aborted)
    with pytest.raises(SystemExit) as end:
        sample("--limit", "1")
    assert end.value.code == 2
    assert "vLLM ended a row of 'problem-0' with 'abort'" in capfd.readouterr().err


@pytest.mark.parametrize("flags, message", [
    (["--n", "0"], "--n must be at least 1"),
    (["--tensor-parallel-size", "0"], "--tensor-parallel-size must be at least 1"),
    (["--top-p", "0.9"], "--top-p and --top-k: vLLM would return log-probs of the cut"),
    (["--top-k", "5"], "--top-p and --top-k: vLLM would return log-probs of the cut"),
    (["--attention", "shared"], "--attention shared is generate.py's"),
    (["--device", "cpu"], "--device cpu: vLLM needs a GPU"),
    ("two ranks", "give --tensor-parallel-size in place of torchrun"),
    ("no vLLM", "vLLM is not installed here: pip install vllm, or take generate.py")])
def test_what_it_cannot_do_it_refuses(sample, monkeypatch, capfd, flags, message):
    if flags == "two ranks":
        set_rank(monkeypatch, 0)
    if flags == "no vLLM":
        monkeypatch.setitem(sys.modules, "vllm", None)
    line = refusal(capfd, sample, *(flags if isinstance(flags, list) else []))
    assert line.startswith("vllm_generate.py: error: ") and message in line
