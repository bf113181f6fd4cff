"""optimize: which layers are replaced, which stay, and why."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import pybigmodel as pbm
from pybigmodel._measure import difference

PRECISIONS = ["fp32", "bf16", "int8"]
BOUND = {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}


def left(model: nn.Module, *args, **kwargs) -> dict[str, str | None]:
    """The reasons by path."""
    rows = pbm.report(pbm.optimize(model, *args, **kwargs)).rows
    return {row.path: row.left for row in rows}


@pytest.mark.parametrize(
    ("selection", "replaced"),
    [
        ({"include": "body.*"}, {"body.0", "body.2"}),
        ({"include": "body"}, {"body.0", "body.2"}),
        ({"include": ["first", "*.2"]}, {"first", "body.2"}),
        ({"include": nn.Sequential}, {"body.0", "body.2"}),
        ({"include": nn.Linear, "exclude": "head"}, {"first", "body.0", "body.2"}),
        ({"exclude": (nn.Sequential, "first")}, {"head"}),
        ({"include": "body", "exclude": "body.0"}, {"body.2"}),
        ({"include": nn.Module}, {"first", "body.0", "body.2", "head"}),
    ],
)
def test_include_and_exclude(model, selection, replaced) -> None:
    reasons = left(model, **selection)
    assert {path for path, reason in reasons.items() if reason is None} == replaced
    assert set(reasons.values()) <= {None, "not in include", "in exclude"}


def test_bad_arguments_are_named(model, x) -> None:
    for call, error, message in [
        (lambda: pbm.optimize(model, exclude="haed"), ValueError, "exclude: 'haed' matches no"),
        (lambda: pbm.optimize(model, include=nn.Conv2d), ValueError, "include: .*matches no"),
        (lambda: pbm.optimize(model, include=[3]), TypeError, "include must be .*; got 3"),
        (lambda: pbm.optimize(model, include=int), TypeError, "include must be .*got <class 'int"),
        (lambda: pbm.optimize(model, ["int8"]), TypeError, "precision must be a string.*int8"),
        (lambda: pbm.optimize(model, None), TypeError, "precision must be a string.*None"),
        (lambda: pbm.optimize(model, include=model.head), TypeError, "include must be.*Linear"),
        (lambda: pbm.optimize(model, exclude=model.body), TypeError, "exclude must be.*Sequential"),
        (lambda: pbm.optimize(model, "int4"), ValueError, "precision must be one of .*'int4'"),
        (lambda: pbm.optimize(model.forward), TypeError, "optimize: model must be a torch.nn"),
        (lambda: pbm.optimize(model, example_inputs=3), TypeError, "example_inputs must be"),
        (lambda: pbm.report(model), ValueError, "model was not optimized"),
        (lambda: pbm.report("model"), TypeError, "report: model must be .*got str"),
        (lambda: pbm.restore(None), TypeError, "restore: model must be .*got NoneType"),
    ]:
        with pytest.raises(error, match=message):
            call()
    assert type(model.head) is nn.Linear


def test_a_model_that_cannot_be_copied(model, x) -> None:
    model.cache = model.head.weight * 2  # not a leaf: torch refuses to copy it
    with pytest.raises(RuntimeError, match=r"model cannot be copied.*inplace=True"):
        pbm.optimize(model)
    pbm.optimize(model, inplace=True)


class Gated(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input).sigmoid()


def replace_forward(layer: nn.Linear) -> nn.Linear:
    layer.forward = lambda input: input
    return layer


def with_nan(layer: nn.Linear) -> nn.Linear:
    with torch.no_grad():
        layer.weight[2, 3] = torch.nan
    return layer


def in_inference_mode() -> nn.Linear:
    with torch.inference_mode():
        return nn.Linear(8, 8)


def without_gradient(layer: nn.Linear, weight: torch.Tensor) -> nn.Linear:
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def with_non_parameter(layer: nn.Linear) -> nn.Linear:
    layer._parameters["weight"] = layer.weight.detach()  # as functional_call does
    return layer


LEFT = {
    "subclass": (lambda: Gated(8, 8), "a subclass of torch.nn.Linear, .*Gated"),
    "lazy": (lambda: nn.LazyLinear(8), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Linear(8, 8)), "parametrized"),
    "pruned": (lambda: prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), "a hook computes"),
    "own forward": (lambda: replace_forward(nn.Linear(8, 8)), "replaced on the instance"),
    "float64": (lambda: nn.Linear(8, 8, dtype=torch.float64), "its weight is torch.float64"),
    "meta": (lambda: nn.Linear(8, 8, device="meta"), "on device meta, for which there is no"),
    "sparse": (
        lambda: without_gradient(nn.Linear(8, 8), torch.eye(8).to_sparse()),
        "its weight is torch.sparse_coo",
    ),
    "not a parameter": (lambda: with_non_parameter(nn.Linear(8, 8)), "its weight is a .*Tensor"),
    "already": (lambda: pbm.nn.Linear(8, 8), "is a pybigmodel.nn.Linear already"),
    "already int8": (lambda: pbm.nn.Int8Linear(8, 8), "is a pybigmodel.nn.Int8Linear already"),
}
LEFT_IN_FP32 = {
    "inference tensor": (in_inference_mode, "an inference tensor"),
    "shared memory": (lambda: nn.Linear(8, 8).share_memory(), "in shared memory"),
}
LEFT_IN_INT8 = {
    "nan": (lambda: with_nan(nn.Linear(8, 8)), "NaN or infinity in 1 of its rows.* row 2"),
    "large": (lambda: nn.Linear(65794, 1), "in_features is above 65793"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    ("precision", "make", "reason"),
    [
        *[("fp32", *case) for case in (*LEFT.values(), *LEFT_IN_FP32.values())],
        *[("int8", *case) for case in (*LEFT.values(), *LEFT_IN_INT8.values())],
    ],
)
def test_layers_that_stay(precision, make, reason) -> None:
    layer = make()
    model = nn.Sequential(nn.ReLU(), layer)
    kind = type(layer)
    pbm.optimize(model, precision, inplace=True)
    (row,) = pbm.report(model).rows
    assert row.path == "1" and row.replaced_by is None
    assert row.left is not None
    assert re.search(reason, row.left), row.left
    assert model[1] is layer and type(layer) is kind


@pytest.mark.parametrize("case", [*LEFT_IN_FP32])
def test_snapshots_in_int8_are_safe(case) -> None:
    layer = LEFT_IN_FP32[case][0]()
    x = torch.randn(3, 8)
    expected = layer(x).clone()
    fast = pbm.optimize(nn.Sequential(layer), "int8", inplace=True)
    assert pbm.report(fast).rows[0].left is None
    assert difference(fast(x), expected)[0] < BOUND["int8"]


def test_tied_weights(x) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 16)
            self.body = nn.Linear(16, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids):
            return self.head(self.body(self.embedding(ids)))

    model, ids = Tied(), torch.arange(5)
    fast = pbm.optimize(model)
    assert fast.head.weight is fast.embedding.weight
    with torch.no_grad():
        assert difference(fast(ids), model(ids))[0] < 1e-6
        for tied in (fast, model):
            tied.embedding.weight.mul_(2)
        assert difference(fast(ids), model(ids))[0] < 1e-6
    reasons = left(model, "int8")
    assert reasons["body"] is None
    assert reasons["head"] == (
        "tied (embedding.weight = head.weight): an int8 copy would no longer be"
    )


def test_memory_shared_by_two_parameters() -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    model[1].weight = nn.Parameter(model[0].weight.data)  # a version counter of its own
    reasons = left(model, inplace=True)
    assert reasons["0"] == "shares memory with 1.weight, another tensor: changes could go unseen"
    assert reasons["1"] == "shares memory with 0.weight, another tensor: changes could go unseen"
    assert reasons["2"] is None
    # Slices of one file side by side in memory do not overlap.
    flat = torch.randn(2, 16, 16)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    for layer, weight in zip(model, flat, strict=True):
        layer.weight = nn.Parameter(weight)
    assert set(left(model, inplace=True).values()) == {None}


def test_one_module_under_two_names(x) -> None:
    shared = nn.Linear(40, 40)
    model = nn.ModuleDict({"a": shared, "b": shared})
    for precision in PRECISIONS:
        fast = pbm.optimize(model, precision)
        assert fast["a"] is fast["b"]
        assert [row.path for row in pbm.report(fast).rows] == ["a"]
    assert left(model, include="b") == {"a": None}
    assert left(model, exclude="b") == {"a": "in exclude"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_hooks_and_attributes_stay(model, x, precision) -> None:
    seen = []
    model.head.register_forward_pre_hook(lambda module, args: seen.append(module))
    model.head.register_forward_hook(lambda module, args, output: output + 100)
    model.head.tag = "mine"
    reference = model.head
    with torch.no_grad():
        expected = model(x)
        fast = pbm.optimize(model, precision, inplace=True)
        seen.clear()
        assert difference(fast(x) - 100, expected - 100)[0] < BOUND[precision]
    assert seen == [reference] and fast.head is reference
    assert fast.head.tag == "mine"
    assert pbm.restore(fast).head.tag == "mine"


def test_copies_and_pickles_of_an_optimized_model(model, x) -> None:
    for precision in PRECISIONS:
        fast = pbm.optimize(model, precision).eval()
        with torch.no_grad():
            for again in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
                assert torch.equal(again(x), fast(x))
                assert pbm.report(again) == pbm.report(fast)
                assert not again.head.training


def test_compiled(model, x) -> None:
    torch._dynamo.reset()
    fast = pbm.optimize(model)
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert difference(compiled(x), model(x))[0] < 1e-6
        pbm.restore(fast)
        assert difference(compiled(x), model(x))[0] < 1e-6
