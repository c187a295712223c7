"""Operators that do nothing, and what nothing reads.

1. Identity; Dropout in inference; Cast to the same type; Concat, Sum, Max, Min, Mean of one input: x -> x.
2. Transpose, Reshape, Flatten, Expand, Pad, Slice, Unsqueeze, Squeeze that leave every element and the shape as they are.
3. Transpose(Transpose(x, p), q) -> Transpose(x, p[q]); Reshape(Reshape(x, s), t) -> Reshape(x, t) where t copies no dimension
   (0), likewise behind Flatten, Squeeze and Unsqueeze.
4. x * 1, x / 1, x - 0, x ** 1: x, bit for bit, where the constant does not broadcast x to a larger shape.
5. Nodes that no output needs, constants that nothing reads.

It must not fire on x + 0 (-0.0 + 0.0 is 0.0; x + -0.0 is exact), on Dropout in training mode or with its mask read, where shapes
are not known well enough, nor where the name of an output would be lost (an Identity stays between an input and an output).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod

import numpy as np

from qcompile.context import Context
from qcompile.graph import Const, Graph, Node, Tensor
from qcompile.passes._dims import ONE, Dims, broadcast
from qcompile.passes._match import ints_of, is_op
from qcompile.passes._shape_values import Shapes
from qcompile.rewrite import Exact, Promise, Report

_FAR = 2**31 - 1  # a slice end from here on means "to the end"


@dataclass(frozen=True)
class Eliminate:
    """Take out what has no effect."""

    name: str = "eliminate"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Until nothing changes; each round knows the shapes of the graph as it is then."""
        report = Report()
        while True:
            report.skipped.clear()
            report.refusals.clear()
            count = graph.cleanup()
            shapes = Shapes(graph)
            for node in list(graph.nodes):
                if node.domain not in ("", "ai.onnx") or not node.outputs:
                    continue
                count += _merge(graph, node) or _drop(graph, shapes, node, report)
            report.rewrites += count
            if count == 0:
                return report


def _drop(graph: Graph, shapes: Shapes, node: Node, report: Report) -> int:
    rule = _RULES.get(node.op)
    source = rule(node, shapes) if rule is not None else None
    if isinstance(source, str):
        report.refuse(node.label, source)
        return 0
    if source is None:
        return 0
    fixed = isinstance(source, Const) or any(i is source for i in graph.inputs) or graph.is_pinned(source)
    if graph.is_pinned(node.outputs[0]) and fixed:
        if node.op == "Identity":
            return 0
        report.refuse(node.label, "stands between two names that must stay")
        return 0
    graph.bypass(node, source)
    return 1


def _merge(graph: Graph, node: Node) -> int:
    before = node.inputs[0].producer if node.inputs else None
    if before is None or (graph.is_pinned(before.outputs[0]) and before.op == "Identity"):
        return 0
    if is_op(node, "Transpose") and is_op(before, "Transpose"):
        first, second = before.attr("perm"), node.attr("perm")
        if first is None or second is None:
            return 0
        node.set_attr("perm", [first[i] for i in second])
        node.inputs[0] = before.inputs[0]
        return 1
    if is_op(node, "Reshape") and is_op(before, "Reshape", "Flatten", "Squeeze", "Unsqueeze"):
        target = node.input(1)
        if not isinstance(target, Const) or 0 in target.array():
            return 0
        node.inputs[0] = before.inputs[0]
        return 1
    return 0


_Found = Tensor | str | None


def _same(node: Node, shapes: Shapes) -> _Found:
    return node.input(0)


def _dropout(node: Node, shapes: Shapes) -> _Found:
    if len(node.outputs) > 1 and node.outputs[1].consumers:
        return "mask of Dropout is read"
    mode = node.input(2)
    if mode is not None and (not isinstance(mode, Const) or bool(mode.array())):
        return "Dropout may be in training mode"
    return node.input(0)


