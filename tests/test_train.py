"""train.py against an oracle written as plain loops: every method, loss, gradient, Adam step and
metric.

The oracle below runs a whole round in fp64, one row, one token and one formula at a time, and
shares no line with train.py. For the comparison train.py's model is made fp64 too, so that only
wrong formulas can make a difference; a few tests then repeat it in fp32 and in bf16 autocast.
Distributed runs are in test_distributed.py.
"""
import functools
import itertools
import json
import math
import os
import random
import re
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

import evaluate
import train
from data import files, models
from data.rollouts import Trajectory
from experiments import arms
from fused_entropy import choose_backend
from shared_prompt import length_blocks

torch.set_num_threads(1)
choose_backend("cpu", None)  # it prints once a process: before the tests that count lines
RIVALS = arms.__file__
VOCAB, T = 13, 0.7
TIMINGS = {"tokens_per_s", "peak_mem_bytes"}


# ---- A toy model and rows made by hand -----------------------------------------------------------
def make_model(folder, seed, **config):
    """A random two-layer Qwen2 whose tokens are far from equally likely, with a word tokenizer."""
    import tokenizers

    words = {word: i for i, word in enumerate(["<eos>", "<pad>", *"0123456789+"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>",
                                         pad_token="<pad>").save_pretrained(folder)
    torch.manual_seed(seed)
    config = {"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24,
              "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
              "max_position_embeddings": 64, "tie_word_embeddings": True, "eos_token_id": 0,
              "pad_token_id": 1, "initializer_range": 0.3, **config}
    transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**config)).save_pretrained(folder)
    # A hostile generation config: top_k without sampling.
    with open(f"{folder}/generation_config.json", "w", encoding="utf-8") as file:
        json.dump({"eos_token_id": [0, 5], "top_k": 20, "do_sample": False}, file)
    return str(folder)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("toy") / "model", 0)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("toy") / "reference", 1)


VERDICTS = [  # a group a line: correct and reward of each sample; a reward above 0 is not correct
    [(1, 1.0), (0, 0.1), (1, 1.0), (0, 0.0)],
    [(0, 0.0), (0, 0.0), (0, 0.0), (0, 0.0)],  # dead: all wrong
    [(1, 1.0), (1, 1.0), (1, 1.0), (1, 1.0)],  # dead: all correct
    [(0, 0.1), (0, 0.0), (0, 0.0), (0, 0.1)],  # all wrong, two of them in the right format
    [(0, 0.0), (0, 0.0), (0, 0.0), (1, 1.0)],
    [(1, 1.1), (1, 1.0), (0, 0.0), (1, 0.9)],
    [(0, 0.0), (1, 1.0), (0, 0.0), (0, 0.0)],
]
LENGTHS = [[3, 1, 6, 4], [5, 0, 2, 6], [1, 1, 4, 2], [6, 3, 3, 2], [4, 4, 1, 5], [2, 6, 3, 3],
           [6, 6, 2, 5]]
# finish_reason "length"; (6, 1) is the only correct answer of its group.
CUT = {(2, 2), (5, 1), (6, 1), (6, 3)}


def make_rows(folder, verdicts=VERDICTS, lengths=LENGTHS, cut=CUT, seed=0):
    """Scored rows with random ids, and the log-probs that the model gives them in fp32, off by a
    little like another program's."""
    return json.loads(rows_as_json(folder, json.dumps([verdicts, lengths, sorted(cut)]), seed))


@functools.cache
def rows_as_json(folder, shapes, seed):
    verdicts, lengths, cut = json.loads(shapes)
    rng, rows, policy = random.Random(seed), [], load(folder)
    for g, group in enumerate(verdicts):
        prompt = [rng.randrange(2, VOCAB) for _ in range(rng.randint(1, 5))]
        for k, (correct, reward) in enumerate(group):
            completion = [rng.randrange(VOCAB) for _ in range(lengths[g][k])]
            with torch.no_grad():
                logprobs = [float(np.float32(logp.item() + rng.uniform(-1e-2, 1e-2)))
                            for logp, _ in tokens_of(policy, prompt, completion)]
            rows.append({"id": f"p/{g}", "sample": k, "prompt_ids": prompt,
                         "completion_ids": completion, "logprobs": logprobs,
                         "finish_reason": "length" if [g, k] in cut else "stop",
                         "correct": bool(correct), "reward": reward, "task": "toy"})
    return json.dumps(rows)


SAMPLING = {"temperature": T, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


def write(path, rows, sampling=SAMPLING):
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


# ---- Running train.py, and reading what it wrote -------------------------------------------------
class Round:
    """What a round wrote; `gradient` is that of its update, if it has only one."""

    def __init__(self, folder):
        self.folder = str(folder)
        self.weights = load_file(f"{folder}/model.safetensors")
        self.moments = load_file(f"{folder}/optimizer.safetensors")
        self.gradient = {name: moment * 10 for name, moment in self.moments.items()
                         if name.endswith("exp_avg")}
        with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
            self.metrics = [json.loads(line) for line in file]
        with open(f"{folder}/trainer_state.json", encoding="utf-8") as file:
            self.step = json.load(file)["step"]


def arguments(model, rollouts, out, *flags):
    return train.parse_args(["--model", model, "--rollouts", rollouts, "--out", str(out),
                             *map(str, flags)])


def run(model, rollouts, out, *flags):
    train.main(arguments(model, rollouts, out, *flags))
    os.close(files.claim.lock)
    return Round(out)


def use_fp64(setattr=setattr):
    """Put train.py in fp64: the model, its norms (which transformers computes in fp32), the rewards
    and all that follows from them."""
    def load_double(name, *args):
        return transformers.AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64).eval()

    def shell_of_doubles(name, options):
        return models.empty_model(name, options, torch.float64)

    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    setattr(train, "load_model", load_double)
    setattr(train, "empty_model", shell_of_doubles)
    setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
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


def without_timings(metrics):
    return {key: value for key, value in metrics.items() if key not in TIMINGS}


# ---- The oracle ----------------------------------------------------------------------------------
def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).double()


def tokens_of(policy, prompt, completion, temperature=T):
    """[(log-prob, entropy)] of each completion token, from the model's own logits, without batch,
    padding or cache."""
    ids = torch.tensor([prompt + completion])
    logits = policy(ids, use_cache=False).logits[0] / temperature
    found = []
    for t, token in enumerate(completion):
        logp = torch.log_softmax(logits[len(prompt) - 1 + t], -1)
        found.append((logp[token], -(logp.exp() * logp).sum()))
    return found


def mean_of(numbers):
    return math.fsum(numbers) / len(numbers)


def std_of(numbers):
    return math.sqrt(mean_of([(x - mean_of(numbers)) ** 2 for x in numbers]))  # of the population


def sampled_means(group):
    """Mean log-prob of each rollout, as the sampler wrote it into the rows."""
    return [mean_of(row["logprobs"]) if row["logprobs"] else 0.0 for row in group]


def scores_of(args, group):
    """What the tokens of each row of a group have in common in their advantage."""
    rewards, corrects = [row["reward"] for row in group], [row["correct"] for row in group]
    if args.method.endswith(":passk"):  # all groups of k that can be made of the n answers
        subsets = list(itertools.combinations(range(len(group)), args.arm["k"]))
        best = [float(any(corrects[i] for i in subset)) for subset in subsets]
        if std_of(best) == 0:
            return [0.0] * len(group)
        return [mean_of([(r - mean_of(best)) / std_of(best)
                         for r, subset in zip(best, subsets) if i in subset])
                for i in range(len(group))]
    if args.method.endswith(":w_reinforce"):
        return [args.arm["positive_weight"] if correct else -1.0 for correct in corrects]
    if args.smooth_level == "reward":
        rewards = [r - args.gamma_p * mean if correct else r + args.gamma_n * mean
                   for r, correct, mean in zip(rewards, corrects, sampled_means(group))]
    scores = [r - mean_of(rewards) for r in rewards]
    if args.adv_norm == "none" or args.smooth_level == "reward":
        return scores
    return [score / (std_of(rewards) + 1e-6) for score in scores]


