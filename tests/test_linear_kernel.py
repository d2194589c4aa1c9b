"""kernels/fused_linear_entropy.py against the plain way: F.linear, then log_softmax, in fp64.

The Triton half runs on a GPU, or in the process that test_kernel.py starts for the interpreter.
"""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import test_kernel
from test_kernel import (DEVICE, INTERPRETED, Watch, backend, error,  # noqa: F401  two fixtures
                         repeatable)
import fused_linear_entropy as linear
from fused_linear_entropy import fused_linear_entropy

ROWS, WIDTH, VOCAB = 7, 16, 150


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    monkeypatch.setattr(linear, "CHUNK", {DEVICE: 3 * VOCAB})  # three, the last one short


def draw(rows=ROWS, width=WIDTH, vocab=VOCAB, dtype=torch.float32):
    hidden = torch.randn(rows, width, dtype=dtype)
    weight = torch.randn(vocab, width, dtype=dtype)
    y = torch.randint(vocab, (rows,))
    y[0], y[-1] = 0, vocab - 1
    return hidden.to(DEVICE).requires_grad_(), weight.to(DEVICE).requires_grad_(), y.to(DEVICE)


def plain(hidden, weight, y, temperature=1.0, bias=None, softcap=None, scale=1.0):
    """The same in eager PyTorch, in the inputs' precision, after the logits in at least fp32."""
    logits = F.linear(hidden, weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * scale
    return [one * (y >= 0) for one in test_kernel.plain(logits, y.clamp(min=0), temperature)]


def loss(results):
    """A different upstream gradient for each row and each result."""
    logp, entropy, lse = results
    up = torch.linspace(-1, 1, logp.numel(), device=logp.device, dtype=logp.dtype).view(logp.shape)
    return (logp * up + entropy * up.cos() + 0.3 * lse * up.sin()).sum()


HEADS = {"plain": {}, "bias": {"bias": True}, "cap": {"softcap": 5.0}, "scale": {"scale": 0.25},
         "all": {"bias": True, "softcap": 5.0, "scale": 2.0}}


@pytest.mark.parametrize("form, temperature", [*((form, 0.7) for form in HEADS), ("plain", 1.0)])
def test_results_and_gradients(backend, form, temperature):
    """fp32 against fp64, through all chunks, with ignored rows."""
    hidden, weight, y = draw()
    y[3] = y[5] = -1
    leaves, head = {"hidden": hidden, "weight": weight}, dict(HEADS[form])
    if head.pop("bias", False):
        leaves["bias"] = torch.randn(VOCAB, device=DEVICE, requires_grad=True)
    wide = {name: one.detach().double().requires_grad_() for name, one in leaves.items()}
    got = fused_linear_entropy(**leaves, targets=y, temperature=temperature, backend=backend,
                               **head)
    want = plain(**wide, y=y, temperature=temperature, **head)
    got_grads, want_grads = (torch.autograd.grad(loss(results), of.values())
                             for results, of in ((got, leaves), (want, wide)))
    for one, other in zip(got, want):  # fp32 products are good to about 1e-6 of logits of size 15
        assert one.dtype == torch.float32 and error(one, other) < 1e-5
    for one, other, leaf in zip(got_grads, want_grads, leaves.values()):
        assert one.dtype == leaf.dtype and one.shape == leaf.shape
        assert (one - other).abs().max() <= 1e-5 * other.abs().max()
    assert (got_grads[0][[3, 5]] == 0).all()


def test_gradcheck(backend):
    hidden, weight, y = draw(3, 4, 20, torch.float64)
    y[1] = -1
    bias = torch.randn(20, dtype=torch.float64, device=DEVICE, requires_grad=True)
    linear.CHUNK = {DEVICE: 40}
    assert torch.autograd.gradcheck(lambda hidden, weight, bias: fused_linear_entropy(
        hidden, weight, y, 0.7, bias, softcap=3.0, scale=1.5, backend=backend),
        (hidden, weight, bias), fast_mode=True)


def test_leading_dimensions(backend):
    """(batch, sequence, d) gives the bits of its flat form."""
    hidden, weight, y = draw(6)
    bits = []
    for h, targets in ((hidden, y), (hidden.view(3, 2, WIDTH), y.view(3, 2))):
        results = fused_linear_entropy(h, weight, targets, 0.7, backend=backend)
        assert all(one.shape == targets.shape for one in results)
        bits.append([one.flatten() for one in (
            *results, *torch.autograd.grad(loss(results), (hidden, weight)))])
    assert all(torch.equal(one, other) for one, other in zip(*bits))


def test_no_rows(backend):
    _, weight, y = draw(width=4)
    hidden = torch.zeros(0, 4, device=DEVICE, requires_grad=True)
    results = fused_linear_entropy(hidden, weight, y[:0], backend=backend)
    sum(one.sum() for one in results).backward()
    assert results[0].shape == (0,) and hidden.grad.shape == (0, 4) and (weight.grad == 0).all()


@pytest.mark.parametrize("frozen, products", [
    ((), 4), (("weight",), 3), (("hidden",), 3), (("hidden", "weight"), 1)])
def test_products(backend, frozen, products):
    """Four products in all, three where one side is frozen, and the forward pass's one where no
    gradient is due."""
    hidden, weight, y = draw()
    hidden.requires_grad_("hidden" not in frozen)
    weight.requires_grad_("weight" not in frozen)
    with Watch() as watch:
        results = fused_linear_entropy(hidden, weight, y, backend=backend)
        assert watch.products == ROWS * WIDTH * VOCAB
        if products > 1:
            loss(results).backward()
    assert watch.products == products * ROWS * WIDTH * VOCAB


def test_the_logits_are_never_whole(monkeypatch):
    """No memory grows with rows x vocab: the largest is one chunk, or the weight's own gradient."""
    monkeypatch.setattr(linear, "CHUNK", {DEVICE: 30 * VOCAB})
    with Watch() as watch:
        loss(fused_linear_entropy(*draw(rows=400), backend="torch")).backward()
    assert watch.largest <= 2 * 30 * VOCAB * 4  # of the logits' 400 rows


def test_autocast(backend):
    """hidden bf16, weight fp32: results fp32, gradients in their leaves' types and as good as those
    of eager PyTorch."""
    hidden, weight, y = draw()
    narrow = hidden.detach().bfloat16().requires_grad_()
    exact = [one.detach().bfloat16().double().requires_grad_() for one in (narrow, weight)]
    with torch.autocast(DEVICE, torch.bfloat16):
        got = fused_linear_entropy(narrow, weight, y, 0.7, backend=backend)
        usual = plain(narrow, weight, y, 0.7)
    want = plain(*exact, y, 0.7)
    got, usual, want = ((*results, *torch.autograd.grad(loss(results), leaves))
                        for results, leaves in (
                            (got, (narrow, weight)), (usual, (narrow, weight)), (want, exact)))
    assert [one.dtype for one in got] == [torch.float32] * 3 + [torch.bfloat16, torch.float32]
    factor = 3 if INTERPRETED else 1.5  # the interpreter truncates bf16 where the GPU rounds
    for one, other, best in zip(got, usual, want):
        assert (one - best).abs().max() <= factor * (other - best).abs().max() + 1e-6


def test_the_weight_gradient_is_summed_in_fp32(monkeypatch):
    """One row a chunk: 128 additions in bf16 would be off by 2 %. Each product is still rounded
    once, on a CPU."""
    rows, vocab, like = 128, 40, {"dtype": torch.bfloat16, "device": DEVICE}
    hidden, weight = torch.ones(rows, 4, **like), torch.zeros(vocab, 4, **like, requires_grad=True)
    monkeypatch.setattr(linear, "CHUNK", {DEVICE: vocab})
    logp = fused_linear_entropy(hidden, weight, torch.full((rows,), 3, device=DEVICE))[0]
    grad, = torch.autograd.grad(logp.sum(), weight)
    want = rows * ((torch.arange(vocab) == 3).double() - 1 / vocab)
    assert grad.dtype == torch.bfloat16
    assert ((grad[:, 0].cpu().double() - want).abs() <= 0.01 * want.abs()).all()


def test_backward_twice(backend):
    """Nothing saved is overwritten: a second backward through the graph gives the same bits. Its
    gradients cannot be differentiated again."""
    hidden, weight, y = draw()
    value = loss(fused_linear_entropy(hidden, weight, y, 0.7, softcap=5.0, backend=backend))
    first, second = (torch.autograd.grad(value, (hidden, weight), retain_graph=True)
                     for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second))
    with pytest.raises(RuntimeError, match="only once"):
        torch.autograd.grad(value, hidden, create_graph=True)


