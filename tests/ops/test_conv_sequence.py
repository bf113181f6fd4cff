"""torch.ops.pybigmodel.conv_sequence: convolutions one after another in one call."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pybigmodel  # noqa: F401  (the ops)

ops = torch.ops.pybigmodel
DIRECT, WINOGRAD2, DEPTHWISE = 1, 3, 5
PLAIN = [1, 1, 0, 0, 1]  # kernel, stride, padding before and after, dilation of one axis
SAME = [3, 1, 1, 1, 1]


def packed(weight: Tensor, algorithm: int, groups: int = 1) -> Tensor:
    result: Tensor = ops.pack_conv_weight(weight, groups, 0, algorithm)
    return result


@pytest.fixture
def block() -> dict[str, Any]:
    """An inverted residual: 1×1, depthwise, 1×1 and the image added."""
    torch.manual_seed(0)
    wide, deep = torch.randn(32, 16, 1, 1), torch.randn(32, 1, 3, 3)
    narrow, bias = torch.randn(16, 32, 1, 1), torch.randn(32)
    x = torch.randn(2, 16, 9, 7).contiguous(memory_format=torch.channels_last)
    weights = [packed(wide, DIRECT), packed(deep, DEPTHWISE, 32), packed(narrow, DIRECT)]
    return {
        "tensors": [x, *weights, bias],
        "program": [
            *(0, 1, 4, -1, 32, 1, 5, DIRECT, 1, 2, *PLAIN, *PLAIN),
            *(5, 2, 4, -1, 32, 32, 7, DEPTHWISE, 1, 2, *SAME, *SAME),
            *(6, 3, -1, 0, 16, 1, 0, DIRECT, 1, 2, *PLAIN, *PLAIN),
        ],
        "slopes": [0.0, 0.1, 0.0],
    }


def one_by_one(block: dict[str, Any]) -> list[Tensor]:
    x, wide, deep, narrow, bias = block["tensors"]
    ones, zeros = [1, 1], [0] * 4
    a = ops.conv_packed(x, wide, 32, ones, bias, None, ones, zeros, ones, 1, 5, 0.0, DIRECT, True)
    b = ops.conv_packed(
        a, deep, 32, [3, 3], bias, None, ones, ones * 2, ones, 32, 7, 0.1, DEPTHWISE, True
    )
    c = ops.conv_packed(b, narrow, 16, ones, None, x, ones, zeros, ones, 1, 0, 0.0, DIRECT, True)
    return [a, b, c]


def sequence(block: dict[str, Any], outputs: list[int], **changes: Any) -> list[Tensor]:
    b = {**block, **changes}
    results: list[Tensor] = ops.conv_sequence(b["tensors"], b["program"], b["slopes"], outputs)
    return results


@pytest.mark.parametrize("outputs", [[2], [0, 2], [1], [2, 0, 1], []])
def test_it_is_the_steps_one_by_one(block: dict[str, Any], outputs: list[int]) -> None:
    expected, found = one_by_one(block), sequence(block, outputs)
    assert len(found) == len(outputs)
    for step, y in zip(outputs, found, strict=True):
        assert torch.equal(y, expected[step])
        assert y.stride() == expected[step].stride()


def test_one_and_three_axes() -> None:
    torch.manual_seed(0)
    for axes in (1, 3):
        x, weight = torch.randn(2, 4, *[5] * axes), torch.randn(6, 4, *[3] * axes)
        copy = packed(weight, DIRECT)
        program = [0, 1, -1, -1, 6, 1, 1, DIRECT, 0, axes, *SAME * axes]
        (y,) = ops.conv_sequence([x, copy], program, [0.0], [0])
        convolve = torch.nn.functional.conv1d if axes == 1 else torch.nn.functional.conv3d
        expected = convolve(x.double(), weight.double(), padding=1).relu()
        assert (y - expected).abs().max() < 1e-5 * expected.abs().max()


def test_nothing_to_do() -> None:
    assert ops.conv_sequence([torch.randn(1, 2, 3, 3)], [], [], []) == []


def test_fake_kernel_and_schema(block: dict[str, Any]) -> None:
    arguments = (block["tensors"], block["program"], block["slopes"], [0, 2])
    torch.library.opcheck(ops.conv_sequence.default, arguments)


@pytest.mark.parametrize(
    ("changes", "outputs", "message"),
    [
        ({"slopes": [0.0]}, [0], "slopes must have one entry a step, 3, got 1"),
        ({"program": [0, 1, -1, -1, 32, 1, 0, 1, 1, 2, *PLAIN]}, [0], "ends within step 0"),
        ({"program": [0, 1, -1, -1, 32, 1, 0, 1, 1, 4, *PLAIN * 4]}, [0], "ends within step 0"),
        ({"program": [0, 1, -1]}, [0], "ends within step 0"),
        ({"program": [9, 1, -1, -1, 32, 1, 0, 1, 1, 2, *PLAIN * 2]}, [0], "reads place 9 of 5"),
        ({"program": [5, 1, -1, -1, 32, 1, 0, 1, 1, 2, *PLAIN * 2]}, [0], "reads place 5 of 5"),
        ({"program": [0, -1, -1, -1, 32, 1, 0, 1, 1, 2, *PLAIN * 2]}, [0], "reads place -1 of 5"),
        ({}, [3], r"outputs must be in \[0, 3\), got 3"),
        ({}, [-1], r"outputs must be in \[0, 3\), got -1"),
        ({}, [1, 1], "outputs must differ, got 1 twice"),
    ],
)
def test_bad_programs(
    block: dict[str, Any], changes: dict[str, Any], outputs: list[int], message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        sequence(block, outputs, **changes)


def test_a_step_is_checked_as_conv_packed_is(block: dict[str, Any]) -> None:
    tensors = [block["tensors"][0].double(), *block["tensors"][1:]]
    with pytest.raises(RuntimeError, match="conv_sequence: input must be float32"):
        sequence(block, [2], tensors=tensors)
