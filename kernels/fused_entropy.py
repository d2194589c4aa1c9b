"""Log-prob of the sampled token, entropy of the softmax and logsumexp, in one pass over the logits,
and their gradient in one more.

    logp, entropy, lse = fused_entropy(logits, targets, temperature=1.0)  # (..., vocab), (...)

Eager PyTorch makes some 40 passes. Two backends compute the same formulas and save the same numbers
a row for the backward pass: Triton on CUDA, chunks in PyTorch elsewhere.

For a row of logits x and a temperature T, with m = max x, t = (x - m)/T <= 0, s = sum e^t,
w = sum t e^t, l = log s:
    lse = m/T + l        logp = t_y - l        H = l - w/s        p = e^u with u = t - l
H is computed relative to the maximum: lse - E[x/T] subtracts two numbers of the logits' size, which
loses three digits near 1e4.
dH/dx_j = -p_j (u_j + H)/T, so upstream gradients a of logp, b of H and c of lse give
    dx_j = (a [j = y] - p_j (a - c + b (u_j + H))) / T
The Triton kernel is an online softmax (Milakov & Gimelshein 2018) that keeps w beside s: when a
block of logits raises the maximum from m to n, with d = (m - n)/T, it sets w <- e^d (w + d s) and
s <- e^d s, then adds the block's own terms.
A masked logit, -inf, has p = 0 and adds 0 to H and to the gradient. As 0 * -inf is NaN, t, d and u
are clamped at -1e30.
"""
import functools
import importlib.util
import math
import os
import sys

import torch

