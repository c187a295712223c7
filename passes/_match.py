"""Small readable pieces that patterns are written with."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np

from qcompile.graph import Array, Const, Graph, Node, Tensor
from qcompile.rewrite import Report

FLOATS = frozenset({1, 10, 11, 16})  # TensorProto FLOAT, FLOAT16, DOUBLE, BFLOAT16


def is_op(node: Node | None, *ops: str) -> bool:
    """Whether `node` is one of the standard operators `ops`."""
    return node is not None and node.op in ops and node.domain in ("", "ai.onnx")


def producer_of(tensor: Tensor | None, *ops: str) -> Node | None:
    """The node that computes `tensor`, where it is one of the standard operators `ops`."""
    node = tensor.producer if tensor is not None else None
    return node if is_op(node, *ops) else None


def single_consumer(graph: Graph, tensor: Tensor) -> Node | None:
    """The only node that reads `tensor`, or None where several do or its name must stay."""
    consumers = tensor.consumers
    return consumers[0] if len(consumers) == 1 and not graph.is_pinned(tensor) else None


def array_of(node: Node, index: int) -> Array | None:
    """Values of input `index` where it is a constant, else None."""
    const = node.constant(index)
    return None if const is None else const.array()


def scalar_of(tensor: Tensor | None) -> float | None:
    """The number that `tensor` holds where it is a constant of one element, else None."""
    if not isinstance(tensor, Const) or int(np.prod(tensor.dims, dtype=np.int64)) != 1:
        return None
    return float(tensor.array().reshape(()))


def ints_of(node: Node, attribute: str, index: int) -> list[int] | None:
    """Integers that stand in `attribute` (older opsets) or in constant input `index` (newer); None where in neither."""
    value = node.attr(attribute)
    if value is not None:
        return [int(v) for v in value]
    values = array_of(node, index)
    return None if values is None else [int(v) for v in np.atleast_1d(values)]


def split_operands(node: Node) -> tuple[Tensor, Const] | None:
    """(computed operand, constant operand) of a two-operand node, whichever side the constant stands on."""
    first, second = node.input(0), node.input(1)
    if isinstance(second, Const) and first is not None and not isinstance(first, Const):
        return first, second
    if isinstance(first, Const) and second is not None and not isinstance(second, Const):
        return second, first
    return None


def visit(graph: Graph, ops: Collection[str], rewrite: Callable[[Graph, Node], str | None]) -> Report:
    """Offer every node of the operators `ops` that is still there to `rewrite`, then clean up.

    `rewrite` returns None where it rewrote, an empty text where the node is no candidate, else the reason for leaving it.
    """
    report = Report()
    for node in list(graph.nodes):
        if not is_op(node, *ops) or not node.outputs:  # a removed node has lost its ends
            continue
        reason = rewrite(graph, node)
        if reason is None:
            report.rewrites += 1
        elif reason:
            report.refuse(node.label, reason)
    graph.cleanup()
    return report


def set_type(output: Tensor, elem_type: int, dims: Sequence[int | str | None] | None) -> None:
    """Give a new value its type; dims None where the rank is unknown."""
    import onnx

    if not isinstance(output, Const):
        output.type = onnx.helper.make_tensor_type_proto(elem_type, dims)
