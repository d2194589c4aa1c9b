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
import pathlib
import random
import re
import shutil

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers.models.qwen2 import modeling_qwen2

import conftest
import evaluate
import train
from conftest import meta_of, read, refusal
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
SAMPLING = {"temperature": T, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0}


# ---- A toy model and rows made by hand -----------------------------------------------------------
def make_model(folder, seed, **config):
    """A random two-layer Qwen2 whose tokens are far from equally likely, with a word tokenizer."""
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
    pathlib.Path(folder, "generation_config.json").write_text(
        '{"eos_token_id": [0, 5], "top_k": 20, "do_sample": false}')
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
# finish_reason "length"; (3, 0) is wrong with a reward, (6, 1) the only right one of its group.
CUT = {(2, 2), (3, 0), (5, 1), (6, 1), (6, 3)}


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
            row = {"id": f"p/{g}", "sample": k, "prompt_ids": prompt,
                   "completion_ids": [rng.randrange(VOCAB) for _ in range(lengths[g][k])],
                   "finish_reason": "length" if [g, k] in cut else "stop",
                   "correct": bool(correct), "reward": reward, "task": "toy"}
            with torch.no_grad():
                row["logprobs"] = [float(np.float32(logp.item() + rng.uniform(-1e-2, 1e-2)))
                                   for logp, _ in tokens_of(policy, row)]
            rows.append(row)
    return json.dumps(rows)


def write(path, rows, sampling=SAMPLING):
    if sampling:
        conftest.write(f"{path}.meta.json", [{"sampling": sampling}])
    return str(conftest.write(path, rows))


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
        self.metrics = read(f"{folder}/metrics.jsonl")
        self.step = json.loads(pathlib.Path(folder, "trainer_state.json").read_text())["step"]
        self.meta = meta_of(folder)


def arguments(model, rollouts, out, *flags):
    return train.parse_args(["--model", model, "--rollouts", rollouts, "--out", str(out),
                             *map(str, flags)])


def run(model, rollouts, out, *flags):
    """A round, whose weights and metrics are finite."""
    train.main(arguments(model, rollouts, out, *flags))
    os.close(files.claim.lock)
    done = Round(out)
    assert all(torch.isfinite(weight).all() for weight in done.weights.values())
    assert all(math.isfinite(value or 0) for line in done.metrics for value in line.values())
    return done


def use_fp64(setattr=setattr):
    """Put train.py in fp64: the model, its norms (which transformers computes in fp32), the rewards
    and all that follows from them."""
    def norm(self, x):
        return self.weight * x * (x.square().mean(-1, keepdim=True) + self.variance_epsilon).rsqrt()

    setattr(train, "load_model", load)
    setattr(train, "empty_model", functools.partial(models.empty_model, dtype=torch.float64))
    setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def fp64(monkeypatch):
    use_fp64(monkeypatch.setattr)
    yield
    torch.set_default_dtype(torch.float32)


def distance(a, b):
    """|a - b| / |b| over all tensors of two dictionaries; 0 where all are zeros."""
    assert a.keys() == b.keys()
    square = sum((a[key].double() - b[key].double()).square().sum() for key in a)
    return (square / sum(b[key].double().square().sum() for key in b).clamp(1e-99)).sqrt().item()


def without_timings(metrics):
    return {key: value for key, value in metrics.items() if key not in TIMINGS}


def same_metrics(found, expected, tolerance=1e-6):
    assert found.keys() - TIMINGS == expected.keys() - TIMINGS
    for key, value in without_timings(expected).items():
        near = None if value is None else pytest.approx(value, rel=tolerance, abs=tolerance)
        assert found[key] == near, key
    assert found["tokens_per_s"] >= 0 and found["peak_mem_bytes"] > 1e6


def same_round(found, expected):
    """A Round is that of the oracle, or another Round: in fp64."""
    assert distance(found.moments, expected.moments) < 1e-9
    assert distance(found.weights, expected.weights) < 1e-9
    assert found.step == expected.step
    for line, other in zip(found.metrics, expected.metrics, strict=True):
        same_metrics(line, other)


# ---- The oracle ----------------------------------------------------------------------------------
def load(folder, *_):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)


def tokens_of(policy, row):
    """[(log-prob, entropy)] of each completion token, from the model's own logits, without batch,
    padding or cache."""
    prompt, completion = row["prompt_ids"], row["completion_ids"]
    logits = policy(torch.tensor([prompt + completion]), use_cache=False).logits[0] / T
    return [(logp[token], -(logp.exp() * logp).sum()) for token, logp
            in zip(completion, torch.log_softmax(logits[len(prompt) - 1:], -1))]


def mean_of(numbers):
    return math.fsum(numbers) / len(numbers)


def std_of(numbers):
    return math.sqrt(mean_of([(x - mean_of(numbers)) ** 2 for x in numbers]))  # of the population


def sampled_means(group):
    """Mean log-prob of each rollout, as the sampler wrote it into the rows."""
    return [mean_of(row["logprobs"]) if row["logprobs"] else 0.0 for row in group]


