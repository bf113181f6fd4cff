"""pbm.freeze: the ops of a model's run, without its code; what cannot be frozen is refused."""

from __future__ import annotations

import copy
import pickle
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import pybigmodel as pbm
from pybigmodel.freeze import MOST

transformers = pytest.importorskip("transformers")


class Calls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


def calls(function: Callable[..., Any], *args: Any) -> list[str]:
    with torch.no_grad(), Calls() as seen:
        function(*args)
    return seen.names


def of_code(function: Callable[..., Any], module: nn.Module | None = None) -> nn.Module:
    """A module with this forward, of itself and its input."""
    model = module or nn.Module()
    model.forward = lambda *args, **kwargs: function(model, *args, **kwargs)  # type: ignore[method-assign]
    return model


def image(batch: int = 1, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[1, 2], num_labels=5
    )
    return transformers.ResNetForImageClassification(config).eval()


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.25, num_labels=5, image_size=32)
    return transformers.MobileNetV2ForImageClassification(config).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("made", [resnet, mobilenet])
def test_convolutional_networks(made: Callable[[], nn.Module], precision: str) -> None:
    example = image()
    model = pbm.optimize(made(), precision, example_inputs=example if precision == "int8" else None)
    frozen = pbm.freeze(model, example)
    for x in (image(), image()):
        with torch.no_grad():
            expected = model(x)
        got = frozen(x)
        assert type(got) is type(expected)
        assert torch.equal(got.logits, expected.logits)
    names = calls(frozen, image())
    assert not any("convolution" in name for name in names)
    if precision != "int8":
        assert names.count("pybigmodel::conv_packed") < 2 <= len(names) < 12
        assert "pybigmodel::conv_sequence" in names


@pytest.mark.parametrize("optimized", [False, True])
def test_an_encoder(optimized: bool) -> None:
    config = transformers.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    model = transformers.BertModel(config).eval()
    model = pbm.optimize(model) if optimized else model
    ids = torch.randint(0, 1000, (2, 7))
    frozen = pbm.freeze(model, {"input_ids": ids})
    other = torch.randint(0, 1000, (2, 7))
    with torch.no_grad():
        expected = model(input_ids=other).last_hidden_state
    assert torch.equal(frozen(input_ids=other).last_hidden_state, expected)


def test_each_kind_of_inputs_has_a_program() -> None:
    runs = []

    def forward(self: Any, x: Tensor, times: int = 1) -> dict[str, Any]:
        runs.append(x.shape)
        return {"y": x * times, "times": times, "none": None}

    frozen = pbm.freeze(of_code(forward))
    x = torch.randn(3, 4)
    for _ in range(3):
        assert torch.equal(frozen(x)["y"], x)
    assert len(runs) == 3  # to pack weights, to record and to check: on copies
    assert torch.equal(frozen(x, times=3)["y"], 3 * x) and frozen(x, times=3)["times"] == 3
    assert torch.equal(frozen(x.t())["y"], x.t()) and frozen(x.double())["y"].dtype is torch.float64
    for size in range(MOST + 3):
        assert frozen(torch.ones(size))["y"].numel() == size
    assert len(frozen._programs) == MOST


def test_outputs_are_what_the_model_gives() -> None:
    def forward(self: Any, x: Tensor, more: list[Tensor]) -> Any:
        a, b = x.split(2)
        return [x, (b, b), self.weight, {"sum": a + more[0], "word": "yes"}]

    model = of_code(forward, nn.Linear(2, 2))
    x, more = torch.randn(4, 2), [torch.randn(2, 2)]
    got = pbm.freeze(model)(x, more)
    assert got[0] is x and got[1][0] is got[1][1] and torch.equal(got[1][0], x[2:])
    assert torch.equal(got[2], model.weight) and got[3]["word"] == "yes"
    assert torch.equal(got[3]["sum"], x[:2] + more[0])


def test_writes_and_views() -> None:
    """What is written to is as it was in the model; constants in the code are new at each call."""

    def forward(self: Any, x: Tensor) -> Tensor:
        y = x.clone()
        rows = y[1:]
        y.mul_(2)
        total = torch.tensor([1.0, 2.0])
        total += rows.sum(0)
        torch.add(y, 1, out=y)
        return rows + total

    model = of_code(forward)
    frozen = pbm.freeze(model)
    for _ in range(3):
        x = torch.randn(4, 2)
        assert torch.equal(frozen(x), model(x))


def test_inputs_are_written_as_by_the_model() -> None:
    frozen = pbm.freeze(of_code(lambda self, x: x.add_(1)), torch.zeros(3))
    x = torch.zeros(3)
    assert frozen(x) is x and torch.equal(x, torch.ones(3))


