"""train.py against an oracle written as plain loops: every method, loss, gradient, Adam step and metric.

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
from data import files, models
from data.rollouts import Trajectory, draw_answers, load_answers, load_rollouts
from experiments import arms
from fused_entropy import choose_backend
from shared_prompt import length_blocks

torch.set_num_threads(1)
choose_backend("cpu", None)  # told once a process: before the tests that count lines, whichever comes first
RIVALS = arms.__file__
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
    os.close(files.claim.lock)
    return Round(out)


def use_fp64(setattr=setattr):
    """Put train.py in fp64: the model, its norms (which transformers computes in fp32), the rewards and all that follows from them."""
    def load_double(name, *args):
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()

    def shell_of_doubles(name, options):
        return models.empty_model(name, options, torch.float64)

    setattr(train, "load_model", load_double)
    setattr(train, "empty_model", shell_of_doubles)
    setattr(modeling_qwen2.Qwen2RMSNorm, "forward",
            lambda self, x: self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt())
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def fp64(monkeypatch):
    use_fp64(monkeypatch.setattr)
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


def advantages(args, group):
    """The advantage of every token of one group: a list of advantages a row."""
    n, old = len(group), [row["old"] for row in group]
    rewards, corrects = [row["reward"] for row in group], [row["correct"] for row in group]
    means = [mean_of(row["logprobs"]) if row["logprobs"] else 0.0 for row in group]
    if args.method.endswith(":passk"):  # all groups of k that can be made of the n answers
        subsets = list(itertools.combinations(range(n), args.arm["k"]))
        best = [float(any(corrects[i] for i in subset)) for subset in subsets]
        scores = [0.0] * n
        if std_of(best) > 0:
            for i in range(n):
                scores[i] = mean_of([(r - mean_of(best)) / std_of(best) for r, subset in zip(best, subsets) if i in subset])
    elif args.method.endswith(":w_reinforce"):
        scores = [args.arm["positive_weight"] if correct else -1.0 for correct in corrects]
    elif args.smooth_level == "reward":
        shaped = [r - args.gamma_p * m if correct else r + args.gamma_n * m for r, correct, m in zip(rewards, corrects, means)]
        scores = [r - mean_of(shaped) for r in shaped]
    else:
        scores = [r - mean_of(rewards) for r in rewards]
        if args.adv_norm != "none":
            scores = [score / (std_of(rewards) + 1e-6) for score in scores]
    result = []
    for i in range(n):
        row = []
        for logp in old[i]:
            advantage = scores[i]
            if args.smooth_level in ("token", "sum", "mean", "share"):
                power = {"sum": 0, "mean": 1, "share": 2}.get(args.smooth_level)
                smooth = logp if power is None else math.fsum(old[i]) / len(old[i]) ** power
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
            if row["finish_reason"] == "length" and args.truncated == "wrong" and not row["correct"]:
                row["reward"] = 0.0
            groups.setdefault(row["id"], []).append(row)
        groups = [sorted(group, key=lambda row: row["sample"]) for group in groups.values()]
        order = np.random.default_rng([args.seed, self.step]).permutation(len(groups)).tolist()
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
        clip_low, clip_high = 0.2 if args.clip_low is None else args.clip_low, 0.25 if args.clip_high is None else args.clip_high
        for group in groups:
            for row, advantages_of_row in zip(group, advantages(args, group)):
                if not any(row is one for one in kept):
                    continue
                tokens = tokens_of(self.policy, row["prompt_ids"], row["completion_ids"], temperature)
                for t, (logp, entropy) in enumerate(tokens):
                    old, adv = row["old"][t], advantages_of_row[t]
                    rho = (logp - old).exp()
                    low, high = rho.item() < 1 - clip_low, rho.item() > 1 + clip_high
                    if args.method.endswith(":cispo"):
                        loss = -min(rho.item(), 1 + clip_high) * adv * logp
                        low = False
                    else:
                        low, high = low and adv < 0, high and adv > 0
                        loss = -torch.as_tensor((1 - clip_low if low else 1 + clip_high) * adv) if low or high else -rho * adv
                    if args.tis_cap:
                        weight = math.exp(old - row["logprobs"][t])
                        loss = loss * min(weight, args.tis_cap)
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
            "pass@1": mean_of([float(row["correct"]) for row in members]),
            "pass@n": mean_of([float(any(row["correct"] for row in group)) for group in groups]), "entropy": mean("entropy", seen),
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
    assert found["tokens_per_s"] >= 0 and found["peak_mem_bytes"] > 1e6


ARMS = {
    "ds-grpo, token": [],
    "ds-grpo, sum": ["--smooth-level", "sum", "--gamma-p", 0.05, "--gamma-n", 0.02],
    "ds-grpo, share": ["--smooth-level", "share", "--gamma-p", 0.5, "--gamma-n", 0.3],
    "ds-grpo, mean": ["--smooth-level", "mean", "--gamma-p", 0.3, "--gamma-n", 0.1],
    "ds-grpo, reward": ["--smooth-level", "reward", "--gamma-p", 0.2, "--gamma-n", 0.1],
    "ds-grpo, positive half": ["--gamma-p", 0.3, "--gamma-n", 0],
    "ds-grpo, uniform bonus": ["--gamma-p", 0.2, "--gamma-n", -0.2],
    "ds-grpo without std": ["--adv-norm", "none"],
    "grpo": ["--method", "grpo"],
    "grpo without std": ["--method", "grpo", "--adv-norm", "none"],
    "passk 1": ["--method", f"{RIVALS}:passk", "--arm", "k=1"],
    "passk 2": ["--method", f"{RIVALS}:passk", "--arm", "k=2"],
    "passk 3": ["--method", f"{RIVALS}:passk", "--arm", "k=3"],
    "cispo": ["--method", f"{RIVALS}:cispo"],
    "w-reinforce": ["--method", f"{RIVALS}:w_reinforce", "--arm", "positive_weight=0.2"],
    "entropy bonus": ["--method", "grpo", "--entropy-coef", 0.3],
    "entropy penalty": ["--method", "grpo", "--entropy-coef", -0.3],
    "differential entropy": ["--method", "grpo", "--entropy-coef-correct", 0.5, "--entropy-coef-wrong", -0.2],
    "kl": ["--method", "grpo", "--kl-coef", 0.5],
    "masked": ["--truncated", "mask", "--gamma-p", 0.3],
    "masked, reward": ["--truncated", "mask", "--smooth-level", "reward", "--gamma-p", 0.3],
    "truncated importance sampling": ["--method", "grpo", "--tis-cap", 1.001],
    "all": ["--smooth-level", "mean", "--entropy-coef", 0.1, "--entropy-coef-wrong", -0.2, "--kl-coef", 0.2, "--truncated", "mask",
            "--clip-low", 0.05, "--clip-high", 0.1, "--warmup-steps", 2, "--weight-decay", 0.1, "--seed", 3],
}


@pytest.mark.parametrize("arm", ARMS)
def test_oracle(arm, model, reference, rollouts, tmp_path, fp64):
    """One update: loss, gradient, weights and every metric of every arm; three updates in small micro-batches: the clipped ratios,
    pi_old of all groups taken before the first, gradient clipping, warm-up and Adam's moments as well."""
    flags = ARMS[arm] + (["--ref-model", reference] if "--kl-coef" in ARMS[arm] else [])
    rows = make_rows(model)
    one = run(model, rollouts, tmp_path / "one", "--max-grad-norm", 1e9, "--lr", 1e-3, *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", "--max-grad-norm", 1e9, "--lr", 1e-3, *flags), rows)
    assert oracle.metrics[0]["grad_norm"] > 1e-2
    assert distance(one.gradient, oracle.gradient) < 1e-9
    assert distance(one.weights, oracle.weights) < 1e-9
    same_metrics(one.metrics[0], oracle.metrics[0])

    flags += ["--updates", 3, "--lr", 0.03, "--micro-batch-tokens", 20, "--max-grad-norm", 0.2]
    three = run(model, rollouts, tmp_path / "three", *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", *flags), rows)
    assert max(line["clip_high_frac"] for line in oracle.metrics) > 0 or arm == "passk 3"  # few of these groups teach it anything
    assert max(line["clip_low_frac"] for line in oracle.metrics) > 0 or arm in ("passk 3", "cispo")
    assert distance(three.moments, oracle.moments) < 1e-9
    assert distance(three.weights, oracle.weights) < 1e-9
    assert three.step == oracle.step == 3
    for found, expected in zip(three.metrics, oracle.metrics, strict=True):
        same_metrics(found, expected)
    first = three.metrics[0]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5) and first["clip_low_frac"] == first["clip_high_frac"] == 0
    assert abs(first["entropy"] - first["nll"]) > 0.05  # two different things


def test_oracle_in_fp32(model, rollouts, tmp_path):
    """As it is run: fp32 gives the oracle's loss and gradient to 1e-6."""
    found, oracle = run(model, rollouts, tmp_path / "out", "--max-grad-norm", 1e9), Oracle(model)
    oracle.round(arguments(model, rollouts, "x"), make_rows(model))
    assert distance(found.gradient, oracle.gradient) < 1e-6
    assert found.metrics[0]["loss"] == pytest.approx(oracle.metrics[0]["loss"], abs=1e-6)
    same_metrics(found.metrics[0], oracle.metrics[0], 1e-5)


# ---- The pure functions -------------------------------------------------------------------------------------------------
def batch_of(reward, correct, old, row):
    """A train.Batch that holds whole rollouts, their mean log-probs taken from its own tokens."""
    length = torch.bincount(row, minlength=reward.numel())
    means = torch.zeros_like(reward.flatten()).index_add(0, row, old.to(reward.dtype)) / length.clamp(min=1)
    return train.Batch(reward, correct, length.view_as(reward), old, row, means.view_as(reward))


def advantage(rewards, corrects, lengths=None, logp=-1.0, method=train.grpo, **options):
    """The advantage of one group in fp64, with `lengths` tokens a row (1), as a list a token."""
    lengths = lengths or [1] * len(rewards)
    row = torch.arange(len(rewards)).repeat_interleave(torch.tensor(lengths))
    old = torch.full((len(row),), logp, dtype=torch.float64) if isinstance(logp, float) else torch.tensor(logp, dtype=torch.float64)
    return method(batch_of(torch.tensor([rewards], dtype=torch.float64), torch.tensor([corrects]), old, row), **options).tolist()


def test_population_std_by_hand():
    assert advantage([1.0, 0.0, 0.0, 0.0], [True, False, False, False]) == pytest.approx([3 ** 0.5, *[-(3 ** -0.5)] * 3], rel=1e-5)
    assert advantage([1.0, 0.0], [True, False], adv_norm="none") == [0.5, -0.5]


@pytest.mark.parametrize("method, options", [(train.grpo, {}), (train.grpo, {"adv_norm": "none"}), (arms.cispo, {}), (arms.passk, {"k": 1})])
def test_one_sample_or_equal_rewards_give_exactly_zero(method, options):
    for reward, n in itertools.product([0.0, 0.1, 1 / 3, 1.0, -7.7], [1, 2, 3, 7, 8, 12]):
        if method == arms.passk and n == 1:
            continue  # refused: below
        row = torch.arange(n)
        found = method(batch_of(torch.full((1, n), reward), torch.full((1, n), True), torch.full((n,), -1.0), row), **options)  # fp32
        assert (found == 0).all(), (reward, n)


def test_the_sign_comes_from_correct_and_dead_groups_are_smoothed():
    options = {"method": train.ds_grpo, "gamma_p": 0.5, "gamma_n": 0.25}
    assert advantage([0.1, 0.1], [False, False], logp=-2.0, **options) == [-0.5, -0.5]  # a format reward does not make it correct
    assert advantage([0.0, 0.0], [True, True], logp=-2.0, **options) == [1.0, 1.0]
    assert advantage([1.0, 1.0], [True, True], [1, 2], logp=[-2.0, -1.0, -3.0], **options) == [1.0, 0.5, 1.5]
    assert advantage([1.0, 1.0], [True, True], [1, 2], logp=[-2.0, -1.0, -4.0], smooth_level="mean", **options) == [1.0, 1.25, 1.25]
    assert advantage([1.0, 1.0], [True, True], [1, 2], logp=[-2.0, -1.0, -4.0], smooth_level="reward", **options) == [-0.125, 0.125, 0.125]


def test_pass_at_k_advantage_against_all_subsets():
    """arXiv 2508.10751: all groups of k out of n answers, a group's reward the largest of its answers', its advantage
    (reward - mean) / std over the groups, an answer's advantage the mean over the groups that it is in."""
    for n in range(1, 9):
        for k, wrong in itertools.product(range(1, n + 1), range(n + 1)):
            corrects = [i >= wrong for i in range(n)]
            if k == n:  # one subset: nothing to differ within
                with pytest.raises(ValueError, match=f"k = {k}"):
                    advantage([float(c) for c in corrects], corrects, method=arms.passk, k=k)
                continue
            args = arguments("m", "r", "o", "--method", f"{RIVALS}:passk", "--arm", f"k={k}")
            expected = sum(advantages(args, [float(c) for c in corrects], corrects, [[-1.0]] * n), [])
            found = advantage([float(c) for c in corrects], corrects, method=arms.passk, k=k)
            assert found == pytest.approx(expected, abs=1e-9), (n, k, wrong)


def test_w_reinforce_and_cispo_by_their_papers():
    """arXiv 2506.01347: lambda on correct, -1 on wrong answers, no baseline. arXiv 2506.13585: the cut ratio is a constant weight of
    log pi; no token loses its gradient; no lower cut."""
    assert advantage([1.0, 0.0, 1.0], [True, False, True], method=arms.w_reinforce, positive_weight=0.1) == pytest.approx([0.1, -1.0, 0.1])
    logp = torch.tensor([-1.0, -1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old, adv = logp.detach() - torch.tensor([2.0, 2.0, 0.5, 0.01]).log(), torch.tensor([1.0, -1.0, -1.0, 1.0])
    loss, low, high = arms.cispo_loss(logp, train.Batch(None, None, None, old), adv, 0.25)
    assert loss.tolist() == pytest.approx([1.25, -1.25, -0.5, 0.01]) and not low.any() and high.tolist() == [True, True, False, False]
    loss.sum().backward()
    assert logp.grad.tolist() == pytest.approx([-1.25, 1.25, 0.5, -0.01])


def test_clipping_on_both_sides_and_at_its_edges():
    """A token is cut, and loses its gradient, only where the step would go further in the direction that it has already gone."""
    cases = [(1.5, 1, 1.25, 0), (1.5, -1, -1.5, -1.5), (0.5, 1, 0.5, 0.5), (0.5, -1, -0.8, 0), (1.0, 1, 1.0, 1.0), (1.0, -1, -1.0, -1.0)]
    for ratio, adv, objective, slope in cases:
        logp = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
        loss, low, high = train.clipped_loss(logp, train.Batch(None, None, None, torch.zeros(1)), torch.tensor([float(adv)]), 0.2, 0.25)
        loss.sum().backward()
        assert (-loss.item(), -logp.grad.item()) == pytest.approx((objective, slope))
        assert (low.item(), high.item()) == (ratio == 0.5 and adv < 0, ratio == 1.5 and adv > 0)


def test_numerics_log_probs_of_minus_ten_thousand():
    """A ratio beyond fp32 must not turn a cut token's gradient into 0 * inf, nor a metric into infinity."""
    values = [-1e4, -9.9e3, -100.0, -1e-7, 0.0]
    for (new, old), adv, cispo in itertools.product(itertools.product(values, values), (-1.0, 0.0, 1.0), (False, True)):
        logp, batch = torch.tensor([new], requires_grad=True), train.Batch(None, None, None, torch.tensor([old]))
        adv = torch.tensor([adv])
        loss, _, _ = arms.cispo_loss(logp, batch, adv, 0.25) if cispo else train.clipped_loss(logp, batch, adv, 0.2, 0.25)
        (loss + train.k3(logp, torch.tensor([old]))).sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all(), (new, old, adv, cispo)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32)), min_size=1, max_size=50))
