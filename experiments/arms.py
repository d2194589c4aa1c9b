"""Other objectives from the literature, as plug-ins of train.py:

    python train.py --model M --rollouts scored.jsonl --out OUT \
        --method experiments/arms.py:passk --arm k=4

Each is a function (batch, **settings) -> the advantage of every completion token, (tokens,); where
NAME_loss stands beside NAME, that is the loss of every token in place of the clipped surrogate.
`train.Batch` says what a batch holds.
"""
import dataclasses

import torch

from train import grpo


def passk(batch, k=4):
    """Pass@k training, analytic (arXiv 2508.10751): optimises Pass@k directly.

    A subset of k of the n rollouts is right (reward 1) if one of them is, and has the advantage
    (reward - mean) / std over all subsets; a rollout's advantage is the mean over those with it:

        F(y) = C(W, k) / C(n, k)                the share of subsets without a right one, W wrong
        A    = F / sqrt(F (1 - F))              of a right rollout
        A    = (F - C(W - 1, k - 1) / C(n - 1, k - 1)) / sqrt(F (1 - F))        of a wrong one
    """
    n = batch.correct.shape[1]
    if not 1 <= k < n:
        raise ValueError(f"k = {k}: must be at least 1, and less than the {n} samples of a group")
    wrong = n - batch.correct.sum(1, keepdim=True).to(batch.reward.dtype)

    def none_right(k, wrong, n):  # C(wrong, k) / C(n, k), as a product
        factors = [((wrong - i) / (n - i)).clamp(min=0) for i in range(k)]
        return torch.stack(factors or [torch.ones_like(wrong)]).prod(0)

    fails = none_right(k, wrong, n)
    std = (fails * (1 - fails)).sqrt()
    score = torch.where(batch.correct, fails, fails - none_right(k - 1, wrong - 1, n - 1))
    score = torch.where(std > 0, score / std.clamp(min=1e-6), 0.0)
    return score.flatten()[batch.row]


def w_reinforce(batch, positive_weight=0.1):
    """Weighted REINFORCE, mostly negative-sample reinforcement (arXiv 2506.01347); no baseline.

    A = lambda of a right rollout, -1 of a wrong one;  lambda: positive_weight, 0 for NSR
    """
    score = torch.where(batch.correct, float(positive_weight), -1.0).to(batch.reward.dtype)
    return score.flatten()[batch.row]


def cispo(batch):
    """CISPO (arXiv 2506.13585): GRPO's advantage under the loss below."""
    return grpo(batch)


def cispo_loss(logp, batch, advantage, clip_high):
    """- sg(min(rho, 1 + clip_high)) A log pi: the weight is cut and detached (sg), so that no token
    loses its gradient; there is no lower cut."""
    ratio = (logp - batch.old_logp).clamp(max=20).exp()
    loss = -ratio.detach().clamp(max=1 + clip_high) * advantage * logp
    cut = ratio > 1 + clip_high
    return loss, torch.zeros_like(cut), cut


def focal(batch, gamma=1.0):
    """F-GRPO (arXiv 2602.06717): GRPO's advantage, smaller for problems that are mostly solved.

    A = (1 - p)^gamma A_GRPO,  p: the share of right rollouts in the group
    """
    solved = batch.correct.to(batch.reward.dtype).mean(1, keepdim=True)
    weight = ((1 - solved) ** gamma).expand_as(batch.reward)
    return weight.flatten()[batch.row] * grpo(batch)


def unlikeliness(batch, beta=0.25):
    """Unlikeliness reward, as the idea of arXiv 2506.02355 reads here: of the right rollouts the
    likelier ones get less, by their rank in the group.

    r'_i = r_i (1 - beta (n - rank_i) / n) if right;  rank_i: how many of the group's n rollouts
    have a log pi_old(y_i), a sum over tokens, at least as high. Then GRPO's advantage of r'.
    """
    n = batch.reward.shape[1]
    logp = batch.mean_logp * batch.length
    rank = (logp[:, None, :] >= logp[:, :, None]).sum(-1)  # (groups, n)
    shaped = batch.reward * torch.where(batch.correct, 1 - beta * (n - rank) / n, 1.0)
    return grpo(dataclasses.replace(batch, reward=shaped.to(batch.reward.dtype)))


def nothing(batch):
    """No reinforcement, A = 0: what is left is the other terms of the loss, such as --rehearse."""
    return torch.zeros_like(batch.old_logp)
