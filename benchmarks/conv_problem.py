"""What problems of convolutions have in common: square images, one filter for each channel out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch
from problem import Problem
from torch import Tensor, nn

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class ConvProblem(Problem):
    """x of (B, C, H, H) to N channels by K×K at stride S; `copies` are of x."""

    layer: ClassVar[type[nn.Module]]  # torch's
    torch_function: ClassVar[str]

    b: int
    c: int
    n: int
    h: int
    k: int
    s: int = 1

    @property
    def shape(self) -> str:
        return " ".join(f"{name}{getattr(self, name.lower())}" for name in "BCNHKS")

    @property
    def trains(self) -> bool:
        """Whether a call is forward and backward."""
        return self.op.endswith("_forward_backward")

    @property
    def groups(self) -> int:
        return 1

    @property
    def input_shape(self) -> Shape:
        return self.b, self.c, self.h, self.h

    @property
    @abstractmethod
    def weight_shape(self) -> Shape:
        """As torch's layer has it."""

    @property
    @abstractmethod
    def output_shape(self) -> Shape:
        """With the batch."""

    @property
    @abstractmethod
    def terms(self) -> float:
        """Products in the sum of one output, on average."""

    @property
    @abstractmethod
    def geometry(self) -> dict[str, Any]:
        """What torch's functions and layers take beside the tensors."""

    @property
    def function(self) -> Callable[..., Tensor]:
        """torch's, of x, weight and bias."""
        return partial(getattr(nn.functional, self.torch_function), **self.geometry)

    @property
    def is_image(self) -> bool:
        """Whether x is the model's input, which wants no gradient."""
        return self.c <= 3

    @property
    def operations(self) -> float:
        """Of the direct algorithm, so that Winograd's may exceed the peak."""
        forward = 2.0 * torch.Size(self.output_shape).numel() * self.terms
        if not self.trains:
            return forward
        return forward * (2 if self.is_image else 3)

    @cached_property
    def data(self) -> ConvData:
        return ConvData(self)


class ConvData:
    """Standard normal x, bias and output gradient, weights of variance 1 / (their sum's length)."""

    def __init__(self, problem: ConvProblem) -> None:
        self._problem = problem
        generator = torch.Generator().manual_seed(hash((problem.input_shape, problem.weight_shape)))
        self.x = torch.randn(problem.input_shape, generator=generator)
        self.weight = torch.randn(problem.weight_shape, generator=generator) * problem.terms**-0.5
        self.bias = torch.randn(problem.n, generator=generator)
        self.grad = torch.randn(problem.output_shape, generator=generator)

    @cached_property
    def exact(self) -> Tensor:
        """The result in float64."""
        return self._problem.function(*(t.double() for t in (self.x, self.weight, self.bias)))

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """In float64, of weight and bias, and of x before them where it wants one."""
        tensors = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        with torch.enable_grad():
            y = self._problem.function(*tensors)
        wanted = tensors[1:] if self._problem.is_image else tensors
        return list(torch.autograd.grad(y, wanted, self.grad.double()))
