"""Packed copies of weights that may change: used only while the weight is what it was.

A copy belongs to one Parameter object, and four things say that it is current:

- the Parameter's version counter, which every op of torch moves that writes in place, except the
  fused optimizers (torch 2.13: `_fused_adam_` and its like) and writes through `.data`;
- the end of an optimizer's step, for the former (a hook on every torch.optim.Optimizer);
- the address of its data: `.data = ...`, conversions. The copy keeps the storage it was made from
  alive, so that no other weight can appear at the same address;
- the bits of 16 elements spread over the weight, for what moves none of these: writes through
  `.data`, numpy or a raw pointer. They change with any update of the whole weight, as target
  networks and averages make; an edit of a few elements they may miss.

Weights in shared memory and inference tensors, which have no version counter, are not cached but
packed at each call, and layers forget their copy at `train()`, `eval()` and every conversion. After
an edit of a few elements through `.data` in between, call `Linear.forget_packed()`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook

from pybigmodel.ops._autocast import cast

_STALE = -1  # no version counter gets there
# Elements (of 4 bytes) compared at each call. Each may be a cache miss: 64 of them took a tenth of
# the time of a 768×768 product with one row.
_SAMPLES = 16

_ops = torch.ops.pybigmodel
_linear = _ops.linear.default
_linear_packed = _ops.linear_packed.default
_pack_linear_weight = _ops.pack_linear_weight.default


def _nothing() -> object:
    return _NOTHING


_NOTHING = object()


class Packed:
    """The packed copies of one Parameter, by precision code.

    Immutable but for :meth:`discard`: so threads may share it.
    """

    __slots__ = (
        *("_address", "_bits", "_parameter", "_sample", "_storage"),
        *("__weakref__", "copies", "out_features", "version"),
    )

    def __init__(self) -> None:
        self._parameter: Callable[[], Any] = _nothing
        self._address = 0
        self._storage: torch.UntypedStorage | None = None
        self._sample = memoryview(b"")
        self._bits = b""
        self.version = _STALE
        self.out_features = 0
        self.copies: dict[int, Tensor] = {}

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """An entry for the weight as it is now, without copies yet."""
        self, key = cls(), id(weight)
        # Weak: an entry must not keep its Parameter alive, nor outlive it and meet a new object
        # with the same id.
        self._parameter = weakref.ref(weight, lambda _: _entries.pop(key, None))
        self._address = weight.data_ptr()
        self._storage = weight.untyped_storage()
        self._sample = _sample(weight)
        self._bits = self._sample.tobytes()
        self.version = weight._version
        self.out_features = weight.shape[0]
        return self

    def is_current(self, weight: Any) -> bool:
        """Whether the copies are of `weight` as it is now."""
        return (
            weight is not None  # a layer's, whose weight became computed
            and self._parameter() is weight
            and weight._version == self.version
            # Before the sample: it reads this address.
            and weight.data_ptr() == self._address
            and self._sample.tobytes() == self._bits
        )

    def discard(self) -> None:
        """No longer current, whoever holds it; and no weak reference, which bars swap_tensors."""
        self.version = _STALE
        self._parameter = _nothing

    # A copied or unpickled layer has another weight and packs it when it first runs.
    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return NOT_PACKED

    def __reduce__(self) -> tuple[Callable[[], Packed], tuple[()]]:
        return _not_packed, ()


def _sample(weight: Tensor) -> memoryview:
    """A strided view of about _SAMPLES words of the memory that the weight spans."""
    if not weight.numel():
        return memoryview(b"")
    steps = zip(weight.shape, weight.stride(), strict=True)
    span = sum((size - 1) * stride for size, stride in steps) + 1
    words = span * weight.element_size() // 4
    # Odd, so that the samples of a weight whose rows are a power of two are not all of one column.
    step = (words // _SAMPLES) | 1
    return memoryview((ctypes.c_int32 * words).from_address(weight.data_ptr()))[::step]


NOT_PACKED = Packed()
_entries: dict[int, Packed] = {}  # by id of the Parameter; tied layers find the same entry


def _not_packed() -> Packed:
    return NOT_PACKED


def cacheable(weight: Tensor) -> bool:
    """Whether changes of this weight can be noticed, and this call computes real values."""
    return (
        type(weight) is Parameter  # not a DTensor, a functorch wrapper or a compiled graph's buffer
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and not weight.is_inference()
        and torch._C._len_torch_dispatch_stack() == 0  # fake tensors, tracing, counting modes
        and torch._C._get_tracing_state() is None  # torch.jit.trace would bake the copy in
        and not weight.is_shared()
    )


def packed_for(weight: Tensor, precision: int) -> Packed:
    """The entry of a cacheable weight, with the copy of this precision in it, current."""
    known = _entries.get(id(weight), NOT_PACKED)
    current = known.is_current(weight)
    if current and precision in known.copies:
        return known
    # The state first, then the copy: a change in between makes the entry out of date, not wrong.
    entry = Packed.of(weight)
    # Outside inference mode: the copy outlives this call and is used in any mode.
    with torch.inference_mode(False), torch.no_grad():
        entry.copies = {**known.copies} if current else {}
        entry.copies[precision] = _pack_linear_weight(weight, precision)
    _entries[id(weight)] = entry
    return entry


def forget(weight: Tensor | None) -> None:
    """Drop the packed copies of this weight; the next call packs again."""
    entry = _entries.pop(id(weight), None)
    if entry is not None:
        entry.discard()


def _after_optimizer_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # A compiled step writes through functional ops and moves the counters itself.
    if not torch.compiler.is_compiling() and _entries:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                forget(parameter)


register_optimizer_step_post_hook(_after_optimizer_step)


# --- linear_cached: the same lookup at the run time of a compiled graph -------------------------
#
# Dynamo cannot guard on a version counter, and a guard would recompile after every optimizer step.
# So the graph holds the weight, and this op looks its packed copy up when it runs. It is Python's,
# since only Python sees the identity of a Parameter; exported programs, which may run without
# Python, hold `linear` instead.

_library = torch.library.Library("pybigmodel", "FRAGMENT")
_library.define(
    "linear_cached(Tensor input, Tensor weight, Tensor? bias, int precision) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _linear_cached(input: Tensor, weight: Tensor, bias: Tensor | None, precision: int) -> Tensor:
    y: Tensor
    if cacheable(weight):
        packed = packed_for(weight, precision)
        copy, out_features = packed.copies[precision], packed.out_features
        y = _linear_packed(input, copy, out_features, bias, None, 0)
    elif input.dtype == weight.dtype:
        y = _linear(input, weight, bias, precision)
    else:  # under autocast
        copy = _pack_linear_weight(weight, precision)
        y = _linear_packed(input, copy, weight.shape[0], bias, None, 0)
    return y


def _linear_cached_autocast(
    input: Tensor, weight: Tensor, bias: Tensor | None, precision: int
) -> Tensor:
    dtype = torch.get_autocast_dtype("cpu")
    input = cast(input, "cpu", dtype)
    key = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)
    with torch._C._ExcludeDispatchKeyGuard(key):
        y: Tensor = linear_cached(input, weight, bias, precision or int(dtype == torch.bfloat16))
    return y


_library.impl("linear_cached", _linear_cached, "CPU")
_library.impl("linear_cached", _linear_cached_autocast, "AutocastCPU")


def _linear_cached_fake(
    input: Tensor, weight: Tensor, bias: Tensor | None, precision: int
) -> Tensor:
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"linear: input's last dimension must be in_features = {weight.shape[1]}, "
            f"got input of shape {tuple(input.shape)}"
        ),
    )
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


torch.library.register_fake("pybigmodel::linear_cached", _linear_cached_fake, lib=_library)
linear_cached = _ops.linear_cached.default
