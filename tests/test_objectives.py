"""Objectives from files: the eight lines of README.md, what a file may hold, what is refused; and
the rivals of experiments/arms.py against their formulas in loops."""
import itertools
import json
import math
import os

import pytest

import train
from experiments import arms
from test_train import (LENGTHS, RIVALS, VERDICTS, advantage, arguments, distance, fp64,  # noqa: F401
                        load, make_rows, mean_of, model, refused, refused_again, run, sampled_means,
                        scores_of, std_of, tokens_of, write)


OWN = '''def concise(batch, penalty=0.1):
    """Dr. GRPO's advantage, of r - penalty * (length / the longest of the group)."""
    longest = batch.length.max(1, keepdim=True).values.clamp(min=1)
    reward = batch.reward - penalty * batch.length / longest
    advantage = reward - reward.mean(1, keepdim=True)
    return advantage.flatten()[batch.row]
'''


def surrogate(logp, old, adv):
    return -(logp - old).exp() * adv


def gradient_of(model, rows, advantages_of, loss_of=surrogate):
    """The gradient of one update of an objective in plain loops, as Round.gradient holds it."""
    policy, groups, total = load(model), {}, 0
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    for group in groups.values():
        tokens = [[logp for logp, _ in tokens_of(policy, row["prompt_ids"], row["completion_ids"])]
                  for row in group]
        old = [[logp.item() for logp in of_row] for of_row in tokens]
        for i, of_row in enumerate(advantages_of(group, old)):
            for logp, old_logp, adv in zip(tokens[i], old[i], of_row, strict=True):
                total = total + loss_of(logp, old_logp, adv)
    (total / sum(len(row["completion_ids"]) for row in rows)).backward()
    return {f"{name}.exp_avg": weight.grad for name, weight in policy.named_parameters()}


def file_of(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_your_own_objective_of_eight_lines(model, tmp_path, fp64, capsys):
    """As README.md shows it: a file, a function, a setting; the gradient is that of its formula in
    loops."""
    with open(os.path.join(os.path.dirname(train.__file__), "README.md"), encoding="utf-8") as file:
        assert OWN in file.read()
    rows = make_rows(model, cut=())
    path, mine = write(tmp_path / "rows.jsonl", rows), file_of(tmp_path, OWN)
    flags = ["--method", f"{mine}:concise", "--max-grad-norm", 1e9]
    half = [*flags, "--arm", "penalty=0.5"]
    found = run(model, path, tmp_path / "out", *half)

    def advantages_of(group, old):
        longest = max(1, *(len(row["completion_ids"]) for row in group))
        rewards = [row["reward"] - 0.5 * len(row["completion_ids"]) / longest for row in group]
        return [[reward - mean_of(rewards)] * len(of_row) for reward, of_row in zip(rewards, old)]

    assert distance(found.gradient, gradient_of(model, rows, advantages_of)) < 1e-9
    with open(tmp_path / "out.meta.json", encoding="utf-8") as file:
        meta = json.load(file)
    assert meta["flags"]["arm"] == {"penalty": 0.5} and list(meta["inputs"])[-1] == mine
    # Its settings and the file itself belong to the command.
    for other in [*flags, "--arm", "penalty=0.25"], flags:
        line = refused_again(capsys, model, path, tmp_path / "out", *other)
        assert "made with other arm;" in line
    file_of(tmp_path, OWN.replace("0.1", "0.12"))
    line = refused_again(capsys, model, path, tmp_path / "out", *half)
    assert "made with other inputs" in line


def test_an_objective_sees_whole_groups_and_row_fields_and_may_bring_a_loss(model, tmp_path, fp64):
    """mean_logp of all rollouts, whatever the micro-batches; fields of the rows; a loss of one's
    own, with the part of the clip range that it names."""
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
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--method",
                f"{mine}:mine", "--arm", "scale=2", "--arm", "label=x", "--max-grad-norm", 1e9,
                "--micro-batch-tokens", 25)

    def advantages_of(group, old):
        means = sampled_means(group)
        return [[len(row["solution"] or "") + 2 * (mean - mean_of(means))] * len(of_row)
                for row, mean, of_row in zip(group, means, old)]

    def loss_of(logp, old, adv):
        return -(logp - old) * adv * 2

    assert distance(found.gradient, gradient_of(model, rows, advantages_of, loss_of)) < 1e-9
    assert found.metrics[0]["clip_high_frac"] == 0


