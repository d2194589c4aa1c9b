"""Stage 3: update a policy on one round of scored rollouts with DS-GRPO (arXiv 2511.19942), GRPO and its rivals.

    python train.py --model data/tiny-countdown --rollouts scored.jsonl --out round-001 --method ds-grpo --gamma-p 0.01 --gamma-n 0.01
    torchrun --nproc-per-node 8 train.py --model round-001 --rollouts scored.jsonl --out round-002 --updates 4 --lr 1e-6

Reads scored.jsonl, one sample a line: `id`, `sample`, `prompt_ids`, `completion_ids`, `logprobs`, `finish_reason`, `correct`,
`reward`; samples with one id are a group, and all groups have the same size. Its meta gives the sampling temperature.
Writes the folder OUT, an ordinary Hugging Face model (fp32 master weights) with optimizer.safetensors, trainer_state.json and
metrics.jsonl (one line an update, carried on from the input folder), from which the next round goes on.

The objective, for n rollouts y_1..y_n of each prompt x, sampled from pi_old, r_i = 1 if correct, else 0:

    A_i   = (r_i - mean(r)) / (std(r) + eps)                                          GRPO
    A_i,t = A_i - gamma_p log pi_old(y_i,t)   if y_i is correct                       Eq. 6: entropy bonus
            A_i + gamma_n log pi_old(y_i,t)   otherwise                                     entropy penalty
    rho_t = pi(y_t | x, y_<t) / pi_old(y_t | x, y_<t)
    loss  = - sum over tokens of min(rho_t A_t, clip(rho_t, 1 - clip_low, 1 + clip_high) A_t) / all completion tokens of the update

All log-probs are of logits / T. The update, in the order of the code: read and group the rows; pi_old of all rows before any step
(the first update's is its own forward pass, at no cost); per update, micro-batches without padding in the head, each
prompt computed once for all its samples; loss; clipped AdamW step on fp32 masters; metrics summed over micro-batches and ranks.
"""
import argparse
import contextlib
import datetime
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import time

from data.files import Parser, claim, describe, fail, publish, read_rows, run


