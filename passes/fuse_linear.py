"""a * (W x + b) + c -> (a W) x + (a b + c), with a and c one number a channel.

1. Conv, ConvTranspose, Gemm or MatMul with constant weights, followed by Add, Sub, Mul or Div with a constant that is a scalar or
   one number an output channel ([C, 1, 1] or [1, C, 1, 1] behind a convolution, [N] behind a matrix product).
2. A MatMul keeps its bias in the Add behind it; further factors and Adds are merged into both.

It must not fire where the product is read elsewhere too or is an output of the graph, where the constant has any other shape, is
zero in a Div or not finite, or where the bias of a Gemm is a whole matrix. The products are formed in float64.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node
from qcompile.passes._linear import absorb, channel_vector, linear_at
from qcompile.passes._match import is_op, single_consumer, split_operands, visit
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class FuseLinear:
    """Take factors and summands behind a linear operator into its weights and bias."""

    name: str = "fuse_linear"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """In topological order, so that a chain of factors is taken in from its start."""
        graph.infer_shapes()
        return visit(graph, ("Add", "Sub", "Mul", "Div"), _fuse)


def _fuse(graph: Graph, node: Node) -> str | None:
    """None where `node` was taken in, an empty text where it is no candidate, else the reason for leaving it."""
    operands = split_operands(node)
    linear = linear_at(graph, operands[0]) if operands is not None else None
    if operands is None or linear is None:
        return ""
    if (
        linear.node.op == "MatMul"
        and linear.add is None
        and is_op(node, "Add")
        and channel_vector(linear, operands[1]) is not None
    ):
        return ""  # this Add is the bias of the MatMul
    if single_consumer(graph, operands[0]) is not node:
        return "the linear output is read elsewhere, or is an output of the graph"
    vector = channel_vector(linear, operands[1])
    if vector is None:
        return "the constant is not one number a channel"
    pair = _scale_and_shift(node, vector)
    return pair if isinstance(pair, str) else absorb(graph, linear, *pair, node)


def _scale_and_shift(node: Node, vector: Array) -> tuple[Array, Array] | str:
    ones, zeros = np.ones_like(vector), np.zeros_like(vector)
    constant_first = node.constant(0) is not None
    if node.op == "Add":
        return ones, vector
    if node.op == "Sub":
        return (-ones, vector) if constant_first else (ones, -vector)
    if node.op == "Mul":
        return vector, zeros
    if constant_first:
        return "a constant divided by the product is not linear"
    if np.any(vector == 0):
        return "division by zero"
    return 1 / vector, zeros
