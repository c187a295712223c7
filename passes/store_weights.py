"""Weights of layers whose activations stay float, stored as integers (`activations = "float"` of a node, mixed precision).

    y = x * W + c    ->    y = x * DequantizeLinear(W_int, s, axis 0) + c'        Conv, Gemm (transB = 1); one scale a channel

For layers with sensitive activations: the file gets smaller by their weights, their arithmetic stays float32. Rounded as integer
layers are, but on any scale: second order on the covariance of what reaches the layer when all before it are rounded, the mean
error taken into the bias (on the second moment about zero, where there is no bias to take it). Without samples, and for effort
`fast`: to nearest. Integer layers behind it learn their weights with it in place.

onnxruntime (1.32) makes MatMulNBits of DequantizeLinear -> Gemm or MatMul, which rounds activations to 8 bits after all, but not
of a Gemm with transB. So a Gemm's weights are stored transposed, and the pass must not fire on a MatMul that `linear_form` left;
nor, the reason counted, on transposed convolutions and on what integer kernels refuse as well (`placement.weight_refusal`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import FLOAT_BITS, Context, matches
from qcompile.errors import DataError, InputError
from qcompile.graph import Array, Graph, Node, Value
from qcompile.moments import input_covariance, input_moment
from qcompile.passes._linear import bias_of, output_axis, with_bias, write
from qcompile.passes._linear_rounding import LinearRounding, RoundedLinear, reduction
from qcompile.passes._match import is_op
from qcompile.passes.round_weights import replace_weight
from qcompile.placement import maker, weight_refusal
from qcompile.rewrite import Lossy, Promise, Report
from qcompile.rounding import WIDEST
from qcompile.walk import Stream, linear_mean, mean_of

_CANDIDATES = {"default": 8, "best": 24}  # scales tried beside the first
WRITTEN = "integers all the same: an integer node writes what it reads, or it is an input that others read in integers"
_WIDE = "reduction too wide for a covariance in memory: rounded to nearest"


@dataclass(frozen=True)
class StoreWeights:
    """Integers behind DequantizeLinear for the weights of float layers; in front of all rounding that is learned."""

    name: str = "store_weights"
    keeps: Promise = field(default_factory=lambda: Lossy(-30.0))  # 2 bits rounded to nearest leave little of a layer

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a layer. Raises InputError where what a user names has no weights that could be stored."""
        report, plan, settings = Report(), context.plan, context.settings
        if plan is None or plan.stored or not settings.stores_any:
            return report
        graph.sort()
        asked = [n for n in graph.nodes if is_op(n, "Conv", "ConvTranspose", "Gemm", "MatMul") and settings.stores(n.name)]
        reasons = {node: _refusal(node) for node in asked}
        for pattern, bits in settings.node_activations:
            if bits == FLOAT_BITS and not any(matches(n.name, pattern) for n in asked):
                raise InputError(f'[nodes] {pattern}: activations "float": no such node multiplies by weights in float')
        for node, reason in reasons.items():
            if reason is not None:
                report.refuse(node.label, reason)
            elif is_op(maker(node.inputs[0]), "DequantizeLinear"):
                report.refuse(node.label, WRITTEN)
        able = [node for node in asked if reasons[node] is None]
        stream = Stream(graph, context.samples) if context.measures else None
        found: list[tuple[Node, RoundedLinear]] = []
        for node in able:
            if context.progress is not None:
                context.progress("rounding weights")
            found.append((node, _round(graph, context, node, stream, report)))
        for node, rounded in found:
            stored = replace_weight(graph, node, rounded.integers, rounded.scale, rounded.axis)
            plan.stored[stored.name] = settings.bits_for(node.name)
        report.rewrites = len(found)
        graph.cleanup()
        graph.sort()
        return report


def _refusal(node: Node) -> str | None:
    if node.op == "ConvTranspose":
        return "a transposed convolution keeps its float weights"
    if node.op == "MatMul" and node.constant(1) is not None:
        return "a MatMul of this form: onnxruntime would round its activations, and it is no Gemm"
    return weight_refusal(node)


def _round(graph: Graph, context: Context, node: Node, stream: Stream | None, report: Report) -> RoundedLinear:
    """Round, let `node` multiply by what the integers stand for (its own constant), and move its bias."""
    settings, const, axis = context.settings, node.constant(1), output_axis(node)
    assert const is not None
    weight = const.array()
    linear = with_bias(graph, node)
    old_bias = bias_of(linear) if linear is not None else None
    moves = old_bias is not None and settings.bias_correction
    inputs = _inputs(node, stream)
    second = None
    if inputs and reduction(weight, node.op, axis) > WIDEST:
        report.refuse(node.label, _WIDE)
    elif inputs:
        statistic = input_covariance if moves else input_moment
        second = statistic(node, weight.shape, inputs, len(inputs), settings.seed)
    groups = int(node.attr("group", 1)) if node.op == "Conv" else 1
    rounding = LinearRounding(weight, node.op, axis, groups, second, _CANDIDATES.get(settings.effort, 0), paired=False)
    rounded = rounding.round(settings.bits_for(node.name))
    values, bias = rounded.dequantised(), None
    if moves and inputs and old_bias is not None:
        bias = old_bias + linear_mean(node, weight - values, mean_of(inputs))
    if node.op == "Gemm" and axis == 1:
        node.set_attr("transB", 1)
        rounded, values = rounded.transposed(), values.T
    if linear is not None and bias is not None:
        write(graph, linear, values, bias)
    else:
        node.inputs[1] = graph.constant(const.name, values)  # its own: another reader may have other integers
    return rounded


def _inputs(node: Node, stream: Stream | None) -> list[Array]:
    """What `node` reads, for each sample; nothing without samples. Raises DataError where that is not finite."""
    source = node.inputs[0]
    if stream is None or not isinstance(source, Value):
        return []
    values = stream.values(source)
    if not all(np.isfinite(v).all() for v in values):
        raise DataError(f"node '{node.label}': the calibration data make its input NaN or infinite; check --data")
    return values