def parse_args(argv=None):
    parser = Parser(__file__, description=__doc__)
    # files
    parser.add_argument("--model", required=True, help="folder of a Hugging Face model (or of an earlier round), or a Hub id")
    parser.add_argument("--rollouts", required=True, help="JSONL file of scored rollouts")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--temperature", type=float, help="sampling temperature of rollouts whose meta does not say it")
    parser.add_argument("--allow-off-policy", action="store_true", help="take rollouts of a truncated or penalised sampler (top-p, "
                        "top-k, repetition penalty), whose log-probs are not those of the policy")
    # the advantage
    parser.add_argument("--method", default="ds-grpo", choices=["ds-grpo", "grpo", "passk", "cispo", "w-reinforce"], help="default %(default)s")
    parser.add_argument("--gamma-p", type=float, help="ds-grpo: weight of -log pi_old on correct rollouts (default 0.01)")
    parser.add_argument("--gamma-n", type=float, help="ds-grpo: weight of +log pi_old on wrong rollouts (default 0.01)")
    parser.add_argument("--smooth-level", choices=["token", "sequence", "reward"], help="ds-grpo: log pi_old of each token, its mean over the "
                        "completion, or that mean added to the reward before the group's mean is taken off (default token)")
    parser.add_argument("--adv-norm", default="std", choices=["std", "none"], help="divide A_i by the group's population std, or not "
                        "(default %(default)s)")
    parser.add_argument("--pass-k", type=int, help="passk: the k of Pass@k (default 4)")
    parser.add_argument("--positive-weight", type=float, help="w-reinforce: weight of correct rollouts (default 0.1)")
    parser.add_argument("--truncated", default="wrong", choices=["wrong", "mask"], help="rollouts cut at the length limit: wrong with reward "
                        "0, or kept in the group's statistics and left out of the loss (default %(default)s)")
    # the loss
    parser.add_argument("--clip-low", type=float, default=0.2, help="rho is clipped at 1 - this (default %(default)s)")
    parser.add_argument("--clip-high", type=float, default=0.25, help="rho is clipped at 1 + this (default %(default)s)")
    parser.add_argument("--entropy-coef", type=float, default=0.0, help="c of loss -= c H_t, averaged over all completion tokens; c > 0 is a "
                        "bonus, c < 0 a penalty (default %(default)s)")
    parser.add_argument("--entropy-coef-correct", type=float, default=0.0, help="the same on correct rollouts alone (default %(default)s)")
    parser.add_argument("--entropy-coef-wrong", type=float, default=0.0, help="the same on wrong rollouts alone (default %(default)s)")
    parser.add_argument("--kl-coef", type=float, default=0.0, help="weight of the k3 estimate of KL(pi || ref) (default %(default)s)")
    parser.add_argument("--ref-model", help="the reference model of --kl-coef")
    # the optimizer
    parser.add_argument("--updates", type=int, default=1, help="optimizer steps: the shuffled groups are dealt into so many mini-batches "
                        "(default %(default)s)")
    parser.add_argument("--lr", type=float, default=1e-6, help="AdamW's learning rate (default %(default)s)")
    parser.add_argument("--warmup-steps", type=int, default=0, help="steps of linear warm-up, counted over all rounds (default %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="AdamW's decoupled weight decay (default %(default)s)")
    parser.add_argument("--max-grad-norm", type=float, default=1.0, help="the gradient is scaled down to this norm (default %(default)s)")
    parser.add_argument("--reset-optimizer", action="store_true", help="start with fresh moments and step 0")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle (default %(default)s)")
    # machine
    parser.add_argument("--micro-batch-tokens", type=int, default=4096, help="most tokens, padding included, in one forward and backward pass "
                        "(default %(default)s)")
    parser.add_argument("--share-prompts", action=argparse.BooleanOptionalAction, help="compute each prompt once for all its samples, with "
                        "gradients through its key-value cache (default: yes, unless --checkpoint-activations or --shard)")
    parser.add_argument("--checkpoint-activations", action="store_true", help="keep one activation a layer and recompute the others")
    parser.add_argument("--shard", action="store_true", help="FSDP2: shard weights, gradients and optimizer over the ranks")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16"], help="of the forward pass, over fp32 master weights; "
                        "auto: float32 on a CPU, bfloat16 autocast on CUDA")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda if there is one")
    parser.add_argument("--rank-timeout", type=float, default=600, help="seconds to wait for another rank (default %(default)s)")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that the model's folder brings along")
    args = parser.parse_args(argv)
    own = {"gamma_p": ("ds-grpo", 0.01), "gamma_n": ("ds-grpo", 0.01), "smooth_level": ("ds-grpo", "token"), "pass_k": ("passk", 4),
           "positive_weight": ("w-reinforce", 0.1)}
    for name, (method, default) in own.items():
        if getattr(args, name) is None:
            setattr(args, name, default if args.method == method else None)
        elif args.method != method and getattr(args, name) != 0:
            parser.error(f"--{name.replace('_', '-')} belongs to --method {method}")
    for name, value in vars(args).items():
        if isinstance(value, float) and not math.isfinite(value):
            parser.error(f"--{name.replace('_', '-')} must be a finite number")
    for name, low in (("updates", 1), ("micro_batch_tokens", 1), ("lr", 0), ("clip_low", 0), ("clip_high", 0), ("warmup_steps", 0),
                      ("weight_decay", 0), ("kl_coef", 0), ("pass_k", 1)):
        if getattr(args, name) is not None and getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')} must be at least {low}")
    if args.max_grad_norm <= 0 or args.rank_timeout <= 0 or (args.temperature is not None and args.temperature <= 0):
        parser.error("--max-grad-norm, --rank-timeout and --temperature must be above 0")
    if bool(args.kl_coef) != bool(args.ref_model):
        parser.error("--kl-coef and --ref-model go together")
    if args.checkpoint_activations and args.share_prompts:
        parser.error("--share-prompts and --checkpoint-activations exclude each other: checkpointing drops the prompt's cache")
    if args.shard and args.share_prompts:
        parser.error("--share-prompts and --shard exclude each other: all ranks must call each sharded layer equally often")
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
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from data.models import check_model, load_model, load_optimizer, load_tokenizer, save_round, source_of

# By its own folder, not as `kernels.`: that name is also a package of Hugging Face, and both may be installed.
sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "kernels"))
from fused_linear_entropy import CHUNK, fused_linear_entropy
from shared_prompt import repeated_hidden, shared_hidden

transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()  # what matters of its warnings is an error here


