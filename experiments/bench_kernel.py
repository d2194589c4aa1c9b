"""Time the fused entropy kernel and its linear form beside eager PyTorch, torch.compile and peers.

    python experiments/bench_kernel.py            # GPU: full shapes; CPU: one thread, smaller ones
    python experiments/bench_kernel.py --csv experiments/kernel_cpu.csv \\
        --plot experiments/kernel_cpu.png
    python experiments/bench_kernel.py --sweep    # GPU: other block sizes for fused_entropy.py

One process. In each round every provider runs once, in turn, so that a slow moment of the machine
strikes all of them. Peers are trl (>= 1.14) and liger-kernel, whose cross entropies give no
entropy. Columns, medians over the rounds:

    forward, backward, both    ms: GPU time; on one CPU thread its CPU time, on more the wall's
    x eager                    eager PyTorch's time of both passes over this one's: median (range)
    rate                       TB/s of the bytes that must move in both passes: logits read twice,
                               gradient written; in the linear form TFLOP/s of the three products
                               that any way needs
    of floor                   the time of a copy of as many bytes, or of those products alone, in
                               this run, over both
    extra MiB                  peak memory beside the inputs: forward, both passes
    error, gradient            largest |result - fp64| / max(1, |fp64|) over 64 rows: logp and
                               entropy, the gradient

The CSV holds the table, a line a provider; the picture is the roofline with the same figures.
"""
import argparse
import csv
import ctypes
import os
import statistics
import sys
import time


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = dict(nargs="*", metavar="SHAPE", type=lambda text: tuple(map(int, text.split("x"))))
    # What to run
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto",
                        help="auto: a GPU if there is one")
    parser.add_argument("--logits", **shape,
                        help="ROWSxVOCAB (default 512x151936 2048x32000, GPU 8192x151936)")
    parser.add_argument("--linear", **shape,
                        help="ROWSxHIDDENxVOCAB (default 2048x512x151936, GPU 4096x4096x131072)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"],
                        help="default float32, GPU bfloat16")
    parser.add_argument("--no-compile", action="store_true",
                        help="leave torch.compile out: it compiles for a minute")
    parser.add_argument("--sweep", action="store_true",
                        help="time the Triton kernels at other block sizes instead")
    # How
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds (default 5)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default 1)")
    # Where to
    parser.add_argument("--csv", metavar="FILE", help="write the table there")
    parser.add_argument("--plot", metavar="FILE", help="draw the roofline there (needs matplotlib)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    ARGS = parse_args()  # before the slow imports

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "kernels"))
import fused_entropy as kernel  # noqa: E402
from fused_linear_entropy import fused_linear_entropy  # noqa: E402

COLUMNS = ["form", "shape", "dtype", "provider", "forward_ms", "backward_ms", "both_ms",
           "speedup", "speedup_min", "speedup_max", "rate", "of_floor", "extra_mib_forward",
           "extra_mib_both", "error", "gradient_error"]
# For the roofline's x axis, both passes: about four products and sums and an exp each way.
FLOP_PER_LOGIT = 16


def eager(x, y):
    """logp and entropy as one writes them: x (rows, vocab), y (rows,)."""
    logps = torch.log_softmax(x.float(), -1)
    return logps.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1)


def closed_form(x, y, a, b):
    """logp, entropy and the gradient of a . logp + b . entropy in fp64.

    The formulas stand in kernels/fused_entropy.py.
    """
    u = x.double().log_softmax(-1)
    p, a, b = u.exp(), a.double().unsqueeze(1), b.double().unsqueeze(1)
    entropy = -(p * u).sum(-1, keepdim=True)
    grad = F.one_hot(y, x.shape[1]) * a - p * (a + b * (u + entropy))
    return u.gather(-1, y.unsqueeze(-1)).squeeze(-1), entropy.squeeze(-1), grad


