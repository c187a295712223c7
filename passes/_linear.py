"""Linear operators with constant weights, y = W x + b, and the one edit that fusions make: y -> scale * y + shift.

Weights are edited in float64 and stored in the type they had. A constant is never changed in place: the node gets its own copy,
so weights shared with another node are safe. MatMul has no bias; the Add of a constant right behind it counts as its bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.graph import Array, Const, Graph, Node, Tensor, Value
from qcompile.passes._match import FLOATS, is_op, set_type, single_consumer, split_operands

LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Linear:
    """A linear node, the Add that holds a MatMul's bias if there is one, and the number of output channels."""

    node: Node
    add: Node | None
    channels: int

    @property
    def output(self) -> Value:
        """The tensor after the bias."""
        return (self.add or self.node).outputs[0]

    @property
    def channel_axis(self) -> int:
        """1 for convolutions, -1 for matrix products."""
        return 1 if self.node.op in ("Conv", "ConvTranspose") else -1

    @property
    def rank(self) -> int | None:
        """Rank of the output, None where unknown."""
        if self.node.op == "Gemm":
            return 2
        if self.channel_axis == 1:
            return len(self.node.inputs[1].dims or ())
        dims = self.node.inputs[0].dims
        return None if dims is None else len(dims)


def output_axis(node: Node) -> int:
    """The axis of the weight of a Conv, Gemm or MatMul that runs over its output channels."""
    return 1 if is_op(node, "MatMul") or (is_op(node, "Gemm") and not node.attr("transB", 0)) else 0


def linear_at(graph: Graph, tensor: Tensor | None) -> Linear | None:
    """The linear operator that ends in `tensor`, with constant float weights; None where there is none."""
    node = tensor.producer if tensor is not None else None
    add: Node | None = None
    if node is not None and is_op(node, "Add"):
        operands = split_operands(node)
        before = operands[0].producer if operands is not None else None
        if operands is None or before is None or not is_op(before, "MatMul") or single_consumer(graph, operands[0]) is not node:
            return None
        node, add = before, node
    if node is None or not is_op(node, *LINEAR):
        return None
    weight = node.constant(1)
    if weight is None or weight.elem_type not in FLOATS or (node.op in ("MatMul", "Gemm") and len(weight.dims) != 2):
        return None
    if node.input(2) is not None and node.constant(2) is None:
        return None
    linear = Linear(node, add, _channels(node, weight))
    if add is not None and channel_vector(linear, split_operands(add)[1]) is None:  # type: ignore[index]
        return None
    return linear


def with_bias(graph: Graph, node: Node) -> Linear | None:
    """`linear_at` from its first node: `node` with the Add of its bias; None where a MatMul has none."""
    output: Tensor = node.outputs[0]
    if node.op == "MatMul":
        readers = output.consumers
        if len(readers) != 1 or not is_op(readers[0], "Add"):
            return None
        output = readers[0].outputs[0]
    linear = linear_at(graph, output)
    return linear if linear is not None and linear.node is node else None


def _channels(node: Node, weight: Const) -> int:
    if node.op == "ConvTranspose":
        return weight.dims[1] * int(node.attr("group", 1))
    if node.op == "Conv" or (node.op == "Gemm" and node.attr("transB", 0)):
        return weight.dims[0]
    return weight.dims[1]


def channel_vector(linear: Linear, const: Const) -> Array | None:
    """`const` as one float64 number a channel, where it broadcasts against the output in that way alone; shape [channels]."""
    rank, dims = linear.rank, const.dims
    if len(dims) > (rank if rank is not None else 1):
        return None
    axis = linear.channel_axis if linear.channel_axis < 0 else 1 - (rank or 0)
    for place, size in enumerate(dims, start=-len(dims)):
        if size != 1 and (place != axis or size != linear.channels):
            return None
    return np.array(np.broadcast_to(const.array().astype(np.float64).reshape(-1), (linear.channels,)))


