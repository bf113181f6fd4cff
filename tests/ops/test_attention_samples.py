"""attention on the samples that torch tests its own scaled_dot_product_attention with."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from attention_cases import FLOATS, Case, check_forward, check_lse, exact, make, theirs
from attention_gradients import check_gradients
from torch.testing._internal.common_methods_invocations import op_db

from pybigmodel import ops
from pybigmodel.testing import assert_no_worse

(SDPA,) = (op for op in op_db if op.name == "nn.functional.scaled_dot_product_attention")


def samples(dtype: torch.dtype) -> Iterator[Case]:
    """Of three dimensions the first is the batch; dropout is the reference's, not torch's."""
    for seed, sample in enumerate(SDPA.sample_inputs("cpu", dtype, requires_grad=False)):
        tensors = [sample.input, *sample.args]
        lead = torch.broadcast_shapes(*(t.shape[:-2] for t in tensors))
        q, k, v = (t.expand(*lead, *t.shape[-2:]) for t in tensors)
        if q.dim() == 3:
            q, k, v = (t[:, None] for t in (q, k, v))
        options = {"dropout_seed": seed, **sample.kwargs}
        if options.pop("is_causal"):
            options |= {"causal": True, "causal_align": "top_left"}
        yield Case(q, k, v, options)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_samples_of_torch(isa: str, dtype: torch.dtype) -> None:
    results = []
    for case in samples(dtype):
        out, lse = case.call(ops.attention, return_lse=True)
        check_lse(case, lse)
        check_gradients(case)
        results.append((out, theirs(case), exact(case)[0]))
    assert len(results) >= 20  # so many has torch 2.13
    # Together, since each has too few rows for its error to mean much.
    assert_no_worse(*(torch.cat([t.flatten() for t in ts]) for ts in zip(*results, strict=True)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_top_left_is_torchs_is_causal(isa: str, dtype: torch.dtype) -> None:
    for sq, sk in [(9, 9), (5, 40), (40, 5), (65, 64)]:
        case = make({"shape": (2, 4, 2, sq, sk, 16, 16), "dtype": dtype, "causal": "top_left"})
        check_forward(case, *case.call(ops.attention, return_lse=True))
        exact = F.scaled_dot_product_attention(
            *(t.double() for t in (case.q, case.k, case.v)), is_causal=True, enable_gqa=True
        )
        theirs = F.scaled_dot_product_attention(
            case.q, case.k, case.v, is_causal=True, enable_gqa=True
        )
        assert_no_worse(case.call(ops.attention), theirs, exact)
