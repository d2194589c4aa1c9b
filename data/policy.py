"""The policy as the update calls it: a causal language model whose head is computed by the kernel.

A model that this would get wrong is refused: `Policy.check`.
"""
import os
import sys

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from data.files import fail
from data.models import autocast, load_model, loading_told, positions_of
from data.ranks import over_ranks
from data.shards import fill, model_without_weights

# By its own folder, not as `kernels.`: that name is also a package of Hugging Face, and both may be
# installed.
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "kernels"))
from fused_linear_entropy import CHUNK, choose_backend, fused_linear_entropy
from shared_prompt import attention_of, repeated_hidden, shared_hidden


def load_policy(name, options, temperature, rows, args, device, world, trained=True):
    """(policy, the module to call, its no_sync context), on all ranks, checked with `rows`.

    trained: whether it will be; a reference is not, and needs no gradients over ranks.

    Under --shard no rank holds the whole model at any time, unless its files spell the weights
    otherwise than the model does: then every rank loads all of it before it is sharded.
    """
    files, shard = {}, args.shard and world > 1
    if shard:
        with loading_told(name):
            model, files = model_without_weights(name, options)
    if not files:
        model = load_model(name, torch.float32, device, options)
    policy = Policy(model, temperature, args.share_prompts, by_rows=bool(files))
    module, no_sync = over_ranks(policy, device, world if trained or shard else 1, shard)
    if files:
        with loading_told(name):
            fill(model, files)
        model.to(device)  # its buffers
    policy.check(name, rows)
    if shard:
        policy.reshard()  # a forward pass leaves what is not in a layer gathered
    return policy, module, no_sync


class Policy(torch.nn.Module):
    """What DDP wraps: ids in, log-prob and entropy of every completion token out.

    The head runs inside, under DDP's hooks. by_rows: whether it was filled by rows
    (data/shards.py), and is to be saved by tensors.
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
        hidden_of = shared_hidden if self.share else repeated_hidden
        hidden = hidden_of(self.model, prompts, completions)
        targets = torch.as_tensor(np.concatenate(completions), device=hidden.device)
        logp, entropy, _ = fused_linear_entropy(
            hidden, self.head.weight, targets, self.temperature, bias=self.head.bias,
            softcap=self.cap, scale=self.scale)
        return logp, entropy

    @torch.no_grad()
    def check(self, name, rows=()):
        """Refuse a model that this class would get wrong, and rows with ids that it lacks: the
        logits must be its own, also after a prompt that is shared through its cache."""
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
        logits = self.head(hidden[0]).float() * self.scale
        logits = self.cap * torch.tanh(logits / self.cap) if self.cap else logits
        if not torch.allclose(logits, expected, atol=1e-3, rtol=1e-3):
            fail(f"{name}: unsupported head: its logits are not a (soft-capped, scaled) linear map "
                 f"of the last hidden states")
        if self.share and not self.shares_prompts():
            fail(f"{name}: a prompt cannot be shared through the cache of this architecture; give "
                 f"--no-share-prompts")
        vocabulary = len(self.head.weight)
        positions = positions_of(self.model.config.get_text_config())
        for row in rows:
            length = len(row.prompt) + len(row.completion)
            if positions and length > positions:
                fail(f"{row.where}: {length} tokens of prompt and completion exceed the "
                     f"{positions} positions of {name}")
            if max(max(row.prompt), row.completion.max(initial=0)) >= vocabulary:
                fail(f"{row.where}: a token id beyond the vocabulary of {vocabulary} of {name}: "
                     f"rollouts of another model?")

    def shares_prompts(self):
        short, long = [1, 2, 3], [3, 2, 1, 0, 1]
        completions = [np.array([1, 2]), np.array([1, 2, 3]), np.array([3, 1, 2])]
        try:
            expected = repeated_hidden(self.model, [long, short, long], completions)
            hidden = shared_hidden(self.model, [long, short, long], completions)
        except Exception:  # a cache of another kind: each raises something else
            return False
        return bool((hidden - expected).norm() < 1e-2 * expected.norm())


def announce(job, static, activations):
    """One line that says what was chosen, and the memory (bytes) that it will take; what of it the
    flags do not say, for the meta."""
    args, (groups, n) = job.args, job.verdicts.reward.shape
    attention = attention_of(job.policy.model)
    print(f"{args.model} on {job.device} x {job.world}"
          f"{' sharded' if args.shard and job.world > 1 else ''}, "
          f"{str(job.dtype).removeprefix('torch.')} over fp32 weights, attention "
          f"{attention}, prompts "
          f"{'shared' if args.share_prompts else 'repeated'}: {groups} groups x {n}, "
          f"{args.updates} updates of {args.method}, T = {job.policy.temperature}; memory: "
          f"{static / 2**30:.2f} GiB for weights, gradients and Adam, about "
          f"{activations / 2**30:.2f} GiB for a micro-batch of {args.micro_batch_tokens} tokens",
          file=sys.stderr)
    backend = choose_backend(job.device.split(":")[0], None)
    return {"attention": attention, "backend": backend}


def checkpoint_activations(model):
    """Recompute activations in the backward pass.

    transformers asks for training mode of the layers that do; dropout and noise stay off, so that
    rho starts at 1.
    """
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        module.training = hasattr(module, "gradient_checkpointing")
        for name in ("p", "dropout", "attention_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def memory_estimate(policy, device, dtype, tokens, ranks=1):
    """(bytes of fp32 weights, gradients and both Adam moments, bytes of a micro-batch besides).

    The first is counted, 16 bytes a weight over `ranks` shards. The second is what autograd saves
    in two small forward passes, carried on in proportion to the tokens, so that it holds for any
    architecture, with autocast and with activation checkpointing; and the head's chunk of logits
    with its share of the weight's gradient. What libraries take for themselves is not in it: on a
    CPU the peak was 3 % above it (tests/test_memory.py).
    """
    own = {weight.untyped_storage().data_ptr() for weight in policy.parameters()
           if not isinstance(weight, DTensor)}

    def saved(count):
        sizes = {}

        def keep(tensor):
            storage = tensor.untyped_storage()
            sizes[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()  # a node that holds its own output would never be freed

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, autocast(device, dtype):
            out = policy([[0]], [np.zeros(count, np.int64)])
        total = sum(size for pointer, size in sizes.items() if pointer not in own)
        del out  # held until here, so that no storage is used twice
        return total

    large = min(192, (positions_of(policy.model.config.get_text_config()) or 193) - 1)
    small = large // 3
    few, many = saved(small), saved(large)
    a_token = (many - few) / (large - small)
    if not own:  # sharded: what is saved holds gathered weights, too, which are freed again
        few = small * a_token
        policy.reshard()
    head = policy.head.weight
    logits = 4 * (min(CHUNK[device.split(":")[0]], tokens * len(head)) + head.numel())
    weights = sum(weight.numel() for weight in policy.parameters())
    return weights * 16 // ranks, int(few + a_token * max(tokens - small, 0)) + logits