def advantages(args, group):
    """The advantage of every token of one group: a list of advantages a row."""
    result = []
    for row, score in zip(group, scores_of(args, group)):
        of_row = []
        for logp in row["old"]:
            smooth = 0.0
            if args.smooth_level == "token":
                smooth = logp
            elif args.smooth_level in ("sum", "mean", "share"):
                power = {"sum": 0, "mean": 1, "share": 2}[args.smooth_level]
                smooth = math.fsum(row["old"]) / len(row["old"]) ** power
            gamma = -(args.gamma_p or 0) if row["correct"] else args.gamma_n or 0
            of_row.append(score + gamma * smooth)
        result.append(of_row)
    return result


class Oracle:
    """Rounds of train.py in plain loops: `weights`, `gradient` (the last, before clipping),
    `moments`, `metrics`, `step`."""

    def __init__(self, folder):
        self.policy, self.metrics, self.step = load(folder), [], 0
        self.names = dict(self.policy.named_parameters())
        self.moments = {f"{name}.{key}": torch.zeros_like(weight)
                        for name, weight in self.names.items() for key in ("exp_avg", "exp_avg_sq")}

    def round(self, args, rows, temperature=T):
        groups = {}
        for row in rows:
            row = dict(row)
            if row["finish_reason"] == "length" and args.truncated == "wrong":
                row["reward"] = row["reward"] if row["correct"] else 0.0
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
            for row in sum(groups, []):
                ids = row["prompt_ids"], row["completion_ids"], temperature
                row["old"] = [logp.item() for logp, _ in tokens_of(self.policy, *ids)]
                if reference:
                    row["ref"] = [logp.item() for logp, _ in tokens_of(reference, *ids)]
        for deal in deals:
            self.update(args, deal, temperature)
        self.weights = {name: weight.detach() for name, weight in self.names.items()}

    def token(self, args, row, t, logp, entropy, adv):
        """The loss of one token, and its part of the metrics."""
        old, rho = row["old"][t], (logp - row["old"][t]).exp()
        low, high = rho.item() < 1 - args.clip_low, rho.item() > 1 + args.clip_high
        if args.method.endswith(":cispo"):
            low = False
            loss = -min(rho.item(), 1 + args.clip_high) * adv * logp
        else:
            low, high = low and adv < 0, high and adv > 0
            loss = -rho * adv
            if low or high:
                loss = -torch.as_tensor((1 - args.clip_low if low else 1 + args.clip_high) * adv)
        if args.tis_cap:
            loss = loss * min(math.exp(old - row["logprobs"][t]), args.tis_cap)
        of_kind = args.entropy_coef_correct if row["correct"] else args.entropy_coef_wrong
        loss = loss - (args.entropy_coef + of_kind) * entropy
        if args.kl_coef:
            d = row["ref"][t] - logp
            loss = loss + args.kl_coef * (d.exp() - d - 1)
        gamma = (args.gamma_p if row["correct"] else args.gamma_n) or 0.0
        weight = math.exp(old - row["logprobs"][t])
        return loss, {
            "entropy": entropy.item(), "correct": row["correct"], "nll": -logp.item(), "low": low,
            "high": high, "gap": abs(old - row["logprobs"][t]), "rho": rho.item(), "adv": adv,
            "smooth": abs(gamma * old), "kl": rho.item() - 1 - (logp.item() - old),
            "tis": weight if args.tis_cap is None else min(weight, args.tis_cap),
            "capped": args.tis_cap is not None and weight > args.tis_cap}

    def update(self, args, groups, temperature):
        members, seen = sum(groups, []), []
        total, count = torch.zeros((), dtype=torch.float64), 0
        for group in groups:
            for row, of_row in zip(group, advantages(args, group)):
                if row["finish_reason"] == "length" and args.truncated == "mask":
                    continue
                count += len(row["completion_ids"])
                ids = row["prompt_ids"], row["completion_ids"], temperature
                for t, (logp, entropy) in enumerate(tokens_of(self.policy, *ids)):
                    loss, numbers = self.token(args, row, t, logp, entropy, of_row[t])
                    total = total + loss
                    seen.append(numbers)
        loss = total / max(count, 1)
        for weight in self.names.values():
            weight.grad = torch.zeros_like(weight)
        if count:
            loss.backward()
        self.gradient = {f"{name}.exp_avg": weight.grad.clone()
                         for name, weight in self.names.items()}
        norm = math.sqrt(sum(grad.square().sum().item() for grad in self.gradient.values()))
        lr = args.lr * min(1.0, (self.step + 1) / max(args.warmup_steps, 1))
        self.step += 1
        with torch.no_grad():
            for name, weight in self.names.items():  # clipped, then AdamW
                gradient = weight.grad * min(1.0, args.max_grad_norm / (norm + 1e-6))
                m, v = self.moments[f"{name}.exp_avg"], self.moments[f"{name}.exp_avg_sq"]
                m.copy_(0.9 * m + 0.1 * gradient)
                v.copy_(0.999 * v + 0.001 * gradient ** 2)
                weight.mul_(1 - lr * args.weight_decay)
                root = (v / (1 - 0.999 ** self.step)).sqrt() + 1e-8
                weight.sub_(lr * (m / (1 - 0.9 ** self.step)) / root)

        def mean(key, tokens=seen):
            return mean_of([token[key] for token in tokens]) if tokens else None

        line = {
            "step": self.step,
            "loss": loss.item(),
            "reward": mean_of([row["reward"] for row in members]),
            "pass@1": mean_of([row["correct"] for row in members]),
            "pass@n": mean_of([any(row["correct"] for row in group) for group in groups]),
            "entropy": mean("entropy"),
            "entropy_correct": mean("entropy", [x for x in seen if x["correct"]]),
            "entropy_wrong": mean("entropy", [x for x in seen if not x["correct"]]),
            "nll": mean("nll"),
            "logprob_gap": mean("gap"),
            "logprob_gap_max": max(x["gap"] for x in seen),
            "ratio_max": max(x["rho"] for x in seen),
            "clip_low_frac": mean("low"),
            "clip_high_frac": mean("high"),
            "approx_kl": mean("kl"),
            "grad_norm": norm,
            "lr": lr,
            "adv_std": std_of([x["adv"] for x in seen]),
            "smooth_abs": mean("smooth"),
            "dead_groups": mean_of([len({row["reward"] for row in group}) == 1
                                    for group in groups]),
            "completion_len": mean_of([len(row["completion_ids"]) for row in members]),
            "truncated_frac": mean_of([row["finish_reason"] == "length" for row in members]),
            "tokens": count}
        if args.tis_cap:
            line |= {"tis_mean": mean("tis"), "tis_capped_frac": mean("capped")}
        self.metrics.append(line)


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
    "ds-grpo, mean": ["--smooth-level", "mean", "--gamma-p", 0.3, "--gamma-n", 0.1],
    "ds-grpo, share": ["--smooth-level", "share", "--gamma-p", 0.5, "--gamma-n", 0.3],
    "ds-grpo, reward": ["--smooth-level", "reward", "--gamma-p", 0.2, "--gamma-n", 0.1],
    "ds-grpo, positive half": ["--gamma-p", 0.3, "--gamma-n", 0],
    "ds-grpo, uniform bonus": ["--gamma-p", 0.2, "--gamma-n", -0.2],
    "ds-grpo without std": ["--adv-norm", "none"],
    "grpo": ["--method", "grpo"],
    "grpo without std": ["--method", "grpo", "--adv-norm", "none"],
    "passk 2": ["--method", f"{RIVALS}:passk", "--arm", "k=2"],
    "passk 3": ["--method", f"{RIVALS}:passk", "--arm", "k=3"],
    "cispo": ["--method", f"{RIVALS}:cispo"],
    "w-reinforce": ["--method", f"{RIVALS}:w_reinforce", "--arm", "positive_weight=0.2"],
    "entropy": ["--method", "grpo", "--entropy-coef", 0.3],
    "differential entropy": ["--method", "grpo", "--entropy-coef-correct", 0.5,
                             "--entropy-coef-wrong", -0.2],
    "kl": ["--method", "grpo", "--kl-coef", 0.5],
    "masked": ["--truncated", "mask", "--gamma-p", 0.3],
    "masked, reward": ["--truncated", "mask", "--smooth-level", "reward", "--gamma-p", 0.3],
    "truncated importance sampling": ["--method", "grpo", "--tis-cap", 1.001],
    "all": ["--smooth-level", "mean", "--entropy-coef", 0.1, "--entropy-coef-wrong", -0.2,
            "--kl-coef", 0.2, "--truncated", "mask", "--clip-low", 0.05, "--clip-high", 0.1,
            "--warmup-steps", 2, "--weight-decay", 0.1, "--seed", 3],
}