def scores_of(args, group):
    """What the tokens of each row of a group have in common in their advantage."""
    rewards = [row["reward"] for row in group]
    if args.smooth_level == "reward":
        rewards = [row["reward"] + (-args.gamma_p if row["correct"] else args.gamma_n) * mean
                   for row, mean in zip(group, sampled_means(group))]
    scores = [r - mean_of(rewards) for r in rewards]
    if args.adv_norm == "none" or args.smooth_level == "reward":
        return scores
    return [score / (std_of(rewards) + 1e-6) for score in scores]


def advantages(args, group, scores):
    """The advantage of every token of one group: a list of advantages a row."""
    result = []
    for row, score in zip(group, scores):
        total, length = math.fsum(row["old"]), max(len(row["old"]), 1)
        gamma = -(args.gamma_p or 0) if row["correct"] else args.gamma_n or 0
        smooth = {"sum": total, "mean": total / length, "share": total / length ** 2}
        smooth = [logp if args.smooth_level == "token" else smooth.get(args.smooth_level, 0.0)
                  for logp in row["old"]]
        result.append([score + gamma * of_token for of_token in smooth])
    return result


class Oracle:
    """Rounds of train.py in plain loops: `weights`, `gradient` (the last, before clipping),
    `moments`, `metrics`, `step`.

    scores(args, group): GRPO's, or those of another objective; answers: all that are rehearsed.
    """

    def __init__(self, folder, scores=scores_of, answers=()):
        self.policy, self.scores, self.answers = load(folder), scores, answers
        self.metrics, self.step, self.weights = [], 0, dict(self.policy.named_parameters())
        self.moments = {f"{name}.{key}": torch.zeros_like(weight)
                        for name, weight in self.weights.items()
                        for key in ("exp_avg", "exp_avg_sq")}

    def round(self, rows, *flags):
        args, groups = arguments("m", "r", "o", *flags), {}
        for row in rows:
            cut = row["finish_reason"] == "length" and args.truncated == "wrong"
            reward = 0.0 if cut and not row["correct"] else row["reward"]
            groups.setdefault(row["id"], []).append({**row, "reward": reward})
        groups = [sorted(group, key=lambda row: row["sample"]) for group in groups.values()]
        order = np.random.default_rng([args.seed, self.step]).permutation(len(groups)).tolist()
        reference = load(args.ref_model) if args.ref_model else None
        with torch.no_grad():  # before any update
            for row in sum(groups, []):
                row["old"] = [logp.item() for logp, _ in tokens_of(self.policy, row)]
                if reference:
                    row["ref"] = [logp.item() for logp, _ in tokens_of(reference, row)]
        for u in range(args.updates):  # the first of them get one group more
            size = len(groups) // args.updates + (u < len(groups) % args.updates)
            self.update(args, [groups[g] for g in order[:size]])
            order = order[size:]
        return self

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
        weight = math.exp(old - row["logprobs"][t])
        if args.tis_cap:
            loss = loss * min(weight, args.tis_cap)
        of_kind = args.entropy_coef_correct if row["correct"] else args.entropy_coef_wrong
        loss = loss - (args.entropy_coef + of_kind) * entropy
        if args.kl_coef:
            d = row["ref"][t] - logp
            loss = loss + args.kl_coef * (d.exp() - d - 1)
        gamma = (args.gamma_p if row["correct"] else args.gamma_n) or 0.0
        return loss, {
            "entropy": entropy.item(), "correct": row["correct"], "nll": -logp.item(), "low": low,
            "high": high, "gap": abs(old - row["logprobs"][t]), "rho": rho.item(), "adv": adv,
            "smooth": abs(gamma * old), "kl": rho.item() - 1 - (logp.item() - old),
            "tis": min(weight, args.tis_cap or 0), "capped": weight > (args.tis_cap or 0)}

    def update(self, args, groups):
        members, seen, losses = sum(groups, []), [], [torch.zeros(())]
        for group in groups:
            for row, of_row in zip(group, advantages(args, group, self.scores(args, group))):
                if row["finish_reason"] == "length" and args.truncated == "mask":
                    continue
                for t, (logp, entropy) in enumerate(tokens_of(self.policy, row)):
                    loss, numbers = self.token(args, row, t, logp, entropy, of_row[t])
                    losses.append(loss)
                    seen.append(numbers)
        loss, nll = sum(losses) / len(seen), [-logp for row in self.answers
                                              for logp, _ in tokens_of(self.policy, row)]
        if nll:
            loss = loss + args.rehearse_coef * sum(nll) / len(nll)
        self.policy.zero_grad()
        loss.backward()
        self.gradient = {f"{name}.exp_avg": weight.grad.clone()
                         for name, weight in self.weights.items()}
        norm = math.sqrt(sum(grad.square().sum().item() for grad in self.gradient.values()))
        lr = args.lr * min(1.0, (self.step + 1) / max(args.warmup_steps, 1))
        self.step += 1
        with torch.no_grad():
            for name, weight in self.weights.items():  # clipped, then AdamW
                gradient = weight.grad * min(1.0, args.max_grad_norm / (norm + 1e-6))
                m, v = self.moments[f"{name}.exp_avg"], self.moments[f"{name}.exp_avg_sq"]
                m.copy_(0.9 * m + 0.1 * gradient)
                v.copy_(0.999 * v + 0.001 * gradient ** 2)
                weight.mul_(1 - lr * args.weight_decay)
                root = (v / (1 - 0.999 ** self.step)).sqrt() + 1e-8
                weight.sub_(lr * (m / (1 - 0.9 ** self.step)) / root)

        def mean(key, tokens=seen):
            return mean_of([token[key] for token in tokens])

        line = {
            "step": self.step, "lr": lr, "tokens": len(seen), "loss": loss.item(),
            "grad_norm": norm, "truncated_frac": mean_of([row["finish_reason"] == "length"
                                                          for row in members]),
            "reward": mean_of([row["reward"] for row in members]),
            "pass@1": mean_of([row["correct"] for row in members]),
            "pass@n": mean_of([any(row["correct"] for row in group) for group in groups]),
            "entropy": mean("entropy"),
            "entropy_correct": mean("entropy", [x for x in seen if x["correct"]]),
            "entropy_wrong": mean("entropy", [x for x in seen if not x["correct"]]),
            "nll": mean("nll"), "smooth_abs": mean("smooth"), "approx_kl": mean("kl"),
            "logprob_gap": mean("gap"), "logprob_gap_max": max(x["gap"] for x in seen),
            "ratio_max": max(x["rho"] for x in seen),
            "clip_low_frac": mean("low"), "clip_high_frac": mean("high"),
            "adv_std": std_of([x["adv"] for x in seen]),
            "dead_groups": mean_of([len({row["reward"] for row in group}) == 1
                                    for group in groups]),
            "completion_len": mean_of([len(row["completion_ids"]) for row in members])}
        if args.tis_cap:
            line |= {"tis_mean": mean("tis"), "tis_capped_frac": mean("capped")}
        if nll:
            line["rehearse_nll"] = (sum(nll) / len(nll)).item()
        self.metrics.append(line)