RIGHT = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(6, 4),
         "targets": torch.zeros(3, dtype=torch.long)}


@pytest.mark.parametrize("change, message", [
    ({"hidden": torch.zeros(3, 5)}, "needed"), ({"weight": torch.zeros(4)}, "needed"),
    ({"targets": torch.zeros(4, dtype=torch.long)}, "needed"), ({"bias": torch.zeros(3)}, "needed"),
    ({"hidden": torch.zeros(3, 4).bfloat16()}, "autocast"), ({"backend": "cuda"}, "backend"),
    ({"targets": torch.zeros(3)}, "integers"), ({"temperature": 0}, "temperature"),
    ({"softcap": 0}, "softcap"), ({"scale": -1}, "scale"), ({"scale": float("nan")}, "scale")])
def test_wrong_inputs(change, message):
    with pytest.raises(ValueError, match=message):
        fused_linear_entropy(**{**RIGHT, **change})


class Model(torch.nn.Module):
    """The embedding's weight is the head's (tied), as in most small models."""
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCAB, WIDTH)
        self.layer = torch.nn.Linear(WIDTH, WIDTH)

    def forward(self, ids, y, logps=fused_linear_entropy):
        return logps(self.layer(self.embed(ids)).tanh() * 4, self.embed.weight, y, 0.7)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
def test_inside_a_wrapped_module(wrapper, tmp_path, monkeypatch):
    """DDP's hooks see the tied weight's gradient; under FSDP2 the head gets the weight that its
    hooks have gathered."""
    monkeypatch.setitem(linear.CHUNK, "cpu", 2 * VOCAB)
    ids = torch.randint(VOCAB, (2, 8))
    y = torch.cat([ids[:, 1:], torch.full((2, 1), -1)], 1)
    model = Model()
    loss(model(ids, y, plain)).backward()
    want = [one.grad.clone() for one in model.parameters()]
    model.zero_grad()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = (torch.nn.parallel.DistributedDataParallel(model) if wrapper == "ddp" else
                   fully_shard(model, mesh=init_device_mesh("cpu", (1,))))
        loss(wrapped(ids, y)).backward()
        for one, other in zip(wrapped.parameters(), want):
            grad = one.grad.full_tensor() if wrapper == "fsdp2" else one.grad
            assert (grad - other).abs().max() <= 1e-5 * other.abs().max()
    finally:
        dist.destroy_process_group()
