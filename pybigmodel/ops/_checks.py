"""The checks of the fake kernels: what csrc/common/checks.h refuses, in the same words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACTIVATION_COUNT = 5
PANEL = 16  # columns of a packed panel
GROUP_BYTES = 64  # bytes of one group of k in a panel
MAX_INT8_K = 65793  # 255 · 128 · K < 2³¹


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_float(op: str, name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dtype in FLOAT_DTYPES,
        lambda: f"{op}: {name} must be float32, bfloat16 or float16, got {name_of(tensor.dtype)}",
    )


def check_input(op: str, input: Tensor) -> None:
    check_float(op, "input", input)
    torch._check(
        input.dim() >= 1, lambda: f"{op}: input must have at least 1 dimension, got a scalar"
    )


def check_dtype(op: str, name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    torch._check(
        tensor.dtype in allowed,
        lambda: (
            f"{op}: {name} must be {' or '.join(map(name_of, allowed))}, "
            f"got {name_of(tensor.dtype)}"
        ),
    )


def check_dim(op: str, name: str, tensor: Tensor, dim: int) -> None:
    torch._check(
        tensor.dim() == dim,
        lambda: (
            f"{op}: {name} must have {dim} dimension{'s' * (dim > 1)}, "
            f"got shape {tuple(tensor.shape)}"
        ),
    )


def check_shape(op: str, name: str, tensor: Tensor, expected: Sequence[int], why: str) -> None:
    """Each size on its own, so that symbolic sizes become guards."""

    def message() -> str:
        return f"{op}: {name} {why}, got {tuple(tensor.shape)}"

    torch._check(tensor.dim() == len(expected), message)
    for got, want in zip(tensor.shape, expected, strict=True):
        torch._check(got == want, message)


def check_contiguous(op: str, name: str, tensor: Tensor) -> None:
    torch._check(tensor.is_contiguous(), lambda: f"{op}: {name} must be contiguous")


def check_same_device(op: str, name: str, tensor: Tensor, input: Tensor) -> None:
    torch._check(
        tensor.device == input.device,
        lambda: f"{op}: {name} must be on the device of input, {input.device}; got {tensor.device}",
    )


def check_range(op: str, name: str, value: int, stop: int) -> None:
    torch._check(0 <= value < stop, lambda: f"{op}: {name} must be in [0, {stop}), got {value}")


def check_int8_k(op: str, k: int) -> None:
    torch._check(
        k <= MAX_INT8_K,
        lambda: (
            f"{op}: in_features must be at most {MAX_INT8_K}, so that int32 sums cannot "
            f"overflow; got {k}"
        ),
    )


def check_weight(op: str, input: Tensor, weight: Tensor) -> None:
    check_input(op, input)
    check_dtype(op, "weight", weight, input.dtype)
    check_matrix(op, input, weight)


def check_matrix(op: str, input: Tensor, weight: Tensor) -> None:
    check_dim(op, "weight", weight, 2)
    check_same_device(op, "weight", weight, input)
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"{op}: input's last dimension must be in_features = {weight.shape[1]}, "
            f"got input of shape {tuple(input.shape)}"
        ),
    )


def check_bias(op: str, input: Tensor, n: int, bias: Tensor | None) -> None:
    if bias is not None:
        check_shape(op, "bias", bias, (n,), f"must have shape ({n},)")
        check_dtype(op, "bias", bias, input.dtype, torch.float32)
        check_same_device(op, "bias", bias, input)


def check_like_output(op: str, name: str, tensor: Tensor | None, input: Tensor, n: int) -> None:
    if tensor is not None:
        check_dtype(op, name, tensor, input.dtype)
        check_same_device(op, name, tensor, input)
        expected = (*input.shape[:-1], n)
        check_shape(op, name, tensor, expected, "must have the output's shape")


def check_packed(
    op: str, packed: Tensor, input: Tensor, groups: int, width: int, n: int, n_from: str = ""
) -> None:
    check_same_device(op, "packed_weight", packed, input)
    check_dim(op, "packed_weight", packed, 3)
    expected = (ceil_div(n, PANEL), groups, width)
    sizes = f"in_features = {input.shape[-1]} and out_features = {n}{n_from}"
    why = f"for {sizes} must have shape {expected}"
    check_shape(op, "packed_weight", packed, expected, why)
    check_contiguous(op, "packed_weight", packed)
