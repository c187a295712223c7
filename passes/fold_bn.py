"""BatchNormalization is a scale and a shift a channel: s = gamma / sqrt(var + eps), t = beta - mean * s, BN(x) = s x + t.

1. Behind Conv, ConvTranspose, Gemm, MatMul (+ Add):    s (W x + b) + t = (s W) x + (s b + t).
2. Before Conv, Gemm, MatMul that alone reads it:       W (s x + t) + b = (W s) x + (W t + b), s and t along the input channels.
3. Alone: a depthwise 1x1 Conv with weights s and bias t where the rank is 4, else Mul and Add.

It must not fire in training mode, with statistics that are not constant or not finite, or where the rank is unknown. Case 1
needs the linear output to be read by nothing else and not to be an output of the graph. Case 2 needs a convolution without
padding (a padded 0 would have to be -t / s), unless t is 0. Where these fail the BatchNormalization goes the way of case 3, and
the reason is counted. Computed in float64, stored in the type of the weights. A variance below -eps is an error, not a NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.errors import ModelError
from qcompile.graph import Array, Graph, Node, Value
from qcompile.passes._linear import Linear, absorb, bias_of, linear_at, weight_of, write
from qcompile.passes._match import array_of, is_op, set_type, single_consumer
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class FoldBatchNorm:
    """Take every BatchNormalization into the linear operator before or after it."""

    name: str = "fold_bn"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """One visit of each BatchNormalization, in topological order."""
        graph.infer_shapes()
        report = Report()
        for node in list(graph.nodes):
            if not is_op(node, "BatchNormalization"):
                continue
            pair = scale_and_shift(node)
            if isinstance(pair, str):
                report.refuse(node.label, pair)
                continue
            scale, shift = pair
            for fold in (_behind, _before, _alone):
                reason = fold(graph, node, scale, shift)
                if reason is None:
                    report.rewrites += 1
                    break
                if reason:
                    report.refuse(node.label, reason)
        graph.cleanup()
        return report


def scale_and_shift(node: Node) -> tuple[Array, Array] | str:
    """s and t in float64, or the reason why they cannot be known. Raises ModelError where var + eps is not positive."""
    if node.attr("training_mode", 0) or any(o.name and o.consumers for o in node.outputs[1:]):
        return "training mode"
    if node.attr("spatial", 1) == 0:
        return "statistics for every element (spatial=0)"
    constants = [array_of(node, i) for i in range(1, 5)]
    arrays = [c.astype(np.float64) for c in constants if c is not None]
    if len(arrays) < 4:
        return "parameters are not constant"
    gamma, beta, mean, var = arrays
    spread = var + float(node.attr("epsilon", 1e-5))
    if not np.all(spread > 0):
        variance = node.inputs[4].name
        raise ModelError(f"node '{node.label}': variance + epsilon is not positive in '{variance}'; export the model again")
    scale = gamma / np.sqrt(spread)
    return scale, beta - mean * scale


def _behind(graph: Graph, node: Node, scale: Array, shift: Array) -> str | None:
    """Case 1: None where done, an empty text where there is no linear operator, else a reason."""
    linear = linear_at(graph, node.inputs[0])
    if linear is None:
        return ""
    if linear.channel_axis == -1 and linear.rank != 2:
        return "axis 1 is not the output channel of the MatMul"
    if single_consumer(graph, linear.output) is not node:
        return "the linear output is read elsewhere, or is an output of the graph"
    return absorb(graph, linear, scale, shift, node)


def _before(graph: Graph, node: Node, scale: Array, shift: Array) -> str | None:
    """Case 2, answers as in case 1."""
    follower = single_consumer(graph, node.outputs[0])
    if follower is None or not is_op(follower, "Conv", "Gemm", "MatMul") or follower.inputs[0] is not node.outputs[0]:
        return ""
    linear = linear_at(graph, follower.outputs[0])
    if linear is None or follower.inputs.count(node.outputs[0]) > 1:
        return ""
    if follower.op != "Conv" and (follower.attr("transA", 0) or node.inputs[0].dims is None or len(node.inputs[0].dims) != 2):
        return "axis 1 is not the input channel of the matrix product"
    padded = any(follower.attr("pads", ())) or follower.attr("auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    if follower.op == "Conv" and padded and np.any(shift):
        return "padding would see the shift"
    bias = bias_of(linear)
    if bias is None:
        return "Gemm adds a whole matrix"
    weight = weight_of(linear)
    moved = _through(linear, weight, shift) * (float(follower.attr("alpha", 1.0)) if follower.op == "Gemm" else 1.0)
    result = write(graph, linear, _scaled_inputs(linear, weight, scale), bias + moved if np.any(bias + moved) else None)
    if result is not follower.outputs[0]:  # a MatMul that had no bias got an Add
        _move_output(graph, follower.outputs[0], result)
    graph.bypass(node, node.inputs[0])
    return None


def _alone(graph: Graph, node: Node, scale: Array, shift: Array) -> str | None:
    """Case 3."""
    x, y = node.inputs[0], node.outputs[0]
    if x.dims is None:
        return "rank is not known"
    dtype, channels = node.inputs[1].array().dtype if node.constant(1) is not None else np.dtype(np.float32), len(scale)
    if len(x.dims) == 4:
        weight = graph.constant(y.name + "_scale", scale.astype(dtype).reshape(channels, 1, 1, 1))
        bias = graph.constant(y.name + "_shift", shift.astype(dtype))
        conv = graph.node("Conv", [x, weight, bias], [y.name + "_bn"], group=channels, kernel_shape=[1, 1])
        result = conv.outputs[0]
    else:
        per_channel = (channels, *[1] * (len(x.dims) - 2))
        factor = graph.constant(y.name + "_scale", scale.astype(dtype).reshape(per_channel))
        summand = graph.constant(y.name + "_shift", shift.astype(dtype).reshape(per_channel))
        product = graph.node("Mul", [x, factor], [y.name + "_scaled"]).outputs[0]
        set_type(product, x.elem_type, x.dims)
        result = graph.node("Add", [product, summand], [y.name + "_bn"]).outputs[0]
    set_type(result, x.elem_type, y.dims)
    graph.bypass(node, result)
    return None


def _by_input(linear: Linear, values: Array) -> Array:
    """`values`, one an input channel, in a shape that multiplies what `_grouped` gives."""
    groups = int(linear.node.attr("group", 1)) if linear.node.op == "Conv" else 1
    return values.reshape(groups, 1, -1, 1)


def _grouped(linear: Linear, weight: Array) -> Array:
    """`weight` as [groups, out / groups, in / groups, kernel elements]."""
    node = linear.node
    if node.op == "Conv":
        groups = int(node.attr("group", 1))
        return weight.reshape(groups, weight.shape[0] // groups, weight.shape[1], -1)
    rows = weight if node.op == "Gemm" and node.attr("transB", 0) else weight.T
    return rows[None, :, :, None]


def _scaled_inputs(linear: Linear, weight: Array, scale: Array) -> Array:
    node = linear.node
    if node.op == "Conv":
        return (_grouped(linear, weight) * _by_input(linear, scale)).reshape(weight.shape)
    return weight * scale if node.op == "Gemm" and node.attr("transB", 0) else weight * scale[:, None]


def _through(linear: Linear, weight: Array, shift: Array) -> Array:
    """W t: what a constant t at the input adds to each output channel; shape [channels]."""
    return np.asarray((_grouped(linear, weight) * _by_input(linear, shift)).sum(axis=(2, 3)).reshape(-1))


def _move_output(graph: Graph, product: Value, result: Value) -> None:
    """Let `result`, computed from `product`, stand for it everywhere else; the name of a graph output goes along."""
    producer = result.inputs[0]
    if graph.is_pinned(product):
        inner = Value(graph.fresh_name(product.name + "_product"))
        inner.type = product.type
        product.inputs[0].outputs[0] = inner
        graph.replace_uses(product, inner, only=lambda n: n is producer)
        producer.outputs[0] = product
    else:
        graph.replace_uses(product, result, only=lambda n: n is not producer)
