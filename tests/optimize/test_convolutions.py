"""optimize on convolutions: what follows them is found, done in one op, and given back."""

from __future__ import annotations

import copy
import io
import json
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel._fuse import Fused
from pybigmodel._measure import difference
from pybigmodel.nn import _conv_plan, _packing
from pybigmodel.ops._conv_geometry import is_channels_last

transformers = pytest.importorskip("transformers")


def randomised(model: Any) -> Any:
    """In eval mode, with statistics that say something."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d | nn.BatchNorm1d):
                norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(0, 0.1)
                norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def resnet(**options: Any) -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10, **options
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet(**options: Any) -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=10, **options)
    return transformers.MobileNetV2ForImageClassification(config)


class BasicBlock(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inplanes, planes, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(planes)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(planes)
        self.downsample = None
        if stride != 1 or inplanes != planes:
            conv = nn.Conv2d(inplanes, planes, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(planes))

    def forward(self, x: Tensor) -> Tensor:
        identity = x

        out = self.conv1(x)
        out = self.bn1(out)
        out = self.relu(out)

        out = self.conv2(out)
        out = self.bn2(out)

        if self.downsample is not None:
            identity = self.downsample(x)

        out += identity
        out = self.relu(out)

        return out


class InvertedResidual(nn.Module):
    """As torchvision writes it."""

    def __init__(self, inp: int, oup: int) -> None:
        super().__init__()
        self.use_res_connect = inp == oup
        hidden = 2 * inp
        self.conv = nn.Sequential(
            nn.Sequential(nn.Conv2d(inp, hidden, 1), nn.BatchNorm2d(hidden), nn.ReLU6()),
            nn.Sequential(
                nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden),
                nn.BatchNorm2d(hidden),
                nn.ReLU6(inplace=True),
            ),
            nn.Conv2d(hidden, oup, 1, bias=False),
            nn.BatchNorm2d(oup),
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.use_res_connect:
            return x + self.conv(x)
        else:
            return self.conv(x)


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.bias = nn.Conv2d(8, 8, 1), nn.Parameter(torch.ones(8, 1, 1))

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.silu(self.bn(self.conv(x))) + self.bias
        y = F.leaky_relu(self.last(y) + x)
        return y * scale


class Returned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.act = nn.Hardswish()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(x)
        h = self.bn1(h)
        h = self.act(h)
        h = self.conv2(h)
        h = self.bn2(h)
        return self.act(h + x)


def torchvision_like() -> nn.Sequential:
    stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
    return nn.Sequential(
        *(stem, BasicBlock(8, 8), BasicBlock(8, 16, 2), InvertedResidual(16, 16)),
        *(InvertedResidual(16, 24), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
    )


class Stem(nn.Module):
    """As torchvision's networks begin."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 7, 2, 3, bias=False), nn.BatchNorm2d(8)
        self.relu, self.maxpool = nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)
        self.layer1, self.fc = nn.Sequential(BasicBlock(8, 8), BasicBlock(8, 8)), nn.Linear(8, 10)

    def _forward_impl(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.relu(x)
        x = self.maxpool(x)
        x = self.layer1(x)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))

    def forward(self, x: Tensor) -> Tensor:
        return self._forward_impl(x)


def small(*blocks: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks)


# By name: the model, how many convolutions it has, how many with a norm, a residual, an activation.
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int, int]]] = {
    "resnet": (resnet, (15, 15, 4, 13)),
    "resnet, basic": (lambda: resnet(layer_type="basic"), (11, 11, 4, 9)),
    "mobilenet": (mobilenet, (52, 52, 10, 35)),
    "mobilenet, symmetric": (lambda: mobilenet(tf_padding=False), (52, 52, 10, 35)),
    "torchvision": (torchvision_like, (12, 12, 3, 9)),
    "stem": (Stem, (5, 5, 2, 5)),
    "nested": (lambda: small(Nested()), (3, 1, 1, 2)),
    "returned": (lambda: small(Returned()), (3, 2, 1, 2)),
}


