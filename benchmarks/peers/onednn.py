"""oneDNN through torch with the weight reordered beforehand: what inductor's freezing emits."""

from __future__ import annotations

from functools import partial

import torch
from shapes import Product

from peers import Contender, Unavailable
from peers.torch_eager import DTYPES


def build(problem: Product) -> Contender:
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch is built without oneDNN")
    dtype = DTYPES[problem.precision]
    data = problem.data
    x, bias = data.x.to(dtype), data.bias.to(dtype)
    reorder, linear = torch.ops.mkldnn._reorder_linear_weight, torch.ops.mkldnn._linear_pointwise
    # The batch size lets oneDNN choose its blocking for this M.
    weights = [reorder(data.weight.to(dtype, copy=True), problem.m) for _ in range(problem.copies)]
    return Contender.of_linear(
        problem, [partial(linear.default, x, w, bias, "none", [], "") for w in weights]
    )
