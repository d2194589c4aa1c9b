r"""Stage 3: update a policy on one round of scored rollouts by DS-GRPO (arXiv 2511.19942) or GRPO.

    python train.py --model data/tiny-countdown --rollouts scored.jsonl --out round-001 \
        --updates 4 --lr 2e-4 --gamma-p 0.3 --gamma-n 0.03
    torchrun --nproc-per-node 8 -- train.py --model round-001 --rollouts scored-002.jsonl \
        --out round-002 --updates 4 --lr 2e-4 --gamma-p 0.3 --gamma-n 0.03

Reads scored.jsonl, one rollout a line (data/files.py: Scored). Rollouts with one id form a group,
and all groups have the same size. The file's meta gives the sampling temperature.
Writes the folder OUT, an ordinary Hugging Face model (fp32 master weights) with
optimizer.safetensors, trainer_state.json and metrics.jsonl (one line an update, carried on from the
input folder). The next round starts from that folder.

The objective, for n rollouts y_1..y_n of each prompt x, sampled from pi_old; r_i = 1 if correct:

    A_i   = (r_i - mean(r)) / (std(r) + eps)                                GRPO
    A_i,t = A_i - gamma_p log pi_old(y_i,t)   if y_i is correct             Eq. 6: entropy bonus
            A_i + gamma_n log pi_old(y_i,t)   otherwise                     entropy penalty
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss  = - sum over tokens of min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t)
            / all completion tokens of the update
            - c mean log pi(z_t) over right answers z of the base     if --rehearse is given

All log-probs are of logits / T. Smoothing applies to every group, including those that are all
right or all wrong, where GRPO's A_i is 0. `--method FILE.py:NAME` takes another objective from a
file: `Batch` says what it gets, and experiments/arms.py holds rivals from the literature.

log pi_old of all rows is computed before the first step; that of the first update is its own
forward pass, at no extra cost. Each prompt is computed once for all its rollouts. GRPO's dead
groups take no backward pass.
"""
from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import functools
import gc
import importlib.util
import inspect
import json
import math
import os
import re
import resource
import signal
import sys
import time
import typing

from data.files import (Parser, claim_empty, describe, fail, files_of, publish, rank_and_world, run,
                        wait_for_rank_0)


# ---- Flags ---------------------------------------------------------------------------------------
def add_flags(parser):
    def group(title):
        return parser.add_argument_group(title).add_argument

    def number(add, flag, default, help):
        add(flag, type=type(default), default=default, help=f"{help} (default {default})")

    add = group("files")
    add("--model", required=True,
        help="folder of a Hugging Face model (or of an earlier round), or a Hub id")
    add("--rollouts", required=True, help="JSONL file of scored rollouts")
    add("--out", required=True, help="folder to write")
    add("--temperature", type=float, help="sampling temperature of rollouts without a meta")
    add("--allow-off-policy", action="store_true",
        help="take rollouts drawn with top-p, top-k or a repetition penalty, not from the policy")

    add = group("the advantage")
    add("--method", default="ds-grpo", metavar="ds-grpo|grpo|FILE.py:NAME",
        help="the objective; the last: function NAME of a file of yours (default ds-grpo)")
    add("--arm", action="append", type=setting, default=[], metavar="KEY=VALUE",
        help="a setting of FILE.py:NAME: int, float or text; may be given several times")
    add("--gamma-p", type=float,
        help="ds-grpo: weight of -log pi_old on correct rollouts (default 0.01)")
    add("--gamma-n", type=float,
        help="ds-grpo: weight of +log pi_old on wrong rollouts (default 0.01)")
    add("--smooth-level", choices=["token", "sum", "mean", "share", "reward"],
        help="ds-grpo: what gamma multiplies: log pi_old of a token; its sum (Eq. 6 as printed); "
             "that over the length, or over its square; the mean, in the reward (default token)")
    add("--adv-norm", choices=["std", "none"],
        help="grpo, and ds-grpo except at level reward: divide A_i by the std (default std)")
    add("--truncated", default="wrong", choices=["wrong", "mask"],
        help="rollouts cut at the length limit: reward 0, unless they hold a complete right "
             "answer; or kept in the statistics, left out of the loss (default wrong)")

    add = group("the loss")
    number(add, "--clip-low", CLIP["clip_low"], "rho is clipped at 1 - this")
    number(add, "--clip-high", CLIP["clip_high"], "rho is clipped at 1 + this")
    add("--tis-cap", type=float, metavar="C",
        help="weigh each token's loss by min(pi_old / the sampler's probability, C), detached: "
             "truncated importance sampling, for rows of another engine (default: off)")
    number(add, "--entropy-coef", 0.0, "c of loss -= c H_t, averaged over all completion tokens; "
                                       "c > 0 is a bonus, c < 0 a penalty")
    number(add, "--entropy-coef-correct", 0.0, "the same on correct rollouts alone")
    number(add, "--entropy-coef-wrong", 0.0, "the same on wrong rollouts alone")
    number(add, "--kl-coef", 0.0, "weight of the k3 estimate of KL(pi || ref)")
    add("--ref-model", help="the reference model of --kl-coef")
    add("--rehearse", metavar="FILE",
        help="scored rollouts, as a rule of the base model, whose right answers are rehearsed")
    add("--rehearse-coef", type=float, help="c of loss -= c mean log pi over the answers drawn")
    add("--rehearse-weight", choices=["samples", "distinct"],
        help="draw each right rollout of a problem equally often (the forward KL to the filtered "
             "base), or each distinct answer (a flatter target) (default samples)")
    add("--rehearse-n", type=int,
        help="answers drawn an update (default: as many as the update has rollouts)")

    add = group("the optimizer")
    number(add, "--updates", 1, "optimizer steps, into which the shuffled groups are dealt")
    number(add, "--lr", 1e-6, "AdamW's learning rate")
    number(add, "--warmup-steps", 0, "steps of linear warm-up, counted over all rounds")
    number(add, "--weight-decay", 0.01, "AdamW's decoupled weight decay")
    number(add, "--max-grad-norm", 1.0, "the gradient is scaled down to this norm")
    add("--reset-optimizer", action="store_true",
        help="start with fresh moments and a new warm-up; the count of steps goes on")
    number(add, "--seed", 0, "seed of the shuffles, which also depend on the steps done")

    add = group("memory")
    number(add, "--micro-batch-tokens", 4096, "most tokens in one forward and backward pass; where "
                                              "prompts are shared, about a sixth is padding on top")
    add("--share-prompts", action=argparse.BooleanOptionalAction,
        help="compute each prompt once for all its rollouts, with gradients through its key-value "
             "cache (default: yes, unless --checkpoint-activations or --shard)")
    add("--checkpoint-activations", action="store_true",
        help="keep one activation a layer and recompute the others")
    add("--shard", action="store_true",
        help="FSDP2: shard weights, gradients and optimizer over the ranks")


