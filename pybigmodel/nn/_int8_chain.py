"""An int8 convolution and what follows it as one op, from and to floats or uint8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel.nn._conv_plan import pad_in_mode, plan_for
from pybigmodel.nn._int8_image import IMAGES, NOT_QUANTISED, Bytes


def int8_in_one(
    layer: Any, chain: Any, code: tuple[int, float], x: Any, residual: Any, pad: Any
) -> Tensor | None:
    """The result of one op, or None where the parts have to be called one by one."""
    of_x = of_residual = NOT_QUANTISED
    if type(x) in IMAGES:
        if layer.padding_mode != "zeros":  # of which bytes know nothing
            return None
        x, of_x = x.taken()
    elif not isinstance(x, Tensor) or x.is_nested:
        return None
    if type(residual) in IMAGES:
        residual, of_residual = residual.taken()
    if layer.padding_mode != "zeros":
        if pad is not None:
            return None
        x = pad_in_mode(layer, x)
    weight = layer._weight_for(x, of_x)
    if weight is None:  # the layer says why
        return None
    plan = plan_for(layer, x, weight, pad)
    if plan is None:
        return None
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.dtype == (torch.uint8 if of_residual[0] else plan.floating)
        and residual.shape == plan.out_shape
        and residual.device == x.device
    ):
        return None
    found = chain.weights(layer, weight, None)
    if found is None:
        return None
    scales, bias = found
    if bias is not None and of_x[0] and bias.dtype != torch.float32:
        bias = bias.float()
    followed_by = (chain.norm is not None, residual is not None, code[0])
    recorder = layer._recorder
    if recorder is not None:
        recorder.given(layer, x)
    of_y = layer._quantiser_after(followed_by, plan.floating)
    y: Tensor = plan.run(x, weight, scales, bias, residual, *code, of_x, of_residual, of_y)
    if of_y[0]:
        return Bytes.of(y, of_y)
    return y if recorder is None else recorder.seen(layer, followed_by, y)
