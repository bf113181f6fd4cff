"""Whether a model computes the same with its images in channels_last."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from pybigmodel._measure import difference, run_once
from pybigmodel._report import log
from pybigmodel._swap import is_swapped

# Relative differences of a model's results above which they are not of rounding. Layouts differ in
# algorithms and the order of sums: through 50 layers that grows to 1e-5 in fp32, some 1e-2 else.
MAX_DIFFERENCE = {"fp32": 1e-3, "bf16": 1e-1, "int8": 2e-1}


def check_layouts(model: nn.Module, example_inputs: Any, precision: str) -> None:
    """Leave images in the layout that they have where the model cannot do with channels_last:
    where it fails, or where what it writes to is a copy in one layout only."""
    turned: list[Any] = [
        module
        for module in model.modules()
        if vars(module).get("_channels_last") and is_swapped(module)
    ]
    if not turned:
        return
    _keep(turned)
    expected = _run(model, example_inputs)
    _forget(turned)
    for layer in turned:
        layer._channels_last = True
    try:
        reason = _why_not(_run(model, example_inputs), expected, precision)
    except RuntimeError as error:
        reason = str(error)
    if reason is not None:
        log.warning("optimize: convolutions leave layouts as they are, since: %s", reason)
        _forget(turned)
        _keep(turned)


def _keep(layers: list[Any]) -> None:
    for layer in layers:
        layer.keep_layout()


def _forget(layers: list[Any]) -> None:
    """Drop the packed weights that the other layout alone may want."""
    for layer in layers:
        if hasattr(layer, "forget_packed"):
            layer.forget_packed()


def _run(model: nn.Module, example_inputs: Any) -> list[Tensor]:
    """The results, from the same inputs and random numbers each time."""
    inputs = tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, example_inputs)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        return [y for y in _leaves(run_once(model, inputs)) if y.is_floating_point()]


def _leaves(output: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            yield leaf
        elif dataclasses.is_dataclass(leaf):
            yield from _leaves([getattr(leaf, f.name) for f in dataclasses.fields(leaf)])


def _why_not(got: list[Tensor], expected: list[Tensor], precision: str) -> str | None:
    if [y.shape for y in got] != [y.shape for y in expected]:
        return "in channels_last the model's results have other shapes"
    for y, y0 in zip(got, expected, strict=True):
        low = y0.dtype in (torch.bfloat16, torch.float16)
        bound = MAX_DIFFERENCE["bf16" if low and precision == "fp32" else precision]
        found = difference(y, y0)[0]
        if not found <= bound:
            return f"in channels_last the model's results differ by {found:.1e}, above {bound:.0e}"
    return None
