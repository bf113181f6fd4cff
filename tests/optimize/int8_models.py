"""Small models of convolutions, for the tests of int8."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")


def randomised(model: Any) -> Any:
    """In eval mode, with statistics that say something."""
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.weight.uniform_(0.5, 1.5), norm.bias.normal_(0, 0.1)
                norm.running_mean.normal_(0, 0.1), norm.running_var.uniform_(0.5, 2.0)
    return model.eval()


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[32, 64], depths=[2, 2], num_labels=10
    )
    return transformers.ResNetForImageClassification(config)


def basic_resnet() -> nn.Module:
    config = transformers.ResNetConfig(
        **{"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [2, 2], "num_labels": 10},
        layer_type="basic",
    )
    return transformers.ResNetForImageClassification(config)


def mobilenet() -> nn.Module:
    config = transformers.MobileNetV2Config(depth_multiplier=0.35, num_labels=10)
    return transformers.MobileNetV2ForImageClassification(config)


# By name: the model, and of its convolutions how many are in int8 and how many are not.
MODELS: dict[str, tuple[Callable[[], nn.Module], int, int]] = {
    "resnet": (resnet, 15, 0),
    "resnet, basic": (basic_resnet, 11, 0),
    "mobilenet": (mobilenet, 35, 17),
}


def made(name: str) -> Any:
    torch.manual_seed(0)
    return randomised(MODELS[name][0]())


def image(batch: int = 2, size: int = 33) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def run(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)
    return getattr(y, "logits", y)
