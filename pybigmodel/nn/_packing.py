"""Packed copies of weights that may change: used only while the weight is what it was.

A copy belongs to one Parameter object and to the memory it was made from, and these say that it is
current:

- the Parameter's version counter, which every op of torch moves that writes in place, except the
  fused optimizers (torch 2.13: `_fused_adam_` and its like) and writes through `.data`;
- no optimizer has made a step since (a hook on every torch.optim.Optimizer drops all copies: what
  it steps may be a flat buffer that the weights are views of, or a master copy);
- address, shape and strides, for `.data = ...` and conversions. When its memory is freed the copy
  goes, so that no other weight can appear at the same address;
- the bits of 16 elements spread over the weight, for what moves none of these: writes through
  `.data`, numpy or a raw pointer. They change with any update of the whole weight, as target
  networks and averages make; an edit of a few elements they may miss.

Weights in shared memory and inference tensors, which have no version counter, are not cached but
packed at each call, and layers forget their copy at `train()`, `eval()`, every conversion, and when
they get another Parameter. After an edit of a few elements through `.data` in between, call
`Linear.forget_packed()`.
"""

from __future__ import annotations

import ctypes
import operator
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.flop_counter import register_flop_formula

from pybigmodel._torch_private import below_autocast, dispatch_modes, jit_tracing_state
from pybigmodel.ops import _checks as check
from pybigmodel.ops import _flops
from pybigmodel.ops._autocast import cast
from pybigmodel.ops._common import has_width

_STALE = -1  # no version counter gets there
# Elements (of 4 bytes) compared at each call. Each may be a cache miss: 64 of them took a tenth of
# the time of a 768×768 product with one row.
_SAMPLES = 16


class ConvKey(NamedTuple):
    """Which copy of a convolution's weight: the codes of the ops."""

    groups: int
    precision: int
    algorithm: int


# Which copy: a precision code, plus this for a weight rounded to float16, as autocast does. Of some
# rows that do not fill panels: with the first of them and the end.
ROUNDED_TO_FP16 = 2
Key: TypeAlias = int | tuple[int, int, int] | ConvKey

_ops = torch.ops.pybigmodel
_linear = _ops.linear.default
_linear_packed = _ops.linear_packed.default
_pack_linear_weight = _ops.pack_linear_weight.default
_pack_conv_weight = _ops.pack_conv_weight.default


class Packed:
    """The packed copies of one Parameter, by key."""

    __slots__ = (
        *("_address", "_bits", "_contiguous", "_id", "_sample", "_storage", "_stride"),
        *("__weakref__", "copies", "dtype", "in_shape", "out_features", "shape", "version"),
    )

    def __init__(self) -> None:
        self._id = self._address = 0
        self.shape: tuple[int, ...] = ()
        self._stride: tuple[int, ...] = ()
        self._contiguous = True
        self._storage: weakref.ref[torch.UntypedStorage] | None = None
        self._sample = self._bits = memoryview(b"")
        self.dtype: torch.dtype | None = None
        self.version = _STALE
        self.out_features = 0
        self.in_shape: tuple[int, ...] = ()  # the last dimension of inputs
        self.copies: dict[Key, Tensor] = {}

    @classmethod
    def of(cls, weight: Tensor) -> Packed:
        """An entry for the weight as it is now, without copies yet."""
        self = cls()
        # No reference to the Parameter, not even a weak one, which would bar swap_tensors; and a
        # weak one to its storage, so that an entry does not keep the weight's memory.
        self._id = id(weight)
        self._storage = weakref.ref(weight.untyped_storage(), partial(_freed, self._id))
        self._address = weight.data_ptr()
        self.shape, self._stride = weight.shape, weight.stride()
        self._contiguous = weight.is_contiguous()
        self._sample = _sample(weight)
        self._bits = _copy_of(self._sample)
        self.dtype = weight.dtype
        self.version = weight._version
        self.out_features = weight.shape[0]
        self.in_shape = weight.shape[1:]
        return self

    def is_current(self, weight: Any) -> bool:
        """Whether the copies are of `weight` as it is now."""
        return (
            id(weight) == self._id  # not of None, a layer's whose weight became computed
            and weight._version == self.version
            and weight.shape == self.shape
            and weight.is_contiguous() == self._contiguous
            and (self._contiguous or weight.stride() == self._stride)
            and weight.dtype is self.dtype
            # Before the sample: it reads this address.
            and weight.data_ptr() == self._address
            and self._sample == self._bits
        )

    def discard(self) -> None:
        """No longer current, whoever holds it, and without its copies."""
        self.version = _STALE
        self.copies = {}  # another dict: a thread may be reading the first

    # A copied or unpickled layer has another weight and packs it when it first runs.
    def __deepcopy__(self, memo: dict[int, Any]) -> Packed:
        return NOT_PACKED

    def __reduce__(self) -> tuple[Callable[[], Packed], tuple[()]]:
        return _not_packed, ()


