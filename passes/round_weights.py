"""Weights to int8, one scale a channel, on the grid where Sx*Sw/Sy is exactly b/2^16; ends in float: any scale.

    W [channels, K]  ->  DequantizeLinear(W_int8, Sw, axis)

The scale is chosen by squared error, each weight's weighted by the variance of its input, among the grid's points, under the
pair rule for `--target any` (depthwise convolutions are exempt: their kernels do not add products in pairs).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompile.context import Context
from qcompile.errors import PassError
from qcompile.graph import Const, Graph, Node, Value
from qcompile.moments import input_variance
from qcompile.plan import LinearSite
from qcompile.qparams import quantise_weight
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.walk import Stream

Array = npt.NDArray[Any]


def weight_matrix(weight: Array, op: str, axis: int) -> Array:
    """`[channels, K]` in the kernel's K order: (kh, kw, channel of the group) for Conv, rows of the product for Gemm."""
    if op == "Conv":
        return np.moveaxis(weight, 1, -1).reshape(weight.shape[0], -1)
    return np.moveaxis(weight, axis, 0)


def weight_tensor(matrix: Array, shape: tuple[int, ...], op: str, axis: int) -> Array:
    """The inverse of `weight_matrix`: back to the tensor's own `shape`."""
    if op == "Conv":
        return np.moveaxis(matrix.reshape(shape[0], *shape[2:], shape[1]), -1, 1)
    return np.moveaxis(matrix, 0, axis)


@dataclass(frozen=True)
class RoundWeights:
    """Round to nearest on the final dyadic scale."""

    name: str = "round_weights"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))  # 4 bits rounded to nearest may drown a net until refine_layers

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor."""
        report = Report()
        if context.plan is None:
            return report
        waiting = [site for site in context.plan.linears if site.weight_scale is None]
        weigh = waiting and context.settings.effort != "fast" and not context.synthetic and context.samples
        original = context.float_graph if weigh else None
        world = Stream(original, context.samples) if original is not None else None
        by_name = {n.name: n for n in original.nodes} if original is not None else {}
        for site in waiting:
            importance = _importance(by_name[site.node.name], world, context) if world is not None else None
            _round(graph, context, site, importance)
            report.rewrites += 1
        graph.cleanup()
        return report


def _importance(original: Node, world: Stream, context: Context) -> Array | None:
    """[channels, K]: the variance of what each weight multiplies, in the float model; None where nothing varies.

    An error of a weight counts as much as its input varies; the input's mean is bias correction's business.
    """
    source, weight = original.inputs[0], original.constant(1)
    assert isinstance(source, Value) and weight is not None
    values = world.values(source)
    variance = input_variance(original, weight.dims, values, len(values), context.settings.seed)
    if not (variance > 0).any():
        return None
    axis = 1 if original.op == "Gemm" and not original.attr("transB", 0) else 0
    channels = weight.dims[axis]
    # A weight whose input never varied still gets a small say: new data may move it.
    return np.repeat(variance + 1e-3 * variance.mean(), channels // variance.shape[0], axis=0)


def _round(graph: Graph, context: Context, site: LinearSite, importance: Array | None) -> None:
    node, settings = site.node, context.settings
    weight, bias = node.constant(1), node.constant(2)
    assert weight is not None and bias is not None
    values = weight.array()
    try:
        result = quantise_weight(
            weight_matrix(values, node.op, site.axis),
            site.source.scale,
            site.grid_scale,
            pair_rule=settings.pair_rule and not site.depthwise,
            candidates=8 if settings.effort == "fast" else 24,
            importance=importance,
            bias=bias.array(),
            top=settings.top_for(node.name),
            activation_top=context.activations.high - context.activations.low,
        )
    except ValueError as error:
        raise PassError(f"node '{node.label}': {error}; leave it float with --exclude '{node.label}'") from error
    site.weight_scale = result.scale
    integers = weight_tensor(result.values, values.shape, node.op, site.axis)
    site.stored = replace_weight(graph, node, integers, result.scale, site.axis)


def _zeros(graph: Graph, channels: int) -> Const:
    """The zero point of `channels` channels, one constant for all weights of that width."""
    name = f"weight_zero_point_{channels}"
    found = graph.constants.get(name)
    if found is not None and found.elem_type == TensorProto.INT8 and found.dims == (channels,) and not found.array().any():
        return found
    return graph.constant(name, np.zeros(channels, np.int8))


def replace_weight(graph: Graph, node: Node, integers: Array, scale: Array, axis: int) -> Const:
    """Let `node` read its weights through a DequantizeLinear with one scale a channel; returns the stored integers."""
    name = node.inputs[1].name
    stored = graph.constant(name + "_int8", np.ascontiguousarray(integers.astype(np.int8)))
    factor = graph.constant(name + "_scale", scale.astype(np.float32))
    zero = _zeros(graph, scale.size)
    dequantise = graph.node(
        "DequantizeLinear", [stored, factor, zero], [name + "_dequantized"], name=node.label + "_weight_dq", axis=axis
    )
    node.inputs[1] = dequantise.outputs[0]
    return stored
