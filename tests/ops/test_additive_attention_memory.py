"""Additive attention needs memory in proportion to the length; lost memory is refused."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from pybigmodel import ops

# In a process of its own: the peak of this one belongs to other tests. All scores are alike.
GROWTH = """
import resource, torch
from pybigmodel import ops

def run(s, backward):
    q, k, value = (torch.full((1, s, 64), 0.1, requires_grad=backward) for _ in range(3))
    v = torch.ones(64, requires_grad=backward)
    out = ops.additive_attention(q, k, value, v)
    torch.testing.assert_close(out.detach(), value.detach(), rtol=1e-5, atol=0)
    if backward:
        *others, d_value, d_v = torch.autograd.grad(out.sum(), (q, k, value, v))
        torch.testing.assert_close(d_value, torch.ones_like(value), rtol=1e-4, atol=0)
        assert all(g.abs().max() < 1e-4 for g in others)

peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
run(256, {backward})
before = peak()
run(6000, {backward})
print((peak() - before) // 1024)
"""


@pytest.mark.parametrize(("backward", "most"), [(False, 24), (True, 60)])
def test_memory_grows_with_the_length_only(backward: bool, most: int) -> None:
    code = GROWTH.format(backward=backward)
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    # The matrix of scores would take 137 MiB, that of hyperbolic tangents 8.6 GiB. A tensor of the
    # size of the input takes 1.5; there are ten or so, and 8 MiB of scores in the backward pass.
    assert int(run.stdout) < most, f"{run.stdout.strip()} MiB of working memory"


@pytest.mark.parametrize("lost", ["query", "key", "value", "v", "attn_mask"])
@pytest.mark.parametrize("queries", [2, 5])
def test_freed_storage_is_refused(lost: str, queries: int) -> None:
    shapes = {"query": (2, queries, 8), "key": (2, 7, 8), "value": (2, 7, 6), "v": (8,)}
    tensors = {name: torch.ones(s) for name, s in (*shapes.items(), ("attn_mask", (queries, 7)))}
    tensors[lost].untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"{lost} must have its storage.*freed"):
        ops.additive_attention(**tensors)
