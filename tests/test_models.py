"""Every architecture that the README names, at toy size with random weights: the three ways to
compute a log-prob (sampling with a cache, training with shared prompts, training with repeated
ones) agree with a plain pass, and the whole pipeline runs on it. And data/models.py: what folders
it refuses, what a round takes over."""
import argparse
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

import generate
import score
import shared_prompt
import train
from conftest import byte_level_bpe, forced, load, read, refusal, stage, write
from data import models

ROOT = os.path.dirname(os.path.abspath(train.__file__))
ENDS = [0, *range(5, 15)]  # several end-of-text ids; the first is the padding too
ROPE3 = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
         "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
# Sliding windows are 8 tokens, shorter than prompts; two key-value heads serve four query heads.
WINDOW = {"head_dim": 8, "sliding_window": 8}
MIXED = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ARCHITECTURES = {
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"num_hidden_layers": 3, "use_sliding_window": True,
                               "sliding_window": 8, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8}), "llama": ("Llama", {"rope_parameters": ROPE3}),
    "mistral": ("Mistral", WINDOW), "ministral": ("Ministral", MIXED),
    "gemma2": ("Gemma2", {**WINDOW, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0,
                          "query_pre_attn_scalar": 8}),
    "gemma3": ("Gemma3Text", {**MIXED, "query_pre_attn_scalar": 8}),
    "phi": ("Phi", {}),  # a bias in the head
    "phi3": ("Phi3", {"sliding_window": 8}), "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "qwen3-moe": ("Qwen3Moe", {**EXPERTS, "head_dim": 8}),
    "cohere2": ("Cohere2", {"sliding_window": 8, "logit_scale": 0.25}),
    "granite": ("Granite", {"logits_scaling": 4.0}), "olmo2": ("Olmo2", {}),
    "gpt2": ("GPT2", {}),  # learned positions, where all others see distances alone
    "gpt-oss": ("GptOss", {**WINDOW, "num_local_experts": 4}),
    "deepseek": ("DeepseekV3", {
        "num_key_value_heads": 4, "head_dim": 8, "n_routed_experts": 4, "n_group": 1,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "q_lora_rank": 16,
        "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
        "first_k_dense_replace": 1}),
}
# windows, soft caps, sinks; of deepseek, what it caches is not yet its keys and values
NOT_SHARED = ("qwen2-window", "mistral", "ministral", "gemma2", "gemma3", "phi3", "cohere2",
              "gpt-oss", "deepseek")


# ---- Helpers -------------------------------------------------------------------------------------
def build(name, vocab_size=64, seed=0, **more):
    """A random model of an architecture, its weights large enough that its logits differ."""
    kind, flags = ARCHITECTURES.get(name, (name, {}))
    config = getattr(transformers, kind + "Config")(**{
        "vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 48, "max_position_embeddings": 256, "eos_token_id": ENDS,
        "pad_token_id": ENDS[0], "bos_token_id": None,
        **flags, **more})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4)
            elif not weight.any():  # biases start at zero
                weight.normal_(std=0.1)
    return model


def make_tokenizer(like_qwen=False):
    """A byte-level BPE with a chat template; some tokens are whole boxed answers, so that a random
    model is right now and then."""
    splits = [pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"),
              pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer = byte_level_bpe(["What is 12 + 30? Please reason step by step"] * 3, 300,
                               ["<|end|>"], splits if like_qwen else None)
    if like_qwen:  # transformers splits so whatever tokenizer.json says, which generate.py refuses
        tokenizer.normalizer = normalizers.NFC()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>",
                                        pad_token="<|end|>", unk_token="<|end|>")
    tokenizer.add_tokens(["\\boxed{" + "0" * zeros + digit + "}" for digit in "12"
                          for zeros in range(8)])
    tokenizer.chat_template = ("{% for turn in messages %}<{{ turn['role'] }}> "
                               "{{ turn['content'] }}\n{% endfor %}<assistant> ")
    return tokenizer


GENERATION = {"eos_token_id": ENDS, "pad_token_id": ENDS[0], "do_sample": True, "top_k": 20,
              "top_p": 0.8, "temperature": 0.7,
              "repetition_penalty": 1.05, "transformers_version": "4.37.0", "of_its_own": [1, 2]}