def test_what_is_not_read_any_more_goes() -> None:
    frozen = pbm.freeze(of_code(lambda self, x: ((x + 1) * 2).relu()), torch.zeros(3))
    alive: list[int] = []
    results: list[weakref.ref[Tensor]] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            alive.append(sum(result() is not None for result in results))
            y = func(*args, **(kwargs or {}))
            results.append(weakref.ref(y))
            return y

    x = torch.zeros(3)
    with Watch():
        frozen(x)
    assert alive == [0, 1, 1]


def test_within_other_modes_and_threads() -> None:
    model = pbm.optimize(resnet())
    frozen = pbm.freeze(model, image())
    with FlopCounterMode(display=False) as counter:
        frozen(image())
    assert counter.get_total_flops() > 0
    x = image(2)
    with ThreadPoolExecutor(2) as pool, torch.no_grad():
        results = list(pool.map(lambda _: frozen(x).logits, range(8)))
        assert all(torch.equal(result, model(x).logits) for result in results)


class Unknown:
    pass


def _writes(self: Any, x: Tensor) -> Tensor:
    self.weight.t()[0].add_(1)
    return x


def _appends(self: Any, x: Tensor, cache: list[Tensor]) -> Tensor:
    cache.append(x)
    return torch.cat(cache)


def _writes_a_part(self: Any, x: Tensor) -> Tensor:
    self.weight.unsafe_chunk(3)[0].add_(1)
    return x


def _normalises(self: Any, x: Tensor) -> Tensor:
    return F.batch_norm(x, self.mean, self.variance, training=True)


