"""Time the fused entropy kernel and its linear form beside eager PyTorch, torch.compile and peers.

    python experiments/bench_kernel.py --out experiments/kernel_cpu.json
    python experiments/bench_kernel.py --no-compile --logits 512x151936 --linear

The providers run in turns, in one process; peers, trl (1.14 or newer) and liger-kernel, are taken
if they are installed. Logits are (rows, vocab); the linear form starts from hidden states (rows,
hidden) and the head's weight (vocab, hidden). The columns:

    forward, backward    ms: on a GPU the median of Triton's do_bench, on a CPU the least CPU time
                         of the rounds, one thread. Timed are the forward pass alone and both
                         passes; backward is their difference
    x eager              eager PyTorch's time of both passes over this one's; least and most of the
                         rounds in brackets
    rate                 TB/s of the bytes that must move: logits read twice, their gradient written
                         once; linear form: TFLOP/s of the three products that any way needs
    of copy              rate over that of a copy, linear form: of those products, in this run
    MiB                  peak memory beside the inputs: forward, both passes
    error                largest |result - fp64| / max(1, |fp64|) over 64 rows: of log-prob and
                         entropy; of the gradient by the logits or hidden states
"""
import argparse
import json
import os
import statistics
import sys
import time


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = dict(nargs="*", metavar="SHAPE", type=lambda text: tuple(map(int, text.split("x"))))
    add = parser.add_argument
    add("--logits", **shape, help="ROWSxVOCAB (default 512x151936 2048x32000, GPU 8192x151936)")
    add("--linear", **shape,
        help="ROWSxHIDDENxVOCAB (default 512x512x151936, GPU 4096x4096x131072)")
    add("--no-compile", action="store_true",
        help="leave torch.compile out: it compiles for a minute")
    add("--rounds", type=int, default=5, help="timed rounds (default 5)")
    add("--out", help="JSON file to write (default: the table alone)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports

import torch
import torch.nn.functional as F

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "kernels")]
from experiments.suite import Meter
from fused_entropy import fused_entropy
from fused_linear_entropy import fused_linear_entropy

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)


# ---- Providers -----------------------------------------------------------------------------------
def eager(x, y):
    """logp and entropy as one writes them: x (rows, vocab), y (rows,)."""
    logp = torch.log_softmax(x.to(torch.promote_types(x.dtype, torch.float32)), -1)
    return logp.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(-1)


def eager_linear(hidden, weight, y):
    return eager(F.linear(hidden, weight), y)


def trl_logits():
    from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
    return selective_log_softmax_and_entropy


def liger_logits():
    from liger_kernel.transformers import LigerCrossEntropyLoss
    loss = LigerCrossEntropyLoss(reduction="none")
    return lambda x, y: (-loss(x.view_as(x), y),)


def liger_linear():
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
    loss = LigerFusedLinearCrossEntropyLoss(reduction="sum")
    return lambda hidden, weight, y: (-loss(weight, hidden, y),)


PLAIN = {"logits": eager, "linear": eager_linear}
OURS = {"logits": {"fused_entropy": lambda x, y: fused_entropy(x, y)[:2],
                   "fused_entropy, in place": lambda x, y: fused_entropy(
                       x.view_as(x), y, inplace_backward=True)[:2]},
        "linear": {"fused_linear_entropy": lambda h, w, y: fused_linear_entropy(h, w, y)[:2]}}
PEERS = {"logits": {"TRL": trl_logits, "Liger, no entropy": liger_logits},
         "linear": {"Liger, no entropy": liger_linear}}


def providers(form, compiled):
    """{name: function of the inputs and y, or why there is none}; eager PyTorch comes first."""
    plain = PLAIN[form]
    found = {"torch eager": plain, "torch.compile": "left out", **OURS[form]}
    if compiled:
        found["torch.compile"] = torch.compile(plain, dynamic=False)
    for name, peer in PEERS[form].items():
        try:
            found[name] = peer() if GPU else "needs a GPU"
        except ImportError:
            found[name] = "not installed"
    return found


# ---- Measuring -----------------------------------------------------------------------------------
def milliseconds(function):
    if GPU:
        from triton.testing import do_bench
        return do_bench(function, return_mode="median")
    start = time.thread_time()
    function()
    return 1e3 * (time.thread_time() - start)


def both_passes(function, leaves, y, upstream, between=lambda: None):
    """Results, gradients of the leaves, and what `between` returns between both passes."""
    results = function(*leaves, y)
    found = between()
    upstream = [torch.ones_like(one) if one.dim() == 0 else up.to(one.dtype)
                for one, up in zip(results, upstream)]
    return results, torch.autograd.grad(results, leaves, upstream), found


def errors(form, inputs, y, upstream, results, gradients):
    """Largest errors against fp64 over 64 rows: (results, first gradient)."""
    some = slice(0, 64)
    leaves = [inputs[0][some].double().requires_grad_(), *(one.double() for one in inputs[1:])]
    wanted = PLAIN[form](*leaves, y[some])
    grad, = torch.autograd.grad(wanted, leaves[0], [one[some].double() for one in upstream])

    def largest(got, want):
        return ((got[some].double() - want).abs() / want.abs().clamp(min=1)).max().item()

    if len(results) < 2:  # a cross entropy: its gradient is another one, and a sum has no rows
        return (largest(results[0], wanted[0]) if results[0].dim() else None), None
    return max(map(largest, results, wanted)), largest(gradients[0], grad)


