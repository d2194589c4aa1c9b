"""train.py against an oracle written as plain loops: every method, loss, gradient, Adam step and metric; pitfalls 14 to 26.

The oracle below runs a whole round in fp64, one row, one token and one formula at a time, and shares no line with train.py.
For the comparison train.py's model is made fp64 too, so that only wrong formulas can make a difference; a few tests then
repeat it in fp32 and in bf16 autocast. Distributed runs are in test_distributed.py.
"""
import contextlib
import itertools
import json
import math
import os
import random
import shutil
import signal

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.qwen2 import modeling_qwen2

import train

torch.set_num_threads(1)
VOCAB, T = 13, 0.7
TIMINGS = {"tokens_per_s", "peak_mem_bytes"}


# ---- A toy model and rows made by hand ---------------------------------------------------------------------------------
def make_model(folder, seed, **config):
    """A random two-layer Qwen2 whose tokens are far from equally likely, with a word tokenizer."""
    import tokenizers

    words = {word: i for i, word in enumerate(["<eos>", "<pad>", *"0123456789+"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
              "num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": 0,
              "pad_token_id": 1, "initializer_range": 0.3, **config}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).save_pretrained(folder)
    with open(f"{folder}/generation_config.json", "w", encoding="utf-8") as file:  # a hostile one: top_k without sampling
        json.dump({"eos_token_id": [0, 5], "top_k": 20, "do_sample": False, "temperature": 0.3}, file)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("toy") / "model", 0)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("toy") / "reference", 1)


VERDICTS = [  # a group a line: correct and reward of each sample; a reward above 0 is not correctness
    [(1, 1.0), (0, 0.1), (1, 1.0), (0, 0.0)],
    [(0, 0.0), (0, 0.0), (0, 0.0), (0, 0.0)],  # dead: all wrong
    [(1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)],  # dead: all correct
    [(0, 0.1), (0, 0.0), (0, 0.0), (0, 0.1)],  # all wrong, two of them in the right format
    [(0, 0.0), (0, 0.0), (0, 0.0), (1, 1.0)],
    [(1, 1.1), (1, 1.0), (0, 0.0), (1, 0.9)],
    [(0, 0.0), (1, 1.0), (0, 0.0), (0, 0.0)],
]
LENGTHS = [[3, 1, 6, 4], [5, 0, 2, 6], [1, 1, 4, 2], [6, 3, 3, 2], [4, 4, 1, 5], [2, 6, 3, 3], [6, 6, 2, 5]]
CUT = {(2, 2), (5, 1), (6, 1), (6, 3)}  # finish_reason "length"; (6, 1) is the only correct answer of its group


def make_rows(folder, verdicts=VERDICTS, lengths=LENGTHS, cut=CUT, seed=0):
    """Scored rows with random ids, and the log-probs that the model gives them, off by a little like another program's."""
    rng, rows, policy = random.Random(seed), [], load(folder)
    for g, group in enumerate(verdicts):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 5))]
        for k, (correct, reward) in enumerate(group):
            completion = [rng.randrange(VOCAB) for _ in range(lengths[g][k])]
            with torch.no_grad():
                logps = [float(logp) + rng.uniform(-1e-2, 1e-2) for logp, _ in tokens_of(policy, prompt, completion)]
            rows.append({"id": f"p/{g}", "sample": k, "prompt_ids": prompt, "completion_ids": completion, "logprobs": logps,
                         "finish_reason": "length" if (g, k) in cut else "stop", "correct": bool(correct), "reward": reward})
    return rows


def write(path, rows, sampling={"temperature": T, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}):
    path = str(path)
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    if sampling:
        with open(path + ".meta.json", "w", encoding="utf-8") as file:
            json.dump({"sampling": sampling}, file)
    return path


@pytest.fixture(scope="session")
def rollouts(model, tmp_path_factory):
    return write(tmp_path_factory.mktemp("rows") / "scored.jsonl", make_rows(model))


# ---- Running train.py, and reading what it wrote -----------------------------------------------------------------------
class Round:
    def __init__(self, folder):
        self.folder = str(folder)
        self.weights = load_file(f"{folder}/model.safetensors")
        self.moments = load_file(f"{folder}/optimizer.safetensors")
        self.gradient = {name: moment * 10 for name, moment in self.moments.items() if name.endswith("exp_avg")}  # after one step
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
            self.metrics = [json.loads(line) for line in file]
        with open(f"{folder}/trainer_state.json", encoding="utf-8") as file:
            self.step = json.load(file)["step"]


