"""generate.py --compile: the tokens of the plain sampler, compiled at most once a batch size.

Ordinary tests trace the step and run it as it is (Dynamo alone), slow ones compile it with Inductor.
"""
import argparse
import functools
import json
import shutil

import numpy as np
import pytest
import torch
from test_models import build
from torch._dynamo.testing import CompileCounterWithBackend

import generate
from decode_step import Decoder, sizes_of

ARCHITECTURES = ["qwen2", "llama", "mistral", "gemma2"]  # full attention, sliding, both by turns and a soft cap
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="Inductor on a CPU needs g++, which is not here")


@pytest.fixture
def counter(monkeypatch):
    """counter(backend): from now on torch.compile has this backend; its .frame_count counts what it compiles."""
    torch._dynamo.reset()
    compiled = torch.compile

    def use(backend):
        found = CompileCounterWithBackend(backend)
        monkeypatch.setattr(torch, "compile", lambda function, dynamic, mode: compiled(function, dynamic=dynamic, backend=found))
        return found

    yield use
    torch._dynamo.reset()


def both(name, counter, top_p=1.0):
    """(what generate.sample returns, what Decoder.sample does) for three chunks, two of them smaller, of a random model."""
    model, rng, steps = build(name), np.random.default_rng(1), 20
    chunks = [(rng.integers(6, 64, length).tolist() for length in lengths) for lengths in ((3, 20, 9, 8), (5, 2), (12,))]
    owners = [[0, 0, 0, 1, 1, 1, 1, 2, 2, 3, 3, 3, 3], [0, 0, 1], [0]]
    draw = functools.partial(generate.draw, temperature=0.7, top_p=top_p)
    generate.choose_attention(model, "model")
    decoder = Decoder(model, draw, 13, 20, steps, [0, 5])
    args = argparse.Namespace(max_new_tokens=steps, temperature=0.7, top_p=top_p, top_k=0, stop=[])
    for prompts, owner in zip(map(list, chunks), owners):
        uniform = rng.random((len(owner), steps))
        yield (generate.sample(model, prompts, owner, uniform, [0, 5], None, args),
               decoder.sample(prompts, owner, uniform, None, 0))
    assert counter.frame_count <= len(sizes_of(13))


def check(pairs):
    stopped = 0
    for (tokens, logprobs, lengths, stops), (own, own_logprobs, own_lengths, own_stops) in pairs:
        assert own_lengths == lengths and own_stops == stops
        stopped += sum(stops)
        for row, length in enumerate(lengths):
            assert own[row, :length].tolist() == tokens[row, :length].tolist()
            assert (own_logprobs[row, :length] - logprobs[row, :length]).abs().max() < 1e-4
    assert stopped > 3  # so that the batch has shrunk


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ("qwen2", "mistral"))) for name in ARCHITECTURES])
def test_the_traced_step_samples_the_same(name, counter):
    backend = counter("eager")
    check(both(name, backend))
    assert backend.frame_count > 1


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_compiled_step_samples_the_same(name, counter):
    check(both(name, counter("inductor")))


@pytest.mark.slow
@needs_compiler
def test_nucleus_and_top_p_in_the_compiled_step(counter):
    check(both("llama", counter("inductor"), top_p=0.8))


def sampled(model, prompts, out, *flags):
    argv = ["--model", model, "--prompts", prompts, "--out", str(out), "--device", "cpu", "--max-new-tokens", "24", *map(str, flags)]
    generate.main(generate.parse_args(argv))
    with open(out, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


@pytest.mark.parametrize("flags", [["--stop", "7", "1)"], pytest.param(["--max-batch-tokens", 400], marks=pytest.mark.slow)])
def test_generate_with_and_without(flags, counter, tiny_model, prompts, tmp_path):
    """The embedded model's shape, stop texts and several chunks: the same rows, log-probs to rounding."""
    backend = counter("eager")
    plain = sampled(tiny_model, prompts, tmp_path / "plain.jsonl", "--n", 4, *flags)
    rows = sampled(tiny_model, prompts, tmp_path / "compiled.jsonl", "--n", 4, "--compile", *flags)
    for one, other in zip(plain, rows, strict=True):
        assert np.allclose(one.pop("logprobs"), other.pop("logprobs"), atol=1e-5)
        assert one == other
    assert 0 < backend.frame_count <= 4


def test_sizes_and_chunks():
    assert sizes_of(1) == [1] and sizes_of(3) == [1, 2, 4] and sizes_of(100) == [16, 32, 64, 128]
    chunks = generate.fixed_chunks([5, 0, 9, 7], 3, 11, 110)  # 5 rows of 20 would fit: 4 are a power of two
    assert list(map(len, chunks)) == [4, 4, 1] and all(problem != 1 for chunk in chunks for problem, _ in chunk)


def test_what_cannot_be_compiled_is_refused(counter, monkeypatch, tiny_model, prompts, tmp_path, capfd):
    def refused(*flags):
        capfd.readouterr()
        with pytest.raises(SystemExit) as end:
            sampled(tiny_model, prompts, tmp_path / "out.jsonl", "--compile", *flags)
        assert end.value.code == 2
        return capfd.readouterr().err.splitlines()[-1]

    assert "--compile works with --attention model alone" in refused("--attention", "shared")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "--compile needs a C++ compiler on a CPU; no no-such-compiler here" in refused()
