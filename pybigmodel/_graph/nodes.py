"""What single calls in Dynamo's graph compute, in the words of this library's ops.

A reader returns None for a call of another kind, and for one whose arguments are not plain numbers.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node

from pybigmodel._torch_private import HigherOrderOperator, OpOverload, torch_pad, traced_types
from pybigmodel.nn._conv_plan import conv_cached
from pybigmodel.nn._packing import ROUNDED_TO_FP16, linear_cached
from pybigmodel.ops._checks import FLOAT_DTYPES
from pybigmodel.ops._conv_geometry import sides


class Options(NamedTuple):
    """Of the backend, as `pbm.optimize` has them."""

    precision: int = 0
    exact: bool = False
    channels_last: bool = True


class Conv(NamedTuple):
    x: Node
    weight: Node
    bias: Node | None
    stride: list[int]
    padding: list[int]  # before and after, axis by axis
    dilation: list[int]
    groups: int
    precision: int
    exact: bool


class Linear(NamedTuple):
    x: Node
    weight: Node
    bias: Node | None
    precision: int


class Norm(NamedTuple):
    """A BatchNorm with running statistics."""

    gamma: Node | None
    beta: Node | None
    mean: Node
    var: Node
    eps: float


class Activation(NamedTuple):
    name: str
    slope: float = 0.0


def value_of(node: Any) -> Any:
    """What Dynamo computed the node to be: a fake tensor, for one."""
    return node.meta.get("example_value") if isinstance(node, Node) else None


def tensor_of(node: Any) -> Tensor | None:
    """The same, where it is a tensor as the ops take them."""
    value = value_of(node)
    plain = type(value) in traced_types and value.layout is torch.strided
    return value if plain and value.device.type == "cpu" else None


def number(argument: Any) -> Any:
    """An int, float or bool; what Dynamo holds symbolic is guarded to be what it is now."""
    if isinstance(argument, Node):
        argument = argument.meta.get("example_value")
    if isinstance(argument, torch.SymFloat):
        return float(argument)
    if isinstance(argument, torch.SymInt):
        return int(argument)
    return argument if isinstance(argument, int | float) else None


def numbers(argument: Any) -> Any:
    """The same of a sequence, or of one that stands for several."""
    if isinstance(argument, Sequence) and not isinstance(argument, str):
        entries = [number(entry) for entry in argument]
        return None if None in entries else entries
    return argument if isinstance(argument, str) else number(argument)


def bound(node: Node, **defaults: Any) -> dict[str, Any] | None:
    """The node's arguments by name; None where there are others."""
    names = list(defaults)
    if len(node.args) > len(names) or not defaults.keys() >= node.kwargs.keys():
        return None
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def function_of(node: Node) -> Any:
    """A function, the name of a method, or None."""
    return node.target if node.op in ("call_function", "call_method") else None


# --- products -------------------------------------------------------------------------------------

PADS = (F.pad, torch_pad)
CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


def conv_of(node: Node, options: Options) -> Conv | None:
    target = function_of(node)
    if target is conv_cached:
        x, weight, bias, stride, padding, dilation, *rest = node.args
        found = Conv(x, weight, bias, stride, padding, dilation, *rest[:3])  # type: ignore[arg-type]
        return found if _is_product(node, found, weight_dims=(3, 4, 5)) else None
    axes: Any = CONVOLUTIONS.get(target)
    args = axes and bound(
        node, input=None, weight=None, bias=None, stride=1, padding=0, dilation=1, groups=1
    )
    if not args or tensor_of(args["weight"]) is None:
        return None
    geometry = [numbers(args[name]) for name in ("stride", "padding", "dilation")]
    groups = number(args["groups"])
    if groups is None or None in geometry:
        return None
    stride, padding, dilation = (_per_axis(entry, axes) for entry in geometry)
    kernel = value_of(args["weight"]).shape[2:]
    around = sides("conv", padding, axes, (kernel, stride, dilation))
    if any(type(side) is not int for side in around):  # "same" of a kernel of symbolic sizes
        return None
    found = Conv(
        *(args["input"], args["weight"], args["bias"], stride, around, dilation, groups),
        *(options.precision, options.exact),
    )
    return found if _is_product(node, found, weight_dims=(axes + 2,)) else None


