"""torch.nn.functional.scaled_dot_product_attention on pybigmodel.ops.attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import (
    composite_kernel,
    forget_kernels,
    outside_of_graphs,
    tag_compile_caches,
    traced_types,
)
from pybigmodel.integrations._left import note, why_left
from pybigmodel.ops._common import Precision, precision_code
from pybigmodel.ops.attention import attention

IMPLEMENTATION = "pybigmodel"  # in torch's registry of flash attentions

_sdpa = torch.ops.aten.scaled_dot_product_attention.default
_torch_sdpa = composite_kernel(_sdpa)


@dataclass(frozen=True, eq=False)  # equal ones may be of several registrations
class _Setting:
    enabled: bool
    precision: Precision | None = None

    @property
    def tag(self) -> str:
        return f"pybigmodel.sdpa {self.precision or ''}" if self.enabled else ""


_OFF = _Setting(False)
_in_context: ContextVar[_Setting | None] = ContextVar("pybigmodel.sdpa", default=None)


class _Kernels:
    """The registrations with torch's dispatcher, and who needs them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._library: torch.library.Library | None = None
        self._contexts = 0
        self.registered: _Setting | None = None  # for the whole process

    @outside_of_graphs("enter pybigmodel.sdpa() around the call of the compiled function")
    def enter(self) -> None:
        with self._lock:
            self._contexts += 1
            self._install()

    def leave(self) -> None:
        # The kernels stay: another thread may be in one. Where nothing asks for ours they call
        # torch's.
        with self._lock:
            self._contexts -= 1

    def register(self, setting: _Setting) -> None:
        with self._lock:
            self._install()
            self.registered = setting

    def unregister(self) -> None:
        with self._lock:
            self.registered = None
            if self._contexts == 0:
                self._library = None  # its end takes the kernels back
                forget_kernels(_sdpa)

    def _install(self) -> None:
        if self._library is None:
            library = torch.library.Library("aten", "IMPL")
            # AutogradCPU, so that our op records its own backward pass; CPU is for inference_mode.
            for key in ("AutogradCPU", "CPU"):
                library.impl(_sdpa, _kernel, key)
            self._library = library
            forget_kernels(_sdpa)


