"""A convolution, a BatchNorm, a residual and an activation, as one op in inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from pybigmodel.nn._conv_chain import convolved
from pybigmodel.nn._conv_plan import is_norm
from pybigmodel.nn.conv import CONVOLUTIONS, Conv1d, Conv2d, Conv3d
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS, Int8Conv1d, Int8Conv2d, Int8Conv3d


class _ConvBnAct(nn.Module):
    _kind: type[nn.Module]  # torch's convolution

    def __init__(
        self,
        convolution: nn.Module,
        norm: nn.Module | None = None,
        activation: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        layer: Any = convolution
        int8 = INT8_CONVOLUTIONS[self._kind]
        if not isinstance(layer, (self._kind, int8)):
            raise TypeError(
                f"{type(self).__name__}: convolution must be a torch.nn.{self._kind.__name__} or "
                f"pybigmodel.nn.{int8.__name__}, got {type(layer).__name__}"
            )
        if norm is not None and not is_norm(norm, layer):
            raise ValueError(
                f"{type(self).__name__}: norm must be a BatchNorm over the {layer.out_channels} "
                f"channels of the convolution, got {norm}"
            )
        ours = CONVOLUTIONS[self._kind]
        self.convolution = layer if isinstance(layer, (ours, int8)) else ours.from_torch(layer)
        self.norm = norm
        self.activation = activation

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = convolved(input, (self.convolution, self.norm), residual, self.activation)
        return y


class ConvBnAct2d(_ConvBnAct):
    """``act(norm(x * W + b) + r)``, in one op where no gradient is wanted.

    In eval mode the factors and offsets of the norm are folded into a packed copy of weight and
    bias, in float64 and rounded once; the copy is made again when anything that it came from has
    changed (see :class:`pybigmodel.nn.Linear`). In training mode, where gradients are recorded,
    under autocast and torch.compile, and where one of the parts has a hook, the parts are called
    one by one: it trains as they do. :func:`pybigmodel.optimize` finds such sequences in a model
    and does the same with them without replacing the modules that call them.

    Args:
        convolution: a torch.nn.Conv2d, whose Parameters are taken over, or pybigmodel.nn's; an
            Int8Conv2d has the norm folded into its scales.
        norm: a torch.nn.BatchNorm2d over its output, or None. Without running statistics it is
            called for itself.
        activation: a function or module. relu, gelu, silu, relu6, hardswish and leaky_relu are done
            in the op, others after it.

    ``forward(input, residual=None)``: residual has the output's shape and is added before the
    activation.

    Raises:
        TypeError, ValueError: convolution or norm of another kind or width.
    """

    _kind = nn.Conv2d
    convolution: Conv2d | Int8Conv2d


class ConvBnAct1d(_ConvBnAct):
    """:class:`ConvBnAct2d` of a torch.nn.Conv1d and BatchNorm1d."""

    _kind = nn.Conv1d
    convolution: Conv1d | Int8Conv1d


class ConvBnAct3d(_ConvBnAct):
    """:class:`ConvBnAct2d` of a torch.nn.Conv3d and BatchNorm3d."""

    _kind = nn.Conv3d
    convolution: Conv3d | Int8Conv3d
