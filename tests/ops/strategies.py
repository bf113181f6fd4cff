"""What the fuzz tests of several ops draw."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor


@st.composite
def tensors(draw: st.DrawFn, shape: list[int], dtype: torch.dtype) -> Tensor:
    """Random values in a random layout: permuted, strided, expanded, off by some elements."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    order = draw(st.permutations(range(len(shape))))
    steps = [draw(st.sampled_from([1, 1, 1, 2, 3])) for _ in shape]
    expanded = [draw(st.integers(0, 9)) == 0 for _ in shape]
    offset = draw(st.integers(0, 5))
    sizes = [1 if e and n else n * s for n, s, e in zip(shape, steps, expanded, strict=True)]
    store = torch.randn([sizes[i] for i in order], generator=generator).to(dtype)
    flat = torch.empty(store.numel() + offset, dtype=dtype)
    flat[offset:] = store.flatten()
    store = flat[offset:].view(store.shape)
    back = store.permute([order.index(i) for i in range(len(shape))])
    for axis, step in enumerate(steps):
        back = back[(slice(None),) * axis + (slice(None, None, step if sizes[axis] > 1 else 1),)]
    return back.expand(shape)