CLIP = {"clip_low": 0.2, "clip_high": 0.25}


def setting(text):
    """KEY=VALUE of the command line as (key, int, float or text)."""
    key, _, value = text.partition("=")
    if not key.isidentifier() or not value:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    with contextlib.suppress(ValueError):
        value = int(value) if re.fullmatch(r"[-+]?\d+", value) else float(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text!r}: a number must be finite")
    return key, value


def check_method(args, error):
    """Give the settings of --method their defaults, and refuse those of another method."""
    for name, default in {"gamma_p": 0.01, "gamma_n": 0.01, "smooth_level": "token"}.items():
        if getattr(args, name) and args.method != "ds-grpo":
            error(f"--{name.replace('_', '-')} belongs to --method ds-grpo")
        if getattr(args, name) is None and args.method == "ds-grpo":
            setattr(args, name, default)
    built_in = args.method in ("ds-grpo", "grpo")
    if built_in and args.smooth_level != "reward":
        args.adv_norm = args.adv_norm or "std"
    elif args.adv_norm:
        error("--adv-norm belongs to --method grpo, and to ds-grpo except at --smooth-level reward")
    if args.arm and built_in:
        error(f"--arm belongs to --method FILE.py:NAME, not to {args.method}")
    if len(dict(args.arm)) < len(args.arm):
        error("--arm: a KEY is given twice")
    args.arm = dict(args.arm)
    path, _, name = args.method.rpartition(":")
    if not built_in and not (path.endswith(".py") and name.isidentifier()):
        error(f"--method {args.method}: neither ds-grpo nor grpo nor FILE.py:NAME")
    if not built_in and not os.path.isfile(path):
        error(f"--method {args.method}: no such file {path}")


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    add_flags(parser)
    parser.add_machine(rank_timeout=600)
    args = parser.parse_args(argv)
    check_method(args, parser.error)
    parser.at_least(args, seed=0, updates=1, micro_batch_tokens=1, lr=0, clip_low=0, clip_high=0,
                    warmup_steps=0, weight_decay=0, kl_coef=0, rehearse_n=1)
    for name in ("max_grad_norm", "temperature", "rehearse_coef", "tis_cap"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0")
    if bool(args.kl_coef) != bool(args.ref_model):
        parser.error("--kl-coef and --ref-model go together")
    if bool(args.rehearse_coef) != bool(args.rehearse):
        parser.error("--rehearse and --rehearse-coef go together")
    if args.rehearse:
        args.rehearse_weight = args.rehearse_weight or "samples"
    elif args.rehearse_n or args.rehearse_weight:
        parser.error("--rehearse-n and --rehearse-weight belong to --rehearse")
    unshared = args.checkpoint_activations or args.shard
    if args.share_prompts and unshared:
        parser.error("--share-prompts excludes --checkpoint-activations, which drops the prompt's "
                     "cache, and --shard, whose ranks must call each layer equally often")
    if args.share_prompts is None:
        args.share_prompts = not unshared
    args.out = args.out.rstrip("/")
    return parser.checked(args)


if __name__ == "__main__":
    ARGS = parse_args()  # before the heavy imports: --help and a wrong flag answer at once
    gc.disable()  # until `run`: looking through what they make takes an eighth of a start

# ---- Imports -------------------------------------------------------------------------------------
import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.models import (OF_TRAINING, autocast, check_model, device_and_dtype, earlier_round,
                         empty_model, fill, folder_of, load_errors, load_model, load_optimizer,
                         load_tokenizer, positions_of, save_round, source_of)
from data.rollouts import (check_ids, draw_answers, load_answers, load_rollouts, plan_update,
                           sampling_of, write_rollouts)

# By its own folder: `kernels` is also a package of Hugging Face, and both may be installed.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
from fused_linear_entropy import choose_backend, fused_linear_entropy
from shared_prompt import (
    attention_of, distinct_rows, repeated_hidden, shared_hidden, shares_prompts)

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here

# Flags that change no byte of the output, and inputs, whose digests are compared instead.
FREE_FLAGS = ("out", "rollouts", "model", "ref_model", "rehearse", "rank_timeout", "device")


# ---- The objective -------------------------------------------------------------------------------
@dataclasses.dataclass
class Batch:
    """What an objective sees: the verdicts of the whole round, the tokens of one micro-batch.

    reward    (groups, n) float   r of each rollout
    correct   (groups, n) bool    the sign of the smoothing: a reward above 0 is not correctness
    length    (groups, n) long    completion tokens of each rollout
    old_logp  (tokens,) float     log pi_old of each completion token at T, detached
    row       (tokens,) long      the token's rollout, an index into groups * n; rollouts are whole
    mean_logp (groups, n) float   mean_t log pi_old of each rollout, as the sampler recorded it;
                                  0 of a rollout without tokens
    and every field of the rows that NAME.fields names: a list of n values a group
    """
    reward: torch.Tensor
    correct: torch.Tensor
    length: torch.Tensor
    old_logp: torch.Tensor | None = None
    row: torch.Tensor | None = None
    mean_logp: torch.Tensor | None = None
    fields: dict = dataclasses.field(default_factory=dict)

    def __getattr__(self, name):
        if name in vars(self).get("fields", ()):
            return self.fields[name]
        raise AttributeError(f"a batch has no {name!r}; of the rows it has what .fields names")


def grpo(batch, adv_norm="std", eps=1e-6):
    """A_i = (r_i - mean(r)) / (std(r) + eps), std of the population: (tokens,).

    Groups with equal rewards, and groups of one, get 0.
    """
    # Relative to the first: in fp32 the mean of three times 0.1 is not 0.1, whose score must be 0.
    reward = batch.reward - batch.reward[:, :1]
    score = reward - reward.mean(1, keepdim=True)
    if adv_norm == "std":
        score = score / (reward.std(1, keepdim=True, correction=0) + eps)
    return score.flatten()[batch.row]


def ds_grpo(batch, gamma_p, gamma_n, smooth_level="token", adv_norm="std"):
    """GRPO with differential smoothing: (tokens,). Upper sign: correct; S_i = log pi_old(y_i|x).

    token     A_i,t = A_i -+ gamma log pi_old(y_i,t)      the authors' code, Aug 2025
    sum       A_i,t = A_i -+ gamma S_i                    Eq. 6 as printed
    mean      A_i,t = A_i -+ gamma S_i / |y_i|
    share     A_i,t = A_i -+ gamma S_i / |y_i|^2          ..., Oct and Nov 2025
    reward    r'_i = r_i -+ gamma S_i / |y_i|;  A_i,t = r'_i - mean(r')         ..., last version
    """
    gamma = torch.where(batch.correct, -gamma_p, gamma_n)  # bonus if correct, penalty if not
    if smooth_level == "reward":
        reward = batch.reward + gamma * batch.mean_logp
        return (reward - reward.mean(1, keepdim=True)).flatten()[batch.row]
    logp = batch.old_logp
    if smooth_level != "token":
        total = torch.zeros_like(batch.reward.flatten()).index_add(0, batch.row, logp)  # S_i
        power = {"sum": 0, "mean": 1, "share": 2}[smooth_level]
        logp = (total / batch.length.flatten().clamp(min=1) ** power)[batch.row]
    return grpo(batch, adv_norm) + gamma.flatten()[batch.row] * logp


def clipped_loss(logp, batch, advantage, clip_low, clip_high):
    """The loss of every token, and where rho was clipped from below and above (bool): (tokens,).

    - min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A),  rho = pi / pi_old
    """
    # At most e^20: a ratio beyond fp32 would give a clipped token the gradient 0 * inf.
    ratio = (logp - batch.old_logp).clamp(max=20).exp()
    low = (ratio < 1 - clip_low) & (advantage < 0)
    high = (ratio > 1 + clip_high) & (advantage > 0)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantage, clipped * advantage), low, high


