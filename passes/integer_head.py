"""A global average at the end of a network, on integers: sums are exact, one multiplication is left.

    DQ(x) -> GlobalAveragePool -> ...   becomes   x -> Cast(int32) -> ReduceSum - zero * HW -> DQ by fl(Sx/HW) -> ...

Only where the average itself is not quantised (elsewhere it is a rescale like any other), its size is static and the sum stays
inside int32. The old form added floats, so results differ by float32 rounding.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Graph, Node
from qcompile.passes._integer_sums import plumb, sum_of_positions
from qcompile.placement import pool_area
from qcompile.rewrite import Close, Promise, Report

_SUM_LIMIT = 2**31 - 1
_EIGHT_BIT = (TensorProto.UINT8, TensorProto.INT8)


@dataclass(frozen=True)
class IntegerHead:
    """Only for `format == "integer"`, between `lower_qoperator` and `lower_integer`."""

    name: str = "integer_head"
    keeps: Promise = field(default_factory=lambda: Close(1e-6))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one an average."""
        report = Report()
        if context.settings.format != "integer":
            return report
        for node in list(graph.nodes):
            if node.op != "GlobalAveragePool" or node.domain not in ("", "ai.onnx"):
                continue
            reason = _rewrite(graph, node)
            if reason is None:
                report.rewrites += 1
            else:
                report.refuse(node.label, reason)
        graph.cleanup()
        graph.sort()
        return report


def _rewrite(graph: Graph, node: Node) -> str | None:
    """Rewrite in place; returns why not, where it cannot be."""
    dequantise = node.inputs[0].producer
    if dequantise is None or dequantise.op != "DequantizeLinear":
        return "its input is float"
    scale, zero = dequantise.constant(1), dequantise.constant(2)
    if scale is None or zero is None or zero.elem_type not in _EIGHT_BIT or scale.array().size != 1:
        return "its input is not 8-bit with one stored scale"
    area, dims = pool_area(node), node.inputs[0].dims
    if area is None or dims is None:
        return "the size of its input is not static"
    if 255 * area > _SUM_LIMIT:
        return "its sum can leave int32"
    result = node.outputs[0]
    step = np.asarray(scale.array().reshape(()) / np.float32(area), np.float32)
    total = sum_of_positions(graph, node, dequantise.inputs[0], int(zero.array().reshape(())), area, len(dims))
    plumb(graph, "DequantizeLinear", [total, graph.constant(f"{result.name}_scale", step)], result)
    return None
