"""What torch demands of convolution: compile, export, autograd's refusals, autocast, counting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import channels_last
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from pybigmodel import ops
from pybigmodel.testing import assert_exact, assert_no_worse

BACKEND = "aot_eager"  # tracing, fake kernels and autograd; inductor would need a compiler for each


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    yield
    torch._dynamo.reset()


class Net(nn.Module):
    """Every op in one graph, with sizes that depend on the image's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(16, 3, 5, 5) / 8)
        self.weight = nn.Parameter(torch.randn(16, 16, 3, 3) / 12)
        self.each = nn.Parameter(torch.randn(16, 1, 3, 3))
        self.up = nn.Parameter(torch.randn(16, 4, 2, 2))
        self.bias = nn.Parameter(torch.randn(16))
        packed = ops.pack_conv_weight(self.weight.detach(), algorithm="winograd2")
        self.register_buffer("packed", packed)

    def forward(self, x: Tensor) -> Tensor:
        y = ops.conv2d(x, self.first, self.bias, stride=2, padding=2, activation="relu6")
        y = ops.conv2d(y, self.weight, padding="same", activation="hardswish", residual=y)
        y = ops.conv2d(y, self.each, padding="same", groups=16, algorithm="direct")
        if not torch.is_grad_enabled():
            packed = self.packed
            y = ops.conv_packed(y, packed, 16, (3, 3), padding=1, algorithm="winograd2")
        return ops.conv_transpose2d(y, self.up, stride=2)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool) -> None:
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=BACKEND)
    for size in (12, 17, 40) if dynamic else (12, 17):  # a graph for each where sizes are fixed
        x = torch.randn(2, 3, size, 16)
        for image in (x, x.to(memory_format=torch.channels_last)):
            with torch.no_grad():
                y = compiled(image)
                assert_exact(y, net(image))
                assert y.stride() == net(image).stride()
            results = [
                torch.autograd.grad(f(image).square().mean(), [*net.parameters()])
                for f in (compiled, net)
            ]
            for actual, expected in zip(*results, strict=True):
                assert_no_worse(actual, expected, expected.double())


@torch.no_grad()
def test_dynamic_shapes_do_not_recompile() -> None:
    net, traced = Net(), []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    for size in (12, 17, 40, 100):
        compiled(torch.randn(2, 3, size, 16))
    assert len(traced) == 1


@torch.no_grad()
def test_export() -> None:
    net, height = Net().eval(), torch.export.Dim("height", min=8, max=512)
    program = torch.export.export(net, (torch.randn(2, 3, 20, 16),), dynamic_shapes=({2: height},))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {f"pybigmodel.{op}.default" for op in ("conv", "conv_packed", "conv_transpose")} < called
    for size in (8, 31, 200):
        x = torch.randn(2, 3, size, 16)
        assert_exact(program.module()(x), net(x))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_compile_of_weights_of_any_size(axes: int) -> None:
    """Packing and the choice of the exact algorithm inside a graph, by symbolic sizes."""
    conv = (ops.conv1d, ops.conv2d, ops.conv3d)[axes - 1]

    def f(x: Tensor, w: Tensor) -> Tensor:
        packed = ops.pack_conv_weight(w, precision="bf16", algorithm="direct")
        y = ops.conv_packed(x, packed, w.shape[0], w.shape[2:], algorithm="direct")
        return y + conv(x, w, algorithm="direct")

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=BACKEND)
    for c, n, size, k in [(20, 18, 7, 3), (33, 47, 9, 2)]:
        x, w = torch.randn(2, c, *[size] * axes), torch.randn(n, c, *[k] * axes)
        assert_exact(compiled(x, w), f(x, w))


def test_second_gradient_is_refused() -> None:
    x, w = torch.randn(2, 8, 5, 5, requires_grad=True), torch.randn(8, 8, 3, 3, requires_grad=True)
    for f, name in ((ops.conv2d, "conv"), (ops.conv_transpose2d, "conv_transpose")):
        (dx,) = torch.autograd.grad(f(x, w).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match=rf"ops\.{name}: the gradient of its gradient"):
            torch.autograd.grad(dx.sum(), w)