@pytest.mark.parametrize("arm", ARMS)
def test_oracle(arm, model, reference, rollouts, tmp_path, fp64):
    """Three updates of every arm in small micro-batches: loss, weights, moments and every metric;
    with them the clipped ratios, pi_old of all groups taken before the first update, gradient
    clipping, warm-up and Adam's bias correction."""
    flags = [*ARMS[arm], "--updates", 3, "--lr", 0.03, "--micro-batch-tokens", 20,
             "--max-grad-norm", 0.2]
    flags += ["--ref-model", reference] if "--kl-coef" in flags else []
    found, oracle = run(model, rollouts, tmp_path / "out", *flags), Oracle(model)
    oracle.round(arguments(model, rollouts, "x", *flags), make_rows(model))
    assert oracle.metrics[0]["grad_norm"] > 1e-2
    if arm != "passk 3":  # few of these groups teach it anything
        assert max(line["clip_high_frac"] for line in oracle.metrics) > 0
        assert max(line["clip_low_frac"] for line in oracle.metrics) > 0 or arm == "cispo"
    assert distance(found.moments, oracle.moments) < 1e-9
    assert distance(found.weights, oracle.weights) < 1e-9
    assert found.step == oracle.step == 3
    for line, expected in zip(found.metrics, oracle.metrics, strict=True):
        same_metrics(line, expected)
    first = found.metrics[0]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert first["clip_low_frac"] == first["clip_high_frac"] == 0
    assert abs(first["entropy"] - first["nll"]) > 0.05  # two different things


def test_oracle_in_fp32(model, rollouts, tmp_path):
    """As it is run: fp32 gives the oracle's loss and gradient to 1e-6."""
    found, oracle = run(model, rollouts, tmp_path / "out", "--max-grad-norm", 1e9), Oracle(model)
    oracle.round(arguments(model, rollouts, "x"), make_rows(model))
    assert distance(found.gradient, oracle.gradient) < 1e-6
    assert found.metrics[0]["loss"] == pytest.approx(oracle.metrics[0]["loss"], abs=1e-6)
    same_metrics(found.metrics[0], oracle.metrics[0], 1e-5)


def test_what_a_round_prints_is_what_evaluate_counts(model, rollouts, tmp_path, capsys):
    """On stdout evaluate.py's Pass@1 and Pass@n; data/README.md explains every key of a line."""
    line = run(model, rollouts, tmp_path / "out").metrics[0]
    out = capsys.readouterr().out
    problems, n = evaluate.read_problems(rollouts)
    _, curve = evaluate.measure(list(problems.values()), n, [1])
    assert (line["pass@1"], line["pass@n"]) == pytest.approx((curve[0], curve[-1]))
    assert out == (f"Pass@1 {curve[0]:.3f}  Pass@4 {curve[-1]:.3f}  entropy {line['entropy']:.3f}  "
                   f"length {line['completion_len']:.1f}  truncated 0.143\n")
    root = os.path.dirname(train.__file__)
    with open(f"{root}/data/README.md", encoding="utf-8") as file:
        assert set(line) <= set(re.findall(r"[\w@]+", file.read()))
    rows = make_rows(model, cut={(g, k) for g in range(7) for k in range(4) if k})
    run(model, write(tmp_path / "cut.jsonl", rows), tmp_path / "cut")
    assert "75% of the completions were cut" in capsys.readouterr().err


# ---- The pure functions --------------------------------------------------------------------------
def batch_of(reward, correct, old, row):
    """A train.Batch of whole rollouts, their mean log-probs taken from its own tokens."""
    length = torch.bincount(row, minlength=reward.numel())
    sums = torch.zeros_like(reward.flatten()).index_add(0, row, old.to(reward.dtype))
    return train.Batch(reward, correct, length.view_as(reward), old, row,
                       (sums / length.clamp(min=1)).view_as(reward))


def advantage(rewards, corrects, lengths=None, logp=-1.0, method=train.grpo, **options):
    """The advantage of one group in fp64, with `lengths` tokens a row (1), as a list a token."""
    lengths = torch.tensor(lengths or [1] * len(rewards))
    row = torch.arange(len(rewards)).repeat_interleave(lengths)
    old = torch.tensor([logp] * len(row) if isinstance(logp, float) else logp, dtype=torch.float64)
    reward = torch.tensor([rewards], dtype=torch.float64)
    return method(batch_of(reward, torch.tensor([corrects]), old, row), **options).tolist()


def test_population_std_and_exact_zeros_of_one_sample_or_equal_rewards():
    found = advantage([1.0, 0.0, 0.0, 0.0], [True, False, False, False])
    assert found == pytest.approx([3 ** 0.5, *[-(3 ** -0.5)] * 3], rel=1e-5)
    assert advantage([1.0, 0.0], [True, False], adv_norm="none") == [0.5, -0.5]
    for (method, options), reward, n in itertools.product(
            [(train.grpo, {}), (train.grpo, {"adv_norm": "none"}), (arms.cispo, {}),
             (arms.passk, {"k": 1})], [0.0, 0.1, 1 / 3, -7.7], [1, 2, 3, 7, 8, 12]):
        if method == arms.passk and n == 1:
            continue  # refused: below
        batch = batch_of(torch.full((1, n), reward), torch.full((1, n), True),
                         torch.full((n,), -1.0), torch.arange(n))  # fp32
        assert (method(batch, **options) == 0).all(), (method, reward, n)


def test_the_sign_comes_from_correct_and_dead_groups_are_smoothed():
    smoothed = functools.partial(advantage, method=train.ds_grpo, gamma_p=0.5, gamma_n=0.25)
    # A format reward does not make it correct.
    assert smoothed([0.1, 0.1], [False, False], logp=-2.0) == [-0.5, -0.5]
    assert smoothed([0.0, 0.0], [True, True], logp=-2.0) == [1.0, 1.0]
    for level, expected in (("token", [1.0, 0.5, 2.0]), ("sum", [1.0, 2.5, 2.5]),
                            ("mean", [1.0, 1.25, 1.25]), ("share", [1.0, 0.625, 0.625]),
                            ("reward", [-0.125, 0.125, 0.125])):
        found = smoothed([1.0, 1.0], [True, True], [1, 2], [-2.0, -1.0, -4.0], smooth_level=level)
        assert found == expected, level