# ---- The objective ----------------------------------------------------------------------------------------------------
def advantage(reward, correct, old_logp, row, method="grpo", adv_norm="std", gamma_p=0.0, gamma_n=0.0, smooth_level="token",
              pass_k=None, positive_weight=None, mean_logp=None, eps=1e-6):
    """The advantage of every completion token, each arm beside its formula.

    reward    (groups, n) float   r of each rollout
    correct   (groups, n) bool    decides the sign of the smoothing: a reward above 0 is not correctness
    old_logp  (tokens,) float     log pi_old of each completion token at the sampling temperature, detached
    row       (tokens,) long      the token's rollout, an index into groups * n
    mean_logp (groups, n) float   mean_t log pi_old of each rollout; None: taken from these tokens, which hold whole rollouts then
    returns   (tokens,) float
    """
    n = reward.shape[1]
    gamma = torch.where(correct.flatten(), -float(gamma_p or 0), float(gamma_n or 0)).to(reward.dtype)  # Eq. 6: bonus if correct
    if mean_logp is None:
        length = torch.bincount(row, minlength=reward.numel()).clamp(min=1)
        mean_logp = torch.zeros_like(reward.flatten()).index_add(0, row, old_logp.to(reward.dtype)) / length
    mean_logp = mean_logp.flatten()
    if method == "ds-grpo" and smooth_level == "reward":  # r' = r -+ gamma mean_t log pi_old, A = r' - mean(r')
        reward = reward + (gamma * mean_logp).view_as(reward)
        return (reward - reward.mean(1, keepdim=True)).flatten()[row]
    if method == "w-reinforce":  # arXiv 2506.01347: lambda on correct, -1 on wrong, no baseline
        return torch.where(correct, float(positive_weight), -1.0).to(reward.dtype).flatten()[row]
    if method == "passk":  # arXiv 2508.10751, analytic: a group of k rollouts is right if one of them is; its mean advantage for each
        wrong = n - correct.sum(1, keepdim=True).to(reward.dtype)
        def none_right(k, wrong, n):  # C(wrong, k) / C(n, k), as a product
            return torch.stack([((wrong - i) / (n - i)).clamp(min=0) for i in range(k)] or [torch.ones_like(wrong)]).prod(0)
        fails = none_right(pass_k, wrong, n)  # 1 - the mean reward of the groups of k
        std = (fails * (1 - fails)).sqrt()
        score = torch.where(correct, fails, fails - none_right(pass_k - 1, wrong - 1, n - 1))
        return torch.where(std > 0, score / std.clamp(min=eps), 0.0).flatten()[row]
    reward = reward - reward[:, :1]  # so that equal rewards give exactly 0: in fp32 the mean of three times 0.1 is not 0.1
    score = reward - reward.mean(1, keepdim=True)  # GRPO; groups with equal rewards, and of one, get 0
    if adv_norm == "std":
        score = score / (reward.std(1, keepdim=True, correction=0) + eps)
    score = score.flatten()[row]
    if method == "ds-grpo":
        score = score + gamma[row] * (old_logp if smooth_level == "token" else mean_logp[row])
    return score


def policy_loss(logp, old_logp, advantage, clip_low, clip_high, method="grpo"):
    """Per-token loss (tokens,) of the ratio rho = pi / pi_old, and where rho was cut from below and above (bool)."""
    ratio = (logp - old_logp).clamp(max=20).exp()  # a ratio beyond fp32 gives a cut token the gradient 0 * inf
    low, high = (ratio < 1 - clip_low) & (advantage < 0), (ratio > 1 + clip_high) & (advantage > 0)
    if method == "cispo":  # arXiv 2506.13585: the weight is cut and detached, so no token loses its gradient; no lower cut
        return -ratio.detach().clamp(max=1 + clip_high) * advantage * logp, torch.zeros_like(low), ratio > 1 + clip_high
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - clip_low, 1 + clip_high) * advantage), low, high


def k3(logp, other):
    """Schulman's low-variance, non-negative estimate of KL(pi || other) at tokens drawn from pi: exp(d) - d - 1, d = other - logp."""
    d = (other - logp).clamp(max=20)
    return d.expm1() - d