def k3(logp, other):
    """Schulman's low-variance, non-negative estimate of KL(pi || other) at tokens drawn from pi.

    exp(d) - d - 1,  d = log other - log pi
    """
    d = (other - logp).clamp(max=20)
    return d.expm1() - d


# ---- One update ----------------------------------------------------------------------------------
@dataclasses.dataclass(kw_only=True)
class Job:
    """What all updates of a round share."""
    args: argparse.Namespace
    rank: int
    world: int
    device: str
    dtype: torch.dtype  # of the forward pass
    rows: list  # of data/rollouts.py: Trajectory
    verdicts: Batch  # of the whole round, without the tokens of a micro-batch
    answers: list  # rows to rehearse, a list a problem
    plan: typing.Callable  # (rows, members) -> this rank's micro-batches of them
    advantage: typing.Callable  # as choose_method returns them
    loss: typing.Callable
    policy: Policy
    module: torch.nn.Module  # the policy under DDP or FSDP2, whose forward is called
    no_sync: typing.Callable  # the context of the passes before an update's last
    optimizer: torch.optim.Optimizer
    old_logp: dict = None  # row -> (tokens,) log pi_old; None in the first update, where it is pi
    ref_logp: dict = None  # row -> (tokens,) log-probs of --ref-model


def plan_members(job, members):
    """This rank's micro-batches of some rows, as (rows, whether they have a gradient): GRPO's loss
    has none in a dead group, which counts in the metrics alone."""
    args, reward = job.args, job.verdicts.reward
    more = args.kl_coef, args.entropy_coef, args.entropy_coef_correct, args.entropy_coef_wrong
    learns = (reward != reward[:, :1]).any(1).tolist()  # a group each
    if args.method != "grpo" or any(more):
        learns = [True] * len(learns)
    parts = [(one, [i for i in members if learns[job.rows[i].group] == one])
             for one in (False, True)]
    return [(micro, one) for one, part in parts if one or part
            for micro in job.plan(job.rows, part)]


