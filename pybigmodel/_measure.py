"""Candidates beside their originals, on what the layers really get."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.backends import mha

from pybigmodel import _native
from pybigmodel._console import OtherLoad
from pybigmodel._swap import with_inner
from pybigmodel.nn.conv import CONVOLUTIONS
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS
from pybigmodel.nn.pool import POOLS, is_plain
from pybigmodel.testing.timers import interleave

# Several shapes of one layer are timed (a decoder's prefill and steps, say), but not every length.
MAX_SHAPES = 3
ROUNDS, MORE_ROUNDS = 5, 12  # MORE where the first leave doubt

_INT8: tuple[type[nn.Module], ...] = tuple(INT8_CONVOLUTIONS.values())
_POOLS: tuple[type[nn.Module], ...] = tuple(POOLS)
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass
class Trial:
    """A layer, or what contains some, and its replacement, over the calls of one run of the
    model."""

    original: nn.Module
    candidate: nn.Module
    kernel: str | None = None
    dtype: torch.dtype | None = None  # of the last output
    like: Callable[[], Tensor] | None = None  # makes one such as the last output
    error: float = 0.0
    cosine: float = 1.0
    failure: str | None = None
    compared: bool | None = None  # whether an output said something; None: not called
    other_load: float | None = None  # cores that other processes used during the run
    on_model_input: bool = False  # whether it was called on that, which is never in int8
    shapes: set[tuple[object, ...]] = field(default_factory=set)
    seconds: tuple[float, float] = (0.0, 0.0)  # of original and candidate, summed over shapes
    outputs: list[Callable[[], Tensor]] = field(default_factory=list)  # like, of each of these

    @property
    def speedup(self) -> float:
        return self.seconds[0] / self.seconds[1]


def run_trials(model: nn.Module, example_inputs: Any, trials: Collection[Trial]) -> None:
    """Run the model once in eval mode, without gradients; try each candidate where it is called.

    Int8 convolutions get the range of all the inputs that they are tried on.

    In the middle of the run: so no layer's input has to be kept until the others are done.
    """
    args, kwargs = split_inputs(example_inputs)
    given = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    # Layers of one kind on inputs of one shape take the same time: they are timed once.
    known: dict[tuple[object, ...], tuple[float, float]] = {}
    hooks = []
    load = OtherLoad()
    try:
        for trial in trials:
            hooks.append(_try_when_called(trial, known, given))
        with ExitStack() as modes:
            for module in (model, *(trial.candidate for trial in trials)):
                modes.enter_context(eval_mode(module))
            # Where a transformer layer has a hook, torch's fast path around it would hand it a
            # nested tensor, which only the layer's own fast path takes.
            modes.enter_context(_fast_path(False))
            modes.enter_context(torch.no_grad())
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    cores = load.cores()
    for trial in trials:
        trial.other_load = cores
        if trial.compared is False and trial.failure is None:
            trial.failure = "nothing finite and non-zero to compare on example_inputs"


def run_once(model: nn.Module, example_inputs: Any) -> Any:
    """What the model gives, in eval mode, without gradients."""
    args, kwargs = split_inputs(example_inputs)
    with eval_mode(model), torch.no_grad():
        return model(*args, **kwargs)


@contextmanager
def _fast_path(enabled: bool) -> Iterator[None]:
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(enabled)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


def split_inputs(example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tensor, a tuple or list of positional arguments, or a mapping of keyword arguments."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, tuple | list):
        return tuple(example_inputs), {}
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    raise TypeError(
        "example_inputs must be a tensor, a tuple of positional arguments or a dict of keyword "
        f"arguments for the model; got {type(example_inputs).__name__}"
    )


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """No dropout and no running statistics; each module's own mode again afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, training in modes:
            module.training = training


def _try_when_called(
    trial: Trial, known: dict[tuple[object, ...], tuple[float, float]], given: Sequence[Tensor]
) -> torch.utils.hooks.RemovableHandle:
    fast_path = mha.get_fastpath_enabled()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _: Any) -> None:
        if trial.failure is not None:
            return
        # A transformer layer with a hook, as this one, does not take its fast path.
        this = module._forward_hooks.pop(handle.id)
        try:
            with _fast_path(fast_path):
                _compare(trial, (args, kwargs))
                if trial.failure is None and trial.compared:
                    _time(trial, (args, kwargs), known, given)
        finally:
            module._forward_hooks[handle.id] = this

    handle = trial.original.register_forward_hook(hook, with_kwargs=True)
    return handle


