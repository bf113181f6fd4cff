"""Convolutional networks whole: the models, images for them, and how far their answers agree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import ClassVar

import torch
from peers import Errors
from problem import Problem
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

SIZE = 224
COMPARED = 200  # images whose answers are compared
Logits = Callable[[Tensor], Tensor]


def _resnet50() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000))


def _mobilenetv2(tensorflow: bool = False) -> nn.Module:
    """tensorflow: asymmetric padding before its convolutions, as its published weights want it;
    otherwise symmetric and within them."""
    from transformers import MobileNetV2Config, MobileNetV2ForImageClassification

    config = MobileNetV2Config(num_labels=1000, tf_padding=tensorflow)
    return MobileNetV2ForImageClassification(config)


_MODELS: dict[str, Callable[[], nn.Module]] = {
    "resnet50": _resnet50,
    "mobilenetv2": _mobilenetv2,
    "mobilenetv2tf": lambda: _mobilenetv2(tensorflow=True),
}


class Classifier(nn.Module):
    """Images to logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


@cache
def images(count: int, seed: int = 0) -> Tensor:
    """Smooth random fields under noise: of noise alone all images look alike to a network."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(count, 3, 7, 7, generator=generator)
    smooth = nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")
    return smooth + 0.3 * torch.randn(smooth.shape, generator=generator)


@cache
def classifier(name: str) -> Classifier:
    """With random weights; its normalisations have scales, shifts and the statistics of images.

    Its answers differ from image to image: what all of them share is taken out of the last bias.
    """
    torch.manual_seed(0)
    model = Classifier(_MODELS[name]()).requires_grad_(False)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.weight.uniform_(0.5, 1.5)
            layer.bias.normal_(std=0.2)
            layer.momentum = None  # their running statistics are then those of all they have seen
    seen = images(32, seed=1)
    model.train()(seen)
    *_, last = (layer for layer in model.modules() if isinstance(layer, nn.Linear))
    last.bias -= model.eval()(seen).mean(0)
    return model


@dataclass(frozen=True)
class Vision(Problem):
    """`b` images through a model; each provider has its own precision."""

    family: ClassVar[str] = "vision"

    model: str
    b: int

    @property
    def shape(self) -> str:
        return f"{self.model} B{self.b}"

    @property
    def operations(self) -> float:
        """Of convolutions and linear layers, by the direct algorithm."""
        with FlopCounterMode(display=False) as counter:
            self.data.original(self.data.input)
        return float(counter.get_total_flops())

    @property
    def quick(self) -> bool:
        return self.model == "mobilenetv2"

    @cached_property
    def data(self) -> VisionData:
        return VisionData(self)


class VisionData:
    def __init__(self, problem: Vision) -> None:
        self._b = problem.b
        self.original = classifier(problem.model)
        self.input = images(COMPARED)[: problem.b]

    def copy(self) -> Classifier:
        return copy.deepcopy(self.original)

    def batches(self) -> Iterator[Tensor]:
        """All images that are compared, in inputs of the problem's size."""
        yield from images(COMPARED).split(self._b)

    def answers(self, logits: Logits) -> Tensor:
        """A copy of each call's logits, which may be the same buffer."""
        return torch.cat([logits(batch).double().clone() for batch in self.batches()])

    @cached_property
    def exact(self) -> Tensor:
        """Of the first input."""
        logits: Tensor = self.copy().double()(self.input.double())
        return logits

    @cached_property
    def eager(self) -> Tensor:
        return self.answers(self.original)

    def errors(self, logits: Logits) -> Errors:
        """Relative to float64 for the first input, to eager for all images."""
        found = self.answers(logits)
        errors = Errors.of([found[: self._b]], [self.exact])
        agreement = (found.argmax(1) == self.eager.argmax(1)).double().mean()
        cosine = nn.functional.cosine_similarity(found, self.eager, dim=1).mean()
        return Errors(errors.relative, errors.largest, float(cosine), float(agreement))