ARMS = [  # flags of train.py
    "", "--smooth-level sum --gamma-p 0.05 --gamma-n 0.02",
    "--smooth-level mean --gamma-p 0.3 --gamma-n 0.1",
    "--smooth-level share --gamma-p 0.5 --gamma-n 0.3",
    "--smooth-level reward --gamma-p 0.2 --gamma-n 0.1",
    "--gamma-p 0.3 --gamma-n 0", "--gamma-p 0.2 --gamma-n -0.2", "--adv-norm none",
    "--method grpo", "--method grpo --adv-norm none", "--method CISPO",
    "--method grpo --entropy-coef 0.3", "--method grpo --kl-coef 0.5 --ref-model REFERENCE",
    "--method grpo --entropy-coef-correct 0.5 --entropy-coef-wrong -0.2",
    "--truncated mask --gamma-p 0.3", "--truncated mask --smooth-level reward --gamma-p 0.3",
    "--method grpo --tis-cap 1.001",
    "--smooth-level mean --entropy-coef 0.1 --entropy-coef-wrong -0.2 --truncated mask --seed 3 "
    "--clip-low 0.05 --clip-high 0.1 --warmup-steps 2 --weight-decay 0.1 --tis-cap 1.001 "
    "--kl-coef 0.2 --ref-model REFERENCE",
    "--micro-batch-tokens 1", "--micro-batch-tokens 4096", "--no-share-prompts",
    "--checkpoint-activations"]


@pytest.mark.parametrize("arm", ARMS)
def test_oracle(arm, model, reference, rollouts, tmp_path, fp64):
    """Three updates of every arm in micro-batches: loss, weights, moments and every metric; with
    them the one normaliser of all micro-batches, prompts of several lengths that are shared, the
    clipped ratios, pi_old of all groups taken before the first update, gradient clipping, warm-up
    and Adam's bias correction."""
    names = {"REFERENCE": reference, "CISPO": f"{RIVALS}:cispo"}
    flags = ["--updates", 3, "--lr", 0.03, "--micro-batch-tokens", 20, "--max-grad-norm", 0.2,
             *[names.get(flag, flag) for flag in arm.split()]]
    found, oracle = run(model, rollouts, tmp_path / "out", *flags), Oracle(model)
    same_round(found, oracle.round(make_rows(model), *flags))
    assert oracle.metrics[0]["grad_norm"] > 1e-2
    assert max(line["clip_high_frac"] for line in oracle.metrics) > 0
    assert max(line["clip_low_frac"] for line in oracle.metrics) > 0 or "CISPO" in arm
    first = found.metrics[0]
    assert first["ratio_max"] == pytest.approx(1, abs=1e-5)
    assert first["clip_low_frac"] == first["clip_high_frac"] == 0
    assert abs(first["entropy"] - first["nll"]) > 0.05  # two different things