def _per_axis(entry: Any, axes: int) -> Any:
    if isinstance(entry, str):
        return entry
    entries = [entry] if isinstance(entry, int) else list(entry)
    return entries * axes if len(entries) == 1 else entries


def linear_of(node: Node, options: Options) -> Linear | None:
    target = function_of(node)
    if target is linear_cached:
        x, weight, bias, precision, *rows = node.args
        whole = tuple(rows) in ((), (0,), (0, None))
        if not whole or precision >= ROUNDED_TO_FP16:  # type: ignore[operator]
            return None
        found = Linear(x, weight, bias, precision)  # type: ignore[arg-type]
    elif target is F.linear:
        args = bound(node, input=None, weight=None, bias=None)
        if args is None:
            return None
        found = Linear(args["input"], args["weight"], args["bias"], options.precision)
    else:
        return None
    return found if _is_product(node, found, weight_dims=(2,)) else None


def _is_product(node: Node, found: Conv | Linear, weight_dims: tuple[int, ...]) -> bool:
    """Whether the tensors are of the kind that the ops take; torch checked that they fit."""
    x, weight, y = tensor_of(found.x), tensor_of(found.weight), tensor_of(node)
    if x is None or weight is None or y is None:
        return False
    if found.bias is not None:
        bias = tensor_of(found.bias)
        if bias is None or bias.dim() != 1 or bias.dtype not in FLOAT_DTYPES:
            return False
    with_batch = x.dim() == weight.dim() if isinstance(found, Conv) else x.dim() >= 1
    return (
        with_batch
        and weight.dim() in weight_dims
        and all(t.dtype in FLOAT_DTYPES for t in (x, weight, y))
    )


# --- what stands beside a product -----------------------------------------------------------------


def norm_of(node: Node, x: Node) -> Norm | None:
    """Of a BatchNorm of x in eval mode."""
    if function_of(node) is not F.batch_norm:
        return None
    names = ("input", "running_mean", "running_var", "weight", "bias")
    args = bound(node, **dict.fromkeys(names), training=False, momentum=0.1, eps=1e-5)
    if args is None or args["input"] is not x or args["training"] is not False:
        return None
    mean, var, gamma, beta = (args[name] for name in names[1:])
    eps = number(args["eps"])
    there = (mean, var, *(t for t in (gamma, beta) if t is not None))
    if eps is None or any(tensor_of(t) is None for t in there):
        return None
    return Norm(gamma, beta, mean, var, float(eps))


def residual_of(node: Node, x: Node) -> Node | None:
    """What is added to x: a tensor of its shape and dtype."""
    target = function_of(node)
    if target not in (operator.add, operator.iadd, torch.add, "add", "add_"):
        return None
    args = bound(node, input=None, other=None, alpha=1)
    if args is None or number(args["alpha"]) != 1:
        return None
    one, other = args["input"], args["other"]
    if one is not x:
        if target in (operator.iadd, "add_"):  # which writes to the other
            return None
        one, other = other, one
    y, residual = tensor_of(x), tensor_of(other)
    if one is not x or other is x or y is None or residual is None:
        return None
    same = residual.dtype == y.dtype and residual.dim() == y.dim() and residual.shape == y.shape
    return other if same else None


_PLAIN: dict[Any, str] = {
    **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_"), "relu"),
    **{F.relu6: "relu6", F.silu: "silu", F.hardswish: "hardswish"},
}
_SLOPED = (F.leaky_relu, F.leaky_relu_)


