"""Images in uint8 between int8 convolutions, and how it is found out which may be.

What an int8 convolution gives may stay in uint8 where only other int8 convolutions take it, as
their image, through a max pooling or not, or as a residual. It is a tensor of a class of its own,
which such layers know, and which turns into floats for whoever else asks: a changed model is
slower, not wrong. What does not ask the class sees the codes: torch.func's transforms and traced
functions that are given such a tensor from outside (within them none is made), `as_subclass` and
code in C++.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

# What says nothing of the values.
_OF_SHAPE = frozenset(
    (
        *(Tensor.dim, Tensor.numel, Tensor.size, Tensor.stride, Tensor.is_contiguous),
        *(Tensor.__len__, Tensor.ndimension, Tensor.is_complex),
        *(
            getattr(Tensor, name).__get__
            for name in ("shape", "device", "layout", "ndim", "is_nested", "requires_grad")
        ),
    )
)
_DTYPE = Tensor.dtype.__get__  # type: ignore[attr-defined]
_make_subclass = Tensor._make_subclass
NOT_QUANTISED = (0.0, 0)


# What one int8 convolution gives to others. For an int8 convolution `taken` is the tensor, its
# scale and zero point (a scale of 0: floats); `pooled` is what a pooling gives that picks some of
# the values: codes are in their order.


class Bytes(Tensor):
    """``scale·(codes − zero_point)``, float32 to all but int8 convolutions."""

    codes: Tensor
    quantiser: tuple[float, int]
    floats: Tensor | None  # once somebody has asked; from then on these are what it is

    @staticmethod
    def of(codes: Tensor, quantiser: tuple[float, int]) -> Bytes:
        image: Bytes = _make_subclass(Bytes, codes)
        image.codes, image.quantiser, image.floats = codes, quantiser, None
        return image

    def taken(self) -> tuple[Tensor, tuple[float, int]]:
        if self.floats is not None:  # which may have been changed in place
            return self.floats, NOT_QUANTISED
        return self.codes, self.quantiser

    def pooled(self, greatest: Callable[[Tensor], Tensor]) -> Tensor:
        if self.floats is not None:
            return greatest(self.floats)
        return Bytes.of(greatest(self.codes), self.quantiser)

    def as_floats(self) -> Tensor:
        if self.floats is None:
            scale, zero = self.quantiser
            self.floats = (self.codes.float() - zero) * scale
        return self.floats

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OF_SHAPE:
            return func(args[0].codes, *args[1:], **(kwargs or {}))
        if func == _DTYPE:
            return torch.float32
        return _called(func, args, kwargs, lambda image: image.as_floats())


class Seen(Tensor):
    """Floats, and the recorder that wants to know who takes them."""

    plain: Tensor
    recorder: Recorder
    producer: Any

    @staticmethod
    def of(plain: Tensor, recorder: Recorder, producer: Any) -> Seen:
        image: Seen = _make_subclass(Seen, plain)
        image.plain, image.recorder, image.producer = plain, recorder, producer
        return image

    def taken(self) -> tuple[Tensor, tuple[float, int]]:
        self.recorder.taken.add(self.producer)
        return self.plain, NOT_QUANTISED

    def pooled(self, greatest: Callable[[Tensor], Tensor]) -> Tensor:
        return Seen.of(greatest(self.plain), self.recorder, self.producer)

    def by_others(self) -> Tensor:
        self.recorder.foreign.add(self.producer)
        return self.plain

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _OF_SHAPE or func == _DTYPE:
            return func(args[0].plain, *args[1:], **(kwargs or {}))
        return _called(func, args, kwargs, lambda image: image.by_others())


def _called(func: Any, args: Any, kwargs: Any, plain: Callable[[Any], Tensor]) -> Any:
    args, kwargs = tree_map(
        lambda value: plain(value) if type(value) in IMAGES else value, (args, kwargs or {})
    )
    return func(*args, **kwargs)


IMAGES = frozenset((Bytes, Seen))


Range: TypeAlias = tuple[float, float]


class Recorder:
    """Over which ranges int8 layers are called and what they give, in runs of a model; who takes
    it."""

    def __init__(self) -> None:
        self.taken: set[Any] = set()
        self.foreign: set[Any] = set()
        self.inputs: dict[Any, Range] = {}
        self._outputs: dict[Any, Range] = {}
        self._chains: dict[Any, Any] = {}

    def given(self, layer: Any, x: Tensor) -> None:
        _widen(self.inputs, layer, x)

    def seen(self, layer: Any, chain: Any, y: Tensor) -> Tensor:
        """y, from now on watched. chain: what was done with the layer in one step."""
        if not y.numel() or y.dtype != torch.float32:
            self.foreign.add(layer)
            return y
        _widen(self._outputs, layer, y)
        if self._chains.setdefault(layer, chain) != chain:
            self.foreign.add(layer)
        return Seen.of(y, self, layer)

    def left(self, output: Any) -> None:
        """What the model itself gives is for others."""
        for leaf in tree_leaves(output):
            if isinstance(leaf, Seen):
                leaf.by_others()
            elif dataclasses.is_dataclass(leaf):
                self.left([getattr(leaf, field.name) for field in dataclasses.fields(leaf)])

    def outputs(self) -> dict[Any, tuple[Any, Range]]:
        """By layer: the chain, and the range of what int8 layers alone took."""
        alone = self.taken - self.foreign
        return {
            layer: (self._chains[layer], found)
            for layer, found in self._outputs.items()
            if layer in alone
        }


def _widen(ranges: dict[Any, Range], layer: Any, tensor: Tensor) -> None:
    if tensor.numel():
        found = torch.aminmax(tensor)
        low, high = float(found.min), float(found.max)
        known = ranges.get(layer, (low, high))
        ranges[layer] = min(low, known[0]), max(high, known[1])
