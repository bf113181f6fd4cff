"""pybigmodel.nn's convolutions: torch.nn's behaviour, and what is cached of their weights."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel._measure import difference
from pybigmodel.nn import _conv_plan, _packing
from pybigmodel.nn.conv import CONVOLUTIONS

C, N = 16, 32
SIZES = {1: (23,), 2: (12, 13), 3: (6, 7, 5)}
# Winograd's error is a few units of 1e-6.
BOUND = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def pair(kind: str = "Conv2d", *args: Any, **kwargs: Any) -> tuple[Any, Any]:
    """Our layer and torch's, with weights of their own that are equal."""
    torch.manual_seed(0)
    theirs = getattr(nn, kind)(*(args or (C, N, 3)), **kwargs)
    return getattr(pbm.nn, kind).from_torch(copy.deepcopy(theirs)), theirs


def x(batch: int = 2, axes: int = 2, channels: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, channels, *SIZES[axes], generator=generator)


def assert_like(got: Tensor, expected: Tensor, bound: float = 1e-5) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert difference(got, expected)[0] < bound


def assert_float64(layer: Any, input: Tensor, bound: float = 1e-5) -> None:
    """The layer gives what torch's gives in float64."""
    kind = next(torchs for torchs, ours in CONVOLUTIONS.items() if type(layer) is ours)
    exact = kind.__new__(kind)
    nn.Module.__init__(exact)
    vars(exact).update({k: v for k, v in vars(layer).items() if k not in vars(exact)})
    exact._parameters = {
        k: None if p is None else p.detach().double() for k, p in layer._parameters.items()
    }
    with torch.no_grad():
        assert difference(layer(input).double(), exact(input.double()))[0] < bound


OPTIONS = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "stride above kernel": {"stride": 4},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "same, odd total": {"kernel_size": 2, "padding": "same"},
    "valid": {"padding": "valid"},
    "1×1": {"kernel_size": 1},
    "grouped": {"groups": 4, "padding": 1},
    "depthwise": {"groups": 16, "out_channels": 16, "padding": 1},
    "no bias": {"bias": False},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_forward_is_torchs(axes: int, name: str) -> None:
    options = {"in_channels": C, "out_channels": N, "kernel_size": 3, **OPTIONS[name]}
    ours, theirs = pair_of(axes, options)
    input = x(axes=axes)
    with torch.no_grad():
        for one in (
            input,
            input[:, :, 1:],
            input[0],
            input[:0],
            input.transpose(0, 1).contiguous().transpose(0, 1),
        ):
            expected = theirs(one)
            for _ in range(2):  # packs, then with what is packed
                assert_like(ours(one), expected)
    assert_float64(ours, input)
    assert_like(ours(input), theirs(input))  # with gradients


def pair_of(axes: int, options: dict[str, Any]) -> tuple[Any, Any]:
    torch.manual_seed(0)
    theirs = getattr(nn, f"Conv{axes}d")(**options)
    return getattr(pbm.nn, f"Conv{axes}d").from_torch(copy.deepcopy(theirs)), theirs