def arguments(model, rollouts, out, *flags):
    return train.parse_args(["--model", model, "--rollouts", rollouts, "--out", str(out), *map(str, flags)])


def run(model, rollouts, out, *flags):
    train.main(arguments(model, rollouts, out, *flags))
    os.close(train.claim.lock)
    return Round(out)


@pytest.fixture
def fp64(monkeypatch):
    """train.py in fp64: the model, its norms (which transformers computes in fp32), the rewards and all that follows from them."""
    original = train.load_model

    def load_double(*args):
        model, tokenizer = original(*args)
        return model.double(), tokenizer

    monkeypatch.setattr(train, "load_model", load_double)
    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward",
                        lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def distance(a, b):
    """|a - b| / |b| over all tensors of two dictionaries."""
    assert a.keys() == b.keys()
    square = sum((a[key].double() - b[key].double()).square().sum() for key in a)
    return (square / sum(b[key].double().square().sum() for key in b)).sqrt().item()


# ---- The oracle ---------------------------------------------------------------------------------------------------------
def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()


def tokens_of(policy, prompt, completion, temperature=T):
    """[(log-prob, entropy)] of each completion token, from the model's own logits, without batch, padding or cache."""
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0] / temperature
    found = []
    for t, token in enumerate(completion):
        logp = torch.log_softmax(logits[len(prompt) - 1 + t], -1)
        entropy = 0
        for v in range(VOCAB):
            entropy = entropy - logp[v].exp() * logp[v]
        found.append((logp[token], entropy))
    return found


def mean_of(numbers):
    return math.fsum(numbers) / len(numbers)


def std_of(numbers):
    return math.sqrt(mean_of([(x - mean_of(numbers)) ** 2 for x in numbers]))  # of the population


def advantages(args, rewards, corrects, old):
    """The advantage of every token of one group. old: a list of log-probs a row -> a list of advantages a row."""
    n = len(rewards)
    means = [mean_of(logps) if logps else 0.0 for logps in old]
    if args.method == "passk":  # all groups of k that can be made of the n answers
        subsets = list(itertools.combinations(range(n), args.pass_k))
        best = [float(any(corrects[i] for i in subset)) for subset in subsets]
        scores = [0.0] * n
        if std_of(best) > 0:
            for i in range(n):
                scores[i] = mean_of([(r - mean_of(best)) / std_of(best) for r, subset in zip(best, subsets) if i in subset])
    elif args.method == "w-reinforce":
        scores = [args.positive_weight if correct else -1.0 for correct in corrects]
    elif args.smooth_level == "reward":
        shaped = [r - args.gamma_p * m if correct else r + args.gamma_n * m for r, correct, m in zip(rewards, corrects, means)]
        scores = [r - mean_of(shaped) for r in shaped]
    else:
        scores = [r - mean_of(rewards) for r in rewards]
        if args.adv_norm == "std":
            scores = [score / (std_of(rewards) + 1e-6) for score in scores]
    result = []
    for i in range(n):
        row = []
        for logp in old[i]:
            advantage = scores[i]
            if args.smooth_level in ("token", "sequence"):
                smooth = logp if args.smooth_level == "token" else means[i]
                advantage += -args.gamma_p * smooth if corrects[i] else args.gamma_n * smooth
            row.append(advantage)
        result.append(row)
    return result


