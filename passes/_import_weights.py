"""The integers of an imported model's weights, remembered by node before the graph becomes a float one."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from qcompile.graph import Const, Graph, Node
from qcompile.import_read import EIGHT_BIT, NARROW, Integers, stored_integers
from qcompile.imported import Imported, StoredWeight
from qcompile.passes._linear import output_axis
from qcompile.passes._match import is_op
from qcompile.passes.round_weights import weight_matrix

_FLOAT = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def remember_weights(graph: Graph, imported: Imported) -> None:
    """Fill `imported.weights`, `float_weights` and `unusable` for every Conv, Gemm and MatMul."""
    for node in graph.nodes:
        if not is_op(node, "Conv", "Gemm", "MatMul"):
            continue
        weight = node.input(1)
        if isinstance(weight, Const) and weight.elem_type in _FLOAT:
            imported.float_weights.add(node.name)
            continue
        integers = stored_integers(weight)
        if integers is None:
            continue
        reason = _refusal(node, integers)
        if reason is not None:
            imported.unusable[node.name] = reason
        else:
            imported.weights[node.name] = _stored(node, integers)


def _refusal(node: Node, integers: Integers) -> str | None:
    if integers.blocked:
        return "weights are quantised in blocks"
    if integers.elem_type not in (*EIGHT_BIT, *NARROW):
        return "weights have more than 8 bits"
    if node.op != "Conv" and integers.values.ndim != 2:
        return "MatMul with weights of rank other than 2"
    return None


def _stored(node: Node, integers: Integers) -> StoredWeight:
    axis = output_axis(node)
    values = weight_matrix(integers.values, node.op, axis)
    scales = weight_matrix(np.broadcast_to(integers.scale, integers.values.shape), node.op, axis)
    one = scales.shape[1] > 0 and bool((scales == scales[:, :1]).all())
    return StoredWeight(np.ascontiguousarray(values.astype(np.int16)), np.array(scales[:, 0]) if one else None)