def regnet() -> nn.Module:
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 32, 32], "depths": [1, 1, 1, 1]}
    config = transformers.RegNetConfig(**sizes, groups_width=8, num_labels=10)
    return transformers.RegNetForImageClassification(config)


MODELS["regnet"] = regnet, (25, 17, 4, 17)


def image(batch: int = 2, size: int = 33) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def made(name: str) -> Any:
    torch.manual_seed(0)
    return randomised(MODELS[name][0]())


def run(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)


def rows_of(model: nn.Module) -> list[Any]:
    return [row for row in pbm.report(model) if row.layer.startswith("Conv")]


def ops_of(model: nn.Module, x: Tensor) -> list[str]:
    with torch.no_grad():
        model(x)  # packs
        with torch.profiler.profile() as profile:
            model(x)
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("name", MODELS)
def test_one_op_a_convolution(name: str) -> None:
    model, x = made(name), image()
    fused = pbm.optimize(model)
    rows = rows_of(fused)
    assert (
        len(rows),
        sum(row.norm is not None for row in rows),
        sum(row.residual for row in rows),
        sum(row.activation is not None for row in rows),
    ) == MODELS[name][1]
    with torch.no_grad():
        exact = run(copy.deepcopy(model).double(), x.double())
        for _ in range(2):
            assert difference(run(fused, x).double(), exact)[0] < 1e-5
    ran = ops_of(fused, x)
    assert ran.count("pybigmodel::conv_packed") == len(rows)
    other = {"aten::batch_norm", "aten::relu", "aten::relu_", "aten::hardtanh", "aten::hardtanh_"}
    assert not {*other, "aten::add_", "aten::constant_pad_nd", "aten::conv2d"} & set(ran)


def test_report_says_what_was_found_and_where() -> None:
    model = made("torchvision")
    fused = pbm.optimize(model)
    rows = {row.path: row for row in pbm.report(fused)}
    first, second = rows["0.0"], rows["2.conv2"]
    assert (first.norm, first.activation, first.found) == ("0.1", "relu", "Sequential")
    assert (second.norm, second.residual, second.activation) == ("2.bn2", True, "relu")
    assert second.found == "forward of BasicBlock"
    assert rows["2.downsample.0"].norm == "2.downsample.1"
    assert rows["2.downsample.0"].activation is None
    assert (rows["3.conv.2"].residual, rows["4.conv.2"].residual) == (True, False)
    assert rows["0.0"].layer == "Conv2d(3, 8, 3×3, stride 2)"
    assert rows["3.conv.1.0"].layer == "Conv2d(32, 32, 3×3, groups 32)"
    text = str(pbm.report(fused))
    assert "forward of BasicBlock" in text and "added" in text
    assert json.loads(pbm.report(fused).to_json())["rows"][0]["norm"] == "0.1"


@pytest.mark.parametrize("name", MODELS)
def test_restore(name: str) -> None:
    model, x = made(name), image()
    with torch.no_grad():
        expected = run(model, x)
        fused = pbm.optimize(model)
        run(fused, x)
        restored = pbm.restore(fused)
        assert torch.equal(run(restored, x), expected)
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in restored.modules()] == [vars(m).keys() for m in model.modules()]
    for p, q in zip(restored.parameters(), model.parameters(), strict=True):
        assert p.stride() == q.stride()
        assert not _packing.entry_of(p).copies


@pytest.mark.parametrize("name", MODELS)
def test_training_is_torchs(name: str) -> None:
    model, x = made(name), image()
    fused = pbm.optimize(model)
    for one in (model, fused):
        with torch.no_grad():
            run(one, x)  # folds
        one.train()
        for dropout in one.modules():
            if isinstance(dropout, nn.Dropout):
                dropout.p = 0.0
        run(one, x).square().sum().backward()
    # Rounding errors pass through many norms over few pixels.
    total = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (model, fused)]
    assert difference(total[1], total[0])[0] < 2e-2
    for m, f in zip(model.buffers(), fused.buffers(), strict=True):
        assert difference(f, m)[0] < 1e-3
    with torch.no_grad():  # what changed meanwhile is seen
        fused.eval()
        apart = copy.deepcopy(fused)
        pbm.restore(apart)
        assert difference(run(fused, x), run(apart, x))[0] < 1e-4


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "torchvision"])
def test_copies_and_pickles(name: str) -> None:
    fused, x = pbm.optimize(made(name)), image()
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        expected = run(fused, x)
        for other in (
            copy.deepcopy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(file, weights_only=False),
        ):
            assert [type(m) for m in other.modules()] == [type(m) for m in fused.modules()]
            assert torch.equal(run(other, x), expected)
            assert ops_of(other, x).count("pybigmodel::conv_packed") == MODELS[name][1][0]
            next(iter(other.parameters())).zero_()
        assert torch.equal(run(fused, x), expected)