# ---- The rows ---------------------------------------------------------------------------------------------------------
def load_rollouts(path, truncated="wrong"):
    """Read scored rollouts: a list of groups, each a list of n rows (dicts) in the order of `sample`, and n.

    Rows are grouped by `id`, whatever their order in the file. `keep` is False for a row that `--truncated mask` leaves out.
    """
    def is_ints(value):
        return isinstance(value, list) and all(type(x) is int and 0 <= x < 2**31 for x in value)

    checks = {"id": lambda x: isinstance(x, str), "sample": lambda x: type(x) is int, "correct": lambda x: isinstance(x, bool),
              "reward": lambda x: type(x) in (int, float) and abs(x) < 1e9, "prompt_ids": lambda x: is_ints(x) and x, "completion_ids": is_ints,
              "logprobs": lambda x: isinstance(x, list) and all(type(y) in (int, float) and abs(y) < 1e9 for y in x),
              "finish_reason": lambda x: x in ("stop", "length")}
    groups = {}
    for where, _, row in read_rows(path):
        for field, check in checks.items():
            if field not in row:
                fail(f"{where}: missing field '{field}'" + ("; run score.py first" if field in ("correct", "reward") else ""))
            if not check(row[field]):
                fail(f"{where}: wrong type or value in '{field}'")
        if len(row["logprobs"]) != len(row["completion_ids"]):
            fail(f"{where}: {len(row['logprobs'])} logprobs for {len(row['completion_ids'])} completion_ids")
        group = groups.setdefault(row["id"], {})
        if row["sample"] in group:
            fail(f"{where}: duplicate sample {row['sample']} of id {row['id']!r}")
        cut = row["finish_reason"] == "length"
        wrong = cut and truncated == "wrong"
        group[row["sample"]] = {
            "id": row["id"], "sample": row["sample"], "where": where, "prompt": row["prompt_ids"], "completion": np.array(row["completion_ids"], np.int64),
            "logprobs": np.array(row["logprobs"], np.float32), "correct": row["correct"] and not wrong,
            "reward": 0.0 if wrong else float(row["reward"]), "cut": cut, "keep": not (cut and truncated == "mask")}
    n = len(next(iter(groups.values())))
    for group in groups.values():
        first = next(iter(group.values()))
        if len(group) != n:
            fail(f"{first['where']}: id {first['id']!r} has {len(group)} samples, others have {n}: a group is not whole")
        for row in group.values():
            if row["prompt"] != first["prompt"]:
                fail(f"{row['where']}: prompt_ids differ from those of the other samples of id {row['id']!r}")
            row["prompt"] = first["prompt"]
    return [[group[sample] for sample in sorted(group)] for group in groups.values()], n


def micro_batches(rows, budget, share):
    """Cut row indices into micro-batches of at most `budget` tokens (at least one row each).

    rows: [(prompt length, completion length, group, index)]. With shared prompts the samples of a group stand together, and a prompt
    counts once in each micro-batch that holds one of them; otherwise rows stand by length, and padding counts."""
    batches, prompts, longest, tokens = [], set(), 0, 0
    for prompt, completion, group, index in sorted(rows, key=lambda row: (row[0], row[2]) if share else (row[0] + row[1], row[3])):
        longest, prompts, tokens = max(longest, prompt), prompts | {group}, tokens + completion
        cost = len(prompts) * longest + tokens if share else (len(batches[-1]) + 1 if batches else 1) * (prompt + completion)
        if not batches or cost > budget:
            batches.append([])
            prompts, longest, tokens = {group}, prompt, completion
        batches[-1].append(index)
    return batches


class Policy(torch.nn.Module):
    """What DDP wraps: token ids in, log-prob and entropy of every completion token out; the head runs inside, under DDP's hooks."""

    def __init__(self, model, temperature, share_prompts):
        super().__init__()
        self.model, self.temperature, self.share = model, temperature, share_prompts
        config, self.head = model.config.get_text_config(), model.get_output_embeddings()
        self.cap = getattr(config, "final_logit_softcapping", None)
        self.scale = getattr(config, "logit_scale", None) or 1 / (getattr(config, "logits_scaling", None) or 1)

    def forward(self, prompts, completions):
        """prompts, completions: lists of id lists, one a row -> logp, entropy (tokens,) fp32, row after row."""
        hidden = (shared_hidden if self.share else repeated_hidden)(self.model, prompts, completions)
        targets = torch.as_tensor(np.concatenate(completions), device=hidden.device)
        logp, entropy, _ = fused_linear_entropy(hidden, self.head.weight, targets, self.temperature, bias=self.head.bias,
                                                softcap=self.cap, scale=self.scale)
        return logp, entropy

    @torch.no_grad()
    def check(self, name, rows=()):
        """Refuse a model that this class would get wrong: the logits must be its own, also after a prompt shared through its cache;
        and rows with token ids that it does not have."""
        if not isinstance(self.head, torch.nn.Linear):
            fail(f"{name}: unsupported head: not a linear layer but {type(self.head).__name__}")
        decoder = self.model.get_decoder()
        used = {id(weight) for part in (decoder, self.head) for weight in part.parameters()}
        for key, weight in self.model.named_parameters():
            if id(weight) not in used:
                fail(f"{name}: unsupported architecture: {key} belongs neither to the text decoder nor to its head")
        ids = torch.arange(4, device=self.head.weight.device)[None]
        expected = self.model(input_ids=ids, use_cache=False).logits[0].float()
        logits = self.head(decoder(input_ids=ids, use_cache=False).last_hidden_state[0]).float() * self.scale
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        if not torch.allclose(logits, expected, atol=1e-3, rtol=1e-3):
            fail(f"{name}: unsupported head: its logits are not a (soft-capped, scaled) linear map of the last hidden states")
        if self.share:
            short, long = [1, 2, 3], [3, 2, 1, 0, 1]
            probe = [long, short, long], [np.array([1, 2]), np.array([1, 2, 3]), np.array([3, 1, 2])]
            try:
                expected, hidden = repeated_hidden(self.model, *probe), shared_hidden(self.model, *probe)
                same = (hidden - expected).norm() < 1e-2 * expected.norm()
            except Exception:  # a cache of another kind: each raises something else when its rows are chosen
                same = False
            if not same:
                fail(f"{name}: a prompt cannot be shared through the cache of this architecture; give --no-share-prompts")
        vocabulary = len(self.head.weight)
        for row in rows:
            if max(row["prompt"]) >= vocabulary or (len(row["completion"]) and row["completion"].max() >= vocabulary):
                fail(f"{row['where']}: a token id beyond the vocabulary of {vocabulary} of {name}: rollouts of another model?")


