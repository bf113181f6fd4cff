"""torch.compile(backend="pybigmodel") over sizes, dtypes, options, and of optimized models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from compile_cases import assert_same, compiled, image, net
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._measure import difference

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes(dynamic: bool | None, graphs: list[Any]) -> None:
    model = net()
    run = compiled(model, dynamic=dynamic)
    assert_same(run, model, image(2, 9))
    if not dynamic:
        assert_same(run, model, image(3, 9))  # from here on the batch may be any
    known = len(graphs)
    for batch in (7, 5, 4):
        assert_same(run, model, image(batch, 9))
    assert len(graphs) == known
    assert_same(run, model, image(4, 12))
    known += not dynamic
    for batch, size in ((6, 17), (3, 30), (2, 8)):
        assert_same(run, model, image(batch, size))
    assert len(graphs) == known
    assert_same(run, model, image(1, 17))  # Dynamo compiles for 1 apart
    for graph in graphs[-2:]:
        names = [str(n.target) for n in graph.nodes]
        assert names.count("pybigmodel.conv_packed.default") == 2
        assert not {"batch_norm", "relu", "silu", "add"} & {n.name for n in graph.nodes}


def test_sizes_in_training(graphs: list[Any]) -> None:
    model = net()
    run = compiled(model, dynamic=True)
    known = set[int]()
    for batch in (2, 3, 8):
        x = image(batch)
        got = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for p, q in zip(got, expected, strict=True):
            assert difference(p, q)[0] < 1e-4
        known.add(len(graphs))
    assert len(known) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, graphs: list[Any]) -> None:
    model, x = net(), image()
    with torch.no_grad():
        exact = model(x)
        low = copy.deepcopy(model).to(dtype)
        theirs = difference(low(x.to(dtype)).float(), exact)[0]
        y = compiled(low)(x.to(dtype))
        assert y.dtype == dtype
        assert difference(y.float(), exact)[0] < 2 * theirs
    assert [str(n.target) for n in graphs[-1].nodes].count("pybigmodel.conv_packed.default") == 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, grad: bool, graphs: list[Any]) -> None:
    model, x = net(), image()
    run = compiled(model)

    def within(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        return y * 2

    with torch.set_grad_enabled(grad):
        exact = model(x)
        with torch.autocast("cpu", dtype=dtype):
            expected, y = model(x), run(x)
        assert y.dtype == expected.dtype == dtype
        theirs = difference(expected.float(), exact)[0]
        assert difference(y.float(), exact)[0] < 2 * theirs
        y = compiled(within)(x)
        assert y.dtype == dtype
        assert difference(y.float() / 2, exact)[0] < 2 * theirs
        assert difference(run(x), exact)[0] < 1e-5  # not under autocast: compiled anew
    name = "pybigmodel.conv.default" if grad else "pybigmodel.conv_packed.default"
    for graph in graphs:
        assert [str(n.target) for n in graph.nodes].count(name) == 2


LOW = torch.bfloat16, torch.float16


@pytest.mark.parametrize(("own", "autocast"), [LOW, LOW[::-1], LOW[:1] * 2])
def test_convolutions_of_one_low_dtype_under_autocast_to_another(
    own: torch.dtype, autocast: torch.dtype, graphs: list[Any]
) -> None:
    model, x = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Conv2d(16, 8, 3)).eval(), image()
    low = copy.deepcopy(model).to(own)
    with torch.no_grad(), torch.autocast("cpu", dtype=autocast):
        y = compiled(low)(x.to(own))
        assert y.dtype == autocast
        assert difference(y.float(), model(x).float())[0] < 2e-2
    assert [str(n.target) for n in graphs[-1].nodes].count("pybigmodel.conv_packed.default") == 2


def test_options(graphs: list[Any]) -> None:
    model, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 56, 56)
    with torch.no_grad():
        exact = model(x)

        def algorithm(**options: Any) -> tuple[int, float]:
            torch._dynamo.reset()
            error = difference(compiled(model, options=options)(x), exact)[0]
            calls = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
            return calls[0].args[12], error

        assert algorithm()[0] in (3, 4)  # Winograd's
        assert algorithm(exact=True)[0] == 1
        low, error = algorithm(precision="bf16")
        assert low == 1 and 1e-4 < error < 2e-2


def test_the_algorithm_is_that_of_the_first_sizes(graphs: list[Any]) -> None:
    def chosen() -> int:
        (call,) = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
        return call.args[12]  # type: ignore[no-any-return]

    for model, options, sizes, found in (
        (nn.Conv2d(64, 64, 3, padding=1), {}, (56, 5, 2, 30), (4, 4, 4, 4)),
        # In planes up to some size, which is guarded.
        (nn.Conv2d(1, 6, 5), {"channels_last": False}, (20, 30, 600, 25), (6, 6, 2, 6)),
    ):
        torch._dynamo.reset()
        run = compiled(model, dynamic=True, options=options)
        for size, algorithm in zip(sizes, found, strict=True):
            x = torch.randn(2, model.in_channels, size, size)
            with torch.no_grad():
                assert difference(run(x), model(x))[0] < 1e-5
            assert size == 25 or chosen() == algorithm  # 25: the first graph again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exactly": True, "tiles": 4}, "unknown options 'exactly', 'tiles'"),
        ({"precision": "int8"}, "precision must be 'fp32' or 'bf16'; got 'int8'"),
        ({"exact": 1}, "option 'exact' must be a bool, got 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, graphs: list[Any]) -> None:
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(net(), options=options)(image())


def test_after_optimize(graphs: list[Any], packings: list[Any]) -> None:
    model = net()
    fused = pbm.optimize(model, exact=True)
    run = compiled(fused, options={"precision": "bf16"})  # which is not the layers'
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(1, 16, 56, 56)
            assert difference(run(x), model(x))[0] < 1e-5
    calls = [n for n in graphs[-1].nodes if "pybigmodel" in str(n.target) and n.op[0] == "c"]
    assert [n.target.name() for n in calls] == [
        *("pybigmodel::conv_packed", "pybigmodel::conv_packed"),
        *("pybigmodel::adaptive_avg_pool2d", "pybigmodel::linear_packed"),
    ]
    assert calls[0].args[12] == 1 and len(packings) == 3


def test_int8_layers(graphs: list[Any]) -> None:
    model = net()
    fast = pbm.optimize(model, "int8")
    run, x = compiled(fast), image()
    with torch.no_grad():
        assert difference(run(x), fast(x))[0] < 1e-5
    names = [str(n.target) for n in graphs[-1].nodes]
    assert names.count("pybigmodel.int8_linear.default") == 1
    assert names.count("pybigmodel.int8_conv.default") == 2
