"""generate.py: what is sampled, which ids a prompt has, and what happens when input is bad or a run
is cut short."""
import functools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import warnings
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicCache

import generate
from conftest import byte_level_bpe, forced, load, meta_of, read, refusal, stage, write
from data.files import claim
from shared_prompt import (
    RoomyLayer, attention_of, branch, cache_keyword, set_layer_class, with_cache)

ROOT = os.path.dirname(os.path.abspath(generate.__file__))
WEIGHTS = "model.safetensors"


# ---- Helpers -------------------------------------------------------------------------------------
def start(model, prompts, out, *flags):
    stage(generate, "--model", model, "--prompts", prompts, "--out", out, "--device", "cpu",
          "--max-new-tokens", 24, *flags)


def run(model, prompts, out, *flags):
    """The rows that generate.py writes to `out`, of at most 24 new tokens."""
    start(model, prompts, out, *flags)
    return read(out)


def ids_of(rows):
    return [(row["id"], row["sample"], row["completion_ids"]) for row in rows]


def refused(capfd, *args):
    """The one line on stderr with which such a run ends, exit code 2."""
    line = refusal(capfd, start, *args)
    assert line.startswith("generate.py: error: ")
    return line


def release():
    """Give up the lock of an output, as the end of a process does."""
    os.close(claim.lock)


def gap(model, rows, temperature):
    """Largest difference between stored log-probs and those of a plain pass."""
    gaps = []
    for row in rows:
        ids = row["completion_ids"]
        logp = forced(model, row["prompt_ids"], ids, temperature)[range(len(ids)), ids]
        gaps.append((logp - torch.tensor(row["logprobs"])).abs().max().item())
    return max(gaps)


def check_cut(rows, whole, ends):
    """These are the rows `whole` up to the first of `ends`, each of which ends some."""
    for row, before in zip(rows, whole, strict=True):
        ids = before["completion_ids"]
        cut = next((k + 1 for k, token in enumerate(ids) if token in ends), len(ids))
        assert row["completion_ids"] == ids[:cut]
        assert row["finish_reason"] == ("stop" if ids[cut - 1] in ends else "length")
        assert row["logprobs"] == pytest.approx(before["logprobs"][:cut], abs=1e-5)
    assert {row["completion_ids"][-1] for row in rows if row["finish_reason"] == "stop"} == ends


def copy_of(folder, target, **files):
    """A copy of a model folder with keys of its JSON files changed (None removes a key)."""
    shutil.copytree(folder, target)
    change_json(target, **files)
    return str(target)


def change_json(folder, **files):
    for name, changes in files.items():
        path = folder / f"{name}.json"
        content = (json.loads(path.read_text()) if path.exists() else {}) | changes
        path.write_text(json.dumps({key: value for key, value in content.items()
                                    if value is not None}))


TEMPLATE = ("{{ bos_token }}{% for turn in messages %}[{{ turn['role'] }}] {{ turn['content'] }}\n"
            "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}")


@functools.cache
def bpe_tokenizer(special=("<s>", "</s>", "<|im_end|>"), single="<s> $A", template=TEMPLATE):
    """A byte-level BPE with an own split of digits; it puts the special tokens of `single` around
    texts."""
    text = ["<think>so 3 * 4 is 12, and 12 + 8 is 20</think>\n<answer>3 * 4 + 8</answer>",
            "naïve café, 数学, the answer is not here", "2024 and 1234"] * 4
    tokenizer = byte_level_bpe(text, 320, special, [
        pre_tokenizers.Split(Regex(r"\d"), "isolated"), pre_tokenizers.ByteLevel(False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", 0), ("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>",
                                   pad_token="</s>", chat_template=template)


@pytest.fixture(scope="module")
def bpe_model(tmp_path_factory):
    """Folder of a random Llama with `bpe_tokenizer`."""
    folder, tokenizer = str(tmp_path_factory.mktemp("bpe")), bpe_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=512, bos_token_id=0,
        eos_token_id=[1, 2], pad_token_id=1)).save_pretrained(folder)
    return folder


def ids_of_prompt(tokenizer, prompt=None, messages=None, template=None, reference=None):
    problem = SimpleNamespace(prompt=prompt, messages=messages)
    return generate.prompt_ids(problem, tokenizer, reference, template or {})


def turn(content, role="user", **more):
    return {"role": role, "content": content, **more}


@pytest.fixture(scope="module")
def base(tiny_model, prompts, tmp_path_factory):
    """(path, rows) of 12 x 8 samples at T = 0.7 with the settings that other tests vary."""
    out = tmp_path_factory.mktemp("base") / "rollouts.jsonl"
    return out, run(tiny_model, prompts, out, "--temperature", 0.7)


# ---- What is sampled -----------------------------------------------------------------------------
def test_a_hostile_generation_config_changes_nothing(tiny_model, prompts, base, tmp_path):
    """Nor does a pad token that is the end of text: masks come from lengths."""
    hostile = copy_of(tiny_model, tmp_path / "hostile", generation_config={
        "do_sample": True, "temperature": 0.01, "top_p": 0.1, "top_k": 1, "min_p": 0.5,
        "typical_p": 0.2, "repetition_penalty": 5.0, "no_repeat_ngram_size": 2,
        "max_new_tokens": 1, "min_new_tokens": 20, "num_beams": 4, "suppress_tokens": [3, 4, 5],
        "max_length": 3, "bad_words_ids": [[6]], "forced_eos_token_id": 0, "pad_token_id": 0,
        "renormalize_logits": True, "num_return_sequences": 3, "use_cache": False},
        config={"pad_token_id": 0}, tokenizer_config={"pad_token": "<|endoftext|>"})
    rows = run(hostile, prompts, tmp_path / "out.jsonl", "--temperature", 0.7)
    assert (tmp_path / "out.jsonl").read_bytes() == base[0].read_bytes()
    assert any(1 in row["completion_ids"][:-1] for row in rows)  # a sampled <|pad|> is a token
    assert meta_of(tmp_path / "out.jsonl")["sampling"].items() >= {
        "temperature": 0.7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}.items()


