"""torch.compile(backend="pybigmodel") of whole models, by inductor."""

from __future__ import annotations

import ast
import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._measure import difference

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch._dynamo.reset()


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=10)
    return transformers.MobileNetV2ForImageClassification(config)


def bert() -> nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=50, num_hidden_layers=2, num_labels=4, **sizes)
    return transformers.BertForSequenceClassification(config)


def made(kind: Any) -> Any:
    torch.manual_seed(0)
    model = kind()
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def input_of(model: nn.Module, batch: int = 2) -> Tensor:
    if "Bert" in type(model).__name__:
        return torch.arange(9 * batch).reshape(batch, 9)
    return torch.randn(batch, 3, 33, 33, generator=torch.Generator().manual_seed(batch))


def exact_of(model: nn.Module, x: Tensor) -> Tensor:
    wide = x.double() if x.is_floating_point() else x
    return copy.deepcopy(model).double()(wide).logits


def code_of(run: Any, x: Tensor) -> tuple[Tensor, str]:
    """The result, and what inductor generated for it."""
    from torch._inductor.utils import run_and_get_code

    y, code = run_and_get_code(lambda: run(x).logits)
    return y, "\n".join(code)


def layouts_in(code: str) -> list[bool]:
    """Of every convolution, alone or in a sequence: whether it gives channels_last."""
    alone = re.findall(r"conv_packed.default\(.*, (\w+)\)$", code, re.MULTILINE)
    found = [last == "True" for last in alone]
    lists = r"conv_sequence.default\(\[[^]]*\], (\[[^]]*\])"
    for program in map(ast.literal_eval, re.findall(lists, code)):
        while program:
            found.append(bool(program[8]))
            program = program[10 + 5 * program[9] :]
    return found


@pytest.mark.parametrize(
    ("kind", "convolutions", "sequences", "linears", "kernels"),
    # Of the last embeddings, LayerNorms and the pooler's tanh are left to inductor.
    [(resnet, 15, 1, 1, 0), (mobilenet, 52, 1, 1, 0), (bert, 0, 0, 14, None)],
)
def test_models(
    kind: Any, convolutions: int, sequences: int, linears: int, kernels: int | None
) -> None:
    model = made(kind)
    run = torch.compile(model, backend="pybigmodel", fullgraph=True)
    x = input_of(model)
    with torch.no_grad():
        y, code = code_of(run, x)
        exact = exact_of(model, x)
        assert difference(y.double(), exact)[0] < 1e-5
        assert difference(run(x).logits.double(), exact)[0] < 1e-5
    assert layouts_in(code) == [True] * convolutions
    assert code.count("torch.ops.pybigmodel.conv_sequence.default(") == sequences
    assert code.count("torch.ops.pybigmodel.linear_packed.default(") == linears
    assert "convolution" not in code and "addmm" not in code and "aten.max_pool" not in code
    if kernels is not None:  # none reorders them between our layers
        assert len(set(re.findall(r"^cpp_fused\w+ = ", code, re.MULTILINE))) == kernels


def test_changes_and_sizes() -> None:
    model: Any = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(16, 16, 3, padding=1), nn.Hardswish(), nn.Flatten(2)),
    ).eval()
    run = torch.compile(model, backend="pybigmodel", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, 16), (3, 16), (5, 24)):
            x = torch.randn(batch, 3, size, size)
            y, expected = run(x), model(x)
            assert difference(y, expected)[0] < 1e-5
            assert y.stride() == expected.stride()
            for p in model.parameters():
                p.mul_(1.1)
            model[1].running_mean.add_(0.1)


def test_training() -> None:
    class Small(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(
                *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
                *(nn.Conv2d(16, 16, 3, 2, groups=16), nn.Hardswish(), nn.Flatten()),
                nn.Linear(16 * 7 * 7, 5),
            )

    model = Small()
    other = copy.deepcopy(model)
    run = torch.compile(model, backend="pybigmodel", fullgraph=True)
    optimizers = [torch.optim.SGD(m.parameters(), 0.01, momentum=0.9) for m in (model, other)]
    for step in range(3):
        x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(step))
        for optimizer, call in zip(optimizers, (run, other), strict=True):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        if name != "0.bias":  # before a norm of the batch: its gradient is rounding errors
            assert difference(p, q)[0] < 1e-5
    model.eval(), other.eval()
    with torch.no_grad():
        assert difference(run(x), other(x))[0] < 1e-5


def test_bf16_in_channels_last() -> None:
    model = made(resnet).to(torch.bfloat16).to(memory_format=torch.channels_last)
    run = torch.compile(
        model, backend="pybigmodel", fullgraph=True, mode="max-autotune-no-cudagraphs"
    )
    x = input_of(model).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        exact = exact_of(model, x)
        theirs = difference(model(x).logits.double(), exact)[0]
        y, code = code_of(run, x)
        assert y.dtype == torch.bfloat16
        assert difference(y.double(), exact)[0] < 2 * theirs
    assert layouts_in(code) == [True] * 15


def test_attention_is_ours_within_sdpa(ours: Callable[[Callable[[], Any]], bool]) -> None:
    attend = torch.compile(F.scaled_dot_product_attention, backend="pybigmodel", fullgraph=True)
    q = torch.randn(1, 2, 64, 32)
    with torch.no_grad(), pbm.sdpa():
        attend(q, q, q)
        assert ours(lambda: attend(q, q, q))
