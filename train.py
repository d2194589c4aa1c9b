"""Stage 3: update a policy on one round of scored rollouts with DS-GRPO (arXiv 2511.19942) or GRPO.

    python train.py --model data/tiny-countdown --rollouts scored.jsonl --out round-001 \
        --updates 4 --lr 2e-4 --gamma-p 0.3 --gamma-n 0.03
    torchrun --nproc-per-node 8 -- train.py --model round-001 --rollouts scored-002.jsonl \
        --out round-002 --updates 4 --lr 2e-4 --gamma-p 0.3 --gamma-n 0.03

Reads scored.jsonl, one rollout a line (data/files.py: Scored). Rollouts with one id are a group,
and all groups have the same size. The file's meta gives the sampling temperature.
Writes the folder OUT, an ordinary Hugging Face model (fp32 master weights) with
optimizer.safetensors, trainer_state.json and metrics.jsonl (one line an update, carried on from the
input folder), from which the next round goes on.

The objective, for n rollouts y_1..y_n of each prompt x, sampled from pi_old; r_i = 1 if correct:

    A_i   = (r_i - mean(r)) / (std(r) + eps)                                GRPO
    A_i,t = A_i - gamma_p log pi_old(y_i,t)   if y_i is correct             Eq. 6: entropy bonus
            A_i + gamma_n log pi_old(y_i,t)   otherwise                     entropy penalty
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss  = - sum over tokens of min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
            / all completion tokens of the update
            - c mean log pi(z_t) over right answers z of the base     if --rehearse is given

All log-probs are of logits / T. The smoothing stands in every group, also where all rollouts are
right, or all wrong, and GRPO's A_i is 0. `--method FILE.py:NAME` takes another objective from a
file: `Batch` says what it gets, and experiments/arms.py holds the rivals.

The update, in the order of the code: read and group the rows; pi_old of all rows before any step
(the first update's is its own forward pass, at no cost); then, update by update, micro-batches
without padding in the head, each prompt computed once for all its rollouts; loss; clipped AdamW
step on fp32 masters; metrics summed over micro-batches and ranks.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
import time
import typing

from data.files import Parser, describe, fail, files_of, publish, run
from data.plugins import check_method, clip_range, load_arm, setting, split_name, try_method


# ---- The objective -------------------------------------------------------------------------------
# torch is imported further down, after the flags. `Batch`, below, says what a batch holds.
def grpo(batch, adv_norm="std", eps=1e-6):
    """A_i = (r_i - mean(r)) / (std(r) + eps), std of the population: (tokens,).

    Groups with equal rewards, and groups of one, get 0.
    """
    # So that equal rewards give exactly 0: in fp32 the mean of three times 0.1 is not 0.1.
    reward = batch.reward - batch.reward[:, :1]
    score = reward - reward.mean(1, keepdim=True)
    if adv_norm == "std":
        score = score / (reward.std(1, keepdim=True, correction=0) + eps)
    return score.flatten()[batch.row]


def ds_grpo(batch, gamma_p, gamma_n, smooth_level="token", adv_norm="std"):
    """Eq. 6, GRPO with differential smoothing: (tokens,).

    token     A_i,t = A_i -+ gamma log pi_old(y_i,t)
    sequence  A_i,t = A_i -+ gamma mean_t log pi_old(y_i,t)
    reward    r'_i = r_i -+ gamma mean_t log pi_old(y_i,t);  A_i,t = r'_i - mean(r')
    """
    gamma = torch.where(batch.correct, -gamma_p, gamma_n)  # bonus if correct, penalty if not
    if smooth_level == "reward":
        reward = batch.reward + gamma * batch.mean_logp
        return (reward - reward.mean(1, keepdim=True)).flatten()[batch.row]
    logp = batch.old_logp
    if smooth_level == "sequence":
        total = torch.zeros_like(batch.reward.flatten()).index_add(0, batch.row, logp)
        logp = (total / batch.length.flatten().clamp(min=1))[batch.row]
    return grpo(batch, adv_norm) + gamma.flatten()[batch.row] * logp


def clipped_loss(logp, batch, advantage, clip_low, clip_high):
    """The loss of every token, and where rho was cut from below and from above (bool): (tokens,).

    - min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),  rho = pi / pi_old
    """
    # At most e^20: a ratio beyond fp32 would give a cut token the gradient 0 * inf.
    ratio = (logp - batch.old_logp).clamp(max=20).exp()
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    cut = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, cut * advantage), low, high


def k3(logp, other):
    """Schulman's low-variance, non-negative estimate of KL(pi || other) at tokens drawn from pi.

    exp(d) - d - 1,  d = log other - log pi
    """
    d = (other - logp).clamp(max=20)
    return d.expm1() - d


# ---- Flags ---------------------------------------------------------------------------------------
def add_flags(add):
    def number(flag, default, help):
        add(flag, type=type(default), default=default, help=f"{help} (default {default})")

    # files
    add("--model", required=True,
        help="folder of a Hugging Face model (or of an earlier round), or a Hub id")
    add("--rollouts", required=True, help="JSONL file of scored rollouts")
    add("--out", required=True, help="folder to write")
    add("--temperature", type=float,
        help="sampling temperature of rollouts whose meta does not say it")
    add("--allow-off-policy", action="store_true",
        help="take rollouts drawn with top-p, top-k or a repetition penalty, whose log-probs are "
             "not those of the policy")
    # the advantage
    add("--method", default="ds-grpo", metavar="ds-grpo|grpo|FILE.py:NAME",
        help="the objective; the last: function NAME of a file of yours (default ds-grpo)")
    add("--arm", action="append", type=setting, metavar="KEY=VALUE",
        help="a setting of FILE.py:NAME: int, float or text; may be given several times")
    add("--gamma-p", type=float,
        help="ds-grpo: weight of -log pi_old on correct rollouts (default 0.01)")
    add("--gamma-n", type=float,
        help="ds-grpo: weight of +log pi_old on wrong rollouts (default 0.01)")
    add("--smooth-level", choices=["token", "sequence", "reward"],
        help="ds-grpo: log pi_old of each token, its mean over the completion, or that mean added "
             "to the reward before the group's mean is taken off (default token)")
    add("--adv-norm", choices=["std", "none"],
        help="grpo, and ds-grpo but at level reward: divide A_i by the group's population std, or "
             "not (default std)")
    add("--truncated", default="wrong", choices=["wrong", "mask"],
        help="rollouts cut at the length limit: wrong with reward 0, unless score.py found a whole "
             "right answer in them; or kept in the group's statistics and left out of the loss "
             "(default wrong)")
    # the loss
    add("--clip-low", type=float, help="rho is cut at 1 - this (default 0.2)")
    add("--clip-high", type=float, help="rho is cut at 1 + this (default 0.25)")
    number("--entropy-coef", 0.0, "c of loss -= c H_t, averaged over all completion tokens; c > 0 "
                                  "is a bonus, c < 0 a penalty")
    number("--entropy-coef-correct", 0.0, "the same on correct rollouts alone")
    number("--entropy-coef-wrong", 0.0, "the same on wrong rollouts alone")
    number("--kl-coef", 0.0, "weight of the k3 estimate of KL(pi || ref)")
    add("--ref-model", help="the reference model of --kl-coef")
    add("--rehearse", metavar="FILE",
        help="scored rollouts, as a rule of the base model, whose right answers are rehearsed")
    add("--rehearse-coef", type=float, help="c of loss -= c mean log pi over the answers drawn")
    add("--rehearse-n", type=int,
        help="answers drawn an update (default: as many as the update has rollouts)")
    # the optimizer
    number("--updates", 1, "optimizer steps: the shuffled groups are dealt into so many "
                           "mini-batches")
    number("--lr", 1e-6, "AdamW's learning rate")
    number("--warmup-steps", 0, "steps of linear warm-up, counted over all rounds")
    number("--weight-decay", 0.01, "AdamW's decoupled weight decay")
    number("--max-grad-norm", 1.0, "the gradient is scaled down to this norm")
    add("--reset-optimizer", action="store_true", help="start with fresh moments and step 0")
    number("--seed", 0, "seed of the shuffle")
    # the machine
    number("--micro-batch-tokens", 4096, "most tokens in one forward and backward pass; where "
                                         "prompts are shared, about a sixth is padding on top")
    add("--share-prompts", action=argparse.BooleanOptionalAction,
        help="compute each prompt once for all its rollouts, with gradients through its key-value "
             "cache (default: yes, unless --checkpoint-activations or --shard)")
    add("--checkpoint-activations", action="store_true",
        help="keep one activation a layer and recompute the others")
    add("--shard", action="store_true",
        help="FSDP2: shard weights, gradients and optimizer over the ranks")


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add_flags(parser.add_argument)
    parser.add_machine(rank_timeout=600)
    args = parser.parse_args(argv)
    check_method(args, parser.error)
    parser.at_least(args, seed=0, updates=1, micro_batch_tokens=1, lr=0, clip_low=0, clip_high=0,
                    warmup_steps=0, weight_decay=0, kl_coef=0, rehearse_n=1)
    for name in ("max_grad_norm", "temperature", "rehearse_coef"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if bool(args.kl_coef) != bool(args.ref_model):
        parser.error("--kl-coef and --ref-model go together")
    if bool(args.rehearse_coef) != bool(args.rehearse):
        parser.error("--rehearse and --rehearse-coef go together")
    if args.rehearse_n and not args.rehearse:
        parser.error("--rehearse-n belongs to --rehearse")
    if args.checkpoint_activations and args.share_prompts:
        parser.error("--share-prompts and --checkpoint-activations exclude each other: "
                     "checkpointing drops the prompt's cache")
    if args.shard and args.share_prompts:
        parser.error("--share-prompts and --shard exclude each other: all ranks must call each "
                     "sharded layer equally often")
    if args.share_prompts is None:
        args.share_prompts = not (args.checkpoint_activations or args.shard)
    args.out = args.out.rstrip("/")
    return parser.checked(args)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once

import numpy as np
import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

from data.metrics import Metrics
from data.models import (OF_TRAINING, autocast, check_model, device_and_dtype, earlier_metrics,
                         load_optimizer, load_tokenizer, save_round, source_of)
from data.plan import plan_update
from data.policy import (Policy, announce, checkpoint_activations, load_policy,
                         memory_estimate)
from data.ranks import (claim_empty, end_ranks, lost_ranks_told, rank_and_world, refuse,
                        start_ranks, wait_for_rank_0)
from data.rollouts import draw_answers, load_answers, load_rollouts, sampling_of

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here

# What a finished output may have had otherwise, and inputs, whose digests are compared instead.
FREE_FLAGS = ("out", "rollouts", "model", "ref_model", "rehearse", "rank_timeout", "device")


# ---- The method ---------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """What an objective sees: the verdicts of the whole round, the tokens of one micro-batch.

    reward    (groups, n) float   r of each rollout
    correct   (groups, n) bool    the sign of the smoothing: a reward above 0 is not correctness
    length    (groups, n) long    completion tokens of each rollout
    old_logp  (tokens,) float     log pi_old of each completion token at T, detached
    row       (tokens,) long      the token's rollout, an index into groups * n; rollouts are whole
    mean_logp (groups, n) float   mean_t log pi_old of each rollout; 0 of one without tokens. Asking
                                  for it costs one more forward pass of the first update
    and every field of the rows that NAME.fields names: a list of n values a group
    """
    reward: torch.Tensor
    correct: torch.Tensor
    length: torch.Tensor
    old_logp: torch.Tensor | None = None
    row: torch.Tensor | None = None
    means: torch.Tensor | None = None
    fields: dict = dataclasses.field(default_factory=dict)
    asked_for_means = False

    @property
    def mean_logp(self):
        self.asked_for_means = True
        return self.means

    def __getattr__(self, name):
        if name in vars(self).get("fields", ()):
            return self.fields[name]
        raise AttributeError(f"a batch has no {name!r}; of the rows it has what .fields names")


def choose_method(args):
    """--method as advantage(batch), loss(logp, batch, advantage), and the row fields it reads."""
    clip = clip_range(args)
    loss = functools.partial(clipped_loss, **clip)
    if args.method == "grpo":
        return functools.partial(grpo, adv_norm=args.adv_norm), loss, ()
    if args.method == "ds-grpo":
        return functools.partial(ds_grpo, gamma_p=args.gamma_p, gamma_n=args.gamma_n,
                                 smooth_level=args.smooth_level, adv_norm=args.adv_norm), loss, ()
    sys.modules.setdefault("train", sys.modules[__name__])  # a file may `from train import grpo`
    given = {name for name in clip if getattr(args, name) is not None}
    advantage, own_loss, fields = load_arm(args.method, args.arm, clip, given)
    return advantage, own_loss or loss, fields


# ---- One update ----------------------------------------------------------------------------------
@dataclasses.dataclass(kw_only=True)
class Job:
    """What all updates of a round share."""
    args: argparse.Namespace
    rank: int
    world: int
    device: str
    dtype: torch.dtype  # of the forward pass
    rows: list
    verdicts: Batch  # of the whole round; what belongs to a micro-batch is empty
    advantage: typing.Callable  # as choose_method returns them
    loss: typing.Callable
    policy: Policy = None
    module: torch.nn.Module = None  # the policy under DDP or FSDP2, whose forward is called
    no_sync: typing.Callable = contextlib.nullcontext  # of the passes before an update's last
    optimizer: torch.optim.Optimizer = None
    old_logp: dict = dataclasses.field(default_factory=dict)  # row -> (tokens,) log pi_old
    ref_logp: dict = dataclasses.field(default_factory=dict)
    answers: list = dataclasses.field(default_factory=list)  # rows to rehearse, a list a problem

    def plan(self, rows, members, unused=False):
        return plan_update(rows, members, self.rank, self.world, self.args.micro_batch_tokens,
                           self.args.share_prompts, unused)

    def progress(self, steps, what):
        return tqdm(steps, what, disable=None if self.rank == 0 else True)


def forward(policy, rows, micro, device, dtype):
    """logp, entropy (tokens,) of a micro-batch, and each token's row.

    micro: row indices; an empty one computes one token, for the ranks to stay in step.
    """
    prompts = [rows[i].prompt for i in micro] or [[0]]
    completions = [rows[i].completion for i in micro] or [np.zeros(1, np.int64)]
    with autocast(device, dtype):
        logp, entropy = policy(prompts, completions)
    row = np.repeat(micro or [0], [len(completion) for completion in completions])
    return logp, entropy, torch.as_tensor(row, device=device)


@torch.no_grad()
def log_probs(job, module, updates, what, unused=False):
    """{row: log-probs (tokens,) under `module`} of this rank's rows of some updates.

    unused: also of rows that stand in no loss.
    """
    found = {}
    for members in job.progress(updates, what):
        for micro in job.plan(job.rows, members, unused):
            logp, _, _ = forward(module, job.rows, micro, job.device, job.dtype)
            if micro:
                found.update(zip(micro, logp.split([len(job.rows[i].completion) for i in micro])))
    return found


def old_logprobs(job, updates, whole):
    """Fill in log pi_old of the rows of all updates but the first, whose own forward pass it is.

    whole: of all rows of all updates, also those in no loss: means of whole groups are asked for.
    """
    updates = updates if whole else updates[1:]
    job.old_logp = log_probs(job, job.module, updates, "pi_old", unused=whole)
    if whole:
        means = torch.zeros_like(job.verdicts.reward).flatten()
        for i, logp in job.old_logp.items():
            means[i] = logp.mean()
        if job.world > 1:
            dist.all_reduce(means)
        job.verdicts.means = means.view_as(job.verdicts.reward)


def token_losses(job, rows, micro, metrics):
    """The loss of every completion token of a micro-batch, (tokens,), before it is normalised."""
    args = job.args
    logp, entropy, row = forward(job.module, rows, micro, job.device, job.dtype)
    if not micro:
        return 0 * logp
    first = micro[0] not in job.old_logp  # the first update: pi is pi_old
    old = logp.detach() if first else torch.cat([job.old_logp[i] for i in micro])
    batch = dataclasses.replace(job.verdicts, old_logp=old, row=row)
    advantage = job.advantage(batch)
    loss, low, high = job.loss(logp, batch, advantage)
    right = batch.correct.flatten()[row]
    of_kind = torch.where(right, args.entropy_coef_correct, args.entropy_coef_wrong)
    loss = loss - (args.entropy_coef + of_kind) * entropy
    if args.ref_model:
        loss = loss + args.kl_coef * k3(logp, torch.cat([job.ref_logp[i] for i in micro]))
    with torch.no_grad():
        sampler = np.concatenate([rows[i].logprobs for i in micro])
        gap = (old - torch.as_tensor(sampler, device=job.device)).abs()
        gamma = torch.where(right, float(args.gamma_p or 0), float(args.gamma_n or 0))
        metrics.add(loss=loss, entropy=entropy, entropy_correct=entropy * right, right=right,
                    nll=-logp, gap=gap, low=low, high=high, kl=k3(old, logp), adv=advantage,
                    adv2=advantage.double() ** 2, smooth=(gamma * old).abs())
        metrics.peak(gap=gap, ratio=(logp - old).clamp(max=88).exp())
    return loss


def rehearsal_losses(job, rows, micro, metrics):
    """- c log pi of every token of right answers drawn from an earlier model, the base: (tokens,).

    Over base(y) v(x, y) / Z(x), the base filtered by the verifier v, the mean of -log pi is the
    forward KL to it up to a constant: DPH-RL (arXiv 2509.07430), the limit of alpha-DPG
    (2512.05962). Here each problem counts the same, and so does each of its distinct answers.
    """
    logp, _, _ = forward(job.module, rows, micro, job.device, job.dtype)
    if not micro:
        return 0 * logp
    with torch.no_grad():
        metrics.add(rehearsed=-logp)
    return -job.args.rehearse_coef * logp


def update_step(job, members, step):
    """One optimizer step on the rows `members`, after `step` earlier ones; its line of metrics."""
    began, args = time.monotonic(), job.args
    # 1. Gradients, micro-batch by micro-batch. `tokens`, over all ranks, is the one normaliser.
    tokens = sum(len(job.rows[i].completion) for i in members if job.rows[i].used)
    drawn = draw_answers(job.answers, args.rehearse_n or len(members), (args.seed, step))
    rehearsed = sum(len(row.completion) for row in drawn)
    metrics = Metrics()
    work = [(token_losses, job.rows, micro, tokens) for micro in job.plan(job.rows, members)]
    if drawn:
        plan = job.plan(drawn, range(len(drawn)))
        work += [(rehearsal_losses, drawn, micro, rehearsed) for micro in plan]
    for number, (losses, rows, micro, count) in enumerate(work):
        last = number == len(work) - 1
        with contextlib.nullcontext() if last else job.no_sync():
            loss = losses(job, rows, micro, metrics).sum()
            # DDP takes the mean over ranks; the loss is one sum over all.
            (loss * job.world / max(count, 1)).backward()
    metrics.reduce(job.device, job.world)

    # 2. A step that is not finite is refused.
    norm = torch.nn.utils.clip_grad_norm_(job.policy.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    loss = metrics.sums["loss"] + metrics.sums["rehearsed"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        refuse(job, members, f"step {step + 1}: loss {loss}, gradient norm {norm}")

    # 3. AdamW.
    lr = args.lr * min(1.0, (step + 1) / max(args.warmup_steps, 1))
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    verdicts = job.verdicts
    return metrics.line(
        step=step + 1, tokens=tokens, rehearsal=(args.rehearse_coef, rehearsed), norm=norm, lr=lr,
        seconds=time.monotonic() - began, device=job.device, rows=[job.rows[i] for i in members],
        reward=verdicts.reward.flatten()[members].view(-1, verdicts.reward.shape[1]),
        correct=verdicts.correct.flatten()[members])


# ---- The round -----------------------------------------------------------------------------------
def verdicts_of(groups, fields, device):
    """The batch of a whole round, to which each micro-batch adds its tokens."""
    def table(value):
        return torch.tensor([[value(row) for row in group] for group in groups], device=device)

    return Batch(table(lambda row: row.reward), table(lambda row: row.correct),
                 table(lambda row: len(row.completion)),
                 fields={name: [[row.fields[name] for row in group] for group in groups]
                         for name in fields})


def sources(args):
    """What the round is made from, and the from_pretrained options of --model and --ref-model."""
    options, ref_options = check_model(args.model, args.trust_remote_code), None
    inputs = [args.rollouts, source_of(args.model, options)]
    if not args.reset_optimizer:  # of a reference, and by generate.py, the weights alone are read
        inputs += [file for name, file in files_of(args.model) if name.startswith(OF_TRAINING)]
    if args.ref_model:
        ref_options = check_model(args.ref_model, args.trust_remote_code)
        inputs.append(source_of(args.ref_model, ref_options))
    if args.rehearse:
        inputs.append(args.rehearse)
    if args.arm is not None:
        inputs.append(split_name(args.method)[0])
    return inputs, options, ref_options


def train(args):
    began, (rank, world) = time.monotonic(), rank_and_world()

    # 1. Everything that can be wrong with the input is found before a model is loaded.
    if rank and not wait_for_rank_0(args.out, args.rank_timeout):
        return
    inputs, options, ref_options = sources(args)
    sampling = sampling_of(args)
    advantage, loss, fields = choose_method(args)
    groups, n = load_rollouts(args.rollouts, args.truncated, fields)
    rows = sum(groups, [])
    if args.updates > len(groups):
        fail(f"{args.rollouts}: {len(groups)} groups cannot be dealt into --updates {args.updates}")
    answers = []
    if args.rehearse:
        answers = load_answers(args.rehearse, sampling["temperature"], args.allow_off_policy)
    whole = try_method(advantage, loss, groups, verdicts_of(groups, fields, "cpu"))
    device, dtype = device_and_dtype(args)
    if rank == 0:
        meta = describe(args, inputs, OF_TRAINING, sampling=sampling, device=device,
                        dtype=str(dtype).removeprefix("torch."), world_size=world)
        if not claim_empty(args.out, meta, FREE_FLAGS):
            return

    # 2. The policy, its optimizer, and the processes that share the work.
    start_ranks(device, world, args.rank_timeout)
    tokenizer, temperature = load_tokenizer(args.model, options), sampling["temperature"]
    load = functools.partial(load_policy, temperature=temperature, rows=rows + sum(answers, []),
                             args=args, device=device, world=world)
    policy, module, no_sync = load(args.model, options)
    if args.ref_model:
        reference, _, _ = load(args.ref_model, ref_options, trained=False)
    if args.checkpoint_activations:
        checkpoint_activations(policy.model)
    memory = memory_estimate(policy, device, dtype, args.micro_batch_tokens,
                             world if args.shard else 1)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    step, lines = 0, []
    if not args.reset_optimizer:
        step, lines = load_optimizer(optimizer, policy, args.model), earlier_metrics(args.model)
    job = Job(args=args, rank=rank, world=world, device=device, dtype=dtype, rows=rows,
              verdicts=verdicts_of(groups, fields, device), advantage=advantage, loss=loss,
              policy=policy, module=module, no_sync=no_sync, optimizer=optimizer,
              answers=answers)
    if rank == 0:
        meta |= announce(job, *memory)

    # 3. The shuffled groups are dealt into updates whose sizes differ by at most one.
    order = np.random.default_rng(args.seed).permutation(len(groups))
    updates = [[g * n + k for g in part for k in range(n)]
               for part in np.array_split(order, args.updates)]

    # 4. Log-probs that no update may change, and the updates.
    if args.ref_model:
        job.ref_logp = log_probs(job, reference, updates, "reference")
        del reference
    old_logprobs(job, updates, whole)
    for members in job.progress(updates, "updates"):
        lines.append(json.dumps(update_step(job, members, step)) + "\n")
        step += 1

    # 5. The folder.
    state = {"step": step, "flags": vars(args)}
    save_round(args.out + ".partial", policy, tokenizer, optimizer, state, lines, args.model)
    if rank == 0:
        publish(args.out, {**meta, "wall_s": time.monotonic() - began})
        last, keys = json.loads(lines[-1]), "pass@1 entropy grad_norm logprob_gap tokens_per_s"
        print(f"{args.out}: step {step}; "
              + ", ".join(f"{key} {last[key]:.4g}" for key in keys.split()), file=sys.stderr)
    return end_ranks() if world > 1 else None


def main(args):
    with lost_ranks_told(args.rank_timeout):
        held = train(args)
    del held


if __name__ == "__main__":
    run(main, ARGS)
