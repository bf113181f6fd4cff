"""torch.nn.Linear on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import (
    autocast_enabled,
    dispatch_modes,
    forward_ad,
    jit_tracing_state,
)
from pybigmodel.nn._packing import NOT_PACKED, entry_of, forget
from pybigmodel.nn._product import Moments, advice, is_traced, product
from pybigmodel.ops._common import (
    PRECISIONS,
    Activation,
    activation_code,
    no_kernel,
    precision_code,
)

_linear_packed = torch.ops.pybigmodel.linear_packed.default
_is_grad_enabled = torch.is_grad_enabled
_MISSING = object()


class Linear(torch.nn.Linear):
    """Drop-in for :class:`torch.nn.Linear`, in inference and in training.

    ``y = x·Wᵀ + b``. The parameters, their names and the state_dict are torch's. The weight is used
    in a packed copy, beside it (as many bytes again; half for "bf16" of float32) and in no
    checkpoint: made at the first call where no gradient is wanted, and where one is, at the second
    with the same weight. A weight that changes at every call, as in training, is packed on the way.

    Args:
        in_features, out_features, bias, device, dtype: as torch's.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32;
            tensors keep their dtype. bfloat16 weights always take the latter. May be assigned.

    The packed copy is made again when the weight's version counter moves (``load_state_dict``, any
    in-place op), after a step of any optimizer, when the Parameter, its data, shape or strides are
    others, after ``train()``, ``eval()``, ``to()`` and the like, and when a sample of its elements
    has changed. A weight that can change unseen (in shared memory, or an inference tensor, which
    has no counter) is packed at every call. The one change that may be missed is of a few elements,
    through ``weight.data`` or a raw pointer: call :meth:`forget_packed` after it.

    Under torch.compile the copy is looked up when the graph runs; exported programs pack at each
    call.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument.
        NotImplementedError: on a device without kernels; forward-mode derivatives.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._packed = NOT_PACKED
        self._moments: Moments = {}
        self._precision = precision_code(precision)

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, *, precision: str = "fp32") -> Linear:
        """A layer on the same Parameter objects as ``linear``.

        Raises:
            ValueError: linear computes its weight (a parametrization, a hook) or has none.
        """
        if linear._parameters.get("weight") is None or "bias" not in linear._parameters:
            raise ValueError(
                "Linear.from_linear: linear must hold weight and bias as Parameters, got "
                f"{type(linear).__name__} with {sorted(linear._parameters)}"
            )
        new = cls(
            linear.in_features,
            linear.out_features,
            linear.bias is not None,
            device="meta",
            precision=precision,
        )
        new._parameters.update(linear._parameters)
        new.training = linear.training
        return new

    @property
    def precision(self) -> str:
        """What the products are computed in: "fp32" or "bf16"."""
        return next(name for name, code in PRECISIONS.items() if code == self._precision)

    @precision.setter
    def precision(self, value: str) -> None:
        self._precision = precision_code(value)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, "none")

    def with_activation(self, input: Tensor, activation: Activation) -> Tensor:
        """``act(x·Wᵀ + b)``, in one pass where no gradient is wanted; calls no hooks.

        Args:
            input: as for the layer.
            activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        """
        return self._run(input, activation)

    def _run(self, input: Tensor, activation: Activation) -> Tensor:
        if is_dynamo_compiling():
            return self._general(input, activation)
        # One condition a line, the likeliest to fail first; what none of them rules out costs
        # less than the two attribute look-ups of torch.nn.Linear.forward.
        packed = self._packed
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        bias: Any = parameters.get("bias", _MISSING)
        if (
            not _is_grad_enabled()
            and jit_tracing_state() is None  # under which shapes are tensors
            and packed.is_current(weight)
            and bias is not _MISSING
            and input.dtype is packed.dtype
            and not input.is_nested  # which may have no shape
            and input.shape[-1:] == packed.in_shape
            and not autocast_enabled()
            and dispatch_modes() == 0
            and forward_ad._current_level < 0
        ):
            copy = packed.copies.get(self._precision)
            if copy is not None:
                code = activation_code(activation)
                try:
                    y: Tensor = _linear_packed(input, copy, packed.out_features, bias, None, code)
                    return y
                except NotImplementedError as error:
                    raise no_kernel(
                        "Linear", advice("Linear"), input=input, weight=weight, bias=bias
                    ) from error
        return self._general(input, activation)

    def _general(self, input: Tensor, activation: Activation) -> Tensor:
        # As torch.nn.Linear reads them: a parametrization or an old-style hook may compute them.
        weight, bias, moments = self.weight, self.bias, self._moments
        y = product("Linear", input, weight, bias, self._precision, moments, activation=activation)
        if not is_traced(input):
            vars(self)["_packed"] = entry_of(weight)  # what assigning does, in a tenth of the time
        return y

    def forget_packed(self) -> None:
        """Drop the packed copy of the weight; the next call makes it again."""
        # Both: of a weight that is gone from here too, and of one that only compiled code packed.
        vars(self).get("_packed", NOT_PACKED).discard()
        self._packed = NOT_PACKED
        self._moments = {}
        forget(self._parameters.get("weight"))

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        if name == "weight":  # assigned: versions of this Parameter and the last do not compare
            self.forget_packed()
        super().register_parameter(name, param)

    def train(self, mode: bool = True) -> Linear:
        # Between the two, weights change, perhaps through `.data`, and the copy is in the way.
        if mode != self.training:
            self.forget_packed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Linear:
        self.forget_packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, precision={self.precision!r}"