def test_losses_of_one_token_by_hand():
    """PPO's: a token is cut, and loses its gradient, only where the step would go further in the
    direction that it has already gone. CISPO's (arXiv 2506.13585): the cut ratio is a constant
    weight of log pi; no token loses its gradient; no lower cut. OREAL's: right rollouts are cloned,
    also where rho is 2; of wrong ones the gradient grows with rho."""
    def check(loss_of, *cases):
        for ratio, adv, loss, slope, clipped in cases:
            logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
            old, row = logp.detach() - math.log(ratio), torch.tensor([0])
            batch = train.Batch(None, torch.tensor([[adv > 0]]), None, old, row)
            found = loss_of(logp, batch, torch.tensor([float(adv)]))
            found, low, high = found if isinstance(found, tuple) else (found, None, None)
            found.sum().backward()
            assert (found.item(), logp.grad.item()) == pytest.approx((loss, slope)), (ratio, adv)
            if low is not None:
                assert (low.item(), high.item()) == (clipped == "low", clipped == "high")

    check(functools.partial(train.clipped_loss, clip_low=0.2, clip_high=0.25),
          (1.5, 1, -1.25, 0, "high"), (1.5, -1, 1.5, 1.5, ""), (0.5, 1, -0.5, -0.5, ""),
          (0.5, -1, 0.8, 0, "low"), (1.0, 1, -1.0, -1.0, ""), (1.0, -1, 1.0, 1.0, ""))
    check(functools.partial(arms.cispo_loss, clip_high=0.25),
          (2.0, 1, 1.25, -1.25, "high"), (2.0, -1, -1.25, 1.25, "high"), (0.5, -1, -0.5, 0.5, ""),
          (0.01, 1, 0.01, -0.01, ""))
    check(arms.oreal_loss, (2.0, 3, 3.0, -3.0, ""), (2.0, -1, 2.0, 2.0, ""),
          (0.5, -1, 0.5, 0.5, ""))


def test_numerics_log_probs_of_minus_ten_thousand():
    """A ratio beyond fp32 must not turn a cut token's gradient into 0 * inf, nor a metric into
    infinity."""
    values = [-1e4, -9.9e3, -100.0, -1e-7, 0.0]
    for new, old, adv, cispo in itertools.product(values, values, (-1.0, 0.0, 1.0), (False, True)):
        logp, old = torch.tensor([new], requires_grad=True), torch.tensor([old])
        batch, adv = train.Batch(None, None, None, old), torch.tensor([adv])
        if cispo:
            loss, _, _ = arms.cispo_loss(logp, batch, adv, 0.25)
        else:
            loss, _, _ = train.clipped_loss(logp, batch, adv, 0.2, 0.25)
        (loss + train.k3(logp, old)).sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all(), (new, old, adv)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(-50, 0, width=32), st.floats(-50, 0, width=32)), min_size=1,
                max_size=50))
def test_k3_is_never_negative(pairs):
    logp, other = torch.tensor(pairs).unbind(1)
    assert (train.k3(logp, other) >= 0).all() and (train.k3(logp, logp) == 0).all()
    near = logp * (1 + 1e-6)  # where exp(d) - d - 1, as it is written, loses all digits in fp32
    assert (train.k3(logp, near) >= 0).all()
    torch.testing.assert_close(train.k3(logp.double(), near.double()),
                               (near.double() - logp.double()) ** 2 / 2, rtol=1e-4, atol=1e-20)


GAMMAS = st.sampled_from([0, 10, -1, 0.01])
NORM = {"adv_norm": st.sampled_from(["std", "none"])}
FUZZED = {train.ds_grpo: {"gamma_p": GAMMAS, "gamma_n": GAMMAS, **NORM, "smooth_level":
                          st.sampled_from(["token", "sum", "mean", "share", "reward"])},
          train.grpo: NORM, arms.passk: {"k": st.integers(1, 4)},
          **{method: {} for method in (arms.cispo, arms.w_reinforce, arms.boundary, arms.unsolved,
                                       arms.oreal, arms.drpo, arms.maxrl, arms.rs, arms.ucpo)}}


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_advantage(data):
    """Any rewards, verdicts and settings: finite, zero-mean where the formula says so, and the same
    whatever order the tokens stand in."""
    groups, n = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 5))

    def table(values):
        row = st.lists(values, min_size=n, max_size=n)
        return torch.tensor(data.draw(st.lists(row, min_size=groups, max_size=groups)))

    reward, correct = table(st.floats(-1e6, 1e6, width=32)), table(st.booleans())
    row = data.draw(st.lists(st.integers(0, groups * n - 1), max_size=20))
    row = torch.tensor(row, dtype=torch.long)
    logp = st.floats(-1e4, 0, width=32)
    old = torch.tensor(data.draw(st.lists(logp, min_size=len(row), max_size=len(row))))
    method = data.draw(st.sampled_from(list(FUZZED)))
    options = data.draw(st.fixed_dictionaries(FUZZED[method]))
    if method == arms.passk and options["k"] >= n:
        return
    found = method(batch_of(reward, correct, old, row), **options)
    assert found.shape == row.shape and torch.isfinite(found).all()
    order = torch.randperm(len(row), generator=torch.Generator().manual_seed(0))
    shuffled = method(batch_of(reward, correct, old[order], row[order]), **options)
    torch.testing.assert_close(shuffled, found[order], rtol=1e-4, atol=1e-3)
    if method in (train.grpo, arms.cispo, arms.passk):
        each = batch_of(reward, correct, torch.zeros(groups * n), torch.arange(groups * n))
        mean = method(each, **options).view(groups, n).mean(1)
        assert (mean.abs() <= 1e-4 * (1 + reward.abs().max())).all()


# ---- Who computes what ---------------------------------------------------------------------------
def row_of(prompt, completion, group=0, used=True):
    return Trajectory(
        where="rows.jsonl:1", id=str(group), sample=0, group=group, prompt=prompt,
        completion=np.array(completion, np.int64), logprobs=np.zeros(len(completion), np.float32),
        correct=True, reward=1.0, truncated=False, used=used, fields={})


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_the_plan_covers_every_row_once(data):
    """Any lengths, any number of ranks: each kept row with tokens once over all ranks, as many
    micro-batches on each rank, and none above its budget unless it is a single row."""
    n, world = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    share, budget = data.draw(st.booleans()), data.draw(st.integers(1, 100))
    samples = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=n, max_size=n)
    shapes = data.draw(st.lists(st.tuples(st.integers(1, 30), samples), min_size=1, max_size=6))
    rows = [row_of([2] * prompt, [0] * length, g, used)
            for g, (prompt, samples) in enumerate(shapes) for length, used in samples]
    plans = [train.plan_update(rows, list(range(len(rows))), rank, world, budget, share)
             for rank in range(world)]
    kept = [i for i, row in enumerate(rows) if len(row.completion) and row.used]
    assert sorted(i for plan in plans for batch in plan for i in batch) == kept
    assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) >= 1
    for batch in filter(None, itertools.chain(*plans)):
        prompts = [len(rows[i].prompt) for i in batch]
        completions = [len(rows[i].completion) for i in batch]
        cost = len(batch) * max(p + c for p, c in zip(prompts, completions))
        if share:
            cost = len({rows[i].group for i in batch}) * max(prompts) + sum(completions)
        assert cost <= budget or len(batch) == 1


def test_the_padding_of_a_micro_batch_is_bounded():
    """What one long completion beside short ones, or lengths of any spread, make of a budget; every
    row with tokens stands in one block."""
    def padding(lengths):
        blocks = length_blocks(lengths)
        assert sorted(sum(blocks, [])) == [i for i, length in enumerate(lengths) if length]
        return sum(len(block) * max(lengths[i] for i in block) for block in blocks) / sum(lengths)

    assert padding([2000] + 31 * [60] + [0]) < 1.05
    rng = np.random.default_rng(0)
    for _ in range(200):
        lengths = []
        while sum(lengths) < 4096:  # as micro_batches fills it
            lengths.append(int(np.clip(np.exp(rng.normal(5.5, 1)), 1, 2000)))
        assert padding(lengths) < 1.35


