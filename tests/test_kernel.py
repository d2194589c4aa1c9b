"""kernels/fused_entropy.py against eager PyTorch in fp64, on both backends.

Triton runs here on a GPU, or through its interpreter, which must be switched on before Triton is
imported: so test_triton_through_the_interpreter starts a process of its own that runs the Triton
half of this file and of test_linear_kernel.py. Its price is the number of programs (rows) times
blocks: hence few rows, and small BLOCK and CHUNK, so that small vocabularies cross many of them.
"""
import importlib.util
import math
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.append(os.path.join(ROOT, "kernels"))  # as train.py does
import fused_entropy as kernel
from fused_entropy import fused_entropy

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
V = 211
on_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
has_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="no Triton here")


@pytest.fixture(params=["torch", "triton"] if kernel.triton else ["torch"])
def backend(request, monkeypatch):
    monkeypatch.setattr(kernel, "BLOCK", 64)
    monkeypatch.setattr(kernel, "CHUNK", 2 * V)
    return request.param


@pytest.fixture(autouse=True)
def repeatable():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def draw(rows, vocab, spread=3.0, dtype=torch.float32):
    """Logits and targets, the first and the last token among them, and upstream gradients, which
    differ from row to row."""
    x = (torch.randn(rows, vocab) * spread).to(dtype).to(DEVICE)
    y = torch.randint(vocab, (rows,))
    y[0], y[-1] = 0, vocab - 1
    return x, y.to(DEVICE), torch.randn(3, rows).to(DEVICE)


def plain(x, y, temperature):
    """logp, entropy and lse as one writes them, in the precision of x."""
    logps = (x / temperature).log_softmax(-1)
    return (logps.gather(-1, y.unsqueeze(-1)).squeeze(-1), -(logps.exp() * logps).sum(-1),
            (x / temperature).logsumexp(-1))


def exact(x, y, temperature, upstream):
    """logp, entropy, lse and the gradient of upstream . (logp, entropy, lse), in fp64."""
    x = x.detach().double().clamp(min=-1e30).requires_grad_()
    results = plain(x, y, temperature)
    grad, = torch.autograd.grad(results, x, upstream.double().unbind())
    return *(one.detach() for one in results), grad


def run(x, y, temperature, upstream, backend, **settings):
    """The same four from the kernel. A row of zeros in `upstream`: a result that is not in the
    loss."""
    x = x.detach().requires_grad_()
    results = fused_entropy(x, y, temperature, backend=backend, **settings)
    used = [(one, up.to(one.dtype)) for one, up in zip(results, upstream) if up.any()]
    grad, = torch.autograd.grad([one for one, _ in used], x, [up for _, up in used])
    return *results, grad


def error(got, want):
    """Largest |got - want| / max(1, |want|)."""
    return ((got.double() - want).abs() / want.abs().clamp(min=1)).max().item()


def check(results, x, y, temperature, upstream):
    """The four results are the exact ones; only the log-prob of a masked target is -inf."""
    wanted = exact(x, y, temperature, upstream)
    masked = wanted[0] < -1e29
    assert torch.equal(results[0] == -float("inf"), masked)
    results[0].data[masked] = wanted[0][masked] = 0
    for got, want in zip(results, wanted):
        assert got.shape == want.shape and got.dtype == torch.float32 and error(got, want) <= 2e-6


@pytest.mark.parametrize("vocab, temperature, case", [
    *((vocab, 0.7, "") for vocab in (1, 2, 63, 64, 65, V)), (V, 0.1, ""), (V, 2.0, ""),
    *((V, 0.7, case) for case in ("far", "peaked", "masked", "0", "1", "2"))])
