"""Objectives from files: the eight lines of README.md, what a file may hold, what is refused; and
the rivals of experiments/arms.py against their formulas in loops."""
import itertools
import math
import pathlib

import numpy as np
import pytest

import train
from experiments import arms
from test_train import (  # noqa: F401  fixtures among them
    LENGTHS, RIVALS, VERDICTS, Oracle, advantage, arguments, distance, fp64, make_rows,
    mean_of, model, refused, rollouts, run, sampled_means, same_round, std_of, write)

OWN = '''def concise(batch, penalty=0.1):
    """Dr. GRPO's advantage, of r - penalty * (length / the longest of the group)."""
    longest = batch.length.max(1, keepdim=True).values.clamp(min=1)
    reward = batch.reward - penalty * batch.length / longest
    advantage = reward - reward.mean(1, keepdim=True)
    return advantage.flatten()[batch.row]
'''


def file_of(tmp_path, text, name="mine.py"):
    (tmp_path / name).write_text(text)
    return str(tmp_path / name)


def test_your_own_objective_of_eight_lines(model, rollouts, tmp_path, fp64, capsys):
    """As README.md shows it: a file, a function, a setting; a round is that of its formula."""
    assert OWN in pathlib.Path(train.__file__).with_name("README.md").read_text()
    mine, out = file_of(tmp_path, OWN), tmp_path / "out"
    flags = ["--method", f"{mine}:concise", "--updates", 2, "--lr", 0.03]
    half = [*flags, "--arm", "penalty=0.5"]
    found = run(model, rollouts, out, *half)

    def scores(args, group):
        longest = max(1, *(len(row["completion_ids"]) for row in group))
        rewards = [row["reward"] - 0.5 * len(row["completion_ids"]) / longest for row in group]
        return [reward - mean_of(rewards) for reward in rewards]

    same_round(found, Oracle(model, scores).round(make_rows(model), *half))
    assert found.meta["flags"]["arm"] == {"penalty": 0.5}
    assert list(found.meta["inputs"])[-1] == mine
    # Its settings and the file itself belong to the command.
    for other in [*flags, "--arm", "penalty=0.25"], flags:
        assert "made with other arm;" in refused(capsys, model, rollouts, out, *other)
    file_of(tmp_path, OWN.replace("0.1", "0.12"))
    assert "made with other inputs" in refused(capsys, model, rollouts, out, *half)


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
    flags = ["--method", f"{mine}:mine", "--arm", "scale=2", "--arm", "label=x", "--max-grad-norm",
             1e9, "--micro-batch-tokens", 25]
    found = run(model, write(tmp_path / "rows.jsonl", rows), tmp_path / "out", *flags)

    def scores(args, group):  # times the loss's scale: at rho = 1 its gradient is the surrogate's
        means = sampled_means(group)
        return [2 * (len(row["solution"] or "") + 2 * (mean - mean_of(means)))
                for row, mean in zip(group, means)]

    assert distance(found.gradient, Oracle(model, scores).round(rows, *flags).gradient) < 1e-9
    assert found.metrics[0]["loss"] == found.metrics[0]["clip_high_frac"] == 0


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
            corrects, expected = [i >= wrong for i in range(n)], [0.0] * n
            rewards = [float(correct) for correct in corrects]
            if k == n:  # one subset: nothing to differ within
                with pytest.raises(ValueError, match=f"k = {k}"):
                    advantage(rewards, corrects, method=arms.passk, k=k)
                continue
            subsets = list(itertools.combinations(range(n), k))
            best = [max(rewards[i] for i in subset) for subset in subsets]
            if std_of(best):
                expected = [mean_of([(r - mean_of(best)) / std_of(best)
                                     for r, subset in zip(best, subsets) if i in subset])
                            for i in range(n)]
            found = advantage(rewards, corrects, method=arms.passk, k=k)
            assert found == pytest.approx(expected, abs=1e-9), (n, k, wrong)


def test_nothing_and_w_reinforce_by_hand():
    """arXiv 2506.01347: lambda on correct, -1 on wrong answers, no baseline."""
    verdicts = [1.0, 0.0, 1.0], [True, False, True]
    assert advantage(*verdicts, method=arms.w_reinforce) == pytest.approx([0.1, -1.0, 0.1])
    assert advantage(*verdicts, method=arms.nothing) == [0, 0, 0]