def test_the_deal_depends_on_the_seed_and_the_steps_done():
    """Whole groups, dealt into updates whose sizes differ by at most one group."""
    deals = [train.deal(8, 2, 4, seed, step) for seed, step in ((0, 0), (0, 4), (1, 0), (0, 0))]
    assert deals[0] == deals[3]
    assert deals[0] != deals[1] != deals[2] != deals[0]
    for updates in (1, 2, 3, 7):
        deal = train.deal(7, 3, updates, 0, 0)
        assert len(deal) == updates and sorted(sum(deal, [])) == list(range(21))
        assert all({i // 3 * 3 + k for i in rows for k in range(3)} == set(rows) for rows in deal)
        sizes = [len(rows) for rows in deal]
        assert max(sizes) - min(sizes) in (0, 3)


# ---- Pitfalls, one by one ------------------------------------------------------------------------
def test_fp32_masters_move_where_bf16_weights_do_not(model, rollouts, tmp_path):
    before = load_file(f"{model}/model.safetensors")
    for dtype in ("float32", "bfloat16"):
        after = run(model, rollouts, tmp_path / dtype, "--lr", 1e-6, "--dtype", dtype).weights
        assert all(weight.dtype == torch.float32 for weight in after.values())
        for of, moved in (torch.float32, (0.95, 1)), (torch.bfloat16, (0, 0.05)):
            differ = [(after[name].to(of) != before[name].to(of)).flatten() for name in before]
            assert moved[0] <= torch.cat(differ).float().mean() <= moved[1], dtype


def test_ratio_is_one_in_bf16_autocast(model, rollouts, tmp_path):
    """pi_old and pi go through the same forward pass, whose log-softmax is fp32: no false ratio,
    however coarse the hidden states. At lr 0 the second update, whose pi_old is another pass, is
    on policy, too, and no bit of the weights changes."""
    found = run(model, rollouts, tmp_path / "out", "--dtype", "bfloat16", "--updates", 2, "--lr", 0,
                "--smooth-level", "reward")
    for line in found.metrics:
        assert line["ratio_max"] == pytest.approx(1, abs=1e-5)
        assert line["clip_low_frac"] == line["clip_high_frac"] == 0
        assert 1e-4 < line["logprob_gap"] < 0.5
    before = load_file(f"{model}/model.safetensors")
    assert all(torch.equal(found.weights[name], before[name]) for name in before)
    policy = train.Policy(train.load_model(model, torch.float32, "cpu", {}), T, True)
    rows = [row_of([2, 3], [4, 5, 6])]
    logp, entropy, _ = train.forward(policy, rows, [0], "cpu", torch.bfloat16)
    assert logp.dtype == entropy.dtype == torch.float32
    assert (logp.bfloat16().float() != logp).any()


def test_the_normaliser_does_not_see_micro_batches(model, tmp_path, monkeypatch):
    """1 x 8 = 4 x 2 = 8 x 1, with prompts repeated and shared: the gradient to 1e-6, weights to a
    tenth of a step."""
    group = [(1, 1.0), (0, 0.0), (1, 1.0), (0, 0.5)]
    rows = make_rows(model, [group, group], [[6, 2, 4, 1], [3, 5, 6, 6]], cut=())
    for row in rows:
        row["prompt_ids"] = row["prompt_ids"][:1] * 3
    path, calls, original = write(tmp_path / "rows.jsonl", rows), [], train.forward
    monkeypatch.setattr(train, "forward",
                        lambda *args: calls.append(len(args[2])) or original(*args))
    rounds, lr = [], 1e-4
    for flag, budgets in ("--no-share-prompts", (72, 18, 1)), ("--share-prompts", (100, 12, 1)):
        for budget in budgets:
            calls.clear()
            rounds.append(run(model, path, tmp_path / f"{flag}{budget}", flag, "--lr", lr,
                              "--micro-batch-tokens", budget, "--max-grad-norm", 1e9,
                              "--entropy-coef", 0.1))
            assert sum(calls) == 8
            assert {72: 1, 100: 1, 1: 8}.get(budget, len(calls)) == len(calls)
            assert budget not in (18, 12) or 1 < len(calls) < 8
    for one in rounds[1:]:
        assert distance(one.gradient, rounds[0].gradient) < 1e-6
        same_metrics(one.metrics[0], without_timings(rounds[0].metrics[0]), 1e-5)
        apart = torch.cat([(one.weights[name] - rounds[0].weights[name]).abs().flatten()
                           for name in one.weights])
        assert (apart < 1e-6).float().mean() > 0.999 and apart.max() < 0.1 * lr


def test_one_pass_a_row_unless_more_is_needed(model, rollouts, tmp_path, monkeypatch):
    """pi_old of the first update is its own forward pass; that of later ones is computed before any
    step."""
    calls, original = [], train.forward
    monkeypatch.setattr(train, "forward",
                        lambda *args: calls.append(torch.is_grad_enabled()) or original(*args))
    for flags, expected in ([], [True]), (["--smooth-level", "reward"], [True]), (
            ["--updates", 3], [False] * 2 + [True] * 3):
        calls.clear()
        run(model, rollouts, tmp_path / f"out{len(flags)}{len(expected)}", *flags)
        assert calls == expected


def test_empty_completions_and_the_length_limit(model, tmp_path):
    """Updates without any token, with one, and at the model's 64 positions."""
    lengths = [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [58, 59, 1, 0]]
    path = write(tmp_path / "rows.jsonl", make_rows(model, [VERDICTS[0]] * 4, lengths, cut=()))
    for number, flags in enumerate([[], ["--smooth-level", "mean"], ["--smooth-level", "reward"],
                                    ["--no-share-prompts"]]):
        found = run(model, path, tmp_path / f"out{number}", *flags, "--updates", 4)
        assert sorted(line["tokens"] for line in found.metrics) == [0, 1, 4, 118]
        for line in found.metrics:
            assert all(value is None or math.isfinite(value) for value in line.values())
        assert all(torch.isfinite(weight).all() for weight in found.weights.values())


def test_truncated_rollouts(model, tmp_path):
    """All cut: under `mask` nothing is learned from, though they stay in the statistics; under
    `wrong` those that are not right have reward 0. score.py calls a cut completion correct where
    the whole answer stands in it, and it stays so: pass@1 is evaluate.py's."""
    everything = {(g, k) for g in range(7) for k in range(4)}
    path = write(tmp_path / "rows.jsonl", make_rows(model, cut=everything))
    masked = run(model, path, tmp_path / "mask", "--truncated", "mask", "--weight-decay", 0)
    line, right = masked.metrics[0], [r for group in VERDICTS for correct, r in group if correct]
    assert line["tokens"] == line["grad_norm"] == 0 and line["truncated_frac"] == 1
    assert line["pass@1"] == pytest.approx(len(right) / 28)
    assert line["entropy_correct"] is line["entropy_wrong"] is None
    assert distance(masked.weights, load_file(f"{model}/model.safetensors")) == 0
    line = run(model, path, tmp_path / "wrong").metrics[0]
    assert line["pass@1"] == pytest.approx(len(right) / 28) and line["grad_norm"] > 0
    assert line["reward"] == pytest.approx(sum(right) / 28)

    # The only rollout with a reward was cut.
    cases = {"wrong": ([(0, 0.0), (0, 1.0), (0, 0.0), (0, 0.0)], 0), "mask": (VERDICTS[6], 0.25)}
    for kind, (verdicts, solved) in cases.items():
        rows = make_rows(model, [verdicts], [LENGTHS[6]], cut={(0, 1)})
        line = run(model, write(tmp_path / f"{kind}.jsonl", rows), tmp_path / f"one-{kind}",
                   "--method", "grpo", "--truncated", kind).metrics[0]
        assert line["pass@1"] == solved and line["dead_groups"] == (kind == "wrong")
        assert (line["grad_norm"] > 0) == (kind == "mask")
        assert line["tokens"] == (13 if kind == "mask" else 19)


@pytest.mark.parametrize("kind", ["sampler at -1e4", "policy at -1e4", "one sample",
                                  "equal rewards"])
def test_numerics_stay_finite(kind, model, tmp_path):
    rows, folder = make_rows(model, VERDICTS[2:6], LENGTHS[2:6], cut=()), model
    if kind == "one sample":
        rows = [row for row in rows if row["sample"] == 0]
    for row in rows:
        if kind == "sampler at -1e4":
            row["logprobs"] = [-1e4] * len(row["logprobs"])
        if kind == "equal rewards":
            row["reward"] = 0.1
    if kind == "policy at -1e4":
        folder = str(tmp_path / "sharp")
        shutil.copytree(model, folder)
        weights = load_file(f"{folder}/model.safetensors")
        weights["model.norm.weight"] *= 5000
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    path = write(tmp_path / "rows.jsonl", rows)
    steps = ["--updates", 2, "--lr", 0.1]
    for number, flags in enumerate([
            ["--gamma-p", 0, "--gamma-n", 0], ["--gamma-p", 10, "--gamma-n", 10, *steps],
            ["--gamma-p", 10, "--gamma-n", -10, "--smooth-level", "reward", *steps],
            ["--method", f"{RIVALS}:passk", "--arm", "k=2"],
            *[["--method", f"{RIVALS}:{name}", *steps] for name in ("cispo", "oreal", "drpo")]]):
        if kind == "one sample" and "k=2" in flags:
            continue  # refused: above
        found = run(folder, path, tmp_path / f"out{number}", *flags)
        for line in found.metrics:
            assert all(value is None or math.isfinite(value) for value in line.values()), line
        assert all(torch.isfinite(weight).all() for weight in found.weights.values())
        assert kind != "policy at -1e4" or found.metrics[0]["nll"] > 3e3
        assert kind != "one sample" or number or found.metrics[0]["grad_norm"] == 0


def test_a_step_that_is_not_finite_is_refused(model, rollouts, tmp_path, capsys):
    """The second update, from weights of 1e30: exit 3, one line, its rows kept and named, nothing
    published; the kept rows are a rollout file that shows the same again."""
    out = tmp_path / "out"
    for _ in range(2):
        with pytest.raises(SystemExit) as error:
            run(model, rollouts, out, "--lr", 1e30, "--updates", 2, "--truncated", "mask")
        os.close(files.claim.lock)
        last = capsys.readouterr().err.splitlines()[-1]
        assert error.value.code == 3 and last.startswith("train.py: error: step 2")
        assert f"{out}.refused.jsonl" in last
        assert not out.exists() and not os.path.exists(f"{out}.meta.json")
    with open(f"{out}.refused.jsonl", encoding="utf-8") as file:
        kept = {(row["id"], row["sample"]): row for row in map(json.loads, file)}
    assert len(kept) == 12
    rows = {(row["id"], row["sample"]): row for row in make_rows(model)}
    for key, row in kept.items():
        for field in "finish_reason", "correct", "reward", "prompt_ids", "completion_ids":
            assert row[field] == rows[key][field]
        assert row["logprobs"] == pytest.approx(rows[key]["logprobs"])
    again = run(model, f"{out}.refused.jsonl", tmp_path / "again", "--temperature", T)
    assert again.metrics[0]["tokens"] == sum(len(row["completion_ids"]) for row in kept.values())


def test_checkpointing_gives_the_same_gradient(model, rollouts, tmp_path, monkeypatch):
    """The dropout of the model's config stays off, though checkpointing needs training mode."""
    folder, calls, original = str(tmp_path / "dropout"), [], modeling_qwen2.Qwen2MLP.forward
    shutil.copytree(model, folder)
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    with open(f"{folder}/config.json", "w", encoding="utf-8") as file:
        json.dump({**config, "attention_dropout": 0.5}, file)
    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward",
                        lambda *args: calls.append(1) or original(*args))
    flags = ["--max-grad-norm", 1e9]
    plain = run(model, rollouts, tmp_path / "plain", *flags, "--no-share-prompts")
    count = len(calls)
    saved = run(folder, rollouts, tmp_path / "saved", *flags, "--checkpoint-activations")
    assert len(calls) - count == count + 2  # each layer once more, in the backward pass
    assert distance(saved.gradient, plain.gradient) < 1e-6 and saved.metrics[0]["ratio_max"] == 1


def test_shared_prompts_give_the_same_gradient(model, tmp_path, fp64):
    """Prompts of many lengths side by side in one micro-batch, so that most of them are padded."""
    rows = make_rows(model, seed=5)
    for row in rows:
        row["prompt_ids"] = (row["prompt_ids"] * 9)[:1 + 3 * int(row["id"][2:])]
    path = write(tmp_path / "rows.jsonl", rows)
    shared, repeated = (run(model, path, tmp_path / flag[2:], flag, "--max-grad-norm", 1e9,
                            "--entropy-coef", 0.1)
                        for flag in ("--share-prompts", "--no-share-prompts"))
    assert distance(shared.gradient, repeated.gradient) < 1e-9


# ---- The folder and the next round ---------------------------------------------------------------
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_is_an_ordinary_model(tied, rollouts, tmp_path):
    """It reloads to the same logits; fp32; a tied weight once; the original generation_config.json,
    byte by byte, or none."""
    folder = make_model(tmp_path / "model", 0, tie_word_embeddings=tied)
    found = run(folder, rollouts, tmp_path / "out", "--lr", 0)
    assert ("lm_head.weight" in found.weights) == (not tied)
    tensors = [*found.weights.values(), *found.moments.values()]
    assert all(tensor.dtype == torch.float32 for tensor in tensors)
    again = transformers.AutoModelForCausalLM.from_pretrained(found.folder)
    ids = torch.arange(VOCAB)[None]
    assert again.dtype == torch.float32
    assert torch.equal(again(ids).logits, load(folder).float()(ids).logits)
    tokenizer = transformers.AutoTokenizer.from_pretrained(found.folder)
    assert tokenizer("3+4")["input_ids"]
    modes = {os.stat(f"{found.folder}/{name}").st_mode for name in os.listdir(found.folder)}
    assert len(modes) == 1  # whoever may read the config may read the weights
    with open(f"{folder}/generation_config.json", "rb") as a:
        with open(f"{found.folder}/generation_config.json", "rb") as b:
            assert a.read() == b.read()
    assert set(found.moments) == {f"{name}.{key}" for name, _ in again.named_parameters()
                                  for key in ("exp_avg", "exp_avg_sq")}
    assert sorted(os.listdir(found.folder)) == [
        "config.json", "generation_config.json", "metrics.jsonl", "model.safetensors",
        "optimizer.safetensors", "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]
    os.remove(f"{folder}/generation_config.json")
    bare = run(folder, rollouts, tmp_path / "none").folder
    assert not os.path.exists(f"{bare}/generation_config.json")


def test_the_next_round_goes_on(model, rollouts, tmp_path, fp64, capsys):
    """Two rounds through files are two rounds in one process: weights, moments, Adam's step,
    warm-up and metrics are carried on."""
    rows = make_rows(model, seed=9)
    second = write(tmp_path / "rows.jsonl", rows)
    flags = ["--lr", 0.01, "--warmup-steps", 4, "--updates", 2]
    one = run(model, rollouts, tmp_path / "one", *flags)
    two = run(one.folder, second, tmp_path / "two", *flags)
    oracle = Oracle(model)
    oracle.round(arguments(model, rollouts, "x", *flags), make_rows(model))
    oracle.round(arguments(model, second, "x", *flags), rows)
    assert distance(two.weights, oracle.weights) < 1e-9
    assert distance(two.moments, oracle.moments) < 1e-9
    assert two.step == 4 and [line["step"] for line in two.metrics] == [1, 2, 3, 4]
    assert two.metrics[:2] == one.metrics
    for found, expected in zip(two.metrics, oracle.metrics, strict=True):
        same_metrics(found, expected)

    bare = tmp_path / "bare"
    shutil.copytree(one.folder, bare)
    for name in "optimizer.safetensors", "trainer_state.json", "metrics.jsonl":
        os.remove(bare / name)
    reset = run(one.folder, second, tmp_path / "reset", "--reset-optimizer")
    fresh = run(str(bare), second, tmp_path / "fresh")
    assert reset.step == 3 and fresh.step == 1
    assert distance(reset.weights, fresh.weights) < 1e-12
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


def test_the_count_of_steps_survives_a_reset(model, rollouts, tmp_path):
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
    assert reset.metrics[3]["reward"] == went_on.metrics[3]["reward"]  # the same groups
    third = run(reset.folder, rollouts, tmp_path / "3", *flags)
    assert third.step == 7
    assert [line["lr"] for line in third.metrics[5:]] == pytest.approx([0.75e-3, 1e-3])


def test_the_same_command_twice_gives_the_same_bits(model, rollouts, tmp_path):
    flags = ["--updates", 3, "--lr", 0.01, "--entropy-coef", 0.1]
    one, two = (run(model, rollouts, tmp_path / name, *flags) for name in "ab")
    for name in ("model.safetensors", "optimizer.safetensors"):
        with open(f"{one.folder}/{name}", "rb") as a, open(f"{two.folder}/{name}", "rb") as b:
            assert a.read() == b.read()
    assert list(map(without_timings, one.metrics)) == list(map(without_timings, two.metrics))
    other = run(model, rollouts, tmp_path / "seed", *flags, "--seed", 1)
    assert distance(other.weights, one.weights) > 1e-4


def test_a_finished_round_is_left_alone_and_an_unfinished_one_is_done_again(
        model, rollouts, tmp_path, capsys):
    out = tmp_path / "out"
    one = run(model, rollouts, tmp_path / "one")
    os.makedirs(f"{out}.partial/checkpoints")  # what a killed run may leave
    for name in "model.safetensors", "checkpoints/x":
        with open(f"{out}.partial/{name}", "w", encoding="utf-8") as file:
            file.write("torn")
    two = run(model, rollouts, out)
    assert distance(two.weights, one.weights) == 0
    assert not os.path.exists(f"{out}.partial/checkpoints") and not os.path.exists(out / "x")
    before = os.stat(out / "model.safetensors").st_mtime_ns
    train.main(arguments(model, rollouts, out))
    assert "complete, left alone" in capsys.readouterr().err
    assert os.stat(out / "model.safetensors").st_mtime_ns == before
    with open(f"{out}.meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    assert meta["flags"]["gamma_p"] == 0.01 and meta["sampling"]["temperature"] == T
    expected = {"dtype": "float32", "device": "cpu", "attention": "sdpa", "backend": "torch"}
    assert {key: meta[key] for key in expected} == expected


def test_policy_and_reference_of_the_hub_are_each_of_their_own_commit(
        model, reference, rollouts, tmp_path, monkeypatch):
    """Both are in the Hub's cache, without network: the round is that of the two folders."""
    for folder, name, commit in (model, "policy", "1" * 40), (reference, "reference", "2" * 40):
        cached = tmp_path / "hub" / f"models--owner--{name}"
        shutil.copytree(folder, cached / "snapshots" / commit)
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    flags = ["--method", "grpo", "--kl-coef", 0.5, "--updates", 2, "--lr", 0.01, "--ref-model"]
    folders = run(model, rollouts, tmp_path / "folders", *flags, reference)
    hub = run("owner/policy", rollouts, tmp_path / "ids", *flags, "owner/reference")
    assert distance(hub.weights, folders.weights) == 0
    with open(f"{hub.folder}.meta.json", encoding="utf-8") as file:
        inputs = list(json.load(file)["inputs"].values())
    assert inputs[1:] == [f"owner/policy@{'1' * 40}", f"owner/reference@{'2' * 40}"]


def test_rank_0_alone_hashes_the_inputs(model, rollouts, tmp_path, monkeypatch):
    """Another rank reads its rows and goes on to the meeting of the ranks without a digest of its
    own."""
    os.mkdir(tmp_path / "out.partial")  # rank 0 has claimed it
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "start_ranks", lambda *args: 1 / 0)
    for name in "describe", "claim_empty":
        monkeypatch.setattr(train, name, None)
    with pytest.raises(ZeroDivisionError):
        train.train(arguments(model, rollouts, tmp_path / "out"))


def test_the_temperature_is_the_samplers(model, rollouts, tmp_path):
    """From the meta, or from --temperature where there is none; log-probs and entropies are of
    logits / T."""
    bare = write(tmp_path / "bare.jsonl", make_rows(model), None)
    given = run(model, bare, tmp_path / "given", "--temperature", T)
    read = run(model, rollouts, tmp_path / "read", "--temperature", T)
    assert distance(given.weights, read.weights) == 0 and read.metrics[0]["logprob_gap"] < 1.1e-2
    hot = run(model, bare, tmp_path / "hot", "--temperature", 1).metrics[0]
    assert hot["entropy"] > read.metrics[0]["entropy"] and hot["logprob_gap"] > 0.1
    cut = write(tmp_path / "cut.jsonl", make_rows(model), {**SAMPLING, "top_p": 0.9})
    allowed = run(model, cut, tmp_path / "allowed", "--allow-off-policy")
    assert distance(allowed.weights, read.weights) == 0


# ---- Bad input: one line, exit 2 -----------------------------------------------------------------
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
    assert error.value.code == code and len(lines) == 1, lines
    assert lines[0].startswith("train.py: error: ")
    assert not os.path.exists(f"{out}/config.json")
    return lines[0]


def test_wrong_files(model, rollouts, tmp_path, capsys):
    def folder(name, **changes):
        shutil.copytree(model, tmp_path / name)
        for file, change in changes.items():
            path = tmp_path / name / file.replace("__", ".")
            if change is None:
                os.remove(path)
            else:
                path.write_bytes(change)
        return str(tmp_path / name)

    def text(name, content):
        (tmp_path / name).write_bytes(content)
        return str(tmp_path / name)

    with open(rollouts, "rb") as file:
        lines = file.readlines()
    with open(f"{model}/model.safetensors", "rb") as file:
        weights = file.read()
    broken = load_file(f"{model}/model.safetensors")
    broken["model.norm.weight"][3] = math.nan
    nan, lacking = folder("nan"), folder("lacking")
    save_file(broken, f"{nan}/model.safetensors", {"format": "pt"})
    del broken["model.norm.weight"]
    save_file(broken, f"{lacking}/model.safetensors", {"format": "pt"})
    small = make_model(tmp_path / "small", 0, vocab_size=9)
    absent, state = str(tmp_path / "absent"), b'{"step": 3}'
    bare, cold = ["--temperature", 1], not torch.cuda.is_available()
    for number, (name, path, flags, message) in enumerate([
            (model, absent, bare, "No such file"),
            (model, text("empty", b""), bare, "no rows"),
            (model, text("torn", b"".join(lines)[:-30]), bare, ":28: not a valid JSON row"),
            (model, text("ragged", b"".join(lines[:-1])), bare, "a group is not whole"),
            (model, rollouts, ["--updates", 8], "--updates 8 is more than the 7 groups of"),
            (absent, rollouts, [], "no such model folder"),
            (str(tmp_path), rollouts, [], "no config.json"),
            (folder("pickle", model__safetensors=None), rollouts, [], "no *.safetensors"),
            (folder("cut", model__safetensors=weights[:-100]), rollouts, [], "cannot be loaded"),
            (folder("no-weights", model__safetensors=b""), rollouts, [], "cannot be loaded"),
            (folder("no-words", tokenizer__json=None, tokenizer_config__json=None), rollouts, [],
             "tokenizer without a vocabulary"),
            (folder("no-json", config__json=b"{"), rollouts, [], "cannot be loaded"),
            (nan, rollouts, [], "model.norm.weight is not finite"),
            (lacking, rollouts, [], "model.norm.weight"),
            (folder("no-moments", trainer_state__json=state), rollouts, [], "--reset-optimizer"),
            *[(folder(f"moments-{len(moments)}", trainer_state__json=state,
                      optimizer__safetensors=moments), rollouts, [], "--reset-optimizer")
              for moments in (b"x" * 100, weights)],
            (folder("no-step", trainer_state__json=b"{}"), rollouts, [],
             "trainer_state.json: not a valid state"),
            (folder("bad-step", trainer_state__json=b'{"step": "x"}'), rollouts, [],
             "not a valid state"),
            (model, rollouts, ["--kl-coef", 1, "--ref-model", absent], "no such model folder"),
            (model, rollouts, ["--kl-coef", 1, "--ref-model", small], "beyond the vocabulary of 9"),
            *[(model, rollouts, ["--device", "cuda"], "no CUDA device")] * cold]):
        assert message in refused(capsys, name, path, tmp_path / f"out{number}", *flags), message
    run(model, rollouts, tmp_path / "out")
    line = refused_again(capsys, model, rollouts, tmp_path / "out", "--gamma-p", 0.5)
    assert "made with other gamma_p" in line


def refused_again(capsys, model, rollouts, out, *flags):
    """What a command says beside a finished output of another command."""
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train.main(arguments(model, rollouts, out, *flags))
    return capsys.readouterr().err


PASSK = ["--method", f"{RIVALS}:passk"]


@pytest.mark.parametrize("flags, message", [
    (["--gamma-p", "nan"], "finite"), (["--lr", "inf"], "finite"), (["--lr", -1], "at least 0"),
    (["--updates", 0], "at least 1"), (["--seed", -1], "--seed must be at least 0"),
    (["--clip-low", -1], "at least 0"), (["--micro-batch-tokens", 0], "at least 1"),
    (["--temperature", 0], "above 0"), (["--max-grad-norm", 0], "above 0"),
    (["--tis-cap", 0], "above 0"), (["--rehearse", "x", "--rehearse-coef", -1], "above 0"),
    (["--kl-coef", 1], "go together"), (["--ref-model", "x"], "go together"),
    (["--rehearse", "x"], "go together"), (["--rehearse-coef", 0.1], "go together"),
    (["--rehearse-n", 3], "belong to --rehearse"), (["--unknown"], "unrecognized arguments"),
    (["--rehearse-weight", "samples"], "belong to --rehearse"),
    (["--checkpoint-activations", "--share-prompts"], "--share-prompts excludes"),
    (["--shard", "--share-prompts"], "--share-prompts excludes"),
    (["--method", "ppo"], "neither ds-grpo nor grpo nor FILE.py:NAME"),
    (["--method", "absent.py:x"], "no such file"), (["--method", "absent.py"], "neither"),
    (["--method", f"{RIVALS}:a-b"], "neither"),
    (["--method", "grpo", "--gamma-p", 1], "--gamma-p belongs to --method ds-grpo"),
    (["--method", "grpo", "--gamma-n", "-1e-3"], "--gamma-n belongs"),
    (["--method", "grpo", "--smooth-level", "token"], "--smooth-level belongs"),
    ([*PASSK, "--gamma-p", 1], "--gamma-p belongs to --method ds-grpo"),
    ([*PASSK, "--adv-norm", "std"], "--adv-norm belongs to"),
    (["--smooth-level", "reward", "--adv-norm", "std"], "--adv-norm"),
    (["--arm", "k=1"], "--arm belongs to --method FILE.py:NAME"),
    ([*PASSK, "--arm", "k"], "KEY=VALUE"), ([*PASSK, "--arm", "k=nan"], "finite"),
    ([*PASSK, "--arm", "k=1", "--arm", "k=2"], "given twice")])
def test_wrong_flags(flags, message, capsys):
    with pytest.raises(SystemExit) as error:
        arguments("m", "r", "o", *flags)
    lines = capsys.readouterr().err.splitlines()
    assert error.value.code == 2 and len(lines) == 1 and message in lines[0]


# ---- Rehearsal and other engines -----------------------------------------------------------------
def rehearsal(model, tmp_path):
    """A scored file of the base, groups of several sizes, one right answer a problem, one of them
    twice; and the answers' ids."""
    chosen = [1, 4, 6, 0]
    rows, answers = make_rows(model, [VERDICTS[g] for g in chosen], [LENGTHS[g] for g in chosen],
                              seed=7), []
    rows = [row for row in rows if (row["id"], row["sample"]) != ("p/3", 2)]
    for row in rows:
        if row["correct"] and row["completion_ids"]:
            answers.append((row["prompt_ids"], row["completion_ids"]))
    rows.append({**rows[7], "sample": 9})
    return write(tmp_path / "base.jsonl", rows), answers


def test_rehearsal_is_the_mean_log_prob_of_right_answers_of_the_base(model, rollouts, tmp_path,
                                                                     fp64):
    """loss -= c mean log pi over the drawn tokens: here every problem has one distinct answer,
    drawn twice; loss, gradient, metric."""
    path, answers = rehearsal(model, tmp_path)
    assert len(answers) == 3
    flags = ["--method", "grpo", "--max-grad-norm", 1e9, "--micro-batch-tokens", 30]
    plain = run(model, rollouts, tmp_path / "plain", *flags)
    found = run(model, rollouts, tmp_path / "out", *flags, "--rehearse", path, "--rehearse-coef",
                0.5, "--rehearse-n", 6)
    policy = load(model)
    nll = [-logp for prompt, completion in answers
           for logp, _ in tokens_of(policy, prompt, completion)]
    nll = sum(nll) / len(nll)
    (0.5 * nll).backward()
    expected = {f"{name}.exp_avg": weight.grad + plain.gradient[f"{name}.exp_avg"]
                for name, weight in policy.named_parameters()}
    assert distance(found.gradient, expected) < 1e-9
    line, before = found.metrics[0], without_timings(plain.metrics[0])
    assert line["rehearse_nll"] == pytest.approx(nll.item())
    assert line["loss"] == pytest.approx(before["loss"] + 0.5 * nll.item())
    same_metrics(line, {**before, **{key: line[key] for key in ("loss", "grad_norm",
                                                               "rehearse_nll")}})


def test_lowered_log_probs_scale_the_gradient_up_to_the_cap(model, tmp_path, fp64):
    """--tis-cap: an engine whose log-probs lie d below the trainer's: min(e^d, C) times."""
    rows, policy = make_rows(model), load(model)
    flags, rounds = ["--method", "grpo", "--max-grad-norm", 1e9, "--tis-cap", 2], []
    for d, capped in (0.0, 0), (0.5, 0), (1.0, 1):
        for row in rows:
            tokens = tokens_of(policy, row["prompt_ids"], row["completion_ids"])
            row["logprobs"] = [logp.item() - d for logp, _ in tokens]
        path = write(tmp_path / f"{d}.jsonl", rows)
        rounds.append(run(model, path, tmp_path / f"{d}", *flags))
        factor, line = min(math.exp(d), 2), rounds[-1].metrics[0]
        assert line["tis_mean"] == pytest.approx(factor) and line["tis_capped_frac"] == capped
        scaled = {name: factor * gradient for name, gradient in rounds[0].gradient.items()}
        assert distance(rounds[-1].gradient, scaled) < 1e-6


def test_two_threads_give_the_same_gradient_every_time(tiny_model):
    """The gradients of a prompt that is repeated for its rows are added in one order, whatever
    thread is the first."""
    rng = random.Random(0)
    policy = train.Policy(train.load_model(tiny_model, torch.float32, "cpu", {}), 1.0, True)
    prompts, completions = [], []
    for _ in range(14):
        prompt = [rng.randrange(3, 20) for _ in range(rng.randint(14, 20))]
        for _ in range(rng.randint(9, 17)):
            prompts.append(prompt)
            ids = [rng.randrange(3, 20) for _ in range(rng.randint(6, 20))]
            completions.append(np.array(ids))

    def gradient():
        policy.zero_grad()
        logp, _ = policy(prompts, completions)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        return [weight.grad.clone() for weight in policy.parameters()]

    torch.set_num_threads(2)
    try:
        first = gradient()
        for _ in range(2):
            assert all(torch.equal(a, b) for a, b in zip(first, gradient(), strict=True))
    finally:
        torch.set_num_threads(1)