def test_against_fp64(backend, vocab, temperature, case):
    """Vocabularies around BLOCK; "0" to "2": one upstream gradient alone."""
    x, y, upstream = draw(4, vocab)
    if case == "far":  # at logits near 1e4 lse - E[x] would lose three digits of H
        x += 1e4
    elif case == "peaked":
        x[range(4), y] += 60
    elif case == "masked":  # half of a row, its first blocks, all but one token, the target
        x[0, ::2] = x[1, :150] = x[2, 1:] = x[3, y[3]] = -float("inf")
        y[0], y[1], y[2] = 1, 200, 0
    elif case:
        upstream *= torch.eye(3, device=DEVICE)[int(case)][:, None]
    results = run(x, y, temperature, upstream, backend)
    check(results, x, y, temperature, upstream)
    logp, entropy, _, grad = results
    assert (logp <= 1e-6).all()
    assert (entropy >= -1e-6).all() and (entropy <= math.log(vocab) + 1e-5).all()
    # lse's gradient is c p / T, that of the others sums to zero over the row
    sums = grad.double().sum(1) - upstream[2].double() / temperature
    assert sums.abs().max() < 2e-5 / min(temperature, 1)


@pytest.mark.parametrize("spread", [0.1, 8])
def test_the_largest_vocabulary(backend, spread, monkeypatch):
    """Summed in the wrong order, 152k terms cost more than the 2e-6 (eager PyTorch: 1e-5 in H, 3e-5
    in gradients)."""
    monkeypatch.undo()
    x, y, upstream = draw(2, 151936, spread)
    check(run(x, y, 0.7, upstream, backend), x, y, 0.7, upstream)


