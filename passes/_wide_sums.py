"""Wide sums: float tensors of the Q/DQ graph that are added or joined, and so must share one step when they become integers.

    Gemm (no Q) --\
    Gemm (no Q) ---+-> Add -> Reshape -> Add -> LayerNormalization            one sum: everything left of LayerNormalization
    Gather(table) -/

A residual stream is one such sum, or one for each block where a LayerNormalization ends it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from onnx import TensorProto

from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.passes._match import is_op

#: What adds or joins tensors: every operand must have the step of the result.
JOINS = ("Add", "Sum", "Sub", "Concat", "Where", "Max", "Min")
MOVES = (
    "Reshape",
    "Transpose",
    "Unsqueeze",
    "Squeeze",
    "Slice",
    "Gather",
    "Expand",
    "Split",
    "Flatten",
    "Identity",
    "Tile",
)
NORMS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
_ENDS = ("QuantizeLinear", "DequantizeLinear")


@dataclass
class WideSum:
    """Tensors of one step. sources: the nodes that make operands (not the joining ones); constants: operands that are stored.
    dequantised: what makes operands of 8 bits."""

    tensors: list[Value] = field(default_factory=list)
    sources: list[Node] = field(default_factory=list)
    constants: list[Const] = field(default_factory=list)
    dequantised: list[Node] = field(default_factory=list)
    readers: list[Node] = field(default_factory=list)


def wide_sums(graph: Graph) -> list[WideSum]:
    """The sums of two operands or more, in graph order; what is dequantised is an operand of 8 bits, and no member."""
    leader: dict[Value, Value] = {}

    def find(tensor: Value) -> Value:
        while leader.setdefault(tensor, tensor) is not tensor:
            leader[tensor] = leader[leader[tensor]]
            tensor = leader[tensor]
        return tensor

    joining = [n for n in graph.nodes if _joins(n)]
    for node in joining:
        members = [t for t in [*joined(node), *node.outputs] if _is_wide(t)]
        for other in members[1:]:
            leader[find(other)] = find(members[0])
    sums: dict[Value, WideSum] = {}
    joined_at: set[Value] = set()
    for node in graph.nodes:
        joins = _joins(node)
        for output in node.outputs:
            if not _is_wide(output):
                continue
            root = find(output)
            found = sums.setdefault(root, WideSum())
            found.tensors.append(output)
            found.readers.extend(r for r in output.consumers if not _joins(r))
            if not joins:
                found.sources.append(node)
            elif is_op(node, *JOINS):
                joined_at.add(root)
        if joins and node.outputs and _is_wide(node.outputs[0]):
            found, operands = sums[find(node.outputs[0])], list(joined(node))
            found.constants.extend(t for t in operands if isinstance(t, Const))
            found.dequantised.extend(
                t.producer for t in operands if t.producer is not None and is_op(t.producer, "DequantizeLinear")
            )
    return [found for root, found in sums.items() if root in joined_at]


def joined(node: Node) -> Iterator[Tensor]:
    """The operands of a joining or moving node that carry numbers."""
    if is_op(node, "Where"):
        yield from node.inputs[1:3]
    elif is_op(node, *JOINS):
        yield from node.inputs
    else:
        yield node.inputs[0]


def _joins(node: Node) -> bool:
    return is_op(node, *JOINS, *MOVES)


def _is_wide(tensor: Tensor) -> bool:
    """Whether it is a computed float tensor that is neither quantised nor just dequantised."""
    if not isinstance(tensor, Value) or not tensor.name:
        return False
    producer = tensor.producer
    return producer is not None and producer.op not in _ENDS and tensor.elem_type in (TensorProto.FLOAT, TensorProto.UNDEFINED)