X = torch.arange(9.0).view(3, 3)
REFUSED: dict[str, tuple[Callable[..., Any], tuple[Any, ...], str]] = {
    "item": (lambda self, x: x * x.sum().item(), (X,), "reads a value of a tensor"),
    "branch": (lambda self, x: x if x.sum() > 0 else -x, (X,), "reads a value of a tensor"),
    "tolist": (lambda self, x: x * x.tolist()[0][1], (X,), r"reads a value of a tensor \(tolist"),
    "numpy": (lambda self, x: x / x.numpy().max(), (X,), r"reads a value of a tensor \(numpy"),
    "split": (
        lambda self, x, at: torch.tensor_split(x, at)[0],
        (X, torch.tensor([1])),
        r"reads a value of a tensor \(tensor_split",
    ),
    "nonzero": (lambda self, x: x[x > 0], (X,), "whose shape depends on values"),
    "parameter": (
        lambda self, x: nn.Parameter(x) * 1,
        (X,),
        "without an op that could be recorded",
    ),
    "hidden": (lambda self, x: x + len(repr(x)), (X,), "reads a value|depends on values"),
    "chance": (lambda self, x: x + torch.rand(()), (X,), "depends on values, or on chance"),
    "dropout": (lambda self, x: F.dropout(x, 0.5, True), (X * 0,), "depends on values, or on"),
    "write": (_writes, (X,), "writes to a tensor of its own"),
    "write to a part": (_writes_a_part, (X,), "writes to a tensor of its own"),
    "statistics": (_normalises, (X,), "writes to a tensor of its own"),
    "result": (lambda self, x: Unknown(), (X,), "the model must give tensors.*Unknown"),
    "container": (_appends, (X, []), "changes a list or a dict that it is given"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str) -> None:
    forward, inputs, message = REFUSED[name]
    layer = nn.Linear(3, 3).requires_grad_(False)
    layer.mean, layer.variance = torch.zeros(3), torch.ones(3)
    before = copy.deepcopy(inputs)
    with pytest.raises((RuntimeError, TypeError), match=message):
        pbm.freeze(of_code(forward, layer))(*inputs)
    assert str(inputs) == str(before)


def test_bad_calls() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got int"):
        pbm.freeze(3)  # type: ignore[arg-type]
    frozen = pbm.freeze(nn.Linear(3, 3), torch.randn(2, 3))
    with pytest.raises(TypeError, match=r"arguments must be tensors.*got Unknown"):
        frozen(torch.randn(2, 3), Unknown())
    with pytest.raises(RuntimeError, match="records no gradient"):
        frozen(torch.randn(2, 3, requires_grad=True))
    with pytest.raises(RuntimeError, match="outside of autocast"), torch.autocast("cpu"):
        frozen(torch.randn(2, 3))
    with pytest.raises(RuntimeError, match=r"must match|cannot be multiplied"):
        frozen(torch.randn(2, 4))  # torch's own error
    with pytest.raises(RuntimeError, match="the model it was made from"):
        frozen.double()
    assert nn.Sequential(frozen).train()[0] is frozen and not frozen.training


def test_copies_record_anew() -> None:
    model, x = nn.Linear(3, 3), torch.randn(2, 3)
    frozen = pbm.freeze(model, x)
    for other in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert not other._programs and torch.equal(other(x), frozen(x))


def test_weights_are_followed() -> None:
    model, x = pbm.optimize(nn.Linear(3, 3)), torch.randn(2, 3)
    frozen = pbm.freeze(model, x)
    for weights in (torch.randn(3, 3), torch.zeros(3, 3)):
        frozen.load_state_dict({"model.weight": weights, "model.bias": weights[0]})
        with torch.no_grad():
            assert torch.equal(frozen(x), model(x))
    with torch.no_grad():
        model.weight.add_(1)
        assert torch.equal(frozen(x), model(x))


def test_one_tensor_given_twice() -> None:
    frozen = pbm.freeze(of_code(lambda self, a, b: 2 * a + b))
    one = torch.ones(3)
    assert torch.equal(frozen(one, one), 3 * one)
    assert torch.equal(frozen(one, 0 * one), 2 * one)
    x = torch.randn(3)
    assert torch.equal(frozen(x, x), 2 * x + x)


def test_the_first_call_runs_once_on_what_it_is_given() -> None:
    frozen = pbm.freeze(of_code(lambda self, x, y: (x.add_(1), y * 2)))
    both = torch.zeros(4)
    assert torch.equal(frozen(both[:2], both[1:3])[1], torch.tensor([2.0, 0.0]))
    assert both.tolist() == [1, 1, 0, 0]


def test_layouts_of_inputs() -> None:
    """Expanded, overlapping and sliced ones."""
    layer = nn.Embedding(4, 3)
    ids = torch.arange(4)[None].expand(2, 4)
    assert torch.equal(pbm.freeze(layer)(ids), layer(ids))
    windows = torch.arange(8.0).unfold(0, 3, 1)
    assert torch.equal(pbm.freeze(of_code(lambda self, x: x + 1))(windows), windows + 1)
    part = torch.arange(12.0).view(3, 4)[:, 1:]
    shifted = pbm.freeze(of_code(lambda self, x: x.as_strided((2, 2), (4, 1), 2) * 1))
    assert torch.equal(shifted(part), part.as_strided((2, 2), (4, 1), 2))


def test_where_other_values_fail_it_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Shuffled integers are no indices here."""
    table, ids = torch.randn(2, 3), torch.tensor([1, 0, -2, 1])
    frozen = pbm.freeze(of_code(lambda self, at, big: table[at // big]))
    assert torch.equal(frozen(ids, torch.tensor([1, 1, 1, 1])), table[ids])
    assert "checked on the given values" not in caplog.text
    sizes = torch.tensor([4, 1])
    frozen = pbm.freeze(of_code(lambda self, at: table[at - torch.tensor([3, 0])]))
    assert torch.equal(frozen(sizes), table[[1, 1]])
    assert "checked on the given values alone, others fail" in caplog.text


def test_usual_code() -> None:
    def forward(self: Any, x: Tensor, order: Tensor) -> Tensor:
        x = x @ self.weight
        x += self.bias
        x.add_(self.bias)
        x = F.relu(x, inplace=True)
        copied = torch.empty_like(self.weight)
        copied.copy_(self.weight).mul_(2)
        return x[order] + copied

    model = of_code(forward, nn.Linear(3, 3).requires_grad_(False))
    frozen = pbm.freeze(model)
    for order in ([2, 0, 1], [0, 1, 2]):
        x = torch.randn(3, 3)
        assert torch.equal(frozen(x, torch.tensor(order)), model(x, torch.tensor(order)))


def test_first_calls_of_threads() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)).train()
    frozen = pbm.freeze(model)
    sizes = [size for size in range(2, 10) for _ in range(3)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda size: frozen(torch.ones(size, 4)), sizes))
    assert [len(result) for result in results] == sizes and len(frozen._programs) == 8
    assert all(module.training for module in model.modules())


def test_a_model_in_training_mode_is_frozen_in_eval_mode_and_stays() -> None:
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout()).train()
    x = torch.randn(8, 4)
    frozen = pbm.freeze(model, x)
    assert model.training and int(model[0].num_batches_tracked) == 0
    assert torch.equal(frozen(x), copy.deepcopy(model).eval()(x))
