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
    """- sg(min(rho, 1 + clip_high)) A log pi: the weight is clipped and detached (sg), so that no
    token loses its gradient; there is no lower clip."""
    ratio = (logp - batch.old_logp).clamp(max=20).exp()
    loss = -ratio.detach().clamp(max=1 + clip_high) * advantage * logp
    clipped = ratio > 1 + clip_high
    return loss, torch.zeros_like(clipped), clipped


def focal(batch, gamma=1.0):
    """F-GRPO (arXiv 2602.06717): GRPO's advantage, smaller for problems that are mostly solved.

    A = (1 - p)^gamma A_GRPO,  p: the share of right rollouts in the group
    """
    solved = batch.correct.to(batch.reward.dtype).mean(1, keepdim=True)
    weight = ((1 - solved) ** gamma).expand_as(batch.reward)
    return weight.flatten()[batch.row] * grpo(batch)


def unlikeliness(batch, beta=0.25):
    """Unlikeliness reward (arXiv 2506.02355), as its authors' code has it: of the right rollouts
    the likelier ones get less.

    r'_i = r_i (1 - beta below_i / n) if right;  below_i: how many of the group's n rollouts have a
    lower mean_t log pi_old(y_i,t). Then GRPO's advantage of r'. Their KL term is left out.
    """
    n, logp = batch.reward.shape[1], batch.mean_logp
    below = (logp[:, None, :] < logp[:, :, None]).sum(-1)  # (groups, n)
    shaped = batch.reward * torch.where(batch.correct, 1 - beta * below / n, 1.0)
    return grpo(dataclasses.replace(batch, reward=shaped.to(batch.reward.dtype)))


def boundary(batch, k=16, floor=0.01):
    """Bayesian boundary gating (arXiv 2606.15455) in a simple form: a problem's update counts by
    what a rise of its chance p of success would add to Pass@k.

    u(m) = E[k (1 - p)^(k - 1)],  p ~ Beta(m + 1, n - m + 1),  m of n rollouts right
         = k prod_{j < k} (n - m + j) / (n + 1 + j)
    A    = A_GRPO u(m) / u(1) where u(m) >= floor (n + 1), else 0

    We had u, the floor and the two defaults from public code that cites the paper's Eq. 8 and 9,
    not from the paper; that u / u(1) is a factor on GRPO's advantage is that code's choice. In the
    paper groups without a right rollout learn, too: see `unsolved`.
    """
    n = batch.correct.shape[1]
    wrong = n - batch.correct.sum(1, keepdim=True)  # (groups, 1)
    step = torch.arange(1, k, device=wrong.device)  # j

    def gain(wrong):
        return k * ((wrong + step) / (n + 1 + step).to(batch.reward.dtype)).prod(-1, keepdim=True)

    weight = torch.where(gain(wrong) >= floor * (n + 1), gain(wrong) / gain(n - 1), 0.0)
    return weight.expand_as(batch.reward).flatten()[batch.row] * grpo(batch)


def unsolved(batch):
    """Updates on unsolved problems alone, our reading of an experiment of arXiv 2606.15455: of a
    problem none of whose rollouts is right there is only to learn what is wrong, by REINFORCE with
    reward -1 and no baseline.

    A = -1 in a group without a right rollout, else 0
    """
    score = -(~batch.correct.any(1, keepdim=True)).to(batch.reward.dtype)
    return score.expand_as(batch.reward).flatten()[batch.row]


def maxrl(batch):
    """MaxRL (arXiv 2602.02710): the truncated maximum likelihood of being right.

    A = (r - p) / p, 0 where p = 0;  r: 1 if right, p: the share of right rollouts in the group
    """
    right = batch.correct.to(batch.reward.dtype)
    solved = right.mean(1, keepdim=True)
    score = (right - solved) / solved.clamp(min=1 / right.shape[1])  # 0 / (1 / n) where p = 0
    return score.flatten()[batch.row]


