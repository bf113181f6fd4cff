"""torch.autocast over the layers and the ops, as over torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel._measure import difference

K, N = 40, 24
DTYPES = [torch.bfloat16, torch.float16]


def layers() -> tuple[pbm.nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    theirs = nn.Linear(K, N)
    return pbm.nn.Linear.from_linear(theirs), theirs


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_layer(dtype: torch.dtype, grad: bool) -> None:
    ours, theirs = layers()
    x = torch.randn(5, K)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        for _ in range(2):
            got, expected = ours(x), theirs(x)
            assert got.dtype == expected.dtype == dtype
            assert difference(got, expected)[0] < 1e-2
        assert ours(x.to(dtype)).dtype == dtype
    with torch.no_grad():
        assert difference(ours(x), theirs(x))[0] < 1e-6  # and in fp32 again outside


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_change_no_number(dtype: torch.dtype, precision: str) -> None:
    ours, _ = layers()
    ours.precision = precision
    x = torch.randn(50, K)
    with torch.autocast("cpu", dtype=dtype):
        expected = ours(x)
        with torch.no_grad():
            assert torch.equal(ours(x), expected)


def test_layer_takes_bf16_products_and_keeps_both_copies() -> None:
    ours, _ = layers()
    x = torch.randn(5, K)
    with torch.no_grad():
        ours(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            ours(x)
            assert "bf16" in _native.last_kernel()
        ours(x)
        assert "f32" in _native.last_kernel()
    assert sorted(ours._packed.copies) == [0, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(dtype: torch.dtype) -> None:
    ours, theirs = layers()
    ours.weight, ours.bias = (nn.Parameter(p.detach().clone()) for p in (ours.weight, ours.bias))
    x = torch.randn(5, K)
    for layer in (ours, theirs):
        with torch.autocast("cpu", dtype=dtype):
            y = layer(x)
        y.float().square().sum().backward()
    for got, expected in ((ours.weight, theirs.weight), (ours.bias, theirs.bias)):
        assert got.grad.dtype == torch.float32
        assert difference(got.grad, expected.grad)[0] < 1e-2


def test_disabled_autocast_and_float64() -> None:
    ours, _ = layers()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert ours(torch.randn(5, K)).dtype == torch.float32
        with pytest.raises(RuntimeError, match="float64"):
            ours(torch.randn(5, K, dtype=torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ops(dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(5, K), torch.randn(N, K), torch.randn(N)
    residual = torch.randn(5, N)
    quantized, scale = pbm.ops.quantize_weight(weight)
    packed = pbm.ops.pack_int8_linear_weight(quantized)
    calls = {
        "linear": lambda: pbm.ops.linear(x, weight, bias),
        "linear_packed": lambda: pbm.ops.linear_packed(
            x, pbm.ops.pack_linear_weight(weight), N, bias, residual=residual
        ),
        "int8_linear": lambda: pbm.ops.int8_linear(x, packed, scale, bias, residual=residual),
        "int8_weight_only_linear": lambda: pbm.ops.int8_weight_only_linear(x, packed, scale, bias),
    }
    for name, call in calls.items():
        expected = call()
        with torch.autocast("cpu", dtype=dtype):
            got = call()
        assert got.dtype == dtype, name
        assert difference(got, expected)[0] < 2e-2, name


def test_int8_layer() -> None:
    _, theirs = layers()
    ours = pbm.nn.Int8Linear.from_linear(theirs)
    x = torch.randn(5, K)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16
        assert difference(ours(x), theirs(x))[0] < 2e-2
