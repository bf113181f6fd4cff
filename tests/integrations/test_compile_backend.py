"""torch.compile(backend="pybigmodel"): what is found in Dynamo's graph, and that it is right."""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pybigmodel._measure import difference
from pybigmodel.ops._common import CONV_ACTIVATIONS

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def randomised(model: Any) -> Any:
    """In eval mode, with statistics that say something."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
                for parameter, low in zip(norm.parameters(), (0.5, -0.5), strict=False):
                    parameter.uniform_(low, 1.5)
                norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


class Net(nn.Module):
    """A forward that is a function of the layers."""

    def __init__(self, forward: Callable[..., Any], **layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleDict(layers)
        self.function = forward

    def forward(self, *args: Any) -> Any:
        return self.function(*self.layers.values(), *args)


def conv(*sizes: int, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(*(sizes or (16, 16, 3)), **({"padding": 1} | options))


def image(*sizes: int) -> Tensor:
    return torch.randn(sizes or (2, 16, 9, 9))


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="pybigmodel", fullgraph=True, **options)


def compare(model: nn.Module, *inputs: Tensor, tolerance: float = 1e-5, **options: Any) -> None:
    """Against float64, strides and all."""
    torch._dynamo.reset()  # of one forward it compiles for few modules
    run = compiled(model, **options)
    with torch.no_grad():
        expected = model(*inputs)
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        for _ in range(2):
            y = run(*inputs)
            assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
            assert difference(y.double(), exact)[0] < tolerance


# --- what is found --------------------------------------------------------------------------------

ACTIVATIONS: dict[str, list[Callable[[Tensor], Tensor]]] = {
    "relu": [F.relu, torch.relu, lambda y: y.relu(), nn.ReLU(True), torch.relu_, Tensor.relu_],
    "relu6": [F.relu6, nn.ReLU6(True), lambda y: F.hardtanh(y, 0, 6), nn.Hardtanh(0.0, 6.0)],
    "silu": [F.silu, nn.SiLU(inplace=True)],
    "gelu": [F.gelu, nn.GELU()],
    "gelu_tanh": [lambda y: F.gelu(y, approximate="tanh"), nn.GELU("tanh")],
    "hardswish": [F.hardswish, nn.Hardswish(True)],
    "leaky_relu": [lambda y: F.leaky_relu(y, 0.2), nn.LeakyReLU(0.2, inplace=True)],
}
WRITTEN = [(name, i) for name, functions in ACTIVATIONS.items() for i in range(len(functions))]


def only(graphs: list[Any]) -> tuple[Any, ...]:
    """The arguments of the one convolution in the last graph, in which there is nothing else but
    what gives the caller torch's strides."""
    calls = [n for n in graphs[-1].nodes if n.op in ("call_function", "call_method")]
    assert [str(n.target) for n in calls] == ["pybigmodel.conv_packed.default", "contiguous"]
    return calls[0].args


def counted(graphs: list[Any]) -> Counter[str]:
    """What the last graph calls, by name."""
    nodes = [n for n in graphs[-1].nodes if n.op in ("call_function", "call_method")]
    return Counter(getattr(n.target, "__name__", str(n.target)) for n in nodes)


@pytest.mark.parametrize(("name", "which"), WRITTEN, ids=str)
def test_activations(name: str, which: int, graphs: list[Any]) -> None:
    act = ACTIVATIONS[name][which]
    model = Net(lambda c, b, x: act(b(c(x))), c=conv(), b=nn.BatchNorm2d(16))
    compare(randomised(model), 3 * image())
    *_, code, slope, _, channels_last = only(graphs)
    assert code == CONV_ACTIVATIONS[name] and channels_last
    assert slope == (0.2 if name == "leaky_relu" else 0)