def test_gradcheck(backend):
    """In fp64, which stays fp64."""
    x = torch.randn(3, 70, dtype=torch.float64, device=DEVICE, requires_grad=True)
    y = torch.tensor([3, -1, 69], device=DEVICE)
    assert torch.autograd.gradcheck(lambda x: fused_entropy(x, y, 0.7, backend=backend), x,
                                    fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(backend, dtype):
    """fp32 inside: the ratio of two log-probs is good to 1e-6, where log_softmax in bf16 is off by
    per cents."""
    x, y, upstream = draw(3, V, dtype=dtype)
    *results, grad = run(x, y, 1, upstream, backend)
    *wanted, want_grad = exact(x, y, 1, upstream)
    for got, want in zip(results, wanted):
        assert got.dtype == torch.float32 and error(got, want) <= 2e-6
    # The interpreter truncates where the GPU rounds.
    ulp = torch.finfo(dtype).eps * (1 if INTERPRETED else 0.5)
    assert grad.dtype == dtype
    assert ((grad.double() - want_grad).abs() <= ulp * 1.001 * want_grad.abs() + 1e-7).all()


def test_strides_and_shapes(backend):
    """Any layout gives the bits of the contiguous copy; a 3-D slice is read where it lies."""
    wide = torch.randn(2, 3, 80, device=DEVICE)
    layouts = {"rows far apart": wide[:, 0, :71], "slice of a sequence": wide[:, :-1],
               "columns apart": wide[0, :, :9].T, "one row": wide[0, 0],
               "four dimensions": wide.view(2, 1, 3, 80)[:, :, 1:],
               "expanded": wide[:1].expand(2, 3, 80), "batch last": wide.transpose(0, 1)}
    for name, x in layouts.items():
        y = torch.randint(-1, x.shape[-1], x.shape[:-1], device=DEVICE, dtype=torch.int32)
        upstream = torch.randn(3, *y.shape, device=DEVICE).unbind()
        got = run(x, y, 0.7, upstream, backend)
        want = run(x.contiguous(), y, 0.7, upstream, backend)
        assert all(torch.equal(one, other) for one, other in zip(got, want)), name
        assert got[0].shape == y.shape and got[3].shape == x.shape


def test_ignored_and_bad_rows_leave_the_others_alone(backend):
    """Row 1 has no target and is not read; row 2 has a NaN, row 4 masks every token."""
    x, y, upstream = draw(6, V)
    want = run(x, y, 0.7, upstream, backend)
    y[1], x[1], upstream[:, 1] = -100, float("nan"), float("nan")
    x[2, 100], x[4] = float("nan"), -float("inf")
    others = torch.tensor([0, 3, 5], device=DEVICE)
    for got, clean in zip(run(x, y, 0.7, upstream, backend), want):
        assert torch.equal(got[others], clean[others]) and (got[1] == 0).all()
        assert not torch.isfinite(got[[2, 4]]).any()
    everything = run(x, torch.full_like(y, -1), 0.7, upstream, backend)
    assert all((one == 0).all() for one in everything)


def test_a_row_does_not_depend_on_its_company(backend, monkeypatch):
    """Bit for bit, alone or in any batch, on one thread or two (PyTorch splits the sum of a lone
    row among threads)."""
    monkeypatch.undo()
    vocab = 40000
    x, y, upstream = draw(3, vocab)
    want = run(x, y, 0.7, upstream, backend)
    torch.set_num_threads(2)
    for chunk in (vocab, 2 * vocab, 2**20) if backend == "torch" else (2**20,):  # PyTorch's
        monkeypatch.setattr(kernel, "CHUNK", chunk)
        for rows in (slice(0, 1), slice(1, 3), slice(0, 3)):
            got = run(x[rows], y[rows], 0.7, upstream[:, rows], backend)
            assert all(torch.equal(one, other[rows]) for one, other in zip(got, want))


def test_no_rows(backend):
    x = torch.zeros(0, 10, device=DEVICE, requires_grad=True)
    results = fused_entropy(x, torch.zeros(0, dtype=torch.long, device=DEVICE), backend=backend)
    sum(one.sum() for one in results).backward()
    assert all(one.shape == (0,) for one in results) and x.grad.shape == (0, 10)


@pytest.mark.parametrize("dtype, rows", [(torch.float32, 3), (torch.bfloat16, 2)])
def test_in_place(backend, dtype, rows):
    """The same bits, in the logits' memory, also of a slice; the logits are gone, so a second
    backward raises. Out of place it gives the same bits again, but no second derivative."""
    leaf = torch.randn(2, 3, 90, device=DEVICE, requires_grad=True)
    y = torch.randint(-1, 90, (2, 3), device=DEVICE)[:, :rows]
    upstream = torch.randn(3, *y.shape, device=DEVICE).unbind()
    x = (leaf * 1).to(dtype)[:, :rows]
    results = fused_entropy(x, y, 0.7, backend=backend)
    want, again = (torch.autograd.grad(results, x, upstream, retain_graph=True)[0]
                   for _ in range(2))
    assert torch.equal(want, again)
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(results, x, upstream, create_graph=True)
    x = (leaf * 1).to(dtype)[:, :rows]
    before = x.detach().clone()
    results = fused_entropy(x, y, 0.7, inplace_backward=True, backend=backend)
    assert torch.equal(x, before)
    got, = torch.autograd.grad(results, x, upstream, retain_graph=True)
    assert torch.equal(got, want) and torch.equal(x, want)
    assert x.data_ptr() == got.data_ptr() and not got.requires_grad
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(results, leaf, upstream)


X, Y, LEAF = torch.zeros(3, 5), torch.zeros(3, dtype=torch.long), torch.zeros(3, 5).requires_grad_()
IN_PLACE = {"inplace_backward": True, "backend": "torch"}  # refuses what it would break


@pytest.mark.parametrize("x, y, settings, message", [
    (X, torch.zeros(4, dtype=torch.long), {}, "needed"), (torch.zeros(3, 0), Y, {}, "needed"),
    (torch.tensor(1.0), torch.tensor(1), {}, "needed"), (X.long(), Y, {}, "needed"),
    (X, torch.zeros(3), {}, "integer"), (X, Y.bool(), {}, "integer"),
    (X, Y, {"temperature": 0}, "temperature"), (X, Y, {"temperature": math.nan}, "temperature"),
    (X, Y, {"backend": "cuda"}, "backend"), (LEAF, Y, IN_PLACE, "leaf"),
    ((LEAF[0] * 1).expand(3, 5), Y, IN_PLACE, "share memory")])
def test_wrong_inputs(x, y, settings, message):
    with pytest.raises(ValueError, match=message):
        fused_entropy(x, y, **settings)


def test_target_beyond_the_vocabulary(backend):
    x, y, _ = draw(3, 20)
    y[1] = 20
    if backend == "triton":
        logp = fused_entropy(x, y, backend=backend)[0]
        assert logp[1].isnan() and torch.isfinite(logp[[0, 2]]).all()
    elif DEVICE == "cpu":
        with pytest.raises(RuntimeError, match="out of bounds"):
            fused_entropy(x, y, backend=backend)


class Watch(TorchDispatchMode):
    """Counts matrix products by their number of multiplications, and notes the largest memory that
    is allocated beside `known`, in bytes."""
    def __init__(self, *known):
        super().__init__()
        self.known = {one.untyped_storage().data_ptr() for one in known}
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if name in ("mm", "addmm", "addmm_"):
            a, b = args[:2] if name == "mm" else args[1:3]
            self.products += a.shape[0] * a.shape[1] * b.shape[1]
        for one in out if isinstance(out, (list, tuple)) else [out]:
            memory = one.untyped_storage() if isinstance(one, torch.Tensor) else None
            if memory is not None and memory.data_ptr() not in self.known:
                self.largest = max(self.largest, memory.nbytes())
        return out


def test_memory_does_not_grow_with_the_rows(monkeypatch):
    monkeypatch.setattr(kernel, "CHUNK", 2**14)
    x = torch.randn(512, 1000, requires_grad=True).bfloat16() * 1
    y = torch.randint(1000, (512,))
    with Watch(x) as watch:
        results = fused_entropy(x, y, 0.7, inplace_backward=True, backend="torch")
        torch.autograd.grad([one.sum() for one in results[:2]], x)
    assert 0 < watch.largest <= 2 * 2**14 * 4


def test_the_choice_of_backend_is_told_once(capsys):
    kernel.choose_backend.cache_clear()
    for _ in range(2):
        fused_entropy(torch.randn(2, 5), torch.tensor([1, 2]))
    assert capsys.readouterr().err == "fused_entropy: backend torch on cpu\n"


@pytest.mark.skipif(INTERPRETED, reason="the graph break comes before the choice of a backend")
def test_torch_compile(backend):
    """Compiled code around the function gives the same results and gradients."""
    x, y, upstream = draw(4, 300)

    def loss(x):
        logits = x.sin() * 3
        logp, entropy, _ = fused_entropy(logits, y, 0.7, inplace_backward=True, backend=backend)
        return (logp * upstream[0]).cos().sum() + (entropy * upstream[1]).sum()

    compiled = torch.compile(loss, backend="aot_eager" if DEVICE == "cpu" else "inductor")
    eager, again = (torch.autograd.grad(one(leaf), leaf)[0] for one in (loss, compiled)
                    for leaf in [x.detach().requires_grad_()])
    assert error(again, eager.double()) < 1e-6


@pytest.mark.skipif(not kernel.triton, reason="test_triton_through_the_interpreter runs this")
def test_triton_kernels_truly_run(monkeypatch):
    """Fails if the PyTorch path answers in Triton's place, or if the interpreter does not run the
    kernels."""
    launched, launch = [], kernel.launch
    monkeypatch.setattr(kernel, "softmax_chunks", None)
    monkeypatch.setattr(kernel, "launch", lambda one, *args, **more: (
        launched.append(one) or launch(one, *args, **more)))
    x, y, upstream = draw(4, 90)
    check(run(x, y, 0.7, upstream, "triton"), x, y, 0.7, upstream)
    assert launched == [kernel.forward_kernel, kernel.backward_kernel]
    assert type(kernel.forward_kernel).__name__ == (
        "InterpretedFunction" if INTERPRETED else "JITFunction")
    with pytest.raises(TypeError):  # the PyTorch path would have failed
        fused_entropy(x, y, backend="torch")


def python(*command, **environment):
    """What Python prints in a process of its own with these variables; None: without it."""
    environment = {name: value for name, value in {**os.environ, **environment}.items() if value}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@has_triton
@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
def test_triton_through_the_interpreter():
    shown = python("-m", "pytest", "-p", "no:cacheprovider", "-k", "triton", "tests/test_kernel.py",
                   "tests/test_linear_kernel.py", TRITON_INTERPRET="1")
    assert int(re.search(r"(\d+) passed", shown)[1]) >= 40, shown


COMPILE = """
import itertools
import sys
import torch

torch.cuda.is_available = lambda: True  # so that the kernels are defined
sys.path.append("kernels")
import fused_entropy
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

kernels = fused_entropy.forward_kernel, fused_entropy.backward_kernel
constants = {"scale": 1.4426950408889634, "BLOCK": fused_entropy.BLOCK}
for capability, logits, kernel in itertools.product((80, 90), ("*bf16", "*fp32"), kernels):
    pointers = {"y_ptr": "*i64", "x_ptr": logits, "grad_ptr": logits}
    signature = {name: pointers.get(name, "*fp32") if name.endswith("_ptr") else "i64"
                 for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32),
                              options={"num_warps": 4})
    print(capability, logits, kernel.__name__, len(compiled.asm["cubin"]))
"""


@has_triton
def test_the_kernels_compile_for_ampere_and_hopper(tmp_path):
    """On a machine without a GPU, so that a release of Triton that breaks them is seen."""
    shown = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET=None)
    sizes = [int(line.split()[-1]) for line in shown.splitlines()]
    assert len(sizes) == 8 and min(sizes) > 1000