def test_k3_is_never_negative(pairs):
    logp, other = torch.tensor(pairs).unbind(1)
    assert (train.k3(logp, other) >= 0).all() and (train.k3(logp, logp) == 0).all()
    near = logp * (1 + 1e-6)  # where exp(d) - d - 1, as it is written, loses all digits in fp32
    assert (train.k3(logp, near) >= 0).all()
    torch.testing.assert_close(train.k3(logp.double(), near.double()), (near.double() - logp.double()) ** 2 / 2, rtol=1e-4, atol=1e-20)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_advantage(data):
    """Any rewards, verdicts and settings: finite, zero-mean where the formula says so, and the same whatever order the tokens stand in."""
    groups, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))
    reward = torch.tensor(data.draw(st.lists(st.lists(st.floats(-1e6, 1e6, width=32), min_size=n, max_size=n), min_size=groups,
                                             max_size=groups)))
    correct = torch.tensor(data.draw(st.lists(st.lists(st.booleans(), min_size=n, max_size=n), min_size=groups, max_size=groups)))
    row = torch.tensor(data.draw(st.lists(st.integers(0, groups * n - 1), max_size=20)), dtype=torch.long)
    old = torch.tensor(data.draw(st.lists(st.floats(-1e4, 0, width=32), min_size=len(row), max_size=len(row))))
    gammas = st.sampled_from([0, 10, -1, 0.01])
    smoothing = st.fixed_dictionaries({"gamma_p": gammas, "gamma_n": gammas, "smooth_level": st.sampled_from(["token", "sum", "mean", "share", "reward"]),
                                       "adv_norm": st.sampled_from(["std", "none"])})
    method, options = data.draw(st.one_of(
        st.tuples(st.just(train.ds_grpo), smoothing), st.tuples(st.just(arms.cispo), st.just({})),
        st.tuples(st.just(train.grpo), st.fixed_dictionaries({"adv_norm": st.sampled_from(["std", "none"])})),
        st.tuples(st.just(arms.w_reinforce), st.just({"positive_weight": 0.1})),
        *[st.tuples(st.just(method), st.just({})) for method in (arms.boundary, arms.unsolved, arms.oreal, arms.drpo, arms.maxrl, arms.rs, arms.ucpo)],
        *[st.tuples(st.just(arms.passk), st.fixed_dictionaries({"k": st.integers(1, n - 1)}))] * (n > 1)))
    found = method(batch_of(reward, correct, old, row), **options)
    assert found.shape == row.shape and torch.isfinite(found).all()
    shuffle = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(method(batch_of(reward, correct, old[shuffle], row[shuffle]), **options), found[shuffle], rtol=1e-4, atol=1e-3)
    if method in (train.grpo, arms.cispo, arms.passk):
        each = method(batch_of(reward, correct, torch.zeros(groups * n), torch.arange(groups * n)), **options).view(groups, n)
        assert (each.mean(1).abs() <= 1e-4 * (1 + reward.abs().max())).all()


def row_of(prompt, completion, group=0, used=True):
    return Trajectory(where="rows.jsonl:1", id=str(group), sample=0, group=group, prompt=prompt, completion=np.array(completion, np.int64),
               logprobs=np.zeros(len(completion), np.float32), correct=True, reward=1.0, truncated=False, used=used, fields={})


# ---- The plan: who computes what ----------------------------------------------------------------------------------------
@settings(max_examples=200, deadline=None)
@given(st.data())
def test_the_plan_covers_every_row_once(data):
    """Any lengths, any number of ranks: each kept row with tokens once over all ranks, as many micro-batches on each rank, and no
    micro-batch above its budget unless it is a single row."""
    n, shapes = data.draw(st.integers(1, 4)), data.draw(st.lists(st.tuples(st.integers(1, 30), st.lists(st.tuples(
        st.integers(0, 30), st.booleans()), min_size=4, max_size=4)), min_size=1, max_size=6))
    rows = [row_of([2] * prompt, [0] * length, group=g, used=used) for g, (prompt, samples) in enumerate(shapes) for length, used in samples[:n]]
    world, share = data.draw(st.integers(1, 5)), data.draw(st.booleans())
    budget = data.draw(st.integers(1, 100))
    if True:
        plans = [train.plan_update(rows, list(range(len(rows))), rank, world, budget, share) for rank in range(world)]
        wanted = [i for i, row in enumerate(rows) if len(row.completion) and row.used]
        assert sorted(i for plan in plans for batch in plan for i in batch) == wanted
        assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) >= 1
        for batch in itertools.chain(*plans):
            lengths = [(len(rows[i].prompt), len(rows[i].completion)) for i in batch]
            if share:
                cost = len({rows[i].group for i in batch}) * max([p for p, _ in lengths], default=0) + sum(c for _, c in lengths)
            else:
                cost = len(batch) * max([p + c for p, c in lengths], default=0)
            assert cost <= budget or len(batch) == 1


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 200), max_size=150))
def test_blocks_of_similar_lengths_hold_every_row_once(lengths):
    blocks = length_blocks(lengths)
    assert sorted(i for block in blocks for i in block) == [i for i, length in enumerate(lengths) if length]
    for block in blocks:
        width, rows = max(lengths[i] for i in block), len(block)
        small = rows <= 32 and (rows - 1) * width < 1024
        assert small or sum(lengths[i] for i in block) >= 0.85 * rows * width


