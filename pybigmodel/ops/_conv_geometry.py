"""What a convolution is told beside its tensors, from torch's arguments to those of the ops."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

from torch import Tensor

Ints: TypeAlias = int | Sequence[int]
# Of an axis: as much on either side, or (before, after).
Padding: TypeAlias = int | str | Sequence[int | Sequence[int]]
ConvAlgorithm: TypeAlias = Literal["auto", "direct", "winograd2", "winograd4", "depthwise"]
LayerAlgorithm: TypeAlias = Literal["auto", "direct"]
# One kernel and one packed layout each; what "direct" above chooses from is all but Winograd.
PackedAlgorithm: TypeAlias = Literal[
    "direct", "direct_rows", "winograd2", "winograd4", "depthwise", "planes"
]

AUTO = 0
# The integers of the op schemas (csrc/cpu/kernels/conv_algorithm.h).
ALGORITHMS: dict[PackedAlgorithm, int] = {
    "direct": 1,
    "direct_rows": 2,
    "winograd2": 3,
    "winograd4": 4,
    "depthwise": 5,
    "planes": 6,
}
WINOGRAD = (ALGORITHMS["winograd2"], ALGORITHMS["winograd4"])


def is_exact(algorithm: str) -> bool:
    """Of the names that a layer and a transposed convolution take."""
    if algorithm not in ("auto", "direct"):
        raise ValueError(f"algorithm must be 'auto' or 'direct'; got {algorithm!r}")
    return algorithm == "direct"


LANES = 16  # of a register of floats; fewer channels leave some of them idle


def packed_algorithm_code(algorithm: str) -> int:
    try:
        return ALGORITHMS[algorithm]  # type: ignore[index]
    except (KeyError, TypeError):  # the latter: a list, say
        names = ", ".join(ALGORITHMS)
        raise ValueError(f"algorithm must be one of {names}; got {algorithm!r}") from None


def algorithm_code(algorithm: str, geometry: Geometry, channels_last: bool) -> int:
    if algorithm == "auto":
        return AUTO
    if algorithm == "direct":
        return exact_algorithm(geometry, channels_last)
    if algorithm not in ("winograd2", "winograd4", "depthwise"):
        raise ValueError(
            "algorithm must be one of auto, direct, winograd2, winograd4, depthwise; got "
            f"{algorithm!r}"
        )
    return packed_algorithm_code(algorithm)


class Geometry(NamedTuple):
    """Of a convolution; all that its algorithm depends on."""

    size: Sequence[int]  # of the image
    weight: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]  # before and after, axis by axis
    dilation: Sequence[int]
    groups: int
    bf16: bool  # products


def exact_algorithm(geometry: Geometry, channels_last: bool) -> int:
    """What _native.conv_algorithm chooses with exact=True, in Python that torch.compile follows."""
    if geometry.groups > 1 and admits(geometry, ALGORITHMS["depthwise"]):
        return ALGORITHMS["depthwise"]
    channels, n = geometry.weight[1], geometry.weight[0]
    few = not channels_last and channels <= LANES and n <= LANES
    if few and admits(geometry, ALGORITHMS["planes"]) and _width(geometry) >= LANES // 2:
        return ALGORITHMS["planes"]
    rows = channels < LANES and geometry.weight[-1] > 1
    if rows and admits(geometry, ALGORITHMS["direct_rows"]):
        return ALGORITHMS["direct_rows"]
    return ALGORITHMS["direct"]


def _width(geometry: Geometry) -> int:
    """Of the output."""
    reach = (geometry.weight[-1] - 1) * geometry.dilation[-1] + 1
    padded = geometry.size[-1] + geometry.padding[-2] + geometry.padding[-1]
    step = geometry.stride[-1]
    fits = padded >= reach and step > 0  # the op refuses what does not
    return (padded - reach) // step + 1 if fits else 0


def admits(geometry: Geometry, algorithm: int) -> bool:
    """conv_admits of csrc/cpu/kernels/conv_algorithm.cpp."""
    size, (n, c, *kernel), stride, padding, dilation, groups, bf16 = geometry
    # No depth, or one of 1 that is not padded.
    flat = len(kernel) < 3 or (size[0] == kernel[0] == 1 and padding[0] == padding[1] == 0)
    if algorithm in WINOGRAD:
        steps = (*stride[-2:], *dilation[-2:])
        return flat and not bf16 and kernel[-2:] == [3, 3] and all(one == 1 for one in steps)
    if algorithm == ALGORITHMS["depthwise"]:
        return c == 1 and n == groups
    if algorithm == ALGORITHMS["planes"]:
        row = _width(geometry) + 16 + (kernel[-1] - 1) * dilation[-1]
        rows = size[-2] + padding[-4] + padding[-3] if len(kernel) > 1 else 1
        fits = c * prod(kernel) <= 400 and c * rows * row * 4 <= 1 << 20
        return flat and not bf16 and groups == 1 and stride[-1] == 1 and fits
    if algorithm == ALGORITHMS["direct_rows"]:
        return groups == 1 and dilation[-1] == 1
    return True


def per_axis(op: str, name: str, value: Ints, axes: int) -> list[int]:
    """One entry an axis; as torch has it, a sequence of one stands for all."""
    if isinstance(value, int):
        return [value] * axes
    entries = list(value) if isinstance(value, Sequence) else []
    if len(entries) == 1:
        entries *= axes
    if len(entries) != axes or not all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"{op}: {name} must be an int or {axes} of them, got {value!r}")
    return entries


def sides(
    op: str,
    padding: Padding,
    axes: int,
    same: tuple[Sequence[int], Sequence[int], Sequence[int]] | None = None,
) -> list[int]:
    """Padding before and after, axis by axis. same: kernel, stride and dilation, where "same" and
    "valid" are taken."""
    if isinstance(padding, int):
        return [padding] * (2 * axes)
    if isinstance(padding, str):
        if padding == "valid" and same:
            return [0] * (2 * axes)
        if padding == "same" and same:
            return _sides_of_same(op, *same)
        words = ", 'same', 'valid'" if same else ""
        raise ValueError(f"{op}: padding must be an int{words} or one an axis, got {padding!r}")
    entries = list(padding) if isinstance(padding, Sequence) else []
    if len(entries) == 1:
        entries *= axes
    pairs: list[list[Any]] = [list(e) if isinstance(e, Sequence) else [e, e] for e in entries]
    flat = [side for pair in pairs if len(pair) == 2 for side in pair]
    if len(pairs) != axes or len(flat) != 2 * axes or not all(isinstance(s, int) for s in flat):
        raise ValueError(
            f"{op}: padding must be an int, or for each of the {axes} axes an int or a pair "
            f"(before, after), got {padding!r}"
        )
    return flat


def _sides_of_same(
    op: str, kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """So that the output has the input's size; of an odd total the greater part comes after."""
    if any(step != 1 for step in stride):
        raise ValueError(f"{op}: padding='same' takes a stride of 1, got {tuple(stride)}")
    result = []
    for size, step in zip(kernel, dilation, strict=True):
        total = step * (size - 1)
        result += [total // 2, total - total // 2]
    return result


def batched(op: str, input: Tensor, axes: int) -> bool:
    """Whether the input (N, C, spatial…) has its first dimension."""
    if input.dim() not in (axes + 1, axes + 2):
        raise RuntimeError(
            f"{op}: input must have {axes + 1} or {axes + 2} dimensions, (C, spatial) or "
            f"(N, C, spatial), got shape {tuple(input.shape)}"
        )
    return input.dim() == axes + 2


def is_channels_last(tensor: Tensor) -> bool:
    """Whether torch takes its strides for channels_last (c10::is_channels_last_strides_2d): sizes
    of 1 count, since their strides say what layout the tensor was given."""
    sizes, strides = tensor.shape, tensor.stride()
    least = strides[1]
    if least == 0 or sizes[1] == 0 or strides[-1] < least:
        return False
    least *= sizes[1]
    for axis in range(len(sizes) - 1, 1, -1):
        if sizes[axis] == 0 or strides[axis] < least:
            return False
        least = strides[axis] * sizes[axis]
    return sizes[0] != 0 and strides[0] >= least and least != strides[1]


def wants_channels_last(input: Tensor, weight: Tensor) -> bool:
    """The layout of the result, by torch's rule: channels_last if one of the two is."""
    return is_channels_last(input) or (weight.dim() > 2 and is_channels_last(weight))