def _compare(trial: Trial, arguments: Arguments) -> None:
    args, kwargs = arguments
    if isinstance(trial.original, _POOLS) and not is_plain(args[0] if args else kwargs["input"]):
        trial.failure = "what it gets on example_inputs is for torch's alone"
        return
    expected = _tensors(trial.original.forward(*args, **kwargs))
    try:
        if isinstance(trial.candidate, _INT8):
            layer: Any = trial.candidate
            layer.calibrate(args[0] if args else kwargs["input"])
        got = _tensors(trial.candidate.forward(*args, **kwargs))
    except Exception as problem:  # a layer that cannot be replaced is not the end of the others
        trial.failure = f"the replacement fails on example_inputs: {problem}"
        return
    of_one_kernel = isinstance(trial.original, (nn.Linear, *CONVOLUTIONS, *_POOLS))
    if of_one_kernel and got[0].device.type == "cpu" and got[0].numel():  # else no kernel ran
        trial.kernel = _native.last_kernel()
    trial.dtype = got[0].dtype
    shape, stride = got[0].shape, got[0].stride()
    trial.like = partial(torch.empty_strided, shape, stride, dtype=trial.dtype)
    for y, y0 in zip(got, expected, strict=True):
        trial.compared = bool(trial.compared) or _says_something(y, y0)
        error, cosine = difference(y, y0)
        trial.error, trial.cosine = max(trial.error, error), min(trial.cosine, cosine)


def _tensors(output: Tensor | tuple[Tensor | None, ...]) -> list[Tensor]:
    outputs = (output,) if isinstance(output, Tensor) else output
    return [y for y in outputs if y is not None]


def _says_something(got: Tensor, expected: Tensor) -> bool:
    """Whether agreement of the two is more than both being empty, zero or not finite."""
    nonzero = (got != 0) | (expected != 0)
    return bool((nonzero & (got.isfinite() | expected.isfinite())).any())


def difference(got: Tensor, expected: Tensor) -> tuple[float, float]:
    """‖got − expected‖/‖expected‖ and the cosine; what is not finite in both is left out."""
    got, expected = got.detach(), expected.detach()
    finite = expected.isfinite()
    if not torch.equal(finite, got.isfinite()):
        return torch.inf, -1.0
    if not bool(finite.all()):
        got, expected = got[finite], expected[finite]
    y, y0 = got.flatten().float(), expected.flatten().float()
    norm, norm0 = float(y.norm()), float(y0.norm())
    if norm0 == 0.0:
        return (0.0, 1.0) if norm == 0.0 else (torch.inf, 0.0)
    cosine = float((y / norm) @ (y0 / norm0)) if norm else 0.0
    return float((y - y0).norm()) / norm0, cosine


def _time(
    trial: Trial,
    arguments: Arguments,
    known: dict[tuple[object, ...], tuple[float, float]],
    given: Sequence[Tensor],
) -> None:
    shape = _shape_of(arguments)
    trial.on_model_input = trial.on_model_input or _is_given(arguments, given)
    if shape in trial.shapes or len(trial.shapes) == MAX_SHAPES:
        return
    trial.shapes.add(shape)
    original, candidate = _part_to_time(trial.original), _part_to_time(trial.candidate)
    turned = _in_channels_last(candidate, arguments, given)
    key = (_kind_of(original), _kind_of(candidate), shape, turned is candidate)
    if key not in known:
        known[key] = time_pair(original, turned, arguments)
    seconds = known[key]
    trial.seconds = trial.seconds[0] + seconds[0], trial.seconds[1] + seconds[1]
    if trial.like is not None:
        trial.outputs.append(trial.like)


def _in_channels_last(
    candidate: nn.Module, arguments: Arguments, given: Sequence[Tensor]
) -> nn.Module:
    """A convolution or a pooling on its input as the others beside it will leave it: all but the
    first, which gets the model's input."""
    (input, *_), _ = arguments if arguments[0] else ((None,), {})
    turns = getattr(candidate, "_channels_last", None) and not _is_given(arguments, given)
    return _Turned(candidate, input) if turns and isinstance(input, Tensor) else candidate


