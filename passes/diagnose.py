"""Measure what each integer layer costs, in `qcompile.diagnosis`; the graph is not changed.

It stands behind the passes that round weights and correct biases, and in front of lowering, so that one walk serves every format.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.diagnosis import diagnose
from qcompile.graph import Graph
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class Diagnose:
    """Each layer's part in the error, on at most `samples` calibration feeds; only where it was asked for."""

    samples: int = 16
    name: str = "diagnose"
    keeps: Promise = field(default_factory=lambda: Exact(fused=True))

    def run(self, graph: Graph, context: Context) -> Report:
        """No rewrites. Sets `context.plan.layers`; needs `context.samples`."""
        plan = context.plan
        if context.diagnose and plan is not None and plan.layers is None and context.samples:
            plan.layers = diagnose(graph, context, self.samples)
        return Report()