triton = None  # imported only where it can run
if importlib.util.find_spec("triton") and (
        torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
    import triton
    import triton.language as tl

# Fixed: autotuning takes 25 s a shape. 32 logits a thread take 56 registers forward and 40 backward
# (bf16, sm_90) without spills, so 9 programs fit an SM and keep 64 KiB in flight while one of them
# reduces; 3 TB/s x 0.7 us latency / 132 SMs needs 16 KiB.
BLOCK, WARPS = 4096, 4
CHUNK = 2**19  # logits at a time on the PyTorch path: its two fp32 buffers take 4 MiB of cache

if triton:
    @triton.jit
    def forward_kernel(x_ptr, y_ptr, logp_ptr, entropy_ptr, max_ptr, logsum_ptr, vocab, rows,
                       x_batch, x_row, scale: tl.constexpr, BLOCK: tl.constexpr):
        # scale = log2(e)/T: with t in units of log 2, e^t is a bare exp2
        LN2: tl.constexpr = 0.6931471805599453
        # One program a row; int32 would overflow at row 14,134 of 152k logits.
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row // rows * x_batch + row % rows * x_row
        y = tl.load(y_ptr + row)
        if y < 0:  # ignored: the row is not read, and the outputs are zeros already
            return
        # Not -inf: with a first block of -inf, x - n would be -inf + inf = NaN.
        m = tl.full((), -1e30, max_ptr.dtype.element_ty)
        s, w = tl.zeros((), m.dtype), tl.zeros((), m.dtype)
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + cols, mask=cols < vocab, other=-float("inf")).to(m.dtype)
            n = tl.maximum(m, tl.max(x, 0))
            t = tl.maximum((x - n) * scale, -1e30, propagate_nan=tl.PropagateNan.ALL)
            d = tl.maximum((m - n) * scale, -1e30)
            e, r = tl.exp2(t), tl.exp2(d)
            w = r * (w + d * s) + tl.sum(t * e, 0)
            s = r * s + tl.sum(e, 0)
            m = n
        l = tl.log2(s)
        # NaN for a target beyond the vocabulary.
        x_y = tl.load(x_ptr + y, mask=y < vocab, other=float("nan")).to(m.dtype)
        tl.store(logp_ptr + row, ((x_y - m) * scale - l) * LN2)
        tl.store(entropy_ptr + row, (l - w / s) * LN2)
        tl.store(max_ptr + row, m)
        tl.store(logsum_ptr + row, l * LN2)

    @triton.jit
    def backward_kernel(x_ptr, y_ptr, entropy_ptr, max_ptr, logsum_ptr, a_ptr, b_ptr, c_ptr,
                        grad_ptr, vocab, rows, x_batch, x_row, grad_batch, grad_row,
                        scale: tl.constexpr, BLOCK: tl.constexpr):
        LN2: tl.constexpr = 0.6931471805599453
        row = tl.program_id(0).to(tl.int64)
        x_ptr += row // rows * x_batch + row % rows * x_row
        grad_ptr += row // rows * grad_batch + row % rows * grad_row
        y = tl.load(y_ptr + row)
        m, l = tl.load(max_ptr + row), tl.load(logsum_ptr + row) / LN2
        a = tl.load(a_ptr + row, mask=y >= 0, other=0.0) * (scale * LN2)  # scale * LN2 = 1/T
        b = tl.load(b_ptr + row, mask=y >= 0, other=0.0) * (scale * LN2)
        c = tl.load(c_ptr + row, mask=y >= 0, other=0.0) * (scale * LN2)
        constant, slope = a - c + b * tl.load(entropy_ptr + row), b * LN2
        for start in range(0, vocab, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            inside = tl.where(y >= 0, cols < vocab, False)
            x = tl.load(x_ptr + cols, mask=inside, other=-float("inf")).to(m.dtype)
            u = tl.maximum((x - m) * scale - l, -1e30, propagate_nan=tl.PropagateNan.ALL)
            grad = tl.where(cols == y, a, 0.0) - tl.exp2(u) * (constant + slope * u)
            tl.store(grad_ptr + cols, grad, mask=cols < vocab)


def launch(kernel, x, *pointers, strides, temperature):
    with torch.cuda.device_of(x):
        kernel[(x.shape[0] * x.shape[1],)](
            x, *pointers, x.shape[2], x.shape[1], *strides,
            scale=math.log2(math.e) / temperature, BLOCK=BLOCK, num_warps=WARPS)


@functools.cache  # so that the choice is printed once
def choose_backend(device, backend=None):
    """`backend`, or "triton" on CUDA where Triton is installed, else "torch".
    device: as in tensor.device.type."""
    backend = backend or ("triton" if triton and device == "cuda" else "torch")
    if backend not in ("torch", "triton") or backend == "triton" and not triton:
        raise ValueError(f"backend must be torch or, on a GPU with Triton, triton, not {backend!r}")
    print(f"fused_entropy: backend {backend} on {device}", file=sys.stderr)
    return backend


def softmax_chunks(x, y, temperature, peak=None):
    """Yield the rows with y >= 0 in chunks: their index, max (n, 1), t = (x - max)/T and
    softmax(t), both (n, vocab)."""
    rows, dtype = max(1, CHUNK // x.shape[2]), torch.promote_types(x.dtype, torch.float32)
    buffers = torch.empty(2, min(rows, y.shape[1]), x.shape[2], dtype=dtype, device=x.device)
    for batch, kept in enumerate(y >= 0):
        for chunk in filter(len, kept.nonzero().squeeze(1).split(rows)):
            first, last = int(chunk[0]), int(chunk[-1])
            adjacent = last - first == len(chunk) - 1  # then x[index] is a view and not a copy
            index = batch, slice(first, last + 1) if adjacent else chunk
            m = peak[index].unsqueeze(1) if peak is not None else x[index].amax(1, True).to(dtype)
            t, p = buffers[:, :len(chunk)]
            torch.sub(x[index], m, out=t)
            if temperature != 1:
                t.div_(temperature)
            yield index, m, t.clamp_(min=-1e30), torch.softmax(t, 1, out=p)


def entropy_forward(x, y, temperature, backend):
    """Forward without autograd: x (batch, rows, vocab), y (batch, rows) -> logp, entropy, m, l,
    each (batch, rows)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    results = [torch.zeros(y.shape, dtype=dtype, device=x.device) for _ in range(4)]
    logp, entropy, peak, logsum = results
    if backend == "triton":
        launch(forward_kernel, x, y, *results, strides=x.stride()[:2], temperature=temperature)
        return results
    for index, m, t, p in softmax_chunks(x, y, temperature):
        # softmax is PyTorch's fastest exp (0.37 ns a logit on an AVX-512 core, torch.exp 0.59), but
        # it does not sum to 1 (1e-5 off at 152k logits). So p is e^t up to a factor; as the largest
        # e^t is 1, s = sum p / max p.
        # expand: PyTorch sums a single row in another order than several, and a row's result must
        # not depend on the rows beside it.
        n, at_least_two = len(p), (max(2, len(p)), -1)
        sum_p, max_p = p.expand(at_least_two).sum(1)[:n], p.amax(1)
        l = (sum_p / max_p).log()
        entropy[index] = l - p.mul_(t).expand(at_least_two).sum(1)[:n] / sum_p
        x_y = x[index].gather(1, y[index].unsqueeze(1))
        logp[index] = ((x_y - m) / temperature).squeeze(1) - l
        peak[index], logsum[index] = m.squeeze(1), l
    return results


def entropy_backward(x, y, entropy, peak, logsum, upstream, temperature, backend, grad):
    """Write the logits' gradient to `grad`, which may be x. upstream: the gradients of logp,
    entropy and lse; None is 0."""
    a, b, c = (torch.zeros_like(peak) if one is None else one.reshape(y.shape).contiguous()
               for one in upstream)
    if backend == "triton":
        return launch(backward_kernel, x, y, entropy, peak, logsum, a, b, c, grad,
                      strides=(*x.stride()[:2], *grad.stride()[:2]), temperature=temperature)
    grad[(y < 0).nonzero(as_tuple=True)] = 0
    # In t, not in u = t - l:
    constant, slope = (c - a - b * (entropy - logsum)) / temperature, -b / temperature
    for index, _, t, p in softmax_chunks(x, y, temperature, peak):
        right = (-logsum[index]).exp() / p.amax(1)  # the largest p is 1/s: corrects softmax's sum
        factor = (constant[index] * right).unsqueeze(1)
        if upstream[1] is not None:                 # the entropy is in the loss
            factor = t.mul_((slope[index] * right).unsqueeze(1)).add_(factor)
        p.mul_(factor).scatter_add_(1, y[index].unsqueeze(1), (a[index] / temperature).unsqueeze(1))
        grad[index] = p.to(grad.dtype)


class FusedEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y, shape, temperature, inplace, backend):
        logp, entropy, peak, logsum = entropy_forward(x, y, temperature, backend)
        ctx.save_for_backward(x, y, entropy, peak, logsum)
        ctx.set_materialize_grads(False)
        ctx.settings = temperature, inplace, backend
        results = logp, entropy, peak / temperature + logsum
        return tuple(one.view(shape).clone() for one in results)  # own memory

    @staticmethod
    def backward(ctx, *upstream):
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError("fused_entropy can be differentiated only once")
        (x, *saved), (temperature, inplace, backend) = ctx.saved_tensors, ctx.settings
        grad = x.detach() if inplace else torch.empty_like(x, memory_format=torch.contiguous_format)
        entropy_backward(x, *saved, upstream, temperature, backend, grad)
        if inplace:  # the logits are overwritten: a second backward must raise
            torch.autograd.graph.increment_version(x)
        return grad, None, None, None, None, None


def fused_entropy(logits, targets, temperature=1.0, inplace_backward=False, backend=None):
    """Log-prob of the targets, entropy and logsumexp of softmax(logits / temperature).

    logits       (..., vocab), bf16, fp16, fp32 or fp64, any strides; -inf masks a token, NaN stays
                 in its row
    targets      (...), integers; negative: the row is ignored, its results and gradient are 0 (pad
                 shifted targets with -1 instead of slicing logits[:, :-1], whose backward copies);
                 >= vocab: an error, from Triton NaN
    temperature  T > 0
    inplace_backward  the gradient overwrites the logits, which nothing else may need; saves a copy
    backend      "triton", "torch", or None: triton on CUDA if it is installed
    Returns (logp, entropy, lse) in nats, shaped like targets, fp32 (fp64 for fp64 logits), once
    differentiable. Raises ValueError for wrong shapes, types or settings. A graph break for
    torch.compile.
    """
    if torch.compiler.is_compiling():
        plain = torch.compiler.disable(fused_entropy)
        return plain(logits, targets, temperature, inplace_backward, backend)
    valid = logits.is_floating_point() and logits.dim() and logits.shape[-1]
    valid = valid and targets.shape == logits.shape[:-1] and targets.device == logits.device
    if not valid or targets.is_floating_point() or targets.dtype == torch.bool:
        given = " and ".join(f"{one.dtype} {tuple(one.shape)} on {one.device}"
                             for one in (logits, targets))
        raise ValueError("logits (..., vocab) and integer targets (...) on one device needed, not "
                         + given)
    if not 0 < (temperature := float(temperature)) < math.inf:
        raise ValueError(f"temperature must be a positive number, not {temperature}")
    if inplace_backward and (logits.is_leaf and logits.requires_grad or 0 in logits.stride()):
        raise ValueError("inplace_backward would overwrite a leaf, or rows that share memory")
    backend = choose_backend(logits.device.type, backend)
    # A slice such as logits[:, :-1] is read where it lies: its rows have two strides.
    flat = logits.dim() < 3 or logits.is_contiguous()
    x = logits.reshape(1, -1, logits.shape[-1]) if flat else logits.reshape(-1, *logits.shape[-2:])
    x = x if x.stride(2) == 1 else x.contiguous()
    y = targets.long().reshape(x.shape[:2]).contiguous()
    return FusedEntropy.apply(x, y, targets.shape, temperature, inplace_backward, backend)
