"""What each layer becomes: its replacement, after trials where there are example inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pybigmodel._measure import Trial, run_trials
from pybigmodel._select import Candidate
from pybigmodel._swap import OUR_INT8, replacement
from pybigmodel.nn.conv import CONVOLUTIONS
from pybigmodel.nn.pool import POOLS

# Relative errors of a layer's output on example_inputs, above which something is wrong with the
# replacement (fp32, bf16) or the layer does not bear int8: rounding alone gives 1e-6, 4e-3, 1e-2.
MAX_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "int8": 1e-1}
_CONVOLUTIONS: tuple[type[nn.Module], ...] = tuple(CONVOLUTIONS)
_POOLS: tuple[type[nn.Module], ...] = tuple(POOLS)


@dataclass
class Choices:
    """What was chosen, by path but for `news`."""

    news: dict[nn.Module, nn.Module] = field(default_factory=dict)
    trials: dict[str, Trial] = field(default_factory=dict)  # of what was chosen
    left: dict[str, str] = field(default_factory=dict)  # why it stays
    in_float: dict[str, str] = field(default_factory=dict)  # why it is not in int8


def choose(
    model: nn.Module,
    found: list[Candidate],
    precision: str,
    example_inputs: Any,
    exact: bool,
    channels_last: bool,
) -> Choices:
    choices = _replacements(found, precision, exact, channels_last)
    tried = [c for c in found if c.module in choices.news and c.units == (c.path,)]
    choices.trials = {c.path: Trial(c.module, choices.news[c.module]) for c in tried}
    if example_inputs is None:
        return choices
    run_trials(model, example_inputs, list(choices.trials.values()))
    _try_floating(model, example_inputs, choices, precision, exact, channels_last)
    rejected = {
        path: reason
        for path, trial in choices.trials.items()
        if (reason := why_rejected(trial, precision)) is not None and not may_gain(trial, precision)
    }
    choices.left |= rejected | _with_their_units(found, rejected)
    return choices


def _try_floating(
    model: nn.Module,
    example_inputs: Any,
    choices: Choices,
    precision: str,
    exact: bool,
    channels_last: bool,
) -> None:
    """Where int8 is not faster than torch's, or the layer does not bear it, a floating convolution
    may be; where the model's input has to be quantised, it may be faster than int8."""
    doubtful = {
        path: trial
        for path, trial in choices.trials.items()
        if isinstance(trial.original, _CONVOLUTIONS) and isinstance(trial.candidate, OUR_INT8)
        if trial.on_model_input or (why_rejected(trial, precision) is not None)
    }
    others = {
        path: Trial(trial.original, replacement(trial.original, "fp32", {}, exact, channels_last))
        for path, trial in doubtful.items()
    }
    if others:
        run_trials(model, example_inputs, list(others.values()))
    for path, other in others.items():
        trial = doubtful[path]
        reason = why_rejected(trial, precision)
        works = why_rejected(other, precision) is None
        if reason is None and works and other.speedup > trial.speedup:
            reason = f"faster in floating point: {other.speedup:.2f}× against {trial.speedup:.2f}×"
        if reason is not None:
            choices.in_float[path] = reason
            choices.trials[path] = other
            choices.news[other.original] = other.candidate


def _replacements(
    found: list[Candidate], precision: str, exact: bool, channels_last: bool
) -> Choices:
    """What each layer would become, and the reasons of those that turn out not to."""
    choices, how = Choices(), (exact, channels_last)
    news = choices.news
    for candidate in reversed(found):  # what a layer contains before the layer
        path, module, why_float = candidate.path, candidate.module, candidate.in_float
        if candidate.left is not None:
            continue
        if why_float is None:
            try:
                news[module] = replacement(module, precision, news, *how)
                continue
            except ValueError as error:  # NaN or infinity in a weight to be quantised
                why_float = str(error)
        if isinstance(module, _CONVOLUTIONS):
            news[module] = replacement(module, "fp32", news, *how)
            choices.in_float[path] = why_float
        else:
            choices.left[path] = why_float
    return choices


def _with_their_units(found: list[Candidate], rejected: dict[str, str]) -> dict[str, str]:
    """Layers stay with what contains them, which may call them in another way."""
    return {
        candidate.path: f"part of {unit or 'the model'}, which stays"
        for candidate in found
        for unit in candidate.units
        if unit in rejected and unit != candidate.path
    }


def why_rejected(trial: Trial, precision: str) -> str | None:
    wrong = _why_wrong(trial, precision)
    return wrong if wrong is not None or trial.speedup > 1 else not_faster(trial.speedup)


def not_faster(speedup: float) -> str:
    return f"not faster on example_inputs: {speedup:.2f}×"


def may_gain(trial: Trial, precision: str) -> bool:
    """Whether it is right and, if slower by itself, may be faster with what follows it."""
    return _is_floating(trial) and _why_wrong(trial, precision) is None


def _is_floating(trial: Trial) -> bool:
    """Whether a convolution stays one of floats."""
    return isinstance(trial.original, _CONVOLUTIONS) and not isinstance(trial.candidate, OUR_INT8)


def _why_wrong(trial: Trial, precision: str) -> str | None:
    if trial.failure is not None:
        return trial.failure
    if not trial.shapes:
        return "not called on example_inputs"
    if precision == "int8" and _is_floating(trial):
        precision = "fp32"
    dtype = dtype_of(trial.original)
    if isinstance(trial.original, _POOLS):  # which hold nothing that would say it
        precision, dtype = "fp32", trial.dtype
    low = dtype in (torch.bfloat16, torch.float16)
    bound = MAX_ERROR["bf16" if low and precision == "fp32" else precision]
    if not trial.error <= bound:
        return f"its error on example_inputs is {trial.error:.1e}, above {bound:.0e}"
    return None


def dtype_of(module: nn.Module) -> torch.dtype | None:
    return next((parameter.dtype for parameter in module.parameters()), None)
