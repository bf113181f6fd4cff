"""torch.nn's convolutions with an int8 weight, for inference."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pybigmodel._torch_private import forward_ad
from pybigmodel.nn._conv_fold import fold
from pybigmodel.nn._conv_plan import Cache, is_channels_last, is_norm, pad_in_mode
from pybigmodel.nn._int8_image import NOT_QUANTISED, Recorder
from pybigmodel.nn._int8_layer import ADVICE, Int8Layer, without_gradient
from pybigmodel.nn._int8_plan import Int8Plan, int8_conv_op, window_with
from pybigmodel.ops import pack_int8_conv_weight, quantize_weight
from pybigmodel.ops._checks import FLOAT_DTYPES, MAX_INT8_K, PANEL, ceil_div
from pybigmodel.ops._common import no_kernel, refuse_forward_mode

_is_grad_enabled = torch.is_grad_enabled
# torch's attributes, of which the arguments of the op are made.
_GEOMETRY = (
    *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    *("padding_mode", "_reversed_padding_repeated_twice"),
)
# Of layers made by `optimize`, on top of torch's attributes.
INT8_STATE = (
    *("input_scale", "input_zero_point", "output_scale", "output_zero_point", "_output_of"),
    *("_window", "_plans", "_chains", "_channels_last"),
)
_ENDS = ("input", "output")
_IN_PLANS = frozenset((*_GEOMETRY, "input_scale", "input_zero_point", "_channels_last"))


class _Int8Conv(Int8Layer):
    """What int8 convolutions of one to three axes have in common."""

    _kind: type[nn.Module]  # torch's
    _maker = "from_conv"

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str
    input_scale: float | None
    input_zero_point: int
    # What `optimize` found: that only other int8 convolutions take the result, its range, and
    # behind which steps (norm, residual, activation).
    output_scale: float | None
    output_zero_point: int
    _output_of: tuple[Any, ...] | None
    _recorder: Recorder | None = None  # while ranges are looked for
    _window: list[int]
    _plans: Cache
    _chains: Cache
    _channels_last: bool | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: str | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        kind: Any = self._kind
        geometry = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        self._set_up(kind(*geometry, False, padding_mode, device="meta"))
        self._set_empty(bias, device, dtype)

    def _set_up(self, layer: Any) -> None:
        """The geometry of torch's layer, and dynamic activations."""
        own = vars(self)
        own.update({name: getattr(layer, name) for name in _GEOMETRY})
        terms = math.prod(self._weight_shape[1:])
        if terms > MAX_INT8_K:
            raise ValueError(
                f"{type(self).__name__}: a filter must have at most {MAX_INT8_K} weights, so that "
                f"int32 sums cannot overflow; got {terms}"
            )
        own.update(input_scale=None, input_zero_point=0, _channels_last=None)
        own.update(output_scale=None, output_zero_point=0, _output_of=None)
        own.update(_plans=Cache(), _chains=Cache(), _window=window_with(self))

    @classmethod
    def from_conv(cls, convolution: nn.Module, norm: nn.Module | None = None) -> Any:
        """The layer's weight rounded to int8, symmetric per output channel; the bias is copied.

        norm: a BatchNorm over its output, with running statistics. Its factors and offsets, of
        inference, go into the scales and the bias: the integers are those without it.

        Raises:
            TypeError, ValueError: convolution or norm of another kind or width; NaN or infinity in
                the weight; more than 65793 weights a filter.
        """
        if not isinstance(convolution, cls._kind):
            raise TypeError(
                f"{cls.__name__}.from_conv: convolution must be a torch.nn.{cls._kind.__name__}, "
                f"got {type(convolution).__name__}"
            )
        layer: Any = convolution
        checked: Any = norm
        if norm is not None and (not is_norm(norm, layer) or checked.running_var is None):
            raise ValueError(
                f"{cls.__name__}.from_conv: norm must be a BatchNorm with running statistics over "
                f"the {layer.out_channels} channels of the convolution, got {norm}"
            )
        new = cls.__new__(cls)
        nn.Module.__init__(new)
        with torch.no_grad():
            new._set_up(layer)
            weight, scale = quantize_weight(layer.weight)
            bias = None if layer.bias is None else layer.bias.detach().clone()
            if norm is not None:
                n = checked
                of_norm = (n.weight, n.bias, n.running_mean, n.running_var)
                scale, bias = fold(scale, bias, *of_norm, eps=n.eps)
            new._set_buffers(new._pack(weight), scale, bias)
        new.training = layer.training
        return new

    @property
    def _weight_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _pack(self, weight: Tensor) -> Tensor:
        return pack_int8_conv_weight(weight, groups=self.groups)

    @property
    def weight(self) -> Tensor:
        """The int8 weight (out_channels, in_channels / groups, kernel…), a copy."""
        n, c, *kernel = self._weight_shape
        taps, lanes = math.prod(kernel), ceil_div(c, 4)
        panels = self.packed_weight[:, :-1]  # the last group: sums of filters
        filters = panels.reshape(self.groups, -1, taps, lanes, PANEL, 4).movedim(4, 2)
        filters = filters.reshape(self.groups, -1, taps, lanes * 4)
        part = filters[:, : n // self.groups, :, :c].reshape(n, *kernel, c)
        # clone, where contiguous() might give a view of the padded storage.
        return part.movedim(-1, 1).clone(memory_format=torch.contiguous_format)

    def calibrate(self, input: Tensor) -> None:
        """Make the activations' range static, and wide enough for this input and for zero.

        Raises:
            ValueError: the input has NaN or infinity in it.
        """
        if input.numel():
            found = torch.aminmax(input.detach())
            wider = self._quantiser_for(float(found.min), float(found.max))
            self.input_scale, self.input_zero_point = wider

    def _quantiser_for(self, low: float, high: float) -> tuple[float, int]:
        """Of a range that holds this one and what it was."""
        if not math.isfinite(high - low):
            raise ValueError(
                f"{type(self).__name__}.calibrate: input must be finite, got values in "
                f"[{low}, {high}]"
            )
        if self.input_scale is None:
            return quantiser(low, high)
        return wider_quantiser(self.input_scale, self.input_zero_point, low, high)

    def keep_layout(self) -> None:
        """Give images in the layout of the input, where `optimize` had them turned."""
        self._channels_last = None

    def forget_packed(self) -> None:
        """Drop what was made of the layer's buffers and of norms beside it."""
        vars(self).update(_plans=Cache(), _chains=Cache())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in _IN_PLANS and "_window" in vars(self):
            vars(self)["_window"] = window_with(self)
            self.forget_packed()

    def forward(self, input: Tensor) -> Tensor:
        # Python's part is short and reads no properties; Dynamo follows it.
        layer, buffers = type(self).__name__, self._buffers
        y: Tensor
        if forward_ad._current_level >= 0:
            refuse_forward_mode(f"pybigmodel.nn.{layer}", input=input)
        known = isinstance(input, Tensor)  # torch.fx comes with a proxy, which has no shape
        if known:
            self._check(input)
        if _is_grad_enabled() and input.requires_grad is True:
            y = without_gradient(input, self)
            return y
        single = known and input.dim() == len(self.kernel_size) + 1
        x = input.unsqueeze(0) if single else input
        if self.padding_mode != "zeros":
            x = pad_in_mode(self, x)
        if self._recorder is not None:
            self._recorder.given(self, x)
        last = self._channels_last
        if last is None:
            last = known and is_channels_last(x)
        packed, scale, bias = (buffers[name] for name in ("packed_weight", "weight_scale", "bias"))
        try:
            y = int8_conv_op(
                *(x, packed, scale, bias, None, self._window, self.groups, 0, 0.0),
                *(self.input_scale or 0.0, self.input_zero_point, 0.0, 0, 0.0, 0, last),
            )
        except NotImplementedError as error:
            raise no_kernel(layer, ADVICE, input=input, **buffers) from error
        return y.squeeze(0) if single else y

    def _check(self, input: Tensor) -> None:
        """What the op would not see, or not for what it is."""
        axes = len(self.kernel_size)
        if input.dtype == torch.float64:
            raise RuntimeError(
                f"pybigmodel.nn.{type(self).__name__} does not compute in float64; {ADVICE}"
            )
        # The packed weight knows its channels to 4 only; uint8 are not activations by themselves.
        if (
            input.dtype not in FLOAT_DTYPES
            or input.dim() not in (axes + 1, axes + 2)
            or input.shape[-axes - 1] != self.in_channels
        ):
            raise RuntimeError(
                f"pybigmodel.nn.{type(self).__name__}: input must be float32, bfloat16 or float16 "
                f"of shape (N, {self.in_channels}, spatial) or ({self.in_channels}, spatial) with "
                f"{axes} spatial axes, got {input.dtype} of shape {tuple(input.shape)}"
            )

    # --- in a chain (_conv_chain.py) --------------------------------------------------------------

    def _weight_for(self, x: Tensor, of_x: tuple[float, int] = NOT_QUANTISED) -> Any:
        fits = of_x[0] or x.dtype in FLOAT_DTYPES
        fits = fits and x.dim() == len(self.kernel_size) + 2
        return self._buffers["packed_weight"] if fits and x.shape[1] == self.in_channels else None

    def _new_plan(self, x: Tensor, weight: Any, extra: tuple[int, ...]) -> Int8Plan:
        return Int8Plan(self, x, weight, extra)

    def _quantiser_after(self, followed_by: Any, dtype: torch.dtype) -> tuple[float, int]:
        """Of the result where it may stay in uint8: of float32, after the steps that it was
        calibrated with."""
        if self.output_scale is None or dtype is not torch.float32:
            return NOT_QUANTISED
        if self._output_of is None:  # loaded
            vars(self)["_output_of"] = followed_by
        same = self._output_of == followed_by
        return (self.output_scale, self.output_zero_point) if same else NOT_QUANTISED

    # The packed weight has no part in these: a norm goes into the scales, and the integers stay.

    def _operands(self, weight: Any, key: Any) -> tuple[Any, Any] | None:
        return self._buffers["weight_scale"], self._buffers["bias"]

    def _sources(self, weight: Any) -> tuple[Any, ...]:
        return self._buffers["weight_scale"], self._buffers["bias"]

    def _folded(self, sources: tuple[Any, ...], eps: float, key: Any) -> tuple[Tensor, Tensor]:
        return fold(*sources, eps=eps)

    # --- state -----------------------------------------------------------------------------------

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for end in _ENDS:
            scale, zero = getattr(self, f"{end}_scale"), getattr(self, f"{end}_zero_point")
            destination[f"{prefix}{end}_scale"] = torch.tensor(math.nan if scale is None else scale)
            destination[f"{prefix}{end}_zero_point"] = torch.tensor(zero)

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
        keys = {end: (f"{prefix}{end}_scale", f"{prefix}{end}_zero_point") for end in _ENDS}
        own = {key for pair in keys.values() for key in pair}
        others = {name: value for name, value in state_dict.items() if name not in own}
        more = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(others, prefix, *more)
        self.forget_packed()
        for end, pair in keys.items():
            there = [key for key in pair if key in state_dict]
            if len(there) == len(pair):
                scale, zero = (float(state_dict[key]) for key in pair)
                self._set_quantiser(end, pair, scale, zero, error_msgs)
            elif strict or there:
                missing_keys += [key for key in pair if key not in there]

    def _set_quantiser(
        self, end: str, keys: tuple[str, str], scale: float, zero: float, error_msgs: list[str]
    ) -> None:
        if not (math.isnan(scale) or 0 < scale < math.inf) or zero not in range(256):
            error_msgs.append(
                f"{keys[0]} must be positive (or NaN: none) and {keys[1]} in [0, 255], got "
                f"{scale} and {zero}"
            )
            return
        setattr(self, f"{end}_scale", None if math.isnan(scale) else scale)
        setattr(self, f"{end}_zero_point", int(zero))
        self._output_of = None

    def extra_repr(self) -> str:
        kind: Any = self._kind
        range_ = "dynamic"
        if self.input_scale is not None:
            zero = self.input_zero_point
            range_ = f"input_scale={self.input_scale:.3g}, input_zero_point={zero}"
        return f"{kind.extra_repr(self)}, {range_}"

    # What torch's extra_repr reads.
    output_padding = property(lambda self: (0,) * len(self.kernel_size))


def quantiser(low: float, high: float) -> tuple[float, int]:
    """Scale, a float32, and zero point of uint8 over the range from low to high and zero."""
    low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        return 1.0, 0
    scale = torch.tensor(high / 255 - low / 255, dtype=torch.float32)
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return float(scale), min(255, round(-low / float(scale)))


def wider_quantiser(scale: float, zero_point: int, low: float, high: float) -> tuple[float, int]:
    """Of a range that holds this one and that of the quantiser, which stays if that suffices."""
    least, most = -zero_point * scale, (255 - zero_point) * scale
    if least <= low and high <= most:
        return scale, zero_point
    return quantiser(min(low, least), max(high, most))


class Int8Conv1d(_Int8Conv):
    """:class:`Int8Conv2d` with one spatial axis."""

    _kind = nn.Conv1d


class Int8Conv2d(_Int8Conv):
    """Convolution with int8 weights, one scale per output channel; for inference.

    ``y[n, o] = s_o·s·Σ (q − z) ⋆ w[o] + b[o]``: activations are quantised to uint8 within the op,
    with one scale and zero point for the whole tensor: of each input's range (dynamic), or static,
    once :meth:`calibrate` has seen some.

    Args:
        in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device: as torch.nn.Conv2d's; in_channels / groups times the taps of the
            kernel ≤ 65793.
        dtype: of the bias. Weight and scales are int8 and float32 always: ``half()``,
            ``bfloat16()`` and the like leave them.

    A layer made by the constructor has no weight yet: its scales are NaN, and so is its output,
    until a state_dict is loaded; :meth:`from_conv` makes one from a float layer.

    The weight is held once, in the packed layout. ``weight`` unpacks it. The state_dict holds
    ``weight_int8`` (out_channels, in_channels / groups, kernel…), ``weight_scale`` float32
    (out_channels,), ``bias``, ``input_scale`` (NaN: dynamic), ``input_zero_point``,
    ``output_scale`` (NaN: its result is floating) and ``output_zero_point``; a pickle has the same.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument; in backward, when a
            gradient through the layer is asked for (the output of a call under autograd is usable).
    """

    _kind = nn.Conv2d


class Int8Conv3d(_Int8Conv):
    """:class:`Int8Conv2d` with three spatial axes."""

    _kind = nn.Conv3d


# By torch's class.
INT8_CONVOLUTIONS: dict[type[nn.Module], type[_Int8Conv]] = {
    nn.Conv1d: Int8Conv1d,
    nn.Conv2d: Int8Conv2d,
    nn.Conv3d: Int8Conv3d,
}
