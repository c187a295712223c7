"""Sum of tensors becomes Adds, which quantise:  Sum(a) -> a,  Sum(a, b) -> Add(a, b),  Sum(a, b, c) -> Add(Add(a, b), c)."""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.graph import Graph
from qcompile.passes._match import is_op
from qcompile.rewrite import Close, Promise, Report


@dataclass(frozen=True)
class SumToAdd:
    """Rewrite every Sum (older exporters write residual connections so)."""

    name: str = "sum_to_add"
    keeps: Promise = field(default_factory=Close)

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a Sum."""
        report = Report()
        for node in [n for n in graph.nodes if is_op(n, "Sum")]:
            if len(node.inputs) == 1:
                node.op = "Identity"
            else:
                terms = list(node.inputs)
                total = terms[0]
                for index, term in enumerate(terms[1:-1]):
                    total = graph.node("Add", [total, term], [f"{node.outputs[0].name}_part_{index}"]).outputs[0]
                node.inputs.clear()
                node.inputs.extend([total, terms[-1]])
                node.op = "Add"
            report.rewrites += 1
        graph.sort()
        return report
