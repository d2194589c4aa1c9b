"""The Triton kernels compile for real GPUs on a machine without one, so that a release of Triton
that breaks them is seen. What they compute is tested through the interpreter, in test_kernel.py."""
import importlib.util
import os
import subprocess
import sys

import pytest

KERNELS = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "kernels")
COMPILE = """
import sys
import torch

torch.cuda.is_available = lambda: True  # so that the kernels are defined
sys.path.append(sys.argv[1])
import fused_entropy
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

for capability in 80, 90:
    for logits in "bf16", "fp32":
        for kernel in fused_entropy.forward_kernel, fused_entropy.backward_kernel:
            signature = {}
            for name in kernel.arg_names:
                pointer = "*i64" if name == "y_ptr" else "*fp32"
                if name in ("x_ptr", "grad_ptr"):
                    pointer = "*" + logits
                signature[name] = pointer if name.endswith("_ptr") else "i64"
            constants = {"scale": 1.4426950408889634, "BLOCK": fused_entropy.BLOCK}
            signature.update(dict.fromkeys(constants, "constexpr"))
            source = ASTSource(kernel, signature=signature, constexprs=constants)
            target = GPUTarget("cuda", capability, 32)
            compiled = triton.compile(source, target=target, options={"num_warps": 4})
            print(capability, logits, kernel.__name__, len(compiled.asm["cubin"]))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
def test_the_kernels_compile_for_ampere_and_hopper(tmp_path):
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, "-c", COMPILE, KERNELS], env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sizes = [int(line.split()[-1]) for line in done.stdout.splitlines()]
    assert len(sizes) == 8 and min(sizes) > 1000