def providers(form, device, compile):
    """{name: function of the inputs and y, or why there is none}; the yardstick comes first."""
    plain = eager if form == "logits" else lambda h, w, y: eager(F.linear(h, w), y)
    compiled = torch.compile(plain, dynamic=False) if compile else "left out"
    found = {"torch eager": plain, "torch.compile": compiled}
    if form == "logits":
        found["fused_entropy"] = lambda x, y: kernel.fused_entropy(x, y)[:2]
        found["fused_entropy, in place"] = lambda x, y: kernel.fused_entropy(
            x.view_as(x), y, inplace_backward=True)[:2]
    else:
        found["fused_linear_entropy"] = lambda h, w, y: fused_linear_entropy(h, w, y)[:2]
    peers = {"logits": ["TRL selective_log_softmax_and_entropy",
                        "Liger cross entropy (no entropy)"],
             "linear": ["Liger fused linear cross entropy (no entropy)"]}[form]
    for peer in peers:
        try:
            if not kernel.triton:
                found[peer] = "needs a GPU"
            elif peer.startswith("TRL"):
                from trl.kernels.logprob_entropy import selective_log_softmax_and_entropy
                found[peer] = lambda x, y: selective_log_softmax_and_entropy(x, y)
            elif form == "logits":
                from liger_kernel.transformers import LigerCrossEntropyLoss
                cross_entropy = LigerCrossEntropyLoss(reduction="none")
                found[peer] = lambda x, y: (-cross_entropy(x.view_as(x), y),)
            else:
                from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss
                linear = LigerFusedLinearCrossEntropyLoss(reduction="sum")
                found[peer] = lambda h, w, y: (-linear(w, h, y),)
        except ImportError:
            found[peer] = "not installed"
    return found


class Clock:
    """Marks moments and gives the milliseconds between them."""
    def __init__(self, device):
        self.cuda, self.marks = device == "cuda", []
        self.now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def mark(self):
        if self.cuda:
            self.marks.append(torch.cuda.Event(enable_timing=True))
            self.marks[-1].record()
        else:
            self.marks.append(self.now())

    def times(self):
        if not self.cuda:
            return [1e3 * (b - a) for a, b in zip(self.marks, self.marks[1:])]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) for a, b in zip(self.marks, self.marks[1:])]


class Memory:
    """Peak MiB since its making: PyTorch's on a GPU, resident on Linux, unknown (nan) elsewhere."""
    def __init__(self, device):
        self.cuda = device == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated() / 2**20
            return
        try:
            ctypes.CDLL(None).malloc_trim(0)
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")  # sets the peak back to the present
        except (OSError, AttributeError):
            pass
        self.start = self.resident("VmRSS")

    @staticmethod
    def resident(field):
        try:
            with open("/proc/self/status") as file:
                line = next(line for line in file if line.startswith(field + ":"))
                return int(line.split()[1]) / 1024
        except OSError:
            return float("nan")

    def peak(self):
        if self.cuda:
            return torch.cuda.max_memory_allocated() / 2**20 - self.start
        return self.resident("VmHWM") - self.start


def one_run(function, inputs, y, upstream, device, memory=False):
    """Both passes on fresh copies of the inputs: their ms or peak MiB, results, gradients."""
    leaves = [one.clone().requires_grad_() for one in inputs]
    gauge = Memory(device) if memory else Clock(device)
    marks = []
    if not memory:
        gauge.mark()
    results = function(*leaves, y)
    marks.append(gauge.peak() if memory else gauge.mark())
    upstream = [torch.ones_like(one) if one.dim() == 0 else up.to(one.dtype)
                for one, up in zip(results, upstream)]
    gradients = torch.autograd.grad(results, leaves, upstream)
    marks.append(gauge.peak() if memory else gauge.mark())
    return marks if memory else gauge.times(), results, gradients


def error(got, want):
    return ((got.double() - want).abs() / want.abs().clamp(min=1)).max().item()


def errors(form, inputs, y, upstream, results, gradients):
    """Largest error against fp64, over 64 rows, of the results and of the first gradient."""
    some = slice(0, 64)
    x = inputs[0][some] if form == "logits" else inputs[0][some].double() @ inputs[1].double().T
    *wanted, grad = closed_form(x, y[some], *(one[some] for one in upstream[:2]))
    if form == "linear":
        grad = grad @ inputs[1].double()
    if len(results) < 2:  # a cross entropy: its gradient is another one, and a sum has no rows
        nan = float("nan")
        return (error(results[0][some], wanted[0]) if results[0].dim() else nan), nan
    largest = max(error(one[some], want) for one, want in zip(results, wanted))
    return largest, error(gradients[0][some], grad)