def _cast(node: Node, shapes: Shapes) -> _Found:
    source = node.inputs[0]
    return source if source.elem_type != 0 and source.elem_type == node.attr("to") else None


def _single(node: Node, shapes: Shapes) -> _Found:
    return node.inputs[0] if len(node.inputs) == 1 else None


def _keeps_shape(node: Node, shapes: Shapes) -> bool:
    before, after = shapes.dims(node.inputs[0]), shapes.dims(node.outputs[0])
    return before is not None and before == after


def _reshape(node: Node, shapes: Shapes) -> _Found:
    return node.inputs[0] if _keeps_shape(node, shapes) else None


def _transpose(node: Node, shapes: Shapes) -> _Found:
    dims, perm = shapes.dims(node.inputs[0]), node.attr("perm")
    if perm is None:
        return node.inputs[0] if dims is not None and len(dims) < 2 else None
    moved = [i for i in perm if dims is None or dims[i] != ONE]
    return node.inputs[0] if list(perm) == sorted(perm) or (moved == sorted(moved) and _keeps_shape(node, shapes)) else None


def _pad(node: Node, shapes: Shapes) -> _Found:
    pads = ints_of(node, "pads", 1)
    return node.inputs[0] if pads is not None and not any(pads) else None


def _slice(node: Node, shapes: Shapes) -> _Found:
    starts, ends = ints_of(node, "starts", 1), ints_of(node, "ends", 2)
    steps = [1] if node.input(4) is None else ints_of(node, "steps", 4)
    dims = shapes.dims(node.inputs[0])
    axes = ints_of(node, "axes", 3)
    if starts is None or ends is None or steps is None or any(s != 1 for s in steps) or any(starts):
        return None
    if axes is None:
        axes = list(range(len(starts))) if node.input(3) is None else None
    for axis, end in zip(axes or [], ends, strict=True):
        known = dims[axis] if dims is not None and -len(dims) <= axis < len(dims) else None
        if end < _FAR and (known is None or not known.static or end < known.factor):
            return None
    return node.inputs[0] if axes is not None else None


def _neutral(value: float) -> Callable[[Node, Shapes], _Found]:
    def rule(node: Node, shapes: Shapes) -> _Found:
        sides = [(0, 1), (1, 0)] if node.op in ("Mul", "Add") else [(0, 1)]
        for kept, other in sides:
            const, x = node.constant(other), node.inputs[kept]
            if const is None or prod(const.dims) > 2**20:
                continue
            values = const.array()
            if values.dtype.kind not in "fiu" or not np.all(values == value):
                continue
            if node.op == "Add" and values.dtype.kind == "f" and not np.all(np.signbit(values)):
                return "x + 0 turns -0.0 into 0.0"
            if node.op == "Sub" and np.any(np.signbit(values)):
                return "x + 0 turns -0.0 into 0.0"
            if not _fits(shapes.dims(x), tuple(const.dims), shapes, const):
                return "the constant may broadcast the other operand"
            return x
        return None

    return rule


def _fits(dims: Dims | None, constant: tuple[int, ...], shapes: Shapes, tensor: Tensor) -> bool:
    """Whether broadcasting against the constant leaves the shape as it is."""
    if not constant:
        return True
    own = shapes.dims(tensor)
    if dims is None or own is None:
        return False
    return tuple(broadcast([dims, own])) == dims and all(
        size == 1 or dims[axis].static for axis, size in zip(range(-len(constant), 0), constant, strict=True)
    )


_RULES: dict[str, Callable[[Node, Shapes], _Found]] = {
    "Identity": _same,
    "Dropout": _dropout,
    "Cast": _cast,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _single),
    **dict.fromkeys(("Reshape", "Flatten", "Expand", "Squeeze", "Unsqueeze"), _reshape),
    "Transpose": _transpose,
    "Pad": _pad,
    "Slice": _slice,
    "Mul": _neutral(1),
    "Div": _neutral(1),
    "Pow": _neutral(1),
    "Sub": _neutral(0),
    "Add": _neutral(0),
}