@torch.no_grad()
def log_probs(job, module, updates, label):
    """{row: (tokens,) log-probs under `module`} of this rank's rows of some updates."""
    logprobs = {}
    for members in tqdm(updates, label, disable=None if job.rank == 0 else True):
        for micro, _ in plan_members(job, members):
            logp, _, _ = forward(module, job.rows, micro, job.device, job.dtype)
            if micro:
                lengths = [len(job.rows[i].completion) for i in micro]
                logprobs.update(zip(micro, logp.split(lengths)))
    return logprobs


def token_losses(job, micro, logp, entropy, row, metrics):
    """The loss of every completion token of a micro-batch, (tokens,), before it is normalised."""
    args = job.args
    first = job.old_logp is None
    old = logp.detach() if first else torch.cat([job.old_logp[i] for i in micro])
    batch = dataclasses.replace(job.verdicts, old_logp=old, row=row)
    advantage = job.advantage(batch)
    loss, low, high = job.loss(logp, batch, advantage)
    if not advantage.shape == loss.shape == logp.shape:
        raise ValueError(f"{args.method} must return a value a token, {tuple(logp.shape)}, not "
                         f"{tuple(advantage.shape)} and {tuple(loss.shape)}")
    sampler = np.concatenate([job.rows[i].logprobs for i in micro])
    gap = old - torch.as_tensor(sampler, device=job.device)
    if args.tis_cap:  # the expectation over the engine's samples becomes one over pi_old's
        weight = gap.clamp(max=20).exp()
        loss = loss * weight.clamp(max=args.tis_cap)
        metrics.add(tis=weight.clamp(max=args.tis_cap), tis_capped=weight > args.tis_cap)
    right = batch.correct.flatten()[row]
    of_kind = torch.where(right, args.entropy_coef_correct, args.entropy_coef_wrong)
    loss = loss - (args.entropy_coef + of_kind) * entropy
    if args.ref_model:
        loss = loss + args.kl_coef * k3(logp, torch.cat([job.ref_logp[i] for i in micro]))
    with torch.no_grad():
        gamma = torch.where(right, float(args.gamma_p or 0), float(args.gamma_n or 0))
        metrics.add(loss=loss, entropy=entropy, entropy_correct=entropy * right, right=right,
                    nll=-logp, gap=gap.abs(), low=low, high=high, kl=k3(old, logp), adv=advantage,
                    adv2=advantage.double() ** 2, smooth=(gamma * old).abs(),
                    ratio=(logp - old).clamp(max=88).exp())
    return loss


def update_step(job, members, step, optimizer_step):
    """One optimizer step on the rows `members`; its line of metrics (a dict).

    step: updates in the life of the model; optimizer_step: those since its moments began.
    """
    began, args = time.monotonic(), job.args
    # 1. Gradients, micro-batch by micro-batch. `tokens`, over all ranks, is the one normaliser.
    tokens = sum(len(job.rows[i].completion) for i in members if job.rows[i].used)
    answers = draw_answers(job.answers, args.rehearse_n or len(members), (args.seed, step))
    answer_tokens = sum(len(row.completion) for row in answers)
    work = [(job.rows, micro, learns, tokens) for micro, learns in plan_members(job, members)]
    if answers:
        plan = job.plan(answers, range(len(answers)))
        work += [(answers, micro, True, answer_tokens) for micro in plan]
    metrics = Metrics()
    for number, (rows, micro, learns, count) in enumerate(work):
        last = number == len(work) - 1
        with contextlib.nullcontext() if last else job.no_sync(), torch.set_grad_enabled(learns):
            logp, entropy, row = forward(job.module, rows, micro, job.device, job.dtype)
            if not micro:
                loss = 0 * logp
            elif rows is answers:
                # Drawn by `samples` this is, up to a constant and a factor, the forward KL to the
                # base filtered by the verifier: DPH-RL (arXiv 2509.07430), the limit of alpha-DPG
                # (2512.05962).
                loss = -args.rehearse_coef * logp
                metrics.add(rehearsed=-logp.detach())
            else:
                loss = token_losses(job, micro, logp, entropy, row, metrics)
            if learns:  # DDP takes the mean over ranks; the loss is one sum over all.
                (loss.sum() * job.world / max(count, 1)).backward()
    metrics.reduce(job.device, job.world)

    # 2. A step that is not finite is refused.
    norm = torch.nn.utils.clip_grad_norm_(job.policy.parameters(), args.max_grad_norm)
    norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
    loss = metrics.sums["loss"] + metrics.sums["rehearsed"]
    if not (math.isfinite(loss) and math.isfinite(norm)):
        refuse(job, members, f"step {step + 1}: loss {loss}, gradient norm {norm}")

    # 3. AdamW.
    lr = args.lr * min(1.0, (optimizer_step + 1) / max(args.warmup_steps, 1))
    for group in job.optimizer.param_groups:
        group["lr"] = lr
    job.optimizer.step()
    job.optimizer.zero_grad(set_to_none=True)
    return metrics.line(job, members, step + 1, tokens, answer_tokens, norm, lr,
                        seconds=time.monotonic() - began)