@pytest.mark.parametrize("axes", [1, 2, 3])
@pytest.mark.parametrize(
    "options",
    [{}, {"stride": 2, "padding": 1, "output_padding": 1}, {"groups": 4, "dilation": 2}],
    ids=str,
)
def test_transposed(axes: int, options: dict[str, Any]) -> None:
    ours, theirs = pair(f"ConvTranspose{axes}d", C, N, 3, **options)
    with torch.no_grad():
        for input in (x(axes=axes), x(axes=axes)[0]):
            assert_like(ours(input), theirs(input))
    assert_float64(ours, x(axes=axes))
    inputs = [x(axes=axes).requires_grad_() for _ in range(2)]
    for layer, input in zip((ours, theirs), inputs, strict=True):
        layer(input).square().sum().backward()
    assert_like(inputs[0].grad, inputs[1].grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_like(p.grad, q.grad)
    if "stride" in options:
        size = [2 * n for n in SIZES[axes]]
        assert_like(ours(x(axes=axes), output_size=size), theirs(x(axes=axes), output_size=size))


@pytest.mark.parametrize("kind", [kind.__name__ for kind in CONVOLUTIONS])
def test_constructor_and_state_dict_are_torchs(kind: str) -> None:
    torch.manual_seed(3)
    ours = getattr(pbm.nn, kind)(C, N, 3, padding=1)
    torch.manual_seed(3)
    theirs = getattr(nn, kind)(C, N, 3, padding=1)
    assert isinstance(ours, getattr(nn, kind))
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert repr(ours) == repr(theirs)[:-1] + ", precision='fp32')"
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert type(again) is type(ours)
        axes = int(kind[-2])
        with torch.no_grad():
            assert torch.equal(again(x(axes=axes)), ours(x(axes=axes)))


@pytest.mark.parametrize("name", OPTIONS)
def test_gradients_are_torchs(name: str) -> None:
    options = {"in_channels": C, "out_channels": N, "kernel_size": 3, **OPTIONS[name]}
    ours, theirs = pair_of(2, options)
    inputs = [x().requires_grad_() for _ in range(2)]
    for layer, input in zip((ours, theirs), inputs, strict=True):
        layer(input).square().sum().backward()
    assert_like(inputs[0].grad, inputs[1].grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert_like(p.grad, q.grad)


@pytest.mark.parametrize("dtype", BOUND, ids=str)
def test_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(padding=1)
    ours, theirs, input = ours.to(dtype), theirs.to(dtype), x().to(dtype)
    with torch.no_grad():
        assert_like(ours(input), theirs(input), BOUND[dtype])
    assert_like(ours(input), theirs(input), BOUND[dtype])


def test_precision_and_algorithm_may_be_changed() -> None:
    ours, _ = pair("Conv2d", 64, 64, 3, padding=1)
    input = torch.randn(1, 64, 28, 28)
    isa = _native.active_isa()
    with torch.no_grad():
        ours(input)
        assert _native.last_kernel() == f"conv_winograd4_f32.{isa}"
        fast = ours(input)
        ours.algorithm = "direct"
        exact = ours(input)
        assert _native.last_kernel() == f"conv_direct_f32.{isa}"
        assert 0 < difference(fast, exact)[0] < 1e-5
        ours.precision = "bf16"
        assert 1e-4 < difference(ours(input), exact)[0] < 1e-2
        assert repr(ours).endswith(", precision='bf16', algorithm='direct')")
        ours.precision, ours.algorithm = "fp32", "auto"
        assert torch.equal(ours(input), fast)
    with pytest.raises(ValueError, match="algorithm must be 'auto' or 'direct'; got 'fft'"):
        ours.algorithm = "fft"
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16'; got 'int8'"):
        pbm.nn.Conv2d(1, 1, 1, precision="int8")
    ours.algorithm = "direct"
    assert difference(ours(input), exact)[0] < 1e-6  # with gradients
    assert _native.last_kernel() == f"conv_direct_f32.{isa}"


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("input_last", [False, True])
def test_the_layout_of_the_result_is_torchs(
    input_last: bool, weight_last: bool, grad: bool
) -> None:
    ours, theirs = pair(padding=1)
    if weight_last:
        ours, theirs = (m.to(memory_format=torch.channels_last) for m in (ours, theirs))
    input = x().contiguous(memory_format=torch.channels_last) if input_last else x()
    with torch.set_grad_enabled(grad):
        for _ in range(2):
            assert ours(input).stride() == theirs(input).stride()


def test_the_packed_weight_is_used_and_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pair(padding=1)
    packed = []
    pack = _packing.pack_filters

    def count(weight: Tensor, key: Any) -> Tensor:
        packed.append(key)
        return pack(weight, key)

    monkeypatch.setattr(_packing, "pack_filters", count)
    with torch.no_grad():
        for batch in (1, 2, 1, 2):
            assert_like(ours(x(batch)), theirs(x(batch)))
    assert len(packed) == len(set(packed))  # one an algorithm
    assert len(ours._plans) == 2


def change_in_place(layer: Any) -> None:
    with torch.no_grad():
        layer.weight.mul_(2)


def change_data(layer: Any) -> None:
    layer.weight.data.mul_(2)  # moves no counter


def assign(layer: Any) -> None:
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def assign_data(layer: Any) -> None:
    layer.weight.data = layer.weight.detach() * 2


def load(layer: Any) -> None:
    layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()})