def test_the_padding_of_a_micro_batch_is_bounded():
    """What one long completion beside short ones, or lengths of any spread, make of a budget."""
    one_long = [length_blocks([2000] + 31 * [60])]
    assert sum(len(block) * ([2000] + 31 * [60])[block[0]] for block in one_long[0]) < 1.05 * (2000 + 31 * 60)
    rng, worst = np.random.default_rng(0), 0
    for _ in range(200):
        lengths, total = [], 0
        while total < 4096:  # as micro_batches fills it
            lengths.append(int(np.clip(np.exp(rng.normal(5.5, 1)), 1, 2000)))
            total += lengths[-1]
        padded = sum(len(block) * lengths[block[0]] for block in length_blocks(lengths))
        worst = max(worst, padded / total)
    assert worst < 1.35


def test_groups_are_dealt_into_updates_whose_sizes_differ_by_at_most_one(model, rollouts, tmp_path, monkeypatch):
    deals, original = [], train.plan_update

    def watched(rows, members, *args, **options):
        deals.append([rows[i].id for i in members])
        return original(rows, members, *args, **options)

    monkeypatch.setattr(train, "plan_update", watched)
    for updates in (2, 3, 7):
        deals.clear()
        run(model, rollouts, tmp_path / f"out{updates}", "--updates", updates)
        sizes = [len(deal) for deal in deals[:updates]]
        assert sum(sizes) == 28 and max(sizes) - min(sizes) <= 4 and all(size % 4 == 0 for size in sizes)
        assert len({id for deal in deals[:updates] for id in deal}) == 7


# ---- Pitfalls, one by one -----------------------------------------------------------------------------------------------
def test_fp32_masters_move_where_bf16_weights_do_not(model, rollouts, tmp_path):
    torch.manual_seed(0)
    narrow = torch.nn.Parameter((0.02 * torch.randn(100_000)).bfloat16())
    before, optimizer = narrow.detach().clone(), torch.optim.AdamW([narrow], lr=1e-6, weight_decay=0.01)
    for _ in range(20):
        narrow.grad = torch.randn(100_000).bfloat16()
        optimizer.step()
    assert (narrow != before).float().mean() < 0.05
    before = load_file(f"{model}/model.safetensors")
    for dtype in ("float32", "bfloat16"):
        after = run(model, rollouts, tmp_path / dtype, "--lr", 1e-6, "--dtype", dtype).weights
        assert all(weight.dtype == torch.float32 for weight in after.values())
        moved = torch.cat([(after[name] != before[name]).flatten() for name in before]).float().mean()
        in_bf16 = torch.cat([(after[name].bfloat16() != before[name].bfloat16()).flatten() for name in before]).float().mean()
        assert moved > 0.95 and in_bf16 < 0.05


def test_ratio_is_one_in_bf16_autocast(model, rollouts, tmp_path):
    """pi_old and pi go through the same forward pass, whose log-softmax is fp32: no false ratio, however coarse the hidden states."""
    found = run(model, rollouts, tmp_path / "out", "--dtype", "bfloat16", "--updates", 2, "--lr", 0, "--smooth-level", "reward")
    for line in found.metrics:  # with lr 0 the second update, whose pi_old is another pass, is on policy, too
        assert line["ratio_max"] == pytest.approx(1, abs=1e-5) and line["clip_low_frac"] == line["clip_high_frac"] == 0
        assert 1e-4 < line["logprob_gap"] < 0.5
    policy = train.Policy(train.load_model(model, torch.float32, "cpu", {}), T, True)
    logp, entropy, _ = train.forward(policy, [row_of([2, 3], [4, 5, 6])], [0], "cpu", torch.bfloat16)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp.bfloat16().float() != logp).any()


def test_the_normaliser_does_not_see_micro_batches(model, tmp_path, monkeypatch):
    """1 x 8 = 4 x 2 = 8 x 1, with prompts repeated and shared: the gradient to 1e-6, weights to a tenth of a step."""
    rows = make_rows(model, [[(1, 1.0), (0, 0.0), (1, 1.0), (0, 0.5)]] * 2, [[6, 2, 4, 1], [3, 5, 6, 6]], cut=())
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"][:1] * 3
    path, calls, original = write(tmp_path / "rows.jsonl", rows), [], train.forward
    monkeypatch.setattr(train, "forward", lambda *args: calls.append(len(args[2])) or original(*args))
    rounds, lr = [], 1e-4
    for share, budgets in ("--no-share-prompts", (72, 18, 1)), ("--share-prompts", (100, 12, 1)):
        for budget in budgets:
            calls.clear()
            rounds.append(run(model, path, tmp_path / f"{share}{budget}", share, "--micro-batch-tokens", budget, "--max-grad-norm", 1e9,
                              "--lr", lr, "--entropy-coef", 0.1))
            assert sum(calls) == 8
            rounds[-1].calls = len(calls)
    assert [one.calls for one in rounds][::3] == [1, 1] and [one.calls for one in rounds][2::3] == [8, 8]
    assert all(1 < one.calls < 8 for one in rounds[1::3])
    for one in rounds[1:]:
        assert distance(one.gradient, rounds[0].gradient) < 1e-6
        same_metrics(one.metrics[0], {key: value for key, value in rounds[0].metrics[0].items() if key not in TIMINGS}, 1e-5)
        apart = torch.cat([(one.weights[name] - rounds[0].weights[name]).abs().flatten() for name in one.weights])
        assert (apart < 1e-6).float().mean() > 0.999 and apart.max() < 0.1 * lr


def test_groups_are_by_id_not_by_position(model, rollouts, tmp_path, fp64):
    rows = make_rows(model)
    random.Random(1).shuffle(rows)
    shuffled = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "shuffled", "--max-grad-norm", 1e9)
    assert distance(shuffled.gradient, run(model, rollouts, tmp_path / "straight", "--max-grad-norm", 1e9).gradient) < 1e-9


def test_dead_groups_train_under_ds_grpo_alone(model, tmp_path):
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[1:3], LENGTHS[1:3], cut=()))
    dead = run(model, path, tmp_path / "grpo", "--method", "grpo")
    assert dead.metrics[0]["grad_norm"] == 0 and dead.metrics[0]["dead_groups"] == 1
    assert run(model, path, tmp_path / "ds", "--method", "ds-grpo").metrics[0]["grad_norm"] > 1e-3


def test_one_pass_a_row_unless_more_is_needed(model, rollouts, tmp_path, monkeypatch):
    """pi_old of the first update is its own forward pass; that of later ones is computed before any step."""
    calls, original = [], train.forward
    monkeypatch.setattr(train, "forward", lambda *args: calls.append(torch.is_grad_enabled()) or original(*args))
    run(model, rollouts, tmp_path / "one")
    assert calls == [True]
    calls.clear()
    run(model, rollouts, tmp_path / "three", "--updates", 3)
    assert calls == [False] * 2 + [True] * 3
    calls.clear()
    run(model, rollouts, tmp_path / "reward", "--smooth-level", "reward")
    assert calls == [True]


@pytest.mark.parametrize("lengths", [[[0, 0, 0, 0]], [[0, 0, 0, 1]], [[1, 1, 1, 1]], [[58, 59, 1, 0]]])
def test_empty_completions_and_the_length_limit(model, lengths, tmp_path):
    rows = make_rows(model, [VERDICTS[0]], lengths, cut=())
    for flags in [], ["--smooth-level", "mean"], ["--smooth-level", "reward", "--updates", 1], ["--no-share-prompts"]:
        found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / f"out{len(os.listdir(tmp_path))}", *flags)
        assert found.metrics[0]["tokens"] == sum(lengths[0])
        assert all(value is None or math.isfinite(value) for value in found.metrics[0].values())
        assert all(torch.isfinite(weight).all() for weight in found.weights.values())


def test_all_truncated(model, tmp_path):
    """A round whose answers were all cut: under `mask` nothing is learned from, under `wrong` those that are not right have reward 0."""
    path = write(tmp_path / "rows.jsonl", make_rows(model, cut={(g, k) for g in range(7) for k in range(4)}))
    masked = run(model, path, tmp_path / "mask", "--truncated", "mask", "--weight-decay", 0)
    assert masked.metrics[0]["tokens"] == masked.metrics[0]["grad_norm"] == 0 and masked.metrics[0]["truncated_frac"] == 1
    assert masked.metrics[0]["pass@1"] > 0.3  # kept in the statistics
    assert masked.metrics[0]["entropy_correct"] is masked.metrics[0]["entropy_wrong"] is None
    assert distance(masked.weights, load_file(f"{model}/model.safetensors")) == 0
    wrong = run(model, path, tmp_path / "wrong")
    right = [reward for group in VERDICTS for correct, reward in group if correct]
    assert wrong.metrics[0]["pass@1"] == pytest.approx(len(right) / 28)  # as evaluate.py counts: by `correct` alone
    assert wrong.metrics[0]["reward"] == pytest.approx(sum(right) / 28) and wrong.metrics[0]["grad_norm"] > 0