def make_folder(name, folder, **more):
    """What somebody downloads: config, safetensors, tokenizer and a generation_config.json with
    sampling settings of its own."""
    tokenizer = make_tokenizer(like_qwen=name.startswith("qwen2"))
    build(name, len(tokenizer), **more).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION, indent=7) + "\n\n")
    return str(folder)


def plain_pass(model, prompt, completion, temperature):
    """log pi of each completion token and the entropy there, by autograd's own softmax."""
    logp = forced(model, prompt, completion, temperature)
    return logp[np.arange(len(completion)), completion], -(logp.exp() * logp).sum(-1)


def check_policy(policy, prompts, completions):
    """Its log-probs are those of plain passes."""
    with torch.no_grad():
        expected = torch.cat([plain_pass(policy.model, *row, policy.temperature)[0]
                              for row in zip(prompts, completions)])
        assert (policy(prompts, completions)[0] - expected).abs().max() < 1e-5


# ---- The sampler ---------------------------------------------------------------------------------
@pytest.mark.parametrize("attention", ["model", "shared"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_sampled_logprobs_equal_a_plain_pass(name, attention, monkeypatch):
    """To 1e-5, with padded prompts longer and shorter than the sliding window, several ends, rows
    that share tokens and part, rows dropped when they end, and both ways of SharedLayer."""
    monkeypatch.setattr(shared_prompt, "SHORT", 80)  # up to ten tokens of the row's own
    model, rng = build(name), np.random.default_rng(1)
    if attention == "shared" and name in NOT_SHARED:
        with pytest.raises(ValueError, match="--attention shared needs SDPA over plain keys"):
            generate.choose_attention(model, attention)
        generate.choose_attention(model, "cpu")
        assert model.config._attn_implementation == build(name).config._attn_implementation
        return
    generate.choose_attention(model, attention)
    prompts = [rng.integers(6, 64, length).tolist() for length in (3, 20, 9, 8)]
    owner = [0, 0, 1, 1, 1, 2, 3, 3]
    args = argparse.Namespace(max_new_tokens=20, temperature=0.7, top_p=1.0, top_k=0, stop=[])
    uniform = rng.random((8, 20))
    uniform[1, :6], uniform[2:4, :3] = uniform[0, :6], uniform[4, :3]  # these part late
    tokens, logprobs, lengths, stops = generate.sample(model, prompts, owner, uniform, [0, 5],
                                                       None, args)
    assert any(stops) and max(lengths) == 20  # some were dropped, some went on
    model.set_attn_implementation(build(name).config._attn_implementation)
    for row, length in enumerate(lengths):
        with torch.no_grad():
            logp, _ = plain_pass(model, prompts[owner[row]], tokens[row, :length].tolist(), 0.7)
        assert (logp - logprobs[row, :length]).abs().max() < 1e-5


def test_what_a_batch_samples_otherwise_than_alone_is_refused():
    """generate.prepare's trial: it also chooses the attention."""
    rng = np.random.default_rng(1)

    def prepared(model, lengths=(9, 3, 20), rows=4):
        flags = ["--model", "m", "--prompts", "p", "--out", "o", "--max-new-tokens", "16",
                 "--temperature", "0"]
        encoded = [rng.integers(15, 64, length).tolist() for length in lengths]
        # the empty one is skipped
        generate.prepare(model, "cpu", rows, [*encoded, []], generate.parse_args(flags))
        return model.config._attn_implementation

    with pytest.raises(ValueError,
                       match="unsupported architecture: log-probs of a batch differ by"):
        prepared(build("Roberta", is_decoder=True, pad_token_id=1))  # its positions begin at 2
    assert prepared(build("qwen2")) == "shared" and prepared(build("gemma2")) == "eager"
    local = {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 4,
             "window_size": 8}
    assert prepared(build("GPTNeo", **local)) == "eager"  # plain sampling has the window right
    # its layers make masks of their own, which `shared` would not see
    assert prepared(build("Doge")) == "sdpa"
    assert prepared(build("qwen2"), rows=1) == prepared(build("qwen2"), lengths=(5,)) == "shared"


# ---- The policy ----------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_and_repeated_prompts_equal_a_plain_pass(name):
    """Log-probs to 1e-5 and gradients (through the prompt's cache) to 1e-5 relative; prompts longer
    and shorter than the window."""
    model, rng = build(name), np.random.default_rng(0)
    policy = train.Policy(model, 0.7, True)
    policy.check(name)
    short, long, middle = (rng.integers(6, 64, length).tolist() for length in (3, 20, 9))
    prompts = [short, long, long, middle, short, long]  # rows of a group share one list
    completions = [rng.integers(0, 64, length) for length in (5, 1, 17, 12, 2, 9)]
    weight = torch.tensor(rng.normal(size=sum(map(len, completions))), dtype=torch.float32)

    def outcome(logp, entropy):
        model.zero_grad()
        (logp * weight + 0.1 * entropy).sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        return logp.detach(), entropy.detach(), torch.cat([weight.grad.flatten()
                                                           for weight in model.parameters()])

    rows = [plain_pass(model, prompt, completion, 0.7)
            for prompt, completion in zip(prompts, completions)]
    expected = outcome(*map(torch.cat, zip(*rows)))
    assert expected[0].std() > 0.1
    for policy.share in (True, False):
        logp, entropy, gradient = outcome(*policy(prompts, completions))
        assert (logp - expected[0]).abs().max() < 1e-5
        assert (entropy - expected[1]).abs().max() < 1e-5
        assert (gradient - expected[2]).norm() < 1e-5 * expected[2].norm()


LONGROPE = {"max_position_embeddings": 512, "original_max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                                "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
                                "original_max_position_embeddings": 64}}


@pytest.mark.parametrize("kind, flags", [("gpt2", {"max_position_embeddings": 64}),
                                         ("Phi3", LONGROPE)])
def test_rows_up_to_the_last_position(kind, flags, capfd):
    """Padding of a short completion after a long prompt lies past the last position: it may neither
    raise nor turn the others."""
    policy, rng = train.Policy(build(kind, **flags), 1.0, True), np.random.default_rng(0)
    prompts = [rng.integers(6, 64, length).tolist() for length in (60, 4)]
    completions = [rng.integers(6, 64, 64 - len(prompt)) for prompt in prompts]
    rows = [argparse.Namespace(prompt=prompt, completion=completion, where="rows:1")
            for prompt, completion in zip(prompts, completions)]
    policy.check(kind, rows)
    for policy.share in (True, False):
        check_policy(policy, prompts, completions)
    rows[0].completion = np.arange(5)
    assert "rows:1: 65 tokens of prompt and completion exceed the 64 positions" in refusal(
        capfd, policy.check, kind, rows)


def capped(model, scale_last):
    """A soft cap before or after the scaling of the logits."""
    model.config.final_logit_softcapping, model.config.logits_scaling = 3.0, 0.25
    plain = model.forward

    def forward(*args, **kwargs):
        output = plain(*args, **kwargs)
        logits = output.logits * (1 if scale_last else 4)
        output.logits = 3 * torch.tanh(logits / 3) * (4 if scale_last else 1)
        return output
    model.forward = forward
    return model


def with_tanh(model):
    model.lm_head = torch.nn.Sequential(model.lm_head, torch.nn.Tanh())
    return model


def with_pictures():
    text = build("gemma3").config.to_dict()
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return AutoModelForCausalLM.from_config(
        transformers.Gemma3Config(text_config=text, vision_config=vision), dtype=torch.float32)


@pytest.mark.parametrize("make, told", [
    (lambda: build("Llama4Text", head_dim=8, num_local_experts=2, attention_chunk_size=8,
                   intermediate_size_mlp=48, no_rope_layers=[1, 0]),
     "its decoder returns no hidden states"),
    (lambda: with_tanh(build("llama")), "not a linear layer but Sequential"),
    (lambda: build("HyperCLOVAX", logits_scaling=4.0),  # multiplied, where Granite divides
     "unsupported head: its logits"),
    (lambda: capped(build("llama"), scale_last=False), "unsupported head: its logits"),
    (with_pictures, "belongs neither to the text decoder nor to its head"),
], ids=["decoder", "tanh", "multiplied", "capped last", "pictures"])
def test_what_the_policy_would_compute_otherwise_is_refused(make, told, capfd):
    assert told in refusal(capfd, train.Policy(make(), 1.0, False).check, "m")


def test_a_scale_after_the_cap_is_right():
    policy = train.Policy(capped(build("llama"), scale_last=True), 1.0, False)
    policy.check("both")
    check_policy(policy, [[7, 8, 9]], [np.arange(10, 20)])


@pytest.mark.parametrize("kind, flags", [
    ("Mamba", {}), ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    ("Qwen3_5Text", {"num_hidden_layers": 4, "head_dim": 8, "linear_num_key_heads": 2,
                     "linear_num_value_heads": 4, "linear_key_head_dim": 8,
                     "linear_value_head_dim": 8})])
def test_a_cache_that_cannot_be_repeated_is_refused_aloud(kind, flags, tmp_path, capfd):
    """Recurrent states: generate.py refuses; train.py asks for --no-share-prompts, with which it is
    right."""
    model = build(kind, **flags)
    policy = train.Policy(model, 1.0, True)
    assert "give --no-share-prompts" in refusal(capfd, policy.check, kind)
    policy.share = False
    policy.check(kind)
    check_policy(policy, [[7, 8, 9], [7, 8, 9, 10, 11]], [np.arange(20, 30), np.arange(9, 12)])
    model.save_pretrained(tmp_path)
    sampler = generate.load_model(str(tmp_path), torch.float32, "cpu", {"local_files_only": True})
    with pytest.raises(ValueError, match="unsupported architecture"):
        generate.choose_attention(sampler, "cpu")


# ---- The pipeline --------------------------------------------------------------------------------
PROBLEMS = [{"id": f"maths/{i}.json", "task": "math", "source": "made-up", "answer": str(1 + i % 2),
             "note": {"of": ["no", "stage"]},
             "messages": [{"role": "system", "content": "Put your final answer within \\boxed{}."},
                          {"role": "user", "content": f"What is {'12 + ' * i}30?"}]}
                          for i in range(4)]


@pytest.mark.parametrize("name", ["qwen2", *(pytest.param(name, marks=pytest.mark.slow)
                                             for name in ARCHITECTURES if name != "qwen2")])
def test_the_whole_pipeline(name, tmp_path, monkeypatch):
    """Maths rows, chat template, generate, score, two updates, another round."""
    folder, kept, save_round = make_folder(name, tmp_path / "model"), {}, train.save_round
    prompts, one, two = write(tmp_path / "prompts", PROBLEMS), tmp_path / "one", tmp_path / "two"

    def spy(out, policy, *args):
        kept["model"] = policy.model
        save_round(out, policy, *args)

    monkeypatch.setattr(train, "save_round", spy)

    def play(model, out):
        """A round from `model`: its scored rows and its metrics."""
        rollouts, scored = f"{out}.rollouts", f"{out}.scored"
        stage(generate, "--model", model, "--prompts", prompts, "--out", rollouts, "--n", 6,
              "--temperature", 0.7, "--max-new-tokens", 16, "--device", "cpu",
              "--max-batch-tokens", 700)
        stage(score, rollouts, "--out", scored, "--workers", 1)
        rows = read(scored)  # train.py works on their ids alone, whatever their texts say
        write(scored, [{**row, "messages": None, "completion": "\ufffd \u00e9"} for row in rows])
        stage(train, "--model", model, "--out", out, "--rollouts", scored, "--lr", 1e-2,
              "--updates", 2, "--device", "cpu", "--micro-batch-tokens", 200)
        return rows, read(out / "metrics.jsonl")

    # 1. The sampler's log-probs are the model's; answers are right now and then.
    scored, (first, second) = play(folder, one)
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        for row in scored:
            logp, _ = plain_pass(model, row["prompt_ids"], row["completion_ids"], 0.7)
            assert torch.allclose(logp, torch.tensor(row["logprobs"]), atol=1e-4)
            assert tokenizer.decode(row["prompt_ids"]) == tokenizer.apply_chat_template(
                row["messages"], tokenize=False)
    assert {row["completion_ids"][-1] for row in scored
            if row["finish_reason"] == "stop"} & set(ENDS)
    assert 0 < sum(row["correct"] for row in scored) < len(scored) == 24

    # 2. The trainer's log-probs are the sampler's (pi_old of both updates comes before the first),
    # and the first ratio is 1.
    assert first["logprob_gap_max"] < 1e-4 and second["logprob_gap_max"] < 1e-4
    assert abs(first["ratio_max"] - 1) < 1e-5 and second["ratio_max"] > 1 + 1e-3
    assert first["clip_low_frac"] == first["clip_high_frac"] == 0
    assert abs(first["approx_kl"]) < 1e-9 and first["grad_norm"] > 0

    # 3. The folder: another model, that reloads with the same logits and the same tokenizer.
    after, ids = load(one), torch.tensor([scored[0]["prompt_ids"]])
    with torch.no_grad():
        logits = after(input_ids=ids).logits
        assert torch.equal(logits, kept["model"](input_ids=ids).logits)
        assert not torch.allclose(logits, model(input_ids=ids).logits, atol=1e-2)
    copied, text = AutoTokenizer.from_pretrained(one), "12 + 30? \\boxed{01} naïve 数学\n"
    assert copied(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert copied.decode(copied(text)["input_ids"]) == text

    # 4. It can be sampled and goes on with its optimizer.
    _, metrics = play(one, two)
    assert [line["step"] for line in metrics] == [1, 2, 3, 4]
    assert metrics[2]["logprob_gap_max"] < 1e-4


@pytest.mark.parametrize("name, flags", [
    ("phi", {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attention_dropout": 0.3}),
    ("mixtral", {"attention_dropout": 0.3, "router_jitter_noise": 0.3}),
    ("qwen2", {"attention_dropout": 0.3}), ("smollm3", {})])
def test_checkpointed_activations_change_nothing(name, flags):
    """Nor do dropout and the noise of a router, which checkpointing could switch on: it asks for
    the training mode."""
    model, rng = build(name, **flags), np.random.default_rng(0)
    policy, calls, found = train.Policy(model, 0.7, False), [], []
    prompts = [[7, 8, 9], [7, 8]]
    completions = [rng.integers(6, 64, length) for length in (5, 11)]
    model.get_decoder().layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    for prepare in (lambda _: None, train.checkpoint_activations):
        prepare(model)
        model.zero_grad()
        calls.clear()
        logp, _ = policy(prompts, completions)
        logp.sum().backward()
        gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
        found.append((logp.detach(), gradient, len(calls)))
    (logp, gradient, once), (again, other, twice) = found
    assert twice > once  # so something was computed again
    assert torch.equal(logp, again) and (gradient - other).norm() < 1e-5 * gradient.norm()


# ---- Folders -------------------------------------------------------------------------------------
OPTIONS = {"trust_remote_code": False, "local_files_only": True}


def llama(folder, change=None, index=False, **more):
    """A toy Llama in `folder`; change: weights (name: tensor, or None to leave one out)."""
    torch.manual_seed(0)
    flags = {"vocab_size": 37, "hidden_size": 20, "intermediate_size": 50, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, **more}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**flags)).eval()
    model.save_pretrained(folder, max_shard_size=20_000 if index else "5GB")
    if change:
        weights = {**load_file(folder / "model.safetensors"), **change}
        save_file({name: tensor for name, tensor in weights.items() if tensor is not None},
                  folder / "model.safetensors", {"format": "pt"})
    return model


def whole(folder):
    """The weights of a folder as one rank loads them."""
    return models.load_model(str(folder), torch.float32, "cpu", OPTIONS)


def by_rows(folder):
    """As ranks that share it do, or from_pretrained where it alone can."""
    with models.load_errors(str(folder)):
        model, files = models.empty_model(str(folder), OPTIONS)
        if not files:
            return whole(folder)
        models.fill(model, files)
    return model


both_ways = pytest.mark.parametrize("load_one", [whole, by_rows])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("index", [False, True])
@both_ways
def test_a_folder_is_loaded_whole_and_by_rows(load_one, tied, index, tmp_path):
    original = llama(tmp_path, index=index, tie_word_embeddings=tied)
    model = load_one(tmp_path)
    found, expected = model.state_dict(), original.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    assert torch.equal(model.model.rotary_emb.inv_freq, original.model.rotary_emb.inv_freq)
    empty, _ = models.empty_model(str(tmp_path), OPTIONS)
    assert all(weight.is_meta for weight in empty.parameters())


FAULTS = {
    "shape": ({"lm_head.weight": torch.zeros(36, 20)}, "36.*37|size mismatch"),
    "not finite": ({"lm_head.weight": torch.full((37, 20), float("nan"))},
                   "lm_head.weight is not finite"),
    "missing": ({"lm_head.weight": None, "model.norm.weight": None}, "lm_head.weight"),
    "an adapter": ({"model.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 20)},
                   r"holds an adapter \(model.layers.0.self_attn.q_proj.lora_A.weight\); merge"),
}


@pytest.mark.parametrize("name", FAULTS)
@both_ways
def test_weights_that_do_not_fit_are_refused(load_one, name, tmp_path, capfd):
    change, told = FAULTS[name]
    llama(tmp_path, change)
    line = refusal(capfd, load_one, tmp_path)
    assert re.search(told, line, re.I) and str(tmp_path) in line, line


@both_ways
def test_weights_that_no_module_takes_are_counted(load_one, tmp_path, capfd):
    """A bias that the config does not have changes the model: said, once, with its name."""
    original = llama(tmp_path, {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(20)
                                for i in (0, 1)})
    capfd.readouterr()
    model = load_one(tmp_path)
    assert capfd.readouterr().err.splitlines() == [
        f"{tmp_path}: 2 tensors of its files are not used, as config.json has no place for "
        f"them, model.layers.0.self_attn.q_proj.bias among them"]
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.fixture
def folders(tmp_path):
    """A source and the round that is made from it."""
    for name in ("source", "out"):
        (tmp_path / name).mkdir()
    return tmp_path / "source", tmp_path / "out"


@pytest.mark.parametrize("same", [False, True])
def test_tied_by_the_config_and_not_by_the_files(same, folders):
    """Both are loaded where they differ, as from_pretrained does, and the round says so in its
    config; equal ones are tied."""
    source, out = folders
    original = llama(source, tie_word_embeddings=True).model.embed_tokens.weight.detach()
    head = original.clone() if same else torch.randn(37, 20)
    llama(source, {"lm_head.weight": head}, tie_word_embeddings=True)
    model = whole(source)
    assert torch.equal(model.lm_head.weight, head)
    assert bool(models.empty_model(str(source), OPTIONS)[1]) == same  # else from_pretrained loads
    save(out, model, source)
    assert json.loads((out / "config.json").read_text())["tie_word_embeddings"] == same
    assert torch.equal(load(out).lm_head.weight, head)
    assert torch.equal(load(out).model.embed_tokens.weight, original)


def save(out, model, source):
    """A round after one step of AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    policy = argparse.Namespace(model=model, by_rows=False)
    models.save_round(str(out), policy, optimizer, {"step": 1}, ["{}\n"], str(source))


def test_a_round_takes_over_config_and_tokenizer_as_they_came(folders):
    """What transformers 4 or another program reads there stays: its fields, its rope_theta."""
    source, out = folders
    make_tokenizer().save_pretrained(source)
    llama(source)
    old = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 37,
           "hidden_size": 20, "intermediate_size": 50, "num_hidden_layers": 2,
           "num_attention_heads": 2, "num_key_value_heads": 1, "rope_theta": 1e6,
           "rope_scaling": {key: ROPE3[key] for key in ROPE3 if key != "rope_theta"},
           "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "of_its_own": {"a": [1]}}
    kept = {"tokenizer_config.json": b'{"tokenizer_class": "PreTrainedTokenizer"}\n\n',
            "special_tokens_map.json": b"{}", "vocab.json": b"{ }", "chat_template.jinja": b"x",
            "modeling_own.py": b"pass", "generation_config.json": b'{"top_k": 7}'}
    for name, content in kept.items():
        (source / name).write_bytes(content)
    (source / "config.json").write_text(json.dumps(old))
    (source / "README.md").write_text("of the source")
    model = whole(source)
    save(out, model, source)
    assert sorted(os.listdir(out)) == sorted([
        *kept, "config.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors",
        "tokenizer.json", "trainer_state.json"])
    for name in [*kept, "tokenizer.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name
    config = json.loads((out / "config.json").read_text())
    assert config == {**old, "torch_dtype": "float32", "dtype": "float32"}
    assert torch.equal(load(out).model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


def test_a_config_of_transformers_5_says_what_transformers_4_looks_for(folders):
    source, out = folders
    model = llama(source, rope_parameters=ROPE3)
    save(out, model, source)
    config, again = json.loads((out / "config.json").read_text()), load(out)
    assert {**config["rope_scaling"], "rope_theta": config["rope_theta"]} == ROPE3
    assert again.config.rope_parameters == model.config.rope_parameters
    assert torch.equal(again.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_not_finite_is_seen_and_a_large_sum_is_no_reason(dtype):
    inf, nan, large = float("inf"), float("nan"), torch.finfo(dtype).max
    for values, finite in (([], True), ([0, 1], True), ([large, large], True),
                           ([-large] * 3, True), ([1, nan], False), ([inf, 1], False),
                           ([inf, -inf], False), ([large, large, -inf], False)):
        assert models.all_finite(torch.tensor(values, dtype=dtype)) == finite, values


def test_ctrl_c_in_the_middle_of_reading_is_its_own_line(tmp_path, monkeypatch, capfd):
    """torch wraps whatever its steps raise, also the end of the process."""
    models.write_tensors(str(tmp_path), "optimizer", {"a": torch.ones(3)})
    files = models.tensor_files(str(tmp_path), "optimizer")
    monkeypatch.setattr("torch.distributed.checkpoint.HuggingFaceStorageReader.read_data",
                        lambda *_: models.fail("interrupted", 130))

    def load_one():
        with models.load_errors("m"):
            models.read_tensors(files, {"a": torch.empty(3)})

    refusal(capfd, load_one, code=130)


# ---- The name `kernels` --------------------------------------------------------------------------
STUB = '''
"""Answers to every name that transformers imports from the distribution `kernels`."""
__version__ = "0.18.5"
def get_kernel(*args, **kwargs):
    raise RuntimeError("no network here")
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: (lambda decorated: decorated)
'''


def test_the_package_kernels_and_the_folder_kernels(tiny_model, prompts, tmp_path):
    """With that package in the environment every stage runs and finds both; without it transformers
    does not take our folder for it."""
    assert not transformers.utils.is_kernels_available()
    meta = "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n"
    for name, content in ("kernels/__init__.py", STUB), ("kernels-0.18.5.dist-info/METADATA", meta):
        (tmp_path / "site" / name).parent.mkdir(parents=True)
        (tmp_path / "site" / name).write_text(content)
    rollouts, scored, out = (str(tmp_path / name) for name in ("rollouts", "scored", "round"))
    # One process, as its start takes the time; as in a stage, the repository's folder stands first
    # on the path.
    script = f"""if True:
        import generate, score, train, transformers, fused_linear_entropy, kernels
        from conftest import stage
        print(transformers.utils.is_kernels_available(), fused_linear_entropy.__file__,
              kernels.__version__)
        stage(generate, "--model", {tiny_model!r}, "--prompts", {prompts!r}, "--out", {rollouts!r},
              "--n", 2, "--max-new-tokens", 8, "--device", "cpu")
        stage(score, {rollouts!r}, "--out", {scored!r})
        stage(train, "--model", {tiny_model!r}, "--rollouts", {scored!r}, "--out", {out!r})"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, text=True, capture_output=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}/tests"})
    assert done.returncode == 0, done.stderr
    available, ours, version = done.stdout.split()[:3]
    assert ours == os.path.join(ROOT, "kernels", "fused_linear_entropy.py")
    assert version == "0.18.5"
    # 5.17 takes other versions of it
    if tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23):
        assert available == "True"
    assert set(os.listdir(out)) >= {"model.safetensors", "metrics.jsonl"}
