"""What the convolutions of pybigmodel.nn have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pybigmodel.nn._conv_plan import (
    Cache,
    is_channels_last,
)
from pybigmodel.nn._packing import NOT_PACKED, Packed, forget
from pybigmodel.nn._product import advice
from pybigmodel.ops._checks import FLOAT_DTYPES, name_of
from pybigmodel.ops._common import (
    PRECISIONS,
    ForwardModeError,
    no_kernel,
    precision_code,
)
from pybigmodel.ops._conv_geometry import LayerAlgorithm, is_exact

_is_grad_enabled = torch.is_grad_enabled
_MISSING = object()
# What a plan depends on, beside the input's shape and the weight's.
_GEOMETRY = frozenset(("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size"))
# Of layers made by `optimize`, on top of torch's attributes.
STATE = ("_packed", "_plans", "_chains", "_precision", "_exact", "_channels_last")


class ConvLayer(nn.Module):
    """What all convolutions here have in common, before torch's class."""

    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: Any
    weight: Any
    bias: Any
    _packed: Packed
    _plans: Cache
    _chains: Cache
    _precision: int
    _exact: bool
    _channels_last: bool | None

    def __init__(
        self,
        *args: Any,
        precision: str = "fp32",
        algorithm: LayerAlgorithm = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._set_up(precision, algorithm)

    def _set_up(self, precision: str, algorithm: str) -> None:
        """Turn what torch's constructor made into this library's."""
        vars(self).update(
            _packed=NOT_PACKED,
            _plans=Cache(),
            _chains=Cache(),
            _precision=precision_code(precision),
            _exact=is_exact(algorithm),
            _channels_last=None,
        )

    @classmethod
    def from_torch(
        cls, layer: Any, *, precision: str = "fp32", algorithm: LayerAlgorithm = "auto"
    ) -> Any:
        """A layer on the same Parameter objects as ``layer``, which is torch's of this name.

        Raises:
            ValueError: layer computes its weight (a parametrization, a hook) or has none, or is of
                another kind.
        """
        # The first of torch's: nn.Conv2d of Conv2d.
        kind: Any = next(base for base in cls.__mro__ if base.__module__ == nn.Conv1d.__module__)
        if (
            not isinstance(layer, kind)
            or layer._parameters.get("weight") is None
            or "bias" not in layer._parameters
        ):
            raise ValueError(
                f"{cls.__name__}.from_torch: layer must be a torch.nn.{kind.__name__} that holds "
                f"weight and bias as Parameters, got {type(layer).__name__} with "
                f"{sorted(layer._parameters)}"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        fresh = vars(new)
        own = {
            name: value
            for name, value in vars(layer).items()
            if name not in fresh and name not in STATE
        }
        fresh.update(own)
        new._parameters.update(layer._parameters)
        new.training = layer.training
        new._set_up(precision, algorithm)
        return new

    @property
    def precision(self) -> str:
        """What the products are computed in: "fp32" or "bf16"."""
        return next(name for name, code in PRECISIONS.items() if code == self._precision)

    @precision.setter
    def precision(self, value: str) -> None:
        self._precision = precision_code(value)
        self._forget_plans()

    @property
    def algorithm(self) -> str:
        """ "auto", or "direct": sums of products alone, no Winograd."""
        return "direct" if self._exact else "auto"

    @algorithm.setter
    def algorithm(self, value: str) -> None:
        self._exact = is_exact(value)
        self._forget_plans()

    def forget_packed(self) -> None:
        """Drop the packed copies of the weight; the next call makes them again."""
        vars(self).get("_packed", NOT_PACKED).discard()
        vars(self)["_packed"] = NOT_PACKED
        self._forget_plans()
        forget(self._parameters.get("weight"))

    def keep_layout(self) -> None:
        """Give images in the layout that torch's rule says, where `optimize` had them turned."""
        vars(self)["_channels_last"] = None
        self._forget_plans()

    def _forget_plans(self) -> None:
        # Others: a thread may be reading the first.
        vars(self).update(_plans=Cache(), _chains=Cache())

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        if name == "weight":  # assigned: versions of this Parameter and the last do not compare
            self.forget_packed()
        super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Any:
        # Between the two, weights change, perhaps through `.data`, and the copy is in the way.
        if mode != self.training:
            self.forget_packed()
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        self.forget_packed()
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _GEOMETRY and "_plans" in vars(self):
            self._forget_plans()

    def extra_repr(self) -> str:
        exact = ", algorithm='direct'" if self._exact else ""
        return f"{super().extra_repr()}, precision={self.precision!r}{exact}"

    def _named(self, error: Exception, **tensors: Tensor | None) -> Exception:
        """What to raise for what the op raised."""
        layer, weight = type(self).__name__, tensors["weight"]
        if isinstance(error, ForwardModeError):
            return error
        if isinstance(error, NotImplementedError):
            return no_kernel(layer, advice(layer), **tensors)
        if weight is None or weight.dtype in FLOAT_DTYPES:
            return error
        return RuntimeError(
            f"pybigmodel.nn.{layer} does not compute in {name_of(weight.dtype)}; {advice(layer)}"
        )


def is_single(input: Tensor, weight: Tensor) -> bool:
    """Whether the input has no batch dimension; torch.fx's proxies, which know no shape, have."""
    known = not isinstance(input, torch.fx.Proxy) and not input.is_nested
    return known and input.dim() == weight.dim() - 1


def are_channels_last(input: Tensor, weight: Tensor) -> bool:
    """Whether torch would give the result in that layout; False of torch.fx's proxies."""
    if isinstance(input, torch.fx.Proxy) or isinstance(weight, torch.fx.Proxy) or input.is_nested:
        return False
    fits = input.dim() == weight.dim()
    return (fits and is_channels_last(input)) or is_channels_last(weight)
