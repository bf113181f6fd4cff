"""Working memory stays bounded, and memory that is gone is refused."""

import subprocess
import sys

import pytest
import torch

import pybigmodel as pbm

# In a process of its own: the peak of this one belongs to other tests.
GROWTH = """
import resource, torch, pybigmodel as pbm
rows, k, n = {rows}, {k}, {n}
x, dy, w = torch.ones(rows, k), torch.ones(rows, n), torch.ones(n, k)
backward = lambda dy, x: torch.autograd.grad(pbm.ops.linear(x, w.requires_grad_()), w, dy)
backward(dy[:64], x[:64])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
(dw,) = backward(dy, x)
assert dw[0, 0] == rows, dw[0, 0]
print((peak() - before) // 1024 - rows * n * 4 // 2**20)
"""


def test_weight_gradient_of_many_rows_needs_little_memory() -> None:
    code = GROWTH.format(rows=2**17, k=256, n=256)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    # Beyond the output of the forward pass. The operands, packed whole, would take 450 MiB.
    assert int(run.stdout) < 100, f"{run.stdout.strip()} MiB of working memory"


@pytest.mark.parametrize("lost", ["input", "weight", "bias"])
def test_freed_storage_is_refused(lost: str) -> None:
    tensors = {"input": torch.ones(4, 32), "weight": torch.ones(48, 32), "bias": torch.ones(48)}
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{lost} must have its storage.*freed"):
        pbm.ops.linear(**tensors)


def test_freed_packed_weight_is_refused() -> None:
    packed = pbm.ops.pack_linear_weight(torch.ones(48, 32))
    packed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="packed_weight must have its storage"):
        pbm.ops.linear_packed(torch.ones(4, 32), packed, 48)


def test_bf16_weight_is_packed_as_bf16() -> None:
    packed = pbm.ops.pack_linear_weight(torch.ones(48, 32, dtype=torch.bfloat16))
    assert packed.dtype == torch.bfloat16