# ---- The policy ----------------------------------------------------------------------------------
def forward(module, rows, micro, device, dtype):
    """logp, entropy (tokens,) of a micro-batch, and each token's row.

    micro: row indices; an empty one computes one token, for the ranks to stay in step.
    """
    prompts = [rows[i].prompt for i in micro] or [[0]]
    completions = [rows[i].completion for i in micro] or [np.zeros(1, np.int64)]
    with autocast(device, dtype):
        logp, entropy = module(prompts, completions)
    row = np.repeat(micro or [0], [len(completion) for completion in completions])
    return logp, entropy, torch.as_tensor(row, device=device)


class Policy(torch.nn.Module):
    """What DDP wraps: ids in, log-prob and entropy of every completion token out.

    The head runs inside, under DDP's hooks. by_rows: whether each rank read its own rows of the
    weights, and is to write them.
    """

    def __init__(self, model, temperature, share_prompts, by_rows=False):
        super().__init__()
        self.model, self.temperature, self.share = model, temperature, share_prompts
        self.by_rows = by_rows
        self.head, config = model.get_output_embeddings(), model.config.get_text_config()
        self.cap = getattr(config, "final_logit_softcapping", None)
        scaling = getattr(config, "logits_scaling", None) or 1
        self.scale = getattr(config, "logit_scale", None) or 1 / scaling

    def forward(self, prompts, completions):
        """prompts, completions: ids, a row each -> logp, entropy (tokens,) fp32, row after row."""
        prompts, completions, places = distinct_rows(prompts, completions)
        hidden_of = shared_hidden if self.share else repeated_hidden
        hidden = hidden_of(self.model, prompts, completions)
        targets = torch.as_tensor(np.concatenate(completions), device=hidden.device)
        logp, entropy, _ = fused_linear_entropy(
            hidden, self.head.weight, targets, self.temperature, bias=self.head.bias,
            softcap=self.cap, scale=self.scale)
        places = torch.as_tensor(places, device=hidden.device)
        return logp.index_select(0, places), entropy.index_select(0, places)

    @torch.no_grad()
    def check(self, name, rows=()):
        """Refuse a model that this class would get wrong, and rows with ids beyond its vocabulary.

        The logits must be the model's own, also after a prompt that is shared through its cache."""
        if not isinstance(self.head, torch.nn.Linear):
            fail(f"{name}: unsupported head: not a linear layer but {type(self.head).__name__}")
        decoder = self.model.get_decoder()
        used = {id(weight) for part in (decoder, self.head) for weight in part.parameters()}
        for key, weight in self.model.named_parameters():
            if id(weight) not in used:
                fail(f"{name}: unsupported architecture: {key} belongs neither to the text decoder "
                     f"nor to its head")
        ids = torch.arange(4, device=self.head.weight.device)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        hidden = getattr(decoder(input_ids=ids, use_cache=False), "last_hidden_state", None)
        if hidden is None:
            fail(f"{name}: unsupported architecture: its decoder returns no hidden states")
        logits = self.head(hidden[0]).float()  # in the kernel's order: the cap, then the scale
        logits = self.scale * (self.cap * torch.tanh(logits / self.cap) if self.cap else logits)
        if not torch.allclose(logits, expected, atol=1e-3, rtol=1e-3):
            fail(f"{name}: unsupported head: its logits are not a (soft-capped, scaled) linear map "
                 f"of the last hidden states")
        if self.share and not shares_prompts(self.model):
            fail(f"{name}: a prompt cannot be shared through the cache of this architecture; give "
                 f"--no-share-prompts")
        positions = positions_of(self.model.config.get_text_config())
        check_ids(rows, len(self.head.weight), positions, name)


def checkpoint_activations(model):
    """Recompute activations in the backward pass. transformers wants training mode for the layers
    that do; dropout and noise stay off, so that rho starts at 1."""
    enable = getattr(model, "activation_checkpointing_enable", None)
    enable = enable or model.gradient_checkpointing_enable  # the name before transformers 5.24
    enable({"use_reentrant": False})
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