def turn(layer: Any) -> None:
    layer.to(memory_format=torch.channels_last)


def restride(layer: Any) -> None:
    layer.stride, layer.padding = (2, 2), (2, 2)


def train(layer: Any) -> None:
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    with torch.enable_grad():
        layer(x()).square().mean().backward()
    optimizer.step()


CHANGES = (change_in_place, change_data, assign, assign_data, load, turn, restride, train)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change: Any) -> None:
    ours, _ = pair(padding=1)
    with torch.no_grad():
        before = ours(x()), ours(x())
        change(ours)
        expected = F.conv2d(x(), ours.weight, ours.bias, ours.stride, ours.padding)
        assert_like(ours(x()), expected)
        if change is not turn:
            assert before[0].shape != expected.shape or difference(before[0], expected)[0] > 1e-3


def give_data(layer: Any, weight: Tensor) -> None:
    layer.weight.data = weight


def swap(layer: Any, weight: Tensor) -> None:
    torch.utils.swap_tensors(layer.weight, nn.Parameter(weight))


@pytest.mark.parametrize("give", [give_data, swap])
@pytest.mark.parametrize("shape", [(12, C, 3, 3), (4, C, 3, 3), (10, C, 1, 3), (10, C, 3, 1)])
@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_another_shape_are_noticed(give: Any, shape: Any, fused: bool) -> None:
    layer = pbm.nn.Conv2d(C, 10, 3, bias=False).eval()
    call = pbm.nn.ConvBnAct2d(layer, None, nn.ReLU()).eval() if fused else layer
    with torch.no_grad():
        for batch in (1, 2, 1, 2):
            call(x(batch))
        give(layer, torch.randn(shape))
        for batch in (3, 1, 2):  # the first of no known shape
            expected = F.conv2d(x(batch), layer.weight)
            assert_like(call(x(batch)), expected.relu() if fused else expected)


def test_computed_weights() -> None:
    with torch.no_grad():
        for compute in (
            parametrizations.weight_norm,
            lambda layer: prune.l1_unstructured(layer, "weight", amount=0.5),
            lambda layer: prune.l1_unstructured(layer, "bias", amount=0.5),
        ):
            ours, theirs = pair()
            for layer in (ours, theirs):
                layer(x())
                compute(layer)
            assert_like(ours(x()), theirs(x()))


def test_functional_call() -> None:
    ours, theirs = pair()
    other = {"weight": torch.randn(N, C, 3, 3), "bias": torch.randn(N)}
    call = torch.func.functional_call
    with torch.no_grad():
        ours(x())
        assert_like(call(ours, other, (x(),)), call(theirs, other, (x(),)))
        assert_like(ours(x()), theirs(x()))


def test_hooks() -> None:
    ours, theirs = pair()
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    ours.register_forward_hook(lambda module, args, output: output * 2)
    ours.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    y = ours(x().requires_grad_())
    y.sum().backward()
    assert seen == ["pre", "backward"]
    assert_like(y, 2 * theirs(x()))


@pytest.mark.parametrize("grad", [False, True])
def test_what_does_not_fit_is_named(grad: bool) -> None:
    ours, _ = pair()
    with torch.set_grad_enabled(grad):
        ours(x())
        with pytest.raises(RuntimeError, match="weight must be bfloat16, got float32"):
            ours(x().bfloat16())
        with pytest.raises(RuntimeError, match="input must have 16 channels"):
            ours(x(channels=17))
        with pytest.raises(RuntimeError, match="the kernel reaches over 3 pixels"):
            ours(torch.ones(1, C, 2, 2))
        with pytest.raises(
            RuntimeError, match=r"pybigmodel\.nn\.Conv2d does not compute in float64"
        ):
            copy.deepcopy(ours).double()(x().double())
        with pytest.raises(RuntimeError):
            ours(torch.ones(C, 3))
        ours.weight = nn.Parameter(ours.weight.detach().to_sparse(), requires_grad=False)
        with pytest.raises(NotImplementedError, match="Conv2d has no kernel for input a Tensor"):
            ours(x())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_forward_mode_is_refused() -> None:
    ours, _ = pair()
    with torch.no_grad(), forward_ad.dual_level():
        ours(x())
        dual = forward_ad.make_dual(x(), torch.ones_like(x()))
        with pytest.raises(NotImplementedError, match="input is a dual tensor"):
            ours(dual)