def test_a_wrong_objective_is_refused_before_a_model_is_loaded(model, tmp_path, capsys,
                                                               monkeypatch):
    monkeypatch.setattr(train, "load_model", None)
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[:1], LENGTHS[:1], cut=()))
    for number, (text, flags, message) in enumerate([
            ("from train import grpo as mine\n"
             "def mine_loss(logp, batch, advantage, clip_high): return logp",
             ["--clip-low", 0.1], "mine_loss does not take it"),
            ("def other(batch): ...", [], "no function mine in this file"),
            ("def mine(batch, k): ...", ["--arm", "j=1"], "has no setting 'j'"),
            ("def mine(batch): ...", ["--arm", "clip_low=1"], "has no setting 'clip_low'"),
            ("def mine(batch): return batch.old_logp\nmine.fields = ('solution',)", [],
             "rows.jsonl:1: missing field 'solution'"),
            ("from __future__ import annotations\nimport dataclasses\n\n@dataclasses.dataclass\n"
             "class Settings:\n    scale: int = 1\n\n"
             "def mine(batch): return batch.old_logp\nmine.fields = ('length',)", [],
             "which a batch holds already")]):
        mine = file_of(tmp_path, text, f"mine{number}.py")
        flags = ["--method", f"{mine}:mine", *flags]
        assert message in refused(capsys, model, path, tmp_path / "out", *flags)


def test_a_mistake_inside_an_objective_is_a_traceback_of_the_users_own_code(model, tmp_path):
    path = write(tmp_path / "rows.jsonl", make_rows(model, VERDICTS[:1], LENGTHS[:1], cut=()))
    for number, (text, kind, message) in enumerate([
            ("def mine(batch): return batch.solution", AttributeError, "no 'solution'"),
            ("def mine(batch): return batch.reward", RuntimeError, "size of tensor"),
            ("def mine(batch): return batch.old_logp.sum()", ValueError, "a value a token"),
            ("import absent_module", ModuleNotFoundError, "absent_module")]):
        flags = ["--method", f"{file_of(tmp_path, text, f'mine{number}.py')}:mine"]
        with pytest.raises(kind, match=message):
            train.main(arguments(model, path, tmp_path / f"out{number}", *flags))


# ---- Rivals --------------------------------------------------------------------------------------
def test_pass_at_k_advantage_against_all_subsets():
    """arXiv 2508.10751: all groups of k out of n answers, a group's reward the largest of its
    answers', its advantage (reward - mean) / std over the groups, an answer's advantage the mean
    over the groups that it is in."""
    for n in range(1, 8):
        for k, wrong in itertools.product(range(1, n + 1), range(n + 1)):
            corrects = [i >= wrong for i in range(n)]
            rewards = [float(correct) for correct in corrects]
            if k == n:  # one subset: nothing to differ within
                with pytest.raises(ValueError, match=f"k = {k}"):
                    advantage(rewards, corrects, method=arms.passk, k=k)
                continue
            args = arguments("m", "r", "o", "--method", f"{RIVALS}:passk", "--arm", f"k={k}")
            expected = scores_of(args, [{"reward": reward, "correct": correct}
                                        for reward, correct in zip(rewards, corrects)])
            found = advantage(rewards, corrects, method=arms.passk, k=k)
            assert found == pytest.approx(expected, abs=1e-9), (n, k, wrong)


def test_nothing_and_w_reinforce_by_hand():
    """arXiv 2506.01347: lambda on correct, -1 on wrong answers, no baseline."""
    verdicts = [1.0, 0.0, 1.0], [True, False, True]
    assert advantage(*verdicts, method=arms.w_reinforce) == pytest.approx([0.1, -1.0, 0.1])
    assert advantage(*verdicts, method=arms.nothing) == [0, 0, 0]


def beta_gain(right, n, k):
    """E[k (1 - p)^(k - 1)] with p ~ Beta(right + 1, n - right + 1), by Simpson's rule."""
    def density(p):
        return p ** right * (1 - p) ** (n - right)

    points = [i / 2000 for i in range(2001)]
    weights = [1 if i in (0, 2000) else 4 if i % 2 else 2 for i in range(2001)]
    above = math.fsum(w * density(p) * k * (1 - p) ** (k - 1) for w, p in zip(weights, points))
    return above / math.fsum(w * density(p) for w, p in zip(weights, points))