_kernels = _Kernels()


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    setting = _in_context.get() or _kernels.registered or _OFF
    if type(query) in traced_types:
        # torch.compile looks into its caches by what it traced, and that is SDPA either way.
        tag_compile_caches(setting.tag)
    if setting.enabled:
        reason = _why_left(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
        if reason is None:
            with_batch = query.dim() == 4
            if not with_batch:
                query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            out = attention(
                query,
                key,
                value,
                attn_mask=attn_mask,
                causal=is_causal,
                causal_align="top_left",
                dropout_p=dropout_p,
                scale=scale,
                precision=setting.precision,
            )
            assert isinstance(out, Tensor)
            return out if with_batch else out.squeeze(0)
        note(f"scaled_dot_product_attention with {reason}")
    y: Tensor = _torch_sdpa(
        query,
        key,
        value,
        attn_mask,
        dropout_p,
        is_causal,
        scale=scale,
        enable_gqa=enable_gqa,
    )
    return y


def _why_left(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    enable_gqa: bool,
) -> str | None:
    if mask is not None and is_causal:
        return "attn_mask beside is_causal"
    if not torch.backends.cuda.flash_sdp_enabled():
        return "flash attention turned off by torch.nn.attention.sdpa_kernel"
    return why_left(q, k, v, mask, dropout_p, enable_gqa)


@contextmanager
def sdpa(enabled: bool = True, *, precision: Precision | None = None) -> Iterator[None]:
    """Within this context F.scaled_dot_product_attention is :func:`pybigmodel.ops.attention`.

    For the thread (or the asyncio task) that enters it, whoever calls: a model, a layer of torch's,
    a C++ extension. Contexts nest, ``enabled=False`` gives torch's back for a while, and at the end
    what was before is again.

    The meaning is torch's: ``is_causal`` is aligned to the top left, ``dropout_p`` applies in
    evaluation too. What differs: which elements dropout hides (see the op), the strides of the
    result, which is contiguous, and double backward, which raises. Left to torch are float64, other
    devices, tensor subclasses, head dimensions above 256, batches or heads that broadcast, empty
    tensors, forward-mode derivatives, ``attn_mask`` beside ``is_causal`` (which torch takes or
    refuses, depending on its kernel), and everything while ``torch.nn.attention.sdpa_kernel`` turns
    flash attention off. :func:`pybigmodel.integrations.left_to_torch` counts them.

    ``torch.compile``: code whose first call is within the context has the op in its graph, backward
    pass included, and keeps it; code compiled outside has torch's, and keeps that. (After
    ``torch._dynamo.reset()`` it is compiled anew.) Within a compiled function the context breaks
    the graph, and is an error with fullgraph=True: enter it around the call. torch.vmap keeps
    torch's op. torch.export writes SDPA into its graph, which is ours if it runs in a context.

    Activation checkpointing computes attention again in the backward pass: run that within the
    context too. Outside it is torch's, which torch.utils.checkpoint raises for, or, with
    use_reentrant=True, silently differentiates in the place of what ran.

    The first context of a process registers kernels of aten::scaled_dot_product_attention for CPU
    tensors, which stay. Outside of contexts they go on to torch's at a cost of some microseconds a
    call.

    Args:
        enabled: False is torch's own.
        precision: of the products, as for the op: "bf16" computes float32 tensors in bfloat16.
    """
    if not isinstance(enabled, bool):
        raise TypeError(f"sdpa: enabled must be a bool, got {enabled!r}; precision goes by name")
    setting = _setting(enabled, precision)
    _kernels.enter()
    try:
        token = _in_context.set(setting)
        try:
            yield
        finally:
            _in_context.reset(token)  # raises in another thread than the one that entered
    finally:
        _kernels.leave()


class Registration:
    """What :func:`register_sdpa` returns."""

    def __init__(self, setting: _Setting) -> None:
        self._setting = setting

    def remove(self) -> None:
        """SDPA is torch's again, except in open contexts. Not while another thread computes it.

        Of a registration that a later one replaced it does nothing.
        """
        if _kernels.registered not in (None, self._setting):
            return
        current = getattr(torch.nn.attention, "current_flash_attention_impl", lambda: None)
        if current() == IMPLEMENTATION:
            torch.nn.attention.restore_flash_attention_impl()
        else:
            _kernels.unregister()


class _Handle:
    """What torch's registry keeps of an implementation."""

    def remove(self) -> None:
        _kernels.unregister()


def register_sdpa(*, precision: Precision | None = None) -> Registration:
    """Make F.scaled_dot_product_attention :func:`pybigmodel.ops.attention` in the whole process.

    As within :func:`sdpa`, whose contexts take precedence, but for every thread and until
    :meth:`Registration.remove`, or until another registration.

    Goes through torch's registry of flash attentions where there is one (2.11 and later), as
    "pybigmodel": ``activate_flash_attention_impl`` and ``restore_flash_attention_impl`` of
    torch.nn.attention work, and as there is one implementation at a time, FA3 or FA4 for CUDA
    tensors gives way. That registry only calls back: torch's own entries register CUDA kernels of
    the flash ops in their callback. Ours registers aten::scaled_dot_product_attention for CPU
    tensors, a level above, because torch calls a flash op on the CPU only without dropout, without
    gradients of the mask, and where the head dimensions are equal.

    Args:
        precision: of the products, as for the op.
    """
    setting = _setting(True, precision)

    def activate() -> _Handle:
        _kernels.register(setting)
        return _Handle()

    register: Callable[..., Any] | None = getattr(
        torch.nn.attention, "register_flash_attention_impl", None
    )
    if register is None:
        activate()
    else:
        register(IMPLEMENTATION, register_fn=activate)
        torch.nn.attention.activate_flash_attention_impl(IMPLEMENTATION)
    return Registration(setting)


def _setting(enabled: bool, precision: Precision | None) -> _Setting:
    if precision is not None:
        precision_code(precision)  # raises for an unknown one
    return _Setting(enabled, precision)
