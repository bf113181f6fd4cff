"""Every private name of torch that this package uses, each with a substitute for a torch that has
renamed it: slower or less informed, never wrong, and no failure to import."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad as _forward_ad
from torch.compiler import is_dynamo_compiling
from torch.nn.modules import module as _module

F = TypeVar("F", bound=Callable[..., Any])


def _private(name: str, substitute: Any) -> Any:
    return getattr(torch._C, name, substitute)


_dispatch_modes: Callable[[], int] = _private("_len_torch_dispatch_stack", lambda: 1)
recording = threading.local()  # depth: how many of the modes are _record.py's, which see ours


def dispatch_modes() -> int:
    """Whether this call is seen by a mode of torch_dispatch (fake tensors, tracing, counting):
    unknown counts as seen."""
    modes = _dispatch_modes()
    return modes and modes - getattr(recording, "depth", 0)


# None outside torch.jit.trace.
jit_tracing_state: Callable[[], Any] = _private(
    "_get_tracing_state", lambda: getattr(torch.jit, "is_tracing", bool)() or None
)
# Whether torch.func transforms what is called: unknown counts as yes.
transforms_active: Callable[[], bool] = _private("_are_functorch_transforms_active", lambda: True)
autocast_enabled: Callable[[], bool] = _private(
    "_is_any_autocast_enabled",
    lambda: torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"),
)
# `_current_level` is negative outside forward-mode differentiation: unknown counts as inside.
forward_ad: Any = (
    _forward_ad if hasattr(_forward_ad, "_current_level") else SimpleNamespace(_current_level=0)
)
# Whether an op has a kernel for a dispatch key: unknown counts as yes, and the call raises.
has_kernel: Callable[[str, str], bool] = _private(
    "_dispatch_has_kernel_for_dispatch_key", lambda op, key: True
)


def is_dual(value: Any) -> bool:
    return isinstance(value, Tensor) and _forward_ad.unpack_dual(value).tangent is not None


def _autocast_guard(device: str) -> Callable[[], AbstractContextManager[Any]]:
    guard = _private("_ExcludeDispatchKeyGuard", None)
    try:
        key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
    except AttributeError:
        guard = None
    if guard is None:
        return lambda: torch.autocast(device, enabled=False)
    return lambda: guard(key)


_autocast_guards = {device: _autocast_guard(device) for device in ("cpu", "cuda")}


def below_autocast(device: str) -> AbstractContextManager[Any]:
    """The ops called within are not cast again."""
    return _autocast_guards[device]()


# What stands for a tensor while torch.compile traces; unknown: such are left to torch.
traced_types: tuple[type, ...]
try:
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor
except ImportError:
    traced_types = ()
else:
    traced_types = (FakeTensor, FunctionalTensor)


# What Dynamo writes for F.pad.
torch_pad: Any = getattr(getattr(torch._C, "_nn", None), "pad", torch.nn.functional.pad)


# Ops with a schema, and those that take functions: unknown, a target is judged by its name.
_torch_ops = getattr(torch, "_ops", None)
OpOverload: Any = getattr(_torch_ops, "OpOverload", type(None))
HigherOrderOperator: Any = getattr(_torch_ops, "HigherOrderOperator", type(None))


def storage_of(tensor: Tensor) -> int | None:
    """What is the same of fake tensors that share memory; None of subclasses that have none."""
    try:
        return int(tensor.untyped_storage()._cdata)
    except NotImplementedError:
        return None


def fake_mode_of(tensor: Tensor) -> AbstractContextManager[Any]:
    """The mode that a fake tensor belongs to: what is computed within is not computed."""
    mode: AbstractContextManager[Any] = getattr(tensor, "fake_mode", None) or nullcontext()
    return mode


def size_hint(size: Any, unknown: int = 32) -> int:
    """What a symbolic size was when it was traced, without a guard that it stays so."""
    if isinstance(size, int):
        return size
    node = getattr(size, "node", None)
    known = getattr(node, "has_hint", lambda: False)()
    return int(node.hint) if node is not None and known else unknown


def composite_kernel(op: Any) -> Callable[..., Any]:
    """What torch registered for a composite op, under whatever was registered above it since."""
    try:
        key = torch._C.DispatchKey.CompositeImplicitAutograd
        op._op_dk  # noqa: B018
    except AttributeError:
        kernel: Callable[..., Any] = op.decompose
        return kernel
    return lambda *args, **kwargs: op._op_dk(key, *args, **kwargs)


def forget_kernels(op: Any) -> None:
    """Of an op whose kernels have just changed: Python's part of the dispatcher remembers which one
    it took when it was last traced."""
    getattr(op, "_dispatch_cache", {}).clear()


def tag_compile_caches(tag: str) -> None:
    """Keep what this thread compiles from now on apart from what it compiled under another tag.

    Without torch's setting, caches on disk may return what an earlier process compiled.
    """
    config = getattr(torch.compiler, "config", None)
    if config is not None and hasattr(config, "cache_key_tag"):
        others, _, _ = config.cache_key_tag.partition(_TAG)
        wanted = f"{others}{_TAG}{tag}" if tag else others
        if config.cache_key_tag != wanted:
            config.cache_key_tag = wanted


_TAG = " pybigmodel:"


def at_trace_time(function: F) -> F:
    """torch.compile calls the function when it traces a call of it, and leaves none in the graph:
    torch.compiler.assume_constant_result, without its import of the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def outside_of_graphs(reason: str) -> Callable[[F], F]:
    """torch.compile breaks its graph at a call of the function, or says the reason:
    torch.compiler.disable, without its import of the compiler."""

    def mark(function: F) -> F:
        function._torchdynamo_disable = True  # type: ignore[attr-defined]
        function._torchdynamo_disable_msg = reason  # type: ignore[attr-defined]
        return function

    return mark