def activation_of(node: Node, x: Node) -> Activation | None:
    """What is computed of x alone, if the ops have it."""
    target = function_of(node)
    if not node.args or node.args[0] is not x:
        return None
    if target in _PLAIN:
        return Activation(_PLAIN[target])
    if target is F.gelu:
        args = bound(node, input=None, approximate="none")
        names = {"none": "gelu", "tanh": "gelu_tanh"}
        name = None if args is None else names.get(args["approximate"])
        return None if name is None else Activation(name)
    if target is F.hardtanh:
        args = bound(node, input=None, min_val=-1.0, max_val=1.0, inplace=False)
        usual = args and (number(args["min_val"]), number(args["max_val"])) == (0, 6)
        return Activation("relu6") if usual else None
    if target in _SLOPED:
        args = bound(node, input=None, negative_slope=0.01, inplace=False)
        slope = None if args is None else number(args["negative_slope"])
        return None if slope is None else Activation("leaky_relu", float(slope))
    return None


def zeros_around(node: Any, axes: int) -> tuple[Node, list[int]] | None:
    """What is padded with zeros, and how far, before and after, axis by axis."""
    if not isinstance(node, Node) or function_of(node) not in PADS:
        return None
    args = bound(node, input=None, pad=None, mode="constant", value=None)
    if args is None or args["mode"] != "constant" or number(args["value"]) not in (None, 0):
        return None
    if args["value"] is not None and number(args["value"]) is None:
        return None
    pad = args["pad"]
    plain = isinstance(pad, Sequence) and all(type(entry) is int and entry >= 0 for entry in pad)
    if not plain or len(pad) > 2 * axes:
        return None
    pairs = [list(pad[i : i + 2]) for i in range(0, len(pad), 2)]  # the last axis comes first
    pairs += [[0, 0]] * (axes - len(pairs))
    return args["input"], [side for pair in reversed(pairs) for side in pair]


def nothing_dropped(node: Node) -> Node | None:
    """The argument of a dropout that is off."""
    if function_of(node) not in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
        return None
    args = bound(node, input=None, p=0.5, training=True, inplace=False)
    off = args is not None and args["training"] is False
    return args["input"] if off else None  # type: ignore[index]


# --- writing --------------------------------------------------------------------------------------


def written_by(node: Node) -> list[Node]:
    """The arguments that the call may write to, by what its name says; all, if it is not known."""
    target = function_of(node)
    tensors = [a for a in node.all_input_nodes if isinstance(value_of(a), Tensor)]
    first = [a for a in tensors if a is node.args[0]] if node.args else []
    if target is None or nothing_dropped(node) is not None:
        return []
    if isinstance(target, OpOverload):
        return tensors if target._schema.is_mutable else []
    if isinstance(target, HigherOrderOperator) or node.kwargs.get("out") is not None:
        return tensors
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if getattr(target, "__module__", None) == "_operator":
        writes = name == "setitem" or (name[:1] == "i" and name[1:] in _OPERATORS)
        return first if writes else []
    if name == "__setitem__" or (name.endswith("_") and not name.endswith("__")):
        return first or tensors  # of a list of tensors
    if target is F.batch_norm or target is F.instance_norm:
        return tensors if _argument(node, target, "training", "use_input_stats") else []
    if _argument(node, target, "max_norm"):  # F.embedding's
        return tensors
    return first if _argument(node, target, "inplace") else []


_OPERATORS = frozenset(
    ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and", "or", "xor")
) | {"lshift", "rshift", "concat"}


def _argument(node: Node, target: Any, *names: str) -> bool:
    """Whether one of these arguments is given and not False."""
    parameters = _parameters(target)
    given = dict(zip(parameters, node.args, strict=False)) | node.kwargs
    return any(given.get(name, parameters.get(name)) not in (False, None) for name in names)


def _parameters(target: Callable[..., Any]) -> dict[str, Any]:
    """By name, with the default; empty of what is written in C."""
    try:
        found = inspect.signature(target).parameters.values()
    except (TypeError, ValueError):
        return {}
    return {p.name: None if p.default is p.empty else p.default for p in found}