def test_autocast() -> None:
    ours, theirs = pair(padding=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert_like(ours(x()), theirs(x()), 1e-2)


def test_inference_mode() -> None:
    ours, theirs = pair(padding=1)
    fused, apart = block()
    with torch.inference_mode():
        assert_like(ours(x()), theirs(x()))
        assert_like(fused(x()), apart(x()).relu())
    with torch.no_grad():  # the copies made in inference mode serve outside it
        assert_like(ours(x()), theirs(x()))
        assert_like(fused(x()), apart(x()).relu())
    ours(x()).sum().backward()


def test_threads_that_meet_a_layer_at_once() -> None:
    fused, apart = block()
    with torch.no_grad():
        expected = apart(x()).relu()

    def call(_: int) -> Tensor:
        with torch.no_grad():
            return fused(x())

    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(call, range(16)):
            assert_like(y, expected)


def test_flops_are_counted() -> None:
    ours, theirs = pair(padding=1)

    def flops(layer: nn.Module) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x())
        return counter.get_total_flops()

    assert flops(ours) == flops(theirs) > 0


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", ["padded", "reflect", "depthwise"])
def test_compiled_and_exported(name: str, grad: bool) -> None:
    options = {"in_channels": C, "out_channels": N, "kernel_size": 3, **OPTIONS[name]}
    ours, theirs = pair_of(2, options)
    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            assert_like(compiled(x()), theirs(x()))
            with torch.no_grad():
                for layer in (ours, theirs):
                    layer.weight.mul_(2)  # the graph looks the copy up when it runs
        exported = torch.export.export(ours, (x(),)).module()
        assert_like(exported(x()), theirs(x()))
        if grad:
            compiled(x()).square().sum().backward()
            theirs(x()).square().sum().backward()
            assert_like(ours.weight.grad, theirs.weight.grad)


def test_compiled_inference_takes_the_packed_copy() -> None:
    ours, _ = pair(padding=1)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
        compiled(x())
        (key,) = _packing.entry_of(ours.weight).copies
        assert isinstance(key, _packing.ConvKey)


def test_fx() -> None:
    ours, theirs = pair(padding=1)
    with torch.no_grad():
        ours(x())
        traced = torch.fx.symbolic_trace(nn.Sequential(ours, nn.ReLU()))
        called = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
        assert called == ["pybigmodel.conv.default"]
        assert_like(traced(x()), theirs(x()).relu())


def test_from_torch_refuses() -> None:
    _, theirs = pair()
    with pytest.raises(ValueError, match=r"Conv1d.from_torch: layer must be a torch.nn.Conv1d"):
        pbm.nn.Conv1d.from_torch(theirs)
    parametrizations.weight_norm(theirs)
    with pytest.raises(ValueError, match="holds weight and bias as Parameters"):
        pbm.nn.Conv2d.from_torch(theirs)


def test_many_shapes_do_not_pile_up() -> None:
    ours, theirs = pair("Conv1d", 4, 4, 3)
    with torch.no_grad():
        for length in range(3, 3 + 2 * _conv_plan.MOST):
            input = torch.randn(1, 4, length)
            assert_like(ours(input), theirs(input))
    assert len(ours._plans) <= _conv_plan.MOST


# --- ConvBnAct ------------------------------------------------------------------------------------


def randomised(norm: Any) -> Any:
    with torch.no_grad():
        for tensor in (*norm._parameters.values(), norm.running_mean):
            if tensor is not None:
                tensor.normal_()
        if norm.running_var is not None:
            norm.running_var.uniform_(0.5, 2.0)
    return norm


def block(axes: int = 2, act: Any = None, **options: Any) -> tuple[Any, nn.Sequential]:
    torch.manual_seed(0)
    conv = getattr(nn, f"Conv{axes}d")(C, N, 3, padding=1, **options)
    norm = randomised(getattr(nn, f"BatchNorm{axes}d")(N))
    act = nn.ReLU() if act is None else act
    apart = nn.Sequential(conv, norm).eval()
    ours = getattr(pbm.nn, f"ConvBnAct{axes}d")(copy.deepcopy(conv), copy.deepcopy(norm), act)
    return ours.eval(), apart