def copy_or_product(form, inputs):
    """(work a ms, in bytes or FLOP) of what no way can save: a copy; the three products."""
    if form == "logits":
        target = torch.empty_like(inputs[0])
        target.copy_(inputs[0])  # its pages are there before the clock starts
        return 2 * target.nbytes / milliseconds(lambda: target.copy_(inputs[0]))
    hidden, weight = inputs
    logits = hidden @ weight.T
    took = milliseconds(lambda: (hidden @ weight.T, logits @ weight, logits.T @ hidden))
    return 6 * logits.numel() * hidden.shape[1] / took


def measure(form, shape, rounds, compiled):
    """{provider: its figures, or why there are none}"""
    torch.manual_seed(0)
    rows, vocab = shape[0], shape[-1]
    if form == "logits":
        inputs = [(torch.randn(rows, vocab, device=DEVICE) * 2).to(DTYPE)]
    else:
        inputs = [torch.randn(size, shape[1], device=DEVICE).to(DTYPE) for size in (rows, vocab)]
        inputs[1] *= 2 / shape[1]**0.5
    y = torch.randint(vocab, (rows,), device=DEVICE)
    upstream = torch.randn(2, rows, device=DEVICE).unbind()
    found, times, floors = providers(form, compiled), {}, []
    usable = {name: function for name, function in found.items() if callable(function)}
    for name, function in [*usable.items()]:
        try:
            for _ in range(2):  # the first one compiles and fills caches
                leaves = [one.clone().requires_grad_() for one in inputs]
                with Meter(DEVICE) as meter:
                    results, gradients, forward = both_passes(function, leaves, y, upstream,
                                                              meter.so_far)
            error = errors(form, inputs, y, upstream, results, gradients)
            mib = [round(peak / 2**20) for peak in (forward, meter.peak)]
            found[name], times[name] = {"mib": mib, "error": error}, []
        except torch.OutOfMemoryError:
            found[name] = "out of memory"
            del usable[name]
        leaves = results = gradients = None
    for _ in range(rounds):
        for name, function in usable.items():
            leaves = [one.clone().requires_grad_() for one in inputs]
            forward = milliseconds(lambda: function(*leaves, y))
            both = milliseconds(lambda: both_passes(function, leaves, y, upstream))
            times[name].append((forward, both))
        floors.append(copy_or_product(form, inputs))
    work = 3 * inputs[0].nbytes if form == "logits" else 6 * rows * shape[1] * vocab
    typical = statistics.median if GPU else min
    for name in usable:
        forward, both = (typical(one) for one in zip(*times[name]))
        ratios = [base / own for (_, base), (_, own) in zip(times["torch eager"], times[name])]
        found[name] |= {
            "forward_ms": forward, "backward_ms": both - forward, "rate": work / both / 1e9,
            "of_copy": work / both / statistics.median(floors),
            "x_eager": [statistics.median(ratios), min(ratios), max(ratios)]}
    return found


# ---- Report --------------------------------------------------------------------------------------
def table(form, found):
    """The figures as Markdown."""
    yield ("| provider | forward, backward ms | x eager | rate | of copy | MiB | error |\n"
           "|---|---|---|---|---|---|---|")
    unit = "TB/s" if form == "logits" else "TFLOP/s"
    for name, one in found.items():
        if isinstance(one, str):
            yield f"| {name} | {one} | | | | | |"
            continue
        middle, least, most = one["x_eager"]
        error = ", ".join("-" if value is None else f"{value:.0e}" for value in one["error"])
        yield (f"| {name} | {one['forward_ms']:.4g}, {one['backward_ms']:.4g} | "
               f"{middle:.2f} [{least:.2f}, {most:.2f}] | {one['rate']:.3g} {unit} | "
               f"{one['of_copy']:.0%} | {one['mib'][0]}, {one['mib'][1]} | {error} |")


def main(args):
    torch.set_num_threads(1)
    shapes = {"logits": [(8192, 151936)] if GPU else [(512, 151936), (2048, 32000)],
              "linear": [(4096, 4096, 131072)] if GPU else [(512, 512, 151936)]}
    shapes |= {form: vars(args)[form] for form in shapes if vars(args)[form] is not None}
    machine = torch.cuda.get_device_name() if GPU else torch.backends.cpu.get_cpu_capability()
    report = {"machine": machine, "torch": torch.__version__, "dtype": str(DTYPE),
              "rounds": args.rounds}
    print(report, flush=True)
    for form in shapes:
        for shape in shapes[form]:
            found = measure(form, shape, args.rounds, not args.no_compile)
            name = f"{form} {'x'.join(map(str, shape))}"
            print(f"\n{name}\n", *table(form, found), sep="\n", flush=True)
            report[name] = json.loads(json.dumps(found),  # rounded
                                      parse_float=lambda text: float(f"{float(text):.4g}"))
            if args.out:
                with open(args.out, "w", encoding="utf-8") as file:
                    print(json.dumps(report, indent=1), file=file)


if __name__ == "__main__":
    main(ARGS)
