"""Attention of long sequences needs memory in proportion to them; lost memory is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pybigmodel import ops

# In a process of its own: the peak of this one belongs to other tests. The scores are zeros, so
# that row i is the mean of the values up to i, and value j has the gradient Σ 1/(i + 1) over i ≥ j.
GROWTH = """
import resource, torch
from pybigmodel import ops

S, BACKWARD = {s}, {backward}
MASKS = dict(
    none=lambda s: None,
    bool=lambda s: torch.ones(s, dtype=torch.bool),
    bias=torch.zeros,
    rows=lambda s: torch.zeros(s, 1),
    transpose=lambda s: torch.zeros(s, 2)[:, :1].expand(s, s).mT,
)

def run(s, dtype, mask):
    q, k = torch.zeros(1, 1, s, 16, dtype=dtype), torch.zeros(1, 1, s, 16, dtype=dtype)
    v = (torch.arange(s) % 64).to(dtype)[:, None].expand(1, 1, s, 16).clone()
    leaves = [t.requires_grad_(BACKWARD) for t in (q, k, v)]
    given = MASKS[mask](s)
    if BACKWARD and given is not None and given.is_floating_point():
        leaves.append(given.requires_grad_())
    out, lse = ops.attention(*leaves[:3], attn_mask=given, causal=True, return_lse=True)
    if BACKWARD:
        torch.autograd.backward(out, torch.ones_like(out))
    return leaves, out, lse

def check(leaves, out, lse):
    n, v = torch.arange(1, S + 1).double(), leaves[2].detach()[0, 0, :, 0].double()
    within = dict(rtol=1e-5 if out.dtype == torch.float32 else 1e-2, atol=1e-4)
    torch.testing.assert_close(out[0, -1, :, 3].double(), v.cumsum(0) / n, **within)
    torch.testing.assert_close(lse[0, -1].double(), n.log(), rtol=1e-6, atol=1e-5)
    if BACKWARD:
        d_v = (1 / n).flip(0).cumsum(0).flip(0)
        torch.testing.assert_close(leaves[2].grad[0, 0, :, 3].double(), d_v, **within)
        assert not leaves[0].grad.any() and not leaves[1].grad.any()

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
run(64, torch.float32, "none")
before, results = peak(), []
for dtype in (torch.float32, torch.bfloat16):
    for mask in {masks}:
        results.append(run(S, dtype, mask))
print(peak() - before)
for result in results:
    check(*result)
"""


def working_memory(**choices: object) -> int:
    """MiB that the calls need beside what was there before, results included."""
    code = GROWTH.format(**{"s": 32768, **choices})
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_long_sequences() -> None:
    # Ten calls with tensors of 8 MiB or 4 MiB together; the scores alone of one are 4 GiB.
    assert working_memory(backward=False, masks=["none", "bool", "bias", "rows", "transpose"]) < 192


def test_gradients_of_long_sequences() -> None:
    assert working_memory(backward=True, masks=["none"]) < 192


def test_gradient_of_a_mask_of_one_column() -> None:
    """That of a mask with a value a query is summed over keys as it comes."""
    assert working_memory(backward=True, masks=["rows"], s=8192) < 96


@pytest.mark.parametrize("lost", ["q", "k", "v", "attn_mask", "alibi_slopes"])
def test_freed_storage_is_refused(lost: str) -> None:
    tensors = {n: torch.ones(1, 2, 5, 8) for n in ("q", "k", "v")}
    tensors |= {"attn_mask": torch.ones(5, 5), "alibi_slopes": torch.ones(2)}
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{lost} must have its storage.*freed"):
        ops.attention(**tensors)


@pytest.mark.parametrize("lost", ["q", "k", "v", "cu_seqlens_q", "cu_seqlens_k"])
def test_freed_storage_of_packed_sequences_is_refused(lost: str) -> None:
    tensors = {n: torch.ones(5, 2, 8) for n in ("q", "k", "v")}
    tensors |= {n: torch.tensor([0, 2, 5]) for n in ("cu_seqlens_q", "cu_seqlens_k")}
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{lost} must have its storage.*freed"):
        ops.attention_varlen(**tensors)
