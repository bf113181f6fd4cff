"""torch.nn.Linear with an int8 weight, for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import forward_ad
from pybigmodel.nn._int8_layer import ADVICE, Int8Layer, without_gradient
from pybigmodel.nn._product import activated, wants_gradient
from pybigmodel.ops import pack_int8_linear_weight, quantize_weight
from pybigmodel.ops._checks import MAX_INT8_K, PANEL
from pybigmodel.ops._common import (
    Activation,
    activation_code,
    has_width,
    no_kernel,
    refuse_forward_mode,
)

_int8_linear = torch.ops.pybigmodel.int8_linear.default
_int8_weight_only_linear = torch.ops.pybigmodel.int8_weight_only_linear.default
_is_grad_enabled = torch.is_grad_enabled


class Int8Linear(Int8Layer):
    """Linear layer with int8 weights, one scale per output feature; for inference.

    ``y = s_n·Σ_k x·w + b``, where x is quantised to int8 per token inside the product (dynamic), or
    taken as it is (weight only, for few tokens at a time).

    Args:
        in_features, out_features, bias, device: as torch.nn.Linear's; in_features ≤ 65793.
        dtype: of the bias. Weight and scales are int8 and float32 always: ``half()``,
            ``bfloat16()`` and the like leave them.
        weight_only: whether activations are left as they are.
        symmetric: quantise activations to [−127, 127] instead of [0, 255] with a zero point.

    A layer made by the constructor has no weight yet: its scales are NaN, and so is its output,
    until a state_dict is loaded; :meth:`from_linear` makes one from a float layer.

    The weight is held once, in the packed layout (a buffer that the state_dict leaves out), so
    there is no second copy that could be out of date. ``weight`` unpacks it. The state_dict holds
    ``weight_int8`` (out_features, in_features), ``weight_scale`` float32 (out_features,) and
    ``bias``; so does a pickle.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument; in backward, when a
            gradient through the layer is asked for (the output of a call under autograd is usable).
    """

    _maker = "from_linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        weight_only: bool = False,
        symmetric: bool = False,
    ) -> None:
        super().__init__()
        if in_features > MAX_INT8_K:
            raise ValueError(
                f"Int8Linear: in_features must be at most {MAX_INT8_K}, so that int32 sums cannot "
                f"overflow; got {in_features}"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.weight_only = weight_only
        self.symmetric = symmetric
        self._set_empty(bias, device, dtype)

    @classmethod
    def from_linear(
        cls, linear: torch.nn.Linear, *, weight_only: bool = False, symmetric: bool = False
    ) -> Int8Linear:
        """The layer's weight rounded to int8, symmetric per output feature; the bias is copied.

        Raises:
            ValueError: NaN or infinity in the weight; in_features > 65793.
        """
        with torch.no_grad():
            new = cls(
                linear.in_features,
                linear.out_features,
                bias=False,
                device="meta",
                weight_only=weight_only,
                symmetric=symmetric,
            )
            weight, scale = quantize_weight(linear.weight)
            bias = None if linear.bias is None else linear.bias.detach().clone()
            new._set_buffers(pack_int8_linear_weight(weight), scale, bias)
        new.training = linear.training
        return new

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _pack(self, weight: Tensor) -> Tensor:
        return pack_int8_linear_weight(weight)

    @property
    def weight(self) -> Tensor:
        """The int8 weight (out_features, in_features), a copy."""
        panels = self.packed_weight[:, :-1].unflatten(2, (PANEL, 4))  # the last group: column sums
        full: Tensor = panels.transpose(1, 2).flatten(2).flatten(0, 1)
        # clone, where contiguous() might give a view of the padded storage.
        part = full[: self.out_features, : self.in_features]
        return part.clone(memory_format=torch.contiguous_format)

    def forward(self, input: Tensor) -> Tensor:
        return self._run(input, 0)

    def with_activation(self, input: Tensor, activation: Activation) -> Tensor:
        """``act(y)`` of the layer's y, in one pass where no gradient is wanted; calls no hooks.

        Args:
            input: as for the layer.
            activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        """
        if wants_gradient(input):
            return activated(self.forward(input), activation)
        return self._run(input, activation_code(activation))

    def _run(self, input: Tensor, activation: int) -> Tensor:
        # Python's part is short and reads no properties; Dynamo follows it.
        buffers: dict[str, Any] = self._buffers
        y: Tensor
        if forward_ad._current_level >= 0:
            refuse_forward_mode("pybigmodel.nn.Int8Linear", input=input)
        # The packed weight knows its width to 4 only. torch.fx comes with a proxy, which has none.
        if isinstance(input, Tensor) and not has_width(input, self.in_features):
            raise RuntimeError(
                "pybigmodel.nn.Int8Linear: input's last dimension must be in_features = "
                f"{self.in_features}, got input of shape {tuple(input.shape)}"
            )
        if _is_grad_enabled() and input.requires_grad is True:
            y = without_gradient(input, self)
            return y
        packed, scale, bias = (buffers[name] for name in ("packed_weight", "weight_scale", "bias"))
        try:
            if self.weight_only:
                y = _int8_weight_only_linear(input, packed, scale, bias, None, activation)
            else:
                y = _int8_linear(input, packed, scale, bias, None, activation, self.symmetric)
        except NotImplementedError as error:
            raise no_kernel("Int8Linear", ADVICE, input=input, **buffers) from error
        except RuntimeError as error:
            if input.dtype != torch.float64:
                raise
            raise RuntimeError(
                f"pybigmodel.nn.Int8Linear does not compute in float64; {ADVICE}"
            ) from error
        return y

    def extra_repr(self) -> str:
        mode = "weight_only" if self.weight_only else "dynamic"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {mode}, symmetric={self.symmetric}"
        )