class Oracle:
    """Rounds of train.py in plain loops: `weights`, `gradient` (the last, before clipping), `moments`, `metrics`, `step`."""

    def __init__(self, folder):
        self.policy, self.metrics, self.step = load(folder), [], 0
        self.names = dict(self.policy.named_parameters())
        self.moments = {f"{name}.{key}": torch.zeros_like(weight) for name, weight in self.names.items()
                        for key in ("exp_avg", "exp_avg_sq")}

    def round(self, args, rows, temperature=T):
        groups = {}
        for row in rows:
            row = dict(row)
            if row["finish_reason"] == "length" and args.truncated == "wrong":
                row["correct"], row["reward"] = False, 0.0
            groups.setdefault(row["id"], []).append(row)
        groups = [sorted(group, key=lambda row: row["sample"]) for group in groups.values()]
        order = np.random.default_rng(args.seed).permutation(len(groups)).tolist()
        deals = []
        for u in range(args.updates):  # the first of them get one group more
            size = len(groups) // args.updates + (u < len(groups) % args.updates)
            deals.append([groups[g] for g in order[:size]])
            order = order[size:]
        reference = load(args.ref_model) if args.ref_model else None
        with torch.no_grad():  # before any update
            for row in rows and sum(groups, []):
                row["old"] = [logp.item() for logp, _ in tokens_of(self.policy, row["prompt_ids"], row["completion_ids"], temperature)]
                row["ref"] = [logp.item() for logp, _ in tokens_of(reference, row["prompt_ids"], row["completion_ids"], temperature)
                              ] if reference else None
        for deal in deals:
            self.update(args, deal, temperature)
        self.weights = {name: weight.detach() for name, weight in self.names.items()}

    def update(self, args, groups, temperature):
        members = sum(groups, [])
        kept = [row for row in members if not (row["finish_reason"] == "length" and args.truncated == "mask")]
        count = sum(len(row["completion_ids"]) for row in kept)
        total, seen = torch.zeros((), dtype=torch.float64), []
        for group in groups:
            of_group = advantages(args, [row["reward"] for row in group], [row["correct"] for row in group], [row["old"] for row in group])
            for row, advantages_of_row in zip(group, of_group):
                if not any(row is one for one in kept):
                    continue
                tokens = tokens_of(self.policy, row["prompt_ids"], row["completion_ids"], temperature)
                for t, (logp, entropy) in enumerate(tokens):
                    old, adv = row["old"][t], advantages_of_row[t]
                    rho = (logp - old).exp()
                    low, high = rho.item() < 1 - args.clip_low, rho.item() > 1 + args.clip_high
                    if args.method == "cispo":
                        loss = -min(rho.item(), 1 + args.clip_high) * adv * logp
                        low = False
                    else:
                        low, high = low and adv < 0, high and adv > 0
                        loss = -torch.as_tensor((1 - args.clip_low if low else 1 + args.clip_high) * adv) if low or high else -rho * adv
                    coefficient = args.entropy_coef + (args.entropy_coef_correct if row["correct"] else args.entropy_coef_wrong)
                    loss = loss - coefficient * entropy
                    if args.kl_coef:
                        d = row["ref"][t] - logp
                        loss = loss + args.kl_coef * (d.exp() - d - 1)
                    total = total + loss
                    gamma = (args.gamma_p if row["correct"] else args.gamma_n) or 0.0
                    seen.append({"entropy": entropy.item(), "correct": row["correct"], "nll": -logp.item(), "low": low, "high": high,
                                 "gap": abs(old - row["logprobs"][t]), "rho": rho.item(), "adv": adv, "smooth": abs(gamma * old),
                                 "kl": rho.item() - 1 - (logp.item() - old)})
        loss = total / max(count, 1)
        for weight in self.names.values():
            weight.grad = torch.zeros_like(weight)
        if count:
            loss.backward()
        self.gradient = {f"{name}.exp_avg": weight.grad.clone() for name, weight in self.names.items()}
        norm = math.sqrt(sum(weight.grad.square().sum().item() for weight in self.names.values()))
        lr = args.lr * min(1.0, (self.step + 1) / args.warmup_steps) if args.warmup_steps else args.lr
        self.step += 1
        with torch.no_grad():
            for name, weight in self.names.items():  # clipped, then AdamW
                gradient = weight.grad * min(1.0, args.max_grad_norm / (norm + 1e-6))
                m, v = self.moments[f"{name}.exp_avg"], self.moments[f"{name}.exp_avg_sq"]
                m.copy_(0.9 * m + 0.1 * gradient)
                v.copy_(0.999 * v + 0.001 * gradient ** 2)
                weight.mul_(1 - lr * args.weight_decay)
                weight.sub_(lr * (m / (1 - 0.9 ** self.step)) / ((v / (1 - 0.999 ** self.step)).sqrt() + 1e-8))

        def mean(key, tokens):
            return mean_of([token[key] for token in tokens]) if tokens else None

        correct, wrong = [x for x in seen if x["correct"]], [x for x in seen if not x["correct"]]
        self.metrics.append({
            "step": self.step, "loss": loss.item(), "reward": mean_of([row["reward"] for row in members]),
            "pass@1": mean_of([float(row["correct"]) for row in members]), "entropy": mean("entropy", seen),
            "entropy_correct": mean("entropy", correct), "entropy_wrong": mean("entropy", wrong), "nll": mean("nll", seen),
            "logprob_gap": mean("gap", seen), "logprob_gap_max": max(x["gap"] for x in seen), "ratio_max": max(x["rho"] for x in seen),
            "clip_low_frac": mean("low", seen), "clip_high_frac": mean("high", seen), "approx_kl": mean("kl", seen), "grad_norm": norm,
            "lr": lr, "adv_std": std_of([x["adv"] for x in seen]), "smooth_abs": mean("smooth", seen),
            "dead_groups": mean_of([float(len({row["reward"] for row in group}) == 1) for group in groups]),
            "completion_len": mean_of([len(row["completion_ids"]) for row in members]),
            "truncated_frac": mean_of([float(row["finish_reason"] == "length") for row in members]), "tokens": count})


