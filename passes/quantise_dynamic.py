"""Matrix products on integers whose activations are quantised as they come, so that no calibration data are needed.

    x -> MatMul(W) [-> Add(b)]      becomes     x -> DynamicQuantizeLinear -> (q, s, z)
                                                y  = Cast(MatMulInteger(q, W_int8, z)) * (s * Sw) [+ b]

1. MatMul(x, W) with constant float W of rank 2; an Add of a bias behind it stays and is fused by onnxruntime.
2. Gemm(x, W, C) with alpha and transB in the constants; beta * C becomes an Add.

onnxruntime runs each as one DynamicQuantizeMatMul or, where several products read one x, as one DynamicQuantizeLinear with
MatMulIntegerToFloat. Weights: one symmetric scale a column, chosen by squared error, under the pair rule for `--target any`.

It must not fire, and counts the reason, on convolutions (ConvInteger is slower than float), on products of two activations, where
W is the left operand, of another rank than 2 or not float32, on Gemm with transA, nor on what `--exclude` names.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto, helper

from qcompile.context import Context
from qcompile.errors import ModelError, PassError
from qcompile.graph import Array, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op
from qcompile.passes._products import product_bias, product_matrix, product_refusal
from qcompile.qparams import quantise_weight
from qcompile.rewrite import Lossy, Promise, Report

_CONVOLUTION = "no data: a convolution needs static ranges; give --data"


@dataclass(frozen=True)
class QuantiseDynamic:
    """Dynamic activations, static int8 weights for MatMul and Gemm."""

    name: str = "quantise_dynamic"
    keeps: Promise = field(default_factory=Lossy)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a matrix product. Raises ModelError where there is none and none was done before."""
        report = Report()
        inserter = _Inserter(graph, context)
        for node in list(graph.nodes):
            if not is_op(node, "Conv", "ConvTranspose", "MatMul", "Gemm"):
                continue
            reason = dynamic_refusal(node, context)
            if reason is not None:
                report.refuse(node.label, reason)
                continue
            inserter.rewrite(node)
            report.rewrites += 1
        if not report.rewrites and not any(n.op == "MatMulInteger" for n in graph.nodes):
            raise ModelError("no node can be quantised without data: there is no Gemm/MatMul with constant weights; give --data")
        graph.cleanup()
        graph.sort()
        return report


def dynamic_refusal(node: Node, context: Context) -> str | None:
    """None where `node` becomes an integer product of dynamic activations, else why it stays float."""
    if is_op(node, "Conv", "ConvTranspose"):
        return context.settings.why_float(node.name) or _CONVOLUTION
    return product_refusal(node, context)


@dataclass
class _Inserter:
    graph: Graph
    context: Context
    quantised: dict[Tensor, Node] = field(default_factory=dict)  # one DynamicQuantizeLinear a tensor, whoever reads it

    def rewrite(self, node: Node) -> None:
        """Put the integer product in the place of `node`; its output keeps its name."""
        graph, x, output = self.graph, node.inputs[0], node.outputs[0]
        weight = node.constant(1)
        assert weight is not None
        matrix = product_matrix(node)
        bias = product_bias(graph, node)
        name, label, dims = weight.name, node.label, output.dims
        integers, scale = self._round(matrix, node)
        graph.remove(node)
        dynamic = self._quantise(x)
        stored = graph.constant(name + "_int8", integers)
        factor = graph.constant(name + "_scale", scale)
        product = graph.node(
            "MatMulInteger", [dynamic.outputs[0], stored, dynamic.outputs[2]], [output.name + "_int32"], name=label + "_integer"
        )
        as_float = graph.node("Cast", [product.outputs[0]], [output.name + "_cast"], to=TensorProto.FLOAT)
        scales = graph.node("Mul", [dynamic.outputs[1], factor], [output.name + "_scales"])
        result = output if bias is None else Value(graph.fresh_name(output.name + "_product"))
        if bias is not None and dims is not None:
            result.type = helper.make_tensor_type_proto(TensorProto.FLOAT, list(dims))
        graph.node("Mul", [as_float.outputs[0], scales.outputs[0]], [result], name=label)
        if bias is not None:
            graph.node("Add", [result, bias], [output])

    def _quantise(self, x: Tensor) -> Node:
        if x not in self.quantised:
            names = [x.name + "_quantized", x.name + "_scale", x.name + "_zero_point"]
            self.quantised[x] = self.graph.node("DynamicQuantizeLinear", [x], names, name=x.name + "_dq")
        return self.quantised[x]

    def _round(self, matrix: Array, node: Node) -> tuple[Array, Array]:
        """int8 [K, N] within the node's bits, and its scale [N]; the kernel's K order is that of the rows."""
        settings = self.context.settings
        try:
            result = quantise_weight(
                matrix.T,
                np.float32(1.0),
                None,
                pair_rule=settings.pair_rule,
                candidates=8 if settings.effort == "fast" else 24,
                top=settings.top_for(node.name),
            )
        except ValueError as error:
            raise PassError(f"node '{node.label}': {error}; leave it float with --exclude '{node.label}'") from error
        return np.ascontiguousarray(result.values.T), result.scale