NAMES = """
import sys
from kernels.fused_entropy import fused_entropy
from kernels.fused_linear_entropy import fused_linear_entropy
for name in [name for name in sys.modules if name.partition(".")[0] == "kernels"]:
    del sys.modules[name]
sys.path.append(sys.argv[1])
import kernels
assert kernels.get_kernel() == "Hugging Face"
sys.path.append("kernels")
from fused_entropy import fused_entropy
from fused_linear_entropy import fused_linear_entropy
import torch
assert torch.cuda.is_available() or "triton" not in sys.modules
"""


def test_names(tmp_path):
    """kernels.fused_entropy can be imported; where Hugging Face's package `kernels` is installed it
    wins `import kernels`, and this folder still serves. On a CPU no import costs Triton's."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text("def get_kernel(): return 'Hugging Face'\n")
    python("-c", NAMES, str(tmp_path), TRITON_INTERPRET=None, PYTHONPATH=ROOT)


@on_gpu
def test_more_than_2_31_elements():
    """Row 14,134 of a 152k vocabulary lies beyond the reach of int32 offsets."""
    rows, vocab = 14400, 151936
    if torch.cuda.mem_get_info()[0] < 2.2 * rows * vocab * 2:
        pytest.skip("needs 10 GB of GPU memory")
    x = torch.randn(rows, vocab, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    y = torch.randint(vocab, (rows,), device=DEVICE)
    upstream = torch.randn(3, rows, device=DEVICE)
    results = fused_entropy(x, y, 0.7, backend="triton")
    grad, = torch.autograd.grad(results, x, upstream.unbind())
    ends = torch.tensor([0, 14133, 14134, 14135, rows - 1], device=DEVICE)
    *wanted, want_grad = exact(x[ends], y[ends], 0.7, upstream[:, ends])
    assert all(error(got[ends], want) <= 2e-6 for got, want in zip(results, wanted))
    assert error(grad[ends], want_grad) <= 0.01


@on_gpu
def test_peak_memory():
    """Forward, and backward in place, take less than 1 MiB beside the logits."""
    x = torch.randn(8192, 32000, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) * 1
    y = torch.randint(32000, (8192,), device=DEVICE)
    upstream = torch.randn(3, 8192, device=DEVICE).unbind()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = fused_entropy(x, y, inplace_backward=True, backend="triton")
    assert torch.cuda.max_memory_allocated() - before < 2**20
    torch.autograd.grad(results, x, upstream)
    assert torch.cuda.max_memory_allocated() - before < 2**20