def test_rows_hold_ids_without_padding_and_the_log_probs_of_a_plain_pass(tiny_model, prompts, base):
    """The end of text is among the ids where it was sampled."""
    tokenizer, rows = AutoTokenizer.from_pretrained(tiny_model), base[1]
    assert [(row["id"], row["sample"]) for row in rows] == [
        (problem["id"], k) for problem in read(prompts) for k in range(8)]
    assert len({len(row["prompt_ids"]) for row in rows}) > 3  # so prompts were padded
    for row in rows:
        ids = row["completion_ids"]
        assert row["prompt_ids"] == tokenizer(row["prompt"])["input_ids"]
        assert row["completion"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert len(row["logprobs"]) == len(ids)
    assert gap(load(tiny_model), rows, 0.7) < 1e-5
    assert np.std([x for row in rows for x in row["logprobs"]]) > 0.3  # not a uniform policy


def test_the_ids_that_end_a_completion(tiny_model, prompts, base, tmp_path):
    """That of the tokenizer (0), and those of generation_config.json; with --ignore-eos none."""
    flags = prompts, tmp_path / "whole.jsonl", "--temperature", 0.7, "--ignore-eos"
    whole = run(tiny_model, *flags)
    assert all(len(row["completion_ids"]) == 24 for row in whole)
    model = copy_of(tiny_model, tmp_path / "model", generation_config={"eos_token_id": [9, 5]})
    several = run(model, prompts, tmp_path / "several.jsonl", "--temperature", 0.7)
    for rows, ends in (whole, set()), (base[1], {0}), (several, {0, 5, 9}):
        check_cut(rows, whole, ends)


def test_prompts_are_computed_once_finished_rows_dropped_and_no_logits_kept(
        tiny_model, prompts, base, tmp_path, monkeypatch):
    shapes, seen, prepare, draw = [], [], generate.prepare, generate.draw

    def spied(model, *args):
        prepare(model, *args)
        model.register_forward_pre_hook(
            lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)),
            with_kwargs=True)

    def spy(logits, *args):
        assert sum(ref() is not None for ref in seen) <= 1  # the step before this one at most
        seen.append(weakref.ref(logits))
        return draw(logits, *args)

    monkeypatch.setattr(generate, "prepare", spied)
    monkeypatch.setattr(generate, "draw", spy)
    rows = run(tiny_model, prompts, tmp_path / "out.jsonl", "--temperature", 0.7)
    assert ids_of(rows) == ids_of(base[1])
    longest = max(len(row["prompt_ids"]) for row in rows)
    assert shapes[0] == (12, longest) and shapes[1][1] == 1 and len(shapes) == 24
    assert len(seen) == 3 + 24  # the steps on trial, and all
    going = [[(row["id"], *row["completion_ids"][:step]) for row in rows
              if len(row["completion_ids"]) > step] for step in range(1, 24)]
    assert [shape[0] for shape in shapes[1:]] == [len(set(histories)) for histories in going]
    assert len(set(going[0])) < len(going[0]) < 96  # some share a history, some have ended
    assert 0 < len(set(going[9])) == len(going[9])  # and all have parted


def test_a_history_keeps_its_place_or_fills_a_gap():
    """Seven rows of four histories, of which the third has ended and the first two part."""
    history, token = (torch.tensor(values) for values in ([0, 0, 1, 1, 1, 3, 3],
                                                          [5, 4, 6, 6, 2, 9, 9]))
    parent, last, row = branch(history, token, 10)
    assert parent[:2].tolist() == [0, 1] and parent[3] == 3 and len(parent) == 5
    assert parent[row].tolist() == history.tolist() and last[row].tolist() == token.tolist()
    parent, last, row = branch(torch.tensor([3, 2]), torch.tensor([1, 1]), 10)
    assert sorted(parent.tolist()) == [2, 3] and parent[row].tolist() == [3, 2]


def test_every_row_has_a_stream_of_its_own(tiny_model, prompts, base, tmp_path):
    """Streams depend on (seed, id, sample) alone, not on n, other problems, batch or length."""
    keys = [(seed, identity, k) for seed in (0, 1) for identity in ("a", "b", "1", "a1")
            for k in (0, 1, 11)]
    streams = np.stack([generate.uniforms(*key, 50) for key in keys])
    assert len({stream.tobytes() for stream in streams}) == len(keys)
    assert 0 <= streams.min() and streams.max() < 1
    even = (np.arange(streams.size) + 0.5) / streams.size
    assert np.abs(np.sort(streams, axis=None) - even).max() < 0.06  # Kolmogorov-Smirnov
    assert np.array_equal(generate.uniforms(0, "a", 1, 7), generate.uniforms(0, "a", 1, 50)[:7])
    assert np.abs(np.corrcoef(streams) - np.eye(len(keys))).max() < 0.6
    reordered = write(tmp_path / "few.jsonl", read(prompts)[5:1:-1])
    few = run(tiny_model, reordered, tmp_path / "few-out.jsonl", "--temperature", 0.7, "--n", 3,
              "--max-new-tokens", 9)
    full = {(row["id"], row["sample"]): row["completion_ids"] for row in base[1]}
    assert [row["completion_ids"] for row in few] == [full[row["id"], row["sample"]][:9]
                                                      for row in few]
    other = run(tiny_model, prompts, tmp_path / "other.jsonl", "--temperature", 0.7, "--seed", 1)
    assert sum(a == b for a, b in zip(ids_of(other), ids_of(base[1]))) < 10


