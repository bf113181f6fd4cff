"""What torch's opcheck demands of every op: schema, fake kernel, autograd."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from linear_cases import packed_int8
from torch import Tensor

import pybigmodel  # noqa: F401  (the ops)

pbm = torch.ops.pybigmodel


def samples() -> dict[str, tuple[Any, ...]]:
    x, w, b = torch.randn(5, 20), torch.randn(18, 20), torch.randn(18)
    r, dy = torch.randn(5, 18), torch.randn(5, 18)
    packed, scale = packed_int8()
    half, x3 = torch.bfloat16, torch.randn(2, 3, 20)
    return {
        "linear": (x, w, b, 0),
        "linear, no bias, bf16": (x3.to(half), w.to(half), None, 0),
        "linear, precision": (x3, w, b, 1),
        "linear_backward": (dy, x, w, 0, True, True, True),
        "linear_backward, input only": (dy, x, w, 0, True, False, False),
        "pack_linear_weight": (w, 0),
        "pack_linear_weight, bf16": (w, 1),
        "linear_packed": (x, pbm.pack_linear_weight(w, 0), 18, b, r, 2),
        "linear_packed, bf16": (x3.to(half), pbm.pack_linear_weight(w, 1), 18, None, None, 0),
        "quantize_per_token": (x3, False),
        "quantize_per_token, symmetric": (x, True),
        "pack_int8_linear_weight": (torch.ones(18, 20, dtype=torch.int8),),
        "int8_linear": (x, packed, scale, b, r, 4, False),
        "int8_linear, symmetric": (x3.to(half), packed, scale, None, None, 0, True),
        "int8_weight_only_linear": (x, packed, scale, b, r, 3),
        "int8_weight_only_linear, bf16": (x3.to(half), packed, scale, None, None, 0),
        **conv_samples(),
        **int8_conv_samples(),
        **pool_samples(),
        **attention_samples(),
        **decoding_samples(),
        **additive_samples(),
    }


def conv_samples() -> dict[str, tuple[Any, ...]]:
    """Of one to three axes, every algorithm, both layouts of the result."""
    x, w, b = torch.randn(2, 20, 7, 6), torch.randn(18, 20, 3, 3), torch.randn(18)
    last, r = x.to(memory_format=torch.channels_last), torch.randn(2, 18, 7, 6)
    plane = ([1, 1], [1, 1, 1, 1], [1, 1])
    uneven = ([2, 1], [0, 1, 2, 3], [1, 2])
    half = (x.bfloat16(), w.bfloat16())
    line = (torch.randn(2, 6, 9), torch.randn(4, 3, 2), None, [2], [0, 1], [3], 2)
    space = (torch.randn(1, 3, 4, 5, 6), torch.randn(6, 3, 2, 1, 3), None)
    cube = ([1, 2, 1], [1, 0, 0, 0, 2, 1], [2, 1, 1])
    single, each = torch.randn(20, 1, 3, 3), torch.randn(20)
    samples: dict[str, tuple[Any, ...]] = {
        "conv": (x, w, b, *plane, 1, 0, 0, False),
        "conv, channels last": (last, w, b, *uneven, 1, 0, 1, True),
        "conv, bf16": (*half, b, *uneven, 1, 1, 0, True),
        "conv, precision": (x, w, None, *plane, 1, 1, 0, False),
        "conv, winograd": (last, w, None, *plane, 1, 0, 4, True),
        "conv, depthwise": (x, single, each, *uneven, 20, 0, 5, False),
        "conv, 1 axis": (*line, 0, 0, True),
        "conv, 3 axes": (*space, *cube, 1, 0, 0, True),
    }
    for name, args in list(samples.items()):
        dy = torch.randn_like(pbm.conv(*args))
        need = (True, True, True) if name == "conv" else (name != "conv, bf16", True, False)
        samples[f"conv_backward{name[4:]}"] = (dy, *args[:2], *args[3:], *need)
    for algorithm, precision in ((1, 0), (1, 1), (2, 0), (3, 0), (4, 0), (6, 0)):
        packed = pbm.pack_conv_weight(w, 1, precision, algorithm)
        name = f", {algorithm}, {precision}"
        samples[f"pack_conv_weight{name}"] = (w, 1, precision, algorithm)
        epilogue = (b, r, *plane, 1, algorithm, 0.1, algorithm)
        samples[f"conv_packed{name}"] = (last, packed, 18, [3, 3], *epilogue, algorithm > 2)
    samples["pack_conv_weight, depthwise"] = (single, 20, 0, 5)
    packed = pbm.pack_conv_weight(single, 20, 0, 5)
    rest = (each, None, *uneven, 20, 7, 0.1, 5, False)
    samples["conv_packed, depthwise"] = (half[0], packed, 20, [3, 3], *rest)
    step = [0, 1, -1, -1, 20, 20, 5, 5, 1, 2, *[3, 1, 1, 1, 1] * 2]
    again = [2, 1, -1, 0, *step[4:]]
    samples["conv_sequence"] = ([last, packed], step + again, [0.1, 0.0], [1, 0])
    t, few = torch.randn(20, 9, 3, 3), torch.randn(9)
    back = {
        "": (x, t, few, [2, 1], [1, 1, 0, 2], [1, 0], [1, 2], 1, 0, False, False),
        ", bf16": (
            half[0],
            t.bfloat16(),
            None,
            [1, 1],
            [0, 0, 0, 0],
            [0, 0],
            [1, 1],
            1,
            0,
            True,
            True,
        ),
        ", groups": (last, single, None, [2, 2], [1, 1, 1, 1], [1, 0], [1, 1], 20, 1, False, True),
        ", 1 axis": (line[0], torch.randn(6, 2, 4), None, [3], [1, 0], [2], [1], 2, 0, True, False),
    }
    for name, args in back.items():
        dy = torch.randn_like(pbm.conv_transpose(*args))
        samples[f"conv_transpose{name}"] = args
        options = (*args[3:5], *args[6:], True, name != ", groups", name == "")
        samples[f"conv_transpose_backward{name}"] = (dy, *args[:2], *options)
    return samples


def pool_samples() -> dict[str, tuple[Any, ...]]:
    """Both layouts, every dtype."""
    x = torch.randn(2, 20, 7, 6)
    last, half = x.to(memory_format=torch.channels_last), x.bfloat16()
    codes = torch.randint(0, 256, x.shape, dtype=torch.uint8)
    uneven = ([3, 2], [2, 1], [1, 0])
    return {
        "max_pool2d": (last, *uneven, [1, 2], True, True),
        "max_pool2d, planes": (x.half(), *uneven, [1, 1], False, False),
        "max_pool2d, uint8": (codes, *uneven, [1, 1], False, True),
        "avg_pool2d": (last, *uneven, True, False, 0, True),
        "avg_pool2d, planes": (half, *uneven, False, True, 5, False),
        "adaptive_avg_pool2d": (last, [1, 1], True),
        "adaptive_avg_pool2d, planes": (half, [3, 4], False),
    }


def int8_conv_samples() -> dict[str, tuple[Any, ...]]:
    """Floating and uint8 images in and out, of one to three axes."""
    x, w = torch.randn(2, 20, 7, 6), torch.randint(-127, 128, (18, 10, 3, 3), dtype=torch.int8)
    codes, r = torch.randint(0, 256, (2, 20, 7, 6), dtype=torch.uint8), torch.randn(2, 18, 7, 6)
    packed, scale, b = pbm.pack_int8_conv_weight(w, 2), torch.rand(18) / 100, torch.randn(18)
    last = x.to(memory_format=torch.channels_last)
    plane, uneven = [3, 1, 1, 1, 1] * 2, [3, 2, 0, 1, 1, 3, 1, 2, 3, 2]
    static, none, out = (0.1, 7), (0.0, 0), (0.3, 200)
    bytes_ = torch.randint(0, 256, (2, 18, 7, 6), dtype=torch.uint8)
    line = torch.randint(-127, 128, (4, 6, 2), dtype=torch.int8)
    cube = torch.randint(-127, 128, (6, 3, 2, 1, 3), dtype=torch.int8)
    wide = [2, 1, 1, 0, 1, 1, 2, 0, 0, 1, 3, 1, 2, 1, 1]
    call = (packed, scale)
    return {
        "pack_int8_conv_weight": (w, 2),
        "pack_int8_conv_weight, 1 axis": (line, 1),
        "int8_conv": (x, *call, b, r, plane, 2, 1, 0.0, *static, *none, *none, False),
        "int8_conv, dynamic": (last, *call, b, None, uneven, 2, 7, 0.1, *[*none] * 3, True),
        "int8_conv, bf16": (x.bfloat16(), *call, None, None, plane, 2, 4, 0.0, *[*none] * 3, False),
        "int8_conv, bytes in": (codes, *call, b, r, plane, 2, 0, 0.0, *static, *none, *none, True),
        "int8_conv, bytes": (
            codes,
            *call,
            b,
            bytes_,
            plane,
            2,
            5,
            0.0,
            *static,
            *static,
            *out,
            True,
        ),
        "int8_conv, 1 axis": (
            *(torch.randn(2, 6, 9), pbm.pack_int8_conv_weight(line, 1), torch.ones(4), None, None),
            *([2, 2, 0, 1, 3], 1, 0, 0.0, *static, *none, *out, False),
        ),
        "int8_conv, 3 axes": (
            *(torch.randn(1, 3, 4, 5, 6), pbm.pack_int8_conv_weight(cube, 1), torch.ones(6)),
            *(None, None, wide, 1, 6, 0.0, *[*none] * 3, True),
        ),
    }


def attention_samples() -> dict[str, tuple[Any, ...]]:
    q, k, v = (torch.randn(2, *shape) for shape in ((4, 5, 8), (2, 7, 8), (2, 7, 6)))
    mask, slopes, seed = torch.randn(5, 7), torch.rand(4), torch.tensor([3])
    plain = (None, None, -1, -1, True, 0.0, 0.0, 0.5, 0)
    rich = (slopes, seed, 3, 0, False, 2.0, 0.3, 0.5, 1)
    dense = {"": (q, k, v, None, *plain), ", rich": (q, k, v, mask, *rich)}
    bf16 = [t.bfloat16() for t in (q, k, v)]
    bshd = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    dense |= {", bf16": (*bf16, mask > 0, *plain), ", bshd": (*bshd, mask, *plain)}
    starts = torch.tensor([0, 3, 10]), torch.tensor([0, 9, 14])
    rows = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    packed = {"": (*rows, *starts, *plain), ", rich": (*rows, *starts, *rich)}
    samples: dict[str, tuple[Any, ...]] = {}
    for name, args in dense.items():
        out, lse, statistics = pbm.attention(*args, True)
        samples[f"attention{name}"] = (*args, False)
        seeds = torch.randn_like(out), torch.randn_like(lse)
        saved = (*seeds, *args[:3], out, statistics, *args[3:], name != ", bf16")
        samples[f"attention_backward{name}"] = saved
    for name, args in packed.items():
        out, _, statistics = pbm.attention_varlen(*args)
        samples[f"attention_varlen{name}"] = args
        seeds = torch.randn_like(out), None
        samples[f"attention_varlen_backward{name}"] = (
            *seeds,
            *args[:3],
            out,
            statistics,
            *args[3:],
        )
    return samples


def decoding_samples() -> dict[str, tuple[Any, ...]]:
    q, slopes = torch.randn(2, 4, 3, 16), torch.rand(4)
    lengths = torch.tensor([9, 2], dtype=torch.int32)
    k, v = torch.randn(2, 2, 3, 16), torch.randn(2, 2, 3, 12)
    caches = torch.randn(2, 2, 13, 16), torch.randn(2, 2, 13, 12)
    codes = tuple(torch.ones(4, 2, 8, width, dtype=torch.int8) for width in (16, 12))
    scales = torch.rand(4, 2, 8), torch.rand(4, 2, 8)
    table = torch.tensor([[3, 1], [0, 2]], dtype=torch.int32)
    return {
        "attention_decode": (q, *caches, lengths, None, None, None, None, 3, -1, 0.0, 0.5),
        "attention_decode, int8": (q, *codes, lengths, table, *scales, slopes, 0, 5, 2.0, 0.5),
        "attention_append_": (*caches, None, None, k, v, lengths, None),
        "attention_append_, int8": (*codes, *scales, k, v, lengths, table),
    }


def additive_samples() -> dict[str, tuple[Any, ...]]:
    """With few queries, which have a way of their own, and with more."""
    samples: dict[str, tuple[Any, ...]] = {}
    for queries in (2, 5):
        query, key, value, v = (
            torch.randn(s) for s in ((2, queries, 8), (2, 7, 8), (2, 7, 6), (8,))
        )
        mask, seed = torch.randn(queries, 7), torch.tensor([3])
        bf16 = tuple(t.bfloat16() for t in (query, key, value, v))
        calls = {
            "": (query, key, value, v, None, None, 0.0),
            ", rich": (query, key.mT.contiguous().mT, value, v, mask, seed, 0.3),
            ", bf16": (*bf16, mask > 0, None, 0.0),
        }
        for name, args in calls.items():
            out, lse = pbm.additive_attention(*args)
            samples[f"additive_attention{name}, {queries} queries"] = args
            d_lse = torch.randn_like(lse) if name else None
            saved = (torch.randn_like(out), d_lse, *args, True, True, name == ", rich")
            samples[f"additive_attention_backward{name}, {queries} queries"] = saved
    return samples


@pytest.mark.parametrize("name", list(samples()))
def test_opcheck(name: str) -> None:
    op = getattr(pbm, name.partition(",")[0]).default
    torch.library.opcheck(op, samples()[name])


def test_every_op_is_checked() -> None:
    checked = {name.partition(",")[0] for name in samples()}
    schemas = (Path(__file__).parents[2] / "csrc" / "ops.cpp").read_text()
    assert set(re.findall(r'm\.def\("(\w+)\(', schemas)) == checked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_with_gradients(dtype: torch.dtype) -> None:
    leaves = [torch.randn(s).to(dtype).requires_grad_() for s in ((2, 5, 20), (18, 20), (18,))]
    # Eager and compiled take the same kernels: the comparison of gradients is to the bit but for
    # sums of the bias, which torch's own tolerance covers.
    torch.library.opcheck(pbm.linear.default, (*leaves, 0))


FAMILY = [n for n in (*attention_samples(), *additive_samples()) if "backward" not in n]
CONVOLUTIONS = [n for n in conv_samples() if re.match(r"conv(_transpose)?(,|$)", n)]


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_opcheck_with_gradients_of_convolution(name: str) -> None:
    op = getattr(pbm, name.partition(",")[0]).default
    leaves = [v.requires_grad_() if isinstance(v, Tensor) else v for v in samples()[name]]
    torch.library.opcheck(op, tuple(leaves))


@pytest.mark.parametrize("name", FAMILY)
def test_opcheck_with_gradients_of_attention(name: str) -> None:
    op, leaves = getattr(pbm, name.partition(",")[0]).default, []
    for value in samples()[name]:
        floating = isinstance(value, Tensor) and value.is_floating_point()
        wanted = floating and (value.dim() >= 2 or name.startswith("additive"))
        leaves.append(value.requires_grad_() if wanted else value)
    torch.library.opcheck(op, tuple(leaves))