def test_oracle_in_fp32(model, rollouts, tmp_path):
    """As it is run: fp32 gives the oracle's loss and gradient to 1e-6."""
    found = run(model, rollouts, tmp_path / "out", "--max-grad-norm", 1e9)
    oracle = Oracle(model).round(make_rows(model))
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
                   f"length {line['completion_len']:.1f}  truncated 0.179\n")
    readme = pathlib.Path(train.__file__).with_name("data") / "README.md"
    assert set(line) <= set(re.findall(r"[\w@]+", readme.read_text()))


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
            [(train.grpo, {}), (train.grpo, {"adv_norm": "none"}), (arms.cispo, {})],
            [0.0, 0.1, 1 / 3, -7.7], [1, 2, 3, 7, 8, 12]):
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


PPO = functools.partial(train.clipped_loss, clip_low=0.2, clip_high=0.25)
CISPO = functools.partial(arms.cispo_loss, clip_high=0.25)


@pytest.mark.parametrize("loss_of, ratio, adv, loss, slope, clipped", [
    (PPO, 1.5, 1, -1.25, 0, "high"), (PPO, 1.5, -1, 1.5, 1.5, ""), (PPO, 0.5, 1, -0.5, -0.5, ""),
    (PPO, 0.5, -1, 0.8, 0, "low"), (PPO, 1.0, 1, -1.0, -1.0, ""), (PPO, 1.0, -1, 1.0, 1.0, ""),
    (CISPO, 2.0, 1, 1.25, -1.25, "high"), (CISPO, 2.0, -1, -1.25, 1.25, "high"),
    (CISPO, 0.5, -1, -0.5, 0.5, ""), (CISPO, 0.01, 1, 0.01, -0.01, ""),
    *[(arms.oreal_loss, *case, None) for case in [(2.0, 3, 3.0, -3.0), (2.0, -1, 2.0, 2.0),
                                                  (0.5, -1, 0.5, 0.5)]]])
def test_losses_of_one_token_by_hand(loss_of, ratio, adv, loss, slope, clipped):
    """PPO's: a token is cut, and loses its gradient, only where the step would go further in the
    direction that it has already gone. CISPO's (arXiv 2506.13585): the cut ratio is a constant
    weight of log pi; no token loses its gradient; no lower cut. OREAL's: right rollouts are cloned,
    also where rho is 2; of wrong ones the gradient grows with rho."""
    logp = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    old, row = logp.detach() - math.log(ratio), torch.tensor([0])
    batch = train.Batch(None, torch.tensor([[adv > 0]]), None, old, row)
    found = loss_of(logp, batch, torch.tensor([float(adv)]))
    if clipped is not None:
        found, low, high = found
        assert (low.item(), high.item()) == (clipped == "low", clipped == "high")
    found.sum().backward()
    assert (found.item(), logp.grad.item()) == pytest.approx((loss, slope))


def test_numerics_log_probs_of_minus_ten_thousand():
    """A ratio beyond fp32 must not turn a cut token's gradient into 0 * inf, nor a metric into
    infinity; k3 is exact for small differences, 0 for none, and never negative."""
    values = torch.cat([-torch.logspace(-7, 4, 100), torch.zeros(1)])
    new, old, adv = torch.cartesian_prod(values, values, torch.tensor([-1.0, 0.0, 1.0])).unbind(1)
    batch = train.Batch(None, None, None, old)
    for losses in PPO, CISPO:
        logp = new.clone().requires_grad_()
        loss = losses(logp, batch, adv)[0] + train.k3(logp, old)
        loss.sum().backward()
        assert torch.isfinite(loss).all() and torch.isfinite(logp.grad).all()
    assert (train.k3(new, old) >= 0).all() and (train.k3(values, values) == 0).all()
    near = values * (1 + 1e-6)  # where exp(d) - d - 1, as it is written, loses all digits in fp32
    assert (train.k3(values, near) >= 0).all()
    torch.testing.assert_close(train.k3(values.double(), near.double()),
                               (near.double() - values.double()) ** 2 / 2, rtol=1e-2, atol=1e-20)


GAMMAS, NORM = st.sampled_from([0, 10, -1, 0.01]), {"adv_norm": st.sampled_from(["std", "none"])}
LEVELS = st.sampled_from(["token", "sum", "mean", "share", "reward"])
FUZZED = {train.ds_grpo: {"gamma_p": GAMMAS, "gamma_n": GAMMAS, "smooth_level": LEVELS, **NORM},
          train.grpo: NORM, arms.passk: {"k": st.integers(1, 4)},
          **dict.fromkeys([arms.cispo, arms.w_reinforce, arms.boundary, arms.unsolved, arms.oreal,
                           arms.drpo, arms.maxrl, arms.rs, arms.ucpo], {})}


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 5))
def test_fuzz_advantage(data, groups, n):
    """Any rewards, verdicts and settings: finite, zero-mean where the formula says so, and the same
    whatever order the tokens stand in."""
    verdicts = data.draw(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), st.booleans()),
                                  min_size=groups * n, max_size=groups * n))
    reward, correct = (torch.tensor(column).view(groups, n) for column in zip(*verdicts))
    tokens = data.draw(st.lists(st.tuples(st.integers(0, groups * n - 1),
                                          st.floats(-1e4, 0, width=32)), max_size=20))
    row = torch.tensor([row for row, _ in tokens], dtype=torch.long)
    old = torch.tensor([logp for _, logp in tokens])
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


