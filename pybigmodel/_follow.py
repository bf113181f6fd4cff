"""What follows the new layers: who do it, and whether that makes up for slow products."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pybigmodel._choose import not_faster
from pybigmodel._fuse import Fused, Taken, taken_in
from pybigmodel._measure import Trial
from pybigmodel._report import Row
from pybigmodel._select import Candidate
from pybigmodel._swap import revert, take_in
from pybigmodel.testing.timers import interleave

_TORCHS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": functional.relu,
    "relu6": functional.relu6,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "hardswish": functional.hardswish,
    "leaky_relu": functional.leaky_relu,
}


def with_what_follows(
    model: nn.Module, found: list[Candidate], rows: list[Row], trials: Mapping[str, Trial]
) -> list[Row]:
    """Have the new layers do what follows them, and say what that is.

    A convolution that is slower than torch's, even with what it saves after it, is torch's again.
    """
    fused, taken = _take_in(model)
    judged = [
        _judged(row, trials.get(candidate.path), taken.get(candidate.module, Taken()))
        for candidate, row in zip(found, rows, strict=True)
    ]
    stay = [c.module for c, row, old in zip(found, judged, rows, strict=True) if _left(row, old)]
    if stay:
        for module in (*stay, *fused):
            revert(module)
        _, taken = _take_in(model)
    paths = {module: path for path, module in model.named_modules()}
    return [
        _with_taken(row, taken.get(candidate.module, Taken()), paths)
        for candidate, row in zip(found, judged, strict=True)
    ]


def _take_in(model: nn.Module) -> tuple[list[nn.Module], dict[nn.Module, Taken]]:
    """The modules that have another forward now, and the layers that do more."""
    fused: list[nn.Module] = []
    taken: dict[nn.Module, Taken] = {}
    for module in reversed(list(model.modules())):  # what a module contains before the module
        kind = type(module)
        take_in(module)
        if type(module) is not kind:
            fused.append(module)
        taken |= taken_in(module) if isinstance(module, Fused) else {}
    return fused, taken


def _left(row: Row, old: Row) -> bool:
    return row.left is not None and old.left is None


def _judged(row: Row, trial: Trial | None, taken: Taken) -> Row:
    """A layer that is not faster by itself has been chosen for what follows it."""
    if row.left is not None or trial is None or not trial.shapes or trial.speedup > 1:
        return row
    original, own = trial.seconds
    speedup = (original + sum(_seconds_after(y, taken) for y in trial.outputs)) / own
    if speedup > 1:
        return replace(row, speedup=speedup)
    return replace(
        row,
        speedup=speedup,
        replaced_by=None,
        bytes_after=row.bytes_before,
        left=not_faster(speedup),
        in_float=None,
    )


def _seconds_after(like: Callable[[], Tensor], taken: Taken) -> float:
    """What torch takes for the norm, the residual and the activation of such an output."""
    y = like().fill_(1)
    steps: list[Callable[[Tensor], Tensor]] = []
    if taken.norm is not None:
        steps.append(partial(_normalized, taken.norm))
    if taken.residual:
        steps.append(partial(torch.add, torch.ones_like(y)))
    if taken.activation is not None:
        steps.append(_TORCHS[taken.activation])
    if not steps:
        return 0.0

    def call() -> None:
        reduce(lambda result, step: step(result), steps, y)

    with torch.no_grad():
        return interleave({"after": [call]}, seconds=0.01, require_idle=False)["after"].median


def _normalized(norm: Any, y: Tensor) -> Tensor:
    statistics = norm.running_mean, norm.running_var
    return functional.batch_norm(y, *statistics, norm.weight, norm.bias, eps=norm.eps)


def _with_taken(row: Row, taken: Taken, paths: dict[nn.Module, str]) -> Row:
    return replace(
        row,
        norm=None if taken.norm is None else paths[taken.norm],
        residual=taken.residual,
        activation=taken.activation,
        found=taken.where or None,
    )