# ---- Models on disk ---------------------------------------------------------------------------------------------------
def sampling_of(args):
    """The sampling settings in the rollouts' meta, checked; without a meta, --temperature stands for them."""
    sampling = None
    if os.path.exists(args.rollouts + ".meta.json"):
        try:
            with open(args.rollouts + ".meta.json", encoding="utf-8") as file:
                sampling = json.load(file).get("sampling")
            if sampling is not None and not (type(sampling["temperature"]) in (int, float) and 0 <= sampling["temperature"] < math.inf):
                raise ValueError(f"temperature {sampling['temperature']}")
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            fail(f"{args.rollouts}.meta.json: not a valid meta ({type(error).__name__}: {error}); delete it and give --temperature")
    if sampling is None:
        if args.temperature is None:
            fail(f"{args.rollouts}: no meta beside it says how it was sampled; give --temperature")
        return {"temperature": args.temperature}
    if args.temperature not in (None, sampling["temperature"]):
        fail(f"{args.rollouts}: sampled at temperature {sampling['temperature']}, not at --temperature {args.temperature}")
    if sampling["temperature"] == 0:
        fail(f"{args.rollouts}: greedy rollouts have no distribution to learn from; sample at a temperature above 0")
    cut = [f"{key} {sampling[key]}" for key, off in (("top_p", 1.0), ("top_k", 0), ("repetition_penalty", 1.0)) if sampling.get(key, off) != off]
    if cut and not args.allow_off_policy:
        fail(f"{args.rollouts}: sampled with {', '.join(cut)}: the log-probs are not those of the policy; sample without, "
             f"or give --allow-off-policy")
    return sampling


# ---- The update -------------------------------------------------------------------------------------------------------
def plan_update(rows, members, rank, world, args, masked=False):
    """This rank's micro-batches (lists of row indices) of one update, with or without the rows that are not kept.
    Every rank gets as many, at least one; an empty one takes part with weight 0.

    members: the row indices of the update's groups. The ranks' shares are cut from one order by their tokens."""
    usable = [i for i in members if len(rows[i]["completion"])]
    order = sorted(usable, key=lambda i: (len(rows[i]["prompt"]), rows[i]["group"]))
    cost = np.cumsum([len(rows[i]["completion"]) + len(rows[i]["prompt"]) / (rows[i]["n"] if args.share_prompts else 1) for i in order])
    cuts = np.searchsorted(cost, np.linspace(0, cost[-1] if len(order) else 0, world + 1)[1:-1]).tolist()
    shares = [order[start:end] for start, end in zip([0, *cuts], [*cuts, len(order)])]
    plans = [micro_batches([(len(rows[i]["prompt"]), len(rows[i]["completion"]), rows[i]["group"], i) for i in share
                            if masked or rows[i]["keep"]],
                           args.micro_batch_tokens, args.share_prompts) for share in shares]
    return plans[rank] + [[]] * (max(1, *map(len, plans)) - len(plans[rank]))


def forward(policy, rows, batch, device, dtype):
    """logp, entropy (tokens,) of a micro-batch, and each token's row. An empty one computes one token, for the ranks to stay in step."""
    prompts, completions = [rows[i]["prompt"] for i in batch] or [[0]], [rows[i]["completion"] for i in batch] or [np.zeros(1, np.int64)]
    with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == torch.bfloat16):
        logp, entropy = policy(prompts, completions)
    row = np.repeat(batch, [len(completion) for completion in completions]) if batch else np.zeros(1, np.int64)
    return logp, entropy, torch.as_tensor(row, device=device)