@pytest.mark.parametrize(
    "act",
    [
        torch.tanh,
        lambda y: F.hardtanh(y, -1, 6),
        lambda y: F.gelu(y, approximate="none") * y,
        lambda y: y.view(-1).relu(),
        lambda y: F.relu(y.transpose(2, 3)),
        lambda y: (y.relu(), y)[1] + y.relu(),  # read twice
    ],
)
def test_what_is_no_activation_of_the_op(act: Any, graphs: list[Any]) -> None:
    compare(Net(lambda c, x: act(c(x)), c=conv()), image())
    (call,) = graphs[-1].find_nodes(
        op="call_function", target=torch.ops.pybigmodel.conv_packed.default
    )
    assert call.args[10] == 0


def added_in_place(y: Tensor, r: Tensor) -> Tensor:
    y += r
    return y


ADDED: list[Callable[[Tensor, Tensor], Tensor]] = [
    operator.add,
    lambda y, r: r + y,
    lambda y, r: torch.add(y, r),
    lambda y, r: torch.add(r, y, alpha=1),
    lambda y, r: y.add(r),
    lambda y, r: y.add_(r),
    added_in_place,
]


@pytest.mark.parametrize("act", [None, F.relu], ids=["", "relu"])
@pytest.mark.parametrize("added", ADDED)
def test_residuals(added: Any, act: Any, graphs: list[Any]) -> None:
    def forward(c: Any, b: Any, x: Tensor) -> Tensor:
        y = added(b(c(x)), x)
        return y if act is None else act(y)

    compare(randomised(Net(forward, c=conv(), b=nn.BatchNorm2d(16))), image())
    arguments = only(graphs)
    assert arguments[5] is arguments[0] and arguments[10] == (act is not None)


@pytest.mark.parametrize(
    "added",
    [
        lambda y, x: torch.add(y, x, alpha=2),
        lambda y, x: y + x[:, :1],
        lambda y, x: y + x[:1],
        lambda y, x: y + 1,
        lambda y, x: y + y,
        lambda y, x: (y.add_(1), y + x)[1],
        lambda y, x: y + x.double(),
        lambda y, x: F.relu(y) + x,  # relu comes first
    ],
)
def test_what_is_no_residual(added: Any, graphs: list[Any]) -> None:
    model = Net(lambda c, x: added(c(x), x).float(), c=conv())
    compare(model, image())
    (call,) = graphs[-1].find_nodes(
        op="call_function", target=torch.ops.pybigmodel.conv_packed.default
    )
    assert call.args[5] is None


def test_two_convolutions_that_are_added(graphs: list[Any]) -> None:
    for first in (True, False):

        def forward(c: Any, b: Any, d: Any, x: Tensor, first: bool = first) -> Tensor:
            y, r = (b(c(x)), d(x)) if first else (d(x), b(c(x)))
            return F.relu(y + r)

        layers = {"c": conv(), "b": nn.BatchNorm2d(16), "d": conv(16, 16, 1, padding=0)}
        compare(randomised(Net(forward, **layers)), image())
        assert counted(graphs) == {"conv_packed.default": 2, "contiguous": 1}


@pytest.mark.parametrize(
    ("function", "padding", "expected"),
    [
        (nn.ZeroPad2d((0, 1, 2, 3)), 0, [2, 3, 0, 1]),
        (lambda x: F.pad(x, (1, 2)), 1, [1, 1, 2, 3]),
        (lambda x: F.pad(x, (1, 1, 1, 1), "constant", 0.0), "same", [2, 2, 2, 2]),
        (lambda x: F.pad(x, (1, 1, 1, 1)), "valid", [1, 1, 1, 1]),
    ],
)
def test_padding(function: Any, padding: Any, expected: list[int], graphs: list[Any]) -> None:
    compare(Net(lambda c, x: c(function(x)), c=conv(padding=padding)), image())
    assert only(graphs)[7] == expected


@pytest.mark.parametrize(
    "pad",
    [
        lambda x: F.pad(x, (1, 1, 1, 1), value=1.0),
        lambda x: F.pad(x, (1, -1, 1, 1)),
        lambda x: F.pad(x, (1, 1, 1, 1), mode="reflect"),
        lambda x: F.pad(x[:, 1:], (0, 0, 0, 0, 1, 0)),
    ],
)
def test_what_is_no_padding(pad: Any, graphs: list[Any]) -> None:
    compare(Net(lambda c, x: c(pad(x)), c=conv()), image())
    assert sum(counted(graphs).values()) > 1