# ---- Metrics -------------------------------------------------------------------------------------
class Metrics:
    """Sums and maxima over the completion tokens of an update, of all micro-batches and ranks."""
    SUMS = ("loss", "entropy", "entropy_correct", "right", "nll", "gap", "low", "high", "kl", "adv",
            "adv2", "smooth", "rehearsed", "tis", "tis_capped")
    PEAKS = ("gap", "ratio")

    def __init__(self):
        self.sums, self.peaks = dict.fromkeys(self.SUMS, 0.0), dict.fromkeys(self.PEAKS, 0.0)

    def add(self, **terms):
        """A value a token, (tokens,), of each of SUMS and PEAKS; those of PEAKS are at least 0."""
        for name, term in terms.items():
            if name in self.sums:
                self.sums[name] = self.sums[name] + term.double().sum()
            if name in self.peaks:
                self.peaks[name] = term.max().double().clamp(min=self.peaks[name])

    def reduce(self, device, world):
        """Over all ranks; then each is a number."""
        for kept, op in (self.sums, dist.ReduceOp.SUM), (self.peaks, dist.ReduceOp.MAX):
            values = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device)
                                  for value in kept.values()])
            if world > 1:
                dist.all_reduce(values, op)
            kept.update(zip(kept, values.tolist()))

    def line(self, job, members, step, tokens, answer_tokens, norm, lr, seconds):
        """The update's line of metrics.jsonl; data/README.md explains each key.

        members: its rows; tokens, answer_tokens: those in the loss and in what is rehearsed.
        """
        sums, count, args = self.sums, max(tokens, 1), job.args
        mean, wrong = {name: value / count for name, value in sums.items()}, tokens - sums["right"]
        rows, n = [job.rows[i] for i in members], job.verdicts.reward.shape[1]
        reward = job.verdicts.reward.flatten()[members].view(-1, n)  # (groups of the update, n)
        correct = job.verdicts.correct.flatten()[members].view(-1, n)
        memory = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
                  if job.device == "cpu" else torch.cuda.max_memory_allocated())
        optional = {}
        if answer_tokens:
            optional["rehearse_nll"] = sums["rehearsed"] / answer_tokens
            mean["loss"] += args.rehearse_coef * optional["rehearse_nll"]
        if args.tis_cap:
            optional |= {"tis_mean": mean["tis"], "tis_capped_frac": mean["tis_capped"]}
        return {
            "step": step, "loss": mean["loss"],
            "reward": reward.mean().item(), "pass@1": correct.float().mean().item(),
            "pass@n": correct.any(1).float().mean().item(),
            "entropy": mean["entropy"],
            "entropy_correct": sums["entropy_correct"] / sums["right"] if sums["right"] else None,
            "entropy_wrong": (sums["entropy"] - sums["entropy_correct"]) / wrong if wrong else None,
            "nll": mean["nll"], "logprob_gap": mean["gap"], "logprob_gap_max": self.peaks["gap"],
            "ratio_max": self.peaks["ratio"],
            "clip_low_frac": mean["low"], "clip_high_frac": mean["high"], "approx_kl": mean["kl"],
            "grad_norm": norm, "lr": lr,
            "adv_std": max(mean["adv2"] - mean["adv"] ** 2, 0) ** 0.5, "smooth_abs": mean["smooth"],
            "dead_groups": (reward == reward[:, :1]).all(1).float().mean().item(),
            "completion_len": sum(len(row.completion) for row in rows) / len(rows),
            "truncated_frac": sum(row.truncated for row in rows) / len(rows),
            "tokens": tokens, "tokens_per_s": tokens / seconds, "peak_mem_bytes": memory,
            **optional,
        }


def print_round(out, lines, n):
    """Print the means over this round's lines of metrics.jsonl; on stderr, what to raise."""
    mean = {key: sum(line[key] for line in lines) / len(lines)
            for key in ("pass@1", "pass@n", "entropy", "completion_len", "truncated_frac")}
    print(f"Pass@1 {mean['pass@1']:.3f}  Pass@{n} {mean['pass@n']:.3f}  "
          f"entropy {mean['entropy']:.3f}  length {mean['completion_len']:.1f}  "
          f"truncated {mean['truncated_frac']:.3f}", flush=True)
    if mean["truncated_frac"] > 0.5:
        print(f"{out}: {mean['truncated_frac']:.0%} of the completions were cut at the length "
              f"limit; raise --max-new-tokens of generate.py", file=sys.stderr)