_GLOBAL_HOOKS = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
_global_hooks = [getattr(_module, f"_global_{name}", {0: None}) for name in _GLOBAL_HOOKS]


def hooked_everywhere() -> bool:
    """Whether there are hooks on all modules: unknown counts as yes."""
    return any(_global_hooks)


# --- autograd -----------------------------------------------------------------------------------


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """What Function.apply ends in, without its inspect.signature at every call, where that will do:
    outside torch.func and torch.compile."""
    apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]

    def call(*args: Any) -> Any:
        if is_dynamo_compiling() or transforms_active():
            return function.apply(*args)
        return apply(*args)

    return call


def register_function(
    library: torch.library.Library, op: Any, function: type[torch.autograd.Function]
) -> None:
    """Make `op` differentiate as `function` does, whose forward calls `below_autograd(op, ...)`.

    Where nothing is differentiated it is not entered. torch.library.register_autograd, the
    substitute, costs more at every call and cannot be used under torch.func.
    """
    try:
        kernel = _autograd_kernel(op, function)
    except AttributeError:

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            function.setup_context(ctx, inputs, output)

        torch.library.register_autograd(op.name(), function.backward, setup_context=setup_context)
    else:
        library.impl(op, kernel, "Autograd", with_keyset=True)


def _autograd_kernel(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    any_requires_grad = torch._C._any_requires_grad
    transforms_active = torch._C._are_functorch_transforms_active
    below, after = torch._C._AutoDispatchBelowAutograd, torch._C._after_autograd_keyset
    is_grad_enabled, before_transforms = torch.is_grad_enabled, _before_transforms()
    apply = applied(function)

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(map(is_dual, args)):
            function.jvp(None)  # at the latest; torch.func may call it itself
        if is_grad_enabled() and any_requires_grad(*args):
            if not transforms_active():
                return apply(*args)
            with before_transforms():
                return apply(*args)
        with below():
            return op.redispatch(keyset & after, *args)

    return kernel


def _before_transforms() -> Callable[[], AbstractContextManager[Any]]:
    """torch.func as the caller of an op has it: a Function starts from there, not from within the
    innermost transform, where the op's kernel is called."""
    guard, include = torch._C._ForceDispatchKeyGuard, torch._C._dispatch_tls_local_include_set
    exclude, key = torch._C._dispatch_tls_local_exclude_set, torch._C.DispatchKey
    keys = torch._C.DispatchKeySet(key.FuncTorchDynamicLayerFrontMode)
    for other in (key.FuncTorchGradWrapper, key.FuncTorchBatched, key.FuncTorchVmapMode):
        keys = keys.add(other)
    return lambda: guard(include(), exclude() - keys)


_below_autograd = _private("_AutoDispatchBelowAutograd", nullcontext)


def below_autograd(op: Any, *args: Any) -> Any:
    """The op without its autograd: half the time of a small call that records nothing."""
    with _below_autograd():
        return op(*args)


# --- torch.compile's backends ---------------------------------------------------------------------

_DYNAMO = "torch._dynamo.backends.registry"


def when_dynamo_is_there(name: str, backend: Callable[..., Any]) -> None:
    """Register a backend of torch.compile: now, or as soon as the compiler is imported, which takes
    a second."""
    if _DYNAMO in sys.modules:
        _register_backend(name, backend)
    else:
        sys.meta_path.insert(0, _AtImport(name, backend))


def _register_backend(name: str, backend: Callable[..., Any]) -> None:
    registry: Any = sys.modules[_DYNAMO]
    # An entry point that torch has found may be what imports this, and torch registers it then.
    found = getattr(registry, "_BACKENDS", {}).get(name)
    if found is None and name not in getattr(registry, "_COMPILER_FNS", {}):
        registry.register_backend(backend, name=name)


class _AtImport(MetaPathFinder):
    """Finds nothing, but has the registry's loader register the backend."""

    def __init__(self, name: str, backend: Callable[..., Any]) -> None:
        self._of = name, backend

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        if fullname != _DYNAMO:
            return None
        sys.meta_path.remove(self)  # and find it as everybody does
        spec = find_spec(fullname)
        load = getattr(getattr(spec, "loader", None), "exec_module", None)
        if load is not None:

            def exec_module(module: Any) -> None:
                load(module)
                _register_backend(*self._of)

            spec.loader.exec_module = exec_module  # type: ignore[union-attr, method-assign]
        return spec
