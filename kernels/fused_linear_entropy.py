"""The results of fused_entropy.py from hidden states and the lm_head's weight: the logits are never whole in memory.

    logp, entropy, lse = fused_linear_entropy(hidden, model.lm_head.weight, targets, temperature=1.0)

At a vocabulary of 152k the logits of 8192 tokens take 2.5 GB in bf16, and the fp32 copies of an eager loss several times
that. Here a chunk of rows at a time is multiplied out, reduced to a few numbers a row, and dropped. The backward pass
multiplies it out once more, turns it into its own gradient in place, and from that adds up both gradients. So there are four
matrix products where the plain way has three, against one chunk of memory; what eager code spends on walking over the logits
is worth more than the fourth. It cannot be had for less: the upstream gradients depend on the results of all rows.

The weight's gradient is summed over the chunks in fp32, whatever the type of the products.
"""
import math

import torch

if __package__:  # imported as kernels.fused_linear_entropy
    from .fused_entropy import choose_backend, entropy_backward, entropy_forward
else:            # imported with this folder on sys.path
    from fused_entropy import choose_backend, entropy_backward, entropy_forward

# Logits at a time. The weight is read, and its fp32 gradient read and written, once a chunk: few rows would make the products
# wait for memory. 2**28 is 512 MiB in bf16, 1766 rows of 152k; on a CPU 2**25 is 128 MiB in fp32, 220 rows.
CHUNK = {"cuda": 2**28, "cpu": 2**25}


def row_chunks(hidden, weight):
    """Yield slices of rows, at least one, and a buffer for the logits of each."""
    rows = max(1, CHUNK.get(hidden.device.type, 2**25) // len(weight))
    buffer = torch.empty(min(rows, len(hidden)), len(weight), dtype=weight.dtype, device=weight.device)
    for start in range(0, max(len(hidden), 1), rows):
        yield slice(start, start + rows), buffer[:len(hidden) - start]


def head(hidden, weight, bias, softcap, out):
    """The lm_head on one chunk, written to `out`: (rows, vocab). Returns it, and tanh's slope where there is a soft cap."""
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
    elif total.is_cuda:  # inside the product: its fp32 sums never pass through bf16
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total += a @ b


class FusedLinearEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, bias, y, temperature, softcap, dtype, backend):
        results, w, b = [], weight.to(dtype), None if bias is None else bias.to(dtype)
        with torch.autocast(hidden.device.type, enabled=False):
            for rows, buffer in row_chunks(hidden, w):
                logits, _ = head(hidden[rows].to(dtype), w, b, softcap, buffer)
                results.append(entropy_forward(logits[None], y[None, rows], temperature, backend))
        logp, entropy, peak, logsum = (torch.cat(parts, 1)[0] for parts in zip(*results))
        ctx.save_for_backward(hidden, weight, bias, y, entropy, peak, logsum)
        ctx.set_materialize_grads(False)
        ctx.settings = temperature, softcap, dtype, backend
        return logp, entropy, peak / temperature + logsum

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("fused_linear_entropy can be differentiated only once")
        (hidden, weight, bias, y, *saved), (temperature, softcap, dtype, backend) = ctx.saved_tensors, ctx.settings
        wide, w, b = torch.promote_types(dtype, torch.float32), weight.to(dtype), None if bias is None else bias.to(dtype)
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
        d_weight, d_bias = (one if one is None else one.to(to.dtype) for one, to in ((d_weight, weight), (d_bias, bias)))
        return d_hidden, d_weight, d_bias, None, None, None, None, None


def fused_linear_entropy(hidden, weight, targets, temperature=1.0, bias=None, softcap=None, scale=1.0, backend=None):
    """fused_entropy(scale * cap(hidden @ weight.T + bias), targets, temperature) without the logits.

    hidden       (..., d), bf16, fp16, fp32 or fp64: the input of the lm_head
    weight       (vocab, d), of hidden's dtype, or of any under autocast, whose dtype the products then take
    targets      (...), integers, as in fused_entropy; ignored rows cost their products, so leave them out where you can
    temperature  T > 0
    bias         (vocab,) or None
    softcap      c > 0 or None: cap(x) = c tanh(x / c), as in Gemma 2
    scale        > 0, multiplies the logits (Cohere's logit_scale, 1 / Granite's logits_scaling)
    backend      "triton", "torch", or None for choose_backend's choice
    Returns (logp, entropy, lse) in nats, shaped like targets, fp32 (fp64 for fp64 products), differentiable, once. Gradients
    go to hidden, weight and bias, those that require them, in their own dtypes; the sums over rows are kept in fp32.
    Raises ValueError on wrong shapes, types or settings.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.disable(fused_linear_entropy)(hidden, weight, targets, temperature, bias, softcap, scale,
                                                            backend)
    if weight.dim() != 2 or hidden.shape != (*targets.shape, weight.shape[1]) or not len(weight):
        raise ValueError("hidden (..., d), weight (vocab, d), targets (...) needed, not "
                         + ", ".join(str(tuple(one.shape)) for one in (hidden, weight, targets)))
    if targets.is_floating_point() or targets.dtype == torch.bool or not hidden.device == weight.device == targets.device:
        raise ValueError(f"targets must be integers, all on one device, not {targets.dtype} on {targets.device} "
                         f"with hidden on {hidden.device} and weight on {weight.device}")
    dtype, device = weight.dtype, hidden.device.type
    if torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    elif hidden.dtype != dtype:
        raise ValueError(f"hidden is {hidden.dtype} and weight {dtype}; outside of autocast they must agree")
    for name, value in ("temperature", temperature), ("scale", scale), ("softcap", 1 if softcap is None else softcap):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, not {value}")
    results = FusedLinearEntropy.apply(hidden.reshape(-1, weight.shape[1]), weight, bias, targets.long().reshape(-1),
                                       temperature / scale, softcap, dtype, backend or choose_backend(device))
    return tuple(one.view(targets.shape) for one in results)
