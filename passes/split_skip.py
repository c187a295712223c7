"""Add -> LayerNormalization becomes Sum -> LayerNormalization: the same number, and onnxruntime does not fuse it.

onnxruntime joins an Add of two [B, L, C] tensors with the LayerNormalization behind it to SkipLayerNormalization, which is slower than
the two. Measured with onnxruntime 1.32 on one thread, MiniLM with 128 tokens and this one change: .20 ms a SkipLayerNormalization against
.008 (Sum) + .021; a model with its linears quantised dynamically 8.34 -> 6.10 ms, ratio .735. Float: no gain, no loss (1.00).
Rows that `sink_reshapes` made two-dimensional are not fused anyway (ratio .99 with Sum); this is for streams that stay [B, L, C].

Sum of two operands is defined as their addition with broadcasting, exactly Add. It must not fire on Adds of rank 2, which need no
help, nor where LayerNormalization reads the sum as its scale or bias.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.passes._match import is_op

from qcompile.context import Context
from qcompile.graph import Graph, Node
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class SplitSkip:
    """Keep Add and LayerNormalization apart. Runs last: other passes know a residual by its Add."""

    name: str = "split_skip"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one an Add."""
        report = Report()
        graph.infer_shapes()
        for node in graph.nodes:
            if is_op(node, "Add") and _feeds_norm(node):
                dims = node.outputs[0].dims
                if dims is None or len(dims) == 3:
                    node.op = "Sum"
                    report.rewrites += 1
        return report


def _feeds_norm(add: Node) -> bool:
    """Whether a LayerNormalization reads the sum as its data."""
    output = add.outputs[0]
    return any(is_op(n, "LayerNormalization") and n.inputs[0] is output for n in output.consumers)