def ops_of(function: Any) -> set[str]:
    with torch.no_grad():
        function()
        with torch.profiler.profile() as profile:
            function()
    return {event.name for event in profile.events()}


ACTIVATIONS = (
    *(nn.ReLU(), nn.ReLU6(), nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.Hardswish()),
    *(nn.LeakyReLU(0.2), F.relu, F.relu6, F.hardswish, F.leaky_relu, nn.Identity()),
)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
def test_conv_bn_act(act: Any, residual: bool) -> None:
    ours, apart = block(act=act)
    r = torch.randn(2, N, *SIZES[2]) if residual else None
    with torch.no_grad():
        expected = copy.deepcopy(apart).double()(x().double())
        expected = act(expected + r.double() if residual else expected)
        assert difference(ours(x(), r).double(), expected)[0] < 1e-5
    input, r = (
        None if image is None else image.contiguous(memory_format=torch.channels_last)
        for image in (x(), r)
    )
    ran = ops_of(lambda: ours(input, r))
    assert {name for name in ran if "::" in name} <= {"pybigmodel::conv_packed", "aten::empty"}


@pytest.mark.parametrize("axes", [1, 3])
def test_conv_bn_act_of_other_axes(axes: int) -> None:
    ours, apart = block(axes)
    with torch.no_grad():
        assert_like(ours(x(axes=axes)), apart(x(axes=axes)).relu())
    assert "aten::batch_norm" not in ops_of(lambda: ours(x(axes=axes)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conv_bn_act_in_low_precision(dtype: torch.dtype) -> None:
    ours, apart = block()
    with torch.no_grad():
        expected = apart(x()).relu()
        assert difference(ours.to(dtype)(x().to(dtype)).float(), expected)[0] < 1e-2


def test_an_activation_that_is_not_known_is_called() -> None:
    ours, apart = block(act=nn.Tanh())
    with torch.no_grad():
        assert_like(ours(x()), apart(x()).tanh())


NORM_CHANGES = {
    "statistics": lambda norm: norm.running_mean.add_(1),
    "variance through data": lambda norm: norm.running_var.data.mul_(4),
    "weight": lambda norm: norm.weight.mul_(2),
    "bias through data": lambda norm: norm.bias.data.add_(1),
    "another statistic": lambda norm: setattr(norm, "running_mean", torch.randn(N)),
    "eps": lambda norm: setattr(norm, "eps", 10.0),
    "reset": lambda norm: norm.reset_running_stats(),
    "loaded": lambda norm: norm.load_state_dict(randomised(nn.BatchNorm2d(N)).state_dict()),
    "training": lambda norm: norm.train(),
    "no statistics": lambda norm: vars(norm)["_buffers"].update(
        running_mean=None, running_var=None
    ),
    "not affine": lambda norm: vars(norm)["_parameters"].update(weight=None, bias=None),
}


@pytest.mark.parametrize("change", NORM_CHANGES)
def test_changes_of_the_norm_are_noticed(change: str) -> None:
    ours, _ = block()
    with torch.no_grad():
        before = ours(x()), ours(x())
        NORM_CHANGES[change](ours.norm)
        apart = nn.Sequential(ours.convolution, copy.deepcopy(ours.norm))
        expected = apart(x()).relu()
        assert difference(before[0], expected)[0] > 1e-3
        for _ in range(2):
            assert_like(ours(x()), expected)


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_convolution_are_noticed_behind_a_norm(change: Any) -> None:
    ours, _ = block()
    with torch.no_grad():
        ours(x()), ours(x())
        change(ours.convolution)
        conv = ours.convolution
        expected = F.conv2d(x(), conv.weight, conv.bias, conv.stride, conv.padding)
        assert_like(ours(x()), ours.norm(expected).relu())


def test_an_optimizers_step_is_noticed() -> None:
    ours, _ = block()
    with torch.no_grad():
        ours(x())
    optimizer = torch.optim.SGD(ours.norm.parameters(), lr=1.0, fused=True)
    ours.norm.weight.grad = torch.randn(N)
    optimizer.step()
    with torch.no_grad():
        assert_like(ours(x()), ours.norm(ours.convolution(x())).relu())


@pytest.mark.parametrize("training", [False, True])
def test_conv_bn_act_trains_as_its_parts(training: bool) -> None:
    # The gradient of a bias before a norm in training is rounding alone.
    ours, apart = block(bias=False)
    ours.train(training), apart.train(training)
    ours(x()).square().sum().backward()
    apart(x()).relu().square().sum().backward()
    for p, q in zip(ours.parameters(), apart.parameters(), strict=True):
        assert_like(p.grad, q.grad, 1e-4)
    if training:
        assert_like(ours.norm.running_mean, apart[1].running_mean)


@pytest.mark.parametrize("part", ["convolution", "norm", "activation"])
def test_hooks_of_the_parts_run(part: str) -> None:
    ours, apart = block()
    seen: list[Any] = []
    getattr(ours, part).register_forward_hook(lambda module, args, y: seen.append(module))
    with torch.no_grad():
        assert_like(ours(x()), apart(x()).relu())
    assert seen == [getattr(ours, part)]


def test_one_convolution_with_several_norms() -> None:
    """As detectors share a head over levels of a pyramid."""
    ours, _ = block()
    other = pbm.nn.ConvBnAct2d(ours.convolution, randomised(nn.BatchNorm2d(N)), nn.ReLU()).eval()
    with torch.no_grad():
        for _ in range(2):
            for one in (ours, other):
                assert_like(one(x()), one.norm(one.convolution(x())).relu())
    assert len(ours.convolution._chains) == 2


def test_conv_bn_act_copies_and_pickles() -> None:
    ours, _ = block()
    with torch.no_grad():
        expected = ours(x())
        for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
            assert torch.equal(again(x()), expected)
            assert not set(map(id, again.parameters())) & set(map(id, ours.parameters()))
            for parameter in again.parameters():
                parameter.zero_()
            assert not again(x()).any()
        assert torch.equal(ours(x()), expected)


def test_conv_bn_act_refuses() -> None:
    with pytest.raises(TypeError, match=r"convolution must be a torch.nn.Conv2d or .*, got Conv1d"):
        pbm.nn.ConvBnAct2d(nn.Conv1d(1, 1, 1))
    with pytest.raises(ValueError, match="norm must be a BatchNorm over the 32 channels"):
        pbm.nn.ConvBnAct2d(nn.Conv2d(C, N, 1), nn.BatchNorm2d(C))
    residual = torch.ones(1, N, 1, 1)  # broadcast, as torch adds it
    ours, apart = block()
    with torch.no_grad():
        assert_like(ours(x(), residual), (apart(x()) + residual).relu())


def test_float64_behind_a_norm_is_named() -> None:
    ours, _ = block()
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"nn.Conv2d does not compute in .*64"):
        ours.double()(x().double())


def test_exchanged_modules_are_freed() -> None:
    convolution = pbm.nn.Conv2d(C, N, 3).eval()
    chain = pbm.nn.ConvBnAct2d(convolution, nn.BatchNorm2d(N), nn.ReLU()).eval()
    with torch.no_grad():
        chain(x())
        old = weakref.ref(chain.norm), weakref.ref(chain.activation)
        chain.norm, chain.activation = randomised(nn.BatchNorm2d(N)).eval(), nn.SiLU()
        chain(x())
        gc.collect()
        assert [one() for one in old] == [None, None]
        assert_like(chain(x()), F.silu(chain.norm(convolution(x()))))


def test_norms_that_take_turns_are_folded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    convolution, folds = pbm.nn.Conv2d(C, N, 3).eval(), []
    fold = type(convolution)._folded
    monkeypatch.setattr(
        type(convolution), "_folded", lambda *args: (folds.append(1), fold(*args))[1]
    )
    norms = [randomised(nn.BatchNorm2d(N)).eval() for _ in range(3)]
    chains = [pbm.nn.ConvBnAct2d(convolution, norm, nn.ReLU()).eval() for norm in norms]
    with torch.no_grad():
        for _ in range(9):
            for chain, norm in zip(chains, norms, strict=True):
                assert_like(chain(x()), norm(convolution(x())).relu())
    assert len(folds) <= 6
