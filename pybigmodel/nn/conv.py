"""torch.nn's convolutions on this library's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import (
    autocast_enabled,
    dispatch_modes,
    forward_ad,
    jit_tracing_state,
)
from pybigmodel.nn._conv_fold import packed_fold
from pybigmodel.nn._conv_layer import STATE as STATE
from pybigmodel.nn._conv_layer import ConvLayer, are_channels_last, is_single
from pybigmodel.nn._conv_plan import (
    MOST,
    Plan,
    algorithm_of,
    conv_cached,
    conv_op,
    conv_transpose_op,
    pad_in_mode,
    padding_of,
)
from pybigmodel.nn._packing import ConvKey, cacheable, packed_for
from pybigmodel.nn._product import is_traced, wants_gradient
from pybigmodel.ops._common import (
    refuse_forward_mode,
)

_is_grad_enabled = torch.is_grad_enabled
_MISSING = object()


class _Conv(ConvLayer):
    """Convolutions that go forward."""

    def forward(self, input: Tensor) -> Tensor:
        if self.padding_mode != "zeros":
            input = pad_in_mode(self, input)
        if is_dynamo_compiling():
            return self._general(input)
        # One condition a line, the likeliest to fail first, as in pybigmodel.nn.Linear.
        packed = self._packed
        parameters = self._parameters
        weight: Any = parameters.get("weight")
        bias: Any = parameters.get("bias", _MISSING)
        if (
            not _is_grad_enabled()
            and jit_tracing_state() is None
            and packed.is_current(weight)
            and bias is not _MISSING
            and input.dtype is packed.dtype
            and not input.is_nested
            and not autocast_enabled()
            and dispatch_modes() == 0
            and forward_ad._current_level < 0
        ):
            shape = input.shape
            plan: Plan | None = self._plans.get(
                shape if self._channels_last else (shape, input.stride())
            )
            copy = None if plan is None else packed.copies.get(plan.key)
            if plan is not None and copy is not None and plan.weight_shape == packed.shape:
                try:
                    return plan.run(input, copy, bias)
                except NotImplementedError as error:
                    raise self._named(error, input=input, weight=weight, bias=bias) from error
        return self._general(input)

    def _general(self, input: Tensor) -> Tensor:
        # As torch's reads them: a parametrization or an old-style hook may compute them.
        weight, bias = self.weight, self.bias
        if is_traced(input):
            return self._traced(input, weight, bias)
        if forward_ad._current_level >= 0:
            name = f"pybigmodel.nn.{type(self).__name__}"
            refuse_forward_mode(name, input=input, weight=weight, bias=bias)
        try:
            if (
                cacheable(weight)
                and not input.is_nested
                and self._fits(input, weight)
                and not wants_gradient(input, weight, bias)
                and not autocast_enabled()
            ):
                return self._with_packed(input, weight, bias)
            return self._unpacked(input, weight, bias)
        except (NotImplementedError, RuntimeError) as error:
            named = self._named(error, input=input, weight=weight, bias=bias)
            if named is error:
                raise
            raise named from error

    def _fits(self, input: Tensor, weight: Tensor) -> bool:
        """Whether the input is what the layer takes, with a batch dimension."""
        return (
            input.dtype == weight.dtype
            and input.dim() == weight.dim()
            and input.shape[1] == self.groups * weight.shape[1]
        )

    def _with_packed(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        plan = self._plan(input, weight)
        self.__dict__["_packed"], copy = packed_for(weight, plan.key)
        return plan.run(input, copy, bias)

    def _plan(self, input: Tensor, weight: Tensor) -> Plan:
        key = input.shape if self._channels_last else (input.shape, input.stride())
        plan: Plan | None = self._plans.get(key)
        if (
            plan is None
            or plan.dtype is not weight.dtype
            or plan.weight_shape != weight.shape  # assigned through `.data`, or swapped
        ):
            plan = Plan(self, input, weight)
            if len(self._plans) >= MOST:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    # --- in a chain (_conv_chain.py) --------------------------------------------------------------

    def _weight_for(self, x: Tensor) -> Any:
        weight: Any = self._parameters.get("weight")
        return weight if weight is not None and self._fits(x, weight) else None

    def _new_plan(self, x: Tensor, weight: Any, extra: tuple[int, ...]) -> Plan:
        return Plan(self, x, weight, extra)

    def _operands(self, weight: Any, key: ConvKey) -> tuple[Tensor, Any] | None:
        """The op's weight and bias; None where changes could not be noticed."""
        bias = self._parameters.get("bias")
        if self._packed.is_current(weight):
            copy = self._packed.copies.get(key)
            if copy is not None:
                return copy, bias
        if not cacheable(weight):
            return None
        self.__dict__["_packed"], copy = packed_for(weight, key)
        return copy, bias

    def _sources(self, weight: Any) -> tuple[Any, ...]:
        return weight, self._parameters.get("bias")

    def _folded(self, sources: tuple[Any, ...], eps: float, key: ConvKey) -> tuple[Tensor, Tensor]:
        """The operands with a norm in them."""
        return packed_fold(sources, eps, key)

    def _unpacked(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        single = is_single(input, weight)
        if single:
            input = input.unsqueeze(0)
        channels_last = self._is_channels_last(input, weight)
        y: Tensor = conv_op(
            *(input, weight, bias, list(self.stride), padding_of(self), list(self.dilation)),
            *(self.groups, self._precision, algorithm_of(self, input, channels_last)),
            channels_last,
        )
        return y.squeeze(0) if single else y

    def _is_channels_last(self, input: Tensor, weight: Tensor) -> bool:
        if self._channels_last is not None:
            return self._channels_last
        return are_channels_last(input, weight)

    def _traced(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if (
            not torch.compiler.is_compiling()  # torch.fx
            or torch.compiler.is_exporting()
            or not isinstance(weight, nn.Parameter)  # of torch.func, which may differentiate
            or wants_gradient(input, weight, bias)
            or input.dtype != weight.dtype
            or input.dim() != weight.dim()
        ):
            return self._unpacked(input, weight, bias)
        y: Tensor = conv_cached(
            *(input, weight, bias, list(self.stride), padding_of(self), list(self.dilation)),
            *(self.groups, self._precision, self._exact, self._is_channels_last(input, weight)),
        )
        return y


class Conv1d(_Conv, nn.Conv1d):
    """Drop-in for :class:`torch.nn.Conv1d`, in inference and in training: see :class:`Conv2d`."""


class Conv2d(_Conv, nn.Conv2d):
    """Drop-in for :class:`torch.nn.Conv2d`, in inference and in training.

    ``y[n, o] = b[o] + Σ_c x[n, c] ⋆ W[o, c]`` within each group. The parameters, their names and
    the state_dict are torch's, and so is the layout of the result: channels_last where the input or
    the weight is. The weight is used in packed copies, as :class:`pybigmodel.nn.Linear` keeps them,
    and under the same conditions: one for each algorithm that the sizes of the inputs ask for (one
    for Winograd's F(4×4, 3×3) has four times the bytes of the weight, one for F(2×2, 3×3) 1.8
    times). Where a gradient is wanted, and under autocast, it is packed at each call.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype: as torch's.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32;
            tensors keep their dtype. bfloat16 weights always take the latter. May be assigned.
        algorithm: "auto", or "direct": no Winograd, whose rounding errors are some times larger
            (docs/numerics.md). May be assigned.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument.
        NotImplementedError: on a device without kernels; forward-mode derivatives.
    """


class Conv3d(_Conv, nn.Conv3d):
    """Drop-in for :class:`torch.nn.Conv3d`, in inference and in training: see :class:`Conv2d`."""


class _ConvTranspose(ConvLayer):
    """Transposed convolutions: nothing is cached, the weight is packed at each call."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        layer = type(self).__name__
        if self.padding_mode != "zeros":
            raise ValueError(f"Only `zeros` padding mode is supported for {layer}")
        weight, bias, options = self.weight, self.bias, vars(self)
        axes = len(self.kernel_size)
        geometry = [options[name] for name in ("stride", "padding", "kernel_size")]
        torchs: Any = self
        more = torchs._output_padding(input, output_size, *geometry, axes, self.dilation)
        single = is_single(input, weight)
        channels_last = self._channels_last
        if channels_last is None:
            channels_last = not single and are_channels_last(input, weight)
        try:
            y: Tensor = conv_transpose_op(
                *(input.unsqueeze(0) if single else input, weight, bias, list(self.stride)),
                *(padding_of(self), list(more), list(self.dilation), self.groups),
                *(self._precision, self._exact, channels_last),
            )
        except (NotImplementedError, RuntimeError) as error:
            named = self._named(error, input=input, weight=weight, bias=bias)
            if named is error:
                raise
            raise named from error
        return y.squeeze(0) if single else y


class ConvTranspose1d(_ConvTranspose, nn.ConvTranspose1d):
    """Drop-in for :class:`torch.nn.ConvTranspose1d`: see :class:`ConvTranspose2d`."""


class ConvTranspose2d(_ConvTranspose, nn.ConvTranspose2d):
    """Drop-in for :class:`torch.nn.ConvTranspose2d`, in inference and in training.

    Arguments, numerics, layouts and errors are those of :class:`Conv2d`; torch's rules for
    ``output_padding`` and ``output_size``. The weight is packed at each call.
    """


class ConvTranspose3d(_ConvTranspose, nn.ConvTranspose3d):
    """Drop-in for :class:`torch.nn.ConvTranspose3d`: see :class:`ConvTranspose2d`."""


# By torch's class.
CONVOLUTIONS: dict[type[nn.Module], type[ConvLayer]] = {
    nn.Conv1d: Conv1d,
    nn.Conv2d: Conv2d,
    nn.Conv3d: Conv3d,
    nn.ConvTranspose1d: ConvTranspose1d,
    nn.ConvTranspose2d: ConvTranspose2d,
    nn.ConvTranspose3d: ConvTranspose3d,
}
# Those that take in what follows them.
FORWARD = (Conv1d, Conv2d, Conv3d)
