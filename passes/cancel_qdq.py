"""DQ -> Q with the same scale and zero point is nothing: integers at the ends of an imported model are used as they are.

    x (integers) -> DQ -> Q -> y    becomes    x -> y

Rounding undoes dequantising exactly: fl(fl((x - z) S) / S) lies within 2^-15 of the integer x - z. It must not fire where type,
scale or zero point differ.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from qcompile.context import Context
from qcompile.graph import Graph, Node
from qcompile.passes._match import producer_of
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class CancelQdq:
    """Only for imported models: others have no such pair."""

    name: str = "cancel_qdq"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """Rewrites: one a QuantizeLinear."""
        report = Report()
        if context.imported is None:
            return report
        for node in list(graph.nodes):
            before = producer_of(node.inputs[0], "DequantizeLinear") if node.op == "QuantizeLinear" else None
            if before is None or not _equal(before, node):
                continue
            graph.bypass(node, before.inputs[0])
            report.rewrites += 1
        graph.cleanup()
        return report


def _equal(one: Node, other: Node) -> bool:
    for index in (1, 2):
        left, right = one.constant(index), other.constant(index)
        if left is None or right is None or left.elem_type != right.elem_type:
            return False
        if not np.array_equal(left.array().reshape(-1), right.array().reshape(-1)):
            return False
    return True
