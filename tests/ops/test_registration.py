"""What torch demands of each op: schema, fake kernel, autograd, compile, export."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from pybigmodel import ops
from pybigmodel.testing import assert_exact, assert_no_worse

pbm = torch.ops.pybigmodel


def packed_int8() -> tuple[Tensor, Tensor]:
    w = torch.randint(-127, 128, (18, 20), dtype=torch.int8)
    return ops.pack_int8_linear_weight(w), torch.rand(18) / 100


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


class Net(nn.Module):
    """Every op in one graph, with sizes that depend on the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(18, 20) / 5)
        self.bias = nn.Parameter(torch.randn(18))
        self.register_buffer("packed", ops.pack_linear_weight(self.weight.detach()))
        packed, scale = packed_int8()
        self.register_buffer("int8", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.detach()
        y = ops.linear(x, self.weight.detach(), bias, activation="gelu")
        y = ops.linear_packed(x, self.packed, 18, bias, activation="silu", residual=y)
        y = y + ops.int8_linear(x, self.int8, self.scale, bias, residual=y)
        y = y + ops.int8_weight_only_linear(x, self.int8, self.scale, activation="relu")
        q, scale, zero = ops.quantize_per_token(y)
        return (q.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


@pytest.fixture(scope="module", autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKEND = "aot_eager"  # tracing, fake kernels and autograd; inductor would need a compiler for each


@torch.no_grad()
def test_compile_static_and_dynamic() -> None:
    net = Net()
    for dynamic in (False, True):
        compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        for rows in (3, 7, 64):
            x = torch.randn(2, rows, 20)
            assert_exact(compiled(x), net(x))


@torch.no_grad()
def test_dynamic_shapes_do_not_recompile() -> None:
    net, traced = Net(), []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    for rows in (3, 7, 64, 1000):
        compiled(torch.randn(2, rows, 20))
    assert len(traced) == 1


def test_compile_training() -> None:
    x = torch.randn(2, 7, 20)
    leaves = [torch.randn(18, 20, requires_grad=True), torch.randn(18, requires_grad=True)]

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear(x, w, b, activation="gelu").square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=BACKEND)
    expected = torch.autograd.grad(loss(x, *leaves), leaves)
    for actual, reference in zip(
        torch.autograd.grad(compiled(x, *leaves), leaves), expected, strict=True
    ):
        assert_no_worse(actual, reference, reference.double())


@torch.no_grad()
def test_export() -> None:
    net, rows = Net().eval(), torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(net, (torch.randn(2, 7, 20),), dynamic_shapes=({1: rows},))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    for op in (
        "linear",
        "linear_packed",
        "int8_linear",
        "int8_weight_only_linear",
        "quantize_per_token",
    ):
        assert f"pybigmodel.{op}.default" in called
    for count in (2, 31, 500):
        x = torch.randn(2, count, 20)
        assert_exact(program.module()(x), net(x))


@torch.no_grad()
def test_compile_of_packing() -> None:
    """Packing inside a graph: what a layer does whose weight changed."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        q, scale, _ = ops.quantize_per_token(w, symmetric=True)
        y = ops.int8_linear(x, ops.pack_int8_linear_weight(q), scale)
        return y + ops.linear_packed(x, ops.pack_linear_weight(w, "bf16"), w.shape[0])

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=BACKEND)
    for m, n, k in [(3, 18, 20), (5, 33, 47)]:
        x, w = torch.randn(m, k), torch.randn(n, k)
        assert_exact(compiled(x, w), f(x, w))


def test_second_gradient_is_refused() -> None:
    x, w = torch.randn(5, 20, requires_grad=True), torch.randn(18, 20, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear.*gradient of its gradient"):
        torch.autograd.grad(dx.sum(), w)


@pytest.mark.parametrize("argument", ["input", "bias", "residual"])
def test_inference_ops_refuse_gradients(argument: str) -> None:
    packed, scale = packed_int8()
    panels = ops.pack_linear_weight(torch.randn(18, 20))
    given = {"input": torch.randn(5, 20), "bias": torch.randn(18), "residual": torch.randn(5, 18)}
    given[argument].requires_grad_()
    x = given.pop("input")
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.linear_packed(x, panels, 18, **given),
        lambda: ops.int8_linear(x, packed, scale, **given),
        lambda: ops.int8_weight_only_linear(x, packed, scale, **given),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"{argument} requires grad.*no gradient"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    """torch falls back to a loop for ops without a batching rule: slow, and right."""
    x, w = torch.randn(4, 5, 20), torch.randn(18, 20, requires_grad=True)
    y = torch.func.vmap(lambda t: ops.linear(t, w))(x)
    assert_exact(y, ops.linear(x, w))
    (got,), (expected,) = (torch.autograd.grad(z.square().sum(), w) for z in (y, ops.linear(x, w)))
    assert_no_worse(got, expected, expected.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_forward_mode_is_refused(name: str) -> None:
    packed, scale = packed_int8()
    given = {"input": torch.randn(5, 20), "bias": torch.randn(18), "residual": torch.randn(5, 18)}
    given["weight"] = torch.randn(18, 20)
    panels = ops.pack_linear_weight(given["weight"])
    with torch.no_grad(), forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        x, w, rest = given.pop("input"), given.pop("weight"), given
        calls: dict[str, Callable[[], Any]] = {
            "linear": lambda: ops.linear(x, w, **rest),
            "linear_packed": lambda: ops.linear_packed(x, panels, 18, **rest),
            "int8_linear": lambda: ops.int8_linear(x, packed, scale, **rest),
            "int8_weight_only_linear": lambda: ops.int8_weight_only_linear(
                x, packed, scale, **rest
            ),
        }
        if name == "input":
            calls["quantize_per_token"] = lambda: ops.quantize_per_token(x)
        if name == "weight":
            calls = {
                "linear": calls["linear"],
                "pack_linear_weight": lambda: ops.pack_linear_weight(w),
            }
        if name == "residual":  # of linear it is torch's addition
            tangent = forward_ad.unpack_dual(calls.pop("linear")()).tangent
            assert_exact(tangent, torch.ones(5, 18))
        for op, call in calls.items():
            with pytest.raises(NotImplementedError, match=f"{op}: {name} is a dual tensor"):
                call()


def test_the_residual_of_linear_has_the_outputs_shape_and_dtype() -> None:
    x, w = torch.randn(5, 20), torch.randn(18, 20)
    for bad in (torch.randn(18), torch.randn(3, 5, 18), torch.randn(5, 18).double()):
        got = rf"got {str(bad.dtype)[6:]} of shape {re.escape(str(tuple(bad.shape)))}"
        with pytest.raises(RuntimeError, match=f"linear: residual must be float32 of .*{got}"):
            ops.linear(x, w, residual=bad)
    good = torch.randn(5, 18)
    compiled = torch.compile(
        lambda r: ops.linear(x, w, residual=r), fullgraph=True, backend=BACKEND
    )
    assert_exact(compiled(good), ops.linear(x, w, residual=good))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, w, residual=good).dtype == torch.bfloat16


def test_unhashable_names_are_refused() -> None:
    x, w = torch.randn(5, 20), torch.randn(18, 20)
    with pytest.raises(ValueError, match=r"precision must be 'fp32' or 'bf16'; got \[\]"):
        ops.linear(x, w, precision=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation must be one of .*; got \[\]"):
        ops.linear(x, w, activation=[])  # type: ignore[arg-type]