# ---- The choice of the objective -----------------------------------------------------------------
def choose_method(args):
    """--method as advantage(batch), loss(logp, batch, advantage), and the row fields it reads.

    FILE.py:NAME: NAME(batch, **settings) returns the advantage of every completion token,
    (tokens,). NAME_loss(logp, batch, advantage, clip_low, clip_high, **settings), if the file has
    it, returns the loss of every token in place of the clipped surrogate, or that with two bool
    tensors (tokens,): where it clipped rho from below and from above. Each function gets what it
    names of the settings and the clip range. NAME.fields: row fields that the batch will hold.
    An error inside the file is a traceback of its author's own code.
    """
    clip = {name: getattr(args, name) for name in CLIP}
    loss = functools.partial(clipped_loss, **clip)
    if args.method == "grpo":
        return functools.partial(grpo, adv_norm=args.adv_norm), loss, ()
    if args.method == "ds-grpo":
        return functools.partial(ds_grpo, gamma_p=args.gamma_p, gamma_n=args.gamma_n,
                                 smooth_level=args.smooth_level, adv_norm=args.adv_norm), loss, ()
    sys.modules.setdefault("train", sys.modules[__name__])  # a file may `from train import grpo`
    path, name = args.method.rsplit(":", 1)
    spec = importlib.util.spec_from_file_location(f"method_{name}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass in it looks itself up
    spec.loader.exec_module(module)
    objective, own_loss = getattr(module, name, None), getattr(module, f"{name}_loss", None)
    if not callable(objective):
        fail(f"{path}: no function {name} in this file")
    settings = accepted(objective, args.arm)
    loss_settings = accepted(own_loss, {**clip, **args.arm}) if own_loss else {}
    for key in args.arm:
        if key not in settings and key not in loss_settings:
            fail(f"{args.method}: has no setting {key!r}")
    for key, value in clip.items() if own_loss else ():
        if key not in loss_settings and value != CLIP[key]:
            fail(f"--{key.replace('_', '-')}: {args.method}_loss does not take it")

    def loss_and_clipped(logp, batch, advantage):
        result = own_loss(logp, batch, advantage, **loss_settings)
        nowhere = torch.zeros_like(batch.row, dtype=torch.bool)
        return result if isinstance(result, tuple) else (result, nowhere, nowhere)

    fields = tuple(getattr(objective, "fields", ()))
    for key in {field.name for field in dataclasses.fields(Batch)} & set(fields):
        fail(f"{args.method}: .fields names {key!r}, which a batch holds already")
    return functools.partial(objective, **settings), loss_and_clipped if own_loss else loss, fields


def accepted(function, settings):
    """Those of `settings` that `function` names as arguments; all, if it takes any."""
    parameters = inspect.signature(function).parameters
    takes_any = any(one.kind is one.VAR_KEYWORD for one in parameters.values())
    return {key: value for key, value in settings.items() if takes_any or key in parameters}


# ---- Several processes ---------------------------------------------------------------------------
# Rank 0 checks the input, claims the output, reports errors and writes; the others wait for its
# claim (data/files.py: wait_for_rank_0).
def start_ranks(device, world, timeout):
    """Join the process group, if there are several. timeout: seconds that one waits for another."""
    if world > 1:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl",
                                timeout=datetime.timedelta(seconds=timeout))


def end_ranks():
    """Wait for the other processes and leave the group. The caller must hold what this returns
    until nothing of the round, least of all DDP's model, is left.

    Were gloo's own thread the last to release the barrier, it would wait for the GIL, which this
    thread keeps while the destructor of the group, which DDP's model holds, waits for that thread:
    a deadlock."""
    barrier = dist.barrier(async_op=True)
    barrier.wait()
    dist.destroy_process_group()
    return barrier


def over_ranks(policy, device, world, shard):
    """(the module to call, a context for the backward passes before an update's last).

    DDP: a copy of the policy on every rank, whose gradients are summed in the last pass. shard:
    FSDP2, every decoder layer, then the rest, in shards over all ranks; gradients are summed in
    every pass, because waiting would keep all of them on every rank.
    """
    if world == 1:
        return policy, contextlib.nullcontext
    if not shard:
        copies = DistributedDataParallel(policy, gradient_as_bucket_view=True)
        return copies, copies.no_sync
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    layers = getattr(policy.model.get_decoder(), "layers", None)
    if layers is None:
        fail("--shard: unsupported architecture: its decoder has no `layers`")
    mesh = init_device_mesh(device.split(":")[0], (world,))
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    register_fsdp_forward_method(policy, "check")  # it calls parts of the model by themselves
    return policy, contextlib.nullcontext


def load_policy(name, options, temperature, rows, args, device, world, trained=True):
    """(policy, the module to call, its no_sync context), on all ranks, checked with `rows`.

    trained: whether it will be; a reference is not, and needs no gradients over ranks.

    Under --shard no rank holds the whole model at any time, unless its files spell the weights
    otherwise than the model does: then every rank loads all of it before it is sharded.
    """
    files, shard = {}, args.shard and world > 1
    if shard:
        with load_errors(name):
            model, files = empty_model(name, options)
    if not files:
        model = load_model(name, torch.float32, device, options)
    policy = Policy(model, temperature, args.share_prompts, by_rows=bool(files))
    module, no_sync = over_ranks(policy, device, world if trained or shard else 1, shard)
    if files:
        with load_errors(name):
            fill(model, files)
        model.to(device)  # its buffers
    policy.check(name, rows)
    if shard:
        policy.reshard()  # a forward pass leaves what is not in a layer gathered
    return policy, module, no_sync


def refuse(job, members, reason):
    """End all ranks with exit 3; the update's rows are kept in OUT.refused.jsonl."""
    path = f"{job.args.out}.refused.jsonl"
    if job.rank == 0:
        write_rollouts(path, [job.rows[i] for i in members])
    if dist.is_initialized():
        dist.barrier()
    if job.rank == 0:
        fail(f"{reason}: the update is refused, nothing was changed; its rows are kept in {path}",
             3)
    sys.exit(3)


@contextlib.contextmanager
def report_lost_ranks(timeout):
    """Where another rank ends or hangs, this one says so in one line."""
    try:
        yield
    except RuntimeError as error:  # gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, in the middle of the exit
        reason = re.sub(r"^\[\S*\] | This is typically.*", "", str(error))
        fail(f"rank {os.environ['RANK']}: another rank ended, or did not answer in {timeout:.0f} s "
             f"({reason}); the same command does this round again", 4)


# ---- The round -----------------------------------------------------------------------------------
def verdicts_of(groups, fields, device):
    """The Batch of a whole round, to which each micro-batch adds its tokens."""
    def table(value):
        return torch.tensor([[value(row) for row in group] for group in groups], device=device)

    return Batch(table(lambda row: row.reward), table(lambda row: row.correct),
                 table(lambda row: len(row.completion)),
                 mean_logp=table(lambda row: sum(row.logprobs.tolist())
                                 / max(len(row.completion), 1)),
                 fields={name: [[row.fields[name] for row in group] for group in groups]
                         for name in fields})


