"""The results of fused_entropy.py from hidden states and the lm_head's weight, with one chunk of
logits in memory at a time.

    logp, entropy, lse = fused_linear_entropy(hidden, model.lm_head.weight, targets, temperature=1)

At a vocabulary of 152k the logits of 8192 tokens take 2.5 GB in bf16, and an eager loss keeps
several fp32 copies. This computes the logits of one chunk of rows at a time, reduces them to a few
numbers a row, and drops them. The backward pass computes them again, turns them into their own
gradient in place, and adds its share to the gradients of hidden states and weight. That makes four
matrix products instead of three, with the memory of one chunk; the fourth product costs less than
eager PyTorch's passes over the logits. A fused cross entropy saves it by computing gradients in the
forward pass. Here they depend on a loss that needs the log-probs and entropies of all rows first.
The weight's gradient is summed over the chunks in fp32, whatever the type of the products.
"""
import math

import torch

if __package__:  # imported as kernels.fused_linear_entropy
    from .fused_entropy import choose_backend, entropy_backward, entropy_forward
else:            # imported with this folder on sys.path
    from fused_entropy import choose_backend, entropy_backward, entropy_forward

# Logits at a time. A chunk reads the weight, and reads and writes its fp32 gradient: with few rows
# the products wait for memory. 2**28 is 512 MiB in bf16, 1766 rows at 152k; on a CPU 2**25 is
# 128 MiB in fp32, 220 rows.
CHUNK = {"cuda": 2**28, "cpu": 2**25}


def row_chunks(hidden, weight):
    """Yield slices of rows, at least one, and for each a buffer for its logits, (n, vocab) of the
    weight's dtype."""
    rows = max(1, CHUNK.get(hidden.device.type, 2**25) // len(weight))
    shape = min(rows, len(hidden)), len(weight)
    buffer = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    for start in range(0, max(len(hidden), 1), rows):
        yield slice(start, start + rows), buffer[:len(hidden) - start]


def head(hidden, weight, bias, softcap, out):
    """Write the logits of one chunk to `out`, (n, vocab). Returns them, and with a soft cap its
    derivative."""
    if bias is None:
        torch.mm(hidden, weight.T, out=out)
    else:
        torch.addmm(bias, hidden, weight.T, out=out)
    if softcap is None:
        return out, None
    slope = 1 - out.div_(softcap).tanh_().square()
    return out.mul_(softcap), slope


def add_product(total, a, b):
    """total += a @ b, where total is fp32 (or fp64) and a, b may be narrower."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.is_cuda:  # adds inside the product: its fp32 sums are never rounded to bf16
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class FusedLinearEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, y, shape, temperature, softcap, dtype, backend):
        results, w, b = [], weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, buffer in row_chunks(hidden, w):
                logits, _ = head(hidden[rows].to(dtype), w, b, softcap, buffer)
                results.append(entropy_forward(logits[None], y[None, rows], temperature, backend))
        logp, entropy, peak, logsum = (torch.cat(parts, 1)[0] for parts in zip(*results))
        ctx.save_for_backward(hidden, weight, bias, y, entropy, peak, logsum)
        ctx.set_materialize_grads(False)
        ctx.settings = temperature, softcap, dtype, backend
        results = logp, entropy, peak / temperature + logsum
        return tuple(one.view(shape).clone() for one in results)  # own memory

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("fused_linear_entropy can be differentiated only once")
        hidden, weight, bias, y, *saved = ctx.saved_tensors
        temperature, softcap, dtype, backend = ctx.settings
        upstream = [one if one is None else one.reshape(-1) for one in upstream]
        w, b = weight.to(dtype), None if bias is None else bias.to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        d_bias = torch.zeros_like(bias, dtype=wide) if needs_bias else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, buffer in row_chunks(hidden, w):
                h = hidden[rows].to(dtype)
                logits, slope = head(h, w, b, softcap, buffer)
                entropy_backward(logits[None], y[None, rows], *(one[None, rows] for one in saved),
                                 [one if one is None else one[None, rows] for one in upstream],
                                 temperature, backend, grad=logits[None])
                d_logits = logits if slope is None else logits.mul_(slope)
                if needs_hidden:
                    d_hidden[rows] = d_logits @ w
                if needs_weight:
                    add_product(d_weight, d_logits.T, h)
                if needs_bias:
                    d_bias += d_logits.sum(0, dtype=wide)
        d_weight, d_bias = (one if one is None else one.to(of)
                            for one, of in [(d_weight, weight), (d_bias, bias)])
        return d_hidden, d_weight, d_bias, None, None, None, None, None, None


def fused_linear_entropy(hidden, weight, targets, temperature=1.0, bias=None, softcap=None,
                         scale=1.0, backend=None):
    """fused_entropy(scale * cap(hidden @ weight.T + bias), targets, temperature), chunk by chunk.

    hidden       (..., d), bf16, fp16, fp32 or fp64: the input of the lm_head
    weight       (vocab, d), of hidden's dtype; of any under autocast, whose dtype the products have
    targets      (...), integers, as in fused_entropy; ignored rows still cost their products, so
                 leave them out
    temperature  T > 0
    bias         (vocab,) or None
    softcap      c > 0 or None: cap(x) = c tanh(x / c), as in Gemma 2
    scale        > 0, multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)
    backend      "triton", "torch", or None for choose_backend's choice
    Returns (logp, entropy, lse) in nats, shaped like targets, fp32 (fp64 for fp64 products), once
    differentiable by hidden, weight and bias; gradients have the dtypes of these. Raises ValueError
    for wrong shapes, types or settings. A graph break for torch.compile.
    """
    if torch.compiler.is_compiling():
        plain = torch.compiler.disable(fused_linear_entropy)
        return plain(hidden, weight, targets, temperature, bias, softcap, scale, backend)
    tensors = hidden, weight, targets, *([] if bias is None else [bias])
    valid = weight.dim() == 2 and len(weight) and hidden.shape == (*targets.shape, weight.shape[1])
    valid = valid and (bias is None or bias.shape == weight.shape[:1])
    if not valid or len({one.device for one in tensors}) > 1:
        given = ", ".join(f"{tuple(one.shape)} on {one.device}" for one in tensors)
        raise ValueError("hidden (..., d), weight (vocab, d), targets (...), bias (vocab,) on one "
                         f"device needed, not {given}")
    if targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(f"targets must be integers, not {targets.dtype}")
    dtype, device = weight.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {dtype}: outside of autocast they "
                         "must agree")
    cap = 1 if softcap is None else softcap
    for name, value in ("temperature", temperature), ("scale", scale), ("softcap", cap):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value}")
    return FusedLinearEntropy.apply(
        hidden.reshape(-1, weight.shape[1]), weight, bias, targets.long().reshape(-1),
        targets.shape, temperature / scale, softcap, dtype, choose_backend(device, backend))