@pytest.mark.parametrize("argument", ["input", "bias", "residual"])
def test_packed_refuses_gradients(argument: str) -> None:
    packed = ops.pack_conv_weight(torch.randn(18, 20, 3, 3), algorithm="direct")
    given = {"input": torch.randn(1, 20, 5, 5), "bias": torch.randn(18)}
    given["residual"] = torch.randn(1, 18, 3, 3)
    given[argument].requires_grad_()
    x = given.pop("input")

    def call() -> Tensor:
        return ops.conv_packed(x, packed, 18, (3, 3), algorithm="direct", **given)  # type: ignore[arg-type]

    with pytest.raises(RuntimeError, match=rf"{argument} requires grad.*ops\.conv2d is diff"):
        call()
    with torch.no_grad():
        call()


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_forward_mode_is_refused(name: str) -> None:
    given = {"input": torch.randn(1, 8, 5, 5), "weight": torch.randn(8, 8, 3, 3)}
    given |= {"bias": torch.randn(8), "residual": torch.randn(1, 8, 3, 3)}
    packed = ops.pack_conv_weight(given["weight"], algorithm="direct")
    with torch.no_grad(), forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        x, w, b, r = given.values()
        calls: dict[str, Callable[[], Any]] = {}
        if name != "weight":
            calls["conv_packed"] = lambda: ops.conv_packed(
                x, packed, 8, (3, 3), b, residual=r, algorithm="direct"
            )
        else:
            calls["pack_conv_weight"] = lambda: ops.pack_conv_weight(w, algorithm="direct")
        if name != "residual":
            calls["conv2d"] = lambda: ops.conv2d(x, w, b)
            calls["conv_transpose2d"] = lambda: ops.conv_transpose2d(x, w, b)
        else:  # of conv2d it is torch's addition
            tangent = forward_ad.unpack_dual(ops.conv2d(x, w, b, residual=r)).tangent
            assert_exact(tangent, torch.ones(1, 8, 3, 3))
        for op, call in calls.items():
            with pytest.raises(NotImplementedError, match=f"{op}: {name} is a dual tensor"):
                call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    """torch falls back to a loop for ops without a batching rule: slow, and right."""
    x, w = torch.randn(3, 2, 8, 5, 5), torch.randn(8, 8, 3, 3, requires_grad=True)
    for f in (ops.conv2d, ops.conv_transpose2d):
        y = torch.func.vmap(lambda t, f=f: f(t, w))(x)
        each = torch.stack([f(t, w) for t in x])
        assert_exact(y, each)
        (got,), (expected,) = (torch.autograd.grad(z.square().sum(), w) for z in (y, each))
        assert_no_worse(got, expected, expected.double(), floor_ulps=4)


def test_functional_gradients() -> None:
    x, w = torch.randn(2, 8, 5, 5), torch.randn(8, 8, 3, 3)
    for f in (ops.conv2d, ops.conv_transpose2d):
        got = torch.func.grad(lambda w, f=f: f(x, w).square().sum())(w)
        leaf = w.clone().requires_grad_()
        (expected,) = torch.autograd.grad(f(x, leaf).square().sum(), leaf)
        assert_exact(got, expected)


def test_autocast() -> None:
    """As F.conv2d: all in autocast's dtype, with gradients in the leaves' own."""
    x, w, b = torch.randn(2, 8, 9, 9), torch.randn(18, 8, 3, 3), torch.randn(18)
    packed = ops.pack_conv_weight(w, algorithm="direct")
    for dtype in (torch.bfloat16, torch.float16):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with torch.autocast("cpu", dtype=dtype):
            y = ops.conv2d(*leaves)
            assert y.dtype == F.conv2d(x, w, b).dtype == dtype
            up = ops.conv_transpose2d(x, w.transpose(0, 1), b)
            assert up.dtype == F.conv_transpose2d(x, w.transpose(0, 1), b).dtype == dtype
            assert ops.conv_packed(x, packed, 18, (3, 3), b, algorithm="direct").dtype == dtype
        assert_exact(y.detach(), ops.conv2d(x.to(dtype), w.to(dtype), b.to(dtype)))
        assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), leaves))


def test_counted_operations_are_torchs() -> None:
    """torch's counter counts its own ops by the same formulas, forward and backward."""

    def counted(f: Callable[..., Tensor], *shapes: tuple[int, ...], **options: Any) -> int:
        leaves = [torch.randn(shape, requires_grad=True) for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            f(*leaves, **options).sum().backward()
        return counter.get_total_flops()

    image = (2, 12, 9, 8)
    for options in ({}, {"stride": 2, "padding": 1}, {"dilation": 2}):
        ours = counted(ops.conv2d, image, (20, 12, 3, 2), **options)
        assert ours == counted(F.conv2d, image, (20, 12, 3, 2), **options)
    # Of a grouped one torch's counter takes the weight's gradient for one without groups.
    assert counted(ops.conv2d, image, (20, 3, 3, 2), groups=4) * 4 == counted(
        ops.conv2d, image, (20, 12, 3, 2)
    )
    up = (12, 5, 3, 2)
    assert counted(ops.conv_transpose2d, image, up, stride=2) == counted(
        F.conv_transpose2d, image, up, stride=2
    )
    packed = ops.pack_conv_weight(torch.randn(20, 3, 3, 2), groups=4, algorithm="direct")
    with FlopCounterMode(display=False) as counter:
        ops.conv_packed(torch.randn(image), packed, 20, (3, 2), groups=4, algorithm="direct")
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(torch.randn(image), torch.randn(20, 3, 3, 2), groups=4)
    assert counter.get_total_flops() == theirs.get_total_flops() > 0


def test_packed_follows_the_image() -> None:
    """channels_last=None: the result is as the image; a bool says it."""
    packed = ops.pack_conv_weight(torch.randn(18, 20, 3, 3), algorithm="direct")
    x = torch.randn(2, 20, 7, 6)
    expected = ops.conv_packed(x, packed, 18, (3, 3), algorithm="direct")
    assert expected.is_contiguous()
    for image in (x, channels_last(x)):
        for wanted in (None, False, True):
            y = ops.conv_packed(image, packed, 18, (3, 3), algorithm="direct", channels_last=wanted)
            last = wanted if wanted is not None else image is not x
            assert y.is_contiguous() != last
            assert_exact(y, expected)
