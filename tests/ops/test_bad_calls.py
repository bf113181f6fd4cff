"""One table of bad calls, fed to the real kernels and to the fake ones: both refuse by name."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pybigmodel  # noqa: F401 (registers the ops)

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
INT8, INT32, LONG = torch.int8, torch.int32, torch.int64

# Good arguments of every op: 5 rows, 20 in_features, 18 out_features. A bad call changes one.
GOOD: dict[str, dict[str, Any]] = {
    "linear": {"input": ((5, 20), F32), "weight": ((18, 20), F32), "bias": None, "precision": 0},
    "linear_backward": {
        "grad_output": ((5, 18), F32),
        "input": ((5, 20), F32),
        "weight": ((18, 20), F32),
        "precision": 0,
        "need_input": True,
        "need_weight": True,
        "need_bias": True,
    },
    "pack_linear_weight": {"weight": ((18, 20), F32), "precision": 0},
    "linear_packed": {
        "input": ((5, 20), F32),
        "packed_weight": ((2, 20, 16), F32),
        "out_features": 18,
        "bias": None,
        "residual": None,
        "activation": 0,
    },
    "quantize_per_token": {"input": ((5, 20), F32), "symmetric": False},
    "pack_int8_linear_weight": {"weight": ((18, 20), INT8)},
    "int8_linear": {
        "input": ((5, 20), F32),
        "packed_weight": ((2, 6, 64), INT8),
        "weight_scale": ((18,), F32),
        "bias": None,
        "residual": None,
        "activation": 0,
        "symmetric": False,
    },
}
# Of attention: batch 2, 4 heads on 2, 5 queries, 7 keys, D = 8, Dv = 6; packed, 10 and 14 rows.
OPTIONS: dict[str, Any] = {
    "alibi_slopes": ((4,), F32),
    "dropout_seed": ((1,), LONG),
    "window_left": -1,
    "window_right": 0,
    "bottom_right": True,
    "softcap": 0.0,
    "dropout_p": 0.5,
    "scale": 1.0,
    "precision": 0,
}
QKV = {"q": ((2, 4, 5, 8), F32), "k": ((2, 2, 7, 8), F32), "v": ((2, 2, 7, 6), F32)}
PACKED = {"q": ((10, 4, 8), F32), "k": ((14, 2, 8), F32), "v": ((14, 2, 6), F32)}
STARTS = {
    "cu_seqlens_q": lambda: torch.tensor([0, 3, 10]),
    "cu_seqlens_k": lambda: torch.tensor([0, 9, 14]),
}
MASK = {"attn_mask": ((5, 7), F32)}
D_OUT, PACKED_D_OUT = ((2, 4, 5, 6), F32), ((10, 4, 6), F32)
LSE, PACKED_LSE = ((2, 4, 5), F32), ((4, 10), F32)
STATISTICS, PACKED_STATISTICS = ((2, 2, 4, 5), F32), ((2, 4, 10), F32)
GOOD["attention"] = {**QKV, **MASK, **OPTIONS, "for_backward": False}
GOOD["attention_varlen"] = {**PACKED, **STARTS, **OPTIONS}
GOOD["attention_backward"] = {
    **{"grad_out": D_OUT, "grad_lse": LSE, **QKV, "out": D_OUT, "statistics": STATISTICS},
    **{**MASK, **OPTIONS, "need_mask": True},
}
GOOD["attention_varlen_backward"] = {
    **{"grad_out": PACKED_D_OUT, "grad_lse": PACKED_LSE},
    **{**PACKED, "out": PACKED_D_OUT, "statistics": PACKED_STATISTICS, **STARTS, **OPTIONS},
}
ATTENTION = [op for op in GOOD if op.startswith("attention")]
# Of decoding: batch 2, 4 heads on 2, 3 new tokens; caches of 6 blocks of 8 tokens, 2 to a sequence.
CACHES = {"k_cache": ((6, 2, 8, 16), INT8), "v_cache": ((6, 2, 8, 12), INT8)}
SCALES = {"k_scale": ((6, 2, 8), F32), "v_scale": ((6, 2, 8), F32)}
LENGTHS = {"cache_seqlens": ((2,), INT32)}
TABLE = {"block_table": ((2, 2), INT32)}
GOOD["attention_decode"] = {
    **{"q": ((2, 4, 3, 16), F32), **CACHES, **LENGTHS, **TABLE, **SCALES},
    **{"alibi_slopes": ((4,), F32), "new_tokens": 3, "window_left": -1, "softcap": 0.0},
    "scale": 1.0,
}
GOOD["attention_append_"] = {
    **CACHES,
    **SCALES,
    **{"k": ((2, 2, 3, 16), F32), "v": ((2, 2, 3, 12), F32), **LENGTHS, **TABLE},
}
# Of additive attention: batch 2, 5 queries, 7 keys, H = 8, Dv = 6.
ADDITIVE: dict[str, Any] = {
    "query": ((2, 5, 8), F32),
    "key": ((2, 7, 8), F32),
    "value": ((2, 7, 6), F32),
    "v": ((8,), F32),
    "attn_mask": ((5, 7), F32),
    "dropout_seed": ((1,), LONG),
    "dropout_p": 0.5,
}
GOOD["additive_attention"] = ADDITIVE
GOOD["additive_attention_backward"] = {
    **{"grad_out": ((2, 5, 6), F32), "grad_lse": ((2, 5), F32), **ADDITIVE},
    **{"need_hidden": True, "need_value": True, "need_mask": True},
}
# Of convolution: batch 2, groups 2, 20 to 18 channels, 7×6 pixels, 3×2 taps, all axes apart.
GEOMETRY: dict[str, Any] = {
    "stride": [2, 1],
    "padding": [0, 1, 2, 0],
    "dilation": [1, 2],
    "groups": 2,
}
IMAGE, FILTERS = {"input": ((2, 20, 7, 6), F32)}, {"weight": ((18, 10, 3, 2), F32)}
HOW: dict[str, Any] = {**GEOMETRY, "precision": 0}
GOOD["conv"] = {**IMAGE, **FILTERS, "bias": None, **HOW, "algorithm": 0, "channels_last": False}
NEEDS = {"need_input": True, "need_weight": True, "need_bias": True}
GOOD["conv_backward"] = {
    **{"grad_output": ((2, 18, 3, 6), F32), **IMAGE, **FILTERS, **HOW},
    **{"algorithm": 0, "channels_last": True, **NEEDS},
}
GOOD["pack_conv_weight"] = {**FILTERS, "groups": 2, "precision": 0, "algorithm": 1}
GOOD["conv_packed"] = {
    **{**IMAGE, "packed_weight": ((2, 60, 16), F32), "out_channels": 18, "kernel_size": [3, 2]},
    **{"bias": None, "residual": None, **GEOMETRY, "activation": 0, "slope": 0.0, "algorithm": 1},
    "channels_last": False,
}
UPWARD = {**IMAGE, "weight": ((20, 9, 3, 2), F32)}
GOOD["conv_transpose"] = {
    **{**UPWARD, "bias": None, "stride": [2, 1], "padding": [0, 1, 2, 0]},
    **{"output_padding": [1, 1], "dilation": [1, 2], "groups": 2, "precision": 0},
    **{"exact": False, "channels_last": False},
}
GOOD["conv_transpose_backward"] = {
    **{
        "grad_output": ((2, 18, 15, 7), F32),
        **UPWARD,
        **HOW,
        "exact": False,
        "channels_last": False,
    },
    **NEEDS,
}
GOOD["pack_int8_conv_weight"] = {"weight": ((18, 10, 3, 2), INT8), "groups": 2}
GOOD["int8_conv"] = {
    **{**IMAGE, "packed_weight": ((2, 19, 64), INT8), "weight_scale": ((18,), F32)},
    **{"bias": None, "residual": None, "window": [3, 2, 0, 1, 1, 2, 1, 2, 0, 2], "groups": 2},
    **{"activation": 0, "slope": 0.0, "input_scale": 0.1, "input_zero_point": 5},
    **{"residual_scale": 0.0, "residual_zero_point": 0},
    **{"output_scale": 0.0, "output_zero_point": 0, "channels_last": False},
}
CONVOLUTIONS = [op for op in GOOD if "conv" in op and "pack_" not in op and "int8" not in op]
GOOD["int8_weight_only_linear"] = {k: v for k, v in GOOD["int8_linear"].items() if k != "symmetric"}


@dataclass
class Bad:
    op: str
    argument: str
    value: Any  # (shape, dtype), an integer, or a call that makes the tensor
    got: str  # what the message says came

    def __str__(self) -> str:
        return f"{self.op}-{self.argument}-{self.got}"


def transposed(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(shape[::-1], dtype=dtype).permute(2, 1, 0)


def bad_calls() -> list[Bad]:
    calls = []
    floating = {
        "linear": ["input"],
        "linear_backward": ["input"],
        "pack_linear_weight": ["weight"],
        "linear_packed": ["input"],
        "quantize_per_token": ["input"],
        "int8_linear": ["input"],
        "int8_weight_only_linear": ["input"],
    }
    for op, names in floating.items():
        for name in names:
            shape = GOOD[op][name][0]
            calls += [Bad(op, name, (shape, F64), "float64"), Bad(op, name, (shape, LONG), "int64")]
    for op in ("linear", "linear_backward", "linear_packed", "quantize_per_token"):
        calls.append(Bad(op, "input", ((), F32), "scalar"))
    for op in ("linear", "linear_backward"):
        calls += [
            Bad(op, "input", ((5, 21), F32), "(5, 21)"),
            Bad(op, "weight", ((18, 20), BF16), "bfloat16"),
            Bad(op, "weight", ((20,), F32), "(20,)"),
            Bad(op, "precision", 2, "2"),
            Bad(op, "precision", -1, "-1"),
        ]
    calls += [
        Bad("linear_backward", "grad_output", ((5, 17), F32), "(5, 17)"),
        Bad("linear_backward", "grad_output", ((4, 18), F32), "(4, 18)"),
        Bad("linear_backward", "grad_output", ((90,), F32), "(90,)"),
        Bad("linear_backward", "grad_output", ((5, 18), BF16), "bfloat16"),
        Bad("pack_linear_weight", "weight", ((2, 18, 20), F32), "(2, 18, 20)"),
        Bad("pack_linear_weight", "precision", 3, "3"),
        Bad("pack_int8_linear_weight", "weight", ((18, 20), torch.uint8), "uint8"),
        Bad("pack_int8_linear_weight", "weight", ((20,), INT8), "(20,)"),
        Bad("pack_int8_linear_weight", "in_features", None, "65794"),
        Bad("linear_packed", "packed_weight", ((2, 20, 16), torch.float16), "float16"),
        Bad("linear_packed", "packed_weight", ((2, 21, 16), F32), "(2, 21, 16)"),
        Bad("linear_packed", "packed_weight", ((3, 20, 16), F32), "(3, 20, 16)"),
        Bad("linear_packed", "packed_weight", ((2, 20, 32), F32), "(2, 20, 32)"),
        Bad("linear_packed", "packed_weight", ((2, 20, 32), BF16), "(2, 20, 32)"),
        Bad("linear_packed", "packed_weight", ((40, 16), F32), "(40, 16)"),
        Bad("linear_packed", "out_features", -3, "-3"),
        Bad("linear_packed", "out_features", 33, "33"),
        Bad("linear_packed", "packed_weight", lambda: transposed((2, 20, 16), F32), "contiguous"),
    ]
    for op in ("int8_linear", "int8_weight_only_linear"):
        calls += [
            Bad(op, "packed_weight", lambda: transposed((2, 6, 64), INT8), "contiguous"),
            Bad(op, "packed_weight", ((2, 6, 64), torch.uint8), "uint8"),
            Bad(op, "packed_weight", ((2, 5, 64), INT8), "(2, 5, 64)"),
            Bad(op, "packed_weight", ((2, 6, 16), INT8), "(2, 6, 16)"),
            Bad(op, "packed_weight", ((3, 6, 64), INT8), "(3, 6, 64)"),
            Bad(op, "packed_weight", ((12, 64), INT8), "(12, 64)"),
            Bad(op, "weight_scale", ((18,), BF16), "bfloat16"),
            Bad(op, "weight_scale", ((18, 1), F32), "(18, 1)"),
            Bad(op, "weight_scale", ((33,), F32), "33"),
            Bad(op, "in_features", None, "65794"),
        ]
    for op in ("linear", "linear_packed", "int8_linear", "int8_weight_only_linear"):
        calls += [
            Bad(op, "bias", ((17,), F32), "(17,)"),
            Bad(op, "bias", ((1, 18), F32), "(1, 18)"),
            Bad(op, "bias", ((18,), BF16), "bfloat16"),
        ]
    for op in ("linear_packed", "int8_linear", "int8_weight_only_linear"):
        calls += [
            Bad(op, "residual", ((5, 17), F32), "(5, 17)"),
            Bad(op, "residual", ((1, 5, 18), F32), "(1, 5, 18)"),
            Bad(op, "residual", ((18,), F32), "(18,)"),
            Bad(op, "residual", ((5, 18), BF16), "bfloat16"),
            Bad(op, "activation", 5, "5"),
            Bad(op, "activation", -1, "-1"),
        ]
    for op in CONVOLUTIONS:
        calls += bad_convolution(op)
    calls += bad_packed_convolution() + bad_int8_convolution()
    for op in ATTENTION:
        calls += bad_attention(op)
    for op in ("additive_attention", "additive_attention_backward"):
        calls += bad_additive(op)
    return calls + bad_decoding()


def bad_convolution(op: str) -> list[Bad]:
    """What all but packing refuse alike."""
    calls = [
        Bad(op, "input", ((2, 20, 7, 6), F64), "float64"),
        Bad(op, "input", ((2, 20, 7, 6), LONG), "int64"),
        Bad(op, "input", ((), F32), "()"),
        Bad(op, "input", ((2, 20), F32), "(2, 20)"),
        Bad(op, "input", ((1, 2, 20, 1, 7, 6), F32), "(1, 2, 20, 1, 7, 6)"),
        Bad(op, "stride", [1], "(1"),
        Bad(op, "stride", [0, 1], "(0, 1)"),
        Bad(op, "stride", [-1, 1], "(-1, 1)"),
        Bad(op, "padding", [1, 1], "(1, 1)"),
        Bad(op, "padding", [0, 1, -2, 0], "(0, 1, -2, 0)"),
        Bad(op, "dilation", [1, 1, 1], "(1, 1, 1)"),
        Bad(op, "dilation", [1, 0], "(1, 0)"),
        Bad(op, "dilation", [1, 2**62], str(2**62)),
        Bad(op, "groups", 0, "0"),
        Bad(op, "groups", -2, "-2"),
        Bad(op, "groups", 7, "7"),
    ]
    transposed, shape = "transpose" in op, GOOD[op].get("weight", ((), None))[0]
    if op != "conv_packed":
        calls += [
            Bad(op, "input", ((2, 22, 7, 6), F32), "(2, 22, 7, 6)"),
            Bad(op, "weight", (shape, BF16), "bfloat16"),
            Bad(op, "weight", (shape[1:], F32), str(shape[1:])),
            Bad(op, "precision", 2, "2"),
            Bad(op, "precision", -1, "-1"),
        ]
    if not transposed:
        calls += [
            Bad(op, "input", ((2, 20, 1, 6), F32), "(2, 20, 1, 6)"),  # of 2 pixels with padding
            Bad(op, "algorithm", 7, "7"),
            Bad(op, "algorithm", -1, "-1"),
            Bad(op, "algorithm", 2, "2"),  # which takes no groups
            Bad(op, "algorithm", 4, "4"),
            Bad(op, "algorithm", 5, "5"),
            Bad(op, "algorithm", 6, "6"),
        ]
    if "backward" in op:
        whole = GOOD[op]["grad_output"][0]
        calls += [
            Bad(op, "grad_output", (whole, BF16), "bfloat16"),
            Bad(op, "grad_output", (whole[1:], F32), str(whole[1:])),
            Bad(op, "grad_output", ((2, 17, *whole[2:]), F32), str((2, 17, *whole[2:]))),
            Bad(op, "grad_output", ((3, *whole[1:]), F32), str((3, *whole[1:]))),
            Bad(op, "grad_output", ((2, 18, 2, 6), F32), "(2, 18, 2, 6)"),
        ]
        return calls
    calls += [
        Bad(op, "bias", ((17,), F32), "(17,)"),
        Bad(op, "bias", ((1, 18), F32), "(1, 18)"),
        Bad(op, "bias", ((18,), BF16), "bfloat16"),
    ]
    if transposed:
        calls += [
            Bad(op, "output_padding", [1], "1"),
            Bad(op, "output_padding", [-1, 0], "-1"),
            Bad(op, "output_padding", [2, 0], "2"),
            Bad(op, "padding", [20, 0, 0, 0], "-4"),  # of which nothing is left
        ]
    return calls


def bad_packed_convolution() -> list[Bad]:
    op, pack = "conv_packed", "pack_conv_weight"
    return [
        Bad(op, "packed_weight", ((2, 60, 16), torch.float16), "float16"),
        Bad(op, "packed_weight", ((2, 60, 32), F32), "(2, 60, 32)"),
        Bad(op, "packed_weight", ((2, 61, 16), F32), "(2, 61, 16)"),
        Bad(op, "packed_weight", ((3, 60, 16), F32), "(3, 60, 16)"),
        Bad(op, "packed_weight", ((120, 16), F32), "(120, 16)"),
        Bad(op, "packed_weight", ((2, 60, 32), BF16), "(2, 60, 32)"),
        Bad(op, "packed_weight", lambda: transposed((2, 60, 16), F32), "contiguous"),
        Bad(op, "out_channels", -2, "-2"),
        Bad(op, "kernel_size", [3], "(3"),
        Bad(op, "kernel_size", [0, 2], "(0, 2)"),
        Bad(op, "residual", ((2, 18, 3, 7), F32), "(2, 18, 3, 7)"),
        Bad(op, "residual", ((18, 3, 6), F32), "(18, 3, 6)"),
        Bad(op, "residual", ((2, 18, 3, 6), BF16), "bfloat16"),
        Bad(op, "activation", 8, "8"),
        Bad(op, "activation", -1, "-1"),
        Bad(op, "algorithm", 0, "0"),
        Bad(pack, "weight", ((18, 10, 3, 2), F64), "float64"),
        Bad(pack, "weight", ((18, 10), F32), "(18, 10)"),
        Bad(pack, "weight", ((), F32), "()"),
        Bad(pack, "groups", 0, "0"),
        Bad(pack, "groups", 4, "4"),
        Bad(pack, "precision", 2, "2"),
        Bad(pack, "algorithm", 0, "0"),
        Bad(pack, "algorithm", 7, "7"),
        Bad(pack, "algorithm", 6, "(18, 10, 3, 2)"),
        Bad(pack, "algorithm", 2, "2"),
        Bad(pack, "algorithm", 3, "(18, 10, 3, 2)"),
        Bad(pack, "algorithm", 5, "(18, 10, 3, 2)"),
    ]


def bad_int8_convolution() -> list[Bad]:
    op, pack = "int8_conv", "pack_int8_conv_weight"
    window = GOOD[op]["window"]
    scales = [
        Bad(op, f"{name}_{value}", number, got)
        for name in ("input", "residual", "output")
        for value, number, got in (
            ("scale", -1.0, "-1"),
            ("scale", math.nan, "nan"),
            ("scale", math.inf, "inf"),
            ("scale", 1e-40, "e-4"),
            ("zero_point", -1, "-1"),
            ("zero_point", 256, "256"),
        )
    ]
    return [
        *[bad for bad in scales if bad.argument.partition("_")[0] != "residual"],
        Bad(op, "input", ((2, 20, 7, 6), F64), "float64"),
        Bad(op, "input", ((2, 20, 7, 6), INT8), "int8"),
        Bad(op, "input", ((), F32), "()"),
        Bad(op, "input", ((2, 20), F32), "(2, 20)"),
        Bad(op, "input", ((1, 2, 20, 1, 7, 6), F32), "(1, 2, 20, 1, 7, 6)"),
        Bad(op, "input", ((2, 20, 1, 6), F32), "(2, 20, 1, 6)"),
        Bad(op, "window", window[:5], "(3, 2, 0, 1, 1"),
        Bad(op, "window", [], "()"),
        Bad(op, "groups", 0, "0"),
        Bad(op, "groups", -2, "-2"),
        Bad(op, "groups", 7, "7"),
        Bad(op, "packed_weight", ((2, 19, 64), torch.uint8), "uint8"),
        Bad(op, "packed_weight", ((2, 18, 64), INT8), "(2, 18, 64)"),
        Bad(op, "packed_weight", ((3, 19, 64), INT8), "(3, 19, 64)"),
        Bad(op, "packed_weight", ((38, 64), INT8), "(38, 64)"),
        Bad(op, "packed_weight", lambda: transposed((2, 19, 64), INT8), "contiguous"),
        Bad(op, "weight_scale", ((18,), BF16), "bfloat16"),
        Bad(op, "weight_scale", ((18, 1), F32), "(18, 1)"),
        Bad(op, "bias", ((17,), F32), "(17,)"),
        Bad(op, "bias", ((1, 18), F32), "(1, 18)"),
        Bad(op, "bias", ((18,), BF16), "bfloat16"),
        Bad(op, "residual", ((2, 18, 3, 7), F32), "(2, 18, 3, 7)"),
        Bad(op, "residual", ((18, 3, 6), F32), "(18, 3, 6)"),
        Bad(op, "residual", ((2, 18, 3, 6), BF16), "bfloat16"),
        Bad(op, "residual", ((2, 18, 3, 6), torch.uint8), "uint8"),
        Bad(op, "activation", 8, "8"),
        Bad(op, "activation", -1, "-1"),
        Bad(pack, "weight", ((18, 10, 3, 2), F32), "float32"),
        Bad(pack, "weight", ((18, 10), INT8), "(18, 10)"),
        Bad(pack, "weight", ((), INT8), "()"),
        Bad(pack, "groups", 0, "0"),
        Bad(pack, "groups", 4, "4"),
    ]


def bad_decoding() -> list[Bad]:
    calls = []
    for op in ("attention_decode", "attention_append_"):
        calls += [
            Bad(op, "k_cache", ((2, 8, 16), INT8), "(2, 8, 16)"),
            Bad(op, "k_cache", ((6, 2, 8, 16), BF16), "bfloat16"),
            Bad(op, "k_cache", ((6, 2, 8, 17), INT8), "(2, "),
            Bad(op, "k_cache", lambda: torch.zeros(6, 2, 16, 8, dtype=INT8).mT, "stride 8"),
            Bad(op, "v_cache", lambda: torch.zeros(6, 2, 12, 8, dtype=INT8).mT, "stride 8"),
            Bad(op, "v_cache", ((6, 2, 8, 12), F32), "float32"),
            Bad(op, "v_cache", ((6, 2, 9, 12), INT8), "(6, 2, 9, 12)"),
            Bad(op, "v_cache", ((5, 2, 8, 12), INT8), "(5, 2, 8, 12)"),
            Bad(op, "v_cache", ((6, 2, 8, 257), INT8), "257"),
            Bad(op, "v_cache", ((6, 2, 8, 0), INT8), "0"),
            Bad(op, "k_scale", None, "int8"),
            Bad(op, "v_scale", ((6, 2, 8), BF16), "bfloat16"),
            Bad(op, "v_scale", ((6, 2, 8, 1), F32), "(6, 2, 8, 1)"),
            Bad(op, "cache_seqlens", ((2,), LONG), "int64"),
            Bad(op, "cache_seqlens", ((3,), INT32), "(3,)"),
            Bad(op, "block_table", ((2, 2), LONG), "int64"),
            Bad(op, "block_table", ((3, 2), INT32), "(3, 2)"),
            Bad(op, "block_table", ((4,), INT32), "(4,)"),
            Bad(op, "block_table", None, "(6, 2, 8, "),
        ]
    op = "attention_decode"
    calls += [
        Bad(op, "q", ((2, 4, 3, 16), F64), "float64"),
        Bad(op, "q", ((4, 3, 16), F32), "(4, 3, 16)"),
        Bad(op, "q", ((2, 3, 3, 16), F32), "3"),
        Bad(op, "q", ((2, 4, 3, 15), F32), "(2, 4, 3, 15)"),
        Bad(op, "alibi_slopes", ((5,), F32), "(5,)"),
        Bad(op, "new_tokens", -1, "-1"),
        Bad(op, "softcap", -1.0, "-1"),
        Bad(op, "scale", math.nan, "nan"),
    ]
    op = "attention_append_"
    calls += [
        Bad(op, "k", ((2, 2, 3, 16), F64), "float64"),
        Bad(op, "k", ((2, 3, 3, 16), F32), "(2, 3, 3, 16)"),
        Bad(op, "v", ((2, 2, 3, 12), BF16), "bfloat16"),
        Bad(op, "v", ((2, 2, 3, 13), F32), "(2, 2, 3, 13)"),
        Bad(op, "v", ((2, 2, 2, 12), F32), "(2, 2, 2, 12)"),
        Bad(op, "v", ((2, 3, 12), F32), "(2, 3, 12)"),
        Bad(op, "k_cache", lambda: torch.zeros(1, 2, 8, 16, dtype=INT8).expand(6, 2, 8, 16), "0"),
        Bad(op, "v_scale", lambda: torch.zeros(6, 1, 8).expand(6, 2, 8), "dimension 1"),
    ]
    return calls


def bad_attention(op: str) -> list[Bad]:
    rows = {n: GOOD[op][n][0][:-1] for n in ("q", "k", "v")}  # B, H, S or T, H
    packed = "varlen" in op

    def shaped(name: str, *last: int, heads: int | None = None) -> tuple[tuple[int, ...], Any]:
        shape = [*rows[name], *last]
        if heads is not None:
            shape[1] = heads
        return tuple(shape), F32

    calls = [
        Bad(op, "q", ((*rows["q"], 8), F64), "float64"),
        Bad(op, "q", ((*rows["q"], 8), LONG), "int64"),
        Bad(op, "q", ((), F32), "()"),
        Bad(op, "q", ((1, *rows["q"], 8), F32), str((1, *rows["q"], 8))),
        Bad(op, "q", shaped("q", 257), "257"),
        Bad(op, "q", shaped("q", 8, heads=3), "3"),
        Bad(op, "k", ((*rows["k"], 8), BF16), "bfloat16"),
        Bad(op, "k", ((7, 8), F32), "(7, 8)"),
        Bad(op, "k", shaped("k", 9), str((*rows["k"], 9))),
        Bad(op, "v", ((*rows["v"], 6), torch.float16), "float16"),
        Bad(op, "v", shaped("v", 6, heads=4), "4"),
        Bad(op, "v", ((1, *rows["v"], 6), F32), str((1, *rows["v"], 6))),
        Bad(op, "v", shaped("v", 0), "0"),
        Bad(op, "alibi_slopes", ((4,), BF16), "bfloat16"),
        Bad(op, "alibi_slopes", ((5,), F32), "(5,)"),
        Bad(op, "alibi_slopes", ((1, 4), F32), "(1, 4)"),
        Bad(op, "alibi_slopes", ((2, 4, 1), F32), "(2, 4, 1)"),
        Bad(op, "dropout_seed", None, ""),
        Bad(op, "dropout_seed", ((1,), torch.int32), "int32"),
        Bad(op, "dropout_seed", ((2,), LONG), "(2,)"),
        Bad(op, "dropout_p", -0.5, "-0.5"),
        Bad(op, "dropout_p", 1.5, "1.5"),
        Bad(op, "dropout_p", math.nan, "nan"),
        Bad(op, "softcap", -1.0, "-1"),
        Bad(op, "softcap", math.inf, "inf"),
        Bad(op, "softcap", math.nan, "nan"),
        Bad(op, "softcap", 1e-50, "1e-50"),
        Bad(op, "softcap", 1e39, "1e+39"),
        Bad(op, "scale", math.inf, "inf"),
        Bad(op, "scale", 3e38, "3e+38"),
        Bad(op, "scale", -1e300, "-1e+300"),
        Bad(op, "scale", math.nan, "nan"),
        Bad(op, "precision", 2, "2"),
        Bad(op, "precision", -1, "-1"),
    ]
    if packed:
        calls += [
            Bad(op, "cu_seqlens_q", ((3,), F32), "float32"),
            Bad(op, "cu_seqlens_k", ((3,), torch.int16), ""),
            Bad(op, "cu_seqlens_q", ((1, 3), LONG), "(1, 3)"),
            Bad(op, "cu_seqlens_q", ((0,), LONG), "(0,)"),
            Bad(op, "cu_seqlens_k", lambda: torch.tensor([0, 14]), "(2,)"),
        ]
    else:
        calls += [
            Bad(op, "k", ((3, 2, 7, 8), F32), "(3, 2, 7, 8)"),
            Bad(op, "v", ((2, 2, 8, 6), F32), "(2, 2, 8, 6)"),
            Bad(op, "attn_mask", ((5, 7), BF16), "bfloat16"),
            Bad(op, "attn_mask", ((5, 7), F64), "float64"),
            Bad(op, "attn_mask", ((5, 7), LONG), "int64"),
            Bad(op, "attn_mask", ((5, 6), F32), "(5, 6)"),
            Bad(op, "attn_mask", ((3, 1, 5, 7), F32), "(3, 1, 5, 7)"),
            Bad(op, "attn_mask", ((2, 2, 5, 7), torch.bool), "(2, 2, 5, 7)"),
            Bad(op, "attn_mask", ((1, 1, 1, 5, 7), F32), "(1, 1, 1, 5, 7)"),
        ]
    if "backward" in op:
        whole, shapes = GOOD[op]["out"][0], {n: GOOD[op][n][0] for n in ("grad_lse", "statistics")}
        longer = (*whole[:-1], 7)
        for name in ("grad_out", "out"):
            calls += [Bad(op, name, (longer, F32), str(longer))]
            calls += [Bad(op, name, (whole, BF16), "bfloat16")]
        for name, shape in shapes.items():
            calls += [Bad(op, name, (shape[:-1], F32), str(shape[:-1]))]
            calls += [Bad(op, name, (shape, F64), "float64")]
    return calls


def bad_additive(op: str) -> list[Bad]:
    names = ("query", "key", "value")
    calls = [Bad(op, n, ((*GOOD[op][n][0][1:],), F32), str(GOOD[op][n][0][1:])) for n in names]
    calls += [
        Bad(op, "query", ((2, 5, 8), F64), "float64"),
        Bad(op, "query", ((2, 5, 8), LONG), "int64"),
        Bad(op, "query", ((), F32), "()"),
        Bad(op, "key", ((2, 7, 8), BF16), "bfloat16"),
        Bad(op, "key", ((3, 7, 8), F32), "(3, 7, 8)"),
        Bad(op, "key", ((2, 7, 9), F32), "(2, 7, 9)"),
        Bad(op, "value", ((2, 7, 6), torch.float16), "float16"),
        Bad(op, "value", ((1, 7, 6), F32), "(1, 7, 6)"),
        Bad(op, "value", ((2, 8, 6), F32), "(2, 8, 6)"),
        Bad(op, "v", ((8,), BF16), "bfloat16"),
        Bad(op, "v", ((9,), F32), "(9,)"),
        Bad(op, "v", ((1, 8), F32), "(1, 8)"),
        Bad(op, "attn_mask", ((5, 7), BF16), "bfloat16"),
        Bad(op, "attn_mask", ((5, 7), LONG), "int64"),
        Bad(op, "attn_mask", ((5, 6), F32), "(5, 6)"),
        Bad(op, "attn_mask", ((3, 5, 7), F32), "(3, 5, 7)"),
        Bad(op, "attn_mask", ((1, 1, 5, 7), F32), "(1, 1, 5, 7)"),
        Bad(op, "dropout_seed", None, ""),
        Bad(op, "dropout_seed", ((1,), torch.int32), "int32"),
        Bad(op, "dropout_seed", ((2,), LONG), "(2,)"),
        Bad(op, "dropout_p", -0.5, "-0.5"),
        Bad(op, "dropout_p", 1.5, "1.5"),
        Bad(op, "dropout_p", math.nan, "nan"),
    ]
    if "backward" in op:
        calls += [
            Bad(op, "grad_out", ((2, 5, 7), F32), "(2, 5, 7)"),
            Bad(op, "grad_out", ((10, 6), F32), "(10, 6)"),
            Bad(op, "grad_out", ((2, 5, 6), BF16), "bfloat16"),
            Bad(op, "grad_lse", ((2, 5, 1), F32), "(2, 5, 1)"),
            Bad(op, "grad_lse", ((2, 5), F64), "float64"),
            Bad(op, "attn_mask", None, "None"),  # whose gradient is wanted
            Bad(op, "attn_mask", ((5, 7), torch.bool), "bool"),
            Bad(op, "attn_mask", ((5, 1), F32), "(5, 1)"),
        ]
    return calls


def build(value: Any, device: str) -> Any:
    if isinstance(value, tuple):
        return torch.zeros(value[0], dtype=value[1], device=device)
    return value() if callable(value) else value


def call(bad: Bad, device: str = "cpu") -> Any:
    arguments = dict(GOOD[bad.op])
    if bad.argument == "in_features":  # one longer than int32 sums allow, everywhere it shows
        for name, (shape, dtype) in [(n, v) for n, v in arguments.items() if isinstance(v, tuple)]:
            if name in ("input", "weight"):
                arguments[name] = ((shape[0], 65794), dtype)
            elif name == "packed_weight":
                arguments[name] = ((shape[0], 16450, 64), dtype)
    else:
        arguments[bad.argument] = bad.value
    op = getattr(torch.ops.pybigmodel, bad.op)
    return op(*(build(value, device) for value in arguments.values()))


def refuses(bad: Bad, run: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        run()
    message = str(caught.value).partition("\n")[0]
    # torch puts the C++ function, file and line in front; never a path of the build machine.
    assert re.search(rf"(^|, ){bad.op}: ", message), message
    assert not re.search(r"(^|\s)/", message), message
    assert re.search(rf"\b{bad.argument}\b", message), f"{bad.argument} is not named: {message}"
    return message


@pytest.mark.parametrize("op", GOOD)
def test_the_table_changes_good_calls(op: str) -> None:
    good = Bad(op, next(iter(GOOD[op])), next(iter(GOOD[op].values())), "")
    call(good)
    with FakeTensorMode():
        call(good)
    call(good, "meta")


@pytest.mark.parametrize("bad", bad_calls(), ids=str)
def test_real_kernel(bad: Bad) -> None:
    message = refuses(bad, lambda: call(bad))
    assert bad.got in message, f"what came, {bad.got}, is not in: {message}"


@pytest.mark.parametrize("bad", bad_calls(), ids=str)
def test_fake_kernel(bad: Bad) -> None:
    with FakeTensorMode():
        message = refuses(bad, lambda: call(bad))
    assert bad.got in message, f"what came, {bad.got}, is not in: {message}"


def tensors_beside_input() -> list[Bad]:
    shapes = {"bias": ((18,), F32), "residual": ((5, 18), F32)}
    return [
        Bad(op, name, shapes.get(name, value), "meta")
        for op, arguments in GOOD.items()
        for name, value in arguments.items()
        if name not in ("input", "q", "query") and (isinstance(value, tuple) or name in shapes)
        if not {"input", "q", "query"}.isdisjoint(arguments)
        or (op == "attention_append_" and name != "k")
    ]


@pytest.mark.parametrize("fake", [False, True])
@pytest.mark.parametrize("bad", tensors_beside_input(), ids=str)
def test_devices_differ(bad: Bad, fake: bool) -> None:
    """torch sends a call with one meta tensor to the fake kernel: that has to look at devices."""
    shape, dtype = bad.value
    moved = Bad(
        bad.op, bad.argument, lambda: torch.zeros(shape, dtype=dtype, device="meta"), "meta"
    )
    if not fake:
        refuses(bad, lambda: call(moved))
    else:
        with FakeTensorMode():
            refuses(bad, lambda: call(moved))
