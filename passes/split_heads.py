"""Heads of q, k and v split off one axis instead of three tensors squeezed out of an axis of their own.

    Reshape [B, L, 3, H, d] -> Transpose [3, B, H, L, d] -> three Gather(i)              (or Split -> Squeeze)
    Reshape [B, L, 3 H, d]  -> Transpose [B, 3 H, L, d]  -> one Split into three [B, H, L, d]

Part i of the axis of 3, head h, is entry i H + h of the joint axis, so that this moves the same numbers to the same places. It
also covers the form without the Transpose and any number of parts.

onnxruntime turns the Gathers into Split and Squeeze itself and pushes the Transpose behind them: three nodes a block more than
this form needs. vit_mnist (17 tokens, 4 blocks), one thread, onnxruntime 1.32: .1260 -> .1206 ms, ratio .96.

It must not fire where the Reshape or the Transpose is read by anything else, where the parts stand behind the heads
([B, L, H, 3, d]: parts would interleave), where a part is read by nobody (a class token taken out of a sequence
looks like that), or where sizes are not known.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node, Value
from qcompile.passes._dims import Dim
from qcompile.passes._match import ints_of, is_op, producer_of, set_type, single_consumer, visit
from qcompile.passes._shape_values import Shapes
from qcompile.passes._shape_vector import Targets
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class SplitHeads:
    """Split the joint axis of parts and heads."""

    name: str = "split_heads"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a tensor that was taken apart."""
        shapes = Shapes(graph)
        targets = Targets(graph, shapes)

        def split(graph: Graph, node: Node) -> str | None:
            parts = _parts(graph, shapes, node)
            return "" if parts is None else _rewrite(graph, shapes, targets, node, parts)

        return visit(graph, ("Reshape", "Transpose"), split)


@dataclass(frozen=True)
class _Parts:
    """What reads the single entries of `axis`, in order: the value of each entry and the nodes that take it out."""

    axis: int
    outputs: dict[int, Value]
    nodes: list[Node]


def _parts(graph: Graph, shapes: Shapes, node: Node) -> _Parts | None:
    """Where every reader of Reshape or Transpose `node` takes one entry of the same axis; None otherwise."""
    if graph.is_pinned(node.outputs[0]):
        return None
    tensor = node.outputs[0]
    dims = shapes.dims(tensor)
    if dims is None or not tensor.consumers:
        return None
    rank = len(dims)
    found: dict[int, Value] = {}
    nodes: list[Node] = []
    axes: set[int] = set()
    for reader in tensor.consumers:
        axis = int(reader.attr("axis", 0)) % rank
        axes.add(axis)
        nodes.append(reader)
        if is_op(reader, "Split"):
            if not dims[axis].static or dims[axis].factor != len(reader.outputs) or len(tensor.consumers) != 1:
                return None
            for index, part in enumerate(reader.outputs):
                squeeze = single_consumer(graph, part)
                if squeeze is None or not is_op(squeeze, "Squeeze") or _squeezed(squeeze, rank) != [axis]:
                    return None
                nodes.append(squeeze)
                found[index] = squeeze.outputs[0]
            continue
        index_const = reader.constant(1) if is_op(reader, "Gather") else None
        if index_const is None or index_const.dims != () or reader.inputs[0] is not tensor or not dims[axis].static:
            return None
        place = int(index_const.array()) % dims[axis].factor
        if place in found:
            return None
        found[place] = reader.outputs[0]
    if len(axes) != 1 or len(found) < 2 or dims[next(iter(axes))].factor != len(found):
        return None
    return _Parts(axes.pop(), found, nodes)


def _squeezed(squeeze: Node, rank: int) -> list[int] | None:
    axes = ints_of(squeeze, "axes", 1)
    return None if axes is None else [a % rank for a in axes]


def _rewrite(graph: Graph, shapes: Shapes, targets: Targets, carrier: Node, parts: _Parts) -> str | None:
    """None where done, else the reason why not."""
    transpose = carrier if carrier.op == "Transpose" else None
    reshape = producer_of(carrier.inputs[0], "Reshape") if transpose is not None else carrier
    if reshape is None or (transpose is not None and single_consumer(graph, reshape.outputs[0]) is not transpose):
        return "no Reshape of its own makes the axis of the parts"
    dims = shapes.dims(reshape.outputs[0])
    rank = len(dims or ())
    perm = [int(p) for p in transpose.attr("perm", list(range(rank))[::-1])] if transpose is not None else list(range(rank))
    if dims is None or len(perm) != rank:
        return "the shape is not known"
    axis = perm[parts.axis]
    if axis + 1 >= rank or not dims[axis].static or not dims[axis + 1].static:
        return "the axis behind the parts is not of a known size"
    count, size = dims[axis].factor, dims[axis + 1].factor
    order = [p - (p > axis) for p in perm if p != axis]  # the joint axis takes the place of the one behind the parts
    joint = (*dims[:axis], Dim(count * size), *dims[axis + 2 :])
    target = targets.get(joint, reshape.outputs[0].name)
    if target is None:
        return "the shape of the result cannot be written down"
    source, base, kind = reshape.inputs[0], reshape.outputs[0].name, reshape.outputs[0].elem_type
    names = (reshape.name or None, transpose.name if transpose is not None else None)
    for node in [*parts.nodes, *([transpose] if transpose is not None else []), reshape]:
        graph.remove(node)
    plain = [d.factor if d.static else None for d in joint]
    tensor = graph.node("Reshape", [source, target], [base + "_joint"], name=names[0]).outputs[0]
    set_type(tensor, kind, plain)
    if order != sorted(order):
        tensor = graph.node("Transpose", [tensor], [base + "_heads"], name=names[1], perm=order).outputs[0]
        set_type(tensor, kind, [plain[p] for p in order])
    sizes = graph.constant(base + "_parts", np.array([size] * count, np.int64))
    graph.node("Split", [tensor, sizes], [parts.outputs[i] for i in range(count)], axis=order.index(axis))
    return None
