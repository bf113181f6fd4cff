"""Autocast for the ops: floating arguments take autocast's dtype, as those of F.linear do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autocast

# The registrations live as long as this object.
_library = torch.library.Library("pybigmodel", "IMPL")


def cast(value: Any, device_type: str, dtype: torch.dtype) -> Any:
    """The value in autocast's dtype if autocast applies to it: floating but not float64."""
    eligible = (
        isinstance(value, Tensor)
        and value.device.type == device_type
        and value.is_floating_point()
        and value.dtype != torch.float64
    )
    return value.to(dtype) if eligible else value


def register_autocast(
    name: str,
    positions: tuple[int, ...] | Callable[[Sequence[Any]], tuple[int, ...]],
    unless_float32: tuple[int, ...] = (),
) -> None:
    """Register autocast of op ``name`` for its arguments at ``positions`` (or at those that this
    says of all arguments), and for those at ``unless_float32`` that are not float32.

    The dtype is the one current at the call; torch.library.register_autocast fixes it beforehand.
    """
    op = getattr(torch.ops.pybigmodel, name).default

    def takes(at: int, arg: Any, cast_at: tuple[int, ...]) -> bool:
        wide = isinstance(arg, Tensor) and arg.dtype == torch.float32
        return at in cast_at or (at in unless_float32 and not wide)

    for device in ("cpu", "cuda"):

        def kernel(*args: Any, device: str = device) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast_at = positions(args) if callable(positions) else positions
            with below_autocast(device):
                return op(
                    *(
                        cast(arg, device, dtype) if takes(at, arg, cast_at) else arg
                        for at, arg in enumerate(args)
                    )
                )

        _library.impl(name, kernel, f"Autocast{device.upper()}")
