"""torch.nn.Linear with an int8 weight, for inference."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import applied, forward_ad
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
# In a state_dict. Not "weight", which with strict=False a float layer would load.
_KEY = "weight_int8"
_ADVICE = "leave such layers out of pbm.optimize (pbm.restore puts torch's back)"


class Int8Linear(torch.nn.Module):
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

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None

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
        weight = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        scale = torch.full((out_features,), torch.nan, dtype=torch.float32, device=device)
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self._set_buffers(pack_int8_linear_weight(weight), scale, zeros)

    def _set_buffers(self, packed_weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("packed_weight", packed_weight, persistent=False)
        self.register_buffer("weight_scale", scale)
        # A buffer, not a Parameter: nothing here is trained.
        self.register_buffer("bias", bias)

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
    def weight(self) -> Tensor:
        """The int8 weight (out_features, in_features), a copy."""
        panels = self.packed_weight[:, :-1].unflatten(2, (PANEL, 4))  # the last group: column sums
        full: Tensor = panels.transpose(1, 2).flatten(2).flatten(0, 1)
        # clone, where contiguous() might give a view of the padded storage.
        part = full[: self.out_features, : self.in_features]
        return part.clone(memory_format=torch.contiguous_format)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight that the layer computes with: scale · weight."""
        return self.weight * self.weight_scale.unsqueeze(1)

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
            y = _without_gradient(input, self)
            return y
        packed, scale, bias = (buffers[name] for name in ("packed_weight", "weight_scale", "bias"))
        try:
            if self.weight_only:
                y = _int8_weight_only_linear(input, packed, scale, bias, None, activation)
            else:
                y = _int8_linear(input, packed, scale, bias, None, activation, self.symmetric)
        except NotImplementedError as error:
            raise no_kernel("Int8Linear", _ADVICE, input=input, **buffers) from error
        except RuntimeError as error:
            if input.dtype != torch.float64:
                raise
            raise RuntimeError(
                f"pybigmodel.nn.Int8Linear does not compute in float64; {_ADVICE}"
            ) from error
        return y

    # --- state -----------------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        destination[prefix + _KEY] = self.weight
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        key = prefix + _KEY
        others = {name: value for name, value in state_dict.items() if name != key}
        super()._load_from_state_dict(
            others, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        weight = state_dict.get(key)
        if weight is not None or prefix + "weight_scale" in state_dict:
            self._free_original()
        if weight is None:
            if prefix + "weight" in state_dict:
                error_msgs.append(
                    f"{key} must be in the state_dict, got {prefix}weight, a float layer's; "
                    "Int8Linear.from_linear quantises a float layer"
                )
            elif strict:
                missing_keys.append(key)
            return
        shape = (self.out_features, self.in_features)
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
            error_msgs.append(
                f"{key} must be int8 of shape {shape}, got {weight.dtype} of shape "
                f"{tuple(weight.shape)}; Int8Linear.from_linear quantises a float layer"
            )
            return
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self.packed_weight = pack_int8_linear_weight(weight)
            else:
                device = self.packed_weight.device
                self.packed_weight.copy_(pack_int8_linear_weight(weight.to(device)))

    def _free_original(self) -> None:
        """Leave of the kept float layer what int8 does not know: its dtype, what was trained."""
        original = self.__dict__.get("_original")
        if original is not None:
            weight = original.weight
            empty = weight.detach().new_empty(0)
            original.weight = torch.nn.Parameter(empty, weight.requires_grad)

    def __getstate__(self) -> dict[str, Any]:
        # A pickle is a checkpoint: no packed layout, and no float originals (see pbm.optimize).
        state = {**self.__dict__, "_buffers": {**self._buffers}}
        if "_original" in state:
            state["_original"] = None
        state["_buffers"]["packed_weight"] = self.weight
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            self.packed_weight = pack_int8_linear_weight(self.packed_weight)

    def __copy__(self) -> Int8Linear:
        new = self.__new__(type(self))
        new.__dict__ = {**self.__dict__, "_buffers": {**self._buffers}}
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Linear:
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Int8Linear:
        kept = {name: self._buffers[name] for name in ("packed_weight", "weight_scale")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = self._buffers[name]
            assert before is not None and after is not None
            if after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        original = self.__dict__.get("_original")
        if original is not None:
            original._apply(fn)
        return self

    def extra_repr(self) -> str:
        mode = "weight_only" if self.weight_only else "dynamic"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, {mode}, symmetric={self.symmetric}"
        )


# --- to another process: the packed weight itself, so that it stays shared ------------------------


def _send(layer: Int8Linear) -> tuple[Callable[..., Int8Linear], tuple[Any, ...]]:
    return _receive, (type(layer), vars(layer))


def _receive(kind: type[Int8Linear], state: dict[str, Any]) -> Int8Linear:
    layer = kind.__new__(kind)
    layer.__dict__ = state
    return layer


ForkingPickler.register(Int8Linear, _send)

# --- the gradient that is not there -------------------------------------------------------------

_library = torch.library.Library("pybigmodel", "FRAGMENT")
_library.define(
    "refuse_gradient(Tensor grad_output, int in_features) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _refuse_gradient(grad_output: Tensor, in_features: int) -> Tensor:
    raise RuntimeError(
        "pybigmodel.nn.Int8Linear is for inference: a gradient through it was asked for. Train the "
        "float model (pbm.restore), or detach() what goes into or comes out of the layer"
    )


def _refuse_gradient_fake(grad_output: Tensor, in_features: int) -> Tensor:
    return grad_output.new_empty((*grad_output.shape[:-1], in_features))


for _device in ("CPU", "CUDA"):
    _library.impl("refuse_gradient", _refuse_gradient, _device)
torch.library.register_fake("pybigmodel::refuse_gradient", _refuse_gradient_fake, lib=_library)


class _NoGradient(torch.autograd.Function):
    """The layer, with a backward that raises. An op does, so that a compiled graph may hold it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, layer: Int8Linear) -> Tensor:
        return layer.forward(input)  # without gradients here

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.in_features = inputs[1].in_features

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grad_outputs
        grad: Tensor = torch.ops.pybigmodel.refuse_gradient.default(grad_output, ctx.in_features)
        return grad, None


_without_gradient = applied(_NoGradient)