def same_metrics(found, expected, tolerance=1e-6):
    assert set(found) == set(expected) | TIMINGS
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
        else:
            assert found[key] == pytest.approx(value, rel=tolerance, abs=tolerance), key
    assert found["tokens_per_s"] > 0 and found["peak_mem_bytes"] > 1e6


ARMS = {
    "ds-grpo, token": [],
    "ds-grpo, sequence": ["--smooth-level", "sequence", "--gamma-p", 0.3, "--gamma-n", 0.1],
    "ds-grpo, reward": ["--smooth-level", "reward", "--gamma-p", 0.2, "--gamma-n", 0.1],
    "ds-grpo, positive half": ["--gamma-p", 0.3, "--gamma-n", 0],
    "ds-grpo, uniform bonus": ["--gamma-p", 0.2, "--gamma-n", -0.2],
    "ds-grpo without std": ["--adv-norm", "none"],
    "grpo": ["--method", "grpo"],
    "grpo without std": ["--method", "grpo", "--adv-norm", "none"],
    "passk 1": ["--method", "passk", "--pass-k", 1],
    "passk 2": ["--method", "passk", "--pass-k", 2],
    "passk 4": ["--method", "passk"],
    "cispo": ["--method", "cispo"],
    "w-reinforce": ["--method", "w-reinforce", "--positive-weight", 0.2],
    "entropy bonus": ["--method", "grpo", "--entropy-coef", 0.3],
    "entropy penalty": ["--method", "grpo", "--entropy-coef", -0.3],
    "differential entropy": ["--method", "grpo", "--entropy-coef-correct", 0.5, "--entropy-coef-wrong", -0.2],
    "kl": ["--method", "grpo", "--kl-coef", 0.5],
    "masked": ["--truncated", "mask", "--gamma-p", 0.3],
    "masked, reward": ["--truncated", "mask", "--smooth-level", "reward", "--gamma-p", 0.3],
    "all": ["--smooth-level", "sequence", "--entropy-coef", 0.1, "--entropy-coef-wrong", -0.2, "--kl-coef", 0.2, "--truncated", "mask",
            "--clip-low", 0.05, "--clip-high", 0.1, "--warmup-steps", 2, "--weight-decay", 0.1, "--seed", 3],
}


@pytest.mark.parametrize("arm", ARMS)
def test_pitfalls_18_22_23_oracle(arm, model, reference, rollouts, tmp_path, fp64):
    """One update: loss, gradient, weights and every metric of every arm; three updates in small micro-batches: the clipped ratios,
    pi_old of all groups taken before the first, gradient clipping, warm-up and Adam's moments as well."""
    flags = ARMS[arm] + (["--ref-model", reference] if "--kl-coef" in ARMS[arm] else [])
    rows = make_rows(model)
    one = run(model, rollouts, tmp_path / "one", "--max-grad-norm", 1e9, "--lr", 1e-3, *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", "--max-grad-norm", 1e9, "--lr", 1e-3, *flags), rows)
    assert oracle.metrics[0]["grad_norm"] > 1e-2
    assert distance(one.gradient, oracle.gradient) < 1e-6
    assert distance(one.weights, oracle.weights) < 1e-6
    same_metrics(one.metrics[0], oracle.metrics[0])

    flags += ["--updates", 3, "--lr", 0.03, "--micro-batch-tokens", 20, "--max-grad-norm", 0.2]
    three = run(model, rollouts, tmp_path / "three", *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", *flags), rows)
    assert max(line["clip_high_frac"] for line in oracle.metrics) > 0
    assert max(line["clip_low_frac"] for line in oracle.metrics) > 0 or "cispo" in arm
    assert distance(three.moments, oracle.moments) < 1e-6
    assert distance(three.weights, oracle.weights) < 1e-6
    assert three.step == oracle.step == 3
    for found, expected in zip(three.metrics, oracle.metrics, strict=True):
        same_metrics(found, expected)
    first = three.metrics[0]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["clip_low_frac"] == first["clip_high_frac"] == 0
    assert abs(first["entropy"] - first["nll"]) > 0.05  # pitfall 23: two different things