SAMPLES = st.lists(st.tuples(st.integers(0, 30), st.booleans()), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 30), SAMPLES), min_size=1, max_size=6), st.integers(1, 5),
       st.booleans(), st.integers(1, 100))
def test_the_plan_covers_every_row_once(shapes, world, share, budget):
    """Any lengths, any number of ranks: each kept row with tokens once over all ranks, as many
    micro-batches on each rank, and none above its budget unless it is a single row."""
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
    equal = [row_of([2], [0] * 5, g) for g in range(2 * world)]
    plans = [train.plan_update(equal, range(2 * world), rank, world, 100, share)
             for rank in range(world)]
    assert [len(sum(plan, [])) for plan in plans] == [2] * world


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
    deals = [train.deal(7, 3, 4, seed, step) for seed, step in ((0, 0), (0, 4), (1, 0), (0, 0))]
    assert deals[0] == deals[3]
    assert deals[0] != deals[1] != deals[2] != deals[0]
    for deal in deals:
        assert sorted(map(len, deal)) == [3, 6, 6, 6] and sorted(sum(deal, [])) == list(range(21))
        assert all({i // 3 * 3 + k for i in rows for k in range(3)} == set(rows) for rows in deal)


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


def test_no_more_passes_than_are_needed(model, rollouts, tmp_path, monkeypatch):
    """pi_old of the first update is its own forward pass; that of later ones is computed before any
    step. The budget of a micro-batch is kept; recomputed activations take another pass; by default
    a prompt is computed once for its rollouts. GRPO's dead groups take no backward pass."""
    calls, layers, forward, layer = [], [], train.forward, modeling_qwen2.Qwen2MLP.forward
    monkeypatch.setattr(train, "forward",
                        lambda *args: calls.append(torch.is_grad_enabled()) or forward(*args))
    monkeypatch.setattr(modeling_qwen2.Qwen2MLP, "forward",
                        lambda self, x: layers.append(x[..., 0].numel()) or layer(self, x))
    for number, (flags, expected) in enumerate([
            (["--micro-batch-tokens", 1], [True] * 27), (["--checkpoint-activations"], [True]),
            (["--updates", 3], [False] * 2 + [True] * 3), (["--smooth-level", "reward"], [True]),
            (["--method", "grpo"], [False, True]),
            (["--method", "grpo", "--entropy-coef-wrong", 1], [True]), ([], [True])]):
        calls.clear()
        layers.clear()
        run(model, rollouts, tmp_path / f"out{number}", "--no-share-prompts", *flags)
        assert calls == expected
        # in each of two layers; the check of the head takes two passes
        assert len(layers) == 2 * (2 + len(calls) + ("--checkpoint-activations" in flags))
    repeated = sum(layers)  # positions
    layers.clear()
    run(model, rollouts, tmp_path / "shared")
    assert sum(layers) < 0.8 * repeated


def test_what_a_group_samples_again_and_again_is_computed_once(model, tmp_path, monkeypatch, fp64):
    """Three of a group's four are alike: half are left out, and it is the oracle's update."""
    rows, counts, hidden_of = make_rows(model), [], train.shared_hidden
    for i in range(0, len(rows), 4):
        for key in ("completion_ids", "logprobs"):
            rows[i + 1][key] = rows[i + 2][key] = rows[i][key]
    monkeypatch.setattr(train, "shared_hidden", lambda model, prompts, completions: counts.append(
        len(completions)) or hidden_of(model, prompts, completions))
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out")
    same_round(found, Oracle(model).round(rows))
    run(model, write(tmp_path / "others.jsonl", make_rows(model)), tmp_path / "others")
    assert 14 in counts and counts[-1] == max(counts) == 27  # of 28 one is empty


def test_an_update_of_dead_groups_alone(model, tmp_path, fp64):
    """GRPO learns nothing from it; its metrics are there."""
    rows, flags = make_rows(model, VERDICTS[1:3], LENGTHS[1:3]), ["--method", "grpo"]
    path = write(tmp_path / "rows.jsonl", rows)
    same_round(run(model, path, tmp_path / "out", *flags), Oracle(model).round(rows, *flags))


def test_empty_completions_and_the_length_limit(model, tmp_path):
    """Updates without any token, with one, and at the model's 64 positions."""
    lengths = [[0, 0, 0, 0], [0, 0, 0, 1], [1, 1, 1, 1], [58, 59, 1, 0]]
    path = write(tmp_path / "rows.jsonl", make_rows(model, [VERDICTS[0]] * 4, lengths, cut=()))
    for number, flags in enumerate([[], ["--smooth-level", "mean"], ["--smooth-level", "reward"],
                                    ["--no-share-prompts"], ["--method", "grpo"]]):
        found = run(model, path, tmp_path / f"out{number}", *flags, "--updates", 4)
        assert sorted(line["tokens"] for line in found.metrics) == [0, 1, 4, 118]


def test_truncated_rollouts(model, tmp_path, capsys):
    """All cut: under `mask` nothing is learned from, though they stay in the statistics. score.py
    calls a cut completion correct where the whole answer stands in it, and it stays so: pass@1 is
    evaluate.py's."""
    everything = {(g, k) for g in range(7) for k in range(4)}
    path = write(tmp_path / "rows.jsonl", make_rows(model, cut=everything))
    masked = run(model, path, tmp_path / "mask", "--truncated", "mask", "--weight-decay", 0)
    assert "100% of the completions were cut" in capsys.readouterr().err
    (line,), right = masked.metrics, sum(correct for group in VERDICTS for correct, _ in group)
    assert line["tokens"] == line["grad_norm"] == 0 and line["truncated_frac"] == 1
    assert line["pass@1"] == pytest.approx(right / 28)
    assert line["entropy_correct"] is line["entropy_wrong"] is None
    assert distance(masked.weights, load_file(f"{model}/model.safetensors")) == 0


@pytest.mark.parametrize("kind", ["sampler at -1e4", "policy at -1e4", "one sample"])
def test_numerics_stay_finite(kind, model, tmp_path):
    rows, folder = make_rows(model, VERDICTS[2:6], LENGTHS[2:6], cut=()), model
    if kind == "one sample":
        rows = [row for row in rows if row["sample"] == 0]
    if kind == "sampler at -1e4":
        rows = [{**row, "logprobs": [-1e4] * len(row["logprobs"])} for row in rows]
    if kind == "policy at -1e4":
        folder = shutil.copytree(model, str(tmp_path / "sharp"))
        weights = load_file(f"{folder}/model.safetensors")
        weights["model.norm.weight"] *= 5000
        save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    path = write(tmp_path / "rows.jsonl", rows)
    for number, flags in enumerate([
            ["--gamma-p", 0, "--gamma-n", 0], ["--gamma-p", 10, "--gamma-n", 10],
            ["--gamma-p", 10, "--gamma-n", -10, "--smooth-level", "reward"],
            *[["--method", f"{RIVALS}:{name}"] for name in ("cispo", "oreal", "drpo")]]):
        found = run(folder, path, tmp_path / f"out{number}", *flags, "--updates", 2, "--lr", 0.1)
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
    kept = read(f"{out}.refused.jsonl")
    assert len(kept) == 12
    rows = {(row["id"], row["sample"]): row for row in make_rows(model)}
    for row in kept:
        row["task"] = "toy"
        assert row.pop("where").startswith(f"{rollouts}:")
        assert row.pop("logprobs") == pytest.approx(rows[row["id"], row["sample"]].pop("logprobs"))
        assert row == rows[row["id"], row["sample"]]
    again = run(model, f"{out}.refused.jsonl", tmp_path / "again", "--temperature", T)
    assert again.metrics[0]["tokens"] == sum(len(row["completion_ids"]) for row in kept)


# ---- The folder and the next round ---------------------------------------------------------------
def test_the_folder_is_an_ordinary_model(model, rollouts, tmp_path):
    """fp32, two moments of each weight, files that all may read alike; the generation_config.json
    of the model, or none. test_models.py reloads it."""
    bare = shutil.copytree(model, tmp_path / "bare")
    os.remove(bare / "generation_config.json")
    ours = ["config.json", "metrics.jsonl", "model.safetensors", "optimizer.safetensors",
            "tokenizer.json", "tokenizer_config.json", "trainer_state.json"]
    for source, more in (model, ["generation_config.json"]), (str(bare), []):
        found = run(source, rollouts, tmp_path / f"out{len(more)}")
        assert sorted(os.listdir(found.folder)) == sorted(ours + more)
        tensors = [*found.weights.values(), *found.moments.values()]
        assert all(tensor.dtype == torch.float32 for tensor in tensors)
        assert set(found.moments) == {f"{name}.{key}" for name in found.weights
                                      for key in ("exp_avg", "exp_avg_sq")}
        # whoever may read the config may read the weights
        assert len({os.stat(f"{found.folder}/{name}").st_mode for name in ours + more}) == 1


def test_the_next_round_goes_on(model, rollouts, tmp_path, fp64, capsys):
    """Two rounds through files are two rounds in one process: weights, moments, Adam's step,
    warm-up and metrics are carried on."""
    rows = make_rows(model, seed=9)
    second = write(tmp_path / "rows.jsonl", rows)
    flags = ["--lr", 0.01, "--warmup-steps", 4, "--updates", 2]
    one = run(model, rollouts, tmp_path / "one", *flags)
    two = run(one.folder, second, tmp_path / "two", *flags)
    same_round(two, Oracle(model).round(make_rows(model), *flags).round(rows, *flags))
    assert two.step == 4 and [line["step"] for line in two.metrics] == [1, 2, 3, 4]
    assert two.metrics[:2] == one.metrics

    run(one.folder, second, tmp_path / "reset", "--reset-optimizer")
    # Moments that are not read are no input, and are not hashed; those of a reference are not.
    kl = ["--kl-coef", 0.1, "--ref-model", one.folder]
    run(model, rollouts, tmp_path / "kl", *kl)
    os.truncate(f"{one.folder}/optimizer.safetensors", 9)
    train.main(arguments(model, rollouts, tmp_path / "kl", *kl))
    assert "complete, left alone" in capsys.readouterr().err
    train.main(arguments(one.folder, second, tmp_path / "reset", "--reset-optimizer"))
    assert "complete, left alone" in capsys.readouterr().err
    assert "made with other inputs;" in refused(capsys, one.folder, second, tmp_path / "two",
                                                *flags)


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

    bare = shutil.copytree(first.folder, tmp_path / "bare")
    for name in "optimizer.safetensors", "trainer_state.json", "metrics.jsonl":
        os.remove(bare / name)
    again, fresh = (run(str(folder), rollouts, tmp_path / f"{number}-of-all", "--reset-optimizer")
                    for number, folder in enumerate((first.folder, bare)))
    assert again.step == 4 and fresh.step == 1
    assert distance(again.moments, fresh.moments) == distance(again.weights, fresh.weights) == 0


def test_the_same_bits_again_and_a_finished_round_is_left_alone(model, rollouts, tmp_path, capsys):
    flags, out = ["--updates", 3, "--lr", 0.01, "--entropy-coef", 0.1], tmp_path / "out"
    one = run(model, rollouts, tmp_path / "one", *flags)
    os.makedirs(f"{out}.partial/checkpoints")  # what a killed run may leave
    for name in "model.safetensors", "checkpoints/x":
        pathlib.Path(f"{out}.partial", name).write_text("torn")
    two = run(model, rollouts, out, *flags)
    for name in "model.safetensors", "optimizer.safetensors":
        assert (out / name).read_bytes() == (tmp_path / "one" / name).read_bytes()
    assert list(map(without_timings, one.metrics)) == list(map(without_timings, two.metrics))
    other = run(model, rollouts, tmp_path / "seed", *flags, "--seed", 1)
    assert distance(other.weights, one.weights) > 1e-4
    assert not os.path.exists(f"{out}.partial") and not os.path.exists(out / "checkpoints")
    before = os.stat(out / "model.safetensors").st_mtime_ns
    train.main(arguments(model, rollouts, out, *flags))
    assert "complete, left alone" in capsys.readouterr().err
    assert os.stat(out / "model.safetensors").st_mtime_ns == before
    assert two.meta["flags"]["gamma_p"] == 0.01 and two.meta["sampling"]["temperature"] == T
    expected = {"dtype": "float32", "device": "cpu", "attention": "sdpa", "backend": "torch"}
    assert {key: two.meta[key] for key in expected} == expected


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
    assert list(hub.meta["inputs"].values())[1:] == [f"owner/policy@{'1' * 40}",
                                                     f"owner/reference@{'2' * 40}"]


def test_the_temperature_is_the_samplers(model, rollouts, tmp_path):
    """From the meta, or from --temperature where there is none; log-probs and entropies are of
    logits / T."""
    bare = write(tmp_path / "bare.jsonl", make_rows(model), None)
    given = run(model, bare, tmp_path / "given", "--temperature", T)
    both = run(model, rollouts, tmp_path / "both", "--temperature", T)
    assert distance(given.weights, both.weights) == 0 and both.metrics[0]["logprob_gap"] < 1.1e-2
    hot = run(model, bare, tmp_path / "hot", "--temperature", 1).metrics[0]
    assert hot["entropy"] > both.metrics[0]["entropy"] and hot["logprob_gap"] > 0.1
    cut = write(tmp_path / "cut.jsonl", make_rows(model), {**SAMPLING, "top_p": 0.9})
    allowed = run(model, cut, tmp_path / "allowed", "--allow-off-policy")
    assert distance(allowed.weights, both.weights) == 0


# ---- Bad input: one line, exit 2 -----------------------------------------------------------------
def refused(capsys, model, rollouts, out, *flags):
    """The one line on stderr with which train.py ends; nothing was published."""
    before = os.path.exists(out)
    line = refusal(capsys, train.main, arguments(model, rollouts, out, *flags))
    assert line.startswith("train.py: error: ") and os.path.exists(out) == before
    return line


def test_wrong_files(model, rollouts, tmp_path, capsys):
    """Earlier rounds, references, flags that do not go with the rows; models and rows that are
    damaged are in test_generate.py, test_files.py and test_rollouts.py."""
    small, absent = make_model(tmp_path / "small", 0, vocab_size=9), str(tmp_path / "absent")
    weights, state = pathlib.Path(model, "model.safetensors").read_bytes(), "trainer_state.json"
    cases = [([], absent, "no such model folder"),
             (["--updates", 8], model, "--updates 8 is more than the 7 groups of"),
             (["--kl-coef", 1, "--ref-model", absent], model, "no such model folder"),
             (["--kl-coef", 1, "--ref-model", small], model, "beyond the vocabulary of 9"),
             *[(["--device", "cuda"], model, "no CUDA device")] * (not torch.cuda.is_available())]
    for number, (message, files) in enumerate([
            ("cannot be loaded", {"tokenizer.json": b"{}"}),
            ("--reset-optimizer", {state: b'{"step": 3}'}),
            ("--reset-optimizer", {state: b'{"step": 3}', "optimizer.safetensors": b"x" * 100}),
            ("--reset-optimizer", {state: b'{"step": 3}', "optimizer.safetensors": weights}),
            (f"{state}: not a valid state", {state: b"{}"}),
            ("not a valid state", {state: b'{"step": "x"}'})]):
        folder = shutil.copytree(model, tmp_path / f"model-{number}")
        for name, content in files.items():
            (folder / name).write_bytes(content)
        cases.append(([], str(folder), message))
    for number, (flags, folder, message) in enumerate(cases):
        out = tmp_path / f"out{number}"
        assert message in refused(capsys, folder, rollouts, out, *flags), message
    run(model, rollouts, tmp_path / "out")
    assert "made with other gamma_p" in refused(capsys, model, rollouts, tmp_path / "out",
                                                "--gamma-p", 0.5)


WRONG_FLAGS = {  # message: flags
    "finite": ["--gamma-p nan", "--lr inf", "--method PASSK --arm k=nan"],
    "at least 1": ["--updates 0", "--micro-batch-tokens 0"],
    "at least 0": ["--lr -1", "--clip-low -1", "--seed -1"],
    "above 0": ["--temperature 0", "--max-grad-norm 0", "--tis-cap 0",
                "--rehearse x --rehearse-coef -1"],
    "go together": ["--kl-coef 1", "--ref-model x", "--rehearse x", "--rehearse-coef 0.1"],
    "belong to --rehearse": ["--rehearse-n 3", "--rehearse-weight samples"],
    "unrecognized arguments": ["--unknown"],
    "--share-prompts excludes": ["--checkpoint-activations --share-prompts",
                                 "--shard --share-prompts"],
    "neither ds-grpo nor grpo nor FILE.py:NAME": ["--method ppo", "--method absent.py",
                                                  "--method absent.py:a-b"],
    "no such file": ["--method absent.py:x"],
    "--gamma-p belongs to --method ds-grpo": ["--method grpo --gamma-p 1",
                                              "--method PASSK --gamma-p 1"],
    "--gamma-n belongs": ["--method grpo --gamma-n -1e-3"],
    "--smooth-level belongs": ["--method grpo --smooth-level token"],
    "--adv-norm belongs to": ["--method PASSK --adv-norm std",
                              "--smooth-level reward --adv-norm std"],
    "--arm belongs to --method FILE.py:NAME": ["--arm k=1"],
    "KEY=VALUE": ["--method PASSK --arm k"],
    "given twice": ["--method PASSK --arm k=1 --arm k=2"],
}


@pytest.mark.parametrize("message", WRONG_FLAGS)
def test_wrong_flags(message, capsys):
    for flags in WRONG_FLAGS[message]:
        flags = [f"{RIVALS}:passk" if flag == "PASSK" else flag for flag in flags.split()]
        assert message in refusal(capsys, arguments, "m", "r", "o", *flags)


# ---- Rehearsal and other engines -----------------------------------------------------------------
def test_rehearsal_is_the_mean_log_prob_of_right_answers_of_the_base(model, rollouts, tmp_path,
                                                                     fp64):
    """loss -= c mean log pi over the drawn tokens. Here groups have several sizes, and each problem
    one distinct answer, which is drawn twice in each update; one of them was sampled twice."""
    chosen = [1, 4, 6, 0]
    rows = make_rows(model, [VERDICTS[g] for g in chosen], [LENGTHS[g] for g in chosen], seed=7)
    rows = [row for row in rows if (row["id"], row["sample"]) != ("p/3", 2)]
    answers = [row for row in rows if row["correct"]]
    assert len(answers) == 3
    path = write(tmp_path / "base.jsonl", [*rows, {**rows[7], "sample": 9}])
    flags = ["--rehearse", path, "--rehearse-coef", 0.5, "--rehearse-n", 6, "--updates", 2, "--lr",
             0.03, "--micro-batch-tokens", 30]
    found = run(model, rollouts, tmp_path / "out", *flags)
    same_round(found, Oracle(model, answers=answers).round(make_rows(model), *flags))


def test_two_threads_give_the_same_gradient_every_time(tiny_model):
    """The gradients of a prompt that is repeated for its rows are added in one order, whatever
    thread is the first."""
    rng, prompts = np.random.default_rng(0), []
    policy = train.Policy(train.load_model(tiny_model, torch.float32, "cpu", {}), 1.0, True)
    for _ in range(14):
        prompts += [rng.integers(3, 20, rng.integers(14, 21)).tolist()] * int(rng.integers(9, 18))
    completions = [rng.integers(3, 20, rng.integers(6, 21)) for _ in prompts]

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
