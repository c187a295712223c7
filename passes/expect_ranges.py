"""Ranges from BatchNormalization statistics in the place of those that synthetic inputs gave. The graph is not changed.

A tensor that nothing is known of (the input, pools, models whose BatchNormalizations were folded before) keeps the range that the
synthetic inputs reached. Where the statistics say less than nothing (all channels constant) it does so too.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from qcompile.context import Context
from qcompile.expected import expected_values
from qcompile.graph import Graph
from qcompile.rewrite import Exact, Promise, Report


@dataclass(frozen=True)
class ExpectRanges:
    """Overrides extremes in `context.observers`; only where no calibration data are given, between `calibrate` and `quantise`."""

    name: str = "expect_ranges"
    keeps: Promise = field(default_factory=Exact)

    def run(self, graph: Graph, context: Context) -> Report:
        """No rewrites; refusals count the tensors that keep the synthetic range."""
        report = Report()
        if not context.synthetic or context.plan is not None:
            return report
        expected = expected_values(graph, context.batch_norms)
        for name, observer in context.observers.items():
            known = expected.get(name)
            if known is None or known.low >= known.high:
                report.refuse(name, "no statistics: range from synthetic inputs")
                continue
            observer.low, observer.high = known.low, known.high
        return report