def deal(count, n, updates, seed, step):
    """Row indices of every update: `count` groups of n rows, shuffled by (seed, step), dealt into
    updates whose sizes differ by at most one group."""
    order = np.random.default_rng([seed, step]).permutation(count)
    return [[group * n + k for group in part for k in range(n)]
            for part in np.array_split(order, updates)]


def sources(args):
    """What the round is made from, and the from_pretrained options of --model and --ref-model."""
    options, ref_options = check_model(args.model, args.trust_remote_code), None
    inputs = [args.rollouts, source_of(args.model, options)]
    # Of a reference, and by generate.py, the weights alone are read.
    inputs += [file for name, file in files_of(args.model) if name.startswith(OF_TRAINING)
               and not (args.reset_optimizer and name.startswith("optimizer"))]
    if args.ref_model:
        ref_options = check_model(args.ref_model, args.trust_remote_code)
        inputs.append(source_of(args.ref_model, ref_options))
    if args.rehearse:
        inputs.append(args.rehearse)
    if ":" in args.method:
        inputs.append(args.method.rsplit(":", 1)[0])
    return inputs, options, ref_options


def announce(job):
    """Print in one line what was chosen; return what of it the flags do not say, for the meta."""
    args, (groups, n) = job.args, job.verdicts.reward.shape
    attention, shards = attention_of(job.policy.model), job.world if args.shard else 1
    weights = sum(weight.numel() for weight in job.policy.parameters())
    print(f"{args.model} on {job.device} x {job.world}{' sharded' if shards > 1 else ''}, "
          f"{str(job.dtype).removeprefix('torch.')} over fp32 weights, attention "
          f"{attention}, prompts {'shared' if args.share_prompts else 'repeated'}: {groups} groups "
          f"x {n}, {args.updates} updates of {args.method}, T = {job.policy.temperature}; "
          f"{16 * weights / shards / 2**30:.2f} GiB a rank for weights, gradients and Adam, "
          f"plus activations", file=sys.stderr)
    backend = choose_backend(job.device.split(":")[0], None)
    return {"attention": attention, "backend": backend}


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
        fail(f"--updates {args.updates} is more than the {len(groups)} groups of {args.rollouts}")
    answers = load_answers(args.rehearse, sampling["temperature"], args.rehearse_weight,
                           args.allow_off_policy) if args.rehearse else []
    device, dtype = device_and_dtype(args)
    if rank == 0:
        meta = describe(args, inputs, OF_TRAINING, sampling=sampling, device=device,
                        dtype=str(dtype).removeprefix("torch."), world_size=world)
        if not claim_empty(args.out, meta, FREE_FLAGS):
            return

    # 2. The policy, its optimizer, and the processes that share the work.
    start_ranks(device, world, args.rank_timeout)
    load_tokenizer(args.model, options)  # it must be there: a round takes over its files
    temperature = sampling["temperature"]
    load = functools.partial(load_policy, temperature=temperature, rows=rows + sum(answers, []),
                             args=args, device=device, world=world)
    policy, module, no_sync = load(args.model, options)
    if args.ref_model:
        reference, _, _ = load(args.ref_model, ref_options, trained=False)
    if args.checkpoint_activations:
        checkpoint_activations(policy.model)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay,
                                  fused=True)
    step, optimizer_step, lines = earlier_round(args.model)
    if args.reset_optimizer:
        optimizer_step = 0
    elif optimizer_step:
        load_optimizer(optimizer, policy, args.model, optimizer_step)
    plan = functools.partial(plan_update, rank=rank, world=world, budget=args.micro_batch_tokens,
                             share=args.share_prompts)
    job = Job(args=args, rank=rank, world=world, device=device, dtype=dtype, rows=rows,
              verdicts=verdicts_of(groups, fields, device), answers=answers, plan=plan,
              advantage=advantage, loss=loss, policy=policy, module=module, no_sync=no_sync,
              optimizer=optimizer)
    if rank == 0:
        meta |= announce(job)

    # 3. Log-probs that no update may change, and the updates.
    updates = deal(len(groups), n, args.updates, args.seed, step)
    if args.ref_model:
        job.ref_logp = log_probs(job, reference, updates, "reference")
        del reference
    old_logp, done = log_probs(job, module, updates[1:], "pi_old"), []
    for members in tqdm(updates, "updates", disable=None if rank == 0 else True):
        done.append(update_step(job, members, step, optimizer_step))
        job.old_logp, step, optimizer_step = old_logp, step + 1, optimizer_step + 1
    lines += [json.dumps(line) + "\n" for line in done]

    # 4. The folder.
    state = {"step": step, "optimizer_step": optimizer_step, "flags": vars(args)}
    save_round(args.out + ".partial", policy, optimizer, state, lines,
               folder_of(args.model, options))
    if rank == 0:
        publish(args.out, {**meta, "wall_s": time.monotonic() - began})
        print_round(args.out, done, n)
    return end_ranks() if world > 1 else None


def main(args):
    with report_lost_ranks(args.rank_timeout):
        barrier = train(args)
    del barrier


if __name__ == "__main__":
    run(main, ARGS)
