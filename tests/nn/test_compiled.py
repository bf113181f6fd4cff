"""The layers under torch.compile and torch.export, where weights may change between runs too."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.nn import _packing

K, N = 40, 24

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def fresh_dynamo(tmp_path, monkeypatch):
    torch._dynamo.reset()
    # Else torch may find on the disk what an earlier version of this library was traced to.
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))


def layers() -> tuple[pbm.nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    theirs = nn.Linear(K, N)
    return pbm.nn.Linear.from_linear(copy.deepcopy(theirs)), theirs


def graph_of(function, *args) -> list[str]:
    """The pybigmodel ops of the graph that Dynamo makes of it, which must be one."""
    explanation = torch._dynamo.explain(function)(*args)
    assert explanation.graph_break_count == 0
    nodes = [str(n.target) for graph in explanation.graphs for n in graph.graph.nodes]
    return [node for node in nodes if node.startswith("pybigmodel.")]


def truncate(layer: pbm.nn.Linear) -> None:
    layer.weight.data, layer.bias.data = layer.weight.data[:8], layer.bias.data[:8]


CHANGES = [
    lambda layer: layer.weight.mul_(2),
    lambda layer: layer.weight[3, 4].add_(1),
    lambda layer: layer.weight.data.mul_(2),
    lambda layer: setattr(layer.weight, "data", torch.randn(N, K)),
    lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn(N, K))),
    lambda layer: layer.load_state_dict(nn.Linear(K, N).state_dict()),
    lambda layer: layer.load_state_dict(nn.Linear(K, N).state_dict(), assign=True),
    lambda layer: layer.bias.mul_(2),
    lambda layer: setattr(layer.weight, "data", layer.weight.data.as_strided((N, K), (1, N))),
    truncate,  # the last: loading a state_dict needs the first shape
]


def test_compiled_inference_sees_every_change() -> None:
    ours, _ = layers()
    ours.eval()
    compiled = torch.compile(ours, fullgraph=True)
    with torch.no_grad():
        assert graph_of(ours, torch.randn(5, K)) == ["pybigmodel.linear_cached.default"]
        for change in (lambda layer: None, *CHANGES):
            change(ours)
            for rows in (5, 5, 3):
                x = torch.randn(rows, K)
                expected = nn.functional.linear(x, ours.weight, ours.bias)
                assert difference(compiled(x), expected)[0] < 1e-6


def test_compiled_inference_packs_once(monkeypatch) -> None:
    ours, _ = layers()
    packed = []
    pack = _packing._pack_linear_weight

    def counted(*args):
        packed.append(args)
        return pack(*args)

    monkeypatch.setattr(_packing, "_pack_linear_weight", counted)
    compiled = torch.compile(ours, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            compiled(torch.randn(5, K))
        ours(torch.randn(5, K))  # the eager layer finds the same copy
    assert len(packed) == 1


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("compile_step", [False, True])
def test_compiled_training(fused: bool, compile_step: bool) -> None:
    results = []
    for layer in layers():
        # aot_eager: what is tested is the capture, and generated C++ would take minutes to build.
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, fused=fused)
        step = optimizer.step
        if compile_step:
            step = torch.compile(step, backend="aot_eager")
        x = torch.linspace(-1, 1, 3 * K).reshape(3, K)
        with torch.no_grad():
            compiled(x), layer(x)
        for _ in range(2):
            optimizer.zero_grad()
            compiled(x).square().sum().backward()
            step()
            with torch.no_grad():
                results.append(compiled(x))
                assert difference(layer(x), results[-1])[0] < 1e-6
    for got, expected in zip(results[:2], results[2:], strict=True):
        assert difference(got, expected)[0] < 1e-5


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_weight_changed_within_the_graph(backend: str) -> None:
    ours, theirs = layers()

    def twice(layer, x):
        first = layer(x)
        layer.weight.mul_(2)
        return first, layer(x)

    compiled = torch.compile(twice, fullgraph=True, backend=backend)
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(3, K)
            for got, expected in zip(compiled(ours, x), twice(theirs, x), strict=True):
                assert difference(got, expected)[0] < 1e-6
            assert difference(ours(x), theirs(x))[0] < 1e-6


def test_precision_is_guarded() -> None:
    ours, theirs = layers()
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(5, K)
    with torch.no_grad():
        assert difference(compiled(x), theirs(x))[0] < 1e-6
        ours.precision = "bf16"
        assert 1e-4 < difference(compiled(x), theirs(x))[0] < 1e-2


@pytest.mark.parametrize("weights", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("grad", [False, True])
def test_autocast_is_eagers(grad: bool, dtype: torch.dtype, weights: torch.dtype) -> None:
    ours, theirs = layers()
    ours, theirs = ours.to(weights), theirs.to(weights)
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    x = torch.randn(50, K)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=dtype):
        got, expected = compiled(x), theirs(x)
        assert got.dtype == expected.dtype == dtype
        assert torch.equal(got, ours(x))
        assert difference(got.float(), expected.float())[0] < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("grad", [False, True])
def test_export(strict: bool, grad: bool) -> None:
    ours, theirs = layers()
    batch = torch.export.Dim("batch", min=1)
    with torch.set_grad_enabled(grad):
        ours(torch.randn(2, K))
        program = torch.export.export(
            ours.eval(), (torch.randn(5, K),), strict=strict, dynamic_shapes=({0: batch},)
        )
    assert sorted(program.state_dict) == ["bias", "weight"]
    assert "pybigmodel.linear.default" in str(program.graph)
    run = program.module()
    with torch.no_grad():
        for rows in (1, 7):
            x = torch.randn(rows, K)
            assert difference(run(x), theirs(x))[0] < 1e-6
        other = nn.Linear(K, N)
        run.load_state_dict(other.state_dict())
        assert difference(run(x), other(x))[0] < 1e-6


@pytest.mark.parametrize("weight_only", [False, True])
def test_int8(weight_only: bool) -> None:
    _, theirs = layers()
    ours = pbm.nn.Int8Linear.from_linear(theirs, weight_only=weight_only)
    compiled = torch.compile(ours, fullgraph=True)
    x = torch.randn(5, K)
    other = pbm.nn.Int8Linear.from_linear(nn.Linear(K, N))
    with torch.no_grad():
        assert torch.equal(compiled(x), ours(x))
        ours.load_state_dict(other.state_dict())
        assert torch.equal(compiled(x), ours(x))
        ours.load_state_dict(pbm.nn.Int8Linear.from_linear(theirs).state_dict(), assign=True)
        assert torch.equal(compiled(x), ours(x))
        program = torch.export.export(ours, (x,))
        assert torch.equal(program.module()(x), ours(x))
    y = compiled(x.requires_grad_())
    assert torch.equal(y, ours(x))
    with pytest.raises(RuntimeError, match="a gradient through it was asked for"):
        y.sum().backward()


def test_the_cached_op() -> None:
    parameter = nn.Parameter(torch.randn(N, K), requires_grad=False)
    for weight in (parameter, parameter.detach().clone()):
        torch.library.opcheck(
            _packing.linear_cached,
            (torch.randn(2, 3, K), weight, torch.randn(N), 0),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"),
        )


def test_the_cached_op_checks_when_traced() -> None:
    x, weight, bias = (torch.randn(s, device="meta") for s in ((5, K), (N, K), (N,)))
    for bad, named in (
        ((x.long(), weight, bias, 0), "input must be float32"),
        ((x[:, :-1], weight, bias, 0), "in_features = 40"),
        ((x, weight[0], bias, 0), "weight must have 2 dimensions"),
        ((x, weight, bias[:-1], 0), "bias must have shape"),
        ((x, weight, bias, 4), "precision must be"),
    ):
        with pytest.raises(RuntimeError, match=named):
            _packing.linear_cached(*bad)
