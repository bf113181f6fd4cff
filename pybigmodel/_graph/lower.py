"""This library's ops in the place of the chains that were found."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pybigmodel import _native
from pybigmodel._graph.chains import Chain, Surroundings
from pybigmodel._graph.nodes import Conv, Linear, tensor_of, value_of
from pybigmodel._graph.weights import Recipe
from pybigmodel._torch_private import size_hint
from pybigmodel.nn._conv_plan import conv_op, conv_packed_op
from pybigmodel.nn._packing import ConvKey, Key
from pybigmodel.ops._common import CONV_ACTIVATIONS
from pybigmodel.ops._conv_geometry import AUTO, Geometry, exact_algorithm, is_channels_last

_linear_op = torch.ops.pybigmodel.linear.default
_linear_packed_op = torch.ops.pybigmodel.linear_packed.default


class Lowering:
    """Of one graph.

    turns: whether images of two and three axes are given in channels_last. `turned` are those that
    torch would have given otherwise, `recipes` the packed weights that the graph takes behind its
    own inputs, `examples` what they will look like.
    """

    def __init__(self, graph: Graph, around: Surroundings, turns: bool) -> None:
        self.recipes: list[Recipe] = []
        self.examples: list[Tensor] = []
        self._graph, self._around, self._turns = graph, around, turns
        self._inputs = [node for node in graph.nodes if node.op == "placeholder"]
        self._at = {node: i for i, node in enumerate(self._inputs)}
        self._made: dict[Recipe, list[Node]] = {}
        self._new: dict[Any, Node] = {}  # by the last node of the chain that it stands for
        self.turned: list[Node] = []

    def lower(self, chain: Chain) -> None:
        packed, last = self._around.admit(chain), chain.last
        chain.product = chain.product._replace(x=self._now(chain.product.x))
        chain.residual = self._now(chain.residual)
        with self._graph.inserting_before(last):
            if isinstance(chain.product, Conv):
                new = self._conv(chain, chain.product, packed)
            else:
                new = self._linear(chain, chain.product, packed)
        new.meta = last.meta.copy()
        self._new[last] = new
        last.replace_all_uses_with(new)
        for node in reversed(chain.nodes):
            self._graph.erase_node(node)

    def _now(self, node: Any) -> Any:
        return self._new.get(node, node)

    def _conv(self, chain: Chain, conv: Conv, packed: bool) -> Node:
        weight: Any = tensor_of(conv.weight)
        padding = conv.padding
        if chain.extra:
            padding = [a + b for a, b in zip(padding, chain.extra, strict=True)]
        x, y = value_of(conv.x), value_of(chain.last)
        bf16 = conv.precision == 1 or torch.bfloat16 in (y.dtype, weight.dtype)
        last = is_channels_last(y) or (self._turns and y.dim() > 3)
        how = (list(conv.stride), list(padding), list(conv.dilation), conv.groups)
        if not packed:
            algorithm = AUTO
            if conv.exact:
                geometry = Geometry(x.shape[2:], weight.shape, *how, bf16=bf16)
                algorithm = exact_algorithm(geometry, last)
            args: tuple[Any, ...] = (conv.x, conv.weight, conv.bias, *how, conv.precision)
            return self._given(conv_op, (*args, algorithm, last), last, y)
        size, sizes = [size_hint(size) for size in x.shape], list(weight.shape)
        algorithm = _native.conv_algorithm(size, sizes, *how, bf16, conv.exact, last)
        key = ConvKey(conv.groups, _rounding(bf16, weight), algorithm)
        copy, bias = self._packed(chain, key, conv.bias)
        if bias is not None and value_of(bias).dtype != torch.float32:
            # In a sequence no autocast does it.
            bias = self._in_dtype(bias, y.dtype)
        act = chain.activation
        code, slope = (CONV_ACTIVATIONS[act.name], act.slope) if act else (0, 0.0)
        args = (
            *(self._in_dtype(conv.x, y.dtype), copy, weight.shape[0], list(weight.shape[2:])),
            *(bias, chain.residual, *how, code, slope, algorithm, last),
        )
        return self._given(conv_packed_op, args, last, y)

    def _given(self, op: Any, args: tuple[Any, ...], last: bool, y: Tensor) -> Node:
        node = self._graph.call_function(op, args)
        if last and not is_channels_last(y):
            self.turned.append(node)
        return node

    def _linear(self, chain: Chain, linear: Linear, packed: bool) -> Node:
        weight: Any = tensor_of(linear.weight)
        y: Any = tensor_of(chain.last)
        if not packed:
            args: tuple[Any, ...] = (linear.x, linear.weight, linear.bias, linear.precision)
            return self._graph.call_function(_linear_op, args)
        bf16 = linear.precision == 1 or y.dtype == torch.bfloat16
        copy, bias = self._packed(chain, _rounding(bf16, weight), linear.bias)
        code = CONV_ACTIVATIONS[chain.activation.name] if chain.activation else 0
        x = self._in_dtype(linear.x, y.dtype)
        args = (x, copy, weight.shape[0], bias, chain.residual, code)
        return self._graph.call_function(_linear_packed_op, args)

    def _in_dtype(self, x: Node, dtype: torch.dtype) -> Node:
        """As autocast casts it."""
        if value_of(x).dtype == dtype:
            return x
        new = self._graph.call_method("to", (x, dtype))
        new.meta["example_value"] = value_of(x).to(dtype)
        return new

    def _packed(self, chain: Chain, key: Key, bias: Node | None) -> tuple[Node, Node | None]:
        """The inputs that are the packed weight and the bias."""
        at = [None if node is None else self._at[node] for node in chain.sources]
        recipe = Recipe(tuple(at), chain.norm.eps if chain.norm else None, key)
        if recipe not in self._made:
            tensors = tuple(None if node is None else value_of(node) for node in chain.sources)
            self.recipes.append(recipe)
            self._made[recipe] = [self._input(t) for t in recipe.examples(tensors)]
        copy, *folded = self._made[recipe]
        return copy, folded[0] if folded else bias

    def _input(self, example: Tensor) -> Node:
        with self._graph.inserting_after(self._inputs[-1]):
            node = self._graph.placeholder(f"pybigmodel_packed_{len(self.examples)}")
        node.meta["example_value"] = example
        vars(node).update(_dynamo_source=None)
        self._inputs.append(node)
        self.examples.append(example)
        return node


def _rounding(bf16: bool, weight: Tensor) -> int:
    """The precision that the packed weight is made with: of bfloat16 there is one."""
    return int(bf16 and weight.dtype != torch.bfloat16)
