"""Matrix products with a constant matrix, MatMul or Gemm, as the passes that need no calibrated ranges see them."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Array, Graph, Node, Tensor, Value


def product_refusal(node: Node, context: Context) -> str | None:
    """None where MatMul or Gemm `node` is x W [+ C] with a constant float32 matrix W, else why it must stay float."""
    reason = context.settings.why_float(node.name)
    if reason is not None:
        return reason
    if node.op == "Gemm" and node.attr("transA", 0):
        return "Gemm with transA"
    weight = node.constant(1)
    if weight is None and node.op == "MatMul":
        return "weights are the left operand" if node.constant(0) is not None else "product of two activations"
    if weight is None or weight.elem_type != TensorProto.FLOAT or not isinstance(node.inputs[0], Value):
        return "weights are computed at run time or not float32"
    return None if len(weight.dims) == 2 else "MatMul with weights of rank other than 2"


def product_matrix(node: Node) -> Array:
    """W as [K, N], a Gemm's alpha and transB taken in."""
    weight = node.constant(1)
    assert weight is not None
    matrix = weight.array()
    if node.op != "Gemm":
        return matrix
    return np.asarray((matrix.T if node.attr("transB", 0) else matrix) * np.float32(node.attr("alpha", 1.0)))


def product_bias(graph: Graph, node: Node) -> Tensor | None:
    """What a Gemm adds, beta included; None where nothing is added (the Add behind a MatMul stays where it is)."""
    added = node.input(2) if node.op == "Gemm" else None
    beta = float(node.attr("beta", 1.0))
    if added is None or beta == 1.0:
        return added
    constant = node.constant(2)
    if constant is not None:
        return graph.constant(constant.name + "_beta", constant.array() * np.float32(beta))
    factor = graph.constant(node.label + "_beta", np.asarray(beta, np.float32))
    return graph.node("Mul", [added, factor], [added.name + "_beta"]).outputs[0]