def bias_of(linear: Linear) -> Array | None:
    """The bias as float64 [channels], zeros where there is none; None where a Gemm adds a whole matrix."""
    if linear.add is not None:
        operands = split_operands(linear.add)
        return None if operands is None else channel_vector(linear, operands[1])
    const = linear.node.constant(2)
    if const is None:
        return np.zeros(linear.channels)
    beta = float(linear.node.attr("beta", 1.0)) if linear.node.op == "Gemm" else 1.0
    values = const.array().astype(np.float64)
    if linear.node.op == "Gemm" and any(d != 1 for d in values.shape[:-1]):
        return None
    return np.array(np.broadcast_to(beta * values.reshape(-1), (linear.channels,)))


def weight_of(linear: Linear) -> Array:
    """The weights in float64, in the layout of the node."""
    const = linear.node.constant(1)
    if const is None:
        raise TypeError(f"{linear.node.label}: its weights are not constant")
    return const.array().astype(np.float64)


def scaled(linear: Linear, weight: Array, scale: Array) -> Array:
    """`weight` with each output channel multiplied by `scale` [channels]."""
    node = linear.node
    if node.op == "ConvTranspose":  # [C, M/g, k...]: channel m of the output is group m // (M/g)
        groups = int(node.attr("group", 1))
        split = weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
        return (split * scale.reshape(groups, 1, weight.shape[1], 1)).reshape(weight.shape)
    if node.op == "Conv" or (node.op == "Gemm" and node.attr("transB", 0)):
        return weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
    return weight * scale


def scaled_inputs(node: Node, weight: Array, scale: Array) -> Array:
    """`weight` of a Conv or Gemm with what it reads multiplied by `scale`, one number an input channel or column."""
    if node.op == "Gemm":
        return weight * (scale if node.attr("transB", 0) else scale[:, None])
    groups, width = int(node.attr("group", 1)), weight.shape[1]  # [M, C/g, k...]: channel m reads group m // (M/g)
    factors = np.repeat(scale.reshape(groups, width), weight.shape[0] // groups, axis=0)
    return np.asarray(weight * factors.reshape(*factors.shape, *[1] * (weight.ndim - 2)))


def input_shift(node: Node, weight: Array, shift: Array) -> Array:
    """What a Conv (without padding) or Gemm adds to each output channel when `shift` is added to what it reads."""
    moved = scaled_inputs(node, weight, shift)
    outputs = 1 if node.op == "Gemm" and not node.attr("transB", 0) else 0
    return np.asarray(moved.sum(axis=tuple(a for a in range(moved.ndim) if a != outputs)))


def write(graph: Graph, linear: Linear, weight: Array, bias: Array | None) -> Value:
    """Give the node its own new weights and bias (None: leave it without); returns the tensor that holds the result now."""
    node, old = linear.node, linear.node.inputs[1]
    dtype = old.array().dtype if isinstance(old, Const) else np.dtype(np.float32)
    node.inputs[1] = graph.constant(old.name, weight.astype(dtype))
    if bias is None:
        return linear.output
    if linear.node.op != "MatMul":
        name = node.inputs[2].name if node.input(2) is not None else old.name + "_bias"
        const = graph.constant(name, bias.astype(dtype))
        if len(node.inputs) > 2:
            node.inputs[2] = const
        else:
            node.inputs.append(const)
        if node.op == "Gemm":
            node.attrs.pop("beta", None)
        return linear.output
    if linear.add is not None:
        place = next(i for i, t in enumerate(linear.add.inputs) if isinstance(t, Const))
        linear.add.inputs[place] = graph.constant(linear.add.inputs[place].name, bias.astype(dtype))
        return linear.output
    product = node.outputs[0]
    added = graph.node("Add", [product, graph.constant(old.name + "_bias", bias.astype(dtype))], [product.name + "_bias"])
    set_type(added.outputs[0], product.elem_type, product.dims)
    return added.outputs[0]


def absorb(graph: Graph, linear: Linear, scale: Array, shift: Array, follower: Node) -> str | None:
    """Replace `follower`, which computes scale * y + shift a channel, by new weights and bias; a reason where that cannot be."""
    bias = bias_of(linear)
    if bias is None:
        return "Gemm adds a whole matrix"
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(shift))):
        return "scale or shift is not finite"
    has_bias = linear.add is not None or linear.node.input(2) is not None
    total = bias * scale + shift
    weight = weight_of(linear) if np.all(scale == 1) else scaled(linear, weight_of(linear), scale)
    result = write(graph, linear, weight, total if has_bias or np.any(total) else None)
    graph.bypass(follower, result)
    return None