def test_a_correct_answer_that_was_cut_stays_correct_and_a_wrong_one_has_no_reward(model, tmp_path):
    """score.py calls a cut completion correct where the whole answer stands in it: pass@1 is evaluate.py's."""
    rows = make_rows(model, [[(1, 1.0), (0, 0.1), (0, 0.0), (0, 0.0)]], [[4, 3, 5, 2]], cut={(0, 0), (0, 1)})
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out").metrics[0]
    assert found["pass@1"] == 0.25 and found["reward"] == 0.25 and found["truncated_frac"] == 0.5


def test_numerics_the_only_correct_answer_was_truncated(model, tmp_path):
    rows = make_rows(model, [[(0, 0.0), (0, 1.0), (0, 0.0), (0, 0.0)]], [LENGTHS[6]], cut={(0, 1)})
    path = write(tmp_path / "rows.jsonl", rows)
    wrong = run(model, path, tmp_path / "wrong", "--method", "grpo").metrics[0]
    assert wrong["dead_groups"] == 1 and wrong["grad_norm"] == 0 and wrong["pass@1"] == 0 and wrong["entropy_correct"] is None
    path = write(tmp_path / "right.jsonl", make_rows(model, [VERDICTS[6]], [LENGTHS[6]], cut={(0, 1)}))
    mask = run(model, path, tmp_path / "mask", "--method", "grpo", "--truncated", "mask").metrics[0]
    assert mask["dead_groups"] == 0 and mask["grad_norm"] > 0 and mask["pass@1"] == 0.25 and mask["tokens"] == 13


@pytest.mark.parametrize("flags", [["--gamma-p", 0, "--gamma-n", 0], ["--gamma-p", 10, "--gamma-n", 10], ["--gamma-p", -1, "--gamma-n", -1],
                                   ["--gamma-p", 10, "--gamma-n", -10, "--smooth-level", "reward", "--lr", 0.1, "--updates", 3],
                                   ["--method", f"{RIVALS}:passk", "--arm", "k=2"], ["--method", f"{RIVALS}:w_reinforce"],
                                   ["--method", f"{RIVALS}:cispo", "--updates", 7, "--lr", 0.1],
                                   ["--method", f"{RIVALS}:oreal", "--updates", 7, "--lr", 0.1],
                                   ["--method", f"{RIVALS}:drpo", "--updates", 7, "--lr", 0.1]])