@pytest.mark.parametrize("name", ["resnet", "torchvision", "nested", "returned"])
def test_compiled_and_exported(name: str) -> None:
    model, x = made(name), image()
    fused = pbm.optimize(model)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(model, x)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert difference(run(compiled, x), expected)[0] < 1e-5
        exported = torch.export.export(fused, (x,)).module()
        assert difference(run(exported, x), expected)[0] < 1e-5


def test_fx() -> None:
    model, x = made("torchvision"), image()
    fused = pbm.optimize(model)
    with torch.no_grad():
        fused(x)
        traced = torch.fx.symbolic_trace(fused)
        assert difference(traced(x), model(x))[0] < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_hooks_have_the_parts_called_one_by_one(name: str) -> None:
    model, x = made(name), image()
    fused = pbm.optimize(model)
    seen: dict[nn.Module, int] = {}
    leaves = [m for m in fused.modules() if not list(m.children())]
    for leaf in leaves:
        leaf.register_forward_hook(
            lambda module, args, y: seen.__setitem__(module, seen.get(module, 0) + 1)
        )
    with torch.no_grad():
        assert difference(run(fused, x), run(model, x))[0] < 1e-5
    unused = {m for m in leaves if m not in seen}
    assert not unused - {m for m in leaves if isinstance(m, nn.Identity | nn.Dropout)}


class Doubled(nn.Module):
    """What adapters wrap a layer in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * 2


def test_exchanged_layers_are_called() -> None:
    model, x = made("torchvision"), image()
    fused = pbm.optimize(model)
    with torch.no_grad():
        fused(x)
        for one in (model, fused):
            one[1].conv1 = Doubled(one[1].conv1)
            one[1].bn2 = nn.Identity()
            one[2].relu = nn.Tanh()
            one[0][1] = Doubled(one[0][1])
            one[3].use_res_connect = False
            one[3].conv[0] = nn.Conv2d(16, 32, 1)
        fused[3].conv[0].load_state_dict(model[3].conv[0].state_dict())
        assert difference(fused(x), model(x))[0] < 1e-5
        model[2].downsample = fused[2].downsample = nn.MaxPool2d(2, ceil_mode=True)
        model[2].conv2, fused[2].conv2 = (nn.Conv2d(16, 8, 3, padding=1) for _ in range(2))
        fused[2].conv2.load_state_dict(model[2].conv2.state_dict())
        for one in (model, fused):
            one[2].bn2 = nn.BatchNorm2d(8).eval()
            one[3] = nn.Conv2d(8, 16, 1)
        fused[3].load_state_dict(model[3].state_dict())
        assert difference(fused(x), model(x))[0] < 1e-5


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "torchvision"])
def test_changed_statistics_are_seen(name: str) -> None:
    model, x = made(name), image()
    fused = pbm.optimize(model)
    with torch.no_grad():
        run(fused, x)
        for one in (model, fused):
            torch.manual_seed(7)
            randomised(one)
        assert difference(run(fused, x), run(model, x))[0] < 1e-5
        fused.load_state_dict(made(name).state_dict())
        assert difference(run(fused, x), run(made(name), x))[0] < 1e-5


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "torchvision"])
def test_images_stay_in_channels_last(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the model's input is converted."""
    fused, x = pbm.optimize(made(name)), image()
    op, converted, convolutions = _conv_plan.conv_packed_op, [], []

    def count(*args: Any) -> Tensor:
        input, residual = args[0], args[5]
        convolutions.append(input)
        for one in (input, residual):
            one_layout = one is None or one.shape[1] == 1 or one.shape[2:].numel() == 1
            if not one_layout and not is_channels_last(one):
                converted.append(one)
        y: Tensor = op(*args)
        return y

    monkeypatch.setattr(_conv_plan, "conv_packed_op", count)
    with torch.no_grad():
        run(fused, x)
    assert len(convolutions) == MODELS[name][1][0]
    assert [one.shape for one in converted] == [x.shape]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 31 * 31, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x))
        return self.head(y.view(len(y), -1))