class Marks:
    """Several tensors, as they were, without a reference to them.

    Shapes and strides are not among the marks. Who keeps these must drop them when the memory of
    one is freed: another tensor could appear in its place.
    """

    __slots__ = ("_addresses", "_bits", "_ids", "_samples", "_steps", "_versions")

    def __init__(self, tensors: list[Tensor]) -> None:
        self._ids = list(map(id, tensors))
        self._steps = _steps
        self._versions = list(map(_version, tensors))
        self._addresses = list(map(Tensor.data_ptr, tensors))
        self._samples = list(map(_sample, tensors))
        self._bits = list(map(_copy_of, self._samples))

    def are_of(self, tensors: list[Tensor]) -> bool:
        """Whether these are the same, and as they were; a step of an optimizer counts for a change,
        as it does above."""
        return list(map(id, tensors)) == self._ids and self._stand(tensors)

    def _stand(self, tensors: list[Tensor]) -> bool:
        return (
            self._steps == _steps
            and list(map(_version, tensors)) == self._versions
            # Before the samples: they read these addresses.
            and list(map(Tensor.data_ptr, tensors)) == self._addresses
            and self._samples == self._bits
        )

    def differing(self, other: Marks) -> list[int]:
        """Which tensors are others than in earlier marks, or not as they were."""
        if self._steps != other._steps:
            return list(range(len(self._ids)))
        return [
            i
            for i, (one, was) in enumerate(zip(self._each(), other._each(), strict=True))
            if one != was
        ]

    def _each(self) -> Iterator[tuple[Any, ...]]:
        return zip(self._ids, self._versions, self._addresses, self._bits, strict=True)


class Sources(Marks):
    """What a copy was made from that is kept elsewhere.

    The first may have any shape; the others are vectors or None. All are held, so that each is
    known by its identity.
    """

    __slots__ = ("_first", "_tensors", "_there")

    def __init__(self, tensors: tuple[Tensor | None, ...]) -> None:
        self._tensors = tensors
        self._there = there = [tensor for tensor in tensors if tensor is not None]
        self._first = there[0].shape, there[0].stride()
        super().__init__(there)

    def are_current(self, tensors: tuple[Tensor | None, ...]) -> bool:
        """Whether these are the same, and as they were."""
        if not all(map(operator.is_, tensors, self._tensors)):
            return False
        there, (shape, stride) = self._there, self._first
        return there[0].shape == shape and there[0].stride() == stride and self._stand(there)


