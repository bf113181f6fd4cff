"""The CUDA ops against the CPU's contract. They run where torch sees a GPU: `make gpu`."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

import pybigmodel as pbm
from pybigmodel.reference import linear as reference

gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device; run `make gpu` on one"
)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Below, at and above tile edges: 16, 64, 128 rows and columns, 64 of k, 16 bytes, 4 of a group.
SHAPES = [
    ((1,), 1, 1),
    ((1,), 768, 768),
    ((2, 3), 17, 5),
    ((16,), 64, 64),
    ((17,), 130, 100),
    ((3, 43), 128, 515),
    ((300,), 1000, 333),
    ((4096,), 1024, 256),
]


def test_import_without_cuda_leaves_the_cuda_library_alone() -> None:
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA, so the library is meant to be loaded")
    script = "import pybigmodel; print('libpybigmodel_cuda' in open('/proc/self/maps').read())"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def random_weight(n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, device="cuda")
    return weight, torch.rand(n, device="cuda") * 0.02 + 0.001


def reference_int8_linear(*tensors: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """On the CPU: torch's CUDA division by a scalar does not round correctly; scales must."""
    on_cpu = [None if t is None else t.cpu() for t in tensors]
    residual = options.pop("residual", None)
    options["residual"] = None if residual is None else residual.cpu()
    return reference.int8_linear(*on_cpu, **options).cuda()  # type: ignore[arg-type]


def assert_rounded(got: torch.Tensor, expected: torch.Tensor, largest_term: float) -> None:
    """One rounding to got's dtype, and a few of fp32 at the size of the terms."""
    bound = torch.finfo(got.dtype).eps / 2 * expected.abs() + 2**-20 * (1 + largest_term)
    same_nan = got.isnan() == expected.isnan()
    assert bool(same_nan.all())
    error = (got.double() - expected).abs()
    assert bool(((error <= bound) | expected.isnan()).all()), float(
        (error - bound).nan_to_num().max()
    )


@gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (1,), (5, 3), (2, 7, 64), (33, 1024), (3, 5001)])
def test_quantize_per_token_is_bit_exact(
    shape: tuple[int, ...], dtype: torch.dtype, symmetric: bool
) -> None:
    x = torch.randn(shape, dtype=dtype)
    for got, expected in zip(
        pbm.ops.quantize_per_token(x.cuda(), symmetric),
        reference.quantize_per_token(x, symmetric),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0)


