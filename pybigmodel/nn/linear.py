"""torch.nn.Linear on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._C import _get_tracing_state, _is_any_autocast_enabled, _len_torch_dispatch_stack
from torch.autograd import forward_ad
from torch.compiler import is_dynamo_compiling

from pybigmodel.nn._packing import NOT_PACKED, cacheable, forget, linear_cached, packed_for
from pybigmodel.ops._autocast import cast
from pybigmodel.ops._common import PRECISIONS, precision_code

_linear = torch.ops.pybigmodel.linear.default
_linear_packed = torch.ops.pybigmodel.linear_packed.default
_is_grad_enabled = torch.is_grad_enabled
_MISSING = object()


class Linear(torch.nn.Linear):
    """Drop-in for :class:`torch.nn.Linear`, in inference and in training.

    ``y = x·Wᵀ + b``. The parameters, their names and the state_dict are torch's. Where no gradient
    is wanted the weight is used in a packed copy, made at the first call, beside the weight (as
    many bytes again; half for "bf16" of float32) and in no checkpoint; where one is, the weight is
    packed on the way and the layer differentiates.

    Args:
        in_features, out_features, bias, device, dtype: as torch's.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32;
            tensors keep their dtype. bfloat16 weights always take the latter. May be assigned.

    The packed copy is made again when the weight's version counter moves (``load_state_dict``, any
    in-place op), after an optimizer's step, when the Parameter or its data is another one, after
    ``train()``, ``eval()``, ``to()`` and the like, and when a sample of its elements has changed. A
    weight that can change unseen (in shared memory, or an inference tensor, which has no counter)
    is packed at every call. The one change that may be missed is of a few elements, through
    ``weight.data`` or a raw pointer: call :meth:`forget_packed` after it.

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
        if is_dynamo_compiling():
            return self._traced(input)
        # One condition a line, the likeliest to fail first; what none of them rules out costs
        # less than the two attribute look-ups of torch.nn.Linear.forward.
        packed = self._packed
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        bias: Any = parameters.get("bias", _MISSING)
        if (
            not _is_grad_enabled()
            and packed.is_current(weight)
            and bias is not _MISSING
            and input.dtype is weight.dtype
            and not _is_any_autocast_enabled()
            and _len_torch_dispatch_stack() == 0
            and _get_tracing_state() is None
            and forward_ad._current_level < 0
        ):
            copy = packed.copies.get(self._precision)
            if copy is not None:
                y: Tensor = _linear_packed(input, copy, packed.out_features, bias, None, 0)
                return y
        return self._general(input)

    def _general(self, input: Tensor) -> Tensor:
        if torch.compiler.is_compiling():  # export that traces without Dynamo
            return self._traced(input)
        # As torch.nn.Linear reads them: a parametrization or an old-style hook may compute them.
        weight, bias = self.weight, self.bias
        _refuse_forward_mode(input, weight, bias)
        autocast = weight.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        y: Tensor
        if (
            _wants_gradient(input, weight, bias)
            or not cacheable(weight)
            or (input.dtype != weight.dtype and not autocast)  # the op names the mismatch
        ):
            try:
                y = _linear(input, weight, bias, self._precision)
            except NotImplementedError as error:
                raise NotImplementedError(
                    f"pybigmodel.nn.Linear has no kernel for a {weight.layout} weight on device "
                    f"'{weight.device}'; "
                    "use torch.nn.Linear there (pbm.restore puts it back, and pbm.optimize "
                    "leaves such layers as they are)"
                ) from error
            return y
        precision = self._precision
        if autocast:
            dtype = torch.get_autocast_dtype("cpu")
            input = cast(input, "cpu", dtype)
            precision = precision or int(dtype == torch.bfloat16)
        self._packed = packed = packed_for(weight, precision)
        copy = packed.copies[precision]
        y = _linear_packed(input, copy, packed.out_features, bias, None, 0)
        return y

    def _traced(self, input: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        y: Tensor
        if (
            torch.compiler.is_exporting()
            or _wants_gradient(input, weight, bias)
            or (input.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"))
        ):
            y = _linear(input, weight, bias, self._precision)
        else:
            y = linear_cached(input, weight, bias, self._precision)
        return y

    def forget_packed(self) -> None:
        """Drop the packed copy of the weight; the next call makes it again."""
        self._packed = NOT_PACKED
        forget(self._parameters.get("weight"))

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


def _wants_gradient(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (
        input.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    )


def _refuse_forward_mode(input: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    if forward_ad._current_level >= 0:
        for name, tensor in (("input", input), ("weight", weight), ("bias", bias)):
            if tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None:
                raise NotImplementedError(
                    f"pybigmodel.nn.Linear: {name} is a dual tensor, and forward-mode derivatives "
                    "are not implemented; use torch.nn.Linear there"
                )
