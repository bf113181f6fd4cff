"""Which int8 convolutions pass uint8 on to each other, from one run of the model."""

from __future__ import annotations

from typing import Any

from torch import nn

from pybigmodel._measure import run_once
from pybigmodel._report import log
from pybigmodel._swap import is_swapped
from pybigmodel.nn._int8_image import Recorder
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS, quantiser

_KINDS: tuple[type[nn.Module], ...] = tuple(INT8_CONVOLUTIONS.values())


def connect(model: nn.Module, example_inputs: Any) -> set[nn.Module]:
    """Have the int8 convolutions give uint8 whose results only others of them take, as an image or
    as a residual, over the range that they have on example_inputs; the layers that do."""
    layers: list[Any] = [m for m in model.modules() if isinstance(m, _KINDS) and is_swapped(m)]
    if len(layers) < 2:
        return set()
    recorder = Recorder()
    for layer in layers:
        layer.output_scale = None
        vars(layer)["_recorder"] = recorder
    try:
        recorder.left(run_once(model, example_inputs))
    except Exception as error:  # of a model that looks at what it is given: it gets floats
        log.warning("optimize: int8 convolutions pass floats on, since: %s", error)
        return set()
    finally:
        for layer in layers:
            del vars(layer)["_recorder"]
    found = recorder.ranges()
    for layer, (chain, low, high) in found.items():
        layer.output_scale, layer.output_zero_point = quantiser(low, high)
        layer._output_of = chain
    return set(found)