def beta_gain(right, n, k):
    """E[k (1 - p)^(k - 1)] with p ~ Beta(right + 1, n - right + 1); Gauss' rule is exact here."""
    points, weights = np.polynomial.legendre.leggauss(9)
    p = (points + 1) / 2
    weights = weights * p ** right * (1 - p) ** (n - right)
    return (weights * k * (1 - p) ** (k - 1)).sum() / weights.sum()


def grpo_scores(rewards):
    return [(r - mean_of(rewards)) / (std_of(rewards) + 1e-6) for r in rewards]


def unlikeliness(rewards, corrects, means, lengths):
    below = [sorted(means).index(mean) for mean in means]  # 0: the unlikeliest
    return grpo_scores([r * (1 - 0.5 * rank / 4 if correct else 1)
                        for r, correct, rank in zip(rewards, corrects, below)])


def boundary(rewards, corrects, means, lengths):
    gain = beta_gain(sum(corrects), 4, 3)
    weight = gain / beta_gain(1, 4, 3) if gain >= 0.1 * 5 else 0
    return [weight * score for score in grpo_scores(rewards)]


TOKENS = {kind: sum(length for group, lengths in zip(VERDICTS, LENGTHS)
                    for (correct, _), length in zip(group, lengths) if correct == kind)
          for kind in (0, 1)}  # of the round's wrong and right rollouts


def oreal(rewards, corrects, means, lengths):
    return [(1 if correct else 0.25) * sum(TOKENS.values()) / TOKENS[correct]
            * (r - (sum(rewards) - r) / 3) for r, correct in zip(rewards, corrects)]


def drpo(rewards, corrects, means, lengths):
    short = [math.exp((1 - max(length, 1) / 6) / 0.5) for length in lengths]  # 6: the longest
    signed = [weight if correct else -math.exp(mean / 2)
              for weight, correct, mean in zip(short, corrects, means)]
    of_kind = {kind: abs(math.fsum(one for one, correct in zip(signed, corrects)
                                   if correct == kind)) for kind in (0, 1)}
    scale = sum(TOKENS.values()) / len(VERDICTS) if all(of_kind.values()) else 0
    return [scale * one / (of_kind[correct] * max(length, 1))
            for one, correct, length in zip(signed, corrects, lengths)]


def ucpo(rewards, corrects, means, lengths):
    likely = [math.exp(mean) if correct else 0 for correct, mean in zip(corrects, means)]
    q = [one / math.fsum(likely) if one else 0 for one in likely]
    entropy = -math.fsum(one * math.log(one) for one in q if one)
    return [score * (1 + 0.5 * (-math.log(one) - entropy) if one else 1)
            for one, score in zip(q, grpo_scores(rewards))]


@pytest.mark.parametrize("name, settings, formula", [
    ("focal", "gamma=2", lambda rewards, corrects, *_: [
        (1 - mean_of(corrects)) ** 2 * score for score in grpo_scores(rewards)]),
    ("unlikeliness", "beta=0.5", unlikeliness), ("boundary", "k=3 floor=0.1", boundary),
    ("unsolved", "", lambda rewards, corrects, *_: [0 if any(corrects) else -1] * 4),
    ("oreal", "negative_weight=0.25", oreal), ("drpo", "tau=2 length_tau=0.5", drpo),
    ("maxrl", "", lambda rewards, corrects, *_: [
        (correct - mean_of(corrects)) / max(mean_of(corrects), 1e-9) for correct in corrects]),
    ("rs", "beta=3", lambda rewards, *_: [
        (math.exp(3 * r) / mean_of([math.exp(3 * one) for one in rewards]) - 1) / 3
        for r in rewards]),
    ("ucpo", "tau=0.5", ucpo)])
def test_neighbours_by_loops(name, settings, formula, model, rollouts, tmp_path, fp64):
    """The gradient of one update of each is that of its formula in loops."""
    rows, flags = make_rows(model), ["--max-grad-norm", 1e9, "--micro-batch-tokens", 40]
    flags += ["--method", f"{RIVALS}:{name}"] + [f"--arm={one}" for one in settings.split()]

    def scores(args, group):
        rewards, corrects = ([row[key] for row in group] for key in ("reward", "correct"))
        lengths = [len(row["completion_ids"]) for row in group]
        return formula(rewards, corrects, sampled_means(group), lengths)

    found = run(model, rollouts, tmp_path / "out", *flags)
    assert distance(found.gradient, Oracle(model, scores).round(rows, *flags).gradient) < 1e-9