def measure(form, shape, dtype, device, rounds, compile):
    """Yield one dict of COLUMNS for each provider, and the reason for each missing one."""
    torch.manual_seed(0)
    rows, vocab = shape[0], shape[-1]
    if form == "logits":
        inputs = [(torch.randn(rows, vocab, device=device) * 2).to(dtype)]
    else:
        inputs = [torch.randn(size, shape[1], device=device).to(dtype) for size in (rows, vocab)]
        inputs[1] *= 2 / shape[1]**0.5
    y = torch.randint(vocab, (rows,), device=device)
    upstream = torch.randn(2, rows, device=device).unbind()
    candidates = providers(form, device, compile)
    usable, best = {}, {}
    for name, function in candidates.items():
        if isinstance(function, str):
            continue
        try:
            one_run(function, inputs, y, upstream, device)  # warm up: compile, fill caches
            peaks, results, gradients = one_run(function, inputs, y, upstream, device, memory=True)
            best[name] = (peaks, *errors(form, inputs, y, upstream, results, gradients))
            usable[name] = function
        except torch.OutOfMemoryError:
            candidates[name] = "out of memory"
        results = gradients = None
    times, floors = {name: [] for name in usable}, []
    for _ in range(rounds):
        for name, function in usable.items():
            times[name].append(one_run(function, inputs, y, upstream, device)[0])
        floors.append(floor(form, inputs, device))
    floor_ms = statistics.median(floors)
    work = 3 * inputs[0].nbytes if form == "logits" else 6 * rows * shape[1] * vocab
    for name, reason in candidates.items():
        row = dict.fromkeys(COLUMNS, "")
        row |= {"form": form, "shape": "x".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."), "provider": name}
        if name in usable:
            row |= times_row(times[name], times.get("torch eager", []), work, floor_ms)
            peaks, row["error"], row["gradient_error"] = best[name]
            row["extra_mib_forward"], row["extra_mib_both"] = peaks
        else:
            row["forward_ms"] = reason
        yield row


def times_row(times, eager_times, work, floor_ms):
    """The columns that are times. times: [(forward ms, backward ms) of each round]."""
    both = [sum(one) for one in times]
    speedups = [sum(base) / one for base, one in zip(eager_times, both)] or [float("nan")]
    median = statistics.median(both)
    return {"forward_ms": statistics.median(one[0] for one in times),
            "backward_ms": statistics.median(one[1] for one in times), "both_ms": median,
            "speedup": statistics.median(speedups), "speedup_min": min(speedups),
            "speedup_max": max(speedups), "rate": work / median / 1e9,
            "of_floor": floor_ms / median}


def floor(form, inputs, device):
    """ms of what no way can save: three passes over the logits at a copy's speed, or the three
    products."""
    clock = Clock(device)
    if form == "logits":
        target = torch.empty_like(inputs[0])
        target.copy_(inputs[0])  # its pages are there before the clock starts
        clock.mark()
        target.copy_(inputs[0])
        clock.mark()
        return clock.times()[0] * 1.5  # a copy reads and writes: two passes
    hidden, weight = inputs
    clock.mark()
    logits = hidden @ weight.T
    logits @ weight
    logits.T @ hidden
    clock.mark()
    return clock.times()[0]


def sweep(shape, dtype, rounds):
    """ms of both Triton kernels at other block sizes, a line each."""
    x = torch.randn(shape, device="cuda").to(dtype)
    y = torch.randint(shape[1], shape[:1], device="cuda")
    upstream = torch.randn(2, shape[0], device="cuda").unbind()

    def fused(x, y):
        return kernel.fused_entropy(x, y)[:2]

    print("| BLOCK | warps | forward ms | backward ms |\n|---|---|---|---|")
    for block in 1024, 2048, 4096, 8192, 16384:
        for warps in 4, 8, 16, 32:
            if 8 <= block // (32 * warps) <= 64:
                kernel.BLOCK, kernel.WARPS = block, warps
                runs = [one_run(fused, [x], y, upstream, "cuda")[0] for _ in range(rounds + 2)]
                forward, backward = (statistics.median(one) for one in zip(*runs[2:]))
                print(f"| {block} | {warps} | {forward:.3f} | {backward:.3f} |", flush=True)


def table(rows):
    """The rows as Markdown."""
    yield ("| provider | forward ms | backward ms | both ms | x eager | rate | of floor "
           "| extra MiB | error | gradient |")
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for row in rows:
        if isinstance(row["forward_ms"], str):
            yield f"| {row['provider']} | {row['forward_ms']} |" + " |" * 8
            continue
        unit = "TB/s" if row["form"] == "logits" else "TFLOP/s"
        cells = (
            row["provider"], f"{row['forward_ms']:.4g}", f"{row['backward_ms']:.4g}",
            f"{row['both_ms']:.4g}",
            f"{row['speedup']:.2f} ({row['speedup_min']:.2f}-{row['speedup_max']:.2f})",
            f"{row['rate']:.3g} {unit}", f"{row['of_floor']:.0%}",
            f"{row['extra_mib_forward']:.0f}, {row['extra_mib_both']:.0f}",
            f"{row['error']:.0e}", f"{row['gradient_error']:.0e}")
        yield f"| {' | '.join(cells)} |"


def plot(rows, path, title):
    """Roofline: the roofs are this run's own copy and its own matrix products."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axes = plt.subplots(figsize=(8, 5))
    roofs = {}
    for row in rows:
        if isinstance(row["forward_ms"], str):
            continue
        shape = [int(size) for size in row["shape"].split("x")]
        size = torch.finfo(getattr(torch, row["dtype"])).bits // 8
        if row["form"] == "logits":
            intensity = scale = FLOP_PER_LOGIT / (3 * size)  # TB/s -> TFLOP/s
        else:  # three products; least traffic: hidden and weight read, both gradients written
            length, hidden, vocab = shape
            intensity, scale = 3 * length * vocab / ((length + vocab) * size), 1
        roofs[row["form"]] = max(roofs.get(row["form"], 0), row["rate"] / row["of_floor"])
        axes.loglog(intensity, row["rate"] * scale, "o" if "fused_" in row["provider"] else "x",
                    markersize=8,
                    label=f"{row['provider']}, {row['shape']}")
    x = [2.0**power for power in range(-2, 15)]
    bandwidth, peak = roofs.get("logits", float("inf")), roofs.get("linear", float("inf"))
    roof = [min(bandwidth * one, peak) for one in x]
    axes.loglog(x, roof, "k-", linewidth=1, label="roof: copy and matrix products of this run")
    axes.set(xlabel="FLOP a byte that must move", ylabel="TFLOP/s of the work that must be done",
             title=title)
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(args):
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(args.threads)
    gpu = device == "cuda"
    if (gpu or args.sweep) and not torch.cuda.is_available():
        sys.exit("bench_kernel.py: error: no GPU here, which --device cuda and --sweep need")
    dtype = getattr(torch, args.dtype or ("bfloat16" if gpu else "float32"))
    logits = [(8192, 151936)] if gpu else [(512, 151936), (2048, 32000)]
    linear = [(4096, 4096, 131072)] if gpu else [(2048, 512, 151936)]
    logits = logits if args.logits is None else args.logits
    linear = linear if args.linear is None else args.linear
    cpu = f"CPU ({torch.backends.cpu.get_cpu_capability()})"
    threads = f"{args.threads} thread{'s' * (args.threads > 1)}"
    machine = torch.cuda.get_device_name() if gpu else f"{cpu}, {threads}"
    title = f"{machine}, torch {torch.__version__}"
    if kernel.triton:
        title += f", triton {kernel.triton.__version__}"
    print(f"{title}, {str(dtype).removeprefix('torch.')}, {args.rounds} rounds", flush=True)
    if args.sweep:
        return sweep(logits[0], dtype, args.rounds)
    everything = []
    for form, shapes in ("logits", logits), ("linear", linear):
        for shape in shapes:
            rows = list(measure(form, shape, dtype, device, args.rounds, not args.no_compile))
            print(f"\n{form} {rows[0]['shape']}\n", *table(rows), sep="\n", flush=True)
            everything += rows
    if args.csv:
        with open(args.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            for row in everything:
                writer.writerow({key: f"{one:.6g}" if isinstance(one, float) else one
                                 for key, one in row.items()})
    if args.plot:
        plot(everything, args.plot, title)


if __name__ == "__main__":
    main(ARGS)
