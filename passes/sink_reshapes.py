"""A Reshape [M, N] -> [..., N] moves down behind whatever works on rows, until it meets the Reshape that undoes it.

1. f(Reshape(y)) -> Reshape(f(y)) for elementwise f, also with constants that are scalars or [N], for LayerNormalization and
   Softmax along the last axis, and for Add, Sub, Mul, Div ... of two tensors of that same shape (the other one is flattened if it
   must be).
2. Reshape(Reshape(y), t) -> Reshape(y, t'), or y where that is its shape again.

So the stream of tokens of a transformer stays [M, N] between the splits into heads. It must not fire where the last dimension is
not kept, where a constant or the other operand broadcasts over the leading dimensions, or where shapes are not known to be equal;
nor inside an RMSNorm that is written out, which would no longer be recognised.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Const, Graph, Node, Tensor, Value
from qcompile.passes._dims import Dim, Dims, volume
from qcompile.passes._match import is_op, producer_of, set_type
from qcompile.passes._norms import find_rms_norms
from qcompile.passes._shape_values import Shapes
from qcompile.passes._shape_vector import Targets
from qcompile.rewrite import Exact, Promise, Report

_ROWWISE = ("LayerNormalization", "Softmax", "LogSoftmax", "RMSNormalization")
_ELEMENTWISE = frozenset(
    [
        "Abs",
        "Add",
        "Cast",
        "Celu",
        "Clip",
        "Div",
        "Elu",
        "Erf",
        "Exp",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "LeakyRelu",
        "Log",
        "Max",
        "Min",
        "Mish",
        "Mul",
        "Neg",
        "Pow",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Sub",
        "Swish",
        "Tanh",
        "ThresholdedRelu",
    ]
)


@dataclass(frozen=True)
class SinkReshapes:
    """Keep rows two-dimensional."""

    name: str = "sink_reshapes"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """One walk in topological order: what sinks behind a node is met again at the nodes that read it."""
        report = Report()
        sink = _Sink(graph, Shapes(graph))
        norms = {step for norm in find_rms_norms(graph) for step in norm.steps}
        for node in list(graph.nodes):
            if is_op(node, "Reshape", "Flatten"):
                report.rewrites += sink.merge(node)
            elif is_op(node, *_ROWWISE, *_ELEMENTWISE) and node not in norms:
                report.rewrites += sink.move(node)
        graph.cleanup()
        return report


class _Sink:
    def __init__(self, graph: Graph, shapes: Shapes) -> None:
        self.graph, self.shapes = graph, shapes
        self.targets = Targets(graph, shapes)

    def rows(self, tensor: Tensor | None) -> tuple[Tensor, Node] | None:
        """(y [M, N], the Reshape) where `tensor` is Reshape(y) to [..., N]."""
        reshape = producer_of(tensor, "Reshape")
        if reshape is None or tensor is None:
            return None
        before, after = self.shapes.dims(reshape.inputs[0]), self.shapes.dims(tensor)
        if before is None or after is None or len(before) != 2 or len(after) < 3 or before[1] != after[-1]:
            return None
        return (reshape.inputs[0], reshape) if volume(after[:-1]) == before[0] else None

    def merge(self, node: Node) -> int:
        found = self.rows(node.inputs[0])
        goal = self.shapes.dims(node.outputs[0])
        if found is None or goal is None:
            return 0
        source, _ = found
        if goal == self.shapes.dims(source):
            if self.graph.is_pinned(node.outputs[0]) and self.graph.is_pinned(source):
                return 0
            self.graph.bypass(node, source)
            return 1
        target = self.targets.get(goal, node.outputs[0].name)
        if target is None:
            return 0
        output, name = node.outputs[0], node.name
        self.graph.remove(node)
        self.graph.node("Reshape", [source, target], [output], name=name or None)
        return 1

    def move(self, node: Node) -> int:
        """Put `node` before the Reshape that feeds it."""
        output = node.outputs[0]
        dims = self.shapes.dims(output)
        lead = next((t for t in node.inputs if self.rows(t) is not None and self.shapes.dims(t) == dims), None)
        found = self.rows(lead)
        if found is None or dims is None or len([o for o in node.outputs if o.name]) != 1:
            return 0
        source, reshape = found
        if is_op(node, *_ROWWISE):
            axis = int(node.attr("axis", -1))
            if lead is not node.inputs[0] or axis not in (-1, len(dims) - 1):
                return 0
            inputs: list[Tensor | None] = [source, *node.inputs[1:]]
        else:
            found_inputs = [self._operand(t, dims) for t in node.inputs]
            if any(t is None for t in found_inputs):
                return 0
            inputs = [self._made(t, source) for t in found_inputs if t is not None]
        moved = Value(self.graph.fresh_name(output.name + "_2d"))
        set_type(moved, output.elem_type, (None, dims[-1].factor if dims[-1].static else None))
        self.shapes.define(moved, self.shapes.dims(source))
        for index, tensor in enumerate(inputs):
            if tensor is not None:
                node.inputs[index] = tensor
        node.outputs[0] = moved
        if is_op(node, *_ROWWISE):
            node.set_attr("axis", -1)
        self.graph.node("Reshape", [moved, reshape.inputs[1]], [output])
        return 1

    def _operand(self, tensor: Tensor, dims: Dims) -> Tensor | None:
        """What stands for `tensor` next to rows: itself where it is the same for every row, or has the full shape; else None."""
        if tensor.name == "":
            return tensor
        own = self.shapes.dims(tensor)
        if own is None:
            return None
        if own == dims or not own:
            return tensor
        same = all(d == Dim(1) for d in own[:-1]) and own[-1] in (Dim(1), dims[-1]) and len(own) <= len(dims)
        return tensor if same and (len(own) <= 2 or isinstance(tensor, Const)) else None

    def _made(self, tensor: Tensor, source: Tensor) -> Tensor:
        """The two-dimensional form of an operand that `_operand` accepted."""
        own = self.shapes.dims(tensor) or ()
        if tensor.name == "" or len(own) <= 2:
            return tensor
        if isinstance(tensor, Const):
            return self.graph.constant(tensor.name, tensor.array().reshape(-1))
        found = self.rows(tensor)
        if found is not None:
            return found[0]
        goal = self.shapes.dims(source)
        for consumer in tensor.consumers:
            if is_op(consumer, "Reshape", "Flatten") and self.shapes.dims(consumer.outputs[0]) == goal:
                return consumer.outputs[0]
        width = own[-1].factor if own[-1].static else -1
        target = self.graph.constant(tensor.name + "_flat_shape", np.array([-1, width], np.int64))
        flat = self.graph.node("Reshape", [tensor, target], [tensor.name + "_flat"]).outputs[0]
        set_type(flat, tensor.elem_type, (None, width if width > 0 else None))
        self.shapes.define(flat, goal)
        return flat
