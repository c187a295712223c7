"""Shape arithmetic that exporters leave behind, said in one operator.

1. Reshape(x, t): where each element of t is a number, the same dimension of x, or (once) anything else, t becomes the constant
   [n | 0 | -1 ...]: 0 copies the dimension of x (allowzero=0), -1 takes what is left.
2. Any other tensor of sizes that a chain of Gather, Unsqueeze, Concat, Where ... computes becomes Concat of Shape(x, start, end)
   and numbers, where that takes fewer nodes.

It must not fire where a size is not provably the dimension claimed (two symbols are equal only when they come from one place),
where a number in t is 0 and allowzero is set, where a second dimension would need -1, nor with -1 beside a dynamic 0 unless t had
it already (an empty batch would become an error). It wants constants folded before.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Const, Graph, Node, Tensor
from qcompile.passes._dims import Dim, Dims
from qcompile.passes._match import is_op, producer_of
from qcompile.passes._shape_rules import VALUES
from qcompile.passes._shape_values import Shapes
from qcompile.passes._shape_vector import pieces_of, shape_vector
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class SimplifyShapes:
    """Make Reshape targets constant and shape arithmetic short."""

    name: str = "simplify_shapes"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Reshapes first, then what other operators read."""
        report = Report()
        shapes = Shapes(graph)
        for node in list(graph.nodes):
            if is_op(node, "Reshape") and node.input(1) is not None and not isinstance(node.inputs[1], Const):
                target = constant_target(shapes, node)
                if target is None:
                    report.refuse(node.label, "target shape is not numbers and dimensions of the data")
                    continue
                node.inputs[1] = graph.constant(node.outputs[0].name + "_shape", np.array(target, np.int64))
                report.rewrites += 1
        graph.cleanup()
        made: dict[Dims, Tensor] = {}
        for node in list(graph.nodes):
            if shapes.values(node.outputs[0]) is not None:
                continue  # part of a chain; its end is what counts
            for index, tensor in enumerate(node.inputs):
                values = shapes.values(tensor)
                if isinstance(tensor, Const) or values is None or tensor.elem_type != 7 or len(shapes.dims(tensor) or ()) != 1:
                    continue
                pieces = pieces_of(shapes, values)
                if pieces is None or all(isinstance(p, int) for p in pieces):
                    continue
                if values not in made:
                    runs = sum(isinstance(p, tuple) for p in pieces)
                    each = 1 if (graph.opset() or 0) >= 15 else 2
                    if runs * each + (len(pieces) > 1) >= _chain_length(tensor):
                        continue
                    vector = shape_vector(graph, shapes, values, tensor.name)
                    if vector is None:
                        continue
                    made[values] = vector
                if made[values] is not tensor:
                    node.inputs[index] = made[values]
                    report.rewrites += 1
        graph.cleanup()
        return report


def constant_target(shapes: Shapes, node: Node) -> list[int] | None:
    """The constant second input of a Reshape that does the same, or None."""
    goal, dims = shapes.values(node.input(1)), shapes.dims(node.inputs[0])
    if goal is None:
        return None
    allowzero = bool(node.attr("allowzero", 0))
    target: list[int] = []
    for axis, size in enumerate(goal):
        if size.static:
            if size.factor == 0 and allowzero:
                return None
            target.append(size.factor)
        elif size == (dims[axis] if dims is not None and axis < len(dims) else _axis(shapes, node.inputs[0], axis, dims)):
            target.append(0)
        else:
            target.append(-1)
    copied = any(t == 0 and not g.static for t, g in zip(target, goal, strict=True))
    if target.count(-1) > 1 or (allowzero and 0 in target):
        return None
    if -1 in target and copied and Dim(-1) not in goal:
        return None
    return target


def _axis(shapes: Shapes, tensor: Tensor, axis: int, dims: Dims | None) -> Dim | None:
    return shapes.dim(tensor, axis) if dims is None else None


def _chain_length(tensor: Tensor) -> int:
    """Nodes between `tensor` and the tensors whose sizes it holds, Shape nodes included."""
    seen: set[Node] = set()
    stack = [tensor]
    while stack:
        node = stack.pop().producer
        if node is not None and node not in seen and is_op(node, *VALUES):
            seen.add(node)
            if producer_of(node.outputs[0], "Shape", "Size") is None:
                stack.extend(node.inputs)
    return len(seen)
