"""Building blocks of integer graphs: int32 tensors, and a pool's sum over positions."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper

from qcompile.graph import Graph, Node, Tensor, Value


def int32_value(graph: Graph, base: str, like: Tensor) -> Value:
    """A new int32 tensor named after `base`, of the shape of `like`."""
    return Value(graph.fresh_name(base), helper.make_tensor_type_proto(TensorProto.INT32, like.dims))


def become(graph: Graph, node: Node, op: str, inputs: list[Tensor]) -> Value:
    """Turn `node` into the standard operator `op` without attributes; returns its new int32 output, the old one is detached."""
    result = node.outputs[0]
    node.outputs.clear()
    made = int32_value(graph, result.name + "_sum", result)
    node.op, node.domain = op, ""
    node.attrs.clear()
    node.inputs.clear()
    node.inputs.extend(inputs)
    node.outputs.append(made)
    return made


def plumb(graph: Graph, op: str, inputs: list[Tensor], result: Value, **attrs: Any) -> Node:
    """Append a node without a name: it belongs to the operator before it, and long names are a tenth of a small file."""
    node = graph.node(op, inputs, [result], **attrs)
    node.name = ""
    return node


def centred(graph: Graph, integers: Tensor, zero: int, base: str) -> Value:
    """int32: integers - zero point."""
    wide = int32_value(graph, f"{base}_wide", integers)
    plumb(graph, "Cast", [integers], wide, to=TensorProto.INT32)
    return wide if zero == 0 else minus(graph, wide, zero, base)


def minus(graph: Graph, value: Value, constant: int, base: str) -> Value:
    """int32: value - constant."""
    less = int32_value(graph, f"{base}_centred", value)
    plumb(graph, "Sub", [value, graph.constant(f"{base}_zero", np.asarray(constant, np.int32))], less)
    return less


def sum_of_positions(graph: Graph, node: Node, integers: Tensor, zero: int, count: int, rank: int) -> Value:
    """Turn the global pool `node` into the int32 sum of `integers - zero` over `count` positions; its output is detached.

    The caller has checked that 255 * count fits int32.
    """
    base = node.outputs[0].name
    wide = int32_value(graph, f"{base}_wide", integers)
    plumb(graph, "Cast", [integers], wide, to=TensorProto.INT32)
    axes = graph.constant(f"{base}_axes", np.arange(2, rank, dtype=np.int64))
    total = become(graph, node, "ReduceSum", [wide, axes])
    return total if zero == 0 else minus(graph, total, zero * count, base)