def spread(scores, old):
    return [[score] * len(of_row) for score, of_row in zip(scores, old)]


def grpo_scores(rewards):
    return [(r - mean_of(rewards)) / (std_of(rewards) + 1e-6) for r in rewards]


def solved(group):
    return mean_of([float(row["correct"]) for row in group])


class Neighbours:
    """The formulas of experiments/arms.py in loops, with the settings of the test below."""

    def __init__(self, rows):
        self.tokens = {kind: sum(len(row["completion_ids"]) for row in rows
                                 if row["correct"] == kind) for kind in (True, False)}

    def focal(self, group, old):
        scores = grpo_scores([row["reward"] for row in group])
        return spread([(1 - solved(group)) ** 2 * score for score in scores], old)

    def unlikeliness(self, group, old):
        means = sampled_means(group)
        ranks = [sorted(means).index(mean) for mean in means]  # 0: the unlikeliest
        return spread(grpo_scores([row["reward"] * (1 - 0.5 * rank / 4 if row["correct"] else 1)
                                   for row, rank in zip(group, ranks)]), old)

    def boundary(self, group, old):
        gain = beta_gain(sum(row["correct"] for row in group), 4, 3)
        weight = gain / beta_gain(1, 4, 3) if gain >= 0.1 * 5 else 0
        scores = grpo_scores([row["reward"] for row in group])
        return spread([weight * score for score in scores], old)

    def unsolved(self, group, old):
        return spread([0 if any(row["correct"] for row in group) else -1] * 4, old)

    def oreal(self, group, old):
        scores = []
        for row in group:
            others = mean_of([other["reward"] for other in group if other is not row])
            weight = sum(self.tokens.values()) / self.tokens[row["correct"]]
            weight *= 1 if row["correct"] else 0.25
            scores.append(weight * (row["reward"] - others))
        return spread(scores, old)

    def drpo(self, group, old):
        longest = 6  # tokens, of all rows
        short = [math.exp((1 - max(len(of_row), 1) / longest) / 0.5) for of_row in old]
        likely = [math.exp(mean / 2) for mean in sampled_means(group)]
        scores = []
        for i, row in enumerate(group):
            same = [j for j in range(4) if group[j]["correct"] == row["correct"]]
            of_kind = short if row["correct"] else [-v for v in likely]
            share = of_kind[i] / abs(math.fsum(of_kind[j] for j in same)) if len(same) < 4 else 0
            tokens = sum(self.tokens.values())
            scores.append(share * tokens / (len(VERDICTS) * max(len(old[i]), 1)))
        return spread(scores, old)

    def maxrl(self, group, old):
        p = solved(group)
        return spread([(row["correct"] - p) / p if p else 0 for row in group], old)

    def rs(self, group, old):
        risk = [math.exp(3 * row["reward"]) for row in group]
        return spread([(one / mean_of(risk) - 1) / 3 for one in risk], old)

    def ucpo(self, group, old):
        likely = [math.exp(mean) if row["correct"] else 0
                  for row, mean in zip(group, sampled_means(group))]
        q = [one / math.fsum(likely) if one else 0 for one in likely]
        entropy = -math.fsum(one * math.log(one) for one in q if one)
        weights = [1 + 0.5 * (-math.log(one) - entropy) if one else 1 for one in q]
        scores = grpo_scores([row["reward"] for row in group])
        return spread([weight * score for weight, score in zip(weights, scores)], old)


@pytest.mark.parametrize("name, settings", [
    ("focal", ["gamma=2"]), ("unlikeliness", ["beta=0.5"]), ("boundary", ["k=3", "floor=0.1"]),
    ("unsolved", []), ("oreal", ["negative_weight=0.25"]), ("drpo", ["tau=2", "length_tau=0.5"]),
    ("maxrl", []), ("rs", ["beta=3"]), ("ucpo", ["tau=0.5"])])
def test_neighbours_by_loops(name, settings, model, tmp_path, fp64):
    """The gradient of one update of each is that of its formula in loops."""
    rows = make_rows(model, cut=())
    flags = sum((["--arm", setting] for setting in settings), [])
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", "--method",
                f"{RIVALS}:{name}", *flags, "--max-grad-norm", 1e9, "--micro-batch-tokens", 40)
    expected = gradient_of(model, rows, getattr(Neighbours(rows), name))
    assert distance(found.gradient, expected) < 1e-9
