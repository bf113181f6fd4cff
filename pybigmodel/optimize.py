"""Swapping the layers of an existing model for faster ones, and back."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import nn

from pybigmodel._choose import MAX_ERROR, choose, dtype_of
from pybigmodel._connect import connect
from pybigmodel._follow import with_what_follows
from pybigmodel._layouts import check_layouts
from pybigmodel._measure import Trial, split_inputs
from pybigmodel._report import Report, Row, log_rows
from pybigmodel._select import Candidate, Selection, candidates
from pybigmodel._swap import (
    OUR_INT8,
    become,
    float_precision,
    is_swapped,
    revert,
    weight_bytes,
    weights_of,
    why_not_reverted,
)
from pybigmodel.nn import Int8Linear
from pybigmodel.nn._int8_layer import Int8Layer
from pybigmodel.nn.conv import CONVOLUTIONS
from pybigmodel.nn.pool import POOLS

Model = TypeVar("Model", bound=nn.Module)
_CONVOLUTIONS: tuple[type[nn.Module], ...] = tuple(CONVOLUTIONS)
_POOLS: tuple[type[nn.Module], ...] = tuple(POOLS)

_REPORT = "_pybigmodel_report"


def optimize(
    model: Model,
    precision: str = "fp32",
    *,
    example_inputs: Any = None,
    include: Selection = None,
    exclude: Selection = None,
    inplace: bool = False,
    keep_original: bool = True,
    exact: bool = False,
    channels_last: bool = True,
) -> Model:
    """The model with its linear layers, convolutions, poolings and attention on this library's
    kernels.

    Every torch.nn.Linear becomes a :class:`pybigmodel.nn.Linear` ("fp32", "bf16") or a
    :class:`pybigmodel.nn.Int8Linear` with dynamic asymmetric activations ("int8"); every
    MultiheadAttention, TransformerEncoderLayer, TransformerDecoderLayer and stack of these becomes
    pybigmodel.nn's of that name, with the linear layers in it. ("int8" leaves the projections of
    queries, keys and values and attention itself in the dtype that they have.) Every convolution
    becomes pybigmodel.nn's of that name, or in "int8" a :class:`pybigmodel.nn.Int8Conv2d` (1d, 3d),
    with dynamic activations or, with example_inputs, in the range that they have there; depthwise,
    transposed and narrow grouped ones, which would not gain by it, stay floating. MaxPool2d,
    AvgPool2d and AdaptiveAvgPool2d become pybigmodel.nn's of that name. A relu, gelu or
    silu that follows a layer, in a Sequential or in the forward of a module as
    ``self.act(self.dense(x))``, is done with it in one pass where no gradient is wanted; so are,
    after a convolution, a BatchNorm in eval mode, whose factors are folded into the weight, a
    residual and relu6, hardswish or leaky_relu too. What cannot or should not be replaced stays,
    and :func:`report` says why. The modules stay the same objects and change their class, so hooks,
    shared modules, tied weights and what refers to them stay too.

    Args:
        model: any torch.nn.Module. A model in "fp32" or "bf16" trains as before: its Parameters are
            the same objects. One in "int8" is for inference.
        precision: "fp32"; "bf16": products in bfloat16, tensors keep their dtype; "int8".
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments. With it the
            model is run once (in eval mode, without gradients), each layer is timed against its
            replacement on what it gets there, and only what is faster and right is replaced: layers
            that the run does not call stay. Attention and transformer layers are tried as a whole,
            the outermost of them, and replaced as a whole. In "int8" it also says in which range
            the images of convolutions are, so it should be data of the kind that will come; what
            convolutions give to none but other int8 convolutions, through a max pooling or not,
            stays in uint8.
        include, exclude: name patterns (as "encoder.*.query"; * also matches dots), module types,
            or a sequence of both. A layer matches if it, or a module that contains it, does.
        inplace: False copies the model first (copy.deepcopy: its Parameters too, so that training
            the copy leaves the original alone); True changes it, for models that should not be held
            twice.
        keep_original: whether int8 layers keep their float weights for :func:`restore` (outside
            parameters() and state_dict(), dropped by pickling). False frees them: restore then
            gives the weights that int8 computed with.
        exact: convolutions sum products as they are, without Winograd
            (:class:`pybigmodel.nn.Conv2d`, algorithm="direct").
        channels_last: whether convolutions of two and three axes, and poolings, give their images
            in that layout, which the next takes as they are: the shape is the same, the strides
            are not. A model needs False that calls ``view`` on an image, as
            ``x.view(len(x), -1)``, or that writes to what ``contiguous``, ``reshape`` or ``to``
            made of one and goes on to use both, as ``z = y.permute(0, 2, 3, 1).contiguous();
            z.mul_(2)``: a copy in one layout is the image itself in the other. With example_inputs
            the new model is run in both, and that is seen to.

    Memory per weight of float32: 4 bytes and 4 more once a layer has run ("fp32"), 4 and 2
    ("bf16"), 1 and 4 for the original ("int8"). Floating convolutions: 4 and, for each algorithm
    that ran, 4 (7 or 16 for Winograd's).

    Raises:
        TypeError, ValueError: an argument of the wrong kind; a pattern or type that matches
            nothing.
    """
    _check_model("optimize", model)
    names = ", ".join(map(repr, MAX_ERROR))
    if not isinstance(precision, str):
        raise TypeError(f"precision must be a string, one of {names}; got {precision!r}")
    if precision not in MAX_ERROR:
        raise ValueError(f"precision must be one of {names}; got {precision!r}")
    if example_inputs is not None:
        split_inputs(example_inputs)
    if not inplace:
        model = _copied(model)
    before = {row.path: row for row in _known_rows(model)}
    found = candidates(model, precision, include, exclude)
    choices = choose(model, found, precision, example_inputs, exact, channels_last)
    rows = []
    for candidate in found:
        path = candidate.path
        left = candidate.left or choices.left.get(path)
        if left is not None and path in before and before[path].replaced_by is not None:
            rows.append(_kept(before[path], candidate, precision))
        else:
            new, trial = choices.news.get(candidate.module), choices.trials.get(path)
            row = _finish(candidate, new, trial, left, precision, keep_original)
            rows.append(replace(row, in_float=None if left else choices.in_float.get(path)))
    rows = with_what_follows(model, found, rows, choices.trials)
    if example_inputs is not None:
        check_layouts(model, example_inputs, precision)
        rows = _connected(model, example_inputs, found, rows)
    log_rows(rows)
    vars(model)[_REPORT] = Report(tuple(rows))
    return model


def report(model: nn.Module) -> Report:
    """What :func:`optimize` did to each layer of the model, or of the parts it was given.

    Raises:
        ValueError: neither the model nor a part of it was optimized.
    """
    _check_model("report", model)
    rows = _known_rows(model)
    if not rows and not any(_REPORT in vars(module) for module in model.modules()):
        raise ValueError("report: model was not optimized; call pybigmodel.optimize(model) first")
    return Report(tuple(rows))


def restore(model: Model) -> Model:
    """The same model with torch's layers again, in place, with the weights as they are now.

    "fp32" and "bf16" layers give back the Parameters they have (trained, if they were). "int8"
    layers give back the float weights they were made from, or, where these were not kept, or the
    model was pickled or loaded a state_dict since, the weights that int8 computed with.

    Raises:
        RuntimeError: a layer was parametrized since; nothing is restored then.
    """
    _check_model("restore", model)
    swapped = {path: module for path, module in model.named_modules() if is_swapped(module)}
    for path, module in swapped.items():
        reason = why_not_reverted(module)
        if reason is not None:
            raise RuntimeError(f"restore: {path or 'the model'} cannot be put back: {reason}")
    for module in swapped.values():
        revert(module)
    for module in model.modules():
        vars(module).pop(_REPORT, None)
    return model


def _check_model(function: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError(
            f"{function}: model must be a torch.nn.Module that runs in Python, got a "
            "ScriptModule; give the module that it was made from"
        )


def _copied(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except Exception as error:
        raise RuntimeError(
            f"optimize: model cannot be copied ({error}); inplace=True changes it itself"
        ) from error


def _known_rows(model: nn.Module) -> list[Row]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return [_as_it_is(row, modules.get(row.path)) for row in _rows_of_reports(model)]


def _as_it_is(row: Row, module: nn.Module | None) -> Row:
    """Parts may have been restored for themselves."""
    if row.replaced_by is None or (module is not None and is_swapped(module)):
        return row
    return Row(
        row.path,
        row.layer,
        row.precision,
        bytes_before=row.bytes_before,
        bytes_after=row.bytes_before,
        left="restored or exchanged since",
    )


def _rows_of_reports(model: nn.Module) -> list[Row]:
    own: Report | None = vars(model).get(_REPORT)
    if own is not None:
        return list(own.rows)
    rows: list[Row] = []
    covered: tuple[str, ...] = ()
    for path, module in model.named_modules():
        part: Report | None = vars(module).get(_REPORT)
        if part is not None and not path.startswith(covered):
            rows += part.under(path).rows
            covered += (f"{path}.",)  # its report speaks for what it contains
    return rows


def _kept(row: Row, candidate: Candidate, precision: str) -> Row:
    """The row of a layer that an earlier call replaced; why it is not for this precision, if so."""
    if precision == "int8" and (row.in_float or candidate.in_float):
        precision = float_precision(precision)
    left, wanted = None, _precision_of(candidate.module, precision)
    if candidate.selected and row.precision != wanted:
        left = f"in {row.precision} since an earlier call; pbm.restore it to have {wanted}"
    return replace(row, left=left)


def _precision_of(module: nn.Module, precision: str) -> str:
    """What the products are computed in: bf16 weights always take bf16's, attention never int8,
    and a pooling has none."""
    if isinstance(module, _POOLS):
        return ""
    if isinstance(module, nn.MultiheadAttention):
        precision = float_precision(precision)
    return "bf16" if precision == "fp32" and dtype_of(module) == torch.bfloat16 else precision


def _finish(
    candidate: Candidate,
    new: nn.Module | None,
    trial: Trial | None,
    left: str | None,
    precision: str,
    keep: bool,
) -> Row:
    """Replace the layer if nothing speaks against it, and say what was done."""
    module = candidate.module
    before = sum(weight.numel() * weight.element_size() for weight in weights_of(module))
    layer = _describe(module)
    if isinstance(module, _CONVOLUTIONS) and not isinstance(new, Int8Layer):
        precision = float_precision(precision)
    precision = _precision_of(module, precision)
    measured: dict[str, Any] = {}
    if trial is not None and trial.shapes:
        measured = {
            "kernel": trial.kernel,
            "speedup": trial.speedup,
            "error": trial.error,
            "cosine": trial.cosine,
            "other_load": trial.other_load,
        }
    replaced_by, after = None, before
    if left is None:
        assert new is not None
        become(module, new, keep)
        replaced_by, after = f"pybigmodel.nn.{type(new).__name__}", weight_bytes(module)
    return Row(
        candidate.path,
        layer,
        precision,
        replaced_by,
        bytes_before=before,
        bytes_after=after,
        left=left,
        **measured,
    )


def _connected(
    model: nn.Module, example_inputs: Any, found: list[Candidate], rows: list[Row]
) -> list[Row]:
    """Have int8 convolutions pass uint8 on to each other, and say which do."""
    connected = connect(model, example_inputs)
    return [
        replace(row, gives="uint8" if candidate.module in connected else None)
        for candidate, row in zip(found, rows, strict=True)
    ]


def _describe(module: nn.Module) -> str:
    name = type(module).__name__
    if isinstance(module, nn.Linear | Int8Linear):
        return f"{name}({module.in_features}, {module.out_features})"
    if isinstance(module, (*_CONVOLUTIONS, *OUR_INT8)):
        return _describe_convolution(name, module)
    if isinstance(module, _POOLS):
        return f"{name}({module.extra_repr()})"
    if isinstance(module, nn.MultiheadAttention):
        return f"{name}({module.embed_dim}, {module.num_heads} heads)"
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return f"{name}({len(module.layers)} layers)"
    return name


def _describe_convolution(name: str, module: Any) -> str:
    kernel = "×".join(map(str, module.kernel_size))
    options = "".join(
        f", {option} {value[0] if isinstance(value, tuple) else value}"
        for option in ("stride", "dilation", "groups")
        if (value := getattr(module, option)) not in (1, (1,) * len(module.kernel_size))
    )
    return f"{name}({module.in_channels}, {module.out_channels}, {kernel}{options})"