def rs(batch, beta=2.0):
    """RS-GRPO (arXiv 2509.24261): risk-seeking, between the mean (beta -> 0) and the best reward.

    A = (e^(beta r) / mean e^(beta r) - 1) / beta, not divided by a std; their default of beta is 2
    """
    weight = batch.reward.shape[1] * (beta * batch.reward).softmax(1)  # (groups, n)
    return ((weight - 1) / beta).flatten()[batch.row]


def ucpo(batch, tau=0.2):
    """UCPO (arXiv 2605.00365), the factor of its authors' code: right rollouts that are rarer than
    the group's other right ones get more.

    A = A_GRPO (1 + tau (-log q - H(q))) if right, else A_GRPO;  q: the softmax of mean_t log pi_old
    over the group's right rollouts. Their code also has a factor of its own on rare wrong rollouts,
    left out here as we read the paper.
    """
    log_q = batch.mean_logp.masked_fill(~batch.correct, -1e30).log_softmax(1)
    entropy = -(log_q.exp() * log_q).sum(1, keepdim=True)
    weight = torch.where(batch.correct, 1 - tau * (log_q + entropy), 1.0)
    return weight.flatten()[batch.row] * grpo(batch)


def oreal(batch, negative_weight=0.5):
    """OREAL (arXiv 2502.06781), as its authors' code has it without the token-level reward model:
    right rollouts are cloned, wrong ones pushed down by a policy gradient, both by their distance
    from the others' reward, each kind averaged over its own tokens.

    a_i = r_i - mean of the other r_j in the group
    A_i = a_i T / T_right                       if right
          negative_weight a_i T / T_wrong       otherwise

    T, T_right, T_wrong: the round's completion tokens, of all, right and wrong rollouts. Their KL
    to the base model is `--kl-coef 0.01 --ref-model BASE`.
    """
    n = batch.reward.shape[1]
    tokens, right = batch.length.sum(), (batch.length * batch.correct).sum()
    of_kind = torch.where(batch.correct, right, tokens - right).clamp(min=1)
    weight = torch.where(batch.correct, 1.0, float(negative_weight)) * tokens / of_kind
    others = n / max(n - 1, 1)  # r - mean of all = (n - 1) / n (r - mean of the others)
    return others * weight.to(batch.reward.dtype).flatten()[batch.row] * grpo(batch, "none")


def oreal_loss(logp, batch, advantage):
    """- A log pi where right, whatever rho is; - rho A where wrong; no clip."""
    ratio = (logp - batch.old_logp).clamp(max=20).exp()
    return -advantage * torch.where(batch.correct.flatten()[batch.row], logp, ratio)


def drpo(batch, tau=10.0, length_tau=0.1):
    """DRPO (arXiv 2510.04474), from its authors' code: what is preferred among right rollouts,
    there a small length, is normalised among them alone, so that none of them is pushed down.

    A problem with rollouts of both kinds has the objective, s = mean_t log pi(y_t),
        sum_right w_i s_i / sum_right w - tau log mean_wrong exp(s_j / tau)
        w = exp((1 - length / longest of the round) / length_tau)
    whose gradient at pi_old is that of these advantages, T tokens and G groups in the round:
        A_i = w_i / sum_right w T / (G length_i)        if right
             -v_i / sum_wrong v T / (G length_i)        otherwise,  v = exp(s / tau)

    Here they stand under the clipped surrogate; there a KL constraint to pi_old takes its place.
    """
    right, length = batch.correct, batch.length.clamp(min=1)
    short = (1 - length / length.max()).to(batch.reward.dtype) / length_tau
    score = torch.where(right, short, batch.mean_logp / tau)

    def share(kind):
        return score.masked_fill(~kind, -torch.inf).softmax(1)

    both = right.any(1, keepdim=True) & ~right.all(1, keepdim=True)
    weight = torch.where(both, torch.where(right, share(right), -share(~right)), 0.0)
    return (weight * batch.length.sum() / (len(length) * length)).flatten()[batch.row]


def nothing(batch):
    """No reinforcement, A = 0: what is left is the other terms of the loss, such as --rehearse."""
    return torch.zeros_like(batch.old_logp)
