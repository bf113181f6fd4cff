"""What layers with int8 weights have in common: their state, copies, and the gradient they refuse.

The weight is held once, in the packed layout, a buffer that the state_dict leaves out: there it is
``weight_int8``, in torch's layout, beside its scales. A pickle is a checkpoint and has the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import applied

# In a state_dict. Not "weight", which with strict=False a float layer would load.
_KEY = "weight_int8"
ADVICE = "leave such layers out of pbm.optimize (pbm.restore puts torch's back)"


class Int8Layer(torch.nn.Module):
    """Buffers ``packed_weight``, ``weight_scale`` and ``bias``; each kind says how it packs."""

    packed_weight: Tensor
    weight_scale: Tensor
    bias: Tensor | None
    _maker = ""  # the class method that quantises a float layer

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        # To another process: the packed weight itself, so that it stays shared.
        ForkingPickler.register(cls, _send)

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        """In torch's layout."""
        raise NotImplementedError

    def _pack(self, weight: Tensor) -> Tensor:
        """An int8 weight as the layer's op reads it."""
        raise NotImplementedError

    @property
    def weight(self) -> Tensor:
        """The int8 weight in torch's layout, a copy."""
        raise NotImplementedError

    def _set_empty(self, bias: bool, device: Any, dtype: torch.dtype | None) -> None:
        """Zeros with scales that are NaN: there is no weight yet."""
        shape = self._weight_shape
        weight = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.full(shape[:1], torch.nan, dtype=torch.float32, device=device)
        zeros = torch.zeros(shape[0], dtype=dtype, device=device) if bias else None
        self._set_buffers(self._pack(weight), scale, zeros)

    def _set_buffers(self, packed_weight: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        self.register_buffer("packed_weight", packed_weight, persistent=False)
        self.register_buffer("weight_scale", scale)
        # A buffer, not a Parameter: nothing here is trained.
        self.register_buffer("bias", bias)

    def dequantized_weight(self) -> Tensor:
        """The float32 weight that the layer computes with: scale · weight."""
        weight = self.weight
        return weight * self.weight_scale.view(-1, *[1] * (weight.dim() - 1))

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
        advice = f"{type(self).__name__}.{self._maker} quantises a float layer"
        if weight is None:
            if prefix + "weight" in state_dict:
                error_msgs.append(
                    f"{key} must be in the state_dict, got {prefix}weight, a float layer's; "
                    f"{advice}"
                )
            elif strict:
                missing_keys.append(key)
            return
        shape = self._weight_shape
        if weight.dtype != torch.int8 or tuple(weight.shape) != shape:
            error_msgs.append(
                f"{key} must be int8 of shape {shape}, got {weight.dtype} of shape "
                f"{tuple(weight.shape)}; {advice}"
            )
            return
        with torch.no_grad():
            if local_metadata.get("assign_to_params_buffers", False):
                self.packed_weight = self._pack(weight)
            else:
                device = self.packed_weight.device
                self.packed_weight.copy_(self._pack(weight.to(device)))

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
            self.packed_weight = self._pack(self.packed_weight)

    def __copy__(self) -> Any:
        new = self.__new__(type(self))
        new.__dict__ = {**self.__dict__, "_buffers": {**self._buffers}}
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        new = self.__new__(type(self))
        memo[id(self)] = new
        new.__dict__ = copy.deepcopy(self.__dict__, memo)
        return new

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
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


def _send(layer: Int8Layer) -> tuple[Callable[..., Int8Layer], tuple[Any, ...]]:
    return _receive, (type(layer), vars(layer))


def _receive(kind: type[Int8Layer], state: dict[str, Any]) -> Int8Layer:
    layer = kind.__new__(kind)
    layer.__dict__ = state
    return layer


# --- the gradient that is not there -------------------------------------------------------------

_library = torch.library.Library("pybigmodel", "FRAGMENT")
_library.define(
    "refuse_gradient(Tensor grad_output, SymInt[] shape, str layer) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _refuse_gradient(grad_output: Tensor, shape: Sequence[int], layer: str) -> Tensor:
    raise RuntimeError(
        f"pybigmodel.nn.{layer} is for inference: a gradient through it was asked for. Train the "
        "float model (pbm.restore), or detach() what goes into or comes out of the layer"
    )


def _refuse_gradient_fake(grad_output: Tensor, shape: Sequence[int], layer: str) -> Tensor:
    return grad_output.new_empty(shape)


for _device in ("CPU", "CUDA"):
    _library.impl("refuse_gradient", _refuse_gradient, _device)
torch.library.register_fake("pybigmodel::refuse_gradient", _refuse_gradient_fake, lib=_library)


class _NoGradient(torch.autograd.Function):
    """The layer, with a backward that raises. An op does, so that a compiled graph may hold it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, layer: Any) -> Tensor:
        y: Tensor = layer.forward(input)  # without gradients here
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, layer = inputs
        ctx.shape, ctx.layer = input.shape, type(layer).__name__

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (grad_output,) = grad_outputs
        refuse = torch.ops.pybigmodel.refuse_gradient.default
        grad: Tensor = refuse(grad_output, ctx.shape, ctx.layer)
        return grad, None


without_gradient = applied(_NoGradient)
