"""4-bit weights stored as 4 bits, read at int8 speed.

    w int8, |w| <= 7    ->    w INT4 (packed, two in a byte) -> Cast to int8

onnxruntime folds the Cast when it loads the model, so that the same fused int8 kernel runs on the same integers; an INT4
DequantizeLinear in front of a Conv would not fuse and is five times slower. Runs last, for every format; needs opset 21.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from onnx import TensorProto

from qcompile.block_packing import int4_tensor
from qcompile.context import Context
from qcompile.graph import Const, Graph, Value
from qcompile.passes._narrow import narrow_weights
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class PackInt4:
    """Pack the weights of integer linear nodes and embedding tables that have 4 bits."""

    name: str = "pack_int4"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a weight tensor. A weight outside [-8, 7] is refused."""
        report = Report()
        for const, bits in narrow_weights(graph, context).items():
            if bits != 4:
                continue
            values = const.array()
            if values.min(initial=0) < -8 or values.max(initial=0) > 7:
                report.refuse(const.name, "a weight needs more than 4 bits")
                continue
            _pack(graph, const, values)
            report.rewrites += 1
        if report.rewrites:
            graph.cleanup()
            graph.sort()
        return report


def _pack(graph: Graph, const: Const, values: npt.NDArray[np.int8]) -> None:
    stored = graph.constant(const.name.removesuffix("_int8") + "_int4", int4_tensor(values, signed=True))
    widened = Value(graph.fresh_name(const.name + "_widened"))
    graph.replace_uses(const, widened)
    graph.node("Cast", [stored], [widened], to=TensorProto.INT8)
