"""Products in Dynamo's graph, each with what is done in one op with it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from torch import Tensor
from torch.fx import Graph, Node

from pybigmodel._graph.nodes import (
    Activation,
    Conv,
    Linear,
    Norm,
    Options,
    activation_of,
    conv_of,
    linear_of,
    norm_of,
    residual_of,
    value_of,
    zeros_around,
)
from pybigmodel._graph.writes import Writes
from pybigmodel.ops._common import ACTIVATIONS


@dataclass
class Chain:
    """``act(norm(x * W + b) + r)``, or of a linear layer ``act(x·Wᵀ + b) + r``."""

    product: Conv | Linear
    nodes: list[Node]  # the product's, then what follows it
    norm: Norm | None = None
    residual: Node | None = None
    activation: Activation | None = None
    extra: list[int] = field(default_factory=list)  # padding beside the convolution's

    @property
    def last(self) -> Node:
        return self.nodes[-1]

    @property
    def sources(self) -> tuple[Node | None, ...]:
        """What the packed weight is made of."""
        if self.norm is None:
            return (self.product.weight,)
        return (self.product.weight, self.product.bias, *self.norm[:4])

    @property
    def reads(self) -> list[Node]:
        """What the op reads of what the product read."""
        bias = self.product.bias
        return [self.product.x] if bias is None or self.norm else [self.product.x, bias]


class Surroundings(NamedTuple):
    """What decides whether a chain may be one op, beside itself."""

    writes: Writes
    parameters: frozenset[Node]  # inputs

    def admit(self, chain: Chain) -> bool:
        """Whether the weight may be packed ahead: a Parameter, which the graph only reads."""
        weight, *rest = chain.sources
        return (
            weight in self.parameters
            and not _records(chain.last)
            and all(type(size) is int for size in value_of(weight).shape)  # else compiled for any
            and not any(
                node is not None and (node.op != "placeholder" or self.writes.ever(node))
                for node in (weight, *rest)
            )
        )


def find(graph: Graph, options: Options, around: Surroundings) -> list[Chain]:
    """Every product, in order; what follows it is in one chain only."""
    chains, taken = [], set[Node]()
    for node in graph.nodes:
        product = conv_of(node, options) or linear_of(node, options)
        if product is not None:
            chain = Chain(product, [node])
            if around.admit(chain):
                _extend(chain, around, taken)
            chains.append(chain)
            taken.update(chain.nodes)
    return chains


def _records(node: Node) -> bool:
    value = value_of(node)
    return not isinstance(value, Tensor) or value.requires_grad


def _extend(chain: Chain, around: Surroundings, taken: set[Node]) -> None:
    """Take in what follows, while it is there for this alone and may be computed at its place."""
    while True:
        last = chain.last
        (user,) = last.users if len(last.users) == 1 else (None,)
        if user is None or user in taken or user.op == "output" or _records(user):
            break
        if not around.writes.together(chain.nodes[0], user):
            break
        if value_of(user).dtype != value_of(last).dtype or not _take(chain, user, around):
            break
    if isinstance(chain.product, Conv):
        _take_padding(chain, around.writes)


def _take(chain: Chain, node: Node, around: Surroundings) -> bool:
    """Whether the op does this too, after what it does already."""
    longer = _with_next(chain, node)
    if longer is None or not around.admit(longer):
        return False
    writes, first = around.writes, chain.nodes[0]
    # What is read at the place of the last may not have been written to since the first.
    if any(writes.between(read, first, node) for read in longer.reads):
        return False
    if chain.residual is not None and writes.between(chain.residual, chain.last, node):
        return False
    vars(chain).update(vars(longer))
    return True


def _with_next(chain: Chain, node: Node) -> Chain | None:
    """The op's order: a convolution adds before its activation, a linear layer after it."""
    last, convolution = chain.last, isinstance(chain.product, Conv)
    nodes = [*chain.nodes, node]
    if convolution and len(chain.nodes) == 1:
        norm = norm_of(node, last)
        if norm is not None:
            return replace(chain, nodes=nodes, norm=norm)
    if chain.residual is None and (chain.activation is None or not convolution):
        residual = residual_of(node, last)
        if residual is not None:
            return replace(chain, nodes=nodes, residual=residual)
    if chain.activation is None and (chain.residual is None or convolution):
        activation = activation_of(node, last)
        if activation is not None and (convolution or activation.name in ACTIVATIONS):
            return replace(chain, nodes=nodes, activation=activation)
    return None


def _take_padding(chain: Chain, writes: Writes) -> None:
    product = chain.product
    assert isinstance(product, Conv)
    found = zeros_around(product.x, len(product.stride))
    if found is None or len(product.x.users) != 1:
        return
    padded, extra = found
    same = value_of(padded).dim() == value_of(product.x).dim()
    if same and not writes.between(padded, product.x, chain.last):
        chain.nodes.insert(0, product.x)
        chain.product, chain.extra = product._replace(x=padded), extra
