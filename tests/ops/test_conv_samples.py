"""Convolution on the samples that torch tests its own functions with."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_cases import FLOATS
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from pybigmodel import ops
from pybigmodel.testing import assert_no_worse

NAMES = ["conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"]
F64 = torch.float64
# So many has torch 2.13.
AT_LEAST = dict(zip(NAMES, (8, 15, 8, 5, 5, 5), strict=True))


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_samples_of_torch(isa: str, name: str, dtype: torch.dtype) -> None:
    (info,) = (op for op in op_db if op.name == f"nn.functional.{name}")
    exact_only = {} if "transpose" in name else {"algorithm": "direct"}
    results: list[list[tuple[Tensor, ...]]] = [[], [], []]
    for sample in info.sample_inputs("cpu", dtype, requires_grad=False):
        tensors = [t for t in (sample.input, *sample.args) if isinstance(t, Tensor)]
        rest = [a for a in sample.args if not isinstance(a, Tensor)]
        shape = getattr(F, name)(sample.input, *sample.args, **sample.kwargs).shape
        dy = torch.randn(shape).to(dtype)
        for result, (library, wanted, more) in zip(
            results, ((ops, dtype, exact_only), (F, dtype, {}), (F, F64, {})), strict=True
        ):
            leaves = [t.detach().to(wanted).requires_grad_() for t in tensors]
            y = getattr(library, name)(*leaves, *rest, **sample.kwargs, **more)
            result.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(wanted))))
    assert len(results[0]) >= AT_LEAST[name]
    # Together, since each has too few values for its error to mean much.
    flat = (torch.cat([t.flatten() for ts in r for t in ts]) for r in results)
    assert_no_worse(*flat)
