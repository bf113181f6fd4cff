"""torch.compile(model, backend="pybigmodel"): our ops in Dynamo's graph, inductor for the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pybigmodel._torch_private import when_dynamo_is_there

NAME = "pybigmodel"


def backend(
    graph: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Callable[..., Any]:
    """What ``torch.compile(model, backend="pybigmodel")`` calls; nobody else needs to.

    Where no gradient is recorded, convolutions with what follows them (a BatchNorm in eval mode, a
    residual, relu, relu6, silu, gelu, hardswish or leaky_relu; a padding with zeros before them)
    and linear layers (relu, silu, gelu; a residual) become single ops on packed weights, as
    :func:`pybigmodel.optimize` makes them of modules, but found in the graph, whatever the code
    looks like; convolutions with nothing between them become one call, ``conv_sequence``. So do
    poolings of images in channels_last (max, mean, adaptive mean; a mean over both axes of an
    image) become this library's. Inductor compiles what is left. Where gradients are recorded the
    same products are ops of this library one by one, differentiated by its own kernels.

    Weights may change: the packed copies are compared with what they were made of at every call,
    under the conditions of :class:`pybigmodel.nn.Linear`, and made again. They are there for each
    compiled graph; those without a norm in them are shared with other graphs and eager layers.

    Images of two and three axes go from one convolution to the next in channels_last. Whoever may
    notice, and the caller, gets the strides that torch would have given, by a copy where needed:
    give a model channels_last images to get such back. Where the graph writes in place to what may
    be the image or a copy of it (contiguous, to, reshape, permute, views) layouts stay torch's.

    With symbolic sizes the algorithm of a convolution is chosen by the sizes of the first call and
    kept for the others. Each is right for every size; what only fits small images is guarded.

    Left to inductor: what is not on the CPU or in float32, bfloat16 or float16, transposed
    convolutions, images without a batch dimension, poolings in planes (N, C, H, W), with indices,
    of one or three axes, of no pixels or where a gradient is recorded, attention (enter
    :func:`pybigmodel.sdpa` around the call to have it), bodies of control flow and checkpoints,
    graphs of torch.func.

    Args:
        graph, example_inputs: Dynamo's.
        mode: torch.compile's, for inductor.
        options: "precision" ("fp32" or "bf16"), "exact" and "channels_last", each as in
            :func:`pybigmodel.optimize`; of layers that it made, their own count.

    Raises:
        ValueError, TypeError: an unknown option or a value that it does not take, by name. Dynamo
            shows it within a BackendCompilerFailed.
    """
    from pybigmodel._graph.compile import compiled, options_of

    return compiled(graph, list(example_inputs), options_of(options), mode)


def register() -> None:
    """Make the name known to torch.compile, without importing the compiler.

    An installed package is found by its entry point too, imported or not.
    """
    when_dynamo_is_there(NAME, backend)