@pytest.mark.parametrize("kind", ["sampler at -1e4", "policy at -1e4", "one sample", "equal rewards"])
def test_numerics_stay_finite(kind, flags, model, tmp_path):
    rows, folder = make_rows(model), model
    for row in rows:
        if kind == "sampler at -1e4":
            row["logprobs"] = [-1e4] * len(row["logprobs"])
        if kind == "equal rewards":
            row["reward"] = 0.1
    if kind == "one sample":
        rows = [row for row in rows if row["sample"] == 0]
        flags = ["--method", "grpo"] if "k=2" in flags else flags
    if kind == "policy at -1e4":
        folder = str(tmp_path / "sharp")
        shutil.copytree(model, folder)
        weights = load_file(f"{folder}/model.safetensors")
        weights["model.norm.weight"] *= 5000
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    found = run(folder, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", *flags)
    for line in found.metrics:
        assert all(value is None or math.isfinite(value) for value in line.values()), line
    assert all(torch.isfinite(weight).all() for weight in found.weights.values())
    if kind == "policy at -1e4":
        assert found.metrics[0]["nll"] > 3e3
    if kind == "one sample" and ("grpo" in flags or flags[1] == 0):
        assert found.metrics[0]["grad_norm"] == 0


def test_lr_zero_changes_no_bit(model, rollouts, tmp_path):
    before = load_file(f"{model}/model.safetensors")
    after = run(model, rollouts, tmp_path / "out", "--lr", 0, "--updates", 2).weights
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_step_that_is_not_finite_is_refused(model, rollouts, tmp_path, capsys):
    """The second update, from weights of 1e30: exit 3, one line, its rows kept and named, nothing published; the kept rows are a
    rollout file that shows the same again."""
    flags, out = ["--lr", 1e30, "--updates", 2, "--truncated", "mask"], tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            run(model, rollouts, out, *flags)
        os.close(files.claim.lock)
        last = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 3 and f"{out}.refused.jsonl" in last and "step 2" in last and last.startswith("train.py: error: ")
        assert not out.exists() and sorted(os.listdir(tmp_path)) == ["out.partial", "out.partial.lock", "out.refused.jsonl"]
    with open(f"{out}.refused.jsonl", encoding="utf-8") as file:
        refused = [json.loads(line) for line in file]
    assert len(refused) == 12 and {key: refused[0][key] for key in ("finish_reason", "correct", "reward", "prompt_ids", "logprobs")}
    assert {(row["id"], row["sample"]) for row in refused} < {(row["id"], row["sample"]) for row in make_rows(model)}
    again = run(model, f"{out}.refused.jsonl", tmp_path / "again", "--temperature", T)
    assert again.metrics[0]["tokens"] == sum(len(row["completion_ids"]) for row in refused if row["finish_reason"] == "stop") + sum(
        len(row["completion_ids"]) for row in refused if row["finish_reason"] == "length")


def test_checkpointing_gives_the_same_gradient_and_excludes_shared_prompts(model, rollouts, tmp_path, monkeypatch, capsys):
    """The dropout of the model's config stays off, though checkpointing asks for training mode."""
    folder, calls, original = str(tmp_path / "dropout"), [], modeling_qwen2.Qwen2MLP.forward
    shutil.copytree(model, folder)
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump({**config, "attention_dropout": 0.5}, file)
    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward", lambda *args: calls.append(1) or original(*args))
    plain = run(model, rollouts, tmp_path / "plain", "--max-grad-norm", 1e9, "--no-share-prompts")
    count = len(calls)
    saved = run(folder, rollouts, tmp_path / "saved", "--max-grad-norm", 1e9, "--checkpoint-activations")
    assert len(calls) - count == count + 2  # each of the two layers once more, in the backward pass
    assert distance(saved.gradient, plain.gradient) < 1e-6 and saved.metrics[0]["ratio_max"] == 1
    capsys.readouterr()
    for flags in ["--checkpoint-activations", "--share-prompts"], ["--shard", "--share-prompts"]:
        with pytest.raises(SystemExit) as error:
            arguments(model, rollouts, "x", *flags)
        assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


def test_shared_prompts_give_the_same_gradient(model, tmp_path, fp64):
    """Prompts of many lengths side by side in one micro-batch, so that most of them are padded."""
    rows = make_rows(model, VERDICTS, LENGTHS, seed=5)
    for row in rows:
        row["prompt_ids"] = (row["prompt_ids"] * 9)[:1 + 3 * int(row["id"][2:])]
    path = write(tmp_path / "rows.jsonl", rows)
    shared, repeated = (run(model, path, tmp_path / flag[2:], flag, "--max-grad-norm", 1e9, "--entropy-coef", 0.1)
                        for flag in ("--share-prompts", "--no-share-prompts"))
    assert distance(shared.gradient, repeated.gradient) < 1e-9


# ---- The folder and the next round --------------------------------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_an_ordinary_model(tied, rollouts, tmp_path):
    """It reloads to the same logits; fp32; a tied weight once; the original generation_config.json, byte by byte, or none."""
    folder = make_model(tmp_path / "model", 0, tie_word_embeddings=tied)
    found = run(folder, rollouts, tmp_path / "out", "--lr", 0)
    assert ("lm_head.weight" in found.weights) == (not tied)
    assert all(weight.dtype == torch.float32 for weight in [*found.weights.values(), *found.moments.values()])
    again = transformers.AutoModelForCausalLM.from_pretrained(found.folder)
    ids = torch.arange(VOCAB)[None]
    assert again.dtype == torch.float32 and torch.equal(again(ids).logits.double(), load(folder).float()(ids).logits.double())
    assert transformers.AutoTokenizer.from_pretrained(found.folder)("3+4")["input_ids"]
    with open(f"{folder}/generation_config.json", "rb") as a, open(f"{found.folder}/generation_config.json", "rb") as b:
        assert a.read() == b.read()
    assert set(found.moments) == {f"{name}.{key}" for name in dict(again.named_parameters()) for key in ("exp_avg", "exp_avg_sq")}
    assert sorted(os.listdir(found.folder)) == ["config.json", "generation_config.json", "metrics.jsonl", "model.safetensors",
                                                "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]
    os.remove(f"{folder}/generation_config.json")
    assert not os.path.exists(run(folder, rollouts, tmp_path / "none").folder + "/generation_config.json")


def test_the_next_round_goes_on(model, rollouts, tmp_path, fp64, capsys):
    """Two rounds through files are two rounds in one process: weights, moments, Adam's step, warm-up and metrics are carried on."""
    rows = make_rows(model, seed=9)
    flags, second = ["--lr", 0.01, "--warmup-steps", 4, "--updates", 2], write(tmp_path / "rows.jsonl", rows)
    one = run(model, rollouts, tmp_path / "one", *flags)
    two = run(one.folder, second, tmp_path / "two", *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", *flags), make_rows(model))
    oracle.round(arguments(model, second, "x", *flags), rows)
    assert distance(two.weights, oracle.weights) < 1e-9 and distance(two.moments, oracle.moments) < 1e-9
    assert two.step == 4 and [line["step"] for line in two.metrics] == [1, 2, 3, 4] and two.metrics[:2] == one.metrics
    for found, expected in zip(two.metrics, oracle.metrics, strict=True):
        same_metrics(found, expected)

    bare = tmp_path / "bare"
    shutil.copytree(one.folder, bare)
    for name in "optimizer.safetensors", "trainer_state.json", "metrics.jsonl":
        os.remove(bare / name)
    reset, fresh = run(one.folder, second, tmp_path / "reset", "--reset-optimizer"), run(str(bare), second, tmp_path / "fresh")
    assert reset.step == 1 and len(reset.metrics) == 1 and distance(reset.weights, fresh.weights) == 0
    # Moments that are not read are no input, and are not hashed; those of a reference are not.
    kl = ["--kl-coef", 0.1, "--ref-model", one.folder]
    run(model, rollouts, tmp_path / "kl", *kl)
    os.truncate(f"{one.folder}/optimizer.safetensors", 9)
    train.main(arguments(model, rollouts, tmp_path / "kl", *kl))
    assert "complete, left alone" in capsys.readouterr().err
    train.main(arguments(one.folder, second, tmp_path / "reset", "--reset-optimizer"))
    assert "complete, left alone" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        train.main(arguments(one.folder, second, tmp_path / "two", *flags))
    assert "made with other inputs;" in capsys.readouterr().err


def test_the_same_command_twice_gives_the_same_bits(model, rollouts, tmp_path):
    one, two = (run(model, rollouts, tmp_path / name, "--updates", 3, "--lr", 0.01, "--entropy-coef", 0.1) for name in "ab")
    for name in ("model.safetensors", "optimizer.safetensors"):
        with open(f"{one.folder}/{name}", "rb") as a, open(f"{two.folder}/{name}", "rb") as b:
            assert a.read() == b.read()
    for a, b in zip(one.metrics, two.metrics, strict=True):
        assert {**a, **dict.fromkeys(TIMINGS)} == {**b, **dict.fromkeys(TIMINGS)}
    other = run(model, rollouts, tmp_path / "seed", "--updates", 3, "--lr", 0.01, "--entropy-coef", 0.1, "--seed", 1)
    assert distance(other.weights, one.weights) > 1e-4


def test_a_finished_round_is_left_alone_and_an_unfinished_one_is_done_again(model, rollouts, tmp_path, capsys):
    out = tmp_path / "out"
    one = run(model, rollouts, tmp_path / "one")
    os.makedirs(f"{out}.partial/checkpoints")  # what a killed run may leave
    for name in "model.safetensors", "checkpoints/x":
        with open(f"{out}.partial/{name}", "w", encoding="utf-8") as file:
            file.write("torn")
    two = run(model, rollouts, out)
    assert distance(two.weights, one.weights) == 0 and not os.path.exists(f"{out}.partial/checkpoints")
    before = os.stat(out / "model.safetensors").st_mtime_ns
    train.main(arguments(model, rollouts, out))
    assert "complete, left alone" in capsys.readouterr().err and os.stat(out / "model.safetensors").st_mtime_ns == before
    with open(f"{out}.meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    assert meta["flags"]["gamma_p"] == 0.01 and meta["sampling"]["temperature"] == T and meta["dtype"] == "float32" and meta["device"] == "cpu"
    assert meta["attention"] == "sdpa" and meta["backend"] == "torch"


def test_policy_and_reference_of_the_hub_are_each_of_their_own_commit(model, reference, rollouts, tmp_path, monkeypatch):
    """Both are in the Hub's cache, and there is no network: the round is the one of the two folders."""
    for folder, name, commit in (model, "policy", "1" * 40), (reference, "reference", "2" * 40):
        cached = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--method", "grpo", "--kl-coef", 0.5, "--updates", 2, "--lr", 0.01]
    folders = run(model, rollouts, tmp_path / "folders", *flags, "--ref-model", reference)
    hub = run("owner/policy", rollouts, tmp_path / "ids", *flags, "--ref-model", "owner/reference")
    assert distance(hub.weights, folders.weights) == 0
    with open(f"{hub.folder}.meta.json", encoding="utf-8") as file:
        assert list(json.load(file)["inputs"].values())[1:] == [f"owner/policy@{'1' * 40}", f"owner/reference@{'2' * 40}"]


def test_rank_0_alone_hashes_the_inputs(model, rollouts, tmp_path, monkeypatch):
    """Another rank reads its rows and goes on to the meeting of the ranks without a digest of its own."""
    class Met(Exception):
        pass

    def meet(*args):
        raise Met

    os.mkdir(tmp_path / "out.partial")  # rank 0 has claimed it
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "start_ranks", meet)
    for name in "describe", "claim_empty":
        monkeypatch.setattr(train, name, None)
    with pytest.raises(Met):
        train.train(arguments(model, rollouts, tmp_path / "out"))


# ---- The sampling temperature -------------------------------------------------------------------------------------------
def test_the_temperature_is_the_samplers(model, rollouts, tmp_path):
    """From the meta, or from --temperature where there is none; log-probs and entropies are of logits / T."""
    rows = make_rows(model)
    told = run(model, write(tmp_path / "bare.jsonl", rows, None), tmp_path / "told", "--temperature", T)
    read = run(model, rollouts, tmp_path / "read")
    assert distance(told.weights, read.weights) == 0 and read.metrics[0]["logprob_gap"] < 1.1e-2
    hot = run(model, write(tmp_path / "bare.jsonl", rows, None), tmp_path / "hot", "--temperature", 1)
    assert hot.metrics[0]["entropy"] > read.metrics[0]["entropy"] and hot.metrics[0]["logprob_gap"] > 0.1
    same = run(model, rollouts, tmp_path / "same", "--temperature", T)
    assert distance(same.weights, read.weights) == 0
    cut = write(tmp_path / "cut.jsonl", rows, {"temperature": T, "top_p": 0.9, "top_k": 0, "repetition_penalty": 1.0})
    assert distance(run(model, cut, tmp_path / "allowed", "--allow-off-policy").weights, read.weights) == 0


# ---- Bad input: one line, exit 2 ----------------------------------------------------------------------------------------
def refused(capsys, model, rollouts, out, *flags, code=2):
    """The one line on stderr with which train.py ends; nothing was published."""
    handler = signal.getsignal(signal.SIGTERM)
    capsys.readouterr()
    try:
        with pytest.raises(SystemExit) as error:
            train.run(train.main, arguments(model, rollouts, out, *flags))
    finally:
        signal.signal(signal.SIGTERM, handler)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == code and len(lines) == 1 and lines[0].startswith("train.py: error: "), lines
    assert not os.path.exists(f"{out}/config.json")
    return lines[0]


SETTINGS = [
    (None, [], "give --temperature"),
    ({"temperature": 0}, [], "greedy"),
    ({"temperature": T, "top_p": 0.9}, [], "top_p 0.9"),
    ({"temperature": T, "top_k": 20}, [], "top_k 20"),
    ({"temperature": T, "repetition_penalty": 1.05}, [], "repetition_penalty 1.05"),
    ({"temperature": T}, ["--temperature", "0.8"], "sampled at temperature 0.7"),
    ({"temperature": "warm"}, [], "not a valid meta"),
    ({"temperature": True}, [], "not a valid meta"),
    ({"temperature": -1}, [], "not a valid meta"),
    ({"temperature": math.nan}, [], "not a valid meta"),
    ({"top_p": 1.0}, [], "not a valid meta"),
    ([1], [], "not a valid meta"),
]


@pytest.mark.parametrize("sampling, flags, message", SETTINGS)
def test_rollouts_of_another_distribution_are_refused(sampling, flags, message, model, tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[:1], LENGTHS[:1]), sampling)
    assert message in refused(capsys, model, path, tmp_path / "out", *flags)


ROWS = [  # what is wrong with the third of eight rows, and what the line says beside file and number
    *[({field: None}, f"missing field '{field}'") for field in ("id", "sample", "prompt_ids", "completion_ids", "logprobs", "finish_reason")],
    ({"correct": None}, "run score.py first"), ({"reward": None}, "run score.py first"),
    ({"id": 7}, "'id'"), ({"sample": "2"}, "'sample'"), ({"sample": True}, "'sample'"), ({"sample": 1.0}, "'sample'"),
    ({"correct": 1}, "'correct'"), ({"correct": "true"}, "'correct'"), ({"reward": "1"}, "'reward'"), ({"reward": True}, "'reward'"),
    ({"reward": 10 ** 400}, "'reward'"), ({"reward": 1e300}, "'reward'"), ({"prompt_ids": []}, "'prompt_ids'"), ({"prompt_ids": "34"}, "'prompt_ids'"),
    ({"completion_ids": [3, -1]}, "'completion_ids'"), ({"completion_ids": [3.0]}, "'completion_ids'"), ({"completion_ids": [2 ** 31]}, "'completion_ids'"),
    ({"completion_ids": {"a": 1}}, "'completion_ids'"), ({"logprobs": ["x"]}, "'logprobs'"), ({"logprobs": [10 ** 400]}, "'logprobs'"),
    ({"logprobs": [-1.0]}, "logprobs for"), ({"finish_reason": "eos"}, "'finish_reason'"), ({"sample": 1}, "duplicate sample 1"),
    ({"prompt_ids": [3, 3, 3, 3, 3, 3]}, "prompt_ids differ"), ({"completion_ids": [VOCAB], "logprobs": [-1.0]}, "beyond the vocabulary of 13"),
    ({"finish_reason": ["stop"]}, "'finish_reason'"), ({"logprobs": [[-1.0]]}, "'logprobs'"), ({"id": "another"}, "samples"),
]


@pytest.mark.parametrize("change, message", ROWS)
def test_wrong_rows_are_named(change, message, model, tmp_path, capsys):
    rows = make_rows(model, VERDICTS[:2], LENGTHS[:2])
    rows[2] = {key: value for key, value in {**rows[2], **change}.items() if value is not None}
    line = refused(capsys, model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert message in line and f"{tmp_path}/rows.jsonl:" in line
    assert "rows.jsonl:3: " in line or "samples" in message


def test_wrong_files_and_flags(model, rollouts, tmp_path, capsys):
    def copy(name, **changes):
        shutil.copytree(model, tmp_path / name)
        for file, change in changes.items():
            path = tmp_path / name / file.replace("__", ".")
            os.remove(path) if change is None else path.write_bytes(change)
        return str(tmp_path / name)

    def text(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    out, number = tmp_path / "out", itertools.count()
    with open(rollouts, "rb") as file:
        lines = file.readlines()
    with open(f"{model}/model.safetensors", "rb") as file:
        weights = file.read()
    broken = load_file(f"{model}/model.safetensors")
    broken["model.norm.weight"][3] = math.nan
    nan, lacking, small = copy("nan"), copy("lacking"), make_model(tmp_path / "small", 0, vocab_size=9)
    save_file(broken, f"{nan}/model.safetensors", {"format": "pt"})
    del broken["model.norm.weight"]
    save_file(broken, f"{lacking}/model.safetensors", {"format": "pt"})
    for folder, path, flags, message in [
            (model, str(tmp_path / "absent.jsonl"), ["--temperature", 1], "No such file"),
            (model, text("empty", b""), ["--temperature", 1], "no rows"),
            (model, text("torn", b"".join(lines)[:-30]), ["--temperature", 1], ":28: not a valid JSON row"),
            (model, text("ragged", b"".join(lines[:-1])), ["--temperature", 1], "a group is not whole"),
            (model, rollouts, ["--updates", 8], "7 groups cannot be dealt"),
            (str(tmp_path / "absent"), rollouts, [], "no such model folder"),
            (str(tmp_path), rollouts, [], "no config.json"),
            (copy("pickle", model__safetensors=None), rollouts, [], "no *.safetensors"),
            (copy("torn-weights", model__safetensors=weights[:-100]), rollouts, [], "cannot be loaded"),
            (copy("no-weights", model__safetensors=b""), rollouts, [], "cannot be loaded"),
            (copy("no-tokenizer", tokenizer__json=None, tokenizer_config__json=None), rollouts, [], "tokenizer without a vocabulary"),
            (copy("no-json", config__json=b"{"), rollouts, [], "cannot be loaded"),
            (nan, rollouts, [], "model.norm.weight is not finite"),
            (lacking, rollouts, [], "model.norm.weight"),
            (copy("no-moments", trainer_state__json=b'{"step": 3}'), rollouts, [], "--reset-optimizer"),
            (copy("bad-moments", trainer_state__json=b'{"step": 3}', optimizer__safetensors=b"x" * 100), rollouts, [], "--reset-optimizer"),
            (copy("other-moments", trainer_state__json=b'{"step": 3}', optimizer__safetensors=weights), rollouts, [], "--reset-optimizer"),
            (copy("no-step", trainer_state__json=b"{}"), rollouts, [], "trainer_state.json: not a valid state"),
            (copy("bad-step", trainer_state__json=b'{"step": "x"}', optimizer__safetensors=weights), rollouts, [], "not a valid state"),
            (model, rollouts, ["--kl-coef", 0.1, "--ref-model", str(tmp_path / "absent")], "no such model folder"),
            (model, rollouts, ["--kl-coef", 0.1, "--ref-model", small], "beyond the vocabulary of 9"),
            *([] if torch.cuda.is_available() else [(model, rollouts, ["--device", "cuda"], "no CUDA device")])]:
        assert message in refused(capsys, folder, path, f"{out}{next(number)}", *flags), message
    run(model, rollouts, out)
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(arguments(model, rollouts, out, "--gamma-p", 0.5))
    assert "made with other gamma_p" in capsys.readouterr().err
    for flags in (["--gamma-p", "nan"], ["--method", "grpo", "--gamma-p", 1], ["--method", "grpo", "--smooth-level", "token"], ["--lr", -1],
                  ["--updates", 0], ["--temperature", 0], ["--kl-coef", 1], ["--ref-model", "x"], ["--max-grad-norm", 0], ["--clip-low", -1],
                  ["--lr", "inf"], ["--arm", "k=2"], ["--method", f"{RIVALS}:passk", "--arm", "k"], ["--micro-batch-tokens", 0], ["--unknown"]):
        with pytest.raises(SystemExit) as error:
            arguments(model, rollouts, out, *flags)
        assert error.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1, flags


JSON = st.recursive(st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats(allow_nan=False, allow_infinity=False)
                    | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
                    max_leaves=4)


def test_rows_of_an_id_are_a_group_wherever_they_stand(model, tmp_path):
    """Also in two files behind each other, as rehearsed ones are: a prompt counts once for its own rows alone."""
    rows = make_rows(model)
    mixed = sorted(rows, key=lambda row: row["sample"])
    assert [row["id"] for row in rows] != [row["id"] for row in mixed]
    groups, _ = load_rollouts(write(tmp_path / "mixed.jsonl", mixed))
    assert [[row.group for row in group] for group in groups] == [[i] * len(group) for i, group in enumerate(groups)]
    right = [row for row in mixed if row["correct"] and row["completion_ids"]]
    answers = load_answers(write(tmp_path / "right.jsonl", right), 0.7)
    assert [{row.group for row in group} for group in answers] == [{i} for i in range(len(answers))] and len(answers) > 1


@settings(max_examples=150, deadline=None)
@given(st.lists(st.fixed_dictionaries({}, optional={
    "id": st.sampled_from("ab") | JSON, "sample": st.integers(0, 2) | JSON, "prompt_ids": st.just([2, 3]) | JSON, "completion_ids": st.just([4]) | JSON,
    "logprobs": st.just([-1.0]) | JSON, "finish_reason": st.sampled_from(["stop", "length"]) | JSON, "correct": st.booleans() | JSON,
    "reward": st.floats(0, 1) | JSON}), min_size=1, max_size=4), st.sampled_from(["wrong", "mask"]))
def test_fuzz_load_rollouts(tmp_path_factory, rows, truncated):
    """Whatever the rows hold, they are groups of n that fit together, or one line and exit 2."""
    path = tmp_path_factory.getbasetemp() / "fuzz.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with contextlib.redirect_stderr(None):
        try:
            groups, n = load_rollouts(str(path), truncated)
        except SystemExit as error:
            assert error.code == 2
            return
    assert sum(map(len, groups)) == len(rows) and all(len(group) == n for group in groups)
    for row in sum(groups, []):
        assert len(row.completion) == len(row.logprobs) and np.isfinite(row.logprobs).all()
        assert not (row.truncated and truncated == "wrong" and not row.correct and row.reward)


# ---- Objectives from files ----------------------------------------------------------------------------------------------
OWN = '''def concise(batch, penalty=0.1):
    """Dr. GRPO's advantage, of r - penalty * (length / the longest of the group)."""
    longest = batch.length.max(1, keepdim=True).values.clamp(min=1)
    reward = batch.reward - penalty * batch.length / longest
    advantage = reward - reward.mean(1, keepdim=True)
    return advantage.flatten()[batch.row]
'''


def sampled_means(group):
    """Mean log-prob of each rollout, as the sampler wrote it into the rows."""
    return [mean_of(row["logprobs"]) if row["logprobs"] else 0.0 for row in group]


def gradient_of(model, rows, advantages_of, loss_of):
    """The gradient of one update of an objective in plain loops, as Round.gradient holds it."""
    policy, groups, total = load(model), {}, 0
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    for group in groups.values():
        tokens = [tokens_of(policy, row["prompt_ids"], row["completion_ids"]) for row in group]
        old = [[logp.item() for logp, _ in of_row] for of_row in tokens]
        for i, advantages_of_row in enumerate(advantages_of(group, old)):
            for t, adv in enumerate(advantages_of_row):
                total = total + loss_of(tokens[i][t][0], old[i][t], adv)
    (total / sum(len(row["completion_ids"]) for row in rows)).backward()
    return {f"{name}.exp_avg": weight.grad for name, weight in policy.named_parameters()}


def file_of(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_your_own_objective_of_eight_lines(model, tmp_path, fp64, capsys):
    """As README.md shows it: a file, a function, a setting; the gradient is that of its formula in loops."""
    with open("README.md", encoding="utf-8") as file:
        assert OWN in file.read()
    rows = make_rows(model, cut=())
    path, mine = write(tmp_path / "rows.jsonl", rows), file_of(tmp_path, OWN)
    found = run(model, path, tmp_path / "out", "--method", f"{mine}:concise", "--arm", "penalty=0.5", "--max-grad-norm", 1e9)

    def advantages_of(group, old):
        longest = max(1, *(len(row["completion_ids"]) for row in group))
        rewards = [row["reward"] - 0.5 * len(row["completion_ids"]) / longest for row in group]
        return [[reward - mean_of(rewards)] * len(of_row) for reward, of_row in zip(rewards, old)]

    assert distance(found.gradient, gradient_of(model, rows, advantages_of, lambda logp, old, adv: -(logp - old).exp() * adv)) < 1e-9
    with open(tmp_path / "out.meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    assert meta["flags"]["arm"] == {"penalty": 0.5} and list(meta["inputs"])[-1] == mine
    # Its settings and the file itself belong to the command.
    for flags, differs in (["--arm", "penalty=0.25"], "arm"), ([], "arm"):
        with pytest.raises(SystemExit):
            train.main(arguments(model, path, tmp_path / "out", "--method", f"{mine}:concise", "--max-grad-norm", 1e9, *flags))
        assert f"made with other {differs};" in capsys.readouterr().err
    file_of(tmp_path, OWN.replace("0.1", "0.12"))
    with pytest.raises(SystemExit):
        train.main(arguments(model, path, tmp_path / "out", "--method", f"{mine}:concise", "--arm", "penalty=0.5", "--max-grad-norm", 1e9))
    assert "made with other inputs" in capsys.readouterr().err


def test_an_objective_sees_means_of_whole_groups_and_row_fields_and_may_bring_a_loss(model, tmp_path, fp64, monkeypatch):
    """mean_logp of all rollouts, whatever the micro-batches; fields of the rows; a loss of one's own, with the clip range it names."""
    mine = file_of(tmp_path, """
import torch

def mine(batch, scale, label):
    assert label == "x" and batch.id[1][0] == "p/1"
    bonus = torch.tensor([[len(text or "") for text in group] for group in batch.solution])
    score = bonus + scale * (batch.mean_logp - batch.mean_logp.mean(1, keepdim=True))
    return score.flatten()[batch.row].to(batch.reward.dtype)

def mine_loss(logp, batch, advantage, clip_high, scale):
    return -(logp - batch.old_logp).clamp(max=clip_high) * advantage * scale

mine.fields = ("solution", "id")
""")
    rows = make_rows(model, cut=())
    for i, row in enumerate(rows):
        row["solution"] = "ab"[:i % 3] or None
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--method", f"{mine}:mine", "--arm", "scale=2", "--arm", "label=x",
                "--max-grad-norm", 1e9, "--micro-batch-tokens", 25)

    def advantages_of(group, old):
        means = sampled_means(group)
        return [[len(row["solution"] or "") + 2 * (mean - mean_of(means))] * len(of_row) for row, mean, of_row in zip(group, means, old)]

    assert distance(found.gradient, gradient_of(model, rows, advantages_of, lambda logp, old, adv: -(logp - old) * adv * 2)) < 1e-9
    assert found.metrics[0]["clip_high_frac"] == 0


WRONG_ARMS = [  # the file, flags, and what the line says
    ("from train import grpo as mine\ndef mine_loss(logp, batch, advantage, clip_high): return logp",
     ["--clip-low", 0.1], "mine_loss does not take it"),
    ("def other(batch): ...", [], "no function mine in this file"),
    ("def mine(batch, k): ...", ["--arm", "j=1"], "has no setting 'j'"),
    ("def mine(batch): return batch.old_logp\nmine.fields = ('solution',)", [],
     "rows.jsonl:1: missing field 'solution'"),
]


@pytest.mark.parametrize("text, flags, message", WRONG_ARMS)
def test_a_wrong_objective_is_refused_before_a_model_is_loaded(
        text, flags, message, model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[:1], LENGTHS[:1]))
    method = f"{file_of(tmp_path, text)}:mine"
    assert message in refused(capsys, model, path, tmp_path / "out", "--method", method, *flags)


def test_a_mistake_inside_an_objective_is_a_traceback_of_the_users_own_code(model, tmp_path):
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[:1], LENGTHS[:1]))
    for number, (text, kind, message) in enumerate([
            ("def mine(batch): return batch.solution", AttributeError, "no 'solution'"),
            ("def mine(batch): return batch.reward", ValueError, "must return a value a token"),
            ("def mine(batch): return batch.old_logp.sum()", ValueError, "a value a token"),
            ("import absent_module", ModuleNotFoundError, "absent_module")]):
        mine = file_of(tmp_path, text, f"mine{number}.py")
        flags = ["--method", f"{mine}:mine"]
        with pytest.raises(kind, match=message):
            train.main(arguments(model, path, tmp_path / f"out{number}", *flags))


@pytest.mark.parametrize("flags, message", [
    (["--method", "ppo"], "neither ds-grpo nor grpo nor FILE.py:NAME"), (["--method", "absent.py:x"], "no such file absent.py"),
    (["--method", "absent.py"], "neither"), (["--method", f"{RIVALS}:a-b"], "neither"), (["--method", f"{RIVALS}:passk", "--arm", "k"], "KEY=VALUE"),
    (["--method", f"{RIVALS}:passk", "--arm", "k=1", "--arm", "k=2"], "given twice"), (["--method", f"{RIVALS}:passk", "--arm", "k=nan"], "finite"),
    (["--method", f"{RIVALS}:passk", "--adv-norm", "std"], "--adv-norm belongs to"), (["--smooth-level", "reward", "--adv-norm", "std"], "--adv-norm"),
    (["--seed", -1], "--seed must be at least 0"), (["--rehearse", "x"], "go together"), (["--rehearse-coef", 0.1], "go together"), (["--rehearse-n", 3], "belong to --rehearse"), (["--rehearse-weight", "samples"], "belong to --rehearse"), (["--tis-cap", 0], "above 0"),
    (["--rehearse", "x", "--rehearse-coef", -1], "above 0"), (["--gamma-n", "-1e-3", "--method", "grpo"], "--gamma-n belongs"),
    (["--method", f"{RIVALS}:passk", "--gamma-p", 1], "--gamma-p belongs to --method ds-grpo"), (["--arm", "k=1"], "--arm belongs to --method FILE.py:NAME")])
def test_wrong_flags_of_an_objective(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        arguments("m", "r", "o", *flags)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


# ---- Rehearsal ------------------------------------------------------------------------------------------------------------
def rehearsal(model, tmp_path):
    """A scored file of the base: groups of several sizes; one right answer a problem, some of them twice; and the answers' ids."""
    rows, answers = make_rows(model, [VERDICTS[1], VERDICTS[4], VERDICTS[6], VERDICTS[0]], [LENGTHS[1], LENGTHS[4], LENGTHS[6], LENGTHS[0]], seed=7), []
    rows = [row for row in rows if (row["id"], row["sample"]) != ("p/3", 2)]
    rows.append({**rows[7], "sample": 9})
    for row in rows:
        if row["correct"] and row["completion_ids"] and row["sample"] < 9:
            answers.append((row["prompt_ids"], row["completion_ids"]))
    return write(tmp_path / "base.jsonl", rows), answers


def test_rehearsal_is_the_mean_log_prob_of_right_answers_of_the_base(model, rollouts, tmp_path, fp64):
    """loss -= c mean log pi over the drawn tokens: here every problem has one distinct answer, drawn twice; loss, gradient, metric."""
    path, answers = rehearsal(model, tmp_path)
    assert len(answers) == 3
    flags = ["--method", "grpo", "--max-grad-norm", 1e9, "--micro-batch-tokens", 30]
    plain = run(model, rollouts, tmp_path / "plain", *flags)
    found = run(model, rollouts, tmp_path / "out", *flags, "--rehearse", path, "--rehearse-coef", 0.5, "--rehearse-n", 6)
    policy, total, count = load(model), 0, 0
    for prompt, completion in answers:
        for logp, _ in tokens_of(policy, prompt, completion):
            total, count = total - logp, count + 1
    (0.5 * total / count).backward()
    expected = {f"{name}.exp_avg": weight.grad + plain.gradient[f"{name}.exp_avg"] for name, weight in policy.named_parameters()}
    assert distance(found.gradient, expected) < 1e-9
    assert found.metrics[0]["rehearse_nll"] == pytest.approx(total.item() / count)
    assert found.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"] + 0.5 * total.item() / count)
    same_metrics({key: value for key, value in found.metrics[0].items() if key != "rehearse_nll"},
                 {**{key: value for key, value in plain.metrics[0].items() if key not in TIMINGS},
                  **{key: found.metrics[0][key] for key in ("loss", "grad_norm")}})


def test_rehearsal_draws_each_right_rollout_or_each_distinct_answer(model, tmp_path):
    """samples: an answer that was sampled three times counts three times; distinct: once."""
    rows = make_rows(model, [[(1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)]], [[3, 2, 2, 2]], cut=())
    for row in rows[2:]:
        row["completion_ids"] = rows[1]["completion_ids"]
    path = write(tmp_path / "base.jsonl", rows)
    for weight, count in ("samples", 4), ("distinct", 2):
        (answers,) = load_answers(path, T, weight)
        assert len(answers) == count
        drawn = draw_answers([answers], 4000, (0, 0))
        share = mean_of([len(row.completion) == 3 for row in drawn])
        assert share == pytest.approx(1 / count, abs=0.03)


def test_the_counter_of_steps_survives_a_reset(model, rollouts, tmp_path):
    """--reset-optimizer: moments and warm-up begin anew; the step, which seeds the deal and the
    draw of what is rehearsed, and metrics.jsonl go on."""
    first = run(model, rollouts, tmp_path / "1", "--updates", 3)
    flags = ["--updates", 2, "--warmup-steps", 4, "--lr", 1e-3]
    went_on = run(first.folder, rollouts, tmp_path / "2", *flags)
    reset = run(first.folder, rollouts, tmp_path / "r", *flags, "--reset-optimizer")
    assert went_on.step == reset.step == 5
    assert [line["step"] for line in reset.metrics] == [1, 2, 3, 4, 5]
    assert [line["lr"] for line in reset.metrics[3:]] == pytest.approx([0.25e-3, 0.5e-3])
    assert [line["lr"] for line in went_on.metrics[3:]] == pytest.approx([1e-3, 1e-3])
    assert reset.metrics[3]["pass@1"] == went_on.metrics[3]["pass@1"]  # the same groups
    third = run(reset.folder, rollouts, tmp_path / "3", *flags)
    assert third.step == 7
    assert [line["lr"] for line in third.metrics[5:]] == pytest.approx([0.75e-3, 1e-3])


def test_the_deal_depends_on_the_seed_and_the_steps_done():
    deals = [train.deal(8, 2, 4, seed, step) for seed, step in ((0, 0), (0, 4), (1, 0), (0, 0))]
    assert deals[0] == deals[3] and deals[1] != deals[0] != deals[2] and deals[1] != deals[2]
    for updates in deals:
        assert sorted(sum(updates, [])) == list(range(16)) and {len(rows) for rows in updates} == {4}


@pytest.mark.parametrize("level, power", [("sum", 1), ("mean", 0), ("share", -1)])
def test_levels_differ_by_a_power_of_the_length(level, power):
    """Where all completions have L tokens: gamma at sum = gamma L at mean = gamma L^2 at share."""
    length, logp = 5, [-0.1, -2.0, -0.3, -1.0, -0.7, -0.2, -0.4, -3.0, -0.1, -0.5]
    verdicts = [1.0, 0.0], [True, False], [length, length]
    expected = advantage(*verdicts, logp=logp, method=train.ds_grpo, smooth_level="mean",
                         gamma_p=0.3, gamma_n=0.2)
    scale = length ** -power
    found = advantage(*verdicts, logp=logp, method=train.ds_grpo, smooth_level=level,
                      gamma_p=0.3 * scale, gamma_n=0.2 * scale)
    assert found == pytest.approx(expected)


def test_lowered_log_probs_scale_the_gradient_up_to_the_cap(model, tmp_path, fp64):
    """--tis-cap: an engine whose log-probs lie d below the trainer's: min(e^d, C) times."""
    rows = make_rows(model)
    for row in rows:
        row["logprobs"] = row["logprobs"] and [
            logp.item() for logp, _ in
            tokens_of(load(model), row["prompt_ids"], row["completion_ids"])]
    flags = ["--method", "grpo", "--max-grad-norm", 1e9]
    plain = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "plain", *flags)
    assert "tis_mean" not in plain.metrics[0]
    for d, capped in (0.5, 0), (1.0, 1):
        low = [{**row, "logprobs": [logp - d for logp in row["logprobs"]]} for row in rows]
        found = run(model, write(tmp_path / f"{d}.jsonl", low), tmp_path / f"tis-{d}", *flags,
                    "--tis-cap", 2)
        factor = min(math.exp(d), 2)
        assert found.metrics[0]["tis_mean"] == pytest.approx(factor)
        assert found.metrics[0]["tis_capped_frac"] == capped
        scaled = {name: factor * gradient for name, gradient in plain.gradient.items()}
        assert distance(found.gradient, scaled) < 1e-6


def test_problems_are_drawn_equally_often_and_anew_at_every_step():
    problems = [[row_of([2], [3 + i], group=g) for i in range(g + 1)] for g in range(5)]
    drawn = draw_answers(problems, 1003, (0, 1))
    counts = [sum(row.group == g for row in drawn) for g in range(5)]
    assert len(drawn) == 1003 and max(counts) - min(counts) <= 1
    of_last = [sum(row is one for row in drawn) for one in problems[4]]
    assert sum(of_last) == counts[4] and min(of_last) > 20
    again = [[row.group for row in draw_answers(problems, 12, seed)] for seed in ((0, 1), (0, 1), (0, 2), (1, 1))]
    assert again[0] == again[1] and again[2] != again[0] != again[3] and draw_answers([], 5, (0, 0)) == []


def test_what_cannot_be_rehearsed_is_refused(model, rollouts, tmp_path, capsys):
    path, _ = rehearsal(model, tmp_path)
    flags = ["--rehearse-coef", 0.1, "--rehearse"]
    hot = write(tmp_path / "hot.jsonl", make_rows(model), {"temperature": 1.0})
    assert "sampled at temperature 1.0, the rollouts at 0.7" in refused(capsys, model, rollouts, tmp_path / "a", *flags, hot)
    cut = write(tmp_path / "cut.jsonl", make_rows(model), {"temperature": T, "top_p": 0.9})
    assert "cut.jsonl: sampled with top_p 0.9" in refused(capsys, model, rollouts, tmp_path / "p", *flags, cut)
    assert run(model, rollouts, tmp_path / "allowed", *flags, cut, "--allow-off-policy").metrics[0]["rehearse_nll"] > 0
    torn = write(tmp_path / "torn.jsonl", make_rows(model), "x")
    assert "torn.jsonl.meta.json: not a valid meta (temperature None)" in refused(capsys, model, rollouts, tmp_path / "t", *flags, torn)
    wrong = write(tmp_path / "wrong.jsonl", make_rows(model, VERDICTS[1:2], LENGTHS[1:2]))
    assert "no correct rollout to rehearse" in refused(capsys, model, rollouts, tmp_path / "b", *flags, wrong)
    rows = make_rows(model, VERDICTS[2:3], LENGTHS[2:3])
    rows[1]["prompt_ids"] = [5, 5, 5, 5, 5, 5]
    assert "differ.jsonl:2: prompt_ids differ" in refused(capsys, model, rollouts, tmp_path / "c", *flags, write(tmp_path / "differ.jsonl", rows))


def test_a_sequence_beyond_the_models_positions_is_refused(model, tmp_path, capsys):
    rows = make_rows(model, VERDICTS[:1], LENGTHS[:1])
    rows[2].update(completion_ids=[3] * 70, logprobs=[-1.0] * 70)
    line = refused(capsys, model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    assert "rows.jsonl:3: " in line and "exceed the 64 positions" in line


def test_two_threads_give_the_same_gradient_every_time(tiny_model):
    """The gradients of a prompt that is repeated for its rows are added in one order, whatever thread is the first."""
    rng = random.Random(0)
    policy = train.Policy(train.load_model(tiny_model, torch.float32, "cpu", {}), 1.0, True)
    prompts, completions = [], []
    for _ in range(14):
        prompt = [rng.randrange(3, 20) for _ in range(rng.randint(14, 20))]
        for _ in range(rng.randint(9, 17)):
            prompts.append(prompt)
            completions.append(np.array([rng.randrange(3, 20) for _ in range(rng.randint(6, 20))]))

    def gradient():
        policy.zero_grad()
        logp, _ = policy(prompts, completions)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        return [weight.grad.clone() for weight in policy.parameters()]

    torch.set_num_threads(2)
    try:
        first = gradient()
        assert all(torch.equal(a, b) for _ in range(4) for a, b in zip(first, gradient(), strict=True))
    finally:
        torch.set_num_threads(1)


# ---- Rivals -----------------------------------------------------------------------------------------------------------------
def beta_gain(right, n, k):
    """E[k (1 - p)^(k - 1)] with p ~ Beta(right + 1, n - right + 1), by Simpson's rule."""
    def density(p):
        return p ** right * (1 - p) ** (n - right)
    points = [i / 2000 for i in range(2001)]
    weights = [1 if i in (0, 2000) else 4 if i % 2 else 2 for i in range(2001)]
    above = math.fsum(w * density(p) * k * (1 - p) ** (k - 1) for w, p in zip(weights, points))
    return above / math.fsum(w * density(p) for w, p in zip(weights, points))


def test_neighbours_by_loops(model, tmp_path, fp64):
    """The gradient of one update of each is that of its formula in loops."""
    rows = make_rows(model, cut=())
    path = write(tmp_path / "rows.jsonl", rows)
    tokens = {kind: sum(len(row["completion_ids"]) for row in rows if row["correct"] == kind) for kind in (True, False)}

    def spread(scores, old):
        return [[score] * len(of_row) for score, of_row in zip(scores, old)]

    def normed(rewards, old):
        return spread([(r - mean_of(rewards)) / (std_of(rewards) + 1e-6) for r in rewards], old)

    def focal(group, old):
        weight = (1 - mean_of([float(row["correct"]) for row in group])) ** 2
        return [[weight * adv for adv in of_row] for of_row in normed([row["reward"] for row in group], old)]

    def unlikeliness(group, old):
        means = sampled_means(group)
        ranks = [sorted(means).index(mean) for mean in means]  # 0: the unlikeliest
        return normed([row["reward"] * (1 - 0.5 * rank / 4 if row["correct"] else 1) for row, rank in zip(group, ranks)], old)

    def boundary(group, old):
        gain = beta_gain(sum(row["correct"] for row in group), 4, 3)
        weight = gain / beta_gain(1, 4, 3) if gain >= 0.1 * 5 else 0
        return [[weight * adv for adv in of_row] for of_row in normed([row["reward"] for row in group], old)]

    def unsolved(group, old):
        return spread([0 if any(row["correct"] for row in group) else -1] * 4, old)

    def oreal(group, old):
        scores = []
        for row in group:
            others = mean_of([other["reward"] for other in group if other is not row])
            weight = (1 if row["correct"] else 0.25) * sum(tokens.values()) / tokens[row["correct"]]
            scores.append(weight * (row["reward"] - others))
        return spread(scores, old)

    def drpo(group, old):
        means = sampled_means(group)
        short = [math.exp((1 - max(len(of_row), 1) / 6) / 0.5) for of_row in old]  # the longest row has 6 tokens
        likely = [math.exp(mean / 2) for mean in means]
        scores = []
        for i, row in enumerate(group):
            same = [j for j in range(4) if group[j]["correct"] == row["correct"]]
            of_kind = short if row["correct"] else [-v for v in likely]
            share = of_kind[i] / abs(math.fsum(of_kind[j] for j in same)) if len(same) < 4 else 0
            scores.append(share * sum(tokens.values()) / (len(VERDICTS) * max(len(old[i]), 1)))
        return spread(scores, old)

    def maxrl(group, old):
        p = mean_of([float(row["correct"]) for row in group])
        return spread([(row["correct"] - p) / p if p else 0 for row in group], old)

    def rs(group, old):
        risk = [math.exp(3 * row["reward"]) for row in group]
        return spread([(one / mean_of(risk) - 1) / 3 for one in risk], old)

    def ucpo(group, old):
        likely = [math.exp(mean) if row["correct"] else 0
                  for row, mean in zip(group, sampled_means(group))]
        q = [one / math.fsum(likely) if one else 0 for one in likely]
        entropy = -math.fsum(one * math.log(one) for one in q if one)
        weights = [1 + 0.5 * (-math.log(one) - entropy) if one else 1 for one in q]
        return [[weight * adv for adv in of_row] for weight, of_row in
                zip(weights, normed([row["reward"] for row in group], old))]

    for formula, *flags in ((maxrl,), (rs, "beta=3"), (ucpo, "tau=0.5"), (focal, "gamma=2"), (unlikeliness, "beta=0.5"), (boundary, "k=3", "floor=0.1"), (unsolved,),
                            (oreal, "negative_weight=0.25"), (drpo, "tau=2", "length_tau=0.5")):
        name, flags = formula.__name__, sum((["--arm", flag] for flag in flags), [])
        found = run(model, path, tmp_path / name, "--method", f"{RIVALS}:{name}", *flags, "--max-grad-norm", 1e9, "--micro-batch-tokens", 40)
        assert distance(found.gradient, gradient_of(model, rows, formula, lambda logp, old, adv: -(logp - old).exp() * adv)) < 1e-9, name


def test_oreal_clones_the_right_and_cuts_nothing():
    """Right: - A log pi, also where rho is 2; wrong: - rho A, and its gradient grows with rho."""
    logp = torch.tensor([-1.0, -1.0, -1.0], dtype=torch.float64, requires_grad=True)
    old, adv = logp.detach() - torch.tensor([2.0, 2.0, 0.5]).log(), torch.tensor([3.0, -1.0, -1.0])
    batch = train.Batch(None, torch.tensor([[True, False]]), None, old, torch.tensor([0, 1, 1]))
    loss = arms.oreal_loss(logp, batch, adv)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([3.0, 2.0, 0.5]) and logp.grad.tolist() == pytest.approx([-3.0, 2.0, 0.5])


@pytest.mark.slow
def test_three_runs_on_two_threads_give_the_same_weights(tiny_model, tmp_path):
    """256 problems x 16 rollouts, eight updates: large enough for threads to meet in one gradient."""
    rng, rows = random.Random(0), []
    for group in range(256):
        prompt = [rng.randrange(3, 20) for _ in range(rng.randint(14, 20))]
        for k in range(16):
            ids, right = [rng.randrange(3, 20) for _ in range(rng.randint(6, 20))], rng.random() < 0.3
            rows.append({"id": str(group), "sample": k, "prompt_ids": prompt, "completion_ids": ids, "logprobs": [-1.0] * len(ids),
                         "finish_reason": "stop", "correct": right, "reward": float(right)})
    path = write(tmp_path / "rows.jsonl", rows, {"temperature": 1.0})
    torch.set_num_threads(2)
    try:
        one, *others = (run(tiny_model, path, tmp_path / name, "--updates", 8, "--lr", 3e-4) for name in "abc")
    finally:
        torch.set_num_threads(1)
    assert all(torch.equal(one.weights[name], other.weights[name]) for other in others for name in one.weights)