def _is_given(arguments: Arguments, given: Sequence[Tensor]) -> bool:
    """Whether the first is one of what the model was called with."""
    args, kwargs = arguments
    first = next((value for value in (*args, *kwargs.values())), None)
    return any(first is one for one in given)


class _Turned(nn.Module):
    def __init__(self, candidate: nn.Module, input: Tensor) -> None:
        super().__init__()
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        layout = formats.get(input.dim(), torch.contiguous_format)
        self._input, self._call = input.contiguous(memory_format=layout), candidate.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._input)


def _shape_of(arguments: Arguments) -> tuple[object, ...]:
    """What the time of a call depends on: tensors by shape, and which are the same."""
    args, kwargs = arguments
    shape: list[object] = []
    seen: list[object] = []
    for name, value in (*enumerate(args), *sorted(kwargs.items())):
        if isinstance(value, Tensor):
            same = next((at for at, other in enumerate(seen) if other is value), len(seen))
            seen.append(value)
            shape.append((name, tuple(value.shape), value.stride(), value.dtype, same))
        else:
            shape.append((name, repr(value)))
    return tuple(shape)


# What a layer does differently without saying so in its repr; dropout is off.
_OPTIONS = ("batch_first", "norm_first", "activation", "bias_k", "add_zero_attn")


def _kind_of(module: nn.Module) -> tuple[object, ...]:
    """What the time of a layer depends on beside what it is called with."""
    parts: list[object] = [str(module)]
    for part in module.modules():
        options = {**vars(part), **part._parameters}
        # A parameter or a function by its identity: they may lack a hash.
        parts += [type(part), *(_identity(options.get(name)) for name in _OPTIONS)]
    return tuple(parts)


def _identity(option: object) -> object:
    if isinstance(option, Tensor):
        return tuple(option.shape)
    return option if isinstance(option, bool) else id(option)


def _part_to_time(module: nn.Module) -> nn.Module:
    """The first layer of a stack of equal ones, as a stack; others as they are."""
    layers = module._modules.get("layers")
    stack = isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder)
    if not stack or not isinstance(layers, nn.ModuleList) or len(set(map(_kind_of, layers))) != 1:
        return module
    return with_inner(module, {layers: nn.ModuleList(layers[:1])})


def time_pair(
    original: nn.Module, candidate: nn.Module, arguments: Arguments
) -> tuple[float, float]:
    """Seconds per call of both, in the ratio that is the median over rounds.

    Each round times one after the other, so that what slows both for longer than a round leaves its
    ratio alone, and what slows one spoils that round only. On a quiet machine it takes 0.2 s, or
    0.6 s where that leaves doubt; longer for calls of more than 10 ms.
    """
    load = OtherLoad()
    originals, candidates = _rounds(original, candidate, arguments, ROUNDS)
    if load.cores() > OtherLoad.ENOUGH_TO_MATTER or _in_doubt(originals, candidates):
        more = _rounds(original, candidate, arguments, MORE_ROUNDS)
        originals, candidates = originals + more[0], candidates + more[1]
    seconds = statistics.median(candidates)
    return seconds * statistics.median(_ratios(originals, candidates)), seconds


def _rounds(
    original: nn.Module, candidate: nn.Module, arguments: Arguments, count: int
) -> tuple[list[float], list[float]]:
    """Seconds per call of both, by round."""
    args, kwargs = arguments
    timings = interleave(
        {
            "original": [lambda: original.forward(*args, **kwargs)],
            "candidate": [lambda: candidate.forward(*args, **kwargs)],
        },
        rounds=count,
        seconds=0.01,
        require_idle=False,
    )
    return timings["original"].turn_medians, timings["candidate"].turn_medians


def _ratios(originals: Sequence[float], candidates: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(originals, candidates, strict=True)]


def _in_doubt(originals: Sequence[float], candidates: Sequence[float]) -> bool:
    """The ratio is near 1, or the middle half of the rounds spans more than a tenth of it."""
    low, median, high = statistics.quantiles(
        _ratios(originals, candidates), n=4, method="inclusive"
    )
    return 0.9 < median < 1.1 or high - low > 0.1 * median
