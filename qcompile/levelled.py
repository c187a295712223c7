"""Functions whose input has a range of its own in each channel: f(x * factor + shift), as `level_functions` writes them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto

from qcompile.graph import Array, Const, Graph, Node, Value


@dataclass(frozen=True)
class Levelled:
    """The operand x * factor + shift of a function: float64 numbers, one a channel along `axis` (negative), and its two nodes."""

    x: Value
    factor: Array
    shift: Array
    axis: int
    product: Node
    total: Node


def levelled(graph: Graph, node: Node) -> Levelled | None:
    """What the function `node` reads, where that is x * factor + shift with numbers a channel, and nothing else reads it."""
    total = node.inputs[0].producer
    summed = _operand(graph, total, "Add")
    if total is None or summed is None or len(node.inputs[0].consumers) != 1:
        return None
    between, shift, axis = summed
    product = between.producer
    multiplied = _operand(graph, product, "Mul")
    if product is None or multiplied is None or multiplied[2] != axis or between.consumers != [total]:
        return None
    x, factor, _ = multiplied
    if factor.size != shift.size or x.elem_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
        return None
    return Levelled(x, factor, shift, axis, product, total)


def channel_factors(graph: Graph, node: Node) -> tuple[Value, Array, int] | None:
    """(x, positive float64 numbers [channels], axis) of x * numbers; None for anything else."""
    found = _operand(graph, node, "Mul")
    return found if found is not None and bool((found[1] > 0).all()) else None


def _operand(graph: Graph, node: Node | None, op: str) -> tuple[Value, Array, int] | None:
    if node is None or node.op != op or node.domain not in ("", "ai.onnx") or graph.is_pinned(node.outputs[0]):
        return None
    for index in (1, 0):
        numbers, value = node.inputs[index], node.inputs[1 - index]
        if not isinstance(numbers, Const) or not isinstance(value, Value) or numbers.elem_type != TensorProto.FLOAT:
            continue
        wide = [place for place, size in enumerate(numbers.dims, start=-len(numbers.dims)) if size != 1]
        if len(wide) != 1 or value.dims is None or len(numbers.dims) > len(value.dims):
            return None
        if value.dims[wide[0]] != numbers.dims[wide[0]]:
            return None
        values = numbers.array().astype(np.float64).reshape(-1)
        return (value, values, wide[0]) if np.isfinite(values).all() else None
    return None