@pytest.mark.parametrize("flags, problems, attention", [
    (["--max-batch-tokens", 1, "--limit", 1], 1, "shared"),
    (["--max-batch-tokens", 200, "--limit", 6], 6, "shared"),
    (["--max-batch-tokens", 2000], 12, "shared"), (["--attention", "shared"], 12, "shared"),
    (["--attention", "model"], 12, "sdpa")])
def test_neither_batch_nor_attention_change_a_stream(flags, problems, attention, tiny_model,
                                                     prompts, base, tmp_path, capfd):
    """Nor does --limit; samples of one prompt may be in two chunks. Log-probs to rounding."""
    rows = run(tiny_model, prompts, tmp_path / "out.jsonl", "--temperature", 0.7, *flags)
    meta = meta_of(tmp_path / "out.jsonl")
    assert (meta["chunks"] > 1) == ("--max-batch-tokens" in flags)
    assert meta["attention"] == attention and f"attention {attention}" in capfd.readouterr().err
    assert ids_of(rows) == ids_of(base[1][:8 * problems])
    assert max(abs(x - y) for a, b in zip(rows, base[1])
               for x, y in zip(a["logprobs"], b["logprobs"])) < 1e-5


def test_greedy_top_k_1_and_a_tiny_top_p(tiny_model, prompts, tmp_path):
    model = load(tiny_model)
    greedy = run(tiny_model, prompts, tmp_path / "greedy.jsonl", "--temperature", 0, "--n", 1)
    for row in greedy:
        logp = forced(model, row["prompt_ids"], row["completion_ids"], 1)
        assert row["completion_ids"] == logp.argmax(-1).tolist()
        assert row["logprobs"] == [0.0] * len(row["completion_ids"])
    for flag, value in ("--top-k", 1), ("--top-p", 1e-9):
        one = run(tiny_model, prompts, tmp_path / f"one{flag}.jsonl", flag, value, "--n", 1)
        assert ids_of(one) == ids_of(greedy)
        assert gap(model, one, 1) < 1e-5  # of the full softmax: not 0


# ---- The draw ------------------------------------------------------------------------------------
def cut_by_loop(probs, top_p, top_k):
    """The definition: of the k likeliest, add the likeliest until their share reaches top_p."""
    order = sorted(range(len(probs)), key=lambda i: -probs[i])[:top_k or None]
    total, kept, share = sum(probs[i] for i in order), [0.0] * len(probs), 0.0
    for i in order:
        if share >= top_p * total:
            break
        kept[i], share = probs[i], share + probs[i]
    return kept


@pytest.mark.parametrize("temperature, top_p, top_k", [
    (1, 1, 0), (0.5, 1, 0), (2, 0.9, 0), (1, 0.5, 0), (1, 0.01, 0), (1, 1e-9, 0),
    (1, 1e-46, 0), (1, 1, 1), (1, 1, 4), (1, 1, 50), (0.7, 0.7, 5)])  # 1e-46 is zero in fp32
def test_draws_are_the_inverse_of_the_cut_distribution(temperature, top_p, top_k):
    """On a grid of uniform numbers each token comes as often as its share says; log-probs are those
    of the whole softmax."""
    grid = (torch.arange(5_000, dtype=torch.float64) + 0.5) / 5_000
    logits = torch.randn(20, 16, generator=torch.Generator().manual_seed(3)) * 2
    logits[:, 5] = -math.inf
    full = torch.softmax(logits.double() / temperature, -1)
    for place, probs in enumerate(full):
        share = torch.tensor(cut_by_loop(probs.tolist(), top_p, top_k), dtype=torch.float64)
        share /= share.sum()
        history = torch.full((len(grid),), place)
        ids, logp = generate.draw(logits, history, grid, temperature, top_p, top_k)
        count = torch.bincount(ids, minlength=16)
        assert (count - share * len(grid)).abs().max() < 1.1 and (count[share == 0] == 0).all()
        assert (ids.diff() >= 0).all()  # inverse CDF
        assert torch.allclose(logp.double(), probs[ids].log(), atol=1e-5)


@pytest.mark.parametrize("logits", [
    [-math.inf, 0.0, -math.inf, 1.0, -math.inf], [-200.0, 0.0, -300.0, 5.0, -1e4],
    [-math.inf, 3.0] + [-math.inf] * 3])
@pytest.mark.parametrize("flags", [(1.0, 1.0, 0), (0.7, 0.999999, 0), (1.3, 1.0, 2)])
def test_the_ends_of_the_unit_interval_draw_no_impossible_token(logits, flags):
    uniform = torch.tensor([0.0, 2.0 ** -53, 0.5, 1 - 2.0 ** -53], dtype=torch.float64)
    ids, logp = generate.draw(torch.tensor([logits]), torch.zeros(4, dtype=int), uniform, *flags)
    assert set(ids.tolist()) <= {1, 3} and torch.isfinite(logp).all()


def test_a_large_vocabulary_loses_no_token_to_rounding():
    """The middle of a token's interval draws that token, from the first to the last of 150,000."""
    tokens = torch.tensor([0, 1, 40_000, 80_000, 120_000, 149_998, 149_999])
    middle = (tokens.double() + 0.5) / 150_000
    ids, logp = generate.draw(torch.zeros(1, 150_000), torch.zeros(7, dtype=int), middle, 1.0)
    assert ids.tolist() == tokens.tolist()
    assert torch.allclose(logp, torch.tensor(-math.log(150_000)))


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_logit_that_is_not_finite_is_refused(temperature, tiny_model, prompts, tmp_path,
                                               monkeypatch, capfd):
    load_model = generate.load_model

    def broken(*args):
        model = load_model(*args)
        model.lm_head.register_forward_hook(lambda _, __, logits: logits * math.nan)
        return model

    monkeypatch.setattr(generate, "load_model", broken)
    with pytest.raises(SystemExit):
        run(tiny_model, prompts, tmp_path / "out.jsonl", "--temperature", temperature)
    assert "logits that are not finite" in capfd.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