@gpu
@pytest.mark.parametrize("symmetric", [False, True])
def test_quantize_per_token_special_rows(symmetric: bool) -> None:
    x = torch.randn(9, 100)
    x[0] = 0
    x[1, 50], x[2, 99], x[3, 0] = torch.nan, torch.inf, -torch.inf
    x[4, :2] = torch.tensor([3.4e38, -3.4e38])
    x[5] *= 1e-39
    x[6], x[7] = x[6].abs() + 1, -x[7].abs() - 1
    for got, expected in zip(
        pbm.ops.quantize_per_token(x.cuda(), symmetric),
        reference.quantize_per_token(x, symmetric),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@gpu
@pytest.mark.parametrize("shape", [(1, 1), (16, 4), (17, 5), (40, 70), (3, 0), (0, 8), (1000, 515)])
def test_packed_weight_is_the_cpus(shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    packed = pbm.ops.pack_int8_linear_weight(weight.cuda())
    assert torch.equal(packed.cpu(), pbm.ops.pack_int8_linear_weight(weight))
    strided = torch.randint(-128, 128, (shape[1], shape[0]), dtype=torch.int8).t()
    packed = pbm.ops.pack_int8_linear_weight(strided.cuda())
    assert torch.equal(packed.cpu(), pbm.ops.pack_int8_linear_weight(strided))


@gpu
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("leading", "n", "k"), SHAPES)
def test_int8_linear(
    leading: tuple[int, ...], n: int, k: int, dtype: torch.dtype, symmetric: bool
) -> None:
    x = torch.randn(*leading, k, device="cuda").to(dtype)
    weight, scale = random_weight(n, k)
    got = pbm.ops.int8_linear(
        x, pbm.ops.pack_int8_linear_weight(weight), scale, symmetric=symmetric
    )
    expected = reference_int8_linear(x, weight, scale, symmetric=symmetric)
    assert got.dtype == dtype and got.shape == expected.shape
    assert_rounded(got, expected, float(expected.abs().max()))


@gpu
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
@pytest.mark.parametrize("n", [64, 61])
def test_int8_linear_epilogue(
    n: int, activation: str, with_residual: bool, bias_dtype: torch.dtype | None
) -> None:
    x = torch.randn(70, 96, device="cuda", dtype=torch.bfloat16)
    weight, scale = random_weight(n, 96)
    bias = None if bias_dtype is None else torch.randn(n, device="cuda").to(bias_dtype)
    residual = torch.randn(70, n, device="cuda", dtype=torch.bfloat16) if with_residual else None
    got = pbm.ops.int8_linear(
        x,
        pbm.ops.pack_int8_linear_weight(weight),
        scale,
        bias,
        activation=activation,
        residual=residual,
    )
    expected = reference_int8_linear(
        x, weight, scale, bias, activation=activation, residual=residual
    )
    before = reference_int8_linear(x, weight, scale, bias)
    assert_rounded(got, expected, float(before.abs().max()))


@gpu
def test_int8_linear_strided_and_misaligned_arguments() -> None:
    weight, scale = random_weight(64, 96)
    packed = pbm.ops.pack_int8_linear_weight(weight)
    storage = torch.randn(98 * 70 + 1, device="cuda")
    x = storage[1 : 1 + 98 * 70].view(98, 70).t()[:, 1:97]
    residual = torch.randn(71 * 64, device="cuda")[1 : 1 + 70 * 64].view(70, 64)
    scale = torch.stack([scale, scale], 1)[:, 0]
    got = pbm.ops.int8_linear(x, packed, scale, residual=residual)
    expected = reference_int8_linear(x, weight, scale, residual=residual)
    assert_rounded(got, expected, float(expected.abs().max()))


@gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("activation", ["none", "relu", "gelu", "gelu_tanh", "silu"])
def test_int8_linear_hides_no_nan(activation: str, value: float) -> None:
    x = torch.randn(20, 64, device="cuda")
    x[3, 5] = value
    weight, scale = random_weight(32, 64)
    packed = pbm.ops.pack_int8_linear_weight(weight)
    got = pbm.ops.int8_linear(x, packed, scale, activation=activation)
    rows = torch.arange(20, device="cuda") == 3
    assert bool(got[rows].isnan().all()) and bool(got[~rows].isfinite().all())


@gpu
def test_int8_linear_largest_sum() -> None:
    k = 65793
    weight = torch.full((1, k), -128, dtype=torch.int8, device="cuda")
    packed = pbm.ops.pack_int8_linear_weight(weight)
    scale = torch.ones(1, device="cuda")
    x = torch.full((1, k), 255.0, device="cuda")
    assert float(pbm.ops.int8_linear(x, packed, scale)) == float(torch.tensor(-255.0 * 128 * k))
    with pytest.raises(RuntimeError, match="65793"):
        pbm.ops.pack_int8_linear_weight(torch.zeros(1, k + 1, dtype=torch.int8, device="cuda"))


@gpu
def test_int8_linear_empty() -> None:
    weight, scale = random_weight(32, 64)
    packed = pbm.ops.pack_int8_linear_weight(weight)
    assert pbm.ops.int8_linear(torch.empty(0, 64, device="cuda"), packed, scale).shape == (0, 32)
    none, bias = pbm.ops.pack_int8_linear_weight(weight[:, :0]), torch.randn(32, device="cuda")
    got = pbm.ops.int8_linear(torch.empty(5, 0, device="cuda"), none, scale, bias)
    assert torch.equal(got, bias.expand(5, 32))


@gpu
def test_int8_linear_runs_on_the_current_stream() -> None:
    weight, scale = random_weight(512, 512)
    packed = pbm.ops.pack_int8_linear_weight(weight)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        x = torch.zeros(2048, 512, device="cuda")
        for _ in range(50):  # work that a kernel on another stream would not wait for
            x = x + 1
        got = pbm.ops.int8_linear(x, packed, scale)
    stream.synchronize()
    expected = reference_int8_linear(torch.full_like(x, 50), weight, scale)
    assert_rounded(got, expected, float(expected.abs().max()))


@gpu
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input": torch.zeros(2, 64, dtype=torch.float64)}, "input must be float32"),
        ({"input": torch.zeros(2, 65)}, "packed_weight for in_features = 65"),
        ({"weight_scale": torch.ones(32, dtype=torch.float16)}, "weight_scale must be float32"),
        ({"bias": torch.zeros(31)}, r"bias must have shape \(32,\)"),
        ({"residual": torch.zeros(2, 31)}, "residual must have the output's shape"),
        ({"residual": torch.zeros(2, 32).half()}, "residual must be float32"),
    ],
)
def test_int8_linear_names_the_bad_argument(change: dict[str, torch.Tensor], message: str) -> None:
    weight, scale = random_weight(32, 64)
    arguments: dict[str, torch.Tensor] = {
        "input": torch.zeros(2, 64, device="cuda"),
        "packed_weight": pbm.ops.pack_int8_linear_weight(weight),
        "weight_scale": scale,
        **{name: tensor.cuda() for name, tensor in change.items()},
    }
    with pytest.raises(RuntimeError, match=message):
        pbm.ops.int8_linear(**arguments)  # type: ignore[arg-type]


@gpu
def test_int8_linear_names_the_bad_device() -> None:
    weight, scale = random_weight(32, 64)
    packed = pbm.ops.pack_int8_linear_weight(weight)
    with pytest.raises(RuntimeError, match="bias must be on the device of input"):
        pbm.ops.int8_linear(torch.zeros(2, 64, device="cuda"), packed, scale, torch.zeros(32))