def _sample(weight: Tensor) -> memoryview:
    """A strided view of about _SAMPLES words of the memory that the weight spans."""
    if not weight.numel():
        return memoryview(b"")
    steps = zip(weight.shape, weight.stride(), strict=True)
    span = sum((size - 1) * stride for size, stride in steps) + 1
    nbytes = span * weight.element_size()
    if nbytes < 4:
        return memoryview((ctypes.c_char * nbytes).from_address(weight.data_ptr())).cast("B")
    words = nbytes // 4
    # Odd, so that the samples of a weight whose rows are a power of two are not all of one column.
    step = (words // _SAMPLES) | 1
    view = memoryview((ctypes.c_char * (4 * words)).from_address(weight.data_ptr()))
    # The native format: views of it are compared in a third of the time that a copy takes.
    return view.cast("B").cast("i")[::step]


def _copy_of(sample: memoryview) -> memoryview:
    return memoryview(sample.tobytes()).cast(sample.format)  # type: ignore[call-overload,no-any-return]


_version = operator.attrgetter("_version")
NOT_PACKED = Packed()
_steps = 0  # of all optimizers
_entries: dict[int, Packed] = {}  # by id of the Parameter; tied layers find the same entry
# Who keeps copies elsewhere and is told what to forget.
_keepers: weakref.WeakSet[Any] = weakref.WeakSet()


def _not_packed() -> Packed:
    return NOT_PACKED


def _freed(key: int, storage: weakref.ref[torch.UntypedStorage]) -> None:
    entry = _entries.get(key)
    if entry is not None and entry._storage is storage:
        del _entries[key]
        entry.discard()


def cacheable(weight: Tensor, kinds: tuple[type, ...] = (Parameter,)) -> bool:
    """Whether changes of this weight can be noticed, and this call computes real values."""
    return (
        type(weight) in kinds  # not a DTensor, a functorch wrapper or a compiled graph's buffer
        and weight.device.type == "cpu"
        and weight.layout is torch.strided
        and not weight.is_inference()
        and dispatch_modes() == 0  # fake tensors, tracing, counting modes
        and jit_tracing_state() is None  # torch.jit.trace would bake the copy in
        and not weight.is_shared()
    )


def packed_for(weight: Tensor, key: Key) -> tuple[Packed, Tensor]:
    """The current entry of a cacheable weight, and its copy of this key."""
    # The state first, then the copy: a change in between makes the entry out of date, not wrong.
    entry = watched(weight)
    copy = entry.copies.get(key)
    if copy is None:
        entry.copies[key] = copy = pack(weight, key)
    return entry, copy


def watched(tensor: Tensor) -> Packed:
    """The current entry of a cacheable tensor, with the copies that it has."""
    entry = _entries.get(id(tensor), NOT_PACKED)
    if not entry.is_current(tensor):
        if entry is not NOT_PACKED:
            entry.discard()
        entry = _entries[id(tensor)] = Packed.of(tensor)
    return entry


def entry_of(weight: Tensor) -> Packed:
    """What is known of this weight, current or not."""
    return _entries.get(id(weight), NOT_PACKED)


def packed_rows(weight: Tensor, key: int, start: int = 0, stop: int | None = None) -> Tensor:
    """The copy of a cacheable weight's rows from start to stop: part of the whole one, where their
    panels are theirs alone."""
    rows = weight.shape[0]
    stop = rows if stop is None else stop
    if start % check.PANEL or (stop % check.PANEL and stop != rows):
        return packed_for(weight, (key, start, stop))[1]
    whole = packed_for(weight, key)[1]
    if stop - start == rows:
        return whole
    return whole[start // check.PANEL : check.ceil_div(stop, check.PANEL)]


def pack(weight: Tensor, key: Key) -> Tensor:
    """The copy of this key, which nobody keeps."""
    # Outside inference mode: the copy outlives this call and is used in any mode.
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(key, ConvKey):
            return pack_filters(weight, key)
        if isinstance(key, tuple):
            key, start, stop = key
            weight = weight[start:stop]
        if key >= ROUNDED_TO_FP16:
            weight = weight.to(torch.float16)
        packed: Tensor = _pack_linear_weight(weight, key % ROUNDED_TO_FP16)
    return packed


def pack_filters(weight: Tensor, key: ConvKey) -> Tensor:
    packed: Tensor = _pack_conv_weight(weight, *key)
    return packed


def forget(weight: Tensor | None) -> None:
    """Drop the packed copies of this weight; the next call packs again."""
    entry = _entries.pop(id(weight), None)
    if entry is not None:
        entry.discard()
    for keeper in list(_keepers):
        keeper.forget(id(weight))


def tell_what_to_forget(keeper: Any) -> None:
    """Have `keeper.forget(id of the weight)` called where copies are dropped by hand."""
    _keepers.add(keeper)


def _after_optimizer_step(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    # A compiled step moves the counters itself: of what it steps, not of what shares its memory.
    if not torch.compiler.is_compiling():
        global _steps
        _steps += 1
        while _entries:
            _entries.popitem()[1].discard()


register_optimizer_step_post_hook(_after_optimizer_step)


def moment(weight: Tensor) -> tuple[int, int]:
    """What moves when training changes the weight: a hint, which is_current must confirm."""
    return weight._version, _steps


# --- linear_cached: the product with the packed copy, looked up when it runs ---------------------
#
# Dynamo cannot guard on a version counter, and a guard would recompile after every optimizer step.
# So the graph holds the weight, and this op looks its packed copy up when it runs. It is Python's,
# since only Python sees the identity of a Parameter; exported programs, which may run without
# Python, hold `linear` instead. It has no gradient. Its precision may have ROUNDED_TO_FP16 added.

_library = torch.library.Library("pybigmodel", "FRAGMENT")
_library.define(
    "linear_cached(Tensor input, Tensor weight, Tensor? bias, int precision, int start=0, "
    "int? stop=None) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def linear_as_packed(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    y: Tensor
    if not has_width(input, weight.shape[1]):  # the packed weight knows its width to 2 only
        check.check_input("linear", input)
        check.check_matrix("linear", input, weight)
    if not cacheable(weight) and input.dtype == weight.dtype:
        y = _linear(input, weight[start:stop], bias, precision)
    else:  # of another dtype: under autocast
        if cacheable(weight):
            copy = packed_rows(weight, precision, start, stop)
        else:
            copy = pack(weight[start:stop], precision)
        y = _linear_packed(input, copy, rows_of(weight, start, stop), bias, None, 0)
    return y


def rows_of(weight: Tensor, start: int, stop: int | None) -> int:
    return (weight.shape[0] if stop is None else stop) - start


def _autocast_key(weight: Tensor, precision: int, dtype: torch.dtype) -> int:
    """The packed copy that gives what `linear` gives of the weight cast to autocast's dtype."""
    if dtype == torch.bfloat16:
        return 1
    return precision if weight.dtype == dtype else precision + ROUNDED_TO_FP16


def linear_under_autocast(
    product: Callable[..., Tensor],
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: int,
    *rows: int | None,
) -> Tensor:
    """What `product`, the op or what it does, gives of what autocast casts."""
    dtype = torch.get_autocast_dtype("cpu")
    input, bias = cast(input, "cpu", dtype), cast(bias, "cpu", dtype)
    with below_autocast("cpu"):
        return product(input, weight, bias, _autocast_key(weight, precision, dtype), *rows)


linear_cached = _ops.linear_cached.default
_library.impl("linear_cached", linear_as_packed, "CPU")
_library.impl("linear_cached", partial(linear_under_autocast, linear_cached), "AutocastCPU")


def _linear_cached_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: int,
    start: int = 0,
    stop: int | None = None,
) -> Tensor:
    rows = rows_of(weight, start, stop)
    check.check_input("linear", input)
    check.check_matrix("linear", input, weight)
    check.check_bias("linear", input, rows, bias)
    check.check_range("linear", "precision", precision, 2 * ROUNDED_TO_FP16)
    return input.new_empty((*input.shape[:-1], rows))


def _linear_cached_flops(
    input: _flops.Shape,
    weight: _flops.Shape,
    bias: _flops.Shape | None,
    precision: int,
    start: int = 0,
    stop: int | None = None,
    **kwargs: Any,
) -> int:
    return _flops.linear(input, ((weight[0] if stop is None else stop) - start, weight[1]))


torch.library.register_fake("pybigmodel::linear_cached", _linear_cached_fake, lib=_library)
register_flop_formula(_ops.linear_cached)(_linear_cached_flops)