# ---- The cache, see also test_models.py ---------------------------------------------------------
def test_what_is_transformers_own_is_found_or_refused(tiny_model):
    """The cache's keyword changed its name within transformers 5."""
    def kind(forward):
        return type("Model", (), {"forward": forward})

    assert cache_keyword(kind(lambda self, past_key_values: 0)) == "past_key_values"
    assert cache_keyword(kind(lambda self, cache, past_key_values: 0)) == "cache"
    with pytest.raises(ValueError, match="Model.forward takes no key-value cache"):
        cache_keyword(kind(lambda self, input_ids: 0))
    layer, model = SimpleNamespace(keys=None, values=torch.zeros(1)), SimpleNamespace()
    model.config = SimpleNamespace()
    for broken in (lambda: attention_of(model), lambda: set_layer_class(layer, RoomyLayer)):
        with pytest.raises(ValueError, match="this version of transformers .* requirements.txt"):
            broken()
    model = load(tiny_model)
    for module in (model, model.get_decoder()):
        cache = DynamicCache(config=model.config)
        with warnings.catch_warnings(action="error"), torch.no_grad():
            with_cache(module, cache, input_ids=torch.tensor([[3, 4, 5]]))
        assert cache.get_seq_length() == 3


# ---- Where a completion ends, and its text -------------------------------------------------------
def test_stop_texts_work_across_token_boundaries(bpe_model, tmp_path):
    """Against the same rows without --stop, cut by a loop after the token that completes one."""
    tokenizer = AutoTokenizer.from_pretrained(bpe_model)
    problems = write(tmp_path / "p.jsonl", [
        {"id": str(i), "prompt": "the answer is " + "3 * 4 " * i} for i in range(6)])
    flags = ["--temperature", 1, "--ignore-eos", "--max-new-tokens", 40]
    plain = run(bpe_model, problems, tmp_path / "plain.jsonl", *flags)
    texts = [[tokenizer.decode([token], skip_special_tokens=True)
              for token in row["completion_ids"]] for row in plain]
    across = [pieces[k][-1] + pieces[k + 1] + pieces[k + 2][:1] for pieces in texts
              for k in range(3, 37) if all(piece.isascii() and piece.isprintable() and piece
                                           for piece in pieces[k:k + 3])]
    stops = [across[0], across[7]]  # they span three tokens
    rest = [row["completion"] for row in plain if not any(one in row["completion"]
                                                          for one in stops)]
    stops.append(rest[0][-len(rest[0]) // 2:])  # and one that spans twenty
    assert all(stop not in piece for stop in stops for row in texts for piece in row)
    rows = run(bpe_model, problems, tmp_path / "stop.jsonl", *flags, "--stop", *stops[:2],
               r"\neq", "--stop", *stops[2:])  # LaTeX is no escape; a flag given again adds to it
    for row, before in zip(rows, plain):
        ids = before["completion_ids"]
        ends = [k for k in range(1, 41) if any(
            stop in tokenizer.decode(ids[:k], skip_special_tokens=True) for stop in stops)]
        assert row["completion_ids"] == ids[:ends[0] if ends else 40]
        assert row["finish_reason"] == ("stop" if ends else "length")
        assert any(stop in row["completion"] for stop in stops) == bool(ends)
        assert len(row["logprobs"]) == len(row["completion_ids"])
    assert all(any(stop in row["completion"] for row in rows) for stop in stops)
    assert any(row["finish_reason"] == "length" for row in rows)


TAGS = ["<answer>", "</answer>", "<think>", "</think>", "<solution>"]


def test_a_stop_text_may_be_a_special_token(bpe_model, tmp_path, capfd):
    """It joins the end-of-text ids, whether or not these count; a tag stays in the text. A line
    names the token that ends turns where it ends no completion."""
    end = {"eos_token_id": 1}
    model = copy_of(bpe_model, tmp_path / "model", config=end, generation_config=end)
    bpe_tokenizer(("<s>", "</s>", "<|im_end|>", *TAGS), template=(
        "{% for turn in messages %}{{ turn['role'] }}: {{ turn['content'] }}<|im_end|>\n"
        "{% endfor %}")).save_pretrained(model)
    problems = write(tmp_path / "p.jsonl", [
        {"id": str(i), "messages": [turn("3 * 4 " * i)]} for i in range(1, 4)])
    hint = f"{model}: <|im_end|> ends a turn of the prompts, but no completion; if it should, give"
    flags = ["--max-new-tokens", 200, "--n", 8]
    plain = run(model, problems, tmp_path / "plain.jsonl", "--ignore-eos", *flags)
    assert hint in capfd.readouterr().err
    assert "<|im_end|> is no part of a completion's text; give it alone" in refused(
        capfd, model, problems, tmp_path / "refused.jsonl", "--stop", "<|im_end|>\n")
    for stop, more, ends in [("<|im_end|>", [], {1, 2}), ("<|im_end|>", ["--ignore-eos"], {2}),
                             ("</answer>", ["--ignore-eos"], {4})]:
        out = tmp_path / f"{ends}.jsonl"
        rows = run(model, problems, out, "--stop", stop, "no such text", *more, *flags)
        check_cut(rows, plain, ends)
        for row in rows:
            assert "</s>" not in row["completion"] and "<|im_end|>" not in row["completion"]
            if ends == {4} and row["finish_reason"] == "stop":
                assert row["completion"].endswith("</answer>")
        assert meta_of(out)["end_ids"] == sorted(ends)
        assert (hint in capfd.readouterr().err) == (2 not in ends)


CHATML = ("{% for turn in messages %}<|im_start|>{{ turn['role'] }}\n{% if turn['role'] == "
          "'assistant' %}<think></think>{% endif %}{{ turn['content'] }}<|im_end|>\n{% endfor %}")


@pytest.mark.parametrize("template", [CHATML, None])
@given(st.lists(st.integers(0, 319), max_size=30))
@settings(max_examples=30, deadline=None)
def test_the_text_keeps_tags_that_are_special_tokens(template, ids):
    """It loses what ends it, pads it or separates turns. Without a template any may be that."""
    tokenizer = bpe_tokenizer(
        ("<s>", "</s>", "<|im_end|>", "<|im_start|>", "<|hint|>", *TAGS), template=template)
    special = generate.special_tokens(tokenizer)
    hidden = ["<s>", "</s>", "<|im_end|>", "<|im_start|>", *([] if template else ["<|hint|>"])]
    ends = [special["</s>"], special["</answer>"]]  # the second by --stop
    for more in ([], [special[tag] for tag in TAGS]):
        row = [*ids, *more, 1]
        expected = tokenizer.decode([token for token in row
                                     if token not in map(special.get, hidden)])
        text = generate.text_of(row, tokenizer, generate.hidden_ids(tokenizer, ends))
        assert text == expected and (not more or text.endswith("".join(TAGS)))


def test_a_model_without_an_end_of_text(bpe_model, prompts, tmp_path, capfd):
    none = {"eos_token_id": None}
    model = copy_of(bpe_model, tmp_path / "model", config=none, generation_config=none,
                    tokenizer_config={"eos_token": None})
    line = refused(capfd, model, prompts, tmp_path / "none.jsonl")
    assert f"{model}: names no end-of-text token; give --stop or --ignore-eos" in line
    for flag, *texts in ["--stop", "1", "e"], ["--ignore-eos"]:
        rows = run(model, prompts, tmp_path / f"{flag}.jsonl", flag, *texts)
        for row in rows:
            stopped = any(text in row["completion"] for text in texts)
            assert row["finish_reason"] == ("stop" if stopped else "length")


# ---- The ids of a prompt -------------------------------------------------------------------------
def test_ids_are_those_of_tokenizer_json_or_the_stage_ends(bpe_model, prompts, tmp_path, capfd):
    otherwise = copy_of(bpe_model, tmp_path / "model",  # a class that does not split digits
                        tokenizer_config={"tokenizer_class": "GPT2Tokenizer"})
    tokenizers = [AutoTokenizer.from_pretrained(folder) for folder in (bpe_model, otherwise)]
    reference, refusals = generate.reference_tokenizer(bpe_model, {"local_files_only": True}), []

    @given(st.text("ab 0123456789.,*é数", min_size=1))
    @settings(max_examples=60, deadline=None)
    def check(text):
        plain = reference.encode(text, add_special_tokens=False).ids
        for tokenizer in tokenizers:
            for prompt in ({"prompt": text}, {"messages": [turn(text)]}):
                try:
                    ids = ids_of_prompt(tokenizer, **prompt, reference=reference)
                except ValueError as error:
                    assert tokenizer is tokenizers[1] and "joins it otherwise" in str(error)
                    refusals.append(text)
                else:
                    assert "messages" in prompt or ids == [0, *plain]

    check()
    assert any(character.isdigit() for text in refusals for character in text)
    line = refused(capfd, otherwise, prompts, tmp_path / "out.jsonl")
    assert "otherwise than tokenizer.json does; set \"tokenizer_class\"" in line
    assert os.listdir(tmp_path) == ["model"]


def test_all_that_tokenizer_json_says_counts(bpe_model, tmp_path):
    """Not its truncation and padding, but its decoder: a class may bring its own, which would give
    right ids and wrong texts."""
    model = copy_of(bpe_model, tmp_path / "model")
    path, tokenizer, text = f"{model}/tokenizer.json", bpe_tokenizer(), "the answer is not here"
    raw = Tokenizer.from_file(path)
    raw.enable_truncation(4)
    raw.enable_padding(length=16)
    raw.save(path)
    reference = generate.reference_tokenizer(model, {})
    short = AutoTokenizer.from_pretrained(model)
    assert ids_of_prompt(short, text, reference=reference) == ids_of_prompt(tokenizer, text)
    raw.decoder = decoders.Fuse()
    raw.save(path)
    with pytest.raises(ValueError, match="splits or joins it otherwise"):
        ids_of_prompt(tokenizer, text, reference=generate.reference_tokenizer(model, {}))
    assert generate.reference_tokenizer(str(tmp_path), {"local_files_only": True}) is None


@pytest.mark.parametrize("single", ["$A", "<s> $A", "<s> $A </s>", "$A </s>"])
@given(st.text("ab 12</s>", max_size=12))
@settings(max_examples=25, deadline=None)
def test_special_tokens_are_neither_doubled_nor_trailing(single, text):
    """Whatever the tokenizer adds: at most one <s>, and </s> never ends a prompt."""
    tokenizer = bpe_tokenizer(single=single)
    for prompt in (text, "<s>" + text, "<s>" + text + "</s>"):
        plain = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        front = [0] if single.startswith("<s>") and plain[:1] != [0] else []
        try:
            ids = ids_of_prompt(tokenizer, prompt)
        except ValueError as error:
            twice = plain[:2] == [0, 0]
            assert str(error).startswith("it begins with <s> twice" if twice else "it ends with")
            assert twice or plain[-1:] == [1] or not plain
        else:
            assert ids == front + plain or not plain  # of an empty text
            assert ids[:2] != [0, 0] and (len(ids) < 2 or ids[-1] != 1)


def test_rendered_chats_are_checked_too():
    content = "{{ messages[0]['content'] }}"
    for template, text, message in [
            ("{{ bos_token }}" + TEMPLATE, "3 * 4", "it begins with <s> twice"),
            (content + "</s>", "3 * 4", "it ends with the end-of-text token </s>"),
            ("{{ bos_token }}" + content, "<s>[user] 3 * 4", "twice")]:  # rendered before
        with pytest.raises(ValueError, match=message):
            ids_of_prompt(bpe_tokenizer(template=template), messages=[turn(text)])


TRIMMED = TEMPLATE.replace("turn['content']", "turn['content'] | trim")


@pytest.mark.parametrize("template", [TEMPLATE, TRIMMED, TEMPLATE.replace("\n", "</s>\n")])
@given(st.text("ab 12.\n", max_size=12))
@settings(max_examples=25, deadline=None)
def test_an_assistant_who_speaks_last_is_continued(template, begun):
    tokenizer = bpe_tokenizer(template=template)
    chat = [turn("3 * 4?"), turn("12", "assistant"), turn("and * 5?")]
    asked = ids_of_prompt(tokenizer, messages=chat)
    ids = ids_of_prompt(tokenizer, messages=[*chat, turn(begun, "assistant")])
    text, expected = tokenizer.decode(ids), tokenizer.decode(asked) + begun
    if template is TRIMMED:
        text, expected = text.rstrip(), (tokenizer.decode(asked) + begun.strip()).rstrip()
    assert text == expected and (begun or ids == asked)


CHATS = {  # spellings of one chat
    "messages": {"messages": [turn("3 * 4?")]}, "under prompt": {"prompt": [turn("3 * 4?")]},
    "empty prompt": {"prompt": "", "messages": [turn("3 * 4?")]},
    "null prompt": {"prompt": None, "messages": [turn("3 * 4?")]},
    "parts": {"messages": [turn([{"type": "text", "text": "3 * "}, {"type": "text", "text": "4?"}])
                           ]},
    "null columns": {"prompt": [turn([{"type": "text", "text": "3 * 4?"}], name=None)],
                     "messages": None, "tools": None, "source": None}}


def test_chats_in_the_columns_of_data_sets(bpe_model, tmp_path):
    """One <s>; fields pass through as they were; templates see every key of a turn."""
    turns = [turn("be brief", "system"), turn("what is 3 * 4?")]
    problems = write(tmp_path / "p.jsonl", [
        *({"id": name, **fields} for name, fields in CHATS.items()),
        {"id": "text", "prompt": "[user] 3 * 4?\n[assistant] ", "messages": None},
        {"id": "system", "messages": turns, "answer": "12"}])
    rows = run(bpe_model, problems, tmp_path / "out.jsonl", "--n", 1)
    assert len(rows) == 8 and len({tuple(row["prompt_ids"]) for row in rows[:7]}) == 1
    for row, before in zip(rows, read(problems)):
        assert row.items() >= before.items() and ("prompt" in row) == ("prompt" in before)
    assert AutoTokenizer.from_pretrained(bpe_model).decode(rows[-1]["prompt_ids"]) == (
        "<s>[system] be brief\n[user] what is 3 * 4?\n[assistant] ")
    assert gap(load(bpe_model), rows, 1) < 1e-5
    named = bpe_tokenizer(template="{{ messages[0]['name'] }}: {{ messages[0]['content'] }}")
    assert named.decode(ids_of_prompt(named, messages=[turn("3 * 4", name="Ann")])) == "Ann: 3 * 4"


def test_values_for_the_chat_template(bpe_model, prompts, tmp_path, capfd):
    model = copy_of(bpe_model, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").write_text(
        "{{ messages[0]['content'] }}{% if enable_thinking is false %} so 12{% endif %}")
    problems = write(tmp_path / "p.jsonl", [{"id": "a", "messages": [turn("3 * 4")]}])
    tokenizer = AutoTokenizer.from_pretrained(model)
    for text, flags in [("3 * 4", []), ("3 * 4 so 12", ["--chat-template-kwargs",
                                                        '{"enable_thinking": false}'])]:
        row, = run(model, problems, tmp_path / f"{text}.jsonl", "--n", 1, *flags)
        assert tokenizer.decode(row["prompt_ids"]) == text
    for values, file, message in [
            ('{"enable_thought": false}', problems, "whose template has 'enable_thought'"),
            ('{"enable_thinking": false}', prompts, "no prompt is a chat whose"),
            ("[1]", problems, "invalid json_object value: '[1]'"),
            ("{", problems, "invalid json_object value: '{'")]:
        assert message in refused(capfd, model, file, tmp_path / "none.jsonl",
                                  "--chat-template-kwargs", values)


# ---- Rows in, rows out ---------------------------------------------------------------------------
def test_rows_are_spliced_byte_for_byte(tiny_model, tmp_path):
    """BOM, CRLF, blank lines, spaces, nesting, escapes, odd ids, fields of an earlier rollout."""
    lines = [
        rb'{"id": "../../x", "prompt": "1 2=3:"}',
        rb'  {"id":"test/precalculus/807.json","prompt":"10 2=5:" , "more": {"a": [{"b": null}]} }',
        b'{"id": "\xf0\x9f\x98\x80", "prompt": "4 6=24:", "answer": "\xe6\x95\xb0 \\u00e9 \\n", '
        b'"big": 1E5, "small": 1e-07, "int": 123456789012345678901}',
        rb'{"id": "", "prompt": "1 2 3=7:", "completions": "}, {", "s": "\"sample\": 3"}',
        rb'{"id": "nul \u0000", "prompt": "1=1:"}']
    stale = {"id": "again", "prompt": "2 2=4:", "sample": 7, "completion": "old", "logprobs": [],
             "finish_reason": "stop", "kept": 1}
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n   \n".join([*lines, json.dumps(stale).encode()]))
    rows = run(tiny_model, path, tmp_path / "out.jsonl", "--n", 3, "--max-batch-tokens", 150)
    written = (tmp_path / "out.jsonl").read_bytes().split(b"\n")[:-1]
    for number, line in enumerate(lines):
        for k in range(3):
            start = line.strip()[:-1] + b', "sample": %d, "completion": ' % k
            assert written[3 * number + k].startswith(start)
    assert [(row["id"], row["sample"]) for row in rows[-3:]] == [("again", k) for k in range(3)]
    assert rows[-1]["kept"] == 1 and list(rows[-1])[:3] == ["id", "prompt", "kept"]
    for line, row in zip(written, rows):  # no key stands twice
        assert len(json.loads(line, object_pairs_hook=list)) == len(row)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "out.jsonl", "out.jsonl.meta.json"]


def test_overlong_prompts_are_skipped_on_demand(tiny_model, prompts, base, tmp_path, capfd):
    """They are left out, counted, and change nothing of the others."""
    rows = read(prompts)
    path = write(tmp_path / "in.jsonl", [
        {"id": "first", "prompt": "1" * 240}, *rows[:5], {"id": "long", "prompt": "1" * 300},
        *rows[5:]])
    out = tmp_path / "out.jsonl"
    flags = ["--temperature", 0.7, "--overlong", "skip", "--max-batch-tokens", 700]
    assert ids_of(run(tiny_model, path, out, *flags)) == ids_of(base[1])
    summary = capfd.readouterr().err
    assert "12 prompts (2 too long ones skipped) x 8 samples" in summary
    assert "96 rows" in summary and meta_of(out)["overlong"] == 2
    long = write(tmp_path / "long.jsonl", [{"id": "long", "prompt": "1" * 300}])
    assert "no prompt leaves room for 24 new tokens" in refused(
        capfd, tiny_model, long, tmp_path / "none.jsonl", "--overlong", "skip")


# ---- Bad input -----------------------------------------------------------------------------------
GOOD = {"id": "a", "prompt": "1 2=3:"}
NEITHER = "needs either 'prompt' or 'messages', and has"


def bad(**fields):
    """A second row with these fields."""
    return [GOOD, {"id": "b", **fields}]


BAD_PROMPTS = {
    "empty": (b"", ": no rows"), "torn": (b'{"id": "a", "prompt": "1"', ":1: not a valid JSON row"),
    "number": (b'{"id": "a", "prompt": 1e999}', ":1: field 'prompt': Number out of range"),
    "missing id": ([GOOD, {"prompt": "1"}], ":2: missing field 'id'; write a text, such as"),
    "duplicate id": ([*bad(prompt="1"), GOOD], ":3: duplicate id 'a'"),
    "id not a string": (bad(id=3), ":2: field 'id': Expected str, got int; write a text, such as"),
    "no prompt": (bad(question="1"), f":2: {NEITHER} id, question; `python -m data."),
    "both": (bad(prompt="1", messages=[turn("x")]), f":2: {NEITHER} id, prompt, messages;"),
    "prompt a number": (bad(prompt=3), 'write "prompt": "a text", or "messages": ['),
    "messages a string": (bad(messages="hello"),
                          'got str; write "messages": [{"role": "user", "content": '),
    "messages empty": (bad(messages=[]), ":2: field 'messages': Expected array of"),
    "content missing": (bad(messages=[{"role": "user"}]), "missing field 'content'"),
    "content a picture": (bad(messages=[turn([{"type": "image"}])]),
                          "field 'messages[0].content[0].type': Invalid enum value 'image'"),
    "turns of from and value": (bad(messages=[{"from": "human", "value": "x"}]),
                                "missing field 'role'; write \"messages\": [{\"role\": "),
    "empty prompt": (bad(prompt=""), ":2: an empty prompt"),
    "prompt too long": (bad(prompt="1" * 240), ":2: 240 prompt tokens + 24 new ones exceed the "
                        "model's 256 positions; lower --max-new-tokens, or give --overlong skip"),
    "no chat template": (bad(messages=[turn("hi")]), ":2: the prompt cannot be encoded"),
}


@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts_end_with_one_line(case, tiny_model, tmp_path, capfd, monkeypatch):
    """Before any model is loaded."""
    (rows, message), path = BAD_PROMPTS[case], tmp_path / "p.jsonl"
    monkeypatch.setattr(generate, "load_model", None)
    path.write_bytes(rows) if isinstance(rows, bytes) else write(path, rows)
    line = refused(capfd, tiny_model, path, tmp_path / "out.jsonl")
    assert f"{path}:" in line and message in line
    assert [one.name for one in tmp_path.iterdir()] == ["p.jsonl"]


@pytest.mark.parametrize("flags, message", [
    *(([flag, value], flag) for flag, value in [
        ("--temperature", -1), ("--temperature", "nan"), ("--n", 0), ("--top-p", 0),
        ("--top-p", 1.5), ("--top-k", -1), ("--max-new-tokens", 0), ("--stop", ""),
        ("--rank-timeout", 0), ("--limit", 0), ("--device", "tpu"), ("--what", 1)]),
    (["--stop", r"\n"], r"--stop \n: \n is a backslash and a letter here; bash writes the "
                        r"character as $'\n'"),
    (["--stop", "ok", r"\nQuestion"], r"$'\n'"), (["--stop", r"a\t"], r"$'\t'")])
def test_wrong_flags_end_with_one_line(flags, message, capfd):
    assert message in refused(capfd, "m", "p", "o", *flags)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def without(*names):
    return lambda folder: [os.remove(folder / name) for name in names]


def holding(name, content):
    return lambda folder: (folder / name).write_text(content)


def pickle_only(folder):
    os.remove(folder / WEIGHTS)
    torch.save({"weight": Bomb()}, folder / "pytorch_model.bin")


def pickle_beside_safetensors(folder):
    """Safetensors of something else do not make the library take the pickle, however harmless."""
    torch.save(load_file(folder / WEIGHTS), folder / "pytorch_model.bin")
    os.rename(folder / WEIGHTS, folder / "adapter.safetensors")


def code_in_auto_map(folder):
    auto_map = {"AutoConfig": "code.Mine", "AutoModelForCausalLM": "code.Mine"}
    change_json(folder, config={"model_type": "mine", "auto_map": auto_map},
                tokenizer_config={"auto_map": {"AutoTokenizer": ["code.Mine", None]}})
    (folder / "code.py").write_text("import os\nos.mkdir('executed')\nclass Mine: pass\n")


def another_vocabulary(folder):
    raw = json.loads((folder / "tokenizer.json").read_text())
    raw["model"]["vocab"]["="] = 900
    (folder / "tokenizer.json").write_text(json.dumps(raw))


def recurrent(folder):
    transformers.MambaForCausalLM(transformers.MambaConfig(
        vocab_size=22, hidden_size=16, num_hidden_layers=1, eos_token_id=0)).save_pretrained(folder)


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
BAD_MODELS = {  # see also test_models.py
    "missing": (shutil.rmtree, "no such model folder"),
    "no config": (without("config.json"), "no config.json"),
    "broken config": (holding("config.json", '{"model_type": "qwen2",'), "cannot be loaded"),
    "adapter": (holding("adapter_config.json", "{}"), "an adapter (adapter_config.json); merge it"),
    **{name: (holding(name, POINTER), f"{name}: a git-lfs pointer") for name in (
        WEIGHTS, "tokenizer.json", "model.safetensors.index.json", "optimizer.safetensors")},
    "pickle only": (pickle_only, "no *.safetensors"),
    "pickle beside safetensors": (pickle_beside_safetensors, "cannot be loaded"),
    "code": (code_in_auto_map, "cannot be loaded"),
    "torn weights": (lambda folder: os.truncate(folder / WEIGHTS, 9999), f"{WEIGHTS}: cannot be"),
    "no tokenizer": (without("tokenizer.json", "tokenizer_config.json"),
                     "a tokenizer without a vocabulary"),
    "another vocabulary": (another_vocabulary, "token id 900 is beyond the model's vocabulary"),
    "recurrent": (recurrent, "unsupported architecture"),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models_end_with_one_line_and_run_no_code(case, tiny_model, prompts, tmp_path, capfd,
                                                      monkeypatch):
    (change, message), folder = BAD_MODELS[case], copy_of(tiny_model, tmp_path / "model")
    change(tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    line = refused(capfd, folder, prompts, tmp_path / "out.jsonl")
    assert (folder in line or prompts in line) and message in line
    assert not (tmp_path / "executed").exists() and not (tmp_path / "out.jsonl").exists()


def test_a_folder_needs_no_network_and_may_bring_code(tiny_model, prompts, base, tmp_path,
                                                      monkeypatch):
    """With --trust-remote-code; its classes, here Qwen2 under another name, sample as Qwen2."""
    calls = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: calls.append(args))
    monkeypatch.setattr(socket.socket, "connect", lambda *args: calls.append(args))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", f"{tmp_path}/modules")
    folder = copy_of(tiny_model, tmp_path / "model", config={"model_type": "mine", "auto_map": {
        "AutoConfig": "mine.MineConfig", "AutoModelForCausalLM": "mine.Mine"}})
    (tmp_path / "model" / "mine.py").write_text(
        "from transformers import Qwen2Config, Qwen2ForCausalLM\n"
        "class MineConfig(Qwen2Config):\n    model_type = 'mine'\n"
        "class Mine(Qwen2ForCausalLM):\n    config_class = MineConfig\n")
    for model, flags in (folder, ["--trust-remote-code"]), (tiny_model, []):
        rows = run(model, prompts, tmp_path / f"{len(flags)}.jsonl", "--temperature", 0.7,
                   "--limit", 2, *flags)
        assert ids_of(rows) == ids_of(base[1][:16]) and not calls


def test_errors_of_a_process_are_one_line_too(tiny_model, tmp_path):
    """Started as people start it; --help does not wait for torch."""
    def launch(*argv):
        return subprocess.run([sys.executable, "-X", "importtime", *argv], cwd=ROOT,
                              capture_output=True, text=True)

    path = write(tmp_path / "p.jsonl", [GOOD, {"id": "b"}])
    done = launch("generate.py", "--model", tiny_model, "--prompts", path, "--out", tmp_path / "o")
    lines = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 1)
    assert lines[0].startswith(f"generate.py: error: {path}:2: {NEITHER} id;")
    for script in (["-m", "data.make_tiny"], ["generate.py"]):
        done = launch(*script, "--help")
        assert done.returncode == 0
        assert " torch" not in done.stderr and " transformers" not in done.stderr
    places = [done.stdout.index(group) for group in  # in the code's order
              ("\nfiles:", "\nprompts:", "\nsampling:", "\nmachine:")]
    assert places == sorted(places) and "--out rollouts.jsonl \\\n" in done.stdout