def test_convolutions_of_every_kind(graphs: list[Any]) -> None:
    cases: list[tuple[nn.Module, Tensor]] = [
        (nn.Sequential(nn.Conv1d(8, 12, 3, 2, 1), nn.BatchNorm1d(12)), image(2, 8, 20)),
        (nn.Sequential(nn.Conv3d(4, 6, 3, padding=1), nn.BatchNorm3d(6)), image(1, 4, 5, 6, 7)),
        (conv(16, 32, (3, 5), groups=4, dilation=(1, 2), stride=(2, 1)), image()),
        (conv(16, 16, 3, groups=16, bias=False), image()),
        (conv(1, 6, 5, padding=0), image(2, 1, 20, 20)),  # in planes where it is not turned
        (conv(16, 16, 3, padding_mode="circular"), image()),
        (conv().to(memory_format=torch.channels_last), image()),
        (conv(), image().to(memory_format=torch.channels_last)),
        (conv(), image(0, 16, 9, 9)),
        (nn.Sequential(conv(bias=False), nn.BatchNorm2d(16, affine=False)), image()),
    ]
    for model, x in cases:
        for turned in (True, False):
            if x.numel() == 0:
                with torch.no_grad():
                    assert compiled(randomised(model))(x).shape == model(x).shape
            else:
                compare(randomised(model), x, options={"channels_last": turned})
            assert counted(graphs)["conv_packed.default"] == 1


def test_linear_layers(graphs: list[Any]) -> None:
    def forward(a: Any, b: Any, d: Any, x: Tensor) -> Tensor:
        y = d(b(F.gelu(a(x)))) + x
        y = x + F.silu(b(y.repeat(1, 1, 2)))
        return F.relu(a(y))[0, 0]

    layers = {"a": nn.Linear(24, 48), "b": nn.Linear(48, 24, bias=False), "d": nn.Dropout(0.5)}
    compare(randomised(Net(forward, **layers)), torch.randn(2, 5, 24))
    calls = [n for n in graphs[-1].nodes if "linear_packed" in str(n.target)]
    assert [(n.args[4] is not None, n.args[5]) for n in calls] == [
        *((False, 2), (True, 0), (True, 4), (False, 1))
    ]
    assert counted(graphs)["linear_packed.default"] == 4
    assert not {"linear", "gelu", "silu", "relu", "add", "dropout"} & set(counted(graphs))


def test_what_stays_with_inductor(graphs: list[Any]) -> None:
    up = nn.ConvTranspose2d(16, 16, 2)
    for model, x in (
        (conv(), image(16, 9, 9)),  # no batch dimension
        (conv().double(), image().double()),
        (up, image()),
    ):
        compare(model, x)
        assert not any("pybigmodel" in str(n.target) for n in graphs[-1].nodes if n.op[0] == "c")


def test_functions_of_torch_func(graphs: list[Any]) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(3, 6)
    for function in (
        lambda x: torch.func.vmap(layer)(x),
        lambda x: torch.func.grad(lambda x: layer(x).square().sum())(x),
        lambda x: torch.func.jvp(layer, (x,), (x,))[1],
    ):
        with torch.no_grad():
            assert difference(compiled(function)(x), function(x))[0] < 1e-6


# --- the order of writes --------------------------------------------------------------------------


def overwritten_image(c: Any, x: Tensor) -> Tensor:
    h = x + 1
    y = c(h)
    h.mul_(2)
    return F.relu(y) + h


def overwritten_residual(c: Any, x: Tensor) -> Tensor:
    r = x * 2
    y = c(x) + r
    r.zero_()
    return F.relu(y) * (r + 1)


def through_a_view(c: Any, x: Tensor) -> Tensor:
    y = c(x)
    y.view(-1)[::3] = 7
    return y.relu()


def read_before(c: Any, x: Tensor) -> Tensor:
    y = c(x)
    z = y * 1
    y.relu_()
    return y + z