def shard(policy, device):
    """FSDP2: every decoder layer, then the rest, sharded over all ranks; (module, a no_sync of its kind)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.split(":")[0], (dist.get_world_size(),))
    for layer in policy.model.get_decoder().layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(policy, mesh=mesh)

    @contextlib.contextmanager
    def no_sync():
        policy.set_requires_gradient_sync(False)
        yield
        policy.set_requires_gradient_sync(True)

    return policy, no_sync


def refuse(out, rows, members, step, loss, grad_norm, rank):
    """Keep the rows of an update that is not finite in OUT.refused.jsonl and end with exit 3; no model was written or changed."""
    if rank == 0:
        with open(f"{out}.refused.jsonl.partial", "w", encoding="utf-8") as file:
            for row in (rows[i] for i in members):
                file.write(json.dumps({"id": row["id"], "sample": row["sample"], "where": row["where"], "prompt_ids": row["prompt"],
                                       "completion_ids": row["completion"].tolist(), "logprobs": row["logprobs"].tolist(),
                                       "correct": row["correct"], "reward": row["reward"],
                                       "finish_reason": "length" if row["cut"] else "stop"}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, f"{out}.refused.jsonl")
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        fail(f"step {step + 1}: loss {loss}, gradient norm {grad_norm}: the update is refused, nothing was changed; "
             f"its rows are kept in {out}.refused.jsonl", 3)
    sys.exit(3)


def memory_estimate(policy, device, dtype, tokens, ranks=1):
    """(bytes of fp32 weights, gradients and both Adam moments; bytes that a micro-batch of `tokens` needs besides).

    The first is counted, 16 bytes a weight over `ranks` shards. The second is what autograd saves in two small forward passes,
    carried on in proportion to the tokens, so that it holds for any architecture, with autocast and with activation checkpointing;
    and the head's chunk of logits with its share of the weight's gradient."""
    own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()}

    def saved(count):
        kept = {}

        def keep(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), \
                torch.autocast(device.split(":")[0], torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = policy([[0]], [np.zeros(count, np.int64)])  # held until the sum is taken, so that no storage is used twice
        return sum(size for pointer, size in kept.items() if pointer not in own) + 0 * len(out)

    few, many = saved(64), saved(192)
    chunk = 4 * (min(CHUNK["cpu" if device == "cpu" else "cuda"], tokens * len(policy.head.weight)) + policy.head.weight.numel())
    return sum(weight.numel() for weight in policy.parameters()) * 16 // ranks, int(few + (many - few) / 128 * max(tokens - 64, 0)) + chunk


def update(args):
    began, rank, world = time.monotonic(), int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    # 1. Everything that can be wrong with the input is found before a model is loaded; rank 0 checks, locks and complains.
    while rank and not os.path.isdir(args.out + ".partial"):
        if os.path.exists(args.out):
            return
        if time.monotonic() - began > args.rank_timeout:
            fail(f"rank {rank}: rank 0 did not start to write {args.out} in {args.rank_timeout:.0f} s: no shared file system?", 4)
        time.sleep(0.1)
    options = check_model(args.model, args.trust_remote_code)
    inputs = [args.rollouts, source_of(args.model, options)]
    if args.ref_model:
        inputs.append(source_of(args.ref_model, check_model(args.ref_model)))
    sampling = sampling_of(args)
    groups, n = load_rollouts(args.rollouts, args.truncated)
    if args.updates > len(groups):
        fail(f"{args.rollouts}: {len(groups)} groups cannot be dealt into --updates {args.updates}")
    if (args.pass_k or 0) >= n:
        fail(f"{args.rollouts}: --pass-k {args.pass_k} needs groups of more samples than that, to differ within; these have {n}")
    if args.device == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: no CUDA device here; use --device cpu")
    device = "cpu" if args.device == "cpu" or not torch.cuda.is_available() else f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    dtype = {"auto": torch.bfloat16 if device != "cpu" else torch.float32, "float32": torch.float32, "bfloat16": torch.bfloat16}[args.dtype]
    if rank == 0:
        meta = describe(args, inputs, sampling=sampling, device=device, dtype=str(dtype).removeprefix("torch."), world_size=world)
        if claim(args.out, meta, ignore=("out", "rollouts", "model", "ref_model", "rank_timeout", "device"), folder=True) is None:
            return
        for name in os.listdir(args.out + ".partial"):  # what a killed run left: a round starts from its input files alone
            path = f"{args.out}.partial/{name}"
            shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
    rows = [{**row, "group": g, "n": n} for g, group in enumerate(groups) for row in group]

    # 2. The policy, its optimizer, and the processes that share the work.
    if world > 1:
        if device != "cpu":
            torch.cuda.set_device(device)
        dist.init_process_group("gloo" if device == "cpu" else "nccl", timeout=datetime.timedelta(seconds=args.rank_timeout))
    model, tokenizer = load_model(args.model, torch.float32, device, options), load_tokenizer(args.model, options)
    policy = Policy(model, sampling["temperature"], args.share_prompts)
    policy.check(args.model, rows)
    if args.ref_model:
        reference = Policy(load_model(args.ref_model, torch.float32, device, options), sampling["temperature"], args.share_prompts)
        reference.check(args.ref_model, rows)
    if args.checkpoint_activations:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in policy.model.modules():  # it asks for training mode of its layers; dropout and noise stay off: rho starts at 1
            module.training = hasattr(module, "gradient_checkpointing")
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    static, activations = memory_estimate(policy, device, dtype, args.micro_batch_tokens, world if args.shard else 1)
    ddp, no_sync = policy, contextlib.nullcontext
    if args.shard and world > 1:
        ddp, no_sync = shard(policy, device)
    elif world > 1:
        ddp = DistributedDataParallel(policy, gradient_as_bucket_view=True)
        no_sync = ddp.no_sync
    optimizer = torch.optim.AdamW(policy.parameters(), lr=args.lr, weight_decay=args.weight_decay, fused=True)
    step = 0 if args.reset_optimizer else load_optimizer(optimizer, policy, args.model)
    if rank == 0:
        print(f"{args.model} on {device} x {world}{' sharded' if args.shard and world > 1 else ''}, {str(dtype).removeprefix('torch.')} over fp32 weights, attention "
              f"{policy.model.config._attn_implementation}, prompts {'shared' if args.share_prompts else 'repeated'}: {len(groups)} groups x "
              f"{n}, {args.updates} updates of {args.method}, T = {sampling['temperature']}; memory: {static / 2**30:.2f} GiB for weights, gradients and "
              f"Adam, up to {activations / 2**30:.2f} GiB for a micro-batch of {args.micro_batch_tokens} tokens", file=sys.stderr)

    # 3. The plan: shuffled groups, dealt into updates whose sizes differ by at most one; pi_old of all comes before the first.
    order = np.random.default_rng(args.seed).permutation(len(groups))
    updates = [[g * n + k for g in part for k in range(n)] for part in np.array_split(order, args.updates)]
    plans = [plan_update(rows, members, rank, world, args) for members in updates]
    reward = torch.tensor([row["reward"] for row in rows], device=device).view(-1, n)
    correct = torch.tensor([row["correct"] for row in rows], device=device).view(-1, n)
    old_logp, ref_logp, mean_logp = {}, {}, None

    def fill(store, module, what, plans):
        for plan in tqdm(plans, what, disable=None if rank == 0 else True):
            for batch in plan:
                with torch.no_grad():
                    logp, _, row = forward(module, rows, batch, device, dtype)
                for i, part in zip(batch, logp.split([len(rows[i]["completion"]) for i in batch]) if batch else ()):
                    store[i] = part

    if args.ref_model:
        fill(ref_logp, reference, "reference", plans)
        del reference
    level = args.smooth_level == "reward"  # its statistics need all log-probs of a group beforehand, of masked rows, too;
    first = 0 if level else 1              # otherwise pi_old of the first update is that update's own forward pass
    fill(old_logp, ddp, "pi_old", [plan_update(rows, members, rank, world, args, masked=level) for members in updates[first:]])
    if level:
        mean_logp = torch.zeros(len(rows), device=device)
        for i, part in old_logp.items():
            mean_logp[i] = part.mean()
        if world > 1:
            dist.all_reduce(mean_logp)
        mean_logp = mean_logp.view(-1, n)

    # 4. The updates.
    lines = []
    if not args.reset_optimizer and os.path.exists(f"{args.model}/metrics.jsonl"):
        with open(f"{args.model}/metrics.jsonl", encoding="utf-8", errors="replace") as file:
            lines = file.readlines()
    for members, plan in tqdm(list(zip(updates, plans)), "updates", disable=None if rank == 0 else True):
        start = time.monotonic()
        kept = [i for i in members if rows[i]["keep"]]
        tokens = sum(len(rows[i]["completion"]) for i in kept)  # over all ranks and micro-batches: the one normaliser
        sums, most = {}, {"logprob_gap_max": torch.zeros((), device=device), "ratio_max": torch.zeros((), device=device)}

        def add(**terms):
            for name, term in terms.items():
                sums[name] = sums.get(name, 0) + term.detach().double().sum()

        for number, batch in enumerate(plan):
            last = number == len(plan) - 1
            with contextlib.nullcontext() if last else no_sync():
                logp, entropy, row = forward(ddp, rows, batch, device, dtype)
                if batch:
                    old = torch.cat([old_logp[i] for i in batch]) if batch[0] in old_logp else logp.detach()
                    adv = advantage(reward, correct, old, row, args.method, args.adv_norm, args.gamma_p, args.gamma_n, args.smooth_level,
                                    args.pass_k, args.positive_weight, mean_logp=mean_logp)
                    loss, low, high = policy_loss(logp, old, adv, args.clip_low, args.clip_high, args.method)
                    right = correct.flatten()[row]
                    loss = loss - (args.entropy_coef + torch.where(right, args.entropy_coef_correct, args.entropy_coef_wrong)) * entropy
                    if args.ref_model:
                        loss = loss + args.kl_coef * k3(logp, torch.cat([ref_logp[i] for i in batch]))
                    gap = (old - torch.as_tensor(np.concatenate([rows[i]["logprobs"] for i in batch]), device=device)).abs()
                    gamma = torch.where(right, float(args.gamma_p or 0), float(args.gamma_n or 0))
                    add(loss=loss, entropy=entropy, entropy_correct=entropy * right, right=right, nll=-logp, gap=gap, low=low, high=high,
                        kl=k3(old, logp.detach()), adv=adv, adv2=adv.double() ** 2, smooth=(gamma * old).abs())
                    most = {"logprob_gap_max": torch.maximum(most["logprob_gap_max"], gap.max()),
                            "ratio_max": torch.maximum(most["ratio_max"], (logp.detach() - old).clamp(max=88).exp().max())}
                else:
                    loss = 0 * logp
                (loss.sum() * world / max(tokens, 1)).backward()  # DDP takes the mean over ranks; the loss is one sum over all
        names = ("loss", "entropy", "entropy_correct", "right", "nll", "gap", "low", "high", "kl", "adv", "adv2", "smooth")
        total = torch.stack([torch.as_tensor(sums.get(name, 0.0), dtype=torch.float64, device=device) for name in names])
        peak = torch.stack([*most.values()])
        if world > 1:
            dist.all_reduce(total)
            dist.all_reduce(peak, dist.ReduceOp.MAX)
        total, count = dict(zip(names, total.tolist())), max(tokens, 1)
        grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), args.max_grad_norm)
        grad_norm = float(grad_norm.full_tensor() if hasattr(grad_norm, "full_tensor") else grad_norm)
        if not (math.isfinite(total["loss"]) and math.isfinite(grad_norm)):
            refuse(args.out, rows, members, step, total["loss"], grad_norm, rank)
        lr = args.lr * min(1.0, (step + 1) / max(args.warmup_steps, 1))
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        wrong, in_kind = count - total["right"], lambda value, number: value / number if number else None
        of_update = reward.flatten()[members].view(-1, n)
        lines.append(json.dumps({
            "step": step, "loss": total["loss"] / count, "reward": of_update.mean().item(), "pass@1": correct.flatten()[members].float().mean().item(),
            "entropy": total["entropy"] / count, "entropy_correct": in_kind(total["entropy_correct"], total["right"]),
            "entropy_wrong": in_kind(total["entropy"] - total["entropy_correct"], wrong), "nll": total["nll"] / count,
            "logprob_gap": total["gap"] / count, "logprob_gap_max": peak[0].item(), "ratio_max": peak[1].item(),
            "clip_low_frac": total["low"] / count, "clip_high_frac": total["high"] / count, "approx_kl": total["kl"] / count,
            "grad_norm": grad_norm, "lr": lr, "adv_std": max(total["adv2"] / count - (total["adv"] / count) ** 2, 0) ** 0.5,
            "smooth_abs": total["smooth"] / count, "dead_groups": (of_update == of_update[:, :1]).all(1).float().mean().item(),
            "completion_len": sum(len(rows[i]["completion"]) for i in members) / len(members),
            "truncated_frac": sum(rows[i]["cut"] for i in members) / len(members), "tokens": tokens,
            "tokens_per_s": tokens / (time.monotonic() - start), "peak_mem_bytes": torch.cuda.max_memory_allocated() if device != "cpu"
            else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}) + "\n")

    # 5. The folder.
    save_round(args.out + ".partial", policy, tokenizer, optimizer, {"step": step, "flags": vars(args)}, lines, args.model)
    if rank == 0:
        publish(args.out, {**meta, "wall_s": time.monotonic() - began})
        shown = json.loads(lines[-1])
        print(f"{args.out}: step {step}; " + ", ".join(f"{key} {shown[key]:.4g}" for key in ("pass@1", "entropy", "grad_norm", "logprob_gap",
                                                                                           "tokens_per_s")), file=sys.stderr)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def main(args):
    """update(args); where another rank ends or hangs, this one says so in one line."""
    try:
        update(args)
    except RuntimeError as error:  # gloo's errors have no class of their own
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, which would come in the middle of the exit
        what = re.sub(r"^\[\S*\] | This is typically.*", "", str(error))
        fail(f"rank {os.environ['RANK']}: another rank ended, or did not answer in {args.rank_timeout:.0f} s ({what}); the same command "
             f"does this round again", 4)


if __name__ == "__main__":
    run(main, ARGS)
