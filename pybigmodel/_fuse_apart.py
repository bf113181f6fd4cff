"""Which layers leave what they are given as it was: a convolution may be moved behind these."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from pybigmodel.nn._activation import hooked
from pybigmodel.nn._conv_chain import CONVOLVING
from pybigmodel.nn.conv import CONVOLUTIONS
from pybigmodel.nn.pool import POOLS

# These read their input, and give memory of their own.
_READING = frozenset(
    (
        *(*CONVOLVING, *CONVOLUTIONS, *CONVOLUTIONS.values(), *POOLS, *POOLS.values()),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    )
)


def leave_alone(layers: Iterable[Any]) -> bool:
    """Whether the layers, called one on the other, do not write to what the first is given."""
    for layer in _one_by_one(layers):
        if layer is None:
            continue
        if not isinstance(layer, nn.Module) or hooked(layer):
            return False
        if type(layer) is not nn.Identity:
            return type(layer) in _READING or _begins_so(layer)
    return True


def _one_by_one(layers: Iterable[Any]) -> Iterator[Any]:
    for layer in layers:
        if _is_sequential(type(layer)) and not hooked(layer):
            yield from _one_by_one(layer._modules.values())
        else:
            yield layer


def _is_sequential(kind: Any) -> bool:
    base = kind.__bases__[1] if hasattr(kind, "_sites") else kind  # under a class of _fuse.py
    return getattr(base, "forward", None) is nn.Sequential.forward


def _begins_so(layer: Any) -> bool:
    """Of what a class of _fuse.py made one chain."""
    layers = layer._last_layers() if hasattr(type(layer), "_sites") else ()
    return bool(layers) and leave_alone(layers)