def of_an_overwritten_weight(c: Any, x: Tensor) -> Tensor:
    y = c(x)
    c.weight.mul_(0.5)
    z = c(x)
    c.weight.mul_(2)
    return y + z


WRITES = [overwritten_image, overwritten_residual, through_a_view, read_before]


@pytest.mark.parametrize("forward", [*WRITES, of_an_overwritten_weight])
def test_writes_are_in_order(forward: Any, graphs: list[Any]) -> None:
    compare(Net(forward, c=conv()), image())
    ours = sum("pybigmodel" in str(node.target) for node in graphs[-1].nodes if node.op[0] == "c")
    assert ours == (2 if forward is of_an_overwritten_weight else 1)


def test_writes_elsewhere_leave_images_turned(graphs: list[Any]) -> None:
    def forward(c: Any, x: Tensor) -> Tensor:
        mask = torch.zeros(9, 9)
        mask[2:5, 3:] = 1
        x.view(-1)[5] = 2  # an input's
        return F.dropout(c(x).flatten(2), 0.5, False, inplace=True) * mask.view(-1)

    model, x = Net(forward, c=conv()), image()
    compare(model, x)
    (call,) = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
    assert call.args[-1] is True


def of_pixels(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1)


@pytest.mark.parametrize(
    "of",
    [
        lambda y: y.contiguous(),
        lambda y: y.contiguous(memory_format=torch.channels_last),
        lambda y: y.to(memory_format=torch.channels_last),
        lambda y: of_pixels(y).contiguous(),
        lambda y: of_pixels(y).reshape(2, -1, 16),
        lambda y: y.flatten(2).transpose(1, 2).contiguous(),
        lambda y: y.reshape(2, -1),
        lambda y: y.view(2, 16, 9, 9),
        lambda y: y.detach(),
        lambda y: y[:],
    ],
)
def test_writes_go_where_torchs_go(of: Any, graphs: list[Any]) -> None:
    """Whether one is a copy of the other can depend on the layout of the image."""

    def forward(c: Any, x: Tensor) -> Tensor:
        y = c(x)
        z = of(y)
        z.mul_(2)
        return (y * y).flatten() + (3 * z).flatten()  # not of views, which keep y's layout

    compare(Net(forward, c=conv()), image())


@pytest.mark.parametrize(
    "of",
    [
        lambda y: y * 2,
        lambda y: F.max_pool2d(y, 2),
        lambda y: torch.cat([y, y], 1),
        lambda y: F.sigmoid(y),
        lambda y: y.clone(),
        lambda y: y,
    ],
)
def test_writes_to_memory_of_its_own_leave_images_turned(of: Any, graphs: list[Any]) -> None:
    def forward(c: Any, x: Tensor) -> Tensor:
        y = c(x)
        z = of(y)
        z += 1
        return F.relu(z, inplace=True)

    compare(Net(forward, c=conv()), image())
    (call,) = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
    assert call.args[-1] is True


@pytest.mark.parametrize(
    "read",
    [
        lambda y: y.view(2, -1),
        lambda y: F.max_pool2d(y, 2).view(2, -1),
        lambda y: y.flatten(2).transpose(1, 2).reshape(2, 1, -1),
        lambda y: y.flatten(2).view(-1),
        lambda y: torch.as_strided(y, (3, 5), (7, 2)),
        lambda y: y,
        lambda y: y.transpose(1, 3),
        lambda y: torch.cat([y, F.relu(y)], 1),
        lambda y: y[:, ::2, 1:],
        lambda y: y.mean((2, 3)),
        lambda y: F.adaptive_avg_pool2d(y, 1).view(2, 16),
        lambda y: torch.fft.rfft2(y).abs(),
        lambda y: F.interpolate(y, scale_factor=2.0) * F.sigmoid(y.mean()),
    ],
)
def test_layouts_are_torchs_for_whoever_may_notice(read: Any, graphs: list[Any]) -> None:
    compare(Net(lambda c, x: read(c(x)), c=conv()), image())
    assert counted(graphs)["conv_packed.default"] == 1
