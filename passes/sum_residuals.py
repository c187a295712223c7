"""Residual additions in front of a LayerNormalization written as Sum: the same numbers, and a faster model.

    LayerNormalization(Add(x, y))    becomes    LayerNormalization(Sum(x, y))

onnxruntime fuses Add + LayerNormalization into one SkipLayerNormalization, which is slower than the two apart (minilm on
integers: by a fifth); it does not know the pattern with Sum. It must not fire where an operand is a constant or is not float32,
nor below opset 8 (Sum without broadcasting).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from onnx import TensorProto

from qcompile.context import Context
from qcompile.graph import Graph, Value
from qcompile.passes._match import is_op, producer_of
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class SumResiduals:
    """Add -> Sum in front of LayerNormalization."""

    name: str = "sum_residuals"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one an Add."""
        report = Report()
        if (graph.opset() or 0) < 8:
            return report
        graph.infer_shapes()
        for node in graph.nodes:
            if not is_op(node, "LayerNormalization"):
                continue
            added = producer_of(node.inputs[0], "Add")
            if added is None or not all(isinstance(t, Value) for t in added.inputs):
                continue
            if added.outputs[0].elem_type not in (TensorProto.FLOAT, TensorProto.UNDEFINED):
                report.refuse(added.label, "not float32")
                continue
            added.op = "Sum"
            report.rewrites += 1
        return report
