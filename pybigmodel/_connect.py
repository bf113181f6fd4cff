"""Which int8 convolutions pass uint8 on to each other, and in which ranges they compute."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pybigmodel._measure import run_once, split_inputs
from pybigmodel._report import log
from pybigmodel._swap import is_swapped
from pybigmodel.nn._int8_image import Recorder
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS, quantiser, wider_quantiser

_KINDS: tuple[type[nn.Module], ...] = tuple(INT8_CONVOLUTIONS.values())


def connect(model: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """Have the int8 convolutions give uint8 whose results only others of them take, as an image or
    as a residual, over the range that they have on example_inputs; the layers that do."""
    layers = [layer for layer in _layers_of(model) if is_swapped(layer)]
    if len(layers) < 2:
        return set()
    recorder = Recorder()
    for layer in layers:
        layer.output_scale = None
    try:
        with _recorded(layers, recorder):
            recorder.left(run_once(model, example_inputs))
    except Exception as error:  # of a model that looks at what it is given: it gets floats
        log.warning("optimize: int8 convolutions pass floats on, since: %s", error)
        return set()
    found = recorder.outputs()
    for layer, (chain, (low, high)) in found.items():
        layer.output_scale, layer.output_zero_point = quantiser(low, high)
        layer._output_of = chain
    return set(found)


def calibrate(model: nn.Module, inputs: Iterable[Any]) -> None:
    """Widen the ranges of the int8 convolutions to those that they have on these inputs.

    :func:`optimize` takes them from its example_inputs, which decide by their shapes what is
    fastest too: one image, say. This adds what other inputs show; layers with dynamic activations
    become static.

    Args:
        model: one with int8 convolutions. It is run in eval mode, without gradients.
        inputs: each as optimize's example_inputs are.

    Raises:
        TypeError: an entry of inputs is of another kind.
        ValueError: there are no int8 convolutions, or NaN or infinity goes into one.
    """
    layers = _layers_of(model)
    if not layers:
        raise ValueError("calibrate: model must have int8 convolutions, got none")
    recorder = Recorder()
    before = [(layer.input_scale, layer.output_scale) for layer in layers]
    try:
        for layer in layers:  # so that no range bounds what the next layers are given
            layer.input_scale = layer.output_scale = None
        with _recorded(layers, recorder):
            for one in inputs:
                split_inputs(one)
                recorder.left(run_once(model, one))
    finally:
        for layer, (scale, output_scale) in zip(layers, before, strict=True):
            layer.input_scale, layer.output_scale = scale, output_scale
    wider = {layer: layer._quantiser_for(*found) for layer, found in recorder.inputs.items()}
    for layer, of_input in wider.items():
        layer.input_scale, layer.input_zero_point = of_input
    for layer, (_, found) in recorder.outputs().items():
        if layer.output_scale is not None:
            of_output = wider_quantiser(layer.output_scale, layer.output_zero_point, *found)
            layer.output_scale, layer.output_zero_point = of_output


def _layers_of(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, _KINDS)]


@contextmanager
def _recorded(layers: list[Any], recorder: Recorder) -> Iterator[None]:
    for layer in layers:
        vars(layer)["_recorder"] = recorder
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["_recorder"]
