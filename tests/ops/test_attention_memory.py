"""Attention of long sequences needs memory in proportion to their length; gone memory is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pybigmodel import ops

# In a process of its own: the peak of this one belongs to other tests. The scores are zeros, so
# that row i is the mean of the values up to i, and value j's gradient the sum of 1/(i + 1) from j on.
GROWTH = """
import resource, torch
from pybigmodel import ops

def make(s):
    q = torch.zeros({heads}, s, 16, dtype=torch.{dtype})[None]
    k = torch.zeros_like(q[:, :1])
    v = (torch.arange(s) % 64).to(q.dtype)[:, None].expand(1, 1, s, 16).clone()
    mask = {mask}
    leaves = [t.requires_grad_({backward}) for t in (q, k, v)]
    return leaves, dict(attn_mask=mask, causal=True, return_lse=True)

def run(s):
    leaves, options = make(s)
    out, lse = ops.attention(*leaves, **options)
    if {backward}:
        torch.autograd.backward(out, torch.ones_like(out))
    return leaves, out, lse

run(64)
leaves, options = make({s})
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before = peak()
leaves, out, lse = run({s})
print(peak() - before)

n = torch.arange(1, {s} + 1).double()
v = leaves[2].detach()[0, 0, :, 0].double()
within = dict(rtol=1e-5 if out.dtype == torch.float32 else 1e-2, atol=1e-4)
torch.testing.assert_close(out[0, -1, :, 3].double(), v.cumsum(0) / n, **within)
torch.testing.assert_close(lse[0, -1].double(), n.log(), rtol=1e-6, atol=1e-5)
if {backward}:
    d_v = {heads} * (1 / n).flip(0).cumsum(0).flip(0)
    within["atol"] *= float(d_v.max())
    torch.testing.assert_close(leaves[2].grad[0, 0, :, 3].double(), d_v, **within)
    assert not leaves[0].grad.isnan().any()
"""
S = 32768


def working_memory(**choices: object) -> int:
    """MiB at the peak of a call beyond what was there before."""
    code = GROWTH.format(**{"s": S, "heads": 1, "mask": None, "backward": False, **choices})
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


# The scores alone are 4 GiB a head. The tensors: 2 MiB each in float32, and several packed copies.
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mask", ["None", "torch.ones(s, dtype=torch.bool)", "torch.zeros(s)"])
def test_long_sequences(dtype: str, mask: str) -> None:
    assert working_memory(dtype=dtype, mask=mask) < 64


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_of_long_sequences(dtype: str) -> None:
    assert working_memory(dtype=dtype, backward=True) < 128


def test_gradients_of_several_heads() -> None:
    assert working_memory(dtype="bfloat16", heads=2, s=S // 2, backward=True) < 128


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