def test_layouts_that_the_model_needs_are_kept(
    twice_as_fast: list[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Flat(), image()
    fused = pbm.optimize(model, example_inputs=x)
    assert "convolutions leave layouts as they are, since: view size" in caplog.text
    assert type(fused.conv) is pbm.nn.Conv2d
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5
    with pytest.raises(TypeError, match="got an unexpected keyword"):
        pbm.optimize(model, example_inputs={"y": x})


class Copying(nn.Module):
    """Writes to what is a copy of an image unless that is in channels_last."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.conv(x)
        z = y.permute(0, 2, 3, 1).contiguous()
        z.mul_(2)
        x += 1  # what the next run must not see
        return {"y": self.head(y), "noise": torch.rand(3)}


def test_layouts_are_kept_where_results_would_be_others(
    twice_as_fast: list[nn.Module], caplog: pytest.LogCaptureFixture
) -> None:
    model, x = Copying(), image()
    before = x.clone()
    fused = pbm.optimize(model, example_inputs=x)
    assert "since: in channels_last the model's results differ by" in caplog.text
    assert type(fused.conv) is pbm.nn.Conv2d
    with torch.no_grad():
        assert difference(fused(before.clone())["y"], model(before.clone())["y"])[0] < 1e-5


def test_checking_layouts_leaves_no_packed_weights_of_the_other(
    twice_as_fast: list[nn.Module],
) -> None:
    torch.manual_seed(0)
    fused = pbm.optimize(wide(), example_inputs=torch.randn(2, 64, 16, 16))
    layers = [layer for layer in fused.modules() if isinstance(layer, pbm.nn.Conv2d)]
    assert layers and all(layer._channels_last for layer in layers)
    for layer in layers:
        copies = [chain._folded.copies for chain in layer._chains.values() if chain._folded]
        assert len(layer._packed.copies) + sum(map(len, copies)) <= 1


def test_layouts_may_be_left_as_they_are() -> None:
    model, x = Flat(), image()
    fused = pbm.optimize(model, channels_last=False)
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5
        with pytest.raises(RuntimeError, match="view"):
            pbm.optimize(model)(x)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_precisions(precision: str) -> None:
    model, x = made("resnet"), image()
    fused = pbm.optimize(model, precision)
    assert {row.precision for row in rows_of(fused)} == {precision}
    with torch.no_grad():
        bound = {"fp32": 1e-5, "bf16": 3e-2, "int8": 3e-2}[precision]
        assert difference(run(fused, x), run(model, x))[0] < bound
    halves = model.bfloat16()
    low = pbm.optimize(halves)
    with torch.no_grad():
        exact = run(made("resnet"), x)
        errors = [difference(run(m, x.bfloat16()).float(), exact)[0] for m in (low, halves)]
    assert errors[0] < 2 * errors[1]
    assert {row.precision for row in rows_of(low)} == {"bf16"}


def wide() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(64, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 8, 1))


def test_exact_refuses_winograd(twice_as_fast: list[nn.Module]) -> None:
    model, x = wide(), torch.randn(1, 64, 28, 28)
    isa = _native.active_isa()
    for exact, kernel in ((False, "conv_winograd4_f32"), (True, "conv_direct_f32")):
        fused = pbm.optimize(model, example_inputs=x, exact=exact)
        assert next(iter(pbm.report(fused))).kernel == f"{kernel}.{isa}"
        assert fused[0].algorithm == ("direct" if exact else "auto")
        with torch.no_grad():
            assert difference(fused(x), model(x))[0] < 1e-5


def test_trials(twice_as_fast: list[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = made("torchvision"), image()
    fused = pbm.optimize(model, example_inputs=x)
    rows = rows_of(fused)
    assert all(row.left is None and row.speedup == 2.0 for row in rows)
    assert all(row.error < 1e-5 and row.kernel.startswith(("conv_", "gemm_f32")) for row in rows)
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5
    monkeypatch.setattr(pbm._measure, "time_pair", lambda *_: (1.0, 2.0))
    slow = pbm.optimize(model, example_inputs=x)
    assert {row.left for row in rows_of(slow)} == {"not faster on example_inputs: 0.50×"}
    assert not any(isinstance(m, Fused) for m in slow.modules())


def test_one_that_stays_among_those_that_do_not() -> None:
    model, x = made("torchvision"), image()
    fused = pbm.optimize(model, exclude=["1.conv2", "3.conv.0.*"])
    rows = {row.path: row for row in pbm.report(fused)}
    assert rows["1.conv2"].left == "in exclude" and not rows["1.conv2"].residual
    assert rows["1.conv1"].activation == "relu"
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5


class Own(nn.Conv2d):
    pass


LEFT = {
    "subclass": (lambda: Own(8, 8, 1), "a subclass of torch.nn.Conv2d, .*Own"),
    "lazy": (lambda: nn.LazyConv2d(8, 1), "lazy"),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(8, 8, 1)), "parametrized"),
    "float64": (lambda: nn.Conv2d(8, 8, 1, dtype=torch.float64), "its weight is torch.float64"),
    "meta": (lambda: nn.Conv2d(8, 8, 1, device="meta"), "on device meta, for which"),
    "already": (lambda: pbm.nn.Conv2d(8, 8, 1), "is a pybigmodel.nn.Conv2d already"),
}


@pytest.mark.parametrize("case", LEFT)
def test_layers_that_stay(case: str) -> None:
    make, reason = LEFT[case]
    layer = make()
    kind = type(layer)
    model = pbm.optimize(nn.Sequential(layer), inplace=True)
    (row,) = pbm.report(model)
    assert type(model[0]) is kind and row.left is not None
    assert re.search(reason, row.left), row.left


def test_shared_and_tied() -> None:
    shared = nn.Conv2d(8, 8, 3, padding=1)
    tied = nn.Conv2d(8, 8, 3, padding=1)
    tied.weight = shared.weight
    model = small(
        nn.Sequential(shared, nn.BatchNorm2d(8), nn.ReLU()),
        nn.Sequential(shared, nn.BatchNorm2d(8), nn.SiLU()),
        nn.Sequential(tied, nn.BatchNorm2d(8), shared),
    )
    model, x = randomised(model), image()
    fused = pbm.optimize(model)
    assert fused[3][0].weight is fused[1][0].weight and fused[1][0] is fused[2][0]
    with torch.no_grad():
        for _ in range(2):
            assert difference(fused(x), model(x))[0] < 1e-5
            for one in (model, fused):
                one[1][0].weight.mul_(1.5)


def test_in_place_before_a_residual_is_seen() -> None:
    """What the block does to its input first is not put off."""

    class Preactivated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(
                nn.ReLU(inplace=True), nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
            )
            self.shortcut = nn.Identity()

        def forward(self, hidden: Tensor) -> Tensor:
            residual = hidden
            hidden = self.layer(hidden)
            residual = self.shortcut(residual)
            hidden += residual
            return hidden

    model, x = randomised(small(Preactivated())), image()
    fused = pbm.optimize(model)
    assert not any(row.residual for row in pbm.report(fused))
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5


class Beside(nn.Module):
    """A convolution, and a shortcut that writes to what both are given."""

    def __init__(self, *shortcut: nn.Module) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
        self.shortcut = shortcut[0] if len(shortcut) == 1 else nn.Sequential(*shortcut)


class BesideAChain(Beside):
    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        identity = self.shortcut(x)
        out = out + identity
        return out


class BesideABlock(Beside):
    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        z = self.shortcut(x)
        y = y + z
        return y


class BesideAnotherName(Beside):
    def forward(self, x: Tensor) -> Tensor:
        out = x
        out = self.conv(out)
        identity = self.shortcut(x)
        out += identity
        return out


@pytest.mark.parametrize("block", [BesideAChain, BesideABlock, BesideAnotherName])
def test_what_writes_to_the_image_is_not_passed(block: type[Beside]) -> None:
    x = torch.randn(2, 8, 9, 9)
    writing = (nn.ReLU(True),), (nn.ReLU(True), nn.Conv2d(8, 8, 1)), (nn.Identity(), nn.ReLU(True))
    for shortcut in writing:
        model = randomised(block(*shortcut))
        fused = pbm.optimize(model)
        assert not any(row.residual for row in pbm.report(fused))
        with torch.no_grad():
            assert difference(fused(x.clone()), model(x.clone()))[0] < 1e-5
    reading = (
        (nn.Conv2d(8, 8, 1),),
        (nn.AvgPool2d(1), nn.ReLU(True)),
        (nn.Identity(), nn.Identity()),
    )
    for shortcut in reading:
        model = randomised(block(*shortcut))
        fused = pbm.optimize(model)
        assert sum(row.residual for row in pbm.report(fused)) == 1
        with torch.no_grad():
            assert difference(fused(x.clone()), model(x.clone()))[0] < 1e-5
            # Looked at at every call.
            for one in (model, fused):
                one.shortcut = nn.ReLU(inplace=True)
            assert difference(fused(x.clone()), model(x.clone()))[0] < 1e-5


def test_what_stands_between_and_is_not_apart() -> None:
    class Used(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

        def forward(self, x: Tensor) -> Tensor:
            out = self.conv(x)
            out = self.bn(out)
            identity = torch.sigmoid(out)
            out += identity
            x = self.conv(out)
            identity = x
            x = self.bn(x) if identity is None else self.bn(out)
            x = x + identity
            return x

    model, x = randomised(small(Used())), image()
    fused = pbm.optimize(model)
    assert not any(row.residual for row in pbm.report(fused))
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5


def test_conditions_are_looked_at_at_every_call() -> None:
    model, x = made("mobilenet"), image()
    fused = pbm.optimize(model)
    with torch.no_grad():
        run(fused, x)
        for one in (model, fused):
            one.config.tf_padding = False
            for m in one.modules():
                if hasattr(m, "use_residual"):
                    m.use_residual = False
                if type(m).__name__ == "MobileNetV2ConvLayer":
                    k = m.convolution.kernel_size[0]
                    m.convolution.padding = (k // 2, k // 2)
        assert difference(run(fused, x), run(model, x))[0] < 1e-5
        for one in (model, fused):
            for m in one.modules():
                if type(m).__name__ == "MobileNetV2ConvLayer" and m.activation is None:
                    m.normalization = None
        assert difference(run(fused, x), run(model, x))[0] < 1e-5


def test_under_autocast() -> None:
    model, x = made("resnet"), image()
    fused = pbm.optimize(model)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(run(fused, x).float(), run(model, x).float())[0] < 3e-2


@pytest.mark.parametrize("axes", [1, 3])
def test_other_axes(axes: int) -> None:
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    transposed = getattr(nn, f"ConvTranspose{axes}d")
    model = nn.Sequential(
        *(conv(3, 8, 3), norm(8), nn.ReLU(), conv(8, 8, 1), transposed(8, 4, 3), nn.ReLU())
    ).eval()
    x = torch.randn(2, 3, *(9, 8, 7)[:axes])
    fused = pbm.optimize(model)
    assert [row.activation for row in pbm.report(fused)] == ["relu", None, None]
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5
    assert "aten::batch_norm" not in ops_of(fused, x)
    fused(x).sum().backward()


def test_bytes_are_those_of_the_packed_weight() -> None:
    fused = pbm.optimize(wide(), exact=True)
    with torch.no_grad():
        fused(torch.randn(1, 64, 8, 8))
    for row, layer in zip(pbm.report(fused), (fused[0], fused[2]), strict=True):
        (packed,) = _packing.entry_of(layer.weight).copies.values()
        assert row.bytes_after == layer.weight.nbytes + packed.nbytes
